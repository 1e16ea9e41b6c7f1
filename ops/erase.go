// erase: a user's events go.
//
// First the erasure is remembered: from then on no instance stores what this user did up to then, wherever it comes from. Then the rows
// are deleted and their hours counted anew, and on Kafka goes what can go. Each step can be repeated: a command that was cut off and is
// run again ends as if it had not been. No statement has the user_id in it, and what is remembered is its hash.

package ops

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"flag"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/ClickHouse/ch-go"
	"github.com/ClickHouse/ch-go/proto"
	"github.com/twmb/franz-go/pkg/kadm"
	"github.com/twmb/franz-go/pkg/kgo"
)

// erasureDelay is for how long an instance may store by what it has read of erasures; it looks once a second.
const erasureDelay = 5 * time.Second

func erase(fs *flag.FlagSet) action {
	user := fs.String("user", "", "user_id whose events are to go")
	dryRun := fs.Bool("dry-run", false, "only say what there is of this user")
	return func(ctx context.Context, sys System, _ []string, w io.Writer) error {
		if *user == "" {
			return badArgument{errors.New("-user is needed: the user_id whose events are to go")}
		}
		e := &erasure{System: sys, user: *user, hash: sha256.Sum256([]byte(*user))}
		return sys.exclusively(ctx, *dryRun, func(ctx context.Context) error { return e.run(ctx, *dryRun, w) })
	}
}

// erasure is one user's.
type erasure struct {
	System
	user   string
	hash   [sha256.Size]byte
	rows   int64 // in events
	newest int64 // Unix second of the newest event of this user that was found
	letters,
	retries traces
}

func (e *erasure) run(ctx context.Context, dryRun bool, w io.Writer) error {
	hours, err := e.find(ctx)
	if err != nil {
		return err
	}
	kafka, err := e.Kafka("event-ingestion-erase")
	if err != nil {
		return err
	}
	defer kafka.Close()
	admin := kadm.NewClient(kafka)
	for topic, found := range e.sideTopics() {
		if *found, err = e.trace(ctx, admin, topic); err != nil {
			return err
		}
	}
	fmt.Fprintf(w, "%d rows of %d hours; %d dead letters, %d records on the retry topic\n", e.rows, len(hours), e.letters.records, e.retries.records)
	if dryRun {
		return e.tell(ctx, admin, w)
	}
	upTo, err := e.remember(ctx)
	if err != nil {
		return err
	}
	fmt.Fprintf(w, "what happened up to %s is left out from now on, after a rewind, a replay or an import, too\n", rfc3339(upTo))
	if err := e.delete(ctx, upTo, w); err != nil {
		return fmt.Errorf("%w (run it again: it goes on from here)", err)
	}
	for topic, found := range e.sideTopics() {
		if len(found.before) > 0 {
			if _, err := wholeAnswer(admin.DeleteRecords(ctx, found.before)); err != nil {
				return fmt.Errorf("delete records of topic %s: %w", topic, err)
			}
		}
	}
	if _, err := e.find(ctx); err != nil {
		return err
	}
	if e.rows > 0 && e.newest <= upTo {
		return fmt.Errorf("%d rows of this user have come back: does an instance of an earlier release store, which knows of no erasures?", e.rows)
	}
	return e.tell(ctx, admin, w)
}

func (e *erasure) sideTopics() map[string]*traces {
	return map[string]*traces{e.Topic + suffixes[inDeadLetters]: &e.letters, e.Topic + suffixes[inRetry]: &e.retries}
}

// find counts the user's rows and returns their hours, which ascend.
func (e *erasure) find(ctx context.Context) (hours []int64, err error) {
	if err := e.SyncReplicas(ctx); err != nil {
		return nil, err
	}
	e.rows = 0
	var hour, newest proto.ColUInt32
	var rows proto.ColUInt64
	q := e.aboutUser("SELECT toUnixTimestamp(toStartOfHour(timestamp)) AS second, count(), toUnixTimestamp(max(timestamp)) FROM {events} WHERE {this user} GROUP BY second ORDER BY second")
	err = e.ask(ctx, q, func(i int) {
		hours = append(hours, int64(hour[i]))
		e.rows += int64(rows[i])
		e.newest = max(e.newest, int64(newest[i]))
	}, &hour, &rows, &newest)
	return hours, err
}

// aboutUser is a query with the user beside it: a statement is kept in logs, and what it is sent with is not.
func (e *erasure) aboutUser(sql string) ch.Query {
	var user proto.ColStr
	user.Append(e.user)
	return ch.Query{
		Body:          strings.ReplaceAll(sql, "{this user}", "user_id IN (SELECT id FROM erased)"),
		ExternalTable: "erased",
		ExternalData:  []proto.InputColumn{{Name: "id", Data: &user}},
	}
}

