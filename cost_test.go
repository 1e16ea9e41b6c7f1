// What a request may cost: shapes that are searched for one that takes more memory or time than its bytes are worth.
//
// Memory is what the runtime has allocated. Time is the CPU time of this thread, and never compared with a clock: with
// what half the body takes, and with what encoding/json takes to look at the same. The last test is of what a round may cost.

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/event-ingestion/event-ingestion/internal/testkit"

	"github.com/event-ingestion/event-ingestion/internal/batches"
	"github.com/event-ingestion/event-ingestion/internal/budget"
)

// Limits of a request's cost.
const (
	maxAllocPerByte = 4        // the body's buffer and the one it grew out of, records, and little else
	maxAllocBase    = 8 << 20  // the slab of records, the decoders, 1000 entries of errors with 20 messages each
	maxAllocBeside  = 64 << 20 // the goal
	maxAnswerBytes  = 2 << 20
	maxTimeRatio    = 3                      // of twice the body: 2 is linear, 4 is quadratic
	maxJSONRatio    = 12                     // of encoding/json's time for the same, and
	slackTime       = 100 * time.Millisecond // for 20,000 messages, with the race detector
)

// cost is what one request took.
type cost struct {
	allocated int
	answer    int
	status    int
	held      int64 // of the budget, at its end
	cpu       time.Duration
}

// discard is a client that reads the answer and forgets it.
type discard struct {
	header http.Header
	cost   *cost
}

func (d discard) Header() http.Header { return d.header }

func (d discard) WriteHeader(status int) { d.cost.status = status }

func (d discard) Write(b []byte) (int, error) { d.cost.answer += len(b); return len(b), nil }

// costOf has a request of its own ingester read, checked, encoded and answered, all but Kafka's part.
func costOf(single bool, media, encoding string, body []byte) (c cost) {
	in := newIngester(new(batches.Producer), &settings{maxInFlightBytes: 1 << 30, ackTimeout: time.Minute}, &newStats().ingest, nil)
	r := httptest.NewRequest("POST", bulkPath, bytes.NewReader(body))
	r.Header.Set("Content-Type", media)
	if encoding != "" {
		r.Header.Set("Content-Encoding", encoding)
	}
	w := discard{http.Header{}, &c}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	allocated, cpu := allocatedBytes(), testkit.ThreadTime()
	from := &in.bulks
	if single {
		from = &in.singles
	}
	if q := in.receive(w, r, from); q == nil {
		// and has answered
	} else if single {
		if _, problems, err := q.parser.parse(q.body.B); err != nil {
			writeReadError(w, err)
		} else if len(problems) > 0 {
			writeProblems(w, problems)
		}
		c.held = in.bodies.Used()
		q.release()
	} else {
		err := error(nil)
		if media == asSegment {
			q.entry = appendItemEntries
			err = q.encodeSegment(context.Background(), "batch", 1795441976)
		} else {
			err = q.encode(context.Background(), media, 1795441976)
		}
		if err != nil {
			writeReadError(w, err)
		} else {
			q.records = q.records[:0]
			in.answerBulk(w, q, false)
		}
		c.held = in.bodies.Used()
		q.release()
	}
	c.cpu = testkit.ThreadTime() - cpu
	c.allocated = allocatedBytes() - allocated
	if used := in.bodies.Used(); used != 0 {
		panic(fmt.Sprintf("%d bytes of the budget were not given back", used))
	}
	return c
}

func allocatedBytes() int {
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int(m.TotalAlloc)
}

// asSegment stands for the media type of a batch of Segment's protocol.
const asSegment = "segment"

// costGood is an event that only needs its end.
const costGood = `{"event_name":"e","user_id":"u","timestamp":1795441976`

