// Dead letters for people: list them, look at one, send them on their way again.
//
// dlq.go owns the subcommand dlq. Replaying is count-neutral: a letter goes back to the main topic under its event's own key,
// where the dedupe catches it if it was stored meanwhile. The letter itself stays: Kafka deletes no single records.

package main

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
	"unicode/utf8"

	"github.com/twmb/franz-go/pkg/kgo"
)

// maxReplays guards against a loop of replays by a script: a letter that came back so often needs a person.
const maxReplays = 3

const dlqUsage = `dlq list    [-since 24h] [-type T] [-filter TEXT] [-json]     what is in the dead letters
dlq show    PARTITION:OFFSET                                  one letter, whole
dlq replay  [-since 24h] [-type T] [-filter TEXT] [-limit N] [-dry-run]
                                                              put letters back on the main topic
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

// matches says whether the flags select a letter.
func (f *dlqFlags) matches(rec *kgo.Record) bool {
	return (f.since == 0 || time.Since(rec.Timestamp) <= f.since) &&
		(f.kind == "" || header(rec, "error_type") == f.kind) &&
		(f.filter == "" || strings.Contains(string(rec.Value), f.filter) || strings.Contains(header(rec, "error_message"), f.filter))
}

// checkKind refuses an unknown error_type.
func (f *dlqFlags) checkKind() error {
	if kinds := []string{"", errorUnmarshal, errorInsertFailed, errorExhausted}; !slices.Contains(kinds, f.kind) {
		return badArgument{fmt.Errorf("-type %s: has to be one of%s", f.kind, strings.Join(kinds, " "))}
	}
	return nil
}

func dlqListTool(fs *flag.FlagSet) toolRun {
	var f dlqFlags
	f.define(fs)
	asJSON := fs.Bool("json", false, "a JSON object a line")
	return func(ctx context.Context, cfg *settings, _ []string, w io.Writer) error {
		if err := f.checkKind(); err != nil {
			return err
		}
		t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
		n := 0
		err := readWhole(ctx, cfg, cfg.kafkaTopic+".dlq", func(rec *kgo.Record) {
			if !f.matches(rec) || f.limit > 0 && n >= f.limit {
				return
			}
			n++
			if *asJSON {
				json.NewEncoder(t).Encode(letterJSON(rec))
				return
			}
			if n == 1 {
				fmt.Fprintln(t, "LETTER\tSENT\tTYPE\tRETRIES\tFROM\tERROR")
			}
			fmt.Fprintf(t, "%d:%d\t%s\t%s\t%s\t%s/%s:%s\t%.100q\n", rec.Partition, rec.Offset, header(rec, "sent_to_dlq_at"), header(rec, "error_type"),
				header(rec, "final_retry_count"), header(rec, "original_topic"), header(rec, "original_partition"), header(rec, "original_offset"), header(rec, "error_message"))
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
		err := readWhole(ctx, cfg, cfg.kafkaTopic+".dlq", func(rec *kgo.Record) {
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
		if err := f.checkKind(); err != nil {
			return err
		}
		return dlqReplay(ctx, cfg, &f, *dryRun, w)
	}
}

func dlqReplay(ctx context.Context, cfg *settings, f *dlqFlags, dryRun bool, w io.Writer) error {
	var letters []*kgo.Record
	noEvent, tired := 0, 0
	var p eventParser
	err := readWhole(ctx, cfg, cfg.kafkaTopic+".dlq", func(rec *kgo.Record) {
		if !f.matches(rec) || f.limit > 0 && len(letters) >= f.limit {
			return
		}
		ev, problems, err := p.parse(rec.Value)
		if err != nil || len(problems) > 0 || !ev.storable() {
			noEvent++
			return
		}
		replays, _ := strconv.Atoi(header(rec, "replay_count"))
		if replays >= maxReplays {
			tired++
			return
		}
		id, _ := ev.id(nil)
		again := &kgo.Record{Topic: cfg.kafkaTopic, Key: hex.AppendEncode(nil, id[:]), Value: rec.Value, Headers: rec.Headers}
		again.Headers = setHeader(again.Headers, "retry_count", "0") // it gets all its attempts again
		again.Headers = setHeader(again.Headers, "replay_count", strconv.Itoa(replays+1))
		again.Headers = setHeader(again.Headers, "replayed_at", rfc3339Now())
		letters = append(letters, again)
	})
	if err != nil {
		return err
	}
	verb := "would be put back"
	if !dryRun {
		verb = "put back"
		kafka, err := newProducer(cfg, kgo.ProducerBatchMaxBytes(90<<20))
		if err != nil {
			return err
		}
		defer kafka.Close()
		if err := kafka.ProduceSync(ctx, letters...).FirstErr(); err != nil {
			return fmt.Errorf("some letters were not acknowledged, it is safe to run this again: %w", err)
		}
	}
	fmt.Fprintf(w, "%d letters %s; left out: %d that are no event, %d replayed %d times already\n", len(letters), verb, noEvent, tired, maxReplays)
	return nil
}
