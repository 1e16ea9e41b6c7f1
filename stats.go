// What is counted on an event's way, and how operators read it: Prometheus' metrics, the last minutes, profiles.
//
// stats.go owns every counter and histogram of a running system; the other files count with them. What they know beside that it is
// given as funcs. It owns the admin listener, which is for loopback or a private network: it has no access control.

package main

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/http"
	_ "net/http/pprof"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/VictoriaMetrics/metrics"

	"github.com/event-ingestion/event-ingestion/internal/troubles"
)

// Why a record was given up: the values of the header error_type, and of the counter's label.
const (
	errorUnmarshal    = "unmarshal_error"
	errorInsertFailed = "insert_failed"
	errorExhausted    = "max_retries_exhausted"
)

type ingestStats struct {
	accepted, refused, unavailable *metrics.Counter
	ack                            *metrics.PrometheusHistogram
	refusals                       *troubles.Refusals
}

type sideStats struct {
	set      *metrics.Set
	retried  *metrics.Counter
	troubles *troubles.Set
}

// dead counts the dead letters of an error_type.
func (s *sideStats) dead(why string) *metrics.Counter {
	return s.set.GetOrCreateCounter(`event_ingestion_dead_letters_total{type="` + why + `"}`)
}

// deadLetters is how many there were of all types.
func (s *sideStats) deadLetters() (n uint64) {
	for _, why := range []string{errorInsertFailed, errorUnmarshal, errorExhausted} {
		n += s.dead(why).Get()
	}
	return n
}

type storeStats struct {
	consumed                          *metrics.Counter
	inserts, rows, failures           *metrics.Counter
	lookups, duplicates, mended       *metrics.Counter
	erased                            *metrics.Counter
	seconds, lookupSeconds, freshness *metrics.PrometheusHistogram
	troubles                          *troubles.Set
	unknown                           *metrics.Counter
	strangers                         sync.Map     // names of members that the log has told
	told                              atomic.Int64 // how many these are

	mu   sync.Mutex          // guards last
	last map[int32]storedEnd // by partition
}

// storedEnd is how far this instance has stored a partition last, or found it stored. Its offsets may have to wait longer.
type storedEnd struct {
	offset int64
	at     time.Time
}

func (s *storeStats) storedOf(partition int32, end storedEnd) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.last[partition] = end
}

// lastOf is the zero value, which is centuries ago, when nothing of the partition was stored.
func (s *storeStats) lastOf(partition int32) storedEnd {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.last[partition]
}

// maxStrangers is how many names of unknown members the log tells: another producer can make up any.
const maxStrangers = 20

// unknownMember counts a member of a consumed event that this version does not know, and tells its name in the log, once.
func (s *storeStats) unknownMember(quoted []byte) {
	s.unknown.Inc()
	name := clip(bytes.Trim(quoted, `"`))
	if s.told.Load() >= maxStrangers {
		return
	}
	if _, again := s.strangers.LoadOrStore(name, true); !again && s.told.Add(1) <= maxStrangers {
		slog.Warn("events have a member that this version does not know, and are stored without it: upgrade consumers before what sends to them", "member", name)
	}
}

func (s *storeStats) lookedUp(rows int, took time.Duration) {
	s.lookups.Add(rows)
	s.lookupSeconds.Update(took.Seconds())
}

func (s *storeStats) inserted(rows int, took time.Duration) {
	s.inserts.Inc()
	s.rows.Add(rows)
	s.seconds.Update(took.Seconds())
}

// routeStats counts the requests of one route.
type routeStats struct {
	set     *metrics.Set
	name    string
	seconds *metrics.PrometheusHistogram
	codes   [600]atomic.Pointer[metrics.Counter] // by status, made when first seen
}