// traces are what is of the user on a side topic.
type traces struct {
	records, noEvent int          // noEvent are those that are no event and have the user_id in them
	newest           time.Time    // of the records
	before           kadm.Offsets // up to where records can be deleted, because nobody needs them, or all are this user's
	stay             int          // records that are not deleted with them
}

// trace looks for the user on a side topic, all of it.
func (e *erasure) trace(ctx context.Context, admin *kadm.Client, topic string) (t traces, err error) {
	var done kadm.OffsetResponses // what is committed of the retry topic has been put back
	if topic == e.Topic+suffixes[inRetry] {
		if done, err = committedOf(ctx, admin, e.Group+suffixes[inRetry], topic); err != nil {
			return t, err
		}
	}
	others := map[int32]bool{} // there was a record of somebody else
	t.before = kadm.Offsets{}
	err = e.readRecords(ctx, topic, "", func(rec *kgo.Record) error {
		_, at, user, err := e.Decode(rec.Value)
		committed, _ := done.Lookup(topic, rec.Partition)
		switch mine := err == nil && string(user) == e.user; {
		case !mine:
			others[rec.Partition] = true
			if err != nil && bytes.Contains(rec.Value, []byte(e.user)) {
				t.noEvent++
			}
		default:
			t.records++
			t.newest = later(t.newest, rec.Timestamp)
			e.newest = max(e.newest, at)
			if t.stay++; !others[rec.Partition] && done == nil || rec.Offset < committed.At {
				t.before.AddOffset(topic, rec.Partition, rec.Offset+1, -1)
				t.stay--
			}
		}
		return nil
	})
	return t, err
}

// remember puts the erasure where the program reads it, and returns the Unix second up to which it goes once no insert can bring rows
// of this user any more.
func (e *erasure) remember(ctx context.Context) (upTo int64, err error) {
	var now int64
	err = e.Connect(ctx, func(do Conn) (err error) { now, err = e.clock(ctx, do); return err })
	if err != nil {
		return 0, err
	}
	upTo = max(now/1000, e.newest) // a sender's clock may be ahead
	err = e.EachServer(ctx, func(do Conn) error {
		return do(ctx, ch.Query{Body: e.SQL(fmt.Sprintf("INSERT INTO {database}.erasures (user, up_to) VALUES (unhex('%x'), %d)", e.hash, upTo))})
	})
	if err != nil {
		return 0, err
	}
	if err := pause(ctx, erasureDelay); err != nil {
		return 0, err
	}
	return upTo, e.awaitInserts(ctx)
}

// delete deletes the user's rows and counts their hours anew, and the hours of an erasure that was cut off.
func (e *erasure) delete(ctx context.Context, upTo int64, w io.Writer) error {
	hours, err := e.find(ctx)
	if err != nil {
		return err
	}
	var hour proto.ColUInt32
	for _, h := range hours {
		hour.Append(uint32(h))
	}
	err = e.EachServer(ctx, func(do Conn) error { // before a row is deleted: nobody would find them again
		err := do(ctx, ch.Query{
			Body:          e.SQL("INSERT INTO {database}.erasing SELECT hour FROM hours"),
			ExternalTable: "hours",
			ExternalData:  []proto.InputColumn{{Name: "hour", Data: &hour}},
		})
		if err != nil {
			return err
		}
		var all proto.ColUInt32
		return do.rows(ctx, ch.Query{Body: e.SQL("SELECT DISTINCT toUnixTimestamp(hour) FROM {database}.erasing")}, func(i int) { hours = append(hours, int64(all[i])) }, &all)
	})
	if err != nil {
		return err
	}
	slices.Sort(hours)
	hours = slices.Compact(hours)
	if err := e.EachServer(ctx, func(do Conn) error { return e.deleteRows(ctx, do, upTo) }); err != nil {
		return err
	}
	if err := e.finishRecount(ctx, w); err != nil {
		return err
	}
	if err := e.recountHours(ctx, hours, w); err != nil {
		return err
	}
	return e.EachServer(ctx, func(do Conn) error { return do(ctx, ch.Query{Body: e.SQL("TRUNCATE TABLE {database}.erasing")}) })
}

// deleteRows deletes the user's rows on a server: their months alone are looked through.
func (e *erasure) deleteRows(ctx context.Context, do Conn, upTo int64) error {
	var partition proto.ColStr
	var partitions []string
	q := e.aboutUser("SELECT DISTINCT CAST(_partition_id, 'String') FROM {database}.events WHERE {this user}")
	q.Body = e.SQL(q.Body)
	if err := do.rows(ctx, q, func(i int) { partitions = append(partitions, partition.Row(i)) }, &partition); err != nil {
		return err
	}
	for _, p := range partitions {
		err := do(ctx, ch.Query{Body: e.SQL(fmt.Sprintf("ALTER TABLE {database}.events DELETE IN PARTITION ID '%s' WHERE SHA256(user_id) = unhex('%x') AND timestamp <= %d SETTINGS mutations_sync = 2",
			p, e.hash, upTo))})
		if err != nil {
			return err
		}
	}
	return nil
}

