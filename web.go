// What a browser gets: the dashboard at /, the two answers that it draws, Swagger UI at /swagger/ and the API's document.
//
// web.go owns what is embedded: everything comes from the binary, no page loads anything from elsewhere. The pages need no
// key; what they show comes from the API, with the key that their reader types in. It also owns GET /api/v1/overview, which
// counts over all event names by the same rules as query.go, and GET /api/v1/pipeline, what this instance accepted and stored
// in the last minutes.

package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"mime"
	"net/http"
	"path"
	"strconv"
	"sync"
	"time"

	"github.com/ClickHouse/ch-go"
	"github.com/ClickHouse/ch-go/proto"
	"github.com/klauspost/compress/gzhttp"
	"github.com/klauspost/compress/gzip"
	swagger "github.com/swaggest/swgui/v5/static"
)

//go:embed web
var webFiles embed.FS

// exampleNow, exampleISO and exampleYesterday stand in openapi.json wherever an example needs a recent time: events older than 30
// days are refused, and "Try it out" has to work as it is.
const (
	exampleNow       = "1767225600"
	exampleISO       = "2026-01-01T00:00:00.123Z" // as Segment's clients write it
	exampleYesterday = "1767139200"
)

// What a page may do. Swagger UI sets styles by itself; nothing may be framed, and nothing comes from another host.
const (
	pagePolicy    = "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
	swaggerPolicy = "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)

func pages() []route {
	page, swagger := gzhttp.GzipHandler(http.HandlerFunc(servePage)), gzhttp.GzipHandler(http.HandlerFunc(serveSwagger))
	return []route{
		{http.MethodGet, "/{$}", "pages", page},
		{http.MethodGet, "/web/{file}", "pages", page},
		{http.MethodGet, "/swagger", "pages", toSwagger},
		{http.MethodGet, "/swagger/{file...}", "pages", swagger},
	}
}

func servePage(w http.ResponseWriter, r *http.Request) {
	name := cmp.Or(r.PathValue("file"), "index.html")
	body, err := webFiles.ReadFile("web/" + name)
	if err != nil {
		notFound(w, r)
		return
	}
	writeFile(w, r, name, pagePolicy, body)
}

func toSwagger(w http.ResponseWriter, r *http.Request) {
	http.Redirect(w, r, "/swagger/index.html", http.StatusFound)
}

// serveSwagger answers with our own page, start script and document, and with Swagger UI's own files otherwise.
func serveSwagger(w http.ResponseWriter, r *http.Request) {
	name := r.PathValue("file")
	var body []byte
	var err error
	switch name {
	case "":
		toSwagger(w, r)
		return
	case "index.html":
		body, err = webFiles.ReadFile("web/swagger.html")
	case "swagger-initializer.js", "openapi.json":
		body, err = webFiles.ReadFile("web/" + name)
	default:
		body, err = swaggerFile(name)
	}
	if err != nil {
		notFound(w, r)
		return
	}
	if name == "openapi.json" {
		now := time.Now().Unix()
		body = bytes.ReplaceAll(body, []byte(exampleNow), strconv.AppendInt(nil, now, 10))
		body = bytes.ReplaceAll(body, []byte(exampleISO), time.Unix(now, 0).UTC().AppendFormat(nil, "2006-01-02T15:04:05.000Z"))
		body = bytes.ReplaceAll(body, []byte(exampleYesterday), strconv.AppendInt(nil, now-daySeconds, 10))
	}
	writeFile(w, r, name, swaggerPolicy, body)
}

// swaggerFile returns a file of Swagger UI, which the package has compressed.
func swaggerFile(name string) ([]byte, error) {
	f, err := swagger.FS.Open(name + ".gz")
	if err != nil {
		return fs.ReadFile(swagger.FS, name)
	}
	defer f.Close()
	unzipped, err := gzip.NewReader(f)
	if err != nil {
		return nil, err
	}
	return io.ReadAll(unzipped)
}

// writeFile answers with a file of the binary, or 304 when the browser has it.
func writeFile(w http.ResponseWriter, r *http.Request, name, policy string, body []byte) {
	sum := sha256.Sum256(body)
	h := w.Header()
	h.Set("ETag", fmt.Sprintf("%q", hex.EncodeToString(sum[:8])))
	h.Set("Cache-Control", "no-cache") // ask again each time: the next version has the same names
	h.Set("Content-Security-Policy", policy)
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Referrer-Policy", "no-referrer")
	if t := mime.TypeByExtension(path.Ext(name)); t != "" {
		h.Set("Content-Type", t)
	}
	http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(body))
}

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
	ActiveCampaigns uint64      `json:"active_campaigns"`
	Channels        []group     `json:"channels"`
	Names           []group     `json:"event_names"`
	Campaigns       []group     `json:"campaigns"`
	Series          []group     `json:"series"`
	Through         *int64      `json:"complete_through"`
}

