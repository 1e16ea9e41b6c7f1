// What load sends.
//
// events.go owns the made-up events and the replay of a file. Each counts by its own rules what was accepted.

package load

import (
	"bufio"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"math"
	"math/bits"
	"math/rand/v2"
	"os"
	"sort"
	"strconv"
	"time"
)

// expectation is one question to the metrics endpoint and its right answer.
type expectation struct {
	event    string
	from, to int64
	count    int64
	users    int64
	hours    map[string]int64
	channels map[string]int64 // nil = not asked
}

// Generator makes events that are distinct by construction: event n has user n mod users, channel and second come from the
// rest of n, and with -insert-ids n itself is the id. The seconds end at the start of the run, so none is in the future.
type Generator struct {
	cfg  *Config
	base int64 // second of event 0
	next int64
	dups int64      // events handed out a second time or more
	seen []uint64   // a bit for each accepted event
	rng  *rand.Rand // which events are repeated
}

var channels = [...]string{"web", "mobile_app", "api"}

// sameButInsertID is how many events differ in nothing but their insert_id, with -insert-ids.
const sameButInsertID = 10

// flatOutRate is what base allows for when no rate is given, events a second.
const flatOutRate = 500_000

// NewGenerator returns a generator of what the flags say.
func NewGenerator(cfg *Config) *Generator {
	rate := cfg.rate
	if rate == 0 {
		rate = flatOutRate
	}
	return &Generator{cfg: cfg, rng: rand.New(rand.NewPCG(cfg.seed, 0)), base: time.Now().Unix() - int64(rate*cfg.duration.Seconds()/float64(cfg.perSecond())) - 2}
}

func (g *Generator) append(body []byte, tickets []int64, separator byte) ([]byte, []int64, bool) {
	n := g.next
	if g.cfg.dup > 0 && n > 0 && g.rng.Float64() < g.cfg.dup {
		n = g.rng.Int64N(n)
		g.dups++
	} else {
		g.next++
	}
	if len(tickets) > 0 {
		body = append(body, separator)
	}
	return g.Event(body, n), append(tickets, n), true
}

func (g *Generator) second(n int64) int64 { return g.base + n/int64(g.cfg.perSecond()) }

func (g *Generator) channel(n int64) string {
	return channels[n/int64(g.cfg.users)%int64(len(channels))]
}

// Event appends the n-th event.
func (g *Generator) Event(b []byte, n int64) []byte {
	users := int64(g.cfg.users)
	b = append(b, `{"event_name":"`...)
	b = append(b, g.cfg.Event...)
	b = append(b, `","channel":"`...)
	b = append(b, g.channel(n)...)
	b = append(b, `","campaign_id":"cmp_`...)
	b = strconv.AppendInt(b, n%50, 10)
	b = append(b, `","user_id":"user_`...)
	b = strconv.AppendInt(b, n%users, 10)
	b = append(b, `","timestamp":`...)
	b = strconv.AppendInt(b, g.second(n), 10)
	if g.cfg.insertIDs {
		b = append(b, `,"insert_id":"`...)
		b = strconv.AppendInt(b, n, 10)
		b = append(b, '"')
	}
	b = append(b, `,"tags":["electronics","homepage"],"metadata":{"product_id":"prod-`...)
	b = strconv.AppendInt(b, n%1000, 10)
	b = append(b, `","price":`...)
	b = strconv.AppendInt(b, 10+n%490, 10)
	return append(b, `.99,"currency":"TRY","referrer":"google"}}`...)
}

func (g *Generator) accepted(n int64) {
	for int64(len(g.seen)) <= n/64 {
		g.seen = append(g.seen, make([]uint64, 1024)...)
	}
	g.seen[n/64] |= 1 << (n % 64)
}

func (g *Generator) where(n int64) string { return fmt.Sprintf("event %d", n) }

