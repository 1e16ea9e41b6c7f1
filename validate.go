// The rules of an event.
//
// validate.go turns the bytes of one JSON object into an event and says everything that is wrong with it. It owns the
// error codes that clients switch on.

package main

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"math"
	"math/bits"
	"slices"
	"strconv"
	"unicode/utf8"
)

// Limits of one event, as the OpenAPI document has them. Lengths are in Unicode code points, metadata in bytes as sent.
const (
	maxTextChars     = 100
	maxTags          = 20
	maxMetadataBytes = 16 << 10
	maxProblems      = 20
	maxAgeSeconds    = 30 * 24 * 3600
	// minMilliseconds is the year 5138 in seconds and March 1973 in milliseconds: beyond it nobody means seconds.
	minMilliseconds = 100_000_000_000
)

// Codes that a client can switch on; the message beside one may change, the code does not.
const (
	codeRequired       = "validation.required.error"
	codeMaxLength      = "validation.max-length.error"
	codeInvalidFormat  = "validation.invalid-format.error"
	codeInvalidChannel = "validation.invalid-channel.error"
	codeFuture         = "validation.timestamp-future.error"
	codeExpired        = "validation.timestamp-expired.error"
	codeMaxTags        = "validation.max-tags.error"
	codeTagTooLong     = "validation.tag-too-long.error"
)

// problem is one broken rule. field is one of fieldNames, or whatever the client called it.
type problem struct {
	field, code, message string
}

var (
	errNotObject    = errors.New("an event must be a JSON object")
	errNoEvent      = errors.New("the event is empty")
	errEventTooDeep = fmt.Errorf("values are nested more than %d deep", maxDepth)
)

// eventParser parses events one after another without garbage: it reuses its scratch space. It is not for concurrent use: each
// worker and each request has its own.
type eventParser struct {
	json     jsonReader
	ev       event
	seen     fieldSet
	named    fieldSet // by a member, whatever its value
	problems []problem
	metadata []byte
	scratch  []byte // texts of the event that were sent with escapes; at most 25 of them, each maxTextBytes
}

// fieldSet has a bit for each known field, to notice one that is sent twice. At event it says what else a new field needs.
type fieldSet uint16

const (
	fieldName fieldSet = 1 << iota
	fieldUserID
	fieldTimestamp
	fieldChannel
	fieldCampaignID
	fieldTags
	fieldMetadata
	fieldInsertID
)

// fieldNames are the fields of an event, in the order of their bits.
var fieldNames = [...]string{"event_name", "user_id", "timestamp", "channel", "campaign_id", "tags", "metadata", "insert_id"}

// form is what a field's value has to be.
func (f fieldSet) form() (kind byte, text string) {
	switch f {
	case fieldTimestamp:
		return 0, "an integer of Unix seconds"
	case fieldTags:
		return '[', "an array of strings"
	case fieldMetadata:
		return '{', "an object"
	}
	return '"', "a string"
}

// name is that of the first field in f.
func (f fieldSet) name() string { return fieldNames[bits.TrailingZeros16(uint16(f))] }

// parse reads one event from raw and checks every rule that does not need a clock. A good event has no problems. The error
// means that raw is no JSON object. Event and problems are valid until the next parse, or until raw changes.
func (p *eventParser) parse(raw []byte) (*event, []problem, error) {
	r := &p.json
	r.reset(raw)
	if r.space(); r.i == len(raw) {
		return nil, nil, errNoEvent
	}
	ev, err := p.read(r)
	if end := r.end(); end != nil {
		err = end
	}
	return ev, p.problems, err
}

// read is parse for an event in the middle of a text, whose problems it leaves in p. A member that is no field of an event only
// has to be JSON. An error that the reader does not have, too, is about this one event: the reader has got past it, and what
// follows can be read.
func (p *eventParser) read(r *jsonReader) (*event, error) {
	p.begin()
	var k, v jsonValue
	deepest, err := 0, r.object()
	for n := 0; err == nil && r.member(n, &k, &v); n++ {
		p.member(&k, &v)
		deepest = max(deepest, v.depth)
	}
	switch {
	case err != nil || r.err != nil:
		return nil, cmp.Or(r.err, err)
	case deepest >= maxDepth: // and the event is a bracket itself
		return nil, errEventTooDeep
	}
	p.finish()
	return &p.ev, nil
}

