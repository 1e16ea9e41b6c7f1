// What it costs, from outside: the whole way of an event as a ratio to doing less. `make bench` runs all, with those of each step,
// which are in the root. Every benchmark checks what it produced.

package test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/event-ingestion/event-ingestion/load"
	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/valyala/fastjson"
)

// oneClient lets the one client that there is in a benchmark take all.
const oneClient = "MAX_IN_FLIGHT_BYTES_PER_CLIENT=0"

const wholePathEvents = 200_000

// BenchmarkWholePath sends events in bulks of 1000 over 8 connections and waits until metrics count them all. In the
// same run, in turns, it sends the same requests to ClickHouse's own HTTP interface as JSONEachRow, into tables of the
// same schema: what a client gets without this system. For scale, also as inserts of 100,000 rows, ClickHouse at its
// best, which needs somebody who collects them. One operation is wholePathEvents events.
func BenchmarkWholePath(b *testing.B) {
	env := newSpace(b, oneClient)
	p := startProgram(b, env)
	other := newSpace(b)
	makeTables(b, other)
	var ours, theirs, best []float64
	for b.Loop() {
		l, done := loadInto(b, p.url, 0, time.Hour, "-bulk", "1000", "-connections", "8", "-users", "10000")
		started := time.Now()
		p.await("sent", time.Minute, func() bool { return l.OK.Load() >= wholePathEvents })
		l.Stop()
		done()
		want := fmt.Sprintf(`{"total_count":%d,`, l.Distinct())
		p.await("queryable", time.Minute, func() bool {
			time.Sleep(100 * time.Millisecond) // a query is CPU that those who store could use
			_, _, answer := p.do("GET", fmt.Sprintf("%sevent_name=%s&from=1&to=%d", metricsPath, l.Config.Event, time.Now().Unix()), "", "", nil)
			return strings.HasPrefix(answer, want)
		})
		ours = append(ours, float64(l.OK.Load())/time.Since(started).Seconds())

		b.StopTimer()
		mustAgree(b, l, p.url) // which also waits for complete_through
		theirs = append(theirs, insertOverHTTP(b, space(other, "CLICKHOUSE_DATABASE"), 1000))
		best = append(best, insertOverHTTP(b, space(other, "CLICKHOUSE_DATABASE"), 100_000))
		b.StartTimer()
	}
	b.ReportMetric(median(ours), "events/s")
	b.ReportMetric(median(theirs), "clickhouse-http-events/s")
	b.ReportMetric(median(best), "clickhouse-best-events/s")
	b.ReportMetric(median(ours)/median(theirs), "ratio")
}

// insertOverHTTP inserts over 8 connections and returns rows a second.
func insertOverHTTP(b testing.TB, database string, rowsPerInsert int) float64 {
	cfg, _ := load.Parse([]string{"-users", "10000"}, io.Discard)
	cfg.Event = fmt.Sprint("http_", time.Now().UnixNano())
	gen := load.NewGenerator(cfg)
	bodies := jsonRows(gen, wholePathEvents, rowsPerInsert)
	started := time.Now()
	postRows(b, database, "async_insert=0&insert_deduplicate=0&optimize_on_insert=0", 8, bodies)
	took := time.Since(started)
	if got := clickhouseQuery(b, fmt.Sprintf("SELECT count() FROM %s.events WHERE event_name = '%s'", database, cfg.Event)); got != fmt.Sprint(wholePathEvents) {
		b.Fatalf("%s rows", got)
	}
	return wholePathEvents / took.Seconds()
}

