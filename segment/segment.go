// Package segment translates the messages of Segment's protocol into the JSON of events, so that an app can use an existing client
// with its queue, batches, retries and last flush.
//
// It is bytes to bytes, and owns the mapping, field by field as the OpenAPI document says: where a message's members go, what stands
// in for those that are missing, and the forms of a time. A value is copied as it was sent, so that the rules of an event, its
// limits and what is said of them are those of every other event, whoever reads the JSON. It knows nothing of requests and keys.
package segment

import (
	"bytes"
	"fmt"
	"strconv"
	"unicode/utf8"

	"github.com/valyala/fastjson"
)

// Problem is a broken rule of a message that its event's JSON does not have, too.
type Problem struct{ Field, Code, Message string }

// Codes of problems, as for every other event.
const (
	codeMaxLength     = "validation.max-length.error"
	codeInvalidFormat = "validation.invalid-format.error"
)

// Translator translates one message after another, and is not for concurrent use.
type Translator struct {
	// Members calls do with each member of a JSON object: its name, its value as it was sent, and whether both are text, which
	// they are not with invalid UTF-8 or half of a surrogate pair. A value that is no object has no members. do may call Members.
	Members func(object []byte, do func(name, value []byte, isText bool))
	// MaxMetadata is how many bytes an event's metadata may have.
	MaxMetadata int

	found    [fields][]byte   // as sent; empty when absent
	metadata []byte           // what is made of properties, when that is not all
	inside   map[string]place // the object that is being read
	depth    int              // of it in the message
	take     func(name, value []byte, isText bool)
	problems []Problem
	words    fastjson.Parser
}

// field is a value that is used of a message.
type field int

const (
	messageType field = iota
	event
	name
	category
	userID
	anonymousID
	messageID
	timestamp
	originalTimestamp
	channel
	writeKey // of which the caller knows more
	properties
	propertiesName
	propertiesCategory
	propertiesContext
	price
	revenue
	total
	library
	campaign
	source
	medium
	term
	content
	path
	referrer
	title
	locale
	fields
)

// place says which field a member is, or nowhere, and what the members in it are.
type place struct {
	field  field
	within map[string]place
}

const nowhere = fields

// message is where the fields stand.
var message = map[string]place{
	"type": {field: messageType}, "event": {field: event}, "name": {field: name}, "category": {field: category},
	"userId": {field: userID}, "anonymousId": {field: anonymousID}, "messageId": {field: messageID}, "writeKey": {field: writeKey},
	"timestamp": {field: timestamp}, "originalTimestamp": {field: originalTimestamp}, "channel": {field: channel},
	"properties": {properties, map[string]place{
		"name": {field: propertiesName}, "category": {field: propertiesCategory}, "context": {field: propertiesContext},
		"price": {field: price}, "revenue": {field: revenue}, "total": {field: total},
	}},
	"context": {nowhere, map[string]place{
		"library": {nowhere, map[string]place{"name": {field: library}}},
		"campaign": {nowhere, map[string]place{
			"name": {field: campaign}, "source": {field: source}, "medium": {field: medium}, "term": {field: term}, "content": {field: content},
		}},
		"page":   {nowhere, map[string]place{"path": {field: path}, "referrer": {field: referrer}, "title": {field: title}}},
		"locale": {field: locale},
	}},
}

// maxWord is how many bytes a string may have that is compared with known ones, or is a time; in longer ones nobody looks.
const maxWord = 1000

// maxSeconds is the last second, in the year 5138, that an event may say without seeming to mean milliseconds.
const maxSeconds = 99_999_999_999

// Append appends the event of a message to dst, as JSON. kind is what the route says that a message is, in a batch "batch": then each
// says so itself. now is in Unix seconds. The message has to be JSON and an object. stored is false for a kind that is taken and not
// stored. An event with problems is complete, so that it can be looked at for others, and is not to be stored. They live until the
// next call.
func (t *Translator) Append(dst, from []byte, kind string, now int64) (to []byte, problems []Problem, stored bool) {
	if t.take == nil {
		t.take = t.member // once: it is garbage
	}
	t.found, t.problems, t.inside, t.depth = [fields][]byte{}, t.problems[:0], message, 0
	t.Members(from, t.take)
	if kind == "batch" {
		kind = string(t.word(messageType))
	}
	to = append(dst, '{')
	switch kind {
	case "track":
		to = t.copy(to, "event_name", event)
	case "page", "screen":
		to = append(append(append(to, `"event_name":"`...), kind...), `",`...)
	case "identify", "group", "alias":
		return dst, nil, false
	default:
		t.addf("type", codeInvalidFormat, "must be track, page, screen, identify, group or alias")
		to = append(to, `"event_name":"unknown",`...)
	}
	if user := t.found[userID]; len(user) > 0 && string(user) != `""` {
		to = t.copy(to, "user_id", userID)
	} else {
		to = t.copy(to, "user_id", anonymousID)
	}
	t.found[campaign] = cut(t.found[campaign])
	to = t.copy(to, "campaign_id", campaign)
	to = t.copy(to, "insert_id", messageID)
	t.addToProperties(kind == "page" || kind == "screen")
	to = t.copy(to, "metadata", properties)
	to = append(append(append(to, `"channel":"`...), t.channel()...), `","timestamp":`...)
	to = append(strconv.AppendInt(to, min(t.time(now), maxSeconds), 10), '}')
	return to, t.problems, true
}

