// The senders in assets/: each is short and retries what was refused for a moment, and every event is counted once.

package main

import (
	"bytes"
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
	"sync/atomic"
	"testing"
	"time"
)

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
			text := "package main\n\nimport (\n\t\"bytes\"\n\t\"fmt\"\n\t\"io\"\n\t\"net/http\"\n\t\"net/url\"\n\t\"os\"\n\t\"time\"\n)\n\n" + senderText(t, "send.go.txt") +
				"\nfunc main() {\n\tlines, _ := io.ReadAll(os.Stdin)\n\tstatus, answer := send(os.Args[1], os.Args[2], lines)\n\tfmt.Printf(\"%s\", answer)\n\tif status != 202 {\n\t\tos.Exit(1)\n\t}\n}\n"
			path := filepath.Join(t.TempDir(), "main.go")
			if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
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
	if _, err := exec.LookPath("python3"); err == nil {
		out, err := exec.Command("python3", "-c", senderText(t, "send.py")+fmt.Sprintf("send(%q, %q, [{'event_name': 'py'}])", p.url, firstKey)).CombinedOutput()
		if err == nil || !strings.Contains(string(out), "user_id is required") {
			t.Errorf("send.py does not say what is refused: %v, %s", err, out)
		}
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

// awaitCount returns when want events of that name are counted. It asks with secondKey.
func (p *program) awaitCount(name string, want int) {
	p.t.Helper()
	answer := ""
	counted := func() bool {
		_, _, answer = p.ask("GET", fmt.Sprintf("%sevent_name=%s&from=1&to=%d", metricsPath, name, time.Now().Unix()+10), nil, "X-API-Key: "+secondKey)
		return bytes.HasPrefix([]byte(answer), fmt.Appendf(nil, `{"total_count":%d,`, want))
	}
	p.await(fmt.Sprintf("counted: %d of %s", want, name), 30*time.Second, counted)
}
