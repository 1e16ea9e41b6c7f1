// What a fault may have left: an hour of events_hourly that does not agree with events.
//
// An insert fills events and, through the view, events_hourly; ClickHouse can die, or fail, between the two. So the hours
// of an insert without an answer, and of records that a former owner may have been inserting when it died, are looked at
// and mended before the offsets of their rounds are committed: whatever dies meanwhile, somebody reads the records again
// and looks again. mend.go owns the hours and the offsets that wait for them.

package main

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/ClickHouse/ch-go"
	"github.com/ClickHouse/ch-go/proto"
	"github.com/twmb/franz-go/pkg/kgo"

	"github.com/event-ingestion/event-ingestion/troubles"
)

const (
	// mendInterval is the least time between two looks at agreeing hours, and lookShare how many times the last look's
	// duration: a look counts the hours whole.
	mendInterval = time.Second
	lookShare    = 10
	// mendTick is the least time between two looks of which the first did not settle it.
	mendTick = 100 * time.Millisecond
	// busyLooks is how many looks in a row have to find a difference where somebody always inserts.
	busyLooks = 10
	// A look is at lookHours to begin with, and at twice as many after one that took less than lookTime: rounds wait for it.
	lookHours = 24
	lookTime  = 200 * time.Millisecond
	// heldBlocks is how many blocks of WORKER_BATCH_SIZE of a worker may be stored and not committed: what a next owner takes for
	// read again, see rereadBlocks, has to reach as far.
	heldBlocks = 10 * maxShare
)

// torn is the hours to look at.
type torn struct {
	hours    map[int64]struct{}        // by Unix hour
	held     map[int32]kgo.EpochOffset // by partition: what may be committed when no hour is left
	next     time.Time                 // of the next look
	atOnce   int                       // hours of the next look
	seen     []string                  // differences, by the last look in which nobody inserted
	last     []string                  // differences, by the last look
	since    time.Time                 // of the first look of those that found them
	times    int                       // how many looks in a row these are
	mended   []string                  // of them, what was mended last
	trusted  bool                      // the last look found none
	heldRows int                       // at most so many of a worker have been stored since there is an hour to look at
}

// difference is the SQL for a row of differences as text: how many events events_hourly lacks, or has too many.
const difference = "toString((event_name, channel, hour, event_count))"

// noteHours notes the hours of the round: all, or those of blocks with rows that were read again.
func (ins *inserter) noteHours(all bool) {
	for _, b := range ins.round {
		if all || b.reread {
			for row := range b.rows() {
				ins.noteHour(b.at(row) / hourSeconds)
			}
		}
	}
}

func (t *torn) noteHour(hour int64) {
	if _, noted := t.hours[hour]; !noted {
		t.hours[hour] = struct{}{}
		t.trusted = false
	}
}

// mend lets what is held be committed, when every noted hour agrees. It takes its turn between rounds, so that no insert
// of this instance runs. Where other instances insert, a difference is believed that two looks in a row have found, each in a
// moment in which nobody inserted, or many looks, after every insert that was at work at the first one has ended: an insert stands
// in events alone for a moment. Agreement is believed that two looks in a row have found.
func (ins *inserter) mend(ctx context.Context) {
	ins.repair(ctx, nil)
	if len(ins.hours) > 0 && !time.Now().Before(ins.next) {
		what, started := ins.store.name("compare hours of events_hourly with events; offsets wait"), time.Now()
		hours := slices.Sorted(maps.Keys(ins.hours)) // the oldest first
		hours = hours[:min(len(hours), ins.atOnce)]
		agree, err := ins.lookAndMend(ctx, hours)
		took := time.Since(started)
		pause := max(mendTick, took)
		if agree {
			for _, hour := range hours {
				delete(ins.hours, hour)
			}
			pause = lookShare * took
			if ins.atOnce = max(lookHours, 2*len(hours)); took > lookTime {
				ins.atOnce = lookHours
			}
		}
		ins.stats.troubles.Note(what, err)
		if err != nil {
			ins.atOnce = max(1, ins.atOnce/2) // it may have taken too long
			ins.store.broken.note(err)
			if saysOtherStates(err) {
				ins.store.readStates(ctx, ins) // an error comes back at the next look
			}
		}
		if err != nil || len(ins.hours) == 0 {
			pause = max(mendInterval, lookShare*took)
		}
		ins.next = time.Now().Add(pause)
	}
	if len(ins.hours) == 0 {
		if len(ins.held) > 0 {
			ins.stored(ins.held)
			clear(ins.held)
		}
		ins.heldRows = 0
	}
}

