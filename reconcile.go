package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"text/tabwriter"
	"time"

	"github.com/ClickHouse/ch-go"
	"github.com/ClickHouse/ch-go/proto"

	"github.com/event-ingestion/event-ingestion/troubles"
)

const quietSeconds = 10

// session is temporary.
type session struct {
	ctx  context.Context
	db   *clickhouse
	conn asker
	err  error
}

func (c *clickhouse) session(ctx context.Context, _ io.Writer, steps func(*session)) error {
	return c.connected(func(conn asker) error {
		s := session{ctx, c, conn, nil}
		steps(&s)
		return s.err
	})
}

func (s *session) ask(q ch.Query, row func(i int), columns ...proto.ColResult) {
	if s.err == nil {
		q.Body = s.db.sql(q.Body)
		s.err = s.conn.Do(s.ctx, eachRow(q, row, columns...))
	}
}

func reconcileTool(fs *flag.FlagSet) toolRun {
	var r timeRange
	r.flags(fs)
	dryRun := fs.Bool("dry-run", false, "only print what differs")
	asJSON := fs.Bool("json", false, "what differs as a JSON object a line, and nothing else")
	return func(ctx context.Context, cfg *settings, _ []string, w io.Writer) error {
		if err := r.check(); err != nil {
			return err
		}
		ctx, cancel := context.WithTimeout(ctx, time.Hour)
		defer cancel()
		return exclusively(ctx, cfg, *dryRun, func(ctx context.Context) error {
			t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
			head := "HOUR\tEVENT\tCHANNEL\tIN EVENTS\tIN EVENTS_HOURLY\n"
			n, err := reconcile(ctx, newClickHouse(cfg), r.hours(), quietSeconds, *dryRun, func(d unequal) {
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

type unequal struct {
	Hour     string `json:"hour"`
	Event    string `json:"event_name"`
	Channel  string `json:"channel"`
	InEvents int64  `json:"in_events"`
	InHourly int64  `json:"in_events_hourly"`
}

func reconcile(ctx context.Context, db *clickhouse, hours string, quiet int, dryRun bool, each func(unequal)) (rows int, err error) {
	err = db.connected(func(conn asker) error {
		if err := db.syncReplicas(ctx); err != nil {
			return err
		}
		now, err := askNumber(ctx, conn, ch.Query{Body: "SELECT toUInt64(toUnixTimestamp64Milli(now64(3)))"})
		if err != nil {
			return err
		}
		written := int64(now) - int64(quiet)*1000
		for {
			n, err := askNumber(ctx, conn, ch.Query{Body: fmt.Sprintf(db.sql("SELECT count() FROM {processes} WHERE query_kind IN ('Insert', 'AsyncInsertFlush') AND position(query, 'events') > 0"+
				" AND (toFloat64(now64(3)) - elapsed) * 1000 < %d + 1"), written)})
			if err != nil || n == 0 {
				if err != nil {
					return err
				}
				break
			}
			if err := troubles.Sleep(ctx, 50*time.Millisecond); err != nil {
				return err
			}
		}
		differing := fmt.Sprintf(differences, "FINAL", hours,
			fmt.Sprintf("(event_count != 0 OR revenue != 0) AND last_written <= fromUnixTimestamp64Milli(%d)", written))
		var name, channel, hour proto.ColStr
		var missing, has proto.ColInt64
		if err := conn.Do(ctx, eachRow(ch.Query{
			Body: db.sql("SELECT CAST(event_name, 'String') AS name, CAST(channel, 'String') AS ch, " + isoHour("hour") +
				", event_count, aggregated FROM " + differing + " ORDER BY hour, name, ch"),
		}, func(i int) {
			rows++
			each(unequal{hour.Row(i), name.Row(i), channel.Row(i), has[i] + missing[i], has[i]})
		}, &name, &channel, &hour, &missing, &has)); err != nil {
			return err
		}
		if rows > 0 && !dryRun {
			return conn.Do(ctx, ch.Query{Body: db.sql(addDifferences + differing), QueryID: db.mendingID(), Settings: db.inserting()})
		}
		return nil
	})
	return rows, err
}
