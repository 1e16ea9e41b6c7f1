// Dead letters: the subcommand dlq.
//
// dlq.go lists dead letters, shows one, and replays them, which is count-neutral: a letter goes back to the main topic under
// its event's own key, where the dedupe catches it if it was stored meanwhile. The letter itself stays: Kafka deletes no single
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
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
	"unicode/utf8"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kgo"
)

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

// each hands the selected letters to take, until that has taken as many as the limit says.
func (f *dlqFlags) each(ctx context.Context, cfg *settings, take func(*kgo.Record) (taken bool, err error)) error {
	if kinds := []string{"", errorUnmarshal, errorInsertFailed, errorExhausted}; !slices.Contains(kinds, f.kind) {
		return badArgument{fmt.Errorf("-type %s: has to be one of%s", f.kind, strings.Join(kinds, " "))}
	}
	if f.since < 0 || f.limit < 0 {
		return badArgument{errors.New("-since and -limit cannot be negative")}
	}
	n := 0
	return readRecords(ctx, cfg, cfg.kafkaTopic+".dlq", "", func(rec *kgo.Record) error {
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

func dlqListTool(fs *flag.FlagSet) toolRun {
	var f dlqFlags
	f.define(fs)
	asJSON := fs.Bool("json", false, "a JSON object a line")
	return func(ctx context.Context, cfg *settings, _ []string, w io.Writer) error {
		t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
		n := 0
		err := f.each(ctx, cfg, func(rec *kgo.Record) (taken bool, err error) {
			if *asJSON {
				return true, json.NewEncoder(w).Encode(letterJSON(rec))
			}
			if n++; n%1000 == 0 { // or it would keep all of them, to find out how wide a column is
				err = t.Flush()
			}
			if n == 1 {
				fmt.Fprintln(t, "LETTER\tSENT\tTYPE\tRETRIES\tFROM\tERROR")
			}
			of := func(key string) string { // whoever wrote it, it is one cell
				quoted := strconv.QuoteToGraphic(header(rec, key))
				return quoted[1 : len(quoted)-1]
			}
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

func dlqShowTool(*flag.FlagSet) toolRun {
	return func(ctx context.Context, cfg *settings, args []string, w io.Writer) error {
		var partition int32
		var offset int64
		which := strings.Join(args, " ")
		if n, err := fmt.Sscanf(which, "%d:%d", &partition, &offset); n != 2 || err != nil || fmt.Sprintf("%d:%d", partition, offset) != which {
			return badArgument{fmt.Errorf("%q is not PARTITION:OFFSET", which)}
		}
		found := false
		err := readRecords(ctx, cfg, cfg.kafkaTopic+".dlq", "", func(rec *kgo.Record) error {
			if rec.Partition == partition && rec.Offset == offset {
				found = true
				e := json.NewEncoder(w)
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

// replayBytes is how many bytes of letters are put back at a time.
const replayBytes = 16 << 20

func dlqReplayTool(fs *flag.FlagSet) toolRun {
	var f dlqFlags
	f.define(fs)
	dryRun := fs.Bool("dry-run", false, "say what would be put back, and do not")
	return func(ctx context.Context, cfg *settings, _ []string, w io.Writer) error {
		side, err := newSideProducer(cfg, nil)
		if err != nil {
			return err
		}
		defer side.close()
		var letters []*kgo.Record // that wait to be put back
		size, n, noEvent, tired := 0, 0, 0, 0
		putBack := func() error {
			for _, result := range side.produceOnce(ctx, letters) {
				if errors.Is(result.Err, kerr.MessageTooLarge) {
					result = side.produceOnce(ctx, []*kgo.Record{result.Record})[0]
				}
				if result.Err != nil {
					return fmt.Errorf("some letters were not acknowledged, it is safe to run this again: %w", result.Err)
				}
			}
			letters, size = letters[:0], 0
			return nil
		}
		var p eventParser
		err = f.each(ctx, cfg, func(rec *kgo.Record) (taken bool, err error) {
			ev, err := p.decode(rec.Value)
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
			id, _ := ev.id(nil)
			again := &kgo.Record{Topic: cfg.kafkaTopic, Key: hex.AppendEncode(nil, id[:]), Value: rec.Value, Headers: rec.Headers}
			again.Headers = setHeaders(again.Headers, "retry_count", "0", // it gets all its attempts again
				"replay_count", strconv.Itoa(replays+1), "replayed_at", rfc3339Now())
			letters = append(letters, again)
			if size += recordBytes(again); size > replayBytes {
				err = putBack()
			}
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
