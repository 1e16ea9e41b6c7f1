// The stack as its users run it: real dev processes around real commands, killed in every way that comes to mind.

package main

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// asDev makes the test binary behave as dev, so that the race detector looks at dev itself.
const asDev = "DEV_TEST_AS_DEV"

func TestMain(m *testing.M) {
	if os.Getenv(asDev) != "" {
		main()
	}
	os.Exit(m.Run())
}

// patience is for what takes a second on an idle machine.
const patience = 30 * time.Second

func TestFlags(t *testing.T) {
	for args, want := range map[string]string{
		"":                                  "no command",
		"-v --":                             "no command",
		"start":                             `"start" is neither`,
		"stop now":                          `"stop" is neither`,
		"-port 1 -- true":                   "-port",
		"-kafka-ports x -- true":            `"x" is not a list`,
		"-kafka-ports 1,2,0 -- true":        "port 0",
		"-clickhouse-port 70000 -- true":    "port 70000",
		"-clickhouse-port 8123 -- true":     "port 8123 is given twice",
		"-ephemeral -data d -- true":        "leave out -data",
		"-keep-free -1 -- true":             "has to be 0 or more",
		"-disk 20 -- true":                  "has to be 256 or more",
		"-kafka x -- true":                  `-kafka "x"`,
		"-data d stop":                      "",
		"-kafka-ports 1,2 -- stop -data -h": "",
	} {
		_, err := parseFlags(strings.Fields(args), io.Discard)
		if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("dev %s: %v, want %q", args, err, want)
		}
	}
}

func TestExitCode(t *testing.T) {
	for command, want := range map[string]int{"exit 7": 7, "kill -9 $$": 137} {
		out, err := dev("-ephemeral", "--", "sh", "-c", command).CombinedOutput()
		if code := exitStatus(err); code != want {
			t.Errorf("%s: exit code %d, want %d\n%s", command, code, want, out)
		}
	}
	out, err := dev("-ephemeral", "--", "no-such-command").CombinedOutput()
	if code := exitStatus(err); code != exitNotFound || bytes.Contains(out, []byte("ready")) {
		t.Errorf("a command that is not there: exit code %d\n%s", code, out)
	}
	if code := exitStatus(dev("-nonsense").Run()); code != 2 {
		t.Errorf("a bad flag: exit code %d", code)
	}
}

// TestSignals: the first reaches the command once, which may take its time; the second kills it.
func TestSignals(t *testing.T) {
	d := start(t, []string{"-ephemeral"}, `n=0; trap 'n=$((n+1))' INT; `, `while [ $n = 0 ]; do sleep 0.02; done; sleep 0.3; exit $((40+n))`)
	d.Process.Signal(os.Interrupt)
	if code := d.exit(); code != 41 {
		t.Errorf("SIGINT: exit code %d, want 41\n%s", code, d.out)
	}
	d = start(t, []string{"-ephemeral"}, `trap '' TERM; `, `while :; do sleep 0.02; done`)
	d.Process.Signal(syscall.SIGTERM)
	time.Sleep(100 * time.Millisecond)
	d.Process.Signal(syscall.SIGTERM)
	if code := d.exit(); code != 137 {
		t.Errorf("two SIGTERMs to a deaf command: exit code %d, want 137\n%s", code, d.out)
	}
	if left, _ := filepath.Glob(filepath.Join(d.tmp, "event-ingestion-dev-*")); len(left) > 0 {
		t.Errorf("left behind: %s", left)
	}
}

