// The loads of tests, and what has to hold behind them: what sends while something dies, what is asked meanwhile, and the counts
// that have to agree.

package test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/event-ingestion/event-ingestion/internal/testkit"

	"github.com/event-ingestion/event-ingestion/load"
)

const (
	onePath     = "/api/v1/events"
	bulkPath    = "/api/v1/events/bulk"
	metricsPath = "/api/v1/metrics?"
	jsonCT      = "application/json"
	ndjson      = "application/x-ndjson"
	good        = `"event_name":"e","user_id":"u","timestamp":$NOW`

	hourSeconds, daySeconds = 3600, 86400
	// lookInterval is how often an instance looks how far everything is stored: complete_through moves no faster.
	lookInterval = 250 * time.Millisecond
)

// loads counts the loads of tests: every other one sends insert_ids.
var loads atomic.Int32

// loadInto sends made-up events to url and returns the loader for its counts. It runs in the background until done.
func loadInto(tb testing.TB, url string, rate float64, d time.Duration, more ...string) (l *load.Loader, done func()) {
	tb.Helper()
	rate *= float64(min(testkit.TortureFactor(), 3)) // where there is time, more is in flight when something dies
	args := []string{"-url", url, "-rate", fmt.Sprint(rate), "-duration", d.String(), "-bulk", "50", "-connections", "16", "-users", "500", "-retries", "100"}
	t, isTest := tb.(*testing.T)
	if isTest { // a benchmark measures without
		args = append(args, "-dup", "0.1", fmt.Sprintf("-insert-ids=%t", loads.Add(1)%2 == 0))
	}
	args = append(args, more...)
	cfg, err := load.Parse(args, io.Discard)
	if err != nil {
		tb.Fatal(err)
	}
	cfg.Event = fmt.Sprintf("%s_%d", cfg.Event, time.Now().UnixNano())
	if l, err = load.New(cfg); err != nil {
		tb.Fatal(err)
	}
	finished := make(chan struct{})
	go func() { // ends after d, or l.Stop
		defer close(finished)
		l.Send(context.Background(), io.Discard)
	}()
	if isTest {
		var watching sync.WaitGroup
		watching.Go(func() { mustBeHonest(t, l, url, finished) }) // ends with the load
		t.Cleanup(watching.Wait)
	}
	tb.Cleanup(l.Stop)
	return l, func() { <-finished }
}

// mustBeHonest fails the test when complete_through says that something is counted which is not, or groups that are not what the
// total is, at any time until done.
func mustBeHonest(t *testing.T, l *load.Loader, url string, done <-chan struct{}) {
	type note struct{ second, acknowledged int64 }
	var notes []note
	var a load.MetricsAnswer
	tick := time.NewTicker(lookInterval) // a query is 20 ms of CPU
	defer tick.Stop()
	for n := 0; ; n++ {
		select {
		case <-done:
			return
		case <-tick.C:
		}
		acknowledged := l.Distinct()
		notes = append(notes, note{time.Now().Unix(), acknowledged})
		resp, err := http.Get(fmt.Sprintf("%s%sevent_name=%s&from=1&to=%d&group_by=%s", url, metricsPath, l.Config.Event, time.Now().Unix()+100,
			[]string{"", "hour", "campaign", "day", "channel"}[n%5]))
		if err != nil {
			continue // the fault
		}
		a.Through, a.Groups = 0, nil
		answered := resp.StatusCode == http.StatusOK && json.NewDecoder(resp.Body).Decode(&a) == nil
		resp.Body.Close()
		sum := int64(0)
		for _, g := range a.Groups {
			sum += g.Total
		}
		if answered && n%5 > 0 && sum != a.Total {
			t.Errorf("%d are counted in all, %d in the groups of question %d", a.Total, sum, n%5)
		}
		for answered && len(notes) > 0 && notes[0].second <= a.Through {
			if a.Total < notes[0].acknowledged {
				t.Errorf("complete through %d, and %d of the %d events acknowledged then are counted", a.Through, a.Total, notes[0].acknowledged)
			}
			notes = notes[1:]
		}
	}
}

// mustAgree fails the test unless the metrics endpoint counts exactly what the loader had accepted.
func mustAgree(t testing.TB, l *load.Loader, url string) {
	t.Helper()
	l.Config.URL = url
	var out bytes.Buffer
	if code := l.Report(&out, l.Verify(&out)); code != 0 {
		t.Fatalf("counts differ:\n%s", &out)
	}
	if l.OK.Load() == 0 {
		t.Fatal("nothing was accepted")
	}
}

// mustHold fails the test unless every event that the loader had accepted is counted once: by the endpoint, in the raw
// table, where merges are stopped, in the aggregate, and by `audit`. What complete_through says is believed: nothing is
// waited for once it has passed.
func mustHold(p *program, l *load.Loader) {
	t := p.t
	t.Helper()
	drained(p)
	mustCount(t, p.env, l.Config.Event, l.Distinct())
	mustAgree(t, l, p.url)
	var a struct {
		Stored, Difference int64
		Rows               int64 `json:"distinct_rows"`
		Aggregated         int64
	}
	out, code := subcommand(t, p.env, "audit -json")
	if err := json.Unmarshal([]byte(out), &a); code != 0 || err != nil || a.Difference != 0 || a.Rows != a.Aggregated || a.Stored == 0 {
		t.Fatalf("the ledger does not balance: %d %s", code, out)
	}
}

