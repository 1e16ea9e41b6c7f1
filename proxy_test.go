// A proxy between the program and what it depends on: it can lose answers, and speak TLS.

package main

import (
	"crypto/tls"
	"io"
	"net"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
)

// proxy passes connections on to a target. Connections can lose their answers.
type proxy struct {
	listener net.Listener
	mu       sync.Mutex // guards conns
	conns    map[net.Conn]*atomic.Bool
}

// newProxy listens on loopback, with TLS unless config is nil, until the test ends.
func newProxy(t *testing.T, target string, config *tls.Config) *proxy {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	if config != nil {
		l = tls.NewListener(l, config)
	}
	p := &proxy{listener: l, conns: map[net.Conn]*atomic.Bool{}}
	t.Cleanup(func() { l.Close() })
	go func() { // ends with the listener
		for {
			client, err := l.Accept()
			if err != nil {
				return
			}
			server, err := net.Dial("tcp", target)
			if err != nil {
				client.Close()
				continue
			}
			p.pass(client, server)
		}
	}()
	return p
}

func (p *proxy) pass(client, server net.Conn) {
	mute := new(atomic.Bool)
	p.mu.Lock()
	p.conns[client] = mute
	p.mu.Unlock()
	go func() { io.Copy(server, client); server.Close() }() // ends with either side
	go func() {                                             // ends with either side
		defer client.Close()
		b := make([]byte, 32<<10)
		for {
			n, err := server.Read(b)
			if err != nil || mute.Load() {
				return // what the server said is never heard
			}
			if _, err := client.Write(b[:n]); err != nil {
				return
			}
		}
	}()
}

func (p *proxy) port() string { return strconv.Itoa(p.listener.Addr().(*net.TCPAddr).Port) }

// cutAnswers makes every connection of now lose its next answer, and end with it.
func (p *proxy) cutAnswers() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, mute := range p.conns {
		mute.Store(true)
	}
	clear(p.conns)
}
