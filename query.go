// The metrics endpoint: how many events and users, in a range that is exact to the second.
//
// What events_hourly knows, package questions asks of it; what only rows know, query.go does. It owns the pool of connections.

package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ClickHouse/ch-go"
	"github.com/ClickHouse/ch-go/chpool"
	"github.com/ClickHouse/ch-go/proto"

	"github.com/event-ingestion/event-ingestion/internal/profile"
	"github.com/event-ingestion/event-ingestion/internal/questions"
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
	// maxGroups is how many groups an answer by campaign, tag or member of metadata has: anybody may make these up.
	maxGroups = 1000
)

// metricsAPI serves GET /api/v1/metrics. The overview asks and answers through it, too.
type metricsAPI struct {
	clickhouse *clickhouse
	through    func() int64                 // Unix second up to which everything acknowledged is stored, 0 while unknown
	failed     func(error)                  // told what ClickHouse says when a query fails
	pool       func() (*chpool.Pool, error) // made when first used
	adopted    atomic.Int64                 // Unix second when the tables were last asked for their rule of revenue
	turns      *turns.Turns                 // at the pool's connections
	hours      questions.Hours              // what events_hourly answers
}

// askerOf is the context's value for the client that a query is asked for.
type askerOf struct{}

// metricsQuery is a parsed request. Empty texts are no filter. from and to are Unix seconds, both inclusive.
type metricsQuery struct {
	questions.Filter
	groupBy, tz string
	from, to    int64
	calendar    *questions.Calendar // of tz
	member      string              // SQL: what group_by=metadata.PATH names, as JSON
	sum         string              // SQL: the sum that is asked for, or noSum
}

// metricsResult is the JSON of an answer. Groups is nil unless they were asked for, and Through while it is not known: a
// backlog from before the start is being worked off.
type metricsResult struct {
	Count     uint64      `json:"total_count"`
	Users     uint64      `json:"unique_users"`
	Sum       json.Number `json:"sum,omitempty"`
	Groups    []group     `json:"grouped_data,omitzero"`
	Truncated bool        `json:"truncated,omitempty"`
	Through   *int64      `json:"complete_through"`
}

// group is a line of an answer. Users, Sum and Revenue are only in some of them. The last two are as ClickHouse writes them: they may
// exceed 64 bits. Revenue is in CURRENCY. at is the Unix second that a key of time names.
type group struct {
	Key     string      `json:"key"`
	Count   int64       `json:"total_count"`
	Users   *uint64     `json:"unique_users,omitempty"`
	Sum     json.Number `json:"sum,omitempty"`
	Revenue json.Number `json:"revenue,omitempty"`
	at      int64
}

func newMetricsAPI(db *clickhouse, through func() int64, failed func(error)) *metricsAPI {
	pool := sync.OnceValues(func() (*chpool.Pool, error) {
		return chpool.New(context.Background(), chpool.Options{ClientOptions: db.options, MaxConns: queryConns})
	})
	return &metricsAPI{clickhouse: db, through: through, failed: failed, pool: pool, turns: turns.New(queryConns, clientConns, clientWaiting)}
}

