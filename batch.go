// The column block: rows of events in ClickHouse's own layout, filled without garbage.
//
// A block is owned by one worker while it fills and by the inserter while it is sent; they hand it over under the
// worker's lock. It keeps its memory when it is emptied, so that a block in steady use never allocates. Beside the
// rows it remembers how far into each partition they reach: that is what may be committed once they are stored.

package main

import (
	"math"
	"strconv"

	"github.com/ClickHouse/ch-go/proto"
	"github.com/twmb/franz-go/pkg/kgo"
)

// block is up to cap rows of the table events, in the order of its columns.
type block struct {
	eventID    proto.ColFixedStr
	eventName  dictColumn
	channel    dictColumn
	campaignID dictColumn
	userID     proto.ColStr
	timestamp  proto.ColDateTime
	tagOffsets proto.ColUInt64 // running total, as Array wants it
	tags       dictColumn
	metadata   proto.ColStr
	price      proto.ColDecimal64
	currency   dictColumn

	priceInput proto.ColInput // price under the type with its scale
	tagsArray  arrayColumn
	records    []*kgo.Record // of the rows, for the case that ClickHouse rejects some
	suspects   []suspect     // records that may be copies, beside the rows
	reached    []position
}

// position is how far a partition has been taken in: next is the offset to go on from.
type position struct {
	partition int32
	epoch     int32
	next      int64
}

// Bytes a row is expected to take; a block grows beyond them once and keeps what it grew to.
const (
	expectUserBytes     = 24
	expectMetadataBytes = 128
	expectTags          = 2
)

func newBlock(rows int) *block {
	b := new(block)
	b.eventID = proto.ColFixedStr{Size: len(eventID{}), Buf: make([]byte, 0, rows*len(eventID{}))}
	b.userID = newColStr(rows, expectUserBytes)
	b.metadata = newColStr(rows, expectMetadataBytes)
	b.timestamp.Data = make([]proto.DateTime, 0, rows)
	b.tagOffsets = make(proto.ColUInt64, 0, rows)
	b.price = make(proto.ColDecimal64, 0, rows)
	b.records = make([]*kgo.Record, 0, rows)
	for _, d := range []*dictColumn{&b.eventName, &b.channel, &b.campaignID, &b.tags, &b.currency} {
		d.init(rows)
	}
	b.priceInput = proto.Alias(&b.price, "Decimal(18, 4)")
	b.tagsArray = arrayColumn{offsets: &b.tagOffsets, data: &b.tags}
	return b
}

func newColStr(rows, width int) proto.ColStr {
	return proto.ColStr{Buf: make([]byte, 0, rows*width), Pos: make([]proto.Position, 0, rows)}
}

// rows is the number of events in the block.
func (b *block) rows() int { return len(b.timestamp.Data) }

// size is what the block holds, of what it may: rows and suspects.
func (b *block) size() int { return b.rows() + len(b.suspects) }

// append adds one event and the record that it came from. It copies every byte of ev that it keeps: ev may be reused
// at once.
func (b *block) append(id *eventID, ev *event, rec *kgo.Record) {
	b.records = append(b.records, rec)
	b.eventID.Buf = append(b.eventID.Buf, id[:]...)
	b.eventName.append(ev.name)
	b.channel.append(ev.channel)
	b.campaignID.append(ev.campaignID)
	b.userID.AppendBytes(ev.userID)
	b.timestamp.Data = append(b.timestamp.Data, proto.DateTime(ev.timestamp))
	for _, t := range ev.tags {
		b.tags.append(t)
	}
	b.tagOffsets = append(b.tagOffsets, uint64(b.tags.rows()))
	b.metadata.AppendBytes(ev.metadata)
	price, currency := priceOf(ev.metadata)
	b.price = append(b.price, price)
	b.currency.append(currency)
}

// reach notes that the block takes in the partition up to, not including, next.
func (b *block) reach(partition, epoch int32, next int64) {
	for i := range b.reached {
		if b.reached[i].partition == partition {
			b.reached[i].epoch, b.reached[i].next = epoch, next
			return
		}
	}
	b.reached = append(b.reached, position{partition: partition, epoch: epoch, next: next})
}

// input points columns at the block's, in insertColumns' order, for the next Data packet.
func (b *block) input(columns proto.Input) {
	columns[0].Data = &b.eventID
	columns[1].Data = &b.eventName
	columns[2].Data = &b.channel
	columns[3].Data = &b.campaignID
	columns[4].Data = &b.userID
	columns[5].Data = &b.timestamp
	columns[6].Data = &b.tagsArray
	columns[7].Data = &b.metadata
	columns[8].Data = b.priceInput
	columns[9].Data = &b.currency
}

// insertColumns is the input of an insert with no rows yet. created_at is left to the server's clock.
func insertColumns() proto.Input {
	names := []string{"event_id", "event_name", "channel", "campaign_id", "user_id", "timestamp", "tags", "metadata", "price", "currency"}
	in := make(proto.Input, len(names))
	for i, name := range names {
		in[i].Name = name
	}
	return in
}

