// Mending the aggregate: events_hourly made equal to events, row by row or as a whole.
//
// User states do not change when a user is added twice, and event_count is a signed sum, so one statement that inserts the
// difference mends all; a second time it does nothing. What a fault can have torn is mended by itself, see mend.go; any
// range by the subcommand reconcile, which reconcile.go owns.
//
// When what is counted of events changes (the precision of the user states, what is revenue), existing rows cannot be
// converted: `reconcile -rebuild` counts the events again, while new ones keep coming in. Each row of events belongs to exactly
// one of two counts, by its created_at, which ClickHouse sets once per insert: rows from before a moment are counted day by
// day, later rows by a view of the new table's own. The old table stays up to date and answers until the two are exchanged.
//
// The exchange has to swap the views, too, which takes more than one step. So inserts stop for a moment: the new table is
// renamed, its view has no target, and ClickHouse refuses an insert into events before it has written any of it. The inserter
// repeats the round. A crash in that moment leaves inserts stopped; the next `reconcile -rebuild` finds the renamed table and
// goes on from there. After an earlier crash it starts over.

package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"text/tabwriter"
	"time"

	"github.com/ClickHouse/ch-go"
	"github.com/ClickHouse/ch-go/proto"

	"github.com/event-ingestion/event-ingestion/troubles"
)

// quietSeconds is how long nothing may have been written to an hour before it is trusted: an insert fills the raw table
// and the aggregate one after the other, and what is seen in between is no difference.
const quietSeconds = 10

// differences is a subquery: events, read with FINAL or without, minus events_hourly or the table that is to become it, of the
// hours and of what differs that two conditions name. What a query over it does not select is not computed.
const differences = `(
SELECT event_name, channel, hour, {added up}, sum(has) AS aggregated, max(written) AS last_written
FROM
(
    SELECT {counted}, toInt64(0) AS has, max(created_at) AS written
    FROM {database}.events %[1]s WHERE %[2]s
    GROUP BY event_name, channel, hour
    UNION ALL
    SELECT event_name, channel, hour, -event_count, unique_users_state, -revenue, campaigns_state, last_at, event_count, toDateTime64(0, 3, 'UTC')
    FROM {database}.%[4]s WHERE %[2]s
)
GROUP BY event_name, channel, hour
HAVING %[3]s)`

// addDifferences is the statement that mends a table, with differences behind it.
const addDifferences = "INSERT INTO {database}.%s (event_name, channel, hour, {counts}) SELECT event_name, channel, hour, {counts} FROM "

func reconcileTool(fs *flag.FlagSet) toolRun {
	var r timeRange
	r.flags(fs)
	dryRun := fs.Bool("dry-run", false, "only print what differs")
	asJSON := fs.Bool("json", false, "what differs as a JSON object a line, and nothing else")
	anew := fs.Bool("rebuild", false, "make the whole table anew from events, as schema.sql says it now, while events go on coming in")
	return func(ctx context.Context, cfg *settings, _ []string, w io.Writer) error {
		if *anew {
			if fs.NFlag() > 1 {
				return badArgument{errors.New("-rebuild takes no other flag")}
			}
			if err := exclusively(ctx, cfg, false, func(ctx context.Context) error { return rebuildHourly(ctx, cfg, w) }); err != nil {
				return fmt.Errorf("-rebuild: %w (run it again: it finishes, or begins anew)", err)
			}
			return nil
		}
		if err := r.check(); err != nil {
			return err
		}
		ctx, cancel := context.WithTimeout(ctx, time.Hour)
		defer cancel()
		return exclusively(ctx, cfg, *dryRun, func(ctx context.Context) error {
			t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
			head := "HOUR\tEVENT\tCHANNEL\tIN EVENTS\tIN EVENTS_HOURLY\n"
			n, err := reconcile(ctx, newStore(cfg), r.hours(), quietSeconds, *dryRun, func(d unequal) {
				if *asJSON {
					json.NewEncoder(w).Encode(d)
					return
				}
				fmt.Fprintf(t, "%s%s\t%s\t%s\t%d\t%d\n", head, d.Hour, d.Event, d.Channel, d.InEvents, d.InHourly)
				head = ""
			})
			t.Flush()
			if err == nil && !*asJSON {
				fmt.Fprintf(w, "%d rows of events_hourly differ from events\n", n)
			}
			return err
		})
	}
}

