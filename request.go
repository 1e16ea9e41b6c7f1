// One request on its way: the events of a body, their records, and what became of them.
//
// request.go cuts a body into events, in the shapes that they arrive in: {"events":[…]}, one event a line, or Segment's messages. Each is
// read in place, so that a body is read once, from front to back; whatever surrounds the events must be JSON and is otherwise ignored.
//
// It owns the memory of a request, which its records point into. It is pooled, and goes back only when both the handler and Kafka's
// last acknowledgement are done with it. ingest.go decides what is done with a request, and when.

package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"unsafe"

	"github.com/twmb/franz-go/pkg/kgo"

	"github.com/event-ingestion/event-ingestion/internal/budget"
	"github.com/event-ingestion/event-ingestion/internal/troubles"
	"github.com/event-ingestion/event-ingestion/segment"
)

// Limits of a request, as the OpenAPI document has them.
const (
	maxBulkEvents = 1000
	maxMessages   = 5000          // of Segment's clients, which drop a batch that is refused
	maxEventBytes = maxSingleBody // of one event in a bulk, as sent
)

// intake is where requests for one event, or for many, come from: one event must not hold the memory of a thousand.
type intake struct {
	limit     int        // bytes of a body
	most      int        // events in it
	room      func() int // bytes of a batch that the topic takes, 0 while unknown
	clockSkew int64      // seconds that an event may be in the future
	pool      sync.Pool  // of *ingestRequest
}

// outgoing is one record and what became of it.
type outgoing struct {
	kgo.Record
	index   int // of the event in the request
	end     int // of the record's bytes in the arena
	acked   atomic.Bool
	request *ingestRequest
}

// outgoingOf is the slot that a record stands in: a closure for each, to remember it, would be garbage.
func outgoingOf(rec *kgo.Record) *outgoing { return (*outgoing)(unsafe.Pointer(rec)) }

const _ = -unsafe.Offsetof(outgoing{}.Record) // does not compile unless the record is the first of a slot

// ingestRequest is everything that an HTTP request needs once its body is read; the next request reuses it. Its buffers and
// its slab of records are charged to the client's account.
type ingestRequest struct {
	in      *intake         // where it goes back to
	account *budget.Account // of the client that sent it, nil in the pool
	parser  eventParser
	body    *budget.Buffer
	index   int            // of the current event
	entry   entryForm      // of the answer's errors
	records []outgoing     // a slab
	arena   *budget.Buffer // keys and values of the records, back to back
	idInput []byte
	errors  *budget.Buffer   // entries of the bulk answer's errors, JSON; nil while there are none
	failed  int              // how many events are in errors
	refused troubles.Refused // those of them that are not valid
	answer  []byte           // the part before errors

	holders  atomic.Int32 // the handler, and Kafka while records are in flight
	pending  atomic.Int32 // records without an outcome
	acked    chan struct{}
	firstErr atomic.Pointer[error]
}

// outgoingBytes is what a record of the slab takes.
const outgoingBytes = int(unsafe.Sizeof(outgoing{}))

// encode checks every event of the request and appends the good ones as records, the bad ones as entries of the answer's
// errors. Nothing goes to Kafka yet, so a body that turns out not to be JSON at its very end is refused whole. It ends early
// with the context's error.
func (q *ingestRequest) encode(ctx context.Context, media string, now int64) error {
	if media == typeNDJSON {
		return q.encodeLines(ctx, now)
	}
	r := &q.parser.json
	r.reset(q.body.B)
	return r.eachEvent("events", q.in.most, nil, func() error { return q.next(ctx, r, q.parser.read, now) })
}

// encodeLines is encode for one event a line; blank lines are skipped. A line that is no JSON does not affect the others.
func (q *ingestRequest) encodeLines(ctx context.Context, now int64) error {
	lines := 0
	for line := range bytes.SplitSeq(q.body.B, []byte("\n")) {
		if line = bytes.Trim(line, " \t\r"); len(line) == 0 { // what JSON calls white space, and no other
			continue
		}
		if lines++; lines > q.in.most {
			return errTooManyEvents(q.in.most)
		}
		if err := q.step(ctx); err != nil {
			return err
		}
		var ev *event
		var why error
		if len(line) <= maxEventBytes { // else it is refused unread
			ev, _, why = q.parser.parse(line)
		}
		if err := q.decide(ev, why, len(line), now); err != nil {
			return err
		}
	}
	if lines == 0 {
		return fmt.Errorf("there is no line with an event: send 1 to %d, one JSON object each", q.in.most)
	}
	return nil
}

// next reads an event in the middle of the body by read, and decides what becomes of it: nothing, when it is nil. An error of the
// skimmer fails the whole body.
func (q *ingestRequest) next(ctx context.Context, r *skimmer, read func(*skimmer) (*event, error), now int64) error {
	if err := q.step(ctx); err != nil {
		return err
	}
	start := afterSpace(r.b, r.i)
	switch ev, err := read(r); {
	case r.err != nil:
		return fmt.Errorf("events[%d]: %w", q.index, r.err)
	case ev == nil && err == nil:
		return nil
	default:
		return q.decide(ev, err, r.i-start, now)
	}
}

