// The Kafka consumer: one poll loop that feeds the workers.
//
// The poll loop hands what it fetches to the workers' queues and waits when these hold enough; it never waits while
// it blocks a rebalance. consume.go owns the group membership and the offsets, and gives partitions back only when what
// was taken from them is stored and committed. A consumer that could not do that, or that the group has given up, ends
// without storing another row, as if killed; main.go then starts a new one.

package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/kmsg"

	"github.com/event-ingestion/event-ingestion/internal/batches"
	"github.com/event-ingestion/event-ingestion/internal/troubles"
)

const (
	// drainTimeout bounds the wait for ClickHouse when partitions move; the group would give up on us at 60 s.
	drainTimeout  = 40 * time.Second
	commitTimeout = 5 * time.Second
	// A broker answers a fetch after fetchWait at the latest, or at once with fetchBytes: 40 answers a second instead
	// of one for every batch that arrives, for 25 ms of freshness at most.
	fetchWait  = 25 * time.Millisecond
	fetchBytes = 1 << 20
	// pollRecords bounds one poll, and with it the time that a rebalance waits.
	pollRecords = 10000
	// pollWait bounds a poll in which nothing comes, so that a grown topic is noticed.
	pollWait = time.Second
	// fullWait is the time between two looks at queues that are full: they do not run empty meanwhile.
	fullWait = 5 * time.Millisecond
	// memoryParts are those of CONSUME_MEMORY: what waits in the queues (one), the records of two rounds, the one that is sent
	// and the one that fills (two), the same as columns (two), and what the client fetches ahead (aheadParts).
	memoryParts = 8
	aheadParts  = 3
)

// ahead bounds the bytes that a consumer has decompressed and not taken yet: a fetch may be compressed a thousandfold.
type ahead struct {
	*batches.Decompressor
	limit int64
	bytes atomic.Int64
	seen  int64 // bytes at the last poll
}

// Decompress refuses a batch beyond the limit: the client hands on those before it, and fetches the rest again. A large batch waits
// until little else is there, so that they are within the limit together.
func (a *ahead) Decompress(src []byte, codec kgo.CompressionCodecType) ([]byte, error) {
	if a.bytes.Load() > a.limit {
		return nil, errAhead
	}
	batch, err := a.Within(src, codec, func() error {
		if a.bytes.Load() > a.limit/aheadParts {
			return errAhead
		}
		return nil
	})
	a.bytes.Add(int64(len(batch)))
	return batch, err
}

// polled is told after each poll how many records wait for the next one. When none does, and none was decompressed since the
// last poll, everything is taken: else one broker's answer may still be on its way while that of another is polled.
func (a *ahead) polled(waiting int64) {
	if waiting == 0 {
		a.bytes.CompareAndSwap(a.seen, 0)
	}
	a.seen = a.bytes.Load()
}

// consumer reads the main topic in the group, spread over the workers.
type consumer struct {
	cfg           *settings
	kafka         *kgo.Client
	ahead         *ahead
	passed        map[int32]*kgo.Record // by partition, in place of batches that cannot be taken in; callbacks change it, but not between a poll and AllowRebalance
	topic         string
	group         string
	parts         int        // partitions of the topic
	partitionsNow func() int // partitions that it was seen to have last
	workers       []*worker
	inserter      *inserter
	stats         *storeStats
	failed        func(error)            // told what a poll says, each time
	queued        atomic.Int64           // bytes of the records that wait in the workers' queues
	maxQueued     int64                  // of these
	assigned      atomic.Int64           // partitions that this instance has; the group's callbacks, which come one at a time, change it
	reread        int                    // records of a partition that comes here that may have been stored by another instance
	member        atomic.Pointer[string] // the group's name for this instance since the first assignment
	owned         context.Context
	abandon       context.CancelCauseFunc // ends owned: nothing that was taken in may be stored any more
}

