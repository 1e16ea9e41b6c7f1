// What the dashboard page draws, in three answers: GET /api/v1/overview, GET /api/v1/events and GET /api/v1/pipeline.
//
// overview.go counts over all event names, by the rules of query.go, and gives everybody who asks the same within a second one
// answer. It owns these answers. The events are listed by pages, of which package questions knows how they follow each other. The
// pipeline's answer is what this instance accepted and stored in the last minutes: stats.go has it.

package main

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/ClickHouse/ch-go"
	"github.com/ClickHouse/ch-go/proto"

	"github.com/event-ingestion/event-ingestion/internal/questions"
)

const (
	// overviewTop is how many event names and campaigns are listed.
	overviewTop = 10
	// maxMinuteBuckets is the longest range, in seconds, drawn by the minute, which counts raw events: 38 ms at 2,000 events/s
	// stored. maxHourBuckets is the longest drawn by the hour; beyond it, by the day.
	maxMinuteBuckets = hourSeconds
	maxHourBuckets   = 3 * daySeconds
	// sharedFor is how long an answer serves everybody who asks the same.
	sharedFor = time.Second
)

// overviewResult is the JSON of an answer. It has unique users in total and along time only: merging user states takes the most
// time, and the metrics endpoint has those of a group.
type overviewResult struct {
	From            int64       `json:"from"`
	To              int64       `json:"to"`
	Bucket          string      `json:"bucket"`
	Count           int64       `json:"total_count"`
	Users           uint64      `json:"unique_users"`
	Purchases       int64       `json:"purchases"`
	Revenue         json.Number `json:"revenue"`
	Currency        string      `json:"currency"`
	ActiveCampaigns uint64      `json:"active_campaigns"`
	Channels        []group     `json:"channels"`
	Names           []group     `json:"event_names"`
	Campaigns       []group     `json:"campaigns"`
	Series          []group     `json:"series"`
	Through         *int64      `json:"complete_through"`
}

// overviewAPI serves GET /api/v1/overview.
type overviewAPI struct {
	metrics *metricsAPI
	shared  sharedAnswers
}

func newOverviewAPI(m *metricsAPI) *overviewAPI {
	return &overviewAPI{metrics: m, shared: sharedAnswers{all: map[string]sharedAnswer{}}}
}

func (o *overviewAPI) serve(w http.ResponseWriter, r *http.Request) {
	q, problems := parseOverviewQuery(r.URL.RawQuery, time.Now().Unix())
	o.metrics.answer(w, r, problems, func(ctx context.Context, through *int64) ([]byte, error) {
		return o.shared.get(fmt.Sprintf("%d %d %s %q %q", q.from, q.to, q.Channel, q.tz, q.EventName), func() ([]byte, error) {
			return questions.Patiently(ctx, func() ([]byte, error) {
				a, err := o.ask(ctx, q)
				a.Through = through
				return jsonOf(a), err
			})
		})
	})
}

// parseOverviewQuery checks the parameters, all of which may be absent: the last 24 hours, every event name and channel.
func parseOverviewQuery(rawQuery string, now int64) (*metricsQuery, []problem) {
	c := newQueryCheck(rawQuery, "from", "to", "channel", "event_name", "tz")
	q := c.filters()
	if q.to = now; c.values.Has("to") {
		q.to = c.seconds("to")
	}
	if q.from = q.to - daySeconds; c.values.Has("from") {
		q.from = c.seconds("from")
	}
	c.place(q)
	q.from, q.to = min(max(q.from, 0), maxUnixSeconds), min(max(q.to, 0), maxUnixSeconds) // no event is outside
	return q, c.problems
}

// bucket is the width of the series: minute, hour or day.
func (q *metricsQuery) bucket() string {
	switch span := q.to - q.from; {
	case span < maxMinuteBuckets:
		return questions.Minute
	case span <= maxHourBuckets:
		return questions.Hour
	}
	return questions.Day
}

// Kinds of rows of the query for names and channels.
const (
	kindTotal = iota
	kindChannel
	kindName
)

// namesSQL writes the query for what needs no users: a row for the total, which has the campaigns, one per channel, one per event name.
func (q *metricsQuery) namesSQL() string {
	return "SELECT toUInt8(multiIf(grouping(name) = 0, 2, grouping(channel) = 0, 1, 0)) AS kind, if(kind = 2, name, channel) AS key," +
		" sum(event_count) AS total, toString(sum(revenue)) AS money, uniqCombined64Merge(12)(campaigns_state) AS campaigns" +
		" FROM (SELECT key.1 AS name, key.2 AS channel, event_count, revenue, campaigns_state FROM " +
		questions.ByDay("tuple(CAST(event_name, 'String'), CAST(channel, 'String'))", q.SQL()) + ") GROUP BY GROUPING SETS ((name), (channel), ())" +
		" ORDER BY kind, -total, key" +
		fmt.Sprintf(" LIMIT %d BY kind, if(kind = 2 AND key NOT IN ({purchase events}), '', key)", overviewTop) // anybody may make up names
}

