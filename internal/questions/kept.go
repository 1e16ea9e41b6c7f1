// What is kept of answers: sets of events by name, within a bound in bytes. Those that were not used for the longest time go first.

package questions

import (
	"container/list"
	"slices"
	"strings"
	"sync"
	"unsafe"
)

// keptBytes bounds what is kept: 300 states of many users, or the users of 100,000 hours.
const keptBytes = 32 << 20

// set is what is known of some events: a line for each group, in order of the keys. It is not changed once it is kept.
type set []line

// line names a set of events by its count and the sum of its ids. Their users are kept as a state or as a number.
type line struct {
	key   string
	count int64
	ids   uint64
	state string
	users uint64
}

// same says whether both are of the same events.
func (s set) same(t set) bool {
	return slices.EqualFunc(s, t, func(a, b line) bool { return a.key == b.key && a.count == b.count && a.ids == b.ids })
}

func (s set) inOrder() {
	slices.SortFunc(s, func(a, b line) int { return strings.Compare(a.key, b.key) })
}

// bytes is about what keeping it takes.
func (s set) bytes(name string) int {
	n := len(name) + int(unsafe.Sizeof(entry{})+unsafe.Sizeof(list.Element{})) + 100 // of the map
	for _, l := range s {
		n += int(unsafe.Sizeof(l)) + len(l.key) + len(l.state)
	}
	return n
}

// kept has sets by name, those that were used last.
type kept struct {
	mu     sync.Mutex // guards the rest
	byName map[string]*list.Element
	order  list.List // of entry, the last used first
	bytes  int
}

type entry struct {
	name string
	set  set
}

// get returns what is kept, or nil.
func (k *kept) get(name string) set {
	k.mu.Lock()
	defer k.mu.Unlock()
	e, ok := k.byName[name]
	if !ok {
		return nil
	}
	k.order.MoveToFront(e)
	return e.Value.(entry).set
}

// put keeps a set, and drops those that were not used for the longest time.
func (k *kept) put(name string, s set) {
	if s == nil {
		s = set{} // nil is not kept
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.remove(name)
	if k.byName == nil {
		k.byName = map[string]*list.Element{}
	}
	k.byName[name] = k.order.PushFront(entry{name, s})
	for k.bytes += s.bytes(name); k.bytes > keptBytes; {
		k.remove(k.order.Back().Value.(entry).name)
	}
}

// drop forgets a set.
func (k *kept) drop(name string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.remove(name)
}

func (k *kept) remove(name string) {
	if e, ok := k.byName[name]; ok {
		k.bytes -= e.Value.(entry).set.bytes(name)
		k.order.Remove(e)
		delete(k.byName, name)
	}
}
