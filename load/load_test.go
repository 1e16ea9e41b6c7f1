// Does load say what happened? Its schedule, its events, its booking of answers, against a peer that can misbehave.

package load

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestPacer(t *testing.T) {
	start := time.Unix(1000, 0)
	p := newPacer(start, 2000, 100, time.Second) // a request every 50 ms
	for i := range 20 {
		// Every claim comes late, by ever more: the schedule must not slip.
		due, ok := p.claim(start.Add(time.Duration(i) * 49 * time.Millisecond))
		if want := start.Add(time.Duration(i) * 50 * time.Millisecond); !ok || !due.Equal(want) {
			t.Fatalf("request %d: due %s %v, want %s", i, due, ok, want)
		}
	}
	if _, ok := p.claim(start.Add(999 * time.Millisecond)); ok {
		t.Error("request 20 is due at the end, so not at all")
	}
	if n := p.unclaimed(start.Add(time.Hour)); n != 0 {
		t.Errorf("%d unclaimed, all were taken", n)
	}

	p = newPacer(start, 1000, 1, time.Second)
	p.claim(start)
	if _, ok := p.claim(start.Add(time.Second)); ok || p.unclaimed(start.Add(2*time.Second)) != 999 {
		t.Errorf("after the end: %v, %d unclaimed, want false, 999", ok, p.unclaimed(start.Add(2*time.Second)))
	}

	p = newPacer(start, 0, 1, time.Second) // flat out
	now := start.Add(time.Millisecond)
	if due, ok := p.claim(now); !ok || !due.Equal(now) || p.unclaimed(now) != 0 {
		t.Error("flat out is due now")
	}
}

func TestGeneratorDistinct(t *testing.T) {
	for _, c := range []struct {
		args     string
		n        int
		distinct func(n int64) bool
	}{
		{"-users 10 -rate 2000 -duration 30s", 50_000, func(n int64) bool { return n == 50_000 }},
		{"-users 10000 -rate 0 -duration 1s", 50_000, func(n int64) bool { return n == 50_000 }},
		{"-users 10 -rate 2000 -duration 30s -insert-ids", 50_000, func(n int64) bool { return n == 50_000 }},
		{"-users 100 -dup 0.3 -rate 2000", 50_000, func(n int64) bool { return n > 34_000 && n < 36_000 }},
	} {
		cfg, err := Parse(strings.Fields(c.args), io.Discard)
		if err != nil {
			t.Fatal(err)
		}
		g := NewGenerator(cfg)
		ids, users, hours := map[string]bool{}, map[string]bool{}, map[string]int64{}
		now := time.Now().Unix()
		for range c.n {
			body, tickets, _ := g.append(nil, nil, ',')
			g.accepted(tickets[0])
			var e peerEvent
			if err := json.Unmarshal(body, &e); err != nil {
				t.Fatal(err, string(body))
			}
			if e.Timestamp > now+1 || e.Timestamp < now-maxSpreadDays*24*60*60 {
				t.Fatalf("%s: timestamp %d s from now", c.args, e.Timestamp-now)
			}
			if !ids[e.key()] {
				ids[e.key()], users[e.UserID] = true, true
				hours[hourKey(e.Timestamp)]++
			}
		}
		want := g.expected()[0]
		if !c.distinct(int64(len(ids))) || want.count != int64(len(ids)) || want.users != int64(len(users)) || fmt.Sprint(want.hours) != fmt.Sprint(hours) {
			t.Errorf("%s: %d ids, %d users; the Generator says %d, %d", c.args, len(ids), len(users), want.count, want.users)
		}
	}
	if _, err := Parse(strings.Fields("-users 1 -rate 20000 -duration 1h"), io.Discard); err == nil {
		t.Error("events that the API must refuse as too old were accepted as a plan")
	}
}

func TestGeneratorAllocations(t *testing.T) {
	cfg, _ := Parse(nil, io.Discard)
	g := NewGenerator(cfg)
	g.accepted(1 << 16) // the growth of its bits is not a cost per event
	body, tickets := make([]byte, 0, 1<<10), make([]int64, 0, 1)
	n := testing.AllocsPerRun(1000, func() {
		body, tickets, _ = g.append(body[:0], tickets[:0], ',')
		g.accepted(tickets[0])
	})
	if n != 0 {
		t.Errorf("%g allocations an event", n)
	}
}

