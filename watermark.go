// The watermark: how far everything that Kafka acknowledged is stored.
//
// watermark.go samples the ends of the topics and the groups' committed offsets, and so knows a moment up to which
// everything acknowledged is stored, by whichever instance. The API answers it as complete_through. It owns the one wake-up of all
// who wait for that moment to pass their own, ?wait=stored.

package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/twmb/franz-go/pkg/kadm"
	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kgo"

	"github.com/event-ingestion/event-ingestion/internal/troubles"
)

const (
	// maxSamples is an hour of samples a second apart; a lag beyond that keeps the watermark where it is.
	maxSamples = 3600
	// metadataWait is how long a client may wait with a look at the topic's partitions that it was asked for, with a margin.
	metadataWait = 10 * time.Second
)

// watermark knows the newest moment up to which everything that Kafka acknowledged is stored, and how many records are not.
//
// A record goes from the main topic into ClickHouse or to the dead letters, or onto events.retry and from there back onto
// the main topic, perhaps several times. It is acknowledged at each place before the offset that it came from is committed.
// A look reads, in this order, (1) the committed offsets of the main topic, (2) those of events.retry, (3) the ends of
// events.retry, (4) the ends of the main topic. A look is quiet when its ends (3) are what the look before it read as
// committed (2): everything that was on events.retry at (3) had been put back before that earlier (2), so between the
// earlier (2) and this (3) no record came to events.retry or was on its way back.
//
// The rule: what the main topic held at the ends (4) of a look is stored when a later look finds its committed offsets (1) at
// or beyond them, and every look since, that one included, was quiet. Proof: from the first look's (2) to the last one's
// (3) the quiet times overlap, so each record's newest place on the main topic is below the first look's (4). It is below
// the last one's (1), so something became of it there. It did not go to events.retry: it would have been there by the last
// (3), hence put back before the first (2), and that would be a newer place. A look that is quiet may be first and last at
// once: what is below its (4) and its (1) and went to events.retry was put back below its (4), and so on to the last time.
// A look that is not quiet therefore voids those before it, and counts as the first of the next ones.
//
// A record on another partition than its key's goes back to the main topic. When the topic has grown, that is every second one:
// so no look is quiet until all that may have been on the wrong partition has been read. Of a record that another producer
// wrote under the wrong key, or an instance that was paused while the topic grew, nothing is known: it may be missing until it
// is there.
type watermark struct {
	kafka         *kgo.Client // the API's producer
	admin         *kadm.Client
	topic, group  string
	lastOf        func(int32) storedEnd
	producersLate time.Duration // after a growth the API's producers may place records by the old number for so long
	through       atomic.Int64  // Unix seconds, 0 while unknown
	stored        storedSignal
	samples       []sample                 // oldest first; only run touches it, and what follows
	retried       []int64                  // (2) of the last look, nil before the first
	moving        []int64                  // records below may be on the wrong partition, because the topic has grown
	moveUntil     time.Time                // so may those that are produced until then
	lost          atomic.Int32             // wholeStore, lostStore or newStore
	gone          map[string][]int64       // committed offsets that belong to a deleted topic of the same name
	progress      atomic.Pointer[progress] // of the last look
}

// progress is what a look found; nothing before the first.
type progress struct {
	committed []int64     // by partition, as the brokers say
	ends      []int64     // by partition
	lags      []int64     // by partition
	since     []time.Time // by partition: when its committed offset moved last, or it had no lag
	retries   int64       // records on events.retry
}

// sample is where the partitions ended at a moment.
type sample struct {
	at   time.Time
	ends []int64
}

// newWatermark returns one that knows nothing yet. lastOf is how far this instance has stored a partition.
func newWatermark(kafka *kgo.Client, cfg *settings, lastOf func(partition int32) storedEnd) *watermark {
	w := &watermark{
		lastOf: lastOf,
		kafka:  kafka, admin: kadm.NewClient(kafka), topic: cfg.kafkaTopic, group: cfg.kafkaGroup,
		producersLate: cfg.ackTimeout + metadataWait, gone: map[string][]int64{},
	}
	w.progress.Store(new(progress))
	return w
}

