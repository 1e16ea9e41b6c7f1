// The real clients of Segment's protocol, through what they will meet, and the senders in assets/: each is short and retries what
// was refused for a moment, and every event is counted once.

package test

import (
	"bytes"
	"cmp"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// TestClients has each client send 4000 events while the program is killed, Kafka is away for 5 s, and answers are lost.
// The clients end without an error, and what is counted is exactly what they sent. `make test-clients` installs them.
func TestClients(t *testing.T) {
	dir := os.Getenv("CLIENTS")
	if dir == "" {
		t.Skip("needs the clients: make test-clients")
	}
	const count, atLeave = 4000, 40
	for name, command := range map[string][]string{
		"python":  {dir + "/venv/bin/python", "dev/scripts/clients/send.py"},
		"node":    {"node", "dev/scripts/clients/send.cjs"},
		"go":      {dir + "/go-client"},
		"browser": {"node", "dev/scripts/clients/send.mjs"},
	} {
		t.Run(name, func(t *testing.T) {
			alone(t)
			pagePort := freePort(t) // of the browser's page, which is another origin
			env := newSpace(t, "API_KEYS="+firstKey, "ACK_TIMEOUT=2s", "CORS_ORIGINS=http://127.0.0.1:"+pagePort)
			p := startProgram(t, env)
			between := newProxy(t, strings.TrimPrefix(p.url, "http://"), nil)
			client := exec.Command(command[0], append(command[1:], "http://127.0.0.1:"+between.port(), firstKey, fmt.Sprint(count), pagePort)...)
			client.Env = append(os.Environ(), "NODE_PATH="+dir+"/node_modules")
			var said bytes.Buffer
			client.Stderr = &said
			out, err := client.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			in, err := client.StdinPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := client.Start(); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { client.Process.Kill() })
			sent := newProgress(out)
			sent.await(t, 400)
			between.cutAnswers()
			sent.await(t, 800)
			p = p.killAndRestart()
			sent.await(t, 1600)
			control(t, "/kafka/stop")
			time.Sleep(5 * time.Second) // the fault itself, not a wait for something
			control(t, "/kafka/start")
			sent.await(t, 2400)
			between.cutAnswers()
			sent.await(t, 3000)
			p = p.killAndRestart()
			db, channel := space(env, "CLICKHOUSE_DATABASE"), "api"
			stored := func(n int) {
				p.await(fmt.Sprint(n, " stored"), time.Minute, func() bool {
					return clickhouseQuery(t, "SELECT sum(event_count) FROM "+db+".events_hourly") == fmt.Sprint(n)
				})
			}
			if name == "browser" { // its last events leave with the page, which nothing sends again
				channel = "web"
				sent.await(t, count-atLeave)
				stored(count - atLeave)
				fmt.Fprintln(in)
				sent.await(t, count)
				stored(count)
				fmt.Fprintln(in)
			} else {
				sent.await(t, count)
				between.cutAnswers()
			}
			if err := client.Wait(); err != nil {
				t.Fatalf("the client ended with %v: %s", err, &said)
			}
			stored(count)
			got := clickhouseQuery(t, "SELECT user_id, campaign_id, channel, count() FROM "+db+".events GROUP BY ALL ORDER BY ALL")
			want := map[string]int{}
			for i := range count {
				want[fmt.Sprintf("u%d\tc%d\t%s", i%50, i%7, channel)]++
			}
			lines := strings.Split(got, "\n")
			for _, line := range lines {
				at := strings.LastIndexByte(line, '\t')
				if fmt.Sprint(want[line[:at]]) != line[at+1:] {
					t.Errorf("%s, sent were %d", line, want[line[:at]])
				}
			}
			if len(lines) != len(want) {
				t.Errorf("%d groups, want %d", len(lines), len(want))
			}
			if got := clickhouseQuery(t, "SELECT countIf(JSONExtractRaw(metadata, 'nested') = '{\"list\":[1,true,null]}') FROM "+db+".events"); got != fmt.Sprint(count) {
				t.Errorf("properties of %s events arrived as they were sent", got)
			}
		})
	}
}