// TestKilled kills dev with -9: nothing that it started is left, and everything acknowledged is there at the next
// start, for a producer that has lived through it too.
func TestKilled(t *testing.T) {
	dir := t.TempDir()
	flags := onPorts(t, dir)
	d := start(t, flags, `sleep 61 & echo $! > `+dir+`/grandchild; `, `sleep 62`)
	d.query(t, "CREATE TABLE t (x UInt8) ENGINE = MergeTree ORDER BY x")
	d.query(t, "INSERT INTO t VALUES (42)")
	producer := d.client(t)
	createTopic(t, producer)
	produce(t, producer, 0, 100)
	if got := d.consume(t, 60); got != "0…59" {
		t.Errorf("consumed %s", got)
	}
	d.Process.Kill()
	d.exit()
	b, err := os.ReadFile(filepath.Join(dir, "grandchild"))
	if err != nil {
		t.Fatal(err)
	}
	grandchild := atoi(strings.TrimSpace(string(b)))
	await(t, "the command's child to end", func() bool { return syscall.Kill(grandchild, 0) != nil })

	d = start(t, flags, ``, `sleep 63`)
	if got := d.query(t, "SELECT x FROM t"); got != "42" {
		t.Errorf("in ClickHouse: %q", got)
	}
	produce(t, producer, 100, 200) // the client of before, with its producer id and its sequence
	if got := d.consume(t, 140); got != "60…199" {
		t.Errorf("consumed %s", got)
	}

	// A second dev on the same data is refused; stop ends the one that runs, cleanly, and then finds nothing.
	out, err := dev(append(onPorts(t, dir), "--", "true")...).CombinedOutput()
	if err == nil || !strings.Contains(string(out), fmt.Sprint("another dev, pid ", d.Process.Pid)) {
		t.Errorf("two devs on one directory: %v %s", err, out)
	}
	stop(t, dir, "stopped")
	if code := d.exit(); code != 128+int(syscall.SIGTERM) {
		t.Errorf("exit code %d after stop\n%s", code, d.out)
	}
	stop(t, dir, "nothing is running")

	d = start(t, flags, ``, `sleep 64`) // after a clean end
	if got := d.query(t, "SELECT x FROM t"); got != "42" {
		t.Errorf("in ClickHouse: %q", got)
	}
	produce(t, producer, 200, 250)
	if got := d.consume(t, 50); got != "200…249" {
		t.Errorf("consumed %s", got)
	}
}

func TestControl(t *testing.T) {
	d := start(t, []string{"-ephemeral"}, ``, `sleep 65`)
	d.query(t, "CREATE TABLE t (x UInt8) ENGINE = MergeTree ORDER BY x")
	d.query(t, "INSERT INTO t VALUES (42)")
	d.control(t, "/clickhouse/kill", http.StatusOK)
	await(t, "ClickHouse to come back", func() bool { b, err := d.ask("SELECT x FROM t"); return err == nil && b == "42" })
	d.control(t, "/clickhouse/stop", http.StatusOK)
	d.control(t, "/clickhouse/stop", http.StatusOK)
	d.control(t, "/clickhouse/kill", http.StatusConflict)
	time.Sleep(2 * firstPause)
	if got, err := d.ask("SELECT 1"); err == nil {
		t.Errorf("stopped, and it answers %q", got)
	}
	d.control(t, "/clickhouse/start", http.StatusOK)
	d.query(t, "SELECT 1")
	d.control(t, "/clickhouse/pause", http.StatusOK)
	if got, err := d.ask("SELECT 1"); err == nil {
		t.Errorf("paused, and it answers %q", got)
	}
	d.control(t, "/clickhouse/resume", http.StatusOK)
	d.query(t, "SELECT 1")

	producer := d.client(t)
	createTopic(t, producer)
	produce(t, producer, 0, 10)
	d.control(t, "/kafka/stop", http.StatusOK)
	if c, err := net.Dial("tcp", strings.Split(d.env["KAFKA_BROKERS"], ",")[0]); err == nil {
		c.Close()
		t.Error("the brokers are stopped, and one accepts a connection")
	}
	d.control(t, "/kafka/start", http.StatusOK)
	produce(t, producer, 10, 20)
	if got := d.consume(t, 20); got != "0…19" {
		t.Errorf("consumed %s", got)
	}

	// A password that does not fit must not end ClickHouse, which then hangs for seconds: see clickhouse.xml.
	server := d.server()
	if answer := d.login(t, "default", "wrong"); answer != 0 {
		t.Errorf("login: packet %d", answer)
	}
	time.Sleep(2 * fatalGrace)
	if d.query(t, "SELECT 1"); d.server() != server {
		t.Errorf("pid %d answers, was %d", d.server(), server)
	}
	if strings.Contains(d.out.String(), "clickhouse ended") {
		t.Errorf("restarts that were not asked for:\n%s", d.out)
	}
}