// hours is the SQL for the hours that the range touches.
func (r timeRange) hours() string {
	from, to := r.from/hourSeconds*hourSeconds, (r.to+hourSeconds-1)/hourSeconds*hourSeconds
	return fmt.Sprintf("hour >= %d AND hour < %d", max(from, 0), min(to, maxUnixSeconds))
}

// unequal is a row of events_hourly that does not agree with events.
type unequal struct {
	Hour     string `json:"hour"`
	Event    string `json:"event_name"`
	Channel  string `json:"channel"`
	InEvents int64  `json:"in_events"`
	InHourly int64  `json:"in_events_hourly"`
}

// mendingID is the id of a command's mending: ClickHouse refuses a second one beside it, such as beside that of a command that was
// killed. No group's inserts have a space there.
func (s *store) mendingID() string { return "mending " + s.database }

// reconcile hands the rows that differ, shard by shard, to each and, unless dryRun, mends them. It returns how many there were.
// hours is a condition; what was written within the last quiet seconds is left out.
func reconcile(ctx context.Context, st *store, hours string, quiet int, dryRun bool, each func(unequal)) (rows int, err error) {
	shards, err := st.shards(ctx)
	failures := []error{err}
	for _, sh := range shards {
		before := rows
		failures = append(failures, sh.session(ctx, io.Discard, func(s *session) {
			s.do(sh.readStates)
			s.do(sh.syncReplica)
			written := s.now() - int64(quiet)*1000
			s.awaitInserts(written, never) // one that is still at work stands in one of the tables, perhaps
			differing := fmt.Sprintf(differences, "FINAL", hours,
				fmt.Sprintf("(event_count != 0 OR revenue != 0) AND last_written <= fromUnixTimestamp64Milli(%d)", written), "events_hourly")
			var name, channel, hour proto.ColStr
			var missing, has proto.ColInt64
			s.ask(ch.Query{
				Body: "SELECT CAST(event_name, 'String') AS name, CAST(channel, 'String') AS ch, " + isoHour("hour") +
					", event_count, aggregated FROM " + differing + " ORDER BY hour, name, ch",
			}, func(i int) {
				rows++
				each(unequal{hour.Row(i), name.Row(i), channel.Row(i), has[i] + missing[i], has[i]})
			}, &name, &channel, &hour, &missing, &has)
			if rows > before && !dryRun {
				s.insert(ch.Query{Body: fmt.Sprintf(addDifferences, "events_hourly") + differing, QueryID: sh.mendingID()})
			}
		}))
	}
	return rows, errors.Join(failures...)
}

const (
	tableNext    = "events_hourly_next"    // is being filled
	tableRebuilt = "events_hourly_rebuilt" // is filled: the exchange has begun
	viewNext     = "events_hourly_next_mv"
	// firstLead is how far ahead the moment lies that divides the two counts: inserts already running when the view was made
	// do not feed it, and must have ended by then. It doubles until they have.
	firstLead = time.Second
	// replicaSkew is how far the clocks of several replicas may be apart.
	replicaSkew = time.Second
	// rebuildPoll is the time between two looks at what is running.
	rebuildPoll = 50 * time.Millisecond
	// never is a time that does not come.
	never = 1 << 62
)

