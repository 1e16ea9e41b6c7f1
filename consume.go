// The Kafka consumer: one poll loop, one worker a partition.
//
// The poll loop hands what it fetches to the workers' queues and waits when these hold enough; it never waits while
// it blocks a rebalance. A worker parses records and appends them to its block; when the block is full and the
// inserter has not taken it yet, the worker waits: that is the backpressure, up to Kafka. consume.go owns queues and
// blocks, and gives partitions back only when what was taken from them is stored and committed.

package main

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/twmb/franz-go/pkg/kgo"
)

const (
	// lockRecords is how many records a worker takes in before it lets the inserter at its block: about 0.2 ms.
	lockRecords = 128
	// drainTimeout bounds the wait for ClickHouse when partitions move; the group would give up on us at 60 s.
	drainTimeout = 40 * time.Second
	// commitInterval bounds what a crash makes the next owner read again.
	commitInterval = 250 * time.Millisecond
	// A broker answers a fetch after fetchWait at the latest, or at once with fetchBytes: 40 answers a second instead
	// of one for every batch that arrives, for 25 ms of freshness at most.
	fetchWait  = 25 * time.Millisecond
	fetchBytes = 1 << 20
	// pollRecords bounds one poll, and with it the time that a rebalance waits.
	pollRecords = 10000
)

// consumer reads the main topic in the group, spread over the workers.
type consumer struct {
	kafka     *kgo.Client
	topic     string
	workers   []*worker
	inserter  *inserter
	sideways  *sideways
	maxQueued int64
	queued    atomic.Int64
	room      chan struct{} // a worker has emptied part of its queue
	assigned  atomic.Int32  // partitions
}

func newConsumer(cfg *settings, in *inserter, side *sideways) (*consumer, error) {
	c := &consumer{
		topic: cfg.kafkaTopic, inserter: in, sideways: side,
		maxQueued: int64(cfg.workerCount * cfg.workerBatchSize),
		room:      make(chan struct{}, 1),
	}
	for range cfg.workerCount {
		c.workers = append(c.workers, newWorker(c, cfg.workerBatchSize))
	}
	in.workers, in.stored, in.rejected = c.workers, c.mark, side.retry
	var err error
	c.kafka, err = kgo.NewClient(
		kgo.SeedBrokers(cfg.kafkaBrokers...),
		kgo.ClientID("event-ingestion-consumer"),
		kgo.ConsumerGroup(cfg.kafkaGroup),
		kgo.ConsumeTopics(cfg.kafkaTopic),
		kgo.ConsumeResetOffset(kgo.NewOffset().AtStart()),
		kgo.Balancers(kgo.CooperativeStickyBalancer()),
		kgo.SessionTimeout(cfg.kafkaSession),
		kgo.HeartbeatInterval(cfg.kafkaSession/4),
		kgo.BlockRebalanceOnPoll(),
		kgo.AutoCommitMarks(),
		kgo.AutoCommitInterval(commitInterval),
		kgo.FetchMaxWait(fetchWait),
		kgo.FetchMinBytes(fetchBytes),
		kgo.FetchMaxBytes(8<<20),
		kgo.FetchMaxPartitionBytes(1<<20),
		kgo.OnPartitionsAssigned(c.onAssigned),
		kgo.OnPartitionsRevoked(c.onRevoked),
		kgo.OnPartitionsLost(c.onLost),
	)
	return c, err
}

// run consumes until ctx is done, then stores and commits what the blocks hold, bounded by the context that
// finish returns, and leaves the group.
func (c *consumer) run(ctx context.Context, finish func() (context.Context, context.CancelFunc)) {
	var workers sync.WaitGroup
	for _, w := range c.workers {
		workers.Go(w.run) // ends with w.close
	}
	insertCtx, cancelInserts := context.WithCancel(context.Background())
	stopInserter, inserterDone := make(chan struct{}), make(chan struct{})
	go func() { // ends with stopInserter, or insertCtx
		defer close(inserterDone)
		c.inserter.run(insertCtx, stopInserter)
	}()
	c.poll(ctx)

	end, cancel := finish()
	defer cancel()
	context.AfterFunc(end, cancelInserts)
	for _, w := range c.workers {
		w.close()
	}
	workers.Wait()
	close(stopInserter)
	<-inserterDone
	if err := c.kafka.CommitMarkedOffsets(end); err != nil {
		slog.Warn("offsets not committed at the end, their records will be read again", "error", err)
	}
	c.kafka.CloseAllowingRebalance()
	cancelInserts()
}

