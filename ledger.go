// The ledger: what was acknowledged against what is stored.
//
// ledger.go owns the subcommand audit, which reads the topics and the tables independently of the program's own bookkeeping. Its
// memory is bounded: what does not fit is read in several passes.

package main

import (
	"cmp"
	"context"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"maps"
	"math"
	"strconv"
	"text/tabwriter"

	"github.com/ClickHouse/ch-go"
	"github.com/ClickHouse/ch-go/proto"
	"github.com/twmb/franz-go/pkg/kadm"
	"github.com/twmb/franz-go/pkg/kgo"
)

// fateBytes is about what a pass holds of an event: an entry of a map that may be half empty.
const fateBytes = 96

func auditTool(fs *flag.FlagSet) toolRun {
	var r timeRange
	r.flags(fs)
	asJSON := fs.Bool("json", false, "the figures as a JSON object")
	memory := fs.Int("memory", 1024, "MiB for the ids of events; more than fit are read in several passes")
	erased := map[string]bool{}
	fs.Func("erased", "user_id that was erased: its events are left out, and none may be in the tables; may be given several times", func(s string) error { erased[s] = true; return nil })
	return func(ctx context.Context, cfg *settings, _ []string, w io.Writer) error {
		if err := r.check(); err != nil {
			return err
		}
		if *memory < 1 {
			return badArgument{fmt.Errorf("-memory %d has to be at least 1", *memory)}
		}
		l, err := readLedger(ctx, cfg, r, erased, *memory<<20/fateBytes)
		if err != nil {
			return err
		}
		if err := newClickHouse(cfg).session(ctx, io.Discard, func(s *session) { l.countErased(s, erased) }); err != nil {
			return err
		}
		l.print(w, *asJSON)
		if l.difference() != 0 || l.unequal != 0 || l.unerased != 0 {
			return errDiffers
		}
		return nil
	}
}

// ledger counts events by where they are. An event in several places counts for the last of these.
type ledger struct {
	records, junk    int64
	distinct         int64
	at               [inTable + 1]int64 // how many events are in each place
	nowhere          []string           // ids of the first that are nowhere but on the topic
	rows, aggregated int64
	unequal          int64 // by how much they differ, hour by hour
	unerased         int64 // rows of erased users, of whatever time
}

type place uint8

const (
	onTopic place = iota
	inDeadLetters
	inRetry
	inTable
)

// fate is what is known of an event.
type fate struct {
	records int32 // on the topic
	replays int16 // how often it came back from the dead letters
	place   place
}

// pass is one reading of topics and tables, for the events whose ids begin with 64 bits of the range first to last. When more
// than most of them turn up it gives half of the range to a later pass: memory is bounded, however long the topic is.
type pass struct {
	first, last uint64
	most        int
	fates       map[eventID]fate
	junk        int64
}

// readLedger reads topics and tables, at most so many events at a time. The events of erased users are left out.
func readLedger(ctx context.Context, cfg *settings, r timeRange, erased map[string]bool, most int) (*ledger, error) {
	l := &ledger{nowhere: []string{}}
	for first := uint64(0); ; {
		p := &pass{first: first, last: math.MaxUint64, most: most, fates: map[eventID]fate{}}
		if err := p.read(ctx, cfg, r, erased); err != nil {
			return nil, err
		}
		l.junk = p.junk // the same in each pass
		for id, f := range p.fates {
			l.records += int64(f.records)
			l.distinct++
			if l.at[f.place]++; f.place == onTopic && len(l.nowhere) < maxNowhere {
				l.nowhere = append(l.nowhere, hex.EncodeToString(id[:]))
			}
		}
		if p.last == math.MaxUint64 {
			return l, newClickHouse(cfg).session(ctx, io.Discard, func(s *session) { l.compareTables(s, r) })
		}
		first = p.last + 1
	}
}