// costPieces are repeated to make a value: what stands in front, the piece, what stands between two, what ends it.
var costPieces = []struct{ name, open, piece, between, close string }{
	{"zeros", `[`, `0`, `,`, `]`},
	{"empty arrays", `[`, `[]`, `,`, `]`},
	{"empty objects", `[`, `{}`, `,`, `]`},
	{"members", `{`, `"":0`, `,`, `}`},
	{"members of one name", `{`, `"price":1`, `,`, `}`},
	{"deep arrays, open", ``, `[`, ``, ``},
	{"deep objects, open", ``, `{"":`, ``, ``},
	{"string", `"`, `xxxxxxxxxxxxxxxx`, ``, `"`},
	{"wide characters", `"`, `ö😀`, ``, `"`},
	{"escapes", `"`, `\u0041`, ``, `"`},
	{"pairs of escapes", `"`, `\ud83d\ude00`, ``, `"`},
	{"halves of pairs", `"`, `\ud83d`, ``, `"`},
	{"backslashes", `"`, `\\`, ``, `"`},
	{"quotes", `"`, `\"`, ``, `"`},
	{"quotes, open", `"`, `\"`, ``, ``},
	{"no text", `"`, "\xff", ``, `"`},
	{"digits", ``, `7`, ``, ``},
	{"fraction", `0.`, `7`, ``, ``},
	{"exponent", `1e`, `9`, ``, ``},
	{"spaces", ``, ` `, ``, `0`},
	{"spaced zeros", `[`, "\n\t 0", `,`, `]`},
	{"strings", `[`, `"a"`, `,`, `]`},
	{"strings of control characters", `[`, `"\u0000"`, `,`, `]`},
	{"words", `[`, `true,false,null`, `,`, `]`},
}

// costMembers are repeated in an event.
var costMembers = []string{
	`"tags":0`, `"\u0074ags":0`, `"tags":null`, `"metadata":{}`, `"event_name":"\u0000"`, `"insert_id":1`, `"x":0`, `"":[]`, "\"\xff\":0", "\"" + strings.Repeat("\xff\xfe", 50) + "\":0",
	"\"" + strings.Repeat("\\ud800", 50) + "\":0", `"channel":"` + strings.Repeat("😀", 100) + `"`,
}

func costValue(i, size int) string {
	p := costPieces[i]
	return p.open + p.piece + strings.Repeat(p.between+p.piece, size/len(p.between+p.piece)) + p.close
}

