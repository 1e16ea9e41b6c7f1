// What is known of the past: the sets themselves, and that rows are cut out of a block as they should.

package main

import (
	"encoding/binary"
	"fmt"
	"maps"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/ClickHouse/ch-go/proto"
	"github.com/twmb/franz-go/pkg/kgo"
)

// TestIDSet: random additions and removals against a map, with keys that crowd at the ends of the table.
func TestIDSet(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	for run := range 200 {
		var s idSet
		want := map[idKey]bool{}
		for range 2000 {
			k := idKey(rnd.Uint64N(300) + 1)
			switch rnd.IntN(3) {
			case 0: // spread
				k *= 0x9e3779b97f4a7c15 >> 4
			case 1: // at the end, so that probing goes round
				k = -k
			}
			if rnd.IntN(3) == 0 {
				s.remove(k)
				delete(want, k)
				continue
			}
			if slots := s.slotsFor(1); slots != len(s.slots) {
				s.resize(slots)
			}
			if isNew := s.add(k); isNew == want[k] {
				t.Fatalf("run %d: %d is new: %v", run, k, isNew)
			}
			want[k] = true
		}
		if s.used != len(want) || s.used*fullDen > len(s.slots)*fullNum {
			t.Fatalf("%d ids in %d slots, want %d", s.used, len(s.slots), len(want))
		}
		for k := range maps.Keys(want) {
			if s.slots[s.find(k)] != k {
				t.Fatalf("%d is not found", k)
			}
		}
	}
}

// TestBudget: sets never take more than their budget, whatever comes, and what they know is never wrong.
func TestBudget(t *testing.T) {
	const budget = 40_000
	known := newPast(nil, "", budget)
	ev := mustParse(t, new(eventParser), sampleEvent)
	rnd := rand.New(rand.NewPCG(3, 4))
	seen := map[eventID]bool{}
	for range 300 {
		minute := rnd.Int64N(30)
		known.round++
		if known.minutes[minute] == nil && known.bytes.Load()+setOverhead <= budget { // as if the hour had been read
			known.minutes[minute] = &idSet{lastUsed: known.round}
			known.bytes.Add(setOverhead)
			for id := range seen {
				if int64(id[31]) == minute && known.makeRoom(known.minutes[minute], 1) {
					known.minutes[minute].add(keyOf(&id))
				} else if int64(id[31]) == minute {
					known.drop(minute)
					break
				}
			}
		}
		if known.minutes[minute] == nil {
			continue
		}
		b := newBlock(100)
		ev.timestamp = minute * minuteSeconds
		want := 0
		for range rnd.IntN(400) {
			var id eventID
			binary.LittleEndian.PutUint64(id[:], (rnd.Uint64N(2000)+1)*0x9e3779b97f4a7c15)
			id[31] = byte(minute)
			b.append(&id, ev, &kgo.Record{})
			if !seen[id] {
				want++
				seen[id] = true
			}
		}
		known.minutes[minute].lastUsed = known.round
		if !known.makeRoom(known.minutes[minute], b.rows()) {
			known.drop(minute)
			continue
		}
		if known.cut([]*block{b}); b.rows() != want {
			t.Fatalf("%d new, want %d", b.rows(), want)
		}
		if n := known.bytes.Load(); n > budget || n < 0 {
			t.Fatalf("%d bytes of %d", n, budget)
		}
	}
}

// TestKeep: what stays of a block is what was there, in every column.
func TestKeep(t *testing.T) {
	rnd := rand.New(rand.NewPCG(5, 6))
	var p eventParser
	for range 50 {
		var raw []string
		b := newBlock(8)
		add := func(to *block, s string) {
			ev := mustParse(t, &p, s)
			id, _ := ev.id(nil)
			to.append(&id, ev, &kgo.Record{Value: []byte(s)})
		}
		for i := range 1 + rnd.IntN(60) {
			tags := `"a"`
			for range rnd.IntN(5) {
				tags += fmt.Sprintf(`,"t%d"`, rnd.IntN(9))
			}
			s := fmt.Sprintf(`{"event_name":"e%d","user_id":"u%d","timestamp":%d,"tags":[%s],"metadata":{"price":%d,"currency":"C%d"}}`, rnd.IntN(3), i, 1795441976+i, tags, i, rnd.IntN(4))
			raw = append(raw, s)
			add(b, s)
		}
		var rows []int
		want := newBlock(8)
		for row := range raw {
			if rnd.IntN(3) > 0 {
				rows = append(rows, row)
				add(want, raw[row])
			}
		}
		b.keep(rows)
		for i := range b.columns {
			var got, expected proto.Buffer
			if d, ok := b.columns[i].column.(*dictColumn); ok { // the dictionaries differ
				for row := range rows {
					if w := want.columns[i].column.(*dictColumn); string(d.value(row)) != string(w.value(row)) {
						t.Fatalf("%s of row %d: %s", b.columns[i].name, row, d.value(row))
					}
				}
				continue
			}
			if l, ok := b.columns[i].column.(*listColumn); ok {
				w := want.columns[i].column.(*listColumn)
				if fmt.Sprint(l.offsets) != fmt.Sprint(w.offsets) || l.rows() != w.rows() {
					t.Fatalf("tags end at %d, want %d", l.offsets, w.offsets)
				}
				for item := range l.rows() {
					if string(l.value(item)) != string(w.value(item)) {
						t.Fatalf("item %d: %s", item, l.value(item))
					}
				}
				continue
			}
			b.columns[i].EncodeColumn(&got)
			want.columns[i].EncodeColumn(&expected)
			if string(got.Buf) != string(expected.Buf) {
				t.Fatalf("%s differs", b.columns[i].name)
			}
		}
		for row, rec := range b.records {
			if rec != nil && string(rec.Value) != string(want.records[row].Value) {
				t.Fatalf("record of row %d", row)
			}
		}
	}
}

