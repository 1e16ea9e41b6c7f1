// The write path from inside: settings, bodies, Segment's messages, and the document of the routes.

package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"math/big"
	"net/http"
	"net/http/httptest"
	"os"
	"runtime"
	"slices"
	"sort"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/event-ingestion/event-ingestion/internal/testkit"

	"github.com/event-ingestion/event-ingestion/internal/batches"
	"github.com/event-ingestion/event-ingestion/internal/budget"
	"github.com/event-ingestion/event-ingestion/internal/troubles"
)

func TestSettings(t *testing.T) {
	env := map[string]string{"SERVER_PORT": "99999", "WORKER_BATCH_TIMEOUT": "soon", "KAFKA_BROKERS": "nohost", "CLICKHOUSE_HOST": "localhost:9000", "CLICKHOUSE_DATABASE": "a;b", "LOG_LEVEL": "loud"}
	_, err := loadSettings(func(k string) string { return env[k] })
	for name := range env {
		if err == nil || !strings.Contains(err.Error(), name+"=") {
			t.Errorf("%s is not named in: %v", name, err)
		}
	}
	cfg, err := loadSettings(func(string) string { return "" })
	if err != nil || cfg.workerCount != 20 || cfg.workerBatchSize != 2000 || cfg.workerBatchTimeout != 50*time.Millisecond || cfg.serverPort != 8080 {
		t.Errorf("defaults: %+v, %v", cfg, err)
	}
	contradict := map[string]string{"KAFKA_MIN_ISR": "3", "KAFKA_LINGER": "10s", "KAFKA_SASL_USERNAME": "u", "TLS_KEY_FILE": "f"}
	_, err = loadSettings(func(k string) string { return contradict[k] })
	for name := range contradict {
		if err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("that %s contradicts another one is not said: %v", name, err)
		}
	}
	if _, err := loadSettings(func(k string) string { return map[string]string{"CLICKHOUSE_HOST": "::1"}[k] }); err != nil {
		t.Error(err)
	}
	const firstKey, secondKey = "key-one-0123456789abcdef", "key-two-0123456789abcdef"
	both := map[string]string{"API_KEYS": secondKey + "," + firstKey, "WRITE_KEYS": firstKey}
	if _, err := loadSettings(func(k string) string { return both[k] }); err == nil || !strings.Contains(err.Error(), "WRITE_KEYS") || strings.Contains(err.Error(), firstKey) {
		t.Errorf("a key that may do everything, and only send: %v", err)
	}
	for _, c := range []struct{ name, value string }{
		{"API_KEYS", " , "}, {"WRITE_KEYS", ","}, // no key lets everybody in
		{"KAFKA_BROKERS", "a:b"}, {"KAFKA_BROKERS", "a:9092,b:0"}, {"KAFKA_BROKERS", "a:65536"}, {"CLICKHOUSE_HOST", "[::1]:9000"}, {"CLICKHOUSE_HOST", "http://localhost"},
		{"KAFKA_SASL_USERNAME", "u"}, {"KAFKA_LINGER", "10s"}, {"RETENTION_DAYS", "30"},
		{"CORS_ORIGINS", "https://a.example,https://Shop.example"}, {"CORS_ORIGINS", "https://shop.example:443"}, {"CORS_ORIGINS", "http://maça.example"}, {"CORS_ORIGINS", "null"},
		{"PURCHASE_EVENTS", "a,,b"}, {"PURCHASE_EVENTS", "a,b\x00c"}, {"PURCHASE_EVENTS", "\xff"}, {"PURCHASE_EVENTS", strings.Repeat("e", 101)},
		{"CURRENCY", "?"}, {"CURRENCY", "T'Y"}, {"CURRENCY", "₺"}, {"CURRENCY", strings.Repeat("T", 21)},
		{"KAFKA_OAUTH_TOKEN_URL", "http://login.example/token"}, {"KAFKA_OAUTH_TOKEN_FILE", "f"}, {"KAFKA_OAUTH_TOKEN_URL", "login.example"}, {"KAFKA_OAUTH_EXTENSIONS", "a"},
		{"KAFKA_SASL_MECHANISM", "OAUTHBEARER"}, {"KAFKA_SASL_MECHANISM", "PLAIN"}, {"KAFKA_TLS_CERT_FILE", "f"}, {"KAFKA_TLS_KEY_FILE", "f"},
		{"CLOCK_SKEW", "1.5s"}, {"KAFKA_TOPIC", "a b"}, {"KAFKA_TOPIC", ".."}, {"KAFKA_TOPIC", strings.Repeat("t", 244)},
		{"CLICKHOUSE_DATABASE", "Table"}, {"CLICKHOUSE_DATABASE", "function"}, {"CLICKHOUSE_DATABASE", "system"}, {"CLICKHOUSE_DATABASE", strings.Repeat("d", 151)},
	} {
		_, err := loadSettings(func(k string) string { return map[string]string{c.name: c.value}[k] })
		if err == nil || !strings.Contains(err.Error(), c.name) {
			t.Errorf("%s=%q: %v", c.name, c.value, err)
		}
	}
	readme, err := os.ReadFile("deploy/README.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range new(settings).settingsTable() {
		if !strings.Contains(string(readme), "`"+s.name+"`") {
			t.Errorf("deploy/README.md does not explain %s", s.name)
		}
	}
}

