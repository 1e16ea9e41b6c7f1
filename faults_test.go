// What must not lose an event: a stop under load, a kill, ClickHouse away, Kafka away, answers lost, instances that come and go.

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/twmb/franz-go/pkg/kadm"
	"github.com/twmb/franz-go/pkg/kgo"

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

func TestClickHouseAwayUnderLoad(t *testing.T) {
	alone(t)
	env := faultSpace(t)
	p := startProgram(t, env)
	away := 10 * time.Second
	l, done := loadInto(t, p.url, 1000, away+3*time.Second)
	p.await("under load", 10*time.Second, func() bool { return l.OK.Load() > 1000 })
	control(t, "/clickhouse/stop")
	before := l.OK.Load()
	if status := p.status(metricsPath + "event_name=e&from=1&to=2"); status != http.StatusServiceUnavailable {
		t.Errorf("metrics without ClickHouse: status %d", status)
	}
	p.await("unready", 20*time.Second, func() bool { return p.status("/ready") == http.StatusServiceUnavailable })
	if p.status("/health") != http.StatusOK {
		t.Error("health has to stay")
	}
	time.Sleep(away) // the fault itself, not a wait for something
	control(t, "/clickhouse/start")
	if accepted := l.OK.Load() - before; accepted < 3000 {
		t.Errorf("only %d accepted while ClickHouse was away", accepted)
	}
	done()
	mustHold(p, l)
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

func TestKafkaAway(t *testing.T) {
	alone(t)
	env := faultSpace(t, "ACK_TIMEOUT=1s")
	p := startProgram(t, env)
	event := func() []byte {
		return fmt.Appendf(nil, `{"event_name":"k","user_id":"u%d","timestamp":%d}`, time.Now().UnixNano(), time.Now().Unix())
	}
	control(t, "/kafka/stop")
	status, header, answer := p.do("POST", onePath, jsonCT, "", event())
	if status != http.StatusServiceUnavailable || header.Get("Retry-After") == "" {
		t.Errorf("single: %d %v %s", status, header, answer)
	}
	status, header, answer = p.do("POST", bulkPath, ndjson, "", append(append(event(), "\n{}\n"...), event()...))
	if status != http.StatusServiceUnavailable || header.Get("Retry-After") == "" || strings.Count(answer, `"code":"unavailable"`) != 2 {
		t.Errorf("bulk: %d %v %s", status, header, answer)
	}
	p.await("unready", 20*time.Second, func() bool { return p.status("/ready") == http.StatusServiceUnavailable })
	if p.status("/health") != http.StatusOK {
		t.Error("health has to stay")
	}
	control(t, "/kafka/start")
	p.await("accepting again", 30*time.Second, func() bool {
		status, _, _ := p.do("POST", onePath, jsonCT, "", event())
		return status == http.StatusAccepted
	})
	l, done := loadInto(t, p.url, 2000, time.Second)
	done()
	mustHold(p, l)
}

// TestKilledUnderLoad: kill -9 of the program at random moments. The client resends what has no answer, the next instance
// reads again what was not committed: everything is counted once.
func TestKilledUnderLoad(t *testing.T) {
	t.Parallel()
	killUnderLoad(t, moreInTorture(12, 20), func() {})
}

// TestPowerCut: the program and ClickHouse die together.
func TestPowerCut(t *testing.T) {
	alone(t)
	killUnderLoad(t, moreInTorture(8, 10), func() { control(t, "/clickhouse/kill") })
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

// TestInstancesComeAndGo: partitions move under load, back and forth, and every event is stored once.
func TestInstancesComeAndGo(t *testing.T) {
	t.Parallel()
	comeAndGo(t, faultSpace(t))
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

// TestTornBesideOthers: an hour of the aggregate is wrong, as two faults at once leave it, when an instance dies; it is
// mended while another one goes on inserting into that hour.
func TestTornBesideOthers(t *testing.T) {
	t.Parallel()
	env := faultSpace(t)
	first, second := startProgram(t, env), startProgram(t, env)
	l, done := loadInto(t, first.url, 1500, time.Hour)
	hourly := space(env, "CLICKHOUSE_DATABASE") + ".events_hourly"
	for range 2 {
		target := l.OK.Load() + 1500
		first.await("under load", 20*time.Second, func() bool { return l.OK.Load() > target })
		mended := func() int {
			return strings.Count(first.log.String(), "mending") + strings.Count(second.log.String(), "mending")
		}
		before := mended() // which may be going on still, and mend this, too
		clickhouseQuery(t, "INSERT INTO "+hourly+" SELECT * FROM "+hourly+" WHERE event_name = '"+l.Config.Event+"' ORDER BY hour DESC LIMIT 3")
		second.cmd.Process.Kill()
		second.cmd.Wait()
		before -= strings.Count(second.log.String(), "mending")
		second = startProgram(t, env)
		first.await("mended", 2*time.Minute, func() bool { return mended() > before })
	}
	l.Stop()
	done()
	mustHold(first, l)
}

// TestFence: when the group is asked, the insert stands in system.processes and has no row; without a yes none gets there.
func TestFence(t *testing.T) {
	t.Parallel()
	cfg := settingsFrom(t, newSpace(t))
	st := preparedStore(t, cfg)
	stored := func() string { return clickhouseQuery(t, "SELECT count() FROM "+st.database+".events") }
	asked := 0
	in := newInserter(st, cfg, &newStats().store, nil, newRoundCall(), membership{isMember: func(context.Context) error {
		if n := clickhouseQuery(t, "SELECT count() FROM system.processes WHERE startsWith(query_id, '"+cfg.kafkaGroup+"-')"); n != "1" || stored() != "0" {
			t.Errorf("%s inserts in system.processes, %s rows", n, stored())
		}
		if asked++; asked < 3 {
			return errors.New("no answer")
		}
		return nil
	}})
	ev := mustParse(t, new(eventParser), sampleEvent)
	id, _ := ev.id(nil)
	b := newBlock(1)
	b.append(&id, ev, &kgo.Record{})
	in.round = []*block{b}
	if err := in.insertRows(t.Context()); err != nil || asked != 3 || stored() != "1" {
		t.Errorf("%v, asked %d times, %s rows", err, asked, stored())
	}
	in.conn.Close()
}

// TestSameBlockAgain: rows that were lost are inserted again, just as they were, and ClickHouse does not take them for known.
func TestSameBlockAgain(t *testing.T) {
	t.Parallel()
	cfg := settingsFrom(t, newSpace(t))
	st := preparedStore(t, cfg)
	in := newInserter(st, cfg, &newStats().store, nil, newRoundCall(), membership{isMember: func(context.Context) error { return nil }})
	ev := mustParse(t, new(eventParser), sampleEvent)
	id, _ := ev.id(nil)
	for range 2 {
		for _, table := range []string{"events", "events_hourly"} { // a dropped part would be forgotten, a mutation is not noticed
			clickhouseQuery(t, "ALTER TABLE "+st.database+"."+table+" DELETE WHERE true SETTINGS mutations_sync = 2")
		}
		b := newBlock(1)
		b.append(&id, ev, &kgo.Record{})
		in.round = []*block{b}
		if err := in.insertRows(t.Context()); err != nil {
			t.Fatal(err)
		}
		mustCount(t, []string{"CLICKHOUSE_DATABASE=" + st.database}, string(ev.name), 1)
	}
	in.conn.Close()
}

// TestPausedInstance: an instance sleeps beyond its session and wakes up with blocks that somebody else has stored meanwhile, or
// in the middle of an insert that somebody else waits for.
func TestPausedInstance(t *testing.T) {
	t.Parallel()
	env := faultSpace(t)
	first := startProgram(t, env)
	second := startProgram(t, env)
	l, done := loadInto(t, first.url, 1500, time.Hour)
	for range moreInTorture(4, 5) {
		target := l.OK.Load() + 1000
		first.await("under load", 20*time.Second, func() bool { return l.OK.Load() > target })
		second.cmd.Process.Signal(syscall.SIGSTOP)
		time.Sleep(2500 * time.Millisecond) // beyond KAFKA_SESSION_TIMEOUT: the fault itself
		second.cmd.Process.Signal(syscall.SIGCONT)
		second.await("back", 20*time.Second, func() bool { return second.status("/ready") == http.StatusOK })
	}
	l.Stop()
	done()
	mustHold(first, l)
}

// TestPausedWhilePlacedAnew: an instance that knows of one server sleeps while its events are spread over several.
func TestPausedWhilePlacedAnew(t *testing.T) {
	t.Parallel()
	env := newSpace(t)
	p := startProgram(t, env)
	drained(p)
	p.cmd.Process.Signal(syscall.SIGSTOP)
	cfg := settingsFrom(t, env)
	kafka, err := newKafka(cfg, "test")
	if err != nil {
		t.Fatal(err)
	}
	defer kafka.Close()
	p.await("missed", time.Minute, func() bool { return mustBeIdle(t.Context(), kadm.NewClient(kafka), cfg.kafkaGroup) == nil })
	table := cfg.clickhouseDatabase + ".events"
	clickhouseQuery(t, "ALTER TABLE "+table+" MODIFY COMMENT '"+fmt.Sprintf(placementForm, 1, 3, 20)+"'")
	p.cmd.Process.Signal(syscall.SIGCONT)
	p.await("accepting", time.Minute, func() bool {
		status, _, _ := p.do("POST", onePath, jsonCT, "", freshEvent("elsewhere"))
		return status == http.StatusAccepted
	})
	p.await("told so", time.Minute, func() bool {
		return strings.Contains(p.log.String(), errPlacement.Error()) || clickhouseQuery(t, "SELECT count() FROM "+table) != "0"
	})
	if n := clickhouseQuery(t, "SELECT count() FROM "+table); n != "0" {
		t.Error("an event is stored by the old placement")
	}
}

// TestKafkaAwayUnderLoad: the brokers stop and come back; the client resends what was not acknowledged.
func TestKafkaAwayUnderLoad(t *testing.T) {
	alone(t)
	env := faultSpace(t, "ACK_TIMEOUT=1s")
	p := startProgram(t, env)
	l, done := loadInto(t, p.url, 1500, time.Hour)
	for range 3 {
		target := l.OK.Load() + 1000
		p.await("under load", 40*time.Second, func() bool { return l.OK.Load() > target })
		control(t, "/kafka/stop")
		time.Sleep(1500 * time.Millisecond) // beyond ACK_TIMEOUT: the fault itself
		control(t, "/kafka/start")
	}
	target := l.OK.Load() + 1000
	p.await("under load again", 40*time.Second, func() bool { return l.OK.Load() > target })
	l.Stop()
	done()
	l.Forgive() // 503 to the end is an honest answer
	mustHold(p, l)
}

// TestAnswersCut: a proxy in front of ClickHouse lets requests through and cuts the connection before the answer.
func TestAnswersCut(t *testing.T) {
	t.Parallel()
	cut := newProxy(t, clickhouseAddress(t), nil)
	env := faultSpace(t, "CLICKHOUSE_PORT="+cut.port())
	p := startProgram(t, env)
	l, done := loadInto(t, p.url, 2000, time.Hour)
	for range moreInTorture(20, 30) {
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
	for range moreInTorture(20, 30) {
		target := l.OK.Load() + 300
		p.await("under load", 20*time.Second, func() bool { return l.OK.Load() > target })
		control(t, "/kafka/cut")
	}
	l.Stop()
	done()
	mustHold(p, l)
}
