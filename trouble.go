// What is failing at the moment: since when, why, and what the log has said about it.
//
// trouble.go owns the words for it. Whoever retries until something works notes each failure here instead of logging it: the
// log gets a cause at once and then once a minute, /ready shows it as long as it lasts.

package main

import (
	"log/slog"
	"strings"
	"sync"
	"time"
)

const (
	// tellAgain is how often the log repeats a cause that stays the same.
	tellAgain = time.Minute
	// maxTold bounds the remembered causes, each at most maxErrorMessage bytes; beyond it all are forgotten and logged anew.
	maxTold = 200
)

// troubles are what does not work now in one running system. Anybody may call its methods at any time; each costs a lock and a
// map look-up, so call them on a failure and at the end of a try.
type troubles struct {
	mu     sync.Mutex // guards what follows
	open   map[string]trouble
	worked map[string]struct{} // what has worked at least once
	told   map[string]telling  // by what fails and its cause without digits: ports, sizes and counts change from try to try
}

// trouble is one thing that does not work.
type trouble struct {
	what, cause string
	since       time.Time
	told        bool // has been logged since it began
}

type telling struct {
	at    time.Time
	times int // how often it has happened since
}

func newTroubles() *troubles {
	return &troubles{open: map[string]trouble{}, worked: map[string]struct{}{}, told: map[string]telling{}}
}

// note says that what ("insert", "create topics") has failed, once more or for the first time, and will be tried again.
func (t *troubles) note(what string, err error) {
	cause, now := firstLine(err.Error()), time.Now()
	cause = cause[:min(len(cause), maxErrorMessage)]
	t.mu.Lock()
	defer t.mu.Unlock()
	tr := t.open[what]
	if tr.since.IsZero() {
		tr.since = now
	}
	tr.what, tr.cause = what, cause
	key := what + ": " + strings.Map(func(r rune) rune {
		if r >= '0' && r <= '9' {
			return -1
		}
		return r
	}, cause)
	seen, known := t.told[key]
	seen.times++
	if !known || now.Sub(seen.at) >= tellAgain {
		slog.Warn("fails, and is tried again", "what", what, "error", cause, "times", seen.times, "for", now.Sub(tr.since).Round(time.Millisecond))
		seen, tr.told = telling{at: now}, true
	}
	if len(t.told) >= maxTold {
		clear(t.told)
	}
	t.told[key], t.open[what] = seen, tr
}

// clear says that what works.
func (t *troubles) clear(what string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.worked[what] = struct{}{}
	if tr, failing := t.open[what]; failing {
		delete(t.open, what)
		if tr.told {
			slog.Info("works again", "what", what, "after", time.Since(tr.since).Round(time.Millisecond))
		}
	}
}

// hasWorked says whether what was ever cleared.
func (t *troubles) hasWorked(what string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	_, worked := t.worked[what]
	return worked
}

// oldest is what has failed for the longest time, as "what: cause"; empty when everything works.
func (t *troubles) oldest() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	var first trouble
	for _, tr := range t.open {
		if first.what == "" || tr.since.Before(first.since) {
			first = tr
		}
	}
	if first.what == "" {
		return ""
	}
	return first.what + ": " + first.cause
}