// TestCanonical: what is read straight ahead is what the parser reads, and what the parser refuses is never taken.
func TestCanonical(t *testing.T) {
	var fast, slow eventParser
	canonical := 0
	for _, raw := range []string{
		sampleEvent,
		`{"event_name":"e","user_id":"u","timestamp":1}`,
		`{"event_name":"e","user_id":"u","timestamp":1,"metadata":{}}`,
		`{"event_name":"e","user_id":"u","timestamp":1,"metadata":{"price":1.25,"currency":"TRY"}}`,
		`{"event_name":"e","user_id":"u","timestamp":1,"metadata":{"a":{"price":7},"price":"no","currency":5}}`,
		`{"event_name":"e","user_id":"u","timestamp":1,"metadata":{"price":-1e3}}`,
		`{"event_name":"ü€","user_id":"\"u","timestamp":1,"channel":"web","campaign_id":"c"}`,
		`{"event_name":"e","user_id":"u","timestamp":1,"tags":["a","b"],"metadata":{"x":[1,2,{"y":"}"}]}}`,
		`{"event_name":"` + strings.Repeat("n", 100) + `","user_id":"` + strings.Repeat("€", 100) + `","timestamp":4294967295}`,
		`{"event_name":"` + strings.Repeat("n", 101) + `","user_id":"u","timestamp":1}`,
		`{"event_name":"e","user_id":"u","timestamp":4294967296}`, `{"event_name":"e","user_id":"u","timestamp":01}`, `{"event_name":"e","user_id":"u","timestamp":}`,
		`{"event_name":"","user_id":"u","timestamp":1}`, `{"event_name":"e","user_id":"u","timestamp":1,"channel":"tv"}`,
		`{"event_name":"e","user_id":"u","timestamp":1,"tags":[]}`, `{"event_name":"e","user_id":"u","timestamp":1,"tags":["a",]}`,
		`{"event_name":"e","user_id":"u","timestamp":1,"tags":[` + strings.Repeat(`"t",`, 20) + `"t"]}`,
		`{"event_name":"e","user_id":"u","timestamp":1,"metadata":{"a":}}`, `{"event_name":"e","user_id":"u","timestamp":1,"metadata":{"a":1}} `,
		`{"event_name":"e","user_id":"u","timestamp":1,"metadata":{"a":1},"metadata":{"a":2}}`,
		`{"event_name":"e","user_id":"u","timestamp":1,"metadata":{"a":1},"user_id":"v"}`,
		`{"event_name":"e","user_id":"u","timestamp":1,"metadata":{"\u0070rice":3}}`,
		`{"event_name":"e","user_id":"u","timestamp":1,"metadata":{"a":` + strings.Repeat("[", 400) + strings.Repeat("]", 400) + `}}`,
		"{\"event_name\":\"e\xff\",\"user_id\":\"u\",\"timestamp\":1}", "{\"event_name\":\"e\x01\",\"user_id\":\"u\",\"timestamp\":1}",
		`{"event_name":"e","user_id":"u","timestamp":1`, `{"event_name":"e`, `{}`, ``,
	} {
		ev, problems, err := slow.parse([]byte(raw))
		good := err == nil && len(problems) == 0 && ev.storable()
		got, failure := fast.decode([]byte(raw))
		if (failure == nil) != good {
			t.Errorf("%s: %v, the parser says %v %v", raw, failure, problems, err)
		}
		if !good || failure != nil {
			continue
		}
		if got.meta == nil {
			canonical++
		}
		if a, b := appendEvent(nil, got), appendEvent(nil, ev); string(a) != string(b) {
			t.Errorf("%s: read as %s, want %s", raw, a, b)
		}
		price, currency := priceOf(got)
		if p, c := priceOf(ev); p != price || string(c) != string(currency) {
			t.Errorf("%s: price %d %s, want %d %s", raw, price, currency, p, c)
		}
	}
	if canonical < 6 {
		t.Errorf("only %d were read straight ahead", canonical)
	}
}

// FuzzCanonical holds the two ways of reading a record to each other.
func FuzzCanonical(f *testing.F) {
	f.Add([]byte(sampleEvent))
	f.Add([]byte(`{"event_name":"e","user_id":"u","timestamp":1,"tags":["a"],"metadata":{"price":1.5,"currency":"TRY"}}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		var fast, slow eventParser
		got := fast.canonical(raw)
		if got == nil {
			return
		}
		ev, problems, err := slow.parse(raw)
		if err != nil || len(problems) > 0 || !ev.storable() {
			t.Fatalf("%q was taken; the parser says %v %v", raw, problems, err)
		}
		a, b := *got, *ev
		a.metadata, b.metadata = nil, nil // the parser's is compact
		if string(appendEvent(nil, &a)) != string(appendEvent(nil, &b)) {
			t.Fatalf("%q was read as %s, want %s", raw, appendEvent(nil, &a), appendEvent(nil, &b))
		}
		price, currency := priceOf(got)
		if p, c := priceOf(ev); p != price || string(c) != string(currency) {
			t.Fatalf("%q: price %d %s, want %d %s", raw, price, currency, p, c)
		}
	})
}
