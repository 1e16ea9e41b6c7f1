// Hours: what events_hourly answers, and what of it need not be computed again.
//
// Merging user states is what these questions cost, a millisecond each when users are many. So what was merged is kept, and used only
// while the same events are there: each hour has the count of its events and the sum of their ids, and the query that computes the rest
// reads both. Late events, erasures, mendings, retention and other instances change the two, so nothing has to expire.

package questions

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/ClickHouse/ch-go"
	"github.com/ClickHouse/ch-go/proto"
)

const (
	// maxUnits is how many hours, days or months of a question are kept: two years by the hour.
	maxUnits = 20_000
	// recent is how many seconds ago a range may end for its last hour to be taken whole.
	recent = 60
	// keptTries is how often a question is asked with what is kept, some of which has just changed, before it is asked without.
	keptTries = 3
)

// Hours answers questions from events_hourly and, for the seconds at the ends of a range, from events.
type Hours struct {
	kept kept
}

// Question is about the events of a range. Parameters has {from} and {to}, too.
type Question struct {
	From, To   int64  // Unix seconds, both included
	Where      string // SQL about event_name and channel, in terms of Parameters
	Parameters []proto.Parameter
	Revenue    bool // is asked for
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
	states  = "uniqCombined64MergeState(17)(unique_users_state) AS state"
	noState = "arrayReduce('uniqCombined64State(17)', emptyArrayString()) AS state"
)

// figures are the columns of a row: an event is in one row, and its user in one state. The ends of a range need no ids.
func (q *Question) figures(count, ids, money, state string) string {
	columns := "toInt64(" + count + ") AS n, " + ids + " AS ids, "
	if q.Revenue {
		columns += "toDecimal128(" + money + ", 4) AS money, "
	}
	return columns + state
}

func (q *Question) ofHours(state string) string {
	return q.figures("sum(event_count)", "sumWithOverflow(id_sum)", "sum(revenue)", state)
}

// Kinds of rows beside those of a span, whose kind is its index.
const (
	ofSeconds  = 10 + iota // at the ends of the range
	ofLastHour             // which is not over: ids is the second of its newest event
	ofKept                 // a state that was kept
	ofRecounts             // is always there: n is how many recounts of hours of the range are at work
)

// hours is a subquery of rows of a span with their states: whole days are read from the projection daily, which has a state per day.
func (q *Question) hours(kind int, s span) string {
	firstDay, endDay := roundUp(s.from, daySeconds), roundDown(s.to, daySeconds)
	if firstDay >= endDay {
		firstDay, endDay = s.to, s.to
	}
	var rows []string
	for _, r := range []struct {
		moment   string
		from, to int64
	}{{"hour", s.from, firstDay}, {"toStartOfDay(hour)", firstDay, endDay}, {"hour", endDay, s.to}} {
		if r.from < r.to {
			rows = append(rows, fmt.Sprintf("SELECT toUInt8(%d) AS kind, %s AS key, %s FROM {events_hourly} WHERE %[4]s >= %[5]d AND %[4]s < %[6]d AND %[7]s GROUP BY key",
				kind, q.key(s.part), q.ofHours(states), r.moment, r.from, r.to, q.Where))
		}
	}
	if len(rows) < 2 {
		return strings.Join(rows, "")
	}
	return fmt.Sprintf("SELECT toUInt8(%d) AS kind, key, %s FROM (%s) GROUP BY key", kind,
		q.figures("sum(n)", "sumWithOverflow(ids)", "sum(money)", "uniqCombined64MergeState(17)(state) AS state"), strings.Join(rows, " UNION ALL "))
}

// knownHours is a subquery of rows of all spans that are kept, without states.
func (q *Question) knownHours(spans []span) string {
	kind, within := strconv.Itoa(len(spans)-1), []string{}
	for i, s := range slices.Backward(spans) {
		if i < len(spans)-1 {
			kind = fmt.Sprintf("if(hour < %d, %d, %s)", s.to, i, kind)
		}
		if s.known != nil && s.from < s.to {
			within = append(within, fmt.Sprintf("hour >= %d AND hour < %d", s.from, s.to))
		}
	}
	if len(within) == 0 {
		return ""
	}
	key := q.key("")
	if q.Unit != "" {
		key = fmt.Sprintf("['%s', '%s', '%s'][kind + 1]", firstUnit, between, lastUnit)
	}
	return "SELECT toUInt8(" + kind + ") AS kind, " + key + " AS key, " + q.ofHours(noState) +
		" FROM {events_hourly} WHERE (" + strings.Join(within, " OR ") + ") AND " + q.Where + " GROUP BY kind, key"
}

