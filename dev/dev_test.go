// The stack as its users run it: the real binary around real commands.

package main

import (
	"context"
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

// asDev makes the test binary behave as dev.
const asDev = "DEV_TEST_AS_DEV"

func TestMain(m *testing.M) {
	if os.Getenv(asDev) != "" || len(os.Args) > 1 && os.Args[1] == clickhouseCommand {
		main()
		return
	}
	os.Exit(m.Run())
}

func dev(args ...string) *exec.Cmd {
	cmd := exec.Command(os.Args[0], args...)
	cmd.Env = append(os.Environ(), asDev+"=1")
	return cmd
}

// onPorts returns flags for a data directory with ports that are free.
func onPorts(t *testing.T, dir string) []string {
	t.Helper()
	ports, err := freePorts(4)
	if err != nil {
		t.Fatal(err)
	}
	return []string{"-data", dir, "-kafka-ports", fmt.Sprintf("%d,%d", ports[0], ports[1]), "-clickhouse-port", strconv.Itoa(ports[2]), "-clickhouse-http-port", strconv.Itoa(ports[3])}
}

func TestExitCodeIsPassedOn(t *testing.T) {
	out, err := dev("-ephemeral", "--", "sh", "-c", "exit 7").CombinedOutput()
	if code := err.(*exec.ExitError).ExitCode(); code != 7 {
		t.Fatalf("exit code %d\n%s", code, out)
	}
	out, err = dev("-ephemeral", "--", "no-such-command").CombinedOutput()
	if code := err.(*exec.ExitError).ExitCode(); code != 127 || !strings.Contains(string(out), "no-such-command") {
		t.Fatalf("exit code %d\n%s", code, out)
	}
}

// TestDataSurvives writes to both stores, kills dev with -9, and finds everything at the next start.
func TestDataSurvives(t *testing.T) {
	dir := t.TempDir()
	flags := onPorts(t, dir)
	marker := filepath.Join(dir, "ready")
	first := dev(append(flags, "--", "sh", "-c", "env > "+marker+".part && mv "+marker+".part "+marker+" && exec sleep 60")...)
	if err := first.Start(); err != nil {
		t.Fatal(err)
	}
	env := awaitEnv(t, marker)
	ask(t, env, "CREATE TABLE t (x UInt8) ENGINE = MergeTree ORDER BY x")
	ask(t, env, "INSERT INTO t VALUES (42)")
	produce(t, env, "kept")
	post(t, env, "/clickhouse/kill") // the supervisor brings it back
	post(t, env, "/clickhouse/start")
	if got := ask(t, env, "SELECT x FROM t"); got != "42" {
		t.Fatalf("after a kill of ClickHouse: %q", got)
	}
	post(t, env, "/kafka/stop")
	post(t, env, "/kafka/start")
	first.Process.Kill()
	first.Wait()

	os.Remove(marker)
	second := dev(append(flags, "--", "sh", "-c", "env > "+marker+".part && mv "+marker+".part "+marker+" && exec sleep 60")...)
	awaitPortsFree(t, flags)
	if err := second.Start(); err != nil {
		t.Fatal(err)
	}
	env = awaitEnv(t, marker)
	if got := ask(t, env, "SELECT x FROM t"); got != "42" {
		t.Errorf("ClickHouse after kill -9 of dev: %q", got)
	}
	if got := consume(t, env); got != "kept" {
		t.Errorf("Kafka after kill -9 of dev: %q", got)
	}
	// A second dev on the same data is told so; `dev stop` ends the first, cleanly.
	out, err := dev(append(onPorts(t, dir), "--", "true")...).CombinedOutput()
	if err == nil || !strings.Contains(string(out), fmt.Sprint("pid ", second.Process.Pid)) {
		t.Errorf("two devs on one directory: %v %s", err, out)
	}
	if out, err := dev("-data", dir, "stop").CombinedOutput(); err != nil || !strings.Contains(string(out), "stopped") {
		t.Errorf("stop: %v %s", err, out)
	}
	second.Wait()
	if out, err := dev("-data", dir, "stop").CombinedOutput(); err != nil || !strings.Contains(string(out), "nothing is running") {
		t.Errorf("stop again: %v %s", err, out)
	}
}

func TestSignalReachesCommand(t *testing.T) {
	marker := filepath.Join(t.TempDir(), "m")
	cmd := dev("-ephemeral", "--", "sh", "-c", "trap 'exit 5' TERM; env > "+marker+".part; mv "+marker+".part "+marker+"; while :; do sleep 0.05; done")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	env := awaitEnv(t, marker)
	cmd.Process.Signal(syscall.SIGINT)
	if err := cmd.Wait(); err == nil || err.(*exec.ExitError).ExitCode() != 5 {
		t.Fatalf("ended with %v, want the command's own 5", err)
	}
	if err := portsFree([]int{atoi(env["CLICKHOUSE_PORT"])}); err != nil {
		t.Errorf("left behind: %v", err)
	}
}

func TestTakenPortIsNamed(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	port := l.Addr().(*net.TCPAddr).Port
	flags := append(onPorts(t, t.TempDir()), "-clickhouse-port", strconv.Itoa(port))
	out, err := dev(append(flags, "--", "true")...).CombinedOutput()
	if err == nil || !strings.Contains(string(out), fmt.Sprintf("port %d is taken by pid %d", port, os.Getpid())) {
		t.Fatalf("%v %s", err, out)
	}
}

func awaitEnv(t *testing.T, marker string) map[string]string {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		if b, err := os.ReadFile(marker); err == nil {
			env := map[string]string{}
			for _, line := range strings.Split(string(b), "\n") {
				k, v, _ := strings.Cut(line, "=")
				env[k] = v
			}
			return env
		}
	}
	t.Fatal("dev did not start its command")
	return nil
}

