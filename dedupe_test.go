// What is known of the past, and blocks: the sets themselves, and that rows are cut out of a block as they should.

package main

import (
	"cmp"
	"context"
	"encoding/binary"
	"fmt"
	"maps"
	"math"
	"math/bits"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ClickHouse/ch-go"
	"github.com/ClickHouse/ch-go/proto"
	"github.com/event-ingestion/event-ingestion/internal/profile"
	"github.com/event-ingestion/event-ingestion/internal/questions"
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

// steps is how many slots beyond the first all looks for what is in the set have to pass. It is the same in whatever order it was put in.
func (s *idSet) steps() (n int) {
	for i, k := range s.slots {
		if k >= leastKey {
			n += (i - s.home(k) + len(s.slots)) % len(s.slots)
		}
	}
	return n
}

// TestGroundIDs: ids that were searched for, so that some of their bits are the same, and ids at any distance from each other, cost
// as many steps as random ones, in a set of any size on the way and in whichever order ClickHouse has them.
func TestGroundIDs(t *testing.T) {
	t.Parallel()
	const ids = 4_000
	rnd := rand.New(rand.NewPCG(7, 8))
	cost := func(key func(i int) uint64) float64 {
		known := newDedupe(nil, nil, 1<<30)
		set, n, looks := new(idSet), 0, 0
		for i := range ids {
			if before := len(set.slots); known.makeRoom(set, 1) && len(set.slots) != before {
				n, looks = n+set.steps(), looks+set.used
			}
			set.add(keyOfBits(key(i)))
		}
		return float64(n+set.steps()) / float64(looks+set.used)
	}
	random := cost(func(int) uint64 { return rnd.Uint64() })
	try := func(shape string, key func(i int) uint64) {
		if got := cost(key); got > 3*random { // a multiplier of chance spreads some distances less well; ground ids took thousands of steps
			t.Errorf("%s: %.1f steps an id, %.1f for random ids", shape, got, random)
		}
	}
	for run := range 100 { // every bit is in one of the first 64, and in some more
		a, b, c := run%64, rnd.IntN(64), rnd.IntN(64)
		if run < 64 {
			b, c = (run+1)%64, (run+2)%64
		}
		same := uint64(1)<<a | uint64(1)<<b | uint64(1)<<c
		value := rnd.Uint64() & same
		try(fmt.Sprintf("bits %d, %d and %d are %064b", a, b, c, value), func(int) uint64 { return rnd.Uint64()&^same | value })
	}
	first := rnd.Uint64()
	for _, stride := range []uint64{1, 3, 7, 10, 255, 1000, 0x9e3779b97f4a7c15, 1<<64 - 1, math.MaxUint64 / ids, math.MaxUint64/ids/2 + 1, math.MaxUint64 / 3, rnd.Uint64(), rnd.Uint64()} {
		for shift := 0; shift+bits.TrailingZeros64(stride) < 48; shift += 1 + int(stride%8) { // beyond that there are not so many
			try(fmt.Sprintf("%#x apart", stride<<shift), func(i int) uint64 { return first + uint64(i)*stride<<shift })
		}
	}
	var sorted []uint64
	for range ids {
		sorted = append(sorted, rnd.Uint64()>>3)
	}
	slices.Sort(sorted)
	try("loaded in the order of keys", func(i int) uint64 { return sorted[i] })
	slices.SortFunc(sorted, func(a, b uint64) int { return cmp.Compare(bits.ReverseBytes64(a), bits.ReverseBytes64(b)) })
	try("loaded in the order of ids", func(i int) uint64 { return sorted[i] })
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
			known.know(minute)
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
		known.use(known.minutes[minute])
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
	in.dedupe.know(ev.timestamp / minuteSeconds)
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

// profileStand works with settings of a profile, each time in a database of its own.
type profileStand struct {
	t    *testing.T
	cfg  *settings
	runs int
}

// profileNow is the first event's time, half an hour after midnight.
const profileNow = 1795393800

// work makes tables, stores, looks up and asks with settings of a profile, and returns everything that came of it.
func (s *profileStand) work(turned []ch.Setting) (all string, err error) {
	s.runs++
	db := newClickHouse(s.cfg)
	db.options.Settings, db.database = append(slices.Clone(turned), profile.Shared...), fmt.Sprint(db.database, "_", s.runs)
	defer askShards(s.t, "DROP DATABASE IF EXISTS "+db.database+" SYNC")
	if err := db.makeTables(s.t.Context()); err != nil {
		return "", err
	}
	for part := range 3 {
		if err := s.insert(db, 20*part, 20*part+20); err != nil {
			return "", err
		}
	}
	for _, sql := range []string{
		"SELECT hex(event_id), * EXCEPT (event_id, created_at) FROM %[1]s.events ORDER BY timestamp",
		"SELECT * EXCEPT (unique_users_state, campaigns_state), finalizeAggregation(unique_users_state), finalizeAggregation(campaigns_state) FROM %[1]s.events_hourly ORDER BY channel, hour",
		"SELECT create_table_query FROM system.tables WHERE database = '%[1]s' ORDER BY name",
	} {
		all += strings.ReplaceAll(strings.Join(askShards(s.t, fmt.Sprintf(sql, db.database)), "\n"), db.database, "database") + "\n"
	}
	m := newMetricsAPI(db, nil, ignored)
	defer m.close()
	note := func(what string, answer any, e error) {
		if all += what + " " + string(jsonOf(answer)) + "\n"; err == nil && e != nil {
			err = fmt.Errorf("%s: %w", what, e)
		}
	}
	const from, to = profileNow + 5043, profileNow + 57*4321
	calendar := questions.CalendarOf(time.UTC, from, to)
	for _, by := range []string{"", "&group_by=channel", "&group_by=hour", "&group_by=day", "&group_by=campaign", "&group_by=metadata.currency&sum=metadata.price"} {
		q, problems := m.parse(fmt.Sprintf("event_name=purchase&from=%d&to=%d%s", from, to, by))
		if len(problems) > 0 {
			s.t.Fatal(problems)
		}
		a, err := m.query(s.t.Context(), q)
		note("by "+by, a, err)
	}
	for _, span := range []int64{maxMinuteBuckets - 1, maxHourBuckets, maxHourBuckets + 1} {
		a, err := newOverviewAPI(m).ask(s.t.Context(), &metricsQuery{from: from, to: from + span, sum: noSum, calendar: calendar})
		note("overview by "+a.Bucket, a, err)
	}
	others := connection{to: newClickHouse(s.cfg)} // who asks the views, without our settings, but for those about the answer to any query
	defer others.close()
	others.to.options.Settings = append(slices.Clone(turned), profile.Of(map[string]string{
		"0": "extremes discard_query_data output_format_native_encode_types_in_binary_format inject_random_order_for_select_without_order_by",
	})...)
	for _, view := range []string{"events_between", "events_between_by_day"} {
		var text proto.ColStr
		note(view, nil, others.Do(s.t.Context(), questions.EachRow(ch.Query{
			Body: fmt.Sprintf("SELECT assumeNotNull(toString(sum(event_count)) || ' ' || toString(sum(revenue))) FROM %s.%s(from = %d, to = %d)", db.database, view, from, to),
		}, func(i int) { all += text.Row(i) }, &text)))
	}
	return all, err
}

// insert stores these events as the program does, and looks them up.
func (s *profileStand) insert(db *clickhouse, from, to int) error {
	in := newInserter(db, s.cfg, &newStats().store, ignored, nil, newRoundCall(), membership{isMember: func(context.Context) error { return nil }})
	defer in.conn.close()
	b := newBlock(to - from)
	for i := from; i < to; i++ {
		ev := mustParse(s.t, new(eventParser), fmt.Sprintf(`{"event_name":"purchase","user_id":"u%d","timestamp":%d,"channel":"%s","campaign_id":"%s","tags":["a","b%d"],"metadata":{"price":%d.25,"currency":"TRY"}}`,
			i%17, profileNow+i*4321, []string{"web", "api", "", "mobile_app"}[i%4], []string{"", "c1", "c2"}[i/5%3], i%2, i))
		id, _ := ev.id(nil)
		b.append(&id, ev, &kgo.Record{})
	}
	in.round = []*block{b}
	for _, there := range []int{0, to - from} {
		if err := in.dedupe.lookUp(s.t.Context(), in.round, true); err != nil {
			return err
		}
		if n := len(in.dedupe.found); n != there {
			return fmt.Errorf("%d events are found, want %d", n, there)
		}
		if there == 0 {
			if err := in.insertOnce(s.t.Context()); err != nil {
				return err
			}
		}
	}
	counts, err := in.dedupe.countHours(s.t.Context(), []int64{profileNow / hourSeconds})
	if err == nil {
		err = in.dedupe.read(s.t.Context(), []secondSpan{{profileNow, profileNow + minuteSeconds}})
	}
	if set := in.dedupe.minutes[profileNow/minuteSeconds]; err == nil && (counts[profileNow/hourSeconds] != 1 || set.used != 1) {
		err = fmt.Errorf("an hour has %d events, and its first minute %d", counts[profileNow/hourSeconds], set.used)
	}
	return err
}
