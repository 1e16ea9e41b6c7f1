// The small stand of the tests from inside: an event, a request, a worker, and a space on the stack for those that need its
// Kafka or its ClickHouse. Whole-system tests have another one, in test/.

package main

import (
	"bytes"
	"compress/gzip"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/twmb/franz-go/pkg/kadm"
	"github.com/twmb/franz-go/pkg/kgo"

	"github.com/event-ingestion/event-ingestion/batches"
)

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
		answers = append(answers, queryAt(t, port, sql))
	}
	return answers
}

func clickhouseQuery(t testing.TB, sql string) string {
	t.Helper()
	first, _, _ := strings.Cut(os.Getenv("CLICKHOUSE_HTTP_PORT"), ",")
	return queryAt(t, first, sql)
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

// readTopic returns the records of a topic once there are n.
func readTopic(t testing.TB, topic string, n int) (records []*kgo.Record) {
	t.Helper()
	kafka, err := kgo.NewClient(kgo.SeedBrokers(kafkaBrokers(t)...), kgo.ConsumeTopics(topic))
	if err != nil {
		t.Fatal(err)
	}
	defer kafka.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute) // ample: another test may have the machine
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

func gzipped(b []byte) []byte {
	var out bytes.Buffer
	z := gzip.NewWriter(&out)
	z.Write(b)
	z.Close()
	return out.Bytes()
}

func zstded(b []byte) []byte {
	z, _ := zstd.NewWriter(nil)
	return z.EncodeAll(b, nil)
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
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.v", "-test.run", "^"+t.Name()+"$")
	cmd.Env = append(os.Environ(), asApart+"=1")
	out, err := cmd.CombinedOutput()
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

func totalOf(ns []int64) (total int64) {
	for _, n := range ns {
		total += n
	}
	return total
}

// lateProxy is a port where ClickHouse answers, late by the nanoseconds that late has.
func lateProxy(t *testing.T, late *atomic.Int64) (port string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() { // ends with the listener
		for {
			client, err := l.Accept()
			if err != nil {
				return
			}
			server, err := net.Dial("tcp", clickhouseAddress(t))
			if err != nil {
				client.Close()
				continue
			}
			go func() { io.Copy(server, client); server.Close() }() // ends with either side
			go func() {                                             // ends with either side
				defer client.Close()
				b := make([]byte, 32<<10)
				for n, err := server.Read(b); err == nil; n, err = server.Read(b) {
					time.Sleep(time.Duration(late.Load()))
					client.Write(b[:n])
				}
			}()
		}
	}()
	return strconv.Itoa(l.Addr().(*net.TCPAddr).Port)
}
