// The filter alone.

package main

import (
	"crypto/sha256"
	"encoding/binary"
	"testing"
)

func testID(n int) eventID {
	return sha256.Sum256(binary.LittleEndian.AppendUint64(nil, uint64(n)))
}

// TestIDFilter: never a false no, and few false maybes, also after it grew.
func TestIDFilter(t *testing.T) {
	const ids = 200_000
	for _, expected := range []int{0, 26, ids} {
		f := newIDFilter(expected)
		for n := range ids {
			id := testID(n)
			f.add(&id)
		}
		for n := range ids {
			if id := testID(n); !f.mayContain(&id) {
				t.Fatalf("expected %d: id %d is missing", expected, n)
			}
		}
		wrong := 0
		for n := ids; n < 2*ids; n++ {
			if id := testID(n); f.mayContain(&id) {
				wrong++
			}
		}
		if wrong > ids/2000 {
			t.Errorf("expected %d: %d of %d unknown ids are maybes", expected, wrong, ids)
		}
		t.Logf("expected %d: %d layers, %.1f bytes an id, %d false maybes of %d", expected, len(f.layers), float64(f.bytes())/ids, wrong, ids)
	}
}
