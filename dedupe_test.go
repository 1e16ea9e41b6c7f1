// What is known of the past, and blocks: the sets themselves, and that rows are cut out of a block as they should.

package main

import (
	"context"
	"encoding/binary"
	"fmt"
	"maps"
	"math/big"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ClickHouse/ch-go/proto"
	"github.com/twmb/franz-go/pkg/kgo"
)

// TestIDSet: random additions and removals against a map, with keys that crowd at the ends of the table.
func TestIDSet(t *testing.T) {
	t.Parallel()
	rnd := rand.New(rand.NewPCG(1, 2))
	for run := range 200 {
		var s idSet
		want := map[idKey]bool{}
		for range 2000 {
			k := leastKey + idKey(rnd.Uint64N(300))
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
		if s.used < len(want) || s.used*fullDen > len(s.slots)*fullNum {
			t.Fatalf("%d ids in %d slots, want %d", s.used, len(s.slots), len(want))
		}
		for k := range maps.Keys(want) {
			if s.slots[s.find(k)] != k {
				t.Fatalf("%d is not found", k)
			}
		}
	}
}

// TestDedupeMemory: sets never take more than their budget, whatever comes, and what they know is never wrong.
func TestDedupeMemory(t *testing.T) {
	t.Parallel()
	const budget = 40_000
	known := newDedupe(nil, nil, budget)
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
					known.minutes[minute].add(idKeyOf(&id))
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
	t.Parallel()
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
			if d, ok := b.columns[i].Data.(*dictColumn); ok { // the dictionaries differ
				for row := range rows {
					if w := want.columns[i].Data.(*dictColumn); string(d.value(row)) != string(w.value(row)) {
						t.Fatalf("%s of row %d: %s", b.columns[i].Name, row, d.value(row))
					}
				}
				continue
			}
			if l, ok := b.columns[i].Data.(*listColumn); ok {
				w := want.columns[i].Data.(*listColumn)
				if fmt.Sprint(l.offsets) != fmt.Sprint(w.offsets) || l.Rows() != w.Rows() {
					t.Fatalf("tags end at %d, want %d", l.offsets, w.offsets)
				}
				for item := range l.Rows() {
					if string(l.value(item)) != string(w.value(item)) {
						t.Fatalf("item %d: %s", item, l.value(item))
					}
				}
				continue
			}
			b.columns[i].Data.EncodeColumn(&got)
			want.columns[i].Data.EncodeColumn(&expected)
			if string(got.Buf) != string(expected.Buf) {
				t.Fatalf("%s differs", b.columns[i].Name)
			}
		}
		for row, rec := range b.records {
			if rec != nil && string(rec.Value) != string(want.records[row].Value) {
				t.Fatalf("record of row %d", row)
			}
		}
	}
}

// TestManyTags: a block is full before a dictionary has more values than its keys tell apart.
func TestManyTags(t *testing.T) {
	t.Parallel()
	w := idleWorker(100_000)
	var p eventParser
	for i := range maxKeys/maxTags + 10 {
		tags := fmt.Sprintf(`"%d"`, i*maxTags)
		for n := 1; n < maxTags; n++ {
			tags += fmt.Sprintf(`,"%d"`, i*maxTags+n)
		}
		ev := mustParse(t, &p, fmt.Sprintf(`{"event_name":"e","user_id":"u%d","timestamp":7,"tags":[%s]}`, i, tags))
		id, _ := ev.id(nil)
		w.enqueue([]*kgo.Record{{Key: fmt.Appendf(nil, "%x", id), Value: appendEvent(nil, ev)}}, 0)
	}
	for len(w.queue) > 0 && !w.isFull() {
		if bad, err := w.takeIn(1); bad != nil {
			t.Fatal(err)
		}
	}
	items := w.cur.tags.dictColumn.Rows()
	if len(w.queue) != 10 || items < maxKeys-2*maxTags || string(w.cur.tags.value(items-1)) != fmt.Sprint(items-1) {
		t.Errorf("%d records wait, %d tags, the last is %s", len(w.queue), items, w.cur.tags.value(items-1))
	}
}

