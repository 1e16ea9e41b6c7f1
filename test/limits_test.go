// Clients that are slow, many, or send too much.

package test

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/event-ingestion/event-ingestion/internal/testkit"
)

// maxSingleBody and maxBulkBody are as large as bodies may be, in bytes.
const maxSingleBody, maxBulkBody = 64 << 10, 8 << 20

// TestStrain: clients that are slow, many, or send too much hold nobody else up.
func TestStrain(t *testing.T) {
	t.Parallel()
	p := startProgram(t, newSpace(t, "SERVER_READ_TIMEOUT=1s", "ALLOWED_HOSTS=x,other.example"))
	host := strings.TrimPrefix(p.url, "http://")
	dial := func() net.Conn {
		conn, err := net.Dial("tcp", host)
		if err != nil {
			t.Fatal(err)
		}
		conn.SetDeadline(time.Now().Add(20 * time.Second))
		return conn
	}
	slow := map[string]func(net.Conn) error{
		"header": func(c net.Conn) error { _, err := c.Write([]byte("X: y\r\n")); return err },
		"body":   func(c net.Conn) error { _, err := c.Write([]byte(" ")); return err },
	}
	for name, drip := range slow {
		conn := dial()
		defer conn.Close()
		fmt.Fprintf(conn, "POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n", onePath)
		if name == "body" {
			fmt.Fprint(conn, "\r\n{")
		}
		cut := make(chan error, 1)
		go func() { // ends when the server closes the connection, or at the deadline
			_, err := io.Copy(io.Discard, conn)
			cut <- err
		}()
		tick := time.NewTicker(100 * time.Millisecond)
		for waiting := true; waiting; {
			select {
			case err := <-cut:
				if ne, ok := err.(net.Error); ok && ne.Timeout() {
					t.Errorf("slow %s: not cut off", name)
				}
				waiting = false
			case <-tick.C:
				drip(conn)
			}
		}
		tick.Stop()
	}

	for i := range 200 { // they claim all that requests may hold, and send nothing of it
		conn := dial()
		defer conn.Close()
		fmt.Fprintf(conn, "POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n", bulkPath, maxBulkBody>>min(i/8, 10))
	}
	for range 20 { // while the handlers of some of them wait for certain
		if status, _, answer := p.do("POST", bulkPath, ndjson, "", testkit.FreshEvent("s")); status != 202 {
			t.Fatalf("beside empty promises: %d %s", status, answer)
		}
		time.Sleep(10 * time.Millisecond)
	}

	var limit syscall.Rlimit
	syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit)
	many := min(10_000, int(limit.Cur)/2) // tests beside this one need some, too
	for range many {
		conn := dial()
		defer conn.Close()
	}
	t.Logf("%d idle connections", many)
	if status, _, answer := p.do("POST", onePath, jsonCT, "", testkit.FreshEvent("s")); status != 202 {
		t.Errorf("beside idle connections: %d %s", status, answer)
	}

	for _, c := range []struct {
		name, request string
		status        []int
	}{
		{"one huge header", "GET /health HTTP/1.1\r\nHost: x\r\nX-A: " + strings.Repeat("a", 30<<10) + "\r\n\r\n", []int{431}},
		{"many headers", "GET /health HTTP/1.1\r\nHost: x\r\n" + strings.Repeat("X-A: b\r\n", 5000) + "\r\n", []int{431}},
		{"two slashes", "GET //health HTTP/1.1\r\nHost: x\r\n\r\n", []int{404}},
		{"dots", "GET /api/../health HTTP/1.1\r\nHost: x\r\n\r\n", []int{404}},
		{"encoded dots", "GET /api/%2e%2e/health HTTP/1.1\r\nHost: x\r\n\r\n", []int{404}},
		{"encoded slash", "GET /api%2Fv1%2Fmetrics HTTP/1.1\r\nHost: x\r\n\r\n", []int{404, 400}},
		{"NUL", "GET /health%00 HTTP/1.1\r\nHost: x\r\n\r\n", []int{404}},
		{"long path", "GET /" + strings.Repeat("a", 12<<10) + " HTTP/1.1\r\nHost: x\r\n\r\n", []int{404}},
		{"absolute", "GET http://other.example/health HTTP/1.1\r\nHost: x\r\n\r\n", []int{200}},
		{"no host", "GET /health HTTP/1.1\r\n\r\n", []int{400}},
		{"two lengths", "POST " + onePath + " HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}", []int{400}},
		{"length and chunks", "POST " + onePath + " HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", []int{400}},
		{"GET with a body", "GET /health HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}", []int{400}},
		{"GET with chunks", "GET /health HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", []int{400}},
		{"GET with an empty body", "GET /health HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n", []int{200}},
		{"negative length", "POST " + onePath + " HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", []int{400}},
	} {
		conn := dial()
		io.WriteString(conn, c.request)
		resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
		conn.Close()
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		ok := false
		for _, s := range c.status {
			ok = ok || s == resp.StatusCode
		}
		if !ok {
			t.Errorf("%s: %s, want %v", c.name, resp.Status, c.status)
		}
	}
}

