// What load sends, and what it must add up to.
//
// loadgen.go owns the made-up events, the replay of a file, the latency histogram, the freshness probe and the
// comparison of the metrics endpoint with an independent count of what was accepted.

package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"math"
	"math/bits"
	"math/rand/v2"
	"net/http"
	"net/url"
	"os"
	"slices"
	"sort"
	"strconv"
	"time"
)

// expectation is one question to the metrics endpoint and its right answer.
type expectation struct {
	event    string
	from, to int64
	count    int64
	users    int64
	hours    map[string]int64
	channels map[string]int64 // nil = not asked
}

// generator makes events that are distinct by construction: event n has user n mod users, channel and second from
// what is left of n, and with -insert-ids n itself. The seconds end at the start of the run, so none is in the future.
type generator struct {
	cfg  *loadConfig
	base int64 // second of event 0
	next int64
	dups int64      // events handed out a second time or more
	seen []uint64   // a bit for each accepted event
	rng  *rand.Rand // which events are repeated
}

var loadChannels = [...]string{"web", "mobile_app", "api"}

// sameButInsertID is how many events differ in nothing but their insert_id, with -insert-ids.
const sameButInsertID = 10

// flatOutRate is what base allows for when no rate is given, events a second.
const flatOutRate = 500_000

func newGenerator(cfg *loadConfig) *generator {
	rate := cfg.rate
	if rate == 0 {
		rate = flatOutRate
	}
	return &generator{cfg: cfg, rng: rand.New(rand.NewPCG(cfg.seed, 0)), base: time.Now().Unix() - int64(rate*cfg.duration.Seconds()/float64(cfg.perSecond())) - 2}
}

func (g *generator) append(body []byte, tickets []int64, separator byte) ([]byte, []int64, bool) {
	n := g.next
	if g.cfg.dup > 0 && n > 0 && g.rng.Float64() < g.cfg.dup {
		n = g.rng.Int64N(n)
		g.dups++
	} else {
		g.next++
	}
	if len(tickets) > 0 {
		body = append(body, separator)
	}
	return g.appendEvent(body, n), append(tickets, n), true
}

func (g *generator) second(n int64) int64 { return g.base + n/int64(g.cfg.perSecond()) }

func (g *generator) channel(n int64) string {
	return loadChannels[n/int64(g.cfg.users)%int64(len(loadChannels))]
}

func (g *generator) appendEvent(b []byte, n int64) []byte {
	users := int64(g.cfg.users)
	b = append(b, `{"event_name":"`...)
	b = append(b, g.cfg.event...)
	b = append(b, `","channel":"`...)
	b = append(b, g.channel(n)...)
	b = append(b, `","campaign_id":"cmp_`...)
	b = strconv.AppendInt(b, n%50, 10)
	b = append(b, `","user_id":"user_`...)
	b = strconv.AppendInt(b, n%users, 10)
	b = append(b, `","timestamp":`...)
	b = strconv.AppendInt(b, g.second(n), 10)
	if g.cfg.insertIDs {
		b = append(b, `,"insert_id":"`...)
		b = strconv.AppendInt(b, n, 10)
		b = append(b, '"')
	}
	b = append(b, `,"tags":["electronics","homepage"],"metadata":{"product_id":"prod-`...)
	b = strconv.AppendInt(b, n%1000, 10)
	b = append(b, `","price":`...)
	b = strconv.AppendInt(b, 10+n%490, 10)
	return append(b, `.99,"currency":"TRY","referrer":"google"}}`...)
}

func (g *generator) accepted(n int64) {
	for int64(len(g.seen)) <= n/64 {
		g.seen = append(g.seen, make([]uint64, 1024)...)
	}
	g.seen[n/64] |= 1 << (n % 64)
}

func (g *generator) where(n int64) string { return fmt.Sprintf("event %d", n) }

