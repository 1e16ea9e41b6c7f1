// A set of event ids, 64 bits of each.
//
// idset.go owns the table and nothing else: dedupe.go decides which ids go in, and how many tables memory has room for. An
// id is SHA-256, so its first eight bytes are as good as any hash.

package main

import (
	"encoding/binary"
	"math/bits"
)

// idKey is what a set keeps of an id: 64 bits, never 0. A new event is taken for a known one when it shares them with
// another one of its minute: one in 10^13 when that minute has a million.
type idKey uint64

func idKeyOf(id *eventID) idKey { return max(1, idKey(binary.LittleEndian.Uint64(id[:8]))) }

// Sizes of an idSet's table.
const (
	firstSlots = 32 // of a set's first table
	// A table grows by half when four of five slots are taken: 10 to 15 bytes an id, and one or two cache lines a look.
	fullNum, fullDen = 4, 5
	growNum, growDen = 3, 2
)

// idSet is an open-addressing table with linear probing. The zero value is an empty set without a table.
type idSet struct {
	slots    []idKey // 0 is free
	used     int
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
	for s.slots[i] != k && s.slots[i] != 0 {
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
	s.slots = make([]idKey, slots)
	for _, k := range old {
		if k != 0 {
			s.slots[s.find(k)] = k
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

// remove takes k out. What was put behind it because its slot was taken moves up.
func (s *idSet) remove(k idKey) {
	if s.used == 0 {
		return
	}
	free := s.find(k)
	if s.slots[free] == 0 {
		return
	}
	for i := free; ; {
		if i++; i == len(s.slots) {
			i = 0
		}
		k := s.slots[i]
		if k == 0 {
			break
		}
		home, stays := s.home(k), false // k stays when its home is behind free, going round
		if free < i {
			stays = free < home && home <= i
		} else {
			stays = free < home || home <= i
		}
		if !stays {
			s.slots[free], free = k, i
		}
	}
	s.slots[free] = 0
	s.used--
}

const slotBytes = 8

func (s *idSet) bytes() int64 { return int64(len(s.slots)) * slotBytes }
