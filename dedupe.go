// Counted once: which events have been here before.
//
// The materialized view counts every inserted row, so a duplicate has to be caught before the insert. What is known of
// the past belongs to the inserter alone, which checks a round's ids in one goroutine, when everything earlier is either
// in ClickHouse or in its sets. A set holds the ids of one minute of event time; a minute with a set is known
// completely. What is in a set is stored, so a duplicate costs no lookup; rows of a minute without a set are looked up in
// ClickHouse by primary key, until there are enough of them to load the hour. Memory is bounded by DEDUPE_MEMORY; the
// minutes that were used longest ago go first.

package main

import (
	"container/list"
	"context"
	"encoding/binary"
	"fmt"
	"log/slog"
	"maps"
	"math/bits"
	"math/rand/v2"
	"slices"
	"strings"
	"sync/atomic"

	"github.com/ClickHouse/ch-go"
	"github.com/ClickHouse/ch-go/proto"
	"github.com/event-ingestion/event-ingestion/internal/questions"
)

const (
	minuteSeconds = 60
	hourMinutes   = hourSeconds / minuteSeconds
	// loadRows is how many rows of an hour without sets make it worth loading; below, they are looked up.
	loadRows = 64
	// loadIDs bounds one loading, and with it the time between two rounds: about 0.3 s. loadHours bounds its query: ClickHouse takes
	// at most 256 KiB of text, and 0.3 ms for each hour in it.
	loadIDs   = 2_000_000
	loadHours = 100
	// loadAgain is after how many more rows a minute is loaded again that did not fit.
	loadAgain = 100_000
	// maxWanted bounds the minutes that are remembered to have been looked up: records of any age may come.
	maxWanted = 100_000
	// setOverhead is about what a set takes beside its table, in bytes.
	setOverhead = 144
)

// dedupe knows which events are stored. Only the inserter's goroutine uses it, except for bytes and sets.
type dedupe struct {
	asker
	db      *clickhouse
	budget  int64        // DEDUPE_MEMORY, bytes of all sets
	bytes   atomic.Int64 // never above budget, a table and its larger successor included
	sets    atomic.Int64 // len(minutes) in the last round
	minutes map[int64]*idSet
	order   *list.List       // of the sets, the one that was used longest ago first
	wanted  map[int64]missed // by minute
	round   uint64

	tally    map[int64]int        // rows of the round, by minute
	doubtful int                  // of them, those of minutes without a set
	found    map[eventID]struct{} // of the rows looked up: those that ClickHouse has
}

// missed is rows of a minute that had to be looked up, because the minute is not known. The first ones do not count where it did not
// fit into memory when it was loaded last.
type missed struct{ rows, spared int }

func (m missed) counted() int { return max(m.rows-m.spared, 0) }

func newDedupe(a asker, db *clickhouse, budget int64) *dedupe {
	d := &dedupe{asker: a, db: db, budget: budget, tally: map[int64]int{}, found: map[eventID]struct{}{}}
	d.forgetAll()
	return d
}

// forgetAll starts over: others have stored events that the sets do not know.
func (d *dedupe) forgetAll() {
	d.minutes, d.order, d.wanted = map[int64]*idSet{}, list.New(), map[int64]missed{}
	d.bytes.Store(0)
}

// prepare does what needs ClickHouse before the round can be checked: it loads minutes that are worth it, and looks up
// the rows of minutes that are not known. It changes nothing in the round, so it can be repeated when it fails.
func (d *dedupe) prepare(ctx context.Context, round []*block) error {
	d.round++
	clear(d.tally)
	for _, b := range round {
		for _, at := range b.timestamp.Data {
			d.tally[int64(at)/minuteSeconds]++
		}
	}
	if err := d.load(ctx); err != nil {
		return err
	}
	d.doubtful = 0
	for minute, n := range d.tally {
		if set := d.minutes[minute]; set != nil && !d.makeRoom(set, n) {
			d.drop(minute)
		}
		if d.minutes[minute] == nil {
			d.doubtful += n
		}
	}
	d.sets.Store(int64(len(d.minutes)))
	if d.doubtful == 0 {
		return nil
	}
	return d.lookUp(ctx, round, false)
}

// cut takes the duplicates out of a prepared round, remembers what stays, and returns how many there were.
func (d *dedupe) cut(round []*block) (duplicates int) {
	for _, b := range round {
		duplicates += b.filter(func(row int) bool { return d.add(b.id(row), b.at(row)) })
	}
	return duplicates
}

// add says whether the event is new, and remembers it.
func (d *dedupe) add(id *eventID, at int64) bool {
	if set := d.minutes[at/minuteSeconds]; set != nil { // Fast path
		return set.add(idKeyOf(id))
	}
	if _, there := d.found[*id]; there {
		return false
	}
	d.found[*id] = struct{}{} // for its duplicates in this round
	return true
}

// forget is for an event that will not be stored now after all.
func (d *dedupe) forget(id *eventID, at int64) {
	if set := d.minutes[at/minuteSeconds]; set != nil {
		set.remove(idKeyOf(id))
	}
}

