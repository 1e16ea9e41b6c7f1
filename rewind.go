// Starting over from Kafka: what ClickHouse lost is read again.
//
// rewind.go owns the subcommand rewind. After a backup was restored, a partition dropped or a disk lost, only Kafka has what
// is missing. Rewinding first makes events_hourly agree with what is left of events, then sets the consumer group back. The
// program reads on from there, skips what ClickHouse has, and stores the rest, counted once.

package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"maps"
	"slices"
	"text/tabwriter"
	"time"

	"github.com/twmb/franz-go/pkg/kadm"
)

func rewindTool(fs *flag.FlagSet) toolRun {
	to := fs.String("to", "", "read again what was accepted from this time on: RFC 3339, or start for all that Kafka still has")
	dryRun := fs.Bool("dry-run", false, "only say what would be read again")
	return func(ctx context.Context, cfg *settings, _ []string, w io.Writer) error {
		var at time.Time
		if *to != "start" {
			var err error
			if at, err = time.Parse(time.RFC3339, *to); err != nil {
				return badArgument{fmt.Errorf("-to %q has to be a time such as %s, or start", *to, rfc3339Now())}
			}
		}
		return rewind(ctx, cfg, at, *dryRun, w)
	}
}

// rewind sets the group back to what was accepted at a time, the zero time being the start of the log.
func rewind(ctx context.Context, cfg *settings, at time.Time, dryRun bool, w io.Writer) error {
	kafka, err := newKafka(cfg, "event-ingestion-rewind")
	if err != nil {
		return err
	}
	defer kafka.Close()
	admin := kadm.NewClient(kafka)
	if err := mustBeIdle(ctx, admin, cfg.kafkaGroup); err != nil {
		return err
	}
	targets, err := rewindTargets(ctx, admin, cfg.kafkaTopic, at)
	if err != nil {
		return err
	}
	committed, err := admin.FetchOffsetsForTopics(ctx, cfg.kafkaGroup, cfg.kafkaTopic)
	if err != nil {
		return fmt.Errorf("offsets of group %s: %w", cfg.kafkaGroup, err)
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, "PARTITION\tFROM\tBACK TO\tRECORDS\t")
	again := kadm.Offsets{}
	records := int64(0)
	for _, target := range targets {
		was, ok := committed.Lookup(cfg.kafkaTopic, target.Partition)
		if !ok || was.At <= target.Offset {
			continue // it was not read beyond the target
		}
		fmt.Fprintf(t, "%d\t%d\t%d\t%d\t\n", target.Partition, was.At, target.Offset, was.At-target.Offset)
		records += was.At - target.Offset
		again.AddOffset(cfg.kafkaTopic, target.Partition, target.Offset, target.LeaderEpoch)
	}
	t.Flush()
	if dryRun || records == 0 {
		fmt.Fprintf(w, "%d records would be read again\n", records)
		return nil
	}
	rows, err := reconcile(ctx, newStore(cfg), timeRange{0, maxUnixSeconds}, 0, false, io.Discard)
	if err != nil {
		return fmt.Errorf("make events_hourly agree with events before anything is read again: %w", err)
	}
	if err := admin.CommitAllOffsets(ctx, cfg.kafkaGroup, again); err != nil {
		return fmt.Errorf("set group %s back: %w", cfg.kafkaGroup, err)
	}
	fmt.Fprintf(w, "%d rows of events_hourly mended; %d records will be read again when the program starts\n", rows, records)
	return nil
}

// mustBeIdle refuses a group with members: they would commit over what is set here.
func mustBeIdle(ctx context.Context, admin *kadm.Client, group string) error {
	groups, err := admin.DescribeGroups(ctx, group)
	if err == nil {
		err = groups.Error()
	}
	if err != nil {
		return fmt.Errorf("describe group %s: %w", group, err)
	}
	if n := len(groups[group].Members); n > 0 {
		return fmt.Errorf("group %s has %d members at %s: stop the program first, or wait until the group has missed those that were killed", group, n, groups[group].Members[0].ClientHost)
	}
	return nil
}

// rewindTargets returns the first offset of each partition at or after the time. A time before the log's start is refused
// where the log was cut: what was there is gone.
func rewindTargets(ctx context.Context, admin *kadm.Client, topic string, at time.Time) ([]kadm.ListedOffset, error) {
	starts, err := admin.ListStartOffsets(ctx, topic)
	if err == nil {
		err = starts.Error()
	}
	if err != nil {
		return nil, fmt.Errorf("starts of topic %s: %w", topic, err)
	}
	if at.IsZero() {
		return inOrder(starts[topic]), nil
	}
	found, err := admin.ListOffsetsAfterMilli(ctx, at.UnixMilli(), topic)
	if err == nil {
		err = found.Error()
	}
	if err != nil {
		return nil, fmt.Errorf("offsets of topic %s at %s: %w", topic, at.Format(time.RFC3339), err)
	}
	first, err := admin.ListOffsetsAfterMilli(ctx, 0, topic) // which has the time of the first record left
	if err == nil {
		err = first.Error()
	}
	if err != nil {
		return nil, fmt.Errorf("first records of topic %s: %w", topic, err)
	}
	targets := inOrder(found[topic])
	for _, o := range targets {
		start, _ := starts.Lookup(topic, o.Partition)
		if oldest, _ := first.Lookup(topic, o.Partition); start.Offset > 0 && o.Offset <= start.Offset && oldest.Timestamp > at.UnixMilli() {
			return nil, fmt.Errorf("partition %d of %s starts at %s, later than -to: what was before is gone; use -to start to read what is left",
				o.Partition, topic, time.UnixMilli(oldest.Timestamp).UTC().Format(time.RFC3339))
		}
	}
	return targets, nil
}

func inOrder(offsets map[int32]kadm.ListedOffset) []kadm.ListedOffset {
	return slices.SortedFunc(maps.Values(offsets), func(a, b kadm.ListedOffset) int { return int(a.Partition - b.Partition) })
}
