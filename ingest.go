// The HTTP write path: read a body, cut it into events, check them, hand them to Kafka, answer when Kafka has them.
//
// ingest.go owns the handlers of single events, of bulks and of Segment's messages. request.go owns what a request holds meanwhile, and
// cuts it into events; package segment knows what a message of Segment's means.
//
// For ?wait=stored it compares the moment of a request's own acknowledgement with the one up to which everything is stored. All
// waiting requests share one wake-up, and ask nothing of Kafka or ClickHouse.

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kgo"

	"github.com/event-ingestion/event-ingestion/internal/batches"
	"github.com/event-ingestion/event-ingestion/internal/budget"
	"github.com/event-ingestion/event-ingestion/internal/troubles"
)

// codeUnavailable is the code of a good event that Kafka did not acknowledge in time.
const codeUnavailable = "unavailable"

// segmentSkew is how many seconds an event of Segment's clients may be in the future: they do not read what is refused. It is stored at
// its own time, and counted when that has come.
const segmentSkew = daySeconds

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
	unknownShare int64         // of bodies, what requests hold together whose key, when there have to be some, has not been found yet
	searching    chan struct{} // holds one: whose body is searched for its key
	singles      intake
	bulks        intake
	messages     intake // of Segment's clients, one at a time
	batches      intake
	stats        *ingestStats
}

func newIngester(kafka *batches.Producer, cfg *settings, stats *ingestStats, stored func(context.Context, time.Time) bool) *ingester {
	in := &ingester{
		kafka: kafka, topic: cfg.kafkaTopic, ackTimeout: cfg.ackTimeout, writeTimeout: cfg.writeTimeout, stored: stored, stats: stats,
		bodies:       budget.New(cfg.maxInFlightBytes, cfg.maxInFlightPerClient),
		unknownShare: cfg.maxInFlightBytes / 16, searching: make(chan struct{}, 1),
	}
	skew := int64(cfg.clockSkew / time.Second)
	for from, is := range map[*intake]struct {
		limit, most int
		skew        int64
	}{
		&in.singles: {maxSingleBody, 1, skew}, &in.bulks: {maxBulkBody, maxBulkEvents, skew},
		&in.messages: {maxSingleBody, 1, segmentSkew}, &in.batches: {maxBulkBody, maxMessages, segmentSkew},
	} {
		from.limit, from.most, from.clockSkew = is.limit, is.most, is.skew
		from.room = kafka.Most
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
		q.refused.Add(refusalOf(problems[0], ev.name))
		in.note(w, routeEvents, &q.refused)
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
		if media = typeJSON; !isEnvelope(q.body.B, "events") {
			media = typeNDJSON
		}
	}
	if err := q.encode(r.Context(), media, time.Now().Unix()); err != nil {
		writeReadError(w, err)
		return
	}
	in.note(w, routeBulk, &q.refused)
	in.produce(q)
	in.answerBulk(w, q, wait && in.awaitStored(w, r, q))
}

// note has the refused events of a request counted and shown.
func (in *ingester) note(w http.ResponseWriter, route string, refused *troubles.Refused) {
	if noted := in.stats.refusals.Note(route, refused); noted {
		if x, ok := w.(*exchange); ok {
			x.noted = true
		}
	}
}

// noting serves a route that takes events. A request that is refused whole, for its body or its type, counts as one refusal: how many
// events were in it is not known.
func (in *ingester) noting(route string, serve http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		serve(w, r)
		x, ok := w.(*exchange)
		if !ok || x.noted {
			return
		}
		whole := problem{message: x.cause}
		switch x.status {
		case http.StatusBadRequest, http.StatusUnsupportedMediaType:
			whole.code = codeInvalidFormat
		case http.StatusRequestEntityTooLarge:
			whole.code = codeMaxLength
		default:
			return
		}
		var refused troubles.Refused
		refused.Add(refusalOf(whole, nil))
		in.note(w, route, &refused)
	}
}

// receive reads r's body and returns a request with it, which the caller releases; nil when it has answered why not. While the
// client takes its time, only the body's buffer is held.
func (in *ingester) receive(w http.ResponseWriter, r *http.Request, from *intake) *ingestRequest {
	acc := in.bodies.Open(clientOf(w, r))
	body, err := readBody(acc, r, from.limit, in.ackTimeout)
	return in.received(w, r, from, acc, body, err)
}

