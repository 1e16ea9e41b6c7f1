// audit: what Kafka acknowledged against what is stored, event by event.
//
// It reads topics and tables by itself, and believes nothing that the program counts. Its memory is bounded: the ids that do not
// fit are read in several passes. What it finds is a ledger. Events move while it reads: settled.go looks again at what it missed.

package ops

import (
	"context"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"maps"
	"math"
	"runtime/debug"
	"strconv"
	"text/tabwriter"

	"github.com/ClickHouse/ch-go"
	"github.com/ClickHouse/ch-go/proto"
	"github.com/twmb/franz-go/pkg/kgo"
)

const (
	// tallyBytes is about what a pass holds of an event: an entry of a map that may be half empty.
	tallyBytes = 96
	// auditGarbage is how many per cent of what an audit holds may be garbage. That has no pointers, so collecting it often costs little.
	auditGarbage = 20
	// maxNowhere is how many ids of lost events are printed.
	maxNowhere = 10
)

func audit(fs *flag.FlagSet) action {
	var r timeRange
	r.flags(fs)
	asJSON := fs.Bool("json", false, "the figures as a JSON object")
	memory := fs.Int("memory", 1024, "MiB for the ids of events; more than fit are read in several passes")
	return func(ctx context.Context, sys System, _ []string, w io.Writer) error {
		if err := r.check(); err != nil {
			return err
		}
		if *memory < 1 {
			return badArgument{fmt.Errorf("-memory %d has to be at least 1", *memory)}
		}
		debug.SetGCPercent(auditGarbage)
		l, err := sys.readLedger(ctx, r, *memory<<20/tallyBytes)
		if err != nil {
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
	in               [inTable + 1]int64 // how many events are in each place
	nowhere          []string           // ids of the first that are nowhere but on the topic
	rows, aggregated int64
	unequal          int64 // by how much they differ, hour by hour
	late             int64 // events that are still to be read: a difference when nobody is at work
	unerased         int64 // rows of erased users
}

// whereabouts is a place where an event can be.
type whereabouts uint8

const (
	onTopic whereabouts = iota
	inDeadLetters
	inRetry
	toBeRead // or on the way back from there
	inTable
)

// suffixes are those of the topics, by whereabouts.
var suffixes = [...]string{onTopic: "", inDeadLetters: ".dlq", inRetry: ".retry"}

// tally is what a pass has found of an event.
type tally struct {
	records int32  // on the topic
	at      uint32 // Unix second
	replays int16  // how often it came back from the dead letters
	in      whereabouts
}

// ledgerPass is one reading of topics and tables, for the events whose ids begin with 64 bits of the range first to last. When more
// than most of them turn up it leaves half of the range to a later pass: memory is bounded, however long the topic is.
type ledgerPass struct {
	first, last uint64
	most        int
	tallies     map[[32]byte]tally
	junk        int64
	late        int64
}

// readLedger reads topics and tables, with at most so many events in memory. The events of erased users are left out.
func (sys System) readLedger(ctx context.Context, r timeRange, most int) (*ledger, error) {
	l := &ledger{nowhere: []string{}}
	erased, err := sys.erasures(ctx)
	if err != nil {
		return nil, err
	}
	for first, done := uint64(0), false; !done; {
		p := &ledgerPass{first: first, last: math.MaxUint64, most: most, tallies: map[[32]byte]tally{}}
		if err := p.read(ctx, sys, r, erased); err != nil {
			return nil, err
		}
		l.add(p)
		first, done = p.last+1, p.last == math.MaxUint64
	}
	if err := l.compareTables(ctx, sys, r); err != nil {
		return nil, err
	}
	l.unerased, err = erased.count(ctx, sys, r)
	return l, err
}

// add takes over what a pass has found.
func (l *ledger) add(p *ledgerPass) {
	l.junk = p.junk // the same in each pass
	l.late += p.late
	for id, found := range p.tallies {
		l.records += int64(found.records)
		l.distinct++
		if l.in[found.in]++; found.in == onTopic && len(l.nowhere) < maxNowhere {
			l.nowhere = append(l.nowhere, hex.EncodeToString(id[:]))
		}
	}
}

func (p *ledgerPass) read(ctx context.Context, sys System, r timeRange, erased erased) error {
	var places [len(suffixes)]map[int32]int64
	for where := range whereabouts(len(suffixes)) {
		places[where] = map[int32]int64{}
		err := sys.readOn(ctx, sys.Topic+suffixes[where], sys.groupOf(where), places[where], func(rec *kgo.Record) error {
			id, at, user, err := sys.Decode(rec.Value)
			if err != nil && where == onTopic {
				p.junk++
			}
			if err != nil || at < r.from || at >= r.to || erased.has(user, at) {
				return nil
			}
			p.note(id, at, where, replaysOf(rec))
			return nil
		})
		if err != nil {
			return err
		}
	}
	if err := p.readTable(ctx, sys, r); err != nil {
		return err
	}
	return p.follow(ctx, sys, places)
}

// groupOf is the group whose committed records are no longer there: what is committed of the retry topic has been put back, or is dead.
func (sys System) groupOf(where whereabouts) string {
	if where == inRetry {
		return sys.Group + suffixes[inRetry]
	}
	return ""
}

// replaysOf is how often a record came back from the dead letters.
func replaysOf(rec *kgo.Record) int16 {
	n, _ := strconv.ParseInt(header(rec, "replay_count"), 10, 16)
	return int16(n)
}

func (p *ledgerPass) has(id *[32]byte) bool {
	begin := binary.BigEndian.Uint64(id[:])
	return begin >= p.first && begin <= p.last
}

// note takes down where an event was found. What is not on the topic is older than what that still holds, and no matter.
func (p *ledgerPass) note(id [32]byte, at int64, in whereabouts, replays int16) {
	if !p.has(&id) {
		return
	}
	found, known := p.tallies[id]
	switch {
	case in == onTopic:
		found.records++
		found.at = uint32(at)
		found.replays = max(found.replays, replays)
	case !known, in == inDeadLetters && replays < found.replays: // a letter that has come back since
		return
	}
	found.in = max(found.in, in)
	p.tallies[id] = found
	for len(p.tallies) > p.most {
		p.last = p.first + (p.last-p.first)/2
		maps.DeleteFunc(p.tallies, func(id [32]byte, _ tally) bool { return !p.has(&id) })
	}
}

// readTable looks for the pass's events in the table.
func (p *ledgerPass) readTable(ctx context.Context, sys System, r timeRange) error {
	var ids proto.ColFixedStr32
	return sys.ask(ctx, ch.Query{
		Body: fmt.Sprintf("SELECT event_id FROM {events} WHERE timestamp >= %d AND timestamp < %d"+
			" AND substring(event_id, 1, 8) BETWEEN unhex('%016x') AND unhex('%016x')", r.from, r.to, p.first, p.last),
	}, func(i int) { p.note(ids[i], 0, inTable, 0) }, &ids)
}

// difference is how many acknowledged events are nowhere.
func (l *ledger) difference() int64 { return l.in[onTopic] }

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
		{"stored", "stored", l.in[inTable]},
		{"waiting for a retry", "waiting", l.in[inRetry]},
		{"dead letters", "dead_letters", l.in[inDeadLetters]},
		{"difference", "difference", l.difference()},
		{"records that are no event", "no_event", l.junk},
		{"distinct rows in whole hours", "distinct_rows", l.rows},
		{"counted in events_hourly", "aggregated", l.aggregated},
		{"counted too few or too many, hour by hour", "unequal", l.unequal},
		{"rows of erased users", "unerased", l.unerased},
		{"still to be read", "unread", l.late},
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