// rebuildHourly makes events_hourly what schema.sql now says. It takes as long as ClickHouse needs to read events once.
func rebuildHourly(ctx context.Context, cfg *settings, out io.Writer) error {
	shards, err := newStore(cfg).prepare(ctx, 0) // in the precision that the tables have
	if err != nil {
		return err
	}
	if len(shards) > 1 && shards[0].replicated {
		return errors.New("several shards of replicas cannot be made anew by this command")
	}
	for _, st := range shards {
		st.userBits.Store(wantedUserBits) // whatever the old table has
	}
	// The tables of all shards are filled before the first is exchanged: queries over shards of two precisions fail.
	return inTurn(ctx, shards, out, makeNext, exchangeHourly)
}

// makeNext makes and fills the new table, unless that was done before.
func makeNext(s *session) {
	if s.has(tableRebuilt) {
		return
	}
	if s.has(eventsMoved) {
		s.fail("a reshard has begun: let it finish first")
	}
	s.do(s.store.syncReplica)
	since := beginNext(s)
	s.fill("events", tableNext, fmt.Sprintf("created_at < fromUnixTimestamp64Milli(%d)", since))
	s.syncReplicas(tableNext)
	if s.sinceOf(tableNext) != since {
		s.fail("another rebuild has begun")
	}
}

// beginNext makes the new table and its view. since, in Unix milliseconds, divides the two counts: when it returns it has
// passed, and every row from before it is visible.
func beginNext(s *session) (since int64) {
	const view = "CREATE MATERIALIZED VIEW {database}.%s{on cluster} TO {database}.%s AS SELECT {counted} FROM {database}.events" +
		" WHERE created_at >= fromUnixTimestamp64Milli(%d) GROUP BY event_name, channel, hour"
	// The clock may have been ahead when the present table was made, and exchangeHourly would take it for the newer one.
	s.change("ALTER TABLE {database}.events_hourly{on cluster} MODIFY COMMENT '0'")
	for lead := firstLead; ; lead *= 2 {
		s.say("the new table is made")
		s.change("DROP VIEW IF EXISTS {database}." + viewNext + "{on cluster} SYNC")
		s.dropTable(tableNext)
		s.change(statementsOf("events_hourly", tableNext)...)
		since = s.now() + lead.Milliseconds()
		s.change(fmt.Sprintf("ALTER TABLE {database}.%s{on cluster} MODIFY COMMENT '%d'", tableNext, since),
			fmt.Sprintf(view, viewNext, tableNext, since))
		if s.awaitInserts(s.now(), since) < since {
			s.awaitInserts(since, never)
			return since
		}
	}
}

// exchangeHourly puts the filled table in the old one's place. It can be repeated from any point: of the two tables the new one
// has the later moment in its comment.
func exchangeHourly(s *session) {
	if s.has(tableRebuilt) {
		s.say("an exchange of tables has begun, it is finished now")
	} else {
		s.say("inserts wait")
		s.change("RENAME TABLE {database}." + tableNext + " TO {database}." + tableRebuilt + "{on cluster}")
	}
	s.awaitRunning() // these still feed both tables
	rebuilt, hourly := s.sinceOf(tableRebuilt), s.sinceOf("events_hourly")
	if rebuilt > hourly {
		mendRebuilt(s, rebuilt)
		s.say("the tables are exchanged")
		s.syncReplicas(tableRebuilt)
		s.change("EXCHANGE TABLES {database}.events_hourly AND {database}." + tableRebuilt + "{on cluster}")
	}
	exchangeViews(s)
}

// exchangeViews gives the new table the view. Inserts go on when the other view, whose target is gone, is dropped.
func exchangeViews(s *session) {
	if s.has(viewNext) { // else that was done, and inserts go on: none may find events without a view
		s.say("the views are made anew")
		s.change("DROP VIEW IF EXISTS {database}.events_hourly_mv{on cluster} SYNC")
		s.makeTables()
		s.makeViews()
		s.change("DROP VIEW IF EXISTS {database}." + viewNext + "{on cluster} SYNC")
	}
	s.say("inserts go on")
	s.dropTable(tableRebuilt)
}

