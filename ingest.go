// The HTTP write path: read a body, cut it into events, check them, hand them to Kafka, answer when Kafka has them.
//
// ingest.go owns the producer and the pooled requests. A request owns every byte that its records point to, so it
// goes back to the pool only when both the handler and Kafka's last acknowledgement are done with it.

package main

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/twmb/franz-go/pkg/kgo"
)

// codeUnavailable is the code of an event that is good, but that Kafka did not acknowledge in time.
const codeUnavailable = "unavailable"

// retryAfterSeconds is what a client that got a 503 should wait: about the time of a broker's failover.
const retryAfterSeconds = "2"

// ingester serves POST /api/v1/events and /api/v1/events/bulk.
type ingester struct {
	kafka      *kgo.Client
	topic      string
	ackTimeout time.Duration
	bodies     byteBudget
	requests   sync.Pool // of *ingestRequest
	stats      *ingestStats
}

func newIngester(kafka *kgo.Client, cfg *settings, stats *ingestStats) *ingester {
	in := &ingester{kafka: kafka, topic: cfg.kafkaTopic, ackTimeout: cfg.ackTimeout, stats: stats}
	in.bodies.limit = cfg.maxInFlightBytes
	in.requests.New = func() any { return &ingestRequest{in: in, acked: make(chan struct{}, 1)} }
	return in
}

// serveOne answers POST /api/v1/events.
func (in *ingester) serveOne(w http.ResponseWriter, r *http.Request) {
	if mediaType(r) != typeJSON {
		writeError(w, http.StatusUnsupportedMediaType, "unsupported content type", "send application/json")
		return
	}
	q := in.get()
	defer in.release(q)
	if err := in.readBody(q, r, maxSingleBody); err != nil {
		writeReadError(w, err)
		return
	}
	ev, _, err := q.parser.parse(bytes.TrimSpace(q.body))
	if err != nil {
		in.stats.refused.Add(1)
		writeError(w, http.StatusBadRequest, "invalid request body", err.Error())
		return
	}
	if problems := q.parser.checkAge(time.Now().Unix()); len(problems) > 0 {
		in.stats.refused.Add(1)
		writeProblems(w, problems)
		return
	}
	q.add(0, ev)
	if in.produce(q); q.records[0].state.Load() != stateAcked {
		in.stats.unavailable.Add(1)
		writeUnavailable(w, q.failure())
		return
	}
	in.stats.accepted.Add(1)
	q.answer = append(q.answer[:0], `{"event_id":"`...)
	q.answer = append(q.answer, q.records[0].Key...)
	q.answer = append(q.answer, `","status":"queued"}`...)
	writeJSON(w, http.StatusAccepted, q.answer)
}

// serveBulk answers POST /api/v1/events/bulk.
func (in *ingester) serveBulk(w http.ResponseWriter, r *http.Request) {
	media := mediaType(r)
	if media == "" {
		writeError(w, http.StatusUnsupportedMediaType, "unsupported content type", "send application/json or application/x-ndjson")
		return
	}
	q := in.get()
	defer in.release(q)
	if err := in.readBody(q, r, maxBulkBody); err != nil {
		writeReadError(w, err)
		return
	}
	if err := q.split(media); err != nil {
		writeError(w, http.StatusBadRequest, "invalid request body", err.Error())
		return
	}
	if err := q.encode(media, time.Now().Unix()); err != nil {
		writeError(w, http.StatusBadRequest, "invalid request body", err.Error())
		return
	}
	in.produce(q)
	in.answerBulk(w, q)
}

// encode checks every event of the request and appends the good ones as records, the bad ones as entries of the
// answer's errors. Nothing has been handed to Kafka yet, so that a body that turns out not to be JSON at its very end
// is refused whole.
func (q *ingestRequest) encode(media string, now int64) error {
	for i, raw := range q.events {
		ev, _, err := q.parser.parse(raw)
		if err != nil && media == typeJSON && !errors.Is(err, errNotObject) {
			return fmt.Errorf("events[%d]: %w", i, err)
		}
		if err != nil { // a line of NDJSON stands alone
			q.addError(i, []problem{{"", codeInvalidFormat, err.Error()}})
			continue
		}
		if problems := q.parser.checkAge(now); len(problems) > 0 {
			q.addError(i, problems)
			continue
		}
		q.add(i, ev)
	}
	return nil
}

