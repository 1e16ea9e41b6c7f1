// For operators: readiness, Prometheus metrics, pprof.
//
// admin.go owns the counters that the other files count with, and the admin listener, which is for loopback or a
// private network: it has no access control.

package main

import (
	"context"
	"fmt"
	"net/http"
	"net/http/pprof"
	"sync/atomic"
	"time"

	"github.com/VictoriaMetrics/metrics"
	"github.com/twmb/franz-go/pkg/kgo"
)

// readyTimeout bounds all dependency checks of one /ready.
const readyTimeout = 3 * time.Second

type ingestStats struct {
	requests, accepted, refused, unavailable *metrics.Counter
}

type sidewaysStats struct {
	dead, retried *metrics.Counter
}

type storeStats struct {
	inserts, rows, failures             *metrics.Counter
	suspects, duplicates, falseSuspects *metrics.Counter
	seconds, lookupSeconds              *metrics.Histogram
}

func (s *storeStats) resolved(suspects, duplicates, new int, took time.Duration) {
	s.suspects.Add(suspects)
	s.duplicates.Add(duplicates)
	s.falseSuspects.Add(new)
	s.lookupSeconds.Update(took.Seconds())
}

func (s *storeStats) inserted(rows int, took time.Duration) {
	s.inserts.Inc()
	s.rows.Add(rows)
	s.seconds.Update(took.Seconds())
}

// stats is every counter of one running system; its set is what /metrics prints.
type stats struct {
	set      *metrics.Set
	ingest   ingestStats
	sideways sidewaysStats
	store    storeStats
}

func newStats() *stats {
	set := metrics.NewSet()
	return &stats{
		set: set,
		ingest: ingestStats{
			requests:    set.NewCounter("event_ingestion_http_ingest_requests_total"),
			accepted:    set.NewCounter("event_ingestion_events_accepted_total"),
			refused:     set.NewCounter("event_ingestion_events_refused_total"),
			unavailable: set.NewCounter("event_ingestion_events_unavailable_total"),
		},
		sideways: sidewaysStats{
			dead:    set.NewCounter("event_ingestion_dead_letters_total"),
			retried: set.NewCounter("event_ingestion_retries_total"),
		},
		store: storeStats{
			inserts:  set.NewCounter("event_ingestion_inserts_total"),
			rows:     set.NewCounter("event_ingestion_rows_stored_total"),
			failures: set.NewCounter("event_ingestion_insert_failures_total"),
			seconds:  set.NewHistogram("event_ingestion_insert_duration_seconds"),

			suspects:      set.NewCounter("event_ingestion_suspects_total"),
			duplicates:    set.NewCounter("event_ingestion_duplicates_total"),
			falseSuspects: set.NewCounter("event_ingestion_false_suspects_total"),
			lookupSeconds: set.NewHistogram("event_ingestion_suspect_lookup_duration_seconds"),
		},
	}
}

// watch adds what the dedupe holds.
func (s *stats) watch(current *atomic.Pointer[consumer]) {
	gauge := func(name string, value func(*inserter) float64) {
		s.set.NewGauge(name, func() float64 {
			if c := current.Load(); c != nil {
				return value(c.inserter)
			}
			return 0
		})
	}
	gauge("event_ingestion_dedupe_filter_bytes", func(in *inserter) float64 { return float64(in.past.bytes.Load()) })
	gauge("event_ingestion_dedupe_covered_hours", func(in *inserter) float64 { return float64(len(in.covered())) })
}

// readiness answers GET /ready.
type readiness struct {
	kafka    *kgo.Client
	metrics  *metricsAPI
	consumer atomic.Pointer[consumer] // nil until it runs
	stopping atomic.Bool
}

func (rd *readiness) serve(w http.ResponseWriter, r *http.Request) {
	ctx, cancel := context.WithTimeout(r.Context(), readyTimeout)
	defer cancel()
	checks := []struct {
		name string
		err  error
	}{
		{"kafka", rd.kafka.Ping(ctx)},
		{"clickhouse", rd.metrics.ping(ctx)},
		{"consumers", rd.consuming()},
	}
	status, word := http.StatusOK, "ready"
	if rd.stopping.Load() {
		status, word = http.StatusServiceUnavailable, "stopping"
	}
	body := []byte(nil)
	for _, c := range checks {
		text := "ok"
		if c.err != nil {
			status, word, text = http.StatusServiceUnavailable, "not ready", firstLine(c.err.Error())
		}
		body = append(body, ",\n"...)
		body = appendString(body, c.name)
		body = append(body, ':')
		body = appendString(body, text)
	}
	b := appendString([]byte(`{"status":`), word)
	if status != http.StatusOK {
		b = append(b, `,"error":"not ready to serve"`...)
	}
	writeJSON(w, status, append(append(b, body...), "}\n"...))
}

func (rd *readiness) consuming() error {
	c := rd.consumer.Load()
	if c == nil {
		return fmt.Errorf("not started: the tables or topics are not there yet")
	}
	if c.assigned.Load() == 0 {
		return fmt.Errorf("no partitions assigned yet")
	}
	return nil
}

// serveHealth answers GET /health: the process answers. It asks no dependency, so that an outage of one does not
// make an orchestrator kill the copies that still accept events.
func serveHealth(w http.ResponseWriter, _ *http.Request) {
	writeJSON(w, http.StatusOK, []byte(`{"status":"ok"}`))
}

// newAdminServer serves Prometheus text and profiles.
func newAdminServer(addr string, st *stats, wm *watermark) *http.Server {
	st.set.NewGauge("event_ingestion_consumer_lag_records", func() float64 { return float64(wm.lag.Load()) })
	st.set.NewGauge("event_ingestion_complete_through_timestamp_seconds", func() float64 { return float64(wm.through.Load()) })
	mux := http.NewServeMux()
	mux.HandleFunc("GET /metrics", func(w http.ResponseWriter, _ *http.Request) {
		st.set.WritePrometheus(w)
		metrics.WriteProcessMetrics(w)
	})
	mux.HandleFunc("GET /debug/pprof/", pprof.Index)
	mux.HandleFunc("GET /debug/pprof/cmdline", pprof.Cmdline)
	mux.HandleFunc("GET /debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("GET /debug/pprof/symbol", pprof.Symbol)
	mux.HandleFunc("GET /debug/pprof/trace", pprof.Trace)
	return &http.Server{Addr: addr, Handler: mux, ReadHeaderTimeout: readHeaderTimeout, MaxHeaderBytes: maxHeaderBytes}
}