func awaitPortsFree(t *testing.T, flags []string) {
	t.Helper()
	ports := []int{atoi(flags[5]), atoi(flags[7])}
	for deadline := time.Now().Add(10 * time.Second); portsFree(ports) != nil; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("ClickHouse outlived a killed dev: %v", portsFree(ports))
		}
	}
}

func atoi(s string) int { n, _ := strconv.Atoi(s); return n }

func ask(t *testing.T, env map[string]string, sql string) string {
	t.Helper()
	resp, err := http.Post("http://127.0.0.1:"+env["CLICKHOUSE_HTTP_PORT"], "", strings.NewReader(sql))
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

func post(t *testing.T, env map[string]string, action string) {
	t.Helper()
	resp, err := http.Post(env["DEV_CONTROL"]+action, "", nil)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		t.Fatalf("%s: %s", action, resp.Status)
	}
}

func produce(t *testing.T, env map[string]string, value string) {
	t.Helper()
	c, err := kgo.NewClient(kgo.SeedBrokers(strings.Split(env["KAFKA_BROKERS"], ",")...))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	req := kgo.StringRecord(value)
	req.Topic = "t"
	createTopic(t, ctx, c)
	if err := c.ProduceSync(ctx, req).FirstErr(); err != nil {
		t.Fatal(err)
	}
}

func consume(t *testing.T, env map[string]string) string {
	t.Helper()
	c, err := kgo.NewClient(kgo.SeedBrokers(strings.Split(env["KAFKA_BROKERS"], ",")...), kgo.ConsumeTopics("t"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	records := c.PollFetches(ctx).Records()
	if len(records) != 1 {
		t.Fatalf("%d records", len(records))
	}
	return string(records[0].Value)
}

func createTopic(t *testing.T, ctx context.Context, c *kgo.Client) {
	t.Helper()
	req := kmsg.NewPtrCreateTopicsRequest()
	topic := kmsg.NewCreateTopicsRequestTopic()
	topic.Topic, topic.NumPartitions, topic.ReplicationFactor = "t", 1, 2
	req.Topics = append(req.Topics, topic)
	if _, err := req.RequestWith(ctx, c); err != nil {
		t.Fatal(err)
	}
}
