// Settled: what audit judges while the program is at work.
//
// Topics and tables are read one after the other, and an event that moves meanwhile is missed by all of them. So events that were found
// nowhere are followed until they are somewhere or certainly nowhere, and hours that differ are counted again until a figure of theirs
// has been found often enough. Both end, whatever comes in meanwhile.

package ops

import (
	"context"
	"fmt"
	"slices"

	"github.com/ClickHouse/ch-go"
	"github.com/ClickHouse/ch-go/proto"
	"github.com/twmb/franz-go/pkg/kadm"
	"github.com/twmb/franz-go/pkg/kgo"
)

const (
	// askedAtOnce is how many events are looked up in one query: 5 MB.
	askedAtOnce = 1 << 17
	// An hour agrees when it was found so agreeLooks times, and differs when the same difference was found differLooks times, or
	// idleLooks when the group has no members: an insert stands in one table alone for a moment, and is another one at each look.
	// After maxLooks the last look decides.
	agreeLooks, differLooks, idleLooks, maxLooks = 2, 10, 2, 100
)

// follow looks for the events that were found nowhere but on the topic. places is how far the topics have been read, by whereabouts.
//
// It reads, in this order, (1) the committed offsets of the main topic, (2) what has come onto the retry topic since the reading before,
// but for what is committed there, (3) the main topic from (1) on, (4) what has come to the dead letters, and (5) the table.
//
// The rule: an event is lost when none of its records is on (2) or (3), and it is neither in (4) nor in (5). Proof: something had become
// of each record below (1). A row or a letter would be in (5) or (4). A record on the retry topic, or on another partition since the
// topic has grown, was acknowledged before (1). So it was read, or, when it is not on (2), put back before (2), which is a record
// below the end of (3). So each record has a later one below (1), without end.
//
// What is on (3) is still to be read, which is no difference as long as the group has members.
func (p *ledgerPass) follow(ctx context.Context, sys System, places [len(suffixes)]map[int32]int64) error {
	if len(p.lost()) == 0 {
		return nil
	}
	atWork, committed, err := sys.atWork(ctx)
	if err != nil {
		return err
	}
	places[onTopic] = committed
	late := map[[32]byte]struct{}{}
	for _, where := range []whereabouts{inRetry, onTopic, inDeadLetters} {
		err := sys.readOn(ctx, sys.Topic+suffixes[where], sys.groupOf(where), places[where], func(rec *kgo.Record) error {
			id, _, _, err := sys.Decode(rec.Value)
			found, known := p.tallies[id]
			switch {
			case err != nil || !known:
			case where != onTopic:
				p.note(id, 0, where, replaysOf(rec))
			case found.in == onTopic: // and no record of the ledger, or one for the second time
				late[id] = struct{}{}
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	if err := p.lookUp(ctx, sys); err != nil {
		return err
	}
	for id := range late {
		if found := p.tallies[id]; found.in == onTopic {
			if p.late++; atWork {
				found.in = toBeRead
				p.tallies[id] = found
			}
		}
	}
	return nil
}

// atWork returns whether the group has members, and what it has committed of the main topic, by partition.
func (sys System) atWork(ctx context.Context) (is bool, committed map[int32]int64, err error) {
	kafka, err := sys.Kafka("event-ingestion-audit")
	if err != nil {
		return false, nil, err
	}
	defer kafka.Close()
	admin := kadm.NewClient(kafka)
	members, err := membersOf(ctx, admin, sys.Group)
	if err != nil {
		return false, nil, err
	}
	answer, err := committedOf(ctx, admin, sys.Group, sys.Topic)
	if err != nil {
		return false, nil, err
	}
	committed = map[int32]int64{}
	for p, o := range answer[sys.Topic] {
		if o.Err == nil {
			committed[p] = o.At
		}
	}
	return len(members) > 0, committed, nil
}

// lost are the events that were found nowhere but on the topic.
func (p *ledgerPass) lost() (ids [][32]byte) {
	for id, found := range p.tallies {
		if found.in == onTopic {
			ids = append(ids, id)
		}
	}
	return ids
}

// lookUp looks for the lost ones in the table.
func (p *ledgerPass) lookUp(ctx context.Context, sys System) error {
	if err := sys.SyncReplicas(ctx); err != nil {
		return err
	}
	for some := range slices.Chunk(p.lost(), askedAtOnce) {
		var ids, got proto.ColFixedStr32
		var at proto.ColUInt32
		for _, id := range some {
			ids.Append(id)
			at.Append(p.tallies[id].at)
		}
		err := sys.ask(ctx, ch.Query{
			Body:          "SELECT event_id FROM {events} WHERE (timestamp, event_id) IN (SELECT toDateTime(at, 'UTC'), id FROM lost)",
			ExternalTable: "lost",
			ExternalData:  []proto.InputColumn{{Name: "at", Data: &at}, {Name: "id", Data: &ids}},
		}, func(i int) { p.note(got[i], 0, inTable, 0) }, &got)
		if err != nil {
			return err
		}
	}
	return nil
}

// hourFigures are those of an hour in both tables.
type hourFigures struct {
	rows, aggregated, unequal int64
	difference                uint64 // a hash of what differs, 0 when nothing does
}

// compareTables counts both tables, hour by hour, and hours that differ again.
func (l *ledger) compareTables(ctx context.Context, sys System, r timeRange) error {
	// The aggregate has whole hours: those entirely within the range are compared.
	from, to := (r.from+hourSeconds-1)/hourSeconds*hourSeconds, r.to/hourSeconds*hourSeconds
	hours, err := sys.countHours(ctx, from, to, nil)
	if err != nil {
		return err
	}
	type finding struct {
		hour       uint32
		difference uint64
	}
	times := map[finding]int{}
	var doubted proto.ColUInt32
	for hour, f := range hours {
		if f.unequal != 0 {
			times[finding{hour, f.difference}] = 1
			doubted.Append(hour)
		}
	}
	enough := idleLooks
	if len(doubted) > 0 {
		if atWork, _, err := sys.atWork(ctx); err != nil {
			return err
		} else if atWork {
			enough = differLooks
		}
	}
	for looks := 1; len(doubted) > 0 && looks < maxLooks; looks++ {
		if err := sys.awaitInserts(ctx); err != nil {
			return err
		}
		again, err := sys.countHours(ctx, int64(slices.Min(doubted)), int64(slices.Max(doubted))+hourSeconds, doubted)
		if err != nil {
			return err
		}
		doubted = slices.DeleteFunc(doubted, func(hour uint32) bool {
			hours[hour] = again[hour]
			found := finding{hour, again[hour].difference}
			times[found]++
			return found.difference == 0 && times[found] >= agreeLooks || times[found] >= enough
		})
	}
	for _, f := range hours {
		l.rows += f.rows
		l.aggregated += f.aggregated
		l.unequal += f.unequal
	}
	return nil
}

// awaitInserts returns after a pause, and once the inserts have ended that were at work when it began.
func (sys System) awaitInserts(ctx context.Context) error {
	return sys.Connect(ctx, func(do Conn) error {
		now, err := sys.clock(ctx, do)
		if err == nil {
			err = pause(ctx, lookPause)
		}
		if err != nil {
			return err
		}
		return sys.await(ctx, do, insertsAtWork, now)
	})
}

// countHours counts both tables from one Unix second to another, which is excluded; of these only the hours that only has, if any.
// Ids are told apart as numbers, which takes a fifth to a third less time than as text.
func (sys System) countHours(ctx context.Context, from, to int64, only proto.ColUInt32) (map[uint32]hourFigures, error) {
	hours := map[uint32]hourFigures{}
	q := ch.Query{}
	within := ""
	if len(only) > 0 {
		within = "WHERE second IN (SELECT hour FROM doubted)"
		q.ExternalTable, q.ExternalData = "doubted", []proto.InputColumn{{Name: "hour", Data: &only}}
	}
	q.Body = fmt.Sprintf(`SELECT second, toInt64(sum(has)), toInt64(sum(counted)), toInt64(sum(abs(has - counted))), sumIf(cityHash64(name, ch, has - counted), has != counted) FROM (
		SELECT name, ch, second, sum(has) AS has, sum(counted) AS counted FROM (
			SELECT CAST(event_name, 'String') AS name, CAST(channel, 'String') AS ch, toUnixTimestamp(toStartOfHour(timestamp)) AS second, toInt64(uniqExact(reinterpretAsUInt256(event_id))) AS has, toInt64(0) AS counted
			FROM {events} WHERE timestamp >= %[1]d AND timestamp < %[2]d GROUP BY name, ch, second
			UNION ALL
			SELECT CAST(event_name, 'String') AS name, CAST(channel, 'String') AS ch, toUnixTimestamp(hour) AS second, toInt64(0) AS has, sum(event_count) AS counted
			FROM {events_hourly} WHERE hour >= %[1]d AND hour < %[2]d GROUP BY name, ch, second
		) %[3]s GROUP BY name, ch, second) GROUP BY second`, from, to, within)
	var second proto.ColUInt32
	var rows, aggregated, unequal proto.ColInt64
	var difference proto.ColUInt64
	err := sys.ask(ctx, q, func(i int) { hours[second[i]] = hourFigures{rows[i], aggregated[i], unequal[i], difference[i]} },
		&second, &rows, &aggregated, &unequal, &difference)
	return hours, err
}
