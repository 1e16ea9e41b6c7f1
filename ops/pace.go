// The pace of an import: as fast as leaves live events fresh.

package ops

import (
	"context"
	"fmt"
	"sync"
	"time"
)

const (
	// paceTick is the time between two looks at the topic.
	paceTick = 200 * time.Millisecond
	// A look finds how old the oldest record may be that is not known to be stored: from when it was there to when its offset was
	// committed, up to 250 ms later, in ticks. Below freshAge, with one tick, the pace goes up; above staleAge, with two, down. What is
	// live then waits for less than 500 ms: with three ticks for staleAge, an import is twice as fast, and one event in a hundred waits longer.
	freshAge, staleAge, lateAge = 300 * time.Millisecond, 350 * time.Millisecond, 700 * time.Millisecond
	// Events a second. The pace begins low: what the machine can is not known. Once it was too much, it goes up slowly beyond paceCalm
	// of that, for calmTime. The least is what little does to a machine that is slow for another reason.
	firstPace, leastPace, mostPace       = 2000., 500., 500_000.
	paceUp, paceSlow, paceDown, paceLate = 1.03, 1.004, 0.8, 0.4
	paceCalm, calmTime                   = 0.6, 10 * time.Second
	// paceSleep is how exactly it is kept.
	paceSleep = 5 * time.Millisecond
	// maxPaceSamples are those of a minute.
	maxPaceSamples = 300
)

// pace says when the next event may go.
type pace struct {
	mu   sync.Mutex // guards what follows
	rate float64    // events a second
	calm float64    // beyond it, it goes up slowly, unless it is 0,
	late time.Time  // for a while after this
	age  time.Duration

	last time.Time // of wait, and how many may go until then; only who waits touches them
	may  float64
}

func newPace() *pace { return &pace{rate: firstPace, last: time.Now()} }

// wait returns when one more event may go, or with the error of ctx.
func (p *pace) wait(ctx context.Context) error {
	for p.may < 1 {
		p.mu.Lock()
		rate := p.rate
		p.mu.Unlock()
		now := time.Now()
		p.may += min(now.Sub(p.last), 10*paceSleep).Seconds() * rate // what was not used in time is lost: no burst follows a pause
		if p.last = now; p.may < 1 {
			if err := pause(ctx, paceSleep); err != nil {
				return err
			}
		}
	}
	p.may--
	return nil
}

// watch looks until ctx is done, and moves the pace. A look that fails slows it down.
func (p *pace) watch(ctx context.Context, reached func(context.Context) (committed, ends map[int32]int64, err error)) {
	type sample struct {
		at   time.Time
		ends map[int32]int64
	}
	var samples []sample // ends that are not known to be stored, oldest first
	for pause(ctx, paceTick) == nil {
		now := time.Now()
		committed, ends, err := reached(ctx)
		if err != nil {
			p.move(lateAge + 1)
			continue
		}
		for len(samples) > 0 && behind(committed, samples[0].ends) == 0 {
			samples = samples[1:]
		}
		if len(samples) < maxPaceSamples {
			samples = append(samples, sample{now, ends})
		}
		p.move(now.Sub(samples[0].at))
	}
}

// behind is how many records before these offsets are not committed.
func behind(committed, offsets map[int32]int64) (n int64) {
	for p, offset := range offsets {
		n += max(0, offset-committed[p])
	}
	return n
}

// move takes the age of the oldest record that is not stored.
func (p *pace) move(age time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	before := p.age
	p.age = age
	if age > staleAge {
		if p.late = time.Now(); before <= staleAge && p.rate > p.calm/2 { // else it is not the import
			p.calm = p.rate * paceCalm
		}
	} else if time.Since(p.late) > calmTime {
		p.calm = 0
	}
	switch {
	case age > lateAge:
		p.rate *= paceLate
	case age > staleAge:
		p.rate *= paceDown
	case age < freshAge && (p.rate < p.calm || p.calm == 0):
		p.rate *= paceUp
	case age < freshAge:
		p.rate *= paceSlow
	}
	p.rate = min(max(p.rate, leastPace), mostPace)
}

// words are for the progress.
func (p *pace) words() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return fmt.Sprintf(", at most %.0f/s, the topic is %s behind", p.rate, p.age.Round(10*time.Millisecond))
}
