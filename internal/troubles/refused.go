// What was refused.
//
// refused.go counts refused events by route, code and field, keeps the last of them, and says so in the log, at most once a second:
// their sender may not read the answer. What is counted by has to be of few values, which is the caller's to see to.

package troubles

import (
	"cmp"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/VictoriaMetrics/metrics"
)

const (
	// maxKept is how many refused events are kept.
	maxKept = 20
	// maxShown is how many characters of a text are.
	maxShown = 100
)

// Refusal is an event that was refused. Time and Route are set when it is noted.
type Refusal struct {
	Time    time.Time `json:"time"` // UTC, whole seconds
	Route   string    `json:"route"`
	Code    string    `json:"code"`
	Field   string    `json:"field"`
	Message string    `json:"message"`
	Name    string    `json:"event_name"` // empty when it is not known
}

// Count is how many events were refused for one reason.
type Count struct {
	Route  string `json:"route"`
	Code   string `json:"code"`
	Field  string `json:"field"`
	Events uint64 `json:"events"`
}

type reason struct{ route, code, field string }

// Refused are the refused events of one request. The zero value has none; it is not for concurrent use.
type Refused struct {
	counts map[reason]int // without the route
	last   []Refusal      // maxKept of them or more
}

// Add adds an event, with texts of any length.
func (r *Refused) Add(one Refusal) {
	if r.counts == nil {
		r.counts = map[reason]int{}
	}
	r.counts[reason{"", one.Code, one.Field}]++
	if len(r.last) == 2*maxKept {
		r.last = r.last[:copy(r.last, r.last[maxKept:])]
	}
	one.Message, one.Name = shown(one.Message), shown(one.Name)
	r.last = append(r.last, one)
}

// Reset empties r, which keeps its memory.
func (r *Refused) Reset() {
	clear(r.counts)
	clear(r.last) // of their texts
	r.last = r.last[:0]
}

// shown is the beginning of a text, as UTF-8.
func shown(s string) string {
	characters := 0
	for i := range s {
		if characters++; characters > maxShown {
			return strings.Clone(strings.ToValidUTF8(s[:i], "\uFFFD"))
		}
	}
	return strings.ToValidUTF8(s, "\uFFFD")
}

// Refusals are those of all requests.
type Refusals struct {
	set  *metrics.Set
	name string // of the counters

	mu       sync.Mutex // guards what follows
	counters map[reason]*metrics.Counter
	last     []Refusal // the newest at the end, at most maxKept
	said     time.Time // when the log had its last line
	unsaid   int       // events since then
}

// NewRefusals counts in set, under that name.
func NewRefusals(set *metrics.Set, name string) *Refusals {
	return &Refusals{set: set, name: name, counters: map[reason]*metrics.Counter{}}
}

// Expect makes counters: an alert sees the first event only when there was a 0 before.
func (r *Refusals) Expect(route, code string, fields ...string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, field := range fields {
		r.counter(reason{route, code, field})
	}
}

// counter is that of a reason; the caller has the lock.
func (r *Refusals) counter(why reason) *metrics.Counter {
	c := r.counters[why]
	if c == nil {
		c = r.set.GetOrCreateCounter(fmt.Sprintf(`%s{route=%q,code=%q,field=%q}`, r.name, why.route, why.code, why.field))
		r.counters[why] = c
	}
	return c
}

// Note takes in what a request had, and says whether that was anything. It keeps nothing of refused itself.
func (r *Refusals) Note(route string, refused *Refused) bool {
	if len(refused.last) == 0 { // Fast path
		return false
	}
	now := time.Now()
	r.mu.Lock()
	for why, n := range refused.counts {
		why.route = route
		r.counter(why).Add(n)
		r.unsaid += n
	}
	for _, one := range refused.last[max(0, len(refused.last)-maxKept):] {
		one.Time, one.Route = now.UTC().Truncate(time.Second), route
		r.last = append(r.last[max(0, len(r.last)+1-maxKept):], one)
	}
	events, last := r.unsaid, r.last[len(r.last)-1]
	says := now.Sub(r.said) >= time.Second
	if says {
		r.said, r.unsaid = now, 0
	}
	r.mu.Unlock()
	if says {
		slog.Warn("events are refused", "events", events, "route", last.Route, "code", last.Code, "field", last.Field, "message", last.Message)
	}
	return true
}

// Shown returns the counts that are not 0, the largest first, and the last events, the newest first. Neither is nil.
func (r *Refusals) Shown() (counts []Count, last []Refusal) {
	r.mu.Lock()
	defer r.mu.Unlock()
	counts, last = []Count{}, append([]Refusal{}, r.last...)
	for why, c := range r.counters {
		if n := c.Get(); n > 0 {
			counts = append(counts, Count{why.route, why.code, why.field, n})
		}
	}
	slices.Reverse(last)
	slices.SortFunc(counts, func(a, b Count) int {
		return cmp.Or(cmp.Compare(b.Events, a.Events), cmp.Compare(a.Route, b.Route), cmp.Compare(a.Code, b.Code), cmp.Compare(a.Field, b.Field))
	})
	return counts, last
}
