// The metrics endpoint: how many events and users, in a range that is exact to the second.
//
// query.go reads whole hours from events_hourly, which has one small row an hour and channel, and only the cut hours
// at both ends of the range from events. It owns a small pool of ClickHouse connections.

package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/ClickHouse/ch-go"
	"github.com/ClickHouse/ch-go/chpool"
	"github.com/ClickHouse/ch-go/proto"
)

// Codes of the metrics endpoint beside those of an event.
const (
	codeInvalidRange   = "validation.invalid-range.error"
	codeInvalidGroupBy = "validation.invalid-group-by.error"
)

const (
	hourSeconds = 3600
	// maxUnixSeconds is what ClickHouse's DateTime holds: 2106.
	maxUnixSeconds = 1<<32 - 1
	// queryTimeout bounds one metrics query, on the server too.
	queryTimeout = 10 * time.Second
	// queryConns bounds the queries that run at once; the next one waits its turn.
	queryConns = 8
	// clockSkew is how far the clocks of several copies may be apart before "the last hour is not over" shows.
	clockSkew = 5
)

// metricsAPI serves GET /api/v1/metrics.
type metricsAPI struct {
	store     *store
	watermark *watermark
	conns     chan *chpool.Pool // holds the one pool; empty while somebody opens it
}

// metricsQuery is a parsed request. from and to are Unix seconds, both inclusive.
type metricsQuery struct {
	eventName, channel, groupBy string
	from, to                    int64
}

type metricsGroup struct {
	key          string
	total, users uint64
}

func newMetricsAPI(st *store, wm *watermark) *metricsAPI {
	m := &metricsAPI{store: st, watermark: wm, conns: make(chan *chpool.Pool, 1)}
	m.conns <- nil
	return m
}

func (m *metricsAPI) serve(w http.ResponseWriter, r *http.Request) {
	q, problems := parseMetricsQuery(r.URL.Query())
	m.answer(w, r, problems, func(ctx context.Context, now, through int64) ([]byte, error) {
		total, groups, err := m.query(ctx, q, now)
		return appendMetrics(nil, q, total, groups, through), err
	})
}

// answer writes what ask returns, or why it cannot.
func (m *metricsAPI) answer(w http.ResponseWriter, r *http.Request, problems []problem, ask func(ctx context.Context, now, through int64) ([]byte, error)) {
	if len(problems) > 0 {
		writeProblems(w, problems)
		return
	}
	ctx, cancel := context.WithTimeout(r.Context(), queryTimeout)
	defer cancel()
	through := m.watermark.through.Load() // before the query, which then sees at least that much
	body, err := ask(ctx, time.Now().Unix(), through)
	if err != nil {
		m.store.broken.note(err)
		writeUnavailable(w, "ClickHouse does not answer the query: "+firstLine(err.Error()))
		return
	}
	writeJSON(w, http.StatusOK, body)
}

func appendMetrics(b []byte, q *metricsQuery, total metricsGroup, groups []metricsGroup, through int64) []byte {
	b = append(b, `{"total_count":`...)
	b = strconv.AppendUint(b, total.total, 10)
	b = append(b, `,"unique_users":`...)
	b = strconv.AppendUint(b, total.users, 10)
	if q.groupBy != "" {
		b = append(b, `,"grouped_data":[`...)
		for i, g := range groups {
			if i > 0 {
				b = append(b, ',')
			}
			b = append(b, `{"key":`...)
			b = appendString(b, g.key)
			b = append(b, `,"total_count":`...)
			b = strconv.AppendUint(b, g.total, 10)
			b = append(b, `,"unique_users":`...)
			b = strconv.AppendUint(b, g.users, 10)
			b = append(b, '}')
		}
		b = append(b, ']')
	}
	return append(appendThrough(b, through), '}')
}

func appendThrough(b []byte, through int64) []byte {
	b = append(b, `,"complete_through":`...)
	if through == 0 { // not known yet: a backlog from before the start is being worked off
		return append(b, "null"...)
	}
	return strconv.AppendInt(b, through, 10)
}