// report is what tools read from -json.
type report struct {
	Sent, Accepted, Unknown, Retries, Unsent, Duplicates int64
	Refused                                              map[string]int64
	Latency                                              map[string]float64 `json:"latency_ms"`
	Freshness                                            map[string]float64 `json:"freshness_ms"`
	Checks                                               []Check
}

func runLoadAgainst(t *testing.T, p *peer, args string) (code int, r report, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	code = Run(append(strings.Fields(args), "-json", "-url", newPeer(t, p)), &out, &errs)
	if err := json.Unmarshal(out.Bytes(), &r); err != nil {
		t.Fatalf("report: %v\n%s%s", err, &out, &errs)
	}
	return code, r, errs.String()
}

func TestLoadVerify(t *testing.T) {
	for _, c := range []struct {
		args string
		peer *peer
		code int
	}{
		{"-rate 2000 -bulk 50 -duration 1s -users 300 -verify -verify-timeout 5s", &peer{}, 0},
		{"-rate 2000 -bulk 50 -duration 1s -users 300 -dup 0.4 -verify -verify-timeout 5s", &peer{}, 0},
		{"-rate 2000 -bulk 50 -duration 1s -users 10 -insert-ids -dup 0.4 -verify -verify-timeout 5s", &peer{}, 0},
		{"-rate 300 -bulk 1 -connections 300 -duration 1s -verify -verify-timeout 5s", &peer{}, 0},
		{"-rate 0 -bulk 1000 -connections 2 -duration 300ms -verify -verify-timeout 5s", &peer{}, 0},
		{"-rate 2000 -bulk 50 -duration 1s -gzip -verify -verify-timeout 5s", &peer{}, 0},
		{"-rate 2000 -bulk 50 -duration 1s -verify -verify-timeout 1s", &peer{lose: true}, 1},
		{"-rate 2000 -bulk 50 -duration 300ms -verify -verify-timeout 1500ms", &peer{late: true}, 1},
		{"-rate 2000 -bulk 50 -duration 300ms", &peer{refuse: func(int, int, peerEvent) string { return "validation.required.error" }}, 1},
	} {
		code, r, stderr := runLoadAgainst(t, c.peer, c.args)
		if code != c.code || len(c.peer.broken) > 0 || r.Sent == 0 {
			t.Errorf("%s: code %d, %+v, broken %q\n%s", c.args, code, r, c.peer.broken, stderr)
		}
		if strings.Contains(c.args, "-verify -verify-timeout 5s") && c.peer.accepted > 0 {
			if len(r.Checks) != 4 || strings.Contains(c.args, "1s -") && r.Freshness["samples"] == 0 || strings.Contains(c.args, "-dup") != (r.Duplicates > 0) {
				t.Errorf("%s: checks %v, freshness %v", c.args, r.Checks, r.Freshness)
			}
		}
	}
}

func TestLoadRetries(t *testing.T) {
	args := "-rate 1000 -bulk 20 -duration 200ms -connections 16 " // one for each request: a slow machine leaves none unsent
	down := func(upTo int) func(int, http.ResponseWriter) bool {
		return func(request int, w http.ResponseWriter) bool {
			if request >= upTo {
				return false
			}
			w.Header().Set("Retry-After", "0")
			w.WriteHeader(http.StatusServiceUnavailable)
			return true
		}
	}
	p := &peer{before: down(3)}
	if code, r, _ := runLoadAgainst(t, p, args); code != 0 || r.Retries != 3 || r.Accepted != 200 || len(p.stored) != 200 {
		t.Errorf("503 three times: code %d, %+v, %d stored", code, r, len(p.stored))
	}
	if code, r, _ := runLoadAgainst(t, &peer{before: down(1 << 20)}, args+"-retries 2"); code != 1 || r.Retries != 20 || r.Refused["HTTP 503"] != 200 {
		t.Errorf("503 for ever: code %d, %+v", code, r)
	}

	// Only the events without an acknowledgement go again, and the indices of the second answer are about them.
	tried := map[string]int{}
	p = &peer{refuse: func(_, index int, e peerEvent) string {
		if tried[e.key()]++; index%5 == 2 && tried[e.key()] == 1 || index == 1 && tried[e.key()] == 2 {
			return codeUnavailable
		}
		return ""
	}}
	code, r, _ := runLoadAgainst(t, p, args)
	if code != 0 || r.Retries != 20 || r.Accepted != 200 || len(p.stored) != 200 || p.accepted != 200 || len(p.broken) > 0 {
		t.Errorf("unavailable: code %d, %+v, %d stored, %d accepted, broken %q", code, r, len(p.stored), p.accepted, p.broken)
	}
	sizes := map[int]int{}
	for _, n := range p.sizes {
		sizes[n]++
	}
	if fmt.Sprint(sizes) != "map[1:10 4:10 20:10]" {
		t.Errorf("requests by number of events: %v, want 10 each of 20, then 4, then 1", sizes)
	}
	if code, r, _ := runLoadAgainst(t, &peer{refuse: func(_, i int, _ peerEvent) string { return map[bool]string{true: codeUnavailable}[i == 2] }}, args+"-gzip -retries 0"); code != 1 || r.Refused[codeUnavailable] != 10 || r.Accepted != 190 {
		t.Errorf("unavailable, no retries: code %d, %+v", code, r)
	}
}

