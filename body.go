// Request bodies.
//
// body.go reads a body from the wire into a buffer. A body is bounded by its own limit (counted after decompression, so
// that a small bomb is a large body), by the server's read timeout, and by the budget of bytes that all requests together
// and those of one client may hold, from the first byte read until Kafka has acknowledged the last record: package budget.
//
// It owns the decompressors, and the answer to a body that cannot be read.

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"

	"github.com/event-ingestion/event-ingestion/internal/budget"
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

const _ = uint(minInFlightBytes - 4*maxBulkBody) // does not compile unless the least budget has room for a few bulks

var (
	errBodyTooLarge = errors.New("the body is larger than the limit")
	errEncoding     = errors.New("send gzip, zstd or none")
	errTinyBlocks   = errors.New("its zstd blocks are too small: compress more at a time")
	errTimeUp       = errors.New("the time for this request is up")
)

// readBody reads r's body, of at most limit bytes; patience is how long it waits for a decompressor. The caller puts the buffer
// back. The errors are errBodyTooLarge, budget.ErrFull, budget.ErrShare, errEncoding, errTimeUp, the context's when the client is
// gone, and others of a body that cannot be read to its end.
func readBody(acc *budget.Account, r *http.Request, limit int, patience time.Duration) (*budget.Buffer, error) {
	body, encoding, err := readSent(acc, r, limit)
	if encoding == "" || err != nil {
		return body, err
	}
	defer acc.Put(&body)
	return decompress(r.Context(), acc, encoding, body.B, limit+1, limit, patience)
}

// readSent is readBody for a body as it was sent. encoding is gzip, zstd, or empty.
func readSent(acc *budget.Account, r *http.Request, limit int) (body *budget.Buffer, encoding string, err error) {
	if r.ContentLength > int64(limit) {
		return nil, "", errBodyTooLarge
	}
	switch encoding = strings.ToLower(r.Header.Get("Content-Encoding")); encoding {
	case "identity":
		encoding = ""
	case "", "gzip", "zstd":
	default:
		return nil, "", errEncoding
	}
	body, err = readAll(r.Context(), acc, r.Body, int(r.ContentLength), limit)
	return body, encoding, err
}

// decompress is readBody for a body that has been read. What is beyond most bytes is left away.
func decompress(ctx context.Context, acc *budget.Account, encoding string, sent []byte, most, limit int, patience time.Duration) (*budget.Buffer, error) {
	waiting, cancel := context.WithTimeoutCause(ctx, patience, errTimeUp)
	defer cancel()
	select {
	case d := <-decompressors:
		defer func() { decompressors <- d }()
		src, err := d.open(encoding, sent)
		if err != nil {
			return nil, badStream(err)
		}
		return readAll(ctx, acc, io.LimitReader(src, int64(most)), min(4*len(sent), limit), limit)
	case <-waiting.Done():
		return nil, context.Cause(waiting)
	}
}

// readAll reads src to its end. hint is its length, or -1; limit is the most it may have. A full buffer is replaced by a bigger
// one.
func readAll(ctx context.Context, acc *budget.Account, src io.Reader, hint, limit int) (*budget.Buffer, error) {
	if hint < 0 {
		hint = firstRead
	}
	var body *budget.Buffer
	err := acc.Move(&body, min(hint, firstClaim)+1, false) // one byte more than expected: the end is seen without growing again
	for err == nil {
		var n int
		n, err = src.Read(body.B[len(body.B):cap(body.B)])
		body.B = body.B[:len(body.B)+n]
		switch {
		case len(body.B) > limit:
			err = errBodyTooLarge
		case err == io.EOF:
			return body, nil
		case errors.Is(err, os.ErrDeadlineExceeded): // the client may still be there, although the context is canceled
			err = errTimeUp
		case ctx.Err() != nil: // the client is gone
			err = ctx.Err()
		case err != nil:
			err = badStream(err)
		case len(body.B) == cap(body.B):
			err = acc.Move(&body, min(2*cap(body.B), limit+1), false)
		}
	}
	acc.Put(&body)
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

// recordTooLarge is an event that can never be on the topic.
type recordTooLarge struct{ size, most int } // bytes

func (e recordTooLarge) Error() string {
	return fmt.Sprintf("the event takes %d bytes on Kafka, whose topic takes at most %d (max.message.bytes)", e.size, e.most)
}

// mediaType returns typeJSON, typeNDJSON, typeText or "" for a Content-Type that is none of them. An absent one means JSON. Text
// is what a page may send to another origin, or as its last beacon, without asking.
func mediaType(r *http.Request) string {
	media, _, _ := strings.Cut(r.Header.Get("Content-Type"), ";")
	switch media = strings.ToLower(strings.TrimSpace(media)); media {
	case "":
		return typeJSON
	case typeJSON, typeNDJSON, typeText:
		return media
	}
	return ""
}

// takes returns the media type of a request, which has to be one of these or text; otherwise it answers 415 and returns "".
func takes(w http.ResponseWriter, r *http.Request, forms ...string) string {
	media := mediaType(r)
	if media == typeText || slices.Contains(forms, media) {
		return media
	}
	writeError(w, http.StatusUnsupportedMediaType, "unsupported content type", "send "+strings.Join(forms, " or "))
	return ""
}

// wantsStored says whether to answer only once the events are stored, ?wait=stored; ok is false when it has answered another
// value.
func wantsStored(w http.ResponseWriter, r *http.Request) (wait, ok bool) {
	value, is := queryValue(r.URL.RawQuery, "wait")
	if is && value != "stored" {
		writeProblems(w, []problem{{"wait", codeInvalidFormat, "wait must be stored, or absent"}})
	}
	return is, !is || value == "stored"
}

// writeReadError answers a request whose body could not be read.
func writeReadError(w http.ResponseWriter, err error) {
	switch {
	case errors.Is(err, errBodyTooLarge):
		// There may be more of the body than was read: the connection ends with this answer.
		w.Header().Set("Connection", "close")
		writeError(w, http.StatusRequestEntityTooLarge, "request body too large",
			"the limit is 64 KiB for one event, 8 MiB for a bulk, after decompression")
	case errors.As(err, new(recordTooLarge)):
		writeError(w, http.StatusRequestEntityTooLarge, "event too large", err.Error())
	case errors.Is(err, budget.ErrShare):
		w.Header().Set("Retry-After", retryAfterSeconds)
		writeError(w, http.StatusTooManyRequests, "too many requests", err.Error())
	case errors.Is(err, budget.ErrFull), errors.Is(err, errTimeUp):
		writeUnavailable(w, err.Error())
	case errors.Is(err, context.Canceled): // the client is gone: nobody is left to tell
	case errors.Is(err, errEncoding):
		writeError(w, http.StatusUnsupportedMediaType, "unsupported content encoding", err.Error())
	default: // it could not be read, is not JSON, or not in the form of a bulk
		writeError(w, http.StatusBadRequest, "invalid request body", err.Error())
	}
}
