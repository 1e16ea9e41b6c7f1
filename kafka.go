// Kafka beside the path of an event: the producer's options, the topics, and how far the group has come.
//
// kafka.go owns the freshness watermark: it samples the ends of the topic and the group's committed offsets, and so
// knows a moment up to which everything acknowledged is stored, whoever of the copies stored it.

package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync/atomic"
	"time"

	"github.com/twmb/franz-go/pkg/kadm"
	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/sasl/plain"
	"github.com/twmb/franz-go/pkg/sasl/scram"
)

// Partitions of the side topics: two for each of the five retry delays, and a few for what is given up.
const (
	retryPartitions = 10
	dlqPartitions   = 5
)

// minEventBytes is about the smallest body of an event: what the byte budget allows bounds the records by it.
const minEventBytes = 64

// newKafka returns a client; every one of the program reaches the brokers like this.
func newKafka(cfg *settings, clientID string, opts ...kgo.Opt) (*kgo.Client, error) {
	all := []kgo.Opt{kgo.SeedBrokers(cfg.kafkaBrokers...), kgo.ClientID(clientID)}
	if cfg.kafkaTLS {
		all = append(all, kgo.DialTLSConfig(&tls.Config{RootCAs: cfg.kafkaCA}))
	}
	switch login := (scram.Auth{User: cfg.kafkaUsername, Pass: cfg.kafkaPassword}); cfg.kafkaSASL {
	case "PLAIN":
		all = append(all, kgo.SASL(plain.Auth{User: login.User, Pass: login.Pass}.AsMechanism()))
	case "SCRAM-SHA-256":
		all = append(all, kgo.SASL(login.AsSha256Mechanism()))
	case "SCRAM-SHA-512":
		all = append(all, kgo.SASL(login.AsSha512Mechanism()))
	}
	return kgo.NewClient(append(all, opts...)...)
}

// newProducer returns a client to produce with. acks=all and idempotence are franz-go's defaults, and required here:
// 202 means that all in-sync replicas have the event. Later options override the ones given here.
func newProducer(cfg *settings, more ...kgo.Opt) (*kgo.Client, error) {
	codec := map[string]kgo.CompressionCodec{
		"none": kgo.NoCompression(), "snappy": kgo.SnappyCompression(), "lz4": kgo.Lz4Compression(), "zstd": kgo.ZstdCompression(),
	}[cfg.kafkaCompression]
	return newKafka(cfg, "event-ingestion", append([]kgo.Opt{
		kgo.RequiredAcks(kgo.AllISRAcks()),
		kgo.RecordPartitioner(kgo.StickyKeyPartitioner(nil)), // murmur2 of the key, as every Kafka client computes it
		kgo.ProducerBatchCompression(codec),
		kgo.ProducerLinger(cfg.kafkaLinger),
		kgo.MaxBufferedRecords(int(min(cfg.maxInFlightBytes/minEventBytes, 1<<30))), // never reached: the byte budget is
		kgo.RecordDeliveryTimeout(cfg.ackTimeout),
		kgo.ProduceRequestTimeout(cfg.ackTimeout),
		kgo.UnknownTopicRetries(-1), // topics are created at start, possibly after the first request
	}, more...)...)
}

// ensureTopics creates the topics that are missing and reports one whose partitions differ from the settings. It
// returns the number of partitions that the main topic has.
func ensureTopics(ctx context.Context, kafka *kgo.Client, cfg *settings) (partitions int, err error) {
	admin := kadm.NewClient(kafka)
	minISR := fmt.Sprint(cfg.kafkaMinISR)
	for _, t := range []struct {
		name       string
		partitions int
	}{
		{cfg.kafkaTopic, cfg.kafkaPartitions},
		{cfg.kafkaTopic + ".retry", retryPartitions},
		{cfg.kafkaTopic + ".dlq", dlqPartitions},
	} {
		_, err = admin.CreateTopic(ctx, int32(t.partitions), int16(cfg.kafkaReplication), map[string]*string{"min.insync.replicas": &minISR}, t.name)
		if err == nil {
			slog.Info("topic created", "topic", t.name, "partitions", t.partitions)
			if t.name == cfg.kafkaTopic {
				partitions = t.partitions
			}
			continue
		}
		if !errors.Is(err, kerr.TopicAlreadyExists) {
			return 0, fmt.Errorf("create topic %s: %w", t.name, err)
		}
		details, err := admin.ListTopics(ctx, t.name)
		if err == nil {
			err = details.Error()
		}
		if err != nil {
			return 0, fmt.Errorf("describe topic %s: %w", t.name, err)
		}
		n := len(details[t.name].Partitions)
		if n != t.partitions {
			slog.Warn("topic has another number of partitions than the settings say; it is used as it is", "topic", t.name, "partitions", n, "settings", t.partitions)
		}
		if t.name == cfg.kafkaTopic {
			partitions = n
		}
	}
	return partitions, nil
}

