// The column block: rows of events in ClickHouse's own layout, filled without garbage.
//
// A block is owned by one worker while it fills and by the inserter while it is sent; they hand it over under the
// worker's lock. It keeps its memory when it is emptied, so that a block in steady use never allocates. Beside the
// rows it remembers how far into each partition they reach: that is what may be committed once they are stored.

package main

import (
	"bytes"
	"time"

	"github.com/ClickHouse/ch-go/proto"
	"github.com/twmb/franz-go/pkg/kgo"
)

// block is rows of the table events. A column is declared, named in newBlock's table, filled in append and read in event.
type block struct {
	eventID    idColumn
	eventName  dictColumn
	channel    dictColumn
	campaignID dictColumn
	userID     textColumn
	insertID   textColumn
	timestamp  timeColumn
	tags       listColumn
	metadata   textColumn
	price      priceColumn
	currency   dictColumn

	columns proto.Input
	json    skimmer                   // of metadata
	kept    []int                     // scratch of filter
	row     event                     // scratch of event
	records []*kgo.Record             // of the rows, for the case that ClickHouse rejects some
	bytes   int                       // of the records
	reread  bool                      // some of the rows may have been stored by an owner that died over it
	offsets map[int32]kgo.EpochOffset // by partition: how far it has been taken in, where to go on from
}

// roundCall is how workers ask for a round.
type roundCall struct {
	arrived chan time.Time // when the first row came since the last round was taken
	full    chan struct{}  // a block has its last row
}

func newRoundCall() *roundCall {
	return &roundCall{arrived: make(chan time.Time, 1), full: make(chan struct{}, 1)}
}

// notify puts v into a channel with room for one, unless an earlier one waits there.
func notify[T any](c chan T, v T) {
	select {
	case c <- v:
	default:
	}
}

func drain[T any](c chan T) {
	select {
	case <-c:
	default:
	}
}

// keeper is a column that rows can be taken out of: keep leaves these, which ascend. The column keeps its memory, unless no row
// is left and huge events blew it up.
type keeper interface{ keep(rows []int) }

// Bytes a row is expected to take; a block grows beyond them once and keeps what it grew to.
const (
	expectUserBytes     = 24
	expectInsertIDBytes = 8
	expectMetadataBytes = 128
)

func newBlock(rows int) *block {
	b := new(block)
	b.columns = proto.Input{ // created_at is left to the server's clock
		{Name: "event_id", Data: &b.eventID}, {Name: "event_name", Data: &b.eventName}, {Name: "channel", Data: &b.channel},
		{Name: "campaign_id", Data: &b.campaignID}, {Name: "user_id", Data: &b.userID}, {Name: "insert_id", Data: &b.insertID}, {Name: "timestamp", Data: &b.timestamp},
		{Name: "tags", Data: &b.tags}, {Name: "metadata", Data: &b.metadata}, {Name: "price", Data: &b.price}, {Name: "currency", Data: &b.currency},
	}
	b.eventID.ColFixedStr32 = make(proto.ColFixedStr32, 0, rows)
	b.userID.init(rows, expectUserBytes)
	b.insertID.init(rows, expectInsertIDBytes)
	b.metadata.init(rows, expectMetadataBytes)
	b.timestamp.Data = make([]proto.DateTime, 0, rows)
	b.tags.offsets = make(proto.ColUInt64, 0, rows)
	b.price.ColDecimal64 = make(proto.ColDecimal64, 0, rows)
	b.records = make([]*kgo.Record, 0, rows)
	b.offsets = map[int32]kgo.EpochOffset{}
	for _, d := range []*dictColumn{&b.eventName, &b.channel, &b.campaignID, &b.tags.dictColumn, &b.currency} {
		d.init(rows)
	}
	return b
}

// rows is the number of events in the block.
func (b *block) rows() int { return len(b.timestamp.Data) }

// append adds one event and the record that it came from. It copies every byte of ev that it keeps: ev may be reused
// at once.
func (b *block) append(id *eventID, ev *event, rec *kgo.Record) {
	b.records = append(b.records, rec)
	b.bytes += recordBytes(rec)
	b.eventID.Append(*id)
	b.eventName.append(ev.name)
	b.channel.append(ev.channel)
	b.campaignID.append(ev.campaignID)
	b.userID.AppendBytes(ev.userID)
	b.insertID.AppendBytes(ev.insertID)
	b.timestamp.Data = append(b.timestamp.Data, proto.DateTime(ev.timestamp))
	b.tags.append(ev.tags)
	b.metadata.AppendBytes(ev.metadata)
	price, currency := priceOf(&b.json, ev.metadata)
	b.price.ColDecimal64 = append(b.price.ColDecimal64, price)
	b.currency.append(currency)
}

// event is the row's event. It lives until the block changes, its tags until the next call.
func (b *block) event(row int) *event {
	b.row = event{
		name: b.eventName.value(row), channel: b.channel.value(row), campaignID: b.campaignID.value(row), userID: b.userID.RowBytes(row),
		insertID: b.insertID.RowBytes(row), timestamp: b.at(row), tags: b.tags.appendItems(b.row.tags[:0], row), metadata: b.metadata.RowBytes(row),
	}
	return &b.row
}

