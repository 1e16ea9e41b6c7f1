// The metrics endpoint: how many events and users, in a range that is exact to the second.
//
// query.go builds its queries from the definitions of schema.sql, which cut a range into whole days, whole hours and, at its
// ends, seconds. It owns a small pool of ClickHouse connections.

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

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
	// maxCampaigns is how many groups an answer by campaign has: anybody may make up campaigns.
	maxCampaigns = 1000
	// statesPause is the time between two attempts while events_hourly is exchanged for one with other states.
	statesPause = 50 * time.Millisecond
)

// metricsAPI serves GET /api/v1/metrics.
type metricsAPI struct {
	store     *store
	watermark *watermark
	failed    func(error)       // told what a query says
	conns     chan *chpool.Pool // holds the one pool; empty while somebody opens it
	shared    sharedAnswers     // of the overview
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

func newMetricsAPI(st *store, wm *watermark, failed func(error)) *metricsAPI {
	m := &metricsAPI{store: st, watermark: wm, failed: failed, conns: make(chan *chpool.Pool, 1)}
	m.conns <- nil
	return m
}

func (m *metricsAPI) serve(w http.ResponseWriter, r *http.Request) {
	q, problems := parseMetricsQuery(r.URL.RawQuery)
	m.answer(w, r, problems, func(ctx context.Context, through int64) ([]byte, error) {
		total, groups, err := m.query(ctx, q)
		return metricsJSON(q, total, groups, through), err
	})
}

// answer writes what ask returns, or why it cannot.
func (m *metricsAPI) answer(w http.ResponseWriter, r *http.Request, problems []problem, ask func(ctx context.Context, through int64) ([]byte, error)) {
	if len(problems) > 0 {
		writeProblems(w, problems)
		return
	}
	ctx, cancel := context.WithTimeout(r.Context(), queryTimeout)
	defer cancel()
	through := m.watermark.through.Load() // before the query, which then sees at least that much
	body, err := ask(ctx, through)
	if err != nil {
		m.failed(err)
		writeUnavailable(w, "ClickHouse does not answer the query: "+firstLine(err.Error()))
		return
	}
	writeJSON(w, http.StatusOK, body)
}

func metricsJSON(q *metricsQuery, total metricsGroup, groups []metricsGroup, through int64) []byte {
	b := fmt.Appendf(nil, `{"total_count":%d,"unique_users":%d`, total.total, total.users)
	if q.groupBy != "" {
		truncated := q.groupBy == "campaign" && len(groups) > maxCampaigns
		if truncated {
			groups = groups[:maxCampaigns]
		}
		b = append(b, `,"grouped_data":[`...)
		for i, g := range groups {
			if i > 0 {
				b = append(b, ',')
			}
			b = appendString(append(b, `{"key":`...), g.key)
			b = fmt.Appendf(b, `,"total_count":%d,"unique_users":%d}`, g.total, g.users)
		}
		b = append(b, ']')
		if truncated {
			b = append(b, `,"truncated":true`...)
		}
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
func parseMetricsQuery(rawQuery string) (*metricsQuery, []problem) {
	c := newQueryCheck(rawQuery, "event_name", "from", "to", "channel", "group_by")
	v := c.values
	q := &metricsQuery{eventName: v.Get("event_name"), channel: v.Get("channel"), groupBy: v.Get("group_by")}
	if q.eventName == "" {
		c.fail("event_name", codeRequired, "is required")
	} else if !utf8.ValidString(q.eventName) {
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

// newQueryCheck parses a query that may have each known parameter once. Unknown ones are named in alphabetical order, so that
// the answer does not depend on chance.
func newQueryCheck(rawQuery string, known ...string) *queryCheck {
	v, err := url.ParseQuery(rawQuery)
	c := &queryCheck{values: v}
	if err != nil { // it leaves out what it cannot parse
		c.fail("query", codeInvalidFormat, "cannot be parsed: "+err.Error())
	}
	for _, name := range slices.Sorted(maps.Keys(v)) {
		switch {
		case !slices.Contains(known, name):
			c.fail(name, codeInvalidFormat, "is not a parameter; there are "+cmp.Or(strings.Join(known, ", "), "none"))
		case len(v[name]) > 1:
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

// byDay is a subquery: what happened in the range {from} to {to}, by a key made of event_name, channel and the day of hour.
// The view events_between_by_day answers the same questions, for five times the CPU over a month: merging user states takes
// the most time, and here each is merged once.
func byDay(key, where string) string {
	return strings.NewReplacer("{key}", key, "{where}", where).Replace(
		"{each shard}(WITH {whole days} SELECT {key} AS key, {added up} FROM {database}.events_hourly WHERE {in whole days} AND {where} GROUP BY key" +
			" UNION ALL SELECT {key} AS key, {added up} FROM {database}.events_hourly WHERE {in whole hours} AND {where} GROUP BY key" +
			" UNION ALL SELECT {key} AS key, {counts of events} FROM (SELECT *, toStartOfHour(timestamp) AS hour FROM {database}.events) WHERE {in seconds} AND {where} GROUP BY key){/each shard}")
}

// byHour is byDay for a key that needs the hour.
func byHour(key, where string) string {
	return "(SELECT " + key + " AS key, {counts} FROM {database}.events_between(from = {from:UInt32}, to = {to:UInt32}) WHERE " + where + ")"
}

// rangeParameters are {from} and {to}, in Unix seconds. No event lies outside what the column can hold.
func rangeParameters(from, to int64) []proto.Parameter {
	second := func(n int64) string { return strconv.FormatInt(min(max(n, 0), maxUnixSeconds), 10) }
	return []proto.Parameter{parameter("from", second(from)), parameter("to", second(to))}
}

// sql writes the query: one row per key, and one over all keys, marked by is_total, because a user in two groups counts once
// in the total.
func (q *metricsQuery) sql() string {
	const figures = " AS key, toUInt64(sum(event_count)) AS total, uniqCombined64Merge({user bits})(unique_users_state) AS users, "
	where := "event_name = {event_name:String}"
	if q.channel != "" {
		where += " AND channel = {channel:String}"
	}
	withTotal := func(key, order string) string {
		return "SELECT key" + figures + "toUInt8(grouping(key) = 1) AS is_total FROM " + byDay(key, where) + " GROUP BY GROUPING SETS ((key), ()) ORDER BY " + order
	}
	besideTotal := func(groups, order string) string {
		return "SELECT * FROM (SELECT ''" + figures + "toUInt8(1) AS is_total FROM " + byDay("''", where) + " UNION ALL " + groups + ") ORDER BY " + order
	}
	switch q.groupBy {
	case "channel":
		return withTotal("CAST(channel, 'String')", "total DESC, key")
	case "day":
		return withTotal(isoHour("toStartOfDay(hour)"), "key")
	case "hour":
		return besideTotal("SELECT key"+figures+"toUInt8(0) AS is_total FROM "+byHour(isoHour("hour"), where)+" GROUP BY key", "key")
	case "campaign": // only the raw table knows campaigns
		return besideTotal(fmt.Sprintf("SELECT * FROM (SELECT CAST(campaign_id, 'String') AS key, count() AS total, uniqCombined64({user bits})(user_id) AS users, toUInt8(0) AS is_total FROM {events} "+
			"WHERE %s AND timestamp >= {from:UInt32} AND timestamp <= {to:UInt32} GROUP BY campaign_id ORDER BY total DESC, key LIMIT %d)", where, maxCampaigns+1), "total DESC, key") // one more shows that there are more
	}
	return "SELECT ''" + figures + "toUInt8(1) AS is_total FROM " + byDay("''", where)
}

func isoHour(expr string) string { return "formatDateTime(" + expr + ", '%Y-%m-%dT%H:00:00Z', 'UTC')" }

func (m *metricsAPI) query(ctx context.Context, q *metricsQuery) (total metricsGroup, groups []metricsGroup, err error) {
	var (
		key          proto.ColStr
		count, users proto.ColUInt64
		isTotal      proto.ColUInt8
	)
	err = m.do(ctx, func() { total, groups = metricsGroup{}, groups[:0] }, eachRow(ch.Query{
		Body:       q.sql(),
		Parameters: append(rangeParameters(q.from, q.to), parameter("event_name", q.eventName), parameter("channel", q.channel)),
	}, func(i int) {
		if g := (metricsGroup{key.Row(i), count[i], users[i]}); isTotal[i] == 1 {
			total = g
		} else {
			groups = append(groups, g)
		}
	}, &key, &count, &users, &isTotal))
	return total, groups, err
}

// do runs a query on a pooled connection. The server may have closed it, and with a restart all of the pool, of which ch-go puts
// one back now and then, so a failure without an answer is retried, after reset, on each. While events_hourly is exchanged for a table with other states, the query is retried
// with their precision.
func (m *metricsAPI) do(ctx context.Context, reset func(), query ch.Query) error {
	pool, err := m.pool(ctx)
	if err != nil {
		return err
	}
	body := query.Body
	query.Settings = append(slices.Clone(everyShard), ch.Setting{Key: "max_execution_time", Value: "10"}, ch.Setting{Key: "enable_positional_arguments", Value: "0"})
	for attempt := 0; ; attempt++ {
		reset()
		query.Body = m.store.sql(body)
		err = pool.Do(ctx, query)
		_, answered := ch.AsException(err)
		switch {
		case saysOtherStates(err) && attempt < 20:
			if sleep(ctx, statesPause) != nil {
				return err
			}
			if _, e := m.store.readStates(ctx, pool); e != nil {
				return err
			}
		case err == nil || answered || attempt >= 2*queryConns || ctx.Err() != nil:
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

func (m *metricsAPI) close() {
	if p := <-m.conns; p != nil {
		p.Close()
	}
	m.conns <- nil
}
