// What a fault may have left: an hour of events_hourly that does not agree with events, and a part that cannot be read.
//
// An insert fills events and, through the view, events_hourly; ClickHouse can die, or fail, between the two. So the hours
// of an insert without an answer, and of records that a former owner may have been inserting when it died, are compared
// and mended before the offsets of their rounds are committed: whatever dies meanwhile, somebody reads the records again
// and compares again. mend.go owns the hours and the offsets that wait for them, and knows which inserts may still be at work.
// A part whose files are broken is not mended here: mend.go says which one it is, and what brings its rows back.

package main

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"math"
	"math/rand/v2"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ClickHouse/ch-go"
	"github.com/ClickHouse/ch-go/proto"
	"github.com/twmb/franz-go/pkg/kgo"

	"github.com/event-ingestion/event-ingestion/internal/questions"
	"github.com/event-ingestion/event-ingestion/internal/troubles"
)

const (
	// mendInterval is the least time from when every hour agreed to the next comparison, and mendShare how many times the last one's
	// duration: it counts the hours whole. Hours that are left wait only as long as the last comparison took: offsets wait for them.
	mendInterval = time.Second
	mendShare    = 10
	// mendTick is the least time between two comparisons of which the first did not settle it.
	mendTick = 100 * time.Millisecond
	// busyLooks is how many comparisons in a row have to find a difference where somebody always inserts.
	busyLooks = 10
	// A comparison is of lookHours to begin with: rounds wait for it. It is of twice as many after one that took less than lookTime, or
	// that counted for less than half of its time: then more hours cost little more.
	lookHours = 24
	lookTime  = 200 * time.Millisecond
	// heldBlocks is how many blocks of WORKER_BATCH_SIZE of a worker may be stored and not committed: what a next owner takes for
	// read again, see rereadBlocks, has to reach as far.
	heldBlocks = 80
)

// mender has the hours to compare and the offsets that wait for them. Only the inserter's goroutine uses it.
type mender struct {
	db      *clickhouse
	conn    asker // the inserter's
	inserts *insertsAtWork
	alone   func() bool                     // this instance has all partitions
	release func(map[int32]kgo.EpochOffset) // these may be committed, by partition
	told    func(error)                     // what every comparison says, nil included
	mended  func(rows int)                  // counts

	hours    map[int64]struct{}        // by Unix hour
	held     map[int32]kgo.EpochOffset // by partition: what may be committed when no hour is left
	heldRows int                       // at most so many of a worker have been stored since there is an hour to compare
	next     time.Time                 // of the next comparison
	atOnce   int                       // hours of the next comparison
	looked   time.Duration             // for how long the last one counted
	quiet    []string                  // differences, by the last comparison in which nobody inserted
	last     []string                  // differences, by the last comparison
	since    time.Time                 // of the first comparison of those that found them
	times    int                       // how many in a row these are
	tried    []string                  // of them, what was mended last
	trusted  bool                      // the last comparison found none
}

// noteHour has the hour compared, and what is held wait for it.
func (m *mender) noteHour(hour int64) {
	if _, noted := m.hours[hour]; !noted {
		m.hours[hour] = struct{}{}
		m.trusted = false
	}
}

// hold keeps offsets of rows that are stored, rows of a worker at most, until no hour is left to compare.
func (m *mender) hold(offsets map[int32]kgo.EpochOffset) { maps.Copy(m.held, offsets) }

// compareHours is what fails when a comparison does.
const compareHours = "compare hours of events_hourly with events; offsets wait"

