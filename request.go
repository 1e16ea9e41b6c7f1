// One request on its way: the events of a body, their records, and what became of them.
//
// request.go owns the memory of a request, which its records point into. It is pooled, and goes back only when both the
// handler and Kafka's last acknowledgement are done with it. ingest.go decides what is done with a request, and when.
package main

import (
	"encoding/hex"
	"fmt"
	"sync"
	"sync/atomic"
	"unsafe"

	"github.com/twmb/franz-go/pkg/kgo"

	"github.com/event-ingestion/event-ingestion/budget"
)

// Limits of a request, as the OpenAPI document has them.
const (
	maxBulkEvents = 1000
	maxEventBytes = maxSingleBody // of one event in a bulk, as sent
)

// intake is where requests for one event, or for many, come from: one event must not hold the memory of a thousand.
type intake struct {
	limit     int        // bytes of a body
	clockSkew int64      // seconds that an event may be in the future
	most      func() int // bytes of a batch that the topic takes, 0 while unknown
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
	errors  *budget.Buffer // entries of the bulk answer's errors, JSON; nil while there are none
	failed  int            // how many events are in errors
	answer  []byte         // the part before errors

	holders  atomic.Int32 // the handler, and Kafka while records are in flight
	pending  atomic.Int32 // records without an outcome
	acked    chan struct{}
	firstErr atomic.Pointer[error]
}

// outgoingBytes is what a record of the slab takes.
const outgoingBytes = int(unsafe.Sizeof(outgoing{}))

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
	if size, most := len(q.arena.B)-start-2*len(id)+batchRoom, q.in.most(); most > 0 && size > most {
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
	size := min(max(16, 2*cap(q.records)), maxBulkEvents)
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
	q.records, q.answer = q.records[:0], q.answer[:0]
}