// step goes on to the next event.
func (q *ingestRequest) step(ctx context.Context) error {
	q.index++
	if q.index%64 == 0 {
		return ctx.Err()
	}
	return nil
}

// decide adds the current event, which was sent as size bytes, to the records, or what is wrong with it to the errors. err is
// why it cannot be read.
func (q *ingestRequest) decide(ev *event, err error, size int, now int64) error {
	var problems []problem
	switch {
	case size > maxEventBytes:
		problems = []problem{{"", codeMaxLength, fmt.Sprintf("the event is larger than %d KiB", maxEventBytes>>10)}}
	case err != nil:
		problems = []problem{{"", codeInvalidFormat, err.Error()}}
	default:
		problems = q.parser.checkAge(now, q.in.clockSkew)
	}
	if len(problems) > 0 {
		q.refused.Add(refusalOf(problems[0], nameOf(ev)))
		return q.addError(q.index, problems, false)
	}
	if err = q.add(ev); err != nil && errors.As(err, new(recordTooLarge)) {
		p := problem{"", codeMaxLength, err.Error()}
		q.refused.Add(refusalOf(p, ev.name))
		return q.addError(q.index, []problem{p}, false)
	}
	return err
}

// nameOf is the name of an event that may not have been read.
func nameOf(ev *event) []byte {
	if ev == nil {
		return nil
	}
	return ev.name
}

// encodeSegment is encode for Segment's messages: each is translated, and its event read as every other.
func (q *ingestRequest) encodeSegment(ctx context.Context, kind string, now int64) error {
	var r, members skimmer
	r.reset(q.body.B)
	t := segment.Translator{Members: members.eachMember, MaxMetadata: maxMetadataBytes}
	var translated []byte
	read := func(r *skimmer) (*event, error) {
		switch m := r.value(); {
		case r.err != nil:
			return nil, r.err
		case m.raw[0] != '{':
			return nil, errNotObject
		case m.depth > maxDepth:
			return nil, errEventTooDeep
		default:
			to, problems, stored := t.Append(translated[:0], m.raw, kind, now)
			if translated = to; !stored {
				return nil, nil
			}
			ev, _, err := q.parser.parse(to)
			for i, p := range problems {
				q.parser.problems = slices.Insert(q.parser.problems, i, problem{p.Field, p.Code, p.Message})
			}
			q.parser.problems = q.parser.problems[:min(len(q.parser.problems), maxProblems)]
			return ev, err
		}
	}
	do := func() error { return q.next(ctx, &r, read, now) }
	switch {
	case kind == "batch":
		return r.eachEvent("batch", q.in.most, nil, do)
	case r.peek() != '{':
		return cmp.Or(byteOrderMark(r.b), errNotObject)
	}
	return cmp.Or(do(), r.end())
}

// errFound ends a search.
var errFound = errors.New("found")

// writeKeyOf returns the first writeKey in a body that has been read, or in the beginning of one: beside the batch, or in a message.
// It looks no further than that.
func writeKeyOf(body []byte, kind string) (key string) {
	var r, members skimmer
	r.reset(body)
	note := func(name, value []byte, _ bool) {
		if key == "" && string(name) == "writeKey" && value[0] == '"' && len(value) <= maxTextBytes {
			key = string(members.word(value))
		}
	}
	if kind != "batch" {
		members.eachMember(body, note)
		return key
	}
	r.eachEvent("batch", maxMessages, note, func() error {
		if key == "" {
			members.eachMember(r.value().raw, note)
		}
		if key != "" {
			return errFound
		}
		return nil
	})
	return key
}

// batchRoom is what a batch of one record takes at the most beside the record's value.
const batchRoom = 100 + 2*len(eventID{})

// add encodes the current event: its key and its value go into the arena, a slot of records remembers where. The error is of the
// account, or recordTooLarge: whether an event is taken does not depend on how well it would be compressed.
func (q *ingestRequest) add(ev *event) error {
	room := 2*len(eventID{}) + ev.maxEncoded()
	if q.arena == nil {
		room = max(room, len(q.body.B)+len(q.body.B)/4) // for the other events and their keys, most of the time
	}
	if err := q.account.Grow(&q.arena, room, false); err != nil {
		return err
	}
	var id eventID
	id, q.idInput = ev.id(q.idInput)
	start := len(q.arena.B)
	q.arena.B = hex.AppendEncode(q.arena.B, id[:])
	q.arena.B = appendEvent(q.arena.B, ev)
	if size, most := len(q.arena.B)-start-2*len(id)+batchRoom, q.in.room(); most > 0 && size > most {
		q.arena.B = q.arena.B[:start]
		return recordTooLarge{size, most}
	}
	n := len(q.records)
	if n == cap(q.records) { // Slow path: the slab grows, at most once a size for the life of the request.
		if err := q.growSlab(); err != nil {
			return err
		}
	}
	q.records = q.records[:n+1]
	rec := &q.records[n]
	rec.request, rec.index, rec.end = q, q.index, len(q.arena.B)
	rec.acked.Store(false)
	return nil
}

