// Rounds, from inside: the fence, rows that were lost, torn hours, what is decompressed ahead.

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/event-ingestion/event-ingestion/internal/testkit"

	"github.com/ClickHouse/ch-go"
	"github.com/ClickHouse/ch-go/proto"
	"github.com/twmb/franz-go/pkg/kgo"

	"github.com/event-ingestion/event-ingestion/internal/batches"
	"github.com/event-ingestion/event-ingestion/internal/questions"

	"github.com/event-ingestion/event-ingestion/internal/troubles"
)

// ignored takes what ClickHouse says when a query fails.
func ignored(error) {}

// TestFence: when the group is asked, the insert stands in system.processes and has no row; without a yes none gets there.
func TestFence(t *testing.T) {
	t.Parallel()
	cfg := settingsFrom(t, newSpace(t))
	db := preparedClickHouse(t, cfg)
	stored := func() string { return clickhouseQuery(t, "SELECT count() FROM "+db.database+".events") }
	asked := 0
	in := newInserter(db, cfg, &newStats().store, ignored, nil, newRoundCall(), membership{isMember: func(context.Context) error {
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
	in.conn.close()
}

// TestSameBlockAgain: rows that were lost are inserted again, just as they were, and ClickHouse does not take them for known.
func TestSameBlockAgain(t *testing.T) {
	t.Parallel()
	cfg := settingsFrom(t, newSpace(t))
	db := preparedClickHouse(t, cfg)
	in := newInserter(db, cfg, &newStats().store, ignored, nil, newRoundCall(), membership{isMember: func(context.Context) error { return nil }})
	ev := mustParse(t, new(eventParser), sampleEvent)
	id, _ := ev.id(nil)
	for range 2 {
		for _, table := range []string{"events", "events_hourly"} { // a dropped part would be forgotten, a mutation is not noticed
			clickhouseQuery(t, "ALTER TABLE "+db.database+"."+table+" DELETE WHERE true SETTINGS mutations_sync = 2")
		}
		b := newBlock(1)
		b.append(&id, ev, &kgo.Record{})
		in.round = []*block{b}
		if err := in.insertRows(t.Context()); err != nil {
			t.Fatal(err)
		}
		mustCount(t, []string{"CLICKHOUSE_DATABASE=" + db.database}, string(ev.name), 1)
	}
	in.conn.close()
}

// TestManyHours: another producer's years of hourly events reach the number at which an hour is loaded, all in the same round.
func TestManyHours(t *testing.T) {
	t.Parallel()
	cfg := settingsFrom(t, newSpace(t))
	in := newInserter(preparedClickHouse(t, cfg), cfg, &newStats().store, ignored, nil, newRoundCall(), membership{})
	const hours = 5000
	ev := mustParse(t, new(eventParser), sampleEvent)
	b := newBlock(hours)
	for i := range int64(hours) {
		ev.timestamp = 1_600_000_000 + i*hourSeconds
		id, _ := ev.id(nil)
		b.append(&id, ev, &kgo.Record{})
		in.dedupe.wanted[ev.timestamp/minuteSeconds] = missed{rows: loadRows}
	}
	for known := range int64(3) {
		if n := in.dedupe.sets.Load(); n != known*loadHours*hourMinutes {
			t.Errorf("%d minutes are known after %d loadings", n, known)
		}
		if err := in.dedupe.prepare(t.Context(), []*block{b}); err != nil {
			t.Fatal(err)
		}
	}
	in.conn.close()
}

// TestGrowthBeforeTheNextLook: a topic grows, and this instance has not noticed. Another one may have, and store events of ours from
// their new partitions: the question before an insert finds out.
func TestGrowthBeforeTheNextLook(t *testing.T) {
	t.Parallel()
	env := newSpace(t, "KAFKA_PARTITIONS=1", "WORKER_COUNT=1") // whose memory is not that of other tests
	cfg := settingsFrom(t, env)
	unnoticed := func() int { return 1 }
	c, err := newConsumer(cfg, preparedClickHouse(t, cfg), ignored, 1, unnoticed, newTestSideProducer(t, cfg), &newStats().store, func(error) {})
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
	for c.assigned.Load() == 0 && troubles.Sleep(ctx, 10*time.Millisecond) == nil {
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

// TestHeldPartitionsLeave: all that was held has left when the last hour agrees. Rounds go on.
func TestHeldPartitionsLeave(t *testing.T) {
	t.Parallel()
	cfg := settingsFrom(t, newSpace(t))
	db := preparedClickHouse(t, cfg)
	w := idleWorker(10)
	ins := newInserter(db, cfg, &newStats().store, ignored, []func() *block{w.takeBlock}, w.call, membership{
		alone: func() bool { return true }, commit: func(context.Context, int) error { return nil },
	})
	ins.noteHour(400000)
	ins.heldRows = ins.mostHeld
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if ins.catchUp(ctx); ctx.Err() != nil {
		t.Error("no round is taken any more")
	}
}

// TestTornBesideMany: so many instances insert that there is no moment in which none does. A torn hour is mended all the same.
func TestTornBesideMany(t *testing.T) {
	t.Parallel()
	cfg := settingsFrom(t, newSpace(t))
	db := preparedClickHouse(t, cfg)
	hour := time.Now().Unix()/hourSeconds - 5
	clickhouseQuery(t, fmt.Sprintf("INSERT INTO %s.events (event_id, event_name, user_id, timestamp) SELECT SHA256(toString(number)), 'many', 'u', %d FROM numbers(100)", db.database, hour*hourSeconds))
	clickhouseQuery(t, fmt.Sprintf("INSERT INTO %[1]s.events_hourly SELECT * REPLACE (toInt64(-30) AS event_count) FROM %[1]s.events_hourly", db.database))
	ctx, stop := context.WithTimeout(t.Context(), time.Minute)
	var others sync.WaitGroup
	defer others.Wait()
	defer stop()
	for n := range 2 {
		others.Go(func() { // ends with stop
			for i := 0; ctx.Err() == nil; i++ {
				db.connected(func(c asker) error {
					return c.Do(ctx, ch.Query{Body: "SELECT sleep(0.3)", QueryID: fmt.Sprint(cfg.kafkaGroup, "-", n, "-", i), Result: proto.Results{{Data: new(proto.ColUInt8)}}})
				})
			}
		})
	}
	reached := false
	ins := newInserter(db, cfg, &newStats().store, ignored, nil, newRoundCall(), membership{
		alone: func() bool { return false }, release: func(map[int32]kgo.EpochOffset) { reached = true },
	})
	ins.noteHour(hour)
	ins.held[0] = kgo.EpochOffset{Offset: 1}
	for !reached && ctx.Err() == nil {
		ins.mend(ctx)
		troubles.Sleep(ctx, mendTick)
	}
	if !reached {
		t.Error("offsets wait")
	}
	countedOnce(t, db.database)
}

// TestTornBesideOneInsert: another instance's insert began just before the first look, and stands in events alone ever since. What is
// seen is not mended beside it, however long answers take.
func TestTornBesideOneInsert(t *testing.T) {
	t.Parallel()
	env := newSpace(t)
	preparedClickHouse(t, settingsFrom(t, env))
	var late atomic.Int64
	cfg := settingsFrom(t, append(env, "CLICKHOUSE_PORT="+lateProxy(t, &late)))
	db, stats := newClickHouse(cfg), &newStats().store
	hour := time.Now().Unix()/hourSeconds - 5
	clickhouseQuery(t, fmt.Sprintf("INSERT INTO %s.events (event_id, event_name, user_id, timestamp) SELECT SHA256(toString(number)), 'one', 'u', %d FROM numbers(100)", db.database, hour*hourSeconds))
	clickhouseQuery(t, "TRUNCATE TABLE "+db.database+".events_hourly")
	ctx, stop := context.WithCancel(t.Context())
	var other sync.WaitGroup
	defer other.Wait()
	defer stop()
	id := cfg.kafkaGroup + "-other"
	other.Go(func() { // ends with stop
		newClickHouse(settingsFrom(t, env)).connected(func(c asker) error {
			return c.Do(ctx, questions.EachRow(ch.Query{Body: "SELECT sleepEachRow(0.1) FROM system.numbers SETTINGS max_block_size = 1", QueryID: id}, func(int) {}, new(proto.ColUInt8)))
		})
	})
	for clickhouseQuery(t, "SELECT count() FROM system.processes WHERE query_id = '"+id+"'") == "0" {
	}
	ins := newInserter(db, cfg, stats, ignored, nil, newRoundCall(), membership{alone: func() bool { return false }})
	for range busyLooks - 1 {
		if _, err := ins.compare(ctx, []int64{hour}); err != nil {
			t.Fatal(err)
		}
	}
	late.Store(int64(200 * time.Millisecond))
	if _, err := ins.compare(ctx, []int64{hour}); err != nil || stats.mended.Get() > 0 {
		t.Errorf("%v, %d rows mended beside the insert that may be about to add them", err, stats.mended.Get())
	}
}

// TestManyLooks: an instance that has looked at an hour many times, each time in a moment, can still do so.
func TestManyLooks(t *testing.T) {
	t.Parallel()
	cfg := settingsFrom(t, newSpace(t))
	db := preparedClickHouse(t, cfg)
	ins := newInserter(db, cfg, &newStats().store, ignored, nil, newRoundCall(), membership{alone: func() bool { return true }})
	ins.atOnce = math.MaxInt/2 + 1 // what one hour after the other had made of it
	for range 3 {
		ins.noteHour(400000)
		ins.next = time.Time{}
		if ins.mend(t.Context()); len(ins.hours) > 0 {
			t.Error("the hour is not looked at")
		}
	}
}

// TestProfileThatCutsAnswers: an answer is whole, or an error.
func TestProfileThatCutsAnswers(t *testing.T) {
	t.Parallel()
	cfg := settingsFrom(t, append(newSpace(t), "CLICKHOUSE_USERNAME=narrow"))
	c := connection{to: newClickHouse(cfg)}
	defer c.close()
	n := 0
	err := c.Do(t.Context(), questions.EachRow(ch.Query{Body: "SELECT number FROM numbers(1000) SETTINGS max_block_size = 100"}, func(int) { n++ }, new(proto.ColUInt64)))
	if !ch.IsErr(err, proto.ErrTooManyRowsOrBytes) {
		t.Errorf("%d of 1000 rows: %v", n, err)
	}
}

// TestProfiles: whatever the profile of the program's user has, a number is right, or there is an error that names the setting. Every
// Bool that ClickHouse knows is turned round, and compatibility is each year's. Many are turned at once, each twice and in other company,
// for one may hide what another one does, and fewer when something differs; `make torture` turns one after the other.
func TestProfiles(t *testing.T) {
	t.Parallel()
	s := profileStand{t: t, cfg: settingsFrom(t, newSpace(t))}
	want, err := s.work(nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, part := range []string{`{"total_count":56,"unique_users":17,`, `{"key":"api","total_count":14,`, `"total_count":58,"unique_users":17,"purchases":58,"revenue":1783.5,`} {
		if !strings.Contains(want, part) {
			t.Fatalf("no %s in\n%s", part, want)
		}
	}
	told := map[string]bool{}
	isRight := func(settings []ch.Setting) (right bool) {
		got, err := s.work(settings)
		if err == nil && got == want {
			return true
		}
		if name := settings[0].Key; len(settings) == 1 && !told[name] {
			told[name] = true
			differ := 0
			for differ < min(len(got), len(want)) && got[differ] == want[differ] {
				differ++
			}
			if err == nil {
				t.Errorf("%v: %.300s\nwant %.300s", settings, got[differ:], want[differ:])
			} else if !strings.Contains(err.Error(), name) {
				t.Errorf("%v: an error that does not name it: %.500v", settings, err)
			}
		}
		return false
	}
	var search func(settings []ch.Setting)
	search = func(settings []ch.Setting) {
		if n := len(settings); !isRight(settings) && n > 1 {
			search(settings[:n/2])
			search(settings[n/2:])
		}
	}
	many, orders := 60, []string{"sipHash64(name)", "cityHash64(name)"}
	if testkit.TortureFactor() > 1 {
		many, orders = 1, orders[:1]
	}
	for _, order := range orders {
		var turned []ch.Setting
		for line := range strings.SplitSeq(clickhouseQuery(t, "SELECT name, 1 - toUInt8(value) FROM system.settings WHERE type = 'Bool' AND NOT is_obsolete ORDER BY "+order), "\n") {
			name, value, _ := strings.Cut(line, "\t")
			if turned = append(turned, ch.Setting{Key: name, Value: value}); name == "enable_analyzer" || name == "allow_experimental_analyzer" { // they hide the most
				isRight(turned[len(turned)-1:])
				turned = turned[:len(turned)-1]
			}
		}
		if len(turned) < 500 {
			t.Errorf("ClickHouse knows %d Bools only", len(turned))
		}
		for some := range slices.Chunk(turned, many) {
			search(some)
		}
	}
	for year := 18; year <= time.Now().Year()%100; year++ {
		isRight([]ch.Setting{{Key: "compatibility", Value: fmt.Sprintf("%d.8", year)}})
	}
	t.Log(s.runs, "runs")
}

// TestDecompressedAhead: one broker's answer is decompressed, batch after batch, while all that another one sends is taken at once.
// It is bounded all the same, and goes on when it is taken.
func TestDecompressedAhead(t *testing.T) {
	t.Parallel()
	asItIs, err := batches.NewDecompressor(0)
	if err != nil {
		t.Fatal(err)
	}
	a := &ahead{Decompressor: asItIs, limit: 100}
	batch := make([]byte, 60)
	for range 3 {
		n := 0
		for ; n < 10; n++ {
			if _, err := a.Decompress(batch, 0); err != nil {
				break
			}
			a.polled(0)
		}
		if n != 2 {
			t.Errorf("%d batches of 60 bytes are decompressed, want 2: the last is the first beyond 100", n)
		}
		a.polled(1)
		if _, err := a.Decompress(batch, 0); err == nil {
			t.Error("there is room before it was taken")
		}
		a.polled(0)
	}
}

// TestDecompressors: what they keep fits into what is reserved for all that no setting bounds, on any machine.
func TestDecompressors(t *testing.T) {
	if kept := cap(newDecompressors(64)) * maxZstdWindow; kept > restMemory {
		t.Errorf("%d bytes of windows, of %d", kept, restMemory)
	}
}

// TestReplicatedSchema: a Keeper is not at hand; the server at least parses every statement for replicas.
func TestReplicatedSchema(t *testing.T) {
	t.Parallel()
	db := newClickHouse(settingsFrom(t, newSpace(t, "CLICKHOUSE_CLUSTER=main")))
	db.replicated.Store(true)
	columns, err := questions.ParseColumns("page.path")
	if err != nil {
		t.Fatal(err)
	}
	replicated, distributed := 0, 0
	for _, stmt := range schemaStatements {
		stmt = strings.Join(perColumn(stmt, columns), "")
		formatted := clickhouseQuery(t, "SELECT formatQuery("+questions.Literal(strings.ReplaceAll(db.sql(stmt), "{fsync}", "0"))+")")
		formatted = strings.ReplaceAll(formatted, `\'`, "'")
		replicated += strings.Count(formatted, "MergeTree('/clickhouse/tables/{shard}/"+db.database+"/{table}', '{replica}')")
		distributed += strings.Count(formatted, "ENGINE = Distributed('main', "+db.database)
	}
	if len(schemaStatements) < 12 || replicated != 2 || distributed != 2 {
		t.Errorf("%d statements, %d replicated tables, %d distributed ones", len(schemaStatements), replicated, distributed)
	}
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
