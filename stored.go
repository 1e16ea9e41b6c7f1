// Read your write: an answer that comes when the events can be queried.
//
// stored.go owns the one wake-up that all waiting requests share. Each compares the moment of its own acknowledgement with the
// watermark, up to which everything is stored: waiting asks nothing of Kafka or ClickHouse.

package main

import (
	"context"
	"net/http"
	"sync"
	"time"
)

// storedTimeout is how long an answer waits for ?wait=stored.
const storedTimeout = 5 * time.Second

// storedSignal says how far everything is stored, to the nanosecond where complete_through has seconds. The zero value knows
// nothing yet.
type storedSignal struct {
	mu      sync.Mutex    // guards what follows
	through time.Time     // everything acknowledged before it is stored
	moved   chan struct{} // closed when through moves or waiting ends; nil while nobody waits
	ended   bool
}

// advance wakes whoever waits.
func (s *storedSignal) advance(through time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.through = through
	s.wake()
}

// age is how long ago through was; 0 while unknown.
func (s *storedSignal) age() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.through.IsZero() {
		return 0
	}
	return time.Since(s.through)
}

// end ends all waiting, so that a stop does not take longer for it.
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

// wait returns true once what was acknowledged by then is stored, false when ctx is done or the program stops first.
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

// wantsStored says whether to answer only once the events are stored, ?wait=stored.
func wantsStored(r *http.Request) (bool, []problem) {
	switch value, is := queryValue(r.URL.RawQuery, "wait"); {
	case !is:
		return false, nil
	case value == "stored":
		return true, nil
	}
	return false, []problem{{"wait", codeInvalidFormat, "wait must be stored, or absent"}}
}

// awaitStored waits until the request's events, all acknowledged, are stored; false when that takes too long. It first gives
// back the body and the records' bytes. What the request keeps still counts as in flight, which bounds how many can wait.
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
