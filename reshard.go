// Growing: the events of all shards are placed anew, after servers were added to the cluster or partitions to the topic.
//
// On each server a second pair of tables is filled with what belongs there, from all servers: a copy, so that nothing is lost
// or counted twice, whatever dies. No instance may consume meanwhile; those with ROLE=api accept, and answer as before. Then
// events_hourly is renamed, which shuts out inserts and metrics, the copies are compared with the originals, and take their
// place. These are few steps, and each can be repeated.
//
// A run goes on where another one has ended. reshard.go owns the tables that it makes beside the two.

package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/ClickHouse/ch-go"
	"github.com/ClickHouse/ch-go/proto"
	"github.com/twmb/franz-go/pkg/kadm"
)

const (
	eventsMoved  = "events_moved"         // the events that belong on the server; after the exchange the old events
	hourlyMoved  = "events_hourly_moved"  // counts them
	hourlyBefore = "events_hourly_before" // the old events_hourly, once inserts are shut out
)

// reshard is one run.
type reshard struct {
	shards []*store
	out    io.Writer
	idle   func() error // fails while an instance consumes
}

// placed is what a server has. number, of and partitions are what its table says, 0 when nothing; bytes are of both tables.
type placed struct {
	number, of, partitions int
	rows, bytes, free      uint64
	inPlace, copied, shut  bool
}

func reshardTool(fs *flag.FlagSet) toolRun {
	dryRun := fs.Bool("dry-run", false, "only say how many events belong on each server, and the room that they take")
	return func(ctx context.Context, cfg *settings, _ []string, w io.Writer) error {
		if cfg.clickhouseCluster == "" {
			return errors.New("CLICKHOUSE_CLUSTER has to name the servers")
		}
		kafka, err := newKafka(cfg, "event-ingestion-reshard")
		if err != nil {
			return err
		}
		defer kafka.Close()
		admin := kadm.NewClient(kafka)
		topics, err := whole(admin.ListTopics(ctx, cfg.kafkaTopic))
		if err != nil {
			return fmt.Errorf("find topic %s: %w", cfg.kafkaTopic, err)
		}
		r := reshard{out: w, idle: func() error { return mustBeIdle(ctx, admin, cfg.kafkaGroup) }}
		if r.shards, err = newStore(cfg).shards(ctx); err != nil {
			return err
		}
		for _, st := range r.shards {
			if st.partitions = len(topics[cfg.kafkaTopic].Partitions); st.replicated {
				return errors.New("shards of replicas cannot be placed anew by this command")
			}
		}
		return exclusively(ctx, cfg, *dryRun, func(ctx context.Context) error { return r.run(ctx, *dryRun) })
	}
}

func (r *reshard) run(ctx context.Context, dryRun bool) error {
	if err := r.idle(); err != nil {
		return err
	}
	var found []placed
	if err := r.each(ctx, func(s *session) { found = append(found, placedOn(s)) }); err != nil {
		return err
	}
	begun := slices.ContainsFunc(found, func(p placed) bool { return p.copied || p.shut })
	switch {
	case slices.ContainsFunc(found, func(p placed) bool { return p.inPlace && p.shut }):
		fmt.Fprintln(r.out, "an exchange of tables has begun")
		if dryRun {
			return nil
		}
		return r.takeOver(ctx)
	case !begun && !slices.ContainsFunc(found, func(p placed) bool { return !p.inPlace }):
		fmt.Fprintln(r.out, "every event is where it belongs")
		return nil
	}
	if err := mustBeWhole(found); err != nil {
		return err
	}
	if err := r.plan(ctx, found); err != nil || dryRun {
		return err
	}
	if err := r.each(ctx, prepareCopy, (*session).makeViews, copyEvents, countCopy, shutInserts); err != nil {
		return err
	}
	if err := r.each(ctx, compareCopy); err != nil {
		return errors.Join(err, r.each(ctx, reopenInserts, dropCopies))
	}
	return r.takeOver(ctx)
}

