// Counted once where it is hard: little memory, many hours, other producers, events as large as they may be, rows that
// ClickHouse refuses all the time.

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/twmb/franz-go/pkg/kgo"

	"github.com/event-ingestion/event-ingestion/troubles"
)

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

// TestLittleMemory: events over many hours, each sent three times in another order, with memory for a small part of
// their ids or for none, with other numbers of workers and partitions, and a kill between.
func TestLittleMemory(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		events, hours int
		settings      []string
	}{
		{moreInTorture(10_000, 20_000), 24, []string{"DEDUPE_MEMORY=120000"}},
		{5_000, 24, []string{"DEDUPE_MEMORY=0", "WORKER_COUNT=1", "KAFKA_PARTITIONS=3"}},
		{moreInTorture(5_000, 20_000), 29 * 24, []string{"DEDUPE_MEMORY=60000", "WORKER_COUNT=7", "KAFKA_PARTITIONS=13"}},
		{5_000, 29 * 24, []string{"CONSUME_MEMORY=2000000"}},
	} {
		t.Run(strings.Join(c.settings, ","), func(t *testing.T) {
			env := faultSpace(t, c.settings...)
			p := startProgram(t, env)
			now := time.Now().Unix()
			for range 3 {
				var bodies [][]byte
				order := rand.Perm(c.events)
				for len(order) > 0 {
					var body []byte
					n := min(len(order), 1000)
					for _, i := range order[:n] {
						body = fmt.Appendf(body, `{"event_name":"little","user_id":"u%d","timestamp":%d}`+"\n", i, now-int64(i)*int64(c.hours)*hourSeconds/int64(c.events))
					}
					bodies, order = append(bodies, body), order[n:]
				}
				postAll(t, p, bodies)
				p = p.killAndRestart()
			}
			drained(p)
			mustCount(t, env, "little", int64(c.events))
		})
	}
}

// TestOtherPartitioner: a producer that places keys by CRC32, as librdkafka's clients do, sends what the API has, too.
func TestOtherPartitioner(t *testing.T) {
	t.Parallel()
	env := faultSpace(t)
	p := startProgram(t, env)
	kafka, err := kgo.NewClient(kgo.SeedBrokers(kafkaBrokers(t)...), kgo.RecordPartitioner(kgo.BasicConsistentPartitioner(func(string) func(*kgo.Record, int) int {
		return func(r *kgo.Record, n int) int { return int(crc32.ChecksumIEEE(r.Key) % uint32(n)) }
	})))
	if err != nil {
		t.Fatal(err)
	}
	defer kafka.Close()
	const events = 5000
	var bodies [][]byte
	var records []*kgo.Record
	var parser eventParser
	at := time.Now().Unix()
	for i := range events {
		line := fmt.Appendf(nil, `{"event_name":"other","user_id":"u%d","timestamp":%d}`, i, at-int64(i))
		ev := mustParse(t, &parser, string(line))
		id, _ := ev.id(nil)
		records = append(records, &kgo.Record{Topic: space(env, "KAFKA_TOPIC"), Key: fmt.Appendf(nil, "%x", id), Value: line})
		if i%1000 == 0 {
			bodies = append(bodies, nil)
		}
		bodies[i/1000] = append(append(bodies[i/1000], line...), '\n')
	}
	var producing sync.WaitGroup
	producing.Go(func() {
		if err := kafka.ProduceSync(t.Context(), records...).FirstErr(); err != nil {
			t.Error(err)
		}
	})
	postAll(t, p, bodies)
	producing.Wait()
	drained(p)
	mustCount(t, env, "other", events)
}

// TestTopicGrows: partitions are added under load, so that most keys get another one, and what was sent before is sent
// again.
func TestTopicGrows(t *testing.T) {
	t.Parallel()
	env := faultSpace(t, "KAFKA_PARTITIONS=5")
	p := startProgram(t, env)
	const events = 8000
	at := time.Now().Unix()
	bodies := numbered("grows", events, 200, func(i int) int64 { return at - int64(i%300) })
	postAll(t, p, bodies[:len(bodies)/2])
	growTopic(t, env, 12)
	postAll(t, p, bodies)
	p.await("all partitions assigned", 30*time.Second, func() bool { return strings.Contains(p.log.String(), "all=12") })
	postAll(t, p, bodies)
	drained(p)
	mustCount(t, env, "grows", events)
	if !strings.Contains(p.log.String(), errGrown.Error()) {
		t.Error("the consumer did not start over")
	}
}

