// Mending the aggregate: events_hourly made equal to events.
//
// User states do not change when a user is added twice, and event_count is a signed sum, so one statement that inserts the
// difference mends all; a second time it does nothing. What a fault can have torn is mended by itself, see mend.go; any
// range by the subcommand.

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
