// Rebuilding events_hourly from events while new events keep coming in.
//
// When what is counted of events changes (the precision of the user states, what is revenue), existing rows cannot be
// converted: the events are counted again. Each row of events belongs to exactly one of two counts, by its created_at, which
// ClickHouse sets once per insert: rows from before a moment are counted day by day, later rows by a view of the new table's
// own. The old table stays up to date and answers until the two are exchanged.
//
// The exchange has to swap the views, too, which takes more than one step. So inserts stop for a moment: the new table is
// renamed, its view has no target, and ClickHouse refuses an insert into events before it has written any of it. The inserter
// repeats the round. A crash in that moment leaves inserts stopped; the next `reconcile -rebuild` finds the renamed table and
// goes on from there. After an earlier crash it starts over.

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/ClickHouse/ch-go"
	"github.com/ClickHouse/ch-go/proto"
)

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
	if err := r.store.syncReplica(ctx, r.conn); err != nil {
		return err
	}
	since, err := r.begin(ctx)
	if err != nil {
		return err
	}
	if err := r.fill(ctx, since); err != nil {
		return err
	}
	if n, err := r.sinceOf(ctx, tableNext); err != nil || n != since {
		return errors.Join(err, errors.New("another rebuild has begun"))
	}
	return nil
}

func (r *rebuild) isFilled(ctx context.Context) (bool, error) {
	n, err := r.number(ctx, "SELECT count() FROM system.tables WHERE database = '{database}' AND name = '"+tableRebuilt+"'")
	return n > 0, err
}

// takeOver puts the filled table in the old one's place.
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
	return r.exchange(ctx)
}

// begin makes the new table and its view. since, in Unix milliseconds, divides the two counts: when begin returns it has
// passed, and every row from before it is visible.
func (r *rebuild) begin(ctx context.Context) (since int64, err error) {
	for lead := firstLead; ; lead *= 2 {
		fmt.Fprintln(r.out, "the new table is made")
		if err := r.change(ctx, "DROP VIEW IF EXISTS {database}."+viewNext+"{on cluster} SYNC", "DROP TABLE IF EXISTS {database}."+tableNext+"{on cluster} SYNC"); err != nil {
			return 0, err
		}
		if err := r.change(ctx, statementsOf("events_hourly", tableNext)...); err != nil {
			return 0, err
		}
		now, err := r.now(ctx)
		if err != nil {
			return 0, err
		}
		since = now + lead.Milliseconds()
		err = r.change(ctx, fmt.Sprintf("ALTER TABLE {database}.%s{on cluster} MODIFY COMMENT '%d'", tableNext, since),
			fmt.Sprintf("CREATE MATERIALIZED VIEW {database}.%s{on cluster} TO {database}.%s AS SELECT {counted} FROM {database}.events WHERE created_at >= fromUnixTimestamp64Milli(%d) GROUP BY event_name, channel, hour",
				viewNext, tableNext, since))
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
			_, err = r.awaitInserts(ctx, since, 1<<62)
			return since, err
		}
	}
}

// awaitInserts returns once begun has passed and no insert from before it is still running, or at until. Both are in the
// server's Unix milliseconds, and so is the time that it returns.
func (r *rebuild) awaitInserts(ctx context.Context, begun, until int64) (now int64, err error) {
	if r.store.replicated {
		begun += replicaSkew.Milliseconds()
	}
	for {
		if now, err = r.now(ctx); err != nil || now >= until {
			return now, err
		}
		if now > begun {
			n, err := r.number(ctx, fmt.Sprintf("SELECT count() FROM %s WHERE query_kind IN ('Insert', 'AsyncInsertFlush') AND position(query, 'events') > 0 AND (toFloat64(now64(3)) - elapsed) * 1000 < %d + 1",
				r.store.processes(), begun))
			if err != nil || n == 0 {
				return now, err
			}
		}
		if err := sleep(ctx, rebuildPoll); err != nil {
			return 0, err
		}
	}
}