// member takes in a member of the message, or of an object within.
func (t *Translator) member(name, value []byte, isText bool) {
	at, isOurs := t.inside[string(name)]
	isNull := value[0] == 'n'
	switch {
	case !isText: // with all that is within
		t.addf(clip(name), codeInvalidFormat, "is not valid UTF-8 text")
		return
	case !isOurs:
		return
	case at.field == nowhere, isNull && (t.depth == 0 || len(t.found[at.field]) > 0):
	case t.depth > 0 && t.has(at.field): // the first counts
	case t.depth == 0 && len(t.found[at.field]) > 0:
		t.addf(string(name), codeInvalidFormat, "appears more than once")
		return
	default:
		t.found[at.field] = value
	}
	if at.within != nil {
		outer := t.inside
		t.inside, t.depth = at.within, t.depth+1
		t.Members(value, t.take)
		t.inside, t.depth = outer, t.depth-1
	}
}

// has says whether a field was sent, and not as null.
func (t *Translator) has(f field) bool { return len(t.found[f]) > 0 && t.found[f][0] != 'n' }

// copy appends a field under the name that it has in an event, with a comma, unless it is absent. A number where an event has a text
// is the text that it was sent as.
func (t *Translator) copy(dst []byte, as string, f field) []byte {
	if !t.has(f) {
		return dst
	}
	dst = append(append(append(dst, '"'), as...), `":`...)
	if value := t.found[f]; isNumber(value) && f != properties {
		return append(append(append(dst, '"'), value...), `",`...)
	}
	return append(append(dst, t.found[f]...), ',')
}

// isNumber says whether a value of JSON is one.
func isNumber(value []byte) bool { return value[0] == '-' || value[0]-'0' <= 9 }

// maxCampaign is how many characters a campaign's name may have; what is longer is cut.
const maxCampaign = 100

// cut is the beginning of a string, as it was sent, or of a number: at most maxCampaign characters. Another value stays as it is.
func cut(value []byte) []byte {
	i, isText := 0, len(value) > 0 && value[0] == '"'
	if isText {
		i++
	} else if len(value) == 0 || !isNumber(value) {
		return value
	}
	for range maxCampaign {
		switch {
		case i == len(value) || value[i] == '"': // and the end of it
			return value
		case value[i] == '\\' && value[i+1] == 'u' && isHighSurrogate(value[i:]): // two escapes are one character
			i += 12
		case value[i] == '\\' && value[i+1] == 'u':
			i += 6
		case value[i] == '\\':
			i += 2
		default:
			_, n := utf8.DecodeRune(value[i:])
			i += n
		}
	}
	switch {
	case !isText:
		return value[:i]
	case value[i] == '"':
		return value
	}
	return append(value[:i:i], '"') // a copy
}

// isHighSurrogate says whether an escape is the first of a pair: \uD800 to \uDBFF.
func isHighSurrogate(escape []byte) bool {
	return len(escape) >= 12 && escape[2]|0x20 == 'd' && (escape[3] == '8' || escape[3] == '9' || escape[3]|0x20 == 'a' || escape[3]|0x20 == 'b')
}

// word is a string, to be compared with known ones: empty when it is none, or longer than any of them. It lives until the next.
func (t *Translator) word(f field) []byte {
	raw := t.found[f]
	if len(raw) == 0 || raw[0] != '"' || len(raw) > maxWord {
		return nil
	}
	v, err := t.words.ParseBytes(raw)
	if err != nil {
		return nil
	}
	return v.GetStringBytes()
}

// said is a field under the name that it gets in metadata.
type said struct {
	name  string
	field field
}

// The parts of metadata.context.
var (
	pageParts     = []said{{"path", path}, {"referrer", referrer}, {"title", title}}
	campaignParts = []said{{"source", source}, {"medium", medium}, {"term", term}, {"content", content}}
)

