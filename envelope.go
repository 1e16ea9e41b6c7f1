// The shapes that events arrive in: one object, {"events":[…]}, or one event a line.
//
// envelope.go cuts a request body into the raw bytes of its events without building a tree of the whole: the parser
// then works on one event at a time, in the first-level cache, and the tree of a thousand events is never in memory.
// Cutting is lenient and costs one pass; each piece is parsed strictly afterwards, so nothing that is not JSON passes.

package main

import (
	"bytes"
	"errors"
	"fmt"

	"github.com/valyala/fastjson"
)

// Limits of a bulk request, from contract.md.
const maxBulkEvents = 1000

var (
	errNotEnvelope   = errors.New(`the body must be a JSON object with an "events" array`)
	errEventsTwice   = errors.New(`"events" appears more than once`)
	errNoEvents      = errors.New(`"events" is missing or empty: send 1 to 1000 events`)
	errTooManyEvents = errors.New("more than 1000 events: split the request")
)

// splitBulk appends the raw events of {"events":[…]} to dst. The pieces point into body. Other members are ignored,
// but have to be JSON.
func splitBulk(dst [][]byte, body []byte, p *fastjson.Parser) ([][]byte, error) {
	s := scanner{b: body}
	if !s.eat('{') {
		return dst, errNotEnvelope
	}
	found := false
	for first := true; !s.eat('}'); first = false {
		if !first && !s.eat(',') {
			return dst, s.unexpected("',' or '}'")
		}
		key, value, err := s.member()
		if err != nil {
			return dst, err
		}
		if string(key) != `"events"` {
			if _, err := parseJSON(p, key); err != nil {
				return dst, err
			}
			if _, err := parseJSON(p, value); err != nil {
				return dst, err
			}
			continue
		}
		if found {
			return dst, errEventsTwice
		}
		found = true
		if dst, err = splitArray(dst, value); err != nil {
			return dst, err
		}
	}
	if s.space(); s.i != len(body) {
		return dst, s.unexpected("the end of the body")
	}
	if len(dst) == 0 {
		return dst, errNoEvents
	}
	return dst, nil
}

func splitArray(dst [][]byte, raw []byte) ([][]byte, error) {
	s := scanner{b: raw}
	if !s.eat('[') {
		return dst, errNotEnvelope
	}
	for !s.eat(']') {
		if len(dst) > 0 && !s.eat(',') {
			return dst, s.unexpected("',' or ']'")
		}
		v := s.value()
		if len(v) == 0 {
			return dst, s.unexpected("an event")
		}
		if len(dst) == maxBulkEvents {
			return dst, errTooManyEvents
		}
		dst = append(dst, v)
	}
	if s.space(); s.i != len(raw) {
		return dst, s.unexpected("the end of the array")
	}
	return dst, nil
}

// splitLines appends the lines of an NDJSON body to dst; blank lines are skipped. The pieces point into body.
func splitLines(dst [][]byte, body []byte) ([][]byte, error) {
	for len(body) > 0 {
		var line []byte
		if i := bytes.IndexByte(body, '\n'); i >= 0 {
			line, body = body[:i], body[i+1:]
		} else {
			line, body = body, nil
		}
		if line = bytes.TrimSpace(line); len(line) == 0 {
			continue
		}
		if len(dst) == maxBulkEvents {
			return dst, errTooManyEvents
		}
		dst = append(dst, line)
	}
	if len(dst) == 0 {
		return dst, errNoEvents
	}
	return dst, nil
}

// memberSize is the length of the named member's value in the object raw as it was sent, spaces included; 0 when
// there is none under that spelling.
func memberSize(raw []byte, name string) int {
	s := scanner{b: raw}
	s.eat('{')
	for {
		key, value, err := s.member()
		if err != nil {
			return 0
		}
		if len(key) > 2 && string(key[1:len(key)-1]) == name {
			return len(value)
		}
		if !s.eat(',') {
			return 0
		}
	}
}

// scanner walks JSON by its brackets and quotes alone.
type scanner struct {
	b []byte
	i int
}

func (s *scanner) space() {
	for s.i < len(s.b) {
		switch s.b[s.i] {
		case ' ', '\t', '\r', '\n':
			s.i++
		default:
			return
		}
	}
}

func (s *scanner) eat(c byte) bool {
	s.space()
	if s.i < len(s.b) && s.b[s.i] == c {
		s.i++
		return true
	}
	return false
}

// member returns the next key, quotes included, and its value.
func (s *scanner) member() (key, value []byte, err error) {
	s.space()
	if s.i >= len(s.b) || s.b[s.i] != '"' {
		return nil, nil, s.unexpected("a member's name")
	}
	key = s.value()
	if !s.eat(':') {
		return nil, nil, s.unexpected("':'")
	}
	if value = s.value(); len(value) == 0 {
		return nil, nil, s.unexpected("a value")
	}
	return key, value, nil
}

// value returns the bytes of the next value and steps behind it; empty when there is none, or its end is missing.
func (s *scanner) value() []byte {
	s.space()
	start, depth := s.i, 0
	for s.i < len(s.b) {
		switch c := s.b[s.i]; c {
		case '"':
			if !s.skipString() {
				return nil
			}
			if depth == 0 {
				return s.b[start:s.i]
			}
		case '{', '[':
			depth++
			s.i++
		case '}', ']':
			if depth == 0 {
				return s.b[start:s.i]
			}
			s.i++
			if depth--; depth == 0 {
				return s.b[start:s.i]
			}
		case ',', ' ', '\t', '\r', '\n':
			if depth == 0 {
				return s.b[start:s.i]
			}
			s.i++
		default:
			s.i++
		}
	}
	if depth > 0 {
		return nil
	}
	return s.b[start:s.i]
}

func (s *scanner) skipString() bool {
	for i := s.i + 1; ; {
		n := bytes.IndexByte(s.b[i:], '"')
		if n < 0 {
			s.i = len(s.b)
			return false
		}
		i += n + 1
		slashes := 0
		for j := i - 2; s.b[j] == '\\'; j-- { // ends at the opening quote at the latest
			slashes++
		}
		if slashes%2 == 0 {
			s.i = i
			return true
		}
	}
}

func (s *scanner) unexpected(want string) error {
	if s.i >= len(s.b) {
		return fmt.Errorf("expected %s at byte %d, found the end", want, s.i)
	}
	return fmt.Errorf("expected %s at byte %d, found %q", want, s.i, s.b[s.i])
}
