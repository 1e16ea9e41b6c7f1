// The tables: how a command asks ClickHouse, for which range of event time, and that one command changes them at a time.

package ops

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"strconv"
	"time"

	"github.com/ClickHouse/ch-go"
	"github.com/ClickHouse/ch-go/proto"
	"github.com/event-ingestion/event-ingestion/internal/questions"
)

const (
	hourSeconds = 3600
	daySeconds  = 24 * hourSeconds
)

// timeRange is what -from and -to say: Unix seconds of event time, from included, to excluded.
type timeRange struct{ from, to int64 }

// flags adds -from and -to. The default is everything that the API can have accepted: it takes what is 30 days old.
func (r *timeRange) flags(fs *flag.FlagSet) {
	now := time.Now().Unix()
	r.from, r.to = now-31*daySeconds, now+hourSeconds
	second := func(dst *int64) func(string) error {
		return func(s string) error {
			n, err := strconv.ParseInt(s, 10, 64)
			if err != nil {
				var t time.Time
				t, err = time.Parse(time.RFC3339, s)
				n = t.Unix()
			}
			*dst = n
			return err
		}
	}
	fs.Func("from", "first second of event time, Unix or RFC 3339 (default 31 days ago)", second(&r.from))
	fs.Func("to", "second after the last (default in an hour)", second(&r.to))
}

func (r *timeRange) check() error {
	if r.from >= r.to {
		return badArgument{fmt.Errorf("-to %d has to be after -from %d", r.to, r.from)}
	}
	return nil
}

// ask is rows on a connection of its own, with the braces of schema.sql.
func (sys System) ask(ctx context.Context, q ch.Query, row func(i int), columns ...proto.ColResult) error {
	return sys.Connect(ctx, func(do Conn) error { // which finds out what the braces mean
		q.Body = sys.SQL(q.Body)
		return do.rows(ctx, q, row, columns...)
	})
}

// rows runs a query. It decodes what is answered into columns, by their order, and calls row with the number of each row in
// them: ch-go hands on a block at a time, and a later one overwrites the columns.
func (do Conn) rows(ctx context.Context, q ch.Query, row func(i int), columns ...proto.ColResult) error {
	return do(ctx, questions.EachRow(q, row, columns...))
}

const (
	// A command tries to be the only one exclusiveTries times, exclusivePause apart: ClickHouse lets go within two seconds of what
	// a command held that has just ended.
	exclusiveTries = 21
	exclusivePause = 100 * time.Millisecond
)

// exclusively runs a change of tables or offsets while no other command's runs. For so long a query with an id of its own runs on
// the first server, and ClickHouse refuses a second query with that id. The query ends with its connection, however the command
// ends, and the change with the query. A dry run changes nothing and waits for nobody.
func (sys System) exclusively(ctx context.Context, dryRun bool, change func(context.Context) error) error {
	if dryRun {
		return change(ctx)
	}
	for try := 1; ; try++ {
		held, release := context.WithCancel(ctx)
		holds, ended := make(chan struct{}, 1), make(chan error, 1)
		go func() { // ends with held
			defer release()
			ended <- sys.EachServer(held, func(do Conn) error { // only the first: this query has no end
				return do.rows(held, ch.Query{
					QueryID: "tables " + sys.Database,
					Body:    "SELECT sleepEachRow(0.1) FROM system.numbers SETTINGS max_block_size = 1, max_execution_time = 0",
				}, func(int) {
					select {
					case holds <- struct{}{}:
					default:
					}
				}, new(proto.ColUInt8))
			})
		}()
		select {
		case <-holds:
			err := change(held)
			release()
			<-ended
			return err
		case err := <-ended:
			if !ch.IsErr(err, proto.ErrQueryWithSameIDIsAlreadyRunning) {
				return err
			}
		}
		if try == exclusiveTries {
			return errors.New("another command changes the tables: wait for its end")
		}
		select {
		case <-time.After(exclusivePause):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
