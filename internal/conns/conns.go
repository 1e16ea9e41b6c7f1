// Package conns bounds the connections of a server's clients, so that the stores' own connections and the memory keep their room.
package conns

import (
	"crypto/tls"
	"log/slog"
	"net"
	"net/http"
	"runtime/debug"
	"sync"
	"syscall"
	"time"
)

const (
	// plainConnection and tlsConnection are what a connection takes in bytes while it waits for a request, the latter with HTTP/2.
	plainConnection, tlsConnection = 20 << 10, 44 << 10
	// connectionsPart of the memory that the program is to keep to is for connections.
	connectionsPart = 4
	// ownFiles is how many open files the program needs at least for itself: the stores' connections, above all.
	ownFiles = 256
	// crowdedEvery is how often the log may say that there are too many.
	crowdedEvery = time.Minute
)

// Limit is of the connections of clients, of which there are so many at the most: beyond it the one is closed that waits for a request for the
// longest. It never waits, because the server's loop that accepts them does.
type Limit struct {
	most   int
	closed func() // counts

	mu      sync.Mutex // guards what follows
	open    map[net.Conn]*clientConn
	waiting clientConn // a ring, from the one that waits for the longest
	told    time.Time  // when the log said that there are too many
}

// clientConn is a connection; it is in the ring while it waits.
type clientConn struct {
	conn       net.Conn
	prev, next *clientConn // nil while a request is served
}

// New returns a limit of so many connections: of what memory has room for when most is 0, and never of more than open files have.
// closed is called for each one that is closed for it.
func New(most int, tls bool, closed func()) *Limit {
	c := &Limit{most: room(most, tls), open: map[net.Conn]*clientConn{}, closed: closed}
	c.waiting.prev, c.waiting.next = &c.waiting, &c.waiting
	return c
}

// Open is how many connections there are.
func (c *Limit) Open() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.open)
}

// room is most, or what memory has room for, but never more than open files have.
func room(most int, tls bool) int {
	files, size := openFiles(), int64(plainConnection)
	room := files - min(max(files/4, ownFiles), files/2)
	if most > room {
		slog.Warn("MAX_CONNECTIONS is more than open files have room for beside the stores' own connections", "MAX_CONNECTIONS", most, "used", room, "RLIMIT_NOFILE", files)
	}
	if most > 0 {
		return min(most, room)
	}
	if tls {
		size = tlsConnection
	}
	return int(min(int64(room), debug.SetMemoryLimit(-1)/connectionsPart/size))
}

// openFiles is how many files the process may have open.
func openFiles() int {
	var limit syscall.Rlimit
	if syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit) != nil {
		return 4 * ownFiles
	}
	return int(min(limit.Cur, 1<<30))
}

// Changed is the server's ConnState.
func (c *Limit) Changed(conn net.Conn, state http.ConnState) {
	c.mu.Lock()
	defer c.mu.Unlock()
	cc := c.open[conn]
	switch {
	case state == http.StateNew:
		cc = &clientConn{conn: conn}
		c.open[conn] = cc
		c.wait(cc)
		if len(c.open) > c.most {
			c.end(c.waiting.next) // perhaps this one: the others are served
		}
	case cc == nil: // it has been closed here
	case state == http.StateActive:
		cc.leave()
	case state == http.StateIdle && cc.next == nil:
		c.wait(cc)
	case state == http.StateClosed, state == http.StateHijacked:
		cc.leave()
		delete(c.open, conn)
	}
}

// wait puts a connection at the ring's end; leave takes it out.
func (c *Limit) wait(cc *clientConn) {
	cc.prev, cc.next = c.waiting.prev, &c.waiting
	cc.prev.next, cc.next.prev = cc, cc
}

func (cc *clientConn) leave() {
	if cc.next != nil {
		cc.prev.next, cc.next.prev = cc.next, cc.prev
		cc.prev, cc.next = nil, nil
	}
}

// end closes a connection that waits, under mu.
func (c *Limit) end(cc *clientConn) {
	cc.leave()
	delete(c.open, cc.conn)
	c.closed()
	if over, is := cc.conn.(*tls.Conn); is {
		over.NetConn().Close() // without a last word, which a client can keep waiting
	} else {
		cc.conn.Close()
	}
	if now := time.Now(); now.Sub(c.told) > crowdedEvery {
		c.told = now
		slog.Warn("there are more connections than MAX_CONNECTIONS: those that wait for the longest are closed", "connections", c.most)
	}
}
