// Package budget bounds the memory of requests: the bytes that all of them together, and those of one client, may hold.
//
// It owns the budget, each client's account of it, and the pools that buffers come from. A request opens an account, takes what
// it needs when it needs it, is charged for the whole buffer, and gives all of it back before it closes the account: a client
// that claims much and sends little, or is slow, holds little. One that sends much and never finishes holds its share, the
// others the rest.
package budget

import (
	"errors"
	"math/bits"
	"sync"
	"sync/atomic"
)

// Why nothing more is taken: the budget is used up, or the client's share of it.
var (
	ErrFull  = errors.New("too much is in flight")
	ErrShare = errors.New("too much of this key, or of this address without a key, is in flight; requests whose key is not in the header have one share together")
)

// Sizes of pooled buffers, each twice the one before: 1 KiB to 1 MiB. A larger one is made to measure and left to the garbage
// collector: one huge request must not keep its memory for ever.
const (
	minBuffer   = 1 << 10
	bufferSizes = 11
)

// Budget bounds the bytes that requests hold.
type Budget struct {
	limit     int64
	perClient int64 // of it, the most that one client may hold; 0 is no limit
	used      atomic.Int64
	pools     [bufferSizes]sync.Pool // of *Buffer, by size

	mu       sync.Mutex            // guards accounts, and the requests of each
	accounts map[[32]byte]*Account // only of clients with a request in flight
}

// Account is what the requests of one client hold.
type Account struct {
	budget   *Budget
	client   [32]byte
	share    int64 // the most that it may hold; 0 is no limit
	used     atomic.Int64
	requests atomic.Int32
}

// Buffer is bytes with an owner, who gives them back.
type Buffer struct{ B []byte }

// Bytes returns what is in the buffer; nil is empty. They are the buffer's: valid until it is grown, moved or put back.
func (b *Buffer) Bytes() []byte {
	if b == nil {
		return nil
	}
	return b.B
}

// New returns a budget of limit bytes, of which one client gets at most perClient; 0 is no limit for a single one. A limit of 0
// refuses everything.
func New(limit, perClient int64) *Budget {
	return &Budget{limit: limit, perClient: perClient, accounts: map[[32]byte]*Account{}}
}

// Used is how many bytes are held at the moment.
func (b *Budget) Used() int64 { return b.used.Load() }

// Open returns the client's account for one more request.
func (b *Budget) Open(client [32]byte) *Account { return b.OpenWithin(client, b.perClient) }

// OpenWithin is Open for an account with a share of its own, in bytes; it is the same in each of the client's calls.
func (b *Budget) OpenWithin(client [32]byte, share int64) *Account {
	b.mu.Lock()
	defer b.mu.Unlock()
	a := b.accounts[client]
	if a == nil {
		a = &Account{budget: b, client: client, share: share}
		b.accounts[client] = a
	}
	a.requests.Add(1)
	return a
}

// Close ends a request that has given back all it took. The client's last one removes the account.
func (a *Account) Close() {
	b := a.budget
	b.mu.Lock()
	defer b.mu.Unlock()
	if a.requests.Add(-1) == 0 {
		delete(b.accounts, a.client)
	}
}

// Take charges n bytes, or fails with ErrFull or ErrShare. A client's only request may exceed its share: a body larger than the
// share would otherwise be refused for ever.
func (a *Account) Take(n int) error {
	if err := a.charge(n); err != nil {
		return err
	}
	if a.budget.used.Add(int64(n)) > a.budget.limit {
		a.Give(n)
		return ErrFull
	}
	return nil
}

// charge is Take for the account alone.
func (a *Account) charge(n int) error {
	if used := a.used.Add(int64(n)); a.share > 0 && used > a.share && a.requests.Load() > 1 {
		a.used.Add(int64(-n))
		return ErrShare
	}
	return nil
}

// Pass charges another account of the budget for a buffer, instead of this one, or fails with ErrShare.
func (a *Account) Pass(buf *Buffer, to *Account) error {
	if err := to.charge(cap(buf.B)); err != nil {
		return err
	}
	a.used.Add(int64(-cap(buf.B)))
	return nil
}

// Give gives n bytes back.
func (a *Account) Give(n int) {
	a.used.Add(int64(-n))
	a.budget.used.Add(int64(-n))
}

// Grow makes room for n more bytes in *buf, unless it has it: at least twice as much as it had. Errors are Move's.
func (a *Account) Grow(buf **Buffer, n int, owed bool) error {
	b := (*buf).Bytes()
	if cap(b)-len(b) >= n { // Fast path
		return nil
	}
	return a.Move(buf, max(len(b)+n, 2*cap(b)), owed)
}

// Move replaces *buf, which may be nil, by a buffer of n bytes and more, with the same ones in it. On an error, ErrFull or
// ErrShare, *buf stays as it was. An answer that is owed ignores the limits.
func (a *Account) Move(buf **Buffer, n int, owed bool) error {
	size := bufferSize(n)
	if owed {
		a.Give(-size)
	} else if err := a.Take(size); err != nil {
		return err
	}
	var moved *Buffer
	if pool := bufferPool(size); pool < bufferSizes {
		moved, _ = a.budget.pools[pool].Get().(*Buffer)
	}
	if moved == nil {
		moved = &Buffer{make([]byte, 0, size)}
	}
	moved.B = append(moved.B, (*buf).Bytes()...)
	a.Put(buf)
	*buf = moved
	return nil
}

// Put takes *held back and forgets it: nobody may look at its bytes any more. nil is fine.
func (a *Account) Put(held **Buffer) {
	buf := *held
	if *held = nil; buf == nil {
		return
	}
	a.Give(cap(buf.B))
	if pool := bufferPool(cap(buf.B)); cap(buf.B) >= minBuffer && pool < bufferSizes {
		buf.B = buf.B[:0]
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