// newConsumer returns a consumer of the topic, which has so many partitions; it starts over when another number was seen. queryFailed
// is told what ClickHouse says when a query fails.
func newConsumer(cfg *settings, db *clickhouse, queryFailed func(error), partitions int, partitionsNow func() int, side *sideProducer, stats *storeStats, failed func(error)) (*consumer, error) {
	part := cfg.consumeMemory / memoryParts
	c := &consumer{
		cfg: cfg, topic: cfg.kafkaTopic, group: cfg.kafkaGroup, parts: partitions, partitionsNow: partitionsNow, stats: stats, failed: failed, maxQueued: part,
		passed: map[int32]*kgo.Record{},
		reread: rereadBlocks * max(cfg.workerBatchSize, usualRows),
	}
	bounded, err := batches.NewDecompressor(cfg.consumeMemory)
	if err != nil {
		return nil, err
	}
	c.ahead = &ahead{Decompressor: bounded, limit: part * aheadParts}
	call := newRoundCall()
	var blocks []func() *block
	for range cfg.workerCount {
		w := newWorker(blockLimits{cfg.workerBatchSize, int(part / int64(cfg.workerCount))}, partitions, &c.queued, call, side)
		w.parser.unknown = stats.unknownMember
		c.workers, blocks = append(c.workers, w), append(blocks, w.takeBlock)
	}
	c.inserter = newInserter(db, cfg, stats, queryFailed, blocks, call, membership{
		isMember: c.isMember,
		alone:    func() bool { return int(c.assigned.Load()) == c.parts },
		release: func(offsets map[int32]kgo.EpochOffset) {
			c.kafka.MarkCommitOffsets(map[string]map[int32]kgo.EpochOffset{c.topic: offsets})
		},
		commit:   c.commit,
		rejected: side.retry,
	})
	c.owned, c.abandon = context.WithCancelCause(context.Background())
	c.kafka, err = newGroupClient(cfg, "event-ingestion-consumer", "",
		kgo.FetchMaxWait(fetchWait),
		kgo.FetchMinBytes(fetchBytes),
		kgo.FetchMaxBytes(8<<20),
		kgo.FetchMaxPartitionBytes(1<<20),
		kgo.WithDecompressor(c.ahead),
		kgo.OnPartitionsAssigned(c.onAssigned),
		kgo.OnPartitionsRevoked(c.onRevoked),
		kgo.OnPartitionsLost(c.onLost),
	)
	return c, err
}

// run consumes until ctx is done, then stores and commits what the blocks hold, bounded by the context that
// finish returns, and leaves the group. After abandon it returns without storing anything.
func (c *consumer) run(ctx context.Context, finish func() (context.Context, context.CancelFunc)) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	context.AfterFunc(c.owned, cancel)
	var workers, inserting sync.WaitGroup
	working, stopWorkers := context.WithCancel(context.Background())
	insertCtx, cancelInserts := context.WithCancel(c.owned)
	stopInserter := make(chan struct{})
	for _, w := range c.workers {
		workers.Go(func() { w.run(working) }) // ends with stopWorkers
	}
	inserting.Go(func() { c.inserter.run(insertCtx, stopInserter) }) // ends with stopInserter, or insertCtx
	c.poll(ctx)

	if c.owned.Err() != nil {
		slog.Warn("starting over, as after a crash: what was not stored is read from Kafka again", "why", context.Cause(c.owned))
	}
	end, cancelEnd := finish()
	defer cancelEnd()
	context.AfterFunc(end, cancelInserts)
	stopWorkers()
	workers.Wait()
	close(stopInserter)
	inserting.Wait()
	commit, cancelCommit := endsBy(end, leaveAtLeast) // a ClickHouse that does not answer has taken all the time
	defer cancelCommit()
	if err := c.kafka.CommitMarkedOffsets(commit); err != nil {
		slog.Warn("offsets not committed at the end, their records will be read again", "error", err)
	}
	leave(end, c.kafka)
	cancelInserts()
}

func (c *consumer) poll(ctx context.Context) {
	for ctx.Err() == nil {
		fetches := poll(ctx, c.kafka, pollRecords, pollWait, c.failed)
		c.noteGrowth(c.partitionsNow())
		fetches.EachPartition(func(p kgo.FetchTopicPartition) {
			records := p.Records
			if passed := passedOver(c.cfg, p.Err); passed != nil {
				records, c.passed[p.Partition] = append(records, passed), passed
			}
			if len(records) > 0 && c.owned.Err() == nil {
				c.stats.troubles.Clear(readEvents)
				c.stats.consumed.Add(len(p.Records))
				c.worker(p.Partition).enqueue(records, p.HighWatermark)
			}
		})
		skip(c.kafka, c.topic, c.passed)
		c.kafka.AllowRebalance()
		c.ahead.polled(c.kafka.BufferedFetchRecords())
		for c.queued.Load() > c.maxQueued && ctx.Err() == nil {
			troubles.Sleep(ctx, fullWait)
		}
	}
}

func (c *consumer) worker(partition int32) *worker { return c.workers[int(partition)%len(c.workers)] }

// readEvents is what fails when a poll does.
const readEvents = "read the main topic"

