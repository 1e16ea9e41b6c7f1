// One request on its way: the events of a body, their records, and what became of them.
//
// request.go owns the memory of a request, which its records point into. It is pooled, and goes back only when both the
// handler and Kafka's last acknowledgement are done with it. For ?wait=stored it also owns the one wake-up that all waiting
// requests share: each compares the moment of its own acknowledgement with the watermark, up to which everything is stored.
// Waiting asks nothing of Kafka or ClickHouse.

package main

import (
	"context"
	"encoding/hex"
	"fmt"
	"io"
	"net/http"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/twmb/franz-go/pkg/kgo"
)

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
// its slab of records are charged to the ingester's budget.
type ingestRequest struct {
	in      *ingester
	from    *intake  // where it goes back to
	account *account // of the client that sent it, nil in the pool
	parser  eventParser
	body    *buffer
	index   int        // of the current event
	entry   entryForm  // of the answer's errors
	records []outgoing // a slab
	arena   *buffer    // keys and values of the records, back to back
	idInput []byte
	errors  *buffer // entries of the bulk answer's errors, JSON; nil while there are none
	failed  int     // how many events are in errors
	answer  []byte  // the part before errors

	holders  atomic.Int32 // the handler, and Kafka while records are in flight
	pending  atomic.Int32 // records without an outcome
	acked    chan struct{}
	firstErr atomic.Pointer[error]
}

// outgoingBytes is what a record of the slab takes.
const outgoingBytes = int(unsafe.Sizeof(outgoing{}))

// add encodes the current event: its key and its value go into the arena, a slot of records remembers where.
func (q *ingestRequest) add(ev *event) error {
	room := 2*len(eventID{}) + ev.maxEncoded()
	if q.arena == nil {
		room = max(room, len(q.body.b)+len(q.body.b)/4) // for the other events and their keys, most of the time
	}
	if err := q.account.grow(&q.arena, room, false); err != nil {
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
	rec.request, rec.index, rec.end = q, q.index, len(q.arena.b)
	rec.acked.Store(false)
	return nil
}

// growSlab moves to a bigger slab. Records are not in flight yet, so nothing points to the old one.
func (q *ingestRequest) growSlab() error {
	size := min(max(16, 2*cap(q.records)), maxBulkEvents)
	if err := q.account.take((size - cap(q.records)) * outgoingBytes); err != nil {
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
			Key:   q.arena.b[start : start+keyLen : start+keyLen],
			Value: q.arena.b[start+keyLen : rec.end : rec.end],
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
		q.in.release(q)
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
	if len(q.errors.bytes()) > maxDetail {
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

// receive reads r's body and returns a request with it, which the caller releases; nil when it has answered why not. While the
// client takes its time, only the body's buffer is held.
func (in *ingester) receive(w http.ResponseWriter, r *http.Request, from *intake) *ingestRequest {
	acc := in.bodies.open(clientOf(w, r))
	body, err := in.readBody(acc, r, from.limit)
	q := from.pool.Get().(*ingestRequest)
	if err == nil {
		err = acc.take(cap(q.records) * outgoingBytes)
	}
	if err != nil {
		acc.put(&body)
		acc.close()
		from.pool.Put(q)
		if err == errBodyTooLarge && r.Header.Get("Expect") == "" {
			io.CopyN(io.Discard, r.Body, maxDropped) // else a client that sends all before it looks finds a broken connection, no 413
		}
		writeReadError(w, err)
		return nil
	}
	q.account, q.body = acc, body
	q.holders.Store(1)
	return q
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
	q.from.pool.Put(q)
}

func (q *ingestRequest) reset() {
	drain(q.acked) // the handler had given up before the last acknowledgement
	for _, buf := range []**buffer{&q.body, &q.arena, &q.errors} {
		q.account.put(buf)
	}
	q.firstErr.Store(nil)
	q.failed, q.index, q.entry = 0, -1, appendBulkEntry
	q.records, q.answer = q.records[:0], q.answer[:0]
}

// wantsStored says whether to answer only once the events are stored, ?wait=stored; ok is false when it has answered another
// value.
func wantsStored(w http.ResponseWriter, r *http.Request) (wait, ok bool) {
	value, is := queryValue(r.URL.RawQuery, "wait")
	if is && value != "stored" {
		writeProblems(w, []problem{{"wait", codeInvalidFormat, "wait must be stored, or absent"}})
	}
	return is, !is || value == "stored"
}

// awaitStored waits until the request's events are stored; false when that takes too long, or not all are acknowledged. It first
// gives back the body and the records' bytes. What the request keeps still counts as in flight, which bounds how many can wait.
func (in *ingester) awaitStored(w http.ResponseWriter, r *http.Request, q *ingestRequest) bool {
	now := time.Now()
	if n := q.acknowledged(); n == 0 || n < len(q.records) {
		return false
	}
	q.account.put(&q.body)
	q.account.put(&q.arena)
	until := now.Add(storedTimeout)
	if x, ok := w.(*exchange); ok { // the answer has to be written before SERVER_WRITE_TIMEOUT
		if last := x.started.Add(in.writeTimeout - in.writeTimeout/8); last.Before(until) {
			until = last
		}
	}
	ctx, cancel := context.WithDeadline(r.Context(), until)
	defer cancel()
	return in.stored.wait(ctx, now)
}

// storedTimeout is how long an answer waits for ?wait=stored.
const storedTimeout = 5 * time.Second

// storedSignal says how far everything is stored, to the nanosecond where complete_through has seconds. The zero value knows
// nothing yet.
type storedSignal struct {
	mu      sync.Mutex    // guards what follows
	through time.Time     // everything acknowledged before it is stored
	moved   chan struct{} // closed when through moves or waiting ends; nil while nobody waits
	ended   bool
}

// change wakes whoever waits.
func (s *storedSignal) change(do func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if do(); s.moved != nil {
		close(s.moved)
		s.moved = nil
	}
}

func (s *storedSignal) advance(through time.Time) { s.change(func() { s.through = through }) }

// end ends all waiting, so that a stop does not take longer for it.
func (s *storedSignal) end() { s.change(func() { s.ended = true }) }

// age is how long ago through was; 0 while unknown.
func (s *storedSignal) age() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.through.IsZero() {
		return 0
	}
	return time.Since(s.through)
}

// wait returns true once what was acknowledged by then is stored, false when ctx is done or the program stops first.
func (s *storedSignal) wait(ctx context.Context, then time.Time) bool {
	for {
		s.mu.Lock()
		stored, ended := s.through.After(then), s.ended
		if s.moved == nil && !stored {
			s.moved = make(chan struct{})
		}
		moved := s.moved
		s.mu.Unlock()
		if stored || ended {
			return stored
		}
		select {
		case <-moved:
		case <-ctx.Done():
			return false
		}
	}
}