// addToProperties puts in front of the properties what else an event's metadata has: the name and the category of a page or screen,
// what was paid, under the name price, and the context. What the properties have under these names stays. The context is left out when
// there is no room for it; without the others an event would be another one, and is refused.
func (t *Translator) addToProperties(hasTitles bool) {
	own := t.found[properties]
	if !t.has(properties) {
		own = nil
	}
	if len(own) > t.MaxMetadata || len(own) > 0 && own[0] != '{' {
		return // they are refused
	}
	b := append(t.metadata[:0], '{')
	if value := t.found[name]; hasTitles && len(value) > 0 && value[0] == '"' && len(t.found[propertiesName]) == 0 {
		b = t.appendNeeded(b, "name", name)
	}
	if value := t.found[category]; hasTitles && len(value) > 0 && value[0] == '"' && len(t.found[propertiesCategory]) == 0 {
		b = t.appendNeeded(b, "category", category)
	}
	if paid := t.paid(); paid != price {
		b = t.appendNeeded(b, "price", paid)
	}
	needed := len(b)
	if len(t.found[propertiesContext]) == 0 {
		if b = t.appendContext(b); len(b)+len(own) > t.MaxMetadata {
			b = b[:needed]
		}
	}
	t.metadata = b
	switch {
	case len(b) == len("{"):
		return
	case len(b)+len(own) > t.MaxMetadata:
		t.addf("metadata", codeMaxLength, "has %d bytes with name and category or price, the limit is %d", len(b)+len(own), t.MaxMetadata)
		t.found[properties], t.metadata = nil, nil
		return
	}
	if own = bytes.TrimLeft(bytes.TrimPrefix(own, []byte("{")), " \t\r\n"); len(own) == 0 {
		own = []byte("}")
	}
	if own[0] == '}' {
		b = b[:len(b)-len(",")]
	}
	t.metadata = append(b, own...)
	t.found[properties] = t.metadata
}

// appendNeeded is appendMember for what has to fit, and is not copied if it cannot.
func (t *Translator) appendNeeded(dst []byte, as string, f field) []byte {
	if n := len(t.found[f]); n > t.MaxMetadata {
		t.addf("metadata", codeMaxLength, "would have %d bytes of %s, the limit is %d", n, as, t.MaxMetadata)
		return dst
	}
	return t.appendMember(dst, as, f)
}

// appendMember appends a field and a comma.
func (t *Translator) appendMember(dst []byte, as string, f field) []byte {
	dst = append(append(append(dst, '"'), as...), `":`...)
	return append(append(dst, t.found[f]...), ',')
}

// appendContext appends the member context, with what was sent of it, or nothing. Only texts and numbers: nothing is nested deeper
// than it was sent.
func (t *Translator) appendContext(dst []byte) []byte {
	start := len(dst)
	dst = append(dst, `"context":{`...)
	before := len(dst)
	dst = t.appendParts(dst, "page", pageParts)
	dst = t.appendParts(dst, "campaign", campaignParts)
	if t.isScalar(locale) {
		dst = t.appendMember(dst, "locale", locale)
	}
	if len(dst) == before {
		return dst[:start]
	}
	return append(dst[:len(dst)-len(",")], `},`...)
}

// appendParts is appendContext for an object in it.
func (t *Translator) appendParts(dst []byte, as string, parts []said) []byte {
	start := len(dst)
	dst = append(append(append(dst, '"'), as...), `":{`...)
	before := len(dst)
	for _, p := range parts {
		if t.isScalar(p.field) {
			dst = t.appendMember(dst, p.name, p.field)
		}
	}
	if len(dst) == before {
		return dst[:start]
	}
	return append(dst[:len(dst)-len(",")], `},`...)
}

// isScalar says whether a field was sent as a text or a number that may fit.
func (t *Translator) isScalar(f field) bool {
	return t.has(f) && len(t.found[f]) <= t.MaxMetadata && (t.found[f][0] == '"' || isNumber(t.found[f]))
}

// paid is the field that is an event's price: price itself, when it was sent, or when no other says it.
func (t *Translator) paid() field {
	for _, f := range [...]field{revenue, total} {
		if !t.has(price) && t.isScalar(f) {
			return f
		}
	}
	return price
}

// mobileLibraries are in the names of libraries for apps.
var mobileLibraries = []string{"-ios", "-android", "-swift", "-kotlin", "react-native", "flutter"}

// channel is an event's, by where the message says that it comes from.
func (t *Translator) channel() string {
	switch string(t.word(channel)) {
	case "web", "browser":
		return "web"
	case "mobile_app", "mobile":
		return "mobile_app"
	case "api", "server":
		return "api"
	}
	from := t.word(library)
	if string(from) == "analytics.js" {
		return "web"
	}
	for _, part := range mobileLibraries {
		if bytes.Contains(from, []byte(part)) { // no copy: it is short
			return "mobile_app"
		}
	}
	return "api"
}

// time is the message's, down to the second, or now when it says none.
func (t *Translator) time(now int64) int64 {
	at := timestamp
	if len(t.found[at]) == 0 {
		at = originalTimestamp
	}
	if len(t.found[at]) == 0 {
		return now
	}
	if second, ok := unixOf(t.word(at)); ok {
		return second
	}
	t.addf("timestamp", codeInvalidFormat, "must be a time of ISO 8601, such as 2026-01-31T14:00:00.000Z")
	return now
}

func (t *Translator) addf(field, code, format string, args ...any) {
	const most = 20
	if len(t.problems) < most {
		t.problems = append(t.problems, Problem{field, code, field + " " + fmt.Sprintf(format, args...)})
	}
}

// clip shortens a name that the client made up, for a message.
func clip(name []byte) string {
	const most, cut = 40, "…"
	if len(name) > most {
		return string(bytes.ToValidUTF8(name[:most], []byte("�"))) + cut
	}
	return string(bytes.ToValidUTF8(name, []byte("�")))
}