// What is known of the tables. What the group has committed says nothing of a store that was lost, and of a new one only a look does
// that began after the group was set back.
const (
	wholeStore int32 = iota
	lostStore
	newStore
)

// completeThrough is the Unix second up to which everything acknowledged is stored, 0 while unknown.
func (w *watermark) completeThrough() int64 {
	if w.lost.Load() != wholeStore {
		return 0
	}
	return w.through.Load()
}

// startOver sets the group back to the start of the topic, because ClickHouse has no tables: what was taken in is lost with them. It is
// counted once whatever happens, but where the counts of it are still there: then a person has to choose. Nothing has to be done where nothing was taken in, as at the first start of all. While somebody
// consumes it is an error that says what to do. The tables are made after it: whatever dies in between, the next start finds none, too.
func (w *watermark) startOver(ctx context.Context, counts bool) error {
	committed, err := committedOffsets(ctx, w.admin, w.topic, w.group)
	if err != nil {
		return err
	}
	starts, err := offsetsOf(w.admin.ListStartOffsets(ctx, w.topic))
	if err != nil {
		return err
	}
	again, records := kadm.Offsets{}, int64(0)
	for p := range min(len(committed), len(starts)) {
		if committed[p] > starts[p] {
			again.AddOffset(w.topic, int32(p), starts[p], -1)
			records += committed[p] - starts[p]
		}
	}
	if records == 0 {
		return nil
	}
	w.lost.Store(lostStore)
	if counts {
		return fmt.Errorf("ClickHouse has events_hourly and no events, and group %s has read %d records, which would be counted twice. Restore events from a backup, "+
			"or drop events_hourly: then the group goes back to the start of topic %s by itself, and what Kafka does not have any more is lost", w.group, records, w.topic)
	}
	groups, err := allOf(w.admin.DescribeGroups(ctx, w.group))
	if err != nil && !errors.Is(err, kerr.GroupIDNotFound) {
		return fmt.Errorf("ask who consumes in group %s: %w", w.group, err)
	}
	if others := groups[w.group].Members; len(others) > 0 {
		return fmt.Errorf("ClickHouse has no tables, and group %s has read %d records: what was stored is lost. Stop all instances that consume, %d of them, such as one at %s: "+
			"then the group goes back to the start of topic %s by itself. If this is the wrong server or database, look at CLICKHOUSE_HOST, CLICKHOUSE_CLUSTER and CLICKHOUSE_DATABASE",
			w.group, records, len(others), others[0].ClientHost, w.topic)
	}
	if err := w.admin.CommitAllOffsets(ctx, w.group, again); err != nil {
		return fmt.Errorf("ClickHouse has no tables, and group %s has read %d records: set it back to the start of topic %s: %w", w.group, records, w.topic, err)
	}
	slog.Warn("ClickHouse has no tables: what was stored is lost, and the group goes back to the start of the topic", "group", w.group, "topic", w.topic, "records to read again", records)
	return troubles.Sleep(ctx, 2*sampleInterval) // other instances see it before there is a table to ask
}

// prepareTables brings the tables up to date. Where there are none although records were read, they will be read again: from the next
// look on it is known again how far everything is stored.
func (w *watermark) prepareTables(ctx context.Context, db *clickhouse) error {
	events, counts, err := db.has(ctx)
	if err == nil && !events {
		err = w.startOver(ctx, counts)
	}
	if err == nil {
		err = db.makeTables(ctx)
	}
	if err == nil {
		w.lost.CompareAndSwap(lostStore, newStore)
	}
	return err
}

// behind returns how many records wait on the main topic and on events.retry, and how long ago the moment was up to which everything
// is stored, 0 while that is unknown.
func (w *watermark) behind() (lag, retries int64, age time.Duration) {
	p := w.progress.Load()
	for _, n := range p.lags {
		lag += n
	}
	if age = w.stored.age(); w.lost.Load() != wholeStore {
		age = 0
	}
	return lag, p.retries, age
}

// awaitStored returns true once what was acknowledged by then is stored, false when ctx is done or the program stops first.
func (w *watermark) awaitStored(ctx context.Context, then time.Time) bool {
	return w.stored.wait(ctx, then)
}

// endWaiting ends all waiting, so that a stop does not take longer for it.
func (w *watermark) endWaiting() { w.stored.end() }