// fill counts the rows from before since, a day at a time: that bounds the memory of a statement.
func (r *rebuild) fill(ctx context.Context, since int64) error {
	var days proto.ColUInt32
	var all []uint32
	err := r.conn.Do(ctx, eachRow(ch.Query{
		Body: r.store.sql(fmt.Sprintf("SELECT DISTINCT toUnixTimestamp(toStartOfDay(timestamp)) AS day FROM {database}.events WHERE created_at < fromUnixTimestamp64Milli(%d) ORDER BY day", since)),
	}, func(i int) { all = append(all, days[i]) }, &days))
	if err != nil {
		return err
	}
	for i, day := range all {
		if month := time.Unix(int64(day), 0).UTC().Format("2006-01"); i == 0 || month != time.Unix(int64(all[i-1]), 0).UTC().Format("2006-01") {
			fmt.Fprintln(r.out, "counting", month)
		}
		err := r.conn.Do(ctx, ch.Query{
			Body: r.store.sql(fmt.Sprintf("INSERT INTO {database}.%s (event_name, channel, hour, {counts}) SELECT {counted} FROM {database}.events FINAL "+
				"WHERE timestamp >= %d AND timestamp < %d AND created_at < fromUnixTimestamp64Milli(%d) GROUP BY event_name, channel, hour", tableNext, day, int64(day)+daySeconds, since)),
			Settings: append(r.store.inserting(), ch.Setting{Key: "max_bytes_before_external_group_by", Value: "1000000000"}),
		})
		if err != nil {
			return fmt.Errorf("count %s: %w", time.Unix(int64(day), 0).UTC().Format(time.DateOnly), err)
		}
	}
	return r.syncReplicas(ctx, tableNext)
}

// exchange puts the new table in the old one's place. Inserts are stopped when it begins; it can be repeated from any point.
// Of the two tables the new one has the later moment in its comment.
func (r *rebuild) exchange(ctx context.Context) error {
	now, err := r.now(ctx)
	if err != nil {
		return err
	}
	if _, err := r.awaitInserts(ctx, now, 1<<62); err != nil { // these still feed both tables
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
	fmt.Fprintln(r.out, "the views are made anew")
	if err := r.change(ctx, "DROP VIEW IF EXISTS {database}.events_hourly_mv{on cluster} SYNC"); err != nil {
		return err
	}
	if err := r.store.applyTables(ctx, r.conn); err != nil {
		return err
	}
	if err := r.store.applyViews(ctx, r.conn); err != nil {
		return err
	}
	if err := r.change(ctx, "DROP VIEW IF EXISTS {database}."+viewNext+"{on cluster} SYNC"); err != nil {
		return err
	}
	fmt.Fprintln(r.out, "inserts go on")
	if err := r.change(ctx, "DROP TABLE {database}."+tableRebuilt+"{on cluster} SYNC"); err != nil {
		return err
	}
	return r.mend(ctx, max(rebuilt, hourly))
}

// mend compares the hours written to meanwhile: a torn insert was perhaps mended in the old table only.
func (r *rebuild) mend(ctx context.Context, since int64) error {
	const written = "FROM {database}.events WHERE created_at >= fromUnixTimestamp64Milli(%d)"
	from, err := r.number(ctx, fmt.Sprintf("SELECT toUInt64(toUnixTimestamp(min(timestamp))) "+written, since))
	if err != nil {
		return err
	}
	to, err := r.number(ctx, fmt.Sprintf("SELECT toUInt64(toUnixTimestamp(max(timestamp))) "+written, since))
	if err != nil {
		return err
	}
	n, err := reconcile(ctx, r.store, timeRange{int64(from), int64(to) + 1}, quietSeconds, false, r.out)
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
	n, err := r.number(ctx, "SELECT toUInt64(toUnixTimestamp64Milli(now64(3)))")
	return int64(n), err
}

// sinceOf is the moment that a table's comment names, 0 when it was not made by a rebuild.
func (r *rebuild) sinceOf(ctx context.Context, table string) (int64, error) {
	n, err := r.number(ctx, "SELECT max(toUInt64OrZero(comment)) FROM system.tables WHERE database = '{database}' AND name = '"+table+"'")
	return int64(n), err
}

// number asks for one UInt64.
func (r *rebuild) number(ctx context.Context, sql string) (uint64, error) {
	return number(ctx, r.conn, ch.Query{Body: r.store.sql(sql)})
}
