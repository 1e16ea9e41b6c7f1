// What cannot be stored now, or never: events.retry and events.dlq.
//
// A row that ClickHouse rejects waits on events.retry, goes back to events when it is due, and after MAX_RETRY_ATTEMPTS
// to events.dlq; a record that is no event goes there at once. retry.go owns the headers of contract.md and the delays:
// two partitions a delay, so that nothing waits behind a longer one. Every move is acknowledged before the offset that
// it came from may be committed: a record is in at least one place, and the dedupe makes two of them one.

package main

import (
	"context"
	"errors"
	"log/slog"
	"strconv"
	"sync"
	"time"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kgo"
)

// The values of the header error_type.
const (
	errorUnmarshal    = "unmarshal_error"
	errorInsertFailed = "insert_failed"
	errorExhausted    = "max_retries_exhausted"
)

const (
	// firstDelay is the wait before the first retry; each further one is twice as long, up to maxDelay.
	firstDelay = 2 * time.Second
	maxDelay   = 60 * time.Second
	// delayPartitions is how many partitions of events.retry each delay has.
	delayPartitions = 2
	// maxErrorMessage bounds the header error_message, in bytes.
	maxErrorMessage = 500
	// maxSideways bounds what is sent at once, in bytes before compression: below every broker's default limit of a batch,
	// 1,048,588. A record that is larger goes alone.
	maxSideways = 900 << 10
	// stopTick is how soon a move that waits sees a stop, and ackGrace what an acknowledgement on its way has left then.
	stopTick = 50 * time.Millisecond
	ackGrace = 500 * time.Millisecond
	// maxTruncated is what is left of a value that the brokers do not take again: below every broker's default limit.
	maxTruncated = 512 << 10
)

// sideways moves records off the main way: to the retry topic, to the dead letters, back to the main topic. It has
// clients of its own: a record can be as large as any that another producer got onto the topic, and a batch of several
// has to stay below the brokers' default limit of 1 MB, or they refuse all of it.
type sideways struct {
	kafka       *kgo.Client // for records of up to maxSideways
	large       *kgo.Client // for larger ones, one at a time
	alone       sync.Mutex  // guards large: two at once could become one batch
	topic       string
	maxAttempts int
	stats       *sidewaysStats
}

func newSideways(cfg *settings, stats *sidewaysStats) (*sideways, error) {
	byHand := kgo.RecordPartitioner(kgo.BasicConsistentPartitioner(func(topic string) func(*kgo.Record, int) int {
		byKey := kgo.StickyKeyPartitioner(nil).ForTopic(topic)
		return func(r *kgo.Record, n int) int {
			if topic == cfg.kafkaTopic+".retry" {
				return int(r.Partition) % n
			}
			return byKey.Partition(r, n)
		}
	}))
	s := &sideways{topic: cfg.kafkaTopic, maxAttempts: cfg.maxRetryAttempts, stats: stats}
	var err error
	snappy := kgo.ProducerBatchCompression(kgo.SnappyCompression()) // whatever the setting: see retryFetch
	if s.kafka, err = newProducer(cfg, kgo.ProducerLinger(0), snappy, byHand); err != nil {
		return nil, err
	}
	s.large, err = newProducer(cfg, kgo.ProducerBatchMaxBytes(90<<20), kgo.ProducerLinger(0), snappy, byHand)
	return s, err
}

func (s *sideways) close() {
	s.kafka.Close()
	s.large.Close()
}

// refresh makes the clients look at the topics anew: they may have more partitions.
func (s *sideways) refresh() {
	s.kafka.ForceMetadataRefresh()
	s.large.ForceMetadataRefresh()
}

// deadLetter gives rec up. It returns true when that is acknowledged by all in-sync replicas, and tries until then;
// false means that stopped said to end, with nothing lost: the record's offset is not committed.
func (s *sideways) deadLetter(rec *kgo.Record, errorType, message string, stopped func() bool) bool {
	return s.produce([]*kgo.Record{s.letter(rec, retryCount(rec), errorType, message)}, stopped)
}

