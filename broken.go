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
	"fmt"
	"log/slog"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ClickHouse/ch-go"
	"github.com/ClickHouse/ch-go/proto"
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
	known map[partName]struct{}
	found []partName // not mended yet
}

// note takes the error of every query. A part is counted and logged once.
func (b *brokenParts) note(err error) {
	e, ok := ch.AsException(err)
	if !ok || !slices.Contains(corruptions, e.Code) {
		return
	}
	if m := readingPart.FindStringSubmatch(e.Message); m != nil {
		b.add(partName{m[2], m[1]}, firstLine(e.Message))
	}
}

// add queues a part for mending.
func (b *brokenParts) add(p partName, why string) {
	if b.tell(p, why) {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.found = append(b.found, p)
	}
}

// tell counts and logs a part, and says whether it is new.
func (b *brokenParts) tell(p partName, why string) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if _, known := b.known[p]; known {
		return false
	}
	if b.known == nil {
		b.known = map[partName]struct{}{}
	}
	b.known[p] = struct{}{}
	b.total.Add(1)
	slog.Error("ClickHouse has a broken part", "table", p.table, "part", p.name, "why", why)
	return true
}

// waiting returns the parts that wait for a mending, in the order they were found.
func (b *brokenParts) waiting() []partName {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.Clone(b.found)
}

// words is for /ready: empty when no part waits for a mending.
func (b *brokenParts) words() string {
	list := b.waiting()
	if len(list) == 0 {
		return ""
	}
	return fmt.Sprintf("answers, but part %s of %s is broken (%d in all)", list[0].name, list[0].table, len(list))
}

// mended takes the first n off the list.
func (b *brokenParts) mended(n int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.found = b.found[n:]
}

// repair is what the inserter knows of its mendings.
type repair struct {
	detached   string                 // the table that has to be attached, empty when none
	reattached time.Time              // the last mending
	notBefore  time.Time              // when the next attempt is due
	dialed     bool                   // ClickHouse may have restarted since it was asked what it put aside
	ranges     map[partName]timeRange // event times of parts, from before they were put aside
	aside      map[partName]struct{}  // put aside and dealt with

	full      time.Time // when inserts began to fail for lack of space, zero once all is checked
	checks    int       // still to come
	nextCheck time.Time
}

// repair is called between two attempts, with the last one's error, and between two rounds, with nil.
func (ins *inserter) repair(ctx context.Context, failure error) {
	ins.store.broken.note(failure)
	if ch.IsErr(failure, proto.ErrNotEnoughSpace) {
		if ins.repairs.full.IsZero() {
			ins.repairs.full = time.Now()
		}
		ins.repairs.checks, ins.repairs.nextCheck = 2, time.Now()
	}
	if failure == nil && ins.repairs.checks > 0 && !time.Now().Before(ins.repairs.nextCheck) {
		ins.repairs.checks, ins.repairs.nextCheck = ins.repairs.checks-1, time.Now().Add(checkAgain)
		go ins.store.checkParts(ctx, time.Since(ins.repairs.full)) // ends with the parts, or with ctx
		if ins.repairs.checks == 0 {
			ins.repairs.full = time.Time{}
		}
	}
	if time.Now().Before(ins.repairs.notBefore) {
		return
	}
	if err := ins.repairParts(ctx); err != nil {
		ins.stats.troubles.note(ins.store.name("mend broken parts"), err)
		ins.repairs.notBefore = time.Now().Add(repairPause)
	}
}

func (ins *inserter) repairParts(ctx context.Context) error {
	if ins.repairs.detached != "" {
		if err := ins.attach(ctx); err != nil {
			return err
		}
	}
	if parts := ins.store.broken.waiting(); len(parts) > 0 && time.Since(ins.repairs.reattached) >= reattachInterval {
		if err := ins.reattach(ctx, parts); err != nil {
			return err
		}
	}
	if !ins.repairs.dialed {
		return nil
	}
	return ins.lookAside(ctx)
}

