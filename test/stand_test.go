// Package test has the whole-system tests: they build the program once and drive it from outside, over HTTP, Kafka and ClickHouse
// and by its commands. A file is a promise.
//
// stand_test.go is the stand: it starts the program and stacks, and asks both stores. loads_test.go sends and compares,
// kafka_test.go has topics, brokers and proxies. A test in ten lines:
//
//	func TestKilled(t *testing.T) { // one promise, in the file of such promises
//		t.Parallel()                                     // or alone(t): a stack of its own, which control breaks
//		env := faultSpace(t, "MAX_RETRY_ATTEMPTS=1")     // a database, topics and a group, and settings
//		p := startProgram(t, env)                        // ready when it returns
//		l, done := loadInto(t, p.url, 1000, time.Hour)   // a client that repeats what was not acknowledged
//		p.await("under load", 20*time.Second, func() bool { return l.OK.Load() > 1000 })
//		p = p.killAndRestart()                           // the fault
//		l.Stop()
//		done()
//		mustHold(p, l)                                   // accepted, stored, counted and audited are the same
//	}
//
// Nothing waits for a time to pass but where the time is the fault. The tests run in the root of the repository: paths are those
// that a reader would type there.
package test

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/event-ingestion/event-ingestion/internal/testkit"
)

const (
	// givenBinary names a program that is built already. Without it the tests build one, with the race detector if they have it.
	givenBinary = "EVENT_INGESTION_BINARY"
	// asBare makes the test binary the bare handler of a benchmark.
	asBare = "EVENT_INGESTION_BARE"
)

// binaries is the directory of what the tests build.
var binaries string

func TestMain(m *testing.M) {
	if os.Getenv(asBare) != "" {
		fmt.Fprintln(os.Stderr, bareHandler())
		os.Exit(1)
	}
	var failed error
	if binaries, failed = os.MkdirTemp("", "event-ingestion-test-"); failed != nil || os.Chdir("..") != nil {
		panic(failed)
	}
	code := m.Run()
	os.RemoveAll(binaries)
	os.Exit(code)
}

// programBinary is the program under test, built when the first test asks for it.
var programBinary = sync.OnceValues(func() (string, error) {
	if given := os.Getenv(givenBinary); given != "" {
		return given, nil
	}
	var flags []string
	if info, ok := debug.ReadBuildInfo(); ok && slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"}) {
		flags = []string{"-race"}
	}
	return build("tested", "CGO_ENABLED="+fmt.Sprint(len(flags)), flags...)
})

func build(name, env string, flags ...string) (string, error) {
	path := filepath.Join(binaries, name)
	cmd := exec.Command("go", append(append([]string{"build", "-o", path}, flags...), ".")...)
	cmd.Env = append(os.Environ(), env)
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build the program: %v\n%s", err, out)
	}
	return path, nil
}

// command is a call of the program in the space env.
func command(t testing.TB, env []string, args ...string) *exec.Cmd {
	t.Helper()
	path, err := programBinary()
	if err != nil {
		t.Fatal(err)
	}
	return asIn(env, exec.Command(path, args...))
}

// asIn gives cmd the space's environment. The race detector is not to wait a second at each end: a race has been reported by then.
func asIn(env []string, cmd *exec.Cmd) *exec.Cmd {
	cmd.Env = append(append(os.Environ(), "GORACE=atexit_sleep_ms=0 "+os.Getenv("GORACE")), env...)
	return cmd
}

// subcommand runs one of the program's commands in the space and returns what it printed and its exit code.
func subcommand(t testing.TB, env []string, args string) (string, int) {
	t.Helper()
	cmd := command(t, env, strings.Fields(args)...)
	defer time.AfterFunc(5*time.Minute, func() { cmd.Process.Kill() }).Stop() // one that hangs: an audit of millions of events beside ingestion may take two
	out, err := cmd.CombinedOutput()
	if exit := new(exec.ExitError); err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return string(out), cmd.ProcessState.ExitCode()
}

// program is one running instance.
type program struct {
	t      testing.TB
	binary string // programBinary when empty
	env    []string
	url    string
	cmd    *exec.Cmd
	log    *logBuffer
}

// newSpace returns the environment of a database, topics and a group of the test's own. Of a setting that is given twice the last
// one counts, as in a process's environment.
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
		"SERVER_HOST=127.0.0.1", "ADMIN_ADDR=off", "KAFKA_SESSION_TIMEOUT=3s", "ALLOWED_HOSTS=x", // of requests written by hand
	}, more...)
}

