// A set of event ids, 64 bits of each.
//
// idset.go owns the table and nothing else: dedupe.go decides which ids go in, and how many tables memory has room for. An
// id is SHA-256, so its first eight bytes are as good as any hash.

package main

import (
	"encoding/binary"
	"math/bits"
)

// idKey is what a set keeps of an id: 64 bits. A new event is taken for a known one when it shares them with another one of
// its minute: one in 10^13 when that minute has a million.
type idKey uint64

// What a slot has instead of a key.
const (
	freeSlot idKey = iota
	goneSlot       // its key was removed; what was put behind it is still found
	leastKey
)

func idKeyOf(id *eventID) idKey { return keyOfBits(binary.LittleEndian.Uint64(id[:8])) }

func keyOfBits(bits uint64) idKey { return max(leastKey, idKey(bits)) }

// Sizes of an idSet's table.
const (
	firstSlots = 32 // of a set's first table
	// A table grows by half when four of five slots are taken: 10 to 15 bytes an id, and one or two cache lines a look.
	fullNum, fullDen = 4, 5
	growNum, growDen = 3, 2
)

// idSet is an open-addressing table with linear probing. The zero value is an empty set without a table.
type idSet struct {
	slots    []idKey
	used     int    // slots that are not free
	lastUsed uint64 // round
}

// home is the slot that a key belongs in. It keeps the keys' order, so that growing reads and writes straight ahead.
func (s *idSet) home(k idKey) int {
	hi, _ := bits.Mul64(uint64(k), uint64(len(s.slots)))
	return int(hi)
}

// find returns the slot of k, or the free one where it belongs. The table must have a free slot.
func (s *idSet) find(k idKey) int {
	i := s.home(k)
	for s.slots[i] != k && s.slots[i] != freeSlot {
		if i++; i == len(s.slots) {
			i = 0
		}
	}
	return i
}

// slotsFor is the size of the table that the set needs for n ids more; its present size when that will do.
func (s *idSet) slotsFor(n int) int {
	size := max(len(s.slots), firstSlots)
	for (s.used+n)*fullDen > size*fullNum {
		size = size * growNum / growDen
	}
	return size
}

// resize moves to a table of that many slots.
func (s *idSet) resize(slots int) {
	old := s.slots
	s.slots, s.used = make([]idKey, slots), 0
	for _, k := range old {
		if k >= leastKey {
			s.add(k)
		}
	}
}

// add puts k in, for which there must be room, and says whether it is new.
func (s *idSet) add(k idKey) bool {
	i := s.find(k)
	if s.slots[i] == k {
		return false
	}
	s.slots[i] = k
	s.used++
	return true
}

// remove takes k out.
func (s *idSet) remove(k idKey) {
	if len(s.slots) == 0 {
		return
	}
	if i := s.find(k); s.slots[i] == k {
		s.slots[i] = goneSlot
	}
}

const slotBytes = 8

func (s *idSet) bytes() int64 { return int64(len(s.slots)) * slotBytes }
