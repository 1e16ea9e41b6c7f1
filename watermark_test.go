// What comes later: complete_through, who waits for it, records that are put off.

package main

import (
	"context"
	"fmt"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/event-ingestion/event-ingestion/internal/testkit"

	"github.com/twmb/franz-go/pkg/kfake"
	"github.com/twmb/franz-go/pkg/kgo"

	"github.com/event-ingestion/event-ingestion/internal/troubles"
)

// never is when this instance has stored what a watermark is asked about.
func never(int32) storedEnd { return storedEnd{} }

// TestStalled: partitions that take turns are not stalled; one that stands by itself is, after a while. Those whose rows go in are not,
// however long their offsets wait.
func TestStalled(t *testing.T) {
	t.Parallel()
	st := &newStats().store
	w := &watermark{lastOf: st.lastOf}
	rd := &readiness{stalled: w.stalled, trouble: troubles.New().Oldest, consumes: true}
	c := new(consumer)
	c.member.Store(new("member"))
	rd.consumer.Store(c)
	for _, c := range []struct {
		lags   []int64
		since  []int // seconds ago
		stored []int // the same, by this instance
		want   string
	}{
		{[]int64{0, 0, 0}, []int{0, 0, 0}, nil, "ok"},
		{[]int64{5, 7, 0}, []int{1, 20, 0}, nil, "ok"},
		{[]int64{5, 7, 0}, []int{5, 20, 0}, nil, "stalled 5 s, 12 waiting"},
		{[]int64{5, 7, 0}, []int{1, 90, 0}, nil, "stalled 90 s, 12 waiting"},
		{[]int64{5, 7, 0}, []int{90, 90, 0}, []int{1, 2}, "ok"},
		{[]int64{5, 7, 0}, []int{90, 90, 0}, []int{1, 70}, "stalled 70 s, 12 waiting"},
		{[]int64{5, 7, 0}, []int{90, 90, 0}, []int{199, 1}, "ok"}, // the first is stored to its end
	} {
		p := &progress{lags: c.lags, ends: []int64{99, 99, 99}}
		for _, s := range c.since {
			p.since = append(p.since, time.Now().Add(-time.Duration(s)*time.Second))
		}
		for partition, s := range c.stored {
			st.storedOf(int32(partition), storedEnd{int64(s % 100), time.Now().Add(-time.Duration(s) * time.Second)})
		}
		w.progress.Store(p)
		if got, _ := rd.consuming(true); got != c.want {
			t.Errorf("lags %v, standing for %v s: %q, want %q", c.lags, c.since, got, c.want)
		}
	}
}

