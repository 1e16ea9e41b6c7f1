// What ClickHouse lost comes back from Kafka: a dropped partition, an older backup, a part that was never written.

package main

import (
	"context"
	"fmt"
	"math"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ClickHouse/ch-go"
	"github.com/ClickHouse/ch-go/proto"
	"github.com/twmb/franz-go/pkg/kadm"
	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kfake"
	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/kmsg"

	"github.com/event-ingestion/event-ingestion/troubles"
)

// TestRewind: events are lost in one table, in both, or are as they were at an earlier time; after a rewind both tables
// have each of them once.
func TestRewind(t *testing.T) {
	t.Parallel()
	env := faultSpace(t)
	db := space(env, "CLICKHOUSE_DATABASE")
	p := startProgram(t, env)
	sent := 0
	send := func(n int) {
		var body []byte
		for range n {
			body = fmt.Appendf(body, `{"event_name":"rewound","user_id":"u%d","timestamp":%d}`+"\n", sent, time.Now().Unix()-int64(sent)*2000)
			sent++
		}
		if status, _, answer := p.do("POST", bulkPath, ndjson, "", body); status != http.StatusAccepted {
			t.Fatal(status, answer)
		}
		drained(p)
	}
	// each runs a query for every monthly partition of a table.
	each := func(table, query string) {
		for partition := range strings.SplitSeq(clickhouseQuery(t, "SELECT DISTINCT partition_id FROM system.parts WHERE active AND database = '"+db+"' AND table = '"+table+"'"), "\n") {
			if partition != "" {
				clickhouseQuery(t, fmt.Sprintf(query, db, partition))
			}
		}
	}
	send(250)
	for _, table := range []string{"events", "events_hourly"} { // a backup
		clickhouseQuery(t, fmt.Sprintf("CREATE TABLE %[1]s.%[2]s_backup AS %[1]s.%[2]s", db, table))
		each(table, "ALTER TABLE %[1]s."+table+"_backup REPLACE PARTITION ID '%[2]s' FROM %[1]s."+table)
	}
	second := time.Now()
	p.await("another second", 5*time.Second, func() bool { return time.Now().Unix() > second.Unix() })
	send(250)
	for what, lose := range map[string]func(){
		"nothing":                     func() {},
		"partitions of events":        func() { each("events", "ALTER TABLE %s.events DROP PARTITION ID '%s'") },
		"partitions of events_hourly": func() { each("events_hourly", "ALTER TABLE %s.events_hourly DROP PARTITION ID '%s'") },
		"both tables": func() {
			clickhouseQuery(t, "TRUNCATE TABLE "+db+".events")
			clickhouseQuery(t, "TRUNCATE TABLE "+db+".events_hourly")
		},
		"what came after the backup": func() {
			for _, table := range []string{"events", "events_hourly"} {
				clickhouseQuery(t, "TRUNCATE TABLE "+db+"."+table)
				each(table+"_backup", "ALTER TABLE %[1]s."+table+" REPLACE PARTITION ID '%[2]s' FROM %[1]s."+table+"_backup")
			}
		},
	} {
		if out, code := subcommand(t, env, "rewind -to start"); code != 1 || !strings.Contains(out, "members") {
			t.Errorf("while consumers run: %d %s", code, out)
		}
		p.terminate()
		lose()
		to := "start"
		if what == "what came after the backup" {
			to = second.UTC().Format(time.RFC3339)
		}
		if out, code := subcommand(t, env, "rewind -dry-run -to "+to); code != 0 || !strings.Contains(out, "would be read again") {
			t.Errorf("%s, dry run: %d %s", what, code, out)
		}
		out, code := subcommand(t, env, "rewind -to "+to)
		if code != 0 {
			t.Fatalf("%s: %d %s", what, code, out)
		}
		p = startProgram(t, env)
		drained(p)
		mustCount(t, env, "rewound", int64(sent))
		t.Logf("lost %s: %s", what, out[strings.LastIndex(strings.TrimSpace(out), "\n")+1:])
	}
	for args, want := range map[string]string{"": "has to be a time", "-to yesterday": "has to be a time", "-to 1960-01-01T00:00:00Z": "has to be a time", "-to 2100-01-01T00:00:00Z": "has to be a time"} {
		if out, code := subcommand(t, env, "rewind "+args); code != 2 || !strings.Contains(out, want) {
			t.Errorf("%q: %d %s", args, code, out)
		}
	}
}

