// JSON, skimmed once from front to back.
//
// json.go cuts a body into events and looks at each of their bytes before fastjson does: is it JSON, is its text UTF-8, how deep
// and how many are its values? It builds nothing and nothing recurses; an open bracket costs one bit. fastjson takes what is not
// JSON (NaN, 1-2, control characters, wrong escapes), recurses, and its tree takes 44 to 80 times the text.

package main

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"fmt"
	"math/bits"
	"strconv"
	"unicode/utf16"
	"unicode/utf8"

	"github.com/valyala/fastjson"
)

// maxDepth is how deep an event's values may be nested: those who read them later may recurse.
const maxDepth = 300

// skimmer is a position in a text. reset makes it ready.
type skimmer struct {
	b       []byte
	i       int
	err     error           // the first one; after it nothing is left to read
	objects []uint64        // a bit for each bracket that is open within a value: 1 is an object
	words   fastjson.Parser // of names with escapes
}

// skimmed is what is known of a value, and of its name if it is a member. name and raw point into the text, as it was sent.
type skimmed struct {
	name, raw []byte
	nameEnd   int  // where the last name skimmed ends in the text
	values    int  // itself and all in it
	items     int  // elements or members, not what is in these
	depth     int  // of its brackets
	spaced    bool // there is white space between its tokens
	badText   bool // its strings, or its name, have invalid UTF-8, or half of a surrogate pair as an escape
}

// reset points the skimmer at the start of b.
func (r *skimmer) reset(b []byte) {
	r.b, r.i, r.err = b, 0, nil
	if cap(r.objects) > 2*maxDepth/64 { // brackets without end
		r.objects = nil
	}
}

// peek is the next token's first byte, 0 at the end.
func (r *skimmer) peek() byte {
	if r.i = afterSpace(r.b, r.i); r.i < len(r.b) {
		return r.b[r.i]
	}
	return 0
}

// eat steps over c if it is the next token.
func (r *skimmer) eat(c byte) bool {
	if r.peek() != c {
		return false
	}
	r.i++
	return true
}

// end is the skimmer's error, which it is, too, when more than white space is left.
func (r *skimmer) end() error {
	if r.i = afterSpace(r.b, r.i); r.i < len(r.b) {
		r.fail("the end", 0)
	}
	return r.err
}

// fail ends the reading: want is not what stands here. deepest is of the brackets so far, which the text's author may not see.
func (r *skimmer) fail(want string, deepest int) {
	err := fmt.Errorf("expected %s at byte %d, found the end", want, r.i)
	if r.i < len(r.b) {
		err = fmt.Errorf("expected %s at byte %d, found %q", want, r.i, r.b[r.i])
	}
	if r.i == 0 {
		err = cmp.Or(byteOrderMark(r.b), err)
	}
	if deepest >= maxDepth {
		err = fmt.Errorf("%w; values are nested more than %d deep", err, maxDepth)
	}
	r.err, r.i = cmp.Or(r.err, err), len(r.b)
}

// byteOrderMark is an error when a text begins with such a mark, of UTF-8 or UTF-16: invisible in what its sender looks at.
func byteOrderMark(text []byte) error {
	for _, mark := range []string{"\xef\xbb\xbf", "\xff\xfe", "\xfe\xff"} {
		if bytes.HasPrefix(text, []byte(mark)) {
			return fmt.Errorf("the body begins with a byte order mark: send UTF-8 without one")
		}
	}
	return nil
}

// more says whether an n-th element or member follows, counted from 0, before closing. It steps over the comma in front of it,
// or over closing.
func (r *skimmer) more(n int, closing byte) bool {
	c := r.peek()
	switch {
	case c == closing:
		r.i++
		return false
	case n == 0:
	case c == ',':
		r.i++
	default:
		r.fail(commaOr(closing), 0)
	}
	return r.err == nil
}

func commaOr(closing byte) string { return "',' or '" + string(rune(closing)) + "'" }

// key reads the name of an object's n-th member, and the colon behind it; false when there is none, or an error.
func (r *skimmer) key(n int, m *skimmed) bool {
	if !r.more(n, '}') {
		return false
	}
	*m = skimmed{}
	start := afterSpace(r.b, r.i)
	end, want := m.key(r.b, start)
	if r.i = end; want != "" {
		r.fail(want, 0)
		return false
	}
	m.name = r.b[start:m.nameEnd]
	return true
}

// member reads an object's n-th member; false when there is none, or an error.
func (r *skimmer) member(n int, m *skimmed) bool {
	if !r.key(n, m) {
		return false
	}
	r.skim(m)
	return r.err == nil
}

// value reads the next value, whatever is in it.
func (r *skimmer) value() (m skimmed) {
	r.skim(&m)
	return m
}

