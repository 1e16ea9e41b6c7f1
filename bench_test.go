// What each step of an event's way costs, alone (the whole way is measured in test/). Figures of one run on one machine compare;
// absolute ones do not travel. Every benchmark checks what it produced. A test holds the hot path to no garbage.
//
// Behind them stands the small stand that they share with the tests from inside: an event, a request, a worker, and a space on the
// stack for those that need its Kafka or its ClickHouse. Whole-system tests have another one, in test/.

package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ClickHouse/ch-go/proto"
	"github.com/event-ingestion/event-ingestion/internal/batches"
	"github.com/event-ingestion/event-ingestion/internal/testkit"
	"github.com/twmb/franz-go/pkg/kadm"
	"github.com/twmb/franz-go/pkg/kgo"
)

func BenchmarkParse(b *testing.B) {
	p, raw := new(eventParser), []byte(sampleEvent)
	b.ReportAllocs()
	b.SetBytes(int64(len(raw)))
	for b.Loop() {
		if ev, problems, err := p.parse(raw); err != nil || len(problems) > 0 || len(ev.tags) != 2 {
			b.Fatal(err, problems)
		}
	}
}

func BenchmarkID(b *testing.B) {
	ev := mustParse(b, new(eventParser), sampleEvent)
	var buf []byte
	want, _ := ev.id(nil)
	b.ReportAllocs()
	for b.Loop() {
		var id eventID
		if id, buf = ev.id(buf); id != want {
			b.Fatal(id)
		}
	}
}

func BenchmarkEncode(b *testing.B) {
	ev := mustParse(b, new(eventParser), sampleEvent)
	var buf []byte
	b.ReportAllocs()
	for b.Loop() {
		if buf = appendEvent(buf[:0], ev); len(buf) < 200 {
			b.Fatalf("%s", buf)
		}
	}
}

// BenchmarkBodyToRecords is the hot path of the API: a bulk body of 1000 events to records ready for Kafka, without and with
// an insert_id.
func BenchmarkBodyToRecords(b *testing.B) {
	for _, more := range []string{"", `"insert_id":"0f9c1d6e-4b7a-4f5e-9d57-3f0b7a6c1e42",`} {
		b.Run(fmt.Sprintf("insert_id=%t", more != ""), func(b *testing.B) {
			event := "{" + more + sampleEvent[1:]
			body := []byte(`{"events":[` + strings.Repeat(event+",", 999) + event + `]}`)
			q := newTestRequest()
			b.ReportAllocs()
			b.SetBytes(int64(len(body)))
			for b.Loop() {
				q.fill(body)
				if q.encode(b.Context(), typeJSON, 1795441976) != nil || len(q.records) != 1000 {
					b.Fatal("not 1000 records")
				}
				q.sealRecords("events")
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/1000, "ns/event")
		})
	}
}

// BenchmarkRecordToRow is the hot path of a worker: decode, hash, append.
func BenchmarkRecordToRow(b *testing.B) {
	const rows = 2000
	w := idleWorker(rows)
	records := make([]*kgo.Record, rows)
	for i := range records {
		ev := mustParse(b, new(eventParser), strings.Replace(sampleEvent, "user_123", fmt.Sprint("user_", i), 1))
		id, _ := ev.id(nil)
		records[i] = &kgo.Record{Key: hex.AppendEncode(nil, id[:]), Value: appendEvent(nil, ev)}
	}
	b.ReportAllocs()
	for b.Loop() {
		w.cur.reset()
		w.queue = append(w.queue[:0], records)
		if bad, err := w.takeIn(rows); bad != nil || w.cur.rows() != rows {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/rows, "ns/event")
}

// BenchmarkInsert is one round into the real tables, of 1, 5 and 20 full blocks.
func BenchmarkInsert(b *testing.B) {
	for _, blocks := range []int{1, 5, 20} {
		b.Run(fmt.Sprintf("rows=%d", blocks*2000), func(b *testing.B) {
			env := newSpace(b)
			cfg := settingsFrom(b, env)
			in := newInserter(preparedClickHouse(b, cfg), cfg, &newStats().store, ignored, nil, newRoundCall(), membership{isMember: func(context.Context) error { return nil }})
			ev := mustParse(b, new(eventParser), sampleEvent)
			serial := uint64(0)
			for b.Loop() {
				b.StopTimer()
				in.round = in.round[:0]
				for range blocks {
					blk := newBlock(2000)
					for range 2000 {
						var id eventID
						serial++
						copy(id[:], fmt.Sprint(serial))
						blk.append(&id, ev, &kgo.Record{})
					}
					in.round = append(in.round, blk)
				}
				b.StartTimer()
				in.insertRows(b.Context())
			}
			if got := clickhouseQuery(b, "SELECT count() FROM "+cfg.clickhouseDatabase+".events"); got != fmt.Sprint(serial) {
				b.Fatalf("%s rows, want %d", got, serial)
			}
		})
	}
}

// BenchmarkKnown is the dedupe of an event that is new: one look and one addition, in rounds of 20,000, in a minute that
// grows to a million ids.
func BenchmarkKnown(b *testing.B) {
	const rows = 20_000
	ev := mustParse(b, new(eventParser), sampleEvent)
	blk, id := newBlock(rows), eventID{}
	for range rows {
		blk.append(&id, ev, &kgo.Record{})
	}
	known := newDedupe(nil, nil, 1<<28)
	rnd, n := rand.New(rand.NewPCG(1, 2)), 0 // ids are hashes
	for b.Loop() {
		if n%1_000_000 == 0 {
			known.forgetAll()
			known.know(ev.timestamp / minuteSeconds)
		}
		b.StopTimer()
		for row := range rows {
			binary.LittleEndian.PutUint64(blk.id(row)[:], rnd.Uint64())
		}
		b.StartTimer()
		if err := known.prepare(b.Context(), []*block{blk}); err != nil {
			b.Fatal(err)
		}
		if dups := known.cut([]*block{blk}); dups > 0 {
			b.Fatalf("%d falsely known", dups)
		}
		n += rows
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/rows, "ns/event")
}

// clickhouseAddress is where ClickHouse speaks its native protocol.
func clickhouseAddress(t testing.TB) string { return "127.0.0.1:" + os.Getenv("CLICKHOUSE_PORT") }

// kafkaBrokers are the addresses of the stack's brokers.
func kafkaBrokers(t testing.TB) []string { return strings.Split(os.Getenv("KAFKA_BROKERS"), ",") }

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
		"KAFKA_BROKERS=" + os.Getenv("KAFKA_BROKERS"), "CLICKHOUSE_PORT=" + os.Getenv("CLICKHOUSE_PORT"), "CLICKHOUSE_CLUSTER=" + os.Getenv("CLICKHOUSE_CLUSTER"),
		"CLICKHOUSE_DATABASE=" + name, "KAFKA_TOPIC=" + name, "KAFKA_CONSUMER_GROUP=" + name,
		"SERVER_HOST=127.0.0.1", "ADMIN_ADDR=off", "KAFKA_SESSION_TIMEOUT=1s",
	}, more...)
}

