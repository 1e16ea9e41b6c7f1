// The inserter: one a shard of ClickHouse.
//
// An insert costs ClickHouse about 26 ms of CPU whether it holds 100 or 2,000 rows, so one inserter serves all
// workers of a shard: when a block is full, or a row has waited long enough, it takes what every worker has, cuts the duplicates out
// and sends the rest as ONE insert of several blocks, which becomes one part. While that runs the next blocks fill, so the
// round grows with the load by itself. Rounds are strictly one after another. A round is repeated until ClickHouse has
// it; only then may its offsets be committed. insert.go owns the rounds; worker.go owns the blocks between them,
// dedupe.go what is known of the past, reject.go rows that ClickHouse does not take, mend.go what a fault may have left.

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math"
	"math/rand/v2"
	"slices"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/ClickHouse/ch-go"
	"github.com/ClickHouse/ch-go/proto"
	"github.com/twmb/franz-go/pkg/kgo"

	"github.com/event-ingestion/event-ingestion/troubles"
)

const (
	// insertTimeout bounds one attempt. A healthy insert takes 30 ms; one that waits for merges, seconds.
	insertTimeout = 60 * time.Second
	// insertSilence, in seconds, is how long ClickHouse waits for the next block of an insert: an instance that is paused in
	// the middle of one holds the next owner of its partitions up for so long.
	insertSilence = "20"
	// wholeRound is more rows and bytes than a round has: ClickHouse gathers all of it before it writes a part of each partition.
	wholeRound = "1000000000000"
	// A round is small with so many rows of so many bytes: copying them takes 0.3 ms of CPU.
	gatherRows  = 1000
	gatherBytes = 1 << 20
	// An insert that takes longer than healthyInsert shows that ClickHouse has much to do. Where other inserters are a reason, the
	// next round waits for four times what was longer, at most maxRest, unless a block is full: fewer and larger inserts cost less.
	healthyInsert = 100 * time.Millisecond
	maxRest       = 2 * time.Second
	minBackoff    = 100 * time.Millisecond
	maxBackoff    = 5 * time.Second
)

// membership is what an inserter needs to know of the consumer group, and tells it.
type membership struct {
	isMember  func(context.Context) error                                     // nil when this instance is in the group now
	alone     func() bool                                                     // it has all partitions of the shard
	stored    func(map[int32]kgo.EpochOffset)                                 // these may be committed, by partition
	committed func(ctx context.Context, most int) error                       // nil when so many records of a partition, at most, are not
	rejected  func(ctx context.Context, recs []*kgo.Record, why string) error // takes what ClickHouse does not; the error is ctx's
}

// inserter runs the rounds.
type inserter struct {
	membership
	store    *store
	workers  []*worker
	call     *roundCall
	wait     time.Duration // WORKER_BATCH_TIMEOUT
	mostHeld int           // rows of a worker
	group    string        // how the query ids of the group's inserts begin
	mine     string        // and this inserter's
	stats    *storeStats
	dedupe   *dedupe
	cameAt   atomic.Pointer[time.Time] // of partitions whose former owner's last insert was not waited out yet
	flushes  chan flushRequest
	ended    chan struct{} // closed when run returns

	rested  time.Time        // when ClickHouse has been left alone for long enough after the last insert
	due     <-chan time.Time // when the first waiting row has waited long enough, nil when there is none
	conn    *ch.Client       // nil when the last attempt failed
	failing atomic.Bool      // what is tried now has failed before
	tried   time.Time        // the last time whether a late shard answers
	round   []*block         // what is still to be stored: one block a worker, or what is left of them
	empty   proto.Input      // the columns of a block without rows
	small   *block           // for gathered
	unknown bool             // the last insert has been given rows and got no answer
	torn
	repairs repair
}

// flushRequest asks for a round, and to forget what is known of partitions that leave.
type flushRequest struct {
	leaving []int32
	done    chan struct{}
}

func newInserter(st *store, cfg *settings, stats *storeStats, workers []*worker, call *roundCall, m membership) *inserter {
	ins := &inserter{
		membership: m, store: st, workers: workers, call: call, wait: cfg.workerBatchTimeout, mostHeld: heldBlocks * cfg.workerBatchSize, stats: stats,
		group:   cfg.kafkaGroup + "-",
		mine:    cfg.kafkaGroup + "-" + strconv.FormatUint(rand.Uint64(), 36) + "-",
		flushes: make(chan flushRequest),
		ended:   make(chan struct{}),
		empty:   newBlock(0).columns,
		small:   newBlock(gatherRows),
		torn:    torn{hours: map[int64]struct{}{}, held: map[int32]kgo.EpochOffset{}, atOnce: lookHours},
		repairs: repair{ranges: map[partName]timeRange{}, aside: map[partName]struct{}{}},
	}
	ins.dedupe = newDedupe(ins, st.database, cfg.dedupeMemory/int64(st.of))
	return ins
}