func (g *Generator) expected() []expectation {
	e := expectation{event: g.cfg.Event, from: g.base - 1, to: time.Now().Unix() + 1, hours: map[string]int64{}, channels: map[string]int64{}}
	users, hours := make([]bool, g.cfg.users), map[int64]int64{}
	for w, word := range g.seen {
		for ; word != 0; word &= word - 1 {
			n := int64(w*64 + bits.TrailingZeros64(word))
			e.count++
			users[n%int64(g.cfg.users)] = true
			hours[g.second(n)/3600]++
			e.channels[g.channel(n)]++
		}
	}
	for _, u := range users {
		if u {
			e.users++
		}
	}
	for hour, count := range hours {
		e.hours[hourKey(hour*3600)] = count
	}
	return []expectation{e}
}

func hourKey(second int64) string {
	return time.Unix(second, 0).UTC().Truncate(time.Hour).Format(time.RFC3339)
}

// replay sends the lines of a file and counts, per event_name, what the accepted ones add up to.
type replay struct {
	lines  *bufio.Scanner
	file   *os.File
	line   int64
	broken string           // why the file was not read to its end
	flight map[int64][]byte // lines without an outcome
	names  map[string]*replayed
}

// replayed is what was accepted of an event_name.
type replayed struct {
	ids      map[[sha256.Size]byte]struct{}
	count    int64
	users    map[string]struct{}
	hours    map[string]int64
	from, to int64
}

func openReplay(path string) (*replay, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	r := &replay{lines: bufio.NewScanner(f), file: f, flight: map[int64][]byte{}, names: map[string]*replayed{}}
	r.lines.Buffer(nil, maxEventBytes+1)
	return r, nil
}

func (r *replay) append(body []byte, tickets []int64, separator byte) ([]byte, []int64, bool) {
	for r.broken == "" && r.lines.Scan() {
		r.line++
		line := r.lines.Bytes()
		if len(line) == 0 {
			continue
		}
		if len(tickets) > 0 {
			body = append(body, separator)
		}
		r.flight[r.line] = append([]byte(nil), line...)
		return append(body, line...), append(tickets, r.line), true
	}
	if err := r.lines.Err(); err != nil && r.broken == "" { // it would go on in the middle of the line
		r.broken = fmt.Sprintf("line %d could not be read, and what follows was not sent: %v", r.line+1, err)
	}
	r.file.Close()
	return body, tickets, false
}

func (r *replay) where(line int64) string { return fmt.Sprintf("line %d", line) }

// accepted reads the line with encoding/json: an independent count does not share the parser that it checks.
func (r *replay) accepted(line int64) {
	var e map[string]any
	if err := json.Unmarshal(r.flight[line], &e); err != nil {
		r.broken = fmt.Sprintf("line %d was accepted and cannot be counted: %v", line, err)
		return
	}
	text := func(name string) string { s, _ := e[name].(string); return s }
	name, user := text("event_name"), text("user_id")
	number, _ := e["timestamp"].(float64)
	at := int64(number)
	delete(r.flight, line)
	s := replayedOf(r.names, name)
	id := sha256.Sum256(fmt.Appendf(nil, "%q %q %d %q %q", name, user, at, text("channel"), text("insert_id")))
	if _, dup := s.ids[id]; dup {
		return
	}
	s.ids[id] = struct{}{}
	s.count++
	s.add(user, at)
}

func replayedOf(names map[string]*replayed, name string) *replayed {
	s := names[name]
	if s == nil {
		s = &replayed{ids: map[[sha256.Size]byte]struct{}{}, users: map[string]struct{}{}, hours: map[string]int64{}, from: math.MaxInt64}
		names[name] = s
	}
	return s
}

func (s *replayed) add(user string, at int64) {
	s.users[user] = struct{}{}
	s.hours[hourKey(at)]++
	s.from, s.to = min(s.from, at), max(s.to, at)
}

func (r *replay) expected() []expectation { return expectationsOf(r.names) }

func expectationsOf(names map[string]*replayed) (list []expectation) {
	for name, s := range names {
		list = append(list, expectation{event: name, from: s.from, to: s.to + 1, count: s.count, users: int64(len(s.users)), hours: s.hours})
	}
	sort.Slice(list, func(i, j int) bool { return list[i].event < list[j].event })
	return list
}
