// Broken parts: files of ClickHouse that cannot be read.
//
// A disk that fills to the last byte may leave a part whose files are empty, usually a merged one. For old_parts_lifetime, 8
// minutes, the parts that were merged into it still exist: detaching and attaching the table puts the broken part aside and
// brings them back. After that only Kafka has the rows. So whoever meets a broken part reports it, and new parts are checked
// after an insert failed for lack of space. Only the inserter mends, between two attempts. A replicated table mends itself.
// broken.go owns what is known of broken parts, and says which rows are gone.

package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ClickHouse/ch-go"
	"github.com/ClickHouse/ch-go/proto"

	"github.com/event-ingestion/event-ingestion/troubles"
)

const (
	// reattachInterval is the least time between two mendings: during one nothing is stored and no query is answered.
	reattachInterval = 10 * time.Minute
	// attachTimeout bounds the attempts to attach a table, which has to wait for queries that still read it.
	attachTimeout = 2 * time.Minute
	// checkAgain is how long after a full disk the parts are checked once more: merges that began on it have ended by then.
	checkAgain = time.Minute
	// repairPause is the least time from a failed mending to the next attempt.
	repairPause = 5 * time.Second
)

// corruptions are ClickHouse's codes for a damaged file.
var corruptions = []proto.Error{
	proto.ErrCorruptedData, proto.ErrChecksumDoesntMatch, proto.ErrCannotReadAllData, proto.ErrAttemptToReadAfterEOF,
	proto.ErrCannotDecompress, proto.ErrBadSizeOfFileInDataPart, proto.ErrNoFileInDataPart,
}

// readingPart finds the part's name in ClickHouse's messages for these errors.
var readingPart = regexp.MustCompile(`while reading from part \S*?/([^/\s]+)/(?:\w+\.proj/)? in table \S+\.(events|events_hourly) \(`)

// partName is a part of a table.
type partName struct{ table, name string }

// brokenParts is what all queries to ClickHouse have found.
type brokenParts struct {
	total atomic.Int64 // event_ingestion_broken_parts_total
	mu    sync.Mutex   // guards what follows
	known []partName
	found []partName // of them, those that are not mended yet
}

// note takes the error of every query.
func (b *brokenParts) note(err error) {
	if ch.IsErr(err, corruptions...) {
		if m := readingPart.FindStringSubmatch(err.Error()); m != nil {
			b.add(partName{m[2], m[1]}, firstLine(err.Error()), true)
		}
	}
}

// add counts and logs a part, once, and queues it for mending if it is still in its table.
func (b *brokenParts) add(p partName, why string, live bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if slices.Contains(b.known, p) {
		return
	}
	b.known = append(b.known, p)
	b.total.Add(1)
	if live {
		b.found = append(b.found, p)
	}
	slog.Error("ClickHouse has a broken part", "table", p.table, "part", p.name, "why", why)
}

// waiting returns the parts that wait for a mending, in the order they were found.
func (b *brokenParts) waiting() []partName {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.Clone(b.found)
}

// mended takes the first n off the list.
func (b *brokenParts) mended(n int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.found = b.found[n:]
}

// words is for /ready: empty when no part waits for a mending.
func (b *brokenParts) words() string {
	list := b.waiting()
	if len(list) == 0 {
		return ""
	}
	return fmt.Sprintf("answers, but part %s of %s is broken (%d in all)", list[0].name, list[0].table, len(list))
}

// repair is what the inserter knows of its mendings.
type repair struct {
	detached   bool                   // a table has to be attached
	reattached time.Time              // the last mending
	notBefore  time.Time              // when the next attempt is due
	dialed     bool                   // ClickHouse may have restarted since it was asked what it put aside
	ranges     map[partName]timeRange // event times of parts, from before they were put aside
	aside      map[partName]struct{}  // put aside and dealt with
	full       time.Time              // when inserts began to fail for lack of space, zero once a check has begun
	checking   atomic.Bool
}

