// The HTTP write path: read a body, cut it into events, check them, hand them to Kafka, answer when Kafka has them.
//
// ingest.go owns the handlers of single events and of bulks, and the shapes that events arrive in: one object, {"events":[…]},
// or one event a line. It has each event read in place, so that a body is read once, from front to back; whatever surrounds
// the events must be JSON and is otherwise ignored. request.go owns what a request holds meanwhile.
//
// For ?wait=stored it compares the moment of a request's own acknowledgement with the one up to which everything is stored. All
// waiting requests share one wake-up, and ask nothing of Kafka or ClickHouse.

package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kgo"

	"github.com/event-ingestion/event-ingestion/batches"
	"github.com/event-ingestion/event-ingestion/budget"
)

var (
	errTooManyEvents = errors.New("more than 1000 events: split the request")
	errNoLines       = errors.New("there is no line with an event: send 1 to 1000, one JSON object each")
)

// codeUnavailable is the code of a good event that Kafka did not acknowledge in time.
const codeUnavailable = "unavailable"

// storedTimeout is how long an answer waits for ?wait=stored.
const storedTimeout = 5 * time.Second

// ingester serves POST /api/v1/events and /api/v1/events/bulk.
type ingester struct {
	kafka        *batches.Producer
	topic        string
	ackTimeout   time.Duration
	writeTimeout time.Duration
	stored       func(ctx context.Context, then time.Time) bool // waits until what was acknowledged by then is stored; false: not in time
	bodies       *budget.Budget
	singles      intake
	bulks        intake
	stats        *ingestStats
}

func newIngester(kafka *batches.Producer, cfg *settings, stats *ingestStats, stored func(context.Context, time.Time) bool) *ingester {
	in := &ingester{
		kafka: kafka, topic: cfg.kafkaTopic, ackTimeout: cfg.ackTimeout, writeTimeout: cfg.writeTimeout, stored: stored, stats: stats,
		bodies: budget.New(cfg.maxInFlightBytes, cfg.maxInFlightPerClient),
	}
	in.singles.limit, in.bulks.limit = maxSingleBody, maxBulkBody
	for _, from := range []*intake{&in.singles, &in.bulks} {
		from.most = kafka.Most
		from.clockSkew = int64(cfg.clockSkew / time.Second)
		from.pool.New = func() any { return newRequest(from) }
	}
	return in
}

// serveOne answers POST /api/v1/events: 202 once all in-sync replicas have the event, 503 when they do not in time.
func (in *ingester) serveOne(w http.ResponseWriter, r *http.Request) {
	if takes(w, r, typeJSON) == "" {
		return
	}
	wait, ok := wantsStored(w, r)
	if !ok {
		return
	}
	q := in.receive(w, r, &in.singles)
	if q == nil {
		return
	}
	defer q.release()
	ev, _, err := q.parser.parse(q.body.B)
	if err != nil {
		in.stats.refused.Add(1)
		writeError(w, http.StatusBadRequest, "invalid request body", err.Error())
		return
	}
	if problems := q.parser.checkAge(time.Now().Unix(), q.in.clockSkew); len(problems) > 0 {
		in.stats.refused.Add(1)
		writeProblems(w, problems)
		return
	}
	if err := q.add(ev); err != nil {
		if errors.As(err, new(recordTooLarge)) {
			in.stats.refused.Add(1)
		}
		writeReadError(w, err)
		return
	}
	if in.produce(q); q.acknowledged() == 0 {
		in.stats.unavailable.Add(1)
		writeUnavailable(w, q.failure())
		return
	}
	in.stats.accepted.Add(1)
	q.answer = append(q.answer[:0], `{"event_id":"`...)
	q.answer = append(q.answer, q.records[0].Key...) // which awaitStored gives back
	status, end := http.StatusAccepted, `","status":"queued"}`
	if wait && in.awaitStored(w, r, q) {
		status, end = http.StatusOK, `","status":"stored"}`
	}
	q.answer = append(q.answer, end...)
	writeJSON(w, status, q.answer)
}

// serveBulk answers POST /api/v1/events/bulk.
func (in *ingester) serveBulk(w http.ResponseWriter, r *http.Request) {
	media := takes(w, r, typeJSON, typeNDJSON)
	if media == "" {
		return
	}
	wait, ok := wantsStored(w, r)
	if !ok {
		return
	}
	q := in.receive(w, r, &in.bulks)
	if q == nil {
		return
	}
	defer q.release()
	if media == typeText { // from a page's beacon, which cannot name its type
		if media = typeJSON; !isEnvelope(q.body.B) {
			media = typeNDJSON
		}
	}
	if err := q.encode(r.Context(), media, time.Now().Unix()); err != nil {
		writeReadError(w, err)
		return
	}
	in.produce(q)
	in.answerBulk(w, q, wait && in.awaitStored(w, r, q))
}

