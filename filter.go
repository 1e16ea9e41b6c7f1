// A Bloom filter over event ids, split into cache lines and grown in layers.
//
// filter.go owns nothing but the bits: dedupe.go decides which ids go in. The split into lines is that of Parquet's
// split-block filter, https://github.com/apache/parquet-format/blob/master/BloomFilter.md, with a line of 512 bits.

package main

import (
	"encoding/binary"
	"math/bits"
)

const (
	// bitsPerID gives less than one false "maybe" in 10^4, with two bits set in each word of a cache line.
	bitsPerID  = 24
	lineWords  = 8 // of 64 bits: a cache line
	lineIDs    = lineWords * 64 / bitsPerID
	firstLines = 32 // of a filter's first layer: 2 KiB for 680 ids
	growth     = 4  // each further layer is that many times larger
)

// idFilter is a Bloom filter over ids, split into cache lines: a lookup touches one line a layer. It grows by layers.
type idFilter struct {
	layers   []idLayer
	lastUsed uint64 // round
}

type idLayer struct {
	lines []idLine
	room  int // ids that still fit
}

type idLine [lineWords]uint64

func newIDFilter(expected int) *idFilter {
	f := new(idFilter)
	f.addLayer(max(firstLines, (expected+expected/2)/lineIDs+1))
	return f
}

func (f *idFilter) addLayer(lines int) {
	f.layers = append(f.layers, idLayer{lines: make([]idLine, lines), room: lines * lineIDs})
}

// bytes is what the filter holds.
func (f *idFilter) bytes() (n int64) {
	for i := range f.layers {
		n += int64(len(f.layers[i].lines)) * lineWords * 8
	}
	return n
}

// line picks the id's line and returns the bits to set in its words. The id is SHA-256: its words are the hashes.
func (l *idLayer) line(id *eventID) (*idLine, idLine) {
	which, _ := bits.Mul64(binary.LittleEndian.Uint64(id[0:]), uint64(len(l.lines)))
	a, b := binary.LittleEndian.Uint64(id[8:]), binary.LittleEndian.Uint64(id[16:])
	var mask idLine
	for i := range mask {
		mask[i] = 1<<(a>>(6*i)&63) | 1<<(b>>(6*i)&63)
	}
	return &l.lines[which], mask
}

// mayContain is false only when add never had the id.
func (f *idFilter) mayContain(id *eventID) bool {
	for i := range f.layers {
		line, mask := f.layers[i].line(id)
		var missing uint64
		for w := range mask {
			missing |= mask[w] &^ line[w]
		}
		if missing == 0 {
			return true
		}
	}
	return false
}

// add puts the id in and returns how many bytes the filter grew by.
func (f *idFilter) add(id *eventID) (grown int64) {
	last := &f.layers[len(f.layers)-1]
	if last.room == 0 { // Slow path
		f.addLayer(len(last.lines) * growth)
		last = &f.layers[len(f.layers)-1]
		grown = int64(len(last.lines)) * lineWords * 8
	}
	line, mask := last.line(id)
	for w := range mask {
		line[w] |= mask[w]
	}
	last.room--
	return grown
}
