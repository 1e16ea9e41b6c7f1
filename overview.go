// The overview: what the dashboard page draws, in one call.
//
// overview.go counts over all event names, by the same rules as query.go: in total and along time, by channel and event name,
// and by campaign. It gives unique users in total and along time only: merging user states takes the most time, and the
// metrics endpoint has those of a group.

package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"github.com/ClickHouse/ch-go"
	"github.com/ClickHouse/ch-go/proto"
)

const (
	// overviewTop is how many event names and campaigns are listed.
	overviewTop = 10
	// maxMinuteBuckets is the longest range, in seconds, drawn by the minute, which counts raw events: 38 ms at 2,000 events/s
	// stored. maxHourBuckets is the longest drawn by the hour; beyond it, by the day.
	maxMinuteBuckets = hourSeconds
	maxHourBuckets   = 3 * daySeconds
	daySeconds       = 24 * hourSeconds
	// sharedFor is how long an answer serves everybody who asks the same.
	sharedFor = time.Second
)

// overviewQuery is a parsed request. from and to are Unix seconds, both inclusive.
type overviewQuery struct {
	eventName, channel string
	from, to           int64
}

// overviewGroup is one line of the answer. revenue is in TRY, a decimal number as ClickHouse writes it: it may exceed 64 bits.
type overviewGroup struct {
	key              string
	count            int64
	revenue          string
	users, campaigns uint64
}

// overview is the answer, before it is JSON.
type overview struct {
	total                              overviewGroup
	purchases                          int64
	channels, names, campaigns, series []overviewGroup
}

func (m *metricsAPI) serveOverview(w http.ResponseWriter, r *http.Request) {
	q, problems := parseOverviewQuery(r.URL.RawQuery, time.Now().Unix())
	m.answer(w, r, problems, func(ctx context.Context, through int64) ([]byte, error) {
		return m.shared.get(ctx, *q, func() ([]byte, error) {
			o, err := m.overview(ctx, q)
			if err != nil {
				return nil, err
			}
			return overviewJSON(q, o, through), nil
		})
	})
}

// parseOverviewQuery checks the parameters, all of which may be absent: the last 24 hours, every event name and channel.
func parseOverviewQuery(rawQuery string, now int64) (*overviewQuery, []problem) {
	c := newQueryCheck(rawQuery, "from", "to", "channel", "event_name")
	v := c.values
	q := &overviewQuery{eventName: v.Get("event_name"), channel: v.Get("channel"), from: now - daySeconds, to: now}
	if !utf8.ValidString(q.eventName) {
		c.fail("event_name", codeInvalidFormat, "is not valid UTF-8 text")
	}
	if v.Has("to") {
		q.to = c.seconds("to")
		q.from = q.to - daySeconds
	}
	if v.Has("from") {
		q.from = c.seconds("from")
	}
	c.rangeAndChannel(q.from, q.to, q.channel)
	q.from, q.to = min(max(q.from, 0), maxUnixSeconds), min(max(q.to, 0), maxUnixSeconds) // no event is outside
	return q, c.problems
}

// bucket is the width of the series: minute, hour or day.
func (q *overviewQuery) bucket() string {
	switch span := q.to - q.from; {
	case span < maxMinuteBuckets:
		return "minute"
	case span <= maxHourBuckets:
		return "hour"
	}
	return "day"
}

func (q *overviewQuery) where() string {
	terms := []string{"1"}
	if q.channel != "" {
		terms = append(terms, "channel = {channel:String}")
	}
	if q.eventName != "" {
		terms = append(terms, "event_name = {event_name:String}")
	}
	return strings.Join(terms, " AND ")
}

// Kinds of rows of the overview's query.
const (
	kindTotal = iota
	kindBucket
	kindChannel
	kindName
)

// sql writes one query, so that all of its figures are of one moment: a row for the total, one per bucket, one per channel,
// one per event name. kind says which.
func (q *overviewQuery) sql() string {
	const (
		figures = "sum(event_count) AS total, toString(sum(revenue)) AS money, uniqCombined64Merge({user bits})(unique_users_state) AS users, uniqCombined64Merge(12)(campaigns_state) AS campaigns"
		noUsers = "toUInt64(0) AS users, toUInt64(0) AS campaigns"
		group   = "tuple(CAST(event_name, 'String'), CAST(channel, 'String'))"
	)
	where := q.where()
	byBucket := func(source string) string { // and in total
		return "SELECT toUInt8(grouping(key) = 0) AS kind, key, " + figures + " FROM " + source + " GROUP BY GROUPING SETS ((key), ())"
	}
	groups := byDay(group, where)
	var series string
	switch q.bucket() {
	case "day":
		series = byBucket(byDay(isoHour("toStartOfDay(hour)"), where))
	case "hour":
		series, groups = byBucket(byHour(isoHour("hour"), where)), byHour(group, where)
	case "minute": // without users: counting those of an hour of raw events takes five times as long
		series = "SELECT toUInt8(0) AS kind, '' AS key, " + figures + " FROM " + byDay("''", where) +
			" UNION ALL SELECT toUInt8(1) AS kind, formatDateTime(toStartOfMinute(timestamp), '%Y-%m-%dT%H:%i:00Z', 'UTC') AS key," +
			" toInt64(count()) AS total, toString({revenue of events}) AS money, " + noUsers + " FROM {events} WHERE timestamp >= {from:UInt32} AND timestamp <= {to:UInt32} AND " + where + " GROUP BY key"
	}
	return "SELECT * FROM (" + series + " UNION ALL SELECT toUInt8(if(grouping(name) = 0, 3, 2)) AS kind, if(kind = 3, name, channel) AS key, sum(event_count) AS total, toString(sum(revenue)) AS money, " + noUsers +
		" FROM (SELECT key.1 AS name, key.2 AS channel, event_count, revenue FROM " + groups + ") GROUP BY GROUPING SETS ((name), (channel))) ORDER BY kind, if(kind = 1, 0, -total), key"
}