// lookUp fills found with the rows that ClickHouse has, by primary key: of all, or of those of minutes without a set.
func (d *dedupe) lookUp(ctx context.Context, round []*block, all bool) error {
	clear(d.found)
	var (
		name proto.ColStr
		at   proto.ColDateTime
		id   proto.ColFixedStr32
		got  proto.ColFixedStr32
	)
	for _, b := range round {
		for row, second := range b.timestamp.Data {
			if all || d.minutes[int64(second)/minuteSeconds] == nil {
				name.AppendBytes(b.eventName.value(row))
				at.Data = append(at.Data, second)
				id.Append(*b.id(row))
			}
		}
	}
	return d.Do(ctx, questions.EachRow(ch.Query{
		Body:          d.db.sql("SELECT event_id FROM {events anywhere}") + " WHERE (event_name, timestamp, event_id) IN (SELECT name, at, id FROM doubtful)",
		ExternalTable: "doubtful",
		ExternalData:  []proto.InputColumn{{Name: "name", Data: &name}, {Name: "at", Data: &at}, {Name: "id", Data: &id}},
	}, func(i int) { d.found[got[i]] = struct{}{} }, &got))
}

// load makes known what the round and those before it asked for in vain, newest first: whole hours, so that the minutes
// to come are known, too, or single minutes of an hour that is too large for that.
func (d *dedupe) load(ctx context.Context) error {
	if len(d.wanted) > maxWanted {
		clear(d.wanted)
	}
	hours := map[int64]int{}
	for minute, n := range d.tally {
		if set := d.minutes[minute]; set != nil {
			d.use(set)
		} else if d.budget > 0 {
			m := d.wanted[minute]
			m.rows += n
			d.wanted[minute] = m
			hours[minute/hourMinutes] = 0
		}
	}
	if len(hours) == 0 {
		return nil
	}
	for minute, m := range d.wanted {
		if _, asked := hours[minute/hourMinutes]; asked {
			hours[minute/hourMinutes] += m.counted()
		}
	}
	maps.DeleteFunc(hours, func(_ int64, n int) bool { return n < loadRows })
	if len(hours) == 0 {
		return nil
	}
	sorted := slices.Sorted(maps.Keys(hours))
	sorted = sorted[max(0, len(sorted)-loadHours):] // the others wait for the next round
	counts, err := d.countHours(ctx, sorted)
	if err != nil {
		return err
	}
	var spans []secondSpan
	room := min(loadIDs, d.budget/4/slotBytes)
	for _, hour := range slices.Backward(sorted) {
		if n := counts[hour]; n <= room {
			room -= n
			spans = append(spans, secondSpan{hour * hourSeconds, (hour + 1) * hourSeconds})
			continue
		}
		for minute := hour * hourMinutes; minute < (hour+1)*hourMinutes && room > 0; minute++ {
			if d.wanted[minute].counted() >= loadRows && d.minutes[minute] == nil {
				room -= counts[hour] / hourMinutes
				spans = append(spans, secondSpan{minute * minuteSeconds, (minute + 1) * minuteSeconds})
			}
		}
	}
	return d.read(ctx, spans)
}

// secondSpan is Unix seconds, from included, to excluded.
type secondSpan struct{ from, to int64 }

// countHours returns about how many events each hour has. events_hourly answers at once.
func (d *dedupe) countHours(ctx context.Context, hours []int64) (map[int64]int64, error) {
	counts := map[int64]int64{}
	var hour proto.ColUInt32
	var n proto.ColInt64
	err := d.Do(ctx, questions.EachRow(ch.Query{
		Body: d.db.sql("SELECT toUnixTimestamp(hour) AS h, sum(event_count) FROM {events_hourly} WHERE ") + inHours(hours) + " GROUP BY h",
	}, func(i int) { counts[int64(hour[i])/hourSeconds] = n[i] }, &hour, &n))
	return counts, err
}

// read makes a set of each minute in the spans that has none. When it fails none of them stays, for they are not complete.
func (d *dedupe) read(ctx context.Context, spans []secondSpan) error {
	if len(spans) == 0 {
		return nil
	}
	var where []string
	var loading []int64
	for _, s := range spans {
		where = append(where, fmt.Sprintf("timestamp >= %d AND timestamp < %d", s.from, s.to))
		for minute := s.from / minuteSeconds; minute < s.to/minuteSeconds; minute++ {
			if d.minutes[minute] == nil && d.free(setOverhead) {
				d.know(minute)
				loading = append(loading, minute)
			}
		}
	}
	var minute proto.ColUInt32
	var key proto.ColUInt64
	err := d.Do(ctx, questions.EachRow(ch.Query{
		Body: fmt.Sprintf("SELECT toUInt32(intDiv(toUnixTimestamp(timestamp), %d)), reinterpretAsUInt64(event_id) FROM %s WHERE %s",
			minuteSeconds, d.db.sql("{events anywhere}"), strings.Join(where, " OR ")),
	}, func(i int) {
		m := int64(minute[i])
		switch set := d.minutes[m]; {
		case set == nil:
		case d.makeRoom(set, 1):
			set.add(keyOfBits(key[i]))
		default:
			d.wanted[m] = missed{spared: loadAgain}
			d.drop(m)
		}
	}, &minute, &key))
	for _, m := range loading {
		if set := d.minutes[m]; set != nil && err == nil {
			delete(d.wanted, m)
		} else if set != nil {
			d.drop(m)
		}
	}
	slog.Debug("loaded into the dedupe's memory", "minutes", len(loading), "bytes", d.bytes.Load())
	return err
}