// mend lets what is held be committed, when every noted hour agrees. It takes its turn between rounds, so that no insert
// of this instance runs. Where other instances insert, a difference is believed that two comparisons in a row have found, each in a
// moment in which nobody inserted, or many, after every insert that was at work at the first one has ended: an insert stands
// in events alone for a moment. Agreement is believed that two comparisons in a row have found.
func (m *mender) mend(ctx context.Context) {
	if len(m.hours) > 0 && !time.Now().Before(m.next) {
		started := time.Now()
		hours := slices.Sorted(maps.Keys(m.hours)) // the oldest first
		hours = hours[:min(len(hours), m.atOnce)]
		agree, err := m.compare(ctx, hours)
		took := time.Since(started)
		pause := max(mendTick, took)
		if agree {
			for _, hour := range hours {
				delete(m.hours, hour)
			}
			pause = took
			if m.atOnce = max(lookHours, 2*len(hours)); took > lookTime && m.looked > took/2 {
				m.atOnce = lookHours
			}
		}
		m.told(err)
		if err != nil {
			m.atOnce = max(1, m.atOnce/2) // it may have taken too long
		}
		if err != nil || len(m.hours) == 0 {
			pause = max(mendInterval, mendShare*took)
		}
		m.next = time.Now().Add(pause)
	}
	if len(m.hours) == 0 {
		if len(m.held) > 0 {
			m.release(m.held)
			clear(m.held)
		}
		m.heldRows = 0
	}
}

// compare says whether the hours agree, and mends them. A mending is believed when the next comparison finds nothing.
func (m *mender) compare(ctx context.Context, hours []int64) (agree bool, err error) {
	// What a command mends it may have found before we mended it: nothing is believed beside it, nor while hours are recounted.
	commands, err := askNumber(ctx, m.conn, ch.Query{
		Body: m.db.sql("SELECT toUInt64(assumeNotNull((SELECT count() FROM {processes} WHERE initial_query_id = {id:String})" +
			fmt.Sprintf(" + (SELECT count() FROM {database}.recounts WHERE first <= %d AND last >= %d)))", hours[len(hours)-1]*hourSeconds, hours[0]*hourSeconds)),
		Parameters: []proto.Parameter{questions.Parameter("id", m.db.mendingID())},
	})
	if err != nil || commands > 0 {
		return false, err
	}
	if err := m.db.syncReplicas(ctx); err != nil {
		return false, err
	}
	differing := func(final string) string {
		return fmt.Sprintf(differences, final, inHours(hours), "(event_count != 0 OR id_sum != 0)")
	}
	alone, started := m.alone(), time.Now()
	before, err := m.inserts.await(ctx, m.conn)
	if err != nil {
		return false, err
	}
	looking := time.Now()
	found, err := m.look(ctx, differing(""))
	m.looked = time.Since(looking)
	if err == nil && len(found) > 0 && slices.Equal(found, m.tried) { // to no avail: a restored backup may have rows twice, which count once
		found, err = m.look(ctx, differing("FINAL"))
	}
	if err != nil {
		return false, err
	}
	if !slices.Equal(found, m.last) {
		m.last, m.since, m.times = found, started, 0
	}
	streak := time.Since(m.since) // before the question: its answer takes time, and is as old as the question
	after, err := m.inserts.await(ctx, m.conn)
	if err != nil {
		return false, err
	}
	quiet := alone || before == 0 && after == 0
	m.times++
	if len(found) == 0 {
		agree = quiet || m.trusted
		if m.quiet, m.trusted = nil, !agree; agree {
			m.tried = nil
		}
		return agree, nil
	}
	m.trusted = false
	certain := alone || quiet && slices.Equal(found, m.quiet) || m.times >= busyLooks && after < streak
	if quiet {
		m.quiet = found
	}
	if !certain {
		return false, nil
	}
	slog.Warn("events_hourly does not agree with events after a fault, mending", "rows", len(found), "hours", len(hours), "first hour", time.Unix(hours[0]*hourSeconds, 0).UTC().Format(time.RFC3339))
	m.mended(len(found))
	m.tried = found
	return false, m.insertDifferences(ctx, differing("FINAL"), found)
}