// takeOver puts the copies in the place of the old tables. Inserts stay shut out until all events are where they belong.
func (r *reshard) takeOver(ctx context.Context) error {
	if err := r.each(ctx, exchangeEvents); err != nil {
		return err
	}
	if err := r.idle(); err != nil { // it started before the exchange, and is shut out; any later one is refused
		return err
	}
	return r.each(ctx, openInserts, dropCopies)
}

func (r *reshard) each(ctx context.Context, steps ...func(*session)) error {
	return inTurn(ctx, r.shards, r.out, steps...)
}

// mustBeWhole refuses servers that do not have all that was placed before.
func mustBeWhole(found []placed) error {
	var shards []placed
	for _, p := range found {
		if p.of > 0 {
			shards = append(shards, p)
		}
	}
	slices.SortFunc(shards, func(a, b placed) int { return a.number - b.number })
	for i, p := range shards {
		if p.number != i+1 || p.of != len(shards) || p.partitions != shards[0].partitions {
			return fmt.Errorf("the events were placed on %d servers, and of these the cluster has %d: each has to be in it", p.of, len(shards))
		}
	}
	if len(shards) == 0 {
		return errors.New("there are no events yet: start the program")
	}
	return nil
}

// plan prints what belongs where, and refuses to begin where there is no room.
func (r *reshard) plan(ctx context.Context, found []placed) error {
	rows := make([]uint64, len(found))
	var all, bytes uint64
	err := r.each(ctx, func(s *session) {
		p := found[s.store.number-1]
		if all, bytes = all+p.rows, bytes+p.bytes; p.rows == 0 {
			return // it may have no table yet
		}
		var shard, count proto.ColUInt64
		s.ask(ch.Query{Body: "SELECT toUInt64(" + s.store.shardOf() + ") AS shard, count() FROM {database}.events GROUP BY shard"},
			func(i int) { rows[shard[i]] += count[i] }, &shard, &count)
	})
	if err != nil {
		return err
	}
	const mb = 1_000_000
	t := tabwriter.NewWriter(r.out, 0, 0, 2, ' ', tabwriter.AlignRight)
	defer t.Flush()
	fmt.Fprintln(t, "SERVER\tEVENTS\tWILL HAVE\tCOPY MB\tFREE MB\t")
	var failures []error
	for i, p := range found {
		needs := uint64(float64(rows[i]) / float64(max(all, 1)) * float64(bytes))
		fmt.Fprintf(t, "%s\t%d\t%d\t%d\t%d\t\n", r.shards[i].replicas[0], p.rows, rows[i], needs/mb, p.free/mb)
		if needs > p.free && !p.copied {
			failures = append(failures, fmt.Errorf("%s has no room for its copy", r.shards[i].replicas[0]))
		}
	}
	return errors.Join(failures...)
}

// shardOf is an expression: the shard of an event, from 0.
func (s *store) shardOf() string {
	return fmt.Sprintf("bitAnd(kafkaMurmurHash(lower(hex(event_id))), 0x7fffffff) %% %d %% %d", s.partitions, s.of)
}

// placedOn asks a server.
func placedOn(s *session) (p placed) {
	var comment string
	s.do(func(ctx context.Context, c asker) (err error) {
		comment, p.rows, err = s.store.placementAt(ctx, c)
		return err
	})
	if _, err := fmt.Sscanf(comment, placementForm, &p.number, &p.of, &p.partitions); err != nil && p.rows > 0 {
		p.number, p.of = 1, 1
	}
	p.inPlace = comment == s.store.placement() && (comment != "" || s.store.of == 1)
	p.copied, p.shut = s.has(eventsMoved), s.has(hourlyBefore)
	var bytes, free proto.ColUInt64
	s.ask(ch.Query{Body: `
		SELECT ifNull(sum(total_bytes), 0), ifNull((SELECT max(unreserved_space) FROM system.disks), 0)
		FROM system.tables WHERE database = '{database}' AND name IN ('events', 'events_hourly', '` + hourlyBefore + `')`},
		func(i int) { p.bytes, p.free = bytes[i], free[i] }, &bytes, &free)
	return p
}