// askShards is clickhouseQuery at each ClickHouse of the test's stack.
func askShards(t testing.TB, sql string) (answers []string) {
	t.Helper()
	for port := range strings.SplitSeq(os.Getenv("CLICKHOUSE_HTTP_PORT"), ",") {
		answers = append(answers, testkit.QueryAt(t, port, sql))
	}
	return answers
}

func clickhouseQuery(t testing.TB, sql string) string {
	t.Helper()
	first, _, _ := strings.Cut(os.Getenv("CLICKHOUSE_HTTP_PORT"), ",")
	return testkit.QueryAt(t, first, sql)
}

const (
	onePath     = "/api/v1/events"
	bulkPath    = "/api/v1/events/bulk"
	metricsPath = "/api/v1/metrics?"
	jsonCT      = "application/json"
	ndjson      = "application/x-ndjson"
	good        = `"event_name":"e","user_id":"u","timestamp":$NOW`
)

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

const sampleEvent = `{"event_name":"product_view","channel":"web","campaign_id":"cmp_987","user_id":"user_123","timestamp":1795441976,` +
	`"tags":["electronics","homepage"],"metadata":{"product_id":"prod-789","price":129.99,"currency":"TRY","referrer":"google"}}`

func mustParse(t testing.TB, p *eventParser, raw string) *event {
	t.Helper()
	ev, problems, err := p.parse([]byte(raw))
	if err != nil || len(problems) > 0 {
		t.Fatalf("%s: %v %v", raw, err, problems)
	}
	return ev
}

// newTestRequest is a request without a server, to be filled.
func newTestRequest() *ingestRequest {
	in := newIngester(new(batches.Producer), &settings{maxInFlightBytes: 1 << 30}, &newStats().ingest, nil)
	q := in.bulks.pool.Get().(*ingestRequest)
	q.account = in.bodies.Open(client{})
	return q
}

// fill makes q the request of a body that has been read. It keeps the buffers that q has: with the race detector a pool drops
// what is put back now and then.
func (q *ingestRequest) fill(body []byte) {
	held, arena := q.body, q.arena
	q.body, q.arena = nil, nil
	q.reset()
	if held == nil || cap(held.B) < len(body) {
		q.account.Move(&held, len(body), false)
	}
	held.B = append(held.B[:0], body...)
	if arena != nil {
		arena.B = arena.B[:0]
	}
	q.body, q.arena = held, arena
}

// idleWorker takes in what is put into its queue, of a topic with one partition.
func idleWorker(rows int) *worker {
	return newWorker(blockLimits{rows, 1 << 30}, 1, new(atomic.Int64), newRoundCall(), nil)
}

// preparedClickHouse has the tables, without events.
func preparedClickHouse(t testing.TB, cfg *settings) *clickhouse {
	t.Helper()
	db := newClickHouse(cfg)
	if err := db.makeTables(t.Context()); err != nil {
		t.Fatal(err)
	}
	return db
}

