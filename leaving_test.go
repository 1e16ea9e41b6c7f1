// The stand of the tests from outside that are still here: shards, broken parts, making tables anew. It leaves with them.

package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net/http"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/event-ingestion/event-ingestion/load"
)

// asProgram makes the test binary behave as the program: fault tests start and kill real processes of it.
const asProgram = "EVENT_INGESTION_TEST_AS_PROGRAM"

func TestMain(m *testing.M) {
	if os.Getenv(asProgram) != "" {
		main()
	}
	os.Exit(m.Run())
}

// program is one running instance.
type program struct {
	t      testing.TB
	binary string // this test's own when empty, see asProgram
	env    []string
	url    string
	cmd    *exec.Cmd
	log    *logBuffer
}

// logBuffer is what a running instance has logged so far.
type logBuffer struct {
	mu sync.Mutex // guards b
	b  bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// faultSpace is a newSpace with tables that never merge, not even after a restart of ClickHouse: what is stored twice stays
// visible.
func faultSpace(t testing.TB, more ...string) []string {
	t.Helper()
	env := newSpace(t, more...)
	if _, err := newStore(settingsFrom(t, env)).prepare(t.Context(), 0); err != nil {
		t.Fatal(err)
	}
	for _, table := range []string{"events", "events_hourly"} {
		askShards(t, "ALTER TABLE "+space(env, "CLICKHOUSE_DATABASE")+"."+table+" MODIFY SETTING max_bytes_to_merge_at_max_space_in_pool = 1, max_bytes_to_merge_at_min_space_in_pool = 1, parts_to_throw_insert = 100000, parts_to_delay_insert = 100000")
	}
	return env
}

// startProgram runs an instance in the space and waits until it is ready. It is killed with the test if it still runs.
func startProgram(t testing.TB, env []string) *program {
	t.Helper()
	return startBinary(t, "", env)
}

// startBinary is startProgram with another build of the program.
func startBinary(t testing.TB, binary string, env []string) *program {
	t.Helper()
	port := space(env, "SERVER_PORT")
	if port == "" {
		port = freePort(t)
		env = append(slices.Clone(env), "SERVER_PORT="+port)
	}
	p := &program{t: t, binary: binary, env: env, url: "http://127.0.0.1:" + port}
	p.start()
	p.await("ready", time.Minute, func() bool { return p.status("/ready") == http.StatusOK })
	return p
}

// start runs the program's binary and does not wait.
func (p *program) start() {
	t := p.t
	t.Helper()
	p.log = new(logBuffer)
	p.cmd = exec.Command(cmp.Or(p.binary, os.Args[0]))
	p.cmd.Env = append(append(os.Environ(), asProgram+"=1"), p.env...)
	p.cmd.Stderr = p.log
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if p.cmd.ProcessState == nil {
			p.cmd.Process.Kill()
			p.cmd.Wait()
		}
		if t.Failed() {
			t.Logf("log of %s:\n%.8000s", p.url, p.log)
		}
	})
}

// freePort is for a part of the program that listens where the test says: no other one is given it, nor draws it from the kernel.
func freePort(t testing.TB) string {
	t.Helper()
	return stackPort(t)
}

// killAndRestart ends the program with -9 and starts another instance in its place, on the same port.
func (p *program) killAndRestart() *program {
	p.t.Helper()
	p.cmd.Process.Kill()
	p.cmd.Wait()
	return startBinary(p.t, p.binary, p.env)
}

func (p *program) await(what string, limit time.Duration, done func() bool) {
	p.t.Helper()
	for deadline := time.Now().Add(limit); !done(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			p.t.Fatalf("not %s within %s; log:\n%.8000s", what, limit, p.log)
		}
	}
}

func (p *program) status(path string) int {
	resp, err := http.Get(p.url + path)
	if err != nil {
		return 0
	}
	resp.Body.Close()
	return resp.StatusCode
}

// terminate ends the program as an orchestrator does and fails the test unless it ends well.
func (p *program) terminate() {
	p.t.Helper()
	p.cmd.Process.Signal(syscall.SIGTERM)
	if err := p.cmd.Wait(); err != nil {
		p.t.Fatalf("ended with %v; log:\n%s", err, p.log)
	}
}

func (p *program) do(method, path, contentType, encoding string, body []byte) (int, http.Header, string) {
	p.t.Helper()
	var headers []string
	if contentType != "" {
		headers = append(headers, "Content-Type: "+contentType)
	}
	if encoding != "" {
		headers = append(headers, "Content-Encoding: "+encoding)
	}
	return p.ask(method, path, body, headers...)
}

