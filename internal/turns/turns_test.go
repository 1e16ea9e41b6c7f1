// Whose turn it is.

package turns

import (
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// TestFair: one that asks for everything delays another by one of its own at most, and is refused what it may not have waiting.
func TestFair(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		turns := New(4, 3, 10)
		var refused, asked atomic.Int32
		hold := func(who byte, n int, long time.Duration) {
			for range n {
				go func() { // ends when its time is over
					done, err := turns.Wait(t.Context(), [32]byte{who})
					if errors.Is(err, ErrTooMany) {
						refused.Add(1)
						return
					}
					asked.Add(1)
					time.Sleep(long)
					done()
				}()
			}
		}
		hold(1, 600, time.Second)
		synctest.Wait()
		if asked.Load() != 3 || refused.Load() != 600-13 {
			t.Errorf("one alone has %d of 4 places, and is refused %d", asked.Load(), refused.Load())
		}
		hold(2, 5, time.Second) // one has the free place, four wait
		synctest.Wait()
		if asked.Load() != 4 {
			t.Errorf("%d places are taken", asked.Load())
		}
		started := time.Now()
		done, err := turns.Wait(t.Context(), [32]byte{3})
		if took := time.Since(started); err != nil || took != time.Second {
			t.Errorf("the third: %v after %s", err, took)
		}
		synctest.Wait()
		if asked.Load() != 4+3 || len(turns.ring) != 2 {
			t.Errorf("%d had a turn, %d clients wait", asked.Load(), len(turns.ring))
		}
		done()
		time.Sleep(time.Minute)
		if synctest.Wait(); len(turns.clients) != 0 || turns.free != 4 || len(turns.ring) != 0 || refused.Load() != 600-13 {
			t.Errorf("left: %d clients, %d places, %d waiting", len(turns.clients), turns.free, len(turns.ring))
		}
	})
}

// TestGone: who has gone gets no turn, and nothing of it is left.
func TestGone(t *testing.T) {
	turns := New(1, 1, 10)
	first, err := turns.Wait(t.Context(), [32]byte{1})
	if err != nil {
		t.Fatal(err)
	}
	gone, leave := context.WithCancel(t.Context())
	left := make(chan error)
	for range 10 {
		go func() { // ends with gone
			_, err := turns.Wait(gone, [32]byte{2})
			left <- err
		}()
	}
	leave()
	for range 10 {
		if err := <-left; !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	}
	if _, err := turns.Wait(gone, [32]byte{3}); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if len(turns.ring) != 0 || len(turns.clients) != 1 {
		t.Errorf("%d wait, %d clients", len(turns.ring), len(turns.clients))
	}
	first()
	if done, err := turns.Wait(t.Context(), [32]byte{2}); err != nil {
		t.Error(err)
	} else {
		done()
	}
}

// TestMany: whatever happens at once, no more have a turn than there are places, and in the end all are free.
func TestMany(t *testing.T) {
	const places, each, clients = 5, 3, 7
	turns := New(places, each, 20)
	var all sync.WaitGroup
	var have, served atomic.Int32
	var theirs [clients]atomic.Int32
	for i := range 2000 {
		all.Go(func() { // ends with its context, or after its turn
			ctx, cancel := context.WithTimeout(t.Context(), time.Duration(rand.IntN(3000))*time.Microsecond)
			defer cancel()
			done, err := turns.Wait(ctx, [32]byte{byte(i % clients)})
			if err != nil {
				return
			}
			defer done()
			if a, b := have.Add(1), theirs[i%clients].Add(1); a > places || b > each {
				t.Errorf("%d have a turn, %d of one client", a, b)
			}
			time.Sleep(time.Duration(rand.IntN(50)) * time.Microsecond)
			served.Add(1)
			theirs[i%clients].Add(-1)
			have.Add(-1)
		})
	}
	if all.Wait(); turns.free != places || len(turns.clients) != 0 || len(turns.ring) != 0 || served.Load() == 0 {
		t.Errorf("%d served, %d places are free, %d clients are left", served.Load(), turns.free, len(turns.clients))
	}
}