func (rs *routeStats) count(status int, took time.Duration) {
	if status < 100 || status >= len(rs.codes) {
		status = 0 // no answer was written
	}
	c := rs.codes[status].Load()
	if c == nil {
		c = rs.set.GetOrCreateCounter(fmt.Sprintf(`event_ingestion_http_requests_total{route="%s",code="%d"}`, rs.name, status))
		rs.codes[status].Store(c)
	}
	c.Inc()
	rs.seconds.Update(took.Seconds())
}

// Routes that take events, by the names of their counters.
const (
	routeEvents  = "events"
	routeBulk    = "bulk"
	routeSegment = "segment"
)

// otherField stands for what only a sender knows, in counters: the name of a member that is no field of an event.
const otherField = "other"

// refusalOf is what is shown of an event of that name that was refused for p: nothing else that its sender made up, so that there are
// few kinds of them.
func refusalOf(p problem, name []byte) troubles.Refusal {
	field, message := p.field, p.message
	if field != "" && field != "type" && !slices.Contains(fieldNames[:], field) {
		field, message = otherField, "a member"+strings.TrimPrefix(message, field)
	}
	if p.code == codeInvalidChannel {
		message, _, _ = strings.Cut(message, ", not ")
	}
	return troubles.Refusal{Code: p.code, Field: field, Message: message, Name: string(name)}
}

// stats is every counter of one running system. set is what /metrics prints, help says what each of its metrics is.
type stats struct {
	set      *metrics.Set
	help     map[string]string // written only before the system runs
	ingest   ingestStats
	side     sideStats
	store    storeStats
	troubles *troubles.Set // shared by all of them
}

// seconds are the buckets of every histogram: requests and acknowledgements take milliseconds, inserts tens of them, and on a
// bad day it matters whether it was one second or thirty.
var seconds = []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60}

func newStats() *stats {
	set, failing := metrics.NewSet(), troubles.New()
	s := &stats{set: set, troubles: failing, help: map[string]string{
		// With labels: made where they are counted.
		"event_ingestion_http_requests_total":           "Answers by route and status code; code 0 is none.",
		"event_ingestion_http_request_duration_seconds": "Time from a request's header to the end of its answer, by route.",
		"event_ingestion_refused_total":                 "Events that are not valid, by route, and by code and field of their first problem; a body that is refused whole counts as one.",
		"event_ingestion_dead_letters_total":            "Records given up, by error type.",
		"event_ingestion_build_info":                    "1, with the version as label.",
	}}
	counter := func(name, help string) *metrics.Counter { return set.NewCounter(s.named(name, help)) }
	histogram := func(name, help string) *metrics.PrometheusHistogram {
		return set.NewPrometheusHistogramExt(s.named(name, help), seconds)
	}
	s.ingest = ingestStats{
		refusals:    troubles.NewRefusals(set, "event_ingestion_refused_total"),
		accepted:    counter("event_ingestion_events_accepted_total", "Events that Kafka has acknowledged."),
		refused:     counter("event_ingestion_events_refused_total", "Events that are not valid."),
		unavailable: counter("event_ingestion_events_unavailable_total", "Good events that Kafka did not acknowledge in time."),
		ack: histogram("event_ingestion_produce_duration_seconds",
			"Time from handing a request's events to Kafka to the last acknowledgement."),
	}
	s.side = sideStats{
		set:      set,
		troubles: failing,
		retried:  counter("event_ingestion_retries_total", "Rejected records put on the retry topic."),
	}
	s.store = storeStats{
		last:       map[int32]storedEnd{},
		troubles:   failing,
		consumed:   counter("event_ingestion_records_consumed_total", "Records read from the main topic."),
		inserts:    counter("event_ingestion_inserts_total", "Inserts that ClickHouse has taken."),
		rows:       counter("event_ingestion_rows_stored_total", "Rows of these inserts."),
		failures:   counter("event_ingestion_insert_failures_total", "Attempts at an insert or a lookup that failed and were repeated."),
		seconds:    histogram("event_ingestion_insert_duration_seconds", "Time of an insert with all its attempts."),
		freshness:  histogram("event_ingestion_freshness_seconds", "Age of a block's first record when its round is stored."),
		duplicates: counter("event_ingestion_duplicates_total", "Records of events that were stored before."),
		erased:     counter("event_ingestion_erased_events_total", "Records that were left out because their user was erased."),
		lookups: counter("event_ingestion_lookups_total",
			"Records that memory did not know about and that were looked up in ClickHouse."),
		lookupSeconds: histogram("event_ingestion_lookup_duration_seconds",
			"Time of loading ids and of looking up, of rounds that looked up."),
		unknown: counter("event_ingestion_unknown_members_total",
			"Members of consumed events that this version does not know: it has stored the events without them."),
		mended: counter("event_ingestion_mended_rows_total",
			"Rows of events_hourly that did not agree with events after a fault and were mended."),
	}
	set.NewGauge(fmt.Sprintf(`event_ingestion_build_info{version="%s",goversion="%s"}`, version(), runtime.Version()), func() float64 { return 1 })
	for _, route := range []string{routeEvents, routeBulk, routeSegment} {
		s.ingest.refusals.Expect(route, codeRequired, "event_name", "user_id", "timestamp")
		s.ingest.refusals.Expect(route, codeMaxLength, "", "event_name", "user_id", "campaign_id", "metadata", "insert_id")
		s.ingest.refusals.Expect(route, codeInvalidFormat, append([]string{"", otherField, "type"}, fieldNames[:]...)...)
		s.ingest.refusals.Expect(route, codeInvalidChannel, "channel")
		s.ingest.refusals.Expect(route, codeFuture, "timestamp")
		s.ingest.refusals.Expect(route, codeExpired, "timestamp")
		s.ingest.refusals.Expect(route, codeMaxTags, "tags")
		s.ingest.refusals.Expect(route, codeTagTooLong, "tags")
	}
	metrics.ExposeMetadata(true) // HELP and TYPE lines
	s.side.deadLetters()         // makes the counters: an alert sees the first dead letter only when there was a 0 before
	return s
}

