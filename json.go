// JSON, read once from front to back.
//
// json.go walks a text strictly and builds nothing: a value is a piece of the text, and reading it looks once at each byte,
// whatever its shape. Nothing recurses; an open bracket costs one bit. A tree of [0,0,0,…] would take fifty times the bytes of
// the text, and a lenient parser would need a second pass to refuse numbers and escapes that are not JSON.

package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"unicode/utf16"
	"unicode/utf8"
)

// maxDepth is how deep an event's values may be nested: those who read them later may recurse.
const maxDepth = 300

// jsonReader is a position in a text. reset makes it ready.
type jsonReader struct {
	b      []byte
	i      int
	spaces int   // bytes of white space so far
	err    error // the first one; after it nothing is left to read
	// The brackets open within value, one bit each: 1 is an object. Those deeper than maxDepth cost memory.
	kinds  [maxDepth/64 + 1]uint64
	deeper []uint64
}

// jsonValue is one value as it was sent. raw points into the text.
type jsonValue struct {
	raw     []byte
	kind    byte // its first byte, and 0 for every number
	escaped bool // there is a \ in its strings
	spaced  bool // there is white space between its tokens
	badText bool // its strings have invalid UTF-8, or half of a surrogate pair as an escape
	depth   int  // of its brackets
}

// kindNames are what messages call a value, by its kind.
var kindNames = map[byte]string{
	'{': "object", '[': "array", '"': "string", 't': "true", 'f': "false", 'n': "null", 0: "number",
}

// text is a string's text. It points into v.raw, or, when it has escapes, to the end of *scratch.
func (v *jsonValue) text(scratch *[]byte) []byte {
	s := v.raw[1 : len(v.raw)-1]
	if !v.escaped { // Fast path
		return s
	}
	start := len(*scratch)
	*scratch = appendUnescaped(*scratch, s)
	return (*scratch)[start:len(*scratch):len(*scratch)]
}

// is says whether a member is called name, which has no characters that need an escape.
func (v *jsonValue) is(name string) bool {
	var scratch []byte
	return len(v.raw) <= 6*len(name)+len(`""`) && string(v.text(&scratch)) == name
}

// appendCompact appends the value without white space between its tokens.
func (v *jsonValue) appendCompact(dst []byte) []byte {
	for i := 0; i < len(v.raw); i++ {
		start := i
		switch v.raw[i] {
		case ' ', '\t', '\n', '\r':
			continue
		case '"':
			for i++; v.raw[i] != '"'; i++ {
				if v.raw[i] == '\\' {
					i++
				}
			}
		}
		dst = append(dst, v.raw[start:i+1]...)
	}
	return dst
}

// space steps over white space.
func (r *jsonReader) space() {
	for r.i < len(r.b) && r.b[r.i] <= ' ' && (r.b[r.i] == ' ' || r.b[r.i] == '\n' || r.b[r.i] == '\r' || r.b[r.i] == '\t') {
		r.i++
		r.spaces++
	}
}

// peek is the next token's first byte, 0 at the end.
func (r *jsonReader) peek() byte {
	if r.space(); r.i < len(r.b) {
		return r.b[r.i]
	}
	return 0
}

// eat steps over c if it is the next token.
func (r *jsonReader) eat(c byte) bool {
	if r.peek() != c {
		return false
	}
	r.i++
	return true
}

// end is the reader's error, which it is, too, when more than white space is left.
func (r *jsonReader) end() error {
	if r.space(); r.i < len(r.b) {
		r.fail(r.unexpected("the end"))
	}
	return r.err
}

// fail ends the reading.
func (r *jsonReader) fail(err error) {
	if r.err == nil {
		r.err = err
	}
	r.i = len(r.b)
}

// more says whether an n-th element or member follows, counted from 0, before closing. It steps over the comma in front of it,
// or over closing.
func (r *jsonReader) more(n int, closing byte) bool {
	c := r.peek()
	switch {
	case c == closing:
		r.i++
		return false
	case n == 0:
	case c == ',':
		r.i++
	default:
		r.fail(r.unexpected("',' or '" + string(rune(closing)) + "'"))
	}
	return r.err == nil
}

// key reads the name of an object's n-th member, and the colon behind it; false when there is none, or an error. It is name,
// written out: a call that also returns what was sent costs an event a tenth.
func (r *jsonReader) key(n int, k *jsonValue) bool {
	if !r.more(n, '}') {
		return false
	}
	*k = jsonValue{kind: '"'}
	r.space()
	start := r.i
	err := r.str(k)
	k.raw = r.b[start:r.i]
	if err == nil && !r.eat(':') {
		err = r.unexpected("':'")
	}
	if err != nil {
		r.fail(err)
	}
	return err == nil
}

