// The overview: what the dashboard page draws, in one call and one query.
//
// overview.go counts over all event names, by the views of schema.sql: in total, by channel, by event name and along time, in
// one query. Only campaigns, which the hourly table does not know, are a query of the raw table.

package main

import (
	"context"
	"fmt"
	"net/http"
	"time"

	"github.com/ClickHouse/ch-go"
	"github.com/ClickHouse/ch-go/proto"
)

const (
	// overviewTop is how many event names and campaigns are listed.
	overviewTop = 10
	// maxHourBuckets is the longest time that is drawn by the hour; beyond it by the day.
	maxHourBuckets = 3 * 24
	daySeconds     = 24 * hourSeconds
)

// overviewQuery is a parsed request. from and to are Unix seconds, both inclusive.
type overviewQuery struct {
	channel  string
	from, to int64
}

// overviewGroup is one line of the answer. revenue is in TRY, a decimal number as ClickHouse writes it: it may be more than
// 64 bits hold.
type overviewGroup struct {
	key              string
	count, purchases int64
	users, campaigns uint64
	revenue          string
}

// overview is the answer, before it is JSON.
type overview struct {
	total                              overviewGroup
	channels, names, campaigns, series []overviewGroup
}

func (m *metricsAPI) serveOverview(w http.ResponseWriter, r *http.Request) {
	q, problems := parseOverviewQuery(r.URL.RawQuery, time.Now().Unix())
	m.answer(w, r, problems, func(ctx context.Context, through int64) ([]byte, error) {
		o, err := m.overview(ctx, q)
		if err != nil {
			return nil, err
		}
		return appendOverview(nil, q, o, through), nil
	})
}

// parseOverviewQuery checks the parameters, all of which may be absent: the last 24 hours, every channel.
func parseOverviewQuery(rawQuery string, now int64) (*overviewQuery, []problem) {
	c := newQueryCheck(rawQuery, "from", "to", "channel")
	v := c.values
	q := &overviewQuery{channel: v.Get("channel"), from: now - daySeconds, to: now}
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

// bucket is the width of the series: hour or day.
func (q *overviewQuery) bucket() string {
	if q.to-q.from > maxHourBuckets*hourSeconds {
		return "day"
	}
	return "hour"
}

func (q *overviewQuery) where() string {
	if q.channel == "" {
		return "1"
	}
	return "channel = {channel:String}"
}

// sql writes the query: a row for the total, one a channel, one an event name, one a bucket. kind says which. Merging user
// states is what takes the time, so each is merged twice, into its bucket and into its name and channel; the rest is
// made of these.
func (q *overviewQuery) sql() string {
	view, bucket := "events_between", "hour"
	if q.bucket() == "day" {
		view, bucket = "events_between_by_day", "toStartOfDay(hour)"
	}
	return "SELECT line.1 AS kind, line.2 AS key, sum(n) AS total, sum(p) AS purchases, uniqCombined64Merge({user bits})(u) AS users, toString(sum(r)) AS money, uniqCombined64Merge(12)(c) AS campaigns FROM (" +
		"SELECT arrayJoin(if(grouping(at) = 0, [(0, ''), (3, " + isoHour("at") + ")], [(1, CAST(channel, 'String')), (2, CAST(event_name, 'String'))])) AS line, " +
		"sum(event_count) AS n, sumIf(event_count, event_name = 'purchase') AS p, uniqCombined64MergeState({user bits})(unique_users_state) AS u, sum(revenue) AS r, uniqCombined64MergeState(12)(campaigns_state) AS c " +
		fmt.Sprintf("FROM (SELECT *, %s AS at FROM {database}.%s(from = %d, to = %d) WHERE %s) ", bucket, view, q.from, q.to, q.where()) +
		"GROUP BY GROUPING SETS ((event_name, channel), (at))) GROUP BY line ORDER BY kind, if(kind = 3, 0, -total), key"
}

func (m *metricsAPI) overview(ctx context.Context, q *overviewQuery) (*overview, error) {
	var (
		o                = new(overview)
		kind             proto.ColUInt8
		key, money       proto.ColStr
		total, purchases proto.ColInt64
		users, campaigns proto.ColUInt64
	)
	err := m.do(ctx, func() { *o = overview{total: overviewGroup{revenue: "0"}} }, ch.Query{
		Body:       q.sql(),
		Parameters: []proto.Parameter{parameter("channel", q.channel)},
		Result: proto.Results{{Name: "kind", Data: &kind}, {Name: "key", Data: &key}, {Name: "total", Data: &total}, {Name: "purchases", Data: &purchases},
			{Name: "users", Data: &users}, {Name: "money", Data: &money}, {Name: "campaigns", Data: &campaigns}},
		OnResult: func(context.Context, proto.Block) error {
			for i := range kind {
				g := overviewGroup{key.Row(i), total[i], purchases[i], users[i], campaigns[i], money.Row(i)}
				switch kind[i] {
				case 0:
					o.total = g
				case 1:
					o.channels = append(o.channels, g)
				case 2:
					if len(o.names) < overviewTop {
						o.names = append(o.names, g)
					}
				case 3:
					o.series = append(o.series, g)
				}
			}
			return nil
		},
	})
	if err != nil {
		return nil, err
	}
	return o, m.topCampaigns(ctx, q, o)
}

func (m *metricsAPI) topCampaigns(ctx context.Context, q *overviewQuery, o *overview) error {
	var (
		key          proto.ColStr
		total, users proto.ColUInt64
	)
	return m.do(ctx, func() { o.campaigns = o.campaigns[:0] }, ch.Query{
		Body: fmt.Sprintf("SELECT CAST(campaign_id, 'String') AS key, count() AS total, uniqCombined64({user bits})(user_id) AS users FROM {database}.events "+
			"WHERE %s AND campaign_id != '' AND timestamp >= %d AND timestamp <= %d GROUP BY key ORDER BY total DESC, key LIMIT %d",
			q.where(), q.from, q.to, overviewTop),
		Parameters: []proto.Parameter{parameter("channel", q.channel)},
		Result:     proto.Results{{Name: "key", Data: &key}, {Name: "total", Data: &total}, {Name: "users", Data: &users}},
		OnResult: func(context.Context, proto.Block) error {
			for i := range total {
				o.campaigns = append(o.campaigns, overviewGroup{key: key.Row(i), count: int64(total[i]), users: users[i]})
			}
			return nil
		},
	})
}

func appendOverview(b []byte, q *overviewQuery, o *overview, through int64) []byte {
	b = fmt.Appendf(b, `{"from":%d,"to":%d,"bucket":%q,"total_count":%d,"unique_users":%d,"purchases":%d,"revenue":`, q.from, q.to, q.bucket(), o.total.count, o.total.users, o.total.purchases)
	b = append(b, o.total.revenue...)
	b = fmt.Appendf(b, `,"active_campaigns":%d`, o.total.campaigns)
	for _, list := range []struct {
		name   string
		groups []overviewGroup
	}{{"channels", o.channels}, {"event_names", o.names}, {"campaigns", o.campaigns}, {"series", o.series}} {
		b = append(append(append(b, `,"`...), list.name...), `":[`...)
		for i, g := range list.groups {
			if i > 0 {
				b = append(b, ',')
			}
			b = appendString(append(b, `{"key":`...), g.key)
			b = fmt.Appendf(b, `,"total_count":%d,"unique_users":%d`, g.count, g.users)
			if list.name != "campaigns" {
				b = append(append(b, `,"revenue":`...), g.revenue...)
			}
			b = append(b, '}')
		}
		b = append(b, ']')
	}
	return append(appendThrough(b, through), '}')
}
