// What each step of an event's way costs, alone. The whole way is measured in test/.
//
// Figures of one run on one machine compare; absolute ones do not travel. `make bench` runs all, `make profile` some
// under pprof. Every benchmark checks what it produced.

package main

import (
	"context"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/twmb/franz-go/pkg/kgo"
)

func BenchmarkParse(b *testing.B) {
	p, raw := new(eventParser), []byte(sampleEvent)
	b.ReportAllocs()
	b.SetBytes(int64(len(raw)))
	for b.Loop() {
		if ev, problems, err := p.parse(raw); err != nil || len(problems) > 0 || len(ev.tags) != 2 {
			b.Fatal(err, problems)
		}
	}
}

func BenchmarkID(b *testing.B) {
	ev := mustParse(b, new(eventParser), sampleEvent)
	var buf []byte
	want, _ := ev.id(nil)
	b.ReportAllocs()
	for b.Loop() {
		var id eventID
		if id, buf = ev.id(buf); id != want {
			b.Fatal(id)
		}
	}
}

func BenchmarkEncode(b *testing.B) {
	ev := mustParse(b, new(eventParser), sampleEvent)
	var buf []byte
	b.ReportAllocs()
	for b.Loop() {
		if buf = appendEvent(buf[:0], ev); len(buf) < 200 {
			b.Fatalf("%s", buf)
		}
	}
}

// BenchmarkBodyToRecords is the hot path of the API: a bulk body of 1000 events to records ready for Kafka, without and with
// an insert_id.
func BenchmarkBodyToRecords(b *testing.B) {
	for _, more := range []string{"", `"insert_id":"0f9c1d6e-4b7a-4f5e-9d57-3f0b7a6c1e42",`} {
		b.Run(fmt.Sprintf("insert_id=%t", more != ""), func(b *testing.B) {
			event := "{" + more + sampleEvent[1:]
			body := []byte(`{"events":[` + strings.Repeat(event+",", 999) + event + `]}`)
			q := newTestRequest()
			b.ReportAllocs()
			b.SetBytes(int64(len(body)))
			for b.Loop() {
				q.fill(body)
				if q.encode(b.Context(), typeJSON, 1795441976) != nil || len(q.records) != 1000 {
					b.Fatal("not 1000 records")
				}
				q.sealRecords("events")
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/1000, "ns/event")
		})
	}
}

// BenchmarkRecordToRow is the hot path of a worker: decode, hash, append.
func BenchmarkRecordToRow(b *testing.B) {
	const rows = 2000
	w := idleWorker(rows)
	records := make([]*kgo.Record, rows)
	for i := range records {
		ev := mustParse(b, new(eventParser), strings.Replace(sampleEvent, "user_123", fmt.Sprint("user_", i), 1))
		id, _ := ev.id(nil)
		records[i] = &kgo.Record{Key: hex.AppendEncode(nil, id[:]), Value: appendEvent(nil, ev)}
	}
	b.ReportAllocs()
	for b.Loop() {
		w.cur.reset()
		w.queue = append(w.queue[:0], records)
		if bad, err := w.takeIn(rows); bad != nil || w.cur.rows() != rows {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/rows, "ns/event")
}

// BenchmarkInsert is one round into the real tables, of 1, 5 and 20 full blocks.
func BenchmarkInsert(b *testing.B) {
	for _, blocks := range []int{1, 5, 20} {
		b.Run(fmt.Sprintf("rows=%d", blocks*2000), func(b *testing.B) {
			env := newSpace(b)
			cfg := settingsFrom(b, env)
			in := newInserter(preparedClickHouse(b, cfg), cfg, &newStats().store, ignored, nil, newRoundCall(), membership{isMember: func(context.Context) error { return nil }})
			ev := mustParse(b, new(eventParser), sampleEvent)
			serial := uint64(0)
			for b.Loop() {
				b.StopTimer()
				in.round = in.round[:0]
				for range blocks {
					blk := newBlock(2000)
					for range 2000 {
						var id eventID
						serial++
						copy(id[:], fmt.Sprint(serial))
						blk.append(&id, ev, &kgo.Record{})
					}
					in.round = append(in.round, blk)
				}
				b.StartTimer()
				in.insertRows(b.Context())
			}
			if got := clickhouseQuery(b, "SELECT count() FROM "+cfg.clickhouseDatabase+".events"); got != fmt.Sprint(serial) {
				b.Fatalf("%s rows, want %d", got, serial)
			}
		})
	}
}

// BenchmarkKnown is the dedupe of an event that is new: one look and one addition, in rounds of 20,000, in a minute that
// grows to a million ids.
func BenchmarkKnown(b *testing.B) {
	const rows = 20_000
	ev := mustParse(b, new(eventParser), sampleEvent)
	blk, id := newBlock(rows), eventID{}
	for range rows {
		blk.append(&id, ev, &kgo.Record{})
	}
	known := newDedupe(nil, nil, 1<<28)
	rnd, n := rand.New(rand.NewPCG(1, 2)), 0 // ids are hashes
	for b.Loop() {
		if n%1_000_000 == 0 {
			known.forgetAll()
			known.minutes[ev.timestamp/minuteSeconds] = new(idSet)
		}
		b.StopTimer()
		for row := range rows {
			binary.LittleEndian.PutUint64(blk.id(row)[:], rnd.Uint64())
		}
		b.StartTimer()
		if err := known.prepare(b.Context(), []*block{blk}); err != nil {
			b.Fatal(err)
		}
		if dups := known.cut([]*block{blk}); dups > 0 {
			b.Fatalf("%d falsely known", dups)
		}
		n += rows
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/rows, "ns/event")
}
