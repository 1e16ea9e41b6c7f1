// The HTTP write path: read a body, cut it into events, check them, hand them to Kafka, answer when Kafka has them.
//
// ingest.go owns the handlers of single events, of bulks and of Segment's messages, and the shapes that events arrive in: one
// object, {"events":[…]}, or one event a line. It has each event read in place; whatever surrounds the events must be JSON and is
// otherwise ignored. request.go owns what a request holds meanwhile, package segment what a message means.

package main

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/twmb/franz-go/pkg/kgo"

	"github.com/event-ingestion/event-ingestion/segment"
)

// Limits of a bulk request, as the OpenAPI document has them.
const (
	maxBulkEvents = 1000
	maxEventBytes = maxSingleBody // of one event in it, as sent
)

// codeUnavailable is the code of a good event that Kafka did not acknowledge in time.
const codeUnavailable = "unavailable"

// retryAfterSeconds is how long a refused client should wait: about the time of a broker's failover.
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
	singles      intake
	bulks        intake
	stats        *ingestStats
}

// intake is where requests for one event, or for many, come from: one event must not hold the memory of a thousand.
type intake struct {
	limit int       // bytes of a body
	pool  sync.Pool // of *ingestRequest
}

func newIngester(kafka *kgo.Client, cfg *settings, stats *ingestStats) *ingester {
	in := &ingester{
		kafka: kafka, topic: cfg.kafkaTopic, ackTimeout: cfg.ackTimeout, writeTimeout: cfg.writeTimeout,
		clockSkew: int64(cfg.clockSkew / time.Second), stats: stats,
	}
	in.bodies.limit, in.bodies.perClient = cfg.maxInFlightBytes, cfg.maxInFlightPerClient
	in.singles.limit, in.bulks.limit = maxSingleBody, maxBulkBody
	for _, from := range []*intake{&in.singles, &in.bulks} {
		from.pool.New = func() any {
			return &ingestRequest{in: in, from: from, index: -1, entry: appendBulkEntry, acked: make(chan struct{}, 1)}
		}
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
	if err := q.add(ev); err != nil {
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
	defer in.release(q)
	if media == typeText { // from a page's beacon, which cannot name its type
		if media = typeJSON; !isEnvelope(q.body.b, "events") {
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

// encode checks every event of the request and appends the good ones as records, the bad ones as entries of the answer's
// errors. Nothing goes to Kafka yet, so a body that turns out not to be JSON at its very end is refused whole. It ends early
// with the context's error.
func (q *ingestRequest) encode(ctx context.Context, media string, now int64) error {
	if media == typeNDJSON {
		return q.encodeLines(ctx, now)
	}
	r := &q.parser.json
	r.reset(q.body.b)
	return r.eachEvent("events", maxBulkEvents, nil, func() error { return q.next(ctx, r, q.parser.read, now) })
}

// encodeLines is encode for one event a line; blank lines are skipped. A line that is no JSON does not affect the others.
func (q *ingestRequest) encodeLines(ctx context.Context, now int64) error {
	lines := 0
	for line := range bytes.SplitSeq(q.body.b, []byte("\n")) {
		if line = bytes.Trim(line, " \t\r"); len(line) == 0 { // what JSON calls white space, and no other
			continue
		}
		if lines++; lines > maxBulkEvents {
			return errTooManyEvents(maxBulkEvents)
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
		return fmt.Errorf("there is no line with an event: send 1 to %d, one JSON object each", maxBulkEvents)
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
		return q.addError(q.index, problems, false)
	}
	return q.add(ev)
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
	writeJSON(w, status, q.answer, q.errors.bytes(), []byte(end))
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
	q.holders.Add(1)            // Kafka's hold on the request, until the last promise
	ctx := context.Background() // not the client's: giving up on the answer must not tear a batch in flight
	for i := range q.records {
		in.kafka.Produce(ctx, &q.records[i].Record, onAck)
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

// segmentKinds are the messages of Segment's protocol, by the last part of a route's path: the whole name or its letter.
var segmentKinds = map[string]string{
	"batch": "batch", "b": "batch", "import": "batch",
	"track": "track", "t": "track", "page": "page", "p": "page", "screen": "screen", "s": "screen",
	"identify": "identify", "i": "identify", "group": "group", "g": "group", "alias": "alias", "a": "alias",
}

// segmentRoutes are the POST routes below /v1/. A key may also stand in the body.
func (in *ingester) segmentRoutes(ac *access) (routes []route) {
	for part, kind := range segmentKinds {
		routes = append(routes, route{http.MethodPost, "/v1/" + part, "segment", func(w http.ResponseWriter, r *http.Request) { in.serveSegment(w, r, kind, ac) }})
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
	from := &in.singles
	if kind == "batch" {
		from = &in.bulks
	}
	q := in.receive(w, r, from)
	if q == nil {
		return
	}
	defer in.release(q)
	refused := map[string]int{} // items by code
	q.entry = func(dst []byte, index int, problems []problem) []byte {
		refused[problems[0].code]++
		return appendItemEntries(dst, index, problems)
	}
	if err := q.encodeSegment(r.Context(), kind, time.Now().Unix()); err != nil {
		writeReadError(w, err)
		return
	}
	if keyOf(r) == "" { // one in the header was checked before the body was read
		key := writeKeyOf(q.body.b, kind)
		if may, _ := ac.rightsOf(key); may == mayNothing {
			ac.refuse(w, key)
			return
		}
	}
	for code, n := range refused {
		in.stats.refusedItems(code).Add(n)
	}
	in.produce(q)
	in.answerSegment(w, q, wait && in.awaitStored(w, r, q))
}

// encodeSegment is encode for Segment's messages: each is translated, and its event read as every other.
func (q *ingestRequest) encodeSegment(ctx context.Context, kind string, now int64) error {
	var r, members skimmer
	r.reset(q.body.b)
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
		return r.eachEvent("batch", maxBulkEvents, nil, do)
	case r.peek() != '{':
		return cmp.Or(byteOrderMark(r.b), errNotObject)
	}
	return cmp.Or(do(), r.end())
}

// writeKeyOf returns the first writeKey in a body that has been read: beside the batch, or in a message.
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
	r.eachEvent("batch", maxBulkEvents, note, func() error {
		members.eachMember(r.value().raw, note)
		return nil
	})
	return key
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
	end := `]}`
	if stored {
		end = `],"status":"stored"}`
	}
	writeJSON(w, http.StatusOK, []byte(`{"success":true,"errors":[`), q.errors.bytes(), []byte(end))
}

// appendItemEntries appends an entry for each problem of an item.
func appendItemEntries(dst []byte, index int, problems []problem) []byte {
	return appendProblems(dst, problems, fmt.Sprintf(`{"index":%d,`, index), "error")
}