// TestLargeHeaders: another producer's records have headers that are far larger than their events. A block has no more of them
// than it may take memory.
func TestLargeHeaders(t *testing.T) {
	t.Parallel()
	const fit, size = 10, 100 << 10
	w := idleWorker(100)
	w.limits = blockLimits{100, fit * size}
	ev := mustParse(t, new(eventParser), sampleEvent)
	id, _ := ev.id(nil)
	rec := &kgo.Record{Key: fmt.Appendf(nil, "%x", id), Value: []byte(sampleEvent), Headers: []kgo.RecordHeader{{Key: "strange", Value: make([]byte, size)}}}
	w.enqueue(slices.Repeat([]*kgo.Record{rec}, 100), 0)
	if bad, err := w.takeIn(100); bad != nil {
		t.Fatal(err)
	}
	if n := w.cur.rows(); n != fit {
		t.Errorf("%d records in a block, want %d", n, fit)
	}
}

// TestAbandonedRound: the ids of a round that a stop cut off are known and its rows are not stored. Whatever is asked of the
// inserter afterwards, nothing of it may be committed.
func TestAbandonedRound(t *testing.T) {
	cfg, err := loadSettings(func(name string) string {
		return map[string]string{"CLICKHOUSE_HOST": "127.0.0.1", "CLICKHOUSE_PORT": "1"}[name] // nobody listens there
	})
	if err != nil {
		t.Fatal(err)
	}
	w := idleWorker(10)
	in := newInserter(newClickHouse(cfg), cfg, &newStats().store, ignored, []func() *block{w.takeBlock}, w.call, membership{
		isMember: func(context.Context) error { return nil },
		alone:    func() bool { return true },
		release:  func(reached map[int32]kgo.EpochOffset) { t.Errorf("%v may be committed", reached) },
		commit:   func(context.Context, int) error { return nil },
	})
	ev := mustParse(t, new(eventParser), sampleEvent)
	in.dedupe.minutes[ev.timestamp/minuteSeconds] = new(idSet)
	id, _ := ev.id(nil)
	record := &kgo.Record{Key: fmt.Appendf(nil, "%x", id), Value: []byte(sampleEvent)}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	for range 3 { // the event, and twice its duplicate
		w.enqueue([]*kgo.Record{record}, 0)
		if bad, err := w.takeIn(1); bad != nil {
			t.Fatal(err)
		}
		in.insertRound(ctx)
	}
}

