// Kafka: how clients reach the brokers, what every producer has in common, and the topics.
//
// kafka.go owns the options that all clients share, and the headers of records, and knows which of Kafka's errors no retry cures.

package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strconv"
	"time"

	"github.com/twmb/franz-go/pkg/kadm"
	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/kmsg"
	"github.com/twmb/franz-go/pkg/sasl/oauth"
	"github.com/twmb/franz-go/pkg/sasl/plain"
	"github.com/twmb/franz-go/pkg/sasl/scram"

	"github.com/event-ingestion/event-ingestion/internal/batches"
	"github.com/event-ingestion/event-ingestion/internal/troubles"
)

const (
	// dlqPartitions are for a few dead letters.
	dlqPartitions = 5
	// sampleInterval is how often the watermark moves, and about how far it is behind at best.
	sampleInterval = 250 * time.Millisecond
)

// minEventBytes is about the smallest body of an event: the byte budget divided by it bounds the number of records.
const minEventBytes = 64

// newKafka returns a client; all clients of the program reach the brokers this way, and no batch that they read takes more memory
// than a quarter of CONSUME_MEMORY.
func newKafka(cfg *settings, clientID string, opts ...kgo.Opt) (*kgo.Client, error) {
	bounded, err := batches.NewDecompressor(cfg.consumeMemory)
	if err != nil {
		return nil, err
	}
	all := []kgo.Opt{kgo.SeedBrokers(cfg.kafkaBrokers...), kgo.ClientID(clientID), kgo.WithDecompressor(bounded)}
	if cfg.kafkaTLS {
		config := &tls.Config{RootCAs: cfg.kafkaCA}
		if cfg.kafkaCertFile != "" {
			config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return readPair(cfg) } // a short-lived one is renewed
			if _, err := readPair(cfg); err != nil {
				return nil, err
			}
		}
		all = append(all, kgo.DialTLSConfig(config))
	}
	switch login := (scram.Auth{User: cfg.kafkaUsername, Pass: cfg.kafkaPassword}); cfg.kafkaSASL {
	case "PLAIN":
		all = append(all, kgo.SASL(plain.Auth{User: login.User, Pass: login.Pass}.AsMechanism()))
	case "SCRAM-SHA-256":
		all = append(all, kgo.SASL(login.AsSha256Mechanism()))
	case "SCRAM-SHA-512":
		all = append(all, kgo.SASL(login.AsSha512Mechanism()))
	case "OAUTHBEARER":
		all = append(all, kgo.SASL(oauth.Oauth(func(ctx context.Context) (auth oauth.Auth, err error) { // at each login: a token ends
			auth.Token, err = cfg.kafkaTokens.Get(ctx)
			auth.Extensions = cfg.kafkaExtensions
			return auth, err
		})))
	}
	return kgo.NewClient(append(all, opts...)...)
}

// readPair reads the certificate that this program shows the brokers.
func readPair(cfg *settings) (*tls.Certificate, error) {
	pair, err := tls.LoadX509KeyPair(cfg.kafkaCertFile, cfg.kafkaKeyFile)
	if err != nil {
		err = fmt.Errorf("load the certificate for the brokers (KAFKA_TLS_CERT_FILE, KAFKA_TLS_KEY_FILE): %w", err)
	}
	return &pair, err
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
		kgo.MaxBufferedRecords(int(min(cfg.maxInFlightBytes/minEventBytes, 1<<30))), // never reached: the byte budget is full first
		kgo.RecordDeliveryTimeout(cfg.ackTimeout),
		kgo.ProduceRequestTimeout(cfg.ackTimeout),
		kgo.MetadataMinAge(sampleInterval), // the watermark waits for new partitions to be known; 5 s by default
		kgo.UnknownTopicRetries(-1),        // topics are created at start, possibly after the first request
	}, more...)...)
}

const (
	// commitInterval bounds what a crash makes the next owner read again.
	commitInterval = 250 * time.Millisecond
	// failedPollPause is for a poll that fails at once.
	failedPollPause = 100 * time.Millisecond
)

// newGroupClient returns a client that reads a topic in a group, with the same suffix to the names of both, and commits what is
// marked. A rebalance waits from each poll to AllowRebalance.
func newGroupClient(cfg *settings, clientID, suffix string, more ...kgo.Opt) (*kgo.Client, error) {
	return newKafka(cfg, clientID, append([]kgo.Opt{
		kgo.ConsumerGroup(cfg.kafkaGroup + suffix),
		kgo.ConsumeTopics(cfg.kafkaTopic + suffix),
		kgo.ConsumeResetOffset(kgo.NewOffset().AtStart()),
		kgo.Balancers(kgo.CooperativeStickyBalancer()),
		kgo.SessionTimeout(cfg.kafkaSession),
		kgo.HeartbeatInterval(cfg.kafkaSession / 4),
		kgo.BlockRebalanceOnPoll(),
		kgo.KeepControlRecords(), // the end of a transaction takes an offset: without it nothing would be done up to the end
		kgo.FetchIsolationLevel(kgo.ReadCommitted()),
		kgo.AutoCommitMarks(),
		kgo.AutoCommitInterval(commitInterval),
	}, more...)...)
}