func (m *metricsAPI) overview(ctx context.Context, q *overviewQuery) (*overview, error) {
	var (
		o                = new(overview)
		kind             proto.ColUInt8
		key, money       proto.ColStr
		total            proto.ColInt64
		users, campaigns proto.ColUInt64
	)
	parameters := append(rangeParameters(q.from, q.to), parameter("channel", q.channel), parameter("event_name", q.eventName))
	var (
		top     []overviewGroup
		topErr  error
		waiting sync.WaitGroup
	)
	waiting.Go(func() { top, topErr = m.topCampaigns(ctx, q, parameters) }) // ends with ctx
	err := m.do(ctx, func() { *o = overview{total: overviewGroup{revenue: "0"}} }, eachRow(ch.Query{Body: q.sql(), Parameters: parameters}, func(i int) {
		switch g := (overviewGroup{key.Row(i), total[i], money.Row(i), users[i], campaigns[i]}); kind[i] {
		case kindTotal:
			o.total = g
		case kindBucket:
			o.series = append(o.series, g)
		case kindChannel:
			o.channels = append(o.channels, g)
		case kindName:
			if g.key == "purchase" {
				o.purchases = g.count
			}
			if len(o.names) < overviewTop {
				o.names = append(o.names, g)
			}
		}
	}, &kind, &key, &total, &money, &users, &campaigns))
	waiting.Wait()
	o.campaigns = top
	return o, errors.Join(err, topErr)
}

// topCampaigns returns the largest campaigns, which only the raw table knows.
func (m *metricsAPI) topCampaigns(ctx context.Context, q *overviewQuery, parameters []proto.Parameter) (top []overviewGroup, err error) {
	var key proto.ColStr
	var total proto.ColInt64
	err = m.do(ctx, func() { top = nil }, eachRow(ch.Query{
		Body: fmt.Sprintf("SELECT CAST(campaign_id, 'String') AS key, toInt64(count()) AS total FROM {events} "+
			"WHERE %s AND campaign_id != '' AND timestamp >= {from:UInt32} AND timestamp <= {to:UInt32} GROUP BY campaign_id ORDER BY total DESC, key LIMIT %d", q.where(), overviewTop),
		Parameters: parameters,
	}, func(i int) { top = append(top, overviewGroup{key: key.Row(i), count: total[i]}) }, &key, &total))
	return top, err
}

func overviewJSON(q *overviewQuery, o *overview, through int64) []byte {
	b := fmt.Appendf(nil, `{"from":%d,"to":%d,"bucket":%q,"total_count":%d,"unique_users":%d,"purchases":%d,"revenue":%s,"active_campaigns":%d`,
		q.from, q.to, q.bucket(), o.total.count, o.total.users, o.purchases, o.total.revenue, o.total.campaigns)
	for _, list := range []struct {
		name           string
		groups         []overviewGroup
		users, revenue bool
	}{
		{"channels", o.channels, false, true}, {"event_names", o.names, false, true}, {"campaigns", o.campaigns, false, false}, {"series", o.series, q.bucket() != "minute", true},
	} {
		b = fmt.Appendf(b, `,%q:[`, list.name)
		for i, g := range list.groups {
			if i > 0 {
				b = append(b, ',')
			}
			b = appendString(append(b, `{"key":`...), g.key)
			b = fmt.Appendf(b, `,"total_count":%d`, g.count)
			if list.users {
				b = fmt.Appendf(b, `,"unique_users":%d`, g.users)
			}
			if list.revenue {
				b = append(append(b, `,"revenue":`...), g.revenue...)
			}
			b = append(b, '}')
		}
		b = append(b, ']')
	}
	return append(appendThrough(b, through), '}')
}

// sharedAnswers gives everybody who asks the same within a second one answer: a page with many viewers costs as one.
type sharedAnswers struct {
	mu  sync.Mutex // guards all
	all map[overviewQuery]*sharedAnswer
}

// sharedAnswer is what the first to ask gets, or is about to get. body and err are set when done is closed.
type sharedAnswer struct {
	asked time.Time
	done  chan struct{}
	body  []byte
	err   error
}

// get returns the answer to q: a shared one, or what ask returns. An error is not shared: perhaps only the first client left.
func (s *sharedAnswers) get(ctx context.Context, q overviewQuery, ask func() ([]byte, error)) ([]byte, error) {
	s.mu.Lock()
	now := time.Now()
	a := s.all[q]
	mine := a == nil || now.Sub(a.asked) > sharedFor
	if mine {
		for old, other := range s.all { // few: those of the last second
			if now.Sub(other.asked) > sharedFor {
				delete(s.all, old)
			}
		}
		a = &sharedAnswer{asked: now, done: make(chan struct{})}
		if s.all == nil {
			s.all = map[overviewQuery]*sharedAnswer{}
		}
		s.all[q] = a
	}
	s.mu.Unlock()
	if mine {
		a.body, a.err = ask()
		close(a.done)
		return a.body, a.err
	}
	select {
	case <-a.done:
		if a.err != nil {
			return ask()
		}
		return a.body, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}
