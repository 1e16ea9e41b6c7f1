// The pace of an import.

package ops

import (
	"context"
	"errors"
	"testing"
	"time"
)

// TestPace: it goes up while everything is fresh, at once down when not, slowly up again near what was too much, and never stands still.
func TestPace(t *testing.T) {
	p := newPace()
	for range 50 {
		p.move(0)
	}
	high := p.rate
	if high < 4*firstPace {
		t.Errorf("%.0f/s after 10 s in which everything was fresh", high)
	}
	p.move(staleAge + 1)
	p.move(lateAge + 1)
	low := p.rate
	if low > high*paceDown*paceLate+1 {
		t.Errorf("%.0f/s when it was late, %.0f before", low, high)
	}
	for range 20 {
		p.move(0)
	}
	if again := p.rate; again < low || again > high*paceCalm*1.2 {
		t.Errorf("%.0f/s, while %.0f was too much a moment ago", again, high)
	}
	for range 100 {
		p.move(time.Hour)
	}
	if p.rate != leastPace {
		t.Errorf("%.0f/s while nothing moves", p.rate)
	}
}

// TestPaceFollowsTheTopic: what has waited for long on the topic slows it down, and so does a look that fails.
func TestPaceFollowsTheTopic(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		about     string
		committed int64
		err       error
		slower    bool
	}{{"stored", 10, nil, false}, {"not stored", 9, nil, true}, {"not known", 10, errors.New("away"), true}} {
		p := newPace()
		ctx, cancel := context.WithCancel(t.Context())
		begun := time.Now()
		p.watch(ctx, func(context.Context) (committed, ends map[int32]int64, err error) {
			if time.Since(begun) > 2*lateAge {
				cancel()
			}
			return map[int32]int64{0: c.committed}, map[int32]int64{0: 10}, c.err
		})
		if slower := p.rate < firstPace; slower != c.slower {
			t.Errorf("%s: %.0f/s", c.about, p.rate)
		}
	}
}
