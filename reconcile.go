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
)

// quietSeconds is how long nothing may have been written to an hour before it is trusted: an insert fills the raw table
// and the aggregate one after the other, and what is seen in between is no difference.
const quietSeconds = 10

// differences is a subquery: events, read with FINAL or without, minus events_hourly, of the hours and of what differs that two
// conditions name. What a query over it does not select is not computed.
const differences = `(
SELECT event_name, channel, hour, {added up}, sum(has) AS aggregated, max(written) AS last_written
FROM
(
    SELECT {counted}, toInt64(0) AS has, max(created_at) AS written
    FROM {database}.events %[1]s WHERE %[2]s
    GROUP BY event_name, channel, hour
    UNION ALL
    SELECT event_name, channel, hour, -event_count, unique_users_state, -revenue, campaigns_state, last_at, event_count, toDateTime64(0, 3, 'UTC')
    FROM {database}.events_hourly WHERE %[2]s
)
GROUP BY event_name, channel, hour
HAVING %[3]s)`

// addDifferences is the statement that mends, with differences behind it.
const addDifferences = "INSERT INTO {database}.events_hourly (event_name, channel, hour, {counts}) SELECT event_name, channel, hour, {counts} FROM "

func reconcileTool(fs *flag.FlagSet) toolRun {
	var r timeRange
	r.flags(fs)
	dryRun := fs.Bool("dry-run", false, "only print what differs")
	asJSON := fs.Bool("json", false, "what differs as a JSON object a line, and nothing else")
	anew := fs.Bool("rebuild", false, "make the whole table anew from events, as schema.sql says it now, while events go on coming in")
	return func(ctx context.Context, cfg *settings, _ []string, w io.Writer) error {
		if *anew && fs.NFlag() > 1 {
			return badArgument{errors.New("-rebuild takes no other flag")}
		}
		if *anew {
			if err := rebuildHourly(ctx, cfg, w); err != nil {
				return fmt.Errorf("-rebuild: %w (run it again: it finishes, or begins anew)", err)
			}
			return nil
		}
		if err := r.check(); err != nil {
			return err
		}
		ctx, cancel := context.WithTimeout(ctx, time.Hour)
		defer cancel()
		if *asJSON {
			lines := json.NewEncoder(w)
			_, err := reconcileEach(ctx, newStore(cfg), r, quietSeconds, *dryRun, func(d unequal) { lines.Encode(d) })
			return err
		}
		n, err := reconcile(ctx, newStore(cfg), r, quietSeconds, *dryRun, w)
		if err == nil {
			fmt.Fprintf(w, "%d rows of events_hourly differ from events\n", n)
		}
		return err
	}
}

// unequal is a row of events_hourly that does not agree with events.
type unequal struct {
	Hour     string `json:"hour"`
	Event    string `json:"event_name"`
	Channel  string `json:"channel"`
	InEvents int64  `json:"in_events"`
	InHourly int64  `json:"in_events_hourly"`
}