// TestOneClient: one that sends many large bodies, and none to its end, takes nothing from others, told apart by key or by
// address; it gets 429 for what is beyond its share.
func TestOneClient(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct{ keys, greedy, other, from string }{
		"by key":     {"API_KEYS=" + firstKey + "," + secondKey, "X-API-Key: " + firstKey, "X-API-Key: " + secondKey, "127.0.0.1"},
		"by address": {"API_KEYS=", "X-Other: 1", "X-Other: 1", "127.0.0.2"},
	} {
		t.Run(name, func(t *testing.T) {
			p := startProgram(t, newSpace(t, c.keys, fmt.Sprintf("MAX_IN_FLIGHT_BYTES=%d", 4*maxBulkBody)))
			dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(c.from)}}
			refused := make(chan string, 90)
			for range cap(refused) { // 90 MB, of which 32 MiB may be in flight
				conn, err := dialer.Dial("tcp", strings.TrimPrefix(p.url, "http://"))
				if err != nil {
					t.Skip("there is only one address here: ", err)
				}
				defer conn.Close()
				go func() { // ends with the connection
					fmt.Fprintf(conn, "POST %s HTTP/1.1\r\nHost: x\r\n%s\r\nContent-Length: 1000000\r\n\r\n%s", bulkPath, c.greedy, strings.Repeat(" ", 999_999))
					if resp, err := http.ReadResponse(bufio.NewReader(conn), nil); err == nil {
						refused <- resp.Status + " " + resp.Header.Get("Retry-After")
					}
				}()
			}
			if status := <-refused; status != "429 Too Many Requests 2" {
				t.Errorf("beyond its share: %s", status)
			}
			body := append(bytes.Repeat([]byte(" "), 500_000), testkit.FreshEvent("o")...)
			for range 30 {
				if status, _, answer := p.ask("POST", bulkPath, body, "Content-Type: "+ndjson, c.other); status != 202 {
					t.Fatalf("somebody else: %d %s", status, answer)
				}
			}
		})
	}
}

// TestUnknownKeys: requests whose key may stand in their bodies take nothing from those who have one, from however many addresses
// they come: together they have a small share, and get 429 for what is beyond it.
func TestUnknownKeys(t *testing.T) {
	t.Parallel()
	p := startProgram(t, newSpace(t, "API_KEYS="+firstKey, fmt.Sprintf("MAX_IN_FLIGHT_BYTES=%d", 4*maxBulkBody)))
	refused := make(chan string, 90)
	for i := range cap(refused) { // 90 MB
		dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 1, byte(1+i))}}
		conn, err := dialer.Dial("tcp", strings.TrimPrefix(p.url, "http://"))
		if err != nil {
			t.Skip("there is only one address here: ", err)
		}
		defer conn.Close()
		go func() { // ends with the connection
			fmt.Fprintf(conn, "POST /v1/batch HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n%s", strings.Repeat(" ", 999_999))
			if resp, err := http.ReadResponse(bufio.NewReader(conn), nil); err == nil {
				refused <- resp.Status + " " + resp.Header.Get("Retry-After")
			}
		}()
	}
	for range cap(refused) / 2 { // while the others hold what they have
		if status := <-refused; status != "429 Too Many Requests 2" {
			t.Errorf("beyond their share: %s", status)
		}
	}
	body := append(bytes.Repeat([]byte(" "), 3<<20), testkit.FreshEvent("k")...)
	for range 30 {
		if status, _, answer := p.ask("POST", bulkPath, body, "Content-Type: "+ndjson, "X-API-Key: "+firstKey); status != 202 {
			t.Fatalf("somebody with a key: %d %s", status, answer)
		}
	}
}

