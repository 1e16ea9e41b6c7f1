// Subcommands for operators: what they have in common, and one of them, rewind. ledger.go has audit, reconcile.go reconcile,
// reshard.go reshard, dlq.go dlq.
//
// After a backup was restored, a partition dropped or a disk lost, only Kafka has what is missing. rewind first makes
// events_hourly agree with what is left of events, then sets the consumer group back. The program reads on from there, skips
// what ClickHouse has, and stores the rest, counted once.

package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"text/tabwriter"
	"time"

	"github.com/ClickHouse/ch-go"
	"github.com/ClickHouse/ch-go/proto"
	"github.com/twmb/franz-go/pkg/kadm"
	"github.com/twmb/franz-go/pkg/kerr"

	"github.com/event-ingestion/event-ingestion/troubles"
)

// tool is a subcommand: it adds its flags and returns what to do once they are parsed.
type tool func(*flag.FlagSet) toolRun

type toolRun func(ctx context.Context, cfg *settings, args []string, w io.Writer) error

var tools = map[string]tool{
	"audit": auditTool, "reconcile": reconcileTool, "rewind": rewindTool, "healthcheck": healthcheckTool,
	"dlq list": dlqListTool, "dlq show": dlqShowTool, "dlq replay": dlqReplayTool,
}

// errDiffers ends a subcommand with 1 when its output has said all there is to say.
var errDiffers = errors.New("what was compared differs")

// badArgument is an error that ends a subcommand with 2.
type badArgument struct{ error }

// runTool runs a subcommand and returns its exit code: 0, 1 when it failed or found a difference, 2 for arguments or
// settings that are wrong.
func runTool(name string, args []string, stdout, stderr io.Writer) int {
	if name == "dlq" {
		if len(args) == 1 && (args[0] == "help" || slices.Contains(helpFlags, args[0])) {
			fmt.Fprint(stdout, dlqUsage)
			return 0
		}
		if len(args) == 0 || tools["dlq "+args[0]] == nil {
			fmt.Fprint(stderr, dlqUsage)
			return 2
		}
		name, args = "dlq "+args[0], args[1:]
	}
	fs := flag.NewFlagSet(name, flag.ContinueOnError)
	fs.SetOutput(stderr)
	run := tools[name](fs)
	if err := fs.Parse(args); errors.Is(err, flag.ErrHelp) {
		return 0
	} else if err != nil {
		return 2
	}
	if fs.NArg() > 0 && name != "dlq show" { // "dlq replay 0:17" would put all letters back
		fmt.Fprintf(stderr, "%s: unexpected argument %q\n", name, fs.Arg(0))
		return 2
	}
	cfg, err := loadSettings(os.Getenv)
	if err != nil {
		fmt.Fprintln(stderr, err)
		return 2
	}
	err = run(context.Background(), cfg, fs.Args(), stdout)
	if err == nil {
		return 0
	}
	if err != errDiffers {
		fmt.Fprintf(stderr, "%s: %v\n", name, err)
	}
	if _, bad := errors.AsType[badArgument](err); bad {
		return 2
	}
	return 1
}

