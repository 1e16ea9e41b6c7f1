// Segment's protocol: each field's way into an event, keys, answers, and bodies that mean harm.

package main

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/event-ingestion/event-ingestion/batches"
	"github.com/event-ingestion/event-ingestion/budget"
)

// segmentNow is the time of receipt, as the tests' messages would have it: 2026-11-23T13:52:56Z.
const segmentNow = 1795441976

func TestSegmentMapping(t *testing.T) {
	q := newTestRequest()
	const at = `"timestamp":"2026-11-23T13:52:50.999Z"`
	long := strings.Repeat("x", 101)
	for _, c := range []struct {
		kind, message string
		want          string // the record, or "" and the errors' parts
		errors        string
	}{
		{"track", `{"event":"e","userId":"u","messageId":"m1",` + at + `}`, `{"event_name":"e","user_id":"u","timestamp":1795441970,"channel":"api","insert_id":"m1"}`, ``},
		{"batch", `{"type":"track","event":"e","userId":"u",` + at + `}`, `{"event_name":"e","user_id":"u","timestamp":1795441970,"channel":"api"}`, ``},
		{"batch", `{"type":"page","userId":"u",` + at + `}`, `{"event_name":"page","user_id":"u","timestamp":1795441970,"channel":"api"}`, ``},
		{"track", `{"event":"e","anonymousId":"a",` + at + `}`, `{"event_name":"e","user_id":"a","timestamp":1795441970,"channel":"api"}`, ``},
		{"track", `{"event":"e","userId":"","anonymousId":"a",` + at + `}`, `{"event_name":"e","user_id":"a","timestamp":1795441970,"channel":"api"}`, ``},
		{"track", `{"event":"e","userId":null,"anonymousId":"a",` + at + `}`, `{"event_name":"e","user_id":"a","timestamp":1795441970,"channel":"api"}`, ``},
		{"track", `{"event":"e","userId":"u","anonymousId":7,` + at + `}`, `{"event_name":"e","user_id":"u","timestamp":1795441970,"channel":"api"}`, ``},
		{"track", `{"event":"e","userId":"u"}`, `{"event_name":"e","user_id":"u","timestamp":1795441976,"channel":"api"}`, ``},
		{"track", `{"event":"e","userId":"u","sentAt":"2026-11-23T00:00:00Z","originalTimestamp":"2026-11-23T13:52:50Z"}`, `{"event_name":"e","user_id":"u","timestamp":1795441970,"channel":"api"}`, ``},
		{"track", `{"event":"e","userId":"u","timestamp":"2026-11-23T16:52:50.123456+03:00"}`, `{"event_name":"e","user_id":"u","timestamp":1795441970,"channel":"api"}`, ``},
		{"track", `{"event":"e","userId":"u","timestamp":"2026-11-23T13:52:50.5"}`, `{"event_name":"e","user_id":"u","timestamp":1795441970,"channel":"api"}`, ``},
		{"track", `{"event":"e","userId":"u","timestamp":"2026-11-23"}`, `{"event_name":"e","user_id":"u","timestamp":1795392000,"channel":"api"}`, ``},
		{"track", `{"event":"e","userId":"u","channel":"browser",` + at + `}`, `{"event_name":"e","user_id":"u","timestamp":1795441970,"channel":"web"}`, ``},
		{"track", `{"event":"e","userId":"u","channel":"mobile","context":{"library":{"name":"analytics.js"}},` + at + `}`, `{"event_name":"e","user_id":"u","timestamp":1795441970,"channel":"mobile_app"}`, ``},
		{"track", `{"event":"e","userId":"u","channel":"tv","context":{"library":{"name":"analytics.js"}},` + at + `}`, `{"event_name":"e","user_id":"u","timestamp":1795441970,"channel":"web"}`, ``},
		{"track", `{"event":"e","userId":"u","context":{"library":{"version":"1","name":"analytics-react-native"}},` + at + `}`, `{"event_name":"e","user_id":"u","timestamp":1795441970,"channel":"mobile_app"}`, ``},
		{"track", `{"event":"e","userId":"u","context":{"library":{"name":"analytics-kotlin"},"campaign":{"name":"c","source":"s"}},` + at + `}`, `{"event_name":"e","user_id":"u","timestamp":1795441970,"channel":"mobile_app","campaign_id":"c"}`, ``},
		{"track", `{"event":"e","userId":"u","context":[1],"properties": { "a" : [1.50, true, {"b":null}] },` + at + `}`, `{"event_name":"e","user_id":"u","timestamp":1795441970,"channel":"api","metadata":{"a":[1.50,true,{"b":null}]}}`, ``},
		{"page", `{"name":"Home","category":"c","userId":"u","properties":{"url":"/"},` + at + `}`, `{"event_name":"page","user_id":"u","timestamp":1795441970,"channel":"api","metadata":{"name":"Home","category":"c","url":"/"}}`, ``},
		{"page", `{"name":"Home","userId":"u","properties":{ },` + at + `}`, `{"event_name":"page","user_id":"u","timestamp":1795441970,"channel":"api","metadata":{"name":"Home"}}`, ``},
		{"screen", `{"name":"S","userId":"u","properties":{"name":"mine"},` + at + `}`, `{"event_name":"screen","user_id":"u","timestamp":1795441970,"channel":"api","metadata":{"name":"mine"}}`, ``},
		{"identify", `{"userId":"u","traits":{"a":1}}`, ``, ``},
		{"batch", `{"type":"alias","userId":5}`, ``, ``},

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
			if _, err := q.encodeSegment(t.Context(), c.kind, segmentNow); err != nil {
				t.Errorf("%.200s: %v", body, err)
				continue
			}
			got := ""
			if len(q.records) > 0 {
				got = string(q.arena.B[2*len(eventID{}):])
			}
			if errors := "[" + string(q.errors.Bytes()) + "]"; got != c.want || !strings.Contains(errors, c.errors) || c.errors == "" && q.failed > 0 || !json.Valid([]byte(errors)) {
				t.Errorf("%s %.300s:\n got %s %s\nwant %s %s", c.kind, c.message, got, errors, c.want, c.errors)
			}
		}
	}
}

// TestSegmentSingle: one message does not hold the memory of a batch.
func TestSegmentSingle(t *testing.T) {
	in := newIngester(new(batches.Producer), &settings{maxInFlightBytes: 1 << 30}, &newStats().ingest, nil)
	ac, err := newAccess(&settings{serverHost: "localhost"})
	if err != nil {
		t.Fatal(err)
	}
	body := `{"batch":[` + strings.Repeat(`{"type":"track","event":"e","userId":"u"},`, 999) + `{"type":"track","event":"e","userId":"u"}]}`
	q := in.receive(httptest.NewRecorder(), httptest.NewRequest("POST", "/v1/batch", strings.NewReader(body)), &in.bulks)
	if _, err := q.encodeSegment(t.Context(), "batch", segmentNow); err != nil || len(q.records) != 1000 {
		t.Fatal(err, len(q.records))
	}
	q.release()
	in.bodies = budget.New(64<<10, 0)
	w := httptest.NewRecorder()
	(&segment{in, ac}).serve(w, httptest.NewRequest("POST", "/v1/track", strings.NewReader(`{"userId":"u"}`)), "track")
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
		if _, err := q.encodeSegment(b.Context(), "batch", segmentNow); err != nil || len(q.records) != 1000 {
			b.Fatal("not 1000 records", err)
		}
		q.sealRecords("events")
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/1000, "ns/event")
}