// TestTornFarBack: an instance dies with as many rounds stored and not committed as there may be, and the last one is in events
// only. The next instance, whose blocks are smaller, meets it among what it reads again, and mends it, although the producer's
// clock is ahead.
func TestTornFarBack(t *testing.T) {
	t.Parallel()
	const rows = 10
	env := faultSpace(t, "KAFKA_PARTITIONS=1", fmt.Sprint("WORKER_BATCH_SIZE=", rows))
	topic := space(env, "KAFKA_TOPIC")
	const events, anHour, uncommitted = 1000, 20, heldBlocks * rows
	begun := (time.Now().Unix()/hourSeconds - events/anHour - 1) * hourSeconds
	kafka, err := kgo.NewClient(kgo.SeedBrokers(kafkaBrokers(t)...))
	if err != nil {
		t.Fatal(err)
	}
	defer kafka.Close()
	var parser eventParser
	p := startProgram(t, env)
	for i := range int64(events) {
		line := fmt.Sprintf(`{"event_name":"far","user_id":"u%d","timestamp":%d}`, i, begun+i/anHour*hourSeconds)
		id, _ := mustParse(t, &parser, line).id(nil)
		ahead := time.Now().Add(5 * time.Minute)
		kafka.Produce(t.Context(), &kgo.Record{Topic: topic, Key: fmt.Appendf(nil, "%x", id), Value: []byte(line), Timestamp: ahead}, nil)
	}
	if err := kafka.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	drained(p)
	p.terminate()
	clickhouseQuery(t, fmt.Sprintf("INSERT INTO %[1]s.events_hourly SELECT * REPLACE (-event_count AS event_count) FROM %[1]s.events_hourly WHERE hour >= %[2]d",
		space(env, "CLICKHOUSE_DATABASE"), begun+(events/anHour-2)*hourSeconds))
	back := kadm.Offsets{}
	back.AddOffset(topic, 0, events-uncommitted, -1)
	if err := kadm.NewClient(kafka).CommitAllOffsets(t.Context(), space(env, "KAFKA_CONSUMER_GROUP"), back); err != nil {
		t.Fatal(err)
	}
	p = startProgram(t, append(env, "WORKER_BATCH_SIZE=1"))
	drained(p)
	mustCount(t, env, "far", events)
}

// TestCommitsRefused: the group's coordinator takes heartbeats and no offsets. No more is stored than the next owner would look at,
// and everything once it takes them again.
func TestCommitsRefused(t *testing.T) {
	t.Parallel()
	brokers, err := kfake.NewCluster(kfake.NumBrokers(2), kfake.GroupMinSessionTimeout(time.Second))
	if err != nil {
		t.Fatal(err)
	}
	defer brokers.Close()
	var refusing atomic.Bool
	refusing.Store(true)
	brokers.ControlKey(int16(kmsg.OffsetCommit), func(r kmsg.Request) (kmsg.Response, error, bool) {
		brokers.KeepControl()
		if !refusing.Load() {
			return nil, nil, false
		}
		req := r.(*kmsg.OffsetCommitRequest)
		resp := req.ResponseKind().(*kmsg.OffsetCommitResponse)
		for _, topic := range req.Topics {
			answer := kmsg.NewOffsetCommitResponseTopic()
			answer.Topic, answer.TopicID = topic.Topic, topic.TopicID
			for _, p := range topic.Partitions {
				refused := kmsg.NewOffsetCommitResponseTopicPartition()
				refused.Partition, refused.ErrorCode = p.Partition, kerr.OffsetMetadataTooLarge.Code
				answer.Partitions = append(answer.Partitions, refused)
			}
			resp.Topics = append(resp.Topics, answer)
		}
		return resp, nil, true
	})
	const rows, events = 10, 3000
	env := faultSpace(t, "KAFKA_BROKERS="+strings.Join(brokers.ListenAddrs(), ","), "KAFKA_PARTITIONS=1", fmt.Sprint("WORKER_BATCH_SIZE=", rows))
	p := startProgram(t, env)
	now := time.Now().Unix()
	postAll(t, p, numbered("uncommitted", events, 1000, func(int) int64 { return now }))
	p.await("refused", time.Minute, func() bool { return strings.Contains(p.log.String(), "commit offsets; nothing more is stored") })
	stored := clickhouseQuery(t, "SELECT count() <= "+fmt.Sprint(heldBlocks*rows+rows*maxShare)+" FROM "+space(env, "CLICKHOUSE_DATABASE")+".events")
	if stored != "1" {
		t.Error("more is stored than the next owner would look at")
	}
	refusing.Store(false)
	drained(p)
	mustCount(t, env, "uncommitted", events)
}