// exclusively runs a change of tables or offsets when no other one runs: a query with an id of its own runs as long, and ClickHouse
// refuses another one with that id. The query ends with its connection, however the command ends, and the change with the query.
// A dry run changes nothing, and waits for nobody.
func exclusively(ctx context.Context, cfg *settings, dryRun bool, change func(context.Context) error) error {
	if dryRun {
		return change(ctx)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	for attempt := 0; ; attempt++ {
		c, err := ch.Dial(ctx, newClickHouse(cfg).options)
		if err != nil {
			return err
		}
		runs, ended := make(chan struct{}, 1), make(chan error, 1)
		go func() { // ends with the connection
			ended <- c.Do(ctx, eachRow(ch.Query{
				QueryID: "tables " + cfg.clickhouseDatabase,
				Body:    "SELECT sleepEachRow(0.1) FROM system.numbers SETTINGS max_block_size = 1, max_execution_time = 0",
			}, func(int) { notify(runs, struct{}{}) }, new(proto.ColUInt8)))
		}()
		select {
		case <-runs:
			defer c.Close()
			go func() { // ends with the connection
				<-ended
				cancel()
			}()
			return change(ctx)
		case err = <-ended:
			c.Close()
		}
		switch {
		case !ch.IsErr(err, proto.ErrQueryWithSameIDIsAlreadyRunning):
			return err
		case attempt == 20: // what has just ended lets go within two seconds
			return errors.New("another command changes the tables: wait for its end")
		}
		if err := troubles.Sleep(ctx, minBackoff); err != nil {
			return err
		}
	}
}

// timeRange is what -from and -to say: Unix seconds or RFC 3339, from included, to excluded.
type timeRange struct{ from, to int64 }

// flags adds -from and -to. The default is everything that the API can have accepted.
func (r *timeRange) flags(fs *flag.FlagSet) {
	now := time.Now().Unix()
	r.from, r.to = now-maxAgeSeconds-86400, now+hourSeconds
	at := func(dst *int64) func(string) error {
		return func(s string) error {
			n, err := strconv.ParseInt(s, 10, 64)
			if err != nil {
				var t time.Time
				t, err = time.Parse(time.RFC3339, s)
				n = t.Unix()
			}
			*dst = n
			return err
		}
	}
	fs.Func("from", "first second of event time, Unix or RFC 3339 (default 31 days ago)", at(&r.from))
	fs.Func("to", "second after the last (default in an hour)", at(&r.to))
}

func (r *timeRange) check() error {
	if r.from >= r.to {
		return badArgument{fmt.Errorf("-to %d has to be after -from %d", r.to, r.from)}
	}
	return nil
}

func rewindTool(fs *flag.FlagSet) toolRun {
	to := fs.String("to", "", "read again what was accepted from this time on: RFC 3339, or start for all that Kafka still has")
	dryRun := fs.Bool("dry-run", false, "only say what would be read again")
	return func(ctx context.Context, cfg *settings, _ []string, w io.Writer) error {
		var at time.Time
		if *to != "start" {
			var err error
			if at, err = time.Parse(time.RFC3339, *to); err != nil || at.Unix() < 0 || at.After(time.Now()) {
				return badArgument{fmt.Errorf("-to %q has to be a time that has been, such as %s, or start", *to, rfc3339Now())}
			}
		}
		return exclusively(ctx, cfg, *dryRun, func(ctx context.Context) error { return rewind(ctx, cfg, at, *dryRun, w) })
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
	rows, err := reconcile(ctx, newClickHouse(cfg), timeRange{0, maxUnixSeconds}.hours(), 0, false, func(unequal) {})
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
	groups, err := whole(admin.DescribeGroups(ctx, group))
	if err != nil && !errors.Is(err, kerr.GroupIDNotFound) { // nobody has ever joined it
		return fmt.Errorf("describe group %s: %w", group, err)
	}
	if members := groups[group].Members; len(members) > 0 {
		return fmt.Errorf("group %s has members, %d of them, such as one at %s: stop the program first, or wait until the group has missed those that were killed",
			group, len(members), members[0].ClientHost)
	}
	return nil
}

// rewindTargets returns the first offset of each partition at or after the time. A time before the log's start is refused
// where the log was cut: what was there is gone.
func rewindTargets(ctx context.Context, admin *kadm.Client, topic string, at time.Time) (kadm.Offsets, error) {
	starts, err := whole(admin.ListStartOffsets(ctx, topic))
	if err != nil {
		return nil, fmt.Errorf("starts of topic %s: %w", topic, err)
	}
	if at.IsZero() {
		return starts.Offsets(), nil
	}
	found, err := whole(admin.ListOffsetsAfterMilli(ctx, at.UnixMilli(), topic))
	if err != nil {
		return nil, fmt.Errorf("offsets of topic %s at %s: %w", topic, at.Format(time.RFC3339), err)
	}
	first, err := whole(admin.ListOffsetsAfterMilli(ctx, 0, topic)) // which has the time of the first record left
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
