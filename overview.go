// What the dashboard page draws, in three answers: GET /api/v1/overview, GET /api/v1/events and GET /api/v1/pipeline.
//
// overview.go counts over all event names, by the rules of query.go, and gives everybody who asks the same within a second one
// answer. It owns these answers. The events are listed by pages, of which package questions knows how they follow each other. The
// pipeline's answer is what this instance accepted and stored in the last minutes: stats.go has it.

package main

import (
	"context"
	"encoding/json"
	"errors"
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
		return o.shared.get(fmt.Sprintf("%d %d %s %q %q", q.from, q.to, q.channel, q.tz, q.eventName), func() ([]byte, error) {
			a, err := o.ask(ctx, q)
			a.Through = through
			return jsonOf(a), err
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

// Kinds of rows of the overview's query.
const (
	kindTotal = iota
	kindBucket
	kindChannel
	kindName
)

// overviewSQL writes one query, so that all of its figures are of one moment: a row for the total, one per bucket, one per
// channel, one per event name. kind says which.
func (q *metricsQuery) overviewSQL() string {
	const (
		figures = "sum(event_count) AS total, toString(sum(revenue)) AS money, " +
			"uniqCombined64Merge(17)(unique_users_state) AS users, uniqCombined64Merge(12)(campaigns_state) AS campaigns"
		noUsers = "toUInt64(0) AS users, toUInt64(0) AS campaigns"
		perPair = "tuple(CAST(event_name, 'String'), CAST(channel, 'String'))"
	)
	where := q.where()
	byBucket := func(source string) string { // and in total
		return "SELECT toUInt8(grouping(key) = 0) AS kind, key, " + figures + " FROM " + source + " GROUP BY GROUPING SETS ((key), ())"
	}
	pairs := questions.ByDay(perPair, where)
	var series string
	ofRows := func(users string) string {
		return "SELECT toUInt8(1) AS kind, " + q.unit(q.bucket(), "timestamp") + " AS key, toInt64(count()) AS total, toString({revenue of events}) AS money, " +
			users + " AS users, toUInt64(0) AS campaigns FROM {events} WHERE " + questions.InRange + " AND " + where + " GROUP BY key"
	}
	total := "SELECT toUInt8(0) AS kind, '' AS key, " + figures + " FROM " + questions.ByDay("''", where) + " UNION ALL "
	switch bucket := q.bucket(); {
	case bucket == questions.Minute: // without users: counting those of an hour of raw events takes five times as long
		series = total + ofRows("toUInt64(0)")
	case !q.calendar.WholeHours():
		series = total + ofRows("uniqCombined64(17)(user_id)")
	case bucket == questions.Day && q.calendar.IsUTC():
		series = byBucket(questions.ByDay(q.unit(bucket, "toStartOfDay(hour)"), where))
	default:
		series, pairs = byBucket(questions.ByHour(q.unit(bucket, "hour"), where)), questions.ByHour(perPair, where)
	}
	return "SELECT * FROM (" + series + " UNION ALL SELECT toUInt8(if(grouping(name) = 0, 3, 2)) AS kind," +
		" if(kind = 3, name, channel) AS key, sum(event_count) AS total, toString(sum(revenue)) AS money, " + noUsers +
		" FROM (SELECT key.1 AS name, key.2 AS channel, event_count, revenue FROM " + pairs + ") GROUP BY GROUPING SETS ((name), (channel)))" +
		" ORDER BY kind, if(kind = 1, 0, -total), key" +
		fmt.Sprintf(" LIMIT %d BY kind, if(kind = 3 AND key NOT IN ({purchase events}), '', key)", overviewTop) // anybody may make up names
}

// ask asks for the figures and, at the same time, for the campaigns.
func (o *overviewAPI) ask(ctx context.Context, q *metricsQuery) (a overviewResult, err error) {
	var (
		kind             proto.ColUInt8
		key, money       proto.ColStr
		total            proto.ColInt64
		users, campaigns proto.ColUInt64
		top              []group
		topErr           error
		answered         bool
		waiting          sync.WaitGroup
	)
	waiting.Go(func() { top, topErr = o.topCampaigns(ctx, q) }) // ends with ctx
	rule := o.metrics.clickhouse.revenue.Load()
	reset := func() {
		answered = false
		a = overviewResult{From: q.from, To: q.to, Bucket: q.bucket(), Currency: rule.Currency, Channels: []group{}, Names: []group{}, Series: []group{}}
	}
	err = o.metrics.do(ctx, reset, eachRow(ch.Query{Body: q.overviewSQL(), Parameters: q.parameters()}, func(i int) {
		switch g := (group{Key: key.Row(i), Count: total[i], Revenue: json.Number(money.Row(i))}); kind[i] {
		case kindTotal:
			answered = true
			a.Count, a.Users, a.Revenue, a.ActiveCampaigns = g.Count, users[i], g.Revenue, campaigns[i]
		case kindBucket:
			if a.Bucket != questions.Minute {
				g.Users = new(users[i])
			}
			number, _ := strconv.ParseInt(g.Key, 10, 64)
			g.Key, g.at = q.calendar.Key(a.Bucket, number)
			a.Series = append(a.Series, g)
		case kindChannel:
			a.Channels = append(a.Channels, g)
		case kindName:
			if slices.Contains(rule.Events, g.Key) {
				a.Purchases += g.Count
			}
			if len(a.Names) < overviewTop {
				a.Names = append(a.Names, g)
			}
		}
	}, &kind, &key, &total, &money, &users, &campaigns))
	waiting.Wait()
	if err == nil && !answered {
		err = errNoTotal
	}
	inOrder(a.Series)
	a.Campaigns = top
	return a, errors.Join(err, topErr)
}

// topCampaigns returns the largest campaigns, which only the raw table knows.
func (o *overviewAPI) topCampaigns(ctx context.Context, q *metricsQuery) (top []group, err error) {
	var key proto.ColStr
	var total proto.ColInt64
	err = o.metrics.do(ctx, func() { top = []group{} }, eachRow(ch.Query{
		Body: "SELECT CAST(campaign_id, 'String') AS key, toInt64(count()) AS total FROM {events} WHERE " + q.where() +
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
		body := []byte(`{"events":[`)
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
	l.From, l.To, l.Where, l.Parameters = max(q.from, 0), min(q.to, maxUnixSeconds), q.where(), q.parameters()
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
