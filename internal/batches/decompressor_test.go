// What a batch may take in memory: by each codec, one that fits, and ones that lie.

package batches

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"errors"
	"io"
	"runtime"
	"testing"

	"github.com/klauspost/compress/s2"
	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
	"github.com/twmb/franz-go/pkg/kgo"
)

// streams compress as other clients do.
var streams = map[kgo.CompressionCodecType]func(io.Writer) io.WriteCloser{
	kgo.CodecGzip: func(w io.Writer) io.WriteCloser { return gzip.NewWriter(w) },
	kgo.CodecLz4:  func(w io.Writer) io.WriteCloser { return lz4.NewWriter(w) },
	kgo.CodecZstd: func(w io.Writer) io.WriteCloser { z, _ := zstd.NewWriter(w); return z },
	kgo.CodecSnappy: func(w io.Writer) io.WriteCloser { // as Java frames it
		w.Write([]byte("\x82SNAPPY\x00\x00\x00\x00\x01\x00\x00\x00\x01"))
		return &xerial{w: w}
	},
}

type xerial struct{ w io.Writer }

func (x *xerial) Write(b []byte) (int, error) {
	block := s2.EncodeSnappy(nil, b)
	x.w.Write(binary.BigEndian.AppendUint32(nil, uint32(len(block))))
	return x.w.Write(block)
}

func (x *xerial) Close() error { return nil }

// compressed is a text of so many bytes, compressed.
func compressed(codec kgo.CompressionCodecType, text []byte, size int) []byte {
	var b bytes.Buffer
	w := streams[codec](&b)
	for size > 0 {
		n := min(size, len(text))
		w.Write(text[:n])
		size -= n
	}
	w.Close()
	return b.Bytes()
}

// bigRecords are records of 64 KiB, and tinyRecords of as few bytes as there can be.
func bigRecords() []byte {
	return append(binary.AppendVarint(nil, 64<<10-3), make([]byte, 64<<10-3)...)
}
func tinyRecords() []byte { return bytes.Repeat([]byte{12, 0, 0, 0, 1, 1, 0}, 10_000) }

// TestBombs: nothing that a batch claims, or is, takes more than a consumer has, whatever the codec; what takes less is whole.
func TestBombs(t *testing.T) {
	const consumer = 64 << 20
	d, err := NewDecompressor(consumer)
	if err != nil {
		t.Fatal(err)
	}
	if Memory(consumer) != 16<<20 || Memory(1<<20) != 8<<20 {
		t.Fatal(Memory(consumer), Memory(1<<20))
	}
	type batch struct {
		name  string
		codec kgo.CompressionCodecType
		src   []byte
		size  int // of what comes out, 0 when it is refused
	}
	var cases []batch
	for codec := range streams {
		for name, c := range map[string]struct {
			text        []byte
			size, comes int
		}{
			"usual": {bigRecords(), 1 << 20, 1 << 20}, "large": {bigRecords(), 15 << 20, 15 << 20}, "too large": {bigRecords(), 17 << 20, 0},
			"bomb": {make([]byte, 1<<20), 200 << 20, 0}, "many records": {tinyRecords(), 700_000, 0}, "some records": {tinyRecords(), 490_000, 490_000},
		} {
			cases = append(cases, batch{name, codec, compressed(codec, c.text, c.size), c.comes})
		}
		cut := compressed(codec, []byte("text that is not much shorter, 0123456789"), 1000)
		cases = append(cases, batch{"cut off", codec, cut[:len(cut)-9], 0}, batch{"junk", codec, []byte("\x01\x02\x03\x04 no such thing at all"), 0})
	}
	cases = append(cases,
		batch{"claim", kgo.CodecSnappy, append(binary.AppendUvarint(nil, 1<<31-1), 0, 'x'), 0},
		batch{"claim", kgo.CodecZstd, append(binary.LittleEndian.AppendUint64([]byte("\x28\xb5\x2f\xfd\xe0"), 1<<40), 1, 0, 0), 0},
		batch{"window", kgo.CodecZstd, []byte("\x28\xb5\x2f\xfd\x00\xf8\x09\x00\x00x"), 0}, // 2 TB
		batch{"no codec", 7, []byte("x"), 0},
	)
	for _, c := range cases {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		out, err := d.Decompress(c.src, c.codec)
		runtime.ReadMemStats(&after)
		if len(out) != c.size || (err == nil) != (c.size > 0) || err != nil && !errors.Is(err, kgo.ErrMaxDecompress) {
			t.Errorf("%s by codec %d: %d bytes of %d, %v", c.name, c.codec, len(out), c.size, err)
		}
		// All that was allocated in the course of it, not at once.
		if took := int64(after.TotalAlloc - before.TotalAlloc); took > 2*consumer {
			t.Errorf("%s by codec %d: took %d MB", c.name, c.codec, took>>20)
		}
	}
}

// TestBusy: a large batch asks whether there is room, and a usual one does not.
func TestBusy(t *testing.T) {
	d, err := NewDecompressor(64 << 20)
	if err != nil {
		t.Fatal(err)
	}
	full := errors.New("no room")
	for size, want := range map[int]error{1 << 20: nil, 9 << 20: full} {
		if _, err := d.Within(compressed(kgo.CodecZstd, bigRecords(), size), kgo.CodecZstd, func() error { return full }); err != want {
			t.Errorf("%d bytes: %v, want %v", size, err, want)
		}
	}
}