func (c *consumer) poll(ctx context.Context) {
	for ctx.Err() == nil {
		fetches := c.kafka.PollRecords(ctx, pollRecords)
		fetches.EachError(func(topic string, partition int32, err error) {
			if ctx.Err() == nil {
				slog.Warn("fetch failed, franz-go goes on trying", "topic", topic, "partition", partition, "error", err)
			}
		})
		fetches.EachPartition(func(p kgo.FetchTopicPartition) {
			if len(p.Records) > 0 {
				c.queued.Add(int64(len(p.Records)))
				c.workers[int(p.Partition)%len(c.workers)].enqueue(p.Partition, p.Records)
			}
		})
		c.kafka.AllowRebalance()
		for c.queued.Load() > c.maxQueued && ctx.Err() == nil {
			select {
			case <-c.room:
			case <-ctx.Done():
			}
		}
	}
}

// mark tells the client what may be committed.
func (c *consumer) mark(reached []position) {
	if len(reached) == 0 {
		return
	}
	offsets := make(map[int32]kgo.EpochOffset, len(reached))
	for _, p := range reached {
		offsets[p.partition] = kgo.EpochOffset{Epoch: p.epoch, Offset: p.next}
	}
	c.kafka.MarkCommitOffsets(map[string]map[int32]kgo.EpochOffset{c.topic: offsets})
}

func (c *consumer) onAssigned(_ context.Context, _ *kgo.Client, topics map[string][]int32) {
	owners := map[*worker]struct{}{}
	for _, p := range topics[c.topic] {
		owners[c.workers[int(p)%len(c.workers)]] = struct{}{}
	}
	c.inserter.onAssigned(owners)
	if n := len(topics[c.topic]); n > 0 {
		slog.Info("partitions assigned", "count", n, "all", c.assigned.Add(int32(n)))
	}
}

// onRevoked lets partitions go: what is queued is dropped, what is in blocks is stored, marks are committed. Only then
// may another copy have them.
func (c *consumer) onRevoked(ctx context.Context, _ *kgo.Client, topics map[string][]int32) {
	if c.forget(topics) == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, drainTimeout)
	defer cancel()
	if err := c.inserter.flush(ctx); err != nil {
		slog.Warn("partitions left before their rows were stored", "error", err)
		return
	}
	if err := c.kafka.CommitMarkedOffsets(ctx); err != nil {
		slog.Warn("offsets not committed before partitions left, their records will be read again", "error", err)
	}
}

// onLost is the other way to lose partitions: the group has already given them to somebody, nothing can be committed.
func (c *consumer) onLost(_ context.Context, _ *kgo.Client, topics map[string][]int32) {
	if n := c.forget(topics); n > 0 {
		slog.Warn("partitions lost, the group did not hear from us in time", "count", n)
	}
}

func (c *consumer) forget(topics map[string][]int32) int {
	lost := topics[c.topic]
	for _, p := range lost {
		c.workers[int(p)%len(c.workers)].drop(p)
	}
	if len(lost) > 0 {
		slog.Info("partitions revoked", "count", len(lost), "all", c.assigned.Add(int32(-len(lost))))
	}
	return len(lost)
}

// worker turns the records of its partitions into rows.
type worker struct {
	consumer *consumer
	rows     int // of a full block
	parser   eventParser
	idInput  []byte

	mu     sync.Mutex // guards everything below
	wake   sync.Cond  // queue has records, cur has room, or closed
	queue  []fetched
	cur    *block
	spare  *block // the inserter's, from takeBlock to reset
	seen   seen
	closed bool
}

// fetched is what is left of one fetch of one partition.
type fetched struct {
	partition int32
	records   []*kgo.Record
}

func newWorker(c *consumer, rows int) *worker {
	w := &worker{consumer: c, rows: rows, cur: newBlock(rows), spare: newBlock(rows)}
	w.wake.L = &w.mu
	w.seen.hours = map[int64]*idFilter{}
	return w
}

func (w *worker) enqueue(partition int32, records []*kgo.Record) {
	w.mu.Lock()
	w.queue = append(w.queue, fetched{partition, records})
	w.mu.Unlock()
	w.wake.Signal()
}

// drop forgets the queued records of a partition. Rows already in blocks stay: flush stores them.
func (w *worker) drop(partition int32) {
	w.mu.Lock()
	defer w.mu.Unlock()
	kept := w.queue[:0]
	for _, f := range w.queue {
		if f.partition == partition {
			w.consumer.release(len(f.records))
		} else {
			kept = append(kept, f)
		}
	}
	clear(w.queue[len(kept):])
	w.queue = kept
}

