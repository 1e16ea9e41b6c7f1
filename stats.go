// What is counted on an event's way, how Prometheus reads it, and what is failing at the moment.
//
// stats.go owns every counter and histogram of a running system; the other files count with them, admin.go serves them. It
// also owns the words for troubles: whoever retries until something works notes each failure here instead of logging it. The
// log gets a cause at once and then once a minute, /ready shows it as long as it lasts.

package main

import (
	"bytes"
	"cmp"
	"fmt"
	"io"
	"log/slog"
	"runtime"
	"runtime/debug"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/VictoriaMetrics/metrics"
)

type ingestStats struct {
	set                            *metrics.Set
	accepted, refused, unavailable *metrics.Counter
	ack                            *metrics.PrometheusHistogram
}

// refusedItems counts the invalid items of Segment's protocol, whose senders get a 200.
func (s *ingestStats) refusedItems(code string) *metrics.Counter {
	return s.set.GetOrCreateCounter(`event_ingestion_segment_items_refused_total{code="` + code + `"}`)
}

type sideStats struct {
	set      *metrics.Set
	retried  *metrics.Counter
	troubles *troubles
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
	seconds, lookupSeconds, freshness *metrics.PrometheusHistogram
	troubles                          *troubles
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

// stats is every counter of one running system. set is what /metrics prints, help says what each of its metrics is.
type stats struct {
	set      *metrics.Set
	help     map[string]string // written only before the system runs
	ingest   ingestStats
	side     sideStats
	store    storeStats
	troubles *troubles // shared by all of them
}

// seconds are the buckets of every histogram: requests and acknowledgements take milliseconds, inserts tens of them, and on a
// bad day it matters whether it was one second or thirty.
var seconds = []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60}

