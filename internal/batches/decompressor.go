package batches

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"math"
	"sync"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
	"github.com/twmb/franz-go/pkg/kgo"
)

// Decompressor is a kgo.Decompressor that bounds what a batch takes in memory, whatever the batch claims: nothing is allocated for a
// claim beyond the limit. A batch that takes more, or that cannot be decompressed at all, gets kgo.ErrMaxDecompress: a client would
// fetch it again for ever otherwise.
type Decompressor struct {
	small, large kgo.Decompressor
	limit        int64
	one          sync.Mutex // held while a batch may be large: one at a time
}

const (
	// smallBatch is what is decompressed without asking, in bytes, whatever the memory of a consumer is: this program's own batches have
	// 1 MB, and the usual encoders of zstd claim a window of 8 MiB for the smallest text.
	smallBatch = 8 << 20
	// recordMemory is about what a record takes beside its bytes: kgo.Record and its place in a slice.
	recordMemory = 200
)

// Memory is what one batch may take in bytes, decompressed and as records, of a consumer that has so many: a quarter.
func Memory(consumer int64) int64 { return max(consumer/4, smallBatch) }

// NewDecompressor returns one whose batches take no more than Memory says.
func NewDecompressor(consumer int64) (*Decompressor, error) {
	d := &Decompressor{limit: Memory(consumer)}
	for _, part := range []struct {
		made *kgo.Decompressor
		most int64
	}{{&d.small, smallBatch}, {&d.large, min(d.limit, math.MaxInt32)}} {
		// franz-go bounds only what a client makes for itself. This one asks no broker anything.
		maker, err := kgo.NewClient(kgo.MaxDecompressBatchBytes(int(part.most)))
		if err != nil {
			return nil, fmt.Errorf("set up the decompression of batches: %w", err)
		}
		*part.made = maker.OptValue(kgo.WithDecompressor).(kgo.Decompressor)
		maker.Close()
	}
	return d, nil
}

// Decompress returns what is in src. The bytes are the caller's.
func (d *Decompressor) Decompress(src []byte, codec kgo.CompressionCodecType) ([]byte, error) {
	return d.Within(src, codec, nil)
}

// Within is Decompress for whoever may have no room for a large batch at the moment: the error that busy returns is Within's.
func (d *Decompressor) Within(src []byte, codec kgo.CompressionCodecType, busy func() error) ([]byte, error) {
	batch, err := d.small.Decompress(src, codec) // Fast path.
	if err != nil {                              // it is more than that, perhaps only a window of zstd
		d.one.Lock()
		defer d.one.Unlock()
		if busy != nil {
			if err := busy(); err != nil {
				return nil, err
			}
		}
		batch, err = d.decompressLarge(src, codec)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %w", kgo.ErrMaxDecompress, err)
	}
	left := d.limit - int64(len(batch))
	if left < 0 || countRecords(batch, left/recordMemory) > left/recordMemory {
		return nil, kgo.ErrMaxDecompress
	}
	return batch, nil
}

// decompressLarge reads what is a stream twice: the first time for its size, so that no buffer has to grow.
func (d *Decompressor) decompressLarge(src []byte, codec kgo.CompressionCodecType) ([]byte, error) {
	var open func() (io.ReadCloser, error)
	switch codec {
	case kgo.CodecGzip:
		open = func() (io.ReadCloser, error) { return gzip.NewReader(bytes.NewReader(src)) }
	case kgo.CodecLz4:
		open = func() (io.ReadCloser, error) { return io.NopCloser(lz4.NewReader(bytes.NewReader(src))), nil }
	case kgo.CodecZstd:
		open = func() (io.ReadCloser, error) {
			z, err := zstd.NewReader(bytes.NewReader(src), zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(uint64(d.limit)))
			if err != nil {
				return nil, err
			}
			return z.IOReadCloser(), nil
		}
	default: // snappy says its size
		return d.large.Decompress(src, codec)
	}
	r, err := open()
	if err != nil {
		return nil, err
	}
	size, err := io.Copy(io.Discard, io.LimitReader(r, d.limit+1))
	r.Close()
	if err == nil && size > d.limit {
		err = kgo.ErrMaxDecompress
	}
	if err != nil {
		return nil, err
	}
	if r, err = open(); err != nil {
		return nil, err
	}
	defer r.Close()
	batch := make([]byte, size)
	_, err = io.ReadFull(r, batch)
	return batch, err
}

// countRecords counts the records of a decompressed batch up to one more than most: each begins with its length.
func countRecords(batch []byte, most int64) (n int64) {
	for len(batch) > 0 && n <= most {
		size, read := binary.Varint(batch)
		if read <= 0 || size < 0 || size > int64(len(batch)-read) {
			break // the client finds out
		}
		batch = batch[read+int(size):]
		n++
	}
	return n
}