// TestTopicGrowsUnheard: the topic grows while an instance cannot store what it has, and has no room to read on. Meanwhile another
// one stores an event of its. When ClickHouse answers again, the instance looks before it stores.
func TestTopicGrowsUnheard(t *testing.T) {
	t.Parallel()
	admin := freePort(t)
	env := faultSpace(t, "KAFKA_PARTITIONS=1", "WORKER_COUNT=1", "CONSUME_MEMORY=1048576", "ADMIN_ADDR=127.0.0.1:"+admin)
	between := newProxy(t, clickhouseAddress(t), nil)
	p := startProgram(t, append(slices.Clone(env), "CLICKHOUSE_PORT="+between.port()))
	at := time.Now().Unix()
	send := func(lines string) {
		t.Helper()
		if status, _, answer := p.do("POST", bulkPath, ndjson, "", []byte(lines)); status != http.StatusAccepted {
			t.Fatal(status, answer)
		}
	}
	line := func(name string, user int, more string) string {
		return fmt.Sprintf(`{"event_name":%q,"user_id":"u%d","timestamp":%d%s}`+"\n", name, user, at, more)
	}
	var warm, large strings.Builder
	for i := range 2 * loadRows {
		warm.WriteString(line("warm", i, ""))
	}
	send(warm.String()) // the hour is in memory from now on
	drained(p)
	between.shut.Store(true)
	between.cutAnswers()
	var grown string
	var id eventID
	for user, part := 0, 0; part != 1; user++ { // one that is on the second partition of two
		grown = line("grown", user, "")
		id, _ = mustParse(t, new(eventParser), grown).id(nil)
		part = kgo.StickyKeyPartitioner(nil).ForTopic("").Partition(&kgo.Record{Key: fmt.Appendf(nil, "%x", id)}, 2)
	}
	send(grown)
	p.await("refused", 20*time.Second, func() bool { return strings.Contains(p.log.String(), "what=insert ") })
	const many = 24 // a block and the queue, of an eighth of the memory each, are full of the first 20
	for i := range many {
		large.WriteString(line("large", i, fmt.Sprintf(`,"metadata":{"x":%q}`, strings.Repeat("x", 15_000))))
	}
	send(large.String())
	p.await("full", 20*time.Second, func() bool { return metric(t, admin, "event_ingestion_records_consumed_total") >= 2*loadRows+1+20 })
	growTopic(t, env, 2)
	p.await("seen to grow", 20*time.Second, func() bool { return strings.Contains(p.log.String(), "more partitions than before") })
	clickhouseQuery(t, fmt.Sprintf("INSERT INTO %s.events (event_id, event_name, user_id, timestamp) VALUES (unhex('%x'), 'grown', 'u', %d)", space(env, "CLICKHOUSE_DATABASE"), id, at))
	between.shut.Store(false)
	drained(p)
	mustCount(t, env, "grown", 1)
	mustCount(t, env, "large", many)
}

// TestGrowthBeforeTheNextLook: a topic grows, and this instance has not noticed. Another one may have, and store events of ours from
// their new partitions: the question before an insert finds out.
func TestGrowthBeforeTheNextLook(t *testing.T) {
	t.Parallel()
	env := newSpace(t, "KAFKA_PARTITIONS=1", "WORKER_COUNT=1") // whose memory is not that of other tests
	cfg := settingsFrom(t, env)
	unnoticed := func() int { return 1 }
	c, err := newConsumer(cfg, []*store{preparedStore(t, cfg)}, 1, unnoticed, newTestSideProducer(t, cfg), &newStats().store, func(error) {})
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithTimeout(t.Context(), time.Minute)
	defer stop()
	ended := make(chan struct{})
	go func() { // ends with stop
		defer close(ended)
		c.run(ctx, func() (context.Context, context.CancelFunc) {
			return context.WithTimeout(context.Background(), time.Second)
		})
	}()
	defer func() { stop(); <-ended }()
	for c.lanes[0].has.Load() == 0 && troubles.Sleep(ctx, 10*time.Millisecond) == nil {
	}
	if err := c.isMember(ctx); err != nil {
		t.Fatal(err)
	}
	growTopic(t, env, 2)
	for deadline := time.Now().Add(10 * time.Second); c.isMember(ctx) != errGrown; troubles.Sleep(ctx, 10*time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("it may insert by the old partitions")
		}
	}
}