// faultSpace is a newSpace with tables that never merge, not even after a restart of ClickHouse: what is stored twice stays
// visible.
func faultSpace(t testing.TB, more ...string) []string {
	t.Helper()
	env := newSpace(t, more...)
	makeTables(t, env)
	for _, table := range []string{"events", "events_hourly"} {
		askShards(t, "ALTER TABLE "+space(env, "CLICKHOUSE_DATABASE")+"."+table+" MODIFY SETTING max_bytes_to_merge_at_max_space_in_pool = 1, max_bytes_to_merge_at_min_space_in_pool = 1, parts_to_throw_insert = 100000, parts_to_delay_insert = 100000")
	}
	return env
}

// makeTables starts an instance that stores, and ends it.
func makeTables(t testing.TB, env []string) {
	t.Helper()
	startProgram(t, append(slices.Clone(env), "SERVER_PORT=")).terminate()
}

// space returns the value of a variable in a space's environment.
func space(env []string, name string) string {
	value := ""
	for _, kv := range env {
		if v, ok := strings.CutPrefix(kv, name+"="); ok {
			value = v
		}
	}
	return value
}

// startProgram runs an instance in the space and waits until it is ready. It is killed with the test if it still runs.
func startProgram(t testing.TB, env []string) *program {
	t.Helper()
	return startBinary(t, "", env)
}

// startBinary is startProgram with another build of the program.
func startBinary(t testing.TB, binary string, env []string) *program {
	t.Helper()
	p := newProgram(t, env)
	p.binary = binary
	p.start()
	p.await("ready", time.Minute, func() bool { return p.status("/ready") == http.StatusOK })
	return p
}

// newProgram is an instance that does not run yet. It has a port of its own unless the space says which.
func newProgram(t testing.TB, env []string) *program {
	t.Helper()
	port := space(env, "SERVER_PORT")
	if port == "" {
		port = freePort(t)
		env = append(slices.Clone(env), "SERVER_PORT="+port)
	}
	return &program{t: t, env: env, url: "http://127.0.0.1:" + port}
}

// start runs the program and does not wait.
func (p *program) start() {
	t := p.t
	t.Helper()
	p.log = new(logBuffer)
	if p.cmd = asIn(p.env, exec.Command(p.binary)); p.binary == "" {
		p.cmd = command(t, p.env)
	}
	p.cmd.Stderr = p.log
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	cmd, log := p.cmd, p.log
	t.Cleanup(func() {
		if cmd.ProcessState == nil {
			cmd.Process.Kill()
			cmd.Wait()
		}
		if strings.Contains(log.String(), "DATA RACE") {
			t.Errorf("the program has a data race")
		}
		if t.Failed() {
			t.Logf("log of %s:\n%.8000s", p.url, log)
		}
	})
}

// killAndRestart ends the program with -9 and starts another instance in its place, on the same port.
func (p *program) killAndRestart() *program {
	p.t.Helper()
	p.cmd.Process.Kill()
	p.cmd.Wait()
	return startBinary(p.t, p.binary, p.env)
}

// terminate ends the program as an orchestrator does and fails the test unless it ends well.
func (p *program) terminate() {
	p.t.Helper()
	p.cmd.Process.Signal(syscall.SIGTERM)
	if err := p.cmd.Wait(); err != nil {
		p.t.Fatalf("ended with %v; log:\n%s", err, p.log)
	}
}

