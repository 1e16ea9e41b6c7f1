// export: the events of a range, in a form that other programs read, and that bulk takes again.
//
// As NDJSON it is what GET /api/v1/events lists, newest first, page by page: memory is bounded, and every event that was stored when
// the export began comes once. Each line is an event as it was sent: sent to bulk again it has the same id. Parquet is written by
// ClickHouse itself, over HTTP, because its native protocol has no formats.

package ops

import (
	"bufio"
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"

	"github.com/ClickHouse/ch-go"

	stored "github.com/event-ingestion/event-ingestion/internal/questions"
)

// exportPage is how many events a query of an export reads; a page has at most 4 MiB.
const exportPage = 10000

func export(fs *flag.FlagSet) action {
	var r timeRange
	r.flags(fs)
	name := fs.String("event-name", "", "only events of this name")
	format := fs.String("format", "ndjson", "ndjson, which bulk takes again, or parquet")
	overHTTP := fs.String("clickhouse-url", "", "for parquet: ClickHouse over HTTP (default http://CLICKHOUSE_HOST:8123)")
	return func(ctx context.Context, sys System, _ []string, w io.Writer) error {
		if err := r.check(); err != nil {
			return err
		}
		from, to := max(r.from, 0), min(r.to-1, maxSecond)
		if to < from {
			return badArgument{fmt.Errorf("-to %d: no event is before 1970", r.to)}
		}
		switch *format {
		case "ndjson":
			return sys.exportLines(ctx, from, to, *name, w)
		case "parquet":
			if *overHTTP == "" {
				*overHTTP = "http://" + net.JoinHostPort(sys.ClickHouse, "8123")
			}
			return sys.exportParquet(ctx, from, to, *name, *overHTTP, w)
		}
		return badArgument{fmt.Errorf("-format %q has to be ndjson or parquet", *format)}
	}
}

// exportLines writes an event a line.
func (sys System) exportLines(ctx context.Context, from, to int64, name string, w io.Writer) error {
	l := stored.Listing{From: from, To: to, Where: "1"}
	if name != "" {
		l.Where = sqlOf("event_name", name)
	}
	out := bufio.NewWriterSize(w, 1<<20)
	err := sys.Connect(ctx, func(do Conn) error {
		for more := true; more; {
			var err error
			more, err = l.Next(ctx, exportPage, func(ctx context.Context, reset func(), q ch.Query) error {
				reset()
				q.Body = sys.SQL(q.Body)
				return do(ctx, q)
			}, func(line []byte) error {
				out.Write(line) // whose error comes again
				return out.WriteByte('\n')
			})
			if err != nil {
				return fmt.Errorf("the export is not whole, it ends before second %d: %w", l.After.At, err)
			}
		}
		return nil
	})
	return errors.Join(err, out.Flush())
}

// sqlOf is the condition that a column has this text, whatever is in it.
func sqlOf(column, text string) string {
	return column + " = unhex('" + hex.EncodeToString([]byte(text)) + "')"
}

// exportParquet writes what ClickHouse does. An event that is stored twice until a merge comes once, by FINAL.
func (sys System) exportParquet(ctx context.Context, from, to int64, name, address string, w io.Writer) error {
	where := ""
	if name != "" {
		where = " AND " + sqlOf("event_name", name)
	}
	sql := sys.SQL(fmt.Sprintf("SELECT lower(hex(event_id)) AS event_id, CAST(event_name, 'String') AS event_name, user_id, timestamp, CAST(channel, 'String') AS channel,"+
		" CAST(campaign_id, 'String') AS campaign_id, insert_id, CAST(tags, 'Array(String)') AS tags, metadata, created_at AS received_at"+
		" FROM {events} FINAL WHERE timestamp >= %d AND timestamp <= %d%s FORMAT Parquet", from, to, where))
	at, err := url.Parse(address)
	if err != nil || at.Host == "" {
		return badArgument{fmt.Errorf("-clickhouse-url %q is no address such as http://localhost:8123", address)}
	}
	at.RawQuery = url.Values{"prefer_column_name_to_alias": {"1"}, "output_format_parquet_string_as_string": {"1"}, "skip_unavailable_shards": {"0"}}.Encode()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, at.String(), strings.NewReader(sql))
	if err != nil {
		return err
	}
	req.Header.Set("X-ClickHouse-User", sys.Username)
	req.Header.Set("X-ClickHouse-Key", sys.Password)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return fmt.Errorf("parquet is written by ClickHouse over HTTP; -clickhouse-url says where: %w", err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		said, _ := io.ReadAll(io.LimitReader(resp.Body, 1000))
		return fmt.Errorf("ClickHouse at %s: %s: %s", at.Host, resp.Status, bytes.TrimSpace(said))
	}
	end := &ending{}
	if _, err := io.Copy(io.MultiWriter(w, end), resp.Body); err != nil {
		return fmt.Errorf("the export is not whole: %w", err)
	}
	if string(end.last) != "PAR1" { // which ends every file of that format
		return errors.New("the export is not whole: ClickHouse ended it before its end")
	}
	return nil
}

// ending keeps the last four bytes.
type ending struct{ last []byte }

func (e *ending) Write(b []byte) (int, error) {
	all := append(e.last, b[max(0, len(b)-4):]...)
	e.last = slices.Clone(all[max(0, len(all)-4):])
	return len(b), nil
}