// TestReconcileBesideMend: while the command reads an hour that is torn, an instance mends it. It is mended once.
func TestReconcileBesideMend(t *testing.T) {
	t.Parallel()
	env := faultSpace(t)
	db, topic, group := space(env, "CLICKHOUSE_DATABASE"), space(env, "KAFKA_TOPIC"), space(env, "KAFKA_CONSUMER_GROUP")
	const events = 12000
	begun := (time.Now().Unix()/hourSeconds - 5) * hourSeconds
	p := startProgram(t, env)
	postAll(t, p, numbered("race", events, 1000, func(i int) int64 { return begun + int64(i)%3600 }))
	drained(p)
	p.terminate()
	clickhouseQuery(t, fmt.Sprintf("INSERT INTO %[1]s.events_hourly SELECT * REPLACE (toInt64(-1000) AS event_count) FROM %[1]s.events_hourly LIMIT 1", db))
	kafka, err := kgo.NewClient(kgo.SeedBrokers(kafkaBrokers(t)...))
	if err != nil {
		t.Fatal(err)
	}
	defer kafka.Close()
	admin := kadm.NewClient(kafka)
	committed, err := admin.FetchOffsetsForTopics(t.Context(), group, topic)
	if err != nil {
		t.Fatal(err)
	}
	back := kadm.Offsets{}
	committed.Each(func(o kadm.OffsetResponse) { back.AddOffset(topic, o.Partition, max(0, o.At-50), -1) })
	if err := admin.CommitAllOffsets(t.Context(), group, back); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { // ends with the query, which takes seconds
		hour := timeRange{begun, begun + hourSeconds}
		_, err := reconcile(t.Context(), newStore(settingsFrom(t, append(env, "CLICKHOUSE_USERNAME=slow"))), hour.hours(), 0, false, func(unequal) {})
		ended <- err
	}()
	p.await("the command's insert", time.Minute, func() bool {
		return clickhouseQuery(t, "SELECT count() FROM system.processes WHERE query_id = 'mending "+db+"' AND read_rows > 0") == "1"
	})
	p = startProgram(t, env)
	if err := <-ended; err != nil {
		t.Error(err)
	}
	drained(p)
	mustCount(t, env, "race", events)
}