// costShapes calls do with every shape of about size bytes. An event of the shape is what a single request has; a body holds
// it once, or in pieces that are events of 60 KiB or less.
// Every fourth is tried, from another one each time; `make torture` tries all.
func costShapes(try func(name string, shape func(size int) []byte, single bool, media string)) {
	const stride = 4
	n := rand.IntN(stride)
	do := func(name string, shape func(size int) []byte, single bool, media string) {
		if n++; n%stride == 0 || testkit.TortureFactor() > 1 {
			try(name, shape, single, media)
		}
	}
	event := func(name string, make func(size int) string) {
		do("single, "+name, func(n int) []byte { return []byte(make(n)) }, true, jsonCT)
		do("one event, "+name, func(n int) []byte { return []byte(`{"events":[` + make(n) + `]}`) }, false, jsonCT)
		do("one line, "+name, func(n int) []byte { return []byte(make(n)) }, false, ndjson)
		do("events of 60 KiB, "+name, func(n int) []byte {
			return []byte(`{"events":[` + make(60<<10) + strings.Repeat(","+make(60<<10), n/(61<<10)) + `]}`)
		}, false, jsonCT)
		do("1000 events, "+name, func(n int) []byte {
			return []byte(`{"events":[` + make(n/1100) + strings.Repeat(","+make(n/1100), 999) + `]}`)
		}, false, jsonCT)
		do("1000 lines, "+name, func(n int) []byte { return []byte(strings.Repeat(make(n/1100)+"\n", 1000)) }, false, ndjson)
	}
	for i, p := range costPieces {
		do("member beside, "+p.name, func(n int) []byte {
			return []byte(`{"a":` + costValue(i, n) + `,"events":[` + costGood + `}]}`)
		}, false, jsonCT)
		do("instead of events, "+p.name, func(n int) []byte { return []byte(`{"events":` + costValue(i, n) + `}`) }, false, jsonCT)
		do("instead of lines, "+p.name, func(n int) []byte { return []byte(costValue(i, n)) }, false, ndjson)
		for _, field := range []string{`"x":`, `"metadata":{"x":`, `"tags":`, `"campaign_id":`, `"timestamp":`} {
			closing := strings.Repeat("}", strings.Count(field, "{")+1)
			event(p.name+" in "+field, func(n int) string { return costGood + `,` + field + costValue(i, n) + closing })
		}
	}
	for i, p := range costPieces {
		for _, field := range []string{`"userId":`, `"timestamp":`, `"name":`, `"properties":`, `"context":`, `"context":{"library":{"name":`, `"x":`} {
			closing := strings.Repeat("}", strings.Count(field, "{")+1)
			message := func(n int) string { return `{"type":"page","userId":"u",` + field + costValue(i, n) + closing }
			do("one message, "+p.name+" in "+field, func(n int) []byte { return []byte(`{"batch":[` + message(n) + `]}`) }, false, asSegment)
			do("1000 messages, "+p.name+" in "+field, func(n int) []byte {
				return []byte(`{"batch":[` + message(n/1100) + strings.Repeat(","+message(n/1100), 999) + `]}`)
			}, false, asSegment)
		}
	}
	for _, m := range []string{`"context":{"campaign":{"name":1}}`, `"userId":0`, "\"\xff\":0", `"name":1`} {
		do(fmt.Sprintf("repeated %.20q in a message", m), func(n int) []byte {
			return []byte(`{"batch":[{"type":"page","userId":"u"` + strings.Repeat(","+m, n/(1+len(m))) + `}]}`)
		}, false, asSegment)
	}
	for _, m := range costMembers {
		event(fmt.Sprintf("repeated %.20q", m), func(n int) string { return costGood + strings.Repeat(","+m, n/(1+len(m))) + `}` })
		do(fmt.Sprintf("repeated %.20q beside", m), func(n int) []byte {
			return []byte(`{"events":[` + costGood + `}]` + strings.Repeat(","+m, n/(1+len(m))) + `}`)
		}, false, jsonCT)
	}
	do("empty lines", func(n int) []byte { return bytes.Repeat([]byte(" \r\n"), n/3) }, false, ndjson)
	do("events without end", func(n int) []byte { return []byte(`{"events":[` + strings.Repeat(`{},`, n/3)) }, false, jsonCT)
}

// TestCostBounds: nothing that a client may send takes more memory than its bytes are worth. The shapes that take the most
// at an eighth of a MiB are tried again as large as a body may be, compressed, too.
func TestCostBounds(t *testing.T) {
	if !apart(t) {
		return
	}
	type tried struct {
		name    string
		perByte int
		again   func() cost
	}
	var all []tried
	costShapes(func(name string, shape func(int) []byte, single bool, media string) {
		try := func(size int, encoding string, compress func([]byte) []byte) cost {
			body := shape(size)
			c := costOf(single, media, encoding, compress(body))
			switch most := min(maxAllocBase+maxAllocPerByte*len(body), maxAllocBeside+len(body)); {
			case c.allocated > most:
				t.Errorf("%s: %d bytes %s allocate %d", name, len(body), encoding, c.allocated)
			case c.held > int64(most):
				t.Errorf("%s: %d bytes %s hold %d", name, len(body), encoding, c.held)
			case c.answer > maxAnswerBytes:
				t.Errorf("%s: %d bytes are answered with %d", name, len(body), c.answer)
			case c.status >= 500:
				t.Errorf("%s: status %d", name, c.status)
			case c.cpu > slackTime+maxJSONRatio*jsonTime(body):
				t.Errorf("%s: %d bytes %s take %s, encoding/json %s", name, len(body), encoding, c.cpu, jsonTime(body))
			}
			return c
		}
		plain := func(b []byte) []byte { return b }
		size := 128 << 10
		if single {
			size = 60 << 10
		}
		c := try(size, "", plain)
		all = append(all, tried{name, c.allocated * 1000 / size, func() cost {
			if size = 15 << 19; single { // as large as it gets: pieces and frames come on top
				size = 60 << 10
			}
			try(size, "gzip", testkit.Gzipped)
			try(size, "zstd", testkit.Zstded)
			return try(size, "", plain)
		}})
	})
	slices.SortFunc(all, func(a, b tried) int { return b.perByte - a.perByte })
	for _, worst := range all[:min(len(all), testkit.MoreInTorture(2, 1))] {
		c := worst.again()
		t.Logf("%d bytes for 1000: %s; %s of CPU", worst.perByte, worst.name, c.cpu)
	}
}