// control asks the embedded stack to take a part away or to give it back.
func control(t testing.TB, action string) {
	t.Helper()
	if _, is := stackOf(t); !is {
		t.Fatal("others use this stack, too: call alone first")
	}
	resp, err := http.Post(stackEnv(t, "DEV_CONTROL")+action, "", nil)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		t.Fatalf("%s: %s", action, resp.Status)
	}
}

// mustHold fails the test unless every event that the loader had accepted is counted once: by the endpoint, in the raw
// table, where merges are stopped, in the aggregate, and by the ledger. What complete_through says is believed: nothing is
// waited for once it has passed.
func mustHold(p *program, l *load.Loader) {
	t := p.t
	t.Helper()
	drained(p)
	mustCount(t, p.env, l.Config.Event, l.Distinct())
	mustAgree(t, l, p.url)
	ledger, err := readLedger(t.Context(), settingsFrom(t, p.env), timeRange{0, maxUnixSeconds}, nil, math.MaxInt)
	if err != nil {
		t.Fatal(err)
	}
	if ledger.difference() != 0 || ledger.rows != ledger.aggregated || ledger.at[inTable] == 0 {
		var out bytes.Buffer
		ledger.print(&out, false)
		t.Fatalf("the ledger does not balance:\n%s", &out)
	}
}

// drained returns when everything that was acknowledged before the call is stored.
func drained(p *program) {
	p.t.Helper()
	second := time.Now().Unix()
	p.await("drained", 2*time.Minute, func() bool {
		time.Sleep(sampleInterval) // it moves no faster, and a query is 20 ms of CPU that those who store could use
		return completeThrough(p) >= second
	})
}

// completeThrough is what the metrics endpoint says, 0 for null.
func completeThrough(p *program) int64 {
	p.t.Helper()
	var a load.MetricsAnswer
	_, _, answer := p.do("GET", metricsPath+"event_name=x&from=1&to=2", "", "", nil)
	json.Unmarshal([]byte(answer), &a)
	return a.Through
}

// subcommand runs one of the program's commands in the space and returns what it printed and its exit code.
func subcommand(t *testing.T, env []string, args string) (string, int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute) // one that hangs
	defer cancel()
	cmd := exec.CommandContext(ctx, os.Args[0], strings.Fields(args)...)
	cmd.Env = append(append(os.Environ(), asProgram+"=1"), env...)
	out, err := cmd.CombinedOutput()
	if exit := new(exec.ExitError); err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return string(out), cmd.ProcessState.ExitCode()
}

// ask sends a request with headers ("Name: value") and returns its status, headers and body.
func (p *program) ask(method, path string, body []byte, headers ...string) (int, http.Header, string) {
	p.t.Helper()
	req, err := http.NewRequest(method, p.url+path, bytes.NewReader(body))
	if err != nil {
		p.t.Fatal(err)
	}
	for _, h := range headers {
		name, value, _ := strings.Cut(h, ": ")
		req.Header.Set(name, value)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		p.t.Fatal(err)
	}
	defer resp.Body.Close()
	answer, _ := io.ReadAll(resp.Body)
	return resp.StatusCode, resp.Header, string(answer)
}

// loads counts the loads of tests: every other one sends insert_ids.
var loads atomic.Int32

// loadInto sends made-up events to url and returns the loader for its counts. It runs in the background until done.
func loadInto(tb testing.TB, url string, rate float64, d time.Duration, more ...string) (l *load.Loader, done func()) {
	tb.Helper()
	rate *= float64(min(tortureFactor(), 3)) // where there is time, more is in flight when something dies
	args := []string{"-url", url, "-rate", fmt.Sprint(rate), "-duration", d.String(), "-bulk", "50", "-connections", "16", "-users", "500", "-retries", "100"}
	t, isTest := tb.(*testing.T)
	if isTest { // a benchmark measures without
		args = append(args, "-dup", "0.1", fmt.Sprintf("-insert-ids=%t", loads.Add(1)%2 == 0))
	}
	args = append(args, more...)
	cfg, err := load.Parse(args, io.Discard)
	if err != nil {
		tb.Fatal(err)
	}
	cfg.Event = fmt.Sprintf("%s_%d", cfg.Event, time.Now().UnixNano())
	if l, err = load.New(cfg); err != nil {
		tb.Fatal(err)
	}
	finished := make(chan struct{})
	go func() { // ends after d, or l.Stop
		defer close(finished)
		l.Send(context.Background(), io.Discard)
	}()
	if isTest {
		var watching sync.WaitGroup
		watching.Go(func() { mustBeHonest(t, l, url, finished) }) // ends with the load
		t.Cleanup(watching.Wait)
	}
	tb.Cleanup(l.Stop)
	return l, func() { <-finished }
}