// run inserts until stop is closed, then once more what is left, bounded by ctx; ctx also ends a round that cannot
// succeed. What was not inserted was not marked and is read from Kafka again.
func (ins *inserter) run(ctx context.Context, stop <-chan struct{}) {
	defer close(ins.ended)
	defer func() {
		if ins.conn != nil {
			ins.conn.Close()
		}
	}()
	mending := time.NewTicker(mendTick)
	defer mending.Stop()
	for {
		select {
		case first := <-ins.call.arrived:
			if ins.due == nil {
				ins.due = time.After(max(time.Until(first.Add(ins.wait)), time.Until(ins.rested)))
			}
		case <-ins.call.full:
			ins.insertRound(ctx)
		case <-ins.due:
			ins.insertRound(ctx)
		case f := <-ins.flushes:
			ins.insertRound(ctx)
			ins.mend(ctx)
			for _, p := range f.leaving { // what waits for a mending is read again by the next owner, who mends it
				delete(ins.held, p)
			}
			close(f.done)
		case <-mending.C:
			if ins.store.late.Load() && time.Since(ins.tried) > maxBackoff { // nobody may have an event for it
				ins.tried = time.Now()
				ins.Do(ctx, ch.Query{Body: "SELECT 1", Result: proto.Results{{Data: new(proto.ColUInt8)}}})
			}
			ins.mend(ctx)
		case <-stop:
			ins.insertRound(ctx)
			ins.mend(ctx)
			return
		case <-ctx.Done():
			return
		}
	}
}