func (in *ingester) answerBulk(w http.ResponseWriter, q *ingestRequest) {
	success, late := 0, 0
	for i := range q.records {
		if rec := &q.records[i]; rec.state.Load() == stateAcked {
			success++
		} else {
			late++
			q.addError(rec.index, []problem{{"", codeUnavailable, "Kafka did not acknowledge the event; it is safe to send it again"}})
		}
	}
	in.stats.accepted.Add(success)
	in.stats.unavailable.Add(late)
	in.stats.refused.Add(q.failed - late)
	q.answer = append(q.answer[:0], `{"success_count":`...)
	q.answer = strconv.AppendInt(q.answer, int64(success), 10)
	q.answer = append(q.answer, `,"failed_count":`...)
	q.answer = strconv.AppendInt(q.answer, int64(q.failed), 10)
	q.answer = append(q.answer, `,"errors":[`...)
	q.answer = append(q.answer, q.errors...)
	q.answer = append(q.answer, ']')
	status := http.StatusMultiStatus
	switch {
	case q.failed == 0:
		status = http.StatusAccepted
	case success == 0 && late > 0:
		status = http.StatusServiceUnavailable
		w.Header().Set("Retry-After", retryAfterSeconds)
		q.answer = append(q.answer, `,"error":"Kafka is unavailable, send the events again"`...)
	case success == 0:
		status = http.StatusBadRequest
		q.answer = append(q.answer, `,"error":"validation failed"`...)
	}
	writeJSON(w, status, append(q.answer, '}'))
}

// produce hands the request's records to Kafka and waits until each is acknowledged by all in-sync replicas, has
// failed, or the time is up. Whatever is not acknowledged then has to be reported as such: it may still arrive, and
// the client's next try of it is then a duplicate, which is counted once.
func (in *ingester) produce(q *ingestRequest) {
	if len(q.records) == 0 {
		return
	}
	q.sealRecords(in.topic)
	q.pending.Store(int32(len(q.records)))
	q.holders.Add(1)            // Kafka's hold on the request, until the last promise
	ctx := context.Background() // not the client's: giving up on the answer must not tear a batch in flight
	for i := range q.records {
		in.kafka.Produce(ctx, &q.records[i].Record, q.records[i].promise)
	}
	started := time.Now()
	defer func() { in.stats.ack.Update(time.Since(started).Seconds()) }()
	timeout := time.NewTimer(in.ackTimeout)
	defer timeout.Stop()
	select {
	case <-q.acked:
	case <-timeout.C:
	}
}

// The states of a record on its way to Kafka.
const (
	statePending int32 = iota
	stateAcked
	stateFailed
)

// outgoing is one record and what became of it.
type outgoing struct {
	kgo.Record
	index   int // of the event in the request
	end     int // of the record's bytes in the arena
	state   atomic.Int32
	promise func(*kgo.Record, error) // made once for the life of the slot: a closure per record would be garbage
}

// ingestRequest is everything that one HTTP request needs on its way, reused by the next.
type ingestRequest struct {
	in      *ingester
	parser  eventParser
	taken   int64    // bytes of the ingester's budget
	raw     []byte   // compressed body, when there is one
	body    []byte   // body as JSON
	events  [][]byte // pieces of body
	records []outgoing
	arena   []byte // keys and values of the records, back to back
	idInput []byte
	errors  []byte // entries of the bulk answer's errors, JSON
	failed  int    // events among them
	answer  []byte

	holders  atomic.Int32 // the handler, and Kafka while records are in flight
	pending  atomic.Int32 // records without an outcome
	acked    chan struct{}
	firstErr atomic.Pointer[error]
}

func (q *ingestRequest) split(media string) (err error) {
	if media == typeNDJSON {
		q.events, err = splitLines(q.events, q.body)
	} else {
		q.events, err = splitBulk(q.events, q.body, &q.parser.json)
	}
	return err
}

// add encodes one event: its key and its value go into the arena, a slot of records remembers where.
func (q *ingestRequest) add(index int, ev *event) {
	var id eventID
	id, q.idInput = ev.id(q.idInput)
	q.arena = hex.AppendEncode(q.arena, id[:])
	q.arena = appendEvent(q.arena, ev)
	n := len(q.records)
	if n == cap(q.records) { // Slow path: the slab grows, at most once a size for the life of the request.
		q.grow()
	}
	q.records = q.records[:n+1]
	rec := &q.records[n]
	rec.index, rec.end = index, len(q.arena)
	rec.state.Store(statePending)
}