// TestTinyBlocks: a zstd body of half a million blocks, each with tables of its own, would take seconds to decompress. One that was
// flushed after each event is fine.
func TestTinyBlocks(t *testing.T) {
	t.Parallel()
	in := newIngester(new(batches.Producer), &settings{maxInFlightBytes: 1 << 30, ackTimeout: time.Minute}, &newStats().ingest, nil)
	event := testkit.FreshEvent("b")
	flushed := bytes.Repeat(testkit.Zstded(event), maxBulkEvents)
	// A frame with a block of 16 spaces, and blocks that repeat 3 of them: no literals, one sequence, three tables, its states.
	tables := "\x28\xb5\x2f\xfd\x00\x58" + "\x82\x00\x00 " +
		strings.Repeat("\x6c\x00\x00"+"\x00"+"\x01\xa8"+"\xe4\xff"+"\xe3\x7f"+"\xe4\xff"+"\x00\x00\x00\x04", 500_000) + "\x01\x00\x00"
	for _, c := range []struct {
		body []byte
		size int
		want string
	}{{flushed, maxBulkEvents * len(event), ""}, {[]byte(tables), 0, "zstd blocks are too small"}} {
		r := httptest.NewRequest("POST", bulkPath, bytes.NewReader(c.body))
		r.Header.Set("Content-Encoding", "zstd")
		acc := in.bodies.Open(client{})
		body, err := readBody(acc, r, maxBulkBody, time.Minute)
		if got := fmt.Sprint(err); len(body.Bytes()) != c.size || err == nil != (c.want == "") || !strings.Contains(got, c.want) {
			t.Errorf("%d bytes, of %d compressed: %v, want %q", len(body.Bytes()), len(c.body), err, c.want)
		}
		acc.Put(&body)
		acc.Close()
	}
}

const segmentNow = 1795441976 // the time of receipt, as the tests' messages would have it: 2026-11-23T13:52:56Z