// mendRebuilt compares the hours written to meanwhile: an insert that was torn was mended in the old table only. Nobody else knows
// the new one yet, and inserts wait, so that an hour that is always written to can be compared, too.
func mendRebuilt(s *session, since int64) {
	differing := fmt.Sprintf(differences, "FINAL",
		fmt.Sprintf("hour IN (SELECT toStartOfHour(timestamp) FROM {database}.events WHERE created_at >= fromUnixTimestamp64Milli(%d))", since),
		"event_count != 0 OR revenue != 0", tableRebuilt)
	n := s.number("SELECT count() FROM " + differing)
	if n > 0 {
		s.insert(ch.Query{Body: fmt.Sprintf(addDifferences, tableRebuilt) + differing})
	}
	s.say(fmt.Sprintf("events_hourly is made anew; %d of its rows had to be mended", n))
}

// syncReplicas waits until every replica has the table's parts.
func (s *session) syncReplicas(table string) {
	if s.store.replicated {
		s.change("SYSTEM SYNC REPLICA{on cluster} {database}." + table)
	}
}

// sinceOf is the moment that a table's comment names, 0 when it was not made by a rebuild.
func (s *session) sinceOf(table string) int64 {
	return s.number("SELECT max(toUInt64OrZero(comment)) FROM system.tables WHERE database = '{database}' AND name = '" + table + "'")
}

// awaitInserts returns once begun has passed and no insert from before it is still running, or at until. Both are in the
// server's Unix milliseconds, and so is the time that it returns.
func (s *session) awaitInserts(begun, until int64) (now int64) {
	processes := "system.processes"
	if s.store.replicated {
		processes = "clusterAllReplicas('" + s.store.cluster + "', system.processes)"
		begun += replicaSkew.Milliseconds()
	}
	running := fmt.Sprintf("SELECT count() FROM %s WHERE query_kind IN ('Insert', 'AsyncInsertFlush') AND position(query, 'events') > 0"+
		" AND (toFloat64(now64(3)) - elapsed) * 1000 < %d + 1", processes, begun)
	for s.err == nil {
		if now = s.now(); now >= until || now > begun && s.number(running) == 0 {
			break
		}
		s.do(func(ctx context.Context, _ asker) error { return troubles.Sleep(ctx, rebuildPoll) })
	}
	return now
}

// awaitRunning waits for the inserts that run now.
func (s *session) awaitRunning() { s.awaitInserts(s.now(), never) }

// fill counts the rows of events that a condition names.
func (s *session) fill(events, hourly, where string) {
	s.eachDay("counting", "{database}."+events, where, "INSERT INTO {database}."+hourly+" (event_name, channel, hour, {counts}) SELECT {counted}"+
		" FROM {database}."+events+" FINAL WHERE %s GROUP BY event_name, channel, hour")
	s.change("ALTER TABLE {database}." + hourly + "{on cluster} MATERIALIZE PROJECTION daily") // merges of large parts may be long in coming
}

// eachDay runs an insert for each day of what a condition selects from a table: that bounds the memory of a statement.
func (s *session) eachDay(what, table, where, insert string) {
	var starts proto.ColUInt32
	var days []time.Time
	s.ask(ch.Query{
		Body: "SELECT DISTINCT toUnixTimestamp(toStartOfDay(timestamp)) AS day FROM " + table + " WHERE " + where + " ORDER BY day",
	}, func(i int) { days = append(days, time.Unix(int64(starts[i]), 0).UTC()) }, &starts)
	told := ""
	for _, day := range days {
		if month := day.Format("2006-01"); month != told {
			s.say(what + " " + month)
			told = month
		}
		selected := fmt.Sprintf("timestamp >= %d AND timestamp < %d AND %s", day.Unix(), day.Unix()+daySeconds, where)
		s.during(what+" "+day.Format(time.DateOnly), func() {
			s.insert(ch.Query{
				Body:     fmt.Sprintf(insert, selected),
				Settings: []ch.Setting{{Key: "max_bytes_before_external_group_by", Value: "1000000000"}},
			})
		})
	}
}
