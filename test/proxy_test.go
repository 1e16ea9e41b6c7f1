// A proxy before the program: deploy/nginx.conf as it is, but for its ports, at a host of its own and below a path.

package test

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

// startNginx runs nginx with deploy/nginx.conf before instances on these ports, and returns its address without a slash at the end. edits
// are further pairs of a text in the file and what is to stand there. It skips the test where nginx is not installed.
func startNginx(t *testing.T, instances []string, edits ...string) string {
	t.Helper()
	nginx, err := exec.LookPath("nginx")
	if err != nil {
		t.Skip("nginx is not installed (Debian's package nginx has it): deploy/nginx.conf is not tested here")
	}
	b, err := os.ReadFile("deploy/nginx.conf")
	if err != nil {
		t.Fatal(err)
	}
	port, dir := freePort(t), t.TempDir()
	edits = append(edits, "listen 8080;", "listen 127.0.0.1:"+port+";", "http {\n", "http {\n"+
		"client_body_temp_path "+dir+"/body; proxy_temp_path "+dir+"/proxy; fastcgi_temp_path "+dir+"/f; uwsgi_temp_path "+dir+"/u; scgi_temp_path "+dir+"/s;\n")
	for i := range 3 {
		edits = append(edits, fmt.Sprintf("server 127.0.0.1:%d ", 8081+i), fmt.Sprintf("server 127.0.0.1:%s ", instances[i%len(instances)]))
	}
	conf := string(b)
	for i := 0; i < len(edits); i += 2 {
		if strings.Count(conf, edits[i]) != 1 {
			t.Fatalf("deploy/nginx.conf has %q not once", edits[i])
		}
		conf = strings.Replace(conf, edits[i], edits[i+1], 1)
	}
	file, log := filepath.Join(dir, "nginx.conf"), new(logBuffer)
	if err := os.WriteFile(file, []byte(conf), 0o600); err != nil {
		t.Fatal(err)
	}
	global := "daemon off; error_log stderr; pid " + dir + "/pid;"
	if os.Getuid() == 0 {
		global += " user root;" // its workers have to reach the directory
	}
	cmd := exec.Command(nginx, "-p", dir, "-e", "stderr", "-c", file, "-g", global)
	cmd.Stderr = log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Signal(os.Interrupt)
		cmd.Wait()
		if t.Failed() {
			t.Logf("nginx:\n%.4000s", log)
		}
	})
	at := "http://127.0.0.1:" + port
	(&program{t: t, url: at, log: log}).await("answered by nginx", time.Minute, func() bool {
		resp, err := http.Get(at + "/health")
		if err == nil {
			resp.Body.Close()
		}
		return err == nil
	})
	return at
}

// behind is the program as it is found at another address.
func (p *program) behind(address string) *program {
	other := *p
	other.url = address
	return &other
}

func portOf(p *program) string { return space(p.env, "SERVER_PORT") }

