// Segment's protocol, so that an app can use an existing client with its queue, batches, retries and last flush.
//
// segment.go owns the mapping of a message onto an event, field by field as the OpenAPI document says, and the answer: these
// clients drop what gets a 4xx, so a 200 names the invalid items. Rules, limits, keys, Kafka and memory are those of the other routes.

package main

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"net/http"
	"time"
)

// segment serves the POST routes below /v1/.
type segment struct {
	in     *ingester
	access *access
}

// segmentKinds are the messages, by the last part of a route's path: the whole name or its letter.
var segmentKinds = map[string]string{
	"batch": "batch", "b": "batch", "import": "batch",
	"track": "track", "t": "track", "page": "page", "p": "page", "screen": "screen", "s": "screen",
	"identify": "identify", "i": "identify", "group": "group", "g": "group", "alias": "alias", "a": "alias",
}

func (s *segment) routes() (routes []route) {
	for part, kind := range segmentKinds {
		routes = append(routes, route{http.MethodPost, "/v1/" + part, "segment", func(w http.ResponseWriter, r *http.Request) { s.serve(w, r, kind) }})
	}
	return routes
}

func (s *segment) serve(w http.ResponseWriter, r *http.Request, kind string) {
	if takes(w, r, typeJSON) == "" {
		return
	}
	wait, ok := wantsStored(w, r)
	if !ok {
		return
	}
	from := &s.in.singles
	if kind == "batch" {
		from = &s.in.bulks
	}
	q := s.in.receive(w, r, from)
	if q == nil {
		return
	}
	defer q.release()
	refused := map[string]int{} // items by code
	q.entry = func(dst []byte, index int, problems []problem) []byte {
		refused[problems[0].code]++
		return appendItemEntries(dst, index, problems)
	}
	key, err := q.encodeSegment(r.Context(), kind, time.Now().Unix())
	if err != nil {
		writeReadError(w, err)
		return
	}
	if keyOf(r) == "" { // one in the header was checked before the body was read
		if may, _ := s.access.rightsOf(string(key)); may == mayNothing {
			writeVerdict(w, unknownKey(string(key)))
			return
		}
	}
	for code, n := range refused {
		s.in.stats.refusedItems(code).Add(n)
	}
	s.in.produce(q)
	s.answer(w, q, wait && s.in.awaitStored(w, r, q))
}

// encodeSegment is encode for Segment's messages. key is the body's writeKey, which points into the body.
func (q *ingestRequest) encodeSegment(ctx context.Context, kind string, now int64) (key []byte, err error) {
	r := &q.parser.json
	r.reset(q.body.B)
	var scratch []byte
	note := func(v *jsonValue) {
		if len(key) == 0 && v.kind == '"' && len(v.raw) <= maxTextBytes {
			key = v.text(&scratch)
		}
	}
	m := new(message) // reused for each item
	fields := m.fields()
	read := func(r *jsonReader) (*event, error) {
		*m = message{}
		err := m.read(r, fields, &q.parser)
		note(&m.writeKey)
		if err != nil {
			return nil, err
		}
		return q.parser.fromMessage(m, kind, now), nil // nil for a kind that is not stored
	}
	do := func(*jsonReader) error { return q.next(ctx, read, now) }
	switch {
	case kind == "batch":
		err = eachEvent(r, "batch", func(k, v jsonValue) {
			if k.is("writeKey") {
				note(&v)
			}
		}, do)
	case r.peek() != '{':
		err = cmp.Or(byteOrderMark(r.b), errNotObject)
	default:
		if err = do(r); err == nil {
			err = r.end()
		}
	}
	return key, err
}

// message is what is used of one message; a field that is absent or null has no bytes. The values point into the body.
type message struct {
	kind, event, name, category, userID, anonymousID, timestamp, originalTimestamp jsonValue
	channel, properties, messageID, writeKey, library, campaign                    jsonValue
}

// fields says where a message's members go; the library's and the campaign's name are in the member context.
func (m *message) fields() map[string]*jsonValue {
	return map[string]*jsonValue{
		"type": &m.kind, "event": &m.event, "name": &m.name, "category": &m.category, "properties": &m.properties,
		"userId": &m.userID, "anonymousId": &m.anonymousID, "messageId": &m.messageID, "writeKey": &m.writeKey,
		"timestamp": &m.timestamp, "originalTimestamp": &m.originalTimestamp, "channel": &m.channel,
	}
}