// partitionLags is the lag of each partition, nil while unknown.
func (w *watermark) partitionLags() []int64 { return w.progress.Load().lags }

// stalled returns for how long nothing was stored of the worst partition with waiting records, and of any such partition, and
// how many records wait in all. While nothing fails, those that are stored, and whose offsets wait for a comparison, stand still for
// no time.
func (w *watermark) stalled(fails bool) (worst, all time.Duration, waiting int64) {
	p := w.progress.Load()
	for i, lag := range p.lags {
		if lag > 0 {
			last := w.lastOf(int32(i))
			d := min(time.Since(p.since[i]), time.Since(last.at))
			if last.offset >= p.ends[i] && !fails {
				d = 0
			}
			if worst = max(worst, d); waiting == 0 {
				all = d
			}
			all = min(all, d)
			waiting += lag
		}
	}
	return worst, all, waiting
}

// run samples until ctx is done.
func (w *watermark) run(ctx context.Context, failing *troubles.Set) {
	const what = "ask Kafka how far everything is stored"
	for troubles.Sleep(ctx, sampleInterval) == nil {
		if err := w.look(ctx); ctx.Err() == nil {
			failing.Note(what, err)
		}
	}
}

// look takes a sample, and moves the watermark to the newest one that is reached.
func (w *watermark) look(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	lost := w.lost.Load()
	retryTopic := w.topic + ".retry"
	stored, err := committedOffsets(ctx, w.admin, w.topic, w.group)
	if err != nil {
		return err
	}
	retried, err := committedOffsets(ctx, w.admin, retryTopic, w.group+".retry")
	if err != nil {
		return err
	}
	retryEnds, err := offsetsOf(w.admin.ListEndOffsets(ctx, retryTopic))
	if err != nil {
		return err
	}
	now := time.Now() // before the ends are read: what is acknowledged later is not covered
	ends, err := offsetsOf(w.admin.ListEndOffsets(ctx, w.topic))
	if err != nil {
		return err
	}
	if n, err := partitionsOf(ctx, w.kafka, w.topic); err != nil || n != len(ends) { // there may be records on those that are new
		w.kafka.ForceMetadataRefresh()
		return err
	}
	if before := len(w.partitionLags()); len(ends) > before {
		w.moveUntil = now // it may have grown before the first look
		if before > 0 {
			slog.Warn("the topic has more partitions than before", "topic", w.topic, "partitions", len(ends), "before", before)
			w.kafka.ForceMetadataRefresh() // or it would place keys by the old number for minutes
			w.moveUntil = now.Add(w.producersLate)
		}
	}
	if !now.After(w.moveUntil) {
		w.moving = slices.Clone(ends)
	}
	atMost(w.moving, ends)
	rewound := !atLeast(stored, w.progress.Load().committed) // what was stored is missing
	ahead := slices.ContainsFunc(w.samples, func(s sample) bool { return s.at.Unix() > now.Unix() })
	if rewound || ahead || lost != wholeStore || w.through.Load() >= now.Unix() { // or the clock was set back: it has not been then yet
		w.through.Store(0)
		w.samples = w.samples[:0]
	}
	found := &progress{committed: stored, ends: ends, lags: make([]int64, len(ends)), since: w.standing(now, stored, ends)}
	if stored, err = w.corrected(ctx, w.topic, stored, ends); err != nil {
		return err
	}
	if retried, err = w.corrected(ctx, retryTopic, retried, retryEnds); err != nil {
		return err
	}
	for p := range ends {
		found.lags[p] = max(0, ends[p]-stored[p])
	}
	for p := range retryEnds {
		found.retries += max(0, retryEnds[p]-retried[p])
	}
	quiet := slices.Equal(w.retried, retryEnds) && atLeast(stored, w.moving)
	w.progress.Store(found)
	if w.retried = retried; lost == w.lost.Load() && lost != lostStore { // else what was committed may be of what was lost
		w.advance(now, stored, ends, quiet)
		w.lost.CompareAndSwap(newStore, wholeStore)
	}
	return nil
}

