// What the run must add up to, and what it did.
//
// verify.go owns the freshness probe, the comparison of the metrics endpoint with an independent count of what was
// accepted, and the report.

package load

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"math"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"time"
)

// MetricsAnswer is the metrics endpoint's answer as a client sees it. Through is a Unix second, 0 for null.
type MetricsAnswer struct {
	Total   int64 `json:"total_count"`
	Users   int64 `json:"unique_users"`
	Through int64 `json:"complete_through"`
	Groups  []struct {
		Key   string `json:"key"`
		Total int64  `json:"total_count"`
	} `json:"grouped_data"`
}

func (l *Loader) askMetrics(ctx context.Context, event string, from, to int64, groupBy string) (a MetricsAnswer, err error) {
	v := url.Values{"event_name": {event}, "from": {strconv.FormatInt(from, 10)}, "to": {strconv.FormatInt(to, 10)}}
	if groupBy != "" {
		v.Set("group_by", groupBy)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, l.Config.URL+"/api/v1/metrics?"+v.Encode(), nil)
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
func (l *Loader) probe(ctx context.Context) {
	name := l.Config.Event + "_probe"
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

// Check is one compared figure.
type Check struct {
	What string `json:"what"`
	Want int64  `json:"want"`
	Got  int64  `json:"got"`
	OK   bool   `json:"ok"`
}

// Verify asks the metrics endpoint until it agrees with what was accepted, and has all of it, or the time is up. Before that a right
// count may be one of which something is missing and something is there twice, or is about to be.
func (l *Loader) Verify(stderr io.Writer) (checks []Check) {
	deadline := time.Now().Add(l.Config.verifyWait)
	ctx, cancel := context.WithDeadline(context.Background(), deadline.Add(10*time.Second))
	defer cancel()
	ended := l.start.Add(l.Took).Unix()
	for _, e := range l.src.expected() {
		for {
			a, err := l.askMetrics(ctx, e.event, e.from, e.to, "hour")
			done := err == nil && a.Total == e.count && a.Through >= ended
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

// exactUsers is the number of users up to which the endpoint counts exactly.
const exactUsers = 4000

func compare(e expectation, a MetricsAnswer) []Check {
	// Beyond exactUsers the endpoint may estimate within 1 %.
	near := a.Users == e.users || e.users > exactUsers && math.Abs(float64(a.Users-e.users)) <= 0.01*float64(e.users)
	return []Check{
		{e.event + " total_count", e.count, a.Total, a.Total == e.count},
		{e.event + " unique_users", e.users, a.Users, near},
		compareGroups(e.event+" hours", e.hours, a),
	}
}

// compareGroups counts the groups that are right: all have to be, and there may be no others.
func compareGroups(what string, want map[string]int64, a MetricsAnswer) Check {
	right := int64(0)
	for _, g := range a.Groups {
		if n, is := want[g.Key]; is && n == g.Total {
			right++
		}
	}
	return Check{what, int64(len(want)), right, right == int64(len(want)) && len(a.Groups) == len(want)}
}

// Report prints what happened and returns the exit code.
func (l *Loader) Report(w io.Writer, checks []Check) int {
	code, refused := 0, 0
	for _, n := range l.Refused {
		refused += n
	}
	if l.Unknown.Load() > 0 || l.OK.Load() == 0 || refused > 0 {
		code = 1
	}
	for _, c := range checks {
		if !c.OK {
			code = 1
		}
	}
	ms := func(h *histogram, q float64) float64 { return float64(h.quantile(q).Microseconds()) / 1000 }
	rate := float64(l.OK.Load()) / l.Took.Seconds()
	dups := int64(0)
	if g, ok := l.src.(*Generator); ok {
		dups = g.dups
	}
	if l.Config.json {
		json.NewEncoder(w).Encode(map[string]any{
			"event": l.Config.Event, "seconds": l.Took.Seconds(), "sent": l.sent.Load(), "accepted": l.OK.Load(), "refused": l.Refused,
			"unsent": l.unsent, "duplicates": dups, "unknown": l.Unknown.Load(), "no_answer": l.noAnswer, "retries": l.Retried.Load(), "rate": rate,
			"latency_ms":   map[string]float64{"p50": ms(l.latency, .5), "p90": ms(l.latency, .9), "p99": ms(l.latency, .99), "p99.9": ms(l.latency, .999), "max": ms(l.latency, 1)},
			"freshness_ms": map[string]float64{"samples": float64(l.freshness.n), "p50": ms(l.freshness, .5), "p99": ms(l.freshness, .99), "max": ms(l.freshness, 1)},
			"checks":       checks,
		})
		return code
	}
	fmt.Fprintf(w, "sent       %d events in %.1f s, %d of them repeats\nunsent     %d (due, but all connections were busy)\naccepted   %d (%.0f/s)\nrefused    %d\nunknown    %d (no answer after %d retries)\nretries    %d\n",
		l.sent.Load(), l.Took.Seconds(), dups, l.unsent, l.OK.Load(), rate, refused, l.Unknown.Load(), l.Config.retries, l.Retried.Load())
	for _, c := range slices.Sorted(maps.Keys(l.Refused)) {
		fmt.Fprintf(w, "           %d × %s\n", l.Refused[c], c)
	}
	for _, e := range l.examples {
		fmt.Fprintf(w, "           %s\n", e)
	}
	for _, why := range slices.Sorted(maps.Keys(l.noAnswer)) {
		fmt.Fprintf(w, "           %d without an answer: %s\n", l.noAnswer[why], why)
	}
	fmt.Fprintf(w, "latency    p50 %.1f ms  p90 %.1f  p99 %.1f\n           p99.9 %.1f  max %.1f, from the intended time\n",
		ms(l.latency, .5), ms(l.latency, .9), ms(l.latency, .99), ms(l.latency, .999), ms(l.latency, 1))
	if l.freshness.n > 0 {
		fmt.Fprintf(w, "freshness  p50 %.0f ms  p99 %.0f  max %.0f,\n           202 to queryable, %d samples, to %s\n", ms(l.freshness, .5), ms(l.freshness, .99), ms(l.freshness, 1), l.freshness.n, probePoll)
	}
	for _, c := range checks {
		verdict := "ok"
		if !c.OK {
			verdict = "DIFFERENT"
		}
		fmt.Fprintf(w, "%-9s  %s: %d\n", verdict, c.What, c.Got)
		if c.Got != c.Want {
			fmt.Fprintf(w, "           accepted were %d\n", c.Want)
		}
	}
	return code
}
