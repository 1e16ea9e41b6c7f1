// The one inserter.
//
// An insert costs ClickHouse about 26 ms of CPU whether it holds 100 or 2,000 rows, so one inserter serves all
// workers: when a block is full, or a row has waited long enough, it takes what every worker has and sends it as ONE
// insert of several blocks, which becomes one part. While that runs the next blocks fill, so the round grows with the
// load by itself. A round is repeated, the same rows under the same token, until ClickHouse has it; only then are its
// offsets marked for commit. insert.go owns the rounds; worker.go owns the blocks between them, dedupe.go what happens
// between taking a round and sending it.

package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/ClickHouse/ch-go"
	"github.com/ClickHouse/ch-go/proto"
	"github.com/twmb/franz-go/pkg/kgo"
)

const (
	// insertTimeout bounds one attempt. A healthy insert takes 30 ms; one that waits for merges, seconds.
	insertTimeout = 60 * time.Second
	// insertSilence, in seconds, is how long ClickHouse waits for the next block of an insert: a copy that is paused in the
	// middle of one holds the next owner of its partitions up for so long.
	insertSilence = "20"
	minBackoff    = 100 * time.Millisecond
	maxBackoff    = 5 * time.Second
)

// inserter runs the rounds, strictly one after another.
type inserter struct {
	store    *store
	workers  []*worker
	wait     time.Duration // WORKER_BATCH_TIMEOUT
	instance string        // random: makes tokens and query ids this process's own
	group    string
	stored   func([]position)                                               // told what a finished round reached, for the offsets
	rejected func(recs []*kgo.Record, why string, stopped func() bool) bool // takes records that ClickHouse does not
	alone    func() bool                                                    // this copy has all partitions
	isMember func(context.Context) error                                    // nil when this copy is in the consumer group now
	stats    *storeStats

	arrived chan struct{} // a block has its first row
	full    chan struct{} // a block has its last row
	oldest  atomic.Int64  // Unix nanoseconds of the first row since the last round was taken, 0 when none
	flushes chan chan struct{}
	ended   chan struct{} // closed when run returns

	conn    *ch.Client // nil when the last attempt failed
	columns proto.Input
	empty   *block
	round   []*block
	seq     atomic.Uint64 // of the round; run counts, workers read
	past    *past
}

func newInserter(st *store, cfg *settings, stats *storeStats) *inserter {
	return &inserter{
		store: st, wait: cfg.workerBatchTimeout, group: cfg.kafkaGroup, stats: stats,
		instance: strconv.FormatUint(rand.Uint64(), 36),
		arrived:  make(chan struct{}, 1),
		full:     make(chan struct{}, 1),
		flushes:  make(chan chan struct{}),
		ended:    make(chan struct{}),
		columns:  insertColumns(),
		empty:    newBlock(0),
		past:     newPast(cfg.dedupeMemory),
	}
}

// run inserts until stop is closed, then once more what is left, bounded by ctx; ctx also ends a round that cannot
// succeed. What was not inserted was not marked and is read from Kafka again.
func (in *inserter) run(ctx context.Context, stop <-chan struct{}) {
	defer close(in.ended)
	defer func() {
		if in.conn != nil {
			in.conn.Close()
		}
	}()
	mending := time.NewTicker(mendInterval)
	defer mending.Stop()
	for {
		select {
		case <-mending.C:
			in.mend(ctx)
			continue
		case <-stop:
			in.insertRound(ctx)
			return
		case <-ctx.Done():
			return
		case done := <-in.flushes:
			in.insertRound(ctx)
			close(done)
			continue
		case <-in.arrived:
		}
		timer := time.NewTimer(time.Until(time.Unix(0, in.oldest.Load()).Add(in.wait)))
		select {
		case <-stop:
			continue
		case done := <-in.flushes:
			in.insertRound(ctx)
			close(done)
		case <-in.full:
			in.insertRound(ctx)
		case <-timer.C:
			in.insertRound(ctx)
		}
		timer.Stop()
	}
}