// advance is a look's part in the rule.
func (w *watermark) advance(now time.Time, stored, ends []int64, quiet bool) {
	for _, s := range w.samples {
		atMost(s.ends, ends)
	}
	if n := len(w.samples); n > 1 && w.samples[n-1].at.Sub(w.samples[n-2].at) < time.Second {
		w.samples = w.samples[:n-1] // a second apart, except the newest
	}
	if !quiet {
		w.samples = w.samples[:0]
	}
	if len(w.samples) < maxSamples {
		w.samples = append(w.samples, sample{now, slices.Clone(ends)})
	}
	reached := 0
	for quiet && reached < len(w.samples) && atLeast(stored, w.samples[reached].ends) {
		w.through.Store(w.samples[reached].at.Unix() - 1) // the second of the sample itself is not over
		reached++
	}
	if reached > 0 {
		w.stored.advance(w.samples[reached-1].at)
	}
	w.samples = append(w.samples[:0], w.samples[reached:]...)
}

// standing is since when each partition has made no progress, now when it has, or has no lag.
func (w *watermark) standing(now time.Time, committed, ends []int64) []time.Time {
	since, before := slices.Repeat([]time.Time{now}, len(ends)), w.progress.Load()
	for p := range min(len(before.since), len(before.committed), len(committed), len(ends)) {
		if committed[p] == before.committed[p] && committed[p] < ends[p] {
			since[p] = before.since[p]
		}
	}
	return since
}

// corrected returns committed offsets, which were read before the ends, as they fit the present topic. One beyond the end belongs to
// a deleted topic of the same name, as long as it does not change. Records below the start of the log have expired, and nobody
// can store them any more. The result is as long as ends.
func (w *watermark) corrected(ctx context.Context, topic string, committed, ends []int64) ([]int64, error) {
	fitting, gone := make([]int64, len(ends)), make([]int64, len(ends))
	copy(fitting, committed)
	copy(gone, w.gone[topic])
	for p := range fitting {
		if fitting[p] > ends[p] || fitting[p] == gone[p] {
			gone[p], fitting[p] = fitting[p], 0
		} else {
			gone[p] = 0
		}
	}
	w.gone[topic] = gone
	if atLeast(fitting, ends) {
		return fitting, nil
	}
	starts, err := offsetsOf(w.admin.ListStartOffsets(ctx, topic))
	if err != nil {
		return nil, err
	}
	for p := range min(len(fitting), len(starts)) {
		fitting[p] = max(fitting[p], starts[p])
	}
	return fitting, nil
}

// atMost is for a topic that was recreated and ends earlier: what it held before will never be stored.
func atMost(before, ends []int64) {
	for p := range min(len(before), len(ends)) {
		before[p] = min(before[p], ends[p])
	}
}

func atLeast(stored, ends []int64) bool {
	for p := range min(len(stored), len(ends)) {
		if stored[p] < ends[p] {
			return false
		}
	}
	return true
}

// storedSignal says how far everything is stored, to the nanosecond where complete_through has seconds. The zero value knows
// nothing yet.
type storedSignal struct {
	mu      sync.Mutex    // guards what follows
	through time.Time     // everything acknowledged before it is stored
	moved   chan struct{} // closed when through moves or waiting ends; nil while nobody waits
	ended   bool
}

// change wakes whoever waits.
func (s *storedSignal) change(do func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if do(); s.moved != nil {
		close(s.moved)
		s.moved = nil
	}
}

// advance moves the signal to a later moment.
func (s *storedSignal) advance(through time.Time) { s.change(func() { s.through = through }) }

// end ends all waiting for good.
func (s *storedSignal) end() { s.change(func() { s.ended = true }) }

// age is how long ago through was; 0 while unknown.
func (s *storedSignal) age() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.through.IsZero() {
		return 0
	}
	return time.Since(s.through)
}

// wait returns true once what was acknowledged by then is stored, false when ctx is done or the program stops first.
func (s *storedSignal) wait(ctx context.Context, then time.Time) bool {
	for {
		s.mu.Lock()
		stored, ended := s.through.After(then), s.ended
		if s.moved == nil && !stored {
			s.moved = make(chan struct{})
		}
		moved := s.moved
		s.mu.Unlock()
		if stored || ended {
			return stored
		}
		select {
		case <-moved:
		case <-ctx.Done():
			return false
		}
	}
}
