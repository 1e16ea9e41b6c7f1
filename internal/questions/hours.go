// Hours: what events_hourly answers, and what of it need not be computed again.
//
// Merging user states is what these questions cost, a millisecond each when users are many. So what was merged is kept, and used only
// while the same events are there: each hour has the count of its events and the sum of their ids, and the query that computes the rest
// reads both. Late events, erasures, mendings, retention and other instances change the two, so nothing has to expire.

package questions

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/ClickHouse/ch-go"
	"github.com/ClickHouse/ch-go/proto"
)

const (
	// maxUnits is how many hours, days or months of a question are kept: two years by the hour.
	maxUnits = 20_000
	// keptTries is how often a question is asked with what is kept, some of which has just changed, before it is asked without.
	keptTries = 3
)

// ErrCut is an answer that is cut off before it ends, or throws rows away: a setting of the profile does that.
var ErrCut = errors.New("ClickHouse answers with fewer rows than it has; look at the profile of CLICKHOUSE_USERNAME for what throws rows away")

// Hours answers questions from events_hourly and, for the seconds at the ends of a range, from events.
type Hours struct {
	kept kept
}

// Question is about the events of a range. Parameters has {from} and {to}, too.
type Question struct {
	From, To   int64  // Unix seconds, both included
	Where      string // SQL about event_name and channel, in terms of Parameters
	Parameters []proto.Parameter
	ByChannel  bool
	Unit       string    // or by hours, days or months
	Calendar   *Calendar // of Unit, with whole hours
	Zone       string    // names Calendar
}

// Figures are those of a group. Key is the channel, or the number of the unit as Calendar.Key takes it. Revenue is as ClickHouse writes it.
type Figures struct {
	Key     string
	Count   int64
	Users   uint64
	Revenue string
}

// Parts of a range by time: what is neither in its first nor in its last unit is counted by h.units.
const (
	firstUnit = "first"
	between   = "between"
	lastUnit  = "last"
)

// span is whole hours, from one Unix second to another, which is excluded. known is what is kept of it, nil when that is not used.
type span struct {
	from, to int64
	part     string
	known    set
}

// Ask returns the total and the groups that have events: the largest channel first, units in no order.
func (h *Hours) Ask(ctx context.Context, do Do, q *Question) (total Figures, groups []Figures, err error) {
	first, last := roundUp(q.From, hourSeconds), roundDown(q.To+1, hourSeconds)
	spans := []span{{from: first, to: last, part: firstUnit}}
	var middle []Figures
	tasks := []func(context.Context) error{func(ctx context.Context) (err error) {
		total, groups, err = h.total(ctx, do, q, spans)
		return err
	}}
	if q.Unit != "" {
		if begin, end, starts := q.Calendar.starting(q.Unit, q.From, q.To, maxUnits); end > 0 {
			spans = []span{{from: first, to: begin, part: firstUnit}, {from: begin, to: end, part: between}, {from: end, to: last, part: lastUnit}}
			if begin < end {
				tasks = append(tasks, func(ctx context.Context) (err error) {
					middle, err = h.units(ctx, do, q, begin, end, starts)
					return err
				})
			}
		}
	}
	if err := Together(ctx, tasks...); err != nil {
		return total, nil, err
	}
	switch {
	case q.ByChannel:
		slices.SortFunc(groups, func(a, b Figures) int { return cmp.Or(cmp.Compare(b.Count, a.Count), cmp.Compare(a.Key, b.Key)) })
	case q.Unit == "":
		groups = nil
	default:
		ends := groups
		groups = middle
		for _, g := range ends {
			switch g.Key {
			case firstUnit:
				g.Key = fmt.Sprint(q.Calendar.Number(q.Unit, q.From))
			case lastUnit:
				g.Key = fmt.Sprint(q.Calendar.Number(q.Unit, q.To))
			default:
				continue
			}
			groups = append(groups, g)
		}
	}
	return total, groups, nil
}

// Together runs the tasks at once. The first error ends them all, and is returned.
func Together(ctx context.Context, tasks ...func(context.Context) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var waiting sync.WaitGroup
	for _, task := range tasks {
		waiting.Go(func() {
			if err := task(ctx); err != nil {
				cancel(err)
			}
		})
	}
	waiting.Wait()
	return context.Cause(ctx)
}

