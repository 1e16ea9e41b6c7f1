// The latency histogram of load.

package load

import (
	"math"
	"time"
)

// histogram counts durations in buckets 1 % apart, from a microsecond to an hour, in fixed memory.
type histogram struct {
	n       int64
	longest time.Duration
	buckets [histogramBuckets]int64
}

const histogramBuckets = 2300 // 1.01^2300 µs is more than an hour

func newHistogram() *histogram { return new(histogram) }

func (h *histogram) add(d time.Duration) {
	i := int(math.Log(max(1, float64(d)/1000)) / math.Log(1.01))
	h.buckets[min(i, histogramBuckets-1)]++
	h.n++
	h.longest = max(h.longest, d)
}

// quantile returns the upper end of the bucket that holds the share q, 0 when nothing was added.
func (h *histogram) quantile(q float64) time.Duration {
	if q >= 1 {
		return h.longest
	}
	left := int64(math.Ceil(q * float64(h.n)))
	for i, n := range h.buckets {
		if left -= n; left <= 0 && n > 0 {
			return min(h.longest, time.Duration(math.Pow(1.01, float64(i+1))*1000))
		}
	}
	return 0
}
