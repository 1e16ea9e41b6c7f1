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
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync/atomic"

	"github.com/ClickHouse/ch-go"
	"github.com/ClickHouse/ch-go/proto"
)

const (
	minuteSeconds = 60
	hourMinutes   = hourSeconds / minuteSeconds
	// loadRows is how many rows of an hour without sets make it worth loading; below, they are looked up.
	loadRows = 64
	// loadIDs bounds one loading, and with it the time between two rounds: about 0.3 s.
	loadIDs = 2_000_000
	// loadAgain is after how many more rows a minute is loaded again that did not fit.
	loadAgain = 100_000
	// maxWanted bounds the minutes that are remembered to have been looked up: records of any age may come.
	maxWanted = 100_000
	// setOverhead is about what a set takes beside its table, in bytes.
	setOverhead = 128
)

// past knows which events are stored. Only the inserter's goroutine uses it, except for bytes and sets.
type past struct {
	query    func(context.Context, ch.Query) error
	database string
	budget   int64        // DEDUPE_MEMORY, bytes of all sets
	bytes    atomic.Int64 // never above budget, a table and its larger successor included
	sets     atomic.Int64 // len(minutes)
	minutes  map[int64]*idSet
	wanted   map[int64]int // rows that had to be looked up, by minute
	round    uint64
	stuck    uint64 // the round in which nothing was left to drop

	tally    map[int64]int // rows of the round, by minute
	doubtful []rowOf
	found    map[eventID]struct{} // of the rows looked up: those that ClickHouse has
	kept     []int
}

// rowOf is a row of a block.
type rowOf struct {
	*block
	row int
}

func newPast(query func(context.Context, ch.Query) error, database string, budget int64) *past {
	p := &past{query: query, database: database, budget: budget, tally: map[int64]int{}, found: map[eventID]struct{}{}}
	p.forgetAll()
	return p
}

// forgetAll starts over: others have stored events that the sets do not know.
func (p *past) forgetAll() {
	p.minutes, p.wanted = map[int64]*idSet{}, map[int64]int{}
	p.bytes.Store(0)
	p.sets.Store(0)
}

// prepare does what needs ClickHouse before the round can be checked: it loads minutes that are worth it, and looks up
// the rows of minutes that are not known. It changes nothing in the round, so it can be repeated when it fails.
func (p *past) prepare(ctx context.Context, round []*block) error {
	p.round++
	clear(p.tally)
	for _, b := range round {
		for _, at := range b.timestamp.Data {
			p.tally[int64(at)/minuteSeconds]++
		}
	}
	if err := p.load(ctx); err != nil {
		return err
	}
	for minute, n := range p.tally {
		if set := p.minutes[minute]; set != nil && !p.makeRoom(set, n) {
			p.drop(minute)
		}
	}
	p.doubtful = p.doubtful[:0]
	for _, b := range round {
		for row := range b.rows() {
			if p.minutes[b.at(row)/minuteSeconds] == nil {
				p.doubtful = append(p.doubtful, rowOf{b, row})
			}
		}
	}
	return p.lookUp(ctx, p.doubtful)
}

// cut takes the duplicates out of a prepared round, remembers what stays, and returns how many there were.
func (p *past) cut(round []*block) (duplicates int) {
	for _, b := range round {
		p.kept = p.kept[:0]
		for row := range b.rows() {
			if p.add(b.id(row), b.at(row)) {
				p.kept = append(p.kept, row)
			}
		}
		duplicates += b.rows() - len(p.kept)
		b.keep(p.kept)
	}
	return duplicates
}

// add says whether the event is new, and remembers it.
func (p *past) add(id *eventID, at int64) bool {
	if set := p.minutes[at/minuteSeconds]; set != nil { // Fast path
		return set.add(idKeyOf(id))
	}
	if _, there := p.found[*id]; there {
		return false
	}
	p.found[*id] = struct{}{} // for its duplicates in this round
	return true
}