func (p *program) await(what string, limit time.Duration, done func() bool) {
	p.t.Helper()
	for deadline := time.Now().Add(limit); !done(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			p.cmd.Process.Signal(syscall.SIGQUIT) // its goroutines say what it waits for
			time.AfterFunc(5*time.Second, func() { p.cmd.Process.Kill() })
			p.cmd.Wait()
			p.t.Fatalf("not %s within %s; log:\n%.30000s", what, limit, p.log)
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

// do is ask with a content type and an encoding, if there are any.
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

// clickhouseQuery asks the first ClickHouse of the test's stack.
func clickhouseQuery(t testing.TB, sql string) string {
	t.Helper()
	first, _, _ := strings.Cut(stackEnv(t, "CLICKHOUSE_HTTP_PORT"), ",")
	return testkit.QueryAt(t, first, sql)
}

// askShards is clickhouseQuery at each ClickHouse of the test's stack.
func askShards(t testing.TB, sql string) (answers []string) {
	t.Helper()
	for port := range strings.SplitSeq(stackEnv(t, "CLICKHOUSE_HTTP_PORT"), ",") {
		answers = append(answers, testkit.QueryAt(t, port, sql))
	}
	return answers
}

// stacks holds the stacks that tests have for themselves, by the test's name; nil is the shared one while nobody else uses it.
var stacks sync.Map // string to *ownStack

// ownStack is an embedded stack that one test may break.
type ownStack struct {
	t      testing.TB
	args   []string // of dev
	env    []string // what dev tells its command
	cmd    *exec.Cmd
	ending io.Closer // its command's stdin
	log    *logBuffer
}

// alone lets the test run beside others with a stack of its own. On a real cluster, of which there is only one, the test
// has to itself what all share: it is not parallel there. more are flags of dev: "-shards", "3" are three ClickHouse servers.
func alone(t *testing.T, more ...string) {
	t.Helper()
	if os.Getenv("DEV_COMMAND") == "" || isCluster() {
		stacks.Store(t.Name(), (*ownStack)(nil))
		return
	}
	t.Parallel()
	startOwnStack(t, append([]string{"-data", t.TempDir()}, more...)...)
}

// startOwnStack starts a stack, which ends with the test or with this process. Everything that the test asks of the stack
// (newSpace, clickhouseQuery, control) is then asked of this one.
func startOwnStack(t testing.TB, args ...string) *ownStack {
	t.Helper()
	s := &ownStack{t: t, log: new(logBuffer)}
	s.args = append(args, "-kafka-ports", freePort(t)+","+freePort(t), "-clickhouse-port", freePort(t), "-clickhouse-http-port", freePort(t),
		"--", "sh", "-c", "env; echo; read end")
	s.start()
	stacks.Store(t.Name(), s)
	t.Cleanup(func() {
		stacks.Delete(t.Name())
		s.ending.Close()
		s.cmd.Wait()
		if t.Failed() {
			t.Logf("log of the test's own stack:\n%.4000s", s.log)
		}
	})
	return s
}

// start runs the stack and waits until it answers.
func (s *ownStack) start() {
	s.t.Helper()
	s.cmd = exec.Command(os.Getenv("DEV_COMMAND"), s.args...)
	s.cmd.Stderr = s.log
	stdin, err := s.cmd.StdinPipe()
	if err != nil {
		s.t.Fatal(err)
	}
	stdout, err := s.cmd.StdoutPipe()
	if err != nil {
		s.t.Fatal(err)
	}
	if err := s.cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	s.ending, s.env = stdin, nil
	for lines := bufio.NewScanner(stdout); lines.Scan() && lines.Text() != ""; {
		s.env = append(s.env, lines.Text())
	}
	if space(s.env, "DEV_CONTROL") == "" {
		s.t.Fatalf("the stack does not start:\n%s", s.log)
	}
}

// killAndRestart ends the whole stack with -9.
func (s *ownStack) killAndRestart() {
	s.t.Helper()
	s.cmd.Process.Kill()
	s.cmd.Wait()
	s.ending.Close()
	s.start()
}

// stackOf is the stack that the test, or the one that it is a part of, has for itself.
func stackOf(t testing.TB) (own *ownStack, is bool) {
	for test := t.Name(); ; test = test[:strings.LastIndexByte(test, '/')] {
		if s, is := stacks.Load(test); is {
			return s.(*ownStack), true
		}
		if !strings.Contains(test, "/") {
			return nil, false
		}
	}
}

// stackEnv is a variable that dev sets, of the stack that the test uses: its own, or the one that all share.
func stackEnv(t testing.TB, name string) string {
	if own, _ := stackOf(t); own != nil {
		return space(own.env, name)
	}
	return os.Getenv(name)
}

// clickhouseAddress is where the test's ClickHouse speaks its native protocol.
func clickhouseAddress(t testing.TB) string { return "127.0.0.1:" + stackEnv(t, "CLICKHOUSE_PORT") }

// control asks the test's own stack to take a part away or to give it back: dev/control.go says which there are.
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
	if paused, is := strings.CutSuffix(action, "/pause"); is { // or a test that fails before it resumes waits when it cleans up
		t.Cleanup(func() { control(t, paused+"/resume") })
	}
}