// ask asks for the figures, for the names and for the campaigns at the same time: an event that comes in meanwhile may be in some only.
func (o *overviewAPI) ask(ctx context.Context, q *metricsQuery) (a overviewResult, err error) {
	var (
		total       questions.Figures
		units       []questions.Figures
		top, series []group
		of          = q.ofHours()
		inRows      = q.bucket() == questions.Minute || !q.calendar.WholeHours()
	)
	if of.Revenue = true; !inRows {
		of.Unit = q.bucket()
	}
	err = questions.Together(ctx, func(ctx context.Context) (err error) {
		total, units, err = o.metrics.hours.Ask(ctx, o.metrics.do, of)
		return err
	}, func(ctx context.Context) (err error) {
		top, err = o.topCampaigns(ctx, q)
		return err
	}, func(ctx context.Context) (err error) {
		if inRows {
			series, err = o.seriesOfRows(ctx, q)
		}
		return err
	}, func(ctx context.Context) (err error) {
		a, err = o.names(ctx, q)
		return err
	})
	a.From, a.To, a.Bucket, a.Currency = q.from, q.to, q.bucket(), o.metrics.clickhouse.revenue.Load().Currency
	a.Count, a.Users, a.Revenue, a.Campaigns, a.Series = total.Count, total.Users, json.Number(total.Revenue), top, series
	if !inRows {
		a.Series = q.groupsOf(units, of.Unit)
	}
	return a, err
}

// names asks for what needs no users.
func (o *overviewAPI) names(ctx context.Context, q *metricsQuery) (a overviewResult, err error) {
	var (
		kind       proto.ColUInt8
		key, money proto.ColStr
		total      proto.ColInt64
		campaigns  proto.ColUInt64
		answered   bool
	)
	purchases := o.metrics.clickhouse.revenue.Load().Events
	reset := func() { answered, a = false, overviewResult{Channels: []group{}, Names: []group{}} }
	err = o.metrics.do(ctx, reset, questions.EachRow(ch.Query{Body: q.namesSQL(), Parameters: q.parameters()}, func(i int) {
		switch g := (group{Key: key.Row(i), Count: total[i], Revenue: json.Number(money.Row(i))}); kind[i] {
		case kindTotal:
			answered, a.ActiveCampaigns = true, campaigns[i]
		case kindChannel:
			a.Channels = append(a.Channels, g)
		case kindName:
			if slices.Contains(purchases, g.Key) {
				a.Purchases += g.Count
			}
			if len(a.Names) < overviewTop {
				a.Names = append(a.Names, g)
			}
		}
	}, &kind, &key, &total, &money, &campaigns))
	if err == nil && !answered {
		err = questions.ErrCut
	}
	return a, err
}

// seriesOfRows asks the raw table for the series, by the minute, or in a zone of which events_hourly has no days. Users of minutes are
// left out: counting those of an hour of raw events takes five times as long.
func (o *overviewAPI) seriesOfRows(ctx context.Context, q *metricsQuery) (series []group, err error) {
	var (
		key, money proto.ColStr
		total      proto.ColInt64
		users      proto.ColUInt64
	)
	counted := "uniqCombined64(17)(user_id)"
	if q.bucket() == questions.Minute {
		counted = "toUInt64(0)"
	}
	err = o.metrics.do(ctx, func() { series = []group{} }, questions.EachRow(ch.Query{
		Body: "SELECT " + q.unit(q.bucket(), "timestamp") + " AS key, toInt64(count()) AS total, toString({revenue of events}) AS money, " + counted +
			" AS users FROM {events} WHERE " + questions.InRange + " AND " + q.SQL() + " GROUP BY key",
		Parameters: q.parameters(),
	}, func(i int) {
		g := q.named(q.bucket(), group{Key: key.Row(i), Count: total[i], Revenue: json.Number(money.Row(i))})
		if q.bucket() != questions.Minute {
			g.Users = new(users[i])
		}
		series = append(series, g)
	}, &key, &total, &money, &users))
	inOrder(series)
	return series, err
}

