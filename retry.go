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
	// maxTruncated is what is left of a value that the brokers do not take again: below every broker's default limit.
	maxTruncated = 512 << 10
)

// sideways moves records off the main way: to the retry topic, to the dead letters, back to the main topic. It has a
// client of its own: a record can be as large as any that another producer got onto the topic, while the API's batches
// stay below the brokers' default limit of 1 MB.
type sideways struct {
	kafka       *kgo.Client
	topic       string
	maxAttempts int
	stats       *sidewaysStats
}

func newSideways(cfg *settings, stats *sidewaysStats) (*sideways, error) {
	byHand := kgo.BasicConsistentPartitioner(func(topic string) func(*kgo.Record, int) int {
		byKey := kgo.StickyKeyPartitioner(nil).ForTopic(topic)
		return func(r *kgo.Record, n int) int {
			if topic == cfg.kafkaTopic+".retry" {
				return int(r.Partition) % n
			}
			return byKey.Partition(r, n)
		}
	})
	kafka, err := newProducer(cfg, kgo.ProducerBatchMaxBytes(90<<20), kgo.ProducerLinger(0), kgo.RecordPartitioner(byHand))
	return &sideways{kafka: kafka, topic: cfg.kafkaTopic, maxAttempts: cfg.maxRetryAttempts, stats: stats}, err
}

// deadLetter gives rec up. It returns true when that is acknowledged by all in-sync replicas, and tries until then;
// false means that stopped said to end, with nothing lost: the record's offset is not committed.
func (s *sideways) deadLetter(rec *kgo.Record, errorType, message string, stopped func() bool) bool {
	retries := retryCount(rec)
	letter := &kgo.Record{Topic: s.topic + ".dlq", Key: rec.Key, Value: rec.Value, Headers: failureHeaders(rec, retries, errorType, message)}
	letter.Headers = setHeader(letter.Headers, "final_retry_count", strconv.Itoa(retries))
	letter.Headers = setHeader(letter.Headers, "sent_to_dlq_at", rfc3339Now())
	if !s.produce(letter, stopped) {
		return false
	}
	s.stats.dead(errorType)
	slog.Warn("record sent to the dead letters", "topic", rec.Topic, "partition", rec.Partition, "offset", rec.Offset, "type", errorType, "error", message)
	return true
}

// retry puts off a record that ClickHouse rejected, or gives it up after the last attempt; the result is deadLetter's.
func (s *sideways) retry(rec *kgo.Record, message string, stopped func() bool) bool {
	attempt := retryCount(rec) + 1
	if attempt > s.maxAttempts {
		return s.deadLetter(rec, errorExhausted, message, stopped)
	}
	again := &kgo.Record{Topic: s.topic + ".retry", Key: rec.Key, Value: rec.Value, Headers: failureHeaders(rec, attempt, errorInsertFailed, message)}
	again.Partition = int32(min(attempt-1, retryPartitions/delayPartitions-1)*delayPartitions + int(rec.Offset)%delayPartitions)
	if !s.produce(again, stopped) {
		return false
	}
	s.stats.retried.Inc()
	return true
}

// reroute puts a record back on its topic under another key; the result is deadLetter's.
func (s *sideways) reroute(rec *kgo.Record, key []byte, stopped func() bool) bool {
	return s.produce(&kgo.Record{Topic: s.topic, Key: key, Value: rec.Value, Headers: rec.Headers}, stopped)
}

func (s *sideways) produce(rec *kgo.Record, stopped func() bool) bool {
	for pause := minBackoff; ; pause = min(2*pause, maxBackoff) {
		err := s.kafka.ProduceSync(context.Background(), rec).FirstErr()
		if err == nil {
			return true
		}
		if errors.Is(err, kerr.MessageTooLarge) && len(rec.Value) > maxTruncated && rec.Topic == s.topic+".dlq" {
			rec.Headers = setHeader(rec.Headers, "value_truncated_from", strconv.Itoa(len(rec.Value)))
			rec.Value = rec.Value[:maxTruncated]
			continue
		}
		if stopped() {
			return false
		}
		slog.Error("record not acknowledged, will try again; its partition waits", "topic", rec.Topic, "in", pause, "error", err)
		time.Sleep(pause)
	}
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

// retryWorker reads events.retry and puts each record back on the main topic when it is due.
type retryWorker struct {
	kafka    *kgo.Client
	sideways *sideways
	waiting  map[int32][]*kgo.Record // by partition; only run and the group's callbacks inside its polls touch it
}

func newRetryWorker(cfg *settings, s *sideways) (*retryWorker, error) {
	w := &retryWorker{sideways: s, waiting: map[int32][]*kgo.Record{}}
	forget := func(_ context.Context, _ *kgo.Client, topics map[string][]int32) {
		for _, p := range topics[cfg.kafkaTopic+".retry"] {
			delete(w.waiting, p) // not committed: the next owner reads them
		}
	}
	var err error
	w.kafka, err = newKafka(cfg, "event-ingestion-retry",
		kgo.ConsumerGroup(cfg.kafkaGroup+".retry"),
		kgo.ConsumeTopics(cfg.kafkaTopic+".retry"),
		kgo.ConsumeResetOffset(kgo.NewOffset().AtStart()),
		kgo.SessionTimeout(cfg.kafkaSession),
		kgo.HeartbeatInterval(cfg.kafkaSession/4),
		kgo.BlockRebalanceOnPoll(),
		kgo.AutoCommitMarks(),
		kgo.AutoCommitInterval(commitInterval),
		kgo.OnPartitionsRevoked(func(ctx context.Context, c *kgo.Client, topics map[string][]int32) {
			c.CommitMarkedOffsets(ctx) // what fails is done twice, which the dedupe sees
			forget(ctx, c, topics)
		}),
		kgo.OnPartitionsLost(forget),
	)
	return w, err
}

const (
	// maxWaiting bounds the records that wait in memory; the rest wait on Kafka.
	maxWaiting = 10_000
	// retryTick is how exactly a delay is kept.
	retryTick = 100 * time.Millisecond
)

// run works until ctx is done.
func (w *retryWorker) run(ctx context.Context) {
	defer w.kafka.CloseAllowingRebalance()
	for ctx.Err() == nil {
		held := 0
		for _, records := range w.waiting {
			held += len(records)
		}
		poll, cancel := context.WithTimeout(ctx, retryTick)
		if held < maxWaiting {
			w.kafka.PollRecords(poll, maxWaiting-held).EachRecord(func(r *kgo.Record) {
				w.waiting[r.Partition] = append(w.waiting[r.Partition], r)
			})
		} else {
			<-poll.Done()
		}
		cancel()
		for p, records := range w.waiting {
			w.waiting[p] = w.putBack(ctx, records)
		}
		w.kafka.AllowRebalance()
	}
	w.kafka.CommitMarkedOffsets(context.Background())
}

// putBack sends the due ones of a partition's records home and returns the rest.
func (w *retryWorker) putBack(ctx context.Context, records []*kgo.Record) []*kgo.Record {
	for len(records) > 0 && ctx.Err() == nil {
		rec := records[0]
		if time.Until(rec.Timestamp.Add(delayOf(retryCount(rec)))) > 0 {
			break
		}
		if !w.sideways.reroute(rec, rec.Key, func() bool { return ctx.Err() != nil }) {
			break
		}
		w.kafka.MarkCommitRecords(rec)
		records = records[1:]
	}
	return records
}
