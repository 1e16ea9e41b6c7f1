// Rounds: what the workers have gathered becomes one insert, and only then may its offsets be committed.
//
// An insert costs ClickHouse 10 to 26 ms of CPU whether it holds 100 or 2,000 rows, so one inserter serves all workers: when a block
// is full, or a row has waited long enough, it takes what every worker has, cuts the duplicates out and sends the rest as ONE insert
// of several blocks, which becomes one part. While that runs the next blocks fill, so the round grows with the load by itself. Rounds
// are strictly one after another. A round is repeated until ClickHouse has it, but for rows that ClickHouse rejects: these are found
// and go to the retry topic, their neighbours are stored. store.go owns the rounds; worker.go owns the blocks between them, dedupe.go
// what is known of the past, mend.go what a fault may have left.

package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"log/slog"
	"regexp"
	"slices"
	"time"

	"github.com/ClickHouse/ch-go"
	"github.com/ClickHouse/ch-go/proto"
	"github.com/twmb/franz-go/pkg/kgo"

	"github.com/event-ingestion/event-ingestion/internal/profile"
	"github.com/event-ingestion/event-ingestion/internal/questions"
	"github.com/event-ingestion/event-ingestion/internal/troubles"
)

const (
	// An insert that takes longer than healthyInsert shows that ClickHouse has much to do. Where other inserters are a reason, the
	// next round waits for four times what was longer, at most maxRest, unless a block is full: fewer and larger inserts cost less.
	healthyInsert = 100 * time.Millisecond
	maxRest       = 2 * time.Second
)

// membership is what an inserter needs to know of the consumer group, and tells it.
type membership struct {
	isMember func(context.Context) error                                     // nil when this instance is in the group now
	alone    func() bool                                                     // it has all partitions
	release  func(map[int32]kgo.EpochOffset)                                 // these may be committed, by partition
	commit   func(ctx context.Context, most int) error                       // nil when so many records of a partition, at most, are not committed
	rejected func(ctx context.Context, recs []*kgo.Record, why string) error // takes what ClickHouse does not; the error is ctx's
}

// inserter runs the rounds.
type inserter struct {
	membership
	db       *clickhouse
	blocks   []func() *block // what each worker has, nil when that is nothing
	call     *roundCall
	wait     time.Duration // WORKER_BATCH_TIMEOUT
	mostHeld int           // rows of a worker
	inserts  *insertsAtWork
	stats    *storeStats
	failed   func(error) // told what ClickHouse says when a query fails
	dedupe   *dedupe
	erased   *erasures
	flushes  chan flushRequest
	ended    chan struct{} // closed when run returns

	rested  time.Time        // when ClickHouse has been left alone for long enough after the last insert
	due     <-chan time.Time // when the first waiting row has waited long enough, nil when there is none
	conn    connection
	round   []*block    // what is still to be stored: one block a worker, or what is left of them
	empty   proto.Input // the columns of a block without rows
	small   *block      // for gathered
	unknown bool        // the last insert has been given rows and got no answer
	mender
}

// flushRequest asks for a round, and to forget what is known of partitions that leave.
type flushRequest struct {
	leaving []int32
	done    chan struct{}
}

func newInserter(db *clickhouse, cfg *settings, stats *storeStats, failed func(error), blocks []func() *block, call *roundCall, m membership) *inserter {
	ins := &inserter{
		membership: m, db: db, blocks: blocks, call: call, wait: cfg.workerBatchTimeout, mostHeld: heldBlocks * cfg.workerBatchSize,
		inserts: newInsertsAtWork(db, cfg.kafkaGroup), erased: &erasures{db: db, count: stats.erased.Add}, stats: stats, failed: failed,
		flushes: make(chan flushRequest), ended: make(chan struct{}), conn: connection{to: db}, empty: newBlock(0).columns, small: newBlock(gatherRows),
	}
	ins.dedupe = newDedupe(ins, db, cfg.dedupeMemory)
	ins.mender = mender{
		db: db, conn: ins, inserts: ins.inserts, alone: m.alone, release: m.release, mended: func(rows int) { stats.mended.Add(rows) },
		told: func(err error) {
			failed(err)
			stats.troubles.Note(compareHours, err)
		},
		hours: map[int64]struct{}{}, held: map[int32]kgo.EpochOffset{}, atOnce: lookHours,
	}
	return ins
}