// metric is what an instance's admin listener says of one.
func metric(t testing.TB, adminPort, name string) (value float64) {
	t.Helper()
	resp, err := http.Get("http://127.0.0.1:" + adminPort + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	page, _ := io.ReadAll(resp.Body)
	_, rest, _ := strings.Cut(string(page), "\n"+name+" ")
	fmt.Sscan(rest, &value)
	return value
}

// TestTransactions: another program writes in transactions. What it takes back is no event, and nobody waits for the records
// that only say how a transaction ended.
func TestTransactions(t *testing.T) {
	t.Parallel()
	env := faultSpace(t, "KAFKA_PARTITIONS=1")
	p := startProgram(t, env)
	topic := space(env, "KAFKA_TOPIC")
	kafka, err := kgo.NewClient(kgo.SeedBrokers(kafkaBrokers(t)...), kgo.TransactionalID(topic))
	if err != nil {
		t.Fatal(err)
	}
	defer kafka.Close()
	for i, end := range []kgo.TransactionEndTry{kgo.TryCommit, kgo.TryAbort, kgo.TryCommit, kgo.TryAbort} {
		to := topic + []string{"", ".retry"}[i/2]
		value := freshEvent(map[kgo.TransactionEndTry]string{kgo.TryCommit: "committed", kgo.TryAbort: "aborted"}[end])
		id, _ := mustParse(t, new(eventParser), string(value)).id(nil)
		if err := kafka.BeginTransaction(); err != nil {
			t.Fatal(err)
		}
		if err := kafka.ProduceSync(t.Context(), &kgo.Record{Topic: to, Key: fmt.Appendf(nil, "%x", id), Value: value}).FirstErr(); err != nil {
			t.Fatal(err)
		}
		if err := kafka.EndTransaction(t.Context(), end); err != nil {
			t.Fatal(err)
		}
		drained(p)
	}
	mustCount(t, env, "committed", 2)
	mustCount(t, env, "aborted", 0)
	if n := totalOf(readTopicEnds(t, env, ".dlq")); n != 0 {
		t.Errorf("%d dead letters", n)
	}
	var l struct{ Records, Stored, Difference int }
	out, code := subcommand(t, env, "audit -json")
	if json.Unmarshal([]byte(out), &l); code != 0 || l.Records != 2 || l.Stored != 2 || l.Difference != 0 {
		t.Errorf("audit: %d %s", code, out)
	}
	behind := freshEvent("behind")
	p.await("told that an event behind them is stored", 30*time.Second, func() bool {
		status, _, _ := p.do("POST", onePath+"?wait=stored", jsonCT, "", behind)
		return status == http.StatusOK
	})
	mustCount(t, env, "behind", 1)
}

// TestLargeEvents: events as large as they may be are accepted while ClickHouse is away, more than memory holds, and pass
// through when it is back. The program runs without the race detector, whose memory would be counted.
func TestLargeEvents(t *testing.T) {
	alone(t)
	env := faultSpace(t)
	p := startBinary(t, builtBinary(t), env)
	control(t, "/clickhouse/stop")
	t.Cleanup(func() { control(t, "/clickhouse/start") })
	events := moreInTorture(10_000, 20_000)
	at := time.Now().Unix()
	rnd := rand.New(rand.NewPCG(7, 8))
	filler := make([]byte, 64<<10)
	for i := range filler {
		filler[i] = "abcdefghijklmnopqrstuvwxyz0123456789"[rnd.IntN(36)]
	}
	for from := 0; from < events; {
		var bodies [][]byte
		for range 8 { // not all of them at once: the test's own memory
			var body []byte
			for range 400 {
				start := rnd.IntN(len(filler) - 15_000)
				body = fmt.Appendf(body, `{"event_name":"large","user_id":"u%d","timestamp":%d,"metadata":{"x":"%s"}}`+"\n", from, at-int64(from%5000), filler[start:start+15_000])
				if from++; from == events {
					break
				}
			}
			bodies = append(bodies, body)
			if from == events {
				break
			}
		}
		postAll(t, p, bodies)
	}
	control(t, "/clickhouse/start")
	drained(p)
	mustCount(t, env, "large", int64(events))
	peak := peakMemory(t, p)
	t.Logf("%d events of 15 KB, at most %d MiB resident", events, peak>>20)
	if peak > 512<<20 {
		t.Errorf("%d MiB resident", peak>>20)
	}
}

// TestCompressedEvents: what waits is compressed a hundredfold, so that little of it on Kafka is a lot of memory.
func TestCompressedEvents(t *testing.T) {
	t.Parallel()
	env := newSpace(t, "KAFKA_COMPRESSION=zstd")
	preparedStore(t, settingsFrom(t, env))
	binary, events, filler := builtBinary(t), 0, strings.Repeat("z", 15_000)
	api := startBinary(t, binary, append(slices.Clone(env), "ROLE=api"))
	for range 12 {
		bodies := make([][]byte, 8) // not all of them at once: the test's own memory
		for i := range bodies {
			for range 500 {
				bodies[i] = fmt.Appendf(bodies[i], `{"event_name":"dense","user_id":"u%d","timestamp":%d,"metadata":{"x":"%s"}}`+"\n", events, time.Now().Unix()-100, filler)
				events++
			}
		}
		postAll(t, api, bodies)
	}
	api.terminate()
	p := startBinary(t, binary, env)
	drained(p)
	if peak := peakMemory(t, p); peak > 512<<20 {
		t.Errorf("%d MiB resident", peak>>20)
	}
	mustCount(t, env, "dense", int64(events))
}

// builtBinary is the program as make build makes it, whose memory is not that of the race detector.
func builtBinary(t *testing.T) string {
	t.Helper()
	binary := filepath.Join(t.TempDir(), "event-ingestion")
	build := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", binary, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return binary
}

// peakMemory is the most that the program has had resident, in bytes.
func peakMemory(t *testing.T, p *program) int64 {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	if err != nil {
		t.Skip("needs /proc")
	}
	for line := range strings.Lines(string(status)) {
		if rest, ok := strings.CutPrefix(line, "VmHWM:"); ok {
			kib, _ := strconv.ParseInt(strings.Fields(rest)[0], 10, 64)
			return kib << 10
		}
	}
	t.Fatal("no VmHWM")
	return 0
}

// TestManyRejected: a constraint refuses a tenth of the rows, all the time. The others arrive, and all of the tenth become
// dead letters.
func TestManyRejected(t *testing.T) {
	t.Parallel()
	env := faultSpace(t, "MAX_RETRY_ATTEMPTS=1")
	p := startProgram(t, env)
	clickhouseQuery(t, "ALTER TABLE "+space(env, "CLICKHOUSE_DATABASE")+".events ADD CONSTRAINT tenth CHECK user_id NOT LIKE '%0'")
	at := time.Now().Unix()
	const events = 20_000
	postAll(t, p, numbered("tenth", events, 500, func(i int) int64 { return at - int64(i%3000) }))
	p.await("stored but for the rejected", time.Minute, func() bool {
		return clickhouseQuery(t, "SELECT count() FROM "+space(env, "CLICKHOUSE_DATABASE")+".events") == fmt.Sprint(events*9/10)
	})
	drained(p)
	mustCount(t, env, "tenth", events*9/10)
	dead := map[string]bool{}
	for _, rec := range readTopic(t, space(env, "KAFKA_TOPIC")+".dlq", events/10) {
		dead[string(rec.Key)] = true
	}
	if len(dead) != events/10 {
		t.Errorf("%d dead letters, want %d", len(dead), events/10)
	}
}