func (g *generator) expected() []expectation {
	e := expectation{event: g.cfg.event, from: g.base - 1, to: time.Now().Unix() + 1, hours: map[string]int64{}, channels: map[string]int64{}}
	users := make([]bool, g.cfg.users)
	for w, word := range g.seen {
		for ; word != 0; word &= word - 1 {
			n := int64(w*64 + bits.TrailingZeros64(word))
			e.count++
			users[n%int64(g.cfg.users)] = true
			e.hours[hourKey(g.second(n))]++
			e.channels[g.channel(n)]++
		}
	}
	for _, u := range users {
		if u {
			e.users++
		}
	}
	return []expectation{e}
}

func hourKey(second int64) string {
	return time.Unix(second, 0).UTC().Truncate(time.Hour).Format(time.RFC3339)
}

// replay sends the lines of a file and counts, per event_name, what the accepted ones add up to.
type replay struct {
	lines  *bufio.Scanner
	file   *os.File
	line   int64
	flight map[int64][]byte // lines without an outcome
	names  map[string]*replayed
}

type replayed struct {
	ids      map[eventID]struct{}
	users    map[string]struct{}
	hours    map[string]int64
	from, to int64
}

func openReplay(path string) (*replay, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	r := &replay{lines: bufio.NewScanner(f), file: f, flight: map[int64][]byte{}, names: map[string]*replayed{}}
	r.lines.Buffer(nil, maxSingleBody+1)
	return r, nil
}

func (r *replay) append(body []byte, tickets []int64, separator byte) ([]byte, []int64, bool) {
	for r.lines.Scan() {
		r.line++
		line := r.lines.Bytes()
		if len(line) == 0 {
			continue
		}
		if len(tickets) > 0 {
			body = append(body, separator)
		}
		r.flight[r.line] = append([]byte(nil), line...)
		return append(body, line...), append(tickets, r.line), true
	}
	if err := r.lines.Err(); err != nil {
		fmt.Fprintf(os.Stderr, "load: line %d: %v\n", r.line+1, err)
	}
	r.file.Close()
	return body, tickets, false
}

func (r *replay) where(line int64) string { return fmt.Sprintf("line %d", line) }

// accepted reads the line with encoding/json: an independent count does not share the parser that it checks.
func (r *replay) accepted(line int64) {
	var e struct {
		EventName string `json:"event_name"`
		UserID    string `json:"user_id"`
		Channel   string `json:"channel"`
		Timestamp int64  `json:"timestamp"`
		InsertID  string `json:"insert_id"`
	}
	if json.Unmarshal(r.flight[line], &e) != nil {
		return
	}
	delete(r.flight, line)
	s := r.names[e.EventName]
	if s == nil {
		s = &replayed{ids: map[eventID]struct{}{}, users: map[string]struct{}{}, hours: map[string]int64{}, from: math.MaxInt64}
		r.names[e.EventName] = s
	}
	id, _ := (&event{name: []byte(e.EventName), userID: []byte(e.UserID), channel: []byte(e.Channel), timestamp: e.Timestamp, insertID: []byte(e.InsertID)}).id(nil)
	if _, dup := s.ids[id]; dup {
		return
	}
	s.ids[id] = struct{}{}
	s.users[e.UserID] = struct{}{}
	s.hours[hourKey(e.Timestamp)]++
	s.from, s.to = min(s.from, e.Timestamp), max(s.to, e.Timestamp)
}

func (r *replay) expected() (list []expectation) {
	for name, s := range r.names {
		list = append(list, expectation{event: name, from: s.from, to: s.to + 1, count: int64(len(s.ids)), users: int64(len(s.users)), hours: s.hours})
	}
	sort.Slice(list, func(i, j int) bool { return list[i].event < list[j].event })
	return list
}

// metricsAnswer is the metrics endpoint's answer as a client sees it.
type metricsAnswer struct {
	Total  int64 `json:"total_count"`
	Users  int64 `json:"unique_users"`
	Groups []struct {
		Key   string `json:"key"`
		Total int64  `json:"total_count"`
	} `json:"grouped_data"`
}

