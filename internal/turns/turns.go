// Package turns shares a few places among many clients: whoever waits gets a turn, one client after the other, however much one of
// them asks for.
//
// It owns the queue. Nothing runs in it: whoever has its turn does something, and says when that is over.
package turns

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
)

var (
	// ErrTooMany is what a client gets that has as much waiting as it may.
	ErrTooMany = errors.New("too many questions of this key, or of this address without a key, are waiting")
	// ErrNone is what a client gets whose time ends before its turn comes.
	ErrNone = errors.New("no turn came")
)

// Turns are a number of places.
type Turns struct {
	each, waiting int // the most that one client may have of the places, and waiting for one

	mu      sync.Mutex // guards what follows
	free    int
	clients map[[32]byte]*client // those with a place, or waiting
	ring    []*client            // those that wait, in the order of their turns
}

type client struct {
	has     int
	waiting []chan struct{} // each is closed when it has its turn, oldest first
}

// New returns that many places, of which one client has at most each at once, while at most waiting more of its wait.
func New(places, each, waiting int) *Turns {
	return &Turns{each: each, waiting: waiting, free: places, clients: map[[32]byte]*client{}}
}

// Wait returns when it is who's turn. done, to be called once, gives the place to whoever is next. The errors are ErrTooMany, at once, and
// ErrNone with the context's.
func (t *Turns) Wait(ctx context.Context, who [32]byte) (done func(), err error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	turn, err := t.enter(who)
	if err != nil {
		return nil, err
	}
	select {
	case <-turn:
	case <-ctx.Done():
		t.leave(who, turn)
		return nil, fmt.Errorf("%w: %w", ErrNone, ctx.Err())
	}
	if err := ctx.Err(); err != nil { // it may have ended before
		t.giveBack(who)
		return nil, err
	}
	return func() { t.giveBack(who) }, nil
}

// enter queues a client's next one.
func (t *Turns) enter(who [32]byte) (turn chan struct{}, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	c := t.clients[who]
	if c == nil {
		c = new(client)
		t.clients[who] = c
	}
	if len(c.waiting) >= t.waiting && (t.free == 0 || c.has >= t.each) {
		t.forget(who)
		return nil, ErrTooMany
	}
	turn = make(chan struct{})
	if c.waiting = append(c.waiting, turn); len(c.waiting) == 1 {
		t.ring = append(t.ring, c)
	}
	t.next()
	return turn, nil
}

// leave ends the wait for a turn, which may have come meanwhile.
func (t *Turns) leave(who [32]byte, turn chan struct{}) {
	t.mu.Lock()
	defer t.mu.Unlock()
	c := t.clients[who]
	i := slices.Index(c.waiting, turn)
	if i < 0 {
		t.end(who)
		return
	}
	if c.waiting = slices.Delete(c.waiting, i, i+1); len(c.waiting) == 0 {
		i := slices.Index(t.ring, c)
		t.ring = slices.Delete(t.ring, i, i+1)
	}
	t.forget(who)
}

func (t *Turns) giveBack(who [32]byte) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.end(who)
}

// end is giveBack for whoever holds the lock.
func (t *Turns) end(who [32]byte) {
	t.free++
	t.clients[who].has--
	t.forget(who)
	t.next()
}

func (t *Turns) forget(who [32]byte) {
	if c := t.clients[who]; c.has == 0 && len(c.waiting) == 0 {
		delete(t.clients, who)
	}
}

// next gives away what is free, a place to each client in its turn.
func (t *Turns) next() {
	for passed := 0; t.free > 0 && passed < len(t.ring); {
		c := t.ring[0]
		t.ring = append(t.ring[1:], c)
		if c.has >= t.each {
			passed++ // until it gives one back
			continue
		}
		passed = 0
		close(c.waiting[0])
		c.waiting = c.waiting[1:]
		c.has++
		t.free--
		if len(c.waiting) == 0 {
			t.ring = t.ring[:len(t.ring)-1]
		}
	}
}
