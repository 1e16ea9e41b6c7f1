// Waiting on events.retry: a rejected row is tried again when its delay is over.
//
// retry.go reads the retry topic and puts each record back on events when it is due, under its own key, so that it meets
// its own worker and the dedupe. The delays and headers are those of sidetopics.go.

package main

import (
	"context"
	"time"

	"github.com/twmb/franz-go/pkg/kgo"
)

// retryWorker is a member of the group that reads events.retry. Each partition has a waiter, so that no record waits for
// another delay's records, and a rebalance waits for none. While a waiter has records, its partition is not fetched: a million
// waiting records stay on Kafka, and memory has at most one fetch of each partition.
type retryWorker struct {
	kafka    *kgo.Client
	side     *sideProducer
	topic    string
	troubles *troubles
	failed   func(error)       // gets every error of a poll
	waiters  map[int32]*waiter // by partition; the group's callbacks change it, and never while run has records in hand
}

// waiter holds the records of one partition until they are due, for as long as the partition is this worker's.
type waiter struct {
	partition int32
	records   chan []*kgo.Record // one fetch; the next one comes when all of it is put back
	ctx       context.Context
	stop      context.CancelFunc
	done      chan struct{} // closed at the end
}

const (
	// A fetch of a partition is at most retryFetch bytes, or one batch of sideProducer, compressed. Snappy expands at most 21
	// times: in the worst case 10 partitions hold 30 MB, and the client as much again.
	retryFetch = 128 << 10
	// requeueRecords bounds what is put back before the next commit, and with it how long a rebalance waits.
	requeueRecords = 500
	// retryTick is how exactly a delay is kept.
	retryTick = 100 * time.Millisecond
	// retryCommit bounds the commit when partitions leave. What is not committed is put back twice, which the dedupe catches.
	retryCommit = 5 * time.Second
)

func newRetryWorker(cfg *settings, side *sideProducer, failed func(error)) (*retryWorker, error) {
	w := &retryWorker{side: side, topic: cfg.kafkaTopic + ".retry", troubles: side.stats.troubles, failed: failed, waiters: map[int32]*waiter{}}
	var err error
	w.kafka, err = newKafka(cfg, "event-ingestion-retry",
		kgo.ConsumerGroup(cfg.kafkaGroup+".retry"),
		kgo.ConsumeTopics(w.topic),
		kgo.ConsumeResetOffset(kgo.NewOffset().AtStart()),
		kgo.SessionTimeout(cfg.kafkaSession),
		kgo.HeartbeatInterval(cfg.kafkaSession/4),
		kgo.BlockRebalanceOnPoll(),
		kgo.AutoCommitMarks(),
		kgo.AutoCommitInterval(commitInterval),
		kgo.FetchMaxBytes(1<<20),
		kgo.FetchMaxPartitionBytes(retryFetch),
		kgo.OnPartitionsAssigned(w.onAssigned),
		kgo.OnPartitionsRevoked(func(ctx context.Context, c *kgo.Client, topics map[string][]int32) {
			if w.release(topics) {
				ctx, cancel := context.WithTimeout(ctx, retryCommit)
				defer cancel()
				c.CommitMarkedOffsets(ctx)
			}
		}),
		kgo.OnPartitionsLost(func(_ context.Context, _ *kgo.Client, topics map[string][]int32) { w.release(topics) }),
	)
	return w, err
}

// run works until ctx is done, and leaves the group within the context that finish returns.
func (w *retryWorker) run(ctx context.Context, finish func() (context.Context, context.CancelFunc)) {
	for ctx.Err() == nil {
		fetches := w.kafka.PollFetches(ctx)
		fetches.EachError(func(_ string, _ int32, err error) {
			if ctx.Err() == nil {
				w.failed(err)
			}
		})
		fetches.EachPartition(func(p kgo.FetchTopicPartition) {
			if len(p.Records) == 0 {
				return
			}
			w.troubles.clear(readRetries)
			w.kafka.PauseFetchPartitions(map[string][]int32{w.topic: {p.Partition}})
			select {
			case w.waiters[p.Partition].records <- p.Records: // at once: the fetch before it is put back
			case <-ctx.Done():
			}
		})
		w.kafka.AllowRebalance()
	}
	end, cancel := finish()
	defer cancel()
	leave(end, w.kafka) // calls release
}

// readRetries is what fails when a poll does.
const readRetries = "read the retry topic"

// onAssigned may be called before newRetryWorker has its client: the group is joined at once.
func (w *retryWorker) onAssigned(_ context.Context, kafka *kgo.Client, topics map[string][]int32) {
	w.troubles.clear(readRetries)
	for _, p := range topics[w.topic] {
		a := &waiter{partition: p, records: make(chan []*kgo.Record, 1), done: make(chan struct{})}
		a.ctx, a.stop = context.WithCancel(context.Background())
		w.waiters[p] = a
		go w.wait(a) // ends with a.stop
	}
	kafka.ResumeFetchPartitions(topics) // they may have been paused when they left
}

// release ends the waiters of partitions that leave, and returns once none of them puts back or marks any more. The next owner
// gets what they hold. It reports whether there were any.
func (w *retryWorker) release(topics map[string][]int32) bool {
	for _, p := range topics[w.topic] {
		if a := w.waiters[p]; a != nil {
			a.stop()
		}
	}
	for _, p := range topics[w.topic] {
		if a := w.waiters[p]; a != nil {
			<-a.done
			delete(w.waiters, p)
		}
	}
	return len(topics[w.topic]) > 0
}

// wait puts the records of a partition back as they become due.
func (w *retryWorker) wait(a *waiter) {
	defer close(a.done)
	for {
		var held []*kgo.Record
		select {
		case held = <-a.records:
		case <-a.ctx.Done():
			return
		}
		for len(held) > 0 {
			due := 0
			for due < min(len(held), requeueRecords) && untilDue(held[due]) <= 0 {
				due++
			}
			if due > 0 {
				if w.side.requeue(a.ctx, held[:due]) != nil {
					return
				}
				w.kafka.MarkCommitRecords(held[due-1])
				held = held[due:]
				continue
			}
			if sleep(a.ctx, max(retryTick, untilDue(held[0]))) != nil {
				return
			}
		}
		w.kafka.ResumeFetchPartitions(map[string][]int32{w.topic: {a.partition}})
	}
}

// untilDue is how long a record still has to wait.
func untilDue(rec *kgo.Record) time.Duration {
	return time.Until(rec.Timestamp.Add(delayOf(retryCount(rec))))
}