// reattach detaches the tables of the parts and attaches them. Meanwhile inserts and queries, those of other instances too,
// get UNKNOWN_TABLE and are retried; an insert into events stores nothing while the view has no target.
func (ins *inserter) reattach(ctx context.Context, parts []partName) error {
	tables, err := ins.tablesOf(ctx, parts)
	if err != nil {
		return err
	}
	for _, table := range tables {
		slog.Warn("a table with a broken part is detached and attached", "table", table)
		ins.repairs.reattached, ins.repairs.detached = time.Now(), table
		// SYNC waits for the inserts and queries that still use the table.
		err := ins.Do(ctx, ch.Query{Body: "DETACH TABLE IF EXISTS " + ins.store.database + "." + table + " SYNC"})
		if err := ins.attach(ctx); err != nil {
			return err
		}
		if err != nil {
			return fmt.Errorf("detach %s: %w", table, err)
		}
	}
	ins.store.broken.mended(len(parts))
	ins.repairs.dialed = true
	return nil
}

// tablesOf returns the tables in which one of the parts is live, except replicated ones, and notes the parts' event times.
func (ins *inserter) tablesOf(ctx context.Context, parts []partName) (tables []string, err error) {
	var list []string
	for _, p := range parts {
		list = append(list, fmt.Sprintf("('%s','%s')", p.table, p.name))
	}
	var table, name, engine proto.ColStr
	var from, to proto.ColUInt32
	err = ins.Do(ctx, eachRow(ch.Query{
		Body: "SELECT table, name, engine, toUnixTimestamp(min_time), toUnixTimestamp(max_time) FROM system.parts" +
			" WHERE active AND database = {database:String} AND (table, name) IN (" + strings.Join(list, ",") + ")",
		Parameters: []proto.Parameter{parameter("database", ins.store.database)},
	}, func(i int) {
		if strings.HasPrefix(engine.Row(i), "Replicated") || strings.HasPrefix(engine.Row(i), "Shared") {
			slog.Warn("a broken part of a replicated table is left to ClickHouse", "table", table.Row(i), "part", name.Row(i))
			return
		}
		ins.repairs.ranges[partName{table.Row(i), name.Row(i)}] = timeRange{int64(from[i]), int64(to[i])}
		if !slices.Contains(tables, table.Row(i)) {
			tables = append(tables, table.Row(i))
		}
	}, &table, &name, &engine, &from, &to))
	return tables, err
}

// attach attaches the detached table, even while the program stops: nobody else would before the next start (attachAll).
func (ins *inserter) attach(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), attachTimeout)
	defer cancel()
	for {
		err := ins.Do(ctx, ch.Query{Body: "ATTACH TABLE IF NOT EXISTS " + ins.store.database + "." + ins.repairs.detached})
		if err == nil {
			ins.repairs.detached = ""
			return nil
		}
		if ctx.Err() != nil {
			return fmt.Errorf("attach %s: %w", ins.repairs.detached, err)
		}
		sleep(ctx, minBackoff)
	}
}

// attachLeft is attachAll for an inserter that finds a table missing: whoever detached it may have died before attaching.
func (s *store) attachLeft(ctx context.Context) {
	if c, err := s.dial(ctx); err == nil {
		defer c.Close()
		s.attachAll(ctx, c)
	}
}

// attachAll attaches the tables that an interrupted mending left detached. It fails where there are no tables yet; a real
// fault shows in the next query.
func (s *store) attachAll(ctx context.Context, c asker) {
	if s.replicated {
		return
	}
	for _, table := range []string{"events", "events_hourly"} {
		if err := c.Do(ctx, ch.Query{Body: "ATTACH TABLE IF NOT EXISTS " + s.database + "." + table}); err != nil {
			slog.Debug("attach", "table", table, "error", err)
		}
	}
}

// lookAside looks at the parts that ClickHouse put aside as broken at its start or when a table was attached. Their rows
// may be gone, so the dedupe forgets everything, and their hours are compared and mended.
func (ins *inserter) lookAside(ctx context.Context) error {
	var table, name, reason, partition proto.ColStr
	var back proto.ColUInt8
	err := ins.Do(ctx, eachRow(ch.Query{
		// The first and the last part that were merged into one share its outer block numbers. They may have been merged
		// again, and then still exist for some minutes.
		Body: "SELECT d.table AS table, d.name AS name, any(d.reason) AS reason, any(d.partition_id) AS partition," +
			" toUInt8(countIf(p.rows > 0 AND p.first = d.first AND p.last <= d.last) > 0 AND countIf(p.rows > 0 AND p.last = d.last AND p.first >= d.first) > 0) AS back FROM (" +
			"SELECT table, name, ifNull(reason, '') AS reason, ifNull(partition_id, '') AS partition_id, assumeNotNull(min_block_number) AS first, assumeNotNull(max_block_number) AS last" +
			" FROM system.detached_parts WHERE database = {database:String} AND table IN ('events', 'events_hourly') AND startsWith(reason, 'broken')) AS d LEFT JOIN (" +
			"SELECT table, partition_id, rows, min_block_number AS first, max_block_number AS last FROM system.parts WHERE database = {database:String}" +
			") AS p ON p.table = d.table AND p.partition_id = d.partition_id GROUP BY table, name ORDER BY table, name",
		Parameters: []proto.Parameter{parameter("database", ins.store.database)},
	}, func(i int) { ins.noteAside(table.Row(i), name.Row(i), reason.Row(i), partition.Row(i), back[i] == 1) }, &table, &name, &reason, &partition, &back))
	ins.repairs.dialed = ins.repairs.dialed && err != nil
	return err
}

