// dlq: dead letters, listed, shown and replayed.
//
// A replay is count-neutral: a letter goes back to the main topic under its event's own key, where the program takes it for a
// duplicate if it was stored meanwhile. The letter itself stays: Kafka deletes no single records. Which letters were replayed stands in
// the offsets that the group GROUP.dlq has committed, in their metadata, so that dlq list can say it.

package ops

import (
	"bytes"
	"cmp"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
	"unicode/utf8"

	"github.com/twmb/franz-go/pkg/kadm"
	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kgo"
)

const dlqUsage = `dlq list    [-since 24h] [-type T] [-filter TEXT] [-json]     what is in the dead letters
dlq show    PARTITION:OFFSET                                  one letter, whole
dlq replay  [-since 24h] [-type T] [-filter TEXT] [-limit N] [-dry-run]
                                                              put letters back on the main topic
-since goes back from now; without it, -type and -filter: all letters.
`

// errorTypes are the values of the header error_type.
var errorTypes = []string{"unmarshal_error", "insert_failed", "max_retries_exhausted"}

// letterFlags select letters.
type letterFlags struct {
	since        time.Duration
	kind, filter string // kind is of errorTypes, or empty
	limit        int
}

func (f *letterFlags) define(fs *flag.FlagSet) {
	fs.DurationVar(&f.since, "since", 0, "only letters of this last while; 0 means all")
	fs.StringVar(&f.kind, "type", "", "only this error_type: "+strings.Join(errorTypes[:2], ", ")+" or "+errorTypes[2])
	fs.StringVar(&f.filter, "filter", "", "only letters whose value or error_message contains this text")
	fs.IntVar(&f.limit, "limit", 0, "at most this many; 0 means all")
}

// check says what is wrong with the flags.
func (f *letterFlags) check() error {
	if f.kind != "" && !slices.Contains(errorTypes, f.kind) {
		return badArgument{fmt.Errorf("-type %s: has to be one of %s", f.kind, strings.Join(errorTypes, " "))}
	}
	if f.since < 0 || f.limit < 0 {
		return badArgument{errors.New("-since and -limit cannot be negative")}
	}
	return nil
}

// each hands the selected letters to take, until that has taken as many as the limit says.
func (f *letterFlags) each(ctx context.Context, sys System, take func(*kgo.Record) (taken bool, err error)) error {
	n := 0
	return sys.readRecords(ctx, sys.Topic+suffixes[inDeadLetters], "", func(rec *kgo.Record) error {
		selected := (f.since == 0 || time.Since(rec.Timestamp) <= f.since) &&
			(f.kind == "" || header(rec, "error_type") == f.kind) &&
			(bytes.Contains(rec.Value, []byte(f.filter)) || strings.Contains(header(rec, "error_message"), f.filter)) &&
			(f.limit == 0 || n < f.limit)
		if !selected {
			return nil
		}
		taken, err := take(rec)
		if taken {
			n++
		}
		return err
	})
}