func (p *pass) read(ctx context.Context, cfg *settings, r timeRange, erased map[string]bool) error {
	var parser eventParser
	for where, suffix := range []string{onTopic: "", inDeadLetters: ".dlq", inRetry: ".retry"} {
		group := ""
		if place(where) == inRetry { // what is committed has been put back, or is dead
			group = cfg.kafkaGroup + suffix
		}
		err := readRecords(ctx, cfg, cfg.kafkaTopic+suffix, group, func(rec *kgo.Record) error {
			ev, err := parser.decode(rec.Value)
			if err != nil && place(where) == onTopic {
				p.junk++
			}
			if err != nil || ev.timestamp < r.from || ev.timestamp >= r.to || erased[string(ev.userID)] {
				return nil
			}
			id, _ := ev.id(nil)
			replays, _ := strconv.ParseInt(header(rec, "replay_count"), 10, 16)
			p.note(id, place(where), int16(replays))
			return nil
		})
		if err != nil {
			return err
		}
	}
	return newClickHouse(cfg).session(ctx, io.Discard, func(s *session) { p.readTable(s, r) })
}

func (p *pass) has(id *eventID) bool {
	begin := binary.BigEndian.Uint64(id[:])
	return begin >= p.first && begin <= p.last
}

// note takes down where an event was found. What is not on the topic is older than what that still holds, and no matter.
func (p *pass) note(id eventID, where place, replays int16) {
	if !p.has(&id) {
		return
	}
	f, known := p.fates[id]
	switch {
	case where == onTopic:
		f.records++
		f.replays = max(f.replays, replays)
	case !known, where == inDeadLetters && replays < f.replays: // a letter that has come back since
		return
	}
	f.place = max(f.place, where)
	p.fates[id] = f
	for len(p.fates) > p.most {
		p.last = p.first + (p.last-p.first)/2
		maps.DeleteFunc(p.fates, func(id eventID, _ fate) bool { return !p.has(&id) })
	}
}

// readTable looks for the pass's events in the table.
func (p *pass) readTable(s *session, r timeRange) {
	var got proto.ColFixedStr32
	s.ask(ch.Query{
		Body: fmt.Sprintf("SELECT event_id FROM {events} WHERE timestamp >= %d AND timestamp < %d"+
			" AND substring(event_id, 1, 8) BETWEEN unhex('%016x') AND unhex('%016x')", r.from, r.to, p.first, p.last),
	}, func(i int) { p.note(got[i], inTable, 0) }, &got)
}

// compareTables counts both tables, hour by hour.
func (l *ledger) compareTables(s *session, r timeRange) {
	// The aggregate has whole hours: those entirely within the range are compared.
	from, to := (r.from+hourSeconds-1)/hourSeconds*hourSeconds, r.to/hourSeconds*hourSeconds
	var rows, aggregated, unequal proto.ColInt64
	s.ask(ch.Query{
		Body: fmt.Sprintf(`SELECT toInt64(sum(has)), toInt64(sum(counted)), toInt64(sum(abs(has - counted))) FROM (
			SELECT name, ch, hour, sum(has) AS has, sum(counted) AS counted FROM (
				SELECT CAST(event_name, 'String') AS name, CAST(channel, 'String') AS ch, toStartOfHour(timestamp) AS hour, toInt64(uniqExact(event_id)) AS has, toInt64(0) AS counted
				FROM {events} WHERE timestamp >= %[1]d AND timestamp < %[2]d GROUP BY name, ch, hour
				UNION ALL
				SELECT CAST(event_name, 'String') AS name, CAST(channel, 'String') AS ch, hour, toInt64(0) AS has, sum(event_count) AS counted
				FROM {events_hourly} WHERE hour >= %[1]d AND hour < %[2]d GROUP BY name, ch, hour
			) GROUP BY name, ch, hour)`, from, to),
	}, func(i int) { l.rows, l.aggregated, l.unequal = rows[i], aggregated[i], unequal[i] }, &rows, &aggregated, &unequal)
}

// countErased looks for rows of erased users, which a record that was still to be read, or a rewind, has brought back.
func (l *ledger) countErased(s *session, erased map[string]bool) {
	for user := range erased {
		var n proto.ColUInt64
		s.ask(ch.Query{Body: "SELECT count() FROM {events} WHERE user_id = {user:String}", Parameters: []proto.Parameter{parameter("user", user)}},
			func(i int) { l.unerased += int64(n[i]) }, &n)
	}
}

// difference is how many acknowledged events are nowhere.
func (l *ledger) difference() int64 { return l.at[onTopic] }