// received is the end of receive: acc and body become the request's, or are given back.
func (in *ingester) received(w http.ResponseWriter, r *http.Request, from *intake, acc *budget.Account, body *budget.Buffer, err error) *ingestRequest {
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

// unknown is the client that all are whose key has not been found yet: it is no address, nor the hash of a key.
var unknown = client{len(client{}) - 1: 1}

// A compressed body is decompressed to so many bytes to find its key: searchedBase, and searchedTimes of what was sent. Messages have
// ids and times of their own, and shrink to a tenth or so; what shrinks to less costs no more, unless its key stands in front.
const (
	searchedBase  = 64 << 10
	searchedTimes = 32
)

// receiveUnknown is receive for a request whose key, if it has one, is in its body. Until it is found all such requests have a small
// share of the budget, and one core, together: whoever has a key does not wait for those who have none.
func (in *ingester) receiveUnknown(w http.ResponseWriter, r *http.Request, from *intake, kind string, ac *access) *ingestRequest {
	acc := in.bodies.OpenWithin(unknown, in.unknownShare)
	body, encoding, err := readSent(acc, r, from.limit)
	if err != nil {
		return in.received(w, r, from, acc, nil, err)
	}
	key, searched, err := in.searchKey(r.Context(), acc, encoding, body.B, from.limit, kind)
	if err != nil {
		return in.received(w, r, from, acc, body, err)
	}
	defer acc.Close()
	defer acc.Put(&body) // unless it is passed on
	may, known := ac.rightsOf(key)
	if may == mayNothing {
		why := unknownKey(key)
		if key == "" && searched > 0 {
			why.detail = fmt.Sprintf("there is no writeKey in the first %d bytes of the decompressed body; send it as the user name of Basic authentication", searched)
		}
		writeVerdict(w, why)
		return nil
	}
	theirs, text := in.bodies.Open(known), (*budget.Buffer)(nil)
	if encoding != "" {
		text, err = decompress(r.Context(), theirs, encoding, body.B, from.limit+1, from.limit, in.ackTimeout)
	} else if err = acc.Pass(body, theirs); err == nil {
		text, body = body, nil
	}
	return in.received(w, r, from, theirs, text, err)
}

// searchKey returns the first writeKey of a body as it was sent, empty when there is none. searched is 0, or the bytes to which the
// body was decompressed when there are more.
func (in *ingester) searchKey(ctx context.Context, acc *budget.Account, encoding string, sent []byte, limit int, kind string) (key string, searched int, err error) {
	waiting, cancel := context.WithTimeoutCause(ctx, in.ackTimeout, errTimeUp)
	defer cancel()
	select {
	case in.searching <- struct{}{}:
		defer func() { <-in.searching }()
	case <-waiting.Done():
		return "", 0, context.Cause(waiting)
	}
	if encoding == "" {
		return writeKeyOf(sent, kind), 0, nil
	}
	most := min(searchedBase+searchedTimes*len(sent), limit)
	head, err := decompress(ctx, acc, encoding, sent, most, most, in.ackTimeout)
	if err != nil {
		return "", 0, err
	}
	defer acc.Put(&head)
	if len(head.B) == most {
		searched = most
	}
	return writeKeyOf(head.B, kind), searched, nil
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

// segmentKinds are the messages of Segment's protocol, by the last part of a route's path: the whole name or its letter.
var segmentKinds = map[string]string{
	"batch": "batch", "b": "batch", "import": "batch",
	"track": "track", "t": "track", "page": "page", "p": "page", "screen": "screen", "s": "screen",
	"identify": "identify", "i": "identify", "group": "group", "g": "group", "alias": "alias", "a": "alias",
}

// segmentRoutes are the POST routes below /v1/. A key may also stand in the body.
func (in *ingester) segmentRoutes(ac *access) (routes []route) {
	for part, kind := range segmentKinds {
		serve := func(w http.ResponseWriter, r *http.Request) { in.serveSegment(w, r, kind, ac) }
		routes = append(routes, route{http.MethodPost, segmentPrefix + part, routeSegment, in.noting(routeSegment, serve)})
	}
	return routes
}

// serveSegment answers a message or a batch of Segment's clients. They drop what gets a 4xx, so a 200 names the invalid items.
func (in *ingester) serveSegment(w http.ResponseWriter, r *http.Request, kind string, ac *access) {
	if takes(w, r, typeJSON) == "" {
		return
	}
	wait, ok := wantsStored(w, r)
	if !ok {
		return
	}
	from := &in.messages
	if kind == "batch" {
		from = &in.batches
	}
	var q *ingestRequest
	if may, _ := ac.rightsOf(""); may != mayNothing || keyOf(r) != "" { // a key in the header was checked before the body is read
		q = in.receive(w, r, from)
	} else {
		q = in.receiveUnknown(w, r, from, kind, ac)
	}
	if q == nil {
		return
	}
	defer q.release()
	q.entry = appendItemEntries
	if err := q.encodeSegment(r.Context(), kind, time.Now().Unix()); err != nil {
		writeReadError(w, err)
		return
	}
	in.note(w, routeSegment, &q.refused)
	in.produce(q)
	in.answerSegment(w, q, wait && in.awaitStored(w, r, q))
}

// answerSegment says 200 only when Kafka has every valid item.
func (in *ingester) answerSegment(w http.ResponseWriter, q *ingestRequest, stored bool) {
	success := q.acknowledged()
	in.stats.accepted.Add(success)
	in.stats.refused.Add(q.failed)
	if late := len(q.records) - success; late > 0 {
		in.stats.unavailable.Add(late)
		writeUnavailable(w, q.failure())
		return
	}
	begin, end := `{"success":true,"errors":[`, `]}`
	if q.failed > 0 {
		begin = `{"success":false,"errors":[`
	}
	if stored {
		end = `],"status":"stored"}`
	}
	writeJSON(w, http.StatusOK, []byte(begin), q.errors.Bytes(), []byte(end))
}

// appendItemEntries appends an entry for each problem of an item.
func appendItemEntries(dst []byte, index int, problems []problem) []byte {
	return appendProblems(dst, problems, fmt.Sprintf(`{"index":%d,`, index), "error")
}