// TestBehindNginx: at a host of its own and below a path, everything that the program has is there, under the addresses that its
// pages, its document and its redirects name.
func TestBehindNginx(t *testing.T) {
	t.Parallel()
	env := newSpace(t, "MAX_IN_FLIGHT_BYTES_PER_CLIENT=0")
	direct := startProgram(t, env)
	at := startNginx(t, []string{portOf(direct)})
	inText := regexp.MustCompile(`(?:src|href)="([^"#]+)"|call\(['` + "`" + `]([^'` + "`" + `?]+)|from '([^']+)'|url: '([^']+)'`)
	for i, below := range []string{"", "/analytics"} {
		p := direct.behind(at + below)
		asked := map[string]bool{}
		// follow asks for an address and for all that the answer names, relative to it. What a script asks for is relative to its page.
		var follow func(page, from, address string)
		follow = func(page, from, address string) {
			base, err := url.Parse(from)
			if err != nil {
				t.Fatal(err)
			}
			to, err := base.Parse(address)
			if err != nil {
				t.Fatal(err)
			}
			if asked[to.String()] {
				return
			}
			asked[to.String()] = true
			if !strings.HasPrefix(to.String(), p.url+"/") {
				t.Errorf("%s at %s leads to %s", address, from, to)
				return
			}
			resp, err := http.Get(to.String())
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			body, _ := io.ReadAll(resp.Body)
			if resp.StatusCode != http.StatusOK && !strings.HasSuffix(to.Path, "/api/v1/metrics") { // which needs parameters
				t.Errorf("%s at %s: %s", address, from, resp.Status)
			}
			name := to.Path[strings.LastIndexByte(to.Path, '/')+1:]
			isPage, isOwn := name == "" || name == "index.html", strings.Contains(to.Path, "/web/") || name == "swagger-initializer.js"
			if isPage {
				page = to.String()
			}
			if isPage || isOwn {
				for _, m := range inText.FindAllStringSubmatch(string(body), -1) {
					base := to.String()
					if m[2] != "" || m[4] != "" {
						base = page
					}
					follow(page, base, m[1]+m[2]+m[3]+m[4])
				}
			}
			if name == "openapi.json" {
				var document struct{ Servers []struct{ URL string } }
				if err := json.Unmarshal(body, &document); err != nil || len(document.Servers) == 0 {
					t.Fatalf("the document: %v", err)
				}
				server, _ := to.Parse(document.Servers[0].URL)
				follow(page, to.String(), strings.TrimSuffix(server.String(), "/")+"/ready")
			}
		}
		for _, page := range []string{p.url + "/", p.url + "/swagger/index.html"} {
			follow(page, page, "")
		}
		for _, name := range append(pageFiles(t), "/api/v1/overview", "/api/v1/pipeline", "/api/v1/events",
			"/swagger/swagger-ui-bundle.js", "/swagger/swagger-ui.css", "/swagger/openapi.json", "/ready") {
			if !asked[p.url+name] {
				t.Errorf("below %q no page leads to %s", below, name)
			}
		}
		for _, path := range []string{"/swagger", "/swagger/"} {
			if resp, err := http.Get(p.url + path); err != nil || resp.StatusCode != 200 || resp.Request.URL.String() != p.url+"/swagger/index.html" {
				t.Errorf("%s%s leads to %v: %v", below, path, resp, err)
			}
		}
		event := fmt.Appendf(nil, `{"event_name":"behind%d","user_id":"u","timestamp":%d}`, i, time.Now().Unix()-1)
		if status, _, answer := p.ask("POST", onePath+"?wait=stored", event, "Content-Type: text/plain", "Origin: "+at); status != 200 && status != 202 {
			t.Errorf("from its own page: %d %s", status, answer)
		}
		if status, _, answer := p.ask("POST", onePath, event, "Content-Type: text/plain", "Origin: https://other.example"); status != 403 {
			t.Errorf("from a page of others: %d %s", status, answer)
		}
		for _, path := range []string{"/v1/batch", strings.Repeat("/", len(below)/len("/analytics")) + "/v1/batch"} { // as clients join host and path
			batch := fmt.Appendf(nil, `{"batch":[{"type":"track","event":"behind%d","userId":"s","messageId":"m","timestamp":%q}]}`, i, time.Now().UTC().Format(time.RFC3339))
			if status, _, answer := p.ask("POST", path, batch, "Content-Type: application/json", "Authorization: Basic "+"a2V5Og=="); status != 200 {
				t.Errorf("%s%s: %d %s", below, path, status, answer)
			}
		}
		direct.await("counted, with an event's name in the query", time.Minute, func() bool {
			_, _, answer := p.ask("GET", fmt.Sprintf("%sevent_name=behind%%3%d&from=1&to=%d", metricsPath, i, time.Now().Unix()+10), nil)
			return strings.HasPrefix(answer, `{"total_count":`) && strings.Contains(answer, `"unique_users":2`)
		})
		// What is too large is said by whoever finds it, in one form.
		for _, size := range []int{8<<20 + 1, 10 << 20} {
			status, header, answer := p.ask("POST", bulkPath, []byte(strings.Repeat("\n", size)), "Content-Type: "+ndjson)
			if status != http.StatusRequestEntityTooLarge || !strings.HasPrefix(header.Get("Content-Type"), jsonCT) || !strings.HasPrefix(answer, `{"error":"request body too large",`) {
				t.Errorf("%d bytes: %d %v %s", size, status, header, answer)
			}
		}
	}
	client := http.Client{CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	if resp, err := client.Get(at + "/analytics"); err != nil || resp.StatusCode != http.StatusMovedPermanently || resp.Header.Get("Location") != "/analytics/" {
		t.Errorf("/analytics: %v %v", resp, err)
	}
}

// TestNginxAndInstances: an instance that dies over its requests costs no client anything; without any, and beyond an address's
// rate, the answer says what to do.
func TestNginxAndInstances(t *testing.T) {
	t.Parallel()
	env := faultSpace(t, "MAX_IN_FLIGHT_BYTES_PER_CLIENT=0")
	p, other := startProgram(t, env), startProgram(t, env)
	at := startNginx(t, []string{portOf(p), portOf(other), freePort(t)}) // nobody listens at the third
	l, done := loadInto(t, at+"/analytics", 500, time.Hour, "-retries", "0")
	p.await("under load", time.Minute, func() bool { return l.OK.Load() > 1000 })
	other.cmd.Process.Kill()
	other.cmd.Wait()
	sent := l.OK.Load()
	p.await("further", time.Minute, func() bool { return l.OK.Load() > sent+1000 })
	l.Stop()
	done()
	if n := l.Unknown.Load(); n > 0 || len(l.Refused) > 0 {
		t.Errorf("clients noticed that an instance died: %d without an answer, refused %v", n, l.Refused)
	}
	mustHold(p, l)

	p.terminate()
	one := fmt.Appendf(nil, `{"event_name":"e","user_id":"u","timestamp":%d}`, time.Now().Unix())
	status, header, answer := p.behind(at).ask("POST", onePath, one, "Content-Type: "+jsonCT)
	if status != http.StatusServiceUnavailable || header.Get("Retry-After") == "" || !json.Valid([]byte(answer)) {
		t.Errorf("without an instance: %d %v %s", status, header, answer)
	}

	slow := p.behind(startNginx(t, []string{portOf(p)}, "rate=1000r/s", "rate=1r/m", "burst=9000", "burst=1"))
	refused := false
	for range 3 {
		status, header, answer := slow.ask("POST", "/analytics"+onePath, one, "Content-Type: "+jsonCT)
		refused = refused || status == http.StatusTooManyRequests && header.Get("Retry-After") == "10" && json.Valid([]byte(answer))
	}
	if !refused {
		t.Error("nothing was too much")
	}
}
