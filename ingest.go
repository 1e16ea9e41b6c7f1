// The HTTP write path: read a body, cut it into events, check them, hand them to Kafka, answer when Kafka has them.
//
// ingest.go owns the producer and the pooled requests. A request owns every byte that its records point to, so it
// goes back to the pool only when both the handler and Kafka's last acknowledgement are done with it.

package main

import (
	"context"
	"encoding/hex"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/twmb/franz-go/pkg/kgo"
)

// codeUnavailable is the code of an event that is good, but that Kafka did not acknowledge in time.
const codeUnavailable = "unavailable"

// retryAfterSeconds is what a client that got a 503 should wait: about the time of a broker's failover.
const retryAfterSeconds = "2"

// ingester serves POST /api/v1/events and /api/v1/events/bulk.
type ingester struct {
	kafka        *kgo.Client
	topic        string
	ackTimeout   time.Duration
	writeTimeout time.Duration
	clockSkew    int64 // seconds
	stored       *storedSignal
	bodies       byteBudget
	singles      sync.Pool // of *ingestRequest, for one event: one must not sit on the memory of a thousand
	bulks        sync.Pool // of *ingestRequest
	stats        *ingestStats
}

func newIngester(kafka *kgo.Client, cfg *settings, stats *ingestStats) *ingester {
	in := &ingester{kafka: kafka, topic: cfg.kafkaTopic, ackTimeout: cfg.ackTimeout, writeTimeout: cfg.writeTimeout, clockSkew: int64(cfg.clockSkew / time.Second), stats: stats}
	in.bodies.limit, in.bodies.perClient = cfg.maxInFlightBytes, cfg.maxInFlightPerClient
	for _, pool := range []*sync.Pool{&in.singles, &in.bulks} {
		pool.New = func() any {
			return &ingestRequest{in: in, pool: pool, index: -1, entry: appendBulkEntry, acked: make(chan struct{}, 1)}
		}
	}
	return in
}

// serveOne answers POST /api/v1/events.
func (in *ingester) serveOne(w http.ResponseWriter, r *http.Request) {
	if media := mediaType(r); media != typeJSON && media != typeText {
		writeError(w, http.StatusUnsupportedMediaType, "unsupported content type", "send application/json")
		return
	}
	wait, problems := wantsStored(r)
	if len(problems) > 0 {
		writeProblems(w, problems)
		return
	}
	q, err := in.receive(w, r, &in.singles, maxSingleBody)
	if err != nil {
		writeReadError(w, err)
		return
	}
	defer in.release(q)
	ev, _, err := q.parser.parse(q.body.b)
	if err != nil {
		in.stats.refused.Add(1)
		writeError(w, http.StatusBadRequest, "invalid request body", err.Error())
		return
	}
	if problems := q.parser.checkAge(time.Now().Unix(), in.clockSkew); len(problems) > 0 {
		in.stats.refused.Add(1)
		writeProblems(w, problems)
		return
	}
	if err := q.add(0, ev); err != nil {
		writeReadError(w, err)
		return
	}
	if in.produce(q); q.records[0].state.Load() != stateAcked {
		in.stats.unavailable.Add(1)
		writeUnavailable(w, q.failure())
		return
	}
	in.stats.accepted.Add(1)
	q.answer = append(q.answer[:0], `{"event_id":"`...)
	q.answer = append(q.answer, q.records[0].Key...)
	if wait && in.awaitStored(w, r, q) {
		q.answer = append(q.answer, `","status":"stored"}`...)
		writeJSON(w, http.StatusOK, q.answer)
		return
	}
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
	wait, problems := wantsStored(r)
	if len(problems) > 0 {
		writeProblems(w, problems)
		return
	}
	q, err := in.receive(w, r, &in.bulks, maxBulkBody)
	if err != nil {
		writeReadError(w, err)
		return
	}
	defer in.release(q)
	if media == typeText { // of a page's beacon, which cannot say what it is
		if media = typeJSON; !isEnvelope(q.body.b) {
			media = typeNDJSON
		}
	}
	if err := q.encode(r.Context(), media, time.Now().Unix()); err != nil {
		writeReadError(w, err)
		return
	}
	in.produce(q)
	q.stored = wait && q.isAcked() && in.awaitStored(w, r, q)
	in.answerBulk(w, q)
}

