// Package troubles knows what does not work at the moment, in a word and its cause, and repeats what has failed.
//
// Whoever retries until something works notes each failure here instead of logging it: the log gets a cause at once and then
// once a minute, and Oldest has it as long as it lasts. The package owns the pause between two tries, too.
package troubles

import (
	"context"
	"log/slog"
	"math/rand/v2"
	"strings"
	"sync"
	"time"
)

const (
	// tellAgain is how often the log repeats a cause that stays the same.
	tellAgain = time.Minute
	// maxTold bounds the remembered causes; beyond it all are forgotten and logged anew.
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
	told map[string]telling // by what fails and its cause without digits: ports, sizes and counts change from try to try
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
	key := what + ": " + strings.Map(func(r rune) rune {
		if r >= '0' && r <= '9' {
			return -1
		}
		return r
	}, cause)
	seen, known := s.told[key]
	seen.times++
	if !known || now.Sub(seen.at) >= tellAgain {
		slog.Warn("fails, and is tried again", "what", what, "error", cause, "times", seen.times, "for", now.Sub(tr.since).Round(time.Millisecond))
		seen, tr.told = telling{at: now}, true
	}
	if len(s.told) >= maxTold {
		clear(s.told)
	}
	s.told[key], s.open[what] = seen, tr
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

// Oldest is what has failed for the longest time, as "what: cause"; empty when everything works.
func (s *Set) Oldest() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	text, since := "", time.Time{}
	for what, tr := range s.open {
		if text == "" || tr.since.Before(since) {
			text, since = what+": "+tr.cause, tr.since
		}
	}
	return text
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
