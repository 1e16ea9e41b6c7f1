// What is put off: whole lists at once, each record with its own count, to the partition of its delay.

package main

import (
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/twmb/franz-go/pkg/kgo"
)

func never() bool { return false }

// newTestSideways has its topics, and no consumer.
func newTestSideways(t *testing.T, cfg *settings) *sideways {
	t.Helper()
	side, err := newSideways(cfg, &newStats().sideways)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(side.close)
	if _, err := ensureTopics(t.Context(), side.kafka, cfg); err != nil {
		t.Fatal(err)
	}
	return side
}

// TestPutOffTogether: a list far above what the brokers take in one batch, all attempts mixed, one record too large for
// any batch: everything is acknowledged where it belongs.
func TestPutOffTogether(t *testing.T) {
	cfg := settingsFrom(t, newSpace(t))
	side := newTestSideways(t, cfg)
	const each = 60
	var recs []*kgo.Record
	for i := range each * (cfg.maxRetryAttempts + 1) {
		rec := &kgo.Record{Topic: cfg.kafkaTopic, Partition: 3, Offset: int64(i / 6), Key: []byte(strconv.Itoa(i)), Value: []byte(strings.Repeat("v", 16<<10))}
		if count := i % 6; count > 0 {
			rec.Headers = []kgo.RecordHeader{{Key: "retry_count", Value: []byte(strconv.Itoa(count))}}
		}
		recs = append(recs, rec)
	}
	recs[7].Value = []byte(strings.Repeat("w", 3<<20))
	if !side.retry(recs, "a reason", never) {
		t.Fatal("not acknowledged")
	}
	perPartition := map[int32]int{}
	for _, rec := range readTopic(t, cfg.kafkaTopic+".retry", each*cfg.maxRetryAttempts) {
		perPartition[rec.Partition]++
		attempt := retryCount(rec)
		n, _ := strconv.Atoi(string(rec.Key))
		if attempt != n%6+1 || int(rec.Partition)/delayPartitions != attempt-1 || len(rec.Value) != len(recs[n].Value) || header(rec, "original_offset") != fmt.Sprint(n/6) {
			t.Errorf("record %d: partition %d, attempt %d, %d bytes, %v", n, rec.Partition, attempt, len(rec.Value), rec.Headers)
		}
	}
	for p, n := range perPartition {
		if n != each/delayPartitions {
			t.Errorf("partition %d has %d", p, n)
		}
	}
	for _, rec := range readTopic(t, cfg.kafkaTopic+".dlq", each) {
		if header(rec, "error_type") != errorExhausted || header(rec, "final_retry_count") != "5" || header(rec, "error_message") != "a reason" {
			t.Errorf("dead letter: %v", rec.Headers)
		}
	}
}

// TestPutOffStopped: with the brokers away a move ends when it is told to, and says that it was not done.
func TestPutOffStopped(t *testing.T) {
	cfg := settingsFrom(t, newSpace(t))
	side := newTestSideways(t, cfg)
	control(t, "/kafka/stop")
	defer control(t, "/kafka/start")
	asked := 0
	stopped := func() bool { asked++; return asked > 3 }
	done := make(chan bool)
	go func() { // ends when retry does
		done <- side.retry([]*kgo.Record{{Topic: cfg.kafkaTopic, Value: []byte("{}")}}, "a reason", stopped)
	}()
	select {
	case acknowledged := <-done:
		if acknowledged {
			t.Error("acknowledged by nobody")
		}
	case <-time.After(20 * time.Second):
		t.Error("goes on after it was told to end")
	}
}