// about names what a question is about, its range left out.
func (q *Question) about() string {
	values := []string{q.Where}
	for _, p := range q.Parameters {
		if p.Key != "from" && p.Key != "to" {
			values = append(values, p.Value)
		}
	}
	return strings.Join(append(values, fmt.Sprint(q.ByChannel)), "\x00")
}

// key is the SQL of a row's group, in a part of the range.
func (q *Question) key(part string) string {
	switch {
	case q.ByChannel:
		return "CAST(channel, 'String')"
	case q.Unit == "":
		return "''"
	}
	return "'" + part + "'"
}

const (
	// figures are the columns of a row of total: an event is in one row, and its user in one state. No state has no user.
	figures = "sum(event_count) AS n, sumWithOverflow(id_sum) AS ids, sum(revenue) AS money, "
	states  = "uniqCombined64MergeState(17)(unique_users_state) AS state"
	noState = "arrayReduce('uniqCombined64State(17)', emptyArrayString()) AS state"
	noRow   = "toInt64(0) AS n, toUInt64(0) AS ids, toDecimal128(0, 4) AS money, "
)

// Kinds of rows of total beside those of a span, whose kind is its index.
const (
	ofEnds    = 10 + iota // hours and seconds at the ends of the range
	ofKept                // a state that was kept
	ofNothing             // is always there
)

// hours are subqueries of rows with these columns from a span, whose groups have to be grouped once more: whole days are read from the
// projection daily, which has a state per day.
func (q *Question) hours(s span, columns string) (sql []string) {
	firstDay, endDay := roundUp(s.from, daySeconds), roundDown(s.to, daySeconds)
	if firstDay >= endDay {
		firstDay, endDay = s.to, s.to
	}
	for _, r := range []struct {
		moment   string
		from, to int64
	}{{"hour", s.from, firstDay}, {"toStartOfDay(hour)", firstDay, endDay}, {"hour", endDay, s.to}} {
		if r.from < r.to {
			sql = append(sql, fmt.Sprintf("SELECT %s AS key, %s FROM {events_hourly} WHERE %[3]s >= %[4]d AND %[3]s < %[5]d AND %[6]s GROUP BY key",
				q.key(s.part), columns, r.moment, r.from, r.to, q.Where))
		}
	}
	return sql
}

// totalSQL writes the query: rows of spans, of the ends of the range, and what is kept. Windows over them are the groups and the total.
func (q *Question) totalSQL(spans []span, isKept bool) string {
	var rows []string
	row := func(kind int, from string) {
		rows = append(rows, fmt.Sprintf("SELECT key, toUInt8(%d) AS kind, n, ids, money, state FROM (%s)", kind, from))
	}
	fresh := []string{strconv.Itoa(len(spans))} // no row's kind
	for i, s := range spans {
		columns, again := figures+states, "uniqCombined64MergeState(17)(state) AS state"
		if s.known != nil {
			columns, again = figures+noState, noState
		} else {
			fresh = append(fresh, strconv.Itoa(i))
		}
		switch hours := q.hours(s, columns); len(hours) {
		case 0:
		case 1:
			row(i, hours[0])
		default:
			row(i, "SELECT key, sum(n) AS n, sumWithOverflow(ids) AS ids, sum(money) AS money, "+again+
				" FROM (SELECT key, n, ids, money, state FROM ("+strings.Join(hours, " UNION ALL ")+")) GROUP BY key")
		}
	}
	start, end := spans[0], spans[len(spans)-1]
	row(ofEnds, "WITH {whole hours} SELECT "+q.key(end.part)+" AS key, "+figures+states+
		fmt.Sprintf(" FROM {events_hourly} WHERE hour >= %d AND hour < end_hour AND ", max(start.from, end.to))+q.Where+" GROUP BY key")
	row(ofEnds, "WITH {whole hours} SELECT "+fmt.Sprintf("if(timestamp < %d, %s, %s)", start.to, q.key(start.part), q.key(end.part))+
		" AS key, toInt64(count()) AS n, {id sum of events} AS ids, {revenue of events} AS money, uniqCombined64State(17)(user_id) AS state"+
		" FROM {events} WHERE {in seconds} AND "+q.Where+" GROUP BY key")
	row(ofNothing, "SELECT '' AS key, "+noRow+noState)
	if isKept {
		row(ofKept, "SELECT key, "+noRow+"CAST(state, 'AggregateFunction(uniqCombined64(17), String)') AS state FROM kept")
	}
	perKey := "toInt64(0), '', toUInt64(0)"
	if q.ByChannel || q.Unit != "" {
		perKey = "toInt64(sum(n) OVER (PARTITION BY key)), toString(sum(money) OVER (PARTITION BY key)), uniqCombined64Merge(17)(state) OVER (PARTITION BY key)"
	}
	return "SELECT CAST(key, 'String'), kind, toInt64(n), ids, if(kind IN (" + strings.Join(fresh, ", ") + "), CAST(state, 'String'), ''), " + perKey +
		", toInt64(sum(n) OVER ()), toString(sum(money) OVER ()), uniqCombined64Merge(17)(state) OVER (), count() OVER () FROM (" +
		strings.Join(rows, " UNION ALL ") + ")"
}

