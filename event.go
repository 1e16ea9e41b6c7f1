// The event: what it holds, what makes two of them the same, and its canonical JSON.
//
// event.go turns an event into the key and the value that go on Kafka. Both ends of the system use it: ingest.go for
// what clients send, worker.go for what Kafka holds. It knows what a price is worth, too. It owns no goroutine and no I/O.

package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"math/bits"
	"strconv"
)

// event is one parsed event. Every slice points into the text that it was read from, or into the eventParser that filled it,
// and is valid until that text changes or the parser reads on.
//
// A new field also goes into fieldSet to fieldByName, appendEvent, maxEncoded, validate.go (form, field), batch.go (block to event)
// and schema.sql; TestFields and TestMaxEncoded fail until all but the last have it. What makes two events different also goes into id.
type event struct {
	name       []byte
	channel    []byte // web, mobile_app, api or empty
	campaignID []byte
	userID     []byte
	timestamp  int64  // Unix seconds
	insertID   []byte // the sender's own id of the event, or empty
	tags       [][]byte
	metadata   []byte // a compact JSON object, or empty when absent
}

// Spans of event time, in seconds. maxUnixSeconds is the last one that ClickHouse's DateTime holds: 2106.
const (
	hourSeconds    = 3600
	daySeconds     = 24 * hourSeconds
	maxUnixSeconds = 1<<32 - 1
)

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

// maxNameBytes is what a field's name takes as it is sent, with 6 bytes of an escape for each character. Longer ones are not looked at.
const maxNameBytes = 6*len("event_name_") + len(`""`)

// name is that of the first field in f.
func (f fieldSet) name() string { return fieldNames[bits.TrailingZeros16(uint16(f))] }

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

// storable says whether ClickHouse's DateTime can hold the event's time. checkAge implies it.
func (e *event) storable() bool { return e.timestamp >= 0 && e.timestamp <= maxUnixSeconds }

// eventID is the event's identity: SHA-256 over event_name|user_id|timestamp|channel, and |insert_id when there is one.
type eventID [sha256.Size]byte

// isKey says whether key is the id in lower-case hex.
func (id *eventID) isKey(key []byte) bool {
	var own [2 * sha256.Size]byte
	hex.Encode(own[:], id[:])
	return string(key) == string(own[:])
}

// id computes the event's id. A | or \ in the free fields is escaped, so that no two events share an input; without them
// the input is the plain join. buf is scratch space, returned grown.
func (e *event) id(buf []byte) (eventID, []byte) {
	buf = appendEscapedPipes(buf[:0], e.name)
	buf = append(buf, '|')
	buf = appendEscapedPipes(buf, e.userID)
	buf = append(buf, '|')
	buf = strconv.AppendInt(buf, e.timestamp, 10)
	buf = append(buf, '|')
	buf = append(buf, e.channel...)
	if len(e.insertID) > 0 {
		buf = append(buf, '|')
		buf = appendEscapedPipes(buf, e.insertID)
	}
	return sha256.Sum256(buf), buf
}

func appendEscapedPipes(dst, s []byte) []byte {
	if bytes.IndexByte(s, '|') < 0 && bytes.IndexByte(s, '\\') < 0 { // Fast path
		return append(dst, s...)
	}
	for _, c := range s {
		if c == '|' || c == '\\' {
			dst = append(dst, '\\')
		}
		dst = append(dst, c)
	}
	return dst
}

// appendEvent appends the canonical JSON of e: fixed field order, no spaces, absent fields left out.
func appendEvent(dst []byte, e *event) []byte {
	dst = appendString(append(dst, `{"event_name":`...), e.name)
	dst = appendString(append(dst, `,"user_id":`...), e.userID)
	dst = append(dst, `,"timestamp":`...)
	dst = strconv.AppendInt(dst, e.timestamp, 10)
	dst = appendText(dst, `,"channel":`, e.channel)
	dst = appendText(dst, `,"campaign_id":`, e.campaignID)
	dst = appendText(dst, `,"insert_id":`, e.insertID)
	if len(e.tags) > 0 {
		dst = append(dst, `,"tags":[`...)
		for i, t := range e.tags {
			if i > 0 {
				dst = append(dst, ',')
			}
			dst = appendString(dst, t)
		}
		dst = append(dst, ']')
	}
	if len(e.metadata) > 0 {
		dst = append(dst, `,"metadata":`...)
		dst = append(dst, e.metadata...)
	}
	return append(dst, '}')
}