// repair is called between two attempts, with the last one's error, and between two rounds, with nil.
func (ins *inserter) repair(ctx context.Context, failure error) {
	r := &ins.repairs
	ins.store.broken.note(failure)
	if ch.IsErr(failure, proto.ErrNotEnoughSpace) && r.full.IsZero() {
		r.full = time.Now()
	}
	if failure == nil && !r.full.IsZero() && r.checking.CompareAndSwap(false, true) {
		since := r.full
		r.full = time.Time{}
		go func() { // ends with the parts, or with ctx
			defer r.checking.Store(false)
			ins.store.checkParts(ctx, since)
			if troubles.Sleep(ctx, checkAgain) == nil {
				ins.store.checkParts(ctx, since)
			}
		}()
	}
	if time.Now().Before(r.notBefore) {
		return
	}
	var err error
	if r.detached {
		err = ins.attach(ctx)
	}
	if parts := ins.store.broken.waiting(); err == nil && len(parts) > 0 && time.Since(r.reattached) >= reattachInterval {
		err = ins.reattach(ctx, parts)
	}
	if err == nil && r.dialed {
		err = ins.lookAside(ctx)
	}
	ins.stats.troubles.Note(ins.store.name("mend broken parts"), err)
	if err != nil {
		r.notBefore = time.Now().Add(repairPause)
	}
}

// reattach detaches the tables in which one of the parts is live, except replicated ones, and attaches them. Meanwhile inserts
// and queries, those of other instances too, get UNKNOWN_TABLE and are retried; an insert into events stores nothing while the
// view has no target.
func (ins *inserter) reattach(ctx context.Context, parts []partName) error {
	var list []string
	for _, p := range parts {
		list = append(list, fmt.Sprintf("('%s','%s')", p.table, p.name))
	}
	live, err := ins.store.liveParts(ctx, ins, "(table, name) IN ("+strings.Join(list, ",")+
		") AND NOT startsWith(engine, 'Replicated') AND NOT startsWith(engine, 'Shared')")
	if err != nil {
		return err
	}
	maps.Copy(ins.repairs.ranges, live)
	tables := map[string]struct{}{}
	for p := range live {
		tables[p.table] = struct{}{}
	}
	for table := range tables {
		slog.Warn("a table with a broken part is detached and attached", "table", table)
		ins.repairs.reattached, ins.repairs.detached = time.Now(), true
		// SYNC waits for the inserts and queries that still use the table.
		err := ins.Do(ctx, ch.Query{Body: "DETACH TABLE IF EXISTS " + ins.store.database + "." + table + " SYNC"})
		if err := errors.Join(err, ins.attach(ctx)); err != nil {
			return err
		}
	}
	ins.store.broken.mended(len(parts))
	ins.repairs.dialed = true
	return nil
}

// liveParts are the parts that are in their tables and that a condition names, and the times of their events.
func (s *store) liveParts(ctx context.Context, c asker, where string) (map[partName]timeRange, error) {
	parts := map[partName]timeRange{}
	var table, name proto.ColStr
	var from, to proto.ColUInt32
	err := c.Do(ctx, eachRow(ch.Query{
		Body: s.sql("SELECT table, name, toUnixTimestamp(min_time), toUnixTimestamp(max_time) FROM system.parts" +
			" WHERE active AND database = '{database}' AND " + where),
	}, func(i int) { parts[partName{table.Row(i), name.Row(i)}] = timeRange{int64(from[i]), int64(to[i])} }, &table, &name, &from, &to))
	return parts, err
}

// attach ends a mending, even while the program stops: nobody else would before the next start.
func (ins *inserter) attach(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), attachTimeout)
	defer cancel()
	for {
		err := ins.store.attach(ctx, ins)
		if err == nil {
			ins.repairs.detached = false
			return nil
		}
		if troubles.Sleep(ctx, minBackoff) != nil {
			return fmt.Errorf("attach a table: %w", err)
		}
	}
}

// attach attaches the tables that a mending has detached. It fails where there are no tables yet.
func (s *store) attach(ctx context.Context, c asker) error {
	if s.replicated {
		return nil
	}
	var failures []error
	for _, table := range []string{"events", "events_hourly"} {
		failures = append(failures, c.Do(ctx, ch.Query{Body: "ATTACH TABLE IF NOT EXISTS " + s.database + "." + table}))
	}
	return errors.Join(failures...)
}

