// Dead letters: records that can never become rows, kept on events.dlq with what is wrong and where they came from.
//
// retry.go owns the headers of contract.md. A letter is sent before the record's offset may be committed, so a record
// is at least once in the dead letters or still on its topic, never in neither.

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
const errorUnmarshal = "unmarshal_error"

// maxErrorMessage bounds the header error_message, in bytes.
const maxErrorMessage = 500

// maxTruncated is what is left of a value that the brokers do not take again: below every broker's default limit.
const maxTruncated = 512 << 10

// deadLetters writes to TOPIC.dlq, through a client of its own: a letter can be as large as any record that another
// producer got onto the topic, while the API's batches stay below the brokers' default limit of 1 MB.
type deadLetters struct {
	kafka *kgo.Client
	topic string
}

func newDeadLetters(cfg *settings) (*deadLetters, error) {
	kafka, err := newProducer(cfg, kgo.ProducerBatchMaxBytes(90<<20), kgo.ProducerLinger(0))
	return &deadLetters{kafka: kafka, topic: cfg.kafkaTopic + ".dlq"}, err
}

// reroute puts a record back on its topic under another key; true when that is acknowledged, as for send.
func (d *deadLetters) reroute(rec *kgo.Record, key []byte, stopped func() bool) bool {
	again := &kgo.Record{Topic: rec.Topic, Key: key, Value: rec.Value, Headers: rec.Headers}
	for pause := minBackoff; ; pause = min(2*pause, maxBackoff) {
		err := d.kafka.ProduceSync(context.Background(), again).FirstErr()
		if err == nil || stopped() {
			return err == nil
		}
		slog.Error("record not put back under its own key, will try again; its partition waits", "partition", rec.Partition, "offset", rec.Offset, "in", pause, "error", err)
		time.Sleep(pause)
	}
}

// send returns true when the letter is acknowledged by all in-sync replicas. It tries until then; false means that
// stopped said to give up, with nothing lost: the record's offset is not committed.
func (d *deadLetters) send(rec *kgo.Record, errorType, message string, stopped func() bool) bool {
	letter := d.letter(rec, errorType, message, time.Now())
	for pause := minBackoff; ; pause = min(2*pause, maxBackoff) {
		err := d.kafka.ProduceSync(context.Background(), letter).FirstErr()
		if err == nil {
			slog.Warn("record sent to the dead letters", "topic", rec.Topic, "partition", rec.Partition, "offset", rec.Offset, "type", errorType, "error", message)
			return true
		}
		if errors.Is(err, kerr.MessageTooLarge) && len(letter.Value) > maxTruncated {
			letter.Value = letter.Value[:maxTruncated]
			letter.Headers = setHeader(letter.Headers, "value_truncated_from", strconv.Itoa(len(rec.Value)))
			continue
		}
		if stopped() {
			return false
		}
		slog.Error("dead letter not acknowledged, will try again; its partition waits", "partition", rec.Partition, "offset", rec.Offset, "in", pause, "error", err)
		time.Sleep(pause)
	}
}

// letter is rec's key and value unchanged, under headers that say why it is there. Headers that rec came with stay.
func (d *deadLetters) letter(rec *kgo.Record, errorType, message string, now time.Time) *kgo.Record {
	if len(message) > maxErrorMessage {
		message = message[:maxErrorMessage]
	}
	retries := "0"
	for _, h := range rec.Headers {
		if h.Key == "retry_count" {
			retries = string(h.Value)
		}
	}
	at := now.UTC().Format(time.RFC3339)
	headers := append([]kgo.RecordHeader(nil), rec.Headers...)
	for _, h := range [][2]string{
		{"retry_count", retries},
		{"error_type", errorType},
		{"error_message", message},
		{"original_topic", rec.Topic},
		{"original_partition", strconv.Itoa(int(rec.Partition))},
		{"original_offset", strconv.FormatInt(rec.Offset, 10)},
		{"failed_at", at},
		{"last_retry_at", at},
		{"final_retry_count", retries},
		{"sent_to_dlq_at", at},
	} {
		headers = setHeader(headers, h[0], h[1])
	}
	return &kgo.Record{Topic: d.topic, Key: rec.Key, Value: rec.Value, Headers: headers}
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