// read takes the fields out of one message. Its errors are those of eventParser.read; the problems go to p.
func (m *message) read(r *jsonReader, fields map[string]*jsonValue, p *eventParser) error {
	p.begin()
	var k, v jsonValue
	deepest, err := 0, r.object()
	for n := 0; err == nil && r.member(n, &k, &v); n++ {
		deepest = max(deepest, v.depth)
		if len(k.raw) > maxNameBytes {
			continue
		}
		name := p.word(&k)
		to := fields[string(name)] // no copy
		switch {
		case k.badText || v.badText:
			p.addf(clip(name), codeInvalidFormat, "is not valid UTF-8 text")
		case string(name) == "context":
			m.context(&v)
		case to == nil || v.kind == 'n':
		case len(to.raw) > 0:
			p.addf(string(name), codeInvalidFormat, "appears more than once")
		default:
			*to = v
		}
	}
	if deepest >= maxDepth {
		err = errEventTooDeep
	}
	return cmp.Or(r.err, err)
}

// each calls do with each member of v, which has been read before; a value that is no object has none.
func (v *jsonValue) each(do func(k, v jsonValue)) {
	var name, value jsonValue
	r := jsonReader{b: v.raw}
	if !r.eat('{') {
		return
	}
	for n := 0; r.member(n, &name, &value); n++ {
		do(name, value)
	}
}

// context takes the names of the library and of the campaign out of a message's context.
func (m *message) context(v *jsonValue) {
	v.each(func(k, part jsonValue) {
		to := &m.library
		if k.is("campaign") {
			to = &m.campaign
		} else if !k.is("library") {
			return
		}
		part.each(func(k, v jsonValue) {
			if k.is("name") && v.kind != 'n' {
				*to = v
			}
		})
	})
}

// fromMessage fills the event from the message and adds to its problems; nil for a kind that is not stored. kind is the
// route's; in a batch each message says its own.
func (p *eventParser) fromMessage(m *message, kind string, now int64) *event {
	if kind == "batch" {
		kind = string(p.word(&m.kind))
	}
	switch kind {
	case "track":
		p.given(fieldName, &m.event)
	case "page", "screen":
		p.ev.name = append(p.ev.name, kind...)
		p.seen |= fieldName
	case "identify", "group", "alias":
		return nil
	default:
		p.addf("type", codeInvalidFormat, "must be track, page, screen, identify, group or alias")
		p.seen |= fieldName
	}
	if p.given(fieldUserID, &m.userID); p.seen&fieldUserID == 0 {
		p.given(fieldUserID, &m.anonymousID)
	}
	p.given(fieldCampaignID, &m.campaign)
	p.given(fieldInsertID, &m.messageID)
	p.given(fieldMetadata, &m.properties)
	if kind == "page" || kind == "screen" {
		p.titled(m)
	}
	p.ev.channel = p.channelOf(m)
	at := &m.timestamp
	if len(at.raw) == 0 {
		at = &m.originalTimestamp
	}
	p.ev.timestamp = now
	p.seen |= fieldTimestamp
	if len(at.raw) > 0 {
		p.isoTime(at)
	}
	p.finish()
	return &p.ev
}

// given is field for a value that may be absent.
func (p *eventParser) given(f fieldSet, v *jsonValue) {
	if len(v.raw) > 0 {
		p.field(f, v)
	}
}

// word returns a string to compare with known ones, empty when it is no string or longer than any of them. It is valid until
// the next text.
func (p *eventParser) word(v *jsonValue) []byte {
	if v.kind != '"' || len(v.raw) > maxTextBytes {
		return nil
	}
	kept := len(p.scratch)
	b := v.text(&p.scratch)
	p.scratch = p.scratch[:kept]
	return b
}

// titled puts the name and the category of a page or screen in front of its properties, unless these have them already.
func (p *eventParser) titled(m *message) {
	if p.seen&fieldMetadata != 0 && len(p.ev.metadata) == 0 {
		return // which are refused
	}
	var b []byte
	for _, title := range []struct {
		name string
		v    *jsonValue
	}{{"name", &m.name}, {"category", &m.category}} {
		has := false
		m.properties.each(func(k, _ jsonValue) { has = has || k.is(title.name) })
		if size := len(title.v.raw); size > maxMetadataBytes {
			p.addf("metadata", codeMaxLength, "would have %d bytes of %s, the limit is %d", size, title.name, maxMetadataBytes)
		} else if size > 0 && title.v.kind == '"' && !has {
			b = append(b, `,"`+title.name+`":`...)
			b = title.v.appendCompact(b)
		}
	}
	if len(b) == 0 {
		return
	}
	if rest := p.ev.metadata; len(rest) > len(`{}`) {
		b = append(append(b, ','), rest[1:]...)
	} else {
		b = append(b, '}')
	}
	b[0] = '{'
	if p.ev.metadata = b; len(b) > maxMetadataBytes {
		p.addf("metadata", codeMaxLength, "has %d bytes with name and category, the limit is %d", len(b), maxMetadataBytes)
	}
}