// TestCostIsLinear: twice the body takes twice the time.
func TestCostIsLinear(t *testing.T) {
	if !apart(t) {
		return
	}
	costShapes(func(name string, shape func(int) []byte, single bool, media string) {
		size := 64 << 10
		if single {
			size = 30 << 10
		}
		if why := tooSlow(single, media, shape(size), shape(2*size)); why != "" {
			t.Errorf("%s: %s", name, why)
		}
	})
}

// tooSlow says how body and twice the body misbehave. Other processes disturb a measurement, so that one good one in ten is
// enough.
func tooSlow(single bool, media string, once, twice []byte) (why string) {
	for range 10 {
		a, b := costOf(single, media, "", once).cpu, costOf(single, media, "", twice).cpu
		if b <= maxTimeRatio*a+slackTime/50 {
			return ""
		}
		why = fmt.Sprintf("%d bytes take %s, %d take %s", len(once), a, len(twice), b)
	}
	return why
}

// jsonTime is how long encoding/json looks at the text, line by line.
func jsonTime(text []byte) time.Duration {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	started := testkit.ThreadTime()
	for line := range bytes.Lines(text) {
		json.Valid(line)
	}
	return testkit.ThreadTime() - started
}

// FuzzCost looks for other shapes: a piece is repeated between a head and a tail.
func FuzzCost(f *testing.F) {
	for i, p := range costPieces {
		f.Add(i%2 == 0, `{"events":[`+costGood+`,"metadata":{"a":`+p.open, p.piece+p.between, p.piece+p.close+`}}]}`)
	}
	for _, m := range costMembers {
		f.Add(true, costGood, ","+m, `}`)
		f.Add(false, `{"events":[`+costGood, ","+m, `}]}`)
	}
	f.Fuzz(func(t *testing.T, lines bool, head, piece, tail string) {
		if len(piece) == 0 || len(head)+len(piece)+len(tail) > 4096 {
			return
		}
		media := jsonCT
		if lines {
			media = ndjson
		}
		body := func(size int) []byte { return []byte(head + strings.Repeat(piece, size/len(piece)) + tail) }
		once, twice := body(64<<10), body(128<<10)
		if c := costOf(false, media, "", twice); c.allocated > maxAllocBase+maxAllocPerByte*len(twice) || c.answer > maxAnswerBytes {
			t.Fatalf("%d bytes allocate %d and are answered with %d", len(twice), c.allocated, c.answer)
		}
		if why := tooSlow(false, media, once, twice); why != "" {
			t.Fatal(why)
		}
	})
}

// TestClientGone: nothing is worked out for a client that has gone, and nothing is held for it.
func TestClientGone(t *testing.T) {
	gone, leave := context.WithCancel(t.Context())
	leave()
	body := []byte(strings.Repeat(costGood+"}\n", 1000))
	q := newTestRequest()
	q.fill(body)
	if err := q.encode(gone, typeNDJSON, 1795441976); !errors.Is(err, context.Canceled) || len(q.records) > 64 {
		t.Errorf("lines: %v, %d records", err, len(q.records))
	}
	q.fill([]byte(`{"events":[` + costGood + `}` + strings.Repeat(`,`+costGood+`}`, 999) + `]}`))
	if err := q.encode(gone, typeJSON, 1795441976); !errors.Is(err, context.Canceled) || len(q.records) > 64 {
		t.Errorf("events: %v, %d records", err, len(q.records))
	}
	r := httptest.NewRequestWithContext(gone, "POST", bulkPath, bytes.NewReader(testkit.Gzipped(bytes.Repeat(body, 100))))
	r.Header.Set("Content-Encoding", "gzip")
	if _, err := readBody(q.account, r, maxBulkBody, time.Minute); !errors.Is(err, context.Canceled) {
		t.Errorf("decompressed to the end: %v", err)
	}
}