// look counts hours in both tables and returns where they differ.
func (m *mender) look(ctx context.Context, differing string) (found []string, err error) {
	var text proto.ColStr
	err = m.conn.Do(ctx, questions.EachRow(ch.Query{
		Body: m.db.sql("SELECT " + differenceText + " AS text FROM " + differing + " ORDER BY text"),
	}, func(i int) { found = append(found, text.Row(i)) }, &text))
	return found, err
}

// insertDifferences gives events_hourly what it lacks, and takes back what it has too much of: just what was found, if that is
// what it still finds. Counts and states of all servers are added up, so it may stand on any.
func (m *mender) insertDifferences(ctx context.Context, differing string, found []string) error {
	var text proto.ColStr
	text.AppendArr(found)
	return m.conn.Do(ctx, ch.Query{
		QueryID:       m.inserts.newID(),
		Body:          m.db.sql(addDifferences + differing + " WHERE " + differenceText + " IN (SELECT text FROM found)"),
		ExternalTable: "found",
		ExternalData:  []proto.InputColumn{{Name: "text", Data: &text}},
	})
}

// differences is a subquery: events, read with FINAL or without, minus events_hourly, of the hours and of what differs that two
// conditions name. What a query over it does not select is not computed.
//
// User states do not change when a user is added twice, and event_count is a signed sum, id_sum one that overflows, so one statement that inserts the
// difference mends all; a second time it does nothing.
const differences = `(
SELECT event_name, channel, hour, {added up}, sum(has) AS aggregated, max(written) AS last_written
FROM
(
    SELECT {counted}, toInt64(0) AS has, max(created_at) AS written
    FROM {events} %[1]s WHERE %[2]s
    GROUP BY event_name, channel, hour
    UNION ALL
    SELECT event_name, channel, hour, -event_count, unique_users_state, -revenue, campaigns_state, last_at, bitNot(id_sum) + 1, event_count, toDateTime64(0, 3, 'UTC')
    FROM {events_hourly} WHERE %[2]s
)
GROUP BY event_name, channel, hour
HAVING %[3]s)`

const (
	// differenceText is the SQL for a row of differences as text: how many events events_hourly lacks, or has too many.
	differenceText = "toString((event_name, channel, hour, event_count, id_sum))"
	// addDifferences is the statement that mends, with differences behind it.
	addDifferences = "INSERT INTO {database}.events_hourly (event_name, channel, hour, {counts}) SELECT event_name, channel, hour, {counts} FROM "
)

// inHours is the SQL for hour being one of these.
func inHours(hours []int64) string {
	var list []string
	for _, hour := range hours {
		list = append(list, strconv.FormatInt(hour*hourSeconds, 10))
	}
	return "hour IN (" + strings.Join(list, ",") + ")"
}

// syncReplicas waits until each server has what the other replicas of its shard have acknowledged.
func (c *clickhouse) syncReplicas(ctx context.Context) error {
	if !c.replicated.Load() { // Fast path
		return nil
	}
	return c.eachServer(ctx, func(_ *clickhouse, conn asker) error {
		for _, table := range []string{"events", "events_hourly"} {
			if err := conn.Do(ctx, ch.Query{Body: "SYSTEM SYNC REPLICA " + c.database + "." + table + " LIGHTWEIGHT"}); err != nil {
				return fmt.Errorf("wait for what other replicas have: %w", err)
			}
		}
		return nil
	})
}

// askNumber runs a query that answers one UInt64.
func askNumber(ctx context.Context, a asker, q ch.Query) (n uint64, err error) {
	var answer proto.ColUInt64
	answered := false
	err = a.Do(ctx, questions.EachRow(q, func(i int) { n, answered = answer[i], true }, &answer))
	if err == nil && !answered {
		err = fmt.Errorf("no number was answered to %s", q.Body)
	}
	return n, err
}

// mendingID is the id of a command's mending: ClickHouse refuses a second one beside it, such as beside that of a command that was
// killed. No group's inserts have a space there.
func (c *clickhouse) mendingID() string { return "mending " + c.database }

