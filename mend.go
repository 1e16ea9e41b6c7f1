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
)

const (
	// mendInterval is the least time between two looks at agreeing hours, and lookShare how many times the last look's
	// duration: a look counts the hours whole.
	mendInterval = time.Second
	lookShare    = 10
	// mendTick is the least time between two looks of which the first did not settle it.
	mendTick = 100 * time.Millisecond
	// lookHours bounds the hours of one look, and with it the time between two rounds.
	lookHours = 24
	// heldRounds is how many rounds may be stored and not committed: what a next owner takes for read again, see
	// rereadBlocks, has to reach as far.
	heldRounds = rereadBlocks - 2
)

// span is a range of Unix seconds, end excluded.
type span struct{ from, end int64 }

// torn is the hours to look at.
type torn struct {
	hours  map[int64]struct{} // by Unix hour
	held   map[int32]position // by partition: what may be committed when no hour is left
	next   time.Time          // of the next look
	last   []difference       // found by the last look, nil when that does not count
	rounds int                // that were stored since there is an hour to look at
}

// difference is a row of events_hourly that lacks so many events, or has too many.
type difference struct {
	name, channel string
	hour          uint32 // Unix seconds
	missing       int64
}

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
		t.last = nil
	}
}

// hold says that the partitions are stored up to here. It is what mend passes on.
func (t *torn) hold(reached []position) {
	for _, p := range reached {
		t.held[p.partition] = p
	}
}

// mend lets what is held be committed, when every noted hour agrees. It takes its turn between rounds, so that no insert
// of this instance runs. Where other instances insert, a difference is believed that two looks in a row have found, each in a
// moment in which nobody inserted, and agreement that two looks in a row have found.
func (ins *inserter) mend(ctx context.Context) {
	ins.repair(ctx, nil)
	if len(ins.hours) > 0 && !time.Now().Before(ins.next) {
		started := time.Now()
		hours := ins.someHours()
		agree, err := ins.lookAndMend(ctx, hours)
		took := time.Since(started)
		pause := max(mendTick, took)
		if agree {
			for _, hour := range hours {
				delete(ins.hours, hour)
			}
			pause = lookShare * took
		}
		if err != nil {
			ins.store.broken.note(err)
			if saysOtherStates(err) {
				ins.store.readStates(ctx, ins) // an error comes back at the next look
			}
			ins.stats.troubles.note(ins.store.name(lookAtHours), err)
		} else {
			ins.stats.troubles.clear(ins.store.name(lookAtHours))
		}
		if err != nil || len(ins.hours) == 0 {
			pause = max(mendInterval, lookShare*took)
		}
		ins.next = time.Now().Add(pause)
	}
	if len(ins.hours) == 0 && len(ins.held) > 0 {
		ins.stored(slices.Collect(maps.Values(ins.held)))
		clear(ins.held)
		ins.rounds = 0
	}
}

// lookAtHours is what fails when hours cannot be counted.
const lookAtHours = "compare hours of events_hourly with events; offsets wait"

// catchUp mends until so few rounds are held that a next owner would read all of them as possibly torn.
func (ins *inserter) catchUp(ctx context.Context) {
	for ins.rounds >= heldRounds && ctx.Err() == nil {
		ins.next = time.Time{}
		if ins.mend(ctx); ins.rounds < heldRounds {
			return
		}
		sleep(ctx, mendTick)
	}
}

// someHours are the oldest noted ones, in order.
func (t *torn) someHours() []int64 {
	hours := slices.Sorted(maps.Keys(t.hours))
	return hours[:min(len(hours), lookHours)]
}