// totalSQL writes the query: rows of spans, of the ends of the range, and what is kept. Windows over them are the groups and the total.
// With wholeHour the last hour is taken whole, for want of events after the range. The query is short, because planning a long one takes
// ClickHouse longer than answering it.
func (q *Question) totalSQL(spans []span, isKept, wholeHour bool) string {
	start, end := spans[0], spans[len(spans)-1]
	rows := []string{fmt.Sprintf("SELECT toUInt8(%d) AS kind, '' AS key, %s FROM {recounts of the range}", ofRecounts, q.figures("count()", "toUInt64(0)", "0", noState))}
	fresh := []string{strconv.Itoa(len(spans))} // no row's kind
	for i, s := range spans {
		if s.known == nil && s.from < s.to {
			rows, fresh = append(rows, q.hours(i, s)), append(fresh, strconv.Itoa(i))
		}
	}
	if known := q.knownHours(spans); known != "" {
		rows = append(rows, known)
	}
	seconds := fmt.Sprintf("timestamp < %d", start.from)
	if wholeHour {
		rows = append(rows, fmt.Sprintf("SELECT toUInt8(%d) AS kind, %s AS key, %s FROM {events_hourly} WHERE hour = %d AND %s GROUP BY key", ofLastHour, q.key(end.part),
			q.figures("sum(event_count)", "toUInt64(toUnixTimestamp(max(last_at)))", "sum(revenue)", states), end.to, q.Where))
	} else {
		seconds = fmt.Sprintf("(%s OR timestamp >= %d)", seconds, end.to)
	}
	rows = append(rows, fmt.Sprintf("SELECT toUInt8(%d) AS kind, if(timestamp < %d, %s, %s) AS key, %s FROM {events} WHERE %s AND %s AND %s GROUP BY key",
		ofSeconds, start.to, q.key(start.part), q.key(end.part), q.figures("count()", "toUInt64(0)", "{revenue of events}", "uniqCombined64State(17)(user_id) AS state"),
		InRange, seconds, q.Where))
	if isKept {
		rows = append(rows, fmt.Sprintf("SELECT toUInt8(%d) AS kind, key, %s FROM kept", ofKept,
			q.figures("0", "toUInt64(0)", "0", "CAST(users, 'AggregateFunction(uniqCombined64(17), String)') AS state")))
	}
	users, money, allMoney := "toUInt64(0)", "''", "''"
	if q.ByChannel || q.Unit != "" {
		users = "uniqCombined64Merge(17)(state) OVER (PARTITION BY key)"
	}
	if q.Revenue {
		money, allMoney = "toString(sum(money) OVER (PARTITION BY key))", "toString(sum(money) OVER ())"
	}
	return "SELECT CAST(key, 'String'), kind, n, ids, if(kind IN (" + strings.Join(fresh, ", ") + "), CAST(state, 'String'), ''), " +
		money + ", " + users + ", " + allMoney + ", uniqCombined64Merge(17)(state) OVER (), count() OVER () FROM (" + strings.Join(rows, " UNION ALL ") + ")"
}