// TestSegmentItems: what is wrong with a message is said by the mapping and by the rules of every event, at once.
func TestSegmentItems(t *testing.T) {
	q := newTestRequest()
	long := strings.Repeat("x", 101)
	for _, c := range []struct {
		kind, message string
		want          string // the record, or "" and the errors' parts
		errors        string
	}{
		{"batch", `{"event":"e","userId":"u"}`, ``, `{"index":0,"field":"type","code":"validation.invalid-format.error","error":"type must be`},
		{"batch", `{"type":"t","event":"e","userId":"u"}`, ``, `"field":"type"`},
		{"batch", `[1]`, ``, `{"index":0,"field":"","code":"validation.invalid-format.error","error":"an event must be a JSON object"}`},
		{"track", `{"userId":true}`, ``, `{"index":0,"field":"user_id","code":"validation.invalid-format.error","error":"user_id must be a string, not true"},{"index":0,"field":"event_name","code":"validation.required.error","error":"event_name is required"}`},
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
	if err := q.encodeSegment(t.Context(), "batch", segmentNow); err != nil || len(q.records) != 1000 {
		t.Fatal(err, len(q.records))
	}
	q.release()
	in.bodies = budget.New(64<<10, 0)
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

// TestDocumentRoutes: every route of the API is in the document, and the reverse; so is every code of an error.
func TestDocumentRoutes(t *testing.T) {
	doc, text := testkit.ReadDocument(t, "web/openapi.json")
	var documented, routed []string
	for path, methods := range doc.Paths {
		for method := range methods {
			documented = append(documented, strings.ToUpper(method)+" "+path)
		}
	}
	s := &system{cfg: &settings{role: "all"}, metrics: newMetricsAPI(nil, nil, nil), ready: &readiness{}}
	for _, rt := range s.routes(nil) {
		short := rt.name == "segment" && (len(rt.path) == len("/v1/t") || rt.path == "/v1/import") // stands with the whole name
		if rt.name != "pages" && !short {
			routed = append(routed, rt.method+" "+rt.path)
		}
	}
	sort.Strings(documented)
	sort.Strings(routed)
	if !slices.Equal(documented, routed) {
		t.Errorf("documented %v, routed %v", documented, routed)
	}
	for _, code := range []string{codeRequired, codeMaxLength, codeFuture, codeExpired, codeInvalidChannel, codeMaxTags,
		codeTagTooLong, codeInvalidFormat, codeInvalidRange, codeInvalidGroupBy, codeUnavailable} {
		if !strings.Contains(text, `"`+code+`"`) {
			t.Errorf("%s is not in the document", code)
		}
	}
}

// TestFaultsInTheLog: Kafka is away for ten minutes, and a hundred requests a second say so, each about another port.
func TestFaultsInTheLog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) { // time passes when everybody sleeps
		l, lines, told := new(requestLog), 0, 0
		for i := range 60_000 {
			if n := l.takes(http.StatusServiceUnavailable, "bulk", fmt.Sprintf("dial 127.0.0.1:%d: refused", i)); n > 0 {
				lines, told = lines+1, told+n
			}
			if i < 2*maxFaults {
				l.takes(http.StatusInternalServerError, fmt.Sprint("route", i), "")
			}
			time.Sleep(10 * time.Millisecond)
		}
		if lines > 12 || told < 50_000 || told > 60_000 || len(l.told) > maxFaults {
			t.Errorf("%d lines about %d of 60000 requests, %d ways are remembered", lines, told, len(l.told))
		}
		if l.takes(http.StatusServiceUnavailable, "bulk", "too much is in flight") != 1 || l.takes(http.StatusServiceUnavailable, "metrics", "dial") != 1 {
			t.Error("another cause, or another route, waits for the minute of the first")
		}
	})
}

// maxStrangerTime is of an answer that anybody gets.
const maxStrangerTime = 300 * time.Microsecond