// named returns name and keeps what it is.
func (s *stats) named(name, help string) string {
	s.help[name] = help
	return name
}

// route returns the counters of a route; call it once per name.
func (s *stats) route(name string) *routeStats {
	return &routeStats{set: s.set, name: name, seconds: s.set.GetOrCreatePrometheusHistogramExt(`event_ingestion_http_request_duration_seconds{route="`+name+`"}`, seconds)}
}

// watched is what other parts know, each at the moment when it is asked for.
type watched struct {
	lags     func() []int64       // of the main topic's partitions, in records
	through  func() int64         // Unix second up to which everything acknowledged is stored
	behind   func() time.Duration // since when nothing was stored of the worst partition that has records waiting
	inFlight func() int64         // bytes that requests hold
	broken   func() uint64        // parts of ClickHouse that could not be read
	assigned func() int64         // partitions of the main topic that this instance has
	ids      func() int64         // bytes of the ids that are known to be stored
	minutes  func() int64         // of event time, of which all ids are known
}

// watch adds what other parts know.
func (s *stats) watch(of watched) {
	lag := s.named("event_ingestion_consumer_lag_records", "Records of the main topic that are not yet stored, by partition.")
	parts := s.named("event_ingestion_broken_parts_total", "Parts of ClickHouse that could not be read, each once.")
	s.set.RegisterMetricsWriter(func(w io.Writer) {
		metrics.WriteMetadataIfNeeded(w, lag, "gauge")
		for p, n := range of.lags() {
			fmt.Fprintf(w, "%s{partition=\"%d\"} %d\n", lag, p, n)
		}
		metrics.WriteCounterUint64(w, parts, of.broken())
		metrics.WriteProcessMetrics(w)
	})
	gauge := func(name, help string, value func() int64) {
		s.set.NewGauge(s.named(name, help), func() float64 { return float64(value()) })
	}
	gauge("event_ingestion_in_flight_bytes", "Bytes of bodies, records and answers that requests hold at the moment.", of.inFlight)
	gauge("event_ingestion_complete_through_timestamp_seconds", "Unix second up to which everything acknowledged is stored.", of.through)
	gauge("event_ingestion_partitions_assigned", "Partitions of the main topic that this instance has.", of.assigned)
	gauge("event_ingestion_dedupe_bytes", "Memory of the ids that are known to be stored.", of.ids)
	gauge("event_ingestion_dedupe_minutes", "Minutes of event time of which all ids are in memory.", of.minutes)
	s.set.NewGauge(s.named("event_ingestion_stored_behind_seconds",
		"Seconds for which nothing was stored of a partition that has records waiting; 0 when none stands still."),
		func() float64 { return of.behind().Seconds() })
}