// total asks for the total and the groups, and keeps what had to be computed of the spans.
func (h *Hours) total(ctx context.Context, do Do, q *Question, spans []span) (total Figures, groups []Figures, err error) {
	about := q.about()
	nameOf := func(s span) string { return fmt.Sprint(about, "\x00", s.from, " ", s.to) }
	// Of an hour that is not over all events are in the range, mostly: else there is another try.
	wholeHour := q.To > time.Now().Unix()-recent && spans[0].from <= spans[len(spans)-1].to
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
		query := ch.Query{Body: q.totalSQL(spans, keptKeys.Rows() > 0, wholeHour), Parameters: q.Parameters}
		if keptKeys.Rows() > 0 {
			query.ExternalTable, query.ExternalData = "kept", []proto.InputColumn{{Name: "key", Data: &keptKeys}, {Name: "users", Data: &keptStates}}
		}
		var (
			key, state, revenue, allRevenue proto.ColStr
			kind                            proto.ColUInt8
			n                               proto.ColInt64
			ids, users, allUsers            proto.ColUInt64
			found                           []set
			byKey                           map[string]Figures
		)
		after, recounts := false, int64(0) // after is that there are events after the range
		reset := func() {
			found, byKey, total, after, recounts = make([]set, len(spans)), map[string]Figures{}, Figures{}, false, 0
		}
		err := do.all(ctx, reset, query, func(i int) {
			if kind[i] == ofRecounts {
				recounts, n[i] = n[i], 0
			}
			total = Figures{Count: total.Count + n[i], Users: allUsers[i], Revenue: allRevenue.Row(i)}
			k := key.Row(i)
			byKey[k] = Figures{Key: k, Count: byKey[k].Count + n[i], Users: users[i], Revenue: revenue.Row(i)}
			after = after || kind[i] == ofLastHour && int64(ids[i]) > q.To
			if of := int(kind[i]); of < len(spans) {
				l := line{count: n[i], ids: ids[i], state: state.Row(i)}
				if q.ByChannel {
					l.key = k
				}
				found[of] = append(found[of], l)
			}
		}, &key, &kind, &n, &ids, &state, &revenue, &users, &allRevenue, &allUsers)
		if err = cmp.Or(err, recounted(recounts)); err != nil {
			return total, nil, err
		}
		stale := after
		wholeHour = wholeHour && !after
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
			maps.DeleteFunc(byKey, func(_ string, g Figures) bool { return g.Count == 0 })
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
			unit, n    proto.ColInt64
			ids, users proto.ColUInt64
			fresh      proto.ColUInt8
			revenue    proto.ColStr
			found      map[int64]line
			recounts   int64
		)
		reset := func() { found, units, recounts = map[int64]line{}, nil, 0 }
		err := do.all(ctx, reset, ch.Query{Body: q.unitsSQL(begin, from, to, end), Parameters: q.Parameters}, func(i int) {
			l := line{count: n[i], ids: ids[i], users: users[i]}
			switch fresh[i] {
			case noUnit:
				recounts = l.count
				return
			case 0:
				l.users = known[unit[i]].users
			}
			if found[unit[i]] = l; l.count != 0 {
				units = append(units, Figures{Key: fmt.Sprint(unit[i]), Count: l.count, Users: l.users, Revenue: revenue.Row(i)})
			}
		}, &unit, &n, &ids, &revenue, &users, &fresh)
		if err = cmp.Or(err, recounted(recounts)); err != nil {
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

// noUnit marks the row that is always there, with the number of recounts.
const noUnit = 2

// unitsSQL writes the query for the units from one hour to another, which is excluded, with users of those from low to high.
func (q *Question) unitsSQL(from, low, high, to int64) string {
	moment := "hour"
	if q.Unit != Hour && q.Calendar.IsUTC() {
		moment = "toStartOfDay(hour)" // which is read from the projection daily
	}
	rows := []string{fmt.Sprintf("SELECT toInt64(0) AS unit, toInt64(count()) AS n, toUInt64(0) AS ids, '' AS money, toUInt64(0) AS users, toUInt8(%d) AS fresh FROM {recounts of the range}", noUnit)}
	money := "''"
	if q.Revenue {
		money = "toString(sum(revenue))"
	}
	add := func(from, to int64, users string, fresh int) {
		if from < to {
			rows = append(rows, fmt.Sprintf("SELECT %s AS unit, toInt64(sum(event_count)) AS n, sumWithOverflow(id_sum) AS ids, %s AS money, %s AS users, toUInt8(%d) AS fresh"+
				" FROM {events_hourly} WHERE %[5]s >= %[6]d AND %[5]s < %[7]d AND %[8]s GROUP BY unit",
				q.Calendar.SQL(q.Unit, moment), money, users, fresh, moment, from, to, q.Where))
		}
	}
	const ofStates, none = "finalizeAggregation(uniqCombined64MergeState(17)(unique_users_state))", "toUInt64(0)" // the projection has states
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