func newStats() *stats {
	set, failing := metrics.NewSet(), newTroubles()
	s := &stats{set: set, troubles: failing, help: map[string]string{
		// With labels: made where they are counted.
		"event_ingestion_http_requests_total":           "Answers by route and status code; code 0 is none.",
		"event_ingestion_http_request_duration_seconds": "Time from a request's header to the end of its answer, by route.",
		"event_ingestion_segment_items_refused_total":   "Items of Segment's protocol that are not valid, by the code of their first problem.",
		"event_ingestion_dead_letters_total":            "Records given up, by error type.",
		"event_ingestion_build_info":                    "1, with the version as label.",
	}}
	counter := func(name, help string) *metrics.Counter { return set.NewCounter(s.named(name, help)) }
	histogram := func(name, help string) *metrics.PrometheusHistogram {
		return set.NewPrometheusHistogramExt(s.named(name, help), seconds)
	}
	s.ingest = ingestStats{
		set:         set,
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
		troubles:   failing,
		consumed:   counter("event_ingestion_records_consumed_total", "Records read from the main topic."),
		inserts:    counter("event_ingestion_inserts_total", "Inserts that ClickHouse has taken."),
		rows:       counter("event_ingestion_rows_stored_total", "Rows of these inserts."),
		failures:   counter("event_ingestion_insert_failures_total", "Attempts at an insert or a lookup that failed and were repeated."),
		seconds:    histogram("event_ingestion_insert_duration_seconds", "Time of an insert with all its attempts."),
		freshness:  histogram("event_ingestion_freshness_seconds", "Age of a block's first record when its round is stored."),
		duplicates: counter("event_ingestion_duplicates_total", "Records of events that were stored before."),
		lookups: counter("event_ingestion_lookups_total",
			"Records that memory did not know about and that were looked up in ClickHouse."),
		lookupSeconds: histogram("event_ingestion_lookup_duration_seconds",
			"Time of loading ids and of looking up, of rounds that looked up."),
		mended: counter("event_ingestion_mended_rows_total",
			"Rows of events_hourly that did not agree with events after a fault and were mended."),
	}
	set.NewGauge(fmt.Sprintf(`event_ingestion_build_info{version="%s",goversion="%s"}`, version(), runtime.Version()), func() float64 { return 1 })
	for _, code := range []string{codeRequired, codeMaxLength, codeInvalidFormat, codeFuture, codeExpired} {
		s.ingest.refusedItems(code)
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

// watch adds what other parts know. broken counts the parts of ClickHouse that could not be read.
func (s *stats) watch(current *atomic.Pointer[consumer], wm *watermark, bodies *byteBudget, broken func() uint64) {
	lag := s.named("event_ingestion_consumer_lag_records", "Records of the main topic that are not yet stored, by partition.")
	parts := s.named("event_ingestion_broken_parts_total", "Parts of ClickHouse that could not be read, each once.")
	s.set.RegisterMetricsWriter(func(w io.Writer) {
		metrics.WriteMetadataIfNeeded(w, lag, "gauge")
		for p, n := range wm.partitionLags() {
			fmt.Fprintf(w, "%s{partition=\"%d\"} %d\n", lag, p, n)
		}
		metrics.WriteCounterUint64(w, parts, broken())
		metrics.WriteProcessMetrics(w)
	})
	gauge := func(name, help string, value func() float64) { s.set.NewGauge(s.named(name, help), value) }
	gauge("event_ingestion_in_flight_bytes", "Bytes of bodies, records and answers that requests hold at the moment.",
		func() float64 { return float64(bodies.used.Load()) })
	gauge("event_ingestion_complete_through_timestamp_seconds", "Unix second up to which everything acknowledged is stored.",
		func() float64 { return float64(wm.through.Load()) })
	gauge("event_ingestion_stored_behind_seconds",
		"Seconds for which nothing was stored of a partition that has records waiting; 0 when none stands still.",
		func() float64 { worst, _, _ := wm.stalled(); return worst.Seconds() })
	of := func(n func(*consumer) int64) func() float64 {
		return func() float64 {
			if c := current.Load(); c != nil {
				return float64(n(c))
			}
			return 0
		}
	}
	gauge("event_ingestion_partitions_assigned", "Partitions of the main topic that this instance has.",
		of(func(c *consumer) int64 { return c.assigned.Load() }))
	gauge("event_ingestion_dedupe_bytes", "Memory of the ids that are known to be stored.",
		of(func(c *consumer) int64 { return c.inserter.dedupe.bytes.Load() }))
	gauge("event_ingestion_dedupe_minutes", "Minutes of event time of which all ids are in memory.",
		of(func(c *consumer) int64 { return c.inserter.dedupe.sets.Load() }))
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

// version is what `go build` knows of the source: a tag, or a commit and whether the tree was clean.
func version() string {
	if info, ok := debug.ReadBuildInfo(); ok {
		return info.Main.Version
	}
	return "unknown"
}

const (
	// tellAgain is how often the log repeats a cause that stays the same.
	tellAgain = time.Minute
	// maxTold bounds the remembered causes, each at most maxErrorMessage bytes; beyond it all are forgotten and logged anew.
	maxTold = 200
)

// troubles are what does not work now in one running system. Anybody may call its methods at any time; each costs a lock and a
// map look-up, so call them on a failure and at the end of a try.
type troubles struct {
	mu   sync.Mutex         // guards what follows
	open map[string]trouble // by what fails
	ever map[string]bool    // what has worked at least once
	told map[string]telling // by what fails and its cause without digits: ports, sizes and counts change from try to try
}

// trouble is one thing that does not work.
type trouble struct {
	cause string
	since time.Time
	told  bool // has been logged since it began
}

type telling struct {
	at    time.Time
	times int // how often it has happened since
}

func newTroubles() *troubles {
	return &troubles{open: map[string]trouble{}, ever: map[string]bool{}, told: map[string]telling{}}
}

// note says that what ("insert", "create topics") has failed, once more or for the first time, and will be tried again; without
// an error, that it works.
func (t *troubles) note(what string, err error) {
	if err == nil {
		t.clear(what)
		return
	}
	cause, now := firstLine(err.Error()), time.Now()
	cause = cause[:min(len(cause), maxErrorMessage)]
	t.mu.Lock()
	defer t.mu.Unlock()
	tr, failing := t.open[what]
	if !failing {
		tr = trouble{since: now}
	}
	tr.cause = cause
	key := what + ": " + strings.Map(func(r rune) rune {
		if r >= '0' && r <= '9' {
			return -1
		}
		return r
	}, cause)
	seen, known := t.told[key]
	seen.times++
	if !known || now.Sub(seen.at) >= tellAgain {
		slog.Warn("fails, and is tried again", "what", what, "error", cause, "times", seen.times, "for", now.Sub(tr.since).Round(time.Millisecond))
		seen, tr.told = telling{at: now}, true
	}
	if len(t.told) >= maxTold {
		clear(t.told)
	}
	t.told[key], t.open[what] = seen, tr
}

// clear says that what works.
func (t *troubles) clear(what string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.ever[what] = true
	if tr := t.open[what]; tr.told {
		slog.Info("works again", "what", what, "after", time.Since(tr.since).Round(time.Millisecond))
	}
	delete(t.open, what)
}

// hasWorked says whether what was ever cleared.
func (t *troubles) hasWorked(what string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.ever[what]
}

// oldest is what has failed for the longest time, as "what: cause"; empty when everything works.
func (t *troubles) oldest() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	text, since := "", time.Time{}
	for what, tr := range t.open {
		if text == "" || tr.since.Before(since) {
			text, since = what+": "+tr.cause, tr.since
		}
	}
	return text
}