// encode checks every event of the request and appends the good ones as records, the bad ones as entries of the
// answer's errors. Nothing has been handed to Kafka yet, so that a body that turns out not to be JSON at its very end
// is refused whole. It ends early with the context's error.
func (q *ingestRequest) encode(ctx context.Context, media string, now int64) error {
	if media == typeNDJSON {
		return eachLine(q.body.b, func(line []byte) error {
			if err := q.step(ctx); err != nil {
				return err
			}
			if len(line) > maxEventBytes { // before anything looks at it
				return q.refuse(errEventTooLarge)
			}
			ev, _, err := q.parser.parse(line)
			if err != nil { // a line stands alone
				return q.refuse(err)
			}
			return q.take(ev, now)
		})
	}
	q.parser.json.reset(q.body.b)
	return eachEvent(&q.parser.json, "events", nil, func(r *jsonReader) error {
		if err := q.step(ctx); err != nil {
			return err
		}
		r.space()
		start := r.i
		ev, _, err := q.parser.read(r)
		return q.outcome(ev, r.i-start, err, now)
	})
}

// outcome is what becomes of the event at hand, of size bytes, that was read out of the middle of a body. Only an error that
// is not the event's own is one of the body.
func (q *ingestRequest) outcome(ev *event, size int, err error, now int64) error {
	switch {
	case err != nil && !isEventsOwn(err):
		return fmt.Errorf("events[%d]: %w", q.index, err)
	case size > maxEventBytes:
		return q.refuse(errEventTooLarge)
	case err != nil:
		return q.refuse(err)
	}
	return q.take(ev, now)
}

// step goes on to the next event.
func (q *ingestRequest) step(ctx context.Context) error {
	q.index++
	if q.index%64 == 0 {
		return ctx.Err()
	}
	return nil
}

// refuse notes that the event at hand is none.
func (q *ingestRequest) refuse(why error) error {
	code := codeInvalidFormat
	if why == errEventTooLarge {
		code = codeMaxLength
	}
	return q.addError(q.index, []problem{{"", code, why.Error()}}, false)
}

// take adds the event at hand to the records, or its problems to the errors.
func (q *ingestRequest) take(ev *event, now int64) error {
	if problems := q.parser.checkAge(now, q.in.clockSkew); len(problems) > 0 {
		return q.addError(q.index, problems, false)
	}
	return q.add(q.index, ev)
}