// insertsAtWork knows the inserts of the group's instances by their query ids, which begin with the group's name.
type insertsAtWork struct {
	db     *clickhouse
	group  string                    // how all of them begin
	mine   string                    // and those of this inserter
	cameAt atomic.Pointer[time.Time] // of partitions whose former owner's last insert was not waited out yet
}

func newInsertsAtWork(db *clickhouse, group string) *insertsAtWork {
	return &insertsAtWork{db: db, group: group + "-", mine: group + "-" + strconv.FormatUint(rand.Uint64(), 36) + "-"}
}

// newID is a new query id of this inserter's.
func (a *insertsAtWork) newID() string { return a.mine + strconv.FormatUint(rand.Uint64(), 36) }

// await waits until no insert is at work that may still add rows to this instance's partitions: none of its own, whose
// answer may have been lost, and none of others that was running when partitions came here; the last one of an instance that was
// killed may still be. It returns for how long others have been inserting, the one that began first; 0 when there is none.
func (a *insertsAtWork) await(ctx context.Context, conn asker) (others time.Duration, err error) {
	for attempt := 0; ; attempt++ {
		since := time.Duration(math.MaxInt64)
		if came := a.cameAt.Load(); came != nil {
			since = time.Since(*came)
		}
		var waitFor, longest proto.ColUInt64
		busy := false
		err := conn.Do(ctx, questions.EachRow(ch.Query{
			Body: a.db.sql("SELECT countIf(startsWith(initial_query_id, {mine:String}) OR elapsed > {since:Float64}), toUInt64(max(1 + elapsed * 1000))" +
				" FROM {processes} WHERE startsWith(initial_query_id, {group:String})"),
			Parameters: []proto.Parameter{questions.Parameter("group", a.group), questions.Parameter("mine", a.mine), questions.Parameter("since", fmt.Sprint(since.Seconds()))},
		}, func(i int) {
			busy, others = waitFor[i] > 0, time.Duration(longest[i])*time.Millisecond
		}, &waitFor, &longest))
		if err != nil {
			return 0, err
		}
		if !busy {
			return others, nil
		}
		if attempt == 20 { // a second
			slog.Info("waiting for an insert that ClickHouse still works at")
		}
		if err := troubles.Sleep(ctx, mendTick/2); err != nil {
			return 0, err
		}
	}
}

// corruptions are ClickHouse's codes for a damaged file.
var corruptions = []proto.Error{
	proto.ErrCorruptedData, proto.ErrChecksumDoesntMatch, proto.ErrCannotReadAllData, proto.ErrAttemptToReadAfterEOF,
	proto.ErrCannotDecompress, proto.ErrBadSizeOfFileInDataPart, proto.ErrNoFileInDataPart,
}

// rowless are ClickHouse's codes for what is wrong with tables, settings, disks and servers: their texts have nothing of a row. So do
// those for a damaged file.
var rowless = append([]proto.Error{
	proto.ErrUnknownTable, proto.ErrUnknownDatabase, proto.ErrUnknownIdentifier, proto.ErrNoSuchColumnInTable, proto.ErrTableIsReadOnly, proto.ErrReadonly,
	proto.ErrNotEnoughSpace, proto.ErrMemoryLimitExceeded, proto.ErrTooManyParts, proto.ErrTooManyPartitions, proto.ErrTimeoutExceeded, proto.ErrSocketTimeout,
	proto.ErrNetworkError, proto.ErrAllConnectionTriesFailed, proto.ErrAccessDenied, proto.ErrAuthenticationFailed, proto.ErrSettingConstraintViolation,
	proto.ErrUnknownSetting, proto.ErrQueryWasCancelled, proto.ErrTooFewLiveReplicas, proto.ErrNoZookeeper, proto.ErrKeeperException, proto.ErrAborted,
	proto.ErrTableIsDropped, proto.ErrCannotFsync, proto.ErrCannotWriteToFile, proto.ErrCannotOpenFile,
}, corruptions...)

