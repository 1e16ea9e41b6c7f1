// Request bodies: read whole, decompressed, bounded three ways.
//
// body.go fills an ingestRequest's body from the wire. A body is bounded by its own limit (counted after
// decompression, so that a small bomb is a large body), by the server's read timeout, and by the budget of bytes that
// all requests together may hold, from the first byte read until Kafka has acknowledged the last record.

package main

import (
	"errors"
	"io"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
)

// Limits of a body, from contract.md, in bytes after decompression.
const (
	maxSingleBody = 64 << 10
	maxBulkBody   = 8 << 20
	// maxZstdWindow bounds what a zstd frame may make the decoder allocate, whatever it claims.
	maxZstdWindow = 8 << 20
	// firstRead is what a body without a length gets as its first buffer.
	firstRead = 4 << 10
	// firstClaim is the most that a body gets for the length that it claims: what a request holds beyond it was sent, or half
	// of it. A client that claims 8 MiB and sends nothing would else take an eighth of the budget of all.
	firstClaim = 16 << 10
)

var (
	errBodyTooLarge = errors.New("the body is larger than the limit")
	errOverBudget   = errors.New("too much is in flight")
	errEncoding     = errors.New("unsupported content encoding: send gzip, zstd or none")
)

// errBadStream is a body that could not be read to its end.
type errBadStream struct{ err error }

func (e errBadStream) Error() string { return e.err.Error() }

// byteBudget bounds the bytes that requests hold. The zero limit refuses everything.
type byteBudget struct {
	limit int64
	used  atomic.Int64
}

func (b *byteBudget) take(n int64) bool {
	if b.used.Add(n) > b.limit {
		b.used.Add(-n)
		return false
	}
	return true
}

func (b *byteBudget) give(n int64) { b.used.Add(-n) }

// readBody reads r's body into q.body. The errors are errBodyTooLarge, errOverBudget, errEncoding and errBadStream.
func (in *ingester) readBody(q *ingestRequest, r *http.Request, limit int) error {
	if r.ContentLength > int64(limit) {
		return errBodyTooLarge
	}
	size := int(r.ContentLength)
	switch encoding := strings.ToLower(r.Header.Get("Content-Encoding")); encoding {
	case "", "identity":
		return in.readAll(q, &q.body, r.Body, size, limit)
	case "gzip", "zstd":
		if err := in.readAll(q, &q.raw, r.Body, size, limit); err != nil {
			return err
		}
		return in.decompress(q, encoding, limit)
	default:
		return errEncoding
	}
}

// readAll reads src to its end into *dst. hint is its length, or -1; limit is the most it may have.
func (in *ingester) readAll(q *ingestRequest, dst *[]byte, src io.Reader, hint, limit int) error {
	b := (*dst)[:0]
	defer func() { *dst = b }()
	if hint < 0 {
		hint = firstRead
	}
	hint = min(hint, firstClaim)
	for {
		// One byte more than expected, so that the end is seen without growing again.
		if free := cap(b) - len(b); free == 0 || len(b) == 0 && free <= hint {
			b = append(make([]byte, 0, max(hint+1, 2*cap(b))), b...)
		}
		if held := int64(len(q.raw) + cap(b)); held > q.taken {
			if !in.bodies.take(held - q.taken) {
				return errOverBudget
			}
			q.taken = held
		}
		n, err := src.Read(b[len(b):cap(b)])
		b = b[:len(b)+n]
		if len(b) > limit {
			return errBodyTooLarge
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return errBadStream{err}
		}
	}
}

func (in *ingester) decompress(q *ingestRequest, encoding string, limit int) error {
	d := decompressors.Get().(*decompressor)
	defer decompressors.Put(d)
	src, err := d.open(encoding, q.raw)
	if err != nil {
		return errBadStream{err}
	}
	return in.readAll(q, &q.body, src, min(4*len(q.raw), limit), limit)
}

// decompressor keeps the state of both decoders, about 40 KiB and 1 MiB once used, for the next body.
type decompressor struct {
	src  byteReader
	gzip *gzip.Reader
	zstd *zstd.Decoder
}

var decompressors = sync.Pool{New: func() any { return new(decompressor) }}

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
		// The rest of the body is not read: the connection ends with this answer.
		w.Header().Set("Connection", "close")
		writeError(w, http.StatusRequestEntityTooLarge, "request body too large", "the limit is 64 KiB for one event, 8 MiB for a bulk, after decompression")
	case errors.Is(err, errOverBudget):
		writeUnavailable(w, err.Error())
	case errors.Is(err, errEncoding):
		writeError(w, http.StatusUnsupportedMediaType, "unsupported content encoding", err.Error())
	case errors.As(err, &bad):
		writeError(w, http.StatusBadRequest, "invalid request body", "the body could not be read: "+err.Error())
	default:
		writeError(w, http.StatusBadRequest, "invalid request body", err.Error())
	}
}
