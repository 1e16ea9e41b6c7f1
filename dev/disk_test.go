// What a disk that forgets has kept, and what it shows.

package main

import (
	"bytes"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"
)

// TestVolatileDisk writes anywhere and reads, beside an array that does the same. What is in the image is what was there at the last
// flush, or, of a disk that empties its cache in any order, what was written since, sector by sector.
func TestVolatileDisk(t *testing.T) {
	for _, early := range []float64{0, 0.5} {
		f, err := os.Create(filepath.Join(t.TempDir(), "image"))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		const size = 16 * sectorSize
		if err := f.Truncate(size); err != nil {
			t.Fatal(err)
		}
		d := newVolatileDisk(f, early)
		written, flushed := make([]byte, size), make([]byte, size)
		since := map[int][][]byte{} // by sector, what it was since the last flush
		kept := 0
		for round := range 300 {
			at := rand.IntN(size - 1)
			p := make([]byte, 1+rand.IntN(min(size-at, 3*sectorSize)))
			for i := range p {
				p[i] = byte(round + i)
			}
			copy(written[at:], p)
			if err := d.writeAt(p, int64(at)); err != nil {
				t.Fatal(err)
			}
			for n := at / sectorSize; n*sectorSize < at+len(p); n++ {
				since[n] = append(since[n], bytes.Clone(written[n*sectorSize:][:sectorSize]))
			}
			from := rand.IntN(size - 1)
			got := make([]byte, 1+rand.IntN(size-from))
			if err := d.readAt(got, int64(from)); err != nil || !bytes.Equal(got, written[from:from+len(got)]) {
				t.Fatalf("round %d: other bytes than were written, %v", round, err)
			}
			image, err := os.ReadFile(f.Name())
			if err != nil {
				t.Fatal(err)
			}
			for n := range size / sectorSize {
				sector := image[n*sectorSize:][:sectorSize]
				is := func(was []byte) bool { return bytes.Equal(was, sector) }
				switch {
				case is(flushed[n*sectorSize:][:sectorSize]):
				case early > 0 && slices.ContainsFunc(since[n], is):
					kept++
				default:
					t.Fatalf("round %d: sector %d was never that", round, n)
				}
			}
			if rand.IntN(20) == 0 {
				if err := d.flush(); err != nil {
					t.Fatal(err)
				}
				copy(flushed, written)
				clear(since)
				if image, _ := os.ReadFile(f.Name()); !bytes.Equal(image, written) || len(d.cache) > 0 {
					t.Fatalf("round %d: flushed, and the image has other bytes", round)
				}
			}
		}
		if (kept > 0) != (early > 0) {
			t.Errorf("%d sectors came early", kept)
		}
	}
}