// BenchmarkDedupe is what counting once costs. In turns, over 8 connections in bulks of 1000: events of this hour, the same
// again (all of them duplicates), and events in time order over 30 days, as a backfill sends them. One operation is
// dedupeEvents events of each.
func BenchmarkDedupe(b *testing.B) {
	const dedupeEvents = 200_000
	admin := freePort(b)
	p := startProgram(b, newSpace(b, oneClient, "ADMIN_ADDR=127.0.0.1:"+admin))
	now, serial, want, sent := time.Now().Unix(), 0, 0, 0
	settled := func() (n int) { // records that are stored or known to be duplicates
		resp, err := http.Get("http://127.0.0.1:" + admin + "/metrics")
		if err != nil {
			b.Fatal(err)
		}
		defer resp.Body.Close()
		page, _ := io.ReadAll(resp.Body)
		for line := range strings.Lines(string(page)) {
			if name, value, _ := strings.Cut(strings.TrimSpace(line), " "); name == "event_ingestion_rows_stored_total" || name == "event_ingestion_duplicates_total" {
				v, _ := strconv.Atoi(value)
				n += v
			}
		}
		return n
	}
	send := func(at func(i int) int64, from int) float64 {
		bodies := make(chan []byte, dedupeEvents/1000)
		for i := 0; i < dedupeEvents; {
			var body []byte
			for range 1000 {
				body = fmt.Appendf(body, `{"event_name":"dedupe","user_id":"user_%d","timestamp":%d,"channel":"web","campaign_id":"cmp_%d"}`+"\n", from+i, at(i), i%50)
				i++
			}
			bodies <- body
		}
		close(bodies)
		started := time.Now()
		var clients sync.WaitGroup
		for range 8 {
			clients.Go(func() { // ends with the bodies
				for body := range bodies {
					resp, err := http.Post(p.url+bulkPath, ndjson, bytes.NewReader(body))
					if err != nil || resp.StatusCode != http.StatusAccepted {
						b.Error(err, resp)
						return
					}
					resp.Body.Close()
				}
			})
		}
		clients.Wait()
		sent += dedupeEvents
		p.await("settled", time.Minute, func() bool { return settled() >= sent })
		took := time.Since(started).Seconds()
		_, _, answer := p.do("GET", fmt.Sprintf("%sevent_name=dedupe&from=1&to=%d", metricsPath, now), "", "", nil)
		if !strings.Contains(answer, fmt.Sprintf(`"total_count":%d,`, want)) {
			b.Fatalf("%s, want %d", answer, want)
		}
		return dedupeEvents / took
	}
	thisHour := func(int) int64 { return now - 60 }
	thirtyDays := func(i int) int64 { return now - 29*daySeconds + int64(i)*28*daySeconds/dedupeEvents }
	var fresh, again, backfill []float64
	for b.Loop() {
		want += dedupeEvents
		fresh = append(fresh, send(thisHour, serial))
		again = append(again, send(thisHour, serial))
		want += dedupeEvents
		backfill = append(backfill, send(thirtyDays, serial))
		serial += dedupeEvents
	}
	b.ReportMetric(median(fresh), "new-events/s")
	b.ReportMetric(median(again), "duplicate-events/s")
	b.ReportMetric(median(backfill), "backfill-events/s")
	b.ReportMetric(median(backfill)/median(fresh), "backfill-ratio")
}

// BenchmarkSinglePost compares single events over 128 connections with a net/http handler that only parses, hashes
// and awaits the same acknowledgement, on the same topic, so that the same program consumes and inserts beside both. One
// operation is a second of each.
func BenchmarkSinglePost(b *testing.B) {
	env := newSpace(b, oneClient)
	p := startProgram(b, env)
	bare := startBare(b, env)
	measure := func(url string) float64 {
		l, done := loadInto(b, url, 0, time.Second, "-bulk", "1", "-connections", "128", "-users", "10000", "-retries", "0")
		done()
		if l.Unknown.Load() > 0 || len(l.Refused) > 0 {
			b.Fatal(l.Refused, l.Unknown.Load())
		}
		return float64(l.OK.Load()) / l.Took.Seconds()
	}
	var ours, theirs []float64
	for b.Loop() {
		ours, theirs = append(ours, measure(p.url)), append(theirs, measure(bare))
	}
	b.ReportMetric(median(ours), "events/s")
	b.ReportMetric(median(theirs), "bare-events/s")
	b.ReportMetric(median(ours)/median(theirs), "ratio")
}

// startBare runs bareHandler in a process of its own, as the program runs.
func startBare(b testing.TB, env []string) (url string) {
	self, err := os.Executable()
	if err != nil {
		b.Fatal(err)
	}
	return startBinary(b, self, append(slices.Clone(env), asBare+"=1")).url
}

// bareHandler is the least that could be called the same: read, parse, hash, produce, await the acknowledgement. Its producer is set
// up as the program's is by default.
func bareHandler() error {
	producer, err := kgo.NewClient(kgo.SeedBrokers(strings.Split(os.Getenv("KAFKA_BROKERS"), ",")...), kgo.RequiredAcks(kgo.AllISRAcks()),
		kgo.ProducerBatchCompression(kgo.SnappyCompression()), kgo.ProducerLinger(time.Millisecond), kgo.MaxBufferedRecords(1<<20))
	if err != nil {
		return err
	}
	topic := os.Getenv("KAFKA_TOPIC")
	var parsers fastjson.ParserPool
	return http.ListenAndServe("127.0.0.1:"+os.Getenv("SERVER_PORT"), http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/ready" {
			return
		}
		body, _ := io.ReadAll(r.Body)
		parser := parsers.Get()
		defer parsers.Put(parser)
		v, err := parser.ParseBytes(body)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		var fields []byte // a load's names have nothing to escape
		fields = append(append(fields, v.GetStringBytes("event_name")...), '|')
		fields = append(append(fields, v.GetStringBytes("user_id")...), '|')
		fields = append(strconv.AppendInt(fields, v.GetInt64("timestamp"), 10), '|')
		id := sha256.Sum256(append(fields, v.GetStringBytes("channel")...))
		key := hex.AppendEncode(nil, id[:])
		if err := producer.ProduceSync(context.Background(), &kgo.Record{Topic: topic, Key: key, Value: body}).FirstErr(); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		w.WriteHeader(http.StatusAccepted)
		fmt.Fprintf(w, `{"event_id":"%s","status":"queued"}`, key)
	}))
}