const (
	// sampleInterval is how often the watermark moves, and about how far it is behind at best.
	sampleInterval = 250 * time.Millisecond
	// maxSamples is an hour of samples a second apart; a lag beyond that keeps the watermark where it is.
	maxSamples = 3600
)

// watermark knows the newest moment up to which everything that Kafka acknowledged is stored in ClickHouse, and how
// many records are not.
type watermark struct {
	admin        *kadm.Client
	topic, group string
	through      atomic.Int64 // Unix seconds, 0 while unknown
	samples      []sample     // oldest first; only run touches it, and what follows
	retryEnds    []int64
	hold         holdPhase
	putBack      []int64 // ends of the topic when all that waited on the retry topic was back on it
	lags         atomic.Pointer[[]int64]
}

// partitionLags is the lag of each partition, nil while unknown.
func (w *watermark) partitionLags() []int64 {
	if lags := w.lags.Load(); lags != nil {
		return *lags
	}
	return nil
}

// holdPhase is how far the records are that ClickHouse rejected: they are acknowledged and not counted, so the watermark
// stays where it is until they are stored or given up.
type holdPhase int

const (
	holdNone    holdPhase = iota
	holdWaiting           // there are records on the retry topic, or there were since the last look
	holdEmptied           // there are none any more: what the next look finds as the topic's ends is behind all of them
	holdStoring           // putBack is known, and not stored yet
)

// sample is where the partitions ended at a moment.
type sample struct {
	at   time.Time
	ends []int64
}

func newWatermark(kafka *kgo.Client, cfg *settings) *watermark {
	return &watermark{admin: kadm.NewClient(kafka), topic: cfg.kafkaTopic, group: cfg.kafkaGroup}
}

// run samples until ctx is done.
func (w *watermark) run(ctx context.Context) {
	tick := time.NewTicker(sampleInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if err := w.sample(ctx); err != nil && ctx.Err() == nil {
			slog.Debug("watermark not sampled", "error", err)
		}
	}
}

func (w *watermark) sample(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	now := time.Now() // before the ends are read: what is acknowledged later is not covered
	ends, stored, err := w.offsets(ctx, w.topic, w.group)
	if err != nil {
		return err
	}
	retryEnds, retried, err := w.offsets(ctx, w.topic+".retry", w.group+".retry") // after stored: what was rejected is there
	if err != nil {
		return err
	}
	lags := make([]int64, len(ends))
	for p := range ends {
		lags[p] = max(0, ends[p]-stored[p])
	}
	w.lags.Store(&lags)
	w.holdFor(ends, stored, retryEnds, retried)
	if n := len(w.samples); n > 1 && w.samples[n-1].at.Sub(w.samples[n-2].at) < time.Second {
		w.samples = w.samples[:n-1] // a second apart, but for the newest
	}
	if len(w.samples) < maxSamples {
		w.samples = append(w.samples, sample{now, ends})
	}
	reached := 0
	for w.hold == holdNone && reached < len(w.samples) && covers(stored, w.samples[reached].ends) {
		w.through.Store(w.samples[reached].at.Unix() - 1) // the second of the sample itself is not over
		reached++
	}
	w.samples = append(w.samples[:0], w.samples[reached:]...)
	return nil
}

// offsets returns where the partitions of a topic end, and how far the group has committed them.
func (w *watermark) offsets(ctx context.Context, topic, group string) (ends, committed []int64, err error) {
	listed, err := w.admin.ListEndOffsets(ctx, topic)
	if err == nil {
		err = listed.Error()
	}
	if err != nil {
		return nil, nil, err
	}
	fetched, err := w.admin.FetchOffsetsForTopics(ctx, group, topic)
	if err != nil && !errors.Is(err, kerr.GroupIDNotFound) { // nobody has joined yet: nothing is committed
		return nil, nil, err
	}
	ends, committed = make([]int64, len(listed[topic])), make([]int64, len(listed[topic]))
	for p, o := range listed[topic] {
		ends[p] = o.Offset
		if c, ok := fetched.Lookup(topic, p); ok && c.Err == nil {
			committed[p] = max(0, c.At)
		}
	}
	return ends, committed, nil
}

// holdFor takes a look at the rejected records. A record goes to the retry topic before its offset is committed, and back
// before its offset there is.
func (w *watermark) holdFor(ends, stored, retryEnds, retried []int64) {
	if w.hold == holdEmptied {
		w.putBack, w.hold = ends, holdStoring
	}
	came := !slices.Equal(retryEnds, w.retryEnds)
	w.retryEnds = retryEnds
	switch {
	case came || !covers(retried, retryEnds):
		w.hold = holdWaiting
	case w.hold == holdWaiting:
		w.hold = holdEmptied
	case w.hold == holdStoring && covers(stored, w.putBack):
		w.hold = holdNone
	}
}

func covers(stored, ends []int64) bool {
	for p := range min(len(stored), len(ends)) {
		if stored[p] < ends[p] {
			return false
		}
	}
	return true
}
