// Three instances behind the load balancer of deploy/compose.scale.yml, with its own configuration: a roll-out that no
// client notices, an instance that dies, a store that is away.

package test

import (
	"bytes"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/event-ingestion/event-ingestion/internal/testkit"
)

// startBalancer runs HAProxy with deploy/haproxy.cfg in front of the instances and returns a program that stands for it.
// Only addresses are replaced, and what a test says, in pairs.
func startBalancer(t *testing.T, haproxy string, instances []*program, replaced ...string) *program {
	t.Helper()
	cfg, err := os.ReadFile("deploy/haproxy.cfg")
	if err != nil {
		t.Fatal(err)
	}
	port := freePort(t)
	replace := append(replaced, "bind :8080", "bind 127.0.0.1:"+port, "bind 127.0.0.1:8404", "bind 127.0.0.1:"+freePort(t))
	for i, name := range []string{"event-ingestion", "event-ingestion-2", "event-ingestion-3"} {
		replace = append(replace, " "+name+":8080", " "+strings.TrimPrefix(instances[i].url, "http://"))
	}
	path := filepath.Join(t.TempDir(), "haproxy.cfg")
	if err := os.WriteFile(path, []byte(strings.NewReplacer(replace...).Replace(string(cfg))), 0o600); err != nil {
		t.Fatal(err)
	}
	b := &program{t: t, env: instances[0].env, url: "http://127.0.0.1:" + port, log: new(logBuffer)}
	b.cmd = exec.Command(haproxy, "-db", "-f", path)
	b.cmd.Stdout, b.cmd.Stderr = b.log, b.log
	if err := b.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		b.cmd.Process.Kill()
		b.cmd.Wait()
		if t.Failed() {
			t.Logf("haproxy:\n%.4000s", b.log)
		}
	})
	b.await("balancing", time.Minute, func() bool { return b.status("/ready") == http.StatusOK })
	return b
}

func TestBalancer(t *testing.T) {
	alone(t)
	haproxy, err := exec.LookPath("haproxy")
	if err != nil {
		t.Skip("haproxy is not installed")
	}
	env := newSpace(t, "MAX_IN_FLIGHT_BYTES_PER_CLIENT=0", "SHUTDOWN_DELAY=1500ms") // some checks, also on a busy machine
	instances := []*program{startProgram(t, env), startProgram(t, env), startProgram(t, env)}
	b := startBalancer(t, haproxy, instances, "inter 1s", "inter 100ms")

	// A roll-out: each instance is stopped and comes back; the client, which tries everything once, sees no failure.
	l, done := loadInto(t, b.url, 1000, time.Hour, "-retries", "0")
	for i, p := range instances {
		target := l.OK.Load() + 1000
		p.await("under load", 20*time.Second, func() bool { return l.OK.Load() > target })
		p.terminate()
		instances[i] = startProgram(t, p.env)
	}
	l.Stop()
	done()
	if n := l.Unknown.Load(); n > 0 || len(l.Refused) > 0 {
		t.Errorf("a roll-out was noticed: %d without an answer, refused %v", n, l.Refused)
	}
	mustHold(b, l)

	// An instance dies: the balancer sends most of what that had in hand to another, the client the rest once more.
	l, done = loadInto(t, b.url, 1000, time.Hour)
	target := l.OK.Load() + 1000
	b.await("under load", 20*time.Second, func() bool { return l.OK.Load() > target })
	instances[0] = instances[0].killAndRestart()
	target = l.OK.Load() + 1000
	b.await("under load again", 20*time.Second, func() bool { return l.OK.Load() > target })
	l.Stop()
	done()
	mustHold(b, l)

	// ClickHouse is away: no instance is ready, and events are accepted all the same.
	t.Cleanup(func() { control(t, "/clickhouse/start") })
	control(t, "/clickhouse/stop")
	b.await("no instance ready", 20*time.Second, func() bool { return b.status("/ready") == http.StatusServiceUnavailable })
	away, done := loadInto(t, b.url, 1000, 5*time.Second) // the checks notice in the meantime
	done()
	control(t, "/clickhouse/start")
	mustAgree(t, away, b.url)
	if away.OK.Load() < 4000 {
		t.Errorf("%d events accepted while ClickHouse was away", away.OK.Load())
	}
}

// TestBalancerRates: an address that asks too often is told so, with when to come back, and nobody else is.
func TestBalancerRates(t *testing.T) {
	t.Parallel()
	haproxy, err := exec.LookPath("haproxy")
	if err != nil {
		t.Skip("haproxy is not installed")
	}
	p := startProgram(t, newSpace(t, "MAX_IN_FLIGHT_BYTES_PER_CLIENT=0"))
	for name, c := range map[string]struct {
		lower []string // what a test can reach on any machine
		body  int
	}{
		"requests": {[]string{"gt 10000", "gt 100"}, 10},
		"bytes":    {[]string{"gt 320000000", "gt 3000000"}, 100_000},
	} {
		t.Run(name, func(t *testing.T) {
			b := startBalancer(t, haproxy, []*program{p, p, p}, c.lower...)
			from := func(address string) (status int, retryAfter, answer string) {
				transport := &http.Transport{DialContext: (&net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(address)}}).DialContext, DisableKeepAlives: true}
				body := append([]byte(strings.Repeat(" ", c.body)), testkit.FreshEvent("r")...)
				resp, err := (&http.Client{Transport: transport}).Post(b.url+bulkPath, ndjson, bytes.NewReader(body))
				if err != nil {
					t.Skip("there is only one address here: ", err)
				}
				defer resp.Body.Close()
				text, _ := io.ReadAll(resp.Body)
				return resp.StatusCode, resp.Header.Get("Retry-After"), string(text)
			}
			accepted := 0
			b.await("too often", time.Minute, func() bool {
				for range 20 {
					switch status, retryAfter, answer := from("127.0.0.2"); {
					case status == http.StatusAccepted:
						accepted++
					case status == http.StatusTooManyRequests && retryAfter == "10" && strings.HasPrefix(answer, `{"error":"too many requests"`):
						return true
					default:
						t.Fatal(status, retryAfter, answer)
					}
				}
				return false
			})
			if accepted < 10 {
				t.Errorf("refused after %d requests", accepted)
			}
			if status, _, answer := from("127.0.0.1"); status != http.StatusAccepted {
				t.Errorf("somebody else: %d %s", status, answer)
			}
		})
	}
}