// TestPriceOf: what of an event's metadata is a price and a currency.
func TestPriceOf(t *testing.T) {
	var r skimmer
	price := func(value string) string {
		got, _ := priceOf(&r, []byte(`{"a":1,"price":`+value+`}`))
		return fmt.Sprint(int64(got))
	}
	for value, want := range map[string]string{
		`10`: "100000", `129.99`: "1299900", `0`: "0", `-0`: "0", `-5.5`: "-55000", `1e2`: "1000000", `1.25E+1`: "125000", `12345e-2`: "1234500", `"129.99"`: "1299900", `"-1e1"`: "-100000", `"\u0031\u002e5"`: "15000",
		`0.0001`: "1", `0.00014`: "1", `0.00015`: "2", `-0.00015`: "-2", `0.00005`: "1", `0.00004999`: "0", `5e-5`: "1", `5e-6`: "0", `49e-6`: "0", `0.1`: "1000", `1.00005`: "10001", `129.9900000000000000000000000001`: "1299900",
		`9999999999999.99`: "99999999999999900", `99999999999999`: "999999999999990000", `99999999999999.9999`: "999999999999999999", `-99999999999999.9999`: "-999999999999999999", `12345678901234.5678`: "123456789012345678",
		`99999999999999.99994`: "999999999999999999", `99999999999999.99995`: "0", `100000000000000`: "0", `-100000000000000`: "0", `1e14`: "0", `1e13`: "100000000000000000", `1e400`: "0", `1e99999999999999999999`: "0", `1e-99999999999999999999`: "0", `0e99999999999999999999`: "0",
		`9223372036854775807`: "0", `922337203685477.5807`: "0", `0.` + strings.Repeat("0", 900) + `1e902`: "100000", `1` + strings.Repeat("0", 900) + `e-899`: "100000",
		`null`: "0", `true`: "0", `"x"`: "0", `""`: "0", `" 1"`: "0", `"1 "`: "0", `"+1"`: "0", `"01"`: "0", `".5"`: "0", `"1."`: "0", `"1,5"`: "0", `"0x10"`: "0", `"NaN"`: "0", `"Infinity"`: "0", `"null"`: "0", `"true"`: "0", `"-"`: "0", `"1e"`: "0", `[1]`: "0", `{"price":1}`: "0", `"\"1\""`: "0", `"1\u0000"`: "0",
	} {
		if got := price(value); got != want {
			t.Errorf("price %.60s: %s, want %s", value, got, want)
		}
	}
	for _, c := range []struct{ metadata, want string }{
		{`{}`, "0 "}, {`{"price":1}`, "10000 "}, {`{"currency":"TRY"}`, "0 TRY"}, {`{"price":1,"currency":"try"}`, "10000 try"}, {`{"currency":null,"price":1}`, "10000 "}, {`{"currency":"","price":1}`, "10000 "},
		{`{"currency":840}`, "0 ?"}, {`{"currency":{"code":"USD"}}`, "0 ?"}, {`{"currency":["USD"]}`, "0 ?"}, {`{"currency":true}`, "0 ?"}, {`{"currency":false}`, "0 ?"}, {`{"currency":"` + strings.Repeat("x", 1300) + `"}`, "0 ?"},
		{`{"curr\u0065ncy":"USD","\u0070rice":2}`, "20000 USD"}, {`{"\u0070\u0072\u0069\u0063\u0065":"\u0031","\u0063\u0075\u0072\u0072\u0065\u006e\u0063\u0079":"\u0055SD"}`, "10000 USD"},
		{`{"currency":"\u0055SD","x\u0041":1,"price":"\u0031"}`, "10000 USD"}, {`{"Price":1,"Currency":"USD","price ":1,"pric\u00e9":1}`, "0 "}, {`{"a":{"price":1,"currency":"USD"}}`, "0 "},
		// Of members with one name the first counts.
		{`{"price":10,"price":"x"}`, "100000 "}, {`{"price":"x","price":10}`, "0 "}, {`{"price":null,"price":10}`, "0 "}, {`{"price":1,"\u0070rice":2}`, "10000 "}, {`{"currency":"USD","currency":"TRY","price":1}`, "10000 USD"}, {`{"currency":null,"currency":"USD"}`, "0 "},
	} {
		for range 2 { // the second time through a dirty skimmer
			if price, currency := priceOf(&r, []byte(c.metadata)); fmt.Sprint(int64(price), " ", string(currency)) != c.want {
				t.Errorf("%.80s: %d %s, want %s", c.metadata, price, currency, c.want)
			}
		}
	}
	metadata := []byte(`{"a":"b","curr\u0065ncy":"\u0055SD","price":"12\u002e5e1"}`)
	if allocated := testing.AllocsPerRun(100, func() { priceOf(&r, metadata) }); allocated != 0 {
		t.Errorf("%v allocations", allocated)
	}
}

// FuzzPrice: a number of JSON is what exact arithmetic makes of it.
func FuzzPrice(f *testing.F) {
	for _, text := range []string{"129.99", "-1e-4", "99999999999999.99995", "0.00005", "5e-5", "1e14", "12e-5", "0.000049"} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		exact, ok := new(big.Rat).SetString(text)
		if _, exponent, _ := strings.Cut(strings.ToLower(text), "e"); !isNumber([]byte(text)) || !ok || len(exponent) > 4 {
			return
		}
		exact.Mul(exact, big.NewRat(10_000, 1))
		half := big.NewRat(1, 2)
		if exact.Sign() < 0 {
			half.Neg(half)
		}
		exact.Add(exact, half)
		want := new(big.Int).Quo(exact.Num(), exact.Denom()) // towards zero
		if new(big.Int).Abs(want).Cmp(big.NewInt(999_999_999_999_999_999)) > 0 {
			want.SetInt64(0)
		}
		if got := decimalOf([]byte(text)); got != want.Int64() {
			t.Errorf("%s: %d, want %s", text, got, want)
		}
	})
}
