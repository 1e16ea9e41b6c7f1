// A worker: the records of its partitions in, rows of a column block out.
//
// A worker parses records and appends them to its block; when the block is full and the inserter has not taken it yet,
// the worker waits: that is the backpressure, up to Kafka. worker.go owns queues and blocks; the worker's lock is held
// for a few records at a time, so that the inserter and a rebalance find them in a state that agrees.

package main

import (
	"encoding/hex"
	"errors"
	"fmt"
	"sync"

	"github.com/twmb/franz-go/pkg/kgo"
)

// lockRecords is how many records a worker takes in before it lets the inserter at its block: about 0.2 ms.
const lockRecords = 128

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
