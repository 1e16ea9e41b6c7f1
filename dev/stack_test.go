// What the tests need around a running dev: start it, end it, ask its ClickHouse, fill and read its Kafka.

package main

import (
	"bytes"
	"context"
	"encoding/binary"
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

	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// running is a dev whose command runs.
type running struct {
	*exec.Cmd
	t   *testing.T
	env map[string]string // the command's
	out *bytes.Buffer     // stdout and stderr, after exit
	tmp string            // where -ephemeral puts its data
}

func dev(args ...string) *exec.Cmd {
	cmd := exec.Command(os.Args[0], args...)
	// A race-enabled process sleeps for a second before it exits; the races themselves are reported at once.
	cmd.Env = append(os.Environ(), asDev+"=1", "GORACE=atexit_sleep_ms=20")
	return cmd
}

// start starts dev with a shell command in two parts, and returns between them, with the environment that it has seen.
func start(t *testing.T, flags []string, before, after string) *running {
	t.Helper()
	seen := filepath.Join(t.TempDir(), "env")
	cmd := dev(append(flags, "--", "sh", "-c", fmt.Sprintf("%s env > %s.part; mv %[2]s.part %[2]s; %s", before, seen, after))...)
	out, err := os.Create(seen + ".out")
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	cmd.Stdout, cmd.Stderr = out, out // a file: a buffer would make Wait wait for everybody who holds the pipe
	d := &running{Cmd: cmd, t: t, env: map[string]string{}, out: new(bytes.Buffer), tmp: t.TempDir()}
	cmd.Env = append(cmd.Env, "TMPDIR="+d.tmp)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if d.ProcessState == nil {
			d.Process.Signal(syscall.SIGTERM)
			d.exit()
		}
	})
	var b []byte
	for deadline := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		if b, err = os.ReadFile(seen); err == nil {
			break
		}
		if time.Now().After(deadline) || syscall.Kill(cmd.Process.Pid, 0) != nil {
			d.Process.Kill()
			d.exit()
			t.Fatalf("dev does not run its command:\n%s", d.out)
		}
	}
	for _, line := range strings.Split(string(b), "\n") {
		name, value, _ := strings.Cut(line, "=")
		d.env[name] = value
	}
	return d
}

// exit waits for the end, and returns the exit code.
func (d *running) exit() int {
	err := d.Wait()
	b, _ := os.ReadFile(d.Stdout.(*os.File).Name())
	d.out.Write(b)
	if bytes.Contains(b, []byte("DATA RACE")) {
		d.t.Errorf("dev:\n%s", b)
	}
	return exitStatus(err)
}

// exitStatus is 0, or a child's exit code, or -1 when a signal ended it.
func exitStatus(err error) int {
	if err == nil {
		return 0
	}
	return err.(*exec.ExitError).ExitCode()
}

func stop(t *testing.T, dir, want string) {
	t.Helper()
	if out, err := dev("-data", dir, "stop").CombinedOutput(); err != nil || !strings.Contains(string(out), want) {
		t.Errorf("dev stop: %v\n%s", err, out)
	}
}

// onPorts returns flags for a data directory and ports that are free.
func onPorts(t *testing.T, dir string) []string {
	t.Helper()
	ports, err := freePorts(4)
	if err != nil {
		t.Fatal(err)
	}
	return []string{"-data", dir, "-kafka-ports", fmt.Sprintf("%d,%d", ports[0], ports[1]),
		"-clickhouse-port", strconv.Itoa(ports[2]), "-clickhouse-http-port", strconv.Itoa(ports[3])}
}

func await(t *testing.T, what string, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !is(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited %s for %s", patience, what)
		}
	}
}

func atoi(s string) int { n, _ := strconv.Atoi(s); return n }

// ask puts one query to ClickHouse, for at most a second.
func (d *running) ask(sql string) (string, error) {
	client := http.Client{Timeout: time.Second}
	resp, err := client.Post("http://127.0.0.1:"+d.env["CLICKHOUSE_HTTP_PORT"], "", strings.NewReader(sql))
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s", b)
	}
	return strings.TrimSpace(string(b)), err
}

func (d *running) query(t *testing.T, sql string) string {
	t.Helper()
	got, err := d.ask(sql)
	if err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
	return got
}