// errAhead is what a batch gets for which there is no room at the moment: the client fetches it again.
var errAhead = errors.New("as much is decompressed as there is room for")

// poll waits for records for that long, and tells failed of every error but those of batches. Where nothing but errors comes, which may come at once,
// it takes a moment.
func poll(ctx context.Context, kafka *kgo.Client, most int, wait time.Duration, failed func(error)) kgo.Fetches {
	waiting, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	fetches, failing := kafka.PollRecords(waiting, most), false
	fetches.EachError(func(_ string, _ int32, err error) {
		if !errors.Is(err, context.DeadlineExceeded) && !errors.Is(err, errAhead) && !errors.Is(err, kgo.ErrMaxDecompress) && ctx.Err() == nil {
			failing = true
			failed(err)
		}
	})
	if failing && fetches.NumRecords() == 0 {
		troubles.Sleep(waiting, failedPollPause)
	}
	return fetches
}

// leaveAtLeast is how long the group has to answer a goodbye, even when the rest took all the time.
const leaveAtLeast = 500 * time.Millisecond

// leave closes a client that consumes in a group. It waits for the group until ctx's deadline, and for leaveAtLeast: a broker
// that does not answer would hold it up for a minute.
func leave(ctx context.Context, kafka *kgo.Client) {
	leaving, giveUp := endsBy(ctx, leaveAtLeast)
	defer giveUp()
	left := make(chan struct{})
	go func() { // ends when the group has answered, or some time after giveUp
		defer close(left)
		kafka.AllowRebalance()
		kafka.LeaveGroupContext(leaving)
		kafka.Close()
	}()
	select {
	case <-left:
	case <-leaving.Done():
		slog.Warn("the consumer group was not left in time; it gives the partitions to others after KAFKA_SESSION_TIMEOUT")
	}
}

// endsBy returns a context that ends at ctx's deadline, whatever becomes of ctx, but not sooner than in d.
func endsBy(ctx context.Context, d time.Duration) (context.Context, context.CancelFunc) {
	by, _ := ctx.Deadline()
	if soon := time.Now().Add(d); by.Before(soon) {
		by = soon
	}
	return context.WithDeadline(context.Background(), by)
}

// hopeless are Kafka's errors that no retry cures: these settings do not work with these brokers.
var hopeless = []error{
	kerr.InvalidSessionTimeout, kerr.InvalidGroupID, kerr.SaslAuthenticationFailed, kerr.UnsupportedSaslMechanism, kerr.IllegalSaslState,
	kerr.ClusterAuthorizationFailed, kerr.TopicAuthorizationFailed, kerr.GroupAuthorizationFailed,
	kerr.InvalidConfig, kerr.InvalidTopicException, kerr.InvalidPartitions, kerr.PolicyViolation,
}

func kafkaIsHopeless(err error) bool {
	return slices.ContainsFunc(hopeless, func(h error) bool { return errors.Is(err, h) })
}

// allOf is what kadm was told, and the first error, if only of one partition, topic or group.
func allOf[T interface{ Error() error }](answer T, err error) (T, error) {
	if err == nil {
		err = answer.Error()
	}
	return answer, err
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
		_, refused := admin.CreateTopic(ctx, int32(t.partitions), int16(cfg.kafkaReplication), map[string]*string{"min.insync.replicas": &minISR}, t.name)
		n := t.partitions
		switch {
		case refused == nil:
			slog.Info("topic created", "topic", t.name, "partitions", t.partitions)
		case errors.Is(refused, kerr.TopicAlreadyExists), errors.Is(refused, kerr.TopicAuthorizationFailed), errors.Is(refused, kerr.ClusterAuthorizationFailed):
			details, err := allOf(admin.ListTopics(ctx, t.name))
			if errors.Is(err, kerr.UnknownTopicOrPartition) { // a user that may not create topics need not when they exist
				err = refused
			}
			if err != nil {
				return 0, fmt.Errorf("find or create topic %s: %w", t.name, err)
			}
			n = len(details[t.name].Partitions)
		default:
			return 0, fmt.Errorf("create topic %s: %w", t.name, refused)
		}
		if n != t.partitions {
			slog.Warn("topic has another number of partitions than the settings say; it is used as it is", "topic", t.name, "partitions", n, "settings", t.partitions)
		}
		if t.name == cfg.kafkaTopic {
			partitions = n
		}
	}
	return partitions, nil
}