// write prints every metric in Prometheus' text format. The library leaves HELP lines without a text; write puts it in.
func (s *stats) write(w io.Writer) {
	var b bytes.Buffer
	s.set.WritePrometheus(&b)
	for line := range strings.Lines(b.String()) {
		if family, ok := strings.CutPrefix(strings.TrimSpace(line), "# HELP "); ok {
			line = "# HELP " + family + " " + cmp.Or(s.help[family], "Of the Go runtime or the process, by github.com/VictoriaMetrics/metrics.") + "\n"
		}
		io.WriteString(w, line)
	}
}

// newAdminServer serves Prometheus text and profiles.
func newAdminServer(addr string, st *stats) *http.Server {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /metrics", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
		st.write(w)
	})
	mux.Handle("GET /debug/pprof/", http.DefaultServeMux) // where net/http/pprof puts its pages
	return &http.Server{Addr: addr, Handler: mux, ReadHeaderTimeout: readHeaderTimeout, MaxHeaderBytes: maxHeaderBytes}
}

// release is CHANGELOG.md's newest version, which make and the Dockerfile give to the linker (-X main.release=…).
var release string

// version is release or, of a build without it, what `go build` knows of the source: a tag, or a commit and whether the tree was clean.
func version() string {
	if info, ok := debug.ReadBuildInfo(); ok && release == "" {
		return info.Main.Version
	}
	return cmp.Or(release, "unknown")
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
	waiting   func() (lag, retries int64, behind time.Duration) // as watermark has them
	consumers func() string                                     // how storing goes, in words
	fixed     pipelineAnswer                                    // what never changes

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
	Refused   []troubles.Count     `json:"refused"`  // events by reason since the start, the most first
	Refusals  []troubles.Refusal   `json:"refusals"` // the last of them, the newest first
}

type pipelineLink struct {
	Name string `json:"name"`
	URL  string `json:"url"`
}

func newPipeline(cfg *settings, instance string, st *stats, waiting func() (lag, retries int64, behind time.Duration), consumers func() string) *pipeline {
	p := &pipeline{stats: st, waiting: waiting, consumers: consumers, series: map[string][]float64{}}
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
	for troubles.Sleep(ctx, pipelineInterval) == nil {
		p.sample(time.Now())
	}
}

// sample adds a value to each series, or begins them.
func (p *pipeline) sample(now time.Time) {
	counters := map[string]uint64{
		"accepted": p.stats.ingest.accepted.Get(), "stored": p.stats.store.rows.Get(),
		"duplicates": p.stats.store.duplicates.Get(), "dead_letters": p.stats.side.deadLetters(),
	}
	lag, retries, behind := p.waiting()
	values := map[string]float64{"lag": float64(lag), "retries": float64(retries)}
	if behind > 0 { // else it is not known yet
		values["freshness_seconds"] = behind.Seconds()
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

// answer is what there is now. Nothing changes it any more: a series only grows behind what a reader has of it.
func (p *pipeline) answer() pipelineAnswer {
	a := p.fixed
	a.Consumers = p.consumers()
	a.Refused, a.Refusals = p.stats.ingest.refusals.Shown()
	p.mu.Lock()
	defer p.mu.Unlock()
	a.Series = maps.Clone(p.series)
	return a
}