// newTestSideProducer has its topics, and no consumer.
func newTestSideProducer(t *testing.T, cfg *settings) *sideProducer {
	t.Helper()
	side, err := newSideProducer(cfg, &newStats().side)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(side.close)
	if _, err := ensureTopics(t.Context(), side.kafka, cfg); err != nil {
		t.Fatal(err)
	}
	return side
}

// asApart is set in the process of a test that calls apart.
const asApart = "EVENT_INGESTION_TEST_APART"

// apart runs the test again in a process of its own, whose allocations are only its own, beside the others. It says whether
// this is that process.
func apart(t *testing.T) bool {
	t.Helper()
	if os.Getenv(asApart) != "" {
		return true
	}
	t.Parallel()
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.v", fmt.Sprintf("-test.short=%t", testing.Short()), "-test.run", "^"+t.Name()+"$")
	cmd.Env = append(os.Environ(), asApart+"=1")
	out, err := cmd.CombinedOutput()
	if bytes.Contains(out, []byte("--- SKIP: "+t.Name())) {
		t.Skipf("%s", out)
	}
	if t.Logf("%s", out); err != nil || !bytes.Contains(out, []byte("--- PASS: "+t.Name())) {
		t.Error("in a process of its own:", err)
	}
	return false
}

// countedOnce fails the test unless each row of events_hourly has the events of its hour.
func countedOnce(t *testing.T, db string) {
	t.Helper()
	if differ := clickhouseQuery(t, fmt.Sprintf(`SELECT event_name, channel, hour, sum(n) FROM (
		SELECT event_name, channel, toStartOfHour(timestamp) AS hour, toInt64(uniqExact(event_id)) AS n FROM %[1]s.events GROUP BY event_name, channel, hour
		UNION ALL SELECT event_name, channel, hour, -event_count FROM %[1]s.events_hourly)
		GROUP BY event_name, channel, hour HAVING sum(n) != 0 LIMIT 10`, db)); differ != "" {
		t.Errorf("not counted, or too often:\n%s", differ)
	}
}

// TestHotPathAllocations is the promise of the README: from body bytes to records ready for Kafka, and from a record
// to a row, nothing is allocated per event.
func TestHotPathAllocations(t *testing.T) {
	const events = 100
	var list []string
	for i := range events / 2 {
		list = append(list, fmt.Sprintf(`{"event_name":"e","user_id":"user_%d","timestamp":1795441976}`, i), strings.Replace(sampleEvent, "user_123", fmt.Sprint("user_", i), 1))
	}
	body := []byte(`{"events":[` + strings.Join(list, ",") + `]}`)
	q := newTestRequest()
	toRecords := func() {
		q.fill(body)
		if err := q.encode(t.Context(), typeJSON, 1795441976); err != nil {
			t.Fatal(err)
		}
		q.sealRecords("events")
	}
	toRecords()
	if len(q.records) != events || q.failed > 0 {
		t.Fatalf("%d records, %d failed", len(q.records), q.failed)
	}
	id, _ := mustParse(t, new(eventParser), list[events-1]).id(nil)
	if got := string(q.records[events-1].Key); got != hex.EncodeToString(id[:]) {
		t.Fatalf("key %s", got)
	}
	if n := testing.AllocsPerRun(100, toRecords); n > 0 {
		t.Errorf("body to records: %.0f allocations for %d events", n, events)
	}
	acknowledge := func() {
		q.holders.Store(2)
		q.pending.Store(int32(len(q.records)))
		for i := range q.records {
			onAck(&q.records[i].Record, nil)
		}
		<-q.acked
	}
	if n := testing.AllocsPerRun(100, acknowledge); n > 0 {
		t.Errorf("acknowledgements: %.0f allocations for %d events", n, events)
	}
	w := idleWorker(2 * events)
	records := make([]*kgo.Record, events)
	for i := range records {
		records[i] = &kgo.Record{Key: q.records[i].Key, Value: q.records[i].Value, Offset: int64(i)}
	}
	queue := make([][]*kgo.Record, 1)
	toRows := func() {
		w.cur.reset()
		queue[0] = records
		w.queue = queue
		if bad, err := w.takeIn(events); bad != nil {
			t.Fatal(err)
		}
	}
	var header proto.Buffer
	toHeader := func() {
		header.Reset()
		for _, c := range w.cur.columns {
			c.EncodeStart(&header, proto.Version)
			if c.Data.Rows() != events {
				t.Fatalf("%d rows of %s", c.Data.Rows(), c.Name)
			}
		}
	}
	toRows()
	if w.cur.rows() != events {
		t.Fatalf("%d rows", w.cur.rows())
	}
	if n := testing.AllocsPerRun(100, toRows); n > 0 {
		t.Errorf("records to rows: %.0f allocations for %d events", n, events)
	}
	if n := testing.AllocsPerRun(100, toHeader); n > 0 {
		t.Errorf("rows to a block's header: %.0f allocations for %d events", n, events)
	}
}
