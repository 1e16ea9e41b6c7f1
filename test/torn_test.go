// Stores that are torn: one of the two tables has what the other lacks, and is mended, whoever else is at it.

package test

import (
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/twmb/franz-go/pkg/kadm"
	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kfake"
	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// heldBlocks is how many full blocks of a partition are stored at most and not committed: the next owner looks at as many. A
// partition that has much to store has maxShare blocks at once.
const heldBlocks, maxShare = 80, 8

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
	p := startProgram(t, env)
	for i := range int64(events) {
		user, at := fmt.Sprint("u", i), begun+i/anHour*hourSeconds
		line := fmt.Sprintf(`{"event_name":"far","user_id":%q,"timestamp":%d}`, user, at)
		ahead := time.Now().Add(5 * time.Minute)
		kafka.Produce(t.Context(), &kgo.Record{Topic: topic, Key: []byte(eventID("far", user, at, "")), Value: []byte(line), Timestamp: ahead}, nil)
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
	p.await("quiet for long enough", 30*time.Second, func() bool {
		out, _ := subcommand(t, env, "reconcile -dry-run")
		return strings.Contains(out, "1 rows of events_hourly differ")
	})
	ended := make(chan string, 1)
	go func() { // ends with the query, which takes seconds
		out, code := subcommand(t, append(env, "CLICKHOUSE_USERNAME=slow"), fmt.Sprint("reconcile -from ", begun, " -to ", begun+hourSeconds))
		ended <- fmt.Sprint(code, out)
	}()
	p.await("the command's insert", time.Minute, func() bool {
		return clickhouseQuery(t, "SELECT count() FROM system.processes WHERE query_id = 'mending "+db+"' AND read_rows > 0") == "1"
	})
	p = startProgram(t, env)
	if out := <-ended; !strings.HasPrefix(out, "0") {
		t.Error(out)
	}
	drained(p)
	mustCount(t, env, "race", events)
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
