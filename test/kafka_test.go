// Kafka as a test sees it, and what stands between the program and what it depends on: a proxy can lose answers, keep silent, and
// speak TLS.

package test

import (
	"crypto/tls"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/twmb/franz-go/pkg/kadm"
	"github.com/twmb/franz-go/pkg/kfake"
	"github.com/twmb/franz-go/pkg/kgo"
)

// kafkaBrokers are the addresses of the brokers of the test's stack.
func kafkaBrokers(t testing.TB) []string { return strings.Split(stackEnv(t, "KAFKA_BROKERS"), ",") }

// growTopic gives the space's topic so many partitions.
func growTopic(t testing.TB, env []string, partitions int) {
	t.Helper()
	kafka, err := kgo.NewClient(kgo.SeedBrokers(kafkaBrokers(t)...))
	if err != nil {
		t.Fatal(err)
	}
	defer kafka.Close()
	if _, err := kadm.NewClient(kafka).UpdatePartitions(t.Context(), partitions, space(env, "KAFKA_TOPIC")); err != nil {
		t.Fatal(err)
	}
}

// readTopicEnds are the ends of the partitions of a topic: KAFKA_TOPIC with a suffix.
func readTopicEnds(t *testing.T, env []string, suffix string) []int64 {
	t.Helper()
	kafka, err := kgo.NewClient(kgo.SeedBrokers(kafkaBrokers(t)...))
	if err != nil {
		t.Fatal(err)
	}
	defer kafka.Close()
	topic := space(env, "KAFKA_TOPIC") + suffix
	ends, err := kadm.NewClient(kafka).ListEndOffsets(t.Context(), topic)
	if err != nil {
		t.Fatal(err)
	}
	all := make([]int64, len(ends[topic]))
	for partition, end := range ends[topic] {
		if end.Err != nil {
			t.Fatal(end.Err)
		}
		all[partition] = end.Offset
	}
	return all
}

// proxy passes connections on to a target. Connections can lose their answers, never get one, or be refused.
type proxy struct {
	listener net.Listener
	mu       sync.Mutex // guards conns
	conns    map[net.Conn]*atomic.Bool
	silent   atomic.Bool  // what the target says on any connection is swallowed, and nothing is closed
	deaf     atomic.Bool  // connections from now on are like that
	shut     atomic.Bool  // connections from now on end at once
	late     atomic.Int64 // nanoseconds that what the target says takes longer
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
			if p.shut.Load() {
				client.Close()
				continue
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
	mute, deaf := new(atomic.Bool), p.deaf.Load()
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
			if deaf || p.silent.Load() {
				continue
			}
			time.Sleep(time.Duration(p.late.Load()))
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

// silentBrokers is a Kafka of the test's own, of which the first n brokers can fall silent: connections stay open, and no answer
// comes any more.
func silentBrokers(t *testing.T) (addresses string, silence func(n int)) {
	t.Helper()
	var listeners []silentListener
	listen := func(network, address string) (net.Listener, error) {
		l, err := net.Listen(network, address)
		listeners = append(listeners, silentListener{l, new(atomic.Bool)})
		return listeners[len(listeners)-1], err
	}
	brokers, err := kfake.NewCluster(kfake.NumBrokers(2), kfake.GroupMinSessionTimeout(time.Second), kfake.ListenFn(listen))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(brokers.Close)
	return strings.Join(brokers.ListenAddrs(), ","), func(n int) {
		for _, l := range listeners[:n] {
			l.silent.Store(true)
		}
	}
}

type silentListener struct {
	net.Listener
	silent *atomic.Bool
}

func (l silentListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	return silentConn{conn, l.silent}, err
}

type silentConn struct {
	net.Conn
	silent *atomic.Bool
}

func (c silentConn) Write(b []byte) (int, error) {
	if c.silent.Load() {
		return len(b), nil
	}
	return c.Conn.Write(b)
}

// portsGiven counts what freePort has tried, from a place of this process's own: no port is given twice.
var portsGiven atomic.Int64

var firstPort = rand.Int64N(4000)

// freePort is a free port, and so are the two behind it, which a stack of three shards takes. They are from below the kernels'
// own ranges: an outgoing connection must not take one while a part of the stack, or the program, is down.
func freePort(t testing.TB) string {
	t.Helper()
	for range 100 {
		port, free := 20000+(firstPort+portsGiven.Add(1))%4000*3, 0
		for i := range int64(3) {
			if l, err := net.Listen("tcp", fmt.Sprint("127.0.0.1:", port+i)); err == nil {
				l.Close()
				free++
			}
		}
		if free == 3 {
			return fmt.Sprint(port)
		}
	}
	t.Fatal("no free port")
	return ""
}

// header is the value of a record's header, "" without one.
func header(rec *kgo.Record, key string) string {
	for _, h := range rec.Headers {
		if h.Key == key {
			return string(h.Value)
		}
	}
	return ""
}