func (c *consumer) onAssigned(_ context.Context, kafka *kgo.Client, topics map[string][]int32) {
	c.stats.troubles.Clear(readEvents)
	member, _ := kafka.GroupMetadata()
	c.member.CompareAndSwap(nil, &member)
	if len(topics[c.topic]) == 0 {
		return
	}
	came := time.Now()
	for _, p := range topics[c.topic] {
		if int(p) >= c.parts {
			c.abandon(errGrown)
			return
		}
		c.inserter.inserts.cameAt.Store(&came)
		c.worker(p).assign(p, c.reread)
	}
	slog.Info("partitions assigned", "count", len(topics[c.topic]), "all", c.assigned.Add(int64(len(topics[c.topic]))))
}

// onRevoked lets partitions go: what is queued is dropped, what is in blocks is stored, marks are committed. Only then
// may another instance have them.
func (c *consumer) onRevoked(ctx context.Context, kafka *kgo.Client, topics map[string][]int32) {
	leaving := topics[c.topic]
	if c.forget(leaving); len(leaving) == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, drainTimeout)
	defer cancel()
	if err := c.inserter.flush(ctx, leaving); err != nil {
		c.abandon(fmt.Errorf("partitions had to go before their rows were stored: %w", err))
	}
	if c.owned.Err() != nil {
		return
	}
	if err := kafka.CommitMarkedOffsets(ctx); err != nil {
		slog.Warn("offsets not committed before partitions left, their records will be read again", "error", err)
	}
}

// onLost is the other way to lose partitions: the group did not hear from us in time and has given all of them to
// others. Nothing can be committed, and nothing of them may be stored any more.
func (c *consumer) onLost(_ context.Context, _ *kgo.Client, topics map[string][]int32) {
	if c.forget(topics[c.topic]); len(topics[c.topic]) > 0 {
		c.abandon(errGivenUp)
	}
}

var errGivenUp = errors.New("the consumer group did not hear from this instance in time and has given its partitions to others")

var errGrown = errors.New("the topic has another number of partitions than before: every key has to be looked at anew")

// noteGrowth ends the consumer when the topic was seen with another number of partitions.
func (c *consumer) noteGrowth(n int) {
	if n > 0 && n != c.parts {
		c.abandon(errGrown)
	}
}

// isMember asks the group's coordinator whether this instance belongs to the group at this moment, under the name that it
// was given its partitions by: franz-go joins under another one without a word when a rebalance finds the old one
// unknown. A no ends the consumer; what is no answer has to be asked again.
func (c *consumer) isMember(ctx context.Context) error {
	req := kmsg.NewPtrHeartbeatRequest()
	req.Group = c.group
	req.MemberID, req.Generation = c.kafka.GroupMetadata()
	if name := c.member.Load(); name == nil || *name != req.MemberID {
		c.abandon(errGivenUp)
	}
	parts, err := partitionsOf(ctx, c.kafka, c.topic)
	if err != nil {
		return err
	}
	c.noteGrowth(parts) // a key's records may be somebody else's now
	if c.owned.Err() != nil {
		return context.Cause(c.owned)
	}
	resp, err := req.RequestWith(ctx, c.kafka)
	if err == nil {
		err = kerr.ErrorForCode(resp.ErrorCode)
	}
	switch {
	case err == nil, errors.Is(err, kerr.RebalanceInProgress), errors.Is(err, kerr.IllegalGeneration): // a member all the same
		return nil
	case errors.Is(err, kerr.UnknownMemberID):
		c.abandon(errGivenUp)
		return errGivenUp
	default:
		return fmt.Errorf("ask Kafka whether this instance is still in the consumer group: %w", err)
	}
}

// commit sees to it that of each partition at most so many records may be committed and are not. Else whoever owns it
// next would not look at the oldest of them.
func (c *consumer) commit(ctx context.Context, most int) error {
	var uncommitted int64
	done := c.kafka.CommittedOffsets()[c.topic]
	for p, o := range c.kafka.MarkedOffsets()[c.topic] {
		uncommitted = max(uncommitted, o.Offset-done[p].Offset)
	}
	if uncommitted <= int64(most) { // Fast path: it is committed every commitInterval
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, commitTimeout)
	defer cancel()
	return c.kafka.CommitMarkedOffsets(ctx)
}

func (c *consumer) forget(lost []int32) {
	if len(lost) == 0 {
		return
	}
	for _, p := range lost {
		delete(c.passed, p)
		c.worker(p).drop(p)
	}
	slog.Info("partitions revoked", "count", len(lost), "all", c.assigned.Add(-int64(len(lost))))
}