// flush returns when every row that was in a block before the call is stored, or ctx is done. Nothing of the leaving
// partitions is committed by this instance after the commit that follows.
func (ins *inserter) flush(ctx context.Context, leaving []int32) error {
	f := flushRequest{leaving, make(chan struct{})}
	for ask := ins.flushes; ; {
		select {
		case ask <- f:
			ask = nil
		case <-f.done:
			return nil
		case <-ins.ended: // run has stored what there was, or said that it could not
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// insertRound takes the blocks of all workers and stores what is new in them as one insert. It returns when that is
// done, or when ctx is: then the blocks' offsets stay unmarked.
func (ins *inserter) insertRound(ctx context.Context) {
	if ins.catchUp(ctx); ctx.Err() != nil { // the ids of a round that was abandoned are known, and its rows are not stored
		return
	}
	drain(ins.call.arrived) // before the blocks are taken: a row that comes later asks again
	drain(ins.call.full)
	ins.due = nil
	var taken []*block
	most, oldest := 0, time.Now() // rows of a block, and when the first record was produced
	for _, w := range ins.workers {
		b := w.takeBlock()
		if b == nil {
			continue
		}
		taken, most = append(taken, b), max(most, b.rows())
		if len(b.records) > 0 && b.records[0].Timestamp.Before(oldest) {
			oldest = b.records[0].Timestamp
		}
	}
	if len(taken) == 0 {
		return
	}
	ins.round = append(ins.round[:0], taken...)
	if ins.persist(ctx, "look for duplicates", func() error { return ins.prepare(ctx) }) != nil {
		return
	}
	ins.noteHours(false)
	ins.stats.duplicates.Add(ins.dedupe.cut(ins.round))
	rows, started := ins.rows(), time.Now()
	if ins.insertRows(ctx) != nil {
		return
	}
	if rows > 0 {
		took := time.Since(started)
		ins.stats.inserted(rows, took)
		if ins.store.of > 1 || !ins.alone() {
			ins.rested = time.Now().Add(min(4*(took-healthyInsert), maxRest))
		}
	}
	for _, b := range taken {
		maps.Copy(ins.held, b.offsets)
		b.reset()
	}
	ins.stats.freshness.Update(time.Since(oldest).Seconds())
	ins.heldRows += most
	ins.mend(ctx)
}

// prepare makes the round ready to be checked. After partitions came nothing is known, and nothing is looked up until
// the last insert of their former owner has ended.
func (ins *inserter) prepare(ctx context.Context) error {
	if came := ins.cameAt.Load(); came != nil {
		ins.dedupe.forgetAll()
		if _, err := ins.awaitInserts(ctx); err != nil {
			return err
		}
		ins.cameAt.CompareAndSwap(came, nil)
	}
	started := time.Now()
	err := ins.dedupe.prepare(ctx, ins.round)
	if n := ins.dedupe.doubtful; n > 0 && err == nil {
		ins.stats.lookedUp(n, time.Since(started))
	}
	return err
}

// insertRows stores the round, or all of it that ClickHouse takes: it repeats the insert until that is so. The error is ctx's.
func (ins *inserter) insertRows(ctx context.Context) error {
	for ins.rows() > 0 {
		var rejection error
		err := ins.persist(ctx, "insert", func() error {
			if ins.unknown {
				ins.noteHours(true) // the aggregate may have got something else than the table
				if err := ins.settle(ctx); err != nil || ins.rows() == 0 {
					return err
				}
			}
			err := ins.insertOnce(ctx)
			if ch.IsErr(err, rejections...) { // and has stored nothing
				rejection, err, ins.unknown = err, nil, false
			}
			return err
		})
		if err != nil || rejection == nil {
			return err
		}
		what := ins.store.name("insert rows that ClickHouse takes") // told once a minute, like every trouble
		ins.stats.troubles.Note(what, rejection)
		if err := ins.dropRejected(ctx, rejection); err != nil {
			return err
		}
		ins.stats.troubles.Clear(what)
	}
	return nil
}

func (ins *inserter) rows() (n int) {
	for _, b := range ins.round {
		n += b.rows()
	}
	return n
}

// settle finds out what became of an insert whose outcome is unknown: it waits until none of our inserts runs any more
// and takes the rows out of the round that are there.
func (ins *inserter) settle(ctx context.Context) error {
	if _, err := ins.awaitInserts(ctx); err != nil {
		return err
	}
	if err := ins.dedupe.lookUp(ctx, ins.round, true); err != nil {
		return err
	}
	for _, b := range ins.round {
		b.filter(func(row int) bool {
			_, there := ins.dedupe.found[*b.id(row)]
			if there {
				ins.noteHour(b.at(row) / hourSeconds)
			}
			return !there
		})
	}
	ins.unknown = false
	return nil
}

// awaitInserts waits until no insert is at work that may still add rows to this instance's partitions: none of its own, whose
// answer may have been lost, and none of others that was running when partitions came here; the last one of an instance that was
// killed may still be. The replica then has what they have added. It returns for how long others have been inserting, the one that
// began first; 0 when there is none.
func (ins *inserter) awaitInserts(ctx context.Context) (others time.Duration, err error) {
	const toBeWaitedFor = 1e12 // on top of milliseconds
	for attempt := 0; ; attempt++ {
		since := time.Duration(math.MaxInt64)
		if came := ins.cameAt.Load(); came != nil {
			since = time.Since(*came)
		}
		most, err := ins.store.most(ctx, ins, ch.Query{
			Body: "SELECT toUInt64(max(if(startsWith(query_id, {mine:String}) OR elapsed > {since:Float64}, 1e12, 1 + elapsed * 1000)))" +
				" FROM system.processes WHERE startsWith(query_id, {group:String})",
			Parameters: []proto.Parameter{parameter("group", ins.group), parameter("mine", ins.mine), parameter("since", fmt.Sprint(since.Seconds()))},
		})
		if err != nil {
			return 0, err
		}
		if most < toBeWaitedFor {
			return time.Duration(most) * time.Millisecond, ins.store.syncReplica(ctx, ins)
		}
		if attempt == 20 { // a second
			slog.Info("waiting for an insert that ClickHouse still works at")
		}
		if err := troubles.Sleep(ctx, minBackoff/2); err != nil {
			return 0, err
		}
	}
}

// persist repeats try with backoff until it succeeds. The error is ctx's.
func (ins *inserter) persist(ctx context.Context, what string, try func() error) error {
	for pause := minBackoff; ; pause = min(2*pause, maxBackoff) {
		err := try()
		ins.failing.Store(err != nil)
		if err == nil {
			ins.stats.troubles.Clear(ins.store.name(what))
			return nil
		}
		ins.stats.failures.Inc()
		if ctx.Err() != nil {
			slog.Warn("round abandoned, its records will be read from Kafka again", "what", what, "error", err)
			return ctx.Err()
		}
		ins.repair(ctx, err)
		ins.stats.troubles.Note(ins.store.name(what), err)
		if ch.IsErr(err, proto.ErrUnknownTable) { // whoever detached it may have died before attaching
			ins.store.connected(ctx, func(c asker) error { return ins.store.attach(ctx, c) })
		}
		troubles.Sleep(ctx, pause/2+rand.N(pause/2))
	}
}

// insertOnce is one attempt at an insert. The fence stands in OnInput: an instance that was paused for longer than its
// session has lost its partitions and does not know. When ClickHouse asks for the rows, the insert is in system.processes
// and has none: an instance that is in the group at that moment goes on, and whoever is given its partitions later finds
// the insert there and waits for its end (awaitInserts). The question costs 0.3 ms.
func (ins *inserter) insertOnce(ctx context.Context) error {
	next, columns, round := 0, slices.Clone(ins.empty), ins.gathered()
	defer ins.small.reset()
	err := ins.Do(ctx, ch.Query{
		Body:    "INSERT INTO " + ins.store.database + ".events " + columns.Columns() + " VALUES",
		QueryID: ins.queryID(),
		Input:   columns,
		OnInput: func(ctx context.Context) error {
			if next == 0 {
				if err := ins.isMember(ctx); err != nil {
					ins.conn.Close() // or ch-go would wait for an answer to what it did not send
					return err
				}
				ins.unknown = true
			}
			for next < len(round) {
				b := round[next]
				next++
				if b.rows() > 0 {
					copy(columns, b.columns)
					return nil
				}
			}
			copy(columns, ins.empty) // rows that still stand here would be sent once more with the EOF
			return io.EOF
		},
		Settings: []ch.Setting{
			{Key: "optimize_on_insert", Value: "0"}, // merges sort duplicates out anyway; a quarter less CPU
			{Key: "materialized_views_ignore_errors", Value: "0"},
			{Key: "max_partitions_per_insert_block", Value: "0"}, // other producers' events may be of any age
			{Key: "min_insert_block_size_rows", Value: wholeRound},
			{Key: "min_insert_block_size_bytes", Value: wholeRound},
			{Key: "receive_timeout", Value: insertSilence},
		},
	})
	if err == nil {
		ins.unknown = false
	}
	if e, ok := ch.AsException(err); ok {
		return fmt.Errorf("insert into %s.events: %w", ins.store.database, &ch.Exception{Code: e.Code, Name: e.Name, Message: firstLine(e.Message)})
	}
	return err
}

// gathered is the round, a small one in one block: ClickHouse takes a sixth less CPU for a hundred rows in one than in twenty.
func (ins *inserter) gathered() []*block {
	bytes := 0
	for _, b := range ins.round {
		bytes += b.bytes
	}
	if len(ins.round) == 1 || ins.rows() > gatherRows || bytes > gatherBytes {
		return ins.round
	}
	for _, b := range ins.round {
		for row := range b.rows() {
			ins.small.append(b.id(row), b.event(row), b.records[row])
		}
	}
	return []*block{ins.small}
}

// queryID is a new one of this inserter's.
func (ins *inserter) queryID() string { return ins.mine + strconv.FormatUint(rand.Uint64(), 36) }

// Do runs one of the inserter's queries on its connection, and drops the connection when that fails: whatever state
// it is in, the next attempt starts clean.
func (ins *inserter) Do(ctx context.Context, q ch.Query) (err error) {
	ctx, cancel := context.WithTimeout(ctx, insertTimeout)
	defer cancel()
	q.Settings = append(append(q.Settings, ins.store.inserting()...), ch.Setting{Key: "send_profile_events", Value: "0"}) // a third of what a round leaves to the garbage collector
	fresh := ins.conn == nil || ins.conn.IsClosed()
	if fresh {
		if ins.conn, err = ins.store.dial(ctx); err != nil {
			return err
		}
		ins.repairs.dialed = true
	}
	conn := ins.conn
	stop := context.AfterFunc(ctx, func() { conn.Close() }) // ch-go looks at ctx between two packets only
	if fresh {
		err = errors.Join(ins.store.prepareLate(ctx, conn), ins.store.syncReplica(ctx, conn))
	}
	if err == nil {
		err = conn.Do(ctx, q)
	}
	if !stop() || err != nil {
		conn.Close()
		ins.conn = nil
	}
	return err
}