// member reads an object's n-th member; false when there is none, or an error.
func (r *jsonReader) member(n int, k, v *jsonValue) bool {
	if !r.key(n, k) {
		return false
	}
	r.read(v)
	return r.err == nil
}

// value reads the next value, whatever is in it.
func (r *jsonReader) value() (v jsonValue) {
	r.read(&v)
	return v
}

// read is value without a copy.
func (r *jsonReader) read(v *jsonValue) {
	var err error
	*v = jsonValue{}
	if v.kind = r.peek(); v.kind == '-' || v.kind >= '0' && v.kind <= '9' {
		v.kind = 0
	}
	start, spaces := r.i, r.spaces
	for depth := 0; ; {
		// A value begins here. The first element of what it opens is read in the next turn.
		switch c := r.peek(); c {
		case '{', '[':
			r.i++
			r.open(depth, c)
			depth++
			v.depth = max(v.depth, depth)
			if closing := c + 2; r.eat(closing) { // in ASCII } is { + 2, and ] is [ + 2
				depth--
				break
			}
			if c == '{' {
				err = r.name(v)
			}
			if err == nil {
				continue
			}
		case '"':
			err = r.str(v)
		case 't':
			err = r.literal("true")
		case 'f':
			err = r.literal("false")
		case 'n':
			err = r.literal("null")
		default:
			err = r.number()
		}
		// The value has ended here, and what holds it may end, too.
		for err == nil && depth > 0 && r.eat(r.closing(depth)) {
			depth--
		}
		switch {
		case err != nil:
		case depth == 0:
			v.raw = r.b[start:r.i]
			v.spaced = r.spaces > spaces
			return
		case !r.eat(','):
			err = r.unexpected("',' or '" + string(rune(r.closing(depth))) + "'")
		case r.closing(depth) == '}':
			err = r.name(v)
		}
		if err != nil && v.depth >= maxDepth { // which the text's author may not see
			err = fmt.Errorf("%w; values are nested more than %d deep", err, maxDepth)
		}
		if err != nil {
			r.fail(err)
			return
		}
	}
}

// name reads a member's name and colon within v.
func (r *jsonReader) name(v *jsonValue) error {
	r.space()
	err := r.str(v)
	if err == nil && !r.eat(':') {
		err = r.unexpected("':'")
	}
	return err
}

// str reads a string and notes in v what is in it.
func (r *jsonReader) str(v *jsonValue) error {
	b, i := r.b, r.i
	if i >= len(b) || b[i] != '"' {
		return r.unexpected("a string")
	}
	for i++; ; {
		for i+8 <= len(b) && allPlain(binary.LittleEndian.Uint64(b[i:])) {
			i += 8
		}
		for i < len(b) && plainASCII[b[i]] {
			i++
		}
		r.i = i
		if i == len(b) {
			return r.unexpected(`'"'`)
		}
		switch c := b[i]; {
		case c == '"':
			r.i++
			return nil
		case c == '\\':
			n, isText := escape(b[i:])
			if n == 0 {
				return r.unexpected("an escape of JSON")
			}
			v.escaped, v.badText = true, v.badText || !isText
			i += n
		case c < ' ':
			return r.unexpected("no control character in a string")
		default:
			_, n := utf8.DecodeRune(b[i:])
			v.badText = v.badText || n == 1 // U+FFFD itself has three bytes
			i += n
		}
	}
}

// plainASCII is what strings mostly hold: ASCII that stands for itself.
var plainASCII = func() (t [256]bool) {
	for c := ' '; c < utf8.RuneSelf; c++ {
		t[c] = c != '"' && c != '\\'
	}
	return t
}()

// allPlain says whether all eight bytes of x are plainASCII.
func allPlain(x uint64) bool {
	const ones, high = 0x0101010101010101, 0x8080808080808080
	quote, slash := x^ones*'"', x^ones*'\\'
	return (x|(x-ones*' ')|(quote-ones)|(slash-ones))&high == 0
}

// escape returns the length of the escape at the start of b, 0 when there is none, and whether it stands for text.
func escape(b []byte) (n int, isText bool) {
	if len(b) < 2 {
		return 0, false
	}
	switch b[1] {
	case '"', '\\', '/', 'b', 'f', 'n', 'r', 't':
		return 2, true
	case 'u':
		first := hexRune(b)
		switch {
		case first < 0:
			return 0, false
		case !utf16.IsSurrogate(first):
			return 6, true
		case utf16.DecodeRune(first, hexRune(b[6:])) != utf8.RuneError:
			return 12, true
		}
		return 6, false
	}
	return 0, false
}

