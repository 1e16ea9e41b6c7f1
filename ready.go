// For whoever runs an instance: is it ready (GET /ready), is it alive (GET /health)?
//
// ready.go owns the questions to Kafka and ClickHouse that a check asks, and the words for how storing goes.

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ClickHouse/ch-go"
	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/kmsg"

	"github.com/event-ingestion/event-ingestion/troubles"
)

const (
	// readyTimeout bounds the checks of one /ready; Kafka and ClickHouse are asked at the same time.
	readyTimeout = 3 * time.Second
	// readyAge is how old an answer may be: whoever asks more often gets the last one.
	readyAge = time.Second
	// stalledAfter is how long a consumer may store nothing before it is called stalled. A slow insert takes a second or two.
	stalledAfter = 3 * time.Second
	// aloneAfter is the same for single partitions, for which no cause is known.
	aloneAfter = time.Minute
)

// readiness answers GET /ready.
type readiness struct {
	client     *kgo.Client
	clickhouse *clickhouse
	broken     *brokenParts
	failed     func(error)                                                // told what ClickHouse says when a query fails
	stalled    func(fails bool) (worst, all time.Duration, waiting int64) // as watermark has it
	trouble    func() troubles.Trouble                                    // the oldest one, none when everything works
	mayKnow    func(*http.Request) bool                                   // whoever asks may know why: keys are not set, or it has one
	consumer   atomic.Pointer[consumer]                                   // nil until it runs
	stopping   atomic.Bool
	consumes   bool // ROLE is not api

	mu       sync.Mutex // guards what follows; its holder asks while the others wait for the answer
	conn     connection // its own, so that slow queries cannot occupy it
	answered time.Time
	kafka    dependency
	tables   dependency
}

// dependency is what was last found of one: nil, or why it does not work, and since when.
type dependency struct {
	err   error
	since time.Time
}

func (d *dependency) found(err error) {
	if err != nil && d.err == nil {
		d.since = time.Now()
	}
	d.err = err
}

// words say what is wrong, and why to those who may know it.
func (d *dependency) words(why bool) string {
	if !why {
		return "does not answer as it should since " + d.since.UTC().Format(time.RFC3339)
	}
	return firstLine(d.err.Error())
}

func (rd *readiness) serve(w http.ResponseWriter, r *http.Request) {
	kafka, tables := rd.dependencies()
	why := rd.mayKnow(r)
	type check struct{ name, text string }
	checks := []check{{"kafka", "ok"}, {"clickhouse", "ok"}}
	if text := rd.broken.words(); text != "" {
		if checks[1].text = text; !why {
			checks[1].text = "answers, but has a broken part"
		}
	}
	status, word := http.StatusOK, "ready"
	if rd.stopping.Load() {
		status, word = http.StatusServiceUnavailable, "stopping"
	}
	for i, d := range []dependency{kafka, tables} {
		if d.err != nil {
			status, word, checks[i].text = http.StatusServiceUnavailable, "not ready", d.words(why)
		}
	}
	if tr := rd.trouble(); tables.err != nil && tr.What == prepareTables && !rd.consumes { // what else says why there are none?
		checks[1].text += "; " + troubleWords(tr, why)
	}
	if rd.consumes {
		text, running := rd.consuming(why)
		if checks = append(checks, check{"consumers", text}); !running {
			status, word = http.StatusServiceUnavailable, "not ready"
		}
	}
	b := appendString([]byte(`{"status":`), word)
	if status != http.StatusOK {
		b = append(b, `,"error":"not ready to serve"`...)
	}
	for _, c := range checks {
		b = append(b, ",\n"...)
		b = appendString(b, c.name)
		b = append(b, ':')
		b = appendString(b, strings.ToValidUTF8(c.text, "�"))
	}
	writeJSON(w, status, append(b, "}\n"...))
}