// reconcile is reconcileEach that prints a table.
func reconcile(ctx context.Context, st *store, r timeRange, quiet int, dryRun bool, w io.Writer) (rows int, err error) {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	defer t.Flush()
	begun := false
	return reconcileEach(ctx, st, r, quiet, dryRun, func(d unequal) {
		if !begun {
			fmt.Fprintln(t, "HOUR\tEVENT\tCHANNEL\tIN EVENTS\tIN EVENTS_HOURLY")
			begun = true
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%d\t%d\n", d.Hour, d.Event, d.Channel, d.InEvents, d.InHourly)
	})
}

// reconcileEach hands the rows that differ, shard by shard, to each and, unless dryRun, mends them. It returns how many there
// were. The range is widened to whole hours; what was written within the last quiet seconds is left out.
func reconcileEach(ctx context.Context, st *store, r timeRange, quiet int, dryRun bool, each func(unequal)) (rows int, err error) {
	shards, err := st.shards(ctx)
	failures := []error{err}
	for _, sh := range shards {
		n, err := reconcileShard(ctx, sh, r, quiet, dryRun, each)
		if rows += n; err != nil && sh.of > 1 {
			err = fmt.Errorf("%s: %w", sh.name("ClickHouse"), err)
		}
		failures = append(failures, err)
	}
	return rows, errors.Join(failures...)
}

func reconcileShard(ctx context.Context, st *store, r timeRange, quiet int, dryRun bool, each func(unequal)) (rows int, err error) {
	from, to := r.from/hourSeconds*hourSeconds, (r.to+hourSeconds-1)/hourSeconds*hourSeconds
	c, err := st.dial(ctx)
	if err != nil {
		return 0, err
	}
	defer c.Close()
	if _, err := st.readStates(ctx, c); err != nil {
		return 0, err
	}
	if err := st.syncReplica(ctx, c); err != nil {
		return 0, err
	}
	query := fmt.Sprintf(differences, "FINAL", fmt.Sprintf("hour >= %d AND hour < %d", max(from, 0), min(to, maxUnixSeconds)),
		fmt.Sprintf("(event_count != 0 OR revenue != 0) AND last_written <= now64(3) - %d", quiet))
	var (
		name, channel, hour proto.ColStr
		missing, has        proto.ColInt64
	)
	err = c.Do(ctx, eachRow(ch.Query{
		Body: st.sql("SELECT CAST(event_name, 'String') AS name, CAST(channel, 'String') AS ch, " + isoHour("hour") + ", event_count, aggregated FROM " + query + " ORDER BY hour, name, ch"),
	}, func(i int) {
		rows++
		each(unequal{hour.Row(i), name.Row(i), channel.Row(i), has[i] + missing[i], has[i]})
	}, &name, &channel, &hour, &missing, &has))
	if err != nil || rows == 0 || dryRun {
		return rows, err
	}
	return rows, c.Do(ctx, ch.Query{
		Body:     st.sql(addDifferences + query),
		Settings: st.inserting(),
	})
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

// rebuild is one run. Its store has the wanted precision, whatever the old table has.
type rebuild struct {
	store *store
	conn  asker
	out   io.Writer
}

// rebuildHourly makes events_hourly what schema.sql now says. It takes as long as ClickHouse needs to read events once.
func rebuildHourly(ctx context.Context, cfg *settings, out io.Writer) error {
	shards, err := newStore(cfg).prepare(ctx, 0) // in the precision that the tables have
	if err != nil {
		return err
	}
	if len(shards) > 1 && shards[0].replicated {
		return errors.New("several shards of replicas cannot be made anew by this command")
	}
	// The tables of all shards are filled before the first is exchanged: queries over shards of two precisions fail.
	for _, step := range []func(*rebuild, context.Context) error{(*rebuild).make, (*rebuild).takeOver} {
		for _, st := range shards {
			st.userBits.Store(wantedUserBits)
			err := st.connected(ctx, func(c asker) error { return step(&rebuild{st, c, out}, ctx) })
			if err != nil {
				return err
			}
		}
	}
	return nil
}

// make makes and fills the new table, unless that was done before.
func (r *rebuild) make(ctx context.Context) error {
	if r.store.of > 1 {
		fmt.Fprintln(r.out, r.store.name("counting"))
	}
	if is, err := r.isFilled(ctx); err != nil || is {
		return err
	}
	if n, err := r.number(ctx, "SELECT count() FROM system.tables WHERE database = '{database}' AND name = '"+eventsMoved+"'"); err != nil || n > 0 {
		return errors.Join(err, errors.New("a reshard has begun: let it finish first"))
	}
	if err := r.store.syncReplica(ctx, r.conn); err != nil {
		return err
	}
	since, err := r.begin(ctx)
	if err != nil {
		return err
	}
	if err := r.fill(ctx, "events", tableNext, fmt.Sprintf("created_at < fromUnixTimestamp64Milli(%d)", since)); err != nil {
		return err
	}
	if err := r.syncReplicas(ctx, tableNext); err != nil {
		return err
	}
	if n, err := r.sinceOf(ctx, tableNext); err != nil || n != since {
		return errors.Join(err, errors.New("another rebuild has begun"))
	}
	return nil
}

// begin makes the new table and its view. since, in Unix milliseconds, divides the two counts: when begin returns it has
// passed, and every row from before it is visible.
func (r *rebuild) begin(ctx context.Context) (since int64, err error) {
	const view = "CREATE MATERIALIZED VIEW {database}.%s{on cluster} TO {database}.%s AS SELECT {counted} FROM {database}.events" +
		" WHERE created_at >= fromUnixTimestamp64Milli(%d) GROUP BY event_name, channel, hour"
	tables := append([]string{
		"DROP VIEW IF EXISTS {database}." + viewNext + "{on cluster} SYNC",
		"DROP TABLE IF EXISTS {database}." + tableNext + "{on cluster} SYNC",
	}, statementsOf("events_hourly", tableNext)...)
	for lead := firstLead; ; lead *= 2 {
		fmt.Fprintln(r.out, "the new table is made")
		if err := r.change(ctx, tables...); err != nil {
			return 0, err
		}
		now, err := r.now(ctx)
		if err != nil {
			return 0, err
		}
		since = now + lead.Milliseconds()
		err = r.change(ctx, fmt.Sprintf("ALTER TABLE {database}.%s{on cluster} MODIFY COMMENT '%d'", tableNext, since),
			fmt.Sprintf(view, viewNext, tableNext, since))
		if err != nil {
			return 0, err
		}
		if now, err = r.now(ctx); err != nil {
			return 0, err
		}
		ended, err := r.awaitInserts(ctx, now, since)
		if err != nil {
			return 0, err
		}
		if ended < since {
			_, err = r.awaitInserts(ctx, since, never)
			return since, err
		}
	}
}

// awaitInserts returns once begun has passed and no insert from before it is still running, or at until. Both are in the
// server's Unix milliseconds, and so is the time that it returns.
func (r *rebuild) awaitInserts(ctx context.Context, begun, until int64) (now int64, err error) {
	processes := "system.processes"
	if r.store.replicated {
		processes = "clusterAllReplicas('" + r.store.cluster + "', system.processes)"
		begun += replicaSkew.Milliseconds()
	}
	running := fmt.Sprintf("SELECT count() FROM %s WHERE query_kind IN ('Insert', 'AsyncInsertFlush') AND position(query, 'events') > 0"+
		" AND (toFloat64(now64(3)) - elapsed) * 1000 < %d + 1", processes, begun)
	for {
		if now, err = r.now(ctx); err != nil || now >= until {
			return now, err
		}
		if now > begun {
			if n, err := r.number(ctx, running); err != nil || n == 0 {
				return now, err
			}
		}
		if err := sleep(ctx, rebuildPoll); err != nil {
			return 0, err
		}
	}
}

// fill counts the rows of events that a condition names.
func (r *rebuild) fill(ctx context.Context, events, hourly, where string) error {
	return r.eachDay(ctx, "counting", "{database}."+events, where, "INSERT INTO {database}."+hourly+" (event_name, channel, hour, {counts}) SELECT {counted} FROM {database}."+events+
		" FINAL WHERE %s GROUP BY event_name, channel, hour")
}

// eachDay runs an insert for each day of what a condition selects from a table: that bounds the memory of a statement.
func (r *rebuild) eachDay(ctx context.Context, what, table, where, insert string) error {
	var days proto.ColUInt32
	var all []time.Time
	err := r.conn.Do(ctx, eachRow(ch.Query{
		Body:     r.store.sql("SELECT DISTINCT toUnixTimestamp(toStartOfDay(timestamp)) AS day FROM " + table + " WHERE " + where + " ORDER BY day"),
		Settings: everyShard,
	}, func(i int) { all = append(all, time.Unix(int64(days[i]), 0).UTC()) }, &days))
	if err != nil {
		return err
	}
	told := ""
	for _, day := range all {
		if month := day.Format("2006-01"); month != told {
			fmt.Fprintln(r.out, what, month)
			told = month
		}
		during := fmt.Sprintf("timestamp >= %d AND timestamp < %d AND %s", day.Unix(), day.Unix()+daySeconds, where)
		err := r.conn.Do(ctx, ch.Query{
			Body:     r.store.sql(fmt.Sprintf(insert, during)),
			Settings: append(append(r.store.inserting(), everyShard...), ch.Setting{Key: "max_bytes_before_external_group_by", Value: "1000000000"}),
		})
		if err != nil {
			return fmt.Errorf("%s %s: %w", what, day.Format(time.DateOnly), err)
		}
	}
	return nil
}

// isFilled says whether the exchange has begun.
func (r *rebuild) isFilled(ctx context.Context) (bool, error) {
	n, err := r.number(ctx, "SELECT count() FROM system.tables WHERE database = '{database}' AND name = '"+tableRebuilt+"'")
	return n > 0, err
}

// takeOver puts the filled table in the old one's place. It can be repeated from any point: of the two tables the new one has
// the later moment in its comment.
func (r *rebuild) takeOver(ctx context.Context) error {
	if is, err := r.isFilled(ctx); err != nil {
		return err
	} else if is {
		fmt.Fprintln(r.out, "an exchange of tables has begun, it is finished now")
	} else {
		fmt.Fprintln(r.out, r.store.name("inserts wait"))
		if err := r.change(ctx, "RENAME TABLE {database}."+tableNext+" TO {database}."+tableRebuilt+"{on cluster}"); err != nil {
			return err
		}
	}
	now, err := r.now(ctx)
	if err != nil {
		return err
	}
	if _, err := r.awaitInserts(ctx, now, never); err != nil { // these still feed both tables
		return err
	}
	rebuilt, err := r.sinceOf(ctx, tableRebuilt)
	if err != nil {
		return err
	}
	hourly, err := r.sinceOf(ctx, "events_hourly")
	if err != nil {
		return err
	}
	if rebuilt > hourly {
		fmt.Fprintln(r.out, "the tables are exchanged")
		if err := r.syncReplicas(ctx, tableRebuilt); err != nil {
			return err
		}
		if err := r.change(ctx, "EXCHANGE TABLES {database}.events_hourly AND {database}."+tableRebuilt+"{on cluster}"); err != nil {
			return err
		}
	}
	if err := r.exchangeViews(ctx); err != nil {
		return err
	}
	return r.mend(ctx, max(rebuilt, hourly))
}

// exchangeViews gives the new table the view. Inserts go on when the other view, whose target is gone, is dropped.
func (r *rebuild) exchangeViews(ctx context.Context) error {
	fmt.Fprintln(r.out, "the views are made anew")
	if err := r.change(ctx, "DROP VIEW IF EXISTS {database}.events_hourly_mv{on cluster} SYNC"); err != nil {
		return err
	}
	for _, views := range []bool{false, true} {
		if err := r.store.apply(ctx, r.conn, views); err != nil {
			return err
		}
	}
	if err := r.change(ctx, "DROP VIEW IF EXISTS {database}."+viewNext+"{on cluster} SYNC"); err != nil {
		return err
	}
	fmt.Fprintln(r.out, "inserts go on")
	return r.change(ctx, "DROP TABLE {database}."+tableRebuilt+"{on cluster} SYNC")
}

// mend compares the hours written to meanwhile: a torn insert was perhaps mended in the old table only.
func (r *rebuild) mend(ctx context.Context, since int64) error {
	const written = "SELECT toUInt64(toUnixTimestamp(%s(timestamp))) FROM {database}.events WHERE created_at >= fromUnixTimestamp64Milli(%d)"
	from, err := r.number(ctx, fmt.Sprintf(written, "min", since))
	if err != nil {
		return err
	}
	to, err := r.number(ctx, fmt.Sprintf(written, "max", since))
	if err != nil {
		return err
	}
	n, err := reconcile(ctx, r.store, timeRange{from, to + 1}, quietSeconds, false, r.out)
	if err == nil {
		fmt.Fprintf(r.out, "events_hourly is made anew; %d of its rows had to be mended\n", n)
	}
	return err
}

// syncReplicas waits until every replica has the table's parts.
func (r *rebuild) syncReplicas(ctx context.Context, table string) error {
	if !r.store.replicated {
		return nil
	}
	return r.change(ctx, "SYSTEM SYNC REPLICA{on cluster} {database}."+table)
}

func (r *rebuild) change(ctx context.Context, statements ...string) error {
	for _, stmt := range statements {
		if err := r.store.change(ctx, r.conn, stmt); err != nil {
			return err
		}
	}
	return nil
}

// now is the server's clock, in Unix milliseconds.
func (r *rebuild) now(ctx context.Context) (int64, error) {
	return r.number(ctx, "SELECT toUInt64(toUnixTimestamp64Milli(now64(3)))")
}

// sinceOf is the moment that a table's comment names, 0 when it was not made by a rebuild.
func (r *rebuild) sinceOf(ctx context.Context, table string) (int64, error) {
	return r.number(ctx, "SELECT max(toUInt64OrZero(comment)) FROM system.tables WHERE database = '{database}' AND name = '"+table+"'")
}

// number asks for one UInt64.
func (r *rebuild) number(ctx context.Context, sql string) (int64, error) {
	n, err := number(ctx, r.conn, ch.Query{Body: r.store.sql(sql)})
	return int64(n), err
}
