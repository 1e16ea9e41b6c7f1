// The document says what the program does, and the program what the document says; pages load nothing from elsewhere;
// the overview's numbers are those of an independent count.

package main

import (
	"encoding/json"
	"fmt"
	"math"
	"net"
	"net/http"
	"os"
	"regexp"
	"slices"
	"sort"
	"strings"
	"testing"
	"time"
)

// document is what the tests need of openapi.json.
type document struct {
	Paths map[string]map[string]struct {
		Responses map[string]any
	}
}

func readDocument(t *testing.T) (doc document, text string) {
	t.Helper()
	b, err := os.ReadFile("web/openapi.json")
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(b, &doc); err != nil {
		t.Fatal(err)
	}
	return doc, string(b)
}

// TestDocumentRoutes: every route of the API is in the document, and the reverse; so is every code of an error.
func TestDocumentRoutes(t *testing.T) {
	doc, text := readDocument(t)
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

// TestDocumentStatuses produces every status that the document has, and no other.
func TestDocumentStatuses(t *testing.T) {
	alone(t)
	doc, _ := readDocument(t)
	want := map[string]bool{}
	for path, methods := range doc.Paths {
		for method, op := range methods {
			for status := range op.Responses {
				want[strings.ToUpper(method)+" "+path+" "+status] = true
			}
		}
	}
	p := startProgram(t, newSpace(t, "API_KEYS="+firstKey, "WRITE_KEYS="+secondKey, "ACK_TIMEOUT=1s", "MAX_IN_FLIGHT_BYTES_PER_CLIENT=100000"))
	got := map[string]bool{}
	try := func(method, path, contentType, body string, headers ...string) {
		status, _, _ := p.ask(method, path, []byte(body), append(headers, "Content-Type: "+contentType)...)
		path, _, _ = strings.Cut(path, "?")
		documented := method
		if status == http.StatusMethodNotAllowed { // stands with the method that is there
			for m := range doc.Paths[path] {
				documented = strings.ToUpper(m)
			}
		}
		got[fmt.Sprintf("%s %s %d", documented, path, status)] = true
	}
	key := "X-API-Key: " + firstKey
	event := func() string { return string(freshEvent("d")) }
	const metrics, overview, pipeline = "/api/v1/metrics", "/api/v1/overview", "/api/v1/pipeline"
	asked := metrics + "?event_name=d&from=1&to=2"
	for _, path := range []string{onePath, bulkPath} {
		try("POST", path, jsonCT, event())
		try("POST", path, jsonCT, "{", key)
		try("POST", path, "text/html", "x", key)
		try("POST", path, "text/plain", "x", key, "Origin: https://other.example")
		try("POST", path, jsonCT, strings.Repeat(" ", 9<<20), key)
		try("PUT", path, jsonCT, "", key)
	}
	try("POST", onePath, jsonCT, event(), key)
	try("POST", bulkPath, ndjson, event(), key)
	try("POST", bulkPath, ndjson, event()+"\n{}", key)
	for path, body := range map[string]string{onePath: event(), bulkPath: event() + "\n" + event()} {
		media := map[string]string{onePath: jsonCT, bulkPath: ndjson}[path]
		p.await("stored", time.Minute, func() bool { // 202 when it takes longer than 5 s
			try("POST", path+"?wait=stored", media, body, key)
			return got["POST "+path+" 200"]
		})
	}
	segmentParts := []string{"batch", "track", "page", "screen", "identify", "group", "alias"}
	for _, part := range segmentParts {
		message := `{"event":"d","userId":"u"}`
		if part == "batch" {
			message = `{"batch":[` + message + `]}`
		}
		path := "/v1/" + part
		try("POST", path, jsonCT, message)
		try("POST", path, jsonCT, message, key)
		try("POST", path, jsonCT, "{", key)
		try("POST", path, "text/html", "x", key)
		try("POST", path, "text/plain", "x", key, "Origin: https://other.example")
		try("POST", path, jsonCT, strings.Repeat(" ", 9<<20), key)
		try("PUT", path, jsonCT, "", key)
	}
	for _, path := range []string{asked, overview, pipeline} {
		try("GET", path, "", "")
		try("GET", path, "", "", key)
		try("GET", path, "", "", "X-API-Key: "+secondKey)
		try("DELETE", path, "", "", key)
	}
	try("GET", metrics, "", "", key)
	try("GET", overview+"?from=x", "", "", key)
	try("GET", pipeline+"?x=1", "", "", key)
	for _, path := range []string{"/health", "/ready"} {
		try("GET", path, "", "")
		try("POST", path, "", "")
	}
	var slow []net.Conn
	p.await("too much in flight", 20*time.Second, func() bool {
		conn, err := net.Dial("tcp", strings.TrimPrefix(p.url, "http://")) // one that is refused itself leaves it to the next
		if err != nil {
			t.Fatal(err)
		}
		slow = append(slow, conn)
		fmt.Fprintf(conn, "POST %s HTTP/1.1\r\nHost: x\r\n%s\r\nContent-Length: 1000000\r\n\r\n%s", bulkPath, key, strings.Repeat(" ", 200_000))
		status, _, _ := p.ask("POST", onePath, []byte(event()), key)
		return status == http.StatusTooManyRequests
	})
	try("POST", onePath, jsonCT, event(), key)
	try("POST", bulkPath, ndjson, event(), key)
	for _, part := range segmentParts {
		try("POST", "/v1/"+part, jsonCT, "{}", key)
	}
	for _, conn := range slow {
		conn.Close()
	}
	p.await("gone", 10*time.Second, func() bool {
		status, _, _ := p.ask("POST", onePath, []byte(event()), key)
		return status == http.StatusAccepted
	})
	control(t, "/kafka/stop")
	try("POST", onePath, jsonCT, event(), key)
	try("POST", bulkPath, ndjson, event(), key)
	try("POST", "/v1/batch", jsonCT, `{"batch":[{"type":"track","event":"d","userId":"u"}]}`, key)
	for _, part := range []string{"track", "page", "screen"} {
		try("POST", "/v1/"+part, jsonCT, `{"event":"d","userId":"u"}`, key)
	}
	try("GET", "/ready", "", "")
	control(t, "/kafka/start")
	control(t, "/clickhouse/stop")
	try("GET", asked, "", "", key)
	try("GET", overview, "", "", key)
	control(t, "/clickhouse/start")
	for s := range want {
		if !got[s] {
			t.Errorf("%s is documented and was not produced", s)
		}
	}
	for s := range got {
		if !want[s] {
			t.Errorf("%s was produced and is not documented", s)
		}
	}
}

func TestPages(t *testing.T) {
	t.Parallel()
	p := startProgram(t, newSpace(t, "API_KEYS="+firstKey))
	for path, kind := range map[string]string{
		"/": "text/html", "/web/app.js": "text/javascript", "/web/draw.js": "text/javascript", "/web/app.css": "text/css", "/web/icon.svg": "image/svg+xml", "/swagger/index.html": "text/html",
		"/swagger/swagger-ui-bundle.js": "text/javascript", "/swagger/swagger-ui.css": "text/css", "/swagger/swagger-initializer.js": "text/javascript",
		"/swagger/openapi.json": "application/json",
	} {
		status, header, body := p.ask("GET", path, nil)
		if status != 200 || !strings.HasPrefix(header.Get("Content-Type"), kind) || header.Get("X-Content-Type-Options") != "nosniff" ||
			!strings.Contains(header.Get("Content-Security-Policy"), "default-src 'self'") || !strings.Contains(header.Get("Content-Security-Policy"), "frame-ancestors 'none'") {
			t.Errorf("%s: %d %v", path, status, header)
		}
		if status, _, _ := p.ask("GET", path, nil, "If-None-Match: "+header.Get("ETag")); status != 304 && path != "/swagger/openapi.json" {
			t.Errorf("%s again: %d", path, status)
		}
		if strings.HasSuffix(path, "/") || strings.HasSuffix(path, "html") || strings.HasPrefix(path, "/web/") {
			if m := regexp.MustCompile(`(?i)(src|href)="?(https?:)?//|url\(|@import|fetch\(['"` + "`" + `]http`).FindString(body); m != "" {
				t.Errorf("%s loads something from elsewhere: %s", path, m)
			}
		}
	}
	for path, want := range map[string]int{"/web/none": 404, "/web/": 404, "/swagger/none.js": 404, "/swagger/swagger-ui.js.map": 404, "/swagger/../main.go": 404} {
		if status, _, _ := p.ask("GET", path, nil); status != want {
			t.Errorf("%s: %d, want %d", path, status, want)
		}
	}
	_, _, doc := p.ask("GET", "/swagger/openapi.json", nil)
	if !json.Valid([]byte(doc)) || regexp.MustCompile(`1767225600|1767139200|2026-01-01T00:00:00.123Z`).MatchString(doc) {
		t.Error("the document's examples are not of now")
	}
}

func TestOverview(t *testing.T) {
	t.Parallel()
	p := startProgram(t, newSpace(t))
	type sent struct {
		name, user, channel, campaign, currency string
		at                                      int64
		price                                   float64
	}
	now := time.Now().Unix()
	base := (now/daySeconds - 9) * daySeconds // 900 events reach 7.2 days further: none is of the last 24 hours, at any hour
	var all []sent
	var body []byte
	for i := range int64(900) {
		e := sent{[]string{"view", "purchase", "cart"}[i%3], fmt.Sprint("u", i*7%83), []string{"", "web", "api"}[i/3%3], fmt.Sprint("c", i%13), []string{"TRY", "", "USD"}[i/9%3], base + i*691, float64(i) + 0.25}
		if e.campaign == "c0" {
			e.campaign = ""
		}
		all = append(all, e)
		body = fmt.Appendf(body, `{"event_name":%q,"user_id":%q,"channel":%q,"campaign_id":%q,"timestamp":%d,"metadata":{"price":%v,"currency":%q}}`+"\n", e.name, e.user, e.channel, e.campaign, e.at, e.price, e.currency)
	}
	for range 2 { // the second time they are duplicates
		if status, _, answer := p.do("POST", bulkPath, ndjson, "", body); status != 202 {
			t.Fatal(status, answer)
		}
	}
	drained(p)
	for _, r := range [][2]int64{{base, base + 9*daySeconds}, {base + 3600, base + 3600 + 3599}, {base + 100, base + 200000}, {base + 7200, base + 10799}, {base + 691, base + 1383}, {base + 1, base + 2}, {base - 50, base + 100000}} {
		for _, filter := range []struct{ channel, name string }{{"", ""}, {"web", ""}, {"", "purchase"}, {"api", "view"}} {
			var total sum
			groups := map[string]map[string]*sum{"channels": {}, "event_names": {}, "campaigns": {}, "series": {}}
			bucket, width := "hour", time.Hour
			if r[1]-r[0] > 3*daySeconds {
				bucket, width = "day", 24*time.Hour
			} else if r[1]-r[0] < 3600 {
				bucket, width = "minute", time.Minute
			}
			campaigns := map[string]bool{}
			for _, e := range all {
				if e.at < r[0] || e.at > r[1] || filter.channel != "" && e.channel != filter.channel || filter.name != "" && e.name != filter.name {
					continue
				}
				revenue, at := 0.0, time.Unix(e.at, 0).UTC().Truncate(width)
				if e.name == "purchase" && e.currency != "USD" {
					revenue = e.price
				}
				total.add(e.user, revenue)
				keys := map[string]string{"channels": e.channel, "event_names": e.name, "series": at.Format(time.RFC3339)}
				if e.campaign != "" {
					keys["campaigns"] = e.campaign
					campaigns[e.campaign] = true
				}
				for kind, key := range keys {
					if groups[kind][key] == nil {
						groups[kind][key] = new(sum)
					}
					groups[kind][key].add(e.user, revenue)
				}
			}
			path := fmt.Sprintf("/api/v1/overview?from=%d&to=%d&channel=%s&event_name=%s", r[0], r[1], filter.channel, filter.name)
			status, _, answer := p.do("GET", path, "", "", nil)
			var a map[string]any
			if err := json.Unmarshal([]byte(answer), &a); err != nil || status != 200 {
				t.Fatal(status, answer)
			}
			if a["total_count"] != float64(total.count) || a["unique_users"] != float64(len(total.users)) || math.Abs(a["revenue"].(float64)-total.revenue) > 0.001 ||
				a["active_campaigns"] != float64(len(campaigns)) || a["bucket"] != bucket {
				t.Errorf("%s: %s; want %d events, %d users, revenue %v, %d campaigns", path, answer, total.count, len(total.users), total.revenue, len(campaigns))
			}
			for kind, want := range groups {
				list := a[kind].([]any)
				if len(list) != min(len(want), overviewTop) && kind != "series" || kind == "series" && len(list) != len(want) {
					t.Errorf("%s: %d %s, want %d", path, len(list), kind, len(want))
				}
				for _, g := range list {
					g := g.(map[string]any)
					w := want[g["key"].(string)]
					if w == nil || g["total_count"] != float64(w.count) || kind == "series" && bucket != "minute" && g["unique_users"] != float64(len(w.users)) || kind != "campaigns" && math.Abs(g["revenue"].(float64)-w.revenue) > 0.001 {
						t.Errorf("%s: %s %v, want %+v", path, kind, g, w)
					}
				}
			}
		}
	}
	for query, want := range map[string]string{"from=x": codeInvalidFormat, "from=5&to=5": codeInvalidRange, "channel=tv": codeInvalidChannel, "to=1795441976000": codeInvalidFormat, "from=1&from=2": codeInvalidFormat, "from=": codeRequired} {
		if status, _, answer := p.do("GET", "/api/v1/overview?"+query, "", "", nil); status != 400 || !strings.Contains(answer, want) {
			t.Errorf("%s: %d %s", query, status, answer)
		}
	}
	for _, query := range []string{"from=-300&to=-50", "from=-9223372036854775808&to=0", "from=-1&to=99999999999", "to=-1", "from=0&to=4294967296"} {
		if status, _, answer := p.do("GET", "/api/v1/overview?"+query, "", "", nil); status != 200 {
			t.Errorf("%s: %d %s", query, status, answer)
		}
	}
	if status, _, answer := p.do("GET", "/api/v1/overview", "", "", nil); status != 200 || !strings.Contains(answer, `"total_count":0,`) {
		t.Errorf("of the last day: %d %s", status, answer)
	}
}

// TestLargeRevenue: prices as large as they can be stored, of which nine are more than 64 bits hold.
func TestLargeRevenue(t *testing.T) {
	t.Parallel()
	env := newSpace(t)
	p := startProgram(t, env)
	clickhouseQuery(t, fmt.Sprintf("INSERT INTO %s.events (event_id, event_name, timestamp, price) SELECT SHA256(toString(number)), 'purchase', toDateTime(%d), toDecimal64('99999999999999.9999', 4) FROM numbers(30)", space(env, "CLICKHOUSE_DATABASE"), time.Now().Unix()-60))
	if status, _, answer := p.do("GET", "/api/v1/overview", "", "", nil); status != 200 || !json.Valid([]byte(answer)) || strings.Count(answer, `"revenue":2999999999999999.997`) != 4 {
		t.Errorf("%d %s", status, answer)
	}
}

// sum is an independent count.
type sum struct {
	count   int
	users   map[string]bool
	revenue float64
}

func (s *sum) add(user string, revenue float64) {
	if s.users == nil {
		s.users = map[string]bool{}
	}
	s.count++
	s.users[user] = true
	s.revenue += revenue
}

// TestStalledOnThePage: the page says what /ready says of consumers, without the seconds, with a cause and without.
func TestStalledOnThePage(t *testing.T) {
	script, err := os.ReadFile("web/app.js")
	if err != nil {
		t.Fatal(err)
	}
	found := regexp.MustCompile(`consumers\.replace\(/(.*?)/,`).FindSubmatch(script)
	if found == nil {
		t.Fatal("app.js does not cut anything off")
	}
	cut := regexp.MustCompile(string(found[1]))
	for text, want := range map[string]string{"stalled 7 s, 14 waiting": "14 waiting", "stalled 7 s: insert: no, 14 waiting": "insert: no, 14 waiting", "not started yet": "not started yet"} {
		if got := cut.ReplaceAllString(text, ""); got != want {
			t.Errorf("%s: %q", text, got)
		}
	}
}