func (m *metricsAPI) serveOverview(w http.ResponseWriter, r *http.Request) {
	q, problems := parseOverviewQuery(r.URL.RawQuery, time.Now().Unix())
	m.answer(w, r, problems, func(ctx context.Context, through *int64) ([]byte, error) {
		return m.shared.get(*q, func() ([]byte, error) {
			a, err := m.overview(ctx, q)
			a.Through = through
			return jsonOf(a), err
		})
	})
}

// parseOverviewQuery checks the parameters, all of which may be absent: the last 24 hours, every event name and channel.
func parseOverviewQuery(rawQuery string, now int64) (*metricsQuery, []problem) {
	c := newQueryCheck(rawQuery, "from", "to", "channel", "event_name")
	q := c.filters()
	if q.to = now; c.values.Has("to") {
		q.to = c.seconds("to")
	}
	if q.from = q.to - daySeconds; c.values.Has("from") {
		q.from = c.seconds("from")
	}
	c.rangeAndChannel(q)
	q.from, q.to = min(max(q.from, 0), maxUnixSeconds), min(max(q.to, 0), maxUnixSeconds) // no event is outside
	return q, c.problems
}

// bucket is the width of the series: minute, hour or day.
func (q *metricsQuery) bucket() string {
	switch span := q.to - q.from; {
	case span < maxMinuteBuckets:
		return "minute"
	case span <= maxHourBuckets:
		return "hour"
	}
	return "day"
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
	pairs := byDay(perPair, where)
	var series string
	switch q.bucket() {
	case "day":
		series = byBucket(byDay(isoHour("toStartOfDay(hour)"), where))
	case "hour":
		series, pairs = byBucket(byHour(isoHour("hour"), where)), byHour(perPair, where)
	case "minute": // without users: counting those of an hour of raw events takes five times as long
		series = "SELECT toUInt8(0) AS kind, '' AS key, " + figures + " FROM " + byDay("''", where) +
			" UNION ALL SELECT toUInt8(1) AS kind, formatDateTime(toStartOfMinute(timestamp), '%Y-%m-%dT%H:%i:00Z', 'UTC') AS key," +
			" toInt64(count()) AS total, toString({revenue of events}) AS money, " + noUsers +
			" FROM {events} WHERE " + inRange + " AND " + where + " GROUP BY key"
	}
	return "SELECT * FROM (" + series + " UNION ALL SELECT toUInt8(if(grouping(name) = 0, 3, 2)) AS kind," +
		" if(kind = 3, name, channel) AS key, sum(event_count) AS total, toString(sum(revenue)) AS money, " + noUsers +
		" FROM (SELECT key.1 AS name, key.2 AS channel, event_count, revenue FROM " + pairs + ") GROUP BY GROUPING SETS ((name), (channel)))" +
		" ORDER BY kind, if(kind = 1, 0, -total), key" +
		fmt.Sprintf(" LIMIT %d BY kind, if(kind = 3 AND key != 'purchase', '', key)", overviewTop) // anybody may make up names
}

func (m *metricsAPI) overview(ctx context.Context, q *metricsQuery) (a overviewResult, err error) {
	var (
		kind             proto.ColUInt8
		key, money       proto.ColStr
		total            proto.ColInt64
		users, campaigns proto.ColUInt64
		top              []group
		topErr           error
		waiting          sync.WaitGroup
	)
	waiting.Go(func() { top, topErr = m.topCampaigns(ctx, q) }) // ends with ctx
	reset := func() {
		a = overviewResult{From: q.from, To: q.to, Bucket: q.bucket(), Channels: []group{}, Names: []group{}, Series: []group{}}
	}
	err = m.do(ctx, reset, eachRow(ch.Query{Body: q.overviewSQL(), Parameters: q.parameters()}, func(i int) {
		switch g := (group{Key: key.Row(i), Count: total[i], Revenue: json.Number(money.Row(i))}); kind[i] {
		case kindTotal:
			a.Count, a.Users, a.Revenue, a.ActiveCampaigns = g.Count, users[i], g.Revenue, campaigns[i]
		case kindBucket:
			if a.Bucket != "minute" {
				g.Users = new(users[i])
			}
			a.Series = append(a.Series, g)
		case kindChannel:
			a.Channels = append(a.Channels, g)
		case kindName:
			if g.Key == "purchase" {
				a.Purchases = g.Count
			}
			if len(a.Names) < overviewTop {
				a.Names = append(a.Names, g)
			}
		}
	}, &kind, &key, &total, &money, &users, &campaigns))
	waiting.Wait()
	a.Campaigns = top
	return a, errors.Join(err, topErr)
}