// forget is for an event that will not be stored now after all.
func (p *past) forget(id *eventID, at int64) {
	if set := p.minutes[at/minuteSeconds]; set != nil {
		set.remove(idKeyOf(id))
	}
}

// lookUp fills found with the rows that ClickHouse has, by primary key.
func (p *past) lookUp(ctx context.Context, rows []rowOf) error {
	clear(p.found)
	if len(rows) == 0 {
		return nil
	}
	var (
		name proto.ColStr
		at   proto.ColDateTime
		id   = proto.ColFixedStr{Size: len(eventID{})}
		got  = proto.ColFixedStr{Size: len(eventID{})}
	)
	for _, r := range rows {
		name.AppendBytes(r.eventName.value(r.row))
		at.Data = append(at.Data, r.timestamp.Data[r.row])
		id.Buf = append(id.Buf, r.id(r.row)[:]...)
	}
	return p.query(ctx, ch.Query{
		Body:          "SELECT event_id FROM " + p.database + ".events WHERE (event_name, timestamp, event_id) IN (SELECT name, at, id FROM doubtful)",
		ExternalTable: "doubtful",
		ExternalData:  []proto.InputColumn{{Name: "name", Data: &name}, {Name: "at", Data: &at}, {Name: "id", Data: &id}},
		Result:        proto.Results{{Name: "event_id", Data: &got}},
		OnResult: func(context.Context, proto.Block) error {
			for i := range got.Rows() {
				p.found[eventID(got.Row(i))] = struct{}{}
			}
			return nil
		},
	})
}

// span is minutes of event time, end excluded.
type minuteSpan struct{ from, end int64 }

// load makes known what the round and those before it asked for in vain, newest first: whole hours, so that the minutes
// to come are known, too, or single minutes of an hour that is too large for that.
func (p *past) load(ctx context.Context) error {
	if len(p.wanted) > maxWanted {
		clear(p.wanted)
	}
	hours := map[int64]int{}
	for minute, n := range p.tally {
		if set := p.minutes[minute]; set != nil {
			set.lastUsed = p.round
		} else if p.budget > 0 {
			p.wanted[minute] += n
			hours[minute/hourMinutes] = 0
		}
	}
	if len(hours) == 0 {
		return nil
	}
	for minute, n := range p.wanted {
		if _, asked := hours[minute/hourMinutes]; asked {
			hours[minute/hourMinutes] += max(n, 0)
		}
	}
	maps.DeleteFunc(hours, func(_ int64, n int) bool { return n < loadRows })
	if len(hours) == 0 {
		return nil
	}
	counts, err := p.countHours(ctx, hours)
	if err != nil {
		return err
	}
	var spans []minuteSpan
	room := min(loadIDs, p.budget/4/slotBytes)
	for _, hour := range slices.Backward(slices.Sorted(maps.Keys(hours))) {
		first := hour * hourMinutes
		if n := counts[hour]; n <= room {
			room -= n
			spans = append(spans, minuteSpan{first, first + hourMinutes})
			continue
		}
		for minute := first; minute < first+hourMinutes && room > 0; minute++ {
			if p.wanted[minute] >= loadRows && p.minutes[minute] == nil {
				room -= counts[hour] / hourMinutes
				spans = append(spans, minuteSpan{minute, minute + 1})
			}
		}
		if room <= 0 {
			break
		}
	}
	return p.read(ctx, spans)
}

// countHours returns about how many events each hour has. events_hourly answers at once.
func (p *past) countHours(ctx context.Context, hours map[int64]int) (map[int64]int64, error) {
	list := []byte("0")
	for hour := range hours {
		list = fmt.Appendf(list, ",%d", hour*hourSeconds)
	}
	counts := map[int64]int64{}
	var hour proto.ColUInt32
	var n proto.ColInt64
	err := p.query(ctx, ch.Query{
		Body:   fmt.Sprintf("SELECT toUnixTimestamp(hour) AS h, sum(event_count) AS n FROM %s.events_hourly WHERE h IN (%s) GROUP BY h", p.database, list),
		Result: proto.Results{{Name: "h", Data: &hour}, {Name: "n", Data: &n}},
		OnResult: func(context.Context, proto.Block) error {
			for i := range hour {
				counts[int64(hour[i])/hourSeconds] = n[i]
			}
			return nil
		},
	})
	return counts, err
}