// TestGreedyReader: one that has hundreds of questions at once is refused most of them, and another's are answered between its own.
func TestGreedyReader(t *testing.T) {
	t.Parallel()
	const greedy, questions, mostBetween = 600, 20, 100
	p := startProgram(t, newSpace(t, "API_KEYS="+firstKey+","+secondKey))
	ask := func(c *http.Client, key, group string) (int, string) {
		r, _ := http.NewRequestWithContext(t.Context(), "GET", p.url+metricsPath+"event_name=e&from=1&to=2&group_by="+group, nil)
		r.Header.Set("X-API-Key", key)
		resp, err := c.Do(r)
		if err != nil {
			return 0, err.Error()
		}
		defer resp.Body.Close()
		io.Copy(io.Discard, resp.Body)
		return resp.StatusCode, resp.Header.Get("Retry-After")
	}
	var asking sync.WaitGroup
	var left, answered atomic.Int32
	var enough atomic.Bool
	client := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: greedy}}
	for range greedy {
		left.Add(1)
		asking.Go(func() { // ends with enough, or when it is refused
			defer left.Add(-1)
			for !enough.Load() {
				switch status, retry := ask(client, firstKey, "campaign"); {
				case status == 429 && retry == "2":
					return
				case status == 200:
					answered.Add(1)
				case status != 503: // it waited too long for the others of its own
					t.Errorf("a question of the greedy: %d %s", status, retry)
					return
				}
			}
		})
	}
	defer asking.Wait()
	defer enough.Store(true)
	p.await("rid of most questions", 20*time.Second, func() bool { return left.Load() < greedy/4 })
	before := answered.Load()
	for range questions {
		if status, retry := ask(http.DefaultClient, secondKey, "channel"); status != 200 {
			t.Fatalf("a question of another: %d %s", status, retry)
		}
	}
	if n := (answered.Load() - before) / questions; n > mostBetween {
		t.Errorf("%d questions of the greedy are answered for each of another's", n)
	} else {
		t.Logf("%d for each", n)
	}
}

// flood sends questions whose answers nobody reads, on connections that end with the test.
func (p *program) flood(questions int, path, header string) {
	for range questions {
		if conn, err := net.Dial("tcp", strings.TrimPrefix(p.url, "http://")); err == nil {
			p.t.Cleanup(func() { conn.Close() })
			fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: x\r\n%s\r\n\r\n", path, header)
		}
	}
}

// TestCutBody: a body that does not arrive whole is never answered as if it had been taken, 200 above all. A client that is
// still there is told to send again.
func TestCutBody(t *testing.T) {
	t.Parallel()
	p := startProgram(t, newSpace(t, "SERVER_READ_TIMEOUT=1s"))
	for _, path := range []string{onePath, bulkPath, "/v1/batch"} {
		for _, leaves := range []bool{false, true} {
			conn, err := net.Dial("tcp", strings.TrimPrefix(p.url, "http://"))
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			conn.SetDeadline(time.Now().Add(20 * time.Second))
			fmt.Fprintf(conn, "POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{", path)
			if leaves {
				conn.(*net.TCPConn).CloseWrite()
			}
			answer, err := io.ReadAll(conn)
			switch text := string(answer); {
			case err != nil:
				t.Errorf("%s: %v", path, err)
			case leaves && text != "":
				t.Errorf("%s: a client that left got %s", path, text)
			case !leaves && (!strings.HasPrefix(text, "HTTP/1.1 503 ") || !strings.Contains(text, "\r\nRetry-After: ")):
				t.Errorf("%s: a client that was too slow got %s", path, text)
			}
		}
	}
	p.await("said in the log why", 5*time.Second, func() bool { return strings.Count(p.log.String(), `cause="the time for this request is up"`) == 3 })
}

// TestBodyTooLarge: a client that looks for the answer only when it has sent everything finds that its body was too large, and not
// a broken connection, after which it would send the same again.
func TestBodyTooLarge(t *testing.T) {
	t.Parallel()
	p := startProgram(t, newSpace(t))
	for path, size := range map[string]int{onePath: maxSingleBody + 1, bulkPath: 2 * maxBulkBody, "/v1/batch": 2 * maxBulkBody} {
		conn, err := net.Dial("tcp", strings.TrimPrefix(p.url, "http://"))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		conn.SetDeadline(time.Now().Add(20 * time.Second))
		_, err = fmt.Fprintf(conn, "POST %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s", path, size, strings.Repeat(" ", size))
		answer, _ := io.ReadAll(conn)
		if err != nil || !bytes.HasPrefix(answer, []byte("HTTP/1.1 413 ")) {
			t.Errorf("%s: sent: %v, answer: %s", path, err, answer)
		}
	}
}
