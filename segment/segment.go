// Package segment translates the messages of Segment's protocol into the JSON of events, so that an app can use an existing client
// with its queue, batches, retries and last flush.
//
// It is bytes to bytes, and owns the mapping, field by field as the OpenAPI document says: where a message's members go, what stands
// in for those that are missing, and the forms of a time. A value is copied as it was sent, so that the rules of an event, its
// limits and what is said of them are those of every other event, whoever reads the JSON. It knows nothing of requests and keys.
package segment

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strconv"
	"time"

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
	library
	campaign
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
		"name": {field: propertiesName}, "category": {field: propertiesCategory},
	}},
	"context": {nowhere, map[string]place{
		"library":  {nowhere, map[string]place{"name": {field: library}}},
		"campaign": {nowhere, map[string]place{"name": {field: campaign}}},
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
	to = t.copy(to, "campaign_id", campaign)
	to = t.copy(to, "insert_id", messageID)
	if kind == "page" || kind == "screen" {
		t.addTitles()
	}
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

// copy appends a field under the name that it has in an event, with a comma, unless it is absent.
func (t *Translator) copy(dst []byte, as string, f field) []byte {
	value := t.found[f]
	if len(value) == 0 || value[0] == 'n' {
		return dst
	}
	dst = append(append(append(dst, '"'), as...), `":`...)
	return append(append(dst, value...), ',')
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

// addTitles puts the name and the category of a page or screen in front of its properties, unless these have them already.
func (t *Translator) addTitles() {
	own := t.found[properties]
	if len(own) > t.MaxMetadata || len(own) > 0 && own[0] != '{' {
		return // they are refused
	}
	var b bytes.Buffer
	for _, title := range []struct {
		name      string
		from, own field
	}{{"name", name, propertiesName}, {"category", category, propertiesCategory}} {
		value := t.found[title.from]
		if len(value) > t.MaxMetadata {
			t.addf("metadata", codeMaxLength, "would have %d bytes of %s, the limit is %d", len(value), title.name, t.MaxMetadata)
		} else if len(value) > 0 && value[0] == '"' && len(t.found[title.own]) == 0 {
			fmt.Fprintf(&b, `,"%s":%s`, title.name, value)
		}
	}
	titles := b.Len()
	if titles == 0 {
		return
	}
	if json.Compact(&b, own); b.Len() > titles+len(`{}`) {
		b.Bytes()[titles] = ','
	} else {
		b.Truncate(titles)
		b.WriteByte('}')
	}
	b.Bytes()[0] = '{'
	if t.found[properties] = b.Bytes(); b.Len() > t.MaxMetadata {
		t.addf("metadata", codeMaxLength, "has %d bytes with name and category, the limit is %d", b.Len(), t.MaxMetadata)
		t.found[properties] = nil
	}
}

// mobileLibraries are in the names of libraries for apps.
var mobileLibraries = []string{"-ios", "-android", "-swift", "-kotlin", "react-native", "flutter"}

// channel is an event's, by where the message says that it comes from.
func (t *Translator) channel() string {
	switch string(t.word(channel)) {
	case "browser":
		return "web"
	case "mobile":
		return "mobile_app"
	case "server":
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

// timeForms are the ISO 8601 times that clients send; each also takes a fraction of a second.
var timeForms = []string{time.RFC3339, "2006-01-02T15:04:05Z0700", "2006-01-02T15:04:05", "2006-01-02 15:04:05", time.DateOnly}

// time is the message's, down to the second, or now when it says none. One without a zone is UTC.
func (t *Translator) time(now int64) int64 {
	at := timestamp
	if len(t.found[at]) == 0 {
		at = originalTimestamp
	}
	if len(t.found[at]) == 0 {
		return now
	}
	given := t.word(at)
	for _, form := range timeForms {
		if at, err := time.Parse(form, string(given)); err == nil {
			return at.Unix()
		}
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
