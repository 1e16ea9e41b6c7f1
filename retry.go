// Off the main way: records that wait on events.retry, those that end on events.dlq, and rows of users who were erased.
//
// A row that ClickHouse rejects goes to the retry topic, and after MAX_RETRY_ATTEMPTS to the dead letters. A record that is no
// event goes to the dead letters at once. Retry workers put what waits back on events when it is due, under its own key, so
// that it meets its own worker and the dedupe. retry.go owns the headers of both topics and the choice of the retry partition:
// two partitions per delay, so that nothing waits behind a longer one. Every move is acknowledged before the offset that the
// record came from may be committed: a record is in at least one place, and the dedupe counts two copies once.

package main

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"strconv"
	"time"

	"github.com/ClickHouse/ch-go"
	"github.com/ClickHouse/ch-go/proto"
	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kgo"

	"github.com/event-ingestion/event-ingestion/internal/batches"
	"github.com/event-ingestion/event-ingestion/internal/questions"
)

const (
	// delayPartitions is how many partitions of events.retry each delay has.
	delayPartitions = 2
	// ackGrace is how long a pending acknowledgement may still take once the move has to end.
	ackGrace = 500 * time.Millisecond
	// maxCutValue bounds a value that the brokers refused: it is below every broker's default limit.
	maxCutValue = 512 << 10
)

// sideProducer moves records between topics.
type sideProducer struct {
	kafka       *kgo.Client
	topic       string
	maxAttempts int
	stats       *sideStats
}

// newSideProducer takes more options of its client: what is known of the batches that the topics take.
func newSideProducer(cfg *settings, stats *sideStats, more ...kgo.Opt) (*sideProducer, error) {
	partitioner := kgo.RecordPartitioner(kgo.BasicConsistentPartitioner(func(topic string) func(*kgo.Record, int) int {
		byKey := kgo.StickyKeyPartitioner(nil).ForTopic(topic)
		return func(r *kgo.Record, n int) int {
			if topic == cfg.kafkaTopic+".retry" {
				return int(r.Partition) % n
			}
			return byKey.Partition(r, n)
		}
	}))
	snappy := kgo.ProducerBatchCompression(kgo.SnappyCompression()) // whatever the setting: see retryFetch
	kafka, err := newProducer(cfg, append(more, kgo.ProducerLinger(0), snappy, partitioner)...)
	return &sideProducer{kafka: kafka, topic: cfg.kafkaTopic, maxAttempts: cfg.maxRetryAttempts, stats: stats}, err
}

func (s *sideProducer) close() { s.kafka.Close() }

// refresh makes the client look at the topics anew: they may have more partitions.
func (s *sideProducer) refresh() { s.kafka.ForceMetadataRefresh() }

// deadLetter gives up a record that is no event. It tries until all in-sync replicas have acknowledged the letter. The error is
// ctx's; nothing is lost then, because the record's offset is not committed.
func (s *sideProducer) deadLetter(ctx context.Context, rec *kgo.Record, why error) error {
	return s.produce(ctx, []*kgo.Record{s.letter(rec, retryCount(rec), errorUnmarshal, why.Error())})
}

// retry puts off records that ClickHouse rejected, and gives up those that had their last attempt. Each record has its own
// count. They are sent together, so that a round with a thousand bad rows waits for a few acknowledgements. The error is
// deadLetter's, for all of them.
func (s *sideProducer) retry(ctx context.Context, recs []*kgo.Record, message string) error {
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
	return s.produce(ctx, moved)
}

// requeue puts records on the main topic, under their keys, but for those that only say how a transaction ended, and those in place of
// a batch that cannot be taken in, which are dead letters. The error is deadLetter's.
func (s *sideProducer) requeue(ctx context.Context, recs []*kgo.Record) error {
	var back []*kgo.Record
	for _, rec := range recs {
		if why := whyPassedOver(rec); why != nil {
			back = append(back, s.letter(rec, retryCount(rec), errorUnmarshal, why.Error()))
		} else if !rec.Attrs.IsControl() {
			back = append(back, &kgo.Record{Topic: s.topic, Key: rec.Key, Value: rec.Value, Headers: rec.Headers})
		}
	}
	return s.produce(ctx, back)
}

// letter is rec as a dead letter.
func (s *sideProducer) letter(rec *kgo.Record, retries int, errorType, message string) *kgo.Record {
	headers := failureHeaders(rec, retries, errorType, message)
	headers = setHeaders(headers, "final_retry_count", strconv.Itoa(retries), "sent_to_dlq_at", rfc3339Now())
	return &kgo.Record{Topic: s.topic + ".dlq", Key: rec.Key, Value: rec.Value, Headers: headers}
}

