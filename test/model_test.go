// A model-based test: random sequences of what can happen, against a map that remembers what was acknowledged.

package test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/event-ingestion/event-ingestion/internal/testkit"
)

// modelEvent is what makes an event the same event.
type modelEvent struct {
	name, user, channel string
	timestamp           int64
	insertID            string
}

// line is the event as it is sent.
func (ev modelEvent) line() []byte {
	b, _ := json.Marshal(map[string]any{"event_name": ev.name, "user_id": ev.user, "channel": ev.channel, "timestamp": ev.timestamp, "insert_id": ev.insertID})
	return b
}

// model is the truth: the set of events that were acknowledged, and who may be asked.
type model struct {
	t         *testing.T
	env       []string
	rnd       *rand.Rand
	instances []*program
	now       int64 // the newest timestamp that is sent
	serial    int
	acked     map[modelEvent]struct{}
	order     []modelEvent // of acked, for choosing
	log       []string     // steps so far
}

// TestModel takes random steps: new, repeated and late events, kills, instances that come and go, stores that die, answers
// that are lost, reconciling. After every few of them the metrics endpoint, the raw table and the aggregate have to say
// what the map says. MODEL_SEED repeats a run as far as timing allows.
func TestModel(t *testing.T) {
	alone(t)
	seed := uint64(time.Now().UnixNano())
	if s, err := strconv.ParseUint(os.Getenv("MODEL_SEED"), 10, 64); err == nil {
		seed = s
	}
	t.Logf("MODEL_SEED=%d", seed)
	m := &model{t: t, env: faultSpace(t), rnd: rand.New(rand.NewPCG(seed, 0)), acked: map[modelEvent]struct{}{}, now: time.Now().Unix()}
	m.instances = []*program{startProgram(t, m.env)}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("steps: %s", strings.Join(m.log, ", "))
		}
	})
	steps := []struct {
		name   string
		weight int
		take   func()
	}{
		{"new", 6, func() { m.send(m.newEvents(1 + m.rnd.IntN(400))) }},
		{"again", 5, func() { m.send(m.oldEvents(1 + m.rnd.IntN(400))) }},
		{"late", 3, func() { m.send(m.lateEvents(1 + m.rnd.IntN(200))) }},
		{"kill", 2, func() { m.while(m.kill) }},
		{"join", 2, func() { m.while(m.join) }},
		{"leave", 2, func() { m.while(m.leave) }},
		{"kill ClickHouse", 1, func() { m.while(func() { control(t, "/clickhouse/kill") }) }},
		{"cut Kafka", 2, func() {
			if !isCluster() {
				m.while(func() { control(t, "/kafka/cut") })
			}
		}},
		{"reconcile", 1, m.reconcile},
	}
	total := 0
	for _, s := range steps {
		total += s.weight
	}
	for range 5 * testkit.TortureFactor() {
		for range 8 {
			n := m.rnd.IntN(total)
			for _, s := range steps {
				if n -= s.weight; n < 0 {
					m.log = append(m.log, s.name)
					s.take()
					break
				}
			}
		}
		m.check()
	}
}

