// Request bodies, and the memory of requests.
//
// body.go reads a body from the wire into a buffer. A body is bounded by its own limit (counted after decompression, so
// that a small bomb is a large body), by the server's read timeout, and by the budget of bytes that all requests together
// and those of one client may hold, from the first byte read until Kafka has acknowledged the last record.
//
// It owns that budget, each client's part of it, and the pools that buffers come from. A request takes what it needs when it
// needs it, and is charged for the whole buffer: a client that claims much and sends little, or is slow, holds little. One
// that sends much and never finishes holds its share, the others the rest.

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/bits"
	"net/http"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
)

// Limits of a body, in bytes after decompression.
const (
	maxSingleBody = 64 << 10
	maxBulkBody   = 8 << 20
	// maxDropped is how much of a body that is too large is still taken from the wire, and dropped.
	maxDropped = 4 * maxBulkBody
	// maxZstdWindow bounds what a zstd frame may make the decoder allocate, whatever it claims.
	maxZstdWindow = 8 << 20
	// maxZstdReads bounds the reads of a zstd body, two a block: one of 16 bytes may bring tables that take microseconds to build.
	// Blocks of 256 bytes stay below it, and so does a frame for each event.
	maxZstdReads = 64 << 10
	// firstRead is the size of the first buffer for a body without a length.
	firstRead = 4<<10 - 1
	// firstClaim caps the first buffer, whatever length a body claims: beyond it a request holds at most twice what was
	// sent. Otherwise a client that claims 8 MiB and sends nothing would take an eighth of everybody's budget.
	firstClaim = 16 << 10
)

var (
	errOverBudget   = errors.New("too much is in flight")
	errOverShare    = errors.New("too much of this key, or of this address without a key, is in flight")
	errBodyTooLarge = errors.New("the body is larger than the limit")
	errEncoding     = errors.New("send gzip, zstd or none")
	errTinyBlocks   = errors.New("its zstd blocks are too small: compress more at a time")
	errTimeUp       = errors.New("the time for this request is up")
)

// readBody reads r's body. The caller puts the buffer back. The errors are errBodyTooLarge, errOverBudget, errOverShare,
// errEncoding, errTimeUp, the context's when the client is gone, and others of a body that cannot be read to its end.
func (in *ingester) readBody(acc *account, r *http.Request, limit int) (*buffer, error) {
	if r.ContentLength > int64(limit) {
		return nil, errBodyTooLarge
	}
	encoding := strings.ToLower(r.Header.Get("Content-Encoding"))
	plain := encoding == "" || encoding == "identity"
	if !plain && encoding != "gzip" && encoding != "zstd" {
		return nil, errEncoding
	}
	body, err := acc.readAll(r.Context(), r.Body, int(r.ContentLength), limit)
	if plain || err != nil {
		return body, err
	}
	defer acc.put(&body)
	waiting, cancel := context.WithTimeoutCause(r.Context(), in.ackTimeout, errTimeUp)
	defer cancel()
	select {
	case d := <-decompressors:
		defer func() { decompressors <- d }()
		src, err := d.open(encoding, body.b)
		if err != nil {
			return nil, badStream(err)
		}
		return acc.readAll(r.Context(), src, min(4*len(body.b), limit), limit)
	case <-waiting.Done():
		return nil, context.Cause(waiting)
	}
}

// readAll reads src to its end. hint is its length, or -1; limit is the most it may have. A full buffer is replaced by a bigger
// one.
func (a *account) readAll(ctx context.Context, src io.Reader, hint, limit int) (*buffer, error) {
	if hint < 0 {
		hint = firstRead
	}
	var body *buffer
	err := a.move(&body, min(hint, firstClaim)+1, false) // one byte more than expected: the end is seen without growing again
	for err == nil {
		var n int
		n, err = src.Read(body.b[len(body.b):cap(body.b)])
		body.b = body.b[:len(body.b)+n]
		switch {
		case len(body.b) > limit:
			err = errBodyTooLarge
		case err == io.EOF:
			return body, nil
		case errors.Is(err, os.ErrDeadlineExceeded): // the client may still be there, although the context is canceled
			err = errTimeUp
		case ctx.Err() != nil: // the client is gone
			err = ctx.Err()
		case err != nil:
			err = badStream(err)
		case len(body.b) == cap(body.b):
			err = a.move(&body, min(2*cap(body.b), limit+1), false)
		}
	}
	a.put(&body)
	return nil, err
}