// mustBeHonest fails the test when complete_through says that something is counted which is not, or groups that are not what the
// total is, at any time until done.
func mustBeHonest(t *testing.T, l *load.Loader, url string, done <-chan struct{}) {
	type note struct{ second, acknowledged int64 }
	var notes []note
	var a load.MetricsAnswer
	tick := time.NewTicker(sampleInterval) // complete_through moves no faster, and a query is 20 ms of CPU
	defer tick.Stop()
	for n := 0; ; n++ {
		select {
		case <-done:
			return
		case <-tick.C:
		}
		acknowledged := l.Distinct()
		notes = append(notes, note{time.Now().Unix(), acknowledged})
		resp, err := http.Get(fmt.Sprintf("%s%sevent_name=%s&from=1&to=%d&group_by=%s", url, metricsPath, l.Config.Event, time.Now().Unix()+100,
			[]string{"", "hour", "campaign", "day", "channel"}[n%5]))
		if err != nil {
			continue // the fault
		}
		a.Through, a.Groups = 0, nil
		answered := resp.StatusCode == http.StatusOK && json.NewDecoder(resp.Body).Decode(&a) == nil
		resp.Body.Close()
		sum := int64(0)
		for _, g := range a.Groups {
			sum += g.Total
		}
		if answered && n%5 > 0 && sum != a.Total {
			t.Errorf("%d are counted in all, %d in the groups of question %d", a.Total, sum, n%5)
		}
		for answered && len(notes) > 0 && notes[0].second <= a.Through {
			if a.Total < notes[0].acknowledged {
				t.Errorf("complete through %d, and %d of the %d events acknowledged then are counted", a.Through, a.Total, notes[0].acknowledged)
			}
			notes = notes[1:]
		}
	}
}

// mustAgree fails the test unless the metrics endpoint counts exactly what the loader had accepted.
func mustAgree(t testing.TB, l *load.Loader, url string) {
	t.Helper()
	l.Config.URL = url
	var out bytes.Buffer
	if code := l.Report(&out, l.Verify(&out)); code != 0 {
		t.Fatalf("counts differ:\n%s", &out)
	}
	if l.OK.Load() == 0 {
		t.Fatal("nothing was accepted")
	}
}

// postAll sends the bodies as NDJSON over four connections, each until it was accepted.
func postAll(t *testing.T, p *program, bodies [][]byte) {
	t.Helper()
	queue := make(chan []byte)
	var clients sync.WaitGroup
	for range 4 {
		clients.Go(func() { // ends with the queue
			for body := range queue {
				for deadline := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
					resp, err := http.Post(p.url+bulkPath, ndjson, bytes.NewReader(body))
					if err == nil {
						resp.Body.Close()
					}
					if err == nil && resp.StatusCode == http.StatusAccepted {
						break
					}
					if time.Now().After(deadline) {
						t.Error("not accepted within a minute:", err, resp)
						break
					}
				}
			}
		})
	}
	for _, body := range bodies {
		queue <- body
	}
	close(queue)
	clients.Wait()
}

// numbered makes NDJSON bodies of at most each events: number i is of user u<i> and happened at at(i).
func numbered(name string, events, each int, at func(i int) int64) (bodies [][]byte) {
	for i := range events {
		if i%each == 0 {
			bodies = append(bodies, nil)
		}
		last := &bodies[len(bodies)-1]
		*last = fmt.Appendf(*last, `{"event_name":%q,"user_id":"u%d","timestamp":%d}`+"\n", name, i, at(i))
	}
	return bodies
}

func comeAndGo(t *testing.T, env []string) {
	first := startProgram(t, env)
	l, done := loadInto(t, first.url, 2000, time.Hour)
	for range 2 {
		second := startProgram(t, env)
		target := l.OK.Load() + 2000
		second.await("shared", 30*time.Second, func() bool { return l.OK.Load() > target })
		second.terminate()
	}
	l.Stop()
	done()
	mustHold(first, l)
}

// isCluster says whether the stack's brokers are processes of their own.
func isCluster() bool { return os.Getenv("DEV_KAFKA_NODES") != "" }