// growSlab moves to a bigger slab. Records are not in flight yet, so nothing points to the old one.
func (q *ingestRequest) growSlab() error {
	size := min(max(16, 2*cap(q.records)), q.in.most)
	if err := q.account.Take((size - cap(q.records)) * outgoingBytes); err != nil {
		return err
	}
	slab := make([]outgoing, size)
	for i := range q.records {
		slab[i].request, slab[i].index, slab[i].end = q, q.records[i].index, q.records[i].end
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
			Key:   q.arena.B[start : start+keyLen : start+keyLen],
			Value: q.arena.B[start+keyLen : rec.end : rec.end],
		}
		start = rec.end
	}
}

// onAck runs on franz-go's goroutine for each record, in the order of production.
func onAck(produced *kgo.Record, err error) {
	rec := outgoingOf(produced)
	q := rec.request
	if rec.acked.Store(err == nil); err != nil {
		why := err // only this one goes to the heap: err itself would, for each record
		q.firstErr.CompareAndSwap(nil, &why)
	}
	if q.pending.Add(-1) == 0 {
		q.acked <- struct{}{} // has room: there is one per request
		q.release()
	}
}

// acknowledged is how many of the records Kafka has. It needs the bytes of these no more.
func (q *ingestRequest) acknowledged() (n int) {
	for i := range q.records {
		if q.records[i].acked.Load() {
			n++
		}
	}
	return n
}

// failure says why the request's records are not acknowledged.
func (q *ingestRequest) failure() string {
	if err := q.firstErr.Load(); err != nil {
		return (*err).Error()
	}
	return "no acknowledgement in time"
}

// Limits of the errors in an answer. An entry with all its problems, names clipped, stays below maxEntry; after maxDetail
// bytes an entry has only its first problem.
const (
	maxEntry  = 16 << 10
	maxDetail = 256 << 10
)

// entryForm appends what an answer says about the event of that index.
type entryForm func(dst []byte, index int, problems []problem) []byte

// addError notes the problems of an event in the answer. An answer that is owed ignores the budget.
func (q *ingestRequest) addError(index int, problems []problem, owed bool) error {
	if len(q.errors.Bytes()) > maxDetail {
		problems = problems[:1]
	}
	if err := q.account.Grow(&q.errors, maxEntry, owed); err != nil {
		return err
	}
	if q.failed > 0 {
		q.errors.B = append(q.errors.B, ',')
	}
	q.failed++
	q.errors.B = q.entry(q.errors.B, index, problems)
	return nil
}

// appendBulkEntry is the entry of a bulk's answer: the first problem in full, all of them in a list.
func appendBulkEntry(dst []byte, index int, problems []problem) []byte {
	text := problems[0].message
	for _, p := range problems[1:] {
		text += "; " + p.message
	}
	dst = appendString(fmt.Appendf(dst, `{"index":%d,"error":`, index), text)
	dst = append(dst, `,"code":"`...)
	dst = append(dst, problems[0].code...)
	dst = append(dst, `","field":`...)
	dst = appendString(dst, problems[0].field)
	if len(problems) > 1 {
		dst = append(dst, `,"errors":[`...)
		dst = append(appendProblems(dst, problems, "{", "message"), ']')
	}
	return append(dst, '}')
}

// newRequest is what an intake's pool makes when it is empty.
func newRequest(in *intake) *ingestRequest {
	return &ingestRequest{in: in, index: -1, entry: appendBulkEntry, acked: make(chan struct{}, 1)}
}

// take returns a request with a body that was read on that account; the caller releases it. On an error, of the account, both
// stay the caller's.
func (in *intake) take(acc *budget.Account, body *budget.Buffer) (*ingestRequest, error) {
	q := in.pool.Get().(*ingestRequest)
	if err := acc.Take(cap(q.records) * outgoingBytes); err != nil {
		in.pool.Put(q)
		return nil, err
	}
	q.account, q.body = acc, body
	q.holders.Store(1)
	return q, nil
}

// release is called by each holder once; the last one resets the request and puts it back.
func (q *ingestRequest) release() {
	if q.holders.Add(-1) != 0 {
		return
	}
	q.account.Give(cap(q.records) * outgoingBytes)
	q.reset()
	q.account.Close()
	q.account = nil
	q.in.pool.Put(q)
}

func (q *ingestRequest) reset() {
	select {
	case <-q.acked: // the handler had given up before the last acknowledgement
	default:
	}
	for _, buf := range []**budget.Buffer{&q.body, &q.arena, &q.errors} {
		q.account.Put(buf)
	}
	q.firstErr.Store(nil)
	q.failed, q.index, q.entry = 0, -1, appendBulkEntry
	q.refused.Reset()
	if q.records, q.answer = q.records[:0], q.answer[:0]; cap(q.records) > maxBulkEvents { // nobody's budget has it in the pool
		q.records = nil
	}
}