// hexRune reads \uXXXX at the start of b; -1 when there is none.
func hexRune(b []byte) rune {
	if len(b) < 6 || b[0] != '\\' || b[1] != 'u' {
		return -1
	}
	n, err := strconv.ParseUint(string(b[2:6]), 16, 16)
	if err != nil {
		return -1
	}
	return rune(n)
}

// appendUnescaped appends the text that the inside of a string stands for.
func appendUnescaped(dst, s []byte) []byte {
	for len(s) > 0 {
		if s[0] != '\\' {
			dst = append(dst, s[0])
			s = s[1:]
			continue
		}
		n, _ := escape(s)
		switch c := s[1]; c {
		case '"', '\\', '/':
			dst = append(dst, c)
		case 'u':
			r := hexRune(s)
			if n == 12 {
				r = utf16.DecodeRune(r, hexRune(s[6:]))
			}
			dst = utf8.AppendRune(dst, r)
		default:
			dst = append(dst, "\b\f\n\r\t"[strings.IndexByte("bfnrt", c)])
		}
		s = s[n:]
	}
	return dst
}

func (r *jsonReader) literal(word string) error {
	if end := r.i + len(word); end <= len(r.b) && string(r.b[r.i:end]) == word {
		r.i = end
		return nil
	}
	return r.unexpected("a value")
}

func (r *jsonReader) number() error {
	minus := r.skip('-', '-')
	if !r.skip('0', '0') && !r.digits() {
		if minus {
			return r.unexpected("a digit")
		}
		return r.unexpected("a value")
	}
	if r.skip('.', '.') && !r.digits() {
		return r.unexpected("a digit")
	}
	if r.skip('e', 'E') {
		if r.skip('+', '-'); !r.digits() {
			return r.unexpected("a digit")
		}
	}
	return nil
}

// skip steps over one of two bytes, and says whether one was there.
func (r *jsonReader) skip(one, other byte) bool {
	is := r.i < len(r.b) && (r.b[r.i] == one || r.b[r.i] == other)
	if is {
		r.i++
	}
	return is
}

// digits steps over digits and says whether there were any.
func (r *jsonReader) digits() bool {
	start := r.i
	for r.i < len(r.b) && r.b[r.i]-'0' <= 9 {
		r.i++
	}
	return r.i > start
}

// open notes that the bracket c is open, inside depth others.
func (r *jsonReader) open(depth int, c byte) {
	word, bit := r.kindsAt(depth), uint64(1)<<(depth%64)
	if *word &^= bit; c == '{' {
		*word |= bit
	}
}

// closing is the bracket that ends the innermost of depth open ones.
func (r *jsonReader) closing(depth int) byte {
	if *r.kindsAt(depth - 1)>>((depth-1)%64)&1 == 1 {
		return '}'
	}
	return ']'
}

// kindsAt is the word with the bit of a bracket inside depth others.
func (r *jsonReader) kindsAt(depth int) *uint64 {
	word := depth / 64
	if word < len(r.kinds) { // Fast path
		return &r.kinds[word]
	}
	if word -= len(r.kinds); word == len(r.deeper) {
		r.deeper = append(r.deeper, 0)
	}
	return &r.deeper[word]
}

func (r *jsonReader) unexpected(want string) error {
	if err := byteOrderMark(r.b); err != nil && r.i == 0 {
		return err
	}
	if r.i >= len(r.b) {
		return fmt.Errorf("expected %s at byte %d, found the end", want, r.i)
	}
	return fmt.Errorf("expected %s at byte %d, found %q", want, r.i, r.b[r.i])
}

// reset points the reader at the start of b.
func (r *jsonReader) reset(b []byte) {
	r.b, r.i, r.spaces, r.err, r.deeper = b, 0, 0, nil, nil
}

var errByteOrderMark = errors.New("the body begins with a byte order mark: send UTF-8 without one")

// byteOrderMark is an error when a text begins with such a mark, of UTF-8 or UTF-16: invisible in what its sender looks at.
func byteOrderMark(text []byte) error {
	for _, mark := range []string{"\xef\xbb\xbf", "\xff\xfe", "\xfe\xff"} {
		if bytes.HasPrefix(text, []byte(mark)) {
			return errByteOrderMark
		}
	}
	return nil
}