// receive reads r's body and returns a request with it, which the caller releases; nil when it has answered why not. While the
// client takes its time, only the body's buffer is held.
func (in *ingester) receive(w http.ResponseWriter, r *http.Request, from *intake) *ingestRequest {
	acc := in.bodies.Open(clientOf(w, r))
	body, err := readBody(acc, r, from.limit, in.ackTimeout)
	if err == nil {
		var q *ingestRequest
		if q, err = from.take(acc, body); err == nil {
			return q
		}
	}
	acc.Put(&body)
	acc.Close()
	if err == errBodyTooLarge && r.Header.Get("Expect") == "" {
		io.CopyN(io.Discard, r.Body, maxDropped) // else a client that sends all before it looks finds a broken connection, no 413
	}
	writeReadError(w, err)
	return nil
}

// encode checks every event of the request and appends the good ones as records, the bad ones as entries of the answer's
// errors. Nothing goes to Kafka yet, so a body that turns out not to be JSON at its very end is refused whole. It ends early
// with the context's error.
func (q *ingestRequest) encode(ctx context.Context, media string, now int64) error {
	if media == typeNDJSON {
		return eachLine(q.body.B, func(line []byte) error {
			if err := q.step(ctx); err != nil {
				return err
			}
			var ev *event
			var err error
			if len(line) <= maxEventBytes { // else it is refused unread
				ev, _, err = q.parser.parse(line)
			}
			return q.decide(ev, err, len(line), now) // which does not affect the other lines
		})
	}
	q.parser.json.reset(q.body.B)
	return eachEvent(&q.parser.json, "events", nil, func(*jsonReader) error { return q.next(ctx, q.parser.read, now) })
}

// next reads an event in the middle of the body by read, and decides what becomes of it: nothing, when it is nil. An error of the
// reader fails the whole body.
func (q *ingestRequest) next(ctx context.Context, read func(*jsonReader) (*event, error), now int64) error {
	if err := q.step(ctx); err != nil {
		return err
	}
	r := &q.parser.json
	r.space()
	start := r.i
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
		return q.addError(q.index, problems, false)
	}
	if err = q.add(ev); err != nil && errors.As(err, new(recordTooLarge)) {
		return q.addError(q.index, []problem{{"", codeMaxLength, err.Error()}}, false)
	}
	return err
}

// produce hands the request's records to Kafka and waits until each is acknowledged by all in-sync replicas or has failed, or
// the time is up. What is not acknowledged by then is reported as such: it may still arrive, and when the client sends it
// again it is a duplicate, which is counted once.
func (in *ingester) produce(q *ingestRequest) {
	if len(q.records) == 0 {
		return
	}
	q.sealRecords(in.topic)
	q.pending.Store(int32(len(q.records)))
	q.holders.Add(1) // Kafka's hold on the request, until the last promise
	limit := in.kafka.Hand(func(kafka *kgo.Client) {
		ctx := context.Background() // not the client's: giving up on the answer must not tear a batch in flight
		for i := range q.records {
			kafka.Produce(ctx, &q.records[i].Record, onAck)
		}
	})
	started := time.Now()
	defer func() { in.stats.ack.Update(time.Since(started).Seconds()) }()
	timeout := time.NewTimer(in.ackTimeout)
	defer timeout.Stop()
	select {
	case <-q.acked:
	case <-timeout.C:
	}
	if why := q.firstErr.Load(); why != nil && errors.Is(*why, kerr.MessageTooLarge) {
		in.kafka.TooLarge(limit)
	}
}

// awaitStored waits until the request's events are stored; false when that takes too long, or not all are acknowledged. It first
// gives back the body and the records' bytes. What the request keeps still counts as in flight, which bounds how many can wait.
func (in *ingester) awaitStored(w http.ResponseWriter, r *http.Request, q *ingestRequest) bool {
	now := time.Now()
	if n := q.acknowledged(); n == 0 || n < len(q.records) {
		return false
	}
	q.account.Put(&q.body)
	q.account.Put(&q.arena)
	until := now.Add(storedTimeout)
	if x, ok := w.(*exchange); ok { // the answer has to be written before SERVER_WRITE_TIMEOUT
		if last := x.started.Add(in.writeTimeout - in.writeTimeout/8); last.Before(until) {
			until = last
		}
	}
	ctx, cancel := context.WithDeadline(r.Context(), until)
	defer cancel()
	return in.stored(ctx, now)
}

