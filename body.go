// Request bodies: read whole, decompressed, bounded three ways.
//
// body.go reads a body from the wire into a buffer. A body is bounded by its own limit (counted after decompression, so
// that a small bomb is a large body), by the server's read timeout, and by the budget of bytes that all requests together
// and those of one client may hold, from the first byte read until Kafka has acknowledged the last record.

package main

import (
	"context"
	"errors"
	"io"
	"net/http"
	"os"
	"runtime"
	"strings"
	"time"

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
	// firstRead is the size of the first buffer for a body without a length.
	firstRead = 4<<10 - 1
	// firstClaim caps the first buffer, whatever length a body claims: beyond it a request holds at most twice what was
	// sent. Otherwise a client that claims 8 MiB and sends nothing would take an eighth of everybody's budget.
	firstClaim = 16 << 10
)

var (
	errBodyTooLarge = errors.New("the body is larger than the limit")
	errEncoding     = errors.New("unsupported content encoding: send gzip, zstd or none")
	errTimeUp       = errors.New("the time for this request is up")
)

// errBadStream is a body that could not be read to its end.
type errBadStream struct{ err error }

func (e errBadStream) Error() string { return e.err.Error() }

// readBody reads r's body. The caller puts the buffer back. The errors are errBodyTooLarge, errOverBudget, errOverShare,
// errEncoding, errTimeUp, errBadStream, and the context's when the client is gone.
func (in *ingester) readBody(acc *account, r *http.Request, limit int) (*buffer, error) {
	if r.ContentLength > int64(limit) {
		return nil, errBodyTooLarge
	}
	switch encoding := strings.ToLower(r.Header.Get("Content-Encoding")); encoding {
	case "", "identity":
		return acc.readAll(r.Context(), r.Body, int(r.ContentLength), limit)
	case "gzip", "zstd":
		raw, err := acc.readAll(r.Context(), r.Body, int(r.ContentLength), limit)
		if err != nil {
			return nil, err
		}
		defer acc.put(raw)
		return in.decompress(acc, r.Context(), encoding, raw.b, limit)
	default:
		return nil, errEncoding
	}
}

// readAll reads src to its end. hint is its length, or -1; limit is the most it may have.
func (a *account) readAll(ctx context.Context, src io.Reader, hint, limit int) (*buffer, error) {
	if hint < 0 {
		hint = firstRead
	}
	// One byte more than expected, so that the end is seen without growing again.
	body, err := a.get(min(hint, firstClaim) + 1)
	if err != nil {
		return nil, err
	}
	if err := a.readInto(&body, ctx, src, limit); err != nil {
		a.put(body)
		return nil, err
	}
	return body, nil
}

// readInto appends src to *body, and replaces it by a bigger buffer when it is full.
func (a *account) readInto(body **buffer, ctx context.Context, src io.Reader, limit int) error {
	for {
		b := *body
		if len(b.b) == cap(b.b) {
			bigger, err := a.get(min(2*cap(b.b), limit+1))
			if err != nil {
				return err
			}
			bigger.b = append(bigger.b, b.b...)
			a.put(b)
			b, *body = bigger, bigger
		}
		n, err := src.Read(b.b[len(b.b):cap(b.b)])
		b.b = b.b[:len(b.b)+n]
		switch {
		case len(b.b) > limit:
			return errBodyTooLarge
		case err == io.EOF:
			return nil
		case errors.Is(err, os.ErrDeadlineExceeded): // the client may still be there, although the context is canceled
			return errTimeUp
		case ctx.Err() != nil: // the client is gone
			return ctx.Err()
		case err != nil:
			return errBadStream{err}
		}
	}
}

func (in *ingester) decompress(acc *account, ctx context.Context, encoding string, raw []byte, limit int) (*buffer, error) {
	var d *decompressor
	select { // Fast path
	case d = <-decompressors:
	default:
		timeout := time.NewTimer(in.ackTimeout)
		defer timeout.Stop()
		select {
		case d = <-decompressors:
		case <-timeout.C:
			return nil, errTimeUp
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	defer func() { decompressors <- d }()
	src, err := d.open(encoding, raw)
	if err != nil {
		return nil, errBadStream{err}
	}
	return acc.readAll(ctx, src, min(4*len(raw), limit), limit)
}

// decompressor keeps the state of both decoders for the next body: about 40 KiB, and up to twice maxZstdWindow.
type decompressor struct {
	src  byteReader
	gzip *gzip.Reader
	zstd *zstd.Decoder
}

// decompressors has one for each core. Decoding never waits, so more of them would only cost memory, of which a few bytes
// of zstd can claim a lot.
var decompressors = func() chan *decompressor {
	all := make(chan *decompressor, runtime.GOMAXPROCS(0))
	for range cap(all) {
		all <- new(decompressor)
	}
	return all
}()

func (d *decompressor) open(encoding string, raw []byte) (io.Reader, error) {
	d.src = byteReader{raw}
	if encoding == "gzip" {
		if d.gzip == nil {
			z, err := gzip.NewReader(&d.src)
			d.gzip = z
			return z, err
		}
		return d.gzip, d.gzip.Reset(&d.src)
	}
	if d.zstd == nil {
		// Concurrency 1 decodes in the caller: no goroutines to leak from a pool.
		z, err := zstd.NewReader(&d.src, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(maxZstdWindow))
		d.zstd = z
		return z, err
	}
	return d.zstd, d.zstd.Reset(&d.src)
}

// byteReader is bytes.Reader without the parts that make zstd decode the whole input at once, past the limit.
type byteReader struct{ b []byte }

func (r *byteReader) Read(p []byte) (int, error) {
	if len(r.b) == 0 {
		return 0, io.EOF
	}
	n := copy(p, r.b)
	r.b = r.b[n:]
	return n, nil
}

func (r *byteReader) ReadByte() (byte, error) {
	if len(r.b) == 0 {
		return 0, io.EOF
	}
	c := r.b[0]
	r.b = r.b[1:]
	return c, nil
}

// writeReadError answers a request whose body could not be read.
func writeReadError(w http.ResponseWriter, err error) {
	var bad errBadStream
	switch {
	case errors.Is(err, errBodyTooLarge):
		// There may be more of the body than was read: the connection ends with this answer.
		w.Header().Set("Connection", "close")
		writeError(w, http.StatusRequestEntityTooLarge, "request body too large", "the limit is 64 KiB for one event, 8 MiB for a bulk, after decompression")
	case errors.Is(err, errOverShare):
		w.Header().Set("Retry-After", retryAfterSeconds)
		writeError(w, http.StatusTooManyRequests, "too many requests", err.Error())
	case errors.Is(err, errOverBudget), errors.Is(err, errTimeUp):
		writeUnavailable(w, err.Error())
	case errors.Is(err, context.Canceled): // the client is gone: nobody is left to tell
	case errors.Is(err, errEncoding):
		writeError(w, http.StatusUnsupportedMediaType, "unsupported content encoding", err.Error())
	case errors.As(err, &bad):
		writeError(w, http.StatusBadRequest, "invalid request body", "the body could not be read: "+err.Error())
	default: // it is not JSON, or not in the form of a bulk
		writeError(w, http.StatusBadRequest, "invalid request body", err.Error())
	}
}