// TestGrowthIsSeen: another instance puts a record on a partition that is new, which nobody reads yet. A look in the seconds after that
// does not claim it.
func TestGrowthIsSeen(t *testing.T) {
	t.Parallel()
	env := newSpace(t, "KAFKA_PARTITIONS=1")
	cfg := settingsFrom(t, env)
	newTestSideProducer(t, cfg)
	producer, err := newProducer(cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer producer.Close()
	w := newWatermark(producer, cfg, never)
	look := func() (through int64) {
		t.Helper()
		if err := w.look(t.Context()); err != nil {
			t.Fatal(err)
		}
		return w.through.Load()
	}
	for look() == 0 {
		troubles.Sleep(t.Context(), sampleInterval)
	}
	growTopic(t, env, 2)
	other, err := newProducer(cfg, kgo.RecordPartitioner(kgo.ManualPartitioner()))
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	if err := other.ProduceSync(t.Context(), &kgo.Record{Topic: cfg.kafkaTopic, Partition: 1, Value: []byte("new")}).FirstErr(); err != nil {
		t.Fatal(err)
	}
	for acked := time.Now().Unix(); time.Now().Unix() < acked+2; troubles.Sleep(t.Context(), sampleInterval) {
		if look() >= acked {
			t.Fatal("it claims a record that is not stored")
		}
	}
	if now := time.Now().Unix(); look() >= now-2 {
		t.Error("it claims a record that is not stored")
	}
}

// TestClockSetBack: the clock was an hour ahead when the last looks were taken. What they knew is not claimed for the hour to come.
func TestClockSetBack(t *testing.T) {
	t.Parallel()
	cfg := settingsFrom(t, newSpace(t))
	side := newTestSideProducer(t, cfg)
	w := newWatermark(side.kafka, cfg, never)
	ahead := time.Now().Add(time.Hour)
	look := func() {
		t.Helper()
		if err := w.look(t.Context()); err != nil {
			t.Fatal(err)
		}
		if through := w.through.Load(); through >= time.Now().Unix() {
			t.Errorf("complete through %d s from now", through-time.Now().Unix())
		}
	}
	look()
	w.samples = []sample{{ahead, make([]int64, cfg.kafkaPartitions)}}
	look()
	if err := side.requeue(t.Context(), []*kgo.Record{{Key: []byte("k"), Value: []byte("not stored")}}); err != nil {
		t.Fatal(err)
	}
	w.through.Store(ahead.Unix())
	look()
}

// TestStoredSignal: each waits for its own moment, all by one wake-up.
func TestStoredSignal(t *testing.T) {
	var s storedSignal
	base := time.Now()
	at := func(n int) time.Time { return base.Add(time.Duration(n)) }
	told := make(chan int, 10)
	for n := range 10 {
		go func() { // ends when the signal has passed its moment
			if s.wait(context.Background(), at(n)) {
				told <- n
			}
		}()
	}
	for n := range 10 {
		if s.advance(at(n)); len(told) > 0 {
			t.Fatalf("%d was told at %d", <-told, n)
		}
		if s.advance(at(n + 1)); <-told != n {
			t.Fatalf("another one than %d was told", n)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if s.wait(ctx, at(10)) || !s.wait(ctx, at(9)) {
		t.Error("a client that is gone is told what is not stored, or not what is")
	}
	s.end()
	if s.wait(context.Background(), at(10)) || !s.wait(context.Background(), at(9)) {
		t.Error("at the end")
	}
}

func TestDelays(t *testing.T) {
	for attempt, want := range map[int]time.Duration{1: 2 * time.Second, 2: 4 * time.Second, 3: 8 * time.Second, 4: 16 * time.Second, 5: 32 * time.Second, 6: time.Minute, 100: time.Minute} {
		if got := delayOf(attempt); got != want {
			t.Errorf("attempt %d waits %s, want %s", attempt, got, want)
		}
	}
}

// TestPutOffTogether: a list far above what the brokers take in one batch, all attempts mixed, one record too large for
// any batch: everything is acknowledged where it belongs, and that one as a cut dead letter.
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
	for _, rec := range testkit.ReadTopic(t, kafkaBrokers(t), cfg.kafkaTopic+".retry", each*cfg.maxRetryAttempts-1) {
		perPartition[rec.Partition]++
		attempt := retryCount(rec)
		n, _ := strconv.Atoi(string(rec.Key))
		if attempt != n%6+1 || int(rec.Partition)/delayPartitions != attempt-1 || len(rec.Value) != len(recs[n].Value) || header(rec, "original_offset") != fmt.Sprint(n/6) {
			t.Errorf("record %d: partition %d, attempt %d, %d bytes, %v", n, rec.Partition, attempt, len(rec.Value), rec.Headers)
		}
	}
	for p, n := range perPartition {
		want := each / delayPartitions
		if p == 3 { // where the large one would be: its second attempt, from an odd offset
			want--
		}
		if n != want {
			t.Errorf("partition %d has %d", p, n)
		}
	}
	for _, rec := range testkit.ReadTopic(t, kafkaBrokers(t), cfg.kafkaTopic+".dlq", each+1) {
		if string(rec.Key) == "7" {
			if header(rec, "value_truncated_from") != fmt.Sprint(3<<20) || header(rec, "error_type") != errorInsertFailed || len(rec.Value) == 0 {
				t.Errorf("the large record: %d bytes, %v", len(rec.Value), rec.Headers)
			}
		} else if header(rec, "error_type") != errorExhausted || header(rec, "final_retry_count") != "5" || header(rec, "error_message") != "a reason" {
			t.Errorf("dead letter: %v", rec.Headers)
		}
	}
}

// TestPutOffStopped: with the brokers away a move ends when it is told to, and says that it was not done.
func TestPutOffStopped(t *testing.T) {
	t.Parallel()
	brokers, err := kfake.NewCluster(kfake.NumBrokers(2))
	if err != nil {
		t.Fatal(err)
	}
	cfg := settingsFrom(t, append(newSpace(t), "KAFKA_BROKERS="+strings.Join(brokers.ListenAddrs(), ",")))
	side := newTestSideProducer(t, cfg)
	brokers.Close()
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
	if !apart(t) { // it measures memory
		return
	}
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
		for _, rec := range testkit.ReadTopic(t, kafkaBrokers(t), cfg.kafkaTopic, short*(round+1)) {
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
	for _, rec := range testkit.ReadTopic(t, kafkaBrokers(t), cfg.kafkaTopic, short*rounds) {
		back[string(rec.Key)]++
	}
	if len(back) != short*rounds {
		t.Errorf("%d records are back, want %d", len(back), short*rounds)
	}
	w := newWatermark(side.kafka, cfg, never)
	done, err := committedOffsets(t.Context(), w.admin, cfg.kafkaTopic+".retry", cfg.kafkaGroup+".retry")
	if err != nil {
		t.Fatal(err)
	}
	for p := range done {
		if want := short * rounds / delayPartitions; p < delayPartitions && done[p] != int64(want) || p >= delayPartitions && done[p] != 0 {
			t.Errorf("partition %d is committed to %d", p, done[p])
		}
	}
	if ends, err := offsetsOf(w.admin.ListEndOffsets(t.Context(), cfg.kafkaTopic)); err != nil || testkit.TotalOf(ends) != short*rounds {
		t.Errorf("%v, %v were put back, want %d", err, ends, short*rounds)
	}
	if grown := peak - before; grown > 64<<20 {
		t.Errorf("%d MB for waiting", grown>>20)
	}
	t.Logf("%d KB for waiting", (peak-before)>>10)
}