// makeRoom lets n more ids fit into the set, for which others may have to go. False when they cannot.
func (d *dedupe) makeRoom(set *idSet, n int) bool {
	slots := set.slotsFor(n)
	if slots == len(set.slots) { // Fast path
		return true
	}
	need := int64(slots) * slotBytes // the present table stays until the ids have moved
	if !d.free(need) {
		return false
	}
	before := set.bytes()
	set.resize(slots)
	d.bytes.Add(set.bytes() - before)
	return true
}

// free says whether need bytes are free, for which it drops the minutes that were used longest ago, never one of this round.
func (d *dedupe) free(need int64) bool {
	for d.bytes.Load()+need > d.budget {
		oldest := d.order.Front()
		if oldest == nil || oldest.Value.(*idSet).lastUsed == d.round {
			return false
		}
		d.drop(oldest.Value.(*idSet).minute)
	}
	return true
}

// know makes the set of a minute, for which setOverhead must be free.
func (d *dedupe) know(minute int64) {
	set := &idSet{minute: minute, lastUsed: d.round}
	set.place = d.order.PushBack(set)
	d.minutes[minute] = set
	d.bytes.Add(setOverhead)
}

// use has a set go last.
func (d *dedupe) use(set *idSet) {
	set.lastUsed = d.round
	d.order.MoveToBack(set.place)
}

func (d *dedupe) drop(minute int64) {
	set := d.minutes[minute]
	d.order.Remove(set.place)
	delete(d.minutes, minute)
	d.bytes.Add(-set.bytes() - setOverhead)
}

// idKey is what a set keeps of an id: 64 bits. A new event is taken for a known one when it shares them with another one of
// its minute: one in 10^13 when that minute has a million.
type idKey uint64

// What a slot has instead of a key.
const (
	freeSlot idKey = iota
	goneSlot       // its key was removed; what was put behind it is still found
	leastKey
)

func idKeyOf(id *eventID) idKey { return keyOfBits(binary.LittleEndian.Uint64(id[:8])) }

func keyOfBits(bits uint64) idKey { return max(leastKey, idKey(bits)) }

// Sizes of an idSet's table.
const (
	firstSlots = 32 // of a set's first table
	// A table grows by half when four of five slots are taken: 10 to 15 bytes an id, and one or two cache lines a look.
	fullNum, fullDen = 4, 5
	growNum, growDen = 3, 2
)

// idSet is an open-addressing table with linear probing. The zero value is an empty set without a table.
type idSet struct {
	slots    []idKey
	used     int // slots that are not free
	minute   int64
	lastUsed uint64        // round
	place    *list.Element // in dedupe.order
}

// placement is of this process alone: who sends events chooses what ids are made of, and would have them stand in one row.
var placement = [3]uint64{rand.Uint64(), rand.Uint64() | 1, rand.Uint64() | 1}

// home is the slot that a key belongs in. After one multiplication keys at equal distances are still that, and for one placement in a
// hundred fall into a few clusters; the second one takes 0.4 ns. What it makes of keys has the same order in a table of any size, so
// that growing reads and writes straight ahead.
func (s *idSet) home(k idKey) int {
	h := (uint64(k) ^ placement[0]) * placement[1]
	h = (h ^ h>>32) * placement[2]
	slot, _ := bits.Mul64(h, uint64(len(s.slots)))
	return int(slot)
}

// find returns the slot of k, or the free one where it belongs. The table must have a free slot.
func (s *idSet) find(k idKey) int {
	i := s.home(k)
	for s.slots[i] != k && s.slots[i] != freeSlot {
		if i++; i == len(s.slots) {
			i = 0
		}
	}
	return i
}

// slotsFor is the size of the table that the set needs for n ids more; its present size when that will do.
func (s *idSet) slotsFor(n int) int {
	size := max(len(s.slots), firstSlots)
	for (s.used+n)*fullDen > size*fullNum {
		size = size * growNum / growDen
	}
	return size
}

// resize moves to a table of that many slots.
func (s *idSet) resize(slots int) {
	old := s.slots
	s.slots, s.used = make([]idKey, slots), 0
	for _, k := range old {
		if k >= leastKey {
			s.add(k)
		}
	}
}

// add puts k in, for which there must be room, and says whether it is new.
func (s *idSet) add(k idKey) bool {
	i := s.find(k)
	if s.slots[i] == k {
		return false
	}
	s.slots[i] = k
	s.used++
	return true
}

// remove takes k out.
func (s *idSet) remove(k idKey) {
	if len(s.slots) == 0 {
		return
	}
	if i := s.find(k); s.slots[i] == k {
		s.slots[i] = goneSlot
	}
}

const slotBytes = 8

func (s *idSet) bytes() int64 { return int64(len(s.slots)) * slotBytes }