func TestLoadUnknown(t *testing.T) {
	hijack := func(_ int, w http.ResponseWriter) bool {
		c, _, _ := w.(http.Hijacker).Hijack()
		c.Close()
		return true
	}
	nonsense := func(_ int, w http.ResponseWriter) bool {
		w.WriteHeader(http.StatusMultiStatus)
		fmt.Fprint(w, "<html>")
		return true
	}
	for name, before := range map[string]func(int, http.ResponseWriter) bool{"no answer": hijack, "nonsense": nonsense} {
		code, r, _ := runLoadAgainst(t, &peer{before: before}, "-rate 1000 -bulk 20 -duration 100ms -retries 0")
		if code != 1 || r.Unknown != 100 || r.Accepted != 0 {
			t.Errorf("%s: code %d, %+v", name, code, r)
		}
	}
}

func TestLoadStall(t *testing.T) {
	stall := func(request int, w http.ResponseWriter) bool {
		if request == 0 {
			time.Sleep(600 * time.Millisecond)
		}
		return false
	}
	// One connection: the requests due in the stall are late by 600 ms down to nothing, 60 of the 100. A slow machine does not
	// catch up with the last of them, and says so.
	_, r, stderr := runLoadAgainst(t, &peer{before: stall}, "-rate 100 -bulk 1 -duration 1s -connections 1")
	if r.Latency["p50"] < 60 || r.Latency["p90"] < 400 || r.Sent+r.Unsent != 100 || strings.Contains(stderr, "not sent") != (r.Unsent > 0) {
		t.Errorf("the stall is hidden: %+v %s", r, stderr)
	}
	slow := func(int, http.ResponseWriter) bool { time.Sleep(400 * time.Millisecond); return false }
	_, r, stderr = runLoadAgainst(t, &peer{before: slow}, "-rate 100 -bulk 1 -duration 1s -connections 2")
	if want := fmt.Sprintf("%d events were due and not sent", 100-r.Sent); r.Unsent != 100-r.Sent || !strings.Contains(stderr, want) {
		t.Errorf("want %q, got %s", want, stderr)
	}
}