// catchUp mends and commits until a next owner would read all that is stored and not committed as possibly torn.
func (ins *inserter) catchUp(ctx context.Context) {
	for ins.heldRows >= ins.mostHeld && ctx.Err() == nil {
		ins.next = time.Time{}
		if ins.mend(ctx); ins.heldRows >= ins.mostHeld {
			troubles.Sleep(ctx, mendTick)
		}
	}
	if ctx.Err() == nil {
		ins.persist(ctx, "commit offsets; nothing more is stored until that works", func() error {
			return ins.committed(ctx, ins.mostHeld-ins.heldRows)
		})
	}
}

// lookAndMend says whether the hours agree. A mending is believed when the next look finds nothing.
func (ins *inserter) lookAndMend(ctx context.Context, hours []int64) (agree bool, err error) {
	differing := func(final string) string {
		return fmt.Sprintf(differences, final, inHours(hours), "event_count != 0", "events_hourly")
	}
	// What a command mends it may have seen before we mended it: nothing is believed beside it.
	mending, err := ins.store.most(ctx, ins, ch.Query{
		Body:       "SELECT count() FROM system.processes WHERE query_id = {id:String}",
		Parameters: []proto.Parameter{parameter("id", ins.store.mendingID())},
	})
	if err != nil || mending > 0 {
		return false, err
	}
	alone, started := ins.alone(), time.Now()
	before, err := ins.awaitInserts(ctx)
	if err != nil {
		return false, err
	}
	seen, err := ins.look(ctx, differing(""))
	if err == nil && len(seen) > 0 && slices.Equal(seen, ins.mended) { // to no avail: a restored backup may have rows twice, which count once
		seen, err = ins.look(ctx, differing("FINAL"))
	}
	if err != nil {
		return false, err
	}
	if !slices.Equal(seen, ins.last) {
		ins.last, ins.since, ins.times = seen, started, 0
	}
	streak := time.Since(ins.since) // before the question: its answer takes time, and is as old as the question
	after, err := ins.awaitInserts(ctx)
	if err != nil {
		return false, err
	}
	quiet := alone || before == 0 && after == 0
	ins.times++
	if len(seen) == 0 {
		agree = quiet || ins.trusted
		if ins.seen, ins.trusted = nil, !agree; agree {
			ins.mended = nil
		}
		return agree, nil
	}
	ins.trusted = false
	certain := alone || quiet && slices.Equal(seen, ins.seen) || ins.times >= busyLooks && after < streak
	if quiet {
		ins.seen = seen
	}
	if !certain {
		return false, nil
	}
	slog.Warn("events_hourly does not agree with events after a fault, mending", "rows", len(seen), "first", seen[0])
	ins.stats.mended.Add(len(seen))
	ins.mended = seen
	return false, ins.insertDifferences(ctx, differing("FINAL"), seen)
}

// look counts hours in both tables and returns where they differ.
func (ins *inserter) look(ctx context.Context, differing string) (seen []string, err error) {
	var text proto.ColStr
	err = ins.Do(ctx, eachRow(ch.Query{
		Body: ins.store.sql("SELECT " + difference + " AS text FROM " + differing + " ORDER BY text"),
	}, func(i int) { seen = append(seen, text.Row(i)) }, &text))
	return seen, err
}

// inHours is the SQL for hour being one of these.
func inHours(hours []int64) string {
	var list []string
	for _, hour := range hours {
		list = append(list, fmt.Sprint(hour*hourSeconds))
	}
	return "hour IN (" + strings.Join(list, ",") + ")"
}

// insertDifferences gives events_hourly what it lacks, and takes back what it has too much of: just what was seen, if that is
// what it still finds.
func (ins *inserter) insertDifferences(ctx context.Context, differing string, seen []string) error {
	var text proto.ColStr
	text.AppendArr(seen)
	return ins.Do(ctx, ch.Query{
		Body:          ins.store.sql(fmt.Sprintf(addDifferences, "events_hourly") + differing + " WHERE " + difference + " IN (SELECT text FROM seen)"),
		QueryID:       ins.queryID(),
		ExternalTable: "seen",
		ExternalData:  []proto.InputColumn{{Name: "text", Data: &text}},
	})
}