// mustCount fails the test unless both tables have so many events of the name, each once, over all servers.
func mustCount(t testing.TB, env []string, name string, want int64) {
	t.Helper()
	table := func(table string) string {
		if cluster := space(env, "CLICKHOUSE_CLUSTER"); cluster != "" {
			return fmt.Sprintf("cluster('%s', %s, %s)", cluster, space(env, "CLICKHOUSE_DATABASE"), table)
		}
		return space(env, "CLICKHOUSE_DATABASE") + "." + table
	}
	got := clickhouseQuery(t, fmt.Sprintf("SELECT count(), uniqExact(event_id), (SELECT sum(event_count) FROM %[1]s WHERE event_name = '%[3]s') FROM %[2]s WHERE event_name = '%[3]s'",
		table("events_hourly"), table("events"), name))
	if got != fmt.Sprintf("%[1]d\t%[1]d\t%[1]d", want) {
		t.Fatalf("accepted %d; rows, distinct rows and the aggregate's count are %q", want, got)
	}
}

// drained returns when everything that was acknowledged before the call is stored.
func drained(p *program) {
	p.t.Helper()
	second := time.Now().Unix()
	p.await("drained", 2*time.Minute, func() bool {
		time.Sleep(lookInterval) // it moves no faster, and a query is 20 ms of CPU that those who store could use
		return completeThrough(p) >= second
	})
}

// completeThrough is what the metrics endpoint says, 0 for null.
func completeThrough(p *program) int64 {
	p.t.Helper()
	var a load.MetricsAnswer
	_, _, answer := p.do("GET", metricsPath+"event_name=x&from=1&to=2", "", "", nil)
	json.Unmarshal([]byte(answer), &a)
	return a.Through
}

// postAll sends the bodies as NDJSON over four connections, each until it was accepted.
func postAll(t *testing.T, p *program, bodies [][]byte) {
	t.Helper()
	queue := make(chan []byte)
	var clients sync.WaitGroup
	for range 4 {
		clients.Go(func() { // ends with the queue
			for body := range queue {
				for deadline := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
					resp, err := http.Post(p.url+bulkPath, ndjson, bytes.NewReader(body))
					if err == nil {
						resp.Body.Close()
					}
					if err == nil && resp.StatusCode == http.StatusAccepted {
						break
					}
					if time.Now().After(deadline) {
						t.Error("not accepted within a minute:", err, resp)
						break
					}
				}
			}
		})
	}
	for _, body := range bodies {
		queue <- body
	}
	close(queue)
	clients.Wait()
}

// numbered makes NDJSON bodies of at most each events: number i is of user u<i> and happened at at(i).
func numbered(name string, events, each int, at func(i int) int64) (bodies [][]byte) {
	for i := range events {
		if i%each == 0 {
			bodies = append(bodies, nil)
		}
		last := &bodies[len(bodies)-1]
		*last = fmt.Appendf(*last, `{"event_name":%q,"user_id":"u%d","timestamp":%d}`+"\n", name, i, at(i))
	}
	return bodies
}

// awaitCount returns when want events of that name are counted. It asks with secondKey.
func (p *program) awaitCount(name string, want int) {
	p.t.Helper()
	answer := ""
	counted := func() bool {
		_, _, answer = p.ask("GET", fmt.Sprintf("%sevent_name=%s&from=1&to=%d", metricsPath, name, time.Now().Unix()+10), nil, "X-API-Key: "+secondKey)
		return bytes.HasPrefix([]byte(answer), fmt.Appendf(nil, `{"total_count":%d,`, want))
	}
	p.await(fmt.Sprintf("counted: %d of %s", want, name), 30*time.Second, counted)
}

// httpPost sends JSON and returns the status.
func httpPost(url, body string) (int, error) {
	resp, err := http.Post(url, jsonCT, strings.NewReader(body))
	if err != nil {
		return 0, err
	}
	resp.Body.Close()
	return resp.StatusCode, nil
}

// oneClock skips a test of programs whose clock `make test-clock` cannot shift along with the others.
func oneClock(t *testing.T) {
	t.Helper()
	if os.Getenv("CLOCK_SHIFT") != "" {
		t.Skip("a browser and a Python have the machine's clock")
	}
}

// metric is what an instance's admin listener says of one.
func metric(t testing.TB, adminPort, name string) (value float64) {
	t.Helper()
	resp, err := http.Get("http://127.0.0.1:" + adminPort + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	page, _ := io.ReadAll(resp.Body)
	_, rest, _ := strings.Cut(string(page), "\n"+name+" ")
	fmt.Sscan(rest, &value)
	return value
}

// peakMemory is the most that the program has had resident, in bytes.
func peakMemory(t *testing.T, p *program) int64 {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	if err != nil {
		t.Skip("needs /proc")
	}
	for line := range strings.Lines(string(status)) {
		if rest, ok := strings.CutPrefix(line, "VmHWM:"); ok {
			kib, _ := strconv.ParseInt(strings.Fields(rest)[0], 10, 64)
			return kib << 10
		}
	}
	t.Fatal("no VmHWM")
	return 0
}

// logBuffer is what a running instance has logged so far.
type logBuffer struct {
	mu sync.Mutex // guards b
	b  bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// eventID is the identity of an event, of which the contract says how every program can compute it.
func eventID(name, user string, timestamp int64, channel string, insertID ...string) string {
	escaped := func(s string) string { return strings.NewReplacer("\\", "\\\\", "|", "\\|").Replace(s) }
	fields := []string{escaped(name), escaped(user), fmt.Sprint(timestamp), channel}
	for _, id := range insertID { // none, or one
		fields = append(fields, escaped(id))
	}
	return fmt.Sprintf("%x", sha256.Sum256([]byte(strings.Join(fields, "|"))))
}
