// The rules of an event.
//
// validate.go turns the bytes of one JSON object into an event and says everything that is wrong with it. It owns the
// error codes that clients switch on.

package main

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/valyala/fastjson"
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

// Limits of what fastjson gets: an event that has more values or bytes is given to it hollow.
const (
	// maxValues bounds what a parser keeps. Each slot of its tree keeps room for the most members, and for the most items, that it
	// ever had: events whose shapes shift leave it with maxValues²/2 of each, 92 KB. A tree of [0,0,…] of 64 KiB would cost 14 MB
	// of garbage.
	maxValues = 64
	maxParsed = 4 << 10 // bytes
)

// eventParser parses events one after another without garbage: it reuses its scratch space. It is not for concurrent use: each
// worker and each request has its own.
type eventParser struct {
	json     skimmer
	fast     fastjson.Parser
	ev       event
	seen     fieldSet
	named    fieldSet           // by a member, whatever its value
	members  [maxValues]skimmed // what fastjson visits, in that order
	visited  int                // of them
	problems []problem
	metadata []byte
	scratch  []byte
	unknown  func(name []byte) // told the name, quoted as it was sent, of each member that is no field of ours; may be nil
}

// parse reads one event from raw and checks every rule that does not need a clock. A good event has no problems. The error
// means that raw is no JSON object. Event and problems are valid until the next parse, or until raw changes.
func (p *eventParser) parse(raw []byte) (*event, []problem, error) {
	r := &p.json
	r.reset(raw)
	if r.peek() == 0 && r.i == len(raw) {
		return nil, nil, errNoEvent
	}
	ev, err := p.read(r)
	if end := r.end(); end != nil {
		err = end
	}
	return ev, p.problems, err
}

// read is parse for an event in the middle of a text, whose problems it leaves in p. A member that is no field of an event only
// has to be JSON. An error that the skimmer does not have, too, is about this one event: the skimmer has got past it, and what
// follows can be read.
func (p *eventParser) read(r *skimmer) (*event, error) {
	p.problems, p.seen, p.named, p.visited = p.problems[:0], 0, 0, 0
	p.ev = event{tags: p.ev.tags[:0]}
	if !r.eat('{') {
		r.value()
		return nil, cmp.Or(r.err, errNotObject)
	}
	start, values, deepest := r.i-1, 1, 0
	from, to := r.i, r.i // what is cut out: the inside of metadata that stays as it was sent
	for n := 0; ; n++ {
		m := &p.members[min(n, maxValues-1)]
		if !r.member(n, m) {
			break
		}
		values += m.values
		deepest = max(deepest, m.depth)
		if from == to && !m.spaced && m.raw[0] == '{' && string(m.name) == `"metadata"` {
			from, to = r.i-len(m.raw)+1, r.i-1
			values -= m.values - 1
		}
	}
	switch {
	case r.err != nil:
		return nil, r.err
	case deepest >= maxDepth: // and the event is a bracket itself
		return nil, errEventTooDeep
	}
	if values > maxValues || r.i-start-(to-from) > maxParsed { // Slow path
		p.hollow(r, start)
	} else {
		p.scratch = append(append(p.scratch[:0], r.b[start:from]...), r.b[to:r.i]...)
	}
	parser, text := &p.fast, p.scratch
	if len(text) > maxParsed { // Slow path: long texts. What has held them is thrown away.
		parser, p.scratch = new(fastjson.Parser), nil
	}
	v, err := parser.ParseBytes(text)
	if err != nil {
		return nil, err
	}
	v.GetObject().Visit(p.member)
	const required = fieldName | fieldUserID | fieldTimestamp
	for missing := required &^ p.seen; missing != 0; missing &= missing - 1 {
		p.addf(missing.name(), codeRequired, "is required")
	}
	return &p.ev, nil
}

// maxHollow is how many members a hollow event may have: the fields, and more than maxProblems that are wrong.
const maxHollow = 32