// id is the row's event id; it lives until the block changes.
func (b *block) id(row int) *eventID { return (*eventID)(&b.eventID.ColFixedStr32[row]) }

// at is the row's Unix second.
func (b *block) at(row int) int64 { return int64(b.timestamp.Data[row]) }

// keep leaves these rows, which ascend, and what the block has reached.
func (b *block) keep(rows []int) {
	if len(rows) == b.rows() {
		return
	}
	for _, c := range b.columns {
		c.Data.(keeper).keep(rows)
	}
	kept := keepRows(b.records, rows)
	clear(b.records[len(kept):])
	b.records = kept
}

// filter leaves the rows for which keep is true, and returns how many went.
func (b *block) filter(keep func(row int) bool) (gone int) {
	b.kept = b.kept[:0]
	for row := range b.rows() {
		if keep(row) {
			b.kept = append(b.kept, row)
		}
	}
	gone = b.rows() - len(b.kept)
	b.keep(b.kept)
	return gone
}

// part is a block of the rows [from, end).
func (b *block) part(from, end int) *block {
	part := newBlock(end - from)
	for row := from; row < end; row++ {
		part.append(b.id(row), b.event(row), b.records[row])
	}
	return part
}

// A round is small with so many rows of so many bytes: copying them takes 0.3 ms of CPU.
const (
	gatherRows  = 1000
	gatherBytes = 1 << 20
)

// gather returns the blocks of a round, those of a small one as rows of into: ClickHouse takes a sixth less CPU for a hundred rows in
// one block than in twenty.
func gather(round []*block, into *block) []*block {
	bytes := 0
	for _, b := range round {
		bytes += b.bytes
	}
	if len(round) == 1 || rowsOf(round) > gatherRows || bytes > gatherBytes {
		return round
	}
	for _, b := range round {
		for row := range b.rows() {
			into.append(b.id(row), b.event(row), b.records[row])
		}
	}
	return []*block{into}
}

func rowsOf(round []*block) (n int) {
	for _, b := range round {
		n += b.rows()
	}
	return n
}

// reset empties the block.
func (b *block) reset() {
	b.keep(nil)
	clear(b.offsets)
	b.bytes, b.reread = 0, false
}

// outOfKeys says that a dictionary may not have room for the values of another event.
func (b *block) outOfKeys() bool {
	return max(b.eventName.index.Rows(), b.channel.index.Rows(), b.campaignID.index.Rows(), b.tags.index.Rows(), b.currency.index.Rows()) > maxKeys-maxTags
}

// otherCurrency stands for a metadata.currency that is no text, or is longer than any: it is not absent, and no currency is called so.
const otherCurrency = "?"

// priceOf takes price and currency out of an event's metadata; 0 and nil when they are not there, or null. Of members with one name the
// first counts, as for ClickHouse's JSONExtract. A price may also be a text. The currency lives until r is used again. A tree of all
// metadata would be large: the skimmer steps over what is not asked for.
func priceOf(r *skimmer, metadata []byte) (price proto.Decimal64, currency []byte) {
	var m skimmed
	var priced, named []byte // as they were sent
	r.reset(metadata)
	if !r.eat('{') {
		return 0, nil
	}
	for n := 0; (priced == nil || named == nil) && r.member(n, &m); n++ {
		name := m.name[1 : len(m.name)-1]
		if len(m.name) <= maxNameBytes && bytes.IndexByte(name, '\\') >= 0 { // Slow path
			name = r.word(m.name)
		}
		switch string(name) {
		case "price":
			if priced == nil {
				priced = m.raw
			}
		case "currency":
			if named == nil {
				named = m.raw
			}
		}
	}
	if len(priced) > 0 && priced[0] == '"' {
		priced = r.word(priced)
	}
	if isNumber(priced) {
		price = proto.Decimal64(decimalOf(priced))
	}
	switch {
	case len(named) == 0 || named[0] == 'n':
	case named[0] == '"' && len(named) <= maxTextBytes:
		currency = r.word(named)
	default:
		currency = []byte(otherCurrency)
	}
	return price, currency
}

// isNumber says whether a text is a number of JSON.
func isNumber(b []byte) bool {
	if len(b) == 0 || b[0] != '-' && b[0]-'0' > 9 {
		return false
	}
	end, want := skimScalar(b, 0)
	return want == "" && end == len(b)
}

// idColumn is FixedString(32).
type idColumn struct{ proto.ColFixedStr32 }

func (c *idColumn) keep(rows []int) { c.ColFixedStr32 = keepRows(c.ColFixedStr32, rows) }

// Type is a constant where ch-go formats one for every block.
func (*idColumn) Type() proto.ColumnType { return "FixedString(32)" }

// timeColumn is DateTime.
type timeColumn struct{ proto.ColDateTime }