// grow moves to a bigger slab. Records are not in flight yet, so nothing points to the old one.
func (q *ingestRequest) grow() {
	size := min(max(16, 2*cap(q.records)), maxBulkEvents)
	slab := make([]outgoing, size)
	for i := range slab {
		rec := &slab[i]
		rec.promise = func(_ *kgo.Record, err error) { q.onAck(rec, err) }
		if i < len(q.records) {
			rec.index, rec.end = q.records[i].index, q.records[i].end
		}
	}
	q.records = slab[:len(q.records)]
}

// sealRecords points the records into the arena, which no longer moves.
func (q *ingestRequest) sealRecords(topic string) {
	const keyLen = 2 * len(eventID{})
	start := 0
	for i := range q.records {
		rec := &q.records[i]
		rec.Record = kgo.Record{
			Topic: topic,
			Key:   q.arena[start : start+keyLen : start+keyLen],
			Value: q.arena[start+keyLen : rec.end : rec.end],
		}
		start = rec.end
	}
}

// onAck runs on franz-go's goroutine for each record, in the order of production.
func (q *ingestRequest) onAck(rec *outgoing, err error) {
	if err == nil {
		rec.state.Store(stateAcked)
	} else {
		q.firstErr.CompareAndSwap(nil, &err)
		rec.state.Store(stateFailed)
	}
	if q.pending.Add(-1) == 0 {
		q.acked <- struct{}{} // has room: one a request
		q.in.release(q)
	}
}

// failure says why the request's records are not acknowledged.
func (q *ingestRequest) failure() string {
	if err := q.firstErr.Load(); err != nil {
		return (*err).Error()
	}
	return "no acknowledgement in time"
}

// addError appends one entry of the bulk answer's errors: the first problem in the original's form, all of them in a list.
func (q *ingestRequest) addError(index int, problems []problem) {
	if q.failed > 0 {
		q.errors = append(q.errors, ',')
	}
	q.failed++
	q.errors = append(q.errors, `{"index":`...)
	q.errors = strconv.AppendInt(q.errors, int64(index), 10)
	q.errors = append(q.errors, `,"error":`...)
	text := problems[0].message
	for _, p := range problems[1:] {
		text += "; " + p.message
	}
	q.errors = appendString(q.errors, text)
	q.errors = append(q.errors, `,"code":"`...)
	q.errors = append(q.errors, problems[0].code...)
	q.errors = append(q.errors, `","field":`...)
	q.errors = appendString(q.errors, problems[0].field)
	if len(problems) > 1 {
		q.errors = append(q.errors, `,"errors":`...)
		q.errors = appendProblems(q.errors, problems)
	}
	q.errors = append(q.errors, '}')
}

// mediaType returns typeJSON, typeNDJSON or "" for a Content-Type that is neither. An absent one means JSON.
func mediaType(r *http.Request) string {
	header := r.Header["Content-Type"]
	if len(header) == 0 {
		return typeJSON
	}
	media, _, _ := strings.Cut(header[0], ";")
	switch media = strings.TrimSpace(media); {
	case strings.EqualFold(media, typeJSON), media == "":
		return typeJSON
	case strings.EqualFold(media, typeNDJSON):
		return typeNDJSON
	}
	return ""
}

// Above these a buffer is dropped instead of pooled: one huge request must not keep its memory for ever.
const (
	maxPooledBody  = 1 << 20
	maxPooledArena = 1 << 20
)

func (in *ingester) get() *ingestRequest {
	q := in.requests.Get().(*ingestRequest)
	q.holders.Store(1)
	return q
}

// release is called by each holder once; the last one resets the request and puts it back.
func (in *ingester) release(q *ingestRequest) {
	if q.holders.Add(-1) != 0 {
		return
	}
	in.bodies.give(q.taken)
	q.reset()
	in.requests.Put(q)
}

func (q *ingestRequest) reset() {
	drain(q.acked) // the handler had given up before the last acknowledgement
	q.taken, q.failed = 0, 0
	q.firstErr.Store(nil)
	clear(q.events)
	q.raw, q.body, q.events, q.records = q.raw[:0], q.body[:0], q.events[:0], q.records[:0]
	q.arena, q.errors, q.answer = q.arena[:0], q.errors[:0], q.answer[:0]
	if cap(q.body) > maxPooledBody || cap(q.raw) > maxPooledBody {
		q.raw, q.body = nil, nil
	}
	if cap(q.arena) > maxPooledArena {
		q.arena = nil
	}
}
