// Crashes: the program is stopped or killed, ClickHouse or the machine with it, answers are lost. No event is
// lost, and none is counted twice.

package test

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/event-ingestion/event-ingestion/internal/testkit"

	"github.com/event-ingestion/event-ingestion/load"
)

func TestStopUnderLoad(t *testing.T) {
	t.Parallel()
	env := faultSpace(t)
	for round := range 3 {
		p := startProgram(t, env)
		l, done := loadInto(t, p.url, 3000, 1500*time.Millisecond, "-retries", "0")
		p.await("under load", 10*time.Second, func() bool { return l.OK.Load() > 500 })
		p.terminate()
		done()
		next := startProgram(t, env)
		l.Forgive() // what the stopped program could not take is not its loss
		mustHold(next, l)
		next.terminate()
		t.Logf("round %d: %d accepted", round, l.OK.Load())
	}
}

// TestClickHouseKilledUnderLoad: an insert whose answer is lost is looked up, completed, and counted once.
func TestClickHouseKilledUnderLoad(t *testing.T) {
	alone(t)
	env := faultSpace(t)
	p := startProgram(t, env)
	l, done := loadInto(t, p.url, 2000, time.Hour)
	for range 4 {
		target := l.OK.Load() + 1500
		p.await("under load", 20*time.Second, func() bool { return l.OK.Load() > target })
		control(t, "/clickhouse/kill")
	}
	l.Stop()
	done()
	control(t, "/clickhouse/start")
	mustHold(p, l)
}

// TestKilledUnderLoad: kill -9 of the program at random moments. The client resends what has no answer, the next instance
// reads again what was not committed: everything is counted once.
func TestKilledUnderLoad(t *testing.T) {
	t.Parallel()
	killUnderLoad(t, testkit.MoreInTorture(12, 20), func() {})
}

// TestKilledTogether: the program and ClickHouse die together. What they wrote is left, see power_test.go for when it is not.
func TestKilledTogether(t *testing.T) {
	alone(t)
	killUnderLoad(t, testkit.MoreInTorture(8, 10), func() { control(t, "/clickhouse/kill") })
}

// killUnderLoad kills the program, and first whatever also does, so many times.
func killUnderLoad(t *testing.T, times int, also func()) {
	env := faultSpace(t)
	p := startProgram(t, env)
	l, done := loadInto(t, p.url, 1500, time.Hour)
	for range times {
		target := l.OK.Load() + 1 + rand.Int64N(1500)
		p.await("under load", 20*time.Second, func() bool { return l.OK.Load() >= target })
		time.Sleep(rand.N(60 * time.Millisecond)) // any moment of a round
		also()
		p = p.killAndRestart()
	}
	l.Stop()
	done()
	mustHold(p, l)
}

// TestResent: three clients send the same file at once, and one of them again after a restart.
func TestResent(t *testing.T) {
	t.Parallel()
	env := faultSpace(t)
	p := startProgram(t, env)
	path := filepath.Join(t.TempDir(), "events.ndjson")
	var lines []byte
	now := time.Now().Unix()
	const events = 6000
	for i := range events { // over 20 days, with a third of the lines twice in the file itself
		n := i - i%3/2
		lines = fmt.Appendf(lines, `{"event_name":"resent","user_id":"u%d","timestamp":%d}`+"\n", n%700, now-int64(n)*288)
	}
	if err := os.WriteFile(path, lines, 0o600); err != nil {
		t.Fatal(err)
	}
	send := func() *load.Loader {
		cfg, err := load.Parse([]string{"-url", p.url, "-file", path, "-rate", "0", "-bulk", "500", "-connections", "4"}, io.Discard)
		if err != nil {
			t.Fatal(err)
		}
		l, err := load.New(cfg)
		if err != nil {
			t.Fatal(err)
		}
		l.Send(context.Background(), io.Discard)
		return l
	}
	var clients sync.WaitGroup
	for range 3 {
		clients.Go(func() { send() })
	}
	clients.Wait()
	p.terminate()
	p = startProgram(t, env)
	l := send()
	if l.OK.Load() != events {
		t.Fatalf("%d accepted", l.OK.Load())
	}
	drained(p)
	mustAgree(t, l, p.url)
	want := fmt.Sprint(events * 2 / 3)
	if got := clickhouseQuery(t, fmt.Sprintf("SELECT sum(event_count) FROM %s.events_hourly", space(env, "CLICKHOUSE_DATABASE"))); got != want {
		t.Fatalf("events_hourly has %s, want %s", got, want)
	}
}

// TestAnswersCut: a proxy in front of ClickHouse lets requests through and cuts the connection before the answer.
func TestAnswersCut(t *testing.T) {
	t.Parallel()
	cut := newProxy(t, clickhouseAddress(t), nil)
	env := faultSpace(t, "CLICKHOUSE_PORT="+cut.port())
	p := startProgram(t, env)
	l, done := loadInto(t, p.url, 2000, time.Hour)
	for range testkit.MoreInTorture(20, 30) {
		target := l.OK.Load() + 300
		p.await("under load", 20*time.Second, func() bool { return l.OK.Load() > target })
		cut.cutAnswers()
	}
	l.Stop()
	done()
	mustHold(p, l)
}

// TestKafkaAnswersCut: the brokers carry requests out and their answers are lost: what was produced is produced again
// under its sequence number, what was committed is committed again.
func TestKafkaAnswersCut(t *testing.T) {
	alone(t)
	if isCluster() {
		t.Skip("the brokers of a cluster are killed instead, see cluster_test.go")
	}
	env := faultSpace(t)
	p := startProgram(t, env)
	l, done := loadInto(t, p.url, 2000, time.Hour)
	for range testkit.MoreInTorture(20, 30) {
		target := l.OK.Load() + 300
		p.await("under load", 20*time.Second, func() bool { return l.OK.Load() > target })
		control(t, "/kafka/cut")
	}
	l.Stop()
	done()
	mustHold(p, l)
}
