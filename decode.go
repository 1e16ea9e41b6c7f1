// A record's value as an event again.
//
// Nearly every record on the topic was written by this program: canonical JSON, fields in a known order, no spaces.
// decode.go reads that shape straight ahead, without a tree and without a second pass, and leaves everything else to the
// parser: another field order, an escape in a text, anything that a rule may refuse. It costs a third of a parse.

package main

import (
	"bytes"
	"fmt"
	"unicode/utf8"

	"github.com/valyala/fastjson"
)

// maxPlainBrackets is how many { and [ metadata may have to be read without the parser, which knows how deep it is.
const maxPlainBrackets = 200

// decode reads a record's value. The API's rules hold for other producers too, except the age: a record may have waited.
// The event lives until the next call.
func (p *eventParser) decode(value []byte) (*event, error) {
	if ev := p.canonical(value); ev != nil { // Fast path
		return ev, nil
	}
	ev, problems, err := p.parse(value)
	switch {
	case err != nil:
		return nil, err
	case len(problems) > 0:
		return nil, fmt.Errorf("%s", problems[0].message)
	case !ev.storable():
		return nil, fmt.Errorf("timestamp %d is not within 1970 to 2106", ev.timestamp)
	}
	return ev, nil
}

// canonical reads what appendEvent writes; nil for a value that has to be looked at more closely.
func (p *eventParser) canonical(value []byte) *event {
	p.ev = event{tags: p.ev.tags[:0]}
	ev, s := &p.ev, canonicalJSON{value}
	if !s.eat(`{"event_name":`) || !s.text(&ev.name) || len(ev.name) == 0 ||
		!s.eat(`,"user_id":`) || !s.text(&ev.userID) || len(ev.userID) == 0 ||
		!s.eat(`,"timestamp":`) || !s.seconds(&ev.timestamp) {
		return nil
	}
	if s.eat(`,"channel":`) && (!s.text(&ev.channel) || !validChannel(ev.channel)) ||
		s.eat(`,"campaign_id":`) && !s.text(&ev.campaignID) ||
		s.eat(`,"tags":[`) && !s.tags(&ev.tags) ||
		s.eat(`,"metadata":`) && !s.object(&ev.metadata) {
		return nil
	}
	if len(s.rest) != 1 || s.rest[0] != '}' || !utf8.Valid(value) || !ev.storable() {
		return nil
	}
	return ev
}

// canonicalJSON reads JSON that has no spaces and no escapes, from the front of rest.
type canonicalJSON struct{ rest []byte }

func (s *canonicalJSON) eat(literal string) bool {
	if len(s.rest) < len(literal) || string(s.rest[:len(literal)]) != literal {
		return false
	}
	s.rest = s.rest[len(literal):]
	return true
}

// text reads a string that no rule can refuse for its length or its characters.
func (s *canonicalJSON) text(dst *[]byte) bool {
	if len(s.rest) == 0 || s.rest[0] != '"' {
		return false
	}
	for i, c := range s.rest[1:] {
		switch {
		case c == '"':
			*dst, s.rest = s.rest[1:1+i], s.rest[2+i:]
			return true
		case c < 0x20, c == 0x7f, c == '\\', i == maxTextChars:
			return false
		}
	}
	return false
}

func (s *canonicalJSON) seconds(dst *int64) bool {
	n := 0
	for n < len(s.rest) && s.rest[n] >= '0' && s.rest[n] <= '9' {
		*dst = *dst*10 + int64(s.rest[n]-'0')
		if n++; n > 10 {
			return false
		}
	}
	ok := n > 0 && (s.rest[0] != '0' || n == 1)
	s.rest = s.rest[n:]
	return ok
}

// tags reads the strings of an array, of which [ is eaten, and its end.
func (s *canonicalJSON) tags(dst *[][]byte) bool {
	for {
		var tag []byte
		if len(*dst) == maxTags || !s.text(&tag) {
			return false
		}
		*dst = append(*dst, tag)
		if s.eat("]") {
			return true
		}
		if !s.eat(",") {
			return false
		}
	}
}

// object reads an object that is the last member of another.
func (s *canonicalJSON) object(dst *[]byte) bool {
	n := len(s.rest) - 1
	if n < 2 || n > maxMetadataBytes || s.rest[0] != '{' || s.rest[n-1] != '}' {
		return false
	}
	raw := s.rest[:n]
	if bytes.IndexByte(raw, '\\') >= 0 || bytes.Count(raw, []byte{'{'})+bytes.Count(raw, []byte{'['}) > maxPlainBrackets || fastjson.ValidateBytes(raw) != nil {
		return false
	}
	*dst, s.rest = raw, s.rest[n:]
	return true
}

// member returns the value of a name in an object without escapes, as it was sent; nil when it is not there.
func member(object []byte, name string) []byte {
	s := scanner{b: object}
	s.eat('{')
	for {
		key, value, err := s.member()
		if err != nil {
			return nil
		}
		if len(key) == len(name)+2 && string(key[1:len(key)-1]) == name {
			return value
		}
		if !s.eat(',') {
			return nil
		}
	}
}
