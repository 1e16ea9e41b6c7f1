// What the log is told of something that goes on failing.

package troubles

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ClickHouse/ch-go"
	"github.com/ClickHouse/ch-go/proto"
	"github.com/twmb/franz-go/pkg/kerr"
)

func TestTroubles(t *testing.T) {
	synctest.Test(t, func(t *testing.T) { // time passes when everybody sleeps
		var log bytes.Buffer
		was := slog.Default()
		slog.SetDefault(slog.New(slog.NewTextHandler(&log, nil)))
		defer slog.SetDefault(was)
		lines := func() int {
			n := strings.Count(log.String(), "\n")
			log.Reset()
			return n
		}
		tr := New()
		if got := tr.Oldest().String(); got != "" {
			t.Errorf("at first: %q", got)
		}
		for i := range 1200 { // two minutes
			tr.Note("insert", fmt.Errorf("port %d: no space\nstack", i))
			time.Sleep(100 * time.Millisecond)
		}
		if n := lines(); n != 2 {
			t.Errorf("%d lines in two minutes, want 2", n)
		}
		tr.Note("insert", errors.New("too many parts"))
		tr.Note("look up", errors.New("away"))
		if n := lines(); n != 2 {
			t.Errorf("%d lines for two other causes", n)
		}
		if got := tr.Oldest().String(); got != "insert: too many parts" {
			t.Error(got)
		}
		tr.Clear("insert")
		tr.Clear("insert")
		if got := tr.Oldest().String(); got != "look up: away" {
			t.Error(got)
		}
		if n := lines(); n != 1 {
			t.Errorf("%d lines for what works again", n)
		}
		for range 100 { // comes and goes: neither is told again so soon
			tr.Note("insert", errors.New("too many parts"))
			tr.Clear("insert")
		}
		if n := lines(); n != 0 {
			t.Errorf("%d lines for what comes and goes", n)
		}
		tr.Note("look up", errors.New("gone"))
		lines()
		for i := range 3 * maxTold {
			tr.Note("insert", errors.New(strings.Repeat("x", i)))
			if i%(maxTold/2) == 0 {
				time.Sleep(tellAgain)
				tr.Note("look up", errors.New("gone"))
			}
		}
		if len(tr.told) > maxTold {
			t.Errorf("%d causes are remembered", len(tr.told))
		}
		lines()
		if tr.Note("look up", errors.New("gone")); lines() != 0 {
			t.Error("an old cause was forgotten over new ones")
		}
		for i := range 3 * maxTold { // rows that ClickHouse refuses, each with another text
			tr.Note("insert rows", fmt.Errorf("insert: %w", &ch.Exception{Code: proto.ErrViolatedConstraint, Name: "DB::Exception", Message: "user" + strings.Repeat("y", i)}))
			tr.Note("read", fmt.Errorf("%s: %w", strings.Repeat("z", i), kerr.NotLeaderForPartition))
		}
		if n := lines(); n != 2 {
			t.Errorf("%d lines for two codes", n)
		}
	})
}

// TestUntil: what fails is tried again after longer and longer pauses, and no more once ctx is done.
func TestUntil(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, began, tries := New(), time.Now(), 0
		err := s.Until(t.Context(), "answer", func() error {
			if tries++; tries < 10 {
				return errors.New("away")
			}
			return nil
		})
		// Nine pauses, 21.3 s together, each less a random half.
		if took := time.Since(began); err != nil || tries != 10 || took < 10*time.Second || took > 22*time.Second || !s.HasWorked("answer") || s.Oldest().What != "" {
			t.Errorf("%v after %d tries in %s, and then %q", err, tries, took, s.Oldest())
		}
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
		defer cancel()
		if err := s.Until(ctx, "never", func() error { return errors.New("away") }); err != context.DeadlineExceeded || s.Oldest().String() != "never: away" {
			t.Errorf("%v, %q", err, s.Oldest())
		}
	})
}
