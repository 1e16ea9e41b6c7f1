// Counted once: which events have been here before.
//
// The materialized view counts every inserted row, so a copy has to be caught before the insert. All copies of an
// event have the same id, the same Kafka key and so the same worker. Each worker keeps, per hour of event time, a Bloom
// filter over every id that ClickHouse has or that it took in itself. "No" is certain: the event is new. "Maybe", and
// any event of an hour without a filter, makes a suspect, which the inserter looks up in ClickHouse by primary key
// before the round's insert. Rounds follow one another strictly, so a lookup sees all earlier ones; copies within the
// round are found by comparing ids. dedupe.go owns the filters, the suspects and the lookups.

package main

import (
	"context"
	"encoding/hex"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync/atomic"
	"time"

	"github.com/ClickHouse/ch-go"
	"github.com/ClickHouse/ch-go/proto"
	"github.com/twmb/franz-go/pkg/kgo"
)

const (
	// loadSuspects is how many suspects of an hour without a filter in one round make it worth loading.
	loadSuspects = 64
	// loadsARound bounds the time between two rounds.
	loadsARound = 4
)

// suspect is a record that may be a copy.
type suspect struct {
	id      eventID
	hour    int64
	covered bool // there was a filter, and it said maybe
	record  *kgo.Record
}

// seen is what a worker knows of the past; the worker's lock guards it.
type seen struct {
	hours map[int64]*idFilter // by Unix hour
	era   uint64              // goes up when the past changed behind our back: partitions came
}

// check says whether the event is certainly new, and remembers it then.
func (w *worker) check(id *eventID, hour int64) (isNew, covered bool) {
	f := w.seen.hours[hour]
	if f == nil {
		return false, false
	}
	f.lastUsed = w.consumer.inserter.seq.Load()
	if f.mayContain(id) {
		return false, true
	}
	if grown := f.add(id); grown > 0 {
		w.consumer.inserter.past.bytes.Add(grown)
	}
	return true, true
}

// past is the inserter's side of the dedupe.
type past struct {
	budget     int64 // DEDUPE_MEMORY, bytes of all filters
	bytes      atomic.Int64
	assignedAt atomic.Int64 // Unix nanoseconds of an assignment not yet waited out, 0 when none
	cameAt     atomic.Int64 // Unix nanoseconds of the last assignment
	router     kgo.TopicPartitioner
	partitions atomic.Int32 // of the topic

	parser    eventParser
	suspects  []suspect
	extra     *block // suspects that turned out to be new
	found     map[eventID]struct{}
	uncovered map[int64]int // suspects by hour without a filter

	torn     map[int64]struct{} // hours that the aggregate may not agree on, see mend
	mendedAt time.Time
}

func newPast(budget int64) *past {
	return &past{
		budget: budget, extra: newBlock(0), found: map[eventID]struct{}{}, uncovered: map[int64]int{}, torn: map[int64]struct{}{},
		router: kgo.StickyKeyPartitioner(nil).ForTopic(""),
	}
}

// onAssigned forgets what the workers of new partitions knew: another copy may have stored events of theirs since.
func (in *inserter) onAssigned(workers map[*worker]struct{}) {
	came := time.Now().UnixNano()
	in.past.cameAt.Store(came)
	in.past.assignedAt.Store(came) // before era: load reads them the other way round
	for w := range workers {
		w.mu.Lock()
		w.seen.era++
		for _, f := range w.seen.hours {
			in.past.bytes.Add(-f.bytes())
		}
		clear(w.seen.hours)
		w.mu.Unlock()
	}
}

