// Read your write: an answer that comes when the events can be queried.
//
// stored.go owns the one wake-up that all who wait share. The watermark says how far everything is stored, and whoever waits
// compares that with the moment of its own acknowledgement: nobody asks Kafka or ClickHouse for it.

package main

import (
	"context"
	"net/http"
	"sync"
	"time"
)

// storedTimeout is how long an answer waits for ?wait=stored.
const storedTimeout = 5 * time.Second

// storedSignal is how far everything is stored, to the nanosecond where complete_through has seconds. The zero one says
// nothing yet.
type storedSignal struct {
	mu      sync.Mutex    // guards what follows
	through time.Time     // what was acknowledged before that is stored
	moved   chan struct{} // closed when through moves or nobody is to wait any more; nil while nobody waits
	ended   bool
}

// advance wakes whoever waits.
func (s *storedSignal) advance(through time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.through = through
	s.wake()
}

// age is how old the moment is up to which everything is stored; 0 while unknown.
func (s *storedSignal) age() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.through.IsZero() {
		return 0
	}
	return time.Since(s.through)
}

// end lets nobody wait any more: a stop does not take longer for them.
func (s *storedSignal) end() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ended = true
	s.wake()
}

// wake is called under mu.
func (s *storedSignal) wake() {
	if s.moved != nil {
		close(s.moved)
		s.moved = nil
	}
}

// wait returns true when what was acknowledged by then is stored, false when ctx is done or the program stops before.
func (s *storedSignal) wait(ctx context.Context, then time.Time) bool {
	for {
		s.mu.Lock()
		stored, ended := s.through.After(then), s.ended
		if s.moved == nil && !stored {
			s.moved = make(chan struct{})
		}
		moved := s.moved
		s.mu.Unlock()
		if stored || ended {
			return stored
		}
		select {
		case <-moved:
		case <-ctx.Done():
			return false
		}
	}
}

// wantsStored says whether the answer is to come when the events are stored, ?wait=stored.
func wantsStored(r *http.Request) (bool, []problem) {
	switch value, is := queryValue(r.URL.RawQuery, "wait"); {
	case !is:
		return false, nil
	case value == "stored":
		return true, nil
	}
	return false, []problem{{"wait", codeInvalidFormat, "wait must be stored, or absent"}}
}

// awaitStored waits until the request's events, all of them acknowledged, are stored, and returns false when that takes too
// long. A request that waits has given its body and its records' bytes back. What it keeps still counts as in flight, which
// bounds how many can wait.
func (in *ingester) awaitStored(w http.ResponseWriter, r *http.Request, q *ingestRequest) bool {
	now := time.Now()
	q.account.put(q.body)
	q.account.put(q.arena)
	q.body, q.arena = nil, nil
	until := now.Add(storedTimeout)
	if x, ok := w.(*exchange); ok { // the answer has to be written before SERVER_WRITE_TIMEOUT
		if last := x.started.Add(in.writeTimeout - in.writeTimeout/8); last.Before(until) {
			until = last
		}
	}
	ctx, cancel := context.WithDeadline(r.Context(), until)
	defer cancel()
	return in.stored.wait(ctx, now)
}
