// Package troubles knows what does not work at the moment, in a word and its cause, and repeats what has failed.
//
// Whoever retries until something works notes each failure here instead of logging it: the log gets a cause at once and then
// once a minute, and Oldest has it as long as it lasts. The package owns the pause between two tries, too.
package troubles

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/ClickHouse/ch-go"
	"github.com/twmb/franz-go/pkg/kerr"
)

const (
	// tellAgain is how often the log repeats a cause that stays the same.
	tellAgain = time.Minute
	// maxTold bounds the remembered causes; beyond it the one that was told the longest time ago is forgotten.
	maxTold = 200
	// maxCause bounds a cause, in bytes.
	maxCause = 500
	// minPause is the pause after the first failure; each further one is twice as long, up to maxPause.
	minPause = 100 * time.Millisecond
	maxPause = 5 * time.Second
)

// Set is what does not work now in one running system. Anybody may call its methods at any time; each costs a lock and a map
// look-up, so call them on a failure and at the end of a try.
type Set struct {
	mu   sync.Mutex         // guards what follows
	open map[string]trouble // by what fails
	ever map[string]bool    // what has worked at least once
	told map[string]telling // by what fails and the code of its cause
}

// trouble is one thing that does not work.
type trouble struct {
	cause string
	since time.Time
	told  bool // has been logged since it began
}

type telling struct {
	at    time.Time
	times int // how often it has happened since
}

// New returns a set in which everything works.
func New() *Set {
	return &Set{open: map[string]trouble{}, ever: map[string]bool{}, told: map[string]telling{}}
}

// Note says that what ("insert", "create topics") has failed, once more or for the first time, and will be tried again; without
// an error, that it works. Of the error, the first line is kept.
func (s *Set) Note(what string, err error) {
	if err == nil {
		s.Clear(what)
		return
	}
	cause, _, _ := strings.Cut(err.Error(), "\n")
	cause = cause[:min(len(cause), maxCause)]
	now := time.Now()
	s.mu.Lock()
	defer s.mu.Unlock()
	tr, failing := s.open[what]
	if !failing {
		tr = trouble{since: now}
	}
	tr.cause = cause
	key := what + ": " + codeOf(err, cause)
	seen, known := s.told[key]
	seen.times++
	if !known || now.Sub(seen.at) >= tellAgain {
		slog.Warn("fails, and is tried again", "what", what, "error", cause, "times", seen.times, "for", now.Sub(tr.since).Round(time.Millisecond))
		seen, tr.told = telling{at: now}, true
	}
	if len(s.told) >= maxTold && !known {
		delete(s.told, s.leastTold())
	}
	s.told[key], s.open[what] = seen, tr
}

// leastTold is the key of what was told the longest time ago, under the lock.
func (s *Set) leastTold() (least string) {
	for key, seen := range s.told {
		if least == "" || seen.at.Before(s.told[least].at) {
			least = key
		}
	}
	return least
}

// codeOf is what an error is, whatever its text says of a row: ClickHouse's code, Kafka's, or the system's. An error without one is
// its text without digits: ports, sizes and counts change from try to try.
func codeOf(err error, text string) string {
	if e, ok := ch.AsException(err); ok {
		return e.Code.String()
	}
	if e := new(kerr.Error); errors.As(err, &e) {
		return e.Message
	}
	if e := syscall.Errno(0); errors.As(err, &e) {
		return e.Error()
	}
	return strings.Map(func(r rune) rune {
		if r >= '0' && r <= '9' {
			return -1
		}
		return r
	}, text)
}

// Clear says that what works.
func (s *Set) Clear(what string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ever[what] = true
	if tr := s.open[what]; tr.told {
		slog.Info("works again", "what", what, "after", time.Since(tr.since).Round(time.Millisecond))
	}
	delete(s.open, what)
}

// HasWorked says whether what was ever cleared.
func (s *Set) HasWorked(what string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.ever[what]
}

// Trouble is what fails, why, and since when. The zero value is none.
type Trouble struct {
	What, Cause string
	Since       time.Time
}

// String is "what: cause", empty for none.
func (t Trouble) String() string {
	if t.What == "" {
		return ""
	}
	return t.What + ": " + t.Cause
}

// Brief is String without the cause, for those who may not know it.
func (t Trouble) Brief() string {
	if t.What == "" {
		return ""
	}
	return t.What + " fails since " + t.Since.UTC().Format(time.RFC3339)
}

// Oldest is what has failed for the longest time.
func (s *Set) Oldest() (oldest Trouble) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for what, tr := range s.open {
		if oldest.What == "" || tr.since.Before(oldest.Since) {
			oldest = Trouble{what, tr.cause, tr.since}
		}
	}
	return oldest
}

// Until repeats try until it succeeds, and notes each failure. The pause between two tries begins at 100 ms and doubles up to
// 5 s, less a random half, so that instances that fail together do not try together. The error is ctx's.
func (s *Set) Until(ctx context.Context, what string, try func() error) error {
	for pause := minPause; ; pause = min(2*pause, maxPause) {
		err := try()
		if err == nil {
			s.Clear(what)
			return nil
		}
		if ctx.Err() == nil {
			s.Note(what, err)
		}
		if err := Sleep(ctx, pause/2+rand.N(pause/2)); err != nil {
			return err
		}
	}
}

// Sleep is done after d, or with the error of ctx before that.
func Sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