// BenchmarkMetrics asks for 30 days that hold 20 million events, 12 million of them of the name that is asked for, of 100,000 users, and
// for what the dashboard page draws: with nothing else to do, and with 20,000 events a second of that name coming in. Ranges end
// now. Warm questions were asked before, or nearly; cold ones are asked of an instance that has
// just started. The aggregate is merged, as it is once an hour has passed.
func BenchmarkMetrics(b *testing.B) {
	env := newSpace(b)
	p := startProgram(b, env)
	now := time.Now().Unix()
	clickhouseQuery(b, fmt.Sprintf(`INSERT INTO %s.events (event_id, event_name, channel, campaign_id, user_id, timestamp, tags, metadata)
		SELECT SHA256(toString(number)), ['view','view','view','cart','purchase'][number %% 5 + 1], ['web','mobile_app','api'][intHash32(number) %% 3 + 1],
			concat('c', toString(number %% 50)), concat('user_', toString(intHash64(number) %% 100000)), %d - intHash64(number + 1) %% 2592000, ['a','b'], '{"price":1}'
		FROM numbers(20000000) SETTINGS max_insert_threads = 2, optimize_on_insert = 0, max_partitions_per_insert_block = 100`, space(env, "CLICKHOUSE_DATABASE"), now))
	clickhouseQuery(b, "OPTIMIZE TABLE "+space(env, "CLICKHOUSE_DATABASE")+".events_hourly FINAL")
	month, week, day := 30*daySeconds-1000, 7*daySeconds, daySeconds
	for _, rate := range []int{0, 20000} {
		b.Run(fmt.Sprintf("in=%d", rate), func(b *testing.B) {
			if rate > 0 {
				cfg, err := load.Parse([]string{"-url", p.url, "-rate", strconv.Itoa(rate), "-duration", "1h", "-bulk", "200", "-users", "100000"}, io.Discard)
				if err != nil {
					b.Fatal(err)
				}
				cfg.Event = "view"
				l, err := load.New(cfg)
				if err != nil {
					b.Fatal(err)
				}
				var sending sync.WaitGroup
				sending.Go(func() { l.Send(context.Background(), io.Discard) }) // ends with Stop
				defer sending.Wait()
				defer l.Stop()
				p.await("under load", time.Minute, func() bool { return l.OK.Load() > int64(5*rate) })
			}
			for _, c := range []struct {
				name, question string
				span           int
			}{
				{"total", "metrics?event_name=view", month},
				{"channel", "metrics?event_name=view&group_by=channel", month},
				{"day", "metrics?event_name=view&group_by=day", month},
				{"hour", "metrics?event_name=view&group_by=hour", month},
				{"campaign", "metrics?event_name=view&group_by=campaign", month},
				{"overview-30d", "overview?", month},
				{"overview-7d", "overview?", week},
				{"overview-24h", "overview?", day},
			} {
				asked := 0 // each question begins a second after the one before: an overview is shared by all who ask the same
				ask := func(p *program) float64 {
					now := time.Now().Unix()
					asked++
					started := time.Now()
					status, _, answer := p.do("GET", fmt.Sprintf("/api/v1/%s&from=%d&to=%d", c.question, now-int64(c.span-asked), now), "", "", nil)
					if status != http.StatusOK || !strings.Contains(answer, `"total_count":`) {
						b.Fatal(status, answer)
					}
					return float64(time.Since(started).Microseconds()) / 1000
				}
				report := func(b *testing.B, took []float64) {
					slices.Sort(took)
					b.ReportMetric(took[len(took)/2], "p50-ms")
					b.ReportMetric(took[len(took)*99/100], "p99-ms")
				}
				b.Run("warm/"+c.name, func(b *testing.B) {
					ask(p)
					var took []float64
					for b.Loop() {
						took = append(took, ask(p))
					}
					report(b, took)
				})
				b.Run("cold/"+c.name, func(b *testing.B) {
					fresh := newProgram(b, append(slices.Clone(env), "ROLE=api"))
					var took []float64
					for b.Loop() {
						fresh.start()
						fresh.await("ready", time.Minute, func() bool { return fresh.status("/ready") == http.StatusOK })
						took = append(took, ask(fresh))
						fresh.terminate()
					}
					report(b, took)
				})
			}
		})
	}
}
