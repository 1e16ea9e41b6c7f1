// Pages of events: the newest first, each stored event once, whatever comes in meanwhile.
//
// A page goes on where the last one ended, at a time and an id, and not after a number of rows: an event that comes in later moves
// no other. One that is older than where a reader has got to is for the next reader.

package questions

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/ClickHouse/ch-go"
	"github.com/ClickHouse/ch-go/proto"
)

const (
	// firstWindow is how many seconds of event time are looked through first, and windowGrowth how many times as many next, as long as
	// a page is not full: without an event_name, each second in it is read.
	firstWindow  = 10
	windowGrowth = 8
	// maxPageBytes is about what a page holds of events; it ends early beyond it. An event is at most 64 KiB.
	maxPageBytes = 4 << 20
	// overhead is about what an event takes beside its tags and metadata.
	overhead = 500
	idBytes  = 32
	// receivedAt is RFC 3339 with the milliseconds that the column has.
	receivedAt = "2006-01-02T15:04:05.000Z07:00"
)

// Cursor is a place among the events: behind one of them, in the order newest first. The zero value is before all. From is the first
// second of the range that is read, for whoever asks for more of it without saying so.
type Cursor struct {
	At, From int64
	ID       [idBytes]byte
}

// String is the cursor as a client gets it: 64 bits of each second, then the id.
func (c Cursor) String() string {
	b := binary.BigEndian.AppendUint64(nil, uint64(c.At))
	b = binary.BigEndian.AppendUint64(b, uint64(c.From))
	return base64.RawURLEncoding.EncodeToString(append(b, c.ID[:]...))
}

// ParseCursor reads what String wrote.
func ParseCursor(s string) (c Cursor, err error) {
	b, err := base64.RawURLEncoding.DecodeString(s)
	if err != nil || len(b) != 16+idBytes {
		return c, errors.New("is not the next of an answer")
	}
	c.At, c.From = int64(binary.BigEndian.Uint64(b)), int64(binary.BigEndian.Uint64(b[8:]))
	copy(c.ID[:], b[16:])
	return c, nil
}

// Listing is a reading of the events from one Unix second to another, both included, that Where is true of: SQL, with Parameters.
type Listing struct {
	From, To   int64
	Where      string
	Parameters []proto.Parameter
	After      Cursor
	window     int64 // seconds to look through next
}

// event is one as it is listed: as it was sent, with its id, and when ClickHouse got it.
type event struct {
	EventID    string          `json:"event_id"`
	Name       string          `json:"event_name"`
	UserID     string          `json:"user_id"`
	Timestamp  int64           `json:"timestamp"`
	Channel    string          `json:"channel,omitempty"`
	CampaignID string          `json:"campaign_id,omitempty"`
	InsertID   string          `json:"insert_id,omitempty"`
	Tags       []string        `json:"tags,omitempty"`
	Metadata   json.RawMessage `json:"metadata,omitempty"`
	ReceivedAt string          `json:"received_at"`
}

// Next reads up to limit events, or 4 MiB of them, and gives each to take as a line of JSON, which is valid until take returns. It moves
// After behind the last. more says whether there may be others behind that. {events} is the table.
func (l *Listing) Next(ctx context.Context, limit int, do Do, take func(line []byte) error) (more bool, err error) {
	var line bytes.Buffer
	encoder := json.NewEncoder(&line)
	encoder.SetEscapeHTML(false)
	l.window = max(l.window, firstWindow)
	for taken, size := 0, 0; ; {
		top := l.To
		if l.After != (Cursor{}) {
			top = min(top, l.After.At)
		}
		if top < l.From {
			return false, nil
		}
		bottom := max(l.From, top-l.window+1)
		p := page{rows: limit - taken, bytes: maxPageBytes - size}
		if err := p.ask(ctx, l, bottom, top, do); err != nil {
			return false, err
		}
		for i := range p.events {
			line.Reset()
			encoder.Encode(&p.events[i]) // to memory, of types that can be encoded
			if err := take(bytes.TrimSuffix(line.Bytes(), []byte("\n"))); err != nil {
				return false, err
			}
		}
		if n := len(p.events); n > 0 {
			l.After = p.last
		}
		taken, size = taken+len(p.events), size+p.size
		switch {
		case taken == limit || p.read < p.found: // the page is full, and about as many seconds hold the next one
			l.window = max(firstWindow, 2*(top-l.After.At+1))
			return true, nil
		case p.read == p.rows: // but some came twice
			continue
		case bottom == l.From:
			return false, nil
		}
		l.After = Cursor{At: bottom - 1, From: l.From, ID: behindAll}
		l.window *= windowGrowth
	}
}