// TestAnybodyCosts: what is answered without a key takes little CPU, and no more memory than a few times what was asked.
func TestAnybodyCosts(t *testing.T) {
	st := newStats()
	ac, err := newAccess(&settings{apiKeys: []string{"0123456789abcdef"}})
	if err != nil {
		t.Fatal(err)
	}
	ready := &readiness{broken: &brokenParts{}, answered: time.Now().Add(time.Hour), mayKnow: ac.mayKnow, stalled: func(bool) (worst, all time.Duration, waiting int64) { return 0, 0, 0 }, trouble: troubles.New().Oldest}
	in := newIngester(new(batches.Producer), &settings{maxInFlightBytes: 1 << 30, ackTimeout: time.Minute}, &st.ingest, nil)
	routes := append(in.segmentRoutes(ac), route{"GET", "/health", "health", serveHealth}, route{"GET", "/ready", "ready", ready.serve},
		route{"POST", bulkPath, "bulk", in.serveBulk}, route{"GET", "/api/v1/metrics", "metrics", nil})
	handler := newServer("", routes, &settings{}, ac, st).Handler
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	for _, c := range []struct {
		status       int
		method, path string
	}{
		{200, "GET", "/health"}, {200, "GET", "/ready"}, {404, "GET", "/none"}, {404, "GET", "/" + strings.Repeat("a", 12<<10)}, {404, "GET", "/" + strings.Repeat("%01", 4<<10)},
		{404, "GET", "/" + strings.Repeat("../", 4<<10)}, {405, "POST", "/health"}, {401, "POST", bulkPath}, {401, "GET", "/api/v1/metrics"}, {401, "POST", bulkPath + "?" + strings.Repeat("a&", 6<<10)},
		{401, "POST", bulkPath + "?key=" + strings.Repeat("%41", 4<<10)}, {401, "GET", "/api/" + strings.Repeat("a/", 6<<10)},
	} {
		r := httptest.NewRequest(c.method, c.path, nil)
		most := 4<<10 + 4*len(c.path)
		ask := func() {
			answer := cost{}
			if handler.ServeHTTP(discard{http.Header{}, &answer}, r); answer.status != c.status {
				t.Fatalf("%s %.40s: %d, want %d", c.method, c.path, answer.status, c.status)
			}
		}
		best := testkit.LeastThreadTime(ask)
		const times = 20
		allocated := allocatedBytes()
		for range times {
			ask()
		}
		bytes := (allocatedBytes() - allocated) / times
		if best > maxStrangerTime && best > testkit.Here(maxStrangerTime) || bytes > most {
			t.Errorf("%s %.40s: %s and %d bytes", c.method, c.path, best, bytes)
		}
	}
}

// Limits of what a request without a key costs: of encoding/json's time for what is searched.
const (
	maxUnknownBase  = 5 * time.Millisecond
	maxUnknownRatio = 6
)

// TestKeyInBody: the key is found in a body before anything else is done with it, at a cost that goes by what was sent; what the request
// holds is then its owner's.
func TestKeyInBody(t *testing.T) {
	const key = "0123456789abcdef"
	const item = `{"type":"track","event":"e","userId":"u"}`
	ac, err := newAccess(&settings{apiKeys: []string{key}})
	if err != nil {
		t.Fatal(err)
	}
	in := newIngester(new(batches.Producer), &settings{maxInFlightBytes: 64 << 20, maxInFlightPerClient: 8 << 20, ackTimeout: time.Minute}, &newStats().ingest, nil)
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	many := strings.Repeat(item+",", 999)
	for _, c := range []struct {
		name, body string
		compress   func([]byte) []byte
		status     int // 0 is let in
		want       string
	}{
		{"beside", `{"batch":[` + item + `],"writeKey":"` + key + `"}`, nil, 0, ""},
		{"in front", `{"writeKey":"` + key + `","batch":[` + many + item + `]}`, testkit.Gzipped, 0, ""},
		{"in front of much", `{"writeKey":"` + key + `","x":"` + strings.Repeat("x", 7<<20) + `","batch":[` + item + `]}`, testkit.Gzipped, 0, ""},
		{"in a message", `{"batch":[{"type":"track","event":"e","userId":"u","writeKey":"` + key + `"},` + many[:len(many)-1] + `]}`, testkit.Zstded, 0, ""},
		{"none", `{"batch":[` + many + item + `]}`, nil, 401, "send a key"},
		{"none, compressed", `{"batch":[` + item + `]}`, testkit.Gzipped, 401, "send a key"},
		{"wrong", `{"writeKey":"wrong","batch":[` + many + item + `]}`, testkit.Gzipped, 401, "not valid"},
		{"none of these", `[`, nil, 401, "send a key"},
		{"bomb", `{"batch":[` + item + `],"x":"` + strings.Repeat("x", 7<<20) + `"}`, testkit.Gzipped, 401, "Basic authentication"},
		{"bomb of messages", `{"batch":[` + many + `{"x":[` + strings.Repeat("0,", 4<<20-100<<10) + `0]}]}`, testkit.Gzipped, 401, "Basic authentication"},
		{"bomb of zstd", `{"batch":[` + many + `{"x":[` + strings.Repeat("0,", 4<<20-100<<10) + `0]}]}`, testkit.Zstded, 401, "Basic authentication"},
		{"beyond the limit", strings.Repeat("x", 9<<20), testkit.Gzipped, 401, "Basic authentication"},
		{"broken", "x", func(b []byte) []byte { return b }, 400, "could not be read"},
	} {
		body := []byte(c.body)
		encoding := "gzip"
		if c.compress == nil {
			encoding = ""
		} else if body = c.compress(body); string(body[:1]) == "\x28" {
			encoding = "zstd"
		}
		best := time.Hour
		for range 10 { // other processes disturb a measurement
			r := httptest.NewRequest("POST", "/v1/batch", bytes.NewReader(body))
			r.Header.Set("Content-Encoding", encoding)
			w, started := httptest.NewRecorder(), testkit.ThreadTime()
			q := in.receiveUnknown(w, r, &in.bulks, "batch", ac)
			best = min(best, testkit.ThreadTime()-started)
			if q == nil != (c.status != 0) || q == nil && (w.Code != c.status || !strings.Contains(w.Body.String(), c.want)) {
				t.Fatalf("%s: %d %s", c.name, w.Code, w.Body)
			}
			if q != nil {
				if string(q.body.B) != c.body || q.account != in.bodies.Open(sha256.Sum256([]byte(key))) {
					t.Errorf("%s: %d bytes, on the account of another", c.name, len(q.body.B))
				}
				q.account.Close()
				q.release()
			}
			if used := in.bodies.Used(); used != 0 {
				t.Fatalf("%s: %d bytes were not given back", c.name, used)
			}
		}
		head := c.body[:min(len(c.body), searchedBase+searchedTimes*len(body))]
		if limit := maxUnknownBase + maxUnknownRatio*jsonTime([]byte(head)); c.status != 0 && best > limit {
			t.Errorf("%s: %d bytes take %s until they are refused, the most is %s", c.name, len(body), best, limit)
		} else {
			t.Logf("%s: %d bytes, %s of %s", c.name, len(body), best, limit)
		}
	}
}