func (l *loader) askMetrics(ctx context.Context, event string, from, to int64, groupBy string) (a metricsAnswer, err error) {
	v := url.Values{"event_name": {event}, "from": {strconv.FormatInt(from, 10)}, "to": {strconv.FormatInt(to, 10)}}
	if groupBy != "" {
		v.Set("group_by", groupBy)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, l.cfg.url+"/api/v1/metrics?"+v.Encode(), nil)
	if err != nil {
		return a, err
	}
	l.authorize(req)
	resp, err := l.client.Do(req)
	if err != nil {
		return a, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return a, fmt.Errorf("metrics answers %s", resp.Status)
	}
	return a, json.NewDecoder(resp.Body).Decode(&a)
}

const (
	probeInterval = 250 * time.Millisecond
	probePoll     = 5 * time.Millisecond // the resolution of the freshness figures
)

// probe measures freshness until ctx is done: it sends one event and asks until a metrics query counts it.
func (l *loader) probe(ctx context.Context) {
	name := l.cfg.event + "_probe"
	from := time.Now().Unix() - 1
	for n := int64(1); sleepUntil(ctx, time.Now().Add(probeInterval)); n++ {
		body := fmt.Appendf(nil, `{"event_name":%q,"user_id":"probe_%d","timestamp":%d}`, name, n, time.Now().Unix())
		if status, _, _, err := l.exchange("/api/v1/events", typeJSON, body); err != nil || status != http.StatusAccepted {
			n--
			continue
		}
		acked := time.Now()
		for {
			a, err := l.askMetrics(ctx, name, from, time.Now().Unix()+1, "")
			if err == nil && a.Total >= n {
				l.mu.Lock()
				l.freshness.add(time.Since(acked))
				l.mu.Unlock()
				break
			}
			if !sleepUntil(ctx, time.Now().Add(probePoll)) {
				return
			}
		}
	}
}

// loadCheck is one compared figure.
type loadCheck struct {
	What string `json:"what"`
	Want int64  `json:"want"`
	Got  int64  `json:"got"`
	OK   bool   `json:"ok"`
}

// verify asks the metrics endpoint until it agrees with what was accepted, or the time is up.
func (l *loader) verify(stderr io.Writer) (checks []loadCheck) {
	deadline := time.Now().Add(l.cfg.verifyWait)
	ctx, cancel := context.WithDeadline(context.Background(), deadline.Add(10*time.Second))
	defer cancel()
	for _, e := range l.src.expected() {
		for {
			a, err := l.askMetrics(ctx, e.event, e.from, e.to, "hour")
			done := err == nil && a.Total == e.count
			if !done && time.Now().Before(deadline) {
				time.Sleep(100 * time.Millisecond)
				continue
			}
			if err != nil {
				fmt.Fprintln(stderr, "load: verify:", err)
			}
			checks = append(checks, compare(e, a)...)
			if e.channels != nil {
				byChannel, _ := l.askMetrics(ctx, e.event, e.from, e.to, "channel") // no answer is a difference
				checks = append(checks, compareGroups(e.event+" channels", e.channels, byChannel))
			}
			break
		}
	}
	return checks
}

// exactUsers is up to how many users the endpoint counts exactly.
const exactUsers = 4000

func compare(e expectation, a metricsAnswer) []loadCheck {
	// Beyond exactUsers the endpoint may estimate within 1 %.
	near := a.Users == e.users || e.users > exactUsers && math.Abs(float64(a.Users-e.users)) <= 0.01*float64(e.users)
	return []loadCheck{
		{e.event + " total_count", e.count, a.Total, a.Total == e.count},
		{e.event + " unique_users", e.users, a.Users, near},
		compareGroups(e.event+" hours", e.hours, a),
	}
}