// appendText appends a field that is not empty.
func appendText(dst []byte, name string, text []byte) []byte {
	if len(text) == 0 {
		return dst
	}
	return appendString(append(dst, name...), text)
}

// maxEncoded is the most that appendEvent appends for e.
func (e *event) maxEncoded() int {
	const frame = len(`{"event_name":"","user_id":"","timestamp":-9223372036854775808,"channel":"",` +
		`"campaign_id":"","insert_id":"","tags":[],"metadata":}`)
	n := len(e.name) + len(e.userID) + len(e.channel) + len(e.campaignID) + len(e.insertID)
	for _, t := range e.tags {
		n += len(t) + 2 // quotes, a comma and, as the sum is doubled, one byte too many
	}
	return frame + 2*n + len(e.metadata) // " and \ are written with a \ in front
}

// appendString appends s, valid UTF-8, as a JSON string.
func appendString[S []byte | string](dst []byte, s S) []byte {
	const hex = "0123456789abcdef"
	dst = append(dst, '"')
	start := 0
	for i := 0; i < len(s); i++ {
		if i+8 <= len(s) && specialBytes(binary.LittleEndian.Uint64([]byte(s[i:i+8]))) == 0 { // Fast path
			i += 7
			continue
		}
		c := s[i]
		if c >= 0x20 && c != '"' && c != '\\' {
			continue
		}
		dst = append(dst, s[start:i]...)
		start = i + 1
		switch c {
		case '"', '\\':
			dst = append(dst, '\\', c)
		default:
			dst = append(dst, '\\', 'u', '0', '0', hex[c>>4], hex[c&15])
		}
	}
	dst = append(dst, s[start:]...)
	return append(dst, '"')
}

const ones, highBits = 0x0101010101010101, 0x8080808080808080 // of eight bytes

// specialBytes has the high bit of each byte of x that does not stand for itself in a string, or is not ASCII, up to the first:
// beyond it, others may have theirs, too.
func specialBytes(x uint64) uint64 {
	quote, slash := x^ones*'"', x^ones*'\\'
	return (x | (x - ones*' ') | (quote - ones) | (slash - ones)) & highBits
}

// maybeControl is 0 when eight bytes have no control character, nor anything beyond ASCII.
func maybeControl(x uint64) uint64 { return (x | (x - ones*' ') | (x + ones)) & highBits }

// A price is Decimal(18, 4) in the table.
const (
	priceDecimals = 4
	maxPrice      = 1_000_000_000_000_000_000 - 1 // in its last decimal
)

// decimalOf is a number of JSON as the table has it: rounded to the last decimal, halves away from zero, and 0 when it is too large. It
// reads digits, because a float has 15 of them and the table 18.
func decimalOf(number []byte) int64 {
	digits, isNegative := bytes.CutPrefix(number, []byte("-"))
	exponent := 0
	if e := bytes.IndexAny(digits, "eE"); e >= 0 { // Slow path
		exponent, digits = exponentOf(digits[e+1:]), digits[:e]
	}
	whole, fraction, _ := bytes.Cut(digits, []byte("."))
	n, at, wanted := int64(0), 0, len(whole)+exponent+priceDecimals // digits, up to the last decimal
	for _, part := range [...][]byte{whole, fraction} {
		for _, c := range part {
			if at < wanted && n > maxPrice/10 {
				return 0
			}
			if at < wanted {
				n = 10*n + int64(c-'0')
			} else if at == wanted && c >= '5' {
				n++
			}
			at++
		}
	}
	for ; at < wanted && n > 0; at++ {
		if n > maxPrice/10 {
			return 0
		}
		n *= 10
	}
	switch {
	case n > maxPrice: // it was rounded
		return 0
	case isNegative:
		n = -n
	}
	return n
}

// exponentOf reads what stands behind the e of a number, up to more than its digits can make up for.
func exponentOf(b []byte) (n int) {
	const most = 1 << 30
	for _, c := range b {
		if c != '-' && c != '+' {
			n = min(10*n+int(c-'0'), most)
		}
	}
	if b[0] == '-' {
		return -n
	}
	return n
}

// revenueRule says which events' prices are revenue: PURCHASE_EVENTS and CURRENCY. The tables keep it as JSON.
type revenueRule struct {
	Events   []string `json:"purchase_events"`
	Currency string   `json:"currency"`
}

func (r *revenueRule) text() string {
	b, _ := json.Marshal(r) // of texts
	return string(b)
}