// tell says what stays on Kafka, and until when.
func (e *erasure) tell(ctx context.Context, admin *kadm.Client, w io.Writer) error {
	kept, err := keptFor(ctx, admin, e.Topic, e.Topic+suffixes[inDeadLetters], e.Topic+suffixes[inRetry])
	if err != nil {
		return err
	}
	fmt.Fprintf(w, "%s: records of this user stay %s\n", e.Topic, until(time.Now(), kept[e.Topic]))
	for _, suffix := range []string{suffixes[inDeadLetters], suffixes[inRetry]} {
		topic := e.Topic + suffix
		found := e.sideTopics()[topic]
		if found.stay > 0 {
			fmt.Fprintf(w, "%s: %d records of this user stay %s, because Kafka deletes none from between others\n", topic, found.stay, until(found.newest, kept[topic]))
		}
		if found.noEvent > 0 {
			fmt.Fprintf(w, "%s: %d records that are no event have the user_id in them, and stay %s\n", topic, found.noEvent, until(time.Now(), kept[topic]))
		}
	}
	fmt.Fprintln(w, "none of them comes back into the tables; ClickHouse removes the files of deleted rows within 8 minutes")
	return nil
}

// keptFor is the retention of topics: -1 for one that keeps everything.
func keptFor(ctx context.Context, admin *kadm.Client, topics ...string) (map[string]time.Duration, error) {
	configs, err := admin.DescribeTopicConfigs(ctx, topics...)
	if err != nil {
		return nil, fmt.Errorf("settings of the topics: %w", err)
	}
	kept := map[string]time.Duration{}
	for _, of := range configs {
		kept[of.Name] = -1
		for _, c := range of.Configs {
			if ms, err := strconv.ParseInt(c.MaybeValue(), 10, 64); err == nil && c.Key == "retention.ms" && ms >= 0 {
				kept[of.Name] = time.Duration(min(ms, int64(1<<63-1)/int64(time.Millisecond))) * time.Millisecond
			}
		}
		err = cmp.Or(err, of.Err)
	}
	return kept, err
}

func until(written time.Time, kept time.Duration) string {
	if kept < 0 {
		return "for ever: the topic has no retention.ms"
	}
	return "until " + rfc3339(written.Add(kept).Unix()) + ", by the topic's retention.ms"
}

func rfc3339(second int64) string { return time.Unix(second, 0).UTC().Format(time.RFC3339) }

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// erased are the erasures that are remembered: the Unix second up to which what a user did is erased, by the hash of user_id.
type erased map[[sha256.Size]byte]int64

// erasures reads which there are. Tables of an earlier release have none.
func (sys System) erasures(ctx context.Context) (erased, error) {
	all := erased{}
	var user proto.ColFixedStr32
	var upTo proto.ColUInt32
	err := sys.ask(ctx, ch.Query{Body: "SELECT user, toUnixTimestamp(max(up_to)) FROM {erasures} GROUP BY user"}, func(i int) { all[user[i]] = int64(upTo[i]) }, &user, &upTo)
	if ch.IsErr(err, proto.ErrUnknownTable) {
		return all, nil
	}
	return all, err
}

// has says whether an event is one of those.
func (e erased) has(user []byte, at int64) bool {
	if len(e) == 0 { // Fast path: a hash of each record would be what an audit costs
		return false
	}
	upTo, is := e[sha256.Sum256(user)]
	return is && at <= upTo
}

// count counts the rows of erased users in a range: a record that was read, or a restored backup, has brought them back.
func (e erased) count(ctx context.Context, sys System, r timeRange) (n int64, err error) {
	if len(e) == 0 {
		return 0, nil
	}
	var users, user proto.ColFixedStr32
	var at proto.ColUInt32
	var rows proto.ColUInt64
	for hash := range e {
		users.Append(hash)
	}
	err = sys.ask(ctx, ch.Query{
		Body: fmt.Sprintf("SELECT SHA256(user_id) AS hash, toUnixTimestamp(timestamp) AS second, count() FROM {events} WHERE timestamp >= %d AND timestamp < %d"+
			" AND SHA256(user_id) IN (SELECT user FROM erased) GROUP BY hash, second", r.from, r.to),
		ExternalTable: "erased",
		ExternalData:  []proto.InputColumn{{Name: "user", Data: &users}},
	}, func(i int) {
		if int64(at[i]) <= e[user[i]] {
			n += int64(rows[i])
		}
	}, &user, &at, &rows)
	return n, err
}
