// The pipeline at work: what this instance accepted and stored in the last minutes, for the dashboard page.
//
// pipeline.go takes a sample every few seconds, and owns the endpoint that returns them. It asks neither Kafka nor ClickHouse:
// the counters and the watermark are there anyway.

package main

import (
	"context"
	"encoding/json"
	"net/http"
	"sync"
	"time"
)

const (
	// pipelineInterval is the time between two samples, and pipelineSamples how many are kept: five minutes.
	pipelineInterval = 5 * time.Second
	pipelineSamples  = 60
)

// pipeline remembers samples of one running system.
type pipeline struct {
	stats     *stats
	watermark *watermark
	ready     *readiness
	fixed     pipelineAnswer // what never changes

	mu      sync.Mutex // guards what follows
	samples []pipelineSample
}

// pipelineSample is the counters and figures of one moment.
type pipelineSample struct {
	at                                 time.Time
	accepted, stored, duplicates, dead uint64
	lag, retries                       int64
	freshness                          time.Duration
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
	p := &pipeline{stats: st, watermark: wm, ready: ready, fixed: pipelineAnswer{Instance: instance, Interval: int(pipelineInterval.Seconds()), Links: []pipelineLink{}}}
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
	tick := time.NewTicker(pipelineInterval)
	defer tick.Stop()
	for {
		select {
		case now := <-tick.C:
			p.sample(now)
		case <-ctx.Done():
			return
		}
	}
}

func (p *pipeline) sample(now time.Time) {
	s := pipelineSample{
		at: now, accepted: p.stats.ingest.accepted.Get(), stored: p.stats.store.rows.Get(), duplicates: p.stats.store.duplicates.Get(),
		dead: p.stats.side.deadLetters(), freshness: p.watermark.stored.age(),
	}
	if found := p.watermark.progress.Load(); found != nil {
		s.retries = found.retries
		for _, lag := range found.lags {
			s.lag += lag
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.samples) > pipelineSamples { // one more than there are rates
		p.samples = append(p.samples[:0], p.samples[1:]...)
	}
	p.samples = append(p.samples, s)
}

func (p *pipeline) serve(w http.ResponseWriter, r *http.Request) {
	if c := newQueryCheck(r.URL.RawQuery); len(c.problems) > 0 {
		writeProblems(w, c.problems)
		return
	}
	a := p.fixed
	a.Consumers, _ = p.ready.consuming()
	a.Series = p.series()
	body, _ := json.Marshal(a)
	writeJSON(w, http.StatusOK, body)
}

func (p *pipeline) series() map[string][]float64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	series := map[string][]float64{}
	for i := 1; i < len(p.samples); i++ {
		s, before := &p.samples[i], &p.samples[i-1]
		rate := func(now, then uint64) float64 { return float64(now-then) / s.at.Sub(before.at).Seconds() }
		for name, value := range map[string]float64{
			"accepted": rate(s.accepted, before.accepted), "stored": rate(s.stored, before.stored), "duplicates": rate(s.duplicates, before.duplicates),
			"lag": float64(s.lag), "freshness_seconds": s.freshness.Seconds(), "retries": float64(s.retries), "dead_letters": float64(s.dead - before.dead),
		} {
			series[name] = append(series[name], value)
		}
	}
	return series
}