// compareGroups counts the groups that are right; all have to be, and no other may be there.
func compareGroups(what string, want map[string]int64, a metricsAnswer) loadCheck {
	right := int64(0)
	for _, g := range a.Groups {
		if n, is := want[g.Key]; is && n == g.Total {
			right++
		}
	}
	return loadCheck{what, int64(len(want)), right, right == int64(len(want)) && len(a.Groups) == len(want)}
}

// report prints what happened and returns the exit code.
func (l *loader) report(w io.Writer, checks []loadCheck) int {
	code, refused := 0, 0
	for _, n := range l.refused {
		refused += n
	}
	if l.unknown.Load() > 0 || l.ok.Load() == 0 || refused > 0 && l.cfg.file == "" {
		code = 1
	}
	for _, c := range checks {
		if !c.OK {
			code = 1
		}
	}
	ms := func(h *histogram, q float64) float64 { return float64(h.quantile(q).Microseconds()) / 1000 }
	rate := float64(l.ok.Load()) / l.took.Seconds()
	dups := int64(0)
	if g, ok := l.src.(*generator); ok {
		dups = g.dups
	}
	if l.cfg.json {
		json.NewEncoder(w).Encode(map[string]any{
			"event": l.cfg.event, "seconds": l.took.Seconds(), "sent": l.sent.Load(), "accepted": l.ok.Load(), "refused": l.refused,
			"unsent": l.unsent, "duplicates": dups, "unknown": l.unknown.Load(), "no_answer": l.noAnswer, "retries": l.retried.Load(), "rate": rate,
			"latency_ms":   map[string]float64{"p50": ms(l.latency, .5), "p90": ms(l.latency, .9), "p99": ms(l.latency, .99), "p99.9": ms(l.latency, .999), "max": ms(l.latency, 1)},
			"freshness_ms": map[string]float64{"samples": float64(l.freshness.n), "p50": ms(l.freshness, .5), "p99": ms(l.freshness, .99), "max": ms(l.freshness, 1)},
			"checks":       checks,
		})
		return code
	}
	fmt.Fprintf(w, "sent       %d events in %.1f s, %d of them repeats\nunsent     %d (due, but all connections were busy)\naccepted   %d (%.0f/s)\nrefused    %d\nunknown    %d (no answer after %d retries)\nretries    %d\n",
		l.sent.Load(), l.took.Seconds(), dups, l.unsent, l.ok.Load(), rate, refused, l.unknown.Load(), l.cfg.retries, l.retried.Load())
	for _, c := range slices.Sorted(maps.Keys(l.refused)) {
		fmt.Fprintf(w, "           %d × %s\n", l.refused[c], c)
	}
	for _, e := range l.examples {
		fmt.Fprintf(w, "           %s\n", e)
	}
	for _, why := range slices.Sorted(maps.Keys(l.noAnswer)) {
		fmt.Fprintf(w, "           %d without an answer: %s\n", l.noAnswer[why], why)
	}
	fmt.Fprintf(w, "latency    p50 %.1f ms  p90 %.1f  p99 %.1f  p99.9 %.1f  max %.1f, from the intended time, a request\n",
		ms(l.latency, .5), ms(l.latency, .9), ms(l.latency, .99), ms(l.latency, .999), ms(l.latency, 1))
	if l.freshness.n > 0 {
		fmt.Fprintf(w, "freshness  p50 %.0f ms  p99 %.0f  max %.0f, 202 to queryable, %d samples, to %s\n", ms(l.freshness, .5), ms(l.freshness, .99), ms(l.freshness, 1), l.freshness.n, probePoll)
	}
	for _, c := range checks {
		verdict := "ok"
		if !c.OK {
			verdict = "DIFFERENT"
		}
		fmt.Fprintf(w, "%-9s  %s: accepted %d, metrics %d\n", verdict, c.What, c.Want, c.Got)
	}
	return code
}
