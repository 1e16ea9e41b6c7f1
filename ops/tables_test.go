// Ranges of event time, and one command at a time.

package ops

import (
	"context"
	"flag"
	"strings"
	"testing"
	"time"

	"github.com/ClickHouse/ch-go"
	"github.com/ClickHouse/ch-go/proto"
)

// TestRange: seconds and RFC 3339 mean the same, and the default is what the API can have accepted.
func TestRange(t *testing.T) {
	parse := func(args ...string) timeRange {
		var r timeRange
		fs := flag.NewFlagSet("", flag.ContinueOnError)
		r.flags(fs)
		if err := fs.Parse(args); err != nil {
			t.Fatal(args, err)
		}
		return r
	}
	if got, want := parse("-from", "1767225600", "-to", "2026-01-01T03:00:01+03:00"), (timeRange{1767225600, 1767225601}); got != want || got.check() != nil {
		t.Errorf("%+v, want %+v", got, want)
	}
	now := time.Now().Unix()
	if r := parse(); r.from > now-31*daySeconds || r.from < now-32*daySeconds || r.to < now+hourSeconds {
		t.Errorf("at %d: %+v", now, r)
	}
}

// TestExclusively: a second change is refused while the first one is at it, a dry run is not, and afterwards it is let in.
func TestExclusively(t *testing.T) {
	t.Parallel()
	s := newStand(t)
	change := func(dryRun bool) (done bool, err error) {
		err = s.exclusively(t.Context(), dryRun, func(context.Context) error { done = true; return nil })
		return done, err
	}
	err := s.exclusively(t.Context(), false, func(context.Context) error {
		if done, err := change(false); done || err == nil || !strings.Contains(err.Error(), "another command changes the tables") {
			t.Error("a second one:", done, err)
		}
		if done, err := change(true); !done || err != nil {
			t.Error("a dry run:", done, err)
		}
		return errDiffers
	})
	if err != errDiffers {
		t.Error(err)
	}
	if done, err := change(false); !done || err != nil {
		t.Error("the next one:", done, err)
	}
}

// TestExclusivelyLost: a change ends when ClickHouse ends the query that keeps others out.
func TestExclusivelyLost(t *testing.T) {
	t.Parallel()
	s := newStand(t)
	err := s.exclusively(t.Context(), false, func(ctx context.Context) error {
		var status, id, user, query proto.ColStr // what it answers
		kill := ch.Query{Body: "KILL QUERY WHERE query_id = 'tables {database}' SYNC"}
		if err := s.ask(ctx, kill, func(int) {}, &status, &id, &user, &query); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(20 * time.Second):
			t.Error("the change goes on")
			return nil
		}
	})
	if err != context.Canceled {
		t.Error(err)
	}
}