// priceScale is the Decimal(18, 4) of the table.
const priceScale = 10000

// priceOf takes price and currency out of an event's metadata; 0 and nil when they are not there. A price beyond what
// Decimal(18, 4) holds counts as none.
func priceOf(metadata []byte) (price proto.Decimal64, currency []byte) {
	r := jsonReader{b: metadata}
	r.eat('{')
	for n := 0; ; n++ {
		if more, err := r.more(n, '}'); err != nil || !more {
			return price, currency
		}
		k, _ := r.key()
		v, err := r.value()
		if err != nil {
			return price, currency
		}
		switch string(k.raw) {
		case `"price"`:
			if f, err := strconv.ParseFloat(string(v.raw), 64); v.kind == 0 && err == nil && math.Abs(f) < 1e13 {
				price = proto.Decimal64(math.Round(f * priceScale))
			}
		case `"currency"`:
			if v.kind == '"' && len(v.raw) <= maxTextBytes {
				currency = v.text(new([]byte))
			}
		}
	}
}

// dictColumn is LowCardinality(String) with its dictionary kept from block to block: a value costs one map lookup,
// and only a new one allocates. ch-go's generic column builds the dictionary anew for each block.
type dictColumn struct {
	proto.ColLowCardinalityRaw
	index  proto.ColStr
	lookup map[string]uint32
}

// maxDict drops a dictionary that the data has outgrown: it is sent with every block.
const maxDict = 1024

func (d *dictColumn) init(rows int) {
	d.Key = proto.KeyUInt16
	d.Keys16 = make(proto.ColUInt16, 0, rows)
	d.Index = &d.index
	d.clearDict()
}

func (d *dictColumn) clearDict() {
	d.index.Reset()
	d.index.AppendBytes(nil) // ClickHouse keeps the default value at 0
	d.lookup = map[string]uint32{"": 0}
}

func (d *dictColumn) append(v []byte) {
	key, ok := d.lookup[string(v)] // no copy for a lookup
	if !ok {                       // Slow path: a value that this block has not had before.
		key = uint32(d.index.Rows())
		d.index.AppendBytes(v)
		d.lookup[string(v)] = key
	}
	if key > 0xffff && d.Key == proto.KeyUInt16 {
		d.widen()
	}
	d.AppendKey(int(key))
}

// rows is Rows without the copy to the heap that ch-go's value receiver makes.
func (d *dictColumn) rows() int {
	if d.Key == proto.KeyUInt16 {
		return len(d.Keys16)
	}
	return len(d.Keys32)
}

// widen moves to 32-bit keys when one block has more than 65,536 values (its tags can).
func (d *dictColumn) widen() {
	for _, k := range d.Keys16 {
		d.Keys32 = append(d.Keys32, uint32(k))
	}
	d.Key = proto.KeyUInt32
}

func (d *dictColumn) reset() {
	d.Keys16, d.Keys32 = d.Keys16[:0], d.Keys32[:0]
	d.Key = proto.KeyUInt16
	if d.index.Rows() > maxDict {
		d.clearDict()
	}
}

// arrayColumn is Array(LowCardinality(String)) over a dictColumn.
type arrayColumn struct {
	offsets *proto.ColUInt64
	data    *dictColumn
}

func (a *arrayColumn) Type() proto.ColumnType        { return proto.ColumnTypeArray.Sub(a.data.Type()) }
func (a *arrayColumn) Rows() int                     { return a.offsets.Rows() }
func (a *arrayColumn) EncodeState(buf *proto.Buffer) { a.data.EncodeState(buf) }
func (a *arrayColumn) EncodeColumn(buf *proto.Buffer) {
	a.offsets.EncodeColumn(buf)
	a.data.EncodeColumn(buf)
}
func (a *arrayColumn) WriteColumn(w *proto.Writer) { a.offsets.WriteColumn(w); a.data.WriteColumn(w) }

// reset empties the block and keeps its memory, unless one block of huge events blew it up.
func (b *block) reset() {
	b.eventID.Buf = b.eventID.Buf[:0]
	b.userID.Reset()
	b.timestamp.Data = b.timestamp.Data[:0]
	b.tagOffsets = b.tagOffsets[:0]
	b.metadata.Reset()
	b.price = b.price[:0]
	for _, d := range []*dictColumn{&b.eventName, &b.channel, &b.campaignID, &b.tags, &b.currency} {
		d.reset()
	}
	clear(b.records)
	clear(b.suspects)
	b.records, b.suspects, b.reached = b.records[:0], b.suspects[:0], b.reached[:0]
	if cap(b.metadata.Buf) > maxBlockMetadata {
		b.metadata.Buf = make([]byte, 0, cap(b.timestamp.Data)*expectMetadataBytes)
	}
}

// maxBlockMetadata is 1 KiB a row of a default block: 40 blocks of the largest metadata would be 1.3 GB.
const maxBlockMetadata = 2 << 20