func TestLoadInterrupted(t *testing.T) {
	p := &peer{before: func(_ int, w http.ResponseWriter) bool {
		w.Header().Set("Retry-After", "30")
		w.WriteHeader(http.StatusServiceUnavailable)
		return true
	}}
	cfg, err := Parse([]string{"-url", newPeer(t, p), "-rate", "1000", "-bulk", "10", "-duration", "1h"}, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	l, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	l.Send(ctx, io.Discard)
	if l.Took > 5*time.Second || l.sent.Load() == 0 || int64(l.Refused["HTTP 503"]) != l.sent.Load() {
		t.Errorf("after %s: sent %d, refused %v", l.Took, l.sent.Load(), l.Refused)
	}
}

func TestLoadFile(t *testing.T) {
	now := time.Now().Unix()
	var lines []string
	for i := range 3000 {
		user := fmt.Sprintf(`"user_id":"u%d",`, i%7)
		if i == 41 || i == 2500 {
			user = "" // lines 42 and 2501
		}
		lines = append(lines, fmt.Sprintf(`{"event_name":"e%d",%s"timestamp":%d,"insert_id":"%d"}`, i%3, user, now-int64(i/30)*7, i))
	}
	path := filepath.Join(t.TempDir(), "events.ndjson")
	if err := os.WriteFile(path, []byte(strings.Join(lines, "\n")), 0o600); err != nil {
		t.Fatal(err)
	}
	p := &peer{refuse: func(_, _ int, e peerEvent) string {
		if e.UserID == "" {
			return "validation.required.error"
		}
		return ""
	}}
	// The other connections would wait for a minute for times at which nothing is left.
	code, r, stderr := runLoadAgainst(t, p, "-file "+path+" -rate 2000 -connections 64 -verify -verify-timeout 5s")
	if code != 1 || r.Sent != 3000 || r.Accepted != 2998 || r.Refused["validation.required.error"] != 2 || len(r.Checks) != 9 || fmt.Sprint(p.sizes) != "[1000 1000 1000]" {
		t.Errorf("code %d, %+v, requests %v %s", code, r, p.sizes, stderr)
	}
	var out bytes.Buffer
	if code := Run([]string{"-file", path, "-rate", "0", "-url", newPeer(t, &peer{refuse: p.refuse})}, &out, io.Discard); code != 1 {
		t.Errorf("events were refused, code %d", code)
	}
	if code := Run([]string{"-file", path, "-rate", "0", "-url", newPeer(t, &peer{})}, io.Discard, io.Discard); code != 0 {
		t.Errorf("all were accepted, code %d", code)
	}
	lines[1500] = strings.Repeat("x", 70<<10)
	if err := os.WriteFile(path, []byte(strings.Join(lines, "\n")), 0o600); err != nil {
		t.Fatal(err)
	}
	var said bytes.Buffer
	if code := Run([]string{"-file", path, "-rate", "0", "-url", newPeer(t, &peer{})}, io.Discard, &said); code != 1 || strings.Count(said.String(), "line 1501 could not be read") != 1 {
		t.Errorf("a line is too long, code %d: %s", code, &said)
	}
	for _, want := range []string{"line 42: ", "line 2501: "} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("the report has no %q:\n%s", want, &out)
		}
	}
}

// TestLoadFileLost: a peer that stores nothing is found out, whatever else the lines have and however they write their numbers.
func TestLoadFileLost(t *testing.T) {
	path := filepath.Join(t.TempDir(), "events.ndjson")
	line := fmt.Sprintf(`{"event_name":"e","user_id":"u","timestamp":%d.0,"Timestamp":"now","Event_Name":"f"}`, time.Now().Unix())
	if err := os.WriteFile(path, []byte(line), 0o600); err != nil {
		t.Fatal(err)
	}
	p := &peer{before: func(_ int, w http.ResponseWriter) bool {
		w.WriteHeader(http.StatusAccepted)
		fmt.Fprint(w, `{"success_count":1,"failed_count":0,"errors":[]}`)
		return true
	}}
	code, r, _ := runLoadAgainst(t, p, "-rate 0 -verify -verify-timeout 1s -file "+path)
	if code != 1 || len(r.Checks) != 3 || r.Checks[0] != (Check{"e total_count", 1, 0, false}) {
		t.Errorf("code %d, %+v", code, r.Checks)
	}
}

// TestLoadFlags: what cannot be meant is said at once.
func TestLoadFlags(t *testing.T) {
	for args, want := range map[string]string{
		"-rate NaN": "-rate", "-rate +Inf": "-rate", "-url foo": "-url foo", "-url localhost:8080": "-url", "-bulk 0": "-bulk", "-dup 1": "-dup", "-retries -1": "-retries", "-max-p99 -1s": "-max-p99", "x": `"x"`,
	} {
		if _, err := Parse(strings.Fields(args), io.Discard); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", args, err)
		}
	}
}