func (m *metricsAPI) serve(w http.ResponseWriter, r *http.Request) {
	q, problems := m.parse(r.URL.RawQuery)
	m.answer(w, r, problems, func(ctx context.Context, through *int64) ([]byte, error) {
		return questions.Patiently(ctx, func() ([]byte, error) {
			a, err := m.query(ctx, q)
			a.Through = through
			return jsonOf(a), err
		})
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
		why := "ClickHouse does not answer the query: " + firstLine(err.Error())
		switch {
		case errors.Is(err, turns.ErrNone):
			why = fmt.Sprintf("other questions take ClickHouse's time: %s within %s", turns.ErrNone, queryTimeout)
		case ch.IsErr(err, proto.ErrTimeoutExceeded, proto.ErrMemoryLimitExceeded) || errors.Is(err, context.DeadlineExceeded):
			why = fmt.Sprintf("the question takes over %s, or over %d MiB of ClickHouse's memory: narrow the range, or declare the member of metadata in METADATA_COLUMNS; %s",
				queryTimeout, profile.QuestionMemory>>20, why)
		}
		writeUnavailable(w, why)
		return
	}
	writeJSON(w, http.StatusOK, body)
}

// parse checks the parameters; all problems come back at once.
func (m *metricsAPI) parse(rawQuery string) (*metricsQuery, []problem) {
	c := newQueryCheck(rawQuery, "event_name", "from", "to", "channel", "group_by", "tz", "campaign_id", "user_id", "tag", "sum", memberParameters)
	q := c.filters()
	if q.EventName == "" {
		c.fail("event_name", codeRequired, "is required")
	}
	q.from, q.to = c.seconds("from"), c.seconds("to")
	c.place(q)
	members := 0
	for _, name := range slices.Sorted(maps.Keys(c.values)) {
		if path, is := strings.CutPrefix(name, memberPrefix); is {
			if members++; members > maxMembers { // of any more, none is looked at
				c.fail("metadata", codeInvalidFormat, fmt.Sprintf("filters by more than %d members", maxMembers))
				break
			}
			q.HasMember(m.memberOf(c, q, name, codeInvalidFormat, path), c.text(name))
		}
	}
	if name := c.values.Get("sum"); name != "" {
		if path, is := strings.CutPrefix(name, memberPrefix); is {
			q.sum = "toString(" + questions.Sum(m.memberOf(c, q, "sum", codeInvalidFormat, path)) + ")"
		} else {
			c.fail("sum", codeInvalidFormat, "must be metadata.PATH")
		}
	}
	switch q.groupBy {
	case "", "channel", questions.Hour, questions.Day, questions.Month, "campaign", "tag":
	default:
		if path, is := strings.CutPrefix(q.groupBy, memberPrefix); is {
			q.member = m.memberOf(c, q, "group_by", codeInvalidGroupBy, path)
		} else {
			c.fail("group_by", codeInvalidGroupBy, "must be one of channel, hour, day, month, campaign, tag, metadata.PATH")
		}
	}
	return q, c.problems
}

// maxMembers is how many members a question filters by, noSum the SQL where no sum is asked for.
const (
	maxMembers = 5
	noSum      = "''"
)

// memberOf is the SQL for a member, as JSON: the column that has it, or its place in metadata.
func (m *metricsAPI) memberOf(c *queryCheck, q *metricsQuery, field, code, path string) string {
	member, err := questions.MemberOf(m.clickhouse.columns, path, q.Value)
	if err != nil {
		c.fail(field, code, err.Error())
	}
	return member
}

// filters reads what metrics and overview have in common, but for the range.
func (c *queryCheck) filters() *metricsQuery {
	return &metricsQuery{groupBy: c.text("group_by"), tz: c.text("tz"), sum: noSum, Filter: questions.Filter{EventName: c.text("event_name"),
		Channel: c.text("channel"), Campaign: c.text("campaign_id"), User: c.text("user_id"), Tag: c.text("tag")}}
}

// place checks where the events are that are asked for: in time and by channel.
func (c *queryCheck) place(q *metricsQuery) {
	if !c.noRange && q.to <= q.from {
		c.fail("to", codeInvalidRange, "must be after from")
	}
	if !validChannel([]byte(q.Channel)) {
		c.fail("channel", codeInvalidChannel, "must be one of web, mobile_app, api")
	}
	zone, err := questions.Zone(q.tz)
	if err != nil {
		c.fail("tz", codeInvalidFormat, "must be a name of the IANA time zone database, such as Europe/Istanbul")
		zone = time.UTC
	}
	from, to := min(max(q.from, 0), maxUnixSeconds), min(max(q.to, 0), maxUnixSeconds) // no event is outside
	q.calendar = questions.CalendarOf(zone, from, to)
}

// isOfRows says whether the answer is in the raw table only.
func (q *metricsQuery) isOfRows() bool                { return q.OfRows() || q.sum != noSum }
func (q *metricsQuery) parameters() []proto.Parameter { return q.Parameters(q.from, q.to) }

// isOfTime and isOfNames say what kind the groups are of: those of time are named by the calendar, and names are made up by anybody.
func (q *metricsQuery) isOfTime() bool { return q.unitOfTime() != "" }

func (q *metricsQuery) unitOfTime() string {
	if slices.Contains([]string{questions.Hour, questions.Day, questions.Month}, q.groupBy) {
		return q.groupBy
	}
	return ""
}

func (q *metricsQuery) isOfNames() bool {
	return q.groupBy == "campaign" || q.groupBy == "tag" || q.member != ""
}

// isOfHours says whether the groups are in events_hourly, where the total is unless isOfRows.
func (q *metricsQuery) isOfHours() bool {
	return !q.isOfRows() && !q.isOfNames() && (!q.isOfTime() || q.calendar.WholeHours())
}

// ofHours is the question for events_hourly.
func (q *metricsQuery) ofHours() *questions.Question {
	of := &questions.Question{From: q.from, To: q.to, Where: q.SQL(), Parameters: q.parameters(), Calendar: q.calendar, Zone: q.tz}
	if q.isOfHours() {
		of.Unit, of.ByChannel = q.unitOfTime(), q.groupBy == "channel"
	}
	return of
}

// unit is the SQL for the number of the hour, day or month that a moment, in SQL, is in.
func (q *metricsQuery) unit(unit, moment string) string {
	return "toString(" + q.calendar.SQL(unit, moment) + ")"
}

// rowsSQL writes the query for what the raw table alone has: one row per key, and one marked by is_total, because a user in two groups,
// or an event with two tags, counts once in the total. When events_hourly has the total, that row has no figures.
func (q *metricsQuery) rowsSQL() string {
	ofRows := func(key, isTotal string) string {
		return "SELECT " + key + " AS key, count() AS total, uniqCombined64(17)(user_id) AS users, " + q.sum + " AS added, toUInt8(" + isTotal + ") AS is_total" +
			" FROM {events} WHERE " + q.SQL() + " AND " + questions.InRange
	}
	total := "SELECT '' AS key, toUInt64(0) AS total, toUInt64(0) AS users, '' AS added, toUInt8(1) AS is_total"
	if q.isOfRows() {
		total = ofRows("''", "1") // without GROUP BY, and so with a line even when there is nothing
	}
	if q.groupBy == "" {
		return total
	}
	groups := ofRows(q.rowKey(), "0") + " GROUP BY key"
	if q.isOfNames() {
		groups = "SELECT CAST(key, 'String') AS key, total, users, added, is_total FROM (" + groups +
			" ORDER BY total DESC, key LIMIT " + strconv.Itoa(maxGroups+1) + ")" // one more shows that there are more
	}
	return "SELECT CAST(key, 'String') AS key, total, users, added, is_total FROM (" + total + " UNION ALL " + groups + ") ORDER BY total DESC, key"
}

// rowKey is the SQL for the key of a row.
func (q *metricsQuery) rowKey() string {
	switch {
	case q.isOfTime():
		return q.unit(q.groupBy, "timestamp")
	case q.groupBy == "campaign":
		return "campaign_id"
	case q.groupBy == "tag":
		return "CAST(arrayJoin(if(empty(tags), [''], arrayDistinct(tags))), 'String')"
	case q.member != "":
		return questions.Text(q.member)
	}
	return "CAST(channel, 'String')"
}

func (m *metricsAPI) query(ctx context.Context, q *metricsQuery) (a metricsResult, err error) {
	of, total, groups := q.ofHours(), questions.Figures{}, []questions.Figures(nil)
	err = questions.Together(ctx, func(ctx context.Context) (err error) {
		if !q.isOfRows() {
			total, groups, err = m.hours.Ask(ctx, m.do, of)
		}
		return err
	}, func(ctx context.Context) (err error) {
		if !q.isOfHours() {
			a, err = m.askRows(ctx, q)
		}
		return err
	})
	if !q.isOfRows() {
		a.Count, a.Users = uint64(total.Count), total.Users
	}
	if q.isOfHours() && q.groupBy != "" {
		a.Groups = q.groupsOf(groups, of.Unit)
	}
	if q.groupBy != "" && q.groupBy != "tag" && !a.Truncated { // the parts of an answer may see different moments
		a.Count = 0
		for _, g := range a.Groups {
			a.Count += uint64(g.Count)
		}
	}
	return a, err
}

// askRows asks the raw table.
func (m *metricsAPI) askRows(ctx context.Context, q *metricsQuery) (a metricsResult, err error) {
	var (
		key, added   proto.ColStr
		count, users proto.ColUInt64
		isTotal      proto.ColUInt8
		answered     bool
	)
	reset := func() {
		answered = false
		if a = (metricsResult{}); q.groupBy != "" {
			a.Groups = []group{}
		}
		if q.sum != noSum {
			a.Sum = "0" // a question without rows has no total
		}
	}
	err = m.do(ctx, reset, questions.EachRow(ch.Query{Body: q.rowsSQL(), Parameters: q.parameters()}, func(i int) {
		if isTotal[i] == 1 {
			a.Count, a.Users, a.Sum, answered = count[i], users[i], json.Number(added.Row(i)), true
		} else {
			a.Groups = append(a.Groups, q.named(q.unitOfTime(), group{Key: key.Row(i), Count: int64(count[i]), Users: new(users[i]), Sum: json.Number(added.Row(i))}))
		}
	}, &key, &count, &users, &added, &isTotal))
	if err == nil && !answered {
		err = questions.ErrCut
	}
	if q.isOfTime() {
		inOrder(a.Groups)
	}
	if len(a.Groups) > maxGroups && q.isOfNames() {
		a.Groups, a.Truncated = a.Groups[:maxGroups], true
	}
	return a, err
}

// groupsOf are the groups of events_hourly, which are of a unit of time or of none.
func (q *metricsQuery) groupsOf(all []questions.Figures, unit string) []group {
	groups := make([]group, len(all))
	for i, f := range all {
		groups[i] = q.named(unit, group{Key: f.Key, Count: f.Count, Users: &all[i].Users, Revenue: json.Number(f.Revenue)})
	}
	if unit != "" {
		inOrder(groups)
	}
	return groups
}

// named gives a group of a unit of time its key instead of its number.
func (q *metricsQuery) named(unit string, g group) group {
	if unit != "" {
		number, _ := strconv.ParseInt(g.Key, 10, 64)
		g.Key, g.at = q.calendar.Key(unit, number)
	}
	return g
}

func inOrder(groups []group) {
	slices.SortFunc(groups, func(a, b group) int { return cmp.Compare(a.at, b.at) })
}

// adopt has an instance that does not decide about the tables go by their rule of revenue, which another one may have just changed.
func (m *metricsAPI) adopt(ctx context.Context) (err error) {
	now := time.Now().Unix()
	if m.clickhouse.decides || m.adopted.Load() == now { // Fast path
		return nil
	}
	if err = m.clickhouse.adoptRevenue(ctx, m); err == nil {
		m.adopted.Store(now)
	}
	return err
}

// Do is do for an answer that needs no reset.
func (m *metricsAPI) Do(ctx context.Context, query ch.Query) error {
	return m.do(ctx, func() {}, query)
}

// do runs a query on a pooled connection, when it is the turn of whoever asks. The server may have closed it, and with a restart all of
// the pool, of which ch-go puts one back now and then, so a failure without an answer is retried, after reset, on each.
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
		if _, answered := ch.AsException(err); err == nil || answered || attempt >= 2*queryConns || ctx.Err() != nil {
			return err
		}
	}
}

func (m *metricsAPI) close() {
	if pool, err := m.pool(); err == nil {
		pool.Close()
	}
}