// produce sends records and returns when all are acknowledged, or ctx is done. It retries what was not acknowledged, after a pause.
// Brokers refuse a whole batch for being too large, so each record of one is tried alone. One that is too large by itself, as another
// producer may have put it onto the topic, becomes a dead letter, cut until the brokers take it.
func (s *sideProducer) produce(ctx context.Context, recs []*kgo.Record) error {
	return s.stats.troubles.Until(ctx, "move records aside", func() error {
		var acked, refused, failed []*kgo.Record
		var why error
		for _, result := range s.produceOnce(ctx, recs) {
			switch {
			case result.Err == nil:
				acked = append(acked, result.Record)
			case errors.Is(result.Err, kerr.MessageTooLarge):
				refused = append(refused, result.Record)
			default:
				failed, why = append(failed, result.Record), result.Err
			}
		}
		s.count(acked)
		for _, rec := range refused {
			if len(recs) == 1 { // else it may have been the batch
				if rec = s.cutLetter(rec); rec == nil {
					return kerr.MessageTooLarge
				}
			}
			if err := s.produce(ctx, []*kgo.Record{rec}); err != nil {
				return err
			}
		}
		recs = failed
		return why
	})
}

// produceOnce is one attempt. Once ctx is done, a record without an answer after ackGrace has failed: franz-go would wait for
// a silent broker much longer.
func (s *sideProducer) produceOnce(ctx context.Context, recs []*kgo.Record) (all kgo.ProduceResults) {
	sending, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel() // takes back what was not sent yet
	results := make(chan kgo.ProduceResult, len(recs))
	for _, rec := range recs {
		sent := &kgo.Record{Topic: rec.Topic, Partition: rec.Partition, Key: rec.Key, Value: rec.Value, Headers: rec.Headers}
		s.kafka.Produce(sending, sent, func(_ *kgo.Record, err error) { results <- kgo.ProduceResult{Record: rec, Err: err} })
	}
	ended := ctx.Done()
	var giveUp <-chan time.Time
	for len(all) < len(recs) {
		select {
		case result := <-results:
			all = append(all, result)
		case <-ended:
			ended, giveUp = nil, time.After(ackGrace)
		case <-giveUp:
			return append(all, kgo.ProduceResult{Record: recs[0], Err: ctx.Err()})
		}
	}
	return all
}

// cutLetter is a record that the brokers refuse as a dead letter that they may take: without the second half of its value, each time,
// and with short headers and a short key, which another producer can have made of any size. It returns nil when nothing is left to cut.
func (s *sideProducer) cutLetter(rec *kgo.Record) *kgo.Record {
	if rec.Topic != s.topic+".dlq" {
		rec = s.letter(rec, retryCount(rec), errorInsertFailed, "the brokers do not take the record: "+kerr.MessageTooLarge.Message)
	} else if len(rec.Value) == 0 && header(rec, "value_truncated_from") != "" {
		return nil
	}
	if header(rec, "value_truncated_from") == "" {
		rec.Headers = setHeaders(rec.Headers, "value_truncated_from", strconv.Itoa(len(rec.Value)))
	}
	for i := range rec.Headers {
		rec.Headers[i].Value = rec.Headers[i].Value[:min(len(rec.Headers[i].Value), maxErrorMessage)]
	}
	rec.Key = rec.Key[:min(len(rec.Key), maxErrorMessage)]
	rec.Value = rec.Value[:min(maxCutValue, len(rec.Value)/2)]
	return rec
}

// count counts the records that were moved. The dead letters among them get one line in the log, about the first of them.
func (s *sideProducer) count(recs []*kgo.Record) {
	var dead []*kgo.Record
	for _, rec := range recs {
		switch rec.Topic {
		case s.topic + ".retry":
			s.stats.retried.Inc()
		case s.topic + ".dlq":
			s.stats.dead(header(rec, "error_type")).Inc()
			dead = append(dead, rec)
		}
	}
	if len(dead) > 0 {
		first := func(key string) string { return header(dead[0], key) }
		slog.Warn("sent to the dead letters", "records", len(dead), "topic", first("original_topic"), "partition", first("original_partition"),
			"offset", first("original_offset"), "type", first("error_type"), "error", first("error_message"))
	}
}