// TestLoadShort: a run that did not do what it was to do says so, and why, and ends with 1.
func TestLoadShort(t *testing.T) {
	secured := httptest.NewTLSServer(http.NotFoundHandler())
	defer secured.Close()
	secured.Config.ErrorLog = log.New(io.Discard, "", 0)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	nobody := l.Addr().String()
	l.Close()
	slow := &peer{before: func(int, http.ResponseWriter) bool { time.Sleep(300 * time.Millisecond); return false }}
	short := " -rate 100 -bulk 10 -duration 200ms -retries 0"
	for name, c := range map[string]struct {
		args, want string
		code       int
	}{
		"dead":        {"-url http://" + nobody + short, "nothing listens at http://" + nobody + ": is `make run` up?", 1},
		"certificate": {"-url " + secured.URL + short, "20 without an answer: tls: failed to verify certificate: x509: certificate signed by unknown authority\n", 1},
		"well":        {"-max-p99 1m -url " + newPeer(t, &peer{}) + short, "accepted   20 ", 0},
		"too slow":    {"-max-p99 1ns -url " + newPeer(t, &peer{}) + short, "is beyond -max-p99 1ns\n", 1},
		"unsent":      {"-rate 100 -bulk 1 -duration 1s -connections 1 -url " + newPeer(t, slow), "events could not be sent in time\n", 1},
	} {
		var out bytes.Buffer
		if code := Run(strings.Fields(c.args), &out, &out); code != c.code || !strings.Contains(out.String(), c.want) {
			t.Errorf("%s: code %d, want %d and %q:\n%s", name, code, c.code, c.want, &out)
		}
		if c.code == 1 && strings.Contains(c.want, "without") && !strings.Contains(out.String(), "p50 0.0 ms") {
			t.Errorf("%s: latency of no answer:\n%s", name, &out)
		}
	}
	if why := (&Loader{Config: &Config{}, latency: newHistogram()}).shortOf(true); len(why) != 1 || why[0] != "interrupted" {
		t.Error(why)
	}
}

func TestHistogram(t *testing.T) {
	h := newHistogram()
	for i := 1; i <= 10000; i++ {
		h.add(time.Duration(i) * time.Millisecond)
	}
	for _, q := range []float64{0.5, 0.9, 0.99} {
		want := time.Duration(q*10000) * time.Millisecond
		if got := h.quantile(q); got < want || got > want+want/50 {
			t.Errorf("quantile %g is %s, want %s", q, got, want)
		}
	}
	if h.quantile(1) != 10*time.Second || newHistogram().quantile(0.5) != 0 {
		t.Error("the ends are wrong")
	}
}

// TestLoadDemo: the shop's events are valid and all different, and what is counted of them is what was sent.
func TestLoadDemo(t *testing.T) {
	page := filepath.Join(t.TempDir(), "report.html")
	p := &peer{before: func(int, http.ResponseWriter) bool { time.Sleep(40 * time.Millisecond); return false }} // or there is no second to draw
	code, r, stderr := runLoadAgainst(t, p, "-demo -connections 4 -verify -verify-timeout 20s -report "+page)
	if code != 0 || r.Accepted < 100_000 || r.Accepted != r.Sent || int64(len(p.stored)) != r.Sent || len(p.broken) > 0 {
		t.Fatalf("code %d, %+v, %d stored, broken %v\n%s", code, r, len(p.stored), p.broken, stderr)
	}
	days, names := map[int64]bool{}, map[string]int{}
	for _, e := range p.stored {
		if age := time.Now().Unix() - e.Timestamp; age < 0 || age >= 30*86400 {
			t.Fatalf("%+v is %d s old", e, age)
		}
		days[e.Timestamp/86400] = true
		names[e.Name]++
	}
	if len(days) < 30 || !(names["product_view"] > names["add_to_cart"] && names["add_to_cart"] > names["purchase"] && names["purchase"] > 1000) {
		t.Errorf("%d days, %v", len(days), names)
	}
	html, err := os.ReadFile(page)
	if err != nil || !bytes.Contains(html, []byte(`<path class="c1" d="M0.0,`)) || !bytes.Contains(html, []byte("accepted   ")) {
		t.Errorf("the page: %v %.2000s", err, html)
	}
}

// TestNobodyThere: it is said at once.
func TestNobodyThere(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	for _, more := range [][]string{{"-demo"}, {"-duration", "1h"}} {
		var said bytes.Buffer
		code := Run(append(more, "-url", "http://"+l.Addr().String()), &said, &said)
		if code != 1 || !strings.Contains(said.String(), "is `make run` up?") || !strings.Contains(said.String(), l.Addr().String()) {
			t.Errorf("%v: %d %s", more, code, &said)
		}
	}
}
