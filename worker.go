// A worker: the records of its partitions in, rows of a column block out.
//
// A worker parses records and appends them to its block. A full block asks for a round; when the inserter is busy the block goes on
// growing, and then the worker waits: that is the backpressure, up to Kafka. worker.go owns queues and blocks; the worker's lock is held
// for a few records at a time, so that the inserter and a rebalance find them in a state that agrees.

package main

import (
	"cmp"
	"context"
	"encoding/hex"
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/twmb/franz-go/pkg/kgo"
)

// lockRecords is how many records a worker takes in before it lets the inserter at its block: about 0.2 ms.
const lockRecords = 128

// queuedBytes is about what a record takes in memory while it waits: its bytes, 200 for kgo.Record, and its places in slices.
func queuedBytes(rec *kgo.Record) int64 { return int64(recordBytes(rec) + 200) }

// blockLimits say when a block is full: it asks for a round with so many rows. It grows on while the inserter is busy, to busyBlocks as
// many rows or so many bytes: larger rounds cost less when there is a backlog.
type blockLimits struct {
	rows, bytes int
}

const busyBlocks = 5

// worker turns the records of its partitions into rows.
type worker struct {
	queued  *atomic.Int64 // bytes of what waits in the queues of all workers
	call    *roundCall
	side    *sideProducer
	router  kgo.TopicPartitioner // tells the partition of a key
	parts   int                  // partitions of the topic
	parser  eventParser
	idInput []byte
	keyed   kgo.Record // for router

	limits blockLimits
	mu     sync.Mutex      // guards everything below
	wake   sync.Cond       // queue has records, cur has room, or run has to end
	queue  [][]*kgo.Record // what is left of fetches, each of one partition and never empty
	cur    *block
	spare  *block             // the inserter's, from takeBlock to reset
	came   map[int32]*arrival // by partition
}

// arrival is a partition that came here: how many of its first records may still have been taken in by an owner that died, and
// where the partition ended when the first of them were fetched. What came later nobody else has had.
type arrival struct {
	left int
	end  int64 // 0 before the first fetch
}

const (
	// rereadBlocks is how many blocks of WORKER_BATCH_SIZE a former owner can have stored of a partition and not committed:
	// heldBlocks of them, and what it has stored since, within a few commitIntervals.
	rereadBlocks = 2 * heldBlocks
	// usualRows is the default of WORKER_BATCH_SIZE: a former owner may have had a larger one than ours.
	usualRows = 2000
)

func newWorker(limits blockLimits, partitions int, queued *atomic.Int64, call *roundCall, side *sideProducer) *worker {
	w := &worker{
		limits: limits, queued: queued, call: call, side: side, parts: partitions, router: kgo.StickyKeyPartitioner(nil).ForTopic(""),
		cur: newBlock(limits.rows), spare: newBlock(limits.rows), came: map[int32]*arrival{},
	}
	w.wake.L = &w.mu
	return w
}

// assign is told that a partition came here, whose first records may be reread.
func (w *worker) assign(partition int32, reread int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.came[partition] = &arrival{left: reread}
}

// enqueue takes over records of one partition, at least one, which ended at end when they were fetched.
func (w *worker) enqueue(records []*kgo.Record, end int64) {
	for _, rec := range records {
		w.queued.Add(queuedBytes(rec))
	}
	w.mu.Lock()
	if a := w.came[records[0].Partition]; a != nil && a.end == 0 {
		a.end = end
	}
	w.queue = append(w.queue, records)
	w.mu.Unlock()
	w.wake.Signal()
}

// drop forgets the queued records of a partition. Rows already in blocks stay: flush stores them.
func (w *worker) drop(partition int32) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.queue = slices.DeleteFunc(w.queue, func(records []*kgo.Record) bool {
		if records[0].Partition != partition {
			return false
		}
		for _, rec := range records {
			w.queued.Add(-queuedBytes(rec))
		}
		return true
	})
}

// takeBlock gives the inserter what the worker has, nil when that is nothing, and the worker an empty block. The
// inserter has emptied the last one it took before it takes the next.
func (w *worker) takeBlock() *block {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.cur, w.spare = w.spare, w.cur
	if len(w.spare.offsets) == 0 {
		return nil
	}
	w.wake.Broadcast()
	return w.spare
}