// resolve looks up the round's suspects and appends the new ones among them to the round, as a block of their own.
func (in *inserter) resolve(ctx context.Context) error {
	p := in.past
	p.suspects = p.suspects[:0]
	for _, b := range in.round {
		p.suspects = append(p.suspects, b.suspects...)
	}
	if len(p.suspects) == 0 {
		return nil
	}
	if err := in.awaitStrangers(ctx); err != nil {
		return err
	}
	started := time.Now()
	if err := in.lookUp(ctx); err != nil {
		return err
	}
	inRound, duplicates := false, 0
	p.extra.reset()
	for i := range p.suspects {
		s := &p.suspects[i]
		if !s.covered {
			p.uncovered[s.hour]++
		}
		if _, dup := p.found[s.id]; !dup && !inRound {
			in.addRoundIDs() // only now: most rounds have no suspect that ClickHouse does not know
			inRound = true
		}
		if _, dup := p.found[s.id]; dup {
			duplicates++
			p.noteReread(s)
			continue
		}
		p.found[s.id] = struct{}{}
		ev, _, _ := p.parser.parse(s.record.Value) // the worker has parsed it without complaint
		p.extra.append(&s.id, ev, s.record)
	}
	in.round = append(in.round, p.extra)
	in.stats.resolved(len(p.suspects), duplicates, p.extra.rows(), time.Since(started))
	return nil
}

