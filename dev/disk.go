// A disk that forgets: what was written to it and not flushed is gone when its process is killed, as it is when a machine
// loses its power.
//
// disk.go owns the sectors, disk_linux.go makes a block device and a file system of them. Above it everything is Linux's own:
// the page cache, which is lost as well, the order in which ext4 writes, its journal, and what fsync waits for.

package main

import (
	"io"
	"math/rand/v2"
	"sync"
)

// sectorSize is ext4's block: a sector is on the disk as a whole or not at all.
const sectorSize = 4096

// image is where a disk keeps what was flushed.
type image interface {
	io.ReaderAt
	io.WriterAt
}

// volatileDisk has a cache for writes, as drives have.
type volatileDisk struct {
	// early is the share of sectors that go to the image at once. A drive empties its cache in any order, so a file system
	// has to live with any part of what it has not flushed; 0 forgets all of it.
	early float64

	mu    sync.Mutex // guards what follows
	image image
	cache map[int64][]byte // by number, sectors that the image has not, or older
}

func newVolatileDisk(image image, early float64) *volatileDisk {
	return &volatileDisk{early: early, image: image, cache: map[int64][]byte{}}
}

// readAt fills p with what was written last.
func (d *volatileDisk) readAt(p []byte, at int64) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if _, err := d.image.ReadAt(p, at); err != nil {
		return err
	}
	for n := at / sectorSize; n*sectorSize < at+int64(len(p)); n++ {
		if sector := d.cache[n]; sector != nil {
			if start := n * sectorSize; start < at {
				copy(p, sector[at-start:])
			} else {
				copy(p[start-at:], sector)
			}
		}
	}
	return nil
}

// writeAt takes p into the cache, or past it.
func (d *volatileDisk) writeAt(p []byte, at int64) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	for len(p) > 0 {
		n, start := at/sectorSize, at%sectorSize
		sector := d.cache[n]
		if sector == nil {
			sector = make([]byte, sectorSize)
			if start != 0 || len(p) < sectorSize {
				if _, err := d.image.ReadAt(sector, n*sectorSize); err != nil {
					return err
				}
			}
			d.cache[n] = sector
		}
		written := copy(sector[start:], p)
		p, at = p[written:], at+int64(written)
		if d.early > 0 && rand.Float64() < d.early {
			if err := d.keep(n); err != nil {
				return err
			}
		}
	}
	return nil
}

// flush returns when the image has all that was written before.
func (d *volatileDisk) flush() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	for n := range d.cache {
		if err := d.keep(n); err != nil {
			return err
		}
	}
	return nil
}

// keep moves a sector from the cache to the image, under mu.
func (d *volatileDisk) keep(n int64) error {
	if _, err := d.image.WriteAt(d.cache[n], n*sectorSize); err != nil {
		return err
	}
	delete(d.cache, n)
	return nil
}