// run inserts until stop is closed, then once more what is left, bounded by ctx; ctx also ends a round that cannot
// succeed. What was not inserted was not marked and is read from Kafka again.
func (ins *inserter) run(ctx context.Context, stop <-chan struct{}) {
	defer close(ins.ended)
	defer ins.conn.close()
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
	for _, take := range ins.blocks {
		b := take()
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
	if ins.persist(ctx, "look for duplicates", func() error { return cmp.Or(ins.erased.leaveOut(ctx, ins, ins.round), ins.prepare(ctx)) }) != nil {
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
		if !ins.membership.alone() {
			ins.rested = time.Now().Add(min(4*(took-healthyInsert), maxRest))
		}
	}
	for _, b := range taken {
		ins.hold(b.offsets)
		for p, end := range b.offsets {
			ins.stats.storedOf(p, storedEnd{end.Offset, time.Now()})
		}
		b.reset()
	}
	ins.stats.freshness.Update(time.Since(oldest).Seconds())
	ins.heldRows += most
	ins.mend(ctx)
}

// prepare makes the round ready to be checked. After partitions came nothing is known, and nothing is looked up until
// the last insert of their former owner has ended.
func (ins *inserter) prepare(ctx context.Context) error {
	if came := ins.inserts.cameAt.Load(); came != nil {
		ins.dedupe.forgetAll()
		if _, err := ins.inserts.await(ctx, ins); err != nil {
			return err
		}
		ins.inserts.cameAt.CompareAndSwap(came, nil)
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
				if err := ins.settle(ctx); err != nil {
					return err
				}
			}
			if err := ins.erased.leaveOut(ctx, ins, ins.round); err != nil || ins.rows() == 0 {
				return err
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
		const what = "insert rows that ClickHouse takes" // told once a minute, like every trouble
		ins.stats.troubles.Note(what, rejection)
		if err := ins.dropRejected(ctx, rejection); err != nil {
			return err
		}
		ins.stats.troubles.Clear(what)
	}
	return nil
}

func (ins *inserter) rows() int { return rowsOf(ins.round) }

// settle finds out what became of an insert whose outcome is unknown: it waits until none of our inserts runs any more
// and takes the rows out of the round that are there.
func (ins *inserter) settle(ctx context.Context) error {
	if _, err := ins.inserts.await(ctx, ins); err != nil {
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
			return ins.commit(ctx, ins.mostHeld-ins.heldRows)
		})
	}
}

// persist repeats try until it succeeds. The error is ctx's.
func (ins *inserter) persist(ctx context.Context, what string, try func() error) error {
	return ins.stats.troubles.Until(ctx, what, func() error {
		err := try()
		switch {
		case err == nil:
		case ctx.Err() != nil:
			slog.Warn("round abandoned, its records will be read from Kafka again", "what", what, "error", err)
		default:
			ins.stats.failures.Inc()
			ins.failed(err)
		}
		return err
	})
}