// lookUp fills found with the suspects that ClickHouse has, by primary key.
func (in *inserter) lookUp(ctx context.Context) error {
	p := in.past
	clear(p.found)
	clear(p.uncovered)
	var (
		name proto.ColStr
		at   proto.ColDateTime
		id   = proto.ColFixedStr{Size: len(eventID{})}
		got  = proto.ColFixedStr{Size: len(eventID{})}
	)
	for i := range p.suspects {
		ev, _, _ := p.parser.parse(p.suspects[i].record.Value)
		name.AppendBytes(ev.name)
		at.Data = append(at.Data, proto.DateTime(ev.timestamp))
		id.Buf = append(id.Buf, p.suspects[i].id[:]...)
	}
	return in.query(ctx, ch.Query{
		Body: "SELECT event_id FROM " + in.store.database + ".events " +
			"WHERE (event_name, timestamp, event_id) IN (SELECT name, at, id FROM suspects)",
		ExternalTable: "suspects",
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

func (in *inserter) addRoundIDs() {
	for _, b := range in.round {
		for i := range b.rows() {
			in.past.found[eventID(b.eventID.Row(i))] = struct{}{}
		}
	}
}

// awaitStrangers waits until no insert that was running when partitions came here is left on the server: the last one
// of a copy that was killed may still be at work, and a lookup before its end would miss its rows.
func (in *inserter) awaitStrangers(ctx context.Context) error {
	for {
		assigned := in.past.assignedAt.Load()
		if assigned == 0 {
			return nil
		}
		var running proto.ColUInt64
		err := in.query(ctx, ch.Query{
			Body: "SELECT count() AS n FROM " + in.store.processes() + " WHERE startsWith(query_id, {ours:String}) AND NOT startsWith(query_id, {mine:String}) AND elapsed > {since:Float64}",
			Parameters: []proto.Parameter{
				parameter("ours", in.group+"-"), parameter("mine", in.group+"-"+in.instance+"-"),
				parameter("since", fmt.Sprint(time.Since(time.Unix(0, assigned)).Seconds())),
			},
			Result: proto.Results{{Name: "n", Data: &running}},
		})
		if err != nil {
			return err
		}
		if len(running) == 0 || running[0] == 0 {
			in.past.assignedAt.CompareAndSwap(assigned, 0)
			continue
		}
		slog.Info("waiting for the last insert of another copy")
		select {
		case <-time.After(minBackoff):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// cover loads filters for the hours that the round's suspects asked for, newest first. It runs between rounds, so that ClickHouse
// holds all that was taken in except what is in the workers' current blocks.
func (in *inserter) cover(ctx context.Context) {
	loads := 0
	for _, hour := range slices.Backward(slices.Sorted(maps.Keys(in.past.uncovered))) {
		if in.past.uncovered[hour] < loadSuspects || loads == loadsARound || in.isCovered(hour) {
			continue
		}
		loads++
		if err := in.load(ctx, hour); err != nil {
			slog.Warn("hour not loaded into the dedupe filter, its events are looked up one by one", "hour", hourKey(hour*hourSeconds), "error", err)
			break
		}
	}
	clear(in.past.uncovered)
	for in.past.bytes.Load() > in.past.budget && in.evict() {
	}
}

// load reads the ids of an hour and gives each worker the filter over its own.
func (in *inserter) load(ctx context.Context, hour int64) error {
	eras := make([]uint64, len(in.workers))
	for i, w := range in.workers {
		w.mu.Lock()
		eras[i] = w.seen.era
		w.mu.Unlock()
	}
	if err := in.awaitStrangers(ctx); err != nil {
		return err
	}
	where := fmt.Sprintf(" FROM %s.events WHERE timestamp >= %d AND timestamp < %d", in.store.database, hour*hourSeconds, (hour+1)*hourSeconds)
	var count proto.ColUInt64
	if err := in.query(ctx, ch.Query{Body: "SELECT count() AS n" + where, Result: proto.Results{{Name: "n", Data: &count}}}); err != nil {
		return err
	}
	need := int64(count[0]) * bitsPerID / 8
	if need > in.past.budget*3/4 {
		return fmt.Errorf("its %d ids need %d bytes of DEDUPE_MEMORY=%d", count[0], need, in.past.budget)
	}
	for in.past.bytes.Load()+need > in.past.budget && in.evict() {
	}
	filters := make([]*idFilter, len(in.workers))
	for i := range filters {
		filters[i] = newIDFilter(int(count[0]) / len(in.workers))
		filters[i].lastUsed = in.seq.Load()
	}
	ids := proto.ColFixedStr{Size: len(eventID{})}
	err := in.query(ctx, ch.Query{
		Body:   "SELECT event_id" + where,
		Result: proto.Results{{Name: "event_id", Data: &ids}},
		OnResult: func(context.Context, proto.Block) error {
			for i := range ids.Rows() {
				id := eventID(ids.Row(i))
				filters[in.workerOf(&id)].add(&id)
			}
			return nil
		},
	})
	if err != nil {
		return err
	}
	for i, w := range in.workers {
		w.install(hour, filters[i], eras[i])
	}
	return nil
}

// workerOf is the worker whose partition the id's key goes to.
func (in *inserter) workerOf(id *eventID) int {
	var key [2 * len(eventID{})]byte
	hex.Encode(key[:], id[:])
	return in.past.router.Partition(&kgo.Record{Key: key[:]}, int(in.past.partitions.Load())) % len(in.workers)
}

// install makes the hour covered. The suspects that wait in the current block are neither in ClickHouse nor in the
// filter yet: they go in now, so that their copies become suspects, too.
func (w *worker) install(hour int64, f *idFilter, era uint64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.seen.era != era {
		return // partitions came while the hour was read
	}
	if w.seen.hours[hour] != nil {
		return // it also knows the rows that wait in the current block, which f does not
	}
	for i := range w.cur.suspects {
		if s := &w.cur.suspects[i]; s.hour == hour {
			f.add(&s.id)
		}
	}
	w.seen.hours[hour] = f
	w.consumer.inserter.past.bytes.Add(f.bytes())
}

// covered returns the hours that have filters, with the round in which each was used last.
func (in *inserter) covered() map[int64]uint64 {
	used := map[int64]uint64{}
	for _, w := range in.workers {
		w.mu.Lock()
		for hour, f := range w.seen.hours {
			used[hour] = max(used[hour], f.lastUsed)
		}
		w.mu.Unlock()
	}
	return used
}

// isCovered says whether every worker has a filter for the hour. The suspects of a round may have been taken in before
// the filter came.
func (in *inserter) isCovered(hour int64) bool {
	for _, w := range in.workers {
		w.mu.Lock()
		f := w.seen.hours[hour]
		w.mu.Unlock()
		if f == nil {
			return false
		}
	}
	return true
}

// evict drops the filters of the hour that was used longest ago; false when there is none.
func (in *inserter) evict() bool {
	used := in.covered()
	oldest, found := int64(0), false
	for hour, at := range used {
		if !found || at < used[oldest] || at == used[oldest] && hour < oldest {
			oldest, found = hour, true
		}
	}
	if !found {
		return false
	}
	for _, w := range in.workers {
		w.mu.Lock()
		if f := w.seen.hours[oldest]; f != nil {
			in.past.bytes.Add(-f.bytes())
			delete(w.seen.hours, oldest)
		}
		w.mu.Unlock()
	}
	return true
}
