// dlq: dead letters, listed, shown and replayed.
//
// A replay is count-neutral: a letter goes back to the main topic under its event's own key, where the program takes it for a
// duplicate if it was stored meanwhile. The letter itself stays: Kafka deletes no single records.

package ops

import (
	"bytes"
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

// each hands the selected letters to take, until that has taken as many as the limit says.
func (f *letterFlags) each(ctx context.Context, sys System, take func(*kgo.Record) (taken bool, err error)) error {
	if f.kind != "" && !slices.Contains(errorTypes, f.kind) {
		return badArgument{fmt.Errorf("-type %s: has to be one of %s", f.kind, strings.Join(errorTypes, " "))}
	}
	if f.since < 0 || f.limit < 0 {
		return badArgument{errors.New("-since and -limit cannot be negative")}
	}
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
		t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
		n := 0
		err := f.each(ctx, sys, func(rec *kgo.Record) (taken bool, err error) {
			if *asJSON {
				return true, json.NewEncoder(visible{w}).Encode(letterJSON(rec))
			}
			if n++; n%1000 == 0 { // or it would keep all of them, to find out how wide a column is
				err = t.Flush()
			}
			if n == 1 {
				fmt.Fprintln(t, "LETTER\tSENT\tTYPE\tRETRIES\tFROM\tERROR")
			}
			of := func(key string) string { return cell(header(rec, key)) } // whoever wrote it
			fmt.Fprintf(t, "%d:%d\t%s\t%s\t%s\t%s/%s:%s\t%.100q\n", rec.Partition, rec.Offset, of("sent_to_dlq_at"), of("error_type"),
				of("final_retry_count"), of("original_topic"), of("original_partition"), of("original_offset"), header(rec, "error_message"))
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
		// acks=all and idempotence are franz-go's defaults, and needed: what is said to be put back is on all in-sync replicas.
		kafka, err := sys.Kafka("event-ingestion-dlq", kgo.RecordPartitioner(kgo.StickyKeyPartitioner(nil)), kgo.ProducerLinger(0),
			kgo.ProducerBatchCompression(kgo.SnappyCompression()), kgo.ProducerBatchMaxBytes(maxBatchBytes), kgo.RecordDeliveryTimeout(replayTimeout))
		if err != nil {
			return err
		}
		defer kafka.Close()
		var letters []*kgo.Record // that wait to be put back
		size, n, noEvent, tired := 0, 0, 0, 0
		putBack := func() error {
			for _, sent := range kafka.ProduceSync(ctx, letters...) {
				if errors.Is(sent.Err, kerr.MessageTooLarge) && len(letters) > 1 { // it may have been the batch
					sent = kafka.ProduceSync(ctx, sent.Record)[0]
				}
				if sent.Err != nil {
					return fmt.Errorf("some letters were not acknowledged, it is safe to run this again: %w", sent.Err)
				}
			}
			letters, size = letters[:0], 0
			return nil
		}
		err = f.each(ctx, sys, func(rec *kgo.Record) (taken bool, err error) {
			id, _, _, err := sys.Decode(rec.Value)
			replays, _ := strconv.Atoi(header(rec, "replay_count"))
			switch {
			case err != nil:
				noEvent++
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
		fmt.Fprintf(w, "%d letters %s; left out: %d that are no event, %d replayed %d times already\n", n, verb, noEvent, tired, maxReplays)
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

// recordBytes is about what a record takes in a batch.
func recordBytes(rec *kgo.Record) int {
	n := 64 + len(rec.Key) + len(rec.Value)
	for _, h := range rec.Headers {
		n += len(h.Key) + len(h.Value) + 8
	}
	return n
}