// insertOnce is one attempt at an insert. The fence stands in OnInput: an instance that was paused for longer than its
// session has lost its partitions and does not know. When ClickHouse asks for the rows, the insert is in system.processes
// and has none: an instance that is in the group at that moment goes on, and whoever is given its partitions later finds
// the insert there and waits for its end (insertsAtWork). The question costs 0.3 ms.
func (ins *inserter) insertOnce(ctx context.Context) error {
	next, columns, round := 0, slices.Clone(ins.empty), gather(ins.round, ins.small)
	defer ins.small.reset()
	err := ins.Do(ctx, ch.Query{
		Body:    ins.db.sql("INSERT INTO {events} ") + columns.Columns() + " VALUES",
		QueryID: ins.inserts.newID(),
		Input:   columns,
		OnInput: func(ctx context.Context) error {
			if next == 0 {
				if err := cmp.Or(ins.isMember(ctx), ins.erased.check(ctx)); err != nil {
					ins.conn.close() // or ch-go would wait for an answer to what it did not send
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
		Settings: slices.Clone(profile.Round), // Do appends to it
	})
	if err == nil {
		ins.unknown = false
	}
	if e, ok := ch.AsException(err); ok {
		return fmt.Errorf("insert into %s.events: %w", ins.db.database, &ch.Exception{Code: e.Code, Name: e.Name, Message: withoutValues(e)})
	}
	return err
}

// Do runs one of the inserter's queries on its connection.
func (ins *inserter) Do(ctx context.Context, q ch.Query) error {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	q.Settings = append(q.Settings, ins.db.inserting()...)
	return ins.conn.Do(ctx, q)
}

// rejections are ClickHouse's codes for "this data, never", by
// https://github.com/ClickHouse/ClickHouse/blob/master/src/Common/ErrorCodes.cpp. Everything else is taken for
// transient: trying again in vain holds up, giving up in error loses.
var rejections = []proto.Error{
	proto.ErrViolatedConstraint, proto.ErrTypeMismatch, proto.ErrCannotConvertType, proto.ErrIncorrectData,
	proto.ErrArgumentOutOfBound, proto.ErrValueIsOutOfRangeOfDataType, proto.ErrDecimalOverflow,
	proto.ErrTooLargeStringSize, proto.ErrTooLargeArraySize,
}

// dropRejected takes the bad rows out of a rejected round, or stores it in two halves. A rejected insert stores nothing, so they have to
// be found: the error for a constraint has its expression, which ClickHouse evaluates, one query a block; for any other error the round
// is halved until the bad rows stand alone. The error is ctx's.
func (ins *inserter) dropRejected(ctx context.Context, rejection error) error {
	if err := ins.persist(ctx, "look up a rejected round", func() error { return ins.settle(ctx) }); err != nil {
		return err
	}
	round := slices.DeleteFunc(slices.Clone(ins.round), func(b *block) bool { return b.rows() == 0 })
	single := ins.rows() == 1
	var bad []*kgo.Record
	for _, b := range round {
		rows := ins.violators(ctx, b, rejection)
		b.filter(func(row int) bool {
			if _, violates := slices.BinarySearch(rows, row); !violates && !single {
				return true
			}
			bad = append(bad, b.records[row])
			ins.dedupe.forget(b.id(row), b.at(row)) // because it comes back
			return false
		})
	}
	switch {
	case len(bad) > 0:
		return ins.rejected(ctx, bad, firstLine(rejection.Error()))
	case len(round) > 0:
		return ins.halve(ctx, round)
	}
	return nil
}

// violated finds the expression in ClickHouse's message for error 469, see
// https://github.com/ClickHouse/ClickHouse/blob/master/src/Processors/Transforms/CheckConstraintsTransform.cpp.
var violated = regexp.MustCompile(`(?s)is violated at row \d+\. Expression: \((.*)\)\. Column values: `)

// violators returns the rows that break the constraint which the rejection names: ClickHouse evaluates its expression over the
// block. None for another rejection, and when that fails.
func (ins *inserter) violators(ctx context.Context, b *block, rejection error) (bad []int) {
	m := violated.FindStringSubmatch(rejection.Error())
	if m == nil {
		return nil
	}
	number, got := make(proto.ColUInt32, b.rows()), proto.ColUInt32{}
	for i := range number {
		number[i] = uint32(i)
	}
	err := ins.Do(ctx, questions.EachRow(ch.Query{
		Body:          fmt.Sprintf("SELECT row_number FROM rejected WHERE NOT (%s) ORDER BY row_number", m[1]),
		ExternalTable: "rejected",
		ExternalData:  append(slices.Clone(b.columns), proto.InputColumn{Name: "row_number", Data: &number}),
	}, func(i int) { bad = append(bad, int(got[i])) }, &got))
	if err != nil {
		return nil
	}
	return bad
}

// halve stores each half of a round by itself and leaves none. A bad row costs two inserts per halving.
func (ins *inserter) halve(ctx context.Context, round []*block) error {
	first, second := round[:len(round)/2], round[len(round)/2:]
	if len(first) == 0 {
		all, middle := round[0], round[0].rows()/2
		first, second = []*block{all.part(0, middle)}, []*block{all.part(middle, all.rows())}
	}
	for _, half := range [][]*block{first, second} {
		ins.round = append(ins.round[:0], half...)
		if err := ins.insertRows(ctx); err != nil {
			return err
		}
	}
	ins.round = ins.round[:0]
	return nil
}
