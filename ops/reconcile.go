// reconcile: events_hourly agrees with events.
//
// User states do not change when a user is added twice, and event_count is a signed sum, so one statement that inserts the
// difference mends all; a second time it does nothing. What a fault can have torn the program mends by itself. A state that has
// users too many, or revenue by another rule, is no difference that can be inserted: -recount deletes hours and counts them anew.
//
// While hours are recounted, the table recounts has them: questions about them wait and end with 503, and the program mends none of
// them. A recount that was cut off leaves them there, and the next one begins with them.

package ops

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/ClickHouse/ch-go"
	"github.com/ClickHouse/ch-go/proto"
)

const (
	// quietSeconds is how long nothing may have been written to a row before it is trusted: an insert fills the raw table
	// and the aggregate one after the other, and what is found in between is no difference.
	quietSeconds = 10
	// lookPause is the time between two looks at what is running.
	lookPause = 50 * time.Millisecond
	// recountHours is how many hours are recounted at once: questions about them wait for so long.
	recountHours = 24
	// questionTimeout is more than the longest question of the program takes.
	questionTimeout = 15 * time.Second
	// maxSecond is what ClickHouse's DateTime holds.
	maxSecond = 1<<32 - 1
)

func reconcile(fs *flag.FlagSet) action {
	var r timeRange
	r.flags(fs)
	dryRun := fs.Bool("dry-run", false, "only print what differs")
	asJSON := fs.Bool("json", false, "what differs as a JSON object a line, and nothing else")
	anew := fs.Bool("recount", false, "count the hours from -from to -to anew, whether they differ or not; events may go on coming in")
	return func(ctx context.Context, sys System, _ []string, w io.Writer) error {
		if err := r.check(); err != nil {
			return err
		}
		if *anew {
			given := map[string]bool{}
			fs.Visit(func(f *flag.Flag) { given[f.Name] = true })
			if *dryRun || *asJSON || !given["from"] || !given["to"] {
				return badArgument{errors.New("-recount needs -from and -to, and takes neither -dry-run nor -json")}
			}
			return sys.exclusively(ctx, false, func(ctx context.Context) error { return sys.recount(ctx, r, w) })
		}
		return sys.exclusively(ctx, *dryRun, func(ctx context.Context) error {
			t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
			head := "HOUR\tEVENT\tCHANNEL\tIN EVENTS\tIN EVENTS_HOURLY\n"
			n, err := sys.mend(ctx, r.hours(), quietSeconds, *dryRun, func(d unequal) {
				if *asJSON {
					json.NewEncoder(visible{w}).Encode(d)
					return
				}
				fmt.Fprintf(t, "%s%s\t%s\t%s\t%d\t%d\n", head, d.Hour, cell(d.Event), cell(d.Channel), d.InEvents, d.InHourly)
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
	from, to := r.wholeHours()
	return fmt.Sprintf("hour >= %d AND hour < %d", from, to)
}

// wholeHours is the range as whole hours that ClickHouse can hold.
func (r timeRange) wholeHours() (from, to int64) {
	return max(r.from/hourSeconds*hourSeconds, 0), min((r.to+hourSeconds-1)/hourSeconds*hourSeconds, maxSecond)
}

// unequal is a row of events_hourly that does not agree with events.
type unequal struct {
	Hour     string `json:"hour"`
	Event    string `json:"event_name"`
	Channel  string `json:"channel"`
	InEvents int64  `json:"in_events"`
	InHourly int64  `json:"in_events_hourly"`
}

// differs is what is compared.
const differs = "(event_count != 0 OR id_sum != 0 OR revenue != 0)"

// mend hands the rows that differ to each and, unless dryRun, mends them. It returns how many there were. hours is a condition;
// what was written within the last quiet seconds is left out.
func (sys System) mend(ctx context.Context, hours string, quiet int64, dryRun bool, each func(unequal)) (rows int, err error) {
	err = sys.Connect(ctx, func(do Conn) error {
		if err := sys.SyncReplicas(ctx); err != nil {
			return err
		}
		written, err := sys.clock(ctx, do)
		if err != nil {
			return err
		}
		written -= quiet * 1000
		if err := sys.await(ctx, do, insertsAtWork, written); err != nil { // one that is still at work stands in one of the tables, perhaps
			return err
		}
		differing := sys.Differences(hours, fmt.Sprintf("%s AND last_written <= fromUnixTimestamp64Milli(%d)", differs, written))
		var name, channel, hour proto.ColStr
		var missing, has proto.ColInt64
		err = do.rows(ctx, ch.Query{
			Body: sys.SQL("SELECT CAST(event_name, 'String') AS name, CAST(channel, 'String') AS ch, formatDateTime(hour, '%Y-%m-%dT%H:00:00Z', 'UTC')" +
				", event_count, aggregated FROM " + differing + " ORDER BY hour, name, ch"),
		}, func(i int) {
			rows++
			each(unequal{hour.Row(i), name.Row(i), channel.Row(i), has[i] + missing[i], has[i]})
		}, &name, &channel, &hour, &missing, &has)
		if err != nil || rows == 0 || dryRun {
			return err
		}
		return do(ctx, ch.Query{Body: sys.SQL(sys.AddDifferences + differing), QueryID: sys.MendingID, Settings: sys.Inserting()})
	})
	return rows, err
}

// recount counts the hours of the range anew.
func (sys System) recount(ctx context.Context, r timeRange, w io.Writer) error {
	if err := sys.finishRecount(ctx, w); err != nil {
		return err
	}
	from, to := r.wholeHours()
	var hours []int64
	var second proto.ColUInt32
	err := sys.ask(ctx, ch.Query{
		Body: fmt.Sprintf("SELECT DISTINCT toUnixTimestamp(hour) AS second FROM (SELECT hour FROM {events_hourly} WHERE hour >= %[1]d AND hour < %[2]d"+
			" UNION ALL SELECT toStartOfHour(timestamp) FROM {events} WHERE timestamp >= %[1]d AND timestamp < %[2]d) ORDER BY second", from, to),
	}, func(i int) { hours = append(hours, int64(second[i])) }, &second)
	if err != nil {
		return err
	}
	return sys.recountHours(ctx, hours, w)
}

// recountHours counts these hours anew, which ascend, some at a time.
func (sys System) recountHours(ctx context.Context, hours []int64, w io.Writer) error {
	for some := range slices.Chunk(hours, recountHours) {
		if err := sys.recountOnce(ctx, spansOf(some)); err != nil {
			return fmt.Errorf("%w (run it again: until then there is no answer about %s)", err, spansOf(some))
		}
		fmt.Fprintf(w, "%s counted anew\n", spansOf(some))
	}
	fmt.Fprintf(w, "%d hours are counted anew\n", len(hours))
	return nil
}

// span is hours that follow one another, by the Unix seconds at which the first and the last of them begin.
type span struct{ first, last int64 }

// spans are hours.
type spans []span

// spansOf are hours, which ascend.
func spansOf(hours []int64) (all spans) {
	for _, hour := range hours {
		if n := len(all); n > 0 && hour-all[n-1].last <= hourSeconds {
			all[n-1].last = hour
		} else {
			all = append(all, span{hour, hour})
		}
	}
	return all
}

// String is the hours in words: those between the first and the last are not told apart.
func (s spans) String() string {
	hour := func(second int64) string { return time.Unix(second, 0).UTC().Format("2006-01-02T15:00Z") }
	first, last := s[0].first, s[len(s)-1].last
	switch {
	case first == last:
		return hour(first)
	case len(s) == 1:
		return hour(first) + " to " + hour(last)
	}
	return "some hours from " + hour(first) + " to " + hour(last)
}

// sql is the condition that a column is in the hours.
func (s spans) sql(column string) string {
	var any []string
	for _, of := range s {
		any = append(any, fmt.Sprintf("%s BETWEEN %d AND %d", column, of.first, of.last+hourSeconds-1))
	}
	return "(" + strings.Join(any, " OR ") + ")"
}

// finishRecount recounts the hours of a recount that was cut off.
func (sys System) finishRecount(ctx context.Context, w io.Writer) error {
	found := map[span]bool{}
	err := sys.EachServer(ctx, func(do Conn) error {
		var first, last proto.ColUInt32
		return do.rows(ctx, ch.Query{Body: sys.SQL("SELECT toUnixTimestamp(first), toUnixTimestamp(last) FROM {database}.recounts")},
			func(i int) { found[span{int64(first[i]), int64(last[i]) + 1 - hourSeconds}] = true }, &first, &last)
	})
	if err != nil || len(found) == 0 {
		return err
	}
	cut := spans(slices.SortedFunc(maps.Keys(found), func(a, b span) int { return cmp.Compare(a.first, b.first) }))
	fmt.Fprintf(w, "%s: a recount was cut off, it is finished first\n", cut)
	return sys.recountOnce(ctx, cut)
}

// recountOnce counts these hours anew. Each step can be repeated.
func (sys System) recountOnce(ctx context.Context, hours spans) error {
	onEachServer := func(sql string) error {
		return sys.EachServer(ctx, func(do Conn) error { return do(ctx, ch.Query{Body: sys.SQL(sql)}) })
	}
	var rows []string
	for _, s := range hours {
		rows = append(rows, fmt.Sprintf("(%d, %d)", s.first, s.last+hourSeconds-1))
	}
	// A question that began before the hours stood there is waited for: it may be about to read.
	if err := onEachServer("INSERT INTO {database}.recounts SELECT r.1, r.2 FROM (SELECT arrayJoin([" + strings.Join(rows, ", ") + "]) AS r)" +
		" WHERE NOT EXISTS (SELECT 1 FROM {database}.recounts)"); err != nil {
		return err
	}
	err := sys.Connect(ctx, func(do Conn) error {
		now, err := sys.clock(ctx, do)
		if err != nil {
			return err
		}
		waiting, cancel := context.WithTimeout(ctx, questionTimeout)
		defer cancel()
		if err := sys.await(waiting, do, questionsAtWork, now); err != nil && waiting.Err() == nil {
			return err
		}
		return ctx.Err()
	})
	if err != nil {
		return err
	}
	err = sys.EachServer(ctx, func(do Conn) error {
		if err := do(ctx, ch.Query{Body: sys.SQL("ALTER TABLE {database}.events_hourly DELETE WHERE " + hours.sql("hour"))}); err != nil {
			return err
		}
		for { // a mutation that is waited for by ClickHouse says nothing meanwhile, and looks like a server that hangs
			n, err := do.number(ctx, ch.Query{Body: sys.SQL("SELECT count() FROM system.mutations WHERE database = '{database}' AND table = 'events_hourly' AND NOT is_done")})
			if err != nil || n == 0 {
				return err
			}
			if err := pause(ctx, lookPause); err != nil {
				return err
			}
		}
	})
	if err != nil {
		return err
	}
	err = sys.Connect(ctx, func(do Conn) error {
		return do(ctx, ch.Query{
			Body: sys.SQL("INSERT INTO {database}.events_hourly (event_name, channel, hour, {counts}) SELECT {counted} FROM {events} FINAL" +
				" WHERE " + hours.sql("timestamp") + " GROUP BY event_name, channel, hour"),
			QueryID:  sys.MendingID,
			Settings: append([]ch.Setting{{Key: "max_bytes_before_external_group_by", Value: "1000000000"}}, sys.Inserting()...),
		})
	})
	if err != nil {
		return err
	}
	if err := sys.settle(ctx, hours.sql("hour")); err != nil {
		return err
	}
	return onEachServer("TRUNCATE TABLE {database}.recounts")
}

// settle makes recounted hours agree with events: what came in meanwhile may be counted twice, or not at all. An insert that is at
// work stands in events alone for a moment, so a difference is believed that two looks in a row have found, and so is agreement;
// between two looks every insert ends that was at work at the first.
func (sys System) settle(ctx context.Context, hours string) error {
	const text = "toString((event_name, channel, hour, event_count, id_sum, revenue))"
	differing := sys.Differences(hours, differs)
	var last []string
	for looks := 0; ; looks++ {
		var found []string
		err := sys.Connect(ctx, func(do Conn) error {
			now, err := sys.clock(ctx, do)
			if err == nil {
				err = sys.await(ctx, do, insertsAtWork, now)
			}
			if err != nil {
				return err
			}
			var row proto.ColStr
			return do.rows(ctx, ch.Query{Body: sys.SQL("SELECT " + text + " AS row FROM " + differing + " ORDER BY row")},
				func(i int) { found = append(found, row.Row(i)) }, &row)
		})
		if err != nil {
			return err
		}
		equal := slices.Equal(found, last) && looks > 0
		if last = found; equal && len(found) == 0 {
			return nil
		}
		if equal {
			var rows proto.ColStr
			rows.AppendArr(found)
			err := sys.Connect(ctx, func(do Conn) error {
				return do(ctx, ch.Query{
					Body:          sys.SQL(sys.AddDifferences + differing + " WHERE " + text + " IN (SELECT row FROM found)"),
					QueryID:       sys.MendingID,
					Settings:      sys.Inserting(),
					ExternalTable: "found",
					ExternalData:  []proto.InputColumn{{Name: "row", Data: &rows}},
				})
			})
			if err != nil {
				return err
			}
			looks = -1
		}
		if err := pause(ctx, lookPause); err != nil {
			return err
		}
	}
}

// What await waits for, as conditions on the queries that run.
const (
	insertsAtWork   = "query_kind IN ('Insert', 'AsyncInsertFlush') AND position(query, 'events') > 0"
	questionsAtWork = "query_kind = 'Select' AND position(query, 'events') > 0"
)

// await returns once no such query runs that began before a time of the server, in Unix milliseconds.
func (sys System) await(ctx context.Context, do Conn, which string, begun int64) error {
	running := sys.SQL(fmt.Sprintf("SELECT count() FROM {processes} WHERE %s AND (toFloat64(now64(3)) - elapsed) * 1000 < %d + 1", which, begun))
	for {
		n, err := do.number(ctx, ch.Query{Body: running})
		if err != nil || n == 0 {
			return err
		}
		if err := pause(ctx, lookPause); err != nil {
			return err
		}
	}
}

// clock is the server's, in Unix milliseconds.
func (sys System) clock(ctx context.Context, do Conn) (int64, error) {
	n, err := do.number(ctx, ch.Query{Body: "SELECT toUInt64(toUnixTimestamp64Milli(now64(3)))"})
	return int64(n), err
}

// number runs a query that answers one UInt64.
func (do Conn) number(ctx context.Context, q ch.Query) (n uint64, err error) {
	var answer proto.ColUInt64
	err = do.rows(ctx, q, func(i int) { n = answer[i] }, &answer)
	return n, err
}

// pause is done after d, or with the error of ctx before that.
func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
