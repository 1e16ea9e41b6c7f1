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

// stats is every counter of one running system; its set is what /metrics prints.
type stats struct {
	set      *metrics.Set
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
	s := &stats{
		set: set,
		ingest: ingestStats{
			set:         set,
			accepted:    set.NewCounter("event_ingestion_events_accepted_total"),
			refused:     set.NewCounter("event_ingestion_events_refused_total"),
			unavailable: set.NewCounter("event_ingestion_events_unavailable_total"),
			ack:         set.NewPrometheusHistogramExt("event_ingestion_produce_duration_seconds", seconds),
		},
		troubles: failing,
		side:     sideStats{set: set, retried: set.NewCounter("event_ingestion_retries_total"), troubles: failing},
		store: storeStats{
			troubles:  failing,
			consumed:  set.NewCounter("event_ingestion_records_consumed_total"),
			inserts:   set.NewCounter("event_ingestion_inserts_total"),
			rows:      set.NewCounter("event_ingestion_rows_stored_total"),
			failures:  set.NewCounter("event_ingestion_insert_failures_total"),
			seconds:   set.NewPrometheusHistogramExt("event_ingestion_insert_duration_seconds", seconds),
			freshness: set.NewPrometheusHistogramExt("event_ingestion_freshness_seconds", seconds),

			lookups:       set.NewCounter("event_ingestion_lookups_total"),
			duplicates:    set.NewCounter("event_ingestion_duplicates_total"),
			mended:        set.NewCounter("event_ingestion_mended_rows_total"),
			lookupSeconds: set.NewPrometheusHistogramExt("event_ingestion_lookup_duration_seconds", seconds),
		},
	}
	set.NewGauge(fmt.Sprintf(`event_ingestion_build_info{version="%s",goversion="%s"}`, version(), runtime.Version()), func() float64 { return 1 })
	for _, code := range []string{codeRequired, codeMaxLength, codeInvalidFormat, codeFuture, codeExpired} {
		s.ingest.refusedItems(code)
	}
	metrics.ExposeMetadata(true) // HELP and TYPE lines
	s.side.deadLetters()         // makes the counters: an alert sees the first dead letter only when there was a 0 before
	return s
}

// route returns the counters of a route; call it once per name.
func (s *stats) route(name string) *routeStats {
	return &routeStats{set: s.set, name: name, seconds: s.set.GetOrCreatePrometheusHistogramExt(`event_ingestion_http_request_duration_seconds{route="`+name+`"}`, seconds)}
}

// watch adds the gauges of other parts.
func (s *stats) watch(current *atomic.Pointer[consumer], wm *watermark, bodies *byteBudget) {
	s.set.RegisterMetricsWriter(func(w io.Writer) {
		metrics.WriteMetadataIfNeeded(w, "event_ingestion_consumer_lag_records", "gauge")
		for p, n := range wm.partitionLags() {
			fmt.Fprintf(w, "event_ingestion_consumer_lag_records{partition=\"%d\"} %d\n", p, n)
		}
	})
	s.set.RegisterMetricsWriter(metrics.WriteProcessMetrics)
	s.set.NewGauge("event_ingestion_in_flight_bytes", func() float64 { return float64(bodies.used.Load()) })
	s.set.NewGauge("event_ingestion_complete_through_timestamp_seconds", func() float64 { return float64(wm.through.Load()) })
	s.set.NewGauge("event_ingestion_stored_behind_seconds", func() float64 { worst, _, _ := wm.stalled(); return worst.Seconds() })
	gauge := func(name string, value func(*consumer) float64) {
		s.set.NewGauge(name, func() float64 {
			if c := current.Load(); c != nil {
				return value(c)
			}
			return 0
		})
	}
	gauge("event_ingestion_partitions_assigned", func(c *consumer) float64 { return float64(c.assigned.Load()) })
	sum := func(of func(*dedupe) int64) func(*consumer) float64 {
		return func(c *consumer) (total float64) {
			for _, l := range c.lanes {
				total += float64(of(l.inserter.dedupe))
			}
			return total
		}
	}
	gauge("event_ingestion_dedupe_bytes", sum(func(d *dedupe) int64 { return d.bytes.Load() }))
	gauge("event_ingestion_dedupe_minutes", sum(func(d *dedupe) int64 { return d.sets.Load() }))
}

// counter prints what another part counts.
func (s *stats) counter(name string, value func() uint64) {
	s.set.RegisterMetricsWriter(func(w io.Writer) { metrics.WriteCounterUint64(w, name, value()) })
}