// passedOver is a record in place of a batch that cannot be taken in, with where it was in its headers; nil when err is no such thing.
// The client reads on in that partition only after skip.
func passedOver(cfg *settings, err error) *kgo.Record {
	e, is := errors.AsType[*kgo.ErrDecompressTooLarge](err)
	if !is {
		return nil
	}
	why := fmt.Errorf("the batch of the offsets %d to %d of partition %d of %s takes more than %d bytes (CONSUME_MEMORY), or cannot be decompressed",
		e.Offset, e.NextOffset-1, e.Partition, e.Topic, batches.Memory(cfg.consumeMemory))
	return &kgo.Record{
		Topic: e.Topic, Partition: e.Partition, Offset: e.NextOffset - 1, LeaderEpoch: e.Epoch, Timestamp: time.Now(),
		Headers: setHeaders(nil, "original_topic", e.Topic, "original_partition", strconv.Itoa(int(e.Partition)),
			"original_offset", strconv.FormatInt(e.Offset, 10), "failed_at", rfc3339Now()),
		Context: context.WithValue(context.Background(), batchLost{}, why),
	}
}

// batchLost is the key of why a batch was passed over, in its record's context.
type batchLost struct{}

// whyPassedOver is nil for a record that is in place of no batch.
func whyPassedOver(rec *kgo.Record) error {
	if rec.Context == nil {
		return nil
	}
	why, _ := rec.Context.Value(batchLost{}).(error)
	return why
}

// skip has a client read on behind passed records of a topic, by partition, of which the group knows that they are done; it takes them
// out of the map. It is called between a poll and AllowRebalance. Sooner the client would take for committed what is not.
func skip(kafka *kgo.Client, topic string, passed map[int32]*kgo.Record) {
	for p, rec := range passed {
		if kafka.CommittedOffsets()[topic][p].Offset > rec.Offset {
			kafka.SetOffsets(map[string]map[int32]kgo.EpochOffset{topic: {p: {Epoch: rec.LeaderEpoch, Offset: rec.Offset + 1}}})
			delete(passed, p)
		}
	}
}

// retryWorker is a member of the group that reads events.retry. It holds at most one fetch of each partition, and does not fetch
// a partition that it holds records of: no record waits for another delay's records, a million waiting records stay on Kafka,
// and a rebalance waits for none.
type retryWorker struct {
	cfg     *settings
	kafka   *kgo.Client
	side    *sideProducer
	topic   string
	failed  func(error)             // gets every error of a poll
	blocked chan struct{}           // a rebalance waits for AllowRebalance
	held    map[int32][]*kgo.Record // by partition, none empty; callbacks change it and passed, but not between a poll and AllowRebalance
	passed  map[int32]*kgo.Record   // in place of batches that cannot be taken in
}

const (
	// A fetch of a partition is at most retryFetch bytes, or one batch of sideProducer, compressed. Snappy expands at most 21
	// times: in the worst case 10 partitions hold 30 MB, and the client as much again.
	retryFetch = 128 << 10
	// retryTick is how exactly a delay is kept.
	retryTick = 100 * time.Millisecond
	// retryCommit bounds the commit when partitions leave. What is not committed is put back twice, which the dedupe catches.
	retryCommit = 5 * time.Second
)

func newRetryWorker(cfg *settings, side *sideProducer, failed func(error)) (*retryWorker, error) {
	w := &retryWorker{
		cfg: cfg, side: side, topic: cfg.kafkaTopic + ".retry", failed: failed, blocked: make(chan struct{}, 1),
		held: map[int32][]*kgo.Record{}, passed: map[int32]*kgo.Record{},
	}
	var err error
	w.kafka, err = newGroupClient(cfg, "event-ingestion-retry", ".retry",
		kgo.FetchMaxBytes(1<<20),
		kgo.FetchMaxPartitionBytes(retryFetch),
		kgo.OnPartitionsCallbackBlocked(func(context.Context, *kgo.Client) { notify(w.blocked, struct{}{}) }),
		kgo.OnPartitionsAssigned(func(_ context.Context, c *kgo.Client, topics map[string][]int32) {
			side.stats.troubles.Clear(readRetries)
			c.ResumeFetchPartitions(topics) // they may have been paused when they left
		}),
		kgo.OnPartitionsRevoked(func(ctx context.Context, c *kgo.Client, topics map[string][]int32) {
			if w.release(topics); len(topics[w.topic]) > 0 {
				ctx, cancel := context.WithTimeout(ctx, retryCommit)
				defer cancel()
				c.CommitMarkedOffsets(ctx)
			}
		}),
		kgo.OnPartitionsLost(func(_ context.Context, _ *kgo.Client, topics map[string][]int32) { w.release(topics) }),
	)
	return w, err
}

// release forgets what is held of partitions that leave: the next owner gets it.
func (w *retryWorker) release(topics map[string][]int32) {
	for _, p := range topics[w.topic] {
		delete(w.held, p)
		delete(w.passed, p)
	}
}

