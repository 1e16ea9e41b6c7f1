// rewind: the program reads again what ClickHouse has lost.
//
// After a backup was restored, a partition dropped or a disk lost, only Kafka has what is missing. rewind first makes
// events_hourly agree with what is left of events, then sets the consumer group back. The program reads on from there, skips
// what ClickHouse has, and stores the rest, counted once.

package ops

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"text/tabwriter"
	"time"

	"github.com/twmb/franz-go/pkg/kadm"
	"github.com/twmb/franz-go/pkg/kerr"
)

func rewind(fs *flag.FlagSet) action {
	to := fs.String("to", "", "read again what was accepted from this time on: RFC 3339, or start for all that Kafka still has")
	dryRun := fs.Bool("dry-run", false, "only say what would be read again")
	return func(ctx context.Context, sys System, _ []string, w io.Writer) error {
		var at time.Time
		if *to != "start" {
			var err error
			if at, err = time.Parse(time.RFC3339, *to); err != nil || at.Unix() < 0 || at.After(time.Now()) {
				return badArgument{fmt.Errorf("-to %q has to be a time that has been, such as %s, or start", *to, time.Now().UTC().Format(time.RFC3339))}
			}
		}
		return sys.exclusively(ctx, *dryRun, func(ctx context.Context) error { return sys.rewind(ctx, at, *dryRun, w) })
	}
}

// rewind sets the group back to what was accepted at a time; the zero time is the start of the log.
func (sys System) rewind(ctx context.Context, at time.Time, dryRun bool, w io.Writer) error {
	kafka, err := sys.Kafka("event-ingestion-rewind")
	if err != nil {
		return err
	}
	defer kafka.Close()
	admin := kadm.NewClient(kafka)
	if err := mustBeIdle(ctx, admin, sys.Group); err != nil {
		return err
	}
	targets, err := rewindTargets(ctx, admin, sys.Topic, at)
	if err != nil {
		return err
	}
	committed, err := committedOf(ctx, admin, sys.Group, sys.Topic)
	if err != nil {
		return err
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, "PARTITION\tFROM\tBACK TO\tRECORDS\t")
	again := kadm.Offsets{}
	records := int64(0)
	for _, target := range targets.Sorted() {
		was, ok := committed.Lookup(target.Topic, target.Partition)
		if !ok || was.At <= target.At {
			continue // it was not read beyond the target
		}
		fmt.Fprintf(t, "%d\t%d\t%d\t%d\t\n", target.Partition, was.At, target.At, was.At-target.At)
		records += was.At - target.At
		again.Add(target)
	}
	t.Flush()
	if dryRun || records == 0 {
		fmt.Fprintf(w, "%d records would be read again\n", records)
		return nil
	}
	rows, err := sys.mend(ctx, timeRange{0, maxSecond}.hours(), 0, false, func(unequal) {})
	if err != nil {
		return fmt.Errorf("make events_hourly agree with events before anything is read again: %w", err)
	}
	if err := admin.CommitAllOffsets(ctx, sys.Group, again); err != nil {
		return fmt.Errorf("set group %s back: %w", sys.Group, err)
	}
	fmt.Fprintf(w, "%d rows of events_hourly mended; %d records will be read again when the program starts\n", rows, records)
	return nil
}

// mustBeIdle refuses a group with members: they would commit over what is set here.
func mustBeIdle(ctx context.Context, admin *kadm.Client, group string) error {
	members, err := membersOf(ctx, admin, group)
	if err != nil {
		return err
	}
	if len(members) > 0 {
		return fmt.Errorf("group %s has members, %d of them, such as one at %s: stop the program first, or wait until the group has missed those that were killed",
			group, len(members), members[0].ClientHost)
	}
	return nil
}

// membersOf are the members of a group: none when nobody has ever joined it.
func membersOf(ctx context.Context, admin *kadm.Client, group string) ([]kadm.DescribedGroupMember, error) {
	groups, err := wholeAnswer(admin.DescribeGroups(ctx, group))
	if err != nil && !errors.Is(err, kerr.GroupIDNotFound) {
		return nil, fmt.Errorf("describe group %s: %w", group, err)
	}
	return groups[group].Members, nil
}

// rewindTargets returns the first offset of each partition at or after the time. It refuses a time before the log's start where
// the log was cut: what was there is gone.
func rewindTargets(ctx context.Context, admin *kadm.Client, topic string, at time.Time) (kadm.Offsets, error) {
	starts, err := startsOf(ctx, admin, topic)
	if err != nil {
		return nil, err
	}
	if at.IsZero() {
		return starts.Offsets(), nil
	}
	found, err := wholeAnswer(admin.ListOffsetsAfterMilli(ctx, at.UnixMilli(), topic))
	if err != nil {
		return nil, fmt.Errorf("offsets of topic %s at %s: %w", topic, at.Format(time.RFC3339), err)
	}
	first, err := wholeAnswer(admin.ListOffsetsAfterMilli(ctx, 0, topic)) // which has the time of the first record left
	if err != nil {
		return nil, fmt.Errorf("first records of topic %s: %w", topic, err)
	}
	targets := found.Offsets()
	for _, o := range targets.Sorted() {
		start, _ := starts.Lookup(topic, o.Partition)
		if oldest, _ := first.Lookup(topic, o.Partition); start.Offset > 0 && o.At <= start.Offset && oldest.Timestamp > at.UnixMilli() {
			return nil, fmt.Errorf("partition %d of %s starts at %s, later than -to: what was before is gone; use -to start to read what is left",
				o.Partition, topic, time.UnixMilli(oldest.Timestamp).UTC().Format(time.RFC3339))
		}
	}
	return targets, nil
}
