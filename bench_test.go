// What it costs: each step of an event's way alone, and the whole way as a ratio to doing less.
//
// Figures of one run on one machine compare; absolute ones do not travel. `make bench` runs all, `make profile` one
// under pprof. Every benchmark checks what it produced.

package main

import (
	"bytes"
	"context"
	"encoding/binary"
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

	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/valyala/fastjson"

	"github.com/event-ingestion/event-ingestion/load"
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

// oneClient lets the one client that there is in a benchmark take all.
const oneClient = "MAX_IN_FLIGHT_BYTES_PER_CLIENT=0"

// BenchmarkInsert is one round into the real tables, of 1, 5 and 20 full blocks.
func BenchmarkInsert(b *testing.B) {
	for _, blocks := range []int{1, 5, 20} {
		b.Run(fmt.Sprintf("rows=%d", blocks*2000), func(b *testing.B) {
			env := newSpace(b)
			cfg := settingsFrom(b, env)
			st := preparedStore(b, cfg)
			in := newInserter(st, cfg, &newStats().store, nil, newRoundCall(), membership{isMember: func(context.Context) error { return nil }})
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

const wholePathEvents = 200_000

// BenchmarkWholePath sends events in bulks of 1000 over 8 connections and waits until metrics count them all. In the
// same run, in turns, it sends the same requests to ClickHouse's own HTTP interface as JSONEachRow, into tables of the
// same schema: what a client gets without this system. For scale, also as inserts of 100,000 rows, ClickHouse at its
// best, which needs somebody who collects them. One operation is wholePathEvents events.
func BenchmarkWholePath(b *testing.B) {
	env := newSpace(b, oneClient)
	p := startProgram(b, env)
	other := settingsFrom(b, newSpace(b))
	if _, err := newStore(other).prepare(b.Context(), 0); err != nil {
		b.Fatal(err)
	}
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
		theirs = append(theirs, insertOverHTTP(b, other.clickhouseDatabase, 1000))
		best = append(best, insertOverHTTP(b, other.clickhouseDatabase, 100_000))
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

// BenchmarkKnown is the dedupe of an event that is new: one look and one addition, in rounds of 20,000, in a minute that
// grows to a million ids.
func BenchmarkKnown(b *testing.B) {
	const rows = 20_000
	ev := mustParse(b, new(eventParser), sampleEvent)
	blk, id := newBlock(rows), eventID{}
	for range rows {
		blk.append(&id, ev, &kgo.Record{})
	}
	known := newDedupe(nil, "", 1<<28)
	serial, n := uint64(0), 0
	for b.Loop() {
		if n%1_000_000 == 0 {
			known.forgetAll()
			known.minutes[ev.timestamp/minuteSeconds] = new(idSet)
		}
		b.StopTimer()
		for row := range rows {
			serial++
			binary.LittleEndian.PutUint64(blk.id(row)[:], serial*0x9e3779b97f4a7c15)
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
	return startProgram(b, append(slices.Clone(env), asProgram+"=bare")).url
}

// bareHandler is the least that could be called the same: read, parse, hash, produce, await the acknowledgement.
func bareHandler() error {
	cfg, err := loadSettings(os.Getenv)
	if err != nil {
		return err
	}
	producer, err := newProducer(cfg)
	if err != nil {
		return err
	}
	if _, err := ensureTopics(context.Background(), producer, cfg); err != nil {
		return err
	}
	var parsers fastjson.ParserPool
	return http.ListenAndServe(fmt.Sprintf("127.0.0.1:%d", cfg.serverPort), http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
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
		ev := event{name: v.GetStringBytes("event_name"), userID: v.GetStringBytes("user_id"), channel: v.GetStringBytes("channel"), timestamp: v.GetInt64("timestamp")}
		id, _ := ev.id(nil)
		key := fmt.Appendf(nil, "%x", id)
		if err := producer.ProduceSync(context.Background(), &kgo.Record{Topic: cfg.kafkaTopic, Key: key, Value: body}).FirstErr(); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		w.WriteHeader(http.StatusAccepted)
		fmt.Fprintf(w, `{"event_id":"%s","status":"queued"}`, key)
	}))
}

// BenchmarkMetrics asks for 30 days that hold 20 million events, from the middle of an hour to the middle of an hour, and
// for what the dashboard page draws. The aggregate is merged, as it is once an hour has passed. Each question differs from
// the one before by a second, because an overview is shared by all who ask the same.
func BenchmarkMetrics(b *testing.B) {
	env := newSpace(b)
	p := startProgram(b, env)
	now := time.Now().Unix()
	clickhouseQuery(b, fmt.Sprintf(`INSERT INTO %s.events (event_id, event_name, channel, campaign_id, user_id, timestamp, tags, metadata)
		SELECT SHA256(toString(number)), ['view','cart','purchase','search'][number %% 4 + 1], ['web','mobile_app','api'][intHash32(number) %% 3 + 1],
			concat('c', toString(number %% 50)), concat('user_', toString(intHash64(number) %% 100000)), %d - intHash64(number + 1) %% 2592000, ['a','b'], '{"price":1}'
		FROM numbers(20000000) SETTINGS max_insert_threads = 2, optimize_on_insert = 0, max_partitions_per_insert_block = 100`, space(env, "CLICKHOUSE_DATABASE"), now))
	clickhouseQuery(b, "OPTIMIZE TABLE "+space(env, "CLICKHOUSE_DATABASE")+".events_hourly FINAL")
	from, to := now-30*daySeconds+1000, now-1000
	for _, c := range []struct {
		name, question string
		from, to       int64
	}{
		{"total", "metrics?event_name=view", from, to},
		{"channel", "metrics?event_name=view&group_by=channel", from, to},
		{"day", "metrics?event_name=view&group_by=day", from, to},
		{"hour", "metrics?event_name=view&group_by=hour", from, to},
		{"campaign", "metrics?event_name=view&group_by=campaign", from, to},
		{"overview-30d", "overview?", from, to},
		{"overview-7d", "overview?", now - 7*daySeconds, now},
		{"overview-24h", "overview?", now - daySeconds, now},
	} {
		b.Run(c.name, func(b *testing.B) {
			var took []float64
			for b.Loop() {
				url := fmt.Sprintf("/api/v1/%s&from=%d&to=%d", c.question, c.from+int64(len(took)), c.to)
				started := time.Now()
				status, _, answer := p.do("GET", url, "", "", nil)
				took = append(took, float64(time.Since(started).Microseconds())/1000)
				if status != http.StatusOK || strings.HasPrefix(c.question, "metrics") && !strings.Contains(answer, `"total_count":4`) {
					b.Fatal(status, answer)
				}
			}
			slices.Sort(took)
			b.ReportMetric(took[len(took)/2], "p50-ms")
			b.ReportMetric(took[len(took)*99/100], "p99-ms")
		})
	}
}