// retry puts off records that ClickHouse rejected, and gives those up that had their last attempt. Each has a count of
// its own. They are sent together, so that a round with a thousand bad rows waits for a few acknowledgements and not for
// a thousand; the result is deadLetter's, for all of them.
func (s *sideways) retry(recs []*kgo.Record, message string, stopped func() bool) bool {
	moved := make([]*kgo.Record, len(recs))
	for i, rec := range recs {
		attempt := retryCount(rec) + 1
		if attempt > s.maxAttempts {
			moved[i] = s.letter(rec, attempt-1, errorExhausted, message)
			continue
		}
		moved[i] = &kgo.Record{Topic: s.topic + ".retry", Key: rec.Key, Value: rec.Value, Headers: failureHeaders(rec, attempt, errorInsertFailed, message)}
		moved[i].Partition = int32(min(attempt-1, retryPartitions/delayPartitions-1)*delayPartitions + int(rec.Offset)%delayPartitions)
	}
	return s.produce(moved, stopped)
}

// reroute puts a record back on its topic under another key; the result is deadLetter's.
func (s *sideways) reroute(rec *kgo.Record, key []byte, stopped func() bool) bool {
	return s.produce([]*kgo.Record{{Topic: s.topic, Key: key, Value: rec.Value, Headers: rec.Headers}}, stopped)
}

// putBack puts records of the retry topic back on the main one, under their keys; the result is deadLetter's.
func (s *sideways) putBack(recs []*kgo.Record, stopped func() bool) bool {
	back := make([]*kgo.Record, len(recs))
	for i, rec := range recs {
		back[i] = &kgo.Record{Topic: s.topic, Key: rec.Key, Value: rec.Value, Headers: rec.Headers}
	}
	return s.produce(back, stopped)
}

// letter is rec as a dead letter.
func (s *sideways) letter(rec *kgo.Record, retries int, errorType, message string) *kgo.Record {
	headers := failureHeaders(rec, retries, errorType, message)
	headers = setHeader(headers, "final_retry_count", strconv.Itoa(retries))
	headers = setHeader(headers, "sent_to_dlq_at", rfc3339Now())
	return &kgo.Record{Topic: s.topic + ".dlq", Key: rec.Key, Value: rec.Value, Headers: headers}
}

// produce sends records and returns true when all are acknowledged. What is not is sent again, with a pause, until
// stopped says to end; then what is on its way has ackGrace left. It sends at most maxSideways bytes at once: franz-go
// makes one batch of what waits for a partition, and the brokers would refuse a larger one as a whole.
func (s *sideways) produce(recs []*kgo.Record, stopped func() bool) bool {
	for len(recs) > 0 {
		n, bytes := 0, 0
		for ; n < len(recs) && (n == 0 || bytes+recordBytes(recs[n]) <= maxSideways); n++ {
			bytes += recordBytes(recs[n])
		}
		if !s.produceAll(recs[:n:n], stopped) {
			return false
		}
		recs = recs[n:]
	}
	return true
}

// produceAll is produce for what can be sent at once.
func (s *sideways) produceAll(recs []*kgo.Record, stopped func() bool) bool {
	for pause := minBackoff; ; pause = min(2*pause, maxBackoff) {
		var done, failed, tooLarge []*kgo.Record
		var why error
		for _, result := range s.produceOnce(recs, stopped) {
			switch {
			case result.Err == nil:
				done = append(done, result.Record)
			case errors.Is(result.Err, kerr.MessageTooLarge):
				tooLarge = append(tooLarge, result.Record)
			default:
				failed, why = append(failed, result.Record), result.Err
			}
		}
		s.count(done)
		for _, rec := range tooLarge {
			if len(recs) == 1 { // else it may have been the batch
				smaller := s.shrink(rec)
				if smaller == nil {
					failed, why = append(failed, rec), kerr.MessageTooLarge
					break
				}
				rec = smaller
			}
			if !s.produceAll([]*kgo.Record{rec}, stopped) {
				return false
			}
		}
		if len(failed) == 0 {
			s.stats.troubles.clear(moveAside)
			return true
		}
		if stopped() {
			return false
		}
		recs = failed
		s.stats.troubles.note(moveAside, why)
		for end := time.Now().Add(pause); time.Now().Before(end) && !stopped(); {
			time.Sleep(min(stopTick, time.Until(end)))
		}
	}
}