// noteAside deals with a part in its table's detached directory. back says that the parts merged into it exist again; some
// minutes after a mending that can no longer be seen.
func (ins *inserter) noteAside(table, dir, reason, partition string, back bool) {
	p := partName{table, strings.TrimPrefix(dir, reason+"_")}
	if _, seen := ins.repairs.aside[p]; seen {
		return
	}
	ins.repairs.aside[p] = struct{}{}
	ins.store.broken.tell(p, reason)
	ins.dedupe.forgetAll()
	within, known := ins.repairs.ranges[p]
	if month, err := time.Parse("200601", partition); !known && err == nil {
		within = timeRange{month.Unix(), month.AddDate(0, 1, 0).Unix() - 1}
	}
	for hour := within.from / hourSeconds; hour <= within.to/hourSeconds; hour++ {
		ins.noteHour(hour)
	}
	log := slog.With("table", table, "part", p.name, "remove it with", fmt.Sprintf("ALTER TABLE %s.%s DROP DETACHED PART '%s' SETTINGS allow_drop_detached = 1", ins.store.database, table, dir))
	switch {
	case back:
		log.Warn("a broken part is put aside, the parts that were merged into it are back")
	case table == "events":
		to := "start"
		if known { // no event is accepted before its time
			to = time.Unix(within.from-minuteSeconds, 0).UTC().Format(time.RFC3339)
		}
		log.Error("a broken part is put aside and nothing has its rows; Kafka does: unless that is done, stop all instances and read them again", "with", "event-ingestion rewind -to "+to)
	default:
		log.Warn("a broken part is put aside, its hours are counted from events again")
	}
}

// checkParts has ClickHouse check the live parts that it wrote within age, on a connection of its own: a large part takes a
// second per gigabyte.
func (s *store) checkParts(ctx context.Context, age time.Duration) {
	conn, err := s.dial(ctx)
	if err == nil {
		defer conn.Close()
		var parts []partName
		if parts, err = s.recentParts(ctx, conn, age); err == nil {
			slog.Info("inserts failed for want of space, checking what was written meanwhile", "parts", len(parts))
			for _, p := range parts {
				if err = s.checkPart(ctx, conn, p); err != nil {
					break
				}
			}
		}
	}
	if err != nil {
		slog.Warn("parts written on a full disk are not checked", "error", err)
	}
}

func (s *store) recentParts(ctx context.Context, conn *ch.Client, age time.Duration) (parts []partName, err error) {
	var table, name proto.ColStr
	err = conn.Do(ctx, eachRow(ch.Query{
		Body: fmt.Sprintf("SELECT table, name FROM system.parts WHERE active AND database = {database:String} AND table IN ('events', 'events_hourly')"+
			" AND modification_time >= now() - %d", int(age.Seconds())+minuteSeconds),
		Parameters: []proto.Parameter{parameter("database", s.database)},
	}, func(i int) { parts = append(parts, partName{table.Row(i), name.Row(i)}) }, &table, &name))
	return parts, err
}

// checkPart is nil for a part that has been merged away meanwhile.
func (s *store) checkPart(ctx context.Context, conn *ch.Client, p partName) error {
	var passed proto.ColUInt8
	err := conn.Do(ctx, ch.Query{
		Body:   fmt.Sprintf("CHECK TABLE %s.%s PART '%s' SETTINGS check_query_single_value_result = 1", s.database, p.table, p.name),
		Result: proto.Results{{Data: &passed}},
	})
	if err == nil && len(passed) == 1 && passed[0] == 0 {
		s.broken.add(p, "CHECK TABLE does not pass it")
	}
	if ch.IsErr(err, proto.ErrNoSuchDataPart) {
		return nil
	}
	return err
}
