// The open loop of load: when each request is due, however long the ones before it take, and the senders that keep to it.
//
// pacer.go owns the schedule, in which a request's place is fixed at the start: a slow answer makes later requests late
// but never moves when they were due, so latency counted from there has the stall in it. It owns the requests under
// way, too, and hands their answers on to load.go.

package load

import (
	"bytes"
	"context"
	"errors"
	"net"
	"net/url"
	"sync/atomic"
	"time"

	"github.com/klauspost/compress/gzip"
)

// pacer hands out due times to any number of senders. Fields are set before the first claim.
type pacer struct {
	start    time.Time
	interval float64       // ns between requests; 0 = whenever a sender is free
	end      time.Duration // after start; 0 = the source ends the run
	next     atomic.Int64  // place in the schedule of the next claim
}

func newPacer(start time.Time, eventsPerSecond float64, eventsPerRequest int, end time.Duration) *pacer {
	p := &pacer{start: start, end: end}
	if eventsPerSecond > 0 {
		p.interval = float64(eventsPerRequest) / eventsPerSecond * float64(time.Second)
	}
	return p
}

// claim returns when the caller's next request is due: maybe later (sleep until then), maybe long ago (send at once).
// false at the end. What was due but unclaimed at the end stays unsent: see unclaimed.
func (p *pacer) claim(now time.Time) (due time.Time, ok bool) {
	if p.end > 0 && now.Sub(p.start) >= p.end {
		return now, false
	}
	if p.interval == 0 {
		return now, true
	}
	after := time.Duration(float64(p.next.Add(1)-1) * p.interval)
	if p.end > 0 && after >= p.end {
		p.next.Add(-1) // this place is not on the schedule, so it was not claimed
		return now, false
	}
	return p.start.Add(after), true
}

// unclaimed returns how many requests were due by now, or by the end, and had no sender free to take them.
func (p *pacer) unclaimed(now time.Time) int64 {
	if p.interval == 0 {
		return 0
	}
	passed := now.Sub(p.start)
	if p.end > 0 {
		passed = min(passed, p.end)
	}
	due := int64(float64(passed) / p.interval)
	return max(0, due-p.next.Load())
}

// sleepUntil returns at t, at once when t has passed; false when ctx is done.
func sleepUntil(ctx context.Context, t time.Time) bool {
	if d := time.Until(t); d > 0 {
		timer := time.NewTimer(d)
		defer timer.Stop()
		select {
		case <-timer.C:
		case <-ctx.Done():
			return false
		}
	}
	return ctx.Err() == nil
}

// sender is one connection's request; its buffers are used again for the next one.
type sender struct {
	l       *Loader
	body    []byte
	ends    []int // where each event ends in body; ends[0] is where the first begins
	tickets []int64
	packed  bytes.Buffer
	zip     *gzip.Writer
}

// run sends until sending is done. interrupted, done or not, only cuts short the waits between tries: a run that came
// to its end still sees its last requests through.
func (s *sender) run(sending, interrupted context.Context) {
	l := s.l
	for {
		due, ok := l.pace.claim(time.Now())
		if !ok || !sleepUntil(sending, due) {
			return
		}
		more := s.fill()
		if !more {
			l.Stop() // the others wait for times at which there will be nothing to send
		}
		if len(s.tickets) == 0 {
			return
		}
		l.sent.Add(int64(len(s.tickets)))
		if s.post(interrupted) {
			l.mu.Lock()
			l.latency.add(time.Since(due))
			l.timeline.latency.add(time.Since(due))
			l.mu.Unlock()
		}
		if !more {
			return
		}
	}
}

// fill makes the body of one request; false when the source has no more. A file's long lines make a request of fewer
// events than -bulk, because a body over the server's limit would refuse all of them.
func (s *sender) fill() (more bool) {
	cfg := s.l.Config
	s.l.srcMu.Lock()
	defer s.l.srcMu.Unlock()
	s.body, s.tickets, s.ends, more = s.body[:0], s.tickets[:0], s.ends[:0], true
	separator := byte('\n')
	if cfg.bulk > 1 && cfg.file == "" {
		s.body, separator = append(s.body, bulkOpen...), ','
	}
	s.ends = append(s.ends, len(s.body))
	for more && len(s.tickets) < cfg.bulk && len(s.body) < maxBulkBytes-2*maxEventBytes {
		before := len(s.tickets)
		s.body, s.tickets, more = s.l.src.append(s.body, s.tickets, separator)
		if len(s.tickets) > before {
			s.ends = append(s.ends, len(s.body))
		}
	}
	s.close()
	return more
}

const bulkOpen, bulkClose = `{"events":[`, `]}`

// close ends the envelope, if the body has one.
func (s *sender) close() {
	if s.ends[0] > 0 {
		s.body = append(s.body, bulkClose...)
	}
}

// keep drops every event but those with the given indices, ascending, from the request.
func (s *sender) keep(indices []int) {
	at := s.ends[0]
	separator := byte('\n')
	if at > 0 {
		separator = ','
	}
	for n, i := range indices {
		from := s.ends[i]
		if i > 0 {
			from++ // the separator
		}
		event := s.body[from:s.ends[i+1]]
		if n > 0 {
			s.body[at] = separator
			at++
		}
		at += copy(s.body[at:], event) // never past event's own start
		s.tickets[n], s.ends[n+1] = s.tickets[i], at
	}
	s.body, s.tickets, s.ends = s.body[:at], s.tickets[:len(indices)], s.ends[:len(indices)+1]
	s.close()
}

// post sends the request, and again what of it has no final answer, until all has or -retries is used up. Sending an
// event twice is safe: its id makes it the same event. It returns whether there was an answer in the end.
func (s *sender) post(interrupted context.Context) bool {
	l := s.l
	path, media := "/api/v1/events/bulk", typeJSON
	if l.Config.file != "" {
		media = typeNDJSON
	} else if l.Config.bulk == 1 {
		path = "/api/v1/events"
	}
	for try := 0; ; try++ {
		last := try >= l.Config.retries || interrupted.Err() != nil
		status, answer, wait, err := l.exchange(path, media, s.encoded())
		if err == nil {
			again := l.settle(status, answer, s.tickets, last)
			if len(again) == 0 {
				return true
			}
			s.keep(again)
		} else if last {
			l.Unknown.Add(int64(len(s.tickets)))
			l.mu.Lock()
			l.noAnswer[reason(err)] += len(s.tickets)
			l.mu.Unlock()
			return false
		}
		l.Retried.Add(1)
		sleepUntil(interrupted, time.Now().Add(wait))
	}
}

// reason says why there is no answer, without what differs between connections: a dead server or an unknown certificate is
// then one entry.
func reason(err error) string {
	var op *net.OpError
	var request *url.Error
	switch {
	case errors.As(err, &op):
		err = op.Err
	case errors.As(err, &request):
		err = request.Err
	}
	return err.Error()
}

// encoded returns the body as it goes over the wire, valid until the next call.
func (s *sender) encoded() []byte {
	if !s.l.Config.gzip {
		return s.body
	}
	if s.zip == nil { // a writer is 800 KB: one a sender, not one a request
		s.zip, _ = gzip.NewWriterLevel(nil, gzip.BestSpeed)
	}
	s.packed.Reset()
	s.zip.Reset(&s.packed)
	s.zip.Write(s.body) // a bytes.Buffer does not fail
	s.zip.Close()
	return s.packed.Bytes()
}