func (c *timeColumn) keep(rows []int) { c.Data = keepRows(c.Data, rows) }

// priceColumn is the table's Decimal(18, 4).
type priceColumn struct{ proto.ColDecimal64 }

func (*priceColumn) Type() proto.ColumnType { return "Decimal(18, 4)" }
func (c *priceColumn) keep(rows []int)      { c.ColDecimal64 = keepRows(c.ColDecimal64, rows) }

// textColumn is String.
type textColumn struct {
	proto.ColStr
	room int // that one value is expected to take
}

func (c *textColumn) init(rows, width int) {
	c.ColStr = proto.ColStr{Buf: make([]byte, 0, rows*width), Pos: make([]proto.Position, 0, rows)}
	c.room = width
}

func (c *textColumn) keep(rows []int) {
	if c.Pos = keepRows(c.Pos, rows); len(rows) > 0 {
		return
	}
	c.Buf = c.Buf[:0]
	if most := 4 * cap(c.Pos) * c.room; cap(c.Buf) > most {
		c.Buf = make([]byte, 0, most/4)
	}
}

// keepRows moves the values of these rows, which ascend, to the front.
func keepRows[T any](values []T, rows []int) []T {
	for i, row := range rows {
		values[i] = values[row]
	}
	return values[:len(rows)]
}

// dictColumn is LowCardinality(String) with its dictionary kept from block to block: a value costs one map lookup,
// and only a new one allocates. ch-go's generic column builds the dictionary anew for each block.
type dictColumn struct {
	proto.ColLowCardinalityRaw
	index  proto.ColStr
	lookup map[string]uint16
}

const (
	// maxKeys is how many values keys of 16 bits tell apart.
	maxKeys = 1 << 16
	// A dictionary beyond these is dropped: it is sent with every block, and each block of each worker has five.
	maxDict      = 1024
	maxDictBytes = 16 << 10
)

func (d *dictColumn) init(rows int) {
	d.Key = proto.KeyUInt16
	d.Keys16 = make(proto.ColUInt16, 0, rows)
	d.Index = &d.index
	d.clearDict()
}

func (d *dictColumn) clearDict() {
	d.index = proto.ColStr{}
	d.index.AppendBytes(nil) // ClickHouse keeps the default value at 0
	d.lookup = map[string]uint16{"": 0}
}

func (d *dictColumn) append(v []byte) {
	key, ok := d.lookup[string(v)] // no copy for a lookup
	if !ok {                       // Slow path: a value that this block has not had before.
		key = uint16(d.index.Rows())
		d.index.AppendBytes(v)
		d.lookup[string(v)] = key
	}
	d.Keys16 = append(d.Keys16, key)
}

// Type is a constant where ch-go formats one for every block.
func (*dictColumn) Type() proto.ColumnType { return "LowCardinality(String)" }

// Rows goes without the copy to the heap that ch-go's value receiver makes.
func (d *dictColumn) Rows() int { return len(d.Keys16) }

// value is the row's; it lives until the column changes.
func (d *dictColumn) value(row int) []byte { return d.index.RowBytes(int(d.Keys16[row])) }

func (d *dictColumn) keep(rows []int) {
	d.Keys16 = keepRows(d.Keys16, rows)
	if len(rows) == 0 && (d.index.Rows() > maxDict || len(d.index.Buf) > maxDictBytes) {
		d.clearDict()
	}
}

// listColumn is Array(LowCardinality(String)).
type listColumn struct {
	dictColumn                 // of the items
	offsets    proto.ColUInt64 // running total of items, as Array wants it
}

func (l *listColumn) append(items [][]byte) {
	for _, v := range items {
		l.dictColumn.append(v)
	}
	l.offsets = append(l.offsets, uint64(l.dictColumn.Rows()))
}

// appendItems appends the row's.
func (l *listColumn) appendItems(dst [][]byte, row int) [][]byte {
	item := uint64(0)
	if row > 0 {
		item = l.offsets[row-1]
	}
	for ; item < l.offsets[row]; item++ {
		dst = append(dst, l.value(int(item)))
	}
	return dst
}

func (*listColumn) Type() proto.ColumnType { return "Array(LowCardinality(String))" }
func (l *listColumn) Rows() int            { return len(l.offsets) }
func (l *listColumn) EncodeColumn(buf *proto.Buffer) {
	l.offsets.EncodeColumn(buf)
	l.dictColumn.EncodeColumn(buf)
}
func (l *listColumn) WriteColumn(w *proto.Writer) {
	l.offsets.WriteColumn(w)
	l.dictColumn.WriteColumn(w)
}

func (l *listColumn) keep(rows []int) {
	var items []int
	first, ends := uint64(0), l.offsets[:0]
	for row, end := range l.offsets { // which is read before a new one takes its place
		if len(ends) < len(rows) && rows[len(ends)] == row {
			for ; first < end; first++ {
				items = append(items, int(first))
			}
			ends = append(ends, uint64(len(items)))
		}
		first = end
	}
	l.offsets = ends
	l.dictColumn.keep(items)
}
