// The ledger: what was acknowledged against what is stored.
//
// ledger.go owns the subcommand audit, which reads the topics and the tables independently of the program's own bookkeeping.

package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"strconv"
	"text/tabwriter"

	"github.com/ClickHouse/ch-go"
	"github.com/ClickHouse/ch-go/proto"
	"github.com/twmb/franz-go/pkg/kadm"
	"github.com/twmb/franz-go/pkg/kgo"
)

func auditTool(fs *flag.FlagSet) toolRun {
	var r timeRange
	r.flags(fs)
	asJSON := fs.Bool("json", false, "the figures as a JSON object")
	erased := map[string]bool{}
	fs.Func("erased", "user_id that was erased from the tables: its events are left out; may be given several times", func(s string) error { erased[s] = true; return nil })
	return func(ctx context.Context, cfg *settings, _ []string, w io.Writer) error {
		if err := r.check(); err != nil {
			return err
		}
		l, err := readLedger(ctx, cfg, r, erased)
		if err != nil {
			return err
		}
		l.print(w, *asJSON)
		if l.difference() != 0 || l.unequal != 0 {
			return errDiffers
		}
		return nil
	}
}

// ledger counts events by where they are. An event in several places counts for the last of these.
type ledger struct {
	records, junk    int64
	ids              map[eventID]place
	replays          map[eventID]int    // how often it came back from the dead letters; only of those that did
	at               [inTable + 1]int64 // how many of ids are in each place
	lost             []eventID          // those that are nowhere but on the topic
	rows, aggregated int64
	unequal          int64 // by how much they differ, hour by hour
}

type place uint8

const (
	onTopic place = iota
	inDeadLetters
	inRetry
	inTable
)

// readLedger reads topics and tables. The events of erased users are left out.
func readLedger(ctx context.Context, cfg *settings, r timeRange, erased map[string]bool) (*ledger, error) {
	l := &ledger{ids: map[eventID]place{}, replays: map[eventID]int{}}
	var p eventParser
	note := func(rec *kgo.Record, where place) {
		ev, err := p.decode(rec.Value)
		if err != nil {
			if where == onTopic {
				l.junk++
			}
			return
		}
		if ev.timestamp < r.from || ev.timestamp >= r.to || erased[string(ev.userID)] {
			return
		}
		id, _ := ev.id(nil)
		replays, _ := strconv.Atoi(header(rec, "replay_count"))
		if where == onTopic {
			if l.records++; replays > l.replays[id] {
				l.replays[id] = replays
			}
		} else if where == inDeadLetters && replays < l.replays[id] {
			return // it has come back since
		} else if _, known := l.ids[id]; !known {
			return // older than what the topic still holds
		}
		l.ids[id] = max(l.ids[id], where)
	}
	for where, suffix := range []string{onTopic: "", inDeadLetters: ".dlq", inRetry: ".retry"} {
		group := ""
		if place(where) == inRetry { // what is committed has been put back, or is dead
			group = cfg.kafkaGroup + suffix
		}
		err := readRecords(ctx, cfg, cfg.kafkaTopic+suffix, group, func(rec *kgo.Record) { note(rec, place(where)) })
		if err != nil {
			return nil, err
		}
	}
	if err := l.readTables(ctx, cfg, r); err != nil {
		return nil, err
	}
	for id, where := range l.ids {
		if l.at[where]++; where == onTopic {
			l.lost = append(l.lost, id)
		}
	}
	return l, nil
}

func (l *ledger) readTables(ctx context.Context, cfg *settings, r timeRange) error {
	st := newStore(cfg)
	c, err := st.dial(ctx)
	if err != nil {
		return err
	}
	defer c.Close()
	var got proto.ColFixedStr32
	err = c.Do(ctx, eachRow(ch.Query{
		Body: st.sql(fmt.Sprintf("SELECT DISTINCT event_id FROM {events} WHERE timestamp >= %d AND timestamp < %d", r.from, r.to)),
	}, func(i int) {
		if _, known := l.ids[got[i]]; known { // else older than what the topic still holds
			l.ids[got[i]] = inTable
		}
	}, &got))
	if err != nil {
		return err
	}
	// The aggregate has whole hours: those entirely within the range are compared.
	from, to := (r.from+hourSeconds-1)/hourSeconds*hourSeconds, r.to/hourSeconds*hourSeconds
	var rows, aggregated, unequal proto.ColInt64
	err = c.Do(ctx, eachRow(ch.Query{
		Body: st.sql(fmt.Sprintf(`SELECT toInt64(sum(has)), toInt64(sum(counted)), toInt64(sum(abs(has - counted))) FROM (
			SELECT name, ch, hour, sum(has) AS has, sum(counted) AS counted FROM (
				SELECT CAST(event_name, 'String') AS name, CAST(channel, 'String') AS ch, toStartOfHour(timestamp) AS hour, toInt64(uniqExact(event_id)) AS has, toInt64(0) AS counted
				FROM {events} WHERE timestamp >= %[1]d AND timestamp < %[2]d GROUP BY name, ch, hour
				UNION ALL
				SELECT CAST(event_name, 'String') AS name, CAST(channel, 'String') AS ch, hour, toInt64(0) AS has, sum(event_count) AS counted
				FROM {events_hourly} WHERE hour >= %[1]d AND hour < %[2]d GROUP BY name, ch, hour
			) GROUP BY name, ch, hour)`, from, to)),
	}, func(i int) { l.rows, l.aggregated, l.unequal = rows[i], aggregated[i], unequal[i] }, &rows, &aggregated, &unequal))
	return err
}