func dlqList(fs *flag.FlagSet) action {
	var f letterFlags
	f.define(fs)
	asJSON := fs.Bool("json", false, "a JSON object a line")
	return func(ctx context.Context, sys System, _ []string, w io.Writer) error {
		if err := f.check(); err != nil {
			return err
		}
		t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
		n := 0
		done, err := sys.replays(ctx)
		if err != nil {
			return err
		}
		err = f.each(ctx, sys, func(rec *kgo.Record) (taken bool, err error) {
			if *asJSON {
				letter := letterJSON(rec)
				letter["replayed"] = done[rec.Partition].has(rec.Offset)
				return true, json.NewEncoder(visible{w}).Encode(letter)
			}
			if n++; n%1000 == 0 { // or it would keep all of them, to find out how wide a column is
				err = t.Flush()
			}
			if n == 1 {
				fmt.Fprintln(t, "LETTER\tSENT\tTYPE\tRETRIES\tREPLAYED\tFROM\tERROR")
			}
			again := "no"
			if done[rec.Partition].has(rec.Offset) {
				again = "yes"
			}
			of := func(key string) string { return cell(header(rec, key)) } // whoever wrote it
			fmt.Fprintf(t, "%d:%d\t%s\t%s\t%s\t%s\t%s/%s:%s\t%.100q\n", rec.Partition, rec.Offset, of("sent_to_dlq_at"), of("error_type"),
				of("final_retry_count"), again, of("original_topic"), of("original_partition"), of("original_offset"), header(rec, "error_message"))
			return true, err
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

func dlqShow(*flag.FlagSet) action {
	return func(ctx context.Context, sys System, args []string, w io.Writer) error {
		var partition int32
		var offset int64
		which := strings.Join(args, " ")
		if n, err := fmt.Sscanf(which, "%d:%d", &partition, &offset); n != 2 || err != nil || fmt.Sprintf("%d:%d", partition, offset) != which {
			return badArgument{fmt.Errorf("%q is not PARTITION:OFFSET", which)}
		}
		found := false
		err := sys.readRecords(ctx, sys.Topic+suffixes[inDeadLetters], "", func(rec *kgo.Record) error {
			if rec.Partition == partition && rec.Offset == offset {
				found = true
				e := json.NewEncoder(visible{w})
				e.SetIndent("", "  ")
				return e.Encode(letterJSON(rec))
			}
			return nil
		})
		if err == nil && !found {
			err = fmt.Errorf("there is no letter %d:%d", partition, offset)
		}
		return err
	}
}

const (
	// maxReplays guards against a script that replays in a loop: a letter that came back so often needs a person.
	maxReplays = 3
	// replayBytes is how many bytes of letters are put back at a time. It is below franz-go's own limit of a batch, 1,000,012, and
	// that one below every broker's default limit, 1,048,588: no batch of these is too large. A larger letter goes alone.
	replayBytes = 900 << 10
	// maxBatchBytes lets the client send such a letter. The brokers decide, by the topic's max.message.bytes.
	maxBatchBytes = 90 << 20
	// replayTimeout is how long the brokers have to acknowledge a letter.
	replayTimeout = 30 * time.Second
)

func dlqReplay(fs *flag.FlagSet) action {
	var f letterFlags
	f.define(fs)
	dryRun := fs.Bool("dry-run", false, "say what would be put back, and do not")
	return func(ctx context.Context, sys System, _ []string, w io.Writer) error {
		if err := f.check(); err != nil {
			return err
		}
		// acks=all and idempotence are franz-go's defaults, and needed: what is said to be put back is on all in-sync replicas.
		kafka, err := sys.Kafka("event-ingestion-dlq", kgo.RecordPartitioner(kgo.StickyKeyPartitioner(nil)), kgo.ProducerLinger(0),
			kgo.ProducerBatchCompression(kgo.SnappyCompression()), kgo.ProducerBatchMaxBytes(maxBatchBytes), kgo.RecordDeliveryTimeout(replayTimeout))
		if err != nil {
			return err
		}
		defer kafka.Close()
		erased, err := sys.erasures(ctx)
		if err != nil {
			return err
		}
		done, err := sys.replays(ctx)
		if err != nil {
			return err
		}
		var letters []*kgo.Record     // that wait to be put back
		taking := map[int32]offsets{} // of these
		size, n, noEvent, tired, ofErased := 0, 0, 0, 0, 0
		putBack := func() error {
			for _, sent := range kafka.ProduceSync(ctx, letters...) {
				if errors.Is(sent.Err, kerr.MessageTooLarge) && len(letters) > 1 { // it may have been the batch
					sent = kafka.ProduceSync(ctx, sent.Record)[0]
				}
				if sent.Err != nil {
					return fmt.Errorf("some letters were not acknowledged, it is safe to run this again: %w", sent.Err)
				}
			}
			for p, these := range taking {
				for _, offset := range these {
					done[p] = done[p].with(offset.from)
				}
			}
			if err := sys.noteReplays(ctx, kafka, done, taking); err != nil {
				return fmt.Errorf("%d letters are put back, but dlq list will not say so: %w", len(letters), err)
			}
			letters, size = letters[:0], 0
			clear(taking)
			return nil
		}
		err = f.each(ctx, sys, func(rec *kgo.Record) (taken bool, err error) {
			id, at, user, err := sys.Decode(rec.Value)
			replays, _ := strconv.Atoi(header(rec, "replay_count"))
			switch {
			case err != nil:
				noEvent++
				return false, nil
			case erased.has(user, at):
				ofErased++
				return false, nil
			case replays >= maxReplays:
				tired++
				return false, nil
			}
			if n++; *dryRun {
				return true, nil
			}
			again := replayed(rec, sys.Topic, id, replays+1)
			takes := recordBytes(again)
			if size+takes > replayBytes {
				err = putBack()
			}
			letters, size = append(letters, again), size+takes
			taking[rec.Partition] = append(taking[rec.Partition], offsetRun{rec.Offset, rec.Offset})
			return true, err
		})
		if err == nil {
			err = putBack()
		}
		if err != nil {
			return err
		}
		verb := "put back"
		if *dryRun {
			verb = "would be put back"
		}
		fmt.Fprintf(w, "%d letters %s; left out: %d that are no event, %d replayed %d times already, %d of erased users\n", n, verb, noEvent, tired, maxReplays, ofErased)
		return nil
	}
}

// replayed is a letter as it goes back: under its event's key, with all its attempts before it again. Its other headers stay: they
// say where it has been.
func replayed(letter *kgo.Record, topic string, id [32]byte, replays int) *kgo.Record {
	headers := []kgo.RecordHeader{
		{Key: "retry_count", Value: []byte("0")},
		{Key: "replay_count", Value: []byte(strconv.Itoa(replays))},
		{Key: "replayed_at", Value: []byte(time.Now().UTC().Format(time.RFC3339))},
	}
	for _, h := range letter.Headers {
		if !slices.ContainsFunc(headers[:3], func(own kgo.RecordHeader) bool { return own.Key == h.Key }) {
			headers = append(headers, h)
		}
	}
	return &kgo.Record{Topic: topic, Key: hex.AppendEncode(nil, id[:]), Value: letter.Value, Headers: headers}
}

// offsetRun has both ends included.
type offsetRun struct{ from, to int64 }

// offsets are runs in ascending order, which do not touch.
type offsets []offsetRun

func (o offsets) has(offset int64) bool {
	i, found := slices.BinarySearchFunc(o, offset, func(s offsetRun, at int64) int { return cmp.Compare(s.to, at) })
	return found || i < len(o) && o[i].from <= offset
}

// with is o and one more.
func (o offsets) with(offset int64) offsets {
	if o.has(offset) {
		return o
	}
	i, _ := slices.BinarySearchFunc(o, offset, func(s offsetRun, at int64) int { return cmp.Compare(s.to, at) })
	o = slices.Insert(o, i, offsetRun{offset, offset})
	if i+1 < len(o) && o[i+1].from == offset+1 {
		o[i].to = o[i+1].to
		o = slices.Delete(o, i+1, i+2)
	}
	if i > 0 && o[i-1].to == offset-1 {
		o[i-1].to = o[i].to
		o = slices.Delete(o, i, i+1)
	}
	return o
}

// maxMetadata is how many bytes of metadata the brokers take with an offset (offset.metadata.max.bytes), of 4,096 by default.
const maxMetadata = 4000

// String is o as 0-17,19; of more than maxMetadata bytes the oldest are left out.
func (o offsets) String() string {
	var runs []string
	size := 0
	for _, s := range slices.Backward(o) {
		run := fmt.Sprint(s.from)
		if s.to > s.from {
			run = fmt.Sprintf("%d-%d", s.from, s.to)
		}
		if size += len(run) + 1; size > maxMetadata {
			break
		}
		runs = append(runs, run)
	}
	slices.Reverse(runs)
	return strings.Join(runs, ",")
}

// parseOffsets reads what String has written; what is no such thing is nothing.
func parseOffsets(text string) (o offsets) {
	for run := range strings.SplitSeq(text, ",") {
		first, last, more := strings.Cut(run, "-")
		from, err := strconv.ParseInt(first, 10, 64)
		to := from
		if more && err == nil {
			to, err = strconv.ParseInt(last, 10, 64)
		}
		if err != nil || from > to || len(o) > 0 && from <= o[len(o)-1].to+1 {
			return nil
		}
		o = append(o, offsetRun{from, to})
	}
	return o
}

// replays are the letters that were replayed, by partition.
func (sys System) replays(ctx context.Context) (map[int32]offsets, error) {
	kafka, err := sys.Kafka("event-ingestion-dlq")
	if err != nil {
		return nil, err
	}
	defer kafka.Close()
	topic := sys.Topic + suffixes[inDeadLetters]
	committed, err := committedOf(ctx, kadm.NewClient(kafka), sys.Group+suffixes[inDeadLetters], topic)
	if err != nil {
		return nil, err
	}
	done := map[int32]offsets{}
	for p, c := range committed[topic] {
		if c.Err == nil {
			done[p] = parseOffsets(c.Metadata)
		}
	}
	return done, nil
}

// noteReplays commits done of the partitions of which letters were put back just now.
func (sys System) noteReplays(ctx context.Context, kafka *kgo.Client, done, of map[int32]offsets) error {
	if len(of) == 0 {
		return nil
	}
	var commits kadm.Offsets
	for p := range of {
		last := done[p][len(done[p])-1].to
		commits.Add(kadm.Offset{Topic: sys.Topic + suffixes[inDeadLetters], Partition: p, At: last + 1, LeaderEpoch: -1, Metadata: done[p].String()})
	}
	answer, err := kadm.NewClient(kafka).CommitOffsets(ctx, sys.Group+suffixes[inDeadLetters], commits)
	return cmp.Or(err, answer.Error())
}

// recordBytes is about what a record takes in a batch.
func recordBytes(rec *kgo.Record) int {
	n := 64 + len(rec.Key) + len(rec.Value)
	for _, h := range rec.Headers {
		n += len(h.Key) + len(h.Value) + 8
	}
	return n
}