// topCampaigns returns the largest campaigns, which only the raw table knows.
func (o *overviewAPI) topCampaigns(ctx context.Context, q *metricsQuery) (top []group, err error) {
	var key proto.ColStr
	var total proto.ColInt64
	err = o.metrics.do(ctx, func() { top = []group{} }, questions.EachRow(ch.Query{
		Body: "SELECT CAST(campaign_id, 'String') AS key, toInt64(count()) AS total FROM {events} WHERE " + q.SQL() +
			" AND campaign_id != '' AND " + questions.InRange + " GROUP BY campaign_id ORDER BY total DESC, key LIMIT " + strconv.Itoa(overviewTop),
		Parameters: q.parameters(),
	}, func(i int) { top = append(top, group{Key: key.Row(i), Count: total[i]}) }, &key, &total))
	return top, err
}

// sharedAnswers gives everybody who asks the same within a second one answer: a page with many viewers costs as one.
type sharedAnswers struct {
	mu  sync.Mutex // guards all
	all map[string]sharedAnswer
}

// sharedAnswer is what the first to ask gets, or is about to get.
type sharedAnswer struct {
	asked time.Time
	wait  func() ([]byte, error)
}

// get returns the answer to q: a shared one, or what ask returns. An error is not shared: perhaps only the first client left.
func (s *sharedAnswers) get(q string, ask func() ([]byte, error)) ([]byte, error) {
	now := time.Now()
	s.mu.Lock()
	maps.DeleteFunc(s.all, func(_ string, a sharedAnswer) bool { return now.Sub(a.asked) > sharedFor })
	a, shared := s.all[q]
	if !shared {
		a = sharedAnswer{now, sync.OnceValues(ask)}
		s.all[q] = a
	}
	s.mu.Unlock()
	body, err := a.wait()
	if shared && err != nil {
		return ask()
	}
	return body, err
}

const (
	// usualEvents is how many events a page has, and maxEvents how many it may have.
	usualEvents = 50
	maxEvents   = 1000
)

// serveEvents answers GET /api/v1/events: the newest events, as they are stored, page by page.
func (m *metricsAPI) serveEvents(w http.ResponseWriter, r *http.Request) {
	l, limit, problems := parseEventsQuery(r.URL.RawQuery, time.Now().Unix())
	m.answer(w, r, problems, func(ctx context.Context, _ *int64) ([]byte, error) {
		return questions.Patiently(ctx, func() ([]byte, error) {
			body, l := []byte(`{"events":[`), *l
			more, err := l.Next(ctx, limit, m.do, func(event []byte) error {
				if body[len(body)-1] != '[' {
					body = append(body, ',')
				}
				body = append(body, event...)
				return nil
			})
			body = append(body, ']')
			if more {
				body = append(append(body, `,"next":"`...), l.After.String()...)
				body = append(body, '"')
			}
			return append(body, '}'), err
		})
	})
}

// parseEventsQuery checks the parameters, all of which may be absent: the last 24 hours, or what the page before began with.
func parseEventsQuery(rawQuery string, now int64) (l *questions.Listing, limit int, problems []problem) {
	c := newQueryCheck(rawQuery, "from", "to", "event_name", "user_id", "channel", "campaign_id", "limit", "before")
	q, l := c.filters(), new(questions.Listing)
	if before := c.values.Get("before"); c.values.Has("before") {
		var err error
		if l.After, err = questions.ParseCursor(before); err != nil {
			c.fail("before", codeInvalidFormat, err.Error())
		}
	}
	if q.to = now; c.values.Has("to") {
		q.to = c.seconds("to")
	}
	switch q.from = q.to - daySeconds; {
	case c.values.Has("from"):
		q.from = c.seconds("from")
	case c.values.Has("before"):
		q.from = min(l.After.From, q.to-1)
	}
	c.place(q)
	if limit = usualEvents; c.values.Has("limit") {
		n, err := strconv.Atoi(c.values.Get("limit"))
		if err != nil || n < 1 || n > maxEvents {
			c.fail("limit", codeInvalidFormat, fmt.Sprintf("must be an integer from 1 to %d", maxEvents))
		}
		limit = n
	}
	l.From, l.To, l.Where, l.Parameters = max(q.from, 0), min(q.to, maxUnixSeconds), q.SQL(), q.parameters()
	return l, limit, c.problems
}

// servePipeline answers GET /api/v1/pipeline.
func servePipeline(p *pipeline) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if c := newQueryCheck(r.URL.RawQuery); len(c.problems) > 0 {
			writeProblems(w, c.problems)
			return
		}
		writeJSON(w, http.StatusOK, jsonOf(p.answer()))
	}
}
