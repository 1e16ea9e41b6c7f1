// Connections to the brokers that can be broken at the worst moment: when a request was carried out and its answer was not
// sent. cuttable.go owns the set of open connections.

package main

import (
	"errors"
	"net"
	"sync"
	"sync/atomic"
)

var errCut = errors.New("cut by the control endpoint")

// cuttable is a set of connections whose next answers can be dropped.
type cuttable struct {
	mu    sync.Mutex // guards conns
	conns map[*cutConn]struct{}
}

// listen is net.Listen; what its listener accepts is in the set.
func (c *cuttable) listen(network, address string) (net.Listener, error) {
	l, err := net.Listen(network, address)
	if err != nil {
		return nil, err
	}
	return cutListener{l, c}, nil
}

// cut makes every connection of now break at its next answer.
func (c *cuttable) cut() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for conn := range c.conns {
		conn.broken.Store(true)
	}
}

type cutListener struct {
	net.Listener
	set *cuttable
}

func (l cutListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	c := &cutConn{Conn: conn, set: l.set}
	l.set.mu.Lock()
	defer l.set.mu.Unlock()
	if l.set.conns == nil {
		l.set.conns = map[*cutConn]struct{}{}
	}
	l.set.conns[c] = struct{}{}
	return c, nil
}

type cutConn struct {
	net.Conn
	set    *cuttable
	broken atomic.Bool
}

func (c *cutConn) Write(b []byte) (int, error) {
	if c.broken.Load() {
		c.Close()
		return 0, errCut
	}
	return c.Conn.Write(b)
}

func (c *cutConn) Close() error {
	c.set.mu.Lock()
	delete(c.set.conns, c)
	c.set.mu.Unlock()
	return c.Conn.Close()
}