func badStream(err error) error {
	switch {
	case errors.Is(err, zstd.ErrDecoderSizeExceeded): // the frame says its size, and no limit is above maxZstdWindow
		return errBodyTooLarge
	case errors.Is(err, zstd.ErrWindowSizeExceeded):
		return fmt.Errorf("the body could not be read: its zstd window is larger than %d MiB", maxZstdWindow>>20)
	}
	return fmt.Errorf("the body could not be read: %v", err)
}

// decompressor keeps the state of both decoders for the next body: about 40 KiB, and up to twice maxZstdWindow.
type decompressor struct {
	src   bytes.Reader
	gzip  gzip.Reader
	zstd  *zstd.Decoder
	reads int // of src that are left to zstd
}

// maxDecompressors bounds what the decoders keep for ever, in nobody's budget, once bodies have claimed the largest window.
const maxDecompressors = 4

var decompressors = newDecompressors(runtime.GOMAXPROCS(0))

// newDecompressors makes one for each core, as long as these are few: decoding never waits.
func newDecompressors(cores int) chan *decompressor {
	all := make(chan *decompressor, min(cores, maxDecompressors))
	for range cap(all) {
		// Concurrency 1 decodes in the caller: no goroutines to leak. The error would be of the options.
		z, _ := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(maxZstdWindow))
		all <- &decompressor{zstd: z}
	}
	return all
}

func (d *decompressor) open(encoding string, raw []byte) (io.Reader, error) {
	d.src.Reset(raw)
	if encoding == "gzip" {
		return &d.gzip, d.gzip.Reset(&d.src)
	}
	d.reads = maxZstdReads
	return d.zstd, d.zstd.Reset(d)
}

// Read gives the zstd decoder the body. A bytes.Buffer it would decode at once, past the limit.
func (d *decompressor) Read(p []byte) (int, error) {
	if d.reads--; d.reads < 0 {
		return 0, errTinyBlocks
	}
	return d.src.Read(p)
}

// writeReadError answers a request whose body could not be read.
func writeReadError(w http.ResponseWriter, err error) {
	switch {
	case errors.Is(err, errBodyTooLarge):
		// There may be more of the body than was read: the connection ends with this answer.
		w.Header().Set("Connection", "close")
		writeError(w, http.StatusRequestEntityTooLarge, "request body too large",
			"the limit is 64 KiB for one event, 8 MiB for a bulk, after decompression")
	case errors.Is(err, errOverShare):
		w.Header().Set("Retry-After", retryAfterSeconds)
		writeError(w, http.StatusTooManyRequests, "too many requests", err.Error())
	case errors.Is(err, errOverBudget), errors.Is(err, errTimeUp):
		writeUnavailable(w, err.Error())
	case errors.Is(err, context.Canceled): // the client is gone: nobody is left to tell
	case errors.Is(err, errEncoding):
		writeError(w, http.StatusUnsupportedMediaType, "unsupported content encoding", err.Error())
	default: // it could not be read, is not JSON, or not in the form of a bulk
		writeError(w, http.StatusBadRequest, "invalid request body", err.Error())
	}
}

// Sizes of pooled buffers, each twice the one before: 1 KiB to 1 MiB. A larger one is made to measure and left to the garbage
// collector: one huge request must not keep its memory for ever.
const (
	minBuffer   = 1 << 10
	bufferSizes = 11
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
		a = &account{budget: b, client: c}
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

// grow makes room for n more bytes in *buf, unless it has it.
func (a *account) grow(buf **buffer, n int, owed bool) error {
	b := (*buf).bytes()
	if cap(b)-len(b) >= n { // Fast path
		return nil
	}
	return a.move(buf, max(len(b)+n, 2*cap(b)), owed)
}

// move replaces *buf, which may be nil, by a buffer of n bytes and more, with the same ones in it. On an error, errOverBudget or
// errOverShare, *buf stays as it was. An answer that is owed ignores the limits.
func (a *account) move(buf **buffer, n int, owed bool) error {
	size := bufferSize(n)
	if owed {
		a.give(-size)
	} else if err := a.take(size); err != nil {
		return err
	}
	var to *buffer
	if pool := bufferPool(size); pool < bufferSizes {
		to, _ = a.budget.pools[pool].Get().(*buffer)
	}
	if to == nil {
		to = &buffer{make([]byte, 0, size)}
	}
	to.b = append(to.b, (*buf).bytes()...)
	a.put(buf)
	*buf = to
	return nil
}

// put takes *held back and forgets it: nobody may look at its bytes any more. nil is fine.
func (a *account) put(held **buffer) {
	buf := *held
	if *held = nil; buf == nil {
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