// skim is value for an m that may have a name.
func (r *skimmer) skim(m *skimmed) {
	b, i := r.b, afterSpace(r.b, r.i)
	start, depth, closing, want := i, 0, byte(0), ""
	m.spaced = false
	for want == "" {
		// A value begins here. The first element of what it opens is read in the next turn.
		m.values++
		opens := false
		switch i = m.afterSpace(b, i); {
		case i == len(b):
			want = "a value"
		case b[i] == '"':
			i, want = m.text(b, i)
		case b[i] == '{' || b[i] == '[':
			closing = b[i] + 2 // in ASCII } is { + 2, and ] is [ + 2
			r.open(depth, closing)
			depth++
			m.depth = max(m.depth, depth)
			i = m.afterSpace(b, i+1)
			opens = i == len(b) || b[i] != closing
		default:
			i, want = skimScalar(b, i)
		}
		if !opens {
			// The value has ended here, and what holds it may end, too.
			for want == "" && depth > 0 {
				if i = m.afterSpace(b, i); i == len(b) || b[i] != closing {
					break
				}
				i++
				depth--
				closing = r.closing(depth)
			}
			if want != "" || depth == 0 {
				break
			}
			if i == len(b) || b[i] != ',' {
				want = commaOr(closing)
				break
			}
			i++
		}
		if depth == 1 {
			m.items++
		}
		if closing == '}' {
			i, want = m.key(b, i)
		}
	}
	m.raw = b[start:i]
	if r.i = i; want != "" {
		r.fail(want, m.depth)
	}
}

// open notes that a bracket is open, inside depth others, which closing ends.
func (r *skimmer) open(depth int, closing byte) {
	if depth/64 == len(r.objects) {
		r.objects = append(r.objects, 0)
	}
	word, bit := &r.objects[depth/64], uint64(1)<<(depth%64)
	if *word &^= bit; closing == '}' {
		*word |= bit
	}
}

// closing is what ends the innermost of depth open brackets.
func (r *skimmer) closing(depth int) byte {
	if depth > 0 && r.objects[(depth-1)/64]>>((depth-1)%64)&1 == 1 {
		return '}'
	}
	return ']'
}

func (m *skimmed) afterSpace(b []byte, i int) int {
	if i == len(b) || b[i] > ' ' { // Fast path
		return i
	}
	m.spaced = true // or it is an error
	return afterSpace(b, i)
}

// afterSpace is where the next token begins.
func afterSpace(b []byte, i int) int {
	for i < len(b) && b[i] <= ' ' && (b[i] == ' ' || b[i] == '\n' || b[i] == '\r' || b[i] == '\t') {
		i++
	}
	return i
}

// key skims the next member's name, and the colon behind it, as text does a string.
func (m *skimmed) key(b []byte, i int) (end int, want string) {
	if m.nameEnd, want = m.text(b, m.afterSpace(b, i)); want != "" {
		return m.nameEnd, want
	}
	if end = m.afterSpace(b, m.nameEnd); end == len(b) || b[end] != ':' {
		return end, "':'"
	}
	return end + 1, ""
}

// text skims a string that begins at i, and returns where it ends. want is empty, or what should stand there.
func (m *skimmed) text(b []byte, i int) (end int, want string) {
	if i == len(b) || b[i] != '"' {
		return i, "a string"
	}
	for i++; ; {
		if i+8 <= len(b) { // Fast path
			special := specialBytes(binary.LittleEndian.Uint64(b[i:]))
			if i += bits.TrailingZeros64(special) / 8; special == 0 {
				continue
			}
		} else if i == len(b) {
			return i, `'"'`
		}
		switch c := b[i]; {
		case c == '"':
			return i + 1, ""
		case c == '\\':
			n, isText := escape(b[i:])
			if n == 0 {
				return i, "an escape of JSON"
			}
			m.badText = m.badText || !isText
			i += n
		case c < ' ':
			return i, "no control character in a string"
		default:
			_, n := utf8.DecodeRune(b[i:])
			m.badText = m.badText || n == 1 && c >= utf8.RuneSelf // U+FFFD itself has three bytes
			i += n
		}
	}
}

// escape returns the length of the escape at the start of b, 0 when there is none, and whether it stands for text.
func escape(b []byte) (n int, isText bool) {
	if len(b) >= 2 && bytes.IndexByte([]byte(`"\/bfnrt`), b[1]) >= 0 {
		return 2, true
	}
	switch first := hexRune(b); {
	case first < 0:
		return 0, false
	case !utf16.IsSurrogate(first):
		return 6, true
	case utf16.DecodeRune(first, hexRune(b[6:])) != utf8.RuneError:
		return 12, true
	}
	return 6, false
}