// hollow leaves in p.scratch the event that begins at start, without what no rule looks at, and has p.members stand for what is
// left: at most maxHollow of them and maxTags. The skimmer is at its end again.
func (p *eventParser) hollow(r *skimmer, start int) {
	end, hollow, members, named := r.i, append(p.scratch[:0], '{'), 0, fieldSet(0)
	r.i = start + len("{")
	var m skimmed
	for n := 0; members < maxHollow && r.member(n, &m); n++ {
		f := fieldSet(0)
		if len(m.name) <= maxNameBytes {
			f = fieldByName(r.word(m.name))
		}
		if f == 0 && !m.badText {
			if p.unknown != nil {
				p.unknown(m.name)
			}
			continue
		}
		p.members[members] = m
		if members++; members > 1 {
			hollow = append(hollow, ',')
		}
		hollow = append(append(hollow, m.name...), ':')
		switch {
		case named&f != 0:
			hollow = append(hollow, "null"...)
		case f == fieldTags && m.raw[0] == '[':
			hollow = append(hollow, '[')
			after := r.i
			r.i -= len(m.raw) - len("[")
			for i := 0; i < min(m.items, maxTags) && r.more(i, ']'); i++ {
				if i > 0 {
					hollow = append(hollow, ',')
				}
				hollow = appendHollow(hollow, r.value().raw)
			}
			hollow, r.i = append(hollow, ']'), after
		default:
			hollow = appendHollow(hollow, m.raw)
		}
		named |= f
	}
	p.scratch, r.i = append(hollow, '}'), end
}

// appendHollow appends a value without what is in it.
func appendHollow(dst, raw []byte) []byte {
	if raw[0] == '{' || raw[0] == '[' {
		return append(dst, raw[0], raw[0]+2) // } or ]
	}
	return append(dst, raw...)
}

// member takes in a member that fastjson has read.
func (p *eventParser) member(name []byte, v *fastjson.Value) {
	m := &p.members[p.visited]
	p.visited++
	f := fieldByName(name)
	switch {
	case m.badText:
		p.seen |= f
		if len(p.problems) < maxProblems { // a name costs an allocation
			p.addf(clip(m.name[1:len(m.name)-1]), codeInvalidFormat, "is not valid UTF-8 text")
		}
	case p.named&f != 0:
		p.addf(f.name(), codeInvalidFormat, "appears more than once")
	case f != 0:
		p.field(f, m, v)
	case p.unknown != nil: // a newer program may have written it
		p.unknown(m.name)
	}
	p.named |= f
}

// maxTextBytes is what a text takes as it is sent: a character has at most 12 bytes, as a surrogate pair of escapes.
const maxTextBytes = 12*maxTextChars + len(`""`)

// clip shortens a name that the client made up, for a message.
func clip(name []byte) string {
	const most = 40
	if len(name) <= most {
		return string(bytes.ToValidUTF8(name, []byte("�")))
	}
	return string(bytes.ToValidUTF8(name[:most], []byte("�"))) + "…"
}

// form is what a field's value has to be.
func (f fieldSet) form() (kind fastjson.Type, description string) {
	switch f {
	case fieldTimestamp:
		return fastjson.TypeNumber, "an integer of Unix seconds"
	case fieldTags:
		return fastjson.TypeArray, "an array of strings"
	case fieldMetadata:
		return fastjson.TypeObject, "an object"
	}
	return fastjson.TypeString, "a string"
}

// field checks a field's value and puts it into the event.
func (p *eventParser) field(f fieldSet, m *skimmed, v *fastjson.Value) {
	kind := v.Type()
	if kind == fastjson.TypeNull || f&(fieldName|fieldUserID) != 0 && string(m.raw) == `""` {
		return // absent
	}
	p.seen |= f
	if want, form := f.form(); kind != want {
		p.addf(f.name(), codeInvalidFormat, "must be %s, not %s", form, kind)
		return
	}
	switch f {
	case fieldName:
		p.ev.name = p.text(f, codeMaxLength, len(m.raw), v)
	case fieldUserID:
		p.ev.userID = p.text(f, codeMaxLength, len(m.raw), v)
	case fieldCampaignID:
		p.ev.campaignID = p.text(f, codeMaxLength, len(m.raw), v)
	case fieldInsertID:
		p.ev.insertID = p.text(f, codeMaxLength, len(m.raw), v)
	case fieldChannel:
		p.channel(m.raw, v)
	case fieldTimestamp:
		p.timestamp(m.raw)
	case fieldTags:
		p.tags(m, v)
	case fieldMetadata:
		p.meta(m, v)
	}
}