// lookAndMend says whether the hours agree. A mending is believed when the next look finds nothing.
func (ins *inserter) lookAndMend(ctx context.Context, hours []int64) (agree bool, err error) {
	alone := ins.alone()
	before, err := ins.awaitInserts(ctx)
	if err != nil {
		return false, err
	}
	if err := ins.store.syncReplica(ctx, ins); err != nil {
		return false, err
	}
	seen, err := ins.look(ctx, hours)
	if err != nil {
		return false, err
	}
	after, err := ins.awaitInserts(ctx)
	if err != nil {
		return false, err
	}
	quiet := alone || !before && !after
	certain := alone || ins.last != nil && slices.Equal(seen, ins.last)
	switch ins.last = seen; {
	case len(seen) == 0 && (quiet || certain):
		ins.last = nil // the next look is at other hours
		return true, nil
	case len(seen) > 0 && !quiet:
		ins.last = nil
		return false, nil
	case len(seen) == 0 || !certain:
		return false, nil
	}
	slog.Warn("events_hourly does not agree with events after a fault, mending", "rows", len(seen), "first", fmt.Sprintf("%+v", seen[0]))
	ins.stats.mended.Add(len(seen))
	return false, ins.insertDifferences(ctx, seen)
}

// look counts the hours in both tables and returns where they differ, never nil.
func (ins *inserter) look(ctx context.Context, hours []int64) (seen []difference, err error) {
	var (
		name, channel proto.ColStr
		hour          proto.ColUInt32
		missing       proto.ColInt64
	)
	seen = []difference{}
	err = ins.Do(ctx, eachRow(ch.Query{
		Body: fmt.Sprintf("SELECT CAST(event_name, 'String') AS name, CAST(channel, 'String') AS ch, toUnixTimestamp(hour) AS h, sum(n) AS missing FROM ("+
			"SELECT event_name, channel, toStartOfHour(timestamp) AS hour, toInt64(count()) AS n FROM %[1]s.events WHERE %[2]s GROUP BY event_name, channel, hour"+
			" UNION ALL SELECT event_name, channel, hour, -event_count FROM %[1]s.events_hourly WHERE %[3]s"+
			") GROUP BY event_name, channel, hour HAVING missing != 0 ORDER BY h, name, ch", ins.store.database, within("timestamp", hours), within("hour", hours)),
	}, func(i int) { seen = append(seen, difference{name.Row(i), channel.Row(i), hour[i], missing[i]}) }, &name, &channel, &hour, &missing))
	return seen, err
}

// within is the SQL for a column of times being in these hours, which ascend.
func within(column string, hours []int64) string {
	var spans []span
	for _, hour := range hours {
		if n := len(spans); n > 0 && spans[n-1].end == hour*hourSeconds {
			spans[n-1].end += hourSeconds
		} else {
			spans = append(spans, span{hour * hourSeconds, (hour + 1) * hourSeconds})
		}
	}
	var terms []string
	for _, s := range spans {
		terms = append(terms, fmt.Sprintf("%[1]s >= %[2]d AND %[1]s <= %[3]d", column, s.from, min(s.end-1, maxUnixSeconds)))
	}
	return strings.Join(terms, " OR ")
}

// insertDifferences gives events_hourly what it lacks, and takes back what it has too much of: just what was seen, if that
// is what it still finds.
func (ins *inserter) insertDifferences(ctx context.Context, seen []difference) error {
	var (
		name, channel proto.ColStr
		hour          proto.ColUInt32
		missing       proto.ColInt64
	)
	for _, d := range seen {
		name.Append(d.name)
		channel.Append(d.channel)
		hour = append(hour, d.hour)
		missing = append(missing, d.missing)
	}
	from, to := int64(seen[0].hour), int64(seen[len(seen)-1].hour)+hourSeconds
	return ins.Do(ctx, ch.Query{
		Body: ins.store.sql("INSERT INTO {database}.events_hourly (event_name, channel, hour, {counts}) SELECT event_name, channel, hour, {counts} FROM (" +
			fmt.Sprintf(strings.Replace(differences, " FINAL", "", 1), from, min(to, maxUnixSeconds), 0) +
			") WHERE (CAST(event_name, 'String'), CAST(channel, 'String'), toUnixTimestamp(hour), event_count) IN (SELECT name, ch, h, n FROM seen)"),
		QueryID:       ins.queryID(),
		ExternalTable: "seen",
		ExternalData:  []proto.InputColumn{{Name: "name", Data: &name}, {Name: "ch", Data: &channel}, {Name: "h", Data: &hour}, {Name: "n", Data: &missing}},
		Settings:      []ch.Setting{{Key: "async_insert", Value: "0"}, {Key: "insert_deduplicate", Value: "0"}},
	})
}