// total asks for the total and the groups, and keeps what had to be computed of the spans.
func (h *Hours) total(ctx context.Context, do Do, q *Question, spans []span) (total Figures, groups []Figures, err error) {
	about := q.about()
	nameOf := func(s span) string { return fmt.Sprint(about, "\x00", s.from, " ", s.to) }
	for try := 0; ; try++ {
		var keptKeys, keptStates proto.ColStr
		for i := range spans {
			s := &spans[i]
			if s.known = nil; try < keptTries {
				s.known = h.kept.get(nameOf(*s))
			}
			for _, l := range s.known {
				if !q.ByChannel && q.Unit != "" {
					l.key = s.part
				}
				keptKeys.Append(l.key)
				keptStates.Append(l.state)
			}
		}
		query := ch.Query{Body: q.totalSQL(spans, keptKeys.Rows() > 0), Parameters: q.Parameters}
		if keptKeys.Rows() > 0 {
			query.ExternalTable, query.ExternalData = "kept", []proto.InputColumn{{Name: "key", Data: &keptKeys}, {Name: "state", Data: &keptStates}}
		}
		var (
			key, state, revenue, allRevenue proto.ColStr
			kind                            proto.ColUInt8
			n, count, all                   proto.ColInt64
			ids, users, allUsers, rows      proto.ColUInt64
			answered, expected              uint64
			found                           []set
			byKey                           map[string]Figures
		)
		reset := func() {
			answered, expected, found, byKey, total = 0, 1, make([]set, len(spans)), map[string]Figures{}, Figures{}
		}
		err := do(ctx, reset, EachRow(query, func(i int) {
			answered, expected = answered+1, rows[i]
			total = Figures{Count: all[i], Users: allUsers[i], Revenue: allRevenue.Row(i)}
			if count[i] != 0 {
				byKey[key.Row(i)] = Figures{Key: key.Row(i), Count: count[i], Users: users[i], Revenue: revenue.Row(i)}
			}
			if k := int(kind[i]); k < len(spans) {
				l := line{count: n[i], ids: ids[i], state: state.Row(i)}
				if q.ByChannel {
					l.key = key.Row(i)
				}
				found[k] = append(found[k], l)
			}
		}, &key, &kind, &n, &ids, &state, &count, &revenue, &users, &all, &allRevenue, &allUsers, &rows))
		if err == nil && answered != expected {
			err = ErrCut
		}
		if err != nil {
			return total, nil, err
		}
		stale := false
		for i, s := range spans {
			found[i].inOrder()
			switch {
			case s.known == nil:
				h.kept.put(nameOf(s), found[i])
			case !found[i].same(s.known):
				h.kept.drop(nameOf(s))
				stale = true
			}
		}
		if !stale {
			return total, slices.Collect(maps.Values(byKey)), nil
		}
	}
}