func (in *ingester) answerBulk(w http.ResponseWriter, q *ingestRequest) {
	success, late := 0, 0
	for i := range q.records {
		if rec := &q.records[i]; rec.state.Load() == stateAcked {
			success++
		} else {
			late++
			q.addError(rec.index, []problem{{"", codeUnavailable, "Kafka did not acknowledge the event; it is safe to send it again"}}, true)
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
	status, end := http.StatusMultiStatus, `]}`
	if q.stored {
		end = `],"status":"stored"}`
	}
	switch {
	case q.failed == 0 && q.stored:
		status = http.StatusOK
	case q.failed == 0:
		status = http.StatusAccepted
	case success == 0 && late > 0:
		status = http.StatusServiceUnavailable
		w.Header().Set("Retry-After", retryAfterSeconds)
		end = `],"error":"Kafka is unavailable, send the events again"}`
	case success == 0:
		status = http.StatusBadRequest
		end = `],"error":"validation failed"}`
	}
	writeJSON(w, status, q.answer, q.errors.bytes(), []byte(end))
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

// ingestRequest is everything that one HTTP request needs on its way from the end of its body, reused by the next. Its
// buffers and its slab of records are charged to the ingester's budget.
type ingestRequest struct {
	in      *ingester
	pool    *sync.Pool // that it goes back to
	account *account   // of the client that sent it, nil in the pool
	parser  eventParser
	body    *buffer
	index   int        // of the event at hand
	entry   entryForm  // of the answer's errors
	records []outgoing // a slab
	arena   *buffer    // keys and values of the records, back to back
	idInput []byte
	errors  *buffer // entries of the bulk answer's errors, JSON; nil while there are none
	failed  int     // events among them
	stored  bool    // all that are accepted can be queried
	answer  []byte  // what stands before them

	holders  atomic.Int32 // the handler, and Kafka while records are in flight
	pending  atomic.Int32 // records without an outcome
	acked    chan struct{}
	firstErr atomic.Pointer[error]
}

// outgoingBytes is what a record of the slab takes.
const outgoingBytes = int(unsafe.Sizeof(outgoing{}))

var errEventTooLarge = fmt.Errorf("the event is larger than %d KiB", maxEventBytes>>10)

// add encodes one event: its key and its value go into the arena, a slot of records remembers where.
func (q *ingestRequest) add(index int, ev *event) error {
	if q.arena == nil {
		arena, err := q.account.get(len(q.body.b) + len(q.body.b)/4) // with room for the keys, most of the time
		if err != nil {
			return err
		}
		q.arena = arena
	}
	if err := q.account.grow(&q.arena, 2*len(eventID{})+ev.maxEncoded(), false); err != nil {
		return err
	}
	var id eventID
	id, q.idInput = ev.id(q.idInput)
	q.arena.b = hex.AppendEncode(q.arena.b, id[:])
	q.arena.b = appendEvent(q.arena.b, ev)
	n := len(q.records)
	if n == cap(q.records) { // Slow path: the slab grows, at most once a size for the life of the request.
		if err := q.growSlab(); err != nil {
			return err
		}
	}
	q.records = q.records[:n+1]
	rec := &q.records[n]
	rec.index, rec.end = index, len(q.arena.b)
	rec.state.Store(statePending)
	return nil
}

// growSlab moves to a bigger slab. Records are not in flight yet, so nothing points to the old one.
func (q *ingestRequest) growSlab() error {
	size := min(max(16, 2*cap(q.records)), maxBulkEvents)
	if err := q.account.take((size - cap(q.records)) * outgoingBytes); err != nil {
		return err
	}
	slab := make([]outgoing, size)
	for i := range slab {
		rec := &slab[i]
		rec.promise = func(_ *kgo.Record, err error) { q.onAck(rec, err) }
		if i < len(q.records) {
			rec.index, rec.end = q.records[i].index, q.records[i].end
		}
	}
	q.records = slab[:len(q.records)]
	return nil
}

// sealRecords points the records into the arena, which no longer moves.
func (q *ingestRequest) sealRecords(topic string) {
	const keyLen = 2 * len(eventID{})
	start := 0
	for i := range q.records {
		rec := &q.records[i]
		rec.Record = kgo.Record{
			Topic: topic,
			Key:   q.arena.b[start : start+keyLen : start+keyLen],
			Value: q.arena.b[start+keyLen : rec.end : rec.end],
		}
		start = rec.end
	}
}

// onAck runs on franz-go's goroutine for each record, in the order of production.
func (q *ingestRequest) onAck(rec *outgoing, err error) {
	if err == nil {
		rec.state.Store(stateAcked)
	} else {
		why := err // only this one goes to the heap: err itself would, for each record
		q.firstErr.CompareAndSwap(nil, &why)
		rec.state.Store(stateFailed)
	}
	if q.pending.Add(-1) == 0 {
		q.acked <- struct{}{} // has room: one a request
		q.in.release(q)
	}
}

// isAcked says whether Kafka has all records, of which there are some. It is done with their bytes then.
func (q *ingestRequest) isAcked() bool {
	for i := range q.records {
		if q.records[i].state.Load() != stateAcked {
			return false
		}
	}
	return len(q.records) > 0
}

// failure says why the request's records are not acknowledged.
func (q *ingestRequest) failure() string {
	if err := q.firstErr.Load(); err != nil {
		return (*err).Error()
	}
	return "no acknowledgement in time"
}

// Limits of the errors in an answer. An entry with all its problems, names clipped, stays below maxEntry; behind maxDetail
// bytes an entry has its first problem only.
const (
	maxEntry  = 16 << 10
	maxDetail = 256 << 10
)

// entryForm appends what an answer says about the event of that index.
type entryForm func(dst []byte, index int, problems []problem) []byte

// addError notes the problems of an event in the answer. owed says that there has to be an answer, whatever the budget says.
func (q *ingestRequest) addError(index int, problems []problem, owed bool) error {
	if q.errors == nil {
		q.errors = new(buffer)
	}
	if len(q.errors.b) > maxDetail {
		problems = problems[:1]
	}
	if err := q.account.grow(&q.errors, maxEntry, owed); err != nil {
		return err
	}
	if q.failed > 0 {
		q.errors.b = append(q.errors.b, ',')
	}
	q.failed++
	q.errors.b = q.entry(q.errors.b, index, problems)
	return nil
}

// appendBulkEntry is the entry of a bulk's answer: the first problem in the original's form, all of them in a list.
func appendBulkEntry(dst []byte, index int, problems []problem) []byte {
	dst = append(dst, `{"index":`...)
	dst = strconv.AppendInt(dst, int64(index), 10)
	dst = append(dst, `,"error":`...)
	text := problems[0].message
	for _, p := range problems[1:] {
		text += "; " + p.message
	}
	dst = appendString(dst, text)
	dst = append(dst, `,"code":"`...)
	dst = append(dst, problems[0].code...)
	dst = append(dst, `","field":`...)
	dst = appendString(dst, problems[0].field)
	if len(problems) > 1 {
		dst = append(dst, `,"errors":`...)
		dst = appendProblems(dst, problems)
	}
	return append(dst, '}')
}

// mediaType returns typeJSON, typeNDJSON, typeText or "" for a Content-Type that is none of them. An absent one means JSON. Text
// is what a page may send to another origin, or as its last beacon, without asking.
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
	case strings.EqualFold(media, typeText):
		return typeText
	}
	return ""
}

// receive reads r's body and returns a request that has it, to be released. Nothing but the body's buffer is held while the
// client takes its time. The errors are readBody's.
func (in *ingester) receive(w http.ResponseWriter, r *http.Request, pool *sync.Pool, limit int) (*ingestRequest, error) {
	acc := in.bodies.open(clientOf(w, r))
	body, err := in.readBody(acc, r, limit)
	if err != nil {
		acc.close()
		return nil, err
	}
	q := pool.Get().(*ingestRequest)
	if err := acc.take(cap(q.records) * outgoingBytes); err != nil {
		acc.put(body)
		acc.close()
		pool.Put(q)
		return nil, err
	}
	q.account, q.body = acc, body
	q.holders.Store(1)
	return q, nil
}

// release is called by each holder once; the last one resets the request and puts it back.
func (in *ingester) release(q *ingestRequest) {
	if q.holders.Add(-1) != 0 {
		return
	}
	q.account.give(cap(q.records) * outgoingBytes)
	q.reset()
	q.account.close()
	q.account = nil
	q.pool.Put(q)
}

func (q *ingestRequest) reset() {
	drain(q.acked) // the handler had given up before the last acknowledgement
	for _, buf := range []**buffer{&q.body, &q.arena, &q.errors} {
		q.account.put(*buf)
		*buf = nil
	}
	q.firstErr.Store(nil)
	q.failed, q.index, q.entry = 0, -1, appendBulkEntry
	q.stored = false
	q.records, q.answer = q.records[:0], q.answer[:0]
}