// text is a string's text, which was sent as size bytes, with its problems noted under f.
func (p *eventParser) text(f fieldSet, tooLong string, size int, v *fastjson.Value) []byte {
	if size > maxTextBytes { // whatever is in it
		p.addf(f.name(), tooLong, "has %d bytes, the limit is %d characters", size-len(`""`), maxTextChars)
		return nil
	}
	b, _ := v.StringBytes()
	if len(b) > maxTextChars {
		if n := utf8.RuneCount(b); n > maxTextChars {
			p.addf(f.name(), tooLong, "has %d characters, the limit is %d", n, maxTextChars)
		}
	}
	for i := 0; i < len(b); i++ {
		if i+8 <= len(b) && maybeControl(binary.LittleEndian.Uint64(b[i:])) == 0 { // Fast path
			i += 7
			continue
		}
		if c := b[i]; c < 0x20 || c == 0x7f || c == 0xc2 && i+1 < len(b) && b[i+1] < 0xa0 { // U+0080 to U+009F are C2 80 to C2 9F
			r, _ := utf8.DecodeRune(b[i:])
			p.addf(f.name(), codeInvalidFormat, "contains the control character U+%04X", r)
			break
		}
	}
	return b
}

func (p *eventParser) channel(raw []byte, v *fastjson.Value) {
	if len(raw) <= maxTextBytes {
		p.ev.channel, _ = v.StringBytes()
	}
	if !validChannel(p.ev.channel) || len(raw) > maxTextBytes {
		p.addf("channel", codeInvalidChannel, "must be one of web, mobile_app, api, not %s", clip(raw))
	}
}

func validChannel(b []byte) bool {
	switch string(b) {
	case "", "web", "mobile_app", "api":
		return true
	}
	return false
}

func (p *eventParser) timestamp(raw []byte) {
	n, err := integer64(raw)
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

func (p *eventParser) tags(m *skimmed, v *fastjson.Value) {
	items, _ := v.Array()
	for n, item := range items[:min(len(items), maxTags)] {
		before, size := len(p.problems), 0
		if len(m.raw) > maxTextBytes { // it may be too long
			p.scratch = item.MarshalTo(p.scratch[:0]) // as it was sent, until it is asked for its type
			size = len(p.scratch)
		}
		if kind := item.Type(); kind == fastjson.TypeString {
			p.ev.tags = append(p.ev.tags, p.text(fieldTags, codeTagTooLong, size, item))
		} else {
			p.addf("tags", codeInvalidFormat, "must be a string, not %s", kind)
		}
		for j := before; j < len(p.problems); j++ {
			p.problems[j].message = fmt.Sprintf("tags[%d] %s", n, p.problems[j].message[len("tags "):])
		}
	}
	if m.items > maxTags {
		p.addf("tags", codeMaxTags, "has %d items, the limit is %d", m.items, maxTags)
	}
}

// meta keeps metadata as it was sent, but for white space between its tokens.
func (p *eventParser) meta(m *skimmed, v *fastjson.Value) {
	switch {
	case len(m.raw) > maxMetadataBytes:
		p.addf("metadata", codeMaxLength, "has %d bytes, the limit is %d", len(m.raw), maxMetadataBytes)
	case !m.spaced: // Fast path
		p.ev.metadata = m.raw
	case m.items > 0 && v.GetObject().Len() == 0: // it is hollow
		b := bytes.NewBuffer(p.metadata[:0])
		json.Compact(b, m.raw) // which has been skimmed
		p.metadata = b.Bytes()
		p.ev.metadata = p.metadata
	default:
		p.metadata = v.MarshalTo(p.metadata[:0])
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

// decode reads a record's value as an event, which lives until the next call. The API's rules hold for other producers
// too, except the age: a record may have waited.
func (p *eventParser) decode(value []byte) (*event, error) {
	ev, problems, err := p.parse(value)
	switch {
	case err != nil:
		return nil, fmt.Errorf("not an event's JSON: %w", err)
	case len(problems) > 0:
		return nil, errors.New(withoutText(problems[0]))
	case !ev.storable():
		return nil, errors.New("timestamp is not within 1970 to 2106")
	}
	return ev, nil
}

// withoutText is a problem's message without what the record has: it goes into the log and into headers.
func withoutText(p problem) string {
	switch message, _, _ := strings.Cut(p.message, ": "); {
	case p.code == codeInvalidChannel:
		return "channel is not one of web, mobile_app, api"
	case strings.HasSuffix(message, "is not valid UTF-8 text"): // of a member with any name
		return "a text is not valid UTF-8"
	default:
		return message
	}
}