// TestSameClient: who is the same client.
func TestSameClient(t *testing.T) {
	of := func(from string, key client) client {
		return clientOf(&exchange{client: key}, &http.Request{RemoteAddr: from})
	}
	for _, c := range []struct {
		a, b string
		same bool
	}{
		{"192.0.2.1:1", "192.0.2.1:2", true}, {"192.0.2.1:1", "192.0.2.2:1", false}, {"192.0.2.1:1", "[::ffff:192.0.2.1]:1", true},
		{"[2001:db8::1]:1", "[2001:db8::2]:1", true}, {"[2001:db8:0:1::1]:1", "[2001:db8::1]:1", false}, {"[fe80::1%eth0]:1", "[fe80::1]:1", true}, {"@", "", true},
	} {
		if same := of(c.a, client{}) == of(c.b, client{}); same != c.same {
			t.Errorf("%s and %s: %v", c.a, c.b, same)
		}
		if of(c.a, client{1}) != of(c.b, client{1}) || of(c.a, client{1}) == of(c.a, client{2}) {
			t.Errorf("%s and %s by key", c.a, c.b)
		}
	}
}

// TestBudget: what requests hold is counted while they hold it, refused beyond the limit, and given back.
func TestBudget(t *testing.T) {
	body := []byte(strings.Repeat(costGood+"}\n", 1000)) // 55,000 bytes; with keys and records about half a MB
	for _, limit := range []int64{1 << 10, 16 << 10, 100 << 10, 300 << 10} {
		in := newIngester(new(batches.Producer), &settings{maxInFlightBytes: limit, ackTimeout: time.Minute}, &newStats().ingest, nil)
		c := cost{}
		w := discard{http.Header{}, &c}
		q := in.receive(w, httptest.NewRequest("POST", bulkPath, bytes.NewReader(body)), &in.bulks)
		if q != nil {
			err := q.encode(t.Context(), typeNDJSON, 1795441976)
			if used := in.bodies.Used(); used > limit || used < int64(len(q.body.B)) {
				t.Errorf("%d of %d bytes used", used, limit)
			}
			if q.release(); !errors.Is(err, budget.ErrFull) {
				t.Errorf("limit %d: %v", limit, err)
			}
			writeReadError(w, err)
		}
		if c.status != http.StatusServiceUnavailable {
			t.Errorf("limit %d: status %d", limit, c.status)
		}
		if used := in.bodies.Used(); used != 0 {
			t.Errorf("limit %d: %d bytes were not given back", limit, used)
		}
	}
}

// TestForgetting: however many minutes are known, one that needs room does not have a round wait: a backfill of a few events a minute
// fills the memory with hundreds of thousands. What was used last stays.
func TestForgetting(t *testing.T) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	const fit = 300_000
	known := newDedupe(nil, nil, fit*setOverhead)
	worst := time.Duration(0)
	for minute := range int64(2 * fit) {
		known.round++
		if known.minutes[7] != nil {
			known.use(known.minutes[7])
		}
		started := testkit.ThreadTime()
		if !known.free(setOverhead) {
			t.Fatal("no room")
		}
		known.know(minute)
		worst = max(worst, testkit.ThreadTime()-started)
	}
	if n := len(known.minutes); n != fit || known.order.Len() != fit || known.bytes.Load() != fit*setOverhead {
		t.Errorf("%d minutes of %d, %d bytes", n, known.order.Len(), known.bytes.Load())
	}
	for _, minute := range []int64{7, fit + 1, 2*fit - 1} {
		if known.minutes[minute] == nil {
			t.Errorf("minute %d is not known", minute)
		}
	}
	if most := testkit.Here(20 * time.Millisecond); worst > most {
		t.Errorf("room for one minute took %s, more than %s", worst, most)
	}
}