// TestPriceOf: what of an event's metadata is a price and a currency.
func TestPriceOf(t *testing.T) {
	var r skimmer
	price := func(value string) string {
		got, _ := priceOf(&r, []byte(`{"a":1,"price":`+value+`}`))
		return fmt.Sprint(int64(got))
	}
	for value, want := range map[string]string{
		`10`: "100000", `129.99`: "1299900", `0`: "0", `-0`: "0", `-5.5`: "-55000", `1e2`: "1000000", `1.25E+1`: "125000", `12345e-2`: "1234500", `"129.99"`: "1299900", `"-1e1"`: "-100000", `"\u0031\u002e5"`: "15000",
		`0.0001`: "1", `0.00014`: "1", `0.00015`: "2", `-0.00015`: "-2", `0.00005`: "1", `0.00004999`: "0", `5e-5`: "1", `5e-6`: "0", `49e-6`: "0", `0.1`: "1000", `1.00005`: "10001", `129.9900000000000000000000000001`: "1299900",
		`9999999999999.99`: "99999999999999900", `99999999999999`: "999999999999990000", `99999999999999.9999`: "999999999999999999", `-99999999999999.9999`: "-999999999999999999", `12345678901234.5678`: "123456789012345678",
		`99999999999999.99994`: "999999999999999999", `99999999999999.99995`: "0", `100000000000000`: "0", `-100000000000000`: "0", `1e14`: "0", `1e13`: "100000000000000000", `1e400`: "0", `1e99999999999999999999`: "0", `1e-99999999999999999999`: "0", `0e99999999999999999999`: "0",
		`9223372036854775807`: "0", `922337203685477.5807`: "0", `0.` + strings.Repeat("0", 900) + `1e902`: "100000", `1` + strings.Repeat("0", 900) + `e-899`: "100000",
		`null`: "0", `true`: "0", `"x"`: "0", `""`: "0", `" 1"`: "0", `"1 "`: "0", `"+1"`: "0", `"01"`: "0", `".5"`: "0", `"1."`: "0", `"1,5"`: "0", `"0x10"`: "0", `"NaN"`: "0", `"Infinity"`: "0", `"null"`: "0", `"true"`: "0", `"-"`: "0", `"1e"`: "0", `[1]`: "0", `{"price":1}`: "0", `"\"1\""`: "0", `"1\u0000"`: "0",
	} {
		if got := price(value); got != want {
			t.Errorf("price %.60s: %s, want %s", value, got, want)
		}
	}
	for _, c := range []struct{ metadata, want string }{
		{`{}`, "0 "}, {`{"price":1}`, "10000 "}, {`{"currency":"TRY"}`, "0 TRY"}, {`{"price":1,"currency":"try"}`, "10000 try"}, {`{"currency":null,"price":1}`, "10000 "}, {`{"currency":"","price":1}`, "10000 "},
		{`{"currency":840}`, "0 ?"}, {`{"currency":{"code":"USD"}}`, "0 ?"}, {`{"currency":["USD"]}`, "0 ?"}, {`{"currency":true}`, "0 ?"}, {`{"currency":false}`, "0 ?"}, {`{"currency":"` + strings.Repeat("x", 1300) + `"}`, "0 ?"},
		{`{"curr\u0065ncy":"USD","\u0070rice":2}`, "20000 USD"}, {`{"\u0070\u0072\u0069\u0063\u0065":"\u0031","\u0063\u0075\u0072\u0072\u0065\u006e\u0063\u0079":"\u0055SD"}`, "10000 USD"},
		{`{"currency":"\u0055SD","x\u0041":1,"price":"\u0031"}`, "10000 USD"}, {`{"Price":1,"Currency":"USD","price ":1,"pric\u00e9":1}`, "0 "}, {`{"a":{"price":1,"currency":"USD"}}`, "0 "},
		// Of members with one name the first counts.
		{`{"price":10,"price":"x"}`, "100000 "}, {`{"price":"x","price":10}`, "0 "}, {`{"price":null,"price":10}`, "0 "}, {`{"price":1,"\u0070rice":2}`, "10000 "}, {`{"currency":"USD","currency":"TRY","price":1}`, "10000 USD"}, {`{"currency":null,"currency":"USD"}`, "0 "},
	} {
		for range 2 { // the second time through a dirty skimmer
			if price, currency := priceOf(&r, []byte(c.metadata)); fmt.Sprint(int64(price), " ", string(currency)) != c.want {
				t.Errorf("%.80s: %d %s, want %s", c.metadata, price, currency, c.want)
			}
		}
	}
	metadata := []byte(`{"a":"b","curr\u0065ncy":"\u0055SD","price":"12\u002e5e1"}`)
	if allocated := testing.AllocsPerRun(100, func() { priceOf(&r, metadata) }); allocated != 0 {
		t.Errorf("%v allocations", allocated)
	}
}

// FuzzPrice: a number of JSON is what exact arithmetic makes of it.
func FuzzPrice(f *testing.F) {
	for text := range strings.FieldsSeq("129.99 -1e-4 99999999999999.99995 0.00005 5e-5 1e14 12e-5 0.000049") {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		exact, ok := new(big.Rat).SetString(text)
		if _, exponent, _ := strings.Cut(strings.ToLower(text), "e"); !isNumber([]byte(text)) || !ok || len(exponent) > 4 {
			return
		}
		exact.Mul(exact, big.NewRat(10_000, 1))
		exact.Add(exact, big.NewRat(int64(exact.Sign()), 2)) // half away from zero
		want := new(big.Int).Quo(exact.Num(), exact.Denom()) // towards zero
		if new(big.Int).Abs(want).Cmp(big.NewInt(999_999_999_999_999_999)) > 0 {
			want.SetInt64(0)
		}
		if got := decimalOf([]byte(text)); got != want.Int64() {
			t.Errorf("%s: %d, want %s", text, got, want)
		}
	})
}