// TestSupervised kills ClickHouse behind dev's back.
func TestSupervised(t *testing.T) {
	d := start(t, []string{"-ephemeral"}, ``, `sleep 66`)
	owner := portOwner(atoi(d.env["CLICKHOUSE_HTTP_PORT"]))
	if !strings.Contains(owner, libraryCommand) && !strings.Contains(owner, "clickhouse local") {
		t.Fatalf("ClickHouse's port belongs to %s", owner)
	}
	server := d.server()
	another := func() bool {
		_, err := d.ask("SELECT 1")
		return err == nil && d.server() != server
	}
	syscall.Kill(server, syscall.SIGKILL)
	await(t, "another ClickHouse", another)

	// A reset connection does nothing to it; a stranger who logs in ends it, and the supervisor sees that at once.
	server = d.server()
	reset := d.native(t)
	reset.SetLinger(0)
	reset.Close()
	time.Sleep(2 * fatalGrace)
	if d.query(t, "SELECT 1"); d.server() != server {
		t.Errorf("a reset connection has ended ClickHouse")
	}
	began := time.Now()
	d.login(t, "stranger", "")
	await(t, "another ClickHouse after a failed login", another)
	if took := time.Since(began); took > 4*time.Second {
		t.Errorf("a hung ClickHouse was replaced after %s", took)
	}
	d.Process.Signal(syscall.SIGTERM)
	d.exit()
	if !strings.Contains(d.out.String(), "clickhouse ended (signal: killed)") {
		t.Errorf("no word of it:\n%s", d.out)
	}
}

// TestFullDisk: a start on a disk without the room that ClickHouse leaves alone says so, reads work, and inserts do not.
func TestFullDisk(t *testing.T) {
	dir := t.TempDir()
	flags := onPorts(t, dir)
	d := start(t, flags, ``, `sleep 69`)
	d.query(t, "CREATE TABLE t (x UInt8) ENGINE = MergeTree ORDER BY x")
	d.query(t, "INSERT INTO t VALUES (42)")
	d.Process.Signal(syscall.SIGTERM)
	if d.exit(); strings.Contains(d.out.String(), "nearly full") {
		t.Errorf("said without need:\n%s", d.out)
	}
	d = start(t, append(flags, "-keep-free", "1000000000"), ``, `sleep 70`)
	if got := d.query(t, "SELECT x FROM t"); got != "42" {
		t.Errorf("in ClickHouse: %q", got)
	}
	if got, err := d.ask("INSERT INTO t VALUES (43)"); err == nil || !strings.Contains(err.Error(), "NOT_ENOUGH_SPACE") {
		t.Errorf("an insert is answered %q, %v", got, err)
	}
	d.Process.Signal(syscall.SIGTERM)
	if d.exit(); !strings.Contains(d.out.String(), "nearly full") || !strings.Contains(d.out.String(), "KEEP_FREE_MB=") {
		t.Errorf("not said:\n%s", d.out)
	}
}

func TestTakenPort(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	port := l.Addr().(*net.TCPAddr).Port
	flags := append(onPorts(t, t.TempDir()), "-clickhouse-port", strconv.Itoa(port))
	out, err := dev(append(flags, "--", "true")...).CombinedOutput()
	want := fmt.Sprintf("port %d is taken by pid %d (", port, os.Getpid())
	if exitStatus(err) != 1 || !strings.Contains(string(out), want) || !strings.Contains(string(out), "-clickhouse-port 19000 -clickhouse-http-port 18123 -- true\n") || strings.Contains(string(out), "ready") {
		t.Fatalf("want %q: %v\n%s", want, err, out)
	}
}

// TestStaleLock: the pid in the file belongs to somebody else by now, who is not to be touched.
func TestStaleLock(t *testing.T) {
	dir := t.TempDir()
	other := exec.Command("sleep", "67")
	if err := other.Start(); err != nil {
		t.Fatal(err)
	}
	defer other.Wait()
	defer other.Process.Kill()
	if err := os.WriteFile(filepath.Join(dir, "dev.lock"), []byte(strconv.Itoa(other.Process.Pid)), 0o644); err != nil {
		t.Fatal(err)
	}
	stop(t, dir, "nothing is running")
	if out, err := dev(append(onPorts(t, dir), "--", "true")...).CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	if err := other.Process.Signal(syscall.Signal(0)); err != nil {
		t.Errorf("the process of that pid: %v", err)
	}
}