// server is the pid of ClickHouse, 0 while it does not listen.
func (d *running) server() int {
	pid, _, _ := strings.Cut(strings.TrimPrefix(portOwner(atoi(d.env["CLICKHOUSE_HTTP_PORT"])), "pid "), " ")
	return atoi(pid)
}

// native connects to the native port.
func (d *running) native(t *testing.T) *net.TCPConn {
	t.Helper()
	c, err := net.DialTimeout("tcp", "127.0.0.1:"+d.env["CLICKHOUSE_PORT"], time.Second)
	if err != nil {
		t.Fatal(err)
	}
	c.SetDeadline(time.Now().Add(patience))
	return c.(*net.TCPConn)
}

// login sends ClickHouse's hello on the native port and returns the type of the answer: 0 is hello, 2 an exception.
func (d *running) login(t *testing.T, user, password string) byte {
	t.Helper()
	c := d.native(t)
	defer c.Close()
	hello := []byte{0}
	text := func(s string) { hello = append(binary.AppendUvarint(hello, uint64(len(s))), s...) }
	text("dev test")
	for _, version := range []uint64{26, 7, 54460} { // major, minor, protocol
		hello = binary.AppendUvarint(hello, version)
	}
	text("") // database
	text(user)
	text(password)
	c.Write(hello)
	c.CloseWrite()
	answer, err := io.ReadAll(c) // all of it: to close over unread bytes would reset the connection
	if err != nil || len(answer) == 0 {
		t.Fatalf("login: %d bytes, %v", len(answer), err)
	}
	return answer[0]
}

func (d *running) control(t *testing.T, action string, want int) {
	t.Helper()
	resp, err := http.Post(d.env["DEV_CONTROL"]+action, "", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != want {
		b, _ := io.ReadAll(resp.Body)
		t.Fatalf("%s: %s %s", action, resp.Status, b)
	}
}

const testTopic, testGroup = "t", "g"

func (d *running) client(t *testing.T, opts ...kgo.Opt) *kgo.Client {
	t.Helper()
	c, err := kgo.NewClient(append(opts, kgo.SeedBrokers(strings.Split(d.env["KAFKA_BROKERS"], ",")...), kgo.DefaultProduceTopic(testTopic))...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

// produce sends the numbers from..to-1, a batch each, so that the sequence of the idempotent producer moves.
func produce(t *testing.T, c *kgo.Client, from, to int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for i := from; i < to; i++ {
		if err := c.ProduceSync(ctx, kgo.StringRecord(strconv.Itoa(i))).FirstErr(); err != nil {
			t.Fatal(err)
		}
	}
}

// consume reads n numbers as a member of a group that continues where the last one has committed, commits them and
// returns the first and the last, or says where they do not follow each other.
func (d *running) consume(t *testing.T, n int) string {
	t.Helper()
	c := d.client(t, kgo.ConsumeTopics(testTopic), kgo.ConsumerGroup(testGroup), kgo.DisableAutoCommit(), kgo.SessionTimeout(2*minSession),
		kgo.HeartbeatInterval(minSession/2), kgo.ConsumeResetOffset(kgo.NewOffset().AtStart()))
	defer c.Close() // leaves the group
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	var first, last *kgo.Record
	for read := 0; read < n; {
		fetches := c.PollRecords(ctx, 1)
		if err := fetches.Err0(); err != nil && ctx.Err() != nil { // what else goes wrong, franz-go tries again
			t.Fatalf("after %d records: %v", read, err)
		}
		for _, r := range fetches.Records() {
			read++
			if last != nil && atoi(string(r.Value)) != atoi(string(last.Value))+1 {
				return fmt.Sprintf("%s after %s", r.Value, last.Value)
			}
			if last = r; first == nil {
				first = r
			}
		}
	}
	if err := c.CommitRecords(ctx, last); err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("%s…%s", first.Value, last.Value)
}

func createTopic(t *testing.T, c *kgo.Client) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	req := kmsg.NewPtrCreateTopicsRequest()
	topic := kmsg.NewCreateTopicsRequestTopic()
	topic.Topic, topic.NumPartitions, topic.ReplicationFactor = testTopic, 1, 2
	req.Topics = append(req.Topics, topic)
	resp, err := req.RequestWith(ctx, c)
	if err != nil {
		t.Fatal(err)
	}
	if code := resp.Topics[0].ErrorCode; code != 0 {
		t.Fatalf("create a topic: error code %d", code)
	}
}
