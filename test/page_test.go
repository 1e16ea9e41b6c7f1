// Pages: those of the program's own, and what a page on another origin can send, in a real browser.

package test

import (
	"bufio"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

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

// pageFiles are the paths of what the dashboard page is made of, beside the page itself.
func pageFiles(t *testing.T) (paths []string) {
	t.Helper()
	for _, pattern := range []string{"web/*.js", "web/*.css", "web/*.svg"} {
		files, err := filepath.Glob(pattern)
		if err != nil || len(files) == 0 {
			t.Fatalf("%s: %v %v", pattern, files, err)
		}
		for _, file := range files {
			if !strings.HasPrefix(filepath.Base(file), "swagger") {
				paths = append(paths, "/"+file)
			}
		}
	}
	return paths
}

func TestPages(t *testing.T) {
	t.Parallel()
	examples := []string{"1767225600", "2026-01-01T00:00:00.123Z", "1767139200"} // in web/openapi.json, where now or yesterday is meant
	p := startProgram(t, newSpace(t, "API_KEYS="+firstKey))
	kinds := map[string]string{"/": "text/html", "/swagger/index.html": "text/html", "/swagger/swagger-ui-bundle.js": "text/javascript", "/swagger/swagger-ui.css": "text/css",
		"/swagger/swagger-initializer.js": "text/javascript", "/swagger/openapi.json": "application/json"}
	for _, path := range pageFiles(t) {
		kinds[path] = map[string]string{".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}[filepath.Ext(path)]
	}
	for path, kind := range kinds {
		status, header, body := p.ask("GET", path, nil)
		if status != 200 || !strings.HasPrefix(header.Get("Content-Type"), kind) || header.Get("X-Content-Type-Options") != "nosniff" ||
			!strings.Contains(header.Get("Content-Security-Policy"), "default-src 'self'") || !strings.Contains(header.Get("Content-Security-Policy"), "frame-ancestors 'none'") {
			t.Errorf("%s: %d %v", path, status, header)
		}
		if status, _, _ := p.ask("GET", path, nil, "If-None-Match: "+header.Get("ETag")); status != 304 && path != "/swagger/openapi.json" {
			t.Errorf("%s again: %d", path, status)
		}
		if strings.HasSuffix(path, "/") || strings.HasSuffix(path, "html") || strings.HasPrefix(path, "/web/") {
			if m := regexp.MustCompile(`(?i)(src|href)="?(https?:)?//|\burl\(|@import|fetch\(['"` + "`" + `]http`).FindString(body); m != "" {
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
	if !json.Valid([]byte(doc)) || slices.ContainsFunc(examples, func(text string) bool { return strings.Contains(doc, text) }) {
		t.Error("the document's examples are not of now")
	}
}

// visit has headless Chromium open pages of an origin of its own, / first, and returns what their scripts report
// to /report, up to the number that is wanted.
func visit(t *testing.T, chromium string, pages map[string]string, reports int) (origin string, open func() []string) {
	t.Helper()
	said := make(chan string, 100)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/report" {
			said <- r.FormValue("said")
			return
		}
		w.Header().Set("Content-Type", "text/html")
		fmt.Fprint(w, "<!doctype html><meta charset=utf-8>", pages[r.URL.Path])
	}))
	t.Cleanup(server.Close)
	return server.URL, func() (all []string) {
		dir, err := os.MkdirTemp("", "browser")
		if err != nil {
			t.Fatal(err)
		}
		log := new(logBuffer)
		cmd := exec.Command(chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
			"--disable-component-update", "--disable-sync", "--user-data-dir="+dir, server.URL+"/")
		cmd.Stderr = log
		cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // it has children
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		defer func() {
			syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
			cmd.Wait()
			os.RemoveAll(dir) // a child that is still ending may leave something
		}()
		for deadline := time.After(time.Minute); len(all) < reports; {
			select {
			case s := <-said:
				all = append(all, s)
			case <-deadline:
				t.Fatalf("the browser reported %q; it said:\n%.4000s", all, log)
			}
		}
		return all
	}
}

// pageScript wraps what a page does: api is where it sends, event makes up an event, and a failure is reported.
func pageScript(api, body string) string {
	return `<script>
const api = '` + api + `', key = '` + firstKey + `', user = () => Math.random().toString(36).slice(2)
const event = (name) => ({event_name: name, user_id: user() + user(), timestamp: Math.floor(Date.now() / 1000), channel: 'web'})
const report = (said) => fetch('/report?said=' + encodeURIComponent(said), {keepalive: true})
const go = async () => {` + body + `}
go().catch((e) => report('failed: ' + e))
</script>`
}

func TestPagesOfOthers(t *testing.T) {
	oneClock(t)
	t.Parallel()
	chromium, err := exec.LookPath("chromium")
	if err != nil {
		t.Skip("chromium is not installed")
	}
	api := "http://127.0.0.1:" + freePort(t)
	pages := map[string]string{
		"/": pageScript(api, `
			const one = api + '/api/v1/events', bulk = api + '/api/v1/events/bulk', said = {}
			const many = (name, n) => Array.from({length: n}, () => event(name))
			said.text = navigator.sendBeacon(one + '?key=' + key, JSON.stringify(event('text')))
			said.blob = navigator.sendBeacon(one + '?key=' + key, new Blob([JSON.stringify(event('blob'))], {type: 'application/json'}))
			said.bulk_text = navigator.sendBeacon(bulk + '?key=' + key, JSON.stringify({events: many('bulk_text', 3)}))
			said.bulk_blob = navigator.sendBeacon(bulk + '?key=' + key, new Blob([JSON.stringify({events: many('bulk_blob', 4)})], {type: 'application/json'}))
			said.lines = navigator.sendBeacon(bulk + '?key=' + key, many('lines', 5).map((e) => JSON.stringify(e)).join('\n'))
			const headers = {'Content-Type': 'application/json', 'X-API-Key': key}
			const kept = await fetch(one, {method: 'POST', keepalive: true, headers, body: JSON.stringify(event('keepalive'))})
			said.keepalive = kept.status + ' ' + (await kept.json()).status
			const plain = new Blob([JSON.stringify({events: many('gzip', 100)})])
			const body = await new Response(plain.stream().pipeThrough(new CompressionStream('gzip'))).arrayBuffer()
			said.gzip = (await fetch(bulk, {method: 'POST', headers: {...headers, 'Content-Encoding': 'gzip'}, body})).status
			said.smaller = body.byteLength < plain.size
			said.asks = (await fetch(api + '/api/v1/overview', {headers})).status
			addEventListener('pagehide', () => navigator.sendBeacon(bulk + '?key=' + key, JSON.stringify({events: many('hidden', 2)})))
			await report(JSON.stringify(said))
			location.href = '/next'`),
		"/next": pageScript(api, `await report('next')`),
	}
	origin, open := visit(t, chromium, pages, 2)
	foreign, openForeign := visit(t, chromium, map[string]string{"/": pageScript(api, `
			await fetch(api + '/api/v1/events?key=' + key, {method: 'POST', mode: 'no-cors', body: JSON.stringify(event('foreign'))})
			await fetch(api + '/api/v1/events?key=' + key, {method: 'POST', mode: 'no-cors', body: new Blob([JSON.stringify(event('foreign'))])})
			const asked = await fetch(api + '/api/v1/events', {method: 'POST', headers: {'X-API-Key': key}, body: JSON.stringify(event('foreign'))}).catch(() => 'refused')
			await report(asked)`)}, 1)
	p := startProgram(t, newSpace(t, "SERVER_PORT="+strings.TrimPrefix(api, "http://127.0.0.1:"), "API_KEYS="+secondKey, "WRITE_KEYS="+firstKey, "CORS_ORIGINS="+origin))

	var said struct {
		Text, Blob, Lines, Smaller bool
		BulkText                   bool `json:"bulk_text"`
		BulkBlob                   bool `json:"bulk_blob"`
		Keepalive                  string
		Gzip, Asks                 int
	}
	reports := open()
	if err := json.Unmarshal([]byte(reports[0]), &said); err != nil || !said.Text || !said.Blob || !said.BulkText || !said.BulkBlob || !said.Lines || !said.Smaller ||
		said.Keepalive != "202 queued" || said.Gzip != 202 || said.Asks != 403 || reports[1] != "next" {
		t.Errorf("the page of %s reported %q", origin, reports)
	}
	if reports := openForeign(); reports[0] != "refused" {
		t.Errorf("the page of %s reported %q", foreign, reports)
	}
	key := "X-API-Key: " + secondKey
	for name, want := range map[string]int{"text": 1, "blob": 1, "bulk_text": 3, "bulk_blob": 4, "lines": 5, "keepalive": 1, "gzip": 100, "hidden": 2} {
		p.await(fmt.Sprintf("counted: %d of %s", want, name), 30*time.Second, func() bool {
			_, _, answer := p.ask("GET", fmt.Sprintf("%sevent_name=%s&from=1&to=%d", metricsPath, name, time.Now().Unix()+10), nil, key)
			return strings.HasPrefix(answer, fmt.Sprintf(`{"total_count":%d,`, want))
		})
	}
	if n := clickhouseQuery(t, "SELECT count() FROM "+space(p.env, "CLICKHOUSE_DATABASE")+".events"); n != "117" {
		t.Errorf("%s events are stored, want 117", n)
	}
}

// TestPage looks at the dashboard page in headless Chromium while ClickHouse goes and comes back. What it looks at stands in
// dev/scripts/clients/page.mjs. `make test-page` installs what it needs; from then on it is part of `make test`.
func TestPage(t *testing.T) { lookAtPage(t, "") }

// TestPageBelow is TestPage with nginx before the program and the page below a path.
func TestPageBelow(t *testing.T) { lookAtPage(t, "/analytics") }

func lookAtPage(t *testing.T, below string) {
	t.Helper()
	p, run := pageScriptOf(t)
	at := p.url
	if below != "" {
		at = startNginx(t, []string{portOf(p)}) + below
	}
	run(func(step string) {
		switch step {
		case "empty state seen":
			var body []byte
			for i := range 1000 {
				body = fmt.Appendf(body, `{"event_name":%q,"user_id":"u%d","channel":"web","campaign_id":"c%d","timestamp":%d,"metadata":{"price":5091.8}}`+"\n",
					[]string{"view", "purchase"}[i%2], i%70, i%12, time.Now().Unix()-int64(i))
			}
			if status, _, answer := p.ask("POST", bulkPath, body, "Content-Type: "+ndjson, "X-API-Key: "+firstKey); status != http.StatusAccepted {
				t.Fatal(status, answer)
			}
		case "filtered":
			control(t, "/clickhouse/stop")
		case "stale":
			control(t, "/clickhouse/start")
		}
	}, "page.mjs", at, firstKey, secondKey)
}

// TestPageView looks at what a reader may choose on the page: the events, filters, breakdowns, dates, the address, CSV. What it looks at
// stands in dev/scripts/clients/view.mjs.
func TestPageView(t *testing.T) {
	p, run := pageScriptOf(t)
	tokyo, err := time.LoadLocation("Asia/Tokyo")
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now().In(tokyo)
	day := time.Date(now.Year(), now.Month(), now.Day()-3, 0, 0, 0, 0, tokyo)
	var body []byte
	send := func(n int, name, user string, at int64, more string) {
		for i := range n {
			body = fmt.Appendf(body, `{"event_name":"%s","user_id":"%s","timestamp":%d%s}`+"\n", name, user, at-int64(i), more)
		}
	}
	recent := now.Unix() - 600
	send(4, "order", "u1", recent, `,"metadata":{"plan":"pro","price":0.1}`)
	send(2, "order", "u2", recent, `,"metadata":{"plan":"pro","price":0.1}`)
	send(4, "order", "u2", recent-10, `,"metadata":{"plan":"=1+1","price":0.2}`)
	send(2, "order", "u1", recent-10, `,"metadata":{"price":0.15}`)
	send(1, "view", "u1", recent, "")
	send(3, "view", "u2", recent, `,"channel":"web"`)
	send(1, `=<b>x</b>\u202e`, "<img src=x>", recent, `,"campaign_id":"<script>","tags":["<i>"],"metadata":{"big":12345678901234567890.10,"said":"\u0085<i>","a.b":{"c":true}}`)
	for _, at := range []time.Time{day, day.Add(-time.Second), day.AddDate(0, 0, 1)} {
		send(1, "order", "u3", at.Unix(), `,"metadata":{"plan":"pro","price":1}`)
	}
	if status, _, answer := p.ask("POST", bulkPath+"?wait=stored", body, "Content-Type: "+ndjson, "X-API-Key: "+firstKey); status != http.StatusOK {
		t.Fatal(status, answer)
	}
	for _, refused := range []string{`{"event_name":"<u>","timestamp":1}`, `{"event_name":"no user","timestamp":1}`} {
		p.ask("POST", onePath, []byte(refused), "Content-Type: application/json", "X-API-Key: "+firstKey)
	}
	days := filepath.Join(t.TempDir(), "days.json")
	starts, err := json.Marshal(dayStarts(t))
	if err == nil {
		err = os.WriteFile(days, starts, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	run(nil, "view.mjs", p.url, firstKey, day.Format(time.DateOnly), days)
}

// dayStarts are the Unix seconds at which the days of two years begin in zones with odd offsets, and with clocks that change at midnight.
func dayStarts(t *testing.T) map[string][]int64 {
	starts := map[string][]int64{}
	for _, name := range []string{"UTC", "Asia/Tokyo", "Asia/Kathmandu", "America/New_York", "America/St_Johns", "America/Havana", "America/Santiago", "Africa/Cairo", "Australia/Lord_Howe", "Pacific/Chatham"} {
		zone, err := time.LoadLocation(name)
		if err != nil {
			t.Fatal(err)
		}
		for at, was := time.Date(2025, 1, 1, 0, 0, 0, 0, time.UTC), 0; at.Year() < 2027; at = at.Add(15 * time.Minute) {
			if day := at.In(zone).YearDay(); day != was {
				starts[name], was = append(starts[name], at.Unix()), day
			}
		}
		starts[name] = starts[name][1:] // the first is only where this began
	}
	return starts
}

// pageScriptOf starts a program with keys, and returns it with what runs a script of dev/scripts/clients on its page. Each step that the
// script says is done, and then it goes on.
func pageScriptOf(t *testing.T) (p *program, run func(do func(step string), script string, args ...string)) {
	t.Helper()
	dir := os.Getenv("PAGE_MODULES")
	if dir == "" {
		t.Skip("needs Chromium, puppeteer and axe-core: make test-page installs them")
	}
	oneClock(t)
	alone(t)
	return startProgram(t, newSpace(t, "API_KEYS="+firstKey, "WRITE_KEYS="+secondKey)), func(do func(step string), script string, args ...string) {
		t.Helper()
		page := exec.Command("node", append([]string{"dev/scripts/clients/" + script}, args...)...)
		page.Env = append(os.Environ(), "CLIENTS="+dir)
		log := new(logBuffer)
		page.Stderr = log
		steps, err := page.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		next, err := page.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := page.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { page.Process.Kill() })
		for lines := bufio.NewScanner(steps); lines.Scan(); fmt.Fprintln(next) {
			do(lines.Text())
		}
		if err := page.Wait(); err != nil {
			t.Errorf("the page: %v\n%s", err, log)
		}
	}
}
