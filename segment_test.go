// Segment's protocol: each field's way into an event, keys, answers, and bodies that mean harm.

package main

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"
)

// segmentNow is the time of receipt, as the tests' messages would have it: 2026-11-23T13:52:56Z.
const segmentNow = 1795441976

// TestSegmentItems: what is wrong with a message is said by the mapping and by the rules of every event, at once.
func TestSegmentItems(t *testing.T) {
	q := newTestRequest()
	const at = `"timestamp":"2026-11-23T13:52:50.999Z"`
	long := strings.Repeat("x", 101)
	for _, c := range []struct {
		kind, message string
		want          string // the record, or "" and the errors' parts
		errors        string
	}{
		{"batch", `{"event":"e","userId":"u"}`, ``, `{"index":0,"field":"type","code":"validation.invalid-format.error","error":"type must be`},
		{"batch", `{"type":"t","event":"e","userId":"u"}`, ``, `"field":"type"`},
		{"batch", `[1]`, ``, `{"index":0,"field":"","code":"validation.invalid-format.error","error":"an event must be a JSON object"}`},
		{"track", `{"userId":5}`, ``, `{"index":0,"field":"user_id","code":"validation.invalid-format.error","error":"user_id must be a string, not number"},{"index":0,"field":"event_name","code":"validation.required.error","error":"event_name is required"}`},
		{"track", `{"event":"e"}`, ``, `"field":"user_id","code":"validation.required.error"`},
		{"track", `{"event":"` + long + `","userId":"u"}`, ``, `"field":"event_name","code":"validation.max-length.error"`},
		{"track", `{"event":"e","userId":"u","messageId":"` + long + `"}`, ``, `"field":"insert_id","code":"validation.max-length.error"`},
		{"track", `{"event":"e","userId":"u","userId":"v"}`, ``, `"field":"userId","code":"validation.invalid-format.error"`},
		{"track", `{"event":"e","userId":"u","timestamp":1795441970}`, ``, `"field":"timestamp","code":"validation.invalid-format.error"`},
		{"track", `{"event":"e","userId":"u","timestamp":"yesterday"}`, ``, `"field":"timestamp","code":"validation.invalid-format.error"`},
		{"track", `{"event":"e","userId":"u","timestamp":"2027-01-01T00:00:00Z"}`, ``, `"field":"timestamp","code":"validation.timestamp-future.error"`},
		{"track", `{"event":"e","userId":"u","timestamp":"2020-01-01T00:00:00Z"}`, ``, `"field":"timestamp","code":"validation.timestamp-expired.error"`},
		{"track", `{"event":"e","userId":"u","properties":[]}`, ``, `"field":"metadata","code":"validation.invalid-format.error"`},
		{"page", `{"name":"` + strings.Repeat("x", 17<<10) + `","userId":"u"}`, ``, `"field":"metadata","code":"validation.max-length.error"`},
		{"page", `{"name":"` + strings.Repeat("x", 10<<10) + `","category":"` + strings.Repeat("x", 10<<10) + `","userId":"u"}`, ``, `"field":"metadata","code":"validation.max-length.error"`},
		{"track", `{"event":"e","userId":"\ud800"}`, ``, `"field":"userId","code":"validation.invalid-format.error"`},
		{"track", `{"event":"e","userId":"u","x":` + strings.Repeat("[", 301) + strings.Repeat("]", 301) + `}`, ``, `nested more than 300 deep`},
	} {
		body := c.message
		if c.kind == "batch" {
			body = `{"batch":[` + body + `],"sentAt":"2026-11-23T13:52:56.000Z"}`
		}
		for range 2 { // the second time through a dirty parser
			q.fill([]byte(body))
			q.entry = appendItemEntries
			if err := q.encodeSegment(t.Context(), c.kind, segmentNow); err != nil {
				t.Errorf("%.200s: %v", body, err)
				continue
			}
			got := ""
			if len(q.records) > 0 {
				got = string(q.arena.b[2*len(eventID{}):])
			}
			if errors := "[" + string(q.errors.bytes()) + "]"; got != c.want || !strings.Contains(errors, c.errors) || c.errors == "" && q.failed > 0 || !json.Valid([]byte(errors)) {
				t.Errorf("%s %.300s:\n got %s %s\nwant %s %s", c.kind, c.message, got, errors, c.want, c.errors)
			}
		}
	}
}

