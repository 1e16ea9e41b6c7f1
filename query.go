// The metrics endpoint: how many events and users, in a range that is exact to the second.
//
// query.go builds its queries from the definitions of schema.sql, which cut a range into whole days, whole hours and, at its
// ends, seconds. It owns a small pool of ClickHouse connections.

package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode/utf8"

	"github.com/ClickHouse/ch-go"
	"github.com/ClickHouse/ch-go/chpool"
	"github.com/ClickHouse/ch-go/proto"

	"github.com/event-ingestion/event-ingestion/internal/profile"
	"github.com/event-ingestion/event-ingestion/internal/troubles"
	"github.com/event-ingestion/event-ingestion/internal/turns"
)

// Codes of the metrics endpoint beside those of an event.
const (
	codeInvalidRange   = "validation.invalid-range.error"
	codeInvalidGroupBy = "validation.invalid-group-by.error"
)

const (
	// queryTimeout bounds one metrics query; queryLimit does on the server.
	queryTimeout = 10 * time.Second
	// queryConns bounds the queries that run at once; the next one waits its turn, which clients have one after the other.
	queryConns = 8
	// clientConns is how many of them are one client's: somebody else's short question need not wait for the end of a long one.
	clientConns = 6
	// clientWaiting is how many queries of one client may wait. Beyond it are 429s.
	clientWaiting = 32
	// maxCampaigns is how many groups an answer by campaign has: anybody may make up campaigns.
	maxCampaigns = 1000
	// tablePause is the time between two attempts while hours are recounted or a table is detached, tableAttempts how many there are.
	tablePause    = 50 * time.Millisecond
	tableAttempts = 20
)

// metricsAPI serves GET /api/v1/metrics. The overview asks and answers through it, too.
type metricsAPI struct {
	clickhouse *clickhouse
	through    func() int64                 // Unix second up to which everything acknowledged is stored, 0 while unknown
	failed     func(error)                  // told what ClickHouse says when a query fails
	pool       func() (*chpool.Pool, error) // made when first used
	adopted    atomic.Int64                 // Unix second when the tables were last asked for their rule of revenue
	turns      *turns.Turns                 // at the pool's connections
}

// askerOf is the context's value for the client that a query is asked for.
type askerOf struct{}

// metricsQuery is a parsed request. Empty texts are no filter. from and to are Unix seconds, both inclusive.
type metricsQuery struct {
	eventName, channel, groupBy string
	from, to                    int64
}

// metricsResult is the JSON of an answer. Groups is nil unless they were asked for, and Through while it is not known: a
// backlog from before the start is being worked off.
type metricsResult struct {
	Count     uint64  `json:"total_count"`
	Users     uint64  `json:"unique_users"`
	Groups    []group `json:"grouped_data,omitzero"`
	Truncated bool    `json:"truncated,omitempty"`
	Through   *int64  `json:"complete_through"`
}

// group is a line of an answer. Users and Revenue are only in some of them. Revenue is in CURRENCY, as ClickHouse writes it: it may
// exceed 64 bits.
type group struct {
	Key     string      `json:"key"`
	Count   int64       `json:"total_count"`
	Users   *uint64     `json:"unique_users,omitempty"`
	Revenue json.Number `json:"revenue,omitempty"`
}

func newMetricsAPI(db *clickhouse, through func() int64, failed func(error)) *metricsAPI {
	pool := sync.OnceValues(func() (*chpool.Pool, error) {
		return chpool.New(context.Background(), chpool.Options{ClientOptions: db.options, MaxConns: queryConns})
	})
	return &metricsAPI{clickhouse: db, through: through, failed: failed, pool: pool, turns: turns.New(queryConns, clientConns, clientWaiting)}
}

func (m *metricsAPI) serve(w http.ResponseWriter, r *http.Request) {
	q, problems := parseMetricsQuery(r.URL.RawQuery)
	m.answer(w, r, problems, func(ctx context.Context, through *int64) ([]byte, error) {
		a, err := m.query(ctx, q)
		a.Through = through
		return jsonOf(a), err
	})
}

// answer writes what ask returns, or why it cannot.
func (m *metricsAPI) answer(w http.ResponseWriter, r *http.Request, problems []problem,
	ask func(ctx context.Context, through *int64) ([]byte, error)) {
	if len(problems) > 0 {
		writeProblems(w, problems)
		return
	}
	ctx, cancel := context.WithTimeout(context.WithValue(r.Context(), askerOf{}, clientOf(w, r)), queryTimeout)
	defer cancel()
	var known *int64
	if through := m.through(); through != 0 { // before the query, which then sees at least that much
		known = &through
	}
	err := m.adopt(ctx)
	var body []byte
	if err == nil {
		body, err = ask(ctx, known)
	}
	if r.Context().Err() != nil { // the client has gone
		return
	}
	if errors.Is(err, turns.ErrTooMany) {
		w.Header().Set("Retry-After", retryAfterSeconds)
		writeError(w, http.StatusTooManyRequests, "too many requests", err.Error())
		return
	}
	if err != nil {
		m.failed(err)
		writeUnavailable(w, "ClickHouse does not answer the query: "+firstLine(err.Error()))
		return
	}
	writeJSON(w, http.StatusOK, body)
}

