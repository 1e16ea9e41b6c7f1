// Counted once where it is hard: little memory, many hours, other producers, topics that grow, events as large as they may be.

package test

import (
	"encoding/json"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/event-ingestion/event-ingestion/internal/testkit"

	"github.com/twmb/franz-go/pkg/kgo"
)

// TestLittleMemory: events over many hours, each sent three times in another order, with memory for a small part of
// their ids or for none, with other numbers of workers and partitions, and a kill between.
func TestLittleMemory(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		events, hours int
		settings      []string
	}{
		{testkit.MoreInTorture(10_000, 20_000), 24, []string{"DEDUPE_MEMORY=120000"}},
		{5_000, 24, []string{"DEDUPE_MEMORY=0", "WORKER_COUNT=1", "KAFKA_PARTITIONS=3"}},
		{testkit.MoreInTorture(5_000, 20_000), 29 * 24, []string{"DEDUPE_MEMORY=60000", "WORKER_COUNT=7", "KAFKA_PARTITIONS=13"}},
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

// TestManyHoursAgain: what a killed instance had stored of many hours, and not committed, is compared hour by hour. A ClickHouse that
// takes its time over every answer does not make that last for minutes.
func TestManyHoursAgain(t *testing.T) {
	t.Parallel()
	const events, hours = 5000, 29 * 24
	env := faultSpace(t)
	between := newProxy(t, clickhouseAddress(t), nil)
	p := startProgram(t, append(slices.Clone(env), "CLICKHOUSE_PORT="+between.port()))
	now := time.Now().Unix()
	bodies := numbered("hours", events, 1000, func(i int) int64 { return now - int64(i)*hours*hourSeconds/events })
	postAll(t, p, bodies)
	p = p.killAndRestart()
	postAll(t, p, bodies)
	between.late.Store(int64(100 * time.Millisecond))
	drained(p)
	mustCount(t, env, "hours", events)
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
	at := time.Now().Unix()
	for i := range events {
		user, at := fmt.Sprint("u", i), at-int64(i)
		line := fmt.Appendf(nil, `{"event_name":"other","user_id":%q,"timestamp":%d}`, user, at)
		records = append(records, &kgo.Record{Topic: space(env, "KAFKA_TOPIC"), Key: []byte(eventID("other", user, at, "")), Value: line})
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
	if !strings.Contains(p.log.String(), "another number of partitions than before") {
		t.Error("the consumer did not start over")
	}
}

// loadRows is as many events of a minute that make the program load all ids of an hour.
const loadRows = 64

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
	var id string
	for user, part := 0, 0; part != 1; user++ { // one that is on the second partition of two
		grown = line("grown", user, "")
		id = eventID("grown", fmt.Sprint("u", user), at, "")
		part = kgo.StickyKeyPartitioner(nil).ForTopic("").Partition(&kgo.Record{Key: []byte(id)}, 2)
	}
	send(grown)
	p.await("refused", 20*time.Second, func() bool {
		log := p.log.String() // whichever of a round's queries is the first
		return strings.Contains(log, "what=insert ") || strings.Contains(log, `what="look for duplicates"`)
	})
	const many = 24 // a block and the queue, of an eighth of the memory each, are full of the first 20
	for i := range many {
		large.WriteString(line("large", i, fmt.Sprintf(`,"metadata":{"x":%q}`, strings.Repeat("x", 15_000))))
	}
	send(large.String())
	p.await("full", 20*time.Second, func() bool { return metric(t, admin, "event_ingestion_records_consumed_total") >= 2*loadRows+1+20 })
	growTopic(t, env, 2)
	p.await("seen to grow", 20*time.Second, func() bool { return strings.Contains(p.log.String(), "more partitions than before") })
	clickhouseQuery(t, fmt.Sprintf("INSERT INTO %s.events (event_id, event_name, user_id, timestamp) VALUES (unhex('%s'), 'grown', 'u', %d)", space(env, "CLICKHOUSE_DATABASE"), id, at))
	between.shut.Store(false)
	drained(p)
	mustCount(t, env, "grown", 1)
	mustCount(t, env, "large", many)
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
		name, user, at := map[kgo.TransactionEndTry]string{kgo.TryCommit: "committed", kgo.TryAbort: "aborted"}[end], fmt.Sprint("u", i), time.Now().Unix()
		value := fmt.Appendf(nil, `{"event_name":%q,"user_id":%q,"timestamp":%d}`, name, user, at)
		if err := kafka.BeginTransaction(); err != nil {
			t.Fatal(err)
		}
		if err := kafka.ProduceSync(t.Context(), &kgo.Record{Topic: to, Key: []byte(eventID(name, user, at, "")), Value: value}).FirstErr(); err != nil {
			t.Fatal(err)
		}
		if err := kafka.EndTransaction(t.Context(), end); err != nil {
			t.Fatal(err)
		}
		drained(p)
	}
	mustCount(t, env, "committed", 2)
	mustCount(t, env, "aborted", 0)
	if n := testkit.TotalOf(readTopicEnds(t, env, ".dlq")); n != 0 {
		t.Errorf("%d dead letters", n)
	}
	var l struct{ Records, Stored, Difference int }
	out, code := subcommand(t, env, "audit -json")
	if json.Unmarshal([]byte(out), &l); code != 0 || l.Records != 2 || l.Stored != 2 || l.Difference != 0 {
		t.Errorf("audit: %d %s", code, out)
	}
	behind := testkit.FreshEvent("behind")
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
	p := startBinary(t, lean(t), env)
	control(t, "/clickhouse/stop")
	t.Cleanup(func() { control(t, "/clickhouse/start") })
	events := testkit.MoreInTorture(10_000, 20_000)
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
	binary, events, filler := lean(t), 0, strings.Repeat("z", 15_000)
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

// TestProfileThatChangesQueries: events that nobody remembers are looked up and counted once, and inserts wait while tables are
// exchanged.
func TestProfileThatChangesQueries(t *testing.T) {
	t.Parallel()
	env := append(faultSpace(t), "CLICKHOUSE_USERNAME=odd", "DEDUPE_MEMORY=0")
	p := startProgram(t, env)
	const events = 3000
	now := time.Now().Unix()
	bodies := numbered("odd", events, 500, func(i int) int64 { return now - int64(i)*9 })
	for range 2 {
		postAll(t, p, bodies)
		drained(p)
	}
	mustCount(t, env, "odd", events)
	question := fmt.Sprintf("%sevent_name=odd&from=%d&to=%d&group_by=day", metricsPath, now-events*9, now)
	if status, _, answer := p.do("GET", question, "", "", nil); status != http.StatusOK || !strings.Contains(answer, fmt.Sprintf(`"total_count":%d,`, events)) || strings.Contains(answer, `"key":""`) {
		t.Errorf("by day: %d %s", status, answer)
	}
	l, done := loadInto(t, p.url, 1000, time.Hour)
	for range 2 {
		if out, code := subcommand(t, env, fmt.Sprintf("reconcile -recount -from %d -to %d", now-86400, now-7200)); code != 0 {
			t.Error(out)
		}
	}
	l.Stop()
	done()
	drained(p)
	mustAgree(t, l, p.url)
	mustCount(t, env, "odd", events)
}

// lean is the program as make build makes it, whose memory is not that of the race detector.
func lean(t testing.TB) string {
	t.Helper()
	path, err := leanBinary()
	if err != nil {
		t.Fatal(err)
	}
	return path
}

var leanBinary = sync.OnceValues(func() (string, error) {
	return build("lean", "CGO_ENABLED=0", "-trimpath", "-ldflags=-s -w")
})