func TestSegment(t *testing.T) {
	t.Parallel()
	p := startProgram(t, newSpace(t, "API_KEYS="+firstKey+","+secondKey))
	basic := func(key string) string {
		return "Authorization: Basic " + base64.StdEncoding.EncodeToString([]byte(key+":"))
	}
	item := func(more string) string {
		return fmt.Sprintf(`{"type":"track","event":"s","userId":"u","timestamp":%q%s}`, time.Now().UTC().Format(time.RFC3339Nano), more)
	}
	batch := func(more string, items ...string) string {
		return `{"batch":[` + strings.Join(items, ",") + `]` + more + `}`
	}
	inBody := `,"writeKey":"` + secondKey + `"`
	for _, c := range []struct {
		name, path, body, header string
		status                   int
		want                     string
	}{
		{"batch", "/v1/batch", batch("", item(""), item(`,"messageId":"1"`)), basic(firstKey), 200, `{"success":true,"errors":[]}`},
		{"b", "/v1/b", batch("", item("")), basic(firstKey), 200, `{"success":true,"errors":[]}`},
		{"import", "/v1/import", batch("", item("")), basic(secondKey), 200, `{"success":true,"errors":[]}`},
		{"track", "/v1/track", item(""), basic(firstKey), 200, `{"success":true,"errors":[]}`},
		{"identify", "/v1/i", `{"userId":"u"}`, basic(firstKey), 200, `{"success":true,"errors":[]}`},
		{"page with a slash", "/v1/p", item(`,"name":"x"`), basic(firstKey), 200, `{"success":true,"errors":[]}`},
		{"one bad, one good", "/v1/batch", batch("", item(""), `{"type":"track","userId":"u"}`), basic(firstKey), 200, `{"success":true,"errors":[{"index":1,"field":"event_name","code":"validation.required.error","error":"event_name is required"}]}`},
		{"key in the body", "/v1/batch", batch(inBody, item("")), "X-A: b", 200, `"success":true`},
		{"key in the message", "/v1/t", item(inBody), "X-A: b", 200, `"success":true`},
		{"key in each message", "/v1/b", batch("", item(inBody)), "X-A: b", 200, `"success":true`},
		{"empty key in the message", "/v1/b", batch(inBody, item(`,"writeKey":""`)), "X-A: b", 200, `"success":true`},
		{"key as everywhere", "/v1/b", batch("", item("")), "X-API-Key: " + firstKey, 200, `"success":true`},
		{"as text", "/v1/t", item(inBody), "Content-Type: text/plain", 200, `"success":true`},
		{"no key", "/v1/batch", batch("", item("")), "X-A: b", 401, `"error":"unauthorized"`},
		{"wrong key", "/v1/batch", batch(inBody, item("")), basic("wrong"), 401, `"error":"unauthorized"`},
		{"wrong key in the body", "/v1/batch", batch(`,"writeKey":"wrong"`, item("")), "X-A: b", 401, `"error":"unauthorized"`},
		{"no JSON", "/v1/batch", `{"batch":[`, basic(firstKey), 400, `"error":"invalid request body"`},
		{"no batch", "/v1/batch", item(""), basic(firstKey), 400, `\"batch\" is missing or empty`},
		{"not an object", "/v1/track", `[]`, basic(firstKey), 400, `"error":"invalid request body"`},
		{"too large", "/v1/track", item(`,"x":"` + strings.Repeat("x", 65<<10) + `"`), basic(firstKey), 413, `"error"`},
		{"one too large", "/v1/batch", batch("", item(`,"x":"`+strings.Repeat("x", 65<<10)+`"`), item("")), basic(firstKey), 200, `"code":"validation.max-length.error"`},
		{"form", "/v1/track", item(""), "Content-Type: application/x-www-form-urlencoded", 415, `"error"`},
		{"basic elsewhere", onePath, string(freshEvent("s")), basic(firstKey), 401, `"error":"unauthorized"`},
	} {
		status, _, answer := p.ask("POST", c.path, []byte(c.body), c.header)
		if status != c.status || !strings.Contains(answer, c.want) || !json.Valid([]byte(answer)) {
			t.Errorf("%s: %d %s, want %d %s", c.name, status, answer, c.status, c.want)
		}
	}
}