// TestReadmeClients runs what README says of the clients, word for word but for key and address, with keys set.
func TestReadmeClients(t *testing.T) {
	dir := cmp.Or(os.Getenv("CLIENTS"), os.Getenv("PAGE_MODULES"))
	if dir == "" {
		t.Skip("needs the clients: make test-clients")
	}
	chromium, err := exec.LookPath("chromium")
	if err != nil {
		t.Skip("chromium is not installed")
	}
	oneClock(t)
	t.Parallel()
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	library, err := os.ReadFile(dir + "/node_modules/@segment/analytics-next/dist/umd/index.js")
	if err != nil {
		t.Fatal(err)
	}
	port := freePort(t)
	snippet := func(begin, end string) string {
		_, code, ok := strings.Cut(string(readme), begin)
		code, _, done := strings.Cut(code, end)
		if !ok || !done {
			t.Fatalf("README has nothing from %q to %q", begin, end)
		}
		return strings.NewReplacer("'KEY'", "'"+firstKey+"'", "localhost:8080", "127.0.0.1:"+port).Replace(code)
	}
	page := "<script>" + strings.ReplaceAll(string(library), "</script", `<\/script`) + "</script><script>const { AnalyticsBrowser } = AnalyticsNext\n" +
		snippet("import { AnalyticsBrowser } from '@segment/analytics-next'\n", "```") +
		"\nanalytics.track('last').then(() => fetch('/report?said=sent'))</script>"
	origin, open := visit(t, chromium, map[string]string{"/": page}, 1)
	env := newSpace(t, "SERVER_PORT="+port, "API_KEYS="+secondKey, "WRITE_KEYS="+firstKey, "CORS_ORIGINS="+origin)
	p := startProgram(t, env)
	open()
	for name, command := range map[string]*exec.Cmd{
		"Node":   exec.Command("node", "-e", snippet("// Node: npm install @segment/analytics-node\n", "```")),
		"Python": exec.Command(dir+"/venv/bin/python", "-c", snippet("# Python: pip install segment-analytics-python\n", "```")),
	} {
		command.Env = append(os.Environ(), "NODE_PATH="+dir+"/node_modules")
		if out, err := command.CombinedOutput(); err != nil {
			t.Errorf("%s: %v\n%s", name, err, out)
		}
	}
	got := ""
	p.await("stored what each client sent", time.Minute, func() bool {
		got = clickhouseQuery(t, "SELECT groupArray(channel) FROM (SELECT channel FROM "+space(env, "CLICKHOUSE_DATABASE")+".events WHERE event_name = 'product_view' ORDER BY channel)")
		return len(got) >= len("['api','api','web']")
	})
	if got != "['api','api','web']" {
		t.Errorf("stored are events of %s", got)
	}
}

// sentSoFar is how many events a client says it has sent.
type sentSoFar struct {
	mu    sync.Mutex // guards the rest
	sent  int
	ended bool
}

func newProgress(out io.Reader) *sentSoFar {
	p := new(sentSoFar)
	go func() { // ends with the client
		for n := 0; ; {
			if _, err := fmt.Fscan(out, &n); err != nil {
				break
			}
			p.mu.Lock()
			p.sent = n
			p.mu.Unlock()
		}
		p.mu.Lock()
		p.ended = true
		p.mu.Unlock()
	}()
	return p
}

func (p *sentSoFar) await(t *testing.T, n int) {
	t.Helper()
	for deadline := time.Now().Add(2 * time.Minute); ; time.Sleep(10 * time.Millisecond) {
		p.mu.Lock()
		sent, ended := p.sent, p.ended
		p.mu.Unlock()
		if sent >= n {
			return
		}
		if ended || time.Now().After(deadline) {
			t.Fatalf("%d sent, waiting for %d; ended is %v", sent, n, ended)
		}
	}
}

// maxSenderLines is how long a sender may be: it is copied, not installed.
const maxSenderLines = 15

// senderText returns the text of a file in assets/.
func senderText(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile("assets/" + name)
	if err != nil {
		t.Fatal(err)
	}
	if lines := bytes.Count(b, []byte("\n")); lines > maxSenderLines {
		t.Errorf("%s has %d lines, at most %d are to be copied", name, lines, maxSenderLines)
	}
	return string(b)
}

// refusing is a proxy to address: the first request with events gets 502, the second 429, the third says that an event was not
// acknowledged, the fourth one's answer is lost, and the fifth one's is cut off in the middle.
func refusing(t *testing.T, address string) *httptest.Server {
	t.Helper()
	to, err := url.Parse(address)
	if err != nil {
		t.Fatal(err)
	}
	proxy := httputil.NewSingleHostReverseProxy(to)
	var posts atomic.Int32
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPost {
			n := posts.Add(1)
			if origin := r.Header.Get("Origin"); origin != "" && n <= 5 && n != 4 { // else a page could not read the answer; the API's own has it
				w.Header().Set("Access-Control-Allow-Origin", origin)
			}
			switch n {
			case 1:
				http.Error(w, "no", http.StatusBadGateway)
				return
			case 2:
				http.Error(w, "not so much", http.StatusTooManyRequests)
				return
			case 3:
				w.WriteHeader(http.StatusMultiStatus)
				io.WriteString(w, `{"success_count":0,"failed_count":1,"errors":[{"index":0,"error":"no","code":"unavailable"}]}`)
				return
			case 4:
				proxy.ServeHTTP(httptest.NewRecorder(), r)
				panic(http.ErrAbortHandler)
			case 5:
				w.Header().Set("Content-Length", "1000")
				w.WriteHeader(http.StatusMultiStatus)
				io.WriteString(w, `{"success_count":0,`)
				http.NewResponseController(w).Flush()
				panic(http.ErrAbortHandler)
			}
		}
		proxy.ServeHTTP(w, r)
	}))
	t.Cleanup(server.Close)
	return server
}

