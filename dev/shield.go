// The shield: ClickHouse's native port as clients see it. It keeps their resets away from ClickHouse.
//
// clickhouse-local gives itself up when a native connection is reset while it is idle, as the connections of a killed
// program are; a server does not mind, and a stack for tests in which programs are killed must not either. So dev
// listens on the native port and passes the bytes on to a port that only ClickHouse knows: for ClickHouse a reset is
// the end of a stream. It costs 55 µs a round trip (of 600) and passes 1 GB a second on; on Linux the kernel moves the
// bytes (splice).

package main

import (
	"errors"
	"io"
	"net"
	"strconv"
	"time"
)

// dialTimeout is for a connection to a port of this machine: refused or accepted at once.
const dialTimeout = 2 * time.Second

// shield passes connections on until its listener is closed.
type shield struct {
	net.Listener
	target func() int // ClickHouse's own port
}

func serveShield(port int, target func() int) (*shield, error) {
	l, err := net.Listen("tcp", "127.0.0.1:"+strconv.Itoa(port))
	if err != nil {
		return nil, err
	}
	s := &shield{l, target}
	go s.accept() // ends with Close
	return s, nil
}

func (s *shield) accept() {
	for {
		c, err := s.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil { // out of file descriptors, or a client that has gone already
			time.Sleep(10 * time.Millisecond)
			continue
		}
		go s.pass(c.(*net.TCPConn)) // ends with either end's connection
	}
}

// pass moves bytes both ways until both sides have ended.
func (s *shield) pass(client *net.TCPConn) {
	defer client.Close()
	c, err := net.DialTimeout("tcp", "127.0.0.1:"+strconv.Itoa(s.target()), dialTimeout)
	if err != nil { // ClickHouse is down
		client.SetLinger(0) // the nearest to a refused connection
		return
	}
	server := c.(*net.TCPConn)
	defer server.Close()

	asked := make(chan struct{})
	go func() { // ends with the client's connection
		defer close(asked)
		io.Copy(server, client)
		server.CloseWrite() // whatever ended the client: closed, reset, killed
	}()
	io.Copy(client, server)
	io.Copy(io.Discard, server) // for a client that is gone: bytes left unread would make the close a reset
	client.Close()
	<-asked
}