// behindAll is as an id before all events of a second, the newest of which comes first.
var behindAll = [idBytes]byte(bytes.Repeat([]byte{0xff}, idBytes))

// page is one query of a listing: at most so many rows, and, but for the first, of so many bytes. found is how many there are
// without the bound of bytes, read how many of them came.
type page struct {
	rows, bytes int
	events      []event
	last        Cursor
	size        int
	found, read int
}

// ask reads the events from bottom to top, both included. A row that is stored twice, until a merge, is one event. ClickHouse is not told
// so: LIMIT BY would have it read every column of all rows, instead of those of the rows that it answers.
func (p *page) ask(ctx context.Context, l *Listing, bottom, top int64, do Do) error {
	var (
		timestamp                                         proto.ColDateTime
		id                                                proto.ColFixedStr32
		name, channel, campaign, user, insertID, metadata proto.ColStr
		tags                                              = new(proto.ColStr).Array()
		created                                           proto.ColDateTime64
		total, found                                      proto.ColUInt64
		results                                           proto.Results
	)
	where := fmt.Sprintf("timestamp >= %d AND timestamp <= %d AND %s", bottom, top, l.Where)
	if l.After.At == top && l.After.ID != behindAll && l.After != (Cursor{}) {
		where += fmt.Sprintf(" AND (timestamp < %d OR event_id < unhex('%x'))", top, l.After.ID)
	}
	const order = "ORDER BY timestamp DESC, event_id DESC"
	body := strings.NewReplacer("{where}", where, "{order}", order, "{rows}", strconv.Itoa(p.rows), "{bytes}", strconv.Itoa(p.bytes),
		"{overhead}", strconv.Itoa(overhead)).Replace(`
SELECT timestamp, event_id, name, channel, campaign, user_id, insert_id, tags, metadata, created_at, total, found
FROM
(
    SELECT *, row_number() OVER newest AS nth, sum(toUInt64(length(metadata) + length(toString(tags)) + {overhead})) OVER newest AS total, count() OVER () AS found
    FROM
    (
        SELECT timestamp, event_id, CAST(event_name, 'String') AS name, CAST(channel, 'String') AS channel, CAST(campaign_id, 'String') AS campaign,
            user_id, insert_id, CAST(tags, 'Array(String)') AS tags, metadata, created_at
        FROM {events}
        WHERE {where}
        {order}
        LIMIT {rows}
    )
    WINDOW newest AS ({order} ROWS BETWEEN UNBOUNDED PRECEDING AND CURRENT ROW)
)
WHERE nth = 1 OR total <= {bytes}
{order}`)
	for _, c := range []proto.ColResult{&timestamp, &id, &name, &channel, &campaign, &user, &insertID, tags, &metadata, &created, &total, &found} {
		results = append(results, proto.ResultColumn{Data: c})
	}
	return do(ctx, func() { p.events, p.last, p.found, p.read, p.size = nil, Cursor{}, 0, 0, 0 }, ch.Query{Body: body, Parameters: l.Parameters, Result: results,
		OnResult: func(_ context.Context, b proto.Block) error {
			for i := range b.Rows {
				p.found, p.size = int(found[i]), int(total[i])
				p.read++
				this := Cursor{At: int64(timestamp.Data[i]), From: l.From, ID: id[i]}
				if this == p.last {
					continue
				}
				p.last = this
				p.events = append(p.events, event{
					EventID: hex.EncodeToString(id[i][:]), Name: text(name.Row(i)), UserID: text(user.Row(i)), Timestamp: p.last.At,
					Channel: text(channel.Row(i)), CampaignID: text(campaign.Row(i)), InsertID: text(insertID.Row(i)),
					Tags: texts(tags.Row(i)), Metadata: object(metadata.Row(i)), ReceivedAt: created.Row(i).UTC().Format(receivedAt),
				})
			}
			return nil
		}})
}

// text and object are what a row has that somebody else inserted, in a form that JSON takes.
func text(s string) string { return strings.ToValidUTF8(s, "\uFFFD") }

func object(s string) json.RawMessage {
	if s = text(s); s == "" || json.Valid([]byte(s)) {
		return json.RawMessage(s)
	}
	quoted, _ := json.Marshal(s)
	return quoted
}

func texts(list []string) []string {
	for i := range list {
		list[i] = text(list[i])
	}
	return list
}
