// Subcommands for operators: what they have in common, and two of them, rewind and dlq. ledger.go has audit, reconcile.go
// reconcile, reshard.go reshard.
//
// After a backup was restored, a partition dropped or a disk lost, only Kafka has what is missing. rewind first makes
// events_hourly agree with what is left of events, then sets the consumer group back. The program reads on from there, skips
// what ClickHouse has, and stores the rest, counted once.
//
// dlq lists dead letters, shows one, and replays them, which is count-neutral: a letter goes back to the main topic under its
// event's own key, where the dedupe catches it if it was stored meanwhile. The letter itself stays: Kafka deletes no single
// records.

package main

import (
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
	"unicode/utf8"

	"github.com/ClickHouse/ch-go"
	"github.com/ClickHouse/ch-go/proto"
	"github.com/twmb/franz-go/pkg/kadm"
	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kgo"
)

// tool is a subcommand: it adds its flags and returns what to do once they are parsed.
type tool func(*flag.FlagSet) toolRun

type toolRun func(ctx context.Context, cfg *settings, args []string, w io.Writer) error

var tools = map[string]tool{
	"audit": auditTool, "reconcile": reconcileTool, "reshard": reshardTool, "rewind": rewindTool, "healthcheck": healthcheckTool,
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
	shards, err := newStore(cfg).shards(ctx)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	for attempt := 0; ; attempt++ {
		c, err := shards[0].dial(ctx)
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
		if err := sleep(ctx, minBackoff); err != nil {
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
	rows, err := reconcile(ctx, newStore(cfg), timeRange{0, maxUnixSeconds}.hours(), 0, false, func(unequal) {})
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

// maxReplays guards against a loop of replays by a script: a letter that came back so often needs a person.
const maxReplays = 3

const dlqUsage = `dlq list    [-since 24h] [-type T] [-filter TEXT] [-json]     what is in the dead letters
dlq show    PARTITION:OFFSET                                  one letter, whole
dlq replay  [-since 24h] [-type T] [-filter TEXT] [-limit N] [-dry-run]
                                                              put letters back on the main topic
-since goes back from now; without it, -type and -filter: all letters.
`

type dlqFlags struct {
	since        time.Duration
	kind, filter string
	limit        int
}

func (f *dlqFlags) define(fs *flag.FlagSet) {
	fs.DurationVar(&f.since, "since", 0, "only letters of this last while; 0 means all")
	fs.StringVar(&f.kind, "type", "", "only this error_type: "+errorUnmarshal+", "+errorInsertFailed+" or "+errorExhausted)
	fs.StringVar(&f.filter, "filter", "", "only letters whose value or error_message contains this text")
	fs.IntVar(&f.limit, "limit", 0, "at most this many; 0 means all")
}

// each hands the selected letters to take, until that has returned true as often as the limit says.
func (f *dlqFlags) each(ctx context.Context, cfg *settings, take func(*kgo.Record) bool) error {
	if kinds := []string{"", errorUnmarshal, errorInsertFailed, errorExhausted}; !slices.Contains(kinds, f.kind) {
		return badArgument{fmt.Errorf("-type %s: has to be one of%s", f.kind, strings.Join(kinds, " "))}
	}
	if f.since < 0 || f.limit < 0 {
		return badArgument{errors.New("-since and -limit cannot be negative")}
	}
	n := 0
	return readRecords(ctx, cfg, cfg.kafkaTopic+".dlq", "", func(rec *kgo.Record) {
		selected := (f.since == 0 || time.Since(rec.Timestamp) <= f.since) &&
			(f.kind == "" || header(rec, "error_type") == f.kind) &&
			(bytes.Contains(rec.Value, []byte(f.filter)) || strings.Contains(header(rec, "error_message"), f.filter)) &&
			(f.limit == 0 || n < f.limit)
		if selected && take(rec) {
			n++
		}
	})
}

func dlqListTool(fs *flag.FlagSet) toolRun {
	var f dlqFlags
	f.define(fs)
	asJSON := fs.Bool("json", false, "a JSON object a line")
	return func(ctx context.Context, cfg *settings, _ []string, w io.Writer) error {
		t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
		n := 0
		err := f.each(ctx, cfg, func(rec *kgo.Record) bool {
			if *asJSON {
				json.NewEncoder(t).Encode(letterJSON(rec))
				return true
			}
			if n++; n == 1 {
				fmt.Fprintln(t, "LETTER\tSENT\tTYPE\tRETRIES\tFROM\tERROR")
			}
			of := func(key string) string { // whoever wrote it, it is one cell
				quoted := strconv.QuoteToGraphic(header(rec, key))
				return quoted[1 : len(quoted)-1]
			}
			fmt.Fprintf(t, "%d:%d\t%s\t%s\t%s\t%s/%s:%s\t%.100q\n", rec.Partition, rec.Offset, of("sent_to_dlq_at"), of("error_type"),
				of("final_retry_count"), of("original_topic"), of("original_partition"), of("original_offset"), header(rec, "error_message"))
			return true
		})
		t.Flush()
		if err == nil && !*asJSON {
			fmt.Fprintf(w, "%d dead letters\n", n)
		}
		return err
	}
}

// letterJSON gives a value that is not text as base64, beside an empty string, so that nothing is hidden or invented.
func letterJSON(rec *kgo.Record) map[string]any {
	headers := map[string]string{}
	for _, h := range rec.Headers {
		headers[h.Key] = string(h.Value)
	}
	m := map[string]any{"partition": rec.Partition, "offset": rec.Offset, "key": string(rec.Key), "headers": headers, "value": string(rec.Value)}
	if !utf8.Valid(rec.Value) {
		m["value"], m["value_base64"] = "", rec.Value
	}
	return m
}

func dlqShowTool(*flag.FlagSet) toolRun {
	return func(ctx context.Context, cfg *settings, args []string, w io.Writer) error {
		var partition int32
		var offset int64
		which := strings.Join(args, " ")
		if n, err := fmt.Sscanf(which, "%d:%d", &partition, &offset); n != 2 || err != nil || fmt.Sprintf("%d:%d", partition, offset) != which {
			return badArgument{fmt.Errorf("%q is not PARTITION:OFFSET", which)}
		}
		found := false
		err := readRecords(ctx, cfg, cfg.kafkaTopic+".dlq", "", func(rec *kgo.Record) {
			if rec.Partition == partition && rec.Offset == offset {
				found = true
				e := json.NewEncoder(w)
				e.SetIndent("", "  ")
				e.Encode(letterJSON(rec))
			}
		})
		if err == nil && !found {
			err = fmt.Errorf("there is no letter %d:%d", partition, offset)
		}
		return err
	}
}

func dlqReplayTool(fs *flag.FlagSet) toolRun {
	var f dlqFlags
	f.define(fs)
	dryRun := fs.Bool("dry-run", false, "say what would be put back, and do not")
	return func(ctx context.Context, cfg *settings, _ []string, w io.Writer) error {
		var letters []*kgo.Record
		noEvent, tired := 0, 0
		var p eventParser
		err := f.each(ctx, cfg, func(rec *kgo.Record) bool {
			ev, err := p.decode(rec.Value)
			replays, _ := strconv.Atoi(header(rec, "replay_count"))
			switch {
			case err != nil:
				noEvent++
				return false
			case replays >= maxReplays:
				tired++
				return false
			}
			id, _ := ev.id(nil)
			again := &kgo.Record{Topic: cfg.kafkaTopic, Key: hex.AppendEncode(nil, id[:]), Value: rec.Value, Headers: rec.Headers}
			again.Headers = setHeaders(again.Headers, "retry_count", "0", // it gets all its attempts again
				"replay_count", strconv.Itoa(replays+1), "replayed_at", rfc3339Now())
			letters = append(letters, again)
			return true
		})
		if err != nil {
			return err
		}
		verb := "would be put back"
		if !*dryRun {
			verb = "put back"
			side, err := newSideProducer(cfg, nil)
			if err != nil {
				return err
			}
			defer side.close()
			for _, result := range side.produceOnce(ctx, letters) {
				if errors.Is(result.Err, kerr.MessageTooLarge) {
					result = side.produceOnce(ctx, []*kgo.Record{result.Record})[0]
				}
				if result.Err != nil {
					return fmt.Errorf("some letters were not acknowledged, it is safe to run this again: %w", result.Err)
				}
			}
		}
		fmt.Fprintf(w, "%d letters %s; left out: %d that are no event, %d replayed %d times already\n", len(letters), verb, noEvent, tired, maxReplays)
		return nil
	}
}