// run takes in records until ctx is done.
func (w *worker) run(ctx context.Context) {
	defer context.AfterFunc(ctx, func() {
		w.mu.Lock() // or it might be about to wait
		defer w.mu.Unlock()
		w.wake.Broadcast()
	})()
	for {
		w.mu.Lock()
		for ctx.Err() == nil && (len(w.queue) == 0 || w.isFull()) {
			w.wake.Wait()
		}
		if ctx.Err() != nil {
			w.mu.Unlock()
			return
		}
		bad, why := w.takeIn(lockRecords)
		w.mu.Unlock()
		if bad != nil {
			w.redirect(ctx, bad, why)
		}
	}
}

var errMisplaced = errors.New("the record is not where its event's id belongs")

// isFull says whether the block takes no more rows.
func (w *worker) isFull() bool {
	return w.cur.rows() >= busyBlocks*w.limits.rows || w.cur.bytes >= w.limits.bytes || w.cur.outOfKeys()
}

// takeIn appends up to n records of the queue's head to the block, under the lock. It stops at a record that is no
// event, or not under its own key or on its key's partition, which it returns and leaves at the head.
func (w *worker) takeIn(n int) (bad *kgo.Record, why error) {
	head, taken := w.queue[0], 0
	for taken < min(n, len(head)) && !w.isFull() {
		rec := head[taken]
		if rec.Attrs.IsControl() { // of another program's transaction
			taken++
			continue
		}
		ev, err := w.parser.decode(rec.Value)
		if err != nil {
			bad, why = rec, cmp.Or(whyPassedOver(rec), err)
			break
		}
		var id eventID
		id, w.idInput = ev.id(w.idInput)
		if !id.isKey(rec.Key) || w.home(rec.Key) != rec.Partition {
			bad, why = rec, errMisplaced
			break
		}
		w.cur.append(&id, ev, rec)
		taken++
	}
	if taken > 0 {
		w.pass(taken)
	}
	if w.cur.rows() >= w.limits.rows || w.isFull() {
		notify(w.call.full, struct{}{})
	}
	return bad, why
}

// home is the partition that murmur2 gives the key, as every Kafka client computes it.
func (w *worker) home(key []byte) int32 {
	w.keyed.Key = key
	return int32(w.router.Partition(&w.keyed, w.parts))
}

// pass moves past n records at the queue's head, under the lock.
func (w *worker) pass(n int) {
	if len(w.cur.offsets) == 0 {
		notify(w.call.arrived, time.Now())
	}
	head := w.queue[0]
	last := head[n-1]
	w.cur.offsets[last.Partition] = kgo.EpochOffset{Epoch: last.LeaderEpoch, Offset: last.Offset + 1}
	for _, rec := range head[:n] {
		if a := w.came[rec.Partition]; a != nil && !rec.Attrs.IsControl() {
			if a.left--; a.left <= 0 || rec.Offset >= a.end {
				delete(w.came, rec.Partition)
			} else {
				w.cur.reread = true
			}
		}
		w.queued.Add(-queuedBytes(rec))
	}
	if w.queue[0] = head[n:]; n == len(head) {
		w.queue[0], w.queue = nil, w.queue[1:]
	}
}

// redirect sends a record that cannot become a row here where it belongs: what is no event to the dead letters, an event under
// another key or on another partition back to the topic. It moves past the record once that is acknowledged, unless the
// partition was lost meanwhile: then the next owner does it again.
func (w *worker) redirect(ctx context.Context, rec *kgo.Record, why error) {
	var err error
	if errors.Is(why, errMisplaced) {
		ev, _ := w.parser.decode(rec.Value) // once more, and again without complaint
		id, _ := ev.id(nil)
		err = w.side.requeue(ctx, []*kgo.Record{{Key: hex.AppendEncode(nil, id[:]), Value: rec.Value, Headers: rec.Headers}})
	} else {
		err = w.side.deadLetter(ctx, rec, why)
	}
	if err != nil {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.queue) > 0 && w.queue[0][0] == rec {
		w.pass(1)
	}
}
