// The memory of requests: buffers in sizes of powers of two, counted from get to put.
//
// buffers.go owns the byte budget of all requests together, each client's part of it, and the pools that the buffers come
// from. A request takes what it needs when it needs it, and is charged for the whole buffer: a client that claims much and
// sends little, or is slow, holds little. One that sends much and never finishes holds its share, the others the rest.

package main

import (
	"errors"
	"math/bits"
	"sync"
	"sync/atomic"
)

// Sizes of pooled buffers, each twice the one before: 1 KiB to 1 MiB. A larger one is made to measure and left to the garbage collector: one huge request must not
// keep its memory for ever.
const (
	minBuffer   = 1 << 10
	bufferSizes = 11
)

var (
	errOverBudget = errors.New("too much is in flight")
	errOverShare  = errors.New("too much of this key, or of this address without a key, is in flight")
)

// byteBudget bounds the bytes that requests hold. The zero limit refuses everything.
type byteBudget struct {
	limit     int64
	perClient int64 // of it, the most that one client may hold; 0 is no limit
	used      atomic.Int64
	pools     [bufferSizes]sync.Pool // of *buffer, by size

	mu       sync.Mutex          // guards accounts, and the requests of each
	accounts map[client]*account // only of clients with a request in flight
}

// account is what the requests of one client hold. Each request opens it, takes and gives back through it, and closes it.
type account struct {
	budget   *byteBudget
	client   client
	used     atomic.Int64
	requests atomic.Int32
}

var accounts = sync.Pool{New: func() any { return new(account) }}

// buffer is bytes with an owner, who gives them back.
type buffer struct{ b []byte }

// bytes returns what is in the buffer; nil is empty.
func (b *buffer) bytes() []byte {
	if b == nil {
		return nil
	}
	return b.b
}

// open returns the client's account for one more request.
func (b *byteBudget) open(c client) *account {
	b.mu.Lock()
	defer b.mu.Unlock()
	a := b.accounts[c]
	if a == nil {
		if b.accounts == nil {
			b.accounts = map[client]*account{}
		}
		a = accounts.Get().(*account)
		a.budget, a.client = b, c
		b.accounts[c] = a
	}
	a.requests.Add(1)
	return a
}

// close ends a request that has given back all it took. The client's last one removes the account.
func (a *account) close() {
	b := a.budget
	b.mu.Lock()
	defer b.mu.Unlock()
	if a.requests.Add(-1) == 0 {
		delete(b.accounts, a.client)
		a.budget = nil
		accounts.Put(a)
	}
}

// take charges n bytes. A client's only request may exceed its share: a body larger than the share would otherwise be
// refused for ever.
func (a *account) take(n int) error {
	b := a.budget
	if used := a.used.Add(int64(n)); b.perClient > 0 && used > b.perClient && a.requests.Load() > 1 {
		a.used.Add(int64(-n))
		return errOverShare
	}
	if b.used.Add(int64(n)) > b.limit {
		a.give(n)
		return errOverBudget
	}
	return nil
}

func (a *account) give(n int) {
	a.used.Add(int64(-n))
	a.budget.used.Add(int64(-n))
}

// get returns an empty buffer with room for n bytes. The errors are errOverBudget and errOverShare.
func (a *account) get(n int) (*buffer, error) {
	if err := a.take(bufferSize(n)); err != nil {
		return nil, err
	}
	return a.budget.taken(bufferSize(n)), nil
}

// grow replaces *buf by a bigger buffer with the same bytes, unless it has room for n more. On an error, one of get's, *buf
// stays as it was. An answer that is owed ignores the limits.
func (a *account) grow(buf **buffer, n int, owed bool) error {
	b := (*buf).bytes()
	if cap(b)-len(b) >= n { // Fast path
		return nil
	}
	size := bufferSize(max(len(b)+n, 2*cap(b)))
	if owed {
		a.give(-size)
	} else if err := a.take(size); err != nil {
		return err
	}
	bigger := a.budget.taken(size)
	bigger.b = append(bigger.b, b...)
	a.put(*buf)
	*buf = bigger
	return nil
}

// taken returns a buffer of a size that is already charged.
func (b *byteBudget) taken(size int) *buffer {
	if pool := bufferPool(size); pool < bufferSizes {
		if buf, ok := b.pools[pool].Get().(*buffer); ok {
			return buf
		}
	}
	return &buffer{make([]byte, 0, size)}
}

// put takes a buffer back; nobody may look at its bytes any more. nil is fine.
func (a *account) put(buf *buffer) {
	if buf == nil {
		return
	}
	a.give(cap(buf.b))
	if pool := bufferPool(cap(buf.b)); cap(buf.b) >= minBuffer && pool < bufferSizes {
		buf.b = buf.b[:0]
		a.budget.pools[pool].Put(buf)
	}
}

// bufferSize is the size of a buffer with room for n bytes.
func bufferSize(n int) int {
	if pool := bufferPool(n); pool < bufferSizes {
		return minBuffer << pool
	}
	return n
}

// bufferPool is the index of the smallest size that holds n bytes; bufferSizes or more when none does.
func bufferPool(n int) int { return bits.Len(uint(max(n, 1)-1) / minBuffer) }