func (m *model) newEvents(n int) []modelEvent {
	events := make([]modelEvent, n)
	for i := range events {
		m.serial++
		events[i] = modelEvent{m.name(), fmt.Sprint("u", m.serial%97), []string{"", "web", "mobile_app", "api"}[m.rnd.IntN(4)], m.now - int64(m.rnd.IntN(7200)), ""}
		if i > 0 && m.rnd.IntN(3) == 0 { // differs from the one before in nothing but its insert_id
			events[i] = events[i-1]
			events[i].insertID = []string{fmt.Sprint(m.serial), fmt.Sprint(`\`, m.serial), fmt.Sprint("|", m.serial), fmt.Sprint(`\|`, m.serial)}[m.rnd.IntN(4)]
		}
	}
	return events
}

// lateEvents are new ones of any hour that is still accepted.
func (m *model) lateEvents(n int) []modelEvent {
	events := m.newEvents(n)
	for i := range events {
		events[i].timestamp -= m.rnd.Int64N(29 * 86400)
	}
	return events
}

func (m *model) oldEvents(n int) []modelEvent {
	if len(m.order) == 0 {
		return m.newEvents(n)
	}
	events := make([]modelEvent, n)
	for i := range events {
		events[i] = m.order[m.rnd.IntN(len(m.order))]
	}
	return events
}

func (m *model) name() string { return []string{"view", "click", `odd|\name`}[m.rnd.IntN(3)] }

func (m *model) any() *program { return m.instances[m.rnd.IntN(len(m.instances))] }

// send posts the events as a bulk until each was acknowledged, as a client does that got no answer.
func (m *model) send(events []modelEvent) {
	var body bytes.Buffer
	for _, ev := range events {
		body.Write(append(ev.line(), '\n'))
	}
	to := m.any()
	for deadline := time.Now().Add(40 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		resp, err := http.Post(to.url+bulkPath, ndjson, bytes.NewReader(body.Bytes()))
		if err == nil {
			answer, _ := io.ReadAll(resp.Body)
			resp.Body.Close()
			if resp.StatusCode == http.StatusAccepted {
				break
			}
			if resp.StatusCode == http.StatusBadRequest {
				m.t.Fatalf("refused: %s", answer)
			}
		}
		if time.Now().After(deadline) {
			m.t.Fatalf("not accepted within 40s; last error %v", err)
		}
	}
	for _, ev := range events {
		if _, known := m.acked[ev]; !known {
			m.acked[ev] = struct{}{}
			m.order = append(m.order, ev)
		}
	}
}

// while runs the fault with a client at work on each side of it. The model itself is single-threaded: what is sent
// meanwhile is chosen before and noted afterwards.
func (m *model) while(fault func()) {
	events := append(m.newEvents(100), m.oldEvents(100)...)
	var sending sync.WaitGroup
	var ids [4][]modelEvent
	url := m.instances[0].url // this one is never taken away for good
	for i := range ids {
		ids[i] = events[i*50 : (i+1)*50]
		sending.Go(func() {
			for _, ev := range ids[i] {
				if resp, err := http.Post(url+onePath, jsonCT, bytes.NewReader(ev.line())); err == nil {
					resp.Body.Close()
				}
			}
		})
	}
	time.Sleep(time.Duration(m.rnd.IntN(30)) * time.Millisecond) // any moment
	fault()
	sending.Wait()
	m.send(events) // once more, now until acknowledged
}

func (m *model) kill() {
	i := m.rnd.IntN(len(m.instances))
	m.instances[i] = m.instances[i].killAndRestart()
}

func (m *model) join() {
	if len(m.instances) < 3 {
		m.instances = append(m.instances, startProgram(m.t, m.env))
	}
}

func (m *model) leave() {
	if last := len(m.instances) - 1; last > 0 {
		m.instances[last].terminate()
		m.instances = m.instances[:last]
	}
}

func (m *model) reconcile() {
	if _, code := subcommand(m.t, m.env, "reconcile"); code != 0 {
		m.log = append(m.log, "(not possible now)") // ClickHouse may be on its way back
	}
}

// check waits until everything is stored, and compares random questions, and the raw table row by row.
func (m *model) check() {
	m.t.Helper()
	control(m.t, "/clickhouse/start")
	p := m.any()
	drained(p)
	db := space(m.env, "CLICKHOUSE_DATABASE")
	for range 12 {
		q := m.question()
		want := m.answer(q)
		var got, why string
		for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(50 * time.Millisecond) { // a torn hour is mended a moment later
			status, _, answer := p.do("GET", q.path(), "", "", nil)
			got, why = q.read(answer), answer
			if status == http.StatusOK && got == want {
				break
			}
			if time.Now().After(deadline) {
				m.t.Fatalf("%s: got %s, want %s (%s)", q.path(), got, want, why)
			}
		}
	}
	if got, want := clickhouseQuery(m.t, "SELECT uniqExact(event_id) FROM "+db+".events"), fmt.Sprint(len(m.acked)); got != want {
		m.t.Fatalf("events has %s distinct events, acknowledged were %s", got, want)
	}
	if got, want := clickhouseQuery(m.t, "SELECT sum(event_count) FROM "+db+".events_hourly"), fmt.Sprint(len(m.acked)); got != want {
		m.t.Fatalf("events_hourly has %s, acknowledged were %s", got, want)
	}
}

// question is one call of the metrics endpoint.
type question struct {
	name, channel, groupBy string
	from, to               int64
}

func (m *model) question() question {
	q := question{name: m.name(), from: m.now - m.rnd.Int64N(30*86400), to: m.now}
	if m.rnd.IntN(2) == 0 {
		q.to = q.from + 1 + m.rnd.Int64N(max(m.now-q.from, 1))
	}
	q.channel = []string{"", "web", "api"}[m.rnd.IntN(3)]
	q.groupBy = []string{"", "channel", "hour", "day"}[m.rnd.IntN(4)]
	return q
}

func (q question) path() string {
	return fmt.Sprintf("%sevent_name=%s&from=%d&to=%d&channel=%s&group_by=%s", metricsPath,
		url.QueryEscape(q.name), q.from, q.to, q.channel, q.groupBy)
}

// answer is what the model says, in read's form.
func (m *model) answer(q question) string {
	type tally struct {
		count int
		users map[string]struct{}
	}
	groups := map[string]*tally{}
	add := func(key string, ev modelEvent) {
		if groups[key] == nil {
			groups[key] = &tally{users: map[string]struct{}{}}
		}
		groups[key].count++
		groups[key].users[ev.user] = struct{}{}
	}
	for ev := range m.acked {
		if ev.name != q.name || ev.timestamp < q.from || ev.timestamp > q.to || q.channel != "" && ev.channel != q.channel {
			continue
		}
		add("total", ev)
		switch at := time.Unix(ev.timestamp, 0).UTC(); q.groupBy {
		case "channel":
			add("key "+ev.channel, ev)
		case "hour":
			add("key "+at.Truncate(time.Hour).Format(time.RFC3339), ev)
		case "day":
			add("key "+at.Truncate(24*time.Hour).Format(time.RFC3339), ev)
		}
	}
	if groups["total"] == nil {
		groups["total"] = &tally{}
	}
	var lines []string
	for key, g := range groups {
		lines = append(lines, fmt.Sprintf("%s: %d of %d", key, g.count, len(g.users)))
	}
	slices.Sort(lines)
	return strings.Join(lines, "; ")
}

func (q question) read(answer string) string {
	var a struct {
		Total  int `json:"total_count"`
		Users  int `json:"unique_users"`
		Groups []struct {
			Key   string `json:"key"`
			Total int    `json:"total_count"`
			Users int    `json:"unique_users"`
		} `json:"grouped_data"`
	}
	if err := json.Unmarshal([]byte(answer), &a); err != nil {
		return answer
	}
	lines := []string{fmt.Sprintf("total: %d of %d", a.Total, a.Users)}
	for _, g := range a.Groups {
		lines = append(lines, fmt.Sprintf("key %s: %d of %d", g.Key, g.Total, g.Users))
	}
	slices.Sort(lines)
	return strings.Join(lines, "; ")
}