// goSender is a program of send.go.txt, which sends what it is given.
func goSender(t *testing.T) (path string) {
	t.Helper()
	text := "package main\n\nimport (\n\t\"bytes\"\n\t\"fmt\"\n\t\"io\"\n\t\"net/http\"\n\t\"net/url\"\n\t\"os\"\n\t\"time\"\n)\n\n" + senderText(t, "send.go.txt") +
		"\nfunc main() {\n\tlines, _ := io.ReadAll(os.Stdin)\n\tstatus, answer := send(os.Args[1], os.Args[2], lines)\n\tfmt.Printf(\"%s\", answer)\n\tif status != 202 {\n\t\tos.Exit(1)\n\t}\n}\n"
	path = filepath.Join(t.TempDir(), "main.go")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestSenders(t *testing.T) {
	oneClock(t)
	t.Parallel()
	p := startProgram(t, newSpace(t, "API_KEYS="+secondKey, "WRITE_KEYS="+firstKey))
	var lines bytes.Buffer
	event := func(name string, i int) string {
		return fmt.Sprintf(`{"event_name":%q,"user_id":"u","timestamp":%d,"insert_id":"i%d"}`, name, time.Now().Unix(), i)
	}
	for name, c := range map[string]struct {
		tool  string
		count int
		run   func(front string) *exec.Cmd
	}{
		"sh": {"curl", 1500, func(front string) *exec.Cmd {
			senderText(t, "send.sh")
			lines.Reset()
			for i := range 1500 {
				fmt.Fprintln(&lines, event("sh", i))
			}
			cmd := exec.Command("sh", "assets/send.sh", front, firstKey)
			cmd.Stdin = &lines
			return cmd
		}},
		"py": {"python3", 50, func(front string) *exec.Cmd {
			return exec.Command("python3", "-c", senderText(t, "send.py")+fmt.Sprintf("print(send(%q, %q, [{'event_name': 'py', 'user_id': 'u'}] * 50))", front, firstKey))
		}},
		"go": {"go", 50, func(front string) *exec.Cmd {
			path := goSender(t)
			var lines bytes.Buffer
			for i := range 50 {
				fmt.Fprintln(&lines, event("go", i))
			}
			cmd := exec.Command("go", "run", path, front, firstKey)
			cmd.Stdin = &lines
			return cmd
		}},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := exec.LookPath(c.tool); err != nil {
				t.Skipf("%s is not installed", c.tool)
			}
			cmd := c.run(refusing(t, p.url).URL)
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			p.awaitCount(name, c.count)
		})
	}
	refused := exec.Command("sh", "assets/send.sh", p.url, firstKey)
	refused.Stdin = strings.NewReader(strings.Repeat("not json\n", 1000) + event("rest", 0))
	if out, err := refused.CombinedOutput(); err == nil || !strings.Contains(string(out), " 400") {
		t.Errorf("what is refused for ever: %v, %.200s", err, out)
	}
	p.awaitCount("rest", 1)
	// An event that is refused for ever, whose answer has the word that a good one is sent again for.
	for name, cmd := range map[string]*exec.Cmd{
		"send.sh": exec.Command("sh", "assets/send.sh", p.url, firstKey),
		"send.go": exec.Command("go", "run", goSender(t), p.url, firstKey),
	} {
		cmd.Stdin = strings.NewReader(fmt.Sprintf(`{"event_name":"u","user_id":"u","timestamp":%d,"unavailable":"\ud800"}`, time.Now().Unix()))
		var out bytes.Buffer
		cmd.Stdout, cmd.Stderr, cmd.SysProcAttr = &out, &out, &syscall.SysProcAttr{Setpgid: true}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		endless := time.AfterFunc(time.Minute, func() { syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) })
		err := cmd.Wait()
		if !endless.Stop() || err == nil || !strings.Contains(out.String(), `"field":"unavailable"`) {
			t.Errorf("%s: %v, %.300s", name, err, out.String())
		}
	}
	if _, err := exec.LookPath("python3"); err == nil {
		out, err := exec.Command("python3", "-c", senderText(t, "send.py")+fmt.Sprintf("send(%q, %q, [{'event_name': 'py'}])", p.url, firstKey)).CombinedOutput()
		if err == nil || !strings.Contains(string(out), "user_id is required") {
			t.Errorf("send.py does not say what is refused: %v, %s", err, out)
		}
	}
}