// TestSegmentHostile: what no client of Segment sends gets 200 with errors, 400 or 413, and nothing else.
func TestSegmentHostile(t *testing.T) {
	t.Parallel()
	p := startProgram(t, newSpace(t))
	values := []string{`null`, `true`, `0`, `-1`, `1e400`, `""`, `"x"`, `[]`, `{}`, `[{}]`, `{"a":{"b":[1]}}`, `{"name":{"name":1}}`, `"\u0000"`, `"\ud800"`, "\"\xff\"",
		`"` + strings.Repeat("x", 70<<10) + `"`, strings.Repeat("[", 400) + strings.Repeat("]", 400), strings.Repeat("[", 1e5), strings.Repeat("7", 1e5), `"2026-11-23T13:52:50Z"`, `1795441970`, `01`, `nul`}
	fields := []string{"type", "event", "userId", "anonymousId", "timestamp", "originalTimestamp", "channel", "context", "properties", "messageId", "name", "category", "writeKey", "batch", "sentAt", "integrations", "x"}
	tried, seen := 0, map[int]int{}
	try := func(path, body string) {
		tried++
		status, _, answer := p.ask("POST", path, []byte(body))
		if seen[status]++; status != 200 && status != 400 && status != 413 || !json.Valid([]byte(answer)) {
			t.Errorf("%s %.100s: %d %.200s", path, body, status, answer)
		}
	}
	for _, field := range fields {
		for _, value := range values {
			message := `{"type":"page","userId":"u","` + field + `":` + value + `}`
			try("/v1/batch", `{"batch":[`+message+`,{"type":"track","event":"e","userId":"u"}]}`)
			try("/v1/batch", `{"`+field+`":`+value+`,"batch":[{"type":"track","event":"e","userId":"u","`+field+`":`+value+`}]}`)
			try("/v1/page", message)
		}
	}
	try("/v1/batch", `{"batch":[`+strings.Repeat(`{},`, 100_000)+`{}]}`)
	try("/v1/batch", `{"batch":[`+strings.Repeat(`{},`, 999)+`{}]}`)
	try("/v1/batch", `{"batch":[{"type":"track"`+strings.Repeat(`,"userId":0`, 100_000)+`}]}`)
	try("/v1/batch", "\x00")
	for _, value := range []string{`"` + strings.Repeat("x", 5<<20) + `"`, strings.Repeat("[", 5<<20), strings.Repeat("7", 5<<20)} {
		try("/v1/batch", `{"batch":[{"type":"page","userId":"u","properties":`+value+`}]}`)
	}
	t.Logf("%d bodies, by status %v", tried, seen)
	if status, _, answer := p.ask("POST", "/v1/t", []byte(`{"event":"e","userId":"u"}`)); status != http.StatusOK || answer != `{"success":true,"errors":[]}` {
		t.Errorf("afterwards: %d %s", status, answer)
	}
}

// TestSegmentSingle: one message does not hold the memory of a batch.
func TestSegmentSingle(t *testing.T) {
	in := newIngester(nil, &settings{maxInFlightBytes: 1 << 30}, &newStats().ingest)
	ac, err := newAccess(&settings{serverHost: "localhost"})
	if err != nil {
		t.Fatal(err)
	}
	body := `{"batch":[` + strings.Repeat(`{"type":"track","event":"e","userId":"u"},`, 999) + `{"type":"track","event":"e","userId":"u"}]}`
	q := in.receive(httptest.NewRecorder(), httptest.NewRequest("POST", "/v1/batch", strings.NewReader(body)), &in.bulks)
	if err := q.encodeSegment(t.Context(), "batch", segmentNow); err != nil || len(q.records) != 1000 {
		t.Fatal(err, len(q.records))
	}
	in.release(q)
	in.bodies.limit = 64 << 10
	w := httptest.NewRecorder()
	in.serveSegment(w, httptest.NewRequest("POST", "/v1/track", strings.NewReader(`{"userId":"u"}`)), "track", ac)
	if w.Code != http.StatusOK || !strings.Contains(w.Body.String(), codeRequired) {
		t.Error(w.Code, w.Body)
	}
}

// BenchmarkSegmentToRecords is BenchmarkBodyToRecords for messages of a client.
func BenchmarkSegmentToRecords(b *testing.B) {
	const message = `{"type":"track","messageId":"node-next-1795441976-0f9c1d6e-4b7a-4f5e-9d57","userId":"user_123","event":"product_view","timestamp":"2026-11-23T13:52:56.123Z",` +
		`"properties":{"product_id":"prod-789","price":129.99,"currency":"TRY","referrer":"google"},"context":{"library":{"name":"@segment/analytics-node","version":"3.1.0"},"campaign":{"name":"cmp_987"}},"integrations":{}}`
	body := []byte(`{"batch":[` + strings.Repeat(message+",", 999) + message + `]}`)
	q := newTestRequest()
	b.ReportAllocs()
	b.SetBytes(int64(len(body)))
	for b.Loop() {
		q.fill(body)
		if err := q.encodeSegment(b.Context(), "batch", segmentNow); err != nil || len(q.records) != 1000 {
			b.Fatal("not 1000 records", err)
		}
		q.sealRecords("events")
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/1000, "ns/event")
}