// dependencies asks Kafka and ClickHouse, at most once per readyAge for everybody. A client that goes away does not cancel
// the check: the others wait for its answer.
func (rd *readiness) dependencies() (kafka, tables dependency) {
	rd.mu.Lock()
	defer rd.mu.Unlock()
	if time.Since(rd.answered) < readyAge {
		return rd.kafka, rd.tables
	}
	ctx, cancel := context.WithTimeout(context.Background(), readyTimeout)
	defer cancel()
	var asking sync.WaitGroup
	asking.Go(func() { rd.kafka.found(rd.brokers(ctx)) }) // ends with ctx
	rd.tables.found(rd.askTables(ctx))
	asking.Wait()
	rd.answered = time.Now()
	return rd.kafka, rd.tables
}

// askTables says whether ClickHouse answers and has the tables. The server may have closed an idle connection, so a first
// failure without an answer is retried on a new one.
func (rd *readiness) askTables(ctx context.Context) (err error) {
	for range 2 {
		_, err = askNumber(ctx, &rd.conn, ch.Query{Body: rd.clickhouse.sql("SELECT count() FROM {events_hourly} WHERE event_name = ''")})
		if err == nil {
			return rd.broken.recheck(ctx, rd.clickhouse, &rd.conn)
		}
		rd.failed(err)
		if ctx.Err() != nil {
			return fmt.Errorf("ClickHouse at %s has not answered in %s", rd.clickhouse.options.Address, readyTimeout)
		}
		if _, answered := ch.AsException(err); answered {
			return err
		}
	}
	return err
}

// brokers asks all of them at once: one answer is enough, and a broker that hangs delays nobody.
func (rd *readiness) brokers(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, readyTimeout)
	defer cancel()
	brokers := append(rd.client.DiscoveredBrokers(), rd.client.SeedBrokers()...)
	answers := make(chan error, len(brokers))
	for _, b := range brokers {
		go func() { // ends with ctx
			req := kmsg.NewPtrMetadataRequest()
			req.Topics = []kmsg.MetadataRequestTopic{} // none, rather than all
			_, err := b.Request(ctx, req)
			answers <- err
		}()
	}
	var err error
	for range brokers {
		if err = <-answers; err == nil {
			return nil
		}
	}
	if errors.Is(err, io.EOF) {
		return fmt.Errorf("no broker keeps the connection (%w); look at KAFKA_TLS and KAFKA_SASL_MECHANISM, user and password", err)
	}
	if ctx.Err() != nil {
		return fmt.Errorf("no broker has answered in %s", readyTimeout)
	}
	return err
}

// consuming says in words how storing goes, and whether the consumer runs at all. A stalled instance stays ready: it still
// accepts events, and Kafka keeps them. What fails is named, and why to those who may know it.
func (rd *readiness) consuming(why bool) (text string, running bool) {
	because := ""
	if tr := rd.trouble(); tr.What != "" {
		because = ": " + troubleWords(tr, why)
	}
	if c := rd.consumer.Load(); rd.consumes && c == nil {
		return "not started yet" + because, false
	} else if rd.consumes && c.member.Load() == nil {
		return "not in the consumer group yet" + because, false
	}
	d, all, waiting := rd.stalled(because != "")
	if because == "" && d < aloneAfter {
		d = all // in a catch-up the partitions take turns
	}
	if d < stalledAfter {
		return "ok", true
	}
	return fmt.Sprintf("stalled %d s%s, %s waiting", int(d.Seconds()), because, grouped(waiting)), true
}

func troubleWords(tr troubles.Trouble, why bool) string {
	if why {
		return tr.String()
	}
	return tr.Brief()
}

// prepareTables is what fails while there are no tables.
const prepareTables = "prepare the tables"

// grouped writes n with commas between thousands.
func grouped(n int64) string {
	s := strconv.FormatInt(n, 10)
	for i := len(s) - 3; i > 0; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}

// serveHealth answers GET /health: the process is alive. It checks no dependency: an outage must not make an orchestrator
// kill the instances that still accept events.
func serveHealth(w http.ResponseWriter, _ *http.Request) {
	writeJSON(w, http.StatusOK, []byte(`{"status":"ok"}`))
}
