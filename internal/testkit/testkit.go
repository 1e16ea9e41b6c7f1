// Package testkit has what the tests beside the program and those of the whole system have in common.
package testkit

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"github.com/klauspost/compress/zstd"
	"github.com/twmb/franz-go/pkg/kgo"
)

// Document is what the tests need of openapi.json.
type Document struct {
	Paths map[string]map[string]struct {
		Responses map[string]any
	}
}

// QueryAt asks ClickHouse at a port of this machine over HTTP.
func QueryAt(t testing.TB, port, sql string) string {
	t.Helper()
	client := http.Client{Timeout: 10 * time.Minute} // a test may have left ClickHouse paused
	resp, err := client.Post("http://127.0.0.1:"+port, "text/plain", strings.NewReader(sql))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, _ := io.ReadAll(resp.Body)
	if resp.StatusCode != http.StatusOK {
		t.Fatalf("%s: %s", sql, b)
	}
	return strings.TrimSpace(string(b))
}

// ReadTopic returns the records of a topic once there are n.
func ReadTopic(t testing.TB, brokers []string, topic string, n int) (records []*kgo.Record) {
	t.Helper()
	kafka, err := kgo.NewClient(kgo.SeedBrokers(brokers...), kgo.ConsumeTopics(topic))
	if err != nil {
		t.Fatal(err)
	}
	defer kafka.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute) // ample: another test may have the machine
	defer cancel()
	for len(records) < n {
		fetches := kafka.PollFetches(ctx)
		if ctx.Err() != nil {
			t.Fatalf("%d records on %s, want %d", len(records), topic, n)
		}
		records = append(records, fetches.Records()...)
	}
	return records
}

// FreshEvent is an event of now, of a user of its own.
func FreshEvent(name string) []byte {
	return fmt.Appendf(nil, `{"event_name":%q,"user_id":"u%d","timestamp":%d}`, name, time.Now().UnixNano(), time.Now().Unix())
}

// Gzipped is b, compressed.
func Gzipped(b []byte) []byte {
	var out bytes.Buffer
	z := gzip.NewWriter(&out)
	z.Write(b)
	z.Close()
	return out.Bytes()
}

// Zstded is b, compressed.
func Zstded(b []byte) []byte {
	z, _ := zstd.NewWriter(nil)
	return z.EncodeAll(b, nil)
}

// TortureFactor is TORTURE from the environment: how many times more often `make torture` kills.
func TortureFactor() int {
	n, _ := strconv.Atoi(os.Getenv("TORTURE"))
	return max(n, 1)
}

// MoreInTorture is how often make test does a thing that takes seconds, and make torture many times of.
func MoreInTorture(usual, factored int) int {
	if n := TortureFactor(); n > 1 {
		return n * factored
	}
	return usual
}

// TotalOf adds up.
func TotalOf(ns []int64) (total int64) {
	for _, n := range ns {
		total += n
	}
	return total
}

// ReadDocument reads openapi.json, and returns its text, too.
func ReadDocument(t testing.TB, path string) (doc Document, text string) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(b, &doc); err != nil {
		t.Fatal(err)
	}
	return doc, string(b)
}

// ThreadTime is the CPU time that this thread has used.
func ThreadTime() time.Duration {
	const clockThreadCPU = 3 // to the nanosecond; getrusage counts in ticks
	var t syscall.Timespec
	syscall.RawSyscall(syscall.SYS_CLOCK_GETTIME, clockThreadCPU, uintptr(unsafe.Pointer(&t)), 0)
	return time.Duration(t.Nano())
}

// LeastThreadTime is the CPU time of a call, as seldom as other processes disturb one.
func LeastThreadTime(call func()) time.Duration {
	best := time.Hour
	for range 10 {
		const times = 20
		started := ThreadTime()
		for range times {
			call()
		}
		best = min(best, (ThreadTime()-started)/times)
	}
	return best
}

// Here is the CPU time that takes as long here and now as d on an idle core without the race detector, or d when that is longer. The
// thread has to be locked.
func Here(d time.Duration) time.Duration {
	const idle = 15 * time.Microsecond
	encoded := strings.Repeat("%41", 4<<10)
	return max(d, d*LeastThreadTime(func() { url.QueryUnescape(encoded) })/idle)
}
