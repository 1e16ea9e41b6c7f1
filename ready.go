// For whoever runs an instance: is it ready (GET /ready), is it alive (GET /health)? And what the operators' commands know of it.
//
// ready.go owns the questions to Kafka and ClickHouse that a check asks, and the words for how storing goes.

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ClickHouse/ch-go"
	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/kmsg"

	"github.com/event-ingestion/event-ingestion/internal/troubles"
	"github.com/event-ingestion/event-ingestion/ops"
	"github.com/event-ingestion/event-ingestion/segment"
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

// operated is the system as the operators' commands know it.
func operated() (ops.System, error) {
	cfg, err := loadSettings(os.Getenv)
	if err != nil {
		return ops.System{}, err
	}
	db, parser := newClickHouse(cfg), new(eventParser)
	return ops.System{
		Topic: cfg.kafkaTopic, Group: cfg.kafkaGroup, Database: cfg.clickhouseDatabase,
		Listen: net.JoinHostPort(cfg.serverHost, fmt.Sprint(cfg.serverPort)), TLS: cfg.tlsCertFile != "",
		Kafka: func(clientID string, opts ...kgo.Opt) (*kgo.Client, error) { return newKafka(cfg, clientID, opts...) },
		Connect: func(ctx context.Context, f func(ops.Conn) error) error {
			return db.connected(func(c asker) error {
				if err := db.adoptRevenue(ctx, c); err != nil {
					return err
				}
				return f(c.Do)
			})
		},
		EachServer: func(ctx context.Context, f func(ops.Conn) error) error {
			return db.eachServer(ctx, func(_ *clickhouse, c asker) error { return f(c.Do) })
		},
		SQL: db.sql,
		Decode: func(value []byte) (id [32]byte, at int64, userID []byte, err error) {
			ev, err := parser.decode(value)
			if err == nil {
				id, _ = ev.id(nil)
				at, userID = ev.timestamp, ev.userID
			}
			return id, at, userID, err
		},
		CheckLine: newLineCheck(cfg.clockSkew),
		SyncReplicas: func(ctx context.Context) (err error) {
			if _, err = db.servers(ctx); err == nil { // which finds out whether there are any
				err = db.syncReplicas(ctx)
			}
			return err
		},
		Differences:    func(hours, differs string) string { return fmt.Sprintf(differences, "FINAL", hours, differs) },
		AddDifferences: addDifferences,
		MendingID:      db.mendingID(),
		Inserting:      db.inserting,
	}, nil
}

// newLineCheck is the check of one line of an import: an event's JSON, or a message's. value is the canonical JSON of a good event, nil
// for a message that is not stored; it and user are valid until the next call. refused has field, code and message of each problem.
// What makes an event this one has to be in the file, or importing it again would count it twice: its time as well.
func newLineCheck(skew time.Duration) func(line []byte, ofSegment bool) (value []byte, id [32]byte, at int64, user []byte, refused [][3]string) {
	p, messages, members := new(eventParser), new(skimmer), new(skimmer)
	t := segment.Translator{Members: members.eachMember, MaxMetadata: maxMetadataBytes}
	var idInput, translated []byte
	return func(line []byte, ofSegment bool) (value []byte, id [32]byte, at int64, user []byte, refused [][3]string) {
		if ofSegment {
			messages.reset(line)
			m := messages.value()
			err := messages.end()
			switch {
			case err != nil:
			case m.raw[0] != '{':
				err = errNotObject
			case m.depth > maxDepth:
				err = errEventTooDeep
			}
			if err != nil {
				return nil, id, 0, nil, [][3]string{{"", codeInvalidFormat, err.Error()}}
			}
			var problems []segment.Problem
			var stored bool
			if translated, problems, stored = t.Append(translated[:0], m.raw, "batch", 0); !stored {
				return nil, id, 0, nil, nil
			}
			for _, p := range problems {
				refused = append(refused, [3]string{p.Field, p.Code, p.Message})
			}
			line = translated
		}
		ev, _, err := p.parse(line)
		if err != nil {
			return nil, id, 0, nil, append(refused, [3]string{"", codeInvalidFormat, err.Error()})
		}
		if ofSegment && ev.timestamp == 0 && len(refused) == 0 {
			p.addf("timestamp", codeRequired, "is required")
		}
		if len(p.problems)+len(refused) == 0 {
			p.checkImported(time.Now().Unix(), int64(skew/time.Second))
		}
		for _, is := range p.problems {
			refused = append(refused, [3]string{is.field, is.code, is.message})
		}
		if len(refused) > 0 {
			return nil, id, 0, nil, refused
		}
		var known eventID
		known, idInput = ev.id(idInput)
		return appendEvent(nil, ev), known, ev.timestamp, ev.userID, nil
	}
}