func (w *worker) close() {
	w.mu.Lock()
	w.closed = true
	w.mu.Unlock()
	w.wake.Broadcast()
}

// takeBlock gives the inserter what the worker has, nil when that is nothing, and the worker an empty block. The
// inserter has emptied the last one it took before it takes the next.
func (w *worker) takeBlock() *block {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.cur.reached) == 0 {
		return nil
	}
	w.cur, w.spare = w.spare, w.cur
	w.wake.Broadcast()
	return w.spare
}

// run takes in records until close. It holds the lock for lockRecords at a time, so that the inserter and a rebalance
// find the queue and the block in a state that agrees.
func (w *worker) run() {
	for {
		w.mu.Lock()
		for !w.closed && (len(w.queue) == 0 || w.cur.size() >= w.rows) {
			w.wake.Wait()
		}
		if w.closed {
			w.mu.Unlock()
			return
		}
		bad, why := w.takeIn(lockRecords)
		w.mu.Unlock()
		if bad != nil {
			w.setAside(bad, why)
		}
	}
}

var errMisplaced = errors.New("the record's key is not its event's id")

// takeIn appends up to n records of the queue's head to the block, under the lock. It stops at a record that is no
// event, or not under its own key, which it returns and leaves at the head.
func (w *worker) takeIn(n int) (bad *kgo.Record, why error) {
	head := &w.queue[0]
	for ; n > 0 && len(head.records) > 0 && w.cur.size() < w.rows; n-- {
		rec := head.records[0]
		ev, err := w.decode(rec.Value)
		if err != nil {
			return rec, err
		}
		var id eventID
		id, w.idInput = ev.id(w.idInput)
		if !id.isKey(rec.Key) {
			return rec, errMisplaced
		}
		if len(w.cur.reached) == 0 {
			w.consumer.inserter.noteRow()
		}
		hour := ev.timestamp / hourSeconds
		if isNew, covered := w.check(&id, hour); isNew {
			w.cur.append(&id, ev, rec)
		} else {
			w.cur.suspects = append(w.cur.suspects, suspect{id, hour, covered, rec})
		}
		w.pop(rec)
	}
	if w.cur.size() >= w.rows {
		notify(w.consumer.inserter.full)
	}
	return nil, nil
}

// pop moves past the record at the queue's head, under the lock.
func (w *worker) pop(rec *kgo.Record) {
	w.cur.reach(rec.Partition, rec.LeaderEpoch, rec.Offset+1)
	head := &w.queue[0]
	head.records = head.records[1:]
	if len(head.records) == 0 {
		w.queue[0] = fetched{}
		w.queue = w.queue[1:]
	}
	w.consumer.release(1)
}

// release says that n records have left the queues.
func (c *consumer) release(n int) {
	if c.queued.Add(int64(-n)) <= c.maxQueued {
		notify(c.room)
	}
}

// decode reads a record's value as an event. The API's rules hold for other producers too, except the age: a record
// may have waited.
func (w *worker) decode(value []byte) (*event, error) {
	ev, problems, err := w.parser.parse(value)
	switch {
	case err != nil:
		return nil, err
	case len(problems) > 0:
		return nil, fmt.Errorf("%s", problems[0].message)
	case !ev.storable():
		return nil, fmt.Errorf("timestamp %d is not within 1970 to 2106", ev.timestamp)
	}
	return ev, nil
}

// setAside deals with a record that cannot become a row here: what is no event goes to the dead letters, an event under
// another key goes back to the topic under its own, where its own worker knows its copies. It moves past the record
// once that is acknowledged, unless the partition was lost meanwhile: then the next owner does it again.
func (w *worker) setAside(rec *kgo.Record, why error) {
	done := false
	if errors.Is(why, errMisplaced) {
		done = w.consumer.sideways.reroute(rec, w.ownKey(rec), w.isClosed)
	} else {
		done = w.consumer.sideways.deadLetter(rec, errorUnmarshal, why.Error(), w.isClosed)
	}
	if !done {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.queue) > 0 && len(w.queue[0].records) > 0 && w.queue[0].records[0] == rec {
		if len(w.cur.reached) == 0 {
			w.consumer.inserter.noteRow()
		}
		w.pop(rec)
	}
}

// ownKey is the key that the record's event should have.
func (w *worker) ownKey(rec *kgo.Record) []byte {
	ev, _, _ := w.parser.parse(rec.Value) // only this goroutine uses the parser, and it has parsed this before
	id, _ := ev.id(nil)
	return hex.AppendEncode(nil, id[:])
}

func (w *worker) isClosed() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.closed
}