// parseMetricsQuery checks the parameters; all problems come back at once.
func parseMetricsQuery(rawQuery string) (*metricsQuery, []problem) {
	c := newQueryCheck(rawQuery, "event_name", "from", "to", "channel", "group_by")
	q := c.filters()
	if q.eventName == "" {
		c.fail("event_name", codeRequired, "is required")
	}
	q.from, q.to = c.seconds("from"), c.seconds("to")
	c.rangeAndChannel(q)
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
	if len(c.problems) < maxProblems {
		c.problems = append(c.problems, problem{field, code, field + " " + message})
	}
}

// filters reads what metrics and overview have in common, but for the range.
func (c *queryCheck) filters() *metricsQuery {
	v := c.values
	q := &metricsQuery{eventName: v.Get("event_name"), channel: v.Get("channel"), groupBy: v.Get("group_by")}
	if !utf8.ValidString(q.eventName) {
		c.fail("event_name", codeInvalidFormat, "is not valid UTF-8 text")
	}
	return q
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

func (c *queryCheck) rangeAndChannel(q *metricsQuery) {
	if !c.noRange && q.to <= q.from {
		c.fail("to", codeInvalidRange, "must be after from")
	}
	if !validChannel([]byte(q.channel)) {
		c.fail("channel", codeInvalidChannel, "must be one of web, mobile_app, api")
	}
}

// byDay is a subquery: what happened in the range {from} to {to}, by a key made of event_name, channel and the day of hour.
// The view events_between_by_day answers the same questions, for five times the CPU over a month: merging user states takes
// the most time, and here each is merged once.
func byDay(key, where string) string {
	return strings.NewReplacer("{key}", key, "{where}", where).Replace(
		"(WITH {whole days} SELECT {key} AS key, {added up} FROM {events_hourly}" +
			" WHERE {in whole days} AND {where} GROUP BY key" +
			" UNION ALL SELECT {key} AS key, {added up} FROM {events_hourly} WHERE {in whole hours} AND {where} GROUP BY key" +
			" UNION ALL SELECT {key} AS key, {counts of events} FROM (SELECT *, toStartOfHour(timestamp) AS hour FROM {events})" +
			" WHERE {in seconds} AND {where} GROUP BY key)")
}

// byHour is byDay for a key that needs the hour.
func byHour(key, where string) string {
	return "(SELECT " + key + " AS key, {counts} FROM {database}.events_between(from = {from:UInt32}, to = {to:UInt32}) WHERE " + where + ")"
}

// inRange are the events of the raw table in the range.
const inRange = "timestamp >= {from:UInt32} AND timestamp <= {to:UInt32}"

// where is the filter, in terms of parameters.
func (q *metricsQuery) where() string {
	terms := []string{"1"}
	if q.channel != "" {
		terms = append(terms, "channel = {channel:String}")
	}
	if q.eventName != "" {
		terms = append(terms, "event_name = {event_name:String}")
	}
	return strings.Join(terms, " AND ")
}

// parameters are what where and the range need. No event lies outside what the column can hold.
func (q *metricsQuery) parameters() []proto.Parameter {
	second := func(n int64) string { return strconv.FormatInt(min(max(n, 0), maxUnixSeconds), 10) }
	return []proto.Parameter{
		parameter("from", second(q.from)), parameter("to", second(q.to)),
		parameter("event_name", q.eventName), parameter("channel", q.channel),
	}
}

// sql writes the query: one row per key, and one over all keys, marked by is_total, because a user in two groups counts once
// in the total.
func (q *metricsQuery) sql() string {
	const figures = " AS key, toUInt64(sum(event_count)) AS total, uniqCombined64Merge(17)(unique_users_state) AS users, "
	where := q.where()
	withTotal := func(key, order string) string {
		return "SELECT key" + figures + "toUInt8(grouping(key) = 1) AS is_total FROM " + byDay(key, where) +
			" GROUP BY GROUPING SETS ((key), ()) ORDER BY " + order
	}
	besideTotal := func(groups, order string) string {
		return "SELECT * FROM (SELECT ''" + figures + "toUInt8(1) AS is_total FROM " + byDay("''", where) +
			" UNION ALL " + groups + ") ORDER BY " + order
	}
	switch q.groupBy {
	case "channel":
		return withTotal("CAST(channel, 'String')", "total DESC, key")
	case "day":
		return withTotal(isoHour("toStartOfDay(hour)"), "key")
	case "hour":
		// In halves, because ClickHouse reads a part of this size on one thread, and two would each make a state for every hour.
		const middle = "intDiv({from:UInt32} + {to:UInt32}, 7200) * 3600"
		half := func(of string) string {
			return "SELECT key" + figures + "toUInt8(0) AS is_total FROM " + byHour(isoHour("hour"), where+" AND hour "+of+middle) + " GROUP BY key"
		}
		return besideTotal(half("< ")+" UNION ALL "+half(">= "), "key")
	case "campaign": // only the raw table knows campaigns
		return besideTotal("SELECT * FROM (SELECT CAST(campaign_id, 'String') AS key, count() AS total,"+
			" uniqCombined64(17)(user_id) AS users, toUInt8(0) AS is_total FROM {events} WHERE "+where+" AND "+inRange+
			" GROUP BY campaign_id ORDER BY total DESC, key LIMIT "+
			strconv.Itoa(maxCampaigns+1)+")", "total DESC, key") // one more shows that there are more
	}
	return "SELECT ''" + figures + "toUInt8(1) AS is_total FROM " + byDay("''", where)
}

// errNoTotal is an answer that is cut off before it ends, or throws rows away: a setting of the profile does that.
var errNoTotal = errors.New("ClickHouse answers without the total; look at the profile of CLICKHOUSE_USERNAME for what throws rows away")

func isoHour(expr string) string { return "formatDateTime(" + expr + ", '%Y-%m-%dT%H:00:00Z', 'UTC')" }

func (m *metricsAPI) query(ctx context.Context, q *metricsQuery) (a metricsResult, err error) {
	var (
		key          proto.ColStr
		count, users proto.ColUInt64
		isTotal      proto.ColUInt8
		answered     bool
	)
	reset := func() {
		answered = false
		if a = (metricsResult{}); q.groupBy != "" {
			a.Groups = []group{}
		}
	}
	err = m.do(ctx, reset, eachRow(ch.Query{Body: q.sql(), Parameters: q.parameters()}, func(i int) {
		if isTotal[i] == 1 {
			a.Count, a.Users, answered = count[i], users[i], true
		} else {
			a.Groups = append(a.Groups, group{Key: key.Row(i), Count: int64(count[i]), Users: new(users[i])})
		}
	}, &key, &count, &users, &isTotal))
	if err == nil && !answered {
		err = errNoTotal
	}
	if q.groupBy == "campaign" && len(a.Groups) > maxCampaigns {
		a.Groups, a.Truncated = a.Groups[:maxCampaigns], true
	}
	if q.groupBy != "" && !a.Truncated { // the parts of a query may see different moments, above all on several servers
		a.Count = 0
		for _, g := range a.Groups {
			a.Count += uint64(g.Count)
		}
	}
	return a, err
}

// adopt has an instance that does not decide about the tables go by their rule of revenue, which another one may have changed a second
// ago.
func (m *metricsAPI) adopt(ctx context.Context) error {
	now := time.Now().Unix()
	if m.clickhouse.decides || m.adopted.Load() == now { // Fast path
		return nil
	}
	err := m.clickhouse.adoptRevenue(ctx, m)
	if err == nil {
		m.adopted.Store(now)
	}
	return err
}

// adopted is connected for a command, which does not decide about the tables either.
func (c *clickhouse) adopted(ctx context.Context, f func(asker) error) error {
	return c.connected(func(conn asker) error {
		if err := c.adoptRevenue(ctx, conn); err != nil {
			return err
		}
		return f(conn)
	})
}

// Do is do for an answer that needs no reset.
func (m *metricsAPI) Do(ctx context.Context, query ch.Query) error {
	return m.do(ctx, func() {}, query)
}

// do runs a query on a pooled connection, when it is the turn of whoever asks. The server may have closed it, and with a restart all of
// the pool, of which ch-go puts
// one back now and then, so a failure without an answer is retried, after reset, on each. While hours are recounted, or a table is
// detached by a person, the query is retried for a second.
func (m *metricsAPI) do(ctx context.Context, reset func(), query ch.Query) error {
	pool, err := m.pool()
	if err != nil {
		return err
	}
	asker, _ := ctx.Value(askerOf{}).(client)
	done, err := m.turns.Wait(ctx, asker)
	if err != nil {
		return err
	}
	defer done()
	query.Body = m.clickhouse.sql(query.Body)
	query.Settings = profile.Question
	for attempt := 0; ; attempt++ {
		reset()
		err = pool.Do(ctx, query)
		_, answered := ch.AsException(err)
		switch {
		case ch.IsErr(err, proto.ErrUnknownTable, proto.ErrFunctionThrowIfValueIsNonZero) && attempt < tableAttempts:
			if troubles.Sleep(ctx, tablePause) != nil {
				return err
			}
		case err == nil || answered || attempt >= 2*queryConns || ctx.Err() != nil:
			return err
		}
	}
}

func (m *metricsAPI) close() {
	if pool, err := m.pool(); err == nil {
		pool.Close()
	}
}