var (
	channelWeb, channelMobile, channelAPI = []byte("web"), []byte("mobile_app"), []byte("api")

	mobileLibraries = []string{"-ios", "-android", "-swift", "-kotlin", "react-native", "flutter"} // in their names
)

// channelOf returns an event's channel, by where the message says that it comes from.
func (p *eventParser) channelOf(m *message) []byte {
	switch string(p.word(&m.channel)) {
	case "browser":
		return channelWeb
	case "mobile":
		return channelMobile
	case "server":
		return channelAPI
	}
	library := p.word(&m.library)
	if string(library) == "analytics.js" {
		return channelWeb
	}
	for _, mobile := range mobileLibraries {
		if bytes.Contains(library, []byte(mobile)) { // no copy: it is short
			return channelMobile
		}
	}
	return channelAPI
}

// isoForms are the ISO 8601 times that clients send; each also takes a fraction of a second.
var isoForms = []string{time.RFC3339, "2006-01-02T15:04:05Z0700", "2006-01-02T15:04:05", "2006-01-02 15:04:05", time.DateOnly}

// isoTime takes a timestamp down to the second. One without a zone is UTC.
func (p *eventParser) isoTime(v *jsonValue) {
	text := p.word(v)
	for _, form := range isoForms {
		if at, err := time.Parse(form, string(text)); err == nil {
			p.ev.timestamp = at.Unix()
			return
		}
	}
	p.addf("timestamp", codeInvalidFormat, "must be a time of ISO 8601, such as 2026-01-31T14:00:00.000Z")
}

// answer says 200 only when Kafka has every valid item.
func (s *segment) answer(w http.ResponseWriter, q *ingestRequest, stored bool) {
	success := q.acknowledged()
	s.in.stats.accepted.Add(success)
	s.in.stats.refused.Add(q.failed)
	if late := len(q.records) - success; late > 0 {
		s.in.stats.unavailable.Add(late)
		writeUnavailable(w, q.failure())
		return
	}
	end := `]}`
	if stored {
		end = `],"status":"stored"}`
	}
	writeJSON(w, http.StatusOK, []byte(`{"success":true,"errors":[`), q.errors.Bytes(), []byte(end))
}

// appendItemEntries appends an entry for each problem of an item.
func appendItemEntries(dst []byte, index int, problems []problem) []byte {
	return appendProblems(dst, problems, fmt.Sprintf(`{"index":%d,`, index), "error")
}

// newLineCheck is the check of one line of an import: an event's JSON, or a message's. value is the canonical JSON of a good event, nil
// for a message that is not stored; it and user are valid until the next call. refused has field, code and message of each problem.
// What makes an event this one has to be in the file, or importing it again would count it twice: its time as well.
func newLineCheck(skew time.Duration) func(line []byte, segment bool) (value []byte, id [32]byte, at int64, user []byte, refused [][3]string) {
	p, m := new(eventParser), new(message)
	fields := m.fields()
	var idInput []byte
	return func(line []byte, segment bool) (value []byte, id [32]byte, at int64, user []byte, refused [][3]string) {
		ev, _, err := (*event)(nil), []problem(nil), error(nil)
		if !segment {
			ev, _, err = p.parse(line)
		} else if err = p.parseMessage(m, fields, line); err == nil {
			if ev = p.fromMessage(m, "batch", 0); ev == nil {
				return nil, id, 0, nil, nil
			}
			if len(m.timestamp.raw)+len(m.originalTimestamp.raw) == 0 {
				p.addf("timestamp", codeRequired, "is required")
			}
		}
		if err != nil {
			return nil, id, 0, nil, [][3]string{{"", codeInvalidFormat, err.Error()}}
		}
		if len(p.problems) == 0 {
			p.checkImported(time.Now().Unix(), int64(skew/time.Second))
		}
		for _, is := range p.problems {
			refused = append(refused, [3]string{is.field, is.code, is.message})
		}
		if len(refused) > 0 {
			return nil, id, 0, nil, refused
		}
		var ok eventID
		ok, idInput = ev.id(idInput)
		return appendEvent(nil, ev), ok, ev.timestamp, ev.userID, nil
	}
}

// parseMessage reads a text that is one message and nothing else.
func (p *eventParser) parseMessage(m *message, fields map[string]*jsonValue, text []byte) error {
	*m = message{}
	r := &p.json
	r.reset(text)
	if r.space(); r.i == len(text) {
		return errNoEvent
	}
	err := m.read(r, fields, p)
	return cmp.Or(r.end(), err)
}