// units asks for the figures of the units from the one that begins at begin to the one before end. starts has all of these, and end; then
// users are kept, unit by unit. Without starts they are too many.
func (h *Hours) units(ctx context.Context, do Do, q *Question, begin, end int64, starts []int64) (units []Figures, err error) {
	numbers := make([]int64, max(len(starts)-1, 0))
	for i := range numbers {
		numbers[i] = q.Calendar.Number(q.Unit, starts[i])
	}
	about := fmt.Sprint(q.about(), "\x00", q.Unit, " ", q.Zone, " ")
	nameOf := func(number int64) string { return about + strconv.FormatInt(number, 36) }
	for try := 0; ; try++ {
		// Users are computed of the units from one that is not kept to another: mostly those of the last hours or days are.
		known := map[int64]line{}
		low, high := 0, len(numbers)
		if try < keptTries {
			low, high = high, low
			for i, number := range numbers {
				if kept := h.kept.get(nameOf(number)); kept != nil {
					known[number] = kept[0]
				} else {
					low, high = min(low, i), i+1
				}
			}
			low = min(low, high)
		}
		from, to := begin, end
		if len(starts) > 0 {
			from, to = starts[low], starts[high]
		}
		var (
			unit, n            proto.ColInt64
			ids, users, rows   proto.ColUInt64
			fresh              proto.ColUInt8
			revenue            proto.ColStr
			answered, expected uint64
			found              map[int64]line
		)
		reset := func() { answered, expected, found, units = 0, 1, map[int64]line{}, nil }
		body := q.unitsSQL(begin, from, to, end)
		err := do(ctx, reset, EachRow(ch.Query{Body: body, Parameters: q.Parameters}, func(i int) {
			answered, expected = answered+1, rows[i]
			l := line{count: n[i], ids: ids[i], users: users[i]}
			if fresh[i] == 0 {
				l.users = known[unit[i]].users
			}
			if found[unit[i]] = l; l.count != 0 {
				units = append(units, Figures{Key: fmt.Sprint(unit[i]), Count: l.count, Users: l.users, Revenue: revenue.Row(i)})
			}
		}, &unit, &n, &ids, &revenue, &users, &fresh, &rows))
		if err == nil && answered != expected {
			err = ErrCut
		}
		if err != nil {
			return nil, err
		}
		stale := false
		for i, number := range numbers {
			now, kept := found[number], known[number]
			switch {
			case i >= low && i < high:
				h.kept.put(nameOf(number), set{now})
			case now.count != kept.count || now.ids != kept.ids:
				h.kept.drop(nameOf(number))
				stale = true
			}
		}
		if !stale {
			return units, nil
		}
	}
}

// unitsSQL writes the query for the units from one hour to another, which is excluded, with users of those from low to high.
func (q *Question) unitsSQL(from, low, high, to int64) string {
	moment := "hour"
	if q.Unit != Hour && q.Calendar.IsUTC() {
		moment = "toStartOfDay(hour)" // which is read from the projection daily
	}
	rows := []string{"SELECT toInt64(0) AS unit, toInt64(0) AS n, toUInt64(0) AS ids, '' AS money, toUInt64(0) AS users, toUInt8(2) AS fresh"}
	add := func(from, to int64, users string, fresh int) {
		if from < to {
			rows = append(rows, fmt.Sprintf("SELECT %s AS unit, toInt64(sum(event_count)) AS n, sumWithOverflow(id_sum) AS ids, toString(sum(revenue)) AS money, %s AS users, toUInt8(%d) AS fresh"+
				" FROM {events_hourly} WHERE %[4]s >= %[5]d AND %[4]s < %[6]d AND %[7]s AND {settled} = 0 GROUP BY unit",
				q.Calendar.SQL(q.Unit, moment), users, fresh, moment, from, to, q.Where))
		}
	}
	const ofStates, none = "uniqCombined64Merge(17)(unique_users_state)", "toUInt64(0)"
	add(from, low, none, 0)
	middle := low
	if q.Unit == Hour { // in halves, because ClickHouse reads a part of this size on one thread, and two would each make a state for every hour
		middle = roundDown(low+(high-low)/2, hourSeconds)
	}
	add(low, middle, ofStates, 1)
	add(middle, high, ofStates, 1)
	add(high, to, none, 0)
	return "SELECT unit, n, ids, money, users, fresh, count() OVER () FROM (" + strings.Join(rows, " UNION ALL ") + ")"
}

func roundDown(n, step int64) int64 { return n / step * step }
func roundUp(n, step int64) int64   { return roundDown(n+step-1, step) }

// EachRow has the query's columns decoded into these, by their order, and calls row with the number of each row in them.
func EachRow(q ch.Query, row func(i int), columns ...proto.ColResult) ch.Query {
	q.Result = make(proto.Results, len(columns))
	for i, c := range columns {
		q.Result.(proto.Results)[i].Data = c
	}
	q.OnResult = func(_ context.Context, b proto.Block) error {
		for i := range b.Rows {
			row(i)
		}
		return nil
	}
	return q
}
