// The rules of an event.
//
// validate.go turns the bytes of one JSON object into an event and says everything that is wrong with it. It owns the
// error codes that clients switch on.

package main

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"unicode/utf8"

	"github.com/valyala/fastjson"
)

// Limits of one event, from contract.md. Lengths are in Unicode code points, metadata in bytes as sent.
const (
	maxTextChars     = 100
	maxTags          = 20
	maxMetadataBytes = 16 << 10
	maxAgeSeconds    = 30 * 24 * 3600
	clockSlackSecs   = 1
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

// problem is one broken rule. field is a name of the table in contract.md, or whatever the client called it.
type problem struct {
	field, code, message string
}

var (
	errNotObject    = errors.New("an event must be a JSON object")
	errNoEvent      = errors.New("the event is empty")
	errEventTooDeep = errors.New("values are nested more than 300 deep")
)

// eventParser parses events one after another without garbage: it keeps the JSON tree and the scratch space of the
// last one. It is not for concurrent use; get one from the pool of whoever parses.
type eventParser struct {
	json     fastjson.Parser
	ev       event
	seen     fieldSet
	problems []problem
	metadata []byte
	scratch  []byte
}

// fieldSet has a bit for each known field, to notice one that is sent twice.
type fieldSet uint8

const (
	fieldName fieldSet = 1 << iota
	fieldUserID
	fieldTimestamp
	fieldChannel
	fieldCampaignID
	fieldTags
	fieldMetadata
)

// parse reads one event from raw and checks every rule that does not need a clock. The problems are empty for a good
// event. The error is for raw that is no JSON object at all. Event and problems live until the next parse.
func (p *eventParser) parse(raw []byte) (*event, []problem, error) {
	p.problems = p.problems[:0]
	p.seen = 0
	p.ev = event{tags: p.ev.tags[:0]}
	v, err := parseJSON(&p.json, raw)
	if err != nil {
		return nil, nil, err
	}
	obj, err := v.Object()
	if err != nil {
		return nil, nil, errNotObject
	}
	// Slow path: text that is not Unicode is looked for value by value only when the event has any.
	badText := hasBadText(raw)
	obj.Visit(func(key []byte, v *fastjson.Value) {
		if badText {
			p.scratch = v.MarshalTo(append(p.scratch[:0], key...))
			if hasBadText(p.scratch) {
				p.addf(string(bytes.ToValidUTF8(key, []byte("�"))), codeInvalidFormat, "is not valid UTF-8 text")
				p.seen |= fieldByName(key)
				return
			}
		}
		p.field(key, v, raw)
	})
	p.require(fieldName, "event_name")
	p.require(fieldUserID, "user_id")
	p.require(fieldTimestamp, "timestamp")
	return &p.ev, p.problems, nil
}

// parseJSON parses and then validates: fastjson's parser takes numbers and escapes that are not JSON, and its
// validator recurses without a limit on depth, which the parser has.
func parseJSON(p *fastjson.Parser, raw []byte) (*fastjson.Value, error) {
	if len(raw) == 0 {
		return nil, errNoEvent
	}
	v, err := p.ParseBytes(raw)
	if err != nil {
		if bytes.Contains([]byte(err.Error()), []byte("too big depth")) {
			return nil, errEventTooDeep
		}
		return nil, jsonError(err)
	}
	if err := fastjson.ValidateBytes(raw); err != nil {
		return nil, jsonError(err)
	}
	return v, nil
}

// jsonError keeps the reason of a fastjson error, without the copy of the input's whole tail that follows it.
func jsonError(err error) error {
	const most = 160
	s := err.Error()
	if len(s) > most {
		s = s[:most] + "…"
	}
	return errors.New(string(bytes.ToValidUTF8([]byte(s), []byte("�"))))
}

func fieldByName(key []byte) fieldSet {
	switch string(key) { // no copy: the compiler compares in place
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
	}
	return 0
}

func (p *eventParser) field(key []byte, v *fastjson.Value, raw []byte) {
	f := fieldByName(key)
	if f == 0 {
		return
	}
	if p.seen&f != 0 {
		p.addf(string(key), codeInvalidFormat, "appears more than once")
		return
	}
	if v.Type() == fastjson.TypeNull {
		return // absent
	}
	p.seen |= f
	switch f {
	case fieldName:
		p.ev.name = p.text("event_name", v)
		if len(p.ev.name) == 0 {
			p.missing(f)
		}
	case fieldUserID:
		p.ev.userID = p.text("user_id", v)
		if len(p.ev.userID) == 0 {
			p.missing(f)
		}
	case fieldCampaignID:
		p.ev.campaignID = p.text("campaign_id", v)
	case fieldChannel:
		p.channel(v)
	case fieldTimestamp:
		p.timestamp(v)
	case fieldTags:
		p.tags(v)
	case fieldMetadata:
		p.meta(v, raw)
	}
}

// missing takes back that a field was seen when it is an empty string without a problem of its own.
func (p *eventParser) missing(f fieldSet) {
	if n := len(p.problems); n > 0 && fieldByName([]byte(p.problems[n-1].field)) == f {
		return
	}
	p.seen &^= f
}

func (p *eventParser) require(f fieldSet, name string) {
	if p.seen&f == 0 {
		p.addf(name, codeRequired, "is required")
	}
}

func (p *eventParser) text(field string, v *fastjson.Value) []byte {
	b, err := v.StringBytes()
	if err != nil {
		p.addf(field, codeInvalidFormat, "must be a string, not %s", v.Type())
		return nil
	}
	p.checkText(field, codeMaxLength, b)
	return b
}

func (p *eventParser) checkText(field, tooLong string, b []byte) {
	if len(b) > maxTextChars {
		if n := utf8.RuneCount(b); n > maxTextChars {
			p.addf(field, tooLong, "has %d characters, the limit is %d", n, maxTextChars)
		}
	}
	for _, c := range b {
		if c < 0x20 || c == 0x7f {
			p.addf(field, codeInvalidFormat, "contains the control character U+%04X", c)
			return
		}
	}
}

func (p *eventParser) channel(v *fastjson.Value) {
	b, err := v.StringBytes()
	if err != nil {
		p.addf("channel", codeInvalidFormat, "must be a string, not %s", v.Type())
		return
	}
	if !validChannel(b) {
		p.addf("channel", codeInvalidChannel, "must be one of web, mobile_app, api, not %.100q", b)
		return
	}
	p.ev.channel = b
}

func validChannel(b []byte) bool {
	switch string(b) {
	case "", "web", "mobile_app", "api":
		return true
	}
	return false
}

func (p *eventParser) timestamp(v *fastjson.Value) {
	if v.Type() != fastjson.TypeNumber {
		p.addf("timestamp", codeInvalidFormat, "must be an integer of Unix seconds, not %s", v.Type())
		return
	}
	n, err := v.Int64()
	if err != nil { // Slow path: 1795441976.0 is the same number, and some languages write it so
		f := v.GetFloat64()
		if n = int64(f); f != math.Trunc(f) || math.Abs(f) >= 1<<53 {
			p.addf("timestamp", codeInvalidFormat, "must be an integer of Unix seconds")
			return
		}
	}
	if n >= minMilliseconds {
		p.addf("timestamp", codeInvalidFormat, "looks like milliseconds or finer, send Unix seconds: %d", n)
		return
	}
	p.ev.timestamp = n
}

func (p *eventParser) tags(v *fastjson.Value) {
	list, err := v.Array()
	if err != nil {
		p.addf("tags", codeInvalidFormat, "must be an array of strings, not %s", v.Type())
		return
	}
	if len(list) > maxTags {
		p.addf("tags", codeMaxTags, "has %d items, the limit is %d", len(list), maxTags)
		return
	}
	for i, t := range list {
		b, err := t.StringBytes()
		if err != nil {
			p.addf("tags", codeInvalidFormat, "tags[%d] must be a string, not %s", i, t.Type())
			continue
		}
		before := len(p.problems)
		p.checkText("tags", codeTagTooLong, b)
		for j := before; j < len(p.problems); j++ {
			p.problems[j].message = fmt.Sprintf("tags[%d] %s", i, p.problems[j].message[len("tags "):])
		}
		p.ev.tags = append(p.ev.tags, b)
	}
}

func (p *eventParser) meta(v *fastjson.Value, raw []byte) {
	if v.Type() != fastjson.TypeObject {
		p.addf("metadata", codeInvalidFormat, "must be an object, not %s", v.Type())
		return
	}
	// Before anything looks inside: fastjson writes strings and keys as they were sent only while nobody has read
	// them; afterwards it writes them back with Go's escapes, which are not JSON's.
	p.metadata = v.MarshalTo(p.metadata[:0])
	size := len(p.metadata)
	if len(raw) > maxMetadataBytes { // Fast path: no event this small can hold metadata that is too big.
		if sent := memberSize(raw, "metadata"); sent > size {
			size = sent
		}
	}
	if size > maxMetadataBytes {
		p.addf("metadata", codeMaxLength, "has %d bytes, the limit is %d", size, maxMetadataBytes)
		return
	}
	p.ev.metadata, p.ev.meta = p.metadata, v
}

// checkAge adds the rules that need a clock: now is Unix seconds. It is apart from parse because a record that waited
// on Kafka while ClickHouse was down has been accepted and does not expire.
func (p *eventParser) checkAge(now int64) []problem {
	if p.seen&fieldTimestamp == 0 {
		return p.problems
	}
	for i := range p.problems {
		if p.problems[i].field == "timestamp" {
			return p.problems
		}
	}
	switch ts := p.ev.timestamp; {
	case ts > now+clockSlackSecs:
		p.addf("timestamp", codeFuture, "%d is %d s in the future", ts, ts-now)
	case ts < now-maxAgeSeconds:
		p.addf("timestamp", codeExpired, "%d is more than 30 days old", ts)
	}
	return p.problems
}

// addf is the slow path: only a bad event pays for the message.
func (p *eventParser) addf(field, code, format string, args ...any) {
	p.problems = append(p.problems, problem{field, code, field + " " + fmt.Sprintf(format, args...)})
}