// TestPageSenderWaits: without CORS_ORIGINS a page can read no answer. Its sender waits longer each time, holds what it may hold, says so
// once, and sends all of it when that is over; an event that is refused for good is not sent again.
func TestPageSenderWaits(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("node"); err != nil {
		t.Skip("node is not installed")
	}
	out, err := exec.Command("node", "-e", senderText(t, "send.js")+`
		const warned = [], pauses = [], sent = new Set()
		let next, posts = 0, answer = async () => { throw new TypeError('blocked') }
		globalThis.addEventListener = () => {}
		globalThis.setTimeout = (f, ms) => { next = f; pauses.push(ms) }
		globalThis.fetch = async (to, how) => { posts++; return answer(JSON.parse(await how.body.text()).events) }
		console.warn = text => warned.push(text)
		const turn = async () => { const f = next; next = null; f(); while (!next) await new Promise(setImmediate) }
		const track = sender('http://api', 'key')
		while (!next) await new Promise(setImmediate)
		for (let i = 0; i < 20000; i++) track({event_name: 'e', user_id: 'u' + i})
		pauses.length = 0
		for (let i = 0; i < 12; i++) await turn()
		if (pauses.join() !== '1000,2000,4000,8000,16000,32000,60000,60000,60000,60000,60000,60000') throw new Error('pauses ' + pauses)
		if (posts !== 12 || warned.length !== 1 || !warned[0].includes('CORS_ORIGINS')) throw new Error(posts + ' posts, said ' + warned)
		answer = async events => { events.forEach(e => sent.add(e.user_id)); return new Response('{}', {status: 202}) }
		for (let i = 0; i < 120; i++) await turn()
		if (sent.size !== 10000 || !sent.has('u0') || pauses.at(-1) !== 500) throw new Error(sent.size + ' sent, pause ' + pauses.at(-1))
		posts = 0
		answer = async () => new Response('{"success_count":0,"failed_count":1,"errors":[{"index":0,"code":"validation.invalid-format.error","field":"unavailable"}]}', {status: 400})
		track({event_name: 'bad', user_id: 'u'})
		for (let i = 0; i < 3; i++) await turn()
		if (posts !== 1 || warned.length !== 2 || !warned[1].includes('refused for good')) throw new Error(posts + ' posts of what is refused, said ' + warned)`, "--input-type=module").CombinedOutput()
	if err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}

// TestPageSender runs the page's sender in a browser; nothing that it still holds when the page goes away may be lost.
func TestPageSender(t *testing.T) {
	oneClock(t)
	t.Parallel()
	chromium, err := exec.LookPath("chromium")
	if err != nil {
		t.Skip("chromium is not installed")
	}
	port := freePort(t)
	front := refusing(t, "http://127.0.0.1:"+port)
	pages := map[string]string{
		"/": "<script>" + senderText(t, "send.js") + "</script>" + pageScript(front.URL, `
			let accepted = 0
			const real = window.fetch
			window.fetch = async (to, how) => {
				const answer = await real(to, how)
				if (how.body && answer.status === 202) accepted += JSON.parse(await how.body.text()).events.length
				return answer
			}
			const track = sender(api, key)
			for (let i = 0; i < 250; i++) track({event_name: 'js', user_id: 'u', channel: 'web', metadata: {text: 'x'.repeat(1000)}}) // a hundred are too large for keepalive
			while (accepted < 250) await new Promise((done) => setTimeout(done, 50)) // after what was refused and lost
			for (let i = 0; i < 150; i++) track({event_name: 'js', user_id: 'u', channel: 'web'})
			await report('sent')
			location.href = '/next'`),
		"/next": pageScript(front.URL, `await report('next')`),
	}
	origin, open := visit(t, chromium, pages, 2)
	p := startProgram(t, newSpace(t, "SERVER_PORT="+port, "API_KEYS="+secondKey, "WRITE_KEYS="+firstKey, "CORS_ORIGINS="+origin))
	if reports := open(); reports[0] != "sent" || reports[1] != "next" {
		t.Fatalf("the page reported %q", reports)
	}
	p.awaitCount("js", 400)
}