// flush returns when every row that was in a block before the call is stored, or ctx is done.
func (in *inserter) flush(ctx context.Context) error {
	done := make(chan struct{})
	select {
	case in.flushes <- done:
	case <-in.ended:
		return nil // run has stored what there was, or said that it could not
	case <-ctx.Done():
		return ctx.Err()
	}
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// noteRow is called by a worker, under its lock, when its block gets its first row.
func (in *inserter) noteRow() {
	in.oldest.CompareAndSwap(0, time.Now().UnixNano())
	notify(in.arrived)
}

func notify(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

func drain(c chan struct{}) {
	select {
	case <-c:
	default:
	}
}

// insertRound takes the blocks of all workers and stores what is new in them as one insert. It returns when that is
// done, or when ctx is: then the blocks' offsets stay unmarked.
func (in *inserter) insertRound(ctx context.Context) {
	in.oldest.Store(0)
	drain(in.arrived) // what asked for this round: a row that comes after takeBlock asks again
	drain(in.full)
	in.round = in.round[:0]
	for _, w := range in.workers {
		if b := w.takeBlock(); b != nil {
			in.round = append(in.round, b)
		}
	}
	if len(in.round) == 0 {
		return
	}
	in.seq.Add(1)
	if in.persist(ctx, "look up suspects", func(int) error { return in.resolve(ctx) }) != nil || in.insertRows(ctx) != nil {
		return
	}
	for i, b := range in.round {
		if len(b.records) > 0 {
			in.stats.freshness.Update(time.Since(b.records[0].Timestamp).Seconds())
		}
		in.stored(b.reached)
		b.reset()
		in.round[i] = nil
	}
	in.cover(ctx)
	in.mend(ctx)
}

// insertRows stores the round, or all of it that ClickHouse takes. The error is ctx's.
func (in *inserter) insertRows(ctx context.Context) error {
	rows := 0
	for _, b := range in.round {
		rows += b.rows()
	}
	if rows == 0 {
		return nil
	}
	started := time.Now()
	err := in.insertUntilStored(ctx, in.round, "")
	if isRejection(err) {
		slog.Warn("ClickHouse rejects rows, looking for them", "rows", rows, "error", err)
		err = in.bisect(ctx)
	}
	if err == nil {
		in.stats.inserted(rows, time.Since(started))
	}
	return err
}

// insertUntilStored repeats an insert of the blocks until ClickHouse has taken or rejected it. The token is the same
// for every attempt and no other rows': what a lost answer left behind is not stored again.
func (in *inserter) insertUntilStored(ctx context.Context, blocks []*block, part string) error {
	token := fmt.Sprintf("%s-%d%s", in.instance, in.seq.Load(), part)
	return in.persist(ctx, "insert", func(attempt int) error { return in.insertOnce(ctx, blocks, token, attempt) })
}

// persist repeats try with backoff until it succeeds or ClickHouse rejects the data. Any other error is ctx's.
func (in *inserter) persist(ctx context.Context, what string, try func(attempt int) error) error {
	for attempt := 1; ; attempt++ {
		err := try(attempt)
		if err == nil || isRejection(err) {
			in.stats.troubles.clear(what)
			return err
		}
		in.stats.failures.Inc()
		in.stats.troubles.note(what, err)
		if ctx.Err() != nil {
			slog.Warn("round abandoned, its records will be read from Kafka again", "what", what, "error", err)
			return ctx.Err()
		}
		pause := min(minBackoff<<min(attempt-1, 10), maxBackoff)
		select {
		case <-time.After(pause/2 + rand.N(pause/2)):
		case <-ctx.Done():
		}
	}
}

// bisect stores the good rows of a rejected round and sends the bad ones to be retried, by halving until the bad stand
// alone: 2 log n inserts for one bad row. Which rows an attempt may have left behind is looked up first.
func (in *inserter) bisect(ctx context.Context) error {
	var records []*kgo.Record
	for _, b := range in.round {
		records = append(records, b.records...)
	}
	p := in.past
	p.suspects = p.suspects[:0]
	for _, rec := range records {
		ev, _, _ := p.parser.parse(rec.Value)
		id, _ := ev.id(nil)
		p.suspects = append(p.suspects, suspect{id: id, record: rec})
	}
	if err := in.persist(ctx, "look up a rejected round", func(int) error { return in.lookUp(ctx) }); err != nil {
		return err
	}
	records = records[:0]
	for i := range p.suspects {
		if _, there := p.found[p.suspects[i].id]; !there {
			records = append(records, p.suspects[i].record)
		}
	}
	return in.insertHalves(ctx, records, 0)
}

// insertHalves stores records, of which the first is the at-th of the round.
func (in *inserter) insertHalves(ctx context.Context, records []*kgo.Record, at int) error {
	if len(records) == 0 {
		return nil
	}
	b := newBlock(len(records))
	for _, rec := range records {
		ev, _, _ := in.past.parser.parse(rec.Value)
		id, _ := ev.id(nil)
		b.append(&id, ev, rec)
	}
	err := in.insertUntilStored(ctx, []*block{b}, fmt.Sprintf("-%d-%d", at, len(records)))
	if !isRejection(err) {
		return err
	}
	if half := len(records) / 2; half > 0 {
		if err := in.insertHalves(ctx, records[:half], at); err != nil {
			return err
		}
		return in.insertHalves(ctx, records[half:], at+half)
	}
	if !in.rejected(records[:1], firstLine(err.Error()), func() bool { return ctx.Err() != nil }) {
		return ctx.Err()
	}
	return nil
}

// insertOnce is one attempt at an insert. The fence stands in OnInput: a copy that was paused for longer than its session
// has lost its partitions and does not know. When ClickHouse asks for the rows, the insert is in system.processes and
// has none: who is in the group at that moment goes on, and whoever is given its partitions later finds the insert there
// and waits for its end (awaitStrangers). The question costs 0.3 ms.
func (in *inserter) insertOnce(ctx context.Context, blocks []*block, token string, attempt int) error {
	next := 0
	in.empty.input(in.columns)
	err := in.query(ctx, ch.Query{
		Body:    "INSERT INTO " + in.store.database + ".events " + in.columns.Columns() + " VALUES",
		QueryID: fmt.Sprintf("%s-%s-%d", in.group, token, attempt),
		Input:   in.columns,
		OnInput: func(ctx context.Context) error {
			if next == 0 {
				if err := in.isMember(ctx); err != nil {
					in.conn.Close() // or ch-go would wait for an answer to what it did not send
					return err
				}
			}
			for next < len(blocks) {
				b := blocks[next]
				next++
				if b.rows() > 0 {
					b.input(in.columns)
					return nil
				}
			}
			in.empty.input(in.columns) // rows that still stand here would be sent once more with the EOF
			return io.EOF
		},
		Settings: []ch.Setting{
			{Key: "async_insert", Value: "0"},
			{Key: "optimize_on_insert", Value: "0"}, // merges sort duplicates out anyway; a quarter less CPU
			{Key: "insert_deduplicate", Value: "1"},
			{Key: "insert_deduplication_token", Value: token},
			{Key: "deduplicate_blocks_in_dependent_materialized_views", Value: "1"},
			{Key: "materialized_views_ignore_errors", Value: "0"},
			{Key: "max_partitions_per_insert_block", Value: "0"}, // other producers' events may be of any age
			{Key: "receive_timeout", Value: insertSilence},
		},
	})
	if e, ok := ch.AsException(err); ok {
		return fmt.Errorf("insert into %s.events: %w", in.store.database, &ch.Exception{Code: e.Code, Name: e.Name, Message: firstLine(e.Message)})
	}
	return err
}

// query runs one of the inserter's queries on its connection, and drops the connection when that fails: whatever state
// it is in, the next attempt starts clean.
func (in *inserter) query(ctx context.Context, q ch.Query) (err error) {
	ctx, cancel := context.WithTimeout(ctx, insertTimeout)
	defer cancel()
	q.Settings = append(q.Settings, in.store.exactly()...)
	if in.conn == nil || in.conn.IsClosed() {
		if in.conn, err = in.store.dial(ctx); err != nil {
			return err
		}
	}
	conn := in.conn
	stop := context.AfterFunc(ctx, func() { conn.Close() }) // ch-go looks at ctx between two packets only
	if err = conn.Do(ctx, q); !stop() || err != nil {
		conn.Close()
		in.conn = nil
	}
	return err
}