// TestHeldPartitionsLeave: all that was held has left when the last hour agrees. Rounds go on.
func TestHeldPartitionsLeave(t *testing.T) {
	t.Parallel()
	cfg := settingsFrom(t, newSpace(t))
	st := preparedStore(t, cfg)
	w := idleWorker(10)
	ins := newInserter(st, cfg, &newStats().store, []*worker{w}, w.call, membership{
		alone: func() bool { return true }, committed: func(context.Context, int) error { return nil },
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
	st := preparedStore(t, cfg)
	hour := time.Now().Unix()/hourSeconds - 5
	clickhouseQuery(t, fmt.Sprintf("INSERT INTO %s.events (event_id, event_name, user_id, timestamp) SELECT SHA256(toString(number)), 'many', 'u', %d FROM numbers(100)", st.database, hour*hourSeconds))
	clickhouseQuery(t, fmt.Sprintf("INSERT INTO %[1]s.events_hourly SELECT * REPLACE (toInt64(-30) AS event_count) FROM %[1]s.events_hourly", st.database))
	ctx, stop := context.WithTimeout(t.Context(), time.Minute)
	var others sync.WaitGroup
	defer others.Wait()
	defer stop()
	for n := range 2 {
		others.Go(func() { // ends with stop
			for i := 0; ctx.Err() == nil; i++ {
				st.connected(ctx, func(c asker) error {
					return c.Do(ctx, ch.Query{Body: "SELECT troubles.Sleep(0.3)", QueryID: fmt.Sprint(cfg.kafkaGroup, "-", n, "-", i), Result: proto.Results{{Data: new(proto.ColUInt8)}}})
				})
			}
		})
	}
	reached := false
	ins := newInserter(st, cfg, &newStats().store, nil, newRoundCall(), membership{
		alone: func() bool { return false }, stored: func(map[int32]kgo.EpochOffset) { reached = true },
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
	countedOnce(t, st.database)
}

// TestTornBesideOneInsert: another instance's insert began just before the first look, and stands in events alone ever since. What is
// seen is not mended beside it, however long answers take.
func TestTornBesideOneInsert(t *testing.T) {
	t.Parallel()
	env := newSpace(t)
	preparedStore(t, settingsFrom(t, env))
	between := newProxy(t, clickhouseAddress(t), nil)
	cfg := settingsFrom(t, append(env, "CLICKHOUSE_PORT="+between.port()))
	st, stats := newStore(cfg), &newStats().store
	hour := time.Now().Unix()/hourSeconds - 5
	clickhouseQuery(t, fmt.Sprintf("INSERT INTO %s.events (event_id, event_name, user_id, timestamp) SELECT SHA256(toString(number)), 'one', 'u', %d FROM numbers(100)", st.database, hour*hourSeconds))
	clickhouseQuery(t, "TRUNCATE TABLE "+st.database+".events_hourly")
	ctx, stop := context.WithCancel(t.Context())
	var other sync.WaitGroup
	defer other.Wait()
	defer stop()
	id := cfg.kafkaGroup + "-other"
	other.Go(func() { // ends with stop
		newStore(settingsFrom(t, env)).connected(ctx, func(c asker) error {
			return c.Do(ctx, eachRow(ch.Query{Body: "SELECT sleepEachRow(0.1) FROM system.numbers SETTINGS max_block_size = 1", QueryID: id}, func(int) {}, new(proto.ColUInt8)))
		})
	})
	for clickhouseQuery(t, "SELECT count() FROM system.processes WHERE query_id = '"+id+"'") == "0" {
	}
	ins := newInserter(st, cfg, stats, nil, newRoundCall(), membership{alone: func() bool { return false }})
	for range busyLooks - 1 {
		if _, err := ins.lookAndMend(ctx, []int64{hour}); err != nil {
			t.Fatal(err)
		}
	}
	between.late.Store(int64(200 * time.Millisecond))
	if _, err := ins.lookAndMend(ctx, []int64{hour}); err != nil || stats.mended.Get() > 0 {
		t.Errorf("%v, %d rows mended beside the insert that may be about to add them", err, stats.mended.Get())
	}
}

// TestManyLooks: an instance that has looked at an hour many times, each time in a moment, can still do so.
func TestManyLooks(t *testing.T) {
	t.Parallel()
	cfg := settingsFrom(t, newSpace(t))
	st := preparedStore(t, cfg)
	ins := newInserter(st, cfg, &newStats().store, nil, newRoundCall(), membership{alone: func() bool { return true }})
	ins.atOnce = math.MaxInt/2 + 1 // what one hour after the other had made of it
	for range 3 {
		ins.noteHour(400000)
		ins.next = time.Time{}
		if ins.mend(t.Context()); len(ins.hours) > 0 {
			t.Error("the hour is not looked at")
		}
	}
}

// TestAttachedTwice: a backup's partition is attached beside what is there. An instance that reads all of it again takes the rows
// that are there twice for what they are, and the aggregate stays as it is.
func TestAttachedTwice(t *testing.T) {
	t.Parallel()
	env := newSpace(t)
	db := space(env, "CLICKHOUSE_DATABASE")
	p := startProgram(t, env)
	begun := (time.Now().Unix()/hourSeconds - 5) * hourSeconds
	postAll(t, p, numbered("attached", 400, 400, func(i int) int64 { return begun + int64(i) }))
	drained(p)
	p.terminate()
	clickhouseQuery(t, fmt.Sprintf("CREATE TABLE %[1]s.backup AS %[1]s.events", db))
	part := clickhouseQuery(t, "SELECT DISTINCT partition_id FROM system.parts WHERE active AND database = '"+db+"' AND table = 'events'")
	for _, move := range [][2]string{{"backup", "events"}, {"events", "backup"}} {
		clickhouseQuery(t, fmt.Sprintf("ALTER TABLE %s.%s ATTACH PARTITION ID '%s' FROM %[1]s.%[4]s", db, move[0], part, move[1]))
	}
	if out, code := subcommand(t, env, "rewind -to start"); code != 0 {
		t.Fatal(out)
	}
	p = startProgram(t, env)
	drained(p)
	clickhouseQuery(t, "OPTIMIZE TABLE "+db+".events FINAL")
	mustCount(t, env, "attached", 400)
}