// hexRune reads \uXXXX at the start of b; -1 when there is none.
func hexRune(b []byte) rune {
	if len(b) >= 6 && b[0] == '\\' && b[1] == 'u' {
		if n, err := strconv.ParseUint(string(b[2:6]), 16, 16); err == nil {
			return rune(n)
		}
	}
	return -1
}

// skimScalar skims a number or a word that begins at i, as text does a string.
func skimScalar(b []byte, i int) (end int, want string) {
	for _, word := range [...]string{"true", "false", "null"} {
		if b[i] == word[0] {
			if end := i + len(word); end <= len(b) && string(b[i:end]) == word {
				return end, ""
			}
			return i, "a value"
		}
	}
	want = "a value"
	if b[i] == '-' {
		i, want = i+1, "a digit"
	}
	if i < len(b) && b[i] == '0' {
		i++
	} else if end, _ = digits(b, i); end == i {
		return i, want
	} else {
		i = end
	}
	if i < len(b) && b[i] == '.' {
		if i, want = digits(b, i+1); want != "" {
			return i, want
		}
	}
	if i < len(b) && b[i]|0x20 == 'e' {
		if i++; i < len(b) && (b[i] == '+' || b[i] == '-') {
			i++
		}
		return digits(b, i)
	}
	return i, ""
}

func digits(b []byte, i int) (end int, want string) {
	for end = i; end < len(b) && b[end]-'0' <= 9; end++ {
	}
	if end == i {
		return i, "a digit"
	}
	return end, ""
}

// eachMember calls do with each member of an object that has been skimmed before: its name as text, its value as it was sent, and
// whether both are text. A value that is no object has no members, and longer names than ours are left out. do may call
// eachMember; a name lives until then.
func (r *skimmer) eachMember(object []byte, do func(name, value []byte, isText bool)) {
	b, i := r.b, r.i
	r.reset(object)
	if r.eat('{') {
		var m skimmed
		for n := 0; r.member(n, &m); n++ {
			if len(m.name) <= maxNameBytes {
				do(r.word(m.name), m.raw, !m.badText)
			}
		}
	}
	r.b, r.i = b, i
}

// word is what a string that has been skimmed stands for. It lives until the next one.
func (r *skimmer) word(raw []byte) []byte {
	if bytes.IndexByte(raw, '\\') < 0 { // Fast path
		return raw[1 : len(raw)-1]
	}
	v, _ := r.words.ParseBytes(raw)
	return v.GetStringBytes() // nil of nil
}

// isWord says whether a string, as it was sent, stands for one of our names.
func (r *skimmer) isWord(raw []byte, name string) bool {
	return len(raw) <= maxNameBytes && string(r.word(raw)) == name
}

// eachEvent calls do at each element of the array that list names, as in {"events":[…]}, of which there may be 1 to most; do reads
// one value. The other members go to other, as eachMember's do; it may be nil.
func (r *skimmer) eachEvent(list string, most int, other func(name, value []byte, isText bool), do func() error) error {
	var m skimmed
	events, found := 0, false
	isEnvelope := r.eat('{')
	for n := 0; isEnvelope && r.key(n, &m); n++ {
		switch {
		case !r.isWord(m.name, list):
			if r.skim(&m); other != nil && r.err == nil && len(m.name) <= maxNameBytes {
				other(r.word(m.name), m.raw, !m.badText)
			}
		case found:
			return fmt.Errorf("%q appears more than once", list)
		case !r.eat('['):
			isEnvelope = false
		default:
			for found = true; r.more(events, ']'); events++ {
				if events == most {
					return errTooManyEvents(most)
				}
				if err := do(); err != nil {
					return err
				}
			}
		}
	}
	switch {
	case !isEnvelope:
		return cmp.Or(byteOrderMark(r.b), fmt.Errorf("the body must be a JSON object, in which %q is an array", list))
	case r.end() == nil && events == 0:
		return fmt.Errorf("%q is missing or empty: send 1 to %d events", list, most)
	}
	return r.err
}

func errTooManyEvents(most int) error {
	return fmt.Errorf("more than %d events: split the request", most)
}

// isEnvelope says whether a body is {"events":…} rather than an event a line, judging by its first object. A body that is not
// JSON but begins like an envelope counts as one: the error is then about the body, not about its lines.
func isEnvelope(body []byte, list string) bool {
	var m skimmed
	r := skimmer{b: body}
	for n := 0; (n > 0 || r.eat('{')) && r.key(n, &m); n++ {
		if r.isWord(m.name, list) {
			return true
		}
		r.skim(&m)
	}
	return r.err != nil
}
