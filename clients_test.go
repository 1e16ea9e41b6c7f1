// The real clients of Segment's protocol, through what they will meet.

package main

import (
	"bytes"
	"cmp"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
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