// object steps into an object; another value is read and errNotObject.
func (r *jsonReader) object() error {
	if r.eat('{') {
		return nil
	}
	r.value()
	return cmp.Or(r.err, errNotObject)
}

func (p *eventParser) begin() {
	p.problems, p.scratch = p.problems[:0], p.scratch[:0]
	p.seen, p.named = 0, 0
	p.ev = event{tags: p.ev.tags[:0]}
}

func (p *eventParser) finish() {
	const required = fieldName | fieldUserID | fieldTimestamp
	for missing := required &^ p.seen; missing != 0; missing &= missing - 1 {
		p.addf(missing.name(), codeRequired, "is required")
	}
}

func (p *eventParser) member(k, v *jsonValue) {
	var f fieldSet
	if len(k.raw) <= maxNameBytes { // Fast path: what is longer is no name of ours, however it is spelled.
		f = fieldByName(p.word(k))
	}
	switch {
	case k.badText || v.badText:
		p.seen |= f
		if len(p.problems) < maxProblems { // a name costs an allocation
			p.addf(clip(k.raw[1:len(k.raw)-1]), codeInvalidFormat, "is not valid UTF-8 text")
		}
	case p.named&f != 0:
		p.addf(f.name(), codeInvalidFormat, "appears more than once")
	case f != 0:
		p.field(f, v)
	}
	p.named |= f
}

// In a JSON string a character takes at most 12 bytes, as a surrogate pair of escapes; in a field's name, 6.
const (
	maxTextBytes = 12*maxTextChars + len(`""`)
	maxNameBytes = 6*len("event_name_") + len(`""`)
)

// clip shortens a name that the client made up, for a message.
func clip(name []byte) string {
	const most = 40
	if len(name) <= most {
		return string(bytes.ToValidUTF8(name, []byte("�")))
	}
	return string(bytes.ToValidUTF8(name[:most], []byte("�"))) + "…"
}

// fieldByName is a switch, whose texts the compiler compares in place; a loop over fieldNames is slower.
func fieldByName(key []byte) fieldSet {
	switch string(key) {
	case "event_name":
		return fieldName
	case "user_id":
		return fieldUserID
	case "timestamp":
		return fieldTimestamp
	case "channel":
		return fieldChannel
	case "campaign_id":
		return fieldCampaignID
	case "tags":
		return fieldTags
	case "metadata":
		return fieldMetadata
	case "insert_id":
		return fieldInsertID
	}
	return 0
}

// field checks a field's value and puts it into the event.
func (p *eventParser) field(f fieldSet, v *jsonValue) {
	if v.kind == 'n' || f&(fieldName|fieldUserID) != 0 && string(v.raw) == `""` {
		return // absent
	}
	p.seen |= f
	if kind, form := f.form(); v.kind != kind {
		p.addf(f.name(), codeInvalidFormat, "must be %s, not %s", form, kindNames[v.kind])
		return
	}
	switch f {
	case fieldName:
		p.ev.name = p.text(f, codeMaxLength, v)
	case fieldUserID:
		p.ev.userID = p.text(f, codeMaxLength, v)
	case fieldCampaignID:
		p.ev.campaignID = p.text(f, codeMaxLength, v)
	case fieldInsertID:
		p.ev.insertID = p.text(f, codeMaxLength, v)
	case fieldChannel:
		p.channel(v)
	case fieldTimestamp:
		p.timestamp(v)
	case fieldTags:
		p.tags(v)
	case fieldMetadata:
		p.meta(v)
	}
}

// text is a string's text, with its problems noted under f.
func (p *eventParser) text(f fieldSet, tooLong string, v *jsonValue) []byte {
	if len(v.raw) > maxTextBytes { // whatever is in it: not worth unescaping
		p.addf(f.name(), tooLong, "has %d bytes, the limit is %d characters", len(v.raw)-len(`""`), maxTextChars)
		return nil
	}
	b := v.text(&p.scratch)
	if len(b) > maxTextChars {
		if n := utf8.RuneCount(b); n > maxTextChars {
			p.addf(f.name(), tooLong, "has %d characters, the limit is %d", n, maxTextChars)
		}
	}
	for _, c := range b {
		if c < 0x20 || c == 0x7f {
			p.addf(f.name(), codeInvalidFormat, "contains the control character U+%04X", c)
			break
		}
	}
	return b
}