// parseMetricsQuery checks the parameters; all problems come back at once.
func parseMetricsQuery(v url.Values) (*metricsQuery, []problem) {
	q := &metricsQuery{eventName: v.Get("event_name"), channel: v.Get("channel"), groupBy: v.Get("group_by")}
	c := newQueryCheck(v)
	if q.eventName == "" {
		c.fail("event_name", codeRequired, "is required")
	} else if hasBadText([]byte(q.eventName)) {
		c.fail("event_name", codeInvalidFormat, "is not valid UTF-8 text")
	}
	q.from, q.to = c.seconds("from"), c.seconds("to")
	c.rangeAndChannel(q.from, q.to, q.channel)
	switch q.groupBy {
	case "", "channel", "hour", "day", "campaign":
	default:
		c.fail("group_by", codeInvalidGroupBy, "must be one of channel, hour, day, campaign")
	}
	return q, c.problems
}

// queryCheck collects what is wrong with the parameters of a request.
type queryCheck struct {
	values   url.Values
	problems []problem
	noRange  bool // from or to is wrong by itself
}

func newQueryCheck(v url.Values) *queryCheck {
	c := &queryCheck{values: v}
	for name, values := range v {
		if len(values) > 1 {
			c.fail(name, codeInvalidFormat, "appears more than once")
		}
	}
	return c
}

func (c *queryCheck) fail(field, code, message string) {
	c.problems = append(c.problems, problem{field, code, field + " " + message})
}

// seconds reads a required parameter.
func (c *queryCheck) seconds(name string) int64 {
	s := c.values.Get(name)
	n, err := strconv.ParseInt(s, 10, 64)
	switch {
	case s == "":
		c.fail(name, codeRequired, "is required")
	case err != nil:
		c.fail(name, codeInvalidFormat, "must be an integer of Unix seconds")
	case n >= minMilliseconds:
		c.fail(name, codeInvalidFormat, "looks like milliseconds or finer, send Unix seconds")
	default:
		return n
	}
	c.noRange = true
	return 0
}

func (c *queryCheck) rangeAndChannel(from, to int64, channel string) {
	if !c.noRange && to <= from {
		c.fail("to", codeInvalidRange, "must be after from")
	}
	if !validChannel([]byte(channel)) {
		c.fail("channel", codeInvalidChannel, "must be one of web, mobile_app, api")
	}
}

// span is a range of seconds, end excluded.
type span struct{ from, end int64 }

// cutHours splits a range, both ends included, into the whole hours and what is cut off at both ends. now decides
// whether the last hour is whole although `to` lies within it: no event is from after now.
func cutHours(from, to, now int64) (hours span, cuts []span) {
	from, end := max(from, 0), min(to, maxUnixSeconds)+1
	if end > now+clockSlackSecs+clockSkew {
		end = max(end, (end+hourSeconds-1)/hourSeconds*hourSeconds)
	}
	hours = span{(from + hourSeconds - 1) / hourSeconds * hourSeconds, end / hourSeconds * hourSeconds}
	if hours.from >= hours.end {
		return span{}, []span{{from, end}}
	}
	for _, s := range []span{{from, hours.from}, {hours.end, end}} {
		if s.from < s.end {
			cuts = append(cuts, s)
		}
	}
	return hours, cuts
}