// maxNowhere is how many ids of lost events are printed.
const maxNowhere = 10

// print writes the figures, and the ids of lost events.
func (l *ledger) print(w io.Writer, asJSON bool) {
	object := map[string]any{"nowhere": l.nowhere}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	for _, f := range []struct {
		words, key string
		n          int64
	}{
		{"records on the topic", "records", l.records},
		{"duplicates", "duplicates", l.records - l.distinct},
		{"distinct events", "distinct_events", l.distinct},
		{"stored", "stored", l.at[inTable]},
		{"waiting for a retry", "waiting", l.at[inRetry]},
		{"dead letters", "dead_letters", l.at[inDeadLetters]},
		{"difference", "difference", l.difference()},
		{"records that are no event", "no_event", l.junk},
		{"distinct rows in whole hours", "distinct_rows", l.rows},
		{"counted in events_hourly", "aggregated", l.aggregated},
		{"counted too few or too many, hour by hour", "unequal", l.unequal},
		{"rows of erased users", "unerased", l.unerased},
	} {
		object[f.key] = f.n
		fmt.Fprintf(t, "%s\t%d\t\n", f.words, f.n)
	}
	if asJSON {
		json.NewEncoder(w).Encode(object)
		return
	}
	t.Flush()
	for _, id := range l.nowhere {
		fmt.Fprintf(w, "nowhere: %s\n", id)
	}
	if l.difference() > int64(len(l.nowhere)) {
		fmt.Fprintln(w, "…")
	}
}

// readRecords hands each record of a topic to f that the group has not committed, all of them without a group, up to where the
// partitions end when it starts. An error of f ends it.
func readRecords(ctx context.Context, cfg *settings, topic, group string, f func(*kgo.Record) error) error {
	kafka, err := newKafka(cfg, "event-ingestion-audit", kgo.FetchMaxWait(fetchWait), kgo.KeepControlRecords(), kgo.FetchIsolationLevel(kgo.ReadCommitted()))
	if err != nil {
		return err
	}
	defer kafka.Close()
	admin := kadm.NewClient(kafka)
	ends, err := whole(admin.ListEndOffsets(ctx, topic))
	if err != nil {
		return fmt.Errorf("ends of topic %s: %w", topic, err)
	}
	starts, err := whole(admin.ListStartOffsets(ctx, topic))
	if err != nil {
		return fmt.Errorf("starts of topic %s: %w", topic, err)
	}
	var done []int64
	if group != "" {
		if done, err = committedOffsets(ctx, admin, topic, group); err != nil {
			return fmt.Errorf("offsets of group %s: %w", group, err)
		}
	}
	left := map[int32]int64{} // end offsets of the partitions that are not read that far yet
	from := map[int32]kgo.Offset{}
	for p, end := range ends[topic] {
		start := starts[topic][p].Offset
		if int(p) < len(done) {
			start = max(start, done[p])
		}
		if start < end.Offset {
			left[p] = end.Offset
			from[p] = kgo.NewOffset().At(start)
		}
	}
	kafka.AddConsumePartitions(map[string]map[int32]kgo.Offset{topic: from})
	for len(left) > 0 {
		var failed error
		fetches := poll(ctx, kafka, 0, pollWait, func(err error) { failed = err })
		if failed = cmp.Or(failed, ctx.Err()); failed != nil {
			return fmt.Errorf("read topic %s: %w", topic, failed)
		}
		if fetches.NumRecords() == 0 { // what is left may have expired meanwhile
			if starts, err = whole(admin.ListStartOffsets(ctx, topic)); err != nil {
				return fmt.Errorf("starts of topic %s: %w", topic, err)
			}
			maps.DeleteFunc(left, func(p int32, end int64) bool { return starts[topic][p].Offset >= end })
		}
		fetches.EachRecord(func(rec *kgo.Record) {
			end := left[rec.Partition] // 0 when all of it is read
			if failed == nil && rec.Offset < end && !rec.Attrs.IsControl() {
				failed = f(rec)
			}
			if rec.Offset+1 >= end {
				delete(left, rec.Partition)
			}
		})
		if failed != nil {
			return failed
		}
	}
	return nil
}
