// The overview: what the dashboard page draws, in one call and one query.
//
// overview.go counts over all event names, by schema.sql's events_between: in total, by channel, by event name and along
// time, in one pass with GROUPING SETS. Only campaigns, which the hourly table does not know, are a query of the raw table.

package main

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
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

// overviewGroup is one line of the answer. revenue is in TRY, in ten-thousandths.
type overviewGroup struct {
	key              string
	count, purchases int64
	users, campaigns uint64
	revenue          int64
}

// overview is the answer, before it is JSON.
type overview struct {
	total                              overviewGroup
	channels, names, campaigns, series []overviewGroup
}

func (m *metricsAPI) serveOverview(w http.ResponseWriter, r *http.Request) {
	q, problems := parseOverviewQuery(r.URL.Query(), time.Now().Unix())
	m.answer(w, r, problems, func(ctx context.Context, _, through int64) ([]byte, error) {
		o, err := m.overview(ctx, q)
		if err != nil {
			return nil, err
		}
		return appendOverview(nil, q, o, through), nil
	})
}

// parseOverviewQuery checks the parameters, all of which may be absent: the last 24 hours, every channel.
func parseOverviewQuery(v url.Values, now int64) (*overviewQuery, []problem) {
	q := &overviewQuery{channel: v.Get("channel"), from: now - daySeconds, to: now}
	c := newQueryCheck(v)
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

// sql writes the query: a row for the total, one a channel, one an event name, one a bucket. kind says which.
func (q *overviewQuery) sql(database string) string {
	bucket := "hour"
	if q.bucket() == "day" {
		bucket = "toStartOfDay(hour)"
	}
	return "SELECT toUInt8(multiIf(grouping(channel) = 0, 1, grouping(event_name) = 0, 2, grouping(at) = 0, 3, 0)) AS kind, " +
		"CAST(multiIf(kind = 1, channel, kind = 2, event_name, kind = 3, " + isoHour("at") + ", ''), 'String') AS key, " +
		"sum(n) AS total, sumIf(n, event_name = 'purchase') AS purchases, uniqCombined64Merge(19)(u) AS users, toInt64(sum(r) * 10000) AS revenue, uniqCombined64Merge(12)(c) AS campaigns " +
		fmt.Sprintf("FROM (SELECT event_name, channel, %s AS at, event_count AS n, unique_users_state AS u, revenue AS r, campaigns_state AS c FROM %s.events_between(from = %d, to = %d) WHERE %s) ",
			bucket, database, q.from, q.to, q.where()) +
		"GROUP BY GROUPING SETS ((), (channel), (event_name), (at)) " +
		"ORDER BY kind, if(kind = 3, 0, -total), key"
}

func (m *metricsAPI) overview(ctx context.Context, q *overviewQuery) (*overview, error) {
	var (
		o                         = new(overview)
		kind                      proto.ColUInt8
		key                       proto.ColStr
		total, purchases, revenue proto.ColInt64
		users, campaigns          proto.ColUInt64
	)
	err := m.do(ctx, func() { *o = overview{} }, ch.Query{
		Body:       q.sql(m.store.database),
		Parameters: []proto.Parameter{parameter("channel", q.channel)},
		Result: proto.Results{{Name: "kind", Data: &kind}, {Name: "key", Data: &key}, {Name: "total", Data: &total}, {Name: "purchases", Data: &purchases},
			{Name: "users", Data: &users}, {Name: "revenue", Data: &revenue}, {Name: "campaigns", Data: &campaigns}},
		OnResult: func(context.Context, proto.Block) error {
			for i := range kind {
				g := overviewGroup{key.Row(i), total[i], purchases[i], users[i], campaigns[i], revenue[i]}
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
		Body: fmt.Sprintf("SELECT CAST(campaign_id, 'String') AS key, count() AS total, uniqCombined64(19)(user_id) AS users FROM %s.events "+
			"WHERE %s AND campaign_id != '' AND timestamp >= %d AND timestamp <= %d GROUP BY key ORDER BY total DESC, key LIMIT %d",
			m.store.database, q.where(), q.from, q.to, overviewTop),
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
	b = appendMoney(b, o.total.revenue)
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
				b = appendMoney(append(b, `,"revenue":`...), g.revenue)
			}
			b = append(b, '}')
		}
		b = append(b, ']')
	}
	return append(appendThrough(b, through), '}')
}

// appendMoney writes ten-thousandths as a decimal number.
func appendMoney(b []byte, n int64) []byte {
	if n < 0 {
		b, n = append(b, '-'), -n
	}
	b = strconv.AppendInt(b, n/10000, 10)
	if n%10000 != 0 {
		b = fmt.Appendf(b, ".%04d", n%10000)
	}
	return b
}