// answerBulk says what became of the events. stored is that all accepted ones can be queried.
func (in *ingester) answerBulk(w http.ResponseWriter, q *ingestRequest, stored bool) {
	success := 0
	for i := range q.records {
		if rec := &q.records[i]; rec.acked.Load() {
			success++
		} else {
			q.addError(rec.index, []problem{{"", codeUnavailable, "Kafka did not acknowledge the event; it is safe to send it again"}}, true)
		}
	}
	late := len(q.records) - success
	in.stats.accepted.Add(success)
	in.stats.unavailable.Add(late)
	in.stats.refused.Add(q.failed - late)
	q.answer = fmt.Appendf(q.answer[:0], `{"success_count":%d,"failed_count":%d,"errors":[`, success, q.failed)
	status, end := http.StatusMultiStatus, `]}`
	if stored {
		end = `],"status":"stored"}`
	}
	switch {
	case q.failed == 0 && stored:
		status = http.StatusOK
	case q.failed == 0:
		status = http.StatusAccepted
	case success == 0 && late > 0:
		status = http.StatusServiceUnavailable
		w.Header().Set("Retry-After", retryAfterSeconds)
		noteCause(w, q.failure())
		end = `],"error":"Kafka is unavailable, send the events again"}`
	case success == 0:
		status = http.StatusBadRequest
		end = `],"error":"validation failed"}`
	}
	writeJSON(w, status, q.answer, q.errors.Bytes(), []byte(end))
}

// mediaType returns typeJSON, typeNDJSON, typeText or "" for a Content-Type that is none of them. An absent one means JSON. Text
// is what a page may send to another origin, or as its last beacon, without asking.
func mediaType(r *http.Request) string {
	media, _, _ := strings.Cut(r.Header.Get("Content-Type"), ";")
	switch media = strings.ToLower(strings.TrimSpace(media)); media {
	case "":
		return typeJSON
	case typeJSON, typeNDJSON, typeText:
		return media
	}
	return ""
}

// takes returns the media type of a request, which has to be one of these or text; otherwise it answers 415 and returns "".
func takes(w http.ResponseWriter, r *http.Request, forms ...string) string {
	media := mediaType(r)
	if media == typeText || slices.Contains(forms, media) {
		return media
	}
	writeError(w, http.StatusUnsupportedMediaType, "unsupported content type", "send "+strings.Join(forms, " or "))
	return ""
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

// eachEvent calls do with r at each element of the array that list names, as in {"events":[…]}; do reads one value. The other
// members go to other, which may be nil.
func eachEvent(r *jsonReader, list string, other func(k, v jsonValue), do func(*jsonReader) error) error {
	if !r.eat('{') {
		return cmp.Or(byteOrderMark(r.b), errNotEnvelope(list))
	}
	var k jsonValue
	events, found := 0, false
	for n := 0; r.key(n, &k); n++ {
		switch {
		case !k.is(list):
			if v := r.value(); other != nil && r.err == nil {
				other(k, v)
			}
		case found:
			return fmt.Errorf("%q appears more than once", list)
		case !r.eat('['):
			return errNotEnvelope(list)
		default:
			found = true
			for ; r.more(events, ']'); events++ {
				if events == maxBulkEvents {
					return errTooManyEvents
				}
				if err := do(r); err != nil {
					return err
				}
			}
		}
	}
	if r.end() == nil && events == 0 {
		return errNoEvents(list)
	}
	return r.err
}

// isEnvelope says whether a body is {"events":…} rather than an event a line, judging by its first object. A body that is not
// JSON but begins like an envelope counts as one: the error is then about the body, not about its lines.
func isEnvelope(body []byte) bool {
	var k jsonValue
	r := jsonReader{b: body}
	if !r.eat('{') {
		return false
	}
	for n := 0; r.key(n, &k); n++ {
		if k.is("events") {
			return true
		}
		r.value()
	}
	return r.err != nil
}

func errNoEvents(list string) error {
	return fmt.Errorf("%q is missing or empty: send 1 to 1000 events", list)
}

func errNotEnvelope(list string) error {
	return fmt.Errorf("the body must be a JSON object, in which %q is an array", list)
}

// eachLine calls do with each line of an NDJSON body; blank lines are skipped.
func eachLine(body []byte, do func(line []byte) error) error {
	n := 0
	for line := range bytes.SplitSeq(body, []byte("\n")) {
		if line = bytes.Trim(line, " \t\r"); len(line) == 0 { // what JSON calls white space, and no other
			continue
		}
		if n++; n > maxBulkEvents {
			return errTooManyEvents
		}
		if err := do(line); err != nil {
			return err
		}
	}
	if n == 0 {
		return errNoLines
	}
	return nil
}