// run works until ctx is done, and leaves the group within the context that finish returns.
func (w *retryWorker) run(ctx context.Context, finish func() (context.Context, context.CancelFunc)) {
	for ctx.Err() == nil {
		poll(ctx, w.kafka, 0, retryTick, w.failed).EachPartition(func(p kgo.FetchTopicPartition) {
			records := p.Records
			if passed := passedOver(w.cfg, p.Err); passed != nil {
				records, w.passed[p.Partition] = append(records, passed), passed
			}
			if len(records) > 0 {
				w.side.stats.troubles.Clear(readRetries)
				now := time.Now()
				for _, rec := range records { // it ages by this clock from now on; one that comes from the future is new
					rec.Timestamp = now.Add(-max(0, now.Sub(rec.Timestamp)))
				}
				w.kafka.PauseFetchPartitions(map[string][]int32{w.topic: {p.Partition}})
				w.held[p.Partition] = append(w.held[p.Partition], records...)
			}
		})
		w.putBack(ctx)
		skip(w.kafka, w.topic, w.passed)
		w.kafka.AllowRebalance()
	}
	end, cancel := finish()
	defer cancel()
	leave(end, w.kafka)
}

// readRetries is what fails when a poll does.
const readRetries = "read the retry topic"

// putBack puts back what is due. When a rebalance wants to begin before all of it is acknowledged, it stays held, and is put back
// twice, which the dedupe catches.
func (w *retryWorker) putBack(ctx context.Context) {
	var due []*kgo.Record
	left := map[int32][]*kgo.Record{}
	for p, held := range w.held {
		n := 0
		for n < len(held) && time.Since(held[n].Timestamp) >= delayOf(retryCount(held[n])) {
			n++
		}
		due, left[p] = append(due, held[:n]...), held[n:]
	}
	if len(due) == 0 {
		return
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() { // ends with ctx
		select {
		case <-w.blocked:
			cancel()
		case <-ctx.Done():
		}
	}()
	if w.side.requeue(ctx, due) != nil {
		return
	}
	w.kafka.MarkCommitRecords(due...)
	for p, rest := range left {
		if w.held[p] = rest; len(rest) == 0 {
			delete(w.held, p)
			w.kafka.ResumeFetchPartitions(map[string][]int32{w.topic: {p}})
		}
	}
}

const (
	// erasuresPause is the least time between two looks at the table of erasures: 1 ms of ClickHouse's CPU a second.
	erasuresPause = time.Second
	// erasureDelay is how old a look may be when an insert begins: an erasure waits for so long, and for the inserts that run then.
	erasureDelay = 5 * time.Second
)

// erasures knows whose rows are not stored any more. Only the inserter's goroutine uses it.
type erasures struct {
	db      *clickhouse
	count   func(rows int)              // of those that were left out
	users   map[[sha256.Size]byte]int64 // the Unix second up to which, by the hash of user_id
	version uint64                      // names the rows of the table
	looked  time.Time                   // when version was asked for last
}

// look reads the table anew if it has changed since the last look, and that was erasuresPause ago.
func (e *erasures) look(ctx context.Context, a asker) error {
	now := time.Now()
	if now.Sub(e.looked) < erasuresPause {
		return nil
	}
	version, err := askNumber(ctx, a, ch.Query{Body: e.db.sql("SELECT count() + sumWithOverflow(cityHash64(user, up_to)) FROM {erasures}")})
	if err == nil && version != e.version {
		users := map[[sha256.Size]byte]int64{}
		var user proto.ColFixedStr32
		var upTo proto.ColUInt32
		err = a.Do(ctx, questions.EachRow(ch.Query{Body: e.db.sql("SELECT user, toUnixTimestamp(max(up_to)) FROM {erasures} GROUP BY user")},
			func(i int) { users[user[i]] = int64(upTo[i]) }, &user, &upTo))
		if err == nil {
			e.users, e.version = users, version
		}
	}
	if err == nil {
		e.looked = now
	}
	return err
}

// leaveOut looks, and takes the rows of erased users out of a round.
func (e *erasures) leaveOut(ctx context.Context, a asker, round []*block) error {
	if err := e.look(ctx, a); err != nil || len(e.users) == 0 { // Fast path
		return err
	}
	for _, b := range round {
		e.count(b.filter(func(row int) bool {
			upTo, erased := e.users[sha256.Sum256(b.userID.RowBytes(row))]
			return !erased || b.at(row) > upTo
		}))
	}
	return nil
}

var errErasures = errors.New("it is long ago that the erased users were looked at, and there are others now")

// check is for the moment in which an insert begins: the last look at the erased users is not too old, or would find no others. It
// takes a connection of its own, because the inserter's is in the middle of the insert.
func (e *erasures) check(ctx context.Context) error {
	if time.Since(e.looked) < erasureDelay { // Fast path
		return nil
	}
	before := e.version
	err := e.db.connected(func(conn asker) error { return e.look(ctx, conn) })
	if err == nil && e.version != before {
		return errErasures
	}
	return err
}
