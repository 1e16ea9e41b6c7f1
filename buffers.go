// The memory of requests: buffers in sizes of powers of two, counted from get to put.
//
// buffers.go owns the budget of bytes that all requests together may hold, and the pools of buffers that come out of it.
// A request takes what it needs, when it needs it, and is charged for the whole buffer: a client that claims much and sends
// little, or is slow, holds little.

package main

import (
	"math/bits"
	"sync"
	"sync/atomic"
)

// Sizes of pooled buffers. A larger one is made to measure and left to the garbage collector: one huge request must not
// keep its memory for ever.
const (
	minBuffer   = 1 << 10
	maxBuffer   = 1 << 20
	bufferSizes = 11
)

// byteBudget bounds the bytes that requests hold. The zero limit refuses everything.
type byteBudget struct {
	limit int64
	used  atomic.Int64
	pools [bufferSizes]sync.Pool // of *buffer, by size
}

// buffer is bytes with an owner, who gives them back.
type buffer struct{ b []byte }

// bytes is what is in the buffer; nil is empty.
func (b *buffer) bytes() []byte {
	if b == nil {
		return nil
	}
	return b.b
}

func (b *byteBudget) take(n int) bool {
	if b.used.Add(int64(n)) > b.limit {
		b.used.Add(int64(-n))
		return false
	}
	return true
}

func (b *byteBudget) give(n int) { b.used.Add(int64(-n)) }

// get returns an empty buffer with room for n bytes, nil when that would pass the limit.
func (b *byteBudget) get(n int) *buffer {
	if !b.take(bufferSize(n)) {
		return nil
	}
	return b.taken(bufferSize(n))
}

// grow returns a buffer with buf's bytes and room for n more: buf itself if it has it, else a bigger one in its place. It
// is nil when that would pass the limit; buf stays as it was. Of what is owed, an answer, the limit is not asked.
func (b *byteBudget) grow(buf *buffer, n int, owed bool) *buffer {
	if cap(buf.b)-len(buf.b) >= n { // Fast path
		return buf
	}
	size := bufferSize(max(len(buf.b)+n, 2*cap(buf.b)))
	if owed {
		b.used.Add(int64(size))
	} else if !b.take(size) {
		return nil
	}
	bigger := b.taken(size)
	bigger.b = append(bigger.b, buf.b...)
	b.put(buf)
	return bigger
}

// taken returns a buffer of a size that has been taken.
func (b *byteBudget) taken(size int) *buffer {
	if pool := bufferPool(size); pool < bufferSizes {
		if buf, ok := b.pools[pool].Get().(*buffer); ok {
			return buf
		}
	}
	return &buffer{make([]byte, 0, size)}
}

// put takes a buffer back; nobody may look at its bytes any more. nil is fine.
func (b *byteBudget) put(buf *buffer) {
	if buf == nil {
		return
	}
	b.give(cap(buf.b))
	if pool := bufferPool(cap(buf.b)); cap(buf.b) >= minBuffer && pool < bufferSizes {
		buf.b = buf.b[:0]
		b.pools[pool].Put(buf)
	}
}

// bufferSize is what a buffer with room for n bytes has.
func bufferSize(n int) int {
	if pool := bufferPool(n); pool < bufferSizes {
		return minBuffer << pool
	}
	return n
}

// bufferPool is the index of the smallest size that holds n bytes; bufferSizes or more when none does.
func bufferPool(n int) int { return bits.Len(uint(max(n, 1)-1) / minBuffer) }
