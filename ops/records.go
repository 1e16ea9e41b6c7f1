// Records: how a command reads a topic, as far as it reaches at that moment, and what it asks about offsets and headers.

package ops

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"time"

	"github.com/twmb/franz-go/pkg/kadm"
	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kgo"
)

const (
	// fetchWait is how long a broker may wait for more records before it answers.
	fetchWait = 25 * time.Millisecond
	// pollWait bounds a poll in which nothing comes: what was still to come may have expired, and nobody waits for that.
	pollWait = time.Second
)

// readRecords hands each record of a topic to f, up to where the partitions end when it starts. It leaves out what the group has
// committed; an empty group has committed nothing. An error of f ends it. In place of a batch that takes more memory than is allowed, or
// that cannot be decompressed, f gets one record without key and value, at the batch's last offset.
func (sys System) readRecords(ctx context.Context, topic, group string, f func(*kgo.Record) error) error {
	return sys.readOn(ctx, topic, group, map[int32]int64{}, f)
}

// readOn is readRecords from where another reading has ended: at is the next offset of each partition, and moves to the ends.
func (sys System) readOn(ctx context.Context, topic, group string, at map[int32]int64, f func(*kgo.Record) error) error {
	kafka, err := sys.Kafka("event-ingestion-audit", kgo.FetchMaxWait(fetchWait), kgo.KeepControlRecords(), kgo.FetchIsolationLevel(kgo.ReadCommitted()))
	if err != nil {
		return err
	}
	defer kafka.Close()
	admin := kadm.NewClient(kafka)
	from, left, err := unread(ctx, admin, topic, group, at)
	if err != nil {
		return err
	}
	ends := maps.Clone(left)
	kafka.AddConsumePartitions(map[string]map[int32]kgo.Offset{topic: from})
	for len(left) > 0 {
		fetches, err := poll(ctx, kafka)
		if err != nil {
			return fmt.Errorf("read topic %s: %w", topic, err)
		}
		if fetches.NumRecords() == 0 { // what is left may have expired meanwhile
			starts, err := startsOf(ctx, admin, topic)
			if err != nil {
				return err
			}
			maps.DeleteFunc(left, func(p int32, end int64) bool { return starts[topic][p].Offset >= end })
		}
		var failed error
		take := func(rec *kgo.Record) {
			end := left[rec.Partition] // 0 when all of it is read
			if failed == nil && rec.Offset < end && !rec.Attrs.IsControl() {
				failed = f(rec)
			}
			if rec.Offset+1 >= end {
				delete(left, rec.Partition)
			}
		}
		fetches.EachPartition(func(p kgo.FetchTopicPartition) {
			p.EachRecord(take)
			if e, is := errors.AsType[*kgo.ErrDecompressTooLarge](p.Err); is {
				take(&kgo.Record{Topic: topic, Partition: p.Partition, Offset: e.NextOffset - 1, LeaderEpoch: e.Epoch})
				kafka.SetOffsets(map[string]map[int32]kgo.EpochOffset{topic: {p.Partition: {Epoch: e.Epoch, Offset: e.NextOffset}}})
			}
		})
		if failed != nil {
			return failed
		}
	}
	maps.Copy(at, ends)
	return nil
}

// unread returns where to read each partition that has something to read at or after an offset, and the offset before which to stop
// there.
func unread(ctx context.Context, admin *kadm.Client, topic, group string, at map[int32]int64) (from map[int32]kgo.Offset, ends map[int32]int64, err error) {
	var done kadm.OffsetResponses // before the ends: what is beyond those belongs to a deleted topic of the same name
	if group != "" {
		if done, err = committedOf(ctx, admin, group, topic); err != nil {
			return nil, nil, err
		}
	}
	listed, err := wholeAnswer(admin.ListEndOffsets(ctx, topic))
	if err != nil {
		return nil, nil, fmt.Errorf("ends of topic %s: %w", topic, err)
	}
	starts, err := startsOf(ctx, admin, topic)
	if err != nil {
		return nil, nil, err
	}
	from, ends = map[int32]kgo.Offset{}, map[int32]int64{}
	for p, end := range listed[topic] {
		start := starts[topic][p].Offset
		if at[p] <= end.Offset {
			start = max(start, at[p])
		}
		if committed, ok := done.Lookup(topic, p); ok && committed.Err == nil && committed.At <= end.Offset {
			start = max(start, committed.At)
		}
		if start < end.Offset {
			from[p], ends[p] = kgo.NewOffset().At(start), end.Offset
		}
	}
	return from, ends, nil
}

// poll waits for records, for pollWait at the most.
func poll(ctx context.Context, kafka *kgo.Client) (fetches kgo.Fetches, err error) {
	waiting, cancel := context.WithTimeout(ctx, pollWait)
	defer cancel()
	fetches = kafka.PollFetches(waiting)
	for _, e := range fetches.Errors() {
		if !errors.Is(e.Err, context.DeadlineExceeded) && !errors.Is(e.Err, kgo.ErrMaxDecompress) {
			err = e.Err
		}
	}
	return fetches, cmp.Or(err, ctx.Err())
}

// startsOf are the offsets at which the partitions of a topic begin.
func startsOf(ctx context.Context, admin *kadm.Client, topic string) (kadm.ListedOffsets, error) {
	starts, err := wholeAnswer(admin.ListStartOffsets(ctx, topic))
	if err != nil {
		return nil, fmt.Errorf("starts of topic %s: %w", topic, err)
	}
	return starts, nil
}

// committedOf are the offsets of a topic that a group has committed: none when nobody has ever joined the group.
func committedOf(ctx context.Context, admin *kadm.Client, group, topic string) (kadm.OffsetResponses, error) {
	committed, err := admin.FetchOffsetsForTopics(ctx, group, topic)
	if err != nil && !errors.Is(err, kerr.GroupIDNotFound) {
		return nil, fmt.Errorf("offsets of group %s: %w", group, err)
	}
	return committed, nil
}

// wholeAnswer is an answer of kadm and the first error in it, if only of one partition or group.
func wholeAnswer[T interface{ Error() error }](answer T, err error) (T, error) {
	return answer, cmp.Or(err, answer.Error())
}

// header is the value of a record's header, empty without it.
func header(rec *kgo.Record, key string) string {
	for _, h := range rec.Headers {
		if h.Key == key {
			return string(h.Value)
		}
	}
	return ""
}