// topCampaigns returns the largest campaigns, which only the raw table knows.
func (m *metricsAPI) topCampaigns(ctx context.Context, q *metricsQuery) (top []group, err error) {
	var key proto.ColStr
	var total proto.ColInt64
	err = m.do(ctx, func() { top = []group{} }, eachRow(ch.Query{
		Body: "SELECT CAST(campaign_id, 'String') AS key, toInt64(count()) AS total FROM {events} WHERE " + q.where() +
			" AND campaign_id != '' AND " + inRange + " GROUP BY campaign_id ORDER BY total DESC, key LIMIT " + strconv.Itoa(overviewTop),
		Parameters: q.parameters(),
	}, func(i int) { top = append(top, group{Key: key.Row(i), Count: total[i]}) }, &key, &total))
	return top, err
}

// sharedAnswers gives everybody who asks the same within a second one answer: a page with many viewers costs as one.
type sharedAnswers struct {
	mu  sync.Mutex // guards all
	all map[metricsQuery]sharedAnswer
}

// sharedAnswer is what the first to ask gets, or is about to get.
type sharedAnswer struct {
	asked time.Time
	wait  func() ([]byte, error)
}

// get returns the answer to q: a shared one, or what ask returns. An error is not shared: perhaps only the first client left.
func (s *sharedAnswers) get(q metricsQuery, ask func() ([]byte, error)) ([]byte, error) {
	now := time.Now()
	s.mu.Lock()
	maps.DeleteFunc(s.all, func(_ metricsQuery, a sharedAnswer) bool { return now.Sub(a.asked) > sharedFor })
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
	// pipelineInterval is the time between two samples, and pipelineSamples how many values a series has: five minutes.
	pipelineInterval = 5 * time.Second
	pipelineSamples  = 60
)

// pipeline remembers the last minutes of one running system. It asks neither Kafka nor ClickHouse: the counters and the
// watermark are there anyway.
type pipeline struct {
	stats     *stats
	watermark *watermark
	ready     *readiness
	fixed     pipelineAnswer // what never changes

	mu       sync.Mutex // guards what follows
	sampled  time.Time
	counters map[string]uint64    // at that moment
	series   map[string][]float64 // as pipelineAnswer has them
}

// pipelineAnswer is the JSON of GET /api/v1/pipeline. A series has one value per interval, oldest first. Rates are this
// instance's events per second; lag and retries count everybody's records, on the main topic and on events.retry.
type pipelineAnswer struct {
	Instance  string               `json:"instance"`
	Interval  int                  `json:"interval_seconds"`
	Consumers string               `json:"consumers"`
	Links     []pipelineLink       `json:"links"`
	Series    map[string][]float64 `json:"series"`
}

type pipelineLink struct {
	Name string `json:"name"`
	URL  string `json:"url"`
}

func newPipeline(cfg *settings, instance string, st *stats, wm *watermark, ready *readiness) *pipeline {
	p := &pipeline{stats: st, watermark: wm, ready: ready, series: map[string][]float64{}}
	p.fixed = pipelineAnswer{Instance: instance, Interval: int(pipelineInterval.Seconds()), Links: []pipelineLink{}}
	for _, l := range []pipelineLink{{"Grafana", cfg.grafanaURL}, {"Kafka UI", cfg.kafkaUIURL}} {
		if l.URL != "" {
			p.fixed.Links = append(p.fixed.Links, l)
		}
	}
	p.sample(time.Now())
	return p
}

// run takes samples until ctx is done.
func (p *pipeline) run(ctx context.Context) {
	for sleep(ctx, pipelineInterval) == nil {
		p.sample(time.Now())
	}
}

// sample adds a value to each series, or begins them.
func (p *pipeline) sample(now time.Time) {
	counters := map[string]uint64{
		"accepted": p.stats.ingest.accepted.Get(), "stored": p.stats.store.rows.Get(),
		"duplicates": p.stats.store.duplicates.Get(), "dead_letters": p.stats.side.deadLetters(),
	}
	found := p.watermark.progress.Load()
	values := map[string]float64{"lag": 0, "retries": float64(found.retries)}
	if age := p.watermark.stored.age(); age > 0 { // else it is not known yet
		values["freshness_seconds"] = age.Seconds()
	}
	for _, lag := range found.lags {
		values["lag"] += float64(lag)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for name, n := range counters {
		if values[name] = float64(n - p.counters[name]); name != "dead_letters" { // which are too few for a rate
			values[name] /= now.Sub(p.sampled).Seconds()
		}
	}
	for name, value := range values {
		if known := p.series[name]; p.counters != nil {
			p.series[name] = append(known[max(0, len(known)+1-pipelineSamples):], value)
		}
	}
	p.sampled, p.counters = now, counters
}

func (p *pipeline) serve(w http.ResponseWriter, r *http.Request) {
	if c := newQueryCheck(r.URL.RawQuery); len(c.problems) > 0 {
		writeProblems(w, c.problems)
		return
	}
	a := p.fixed
	a.Consumers, _ = p.ready.consuming()
	p.mu.Lock()
	a.Series = p.series
	body := jsonOf(a)
	p.mu.Unlock()
	writeJSON(w, http.StatusOK, body)
}