// putAside are the parts that ClickHouse has put aside as broken, and whether what was merged into one is back: the first and
// the last part that were share its outer block numbers. They may have been merged again, and then still exist for some minutes.
// Nothing was merged into a part of level 0; a new one may have its number.
const putAside = `
WITH present AS (SELECT * FROM system.parts WHERE database = '{database}' AND rows > 0)
SELECT table, name, ifNull(reason, ''), ifNull(partition_id, '') AS partition,
    toUInt8(ifNull(level, 0) > 0 AND (table, partition, assumeNotNull(min_block_number)) IN (SELECT table, partition_id, min_block_number FROM present)
        AND (table, partition, assumeNotNull(max_block_number)) IN (SELECT table, partition_id, max_block_number FROM present))
FROM system.detached_parts
WHERE database = '{database}' AND table IN ('events', 'events_hourly') AND startsWith(reason, 'broken')
ORDER BY table, name`

// lookAside looks at the parts that ClickHouse put aside as broken at its start or when a table was attached.
func (ins *inserter) lookAside(ctx context.Context) error {
	var table, dir, reason, partition proto.ColStr
	var back proto.ColUInt8
	err := ins.Do(ctx, eachRow(ch.Query{Body: ins.store.sql(putAside)}, func(i int) {
		p := partName{table.Row(i), strings.TrimPrefix(dir.Row(i), reason.Row(i)+"_")}
		if _, seen := ins.repairs.aside[p]; !seen {
			ins.repairs.aside[p] = struct{}{}
			ins.store.broken.add(p, reason.Row(i), false)
			ins.noteAside(p, dir.Row(i), partition.Row(i), back[i] == 1)
		}
	}, &table, &dir, &reason, &partition, &back))
	ins.repairs.dialed = err != nil
	return err
}

// noteAside deals with a part in its table's detached directory. Its rows may be gone, so the dedupe forgets everything, and
// its hours are compared and mended. back is true when the parts that were merged into it exist again, which can no longer be
// seen some minutes after a mending.
func (ins *inserter) noteAside(p partName, dir, partition string, back bool) {
	ins.dedupe.forgetAll()
	within, known := ins.repairs.ranges[p]
	if month, err := time.Parse("200601", partition); !known && err == nil {
		within = timeRange{month.Unix(), month.AddDate(0, 1, 0).Unix() - 1}
	}
	for hour := within.from / hourSeconds; hour <= within.to/hourSeconds; hour++ {
		ins.noteHour(hour)
	}
	drop := fmt.Sprintf("ALTER TABLE %s.%s DROP DETACHED PART '%s' SETTINGS allow_drop_detached = 1", ins.store.database, p.table, dir)
	log := slog.With("table", p.table, "part", p.name, "remove it with", drop)
	switch {
	case back:
		log.Warn("a broken part is put aside, the parts that were merged into it are back")
	case p.table == "events":
		to := "start"
		if known { // no event is accepted before its time
			to = time.Unix(within.from-minuteSeconds, 0).UTC().Format(time.RFC3339)
		}
		log.Error("a broken part is put aside and nothing has its rows; Kafka does: unless that is done, stop all instances and read them again",
			"with", "event-ingestion rewind -to "+to)
	default:
		log.Warn("a broken part is put aside, its hours are counted from events again")
	}
}

// checkParts has ClickHouse check the live parts that it has written since, on a connection of its own: a large part takes a
// second per gigabyte.
func (s *store) checkParts(ctx context.Context, since time.Time) {
	err := s.connected(ctx, func(c asker) error {
		parts, err := s.liveParts(ctx, c, fmt.Sprintf("table IN ('events', 'events_hourly') AND modification_time >= now() - %d",
			int(time.Since(since).Seconds())+minuteSeconds))
		if err != nil {
			return err
		}
		slog.Info("inserts failed for want of space, checking what was written meanwhile", "parts", len(parts))
		for p := range parts {
			var passed proto.ColUInt8
			err := c.Do(ctx, ch.Query{
				Body:   fmt.Sprintf("CHECK TABLE %s.%s PART '%s' SETTINGS check_query_single_value_result = 1", s.database, p.table, p.name),
				Result: proto.Results{{Data: &passed}},
			})
			if len(passed) == 1 && passed[0] == 0 {
				s.broken.add(p, "CHECK TABLE does not pass it", true)
			}
			if err != nil && !ch.IsErr(err, proto.ErrNoSuchDataPart) { // which has been merged away meanwhile
				return err
			}
		}
		return nil
	})
	if err != nil {
		slog.Warn("parts written on a full disk are not checked", "error", err)
	}
}