// ofRow is where a value of a row may begin in ClickHouse's other texts.
var ofRow = regexp.MustCompile("['\"`0-9]|(?i)\\b(string|value|text)s? ")

// withoutValues is what ClickHouse says of an insert, up to where values of rows begin.
func withoutValues(e *ch.Exception) string {
	text := firstLine(e.Message)
	const values = "Column values: " // of a constraint, behind its expression
	if before, _, has := strings.Cut(text, values); has {
		return before + values + "not shown"
	}
	if begin := ofRow.FindStringIndex(text); begin != nil && !slices.Contains(rowless, e.Code) {
		return text[:begin[0]] + "… (what follows may be of a row: it is in ClickHouse's log)"
	}
	return text
}

// readingPart finds the part's name in ClickHouse's messages for these errors.
var readingPart = regexp.MustCompile(`while reading from part \S*?/([^/\s]+)/(?:\w+\.proj/)? in table \S+\.(events|events_hourly) \(`)

// partName is a part of a table.
type partName struct{ table, name string }

// brokenParts are parts of ClickHouse whose files cannot be read. A disk that fills to the last byte may leave one, usually a merged
// part. For old_parts_lifetime, 8 minutes, the parts that were merged into it still exist; after that only Kafka has the rows.
type brokenParts struct {
	database string
	total    atomic.Int64 // event_ingestion_broken_parts_total
	mu       sync.Mutex   // guards what follows
	known    []partName
	live     []partName // of them, those that are in their tables
}

// note takes the error of every query. It counts and logs a part once, with what brings its rows back.
func (b *brokenParts) note(err error) {
	if !ch.IsErr(err, corruptions...) {
		return
	}
	m := readingPart.FindStringSubmatch(err.Error())
	if m == nil {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	p := partName{m[2], m[1]}
	if slices.Contains(b.known, p) {
		return
	}
	b.known, b.live = append(b.known, p), append(b.live, p)
	b.total.Add(1)
	later := "after that stop all instances and run `event-ingestion rewind -to start`: Kafka has the rows"
	if p.table == "events_hourly" {
		later = "after that run `event-ingestion reconcile`, with -from for what is older than 31 days: events has the rows"
	}
	slog.Error("ClickHouse has a broken part", "table", p.table, "part", p.name, "why", firstLine(err.Error()),
		"within 8 minutes of its merge run", fmt.Sprintf("DETACH TABLE %[1]s.%[2]s SYNC; ATTACH TABLE %[1]s.%[2]s", b.database, p.table), "then", later)
}

// words is for /ready: empty when no broken part is in its table.
func (b *brokenParts) words() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.live) == 0 {
		return ""
	}
	p := b.live[0]
	return fmt.Sprintf("answers, but part %[1]s of %[3]s is broken (%[4]d in all): DETACH TABLE %[2]s.%[3]s SYNC; ATTACH TABLE %[2]s.%[3]s brings its rows back for 8 minutes after its merge, "+
		"later `event-ingestion rewind` does", p.name, b.database, p.table, len(b.live))
}

// recheck forgets the parts that somebody has put aside.
func (b *brokenParts) recheck(ctx context.Context, db *clickhouse, conn asker) error {
	if b.words() == "" { // Fast path
		return nil
	}
	var table, name proto.ColStr
	there := map[partName]bool{}
	err := conn.Do(ctx, questions.EachRow(ch.Query{
		Body: db.sql("SELECT table, name FROM {parts} WHERE active AND database = '{database}'"),
	}, func(i int) { there[partName{table.Row(i), name.Row(i)}] = true }, &table, &name))
	if err == nil {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.live = slices.DeleteFunc(b.live, func(p partName) bool { return !there[p] })
	}
	return err
}
