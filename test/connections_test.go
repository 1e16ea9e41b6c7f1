// Connections: however many clients keep one open, the stores' own find room.

package test

import (
	"bufio"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/event-ingestion/event-ingestion/internal/testkit"
)

// fewFiles is the program as one that may have so many files open.
func fewFiles(t *testing.T, files int) (binary string) {
	t.Helper()
	path, err := programBinary()
	if err != nil {
		t.Fatal(err)
	}
	binary = filepath.Join(t.TempDir(), "few-files")
	if err := os.WriteFile(binary, fmt.Appendf(nil, "#!/bin/sh\nulimit -n %d\nexec %s \"$@\"\n", files, path), 0o700); err != nil {
		t.Fatal(err)
	}
	return binary
}

// keeper is a client that keeps one connection.
type keeper struct {
	transport *http.Transport
	reused    bool // the last request came over the connection of the one before
}

func (k *keeper) get(t *testing.T, url string) error {
	req, err := http.NewRequestWithContext(httptrace.WithClientTrace(t.Context(), &httptrace.ClientTrace{
		GotConn: func(got httptrace.GotConnInfo) { k.reused = got.Reused },
	}), "GET", url, nil)
	if err != nil {
		return err
	}
	resp, err := k.transport.RoundTrip(req)
	if err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, resp.Body)
	resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("status %d", resp.StatusCode)
	}
	return err
}

// TestManyConnections: thousands of clients keep a connection each, more than the program may have files, and ClickHouse restarts:
// storing goes on. Those that wait for the longest are closed, and the others stay.
func TestManyConnections(t *testing.T) {
	for name, secure := range map[string]bool{"HTTP1": false, "TLS and HTTP2": true} {
		t.Run(name, func(t *testing.T) {
			alone(t)
			manyConnections(t, secure)
		})
	}
}

func manyConnections(t *testing.T, secure bool) {
	const files, clients, most = 800, 2500, 800 - 256
	admin := freePort(t)
	env := faultSpace(t, "ADMIN_ADDR=127.0.0.1:"+admin, "SERVER_IDLE_TIMEOUT=10m")
	known := x509.NewCertPool()
	p := newProgram(t, env)
	url := p.url
	if secure { // the connections of this test are to a second instance of the space
		certFile, keyFile, _ := newCertificate(t, t.TempDir(), "api")
		pem, _ := os.ReadFile(certFile)
		known.AppendCertsFromPEM(pem)
		p.env = append(p.env, "TLS_CERT_FILE="+certFile, "TLS_KEY_FILE="+keyFile)
		url = "https" + strings.TrimPrefix(p.url, "http")
	}
	p.binary = fewFiles(t, files)
	p.start()
	newKeeper := func() *keeper {
		return &keeper{transport: &http.Transport{ForceAttemptHTTP2: secure, TLSClientConfig: &tls.Config{RootCAs: known}}}
	}
	ask := newKeeper()
	p.await("ready", time.Minute, func() bool { return ask.get(t, url+"/ready") == nil })
	var sent []int // the events
	keepers := make([]*keeper, clients)
	for i := range keepers {
		if i == clients/2 {
			control(t, "/clickhouse/stop")
		}
		keepers[i] = newKeeper()
		defer keepers[i].transport.CloseIdleConnections()
		if err := keepers[i].get(t, url+"/health"); err != nil {
			t.Fatalf("client %d: %v", i, err)
		}
		if i%100 == 0 {
			ask.transport.CloseIdleConnections()
			req, _ := http.NewRequestWithContext(t.Context(), "POST", url+onePath, strings.NewReader(string(testkit.FreshEvent("crowd"))))
			resp, err := ask.transport.RoundTrip(req)
			if err != nil || resp.StatusCode != 202 {
				t.Fatalf("event %d: %v %v", i, resp, err)
			}
			resp.Body.Close()
			sent = append(sent, i)
		}
	}
	control(t, "/clickhouse/start")
	if open := metric(t, admin, "event_ingestion_connections"); open > most || open < most-100 {
		t.Errorf("%g connections are open, %d are the most", open, most)
	}
	if closed := metric(t, admin, "event_ingestion_connections_closed_total"); closed < clients-most || closed > clients-most+200 {
		t.Errorf("%g connections were closed", closed)
	}
	p.await("stored", time.Minute, func() bool {
		return clickhouseQuery(t, "SELECT count() FROM "+space(env, "CLICKHOUSE_DATABASE")+".events WHERE event_name = 'crowd'") == fmt.Sprint(len(sent))
	})
	for _, i := range []int{0, clients - 1} { // the newest first would make room for itself
		k := keepers[clients-1-i]
		if err := k.get(t, url+"/health"); err != nil || k.reused != (i == 0) {
			t.Errorf("client %d: the same connection: %t, %v", clients-1-i, k.reused, err)
		}
	}
	if !strings.Contains(p.log.String(), "more connections than MAX_CONNECTIONS") {
		t.Error("the log does not say it")
	}
}

// TestAllServed: while every connection serves a request, one more is closed, and none of those that serve. One that waits goes first,
// also when it has never sent anything.
func TestAllServed(t *testing.T) {
	t.Parallel()
	p := startProgram(t, newSpace(t, "MAX_CONNECTIONS=4"))
	host := strings.TrimPrefix(p.url, "http://")
	http.DefaultClient.CloseIdleConnections()
	dial := func() net.Conn {
		conn, err := net.Dial("tcp", host)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		conn.SetDeadline(time.Now().Add(30 * time.Second))
		return conn
	}
	silent := dial()
	var served []net.Conn
	for range 4 {
		conn := dial()
		body := testkit.FreshEvent("served")
		fmt.Fprintf(conn, "POST %s HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n", onePath, len(body))
		if line, err := bufio.NewReader(conn).ReadString('\n'); !strings.Contains(line, "100 Continue") {
			t.Fatal(line, err) // it is being served now
		}
		served = append(served, conn)
	}
	closed := func(conn net.Conn) bool {
		_, err := conn.Read(make([]byte, 1))
		ne, is := err.(net.Error)
		return err != nil && !(is && ne.Timeout())
	}
	if !closed(silent) {
		t.Error("a connection that never sent anything stays")
	}
	if !closed(dial()) {
		t.Error("there is room for a fifth")
	}
	for i, conn := range served {
		conn.Write(testkit.FreshEvent("served"))
		if resp, err := http.ReadResponse(bufio.NewReader(conn), nil); err != nil || resp.StatusCode != 202 {
			t.Errorf("%d: %v %v", i, resp, err)
		}
	}
}

// TestIdleTimeout: a connection waits for its next request for as long as the setting says.
func TestIdleTimeout(t *testing.T) {
	t.Parallel()
	p := startProgram(t, newSpace(t, "SERVER_IDLE_TIMEOUT=1s"))
	conn, err := net.Dial("tcp", strings.TrimPrefix(p.url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(time.Minute)) // of the two minutes that it has by default
	fmt.Fprint(conn, "GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
	answer, err := io.ReadAll(conn) // which ends when the server closes it
	if err != nil || !strings.Contains(string(answer), "200 OK") {
		t.Errorf("%q %v", answer, err)
	}
}