// partitionsOf asks how many partitions a topic has at this moment: what a client knows may be seconds old.
func partitionsOf(ctx context.Context, kafka *kgo.Client, topic string) (int, error) {
	req, asked := kmsg.NewPtrMetadataRequest(), kmsg.NewMetadataRequestTopic()
	asked.Topic = &topic
	req.Topics = append(req.Topics, asked)
	resp, err := req.RequestWith(ctx, kafka)
	if err == nil && len(resp.Topics) != 1 {
		err = errors.New("no answer about it")
	}
	if err == nil {
		err = kerr.ErrorForCode(resp.Topics[0].ErrorCode)
	}
	if err != nil {
		return 0, fmt.Errorf("ask Kafka for the partitions of topic %s: %w", topic, err)
	}
	return len(resp.Topics[0].Partitions), nil
}

const (
	// topicsEvery is the time between two looks at the topics, and missedLooks how many in a row have to miss one.
	topicsEvery = 2 * time.Second
	missedLooks = 5
)

// awaitDeletion returns when one of the three topics has been deleted, also when there is another one of its name: the clients go
// on asking for the old one, whose records are gone. nil when ctx is done first.
func awaitDeletion(ctx context.Context, kafka *kgo.Client, topic string) error {
	admin, ids := kadm.NewClient(kafka), map[string]kadm.TopicID{}
	for missed := 0; troubles.Sleep(ctx, topicsEvery) == nil; {
		details, err := allOf(admin.ListTopics(ctx, topic, topic+".retry", topic+".dlq"))
		if missed++; !errors.Is(err, kerr.UnknownTopicOrPartition) {
			missed = 0
		}
		if missed == missedLooks {
			return fmt.Errorf("a topic was deleted: %w", err)
		}
		for name, t := range details {
			if before, known := ids[name]; known && err == nil && t.ID != before {
				return fmt.Errorf("topic %s was deleted and made again", name)
			} else if err == nil {
				ids[name] = t.ID
			}
		}
	}
	return nil
}

// committedOffsets returns the group's committed offsets of a topic, by partition: 0 where there is none.
func committedOffsets(ctx context.Context, admin *kadm.Client, topic, group string) ([]int64, error) {
	fetched, err := admin.FetchOffsetsForTopics(ctx, group, topic)
	if err != nil && !errors.Is(err, kerr.GroupIDNotFound) { // nobody has joined yet: nothing is committed
		return nil, err
	}
	offsets := make([]int64, len(fetched[topic]))
	for p, o := range fetched[topic] {
		if int(p) < len(offsets) && o.Err == nil {
			offsets[p] = max(0, o.At)
		}
	}
	return offsets, nil
}

// offsetsOf returns what was listed of one topic, by partition.
func offsetsOf(listed kadm.ListedOffsets, err error) ([]int64, error) {
	if listed, err = allOf(listed, err); err != nil {
		return nil, err
	}
	var offsets []int64
	for _, partitions := range listed {
		offsets = make([]int64, len(partitions))
		for p, o := range partitions {
			if int(p) >= len(offsets) {
				return nil, fmt.Errorf("partition %d is listed, those before it are not", p)
			}
			offsets[p] = o.Offset
		}
	}
	return offsets, nil
}

// recordBytes is about what a record takes in a batch.
func recordBytes(rec *kgo.Record) int {
	n := 64 + len(rec.Key) + len(rec.Value)
	for _, h := range rec.Headers {
		n += len(h.Key) + len(h.Value) + 8
	}
	return n
}

// header is the value of a record's header, empty without it.
func header(rec *kgo.Record, key string) string {
	for i := range rec.Headers {
		if rec.Headers[i].Key == key {
			return string(rec.Headers[i].Value)
		}
	}
	return ""
}

// setHeaders sets or adds headers: key and value, in turns.
func setHeaders(headers []kgo.RecordHeader, pairs ...string) []kgo.RecordHeader {
	for pair := range slices.Chunk(pairs, 2) {
		i := slices.IndexFunc(headers, func(h kgo.RecordHeader) bool { return h.Key == pair[0] })
		if i < 0 {
			i, headers = len(headers), append(headers, kgo.RecordHeader{Key: pair[0]})
		}
		headers[i].Value = []byte(pair[1])
	}
	return headers
}

func rfc3339Now() string { return time.Now().UTC().Format(time.RFC3339) }

const (
	// firstDelay is the wait before the first retry; each further one is twice as long, up to maxDelay.
	firstDelay = 2 * time.Second
	maxDelay   = 60 * time.Second
	// maxErrorMessage bounds the header error_message, in bytes.
	maxErrorMessage = 500
)

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

// failureHeaders returns rec's headers with what went wrong. Where it came from and when it first failed stay as first set.
func failureHeaders(rec *kgo.Record, retries int, errorType, message string) []kgo.RecordHeader {
	headers := slices.Clone(rec.Headers)
	if header(rec, "original_topic") == "" {
		headers = setHeaders(headers, "original_topic", rec.Topic, "original_partition", strconv.Itoa(int(rec.Partition)),
			"original_offset", strconv.FormatInt(rec.Offset, 10), "failed_at", rfc3339Now())
	}
	return setHeaders(headers, "retry_count", strconv.Itoa(retries), "error_type", errorType,
		"error_message", message[:min(len(message), maxErrorMessage)], "last_retry_at", rfc3339Now())
}