// prepareCopy makes the tables of a server that is new, and undoes what a run that was cut off has shut.
func prepareCopy(s *session) {
	reopenInserts(s)
	s.awaitRunning() // ClickHouse goes on with what a run that was killed has begun
	s.do(s.store.readStates)
	if s.has(tableNext, tableRebuilt) || s.store.userBits.Load() != wantedUserBits {
		s.fail("events_hourly has to be made anew first, with `event-ingestion reconcile -rebuild` and CLICKHOUSE_CLUSTER as it was")
	}
	s.makeTables()
	if placedOn(s).of == 0 { // An instance that starts meanwhile must not take the new server's empty table for a shard's.
		s.change("ALTER TABLE {database}.events MODIFY COMMENT '" + fmt.Sprintf(placementForm, 0, 0, 0) + "'")
	}
}

// copyEvents fills events_moved. What an earlier run has copied stays, but for its last month.
func copyEvents(s *session) {
	if !hasCopy(s) {
		s.dropTable(eventsMoved)
		s.change(statementsOf("events", eventsMoved)...)
		s.change("ALTER TABLE {database}." + eventsMoved + " MODIFY COMMENT '" + s.store.placement() + "'")
	}
	from := s.number("SELECT toUInt64(toUnixTimestamp(toStartOfMonth(max(timestamp)), 'UTC')) FROM {database}." + eventsMoved)
	if from > 0 {
		s.change("ALTER TABLE {database}." + eventsMoved + " DROP PARTITION " + time.Unix(from, 0).UTC().Format("200601") +
			" SETTINGS max_partition_size_to_drop = 0")
	}
	var names proto.ColStr
	var columns []string
	s.ask(ch.Query{Body: "SELECT name FROM system.columns WHERE database = '{database}' AND table = '" + eventsMoved + "'"},
		func(i int) { columns = append(columns, names.Row(i)) }, &names)
	list := strings.Join(columns, ", ")
	s.eachDay("copying", "{events}", fmt.Sprintf("timestamp >= %d AND %s", from, s.store.belongs()),
		"INSERT INTO {database}."+eventsMoved+" ("+list+") SELECT "+list+" FROM {events} FINAL WHERE %s")
}

// belongs is a condition: the event belongs on this server.
func (s *store) belongs() string { return fmt.Sprintf("%s = %d", s.shardOf(), s.number-1) }

// hasCopy says whether events_moved has, or is to have, what belongs here: else it is the old events.
func hasCopy(s *session) bool {
	return s.number(fmt.Sprintf("SELECT count() FROM system.tables WHERE database = '{database}' AND name = '%s' AND comment = '%s'",
		eventsMoved, s.store.placement())) > 0
}

// countCopy fills events_hourly_moved.
func countCopy(s *session) {
	s.dropTable(hourlyMoved)
	s.change(statementsOf("events_hourly", hourlyMoved)...)
	s.say("counting what was copied")
	s.fill(eventsMoved, hourlyMoved, "1")
}

// shutInserts ends inserts: their view has no target.
func shutInserts(s *session) {
	s.say("inserts are shut out")
	s.change("RENAME TABLE {database}.events_hourly TO {database}." + hourlyBefore)
	s.awaitRunning()
}

func reopenInserts(s *session) {
	s.change("RENAME TABLE IF EXISTS {database}." + hourlyBefore + " TO {database}.events_hourly")
}

// compareCopy fails unless the copy has each event that belongs here, once.
func compareCopy(s *session) {
	const ids = "SELECT sum(cityHash64(event_id)) FROM "
	if s.number(ids+"{database}."+eventsMoved) != s.number(ids+"{events} FINAL WHERE "+s.store.belongs()) {
		s.fail("events has changed while it was copied: an instance consumed")
	}
}

func exchangeEvents(s *session) {
	if hasCopy(s) {
		s.say("the copy takes the place of events")
		s.change("EXCHANGE TABLES {database}.events AND {database}." + eventsMoved)
	}
}

func openInserts(s *session) {
	s.say("inserts are let in")
	s.change("RENAME TABLE IF EXISTS {database}." + hourlyMoved + " TO {database}.events_hourly")
}

// dropCopies removes what is no longer needed, in the end the table that says that inserts were shut out.
func dropCopies(s *session) {
	s.dropTable(hourlyMoved)
	s.dropTable(eventsMoved)
	s.dropTable(hourlyBefore)
}