func (p *eventParser) channel(v *jsonValue) {
	if len(v.raw) <= maxTextBytes {
		p.ev.channel = v.text(&p.scratch)
	}
	if !validChannel(p.ev.channel) || len(v.raw) > maxTextBytes {
		p.addf("channel", codeInvalidChannel, "must be one of web, mobile_app, api, not %s", clip(v.raw))
	}
}

func validChannel(b []byte) bool {
	switch string(b) {
	case "", "web", "mobile_app", "api":
		return true
	}
	return false
}

func (p *eventParser) timestamp(v *jsonValue) {
	n, err := integer64(v.raw)
	if err != nil {
		p.addf("timestamp", codeInvalidFormat, "must be an integer of Unix seconds")
		return
	}
	if n >= minMilliseconds {
		p.addf("timestamp", codeInvalidFormat, "looks like milliseconds or finer, send Unix seconds: %d", n)
		return
	}
	p.ev.timestamp = n
}

// integer64 reads a number of JSON that is an integer.
func integer64(raw []byte) (int64, error) {
	n := int64(0)
	for i, c := range raw {
		if c < '0' || c > '9' || i > 17 { // Slow path: 1795441976.0 is the same number, and some languages write it so
			f, err := strconv.ParseFloat(string(raw), 64)
			if err != nil || f != math.Trunc(f) || math.Abs(f) >= 1<<53 {
				return 0, errors.New("not an integer")
			}
			return int64(f), nil
		}
		n = 10*n + int64(c-'0')
	}
	return n, nil
}

func (p *eventParser) tags(v *jsonValue) {
	r := jsonReader{b: v.raw, i: len(`[`)} // it has been read without an error before
	n := 0
	for ; r.more(n, ']'); n++ {
		t := r.value()
		if n >= maxTags {
			continue
		}
		before := len(p.problems)
		if t.kind == '"' {
			p.ev.tags = append(p.ev.tags, p.text(fieldTags, codeTagTooLong, &t))
		} else {
			p.addf("tags", codeInvalidFormat, "must be a string, not %s", kindNames[t.kind])
		}
		for j := before; j < len(p.problems); j++ {
			p.problems[j].message = fmt.Sprintf("tags[%d] %s", n, p.problems[j].message[len("tags "):])
		}
	}
	if n > maxTags {
		p.addf("tags", codeMaxTags, "has %d items, the limit is %d", n, maxTags)
	}
}

func (p *eventParser) meta(v *jsonValue) {
	if len(v.raw) > maxMetadataBytes {
		p.addf("metadata", codeMaxLength, "has %d bytes, the limit is %d", len(v.raw), maxMetadataBytes)
		return
	}
	p.ev.metadata = v.raw
	if v.spaced {
		p.metadata = v.appendCompact(p.metadata[:0])
		p.ev.metadata = p.metadata
	}
}

// checkAge adds the rules that need a clock: now is in Unix seconds, and a sender's clock may be ahead by skew seconds. parse
// does without, because a record that waited on Kafka while ClickHouse was down has been accepted and does not expire.
func (p *eventParser) checkAge(now, skew int64) []problem {
	if p.seen&fieldTimestamp == 0 || slices.ContainsFunc(p.problems, func(is problem) bool { return is.field == "timestamp" }) {
		return p.problems
	}
	switch ts := p.ev.timestamp; {
	case ts > now+skew:
		p.addf("timestamp", codeFuture, "%d is %d s in the future", ts, ts-now)
	case ts < now-maxAgeSeconds:
		p.addf("timestamp", codeExpired, "%d is more than 30 days old", ts)
	}
	return p.problems
}

// checkImported is checkAge for what is imported: it may be of any age that the tables hold.
func (p *eventParser) checkImported(now, skew int64) []problem {
	p.problems = slices.DeleteFunc(p.checkAge(now, skew), func(is problem) bool { return is.code == codeExpired })
	if !p.ev.storable() && len(p.problems) == 0 {
		p.addf("timestamp", codeInvalidFormat, "%d is not within 1970 to 2106", p.ev.timestamp)
	}
	return p.problems
}

// addf is the slow path: only a bad event pays for messages, and only for those that are reported.
func (p *eventParser) addf(field, code, format string, args ...any) {
	if len(p.problems) < maxProblems {
		p.problems = append(p.problems, problem{field, code, field + " " + fmt.Sprintf(format, args...)})
	}
}
