// What is put off: whole lists at once, each record with its own count, to the partition of its delay.

package main

import (
	"bytes"
	"context"
	crand "crypto/rand"
	"fmt"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/twmb/franz-go/pkg/kadm"
	"github.com/twmb/franz-go/pkg/kgo"
)

// newTestSideProducer has its topics, and no consumer.
func newTestSideProducer(t *testing.T, cfg *settings) *sideProducer {
	t.Helper()
	side, err := newSideProducer(cfg, &newStats().side)
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
	t.Parallel()
	cfg := settingsFrom(t, newSpace(t))
	side := newTestSideProducer(t, cfg)
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
	if side.retry(t.Context(), recs, "a reason") != nil {
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
	alone(t)
	cfg := settingsFrom(t, newSpace(t))
	side := newTestSideProducer(t, cfg)
	control(t, "/kafka/stop")
	defer control(t, "/kafka/start")
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { // ends when retry does
		done <- side.retry(ctx, []*kgo.Record{{Topic: cfg.kafkaTopic, Value: []byte("{}")}}, "a reason")
	}()
	time.AfterFunc(200*time.Millisecond, stop) // at any moment of a try
	select {
	case err := <-done:
		if err == nil {
			t.Error("acknowledged by nobody")
		}
	case <-time.After(20 * time.Second):
		t.Error("goes on after it was told to end")
	}
}

// TestRetryWorkers: 20,000 records of 16 KB wait for a minute, and take little memory; those with a short delay pass them, each
// once, while workers come and go; what waits is still uncommitted in the end.
func TestRetryWorkers(t *testing.T) {
	t.Parallel()
	cfg := settingsFrom(t, newSpace(t))
	side := newTestSideProducer(t, cfg)
	kafka, err := newProducer(cfg, kgo.RecordPartitioner(kgo.ManualPartitioner()))
	if err != nil {
		t.Fatal(err)
	}
	defer kafka.Close()
	put := func(n int, partition func(i int) int32, at time.Time, value string) {
		recs := make([]*kgo.Record, n)
		for i := range recs {
			p := partition(i)
			count := "1"
			if p >= delayPartitions {
				count = "100" // the longest delay, from when they are read, because they are ahead
			}
			recs[i] = &kgo.Record{Topic: cfg.kafkaTopic + ".retry", Partition: p, Key: []byte(fmt.Sprint(at.UnixNano(), i)), Value: []byte(value), Timestamp: at,
				Headers: []kgo.RecordHeader{{Key: "retry_count", Value: []byte(count)}}}
		}
		if err := kafka.ProduceSync(t.Context(), recs...).FirstErr(); err != nil {
			t.Fatal(err)
		}
	}
	const long = 2500 // in each of the long partitions
	for range 10 {
		put(retryPartitions*long/10, func(i int) int32 { return int32(max(i%retryPartitions, delayPartitions)) }, time.Now().Add(time.Hour), strings.Repeat("waits ", 16<<10/6))
	}
	peak := uint64(0)
	measure := func() {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		peak = max(peak, m.HeapAlloc)
	}
	measure()
	before := peak
	start := func() (stop func()) {
		ctx, cancel := context.WithCancel(t.Context())
		w, err := newRetryWorker(cfg, side, func(err error) { t.Log(err) })
		if err != nil {
			t.Fatal(err)
		}
		done := make(chan struct{})
		go func() { // ends with cancel
			defer close(done)
			w.run(ctx, func() (context.Context, context.CancelFunc) {
				return context.WithTimeout(context.Background(), 20*time.Second)
			})
		}()
		return func() { cancel(); <-done }
	}
	stop := start()
	const rounds, short = 3, 200
	back := map[string]int{}
	for round := range rounds {
		put(short, func(i int) int32 { return int32(i % delayPartitions) }, time.Now(), "short")
		another := start()
		for _, rec := range readTopic(t, cfg.kafkaTopic, short*(round+1)) {
			back[string(rec.Key)]++
			if string(rec.Value) != "short" {
				t.Fatal("a record is back before it was due")
			}
		}
		measure()
		stop()
		stop = another
	}
	stop()
	for _, rec := range readTopic(t, cfg.kafkaTopic, short*rounds) {
		back[string(rec.Key)]++
	}
	if len(back) != short*rounds {
		t.Errorf("%d records are back, want %d", len(back), short*rounds)
	}
	w := newWatermark(side.kafka, cfg)
	committed, err := committedOffsets(t.Context(), w.admin, cfg.kafkaTopic+".retry", cfg.kafkaGroup+".retry")
	if err != nil {
		t.Fatal(err)
	}
	for p := range committed {
		if want := short * rounds / delayPartitions; p < delayPartitions && committed[p] != int64(want) || p >= delayPartitions && committed[p] != 0 {
			t.Errorf("partition %d is committed to %d", p, committed[p])
		}
	}
	if ends, err := offsetsOf(w.admin.ListEndOffsets(t.Context(), cfg.kafkaTopic)); err != nil || totalOf(ends) != short*rounds {
		t.Errorf("%v, %v were put back, want %d", err, ends, short*rounds)
	}
	if grown := peak - before; grown > 64<<20 {
		t.Errorf("%d MB for waiting", grown>>20)
	}
	t.Logf("%d KB for waiting", (peak-before)>>10)
}

func totalOf(ns []int64) (total int64) {
	for _, n := range ns {
		total += n
	}
	return total
}

// TestPutOffByAnotherClock: who put a record off has a clock that is ahead. It waits no longer for that, and nothing behind it does.
func TestPutOffByAnotherClock(t *testing.T) {
	t.Parallel()
	env := faultSpace(t)
	p := startProgram(t, env)
	kafka, err := kgo.NewClient(kgo.SeedBrokers(kafkaBrokers(t)...))
	if err != nil {
		t.Fatal(err)
	}
	defer kafka.Close()
	for _, ahead := range []time.Duration{time.Hour, 0} {
		rec := &kgo.Record{Topic: space(env, "KAFKA_TOPIC") + ".retry", Key: []byte("k"), Value: freshEvent("ahead"), Timestamp: time.Now().Add(ahead)}
		if err := kafka.ProduceSync(t.Context(), rec).FirstErr(); err != nil {
			t.Fatal(err)
		}
	}
	drained(p)
	mustCount(t, env, "ahead", 2)
}

// TestTooLarge: topics that take less than the main one. A batch that is too large goes record by record, and a record that is
// too large is a dead letter, cut until it fits, with what it was in its headers.
func TestTooLarge(t *testing.T) {
	t.Parallel()
	cfg := settingsFrom(t, newSpace(t))
	side := newTestSideProducer(t, cfg)
	limit := "20000"
	_, err := kadm.NewClient(side.kafka).AlterTopicConfigs(t.Context(), []kadm.AlterConfig{{Name: "max.message.bytes", Value: &limit}}, cfg.kafkaTopic+".retry", cfg.kafkaTopic+".dlq")
	if err != nil {
		t.Fatal(err)
	}
	noise := make([]byte, 100_000)
	crand.Read(noise)
	recs := []*kgo.Record{{Topic: cfg.kafkaTopic, Value: noise, Headers: []kgo.RecordHeader{{Key: "strange", Value: noise[:30_000]}}}}
	for i := range 20 {
		recs = append(recs, &kgo.Record{Topic: cfg.kafkaTopic, Value: noise[i : i+5000]})
	}
	if side.retry(t.Context(), recs, "a reason") != nil {
		t.Fatal("not acknowledged")
	}
	letter := readTopic(t, cfg.kafkaTopic+".dlq", 1)[0]
	if header(letter, "value_truncated_from") != "100000" || header(letter, "error_type") != errorInsertFailed || !strings.Contains(header(letter, "error_message"), "do not take") ||
		len(letter.Value) == 0 || !bytes.HasPrefix(noise, letter.Value) {
		t.Errorf("%d bytes, %.100v", len(letter.Value), letter.Headers)
	}
	if small := readTopic(t, cfg.kafkaTopic+".retry", 20); len(small) != 20 {
		t.Errorf("%d records are put off, want 20", len(small))
	}
}