// sql writes the query: each part gives key, count and user state; the outer one adds them up by key and, in a row
// marked by is_total, over all keys, so that a user in two groups counts once in the total.
func (q *metricsQuery) sql(database string, now int64) string {
	hours, cuts := cutHours(q.from, q.to, now)
	if q.groupBy == "campaign" { // the hourly table does not know campaigns
		hours, cuts = span{}, []span{{max(q.from, 0), min(q.to, maxUnixSeconds) + 1}}
	}
	hourKey, eventKey := "''", "''"
	switch q.groupBy {
	case "channel":
		hourKey, eventKey = "CAST(channel, 'String')", "CAST(channel, 'String')"
	case "hour":
		hourKey, eventKey = isoHour("hour"), isoHour("toStartOfHour(timestamp)")
	case "day":
		hourKey, eventKey = isoHour("toStartOfDay(hour)"), isoHour("toStartOfDay(timestamp)")
	case "campaign":
		eventKey = "CAST(campaign_id, 'String')"
	}
	where := "event_name = {event_name:String}"
	if q.channel != "" {
		where += " AND channel = {channel:String}"
	}
	var parts []string
	if hours.from < hours.end {
		parts = append(parts, fmt.Sprintf("SELECT %s AS key, sum(event_count) AS n, uniqCombined64MergeState(19)(unique_users_state) AS u FROM %s.events_hourly WHERE %s AND hour >= %d AND hour < %d GROUP BY key",
			hourKey, database, where, hours.from, hours.end))
	}
	for _, c := range cuts {
		parts = append(parts, fmt.Sprintf("SELECT %s AS key, toInt64(count()) AS n, uniqCombined64State(19)(user_id) AS u FROM %s.events WHERE %s AND timestamp >= %d AND timestamp < %d GROUP BY key",
			eventKey, database, where, c.from, c.end))
	}
	order := "key"
	if q.groupBy == "channel" || q.groupBy == "campaign" {
		order = "total DESC, key"
	}
	return "SELECT key, toUInt64(sum(n)) AS total, uniqCombined64Merge(19)(u) AS users, toUInt8(grouping(key) = 1) AS is_total FROM (" +
		strings.Join(parts, " UNION ALL ") + ") GROUP BY GROUPING SETS ((key), ()) ORDER BY is_total DESC, " + order
}

func isoHour(expr string) string { return "formatDateTime(" + expr + ", '%Y-%m-%dT%H:00:00Z', 'UTC')" }

func (m *metricsAPI) query(ctx context.Context, q *metricsQuery, now int64) (total metricsGroup, groups []metricsGroup, err error) {
	var (
		key          proto.ColStr
		count, users proto.ColUInt64
		isTotal      proto.ColUInt8
	)
	err = m.do(ctx, func() { total, groups = metricsGroup{}, groups[:0] }, ch.Query{
		Body:       q.sql(m.store.database, now),
		Parameters: []proto.Parameter{parameter("event_name", q.eventName), parameter("channel", q.channel)},
		Result:     proto.Results{{Name: "key", Data: &key}, {Name: "total", Data: &count}, {Name: "users", Data: &users}, {Name: "is_total", Data: &isTotal}},
		OnResult: func(context.Context, proto.Block) error {
			for i := range count {
				if g := (metricsGroup{key.Row(i), count[i], users[i]}); isTotal[i] == 1 {
					total = g
				} else {
					groups = append(groups, g)
				}
			}
			return nil
		},
	})
	return total, groups, err
}

// do runs a query on a pooled connection. That may be one which the server closed since: a first failure without an
// answer is tried again, after reset; a second one is the server's.
func (m *metricsAPI) do(ctx context.Context, reset func(), query ch.Query) error {
	pool, err := m.pool(ctx)
	if err != nil {
		return err
	}
	query.Settings = []ch.Setting{{Key: "max_execution_time", Value: "10"}, {Key: "enable_positional_arguments", Value: "0"}}
	for attempt := 0; ; attempt++ {
		reset()
		err = pool.Do(ctx, query)
		if _, answered := ch.AsException(err); err == nil || answered || attempt > 0 || ctx.Err() != nil {
			return err
		}
	}
}

// pool opens the connections on first use, so that the API starts without ClickHouse.
func (m *metricsAPI) pool(ctx context.Context) (*chpool.Pool, error) {
	select {
	case p := <-m.conns:
		var err error
		if p == nil {
			p, err = chpool.New(ctx, chpool.Options{ClientOptions: m.store.options, MaxConns: queryConns})
		}
		m.conns <- p
		return p, err
	case <-ctx.Done():
		return nil, errors.New("no connection in time")
	}
}

// ping says whether ClickHouse answers and has the tables.
func (m *metricsAPI) ping(ctx context.Context) error {
	pool, err := m.pool(ctx)
	if err != nil {
		return err
	}
	var n proto.ColUInt8
	return pool.Do(ctx, ch.Query{
		Body:   "SELECT toUInt8(count() >= 0) AS n FROM " + m.store.database + ".events_hourly WHERE event_name = ''",
		Result: proto.Results{{Name: "n", Data: &n}},
	})
}

func (m *metricsAPI) close() {
	if p := <-m.conns; p != nil {
		p.Close()
	}
	m.conns <- nil
}