// read makes sets of all ids in the spans that have none.
func (p *past) read(ctx context.Context, spans []minuteSpan) error {
	if len(spans) == 0 {
		return nil
	}
	var where []string
	loading := map[int64]*idSet{}
	for _, s := range spans {
		where = append(where, fmt.Sprintf("timestamp >= %d AND timestamp < %d", s.from*minuteSeconds, s.end*minuteSeconds))
		for minute := s.from; minute < s.end; minute++ {
			if p.minutes[minute] == nil {
				loading[minute] = &idSet{lastUsed: p.round}
			}
		}
	}
	var minute proto.ColUInt32
	var key proto.ColUInt64
	err := p.query(ctx, ch.Query{
		Body: fmt.Sprintf("SELECT toUInt32(intDiv(toUnixTimestamp(timestamp), %d)) AS minute, reinterpretAsUInt64(event_id) AS key FROM %s.events WHERE %s",
			minuteSeconds, p.database, strings.Join(where, " OR ")),
		Result: proto.Results{{Name: "minute", Data: &minute}, {Name: "key", Data: &key}},
		OnResult: func(context.Context, proto.Block) error {
			for i, k := range key {
				m := int64(minute[i])
				set := loading[m]
				if set == nil {
					continue
				}
				if !p.makeRoom(set, 1) {
					p.bytes.Add(-set.bytes())
					p.wanted[m] = -loadAgain
					delete(loading, m)
					continue
				}
				set.add(max(1, idKey(k)))
			}
			return nil
		},
	})
	if err != nil {
		for _, set := range loading {
			p.bytes.Add(-set.bytes())
		}
		return err
	}
	for m, set := range loading {
		if p.bytes.Load()+setOverhead > p.budget {
			p.bytes.Add(-set.bytes())
			continue
		}
		p.bytes.Add(setOverhead)
		p.minutes[m] = set
		delete(p.wanted, m)
	}
	p.sets.Store(int64(len(p.minutes)))
	slog.Debug("loaded into the dedupe's memory", "minutes", len(loading), "bytes", p.bytes.Load())
	return nil
}

// makeRoom lets n more ids fit into the set, for which others may have to go. False when they cannot.
func (p *past) makeRoom(set *idSet, n int) bool {
	slots := set.slotsFor(n)
	if slots == len(set.slots) { // Fast path
		return true
	}
	need := int64(slots) * slotBytes // the present table stays until the ids have moved
	if p.bytes.Load()+need > p.budget && !p.evict(need) {
		return false
	}
	before := set.bytes()
	set.resize(slots)
	p.bytes.Add(set.bytes() - before)
	return true
}

// evict drops the minutes that were used longest ago, never one of this round, until need bytes are free and some more.
func (p *past) evict(need int64) bool {
	if p.stuck == p.round {
		return false
	}
	var old []int64
	for minute, set := range p.minutes {
		if set.lastUsed < p.round {
			old = append(old, minute)
		}
	}
	slices.SortFunc(old, func(a, b int64) int {
		return cmp.Or(cmp.Compare(p.minutes[a].lastUsed, p.minutes[b].lastUsed), cmp.Compare(a, b))
	})
	for _, minute := range old {
		if p.bytes.Load()+need <= p.budget*15/16 { // or each set that grows would sort again
			break
		}
		p.drop(minute)
	}
	if p.bytes.Load()+need > p.budget {
		p.stuck = p.round
		return false
	}
	return true
}

func (p *past) drop(minute int64) {
	p.bytes.Add(-p.minutes[minute].bytes() - setOverhead)
	delete(p.minutes, minute)
	p.sets.Store(int64(len(p.minutes)))
}