// shrink makes something smaller of a record that the brokers do not take: a dead letter, and of that one the beginning, half
// as much each time. Nil when nothing is left to cut.
func (s *sideways) shrink(rec *kgo.Record) *kgo.Record {
	if rec.Topic != s.topic+".dlq" {
		return s.letter(rec, retryCount(rec), errorInsertFailed, "the brokers do not take the record: "+kerr.MessageTooLarge.Message)
	}
	if len(rec.Value) == 0 {
		return nil
	}
	if header(rec, "value_truncated_from") == "" {
		rec.Headers = setHeader(rec.Headers, "value_truncated_from", strconv.Itoa(len(rec.Value)))
	}
	for i := range rec.Headers { // another producer's can be of any size
		rec.Headers[i].Value = rec.Headers[i].Value[:min(len(rec.Headers[i].Value), maxErrorMessage)]
	}
	rec.Key = rec.Key[:min(len(rec.Key), maxErrorMessage)]
	rec.Value = rec.Value[:min(maxTruncated, len(rec.Value)/2)]
	return rec
}

// produceOnce is one attempt. Once stopped says to end, what has no answer after ackGrace has failed: franz-go would
// wait for a silent broker much longer.
func (s *sideways) produceOnce(recs []*kgo.Record, stopped func() bool) (all kgo.ProduceResults) {
	kafka := s.kafka
	if recordBytes(recs[0]) > maxSideways {
		s.alone.Lock()
		defer s.alone.Unlock()
		kafka = s.large
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel() // takes back what was not sent yet
	results := make(chan kgo.ProduceResult, len(recs))
	for _, rec := range recs {
		sent := &kgo.Record{Topic: rec.Topic, Partition: rec.Partition, Key: rec.Key, Value: rec.Value, Headers: rec.Headers}
		kafka.Produce(ctx, sent, func(_ *kgo.Record, err error) { results <- kgo.ProduceResult{Record: rec, Err: err} })
	}
	tick := time.NewTicker(stopTick)
	defer tick.Stop()
	var giveUp time.Time
	for len(all) < len(recs) {
		select {
		case result := <-results:
			all = append(all, result)
		case now := <-tick.C:
			if giveUp.IsZero() && stopped() {
				giveUp = now.Add(ackGrace)
			}
			if !giveUp.IsZero() && now.After(giveUp) {
				return append(all, kgo.ProduceResult{Record: recs[0], Err: errNoAnswer})
			}
		}
	}
	return all
}

// moveAside is what fails when Kafka does not acknowledge a record of the retry topic, of the dead letters, or put back.
const moveAside = "move records aside"

var errNoAnswer = errors.New("no answer from Kafka before the end")

// count counts the records that were moved, and tells of the dead letters among them: one line for all, with the first.
func (s *sideways) count(recs []*kgo.Record) {
	var first *kgo.Record
	dead := 0
	for _, rec := range recs {
		switch rec.Topic {
		case s.topic + ".retry":
			s.stats.retried.Inc()
		case s.topic + ".dlq":
			s.stats.dead(header(rec, "error_type"))
			if dead++; first == nil {
				first = rec
			}
		}
	}
	if first != nil {
		slog.Warn("sent to the dead letters", "records", dead, "topic", header(first, "original_topic"), "partition", header(first, "original_partition"),
			"offset", header(first, "original_offset"), "type", header(first, "error_type"), "error", header(first, "error_message"))
	}
}

// recordBytes is about what a record takes in a batch.
func recordBytes(rec *kgo.Record) int {
	n := 64 + len(rec.Key) + len(rec.Value)
	for _, h := range rec.Headers {
		n += len(h.Key) + len(h.Value) + 8
	}
	return n
}

// delayOf is how long the attempt-th retry waits.
func delayOf(attempt int) time.Duration {
	return min(firstDelay<<min(max(attempt-1, 0), 10), maxDelay)
}

// retryCount is how often a record has been put off; 0 without the header.
func retryCount(rec *kgo.Record) int {
	n, err := strconv.Atoi(header(rec, "retry_count"))
	if err != nil || n < 0 {
		return 0
	}
	return n
}

func header(rec *kgo.Record, key string) string {
	for i := range rec.Headers {
		if rec.Headers[i].Key == key {
			return string(rec.Headers[i].Value)
		}
	}
	return ""
}

// failureHeaders is rec's headers with what went wrong. Where it came from and when it first failed stay as they were
// set the first time.
func failureHeaders(rec *kgo.Record, retries int, errorType, message string) []kgo.RecordHeader {
	if len(message) > maxErrorMessage {
		message = message[:maxErrorMessage]
	}
	headers := append([]kgo.RecordHeader(nil), rec.Headers...)
	if header(rec, "original_topic") == "" {
		headers = setHeader(headers, "original_topic", rec.Topic)
		headers = setHeader(headers, "original_partition", strconv.Itoa(int(rec.Partition)))
		headers = setHeader(headers, "original_offset", strconv.FormatInt(rec.Offset, 10))
		headers = setHeader(headers, "failed_at", rfc3339Now())
	}
	headers = setHeader(headers, "retry_count", strconv.Itoa(retries))
	headers = setHeader(headers, "error_type", errorType)
	headers = setHeader(headers, "error_message", message)
	return setHeader(headers, "last_retry_at", rfc3339Now())
}

func setHeader(headers []kgo.RecordHeader, key, value string) []kgo.RecordHeader {
	for i := range headers {
		if headers[i].Key == key {
			headers[i].Value = []byte(value)
			return headers
		}
	}
	return append(headers, kgo.RecordHeader{Key: key, Value: []byte(value)})
}

func rfc3339Now() string { return time.Now().UTC().Format(time.RFC3339) }

// retryWorker reads events.retry and puts each record back on the main topic when it is due. Each partition has a waiter,
// so that nobody waits for another delay's records, and a rebalance for nobody. While a waiter has records the client
// fetches no more of its partition: a million waiting records are on Kafka, and at most a fetch of each partition is here.
type retryWorker struct {
	kafka    *kgo.Client
	sideways *sideways
	topic    string
	troubles *troubles
	failed   func(error)       // told what a poll says, each time
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
	// A fetch of a partition is at most retryFetch bytes, or one batch of sideways, compressed. Snappy makes at most 21
	// times as much of it: in the worst case 10 partitions hold 30 MB, and the client as much again.
	retryFetch = 128 << 10
	// putBackRecords bounds what is put back before the next commit, and with it how long a rebalance waits.
	putBackRecords = 500
	// retryTick is how exactly a delay is kept.
	retryTick = 100 * time.Millisecond
	// retryCommit bounds the commit when partitions leave; what is not committed is put back twice, which the dedupe sees.
	retryCommit = 5 * time.Second
)

func newRetryWorker(cfg *settings, s *sideways, failed func(error)) (*retryWorker, error) {
	w := &retryWorker{sideways: s, topic: cfg.kafkaTopic + ".retry", troubles: s.stats.troubles, failed: failed, waiters: map[int32]*waiter{}}
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
			case w.waiters[p.Partition].records <- p.Records: // at once: what was there before is put back
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

func (w *retryWorker) onAssigned(_ context.Context, _ *kgo.Client, topics map[string][]int32) {
	w.troubles.clear(readRetries)
	for _, p := range topics[w.topic] {
		a := &waiter{partition: p, records: make(chan []*kgo.Record, 1), done: make(chan struct{})}
		a.ctx, a.stop = context.WithCancel(context.Background())
		w.waiters[p] = a
		go w.wait(a) // ends with a.stop
	}
	w.kafka.ResumeFetchPartitions(topics) // they may have been paused when they left
}

// release ends the waiters of partitions that leave, and returns when none of them puts back or marks any more: what they
// hold is the next owner's. It says whether there were any.
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
	stopped := func() bool { return a.ctx.Err() != nil }
	for {
		var held []*kgo.Record
		select {
		case held = <-a.records:
		case <-a.ctx.Done():
			return
		}
		for len(held) > 0 {
			due := 0
			for due < min(len(held), putBackRecords) && time.Since(held[due].Timestamp) >= delayOf(retryCount(held[due])) {
				due++
			}
			if due > 0 {
				if !w.sideways.putBack(held[:due], stopped) {
					return
				}
				w.kafka.MarkCommitRecords(held[due-1])
				held = held[due:]
				continue
			}
			select {
			case <-time.After(max(retryTick, time.Until(held[0].Timestamp.Add(delayOf(retryCount(held[0])))))):
			case <-a.ctx.Done():
				return
			}
		}
		w.kafka.ResumeFetchPartitions(map[string][]int32{w.topic: {a.partition}})
	}
}