// difference is how many acknowledged events are nowhere.
func (l *ledger) difference() int64 { return l.at[onTopic] }

// print writes the figures, and at most ten ids of lost events.
func (l *ledger) print(w io.Writer, asJSON bool) {
	distinct, nowhere := int64(len(l.ids)), []string{}
	for _, id := range l.lost[:min(len(l.lost), 10)] {
		nowhere = append(nowhere, fmt.Sprintf("%x", id))
	}
	object := map[string]any{"nowhere": nowhere}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	for _, f := range []struct {
		words, key string
		n          int64
	}{
		{"records on the topic", "records", l.records},
		{"duplicates", "duplicates", l.records - distinct},
		{"distinct events", "distinct_events", distinct},
		{"stored", "stored", l.at[inTable]},
		{"waiting for a retry", "waiting", l.at[inRetry]},
		{"dead letters", "dead_letters", l.at[inDeadLetters]},
		{"difference", "difference", l.difference()},
		{"records that are no event", "no_event", l.junk},
		{"distinct rows in whole hours", "distinct_rows", l.rows},
		{"counted in events_hourly", "aggregated", l.aggregated},
		{"counted too few or too many, hour by hour", "unequal", l.unequal},
	} {
		object[f.key] = f.n
		fmt.Fprintf(t, "%s\t%d\t\n", f.words, f.n)
	}
	if asJSON {
		json.NewEncoder(w).Encode(object)
		return
	}
	t.Flush()
	for _, id := range nowhere {
		fmt.Fprintf(w, "nowhere: %s\n", id)
	}
	if len(l.lost) > len(nowhere) {
		fmt.Fprintln(w, "…")
	}
}

// readRecords hands each record of a topic to f that the group has not committed, all of them without a group, up to where the
// partitions end when it starts.
func readRecords(ctx context.Context, cfg *settings, topic, group string, f func(*kgo.Record)) error {
	kafka, err := newKafka(cfg, "event-ingestion-audit", kgo.FetchMaxWait(fetchWait), kgo.KeepControlRecords(), kgo.FetchIsolationLevel(kgo.ReadCommitted()))
	if err != nil {
		return err
	}
	defer kafka.Close()
	admin := kadm.NewClient(kafka)
	ends, err := whole(admin.ListEndOffsets(ctx, topic))
	if err != nil {
		return fmt.Errorf("ends of topic %s: %w", topic, err)
	}
	starts, err := whole(admin.ListStartOffsets(ctx, topic))
	if err != nil {
		return fmt.Errorf("starts of topic %s: %w", topic, err)
	}
	var done []int64
	if group != "" {
		if done, err = committed(ctx, admin, topic, group); err != nil {
			return fmt.Errorf("offsets of group %s: %w", group, err)
		}
	}
	left := map[int32]int64{} // end offsets of the partitions that are not read that far yet
	from := map[int32]kgo.Offset{}
	for p, end := range ends[topic] {
		start := starts[topic][p].Offset
		if int(p) < len(done) {
			start = max(start, done[p])
		}
		if start < end.Offset {
			left[p] = end.Offset
			from[p] = kgo.NewOffset().At(start)
		}
	}
	kafka.AddConsumePartitions(map[string]map[int32]kgo.Offset{topic: from})
	for len(left) > 0 {
		fetches := kafka.PollFetches(ctx)
		if err := fetches.Err(); err != nil {
			return fmt.Errorf("read topic %s: %w", topic, err)
		}
		fetches.EachRecord(func(rec *kgo.Record) {
			end := left[rec.Partition] // 0 when all of it is read
			if rec.Offset < end && !rec.Attrs.IsControl() {
				f(rec)
			}
			if rec.Offset+1 >= end {
				delete(left, rec.Partition)
			}
		})
	}
	return nil
}
