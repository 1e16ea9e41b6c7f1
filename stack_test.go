// The stand that the tests share: a database, topics and a group for each, the program as a process, the embedded stack to
// ask and to break, and the counts that have to agree.

package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/twmb/franz-go/pkg/kadm"
	"github.com/twmb/franz-go/pkg/kgo"

	"github.com/event-ingestion/event-ingestion/load"
)

// asProgram makes the test binary behave as the program: fault tests start and kill real processes of it.
const asProgram = "EVENT_INGESTION_TEST_AS_PROGRAM"

func TestMain(m *testing.M) {
	switch os.Getenv(asProgram) {
	case "":
		os.Exit(m.Run())
	case "bare":
		fmt.Fprintln(os.Stderr, bareHandler())
		os.Exit(1)
	default:
		main()
	}
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

// newSpace returns the environment of a database, topics and a group of the test's own.
func newSpace(t testing.TB, more ...string) []string {
	t.Helper()
	if os.Getenv("KAFKA_BROKERS") == "" {
		if testing.Short() {
			t.Skip("needs the embedded stack")
		}
		t.Fatal("needs the embedded stack: run `make test`, or give -short to leave these tests out")
	}
	name := fmt.Sprintf("t%d_%d", os.Getpid(), time.Now().UnixNano())
	t.Cleanup(func() { askShards(t, "DROP DATABASE IF EXISTS "+name) })
	return append([]string{
		"KAFKA_BROKERS=" + stackEnv(t, "KAFKA_BROKERS"), "CLICKHOUSE_PORT=" + stackEnv(t, "CLICKHOUSE_PORT"), "CLICKHOUSE_CLUSTER=" + stackEnv(t, "CLICKHOUSE_CLUSTER"),
		"CLICKHOUSE_DATABASE=" + name, "KAFKA_TOPIC=" + name, "KAFKA_CONSUMER_GROUP=" + name,
		"SERVER_HOST=127.0.0.1", "ADMIN_ADDR=off", "KAFKA_SESSION_TIMEOUT=1s",
	}, more...)
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

func clickhouseQuery(t testing.TB, sql string) string {
	t.Helper()
	first, _, _ := strings.Cut(stackEnv(t, "CLICKHOUSE_HTTP_PORT"), ",")
	return queryAt(t, first, sql)
}

// askShards is clickhouseQuery at each ClickHouse of the test's stack.
func askShards(t testing.TB, sql string) (answers []string) {
	t.Helper()
	for port := range strings.SplitSeq(stackEnv(t, "CLICKHOUSE_HTTP_PORT"), ",") {
		answers = append(answers, queryAt(t, port, sql))
	}
	return answers
}

func queryAt(t testing.TB, port, sql string) string {
	t.Helper()
	resp, err := http.Post("http://127.0.0.1:"+port, "text/plain", strings.NewReader(sql))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, _ := io.ReadAll(resp.Body)
	if resp.StatusCode != http.StatusOK {
		t.Fatalf("%s: %s", sql, b)
	}
	return strings.TrimSpace(string(b))
}

const (
	onePath     = "/api/v1/events"
	bulkPath    = "/api/v1/events/bulk"
	metricsPath = "/api/v1/metrics?"
	jsonCT      = "application/json"
	ndjson      = "application/x-ndjson"
	good        = `"event_name":"e","user_id":"u","timestamp":$NOW`
)

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

// tortureFactor is TORTURE from the environment: how many times more often `make torture` kills.
func tortureFactor() int {
	n, _ := strconv.Atoi(os.Getenv("TORTURE"))
	return max(n, 1)
}

// moreInTorture is how often make test does a thing that takes seconds, and make torture many times of.
func moreInTorture(usual, factored int) int {
	if n := tortureFactor(); n > 1 {
		return n * factored
	}
	return usual
}

// oneClock skips a test of programs whose clock `make test-clock` cannot shift along with the others.
func oneClock(t *testing.T) {
	t.Helper()
	if os.Getenv("CLOCK_SHIFT") != "" {
		t.Skip("a browser and a Python have the machine's clock")
	}
}

// space returns the value of a variable in a space's environment.
func space(env []string, name string) string {
	value := ""
	for _, kv := range env { // the last one counts, as in a process's environment
		if v, ok := strings.CutPrefix(kv, name+"="); ok {
			value = v
		}
	}
	return value
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
	out, code := subcommand(t, p.env, fmt.Sprintf("audit -json -from 0 -to %d", maxUnixSeconds))
	var found struct {
		Difference, Aggregated, Stored int64
		Rows                           int64 `json:"distinct_rows"`
	}
	if err := json.Unmarshal([]byte(out), &found); code != 0 || err != nil || found.Difference != 0 || found.Rows != found.Aggregated || found.Stored == 0 {
		t.Fatalf("the ledger does not balance: %d\n%s", code, out)
	}
}

// mustCount fails the test unless both tables have so many events of the name, each once: on each shard, and in all.
func mustCount(t testing.TB, env []string, name string, want int64) {
	t.Helper()
	shards := askShards(t, fmt.Sprintf("SELECT count(), uniqExact(event_id), (SELECT sum(event_count) FROM %[1]s.events_hourly WHERE event_name = '%[2]s') FROM %[1]s.events WHERE event_name = '%[2]s'",
		space(env, "CLICKHOUSE_DATABASE"), name))
	var rows, total int64
	for _, got := range shards {
		fmt.Sscan(got, &rows)
		if got != fmt.Sprintf("%[1]d\t%[1]d\t%[1]d", rows) {
			total = -1
			break
		}
		total += rows
	}
	if total != want {
		t.Fatalf("accepted %d; rows, distinct rows and the aggregate's count are, by shard, %q", want, shards)
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
func subcommand(t testing.TB, env []string, args string) (string, int) {
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

// growTopic gives the space's topic so many partitions.
func growTopic(t testing.TB, env []string, partitions int) {
	t.Helper()
	kafka, err := kgo.NewClient(kgo.SeedBrokers(kafkaBrokers(t)...))
	if err != nil {
		t.Fatal(err)
	}
	defer kafka.Close()
	if _, err := kadm.NewClient(kafka).UpdatePartitions(t.Context(), partitions, space(env, "KAFKA_TOPIC")); err != nil {
		t.Fatal(err)
	}
}

// readTopic returns the records of a topic once there are n.
func readTopic(t testing.TB, topic string, n int) (records []*kgo.Record) {
	t.Helper()
	kafka, err := kgo.NewClient(kgo.SeedBrokers(kafkaBrokers(t)...), kgo.ConsumeTopics(topic))
	if err != nil {
		t.Fatal(err)
	}
	defer kafka.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	for len(records) < n {
		fetches := kafka.PollFetches(ctx)
		if ctx.Err() != nil {
			t.Fatalf("%d records on %s, want %d", len(records), topic, n)
		}
		records = append(records, fetches.Records()...)
	}
	return records
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

func freshEvent(name string) []byte {
	return fmt.Appendf(nil, `{"event_name":%q,"user_id":"u%d","timestamp":%d}`, name, time.Now().UnixNano(), time.Now().Unix())
}

func settingsFrom(b testing.TB, env []string) *settings {
	b.Helper()
	cfg, err := loadSettings(func(name string) string {
		if v := space(env, name); v != "" {
			return v
		}
		return os.Getenv(name)
	})
	if err != nil {
		b.Fatal(err)
	}
	return cfg
}

// httpPost sends JSON and returns the status.
func httpPost(url, body string) (int, error) {
	resp, err := http.Post(url, jsonCT, strings.NewReader(body))
	if err != nil {
		return 0, err
	}
	resp.Body.Close()
	return resp.StatusCode, nil
}