// help says what each metric is; the library adds its type.
var help = map[string]string{
	"event_ingestion_http_requests_total":                "Answers by route and status code; code 0 is none.",
	"event_ingestion_http_request_duration_seconds":      "Time from a request's header to the end of its answer, by route.",
	"event_ingestion_events_accepted_total":              "Events that Kafka has acknowledged.",
	"event_ingestion_events_refused_total":               "Events that are not valid.",
	"event_ingestion_segment_items_refused_total":        "Items of Segment's protocol that are not valid, by the code of their first problem.",
	"event_ingestion_events_unavailable_total":           "Good events that Kafka did not acknowledge in time.",
	"event_ingestion_in_flight_bytes":                    "Bytes of bodies, records and answers that requests hold at the moment.",
	"event_ingestion_produce_duration_seconds":           "Time from handing a request's events to Kafka to the last acknowledgement.",
	"event_ingestion_records_consumed_total":             "Records read from the main topic.",
	"event_ingestion_partitions_assigned":                "Partitions of the main topic that this instance has.",
	"event_ingestion_consumer_lag_records":               "Records of the main topic that are not yet stored, by partition.",
	"event_ingestion_freshness_seconds":                  "Age of a block's first record when its round is stored.",
	"event_ingestion_complete_through_timestamp_seconds": "Unix second up to which everything acknowledged is stored.",
	"event_ingestion_stored_behind_seconds":              "Seconds for which nothing was stored of a partition that has records waiting; 0 when none stands still.",
	"event_ingestion_inserts_total":                      "Inserts that ClickHouse has taken.",
	"event_ingestion_rows_stored_total":                  "Rows of these inserts.",
	"event_ingestion_insert_failures_total":              "Attempts at an insert or a lookup that failed and were repeated.",
	"event_ingestion_insert_duration_seconds":            "Time of an insert with all its attempts.",
	"event_ingestion_duplicates_total":                   "Records of events that were stored before.",
	"event_ingestion_lookups_total":                      "Records that memory did not know about and that were looked up in ClickHouse.",
	"event_ingestion_lookup_duration_seconds":            "Time of loading ids and of looking up, of rounds that looked up.",
	"event_ingestion_dedupe_bytes":                       "Memory of the ids that are known to be stored.",
	"event_ingestion_dedupe_minutes":                     "Minutes of event time of which all ids are in memory.",
	"event_ingestion_mended_rows_total":                  "Rows of events_hourly that did not agree with events after a fault and were mended.",
	"event_ingestion_broken_parts_total":                 "Parts of ClickHouse that could not be read, each once.",
	"event_ingestion_retries_total":                      "Rejected records put on the retry topic.",
	"event_ingestion_dead_letters_total":                 "Records given up, by error type.",
	"event_ingestion_build_info":                         "1, with the version as label.",
}

// write prints every metric in Prometheus' text format. The library leaves HELP lines without a text; write puts it in.
func (s *stats) write(w io.Writer) {
	var b bytes.Buffer
	s.set.WritePrometheus(&b)
	for line := range strings.Lines(b.String()) {
		if family, ok := strings.CutPrefix(strings.TrimSpace(line), "# HELP "); ok {
			line = "# HELP " + family + " " + cmp.Or(help[family], "Of the Go runtime or the process, by github.com/VictoriaMetrics/metrics.") + "\n"
		}
		io.WriteString(w, line)
	}
}

// version is what `go build` knows of the source: a tag, or a commit and whether the tree was clean.
func version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	return info.Main.Version
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
	mu   sync.Mutex // guards what follows
	open map[string]trouble
	ever map[string]bool    // what has worked at least once
	told map[string]telling // by what fails and its cause without digits: ports, sizes and counts change from try to try
}

// trouble is one thing that does not work.
type trouble struct {
	what, cause string
	since       time.Time
	told        bool // has been logged since it began
}

type telling struct {
	at    time.Time
	times int // how often it has happened since
}

func newTroubles() *troubles {
	return &troubles{open: map[string]trouble{}, ever: map[string]bool{}, told: map[string]telling{}}
}

// note says that what ("insert", "create topics") has failed, once more or for the first time, and will be tried again.
func (t *troubles) note(what string, err error) {
	cause, now := firstLine(err.Error()), time.Now()
	cause = cause[:min(len(cause), maxErrorMessage)]
	t.mu.Lock()
	defer t.mu.Unlock()
	tr, failing := t.open[what]
	if !failing {
		tr = trouble{what: what, since: now}
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
	var first trouble
	for _, tr := range t.open {
		if first.what == "" || tr.since.Before(first.since) {
			first = tr
		}
	}
	if first.what == "" {
		return ""
	}
	return first.what + ": " + first.cause
}
