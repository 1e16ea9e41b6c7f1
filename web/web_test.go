// The pages by themselves: what is served, how, and what is not.

package web

import (
	"compress/gzip"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"net/url"
	"regexp"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/event-ingestion/event-ingestion/internal/testkit"
)

// mounted is all pages as a server has them.
func mounted() *http.ServeMux {
	mux := http.NewServeMux()
	for pattern, page := range Pages(func(w http.ResponseWriter, r *http.Request) {
		http.Error(w, "whoever mounts it says so", http.StatusNotFound)
	}) {
		mux.Handle("GET "+pattern, page)
		mux.Handle(pattern, http.NotFoundHandler()) // as the program answers other methods
	}
	return mux
}

func TestPages(t *testing.T) {
	mux := mounted()
	get := func(path string, headers ...string) (*http.Response, string) {
		r := httptest.NewRequest("GET", path, nil)
		for i := 0; i < len(headers); i += 2 {
			r.Header.Set(headers[i], headers[i+1])
		}
		w := httptest.NewRecorder()
		mux.ServeHTTP(w, r)
		body, _ := io.ReadAll(w.Result().Body)
		return w.Result(), string(body)
	}
	for path, has := range map[string]string{
		"/": "<!doctype html>", "/web/ask.js": "fetch(", "/web/icon.svg": "<svg", "/web/app.css": "{",
		"/swagger/index.html": "swagger-ui", "/swagger/swagger-initializer.js": "openapi.json", "/swagger/swagger-ui-bundle.js": "function",
	} {
		resp, body := get(path)
		if resp.StatusCode != http.StatusOK || !strings.Contains(body, has) || resp.Header.Get("Content-Security-Policy") == "" {
			t.Errorf("%s: %d %v", path, resp.StatusCode, resp.Header)
		}
		if resp, _ := get(path, "If-None-Match", resp.Header.Get("ETag")); resp.StatusCode != http.StatusNotModified {
			t.Errorf("%s again: %d", path, resp.StatusCode)
		}
	}
	if resp, _ := get("/web/app.js", "Accept-Encoding", "gzip"); resp.Header.Get("Content-Encoding") != "gzip" {
		t.Error("not compressed for a browser that takes it")
	}
	for _, path := range []string{"/web/none", "/web/web.go", "/web/web_test.go", "/swagger/none.js", "/swagger/web.go"} {
		if resp, body := get(path); resp.StatusCode != http.StatusNotFound || !strings.HasPrefix(body, "whoever mounts it") {
			t.Errorf("%s: %d %s", path, resp.StatusCode, body)
		}
	}
	for _, path := range []string{"/swagger", "/swagger/"} {
		resp, _ := get(path)
		for _, below := range []string{"", "/analytics", "/a/b"} { // where a proxy may have put the pages
			to, err := (&url.URL{Path: below + path}).Parse(resp.Header.Get("Location"))
			if err != nil || resp.StatusCode != http.StatusFound || to.Path != below+"/swagger/index.html" {
				t.Errorf("%s%s leads to %v: %d %v", below, path, to, resp.StatusCode, err)
			}
		}
	}
	_, document := get("/swagger/openapi.json")
	for _, example := range []string{exampleNow, exampleISO, exampleYesterday} {
		if strings.Contains(document, example) {
			t.Errorf("an example is of %s, not of now", example)
		}
	}
	if !json.Valid([]byte(document)) {
		t.Error("the document is not JSON")
	}
}

// TestRelative: no page, script or style has an address that begins at the root of its host, so that all of them work below any path.
// The document's routes are relative to its server, which is the directory above it.
func TestRelative(t *testing.T) {
	rooted := regexp.MustCompile(`(?:src|href|action)=["']?/|["'` + "`" + `(}]/(?:api|v1|web|swagger|health|ready)\b|location\.(?:origin|host)|url\(["']?/`)
	for _, line := range []string{`<a href="/swagger/index.html">`, "call(`/api/v1/overview?x`)", "fetch('/api/v1/events')", "`${location.origin}/api`", `url(/web/x.svg)`} {
		if !rooted.MatchString(line) {
			t.Errorf("%s is not found", line)
		}
	}
	files, err := fs.Glob(embedded, "*")
	if err != nil || len(files) < 7 {
		t.Fatal(files, err)
	}
	for _, name := range files {
		b, err := embedded.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if name == "openapi.json" {
			var document struct{ Servers []struct{ URL string } }
			if err := json.Unmarshal(b, &document); err != nil || len(document.Servers) != 1 || document.Servers[0].URL != ".." {
				t.Errorf("the document's servers: %v %v", document.Servers, err)
			}
		} else if found := rooted.Find(b); found != nil {
			t.Errorf("%s: %s", name, found)
		}
	}
}

// TestForms: what a client asks for is what it gets: compressed or not, whole or a part, or that it has it already.
func TestForms(t *testing.T) {
	mux := mounted()
	ask := func(method string, headers ...string) *http.Response {
		r := httptest.NewRequest(method, "/swagger/swagger-ui-bundle.js", nil)
		for i := 0; i < len(headers); i += 2 {
			r.Header.Add(headers[i], headers[i+1])
		}
		w := httptest.NewRecorder()
		mux.ServeHTTP(w, r)
		return w.Result()
	}
	text := func(resp *http.Response) string { b, _ := io.ReadAll(resp.Body); return string(b) }
	first := ask("GET")
	plain, tag := text(first), first.Header.Get("ETag")
	packed := ask("GET", "Accept-Encoding", "br, gzip;q=0.5")
	gzipTag := packed.Header.Get("ETag")
	if length := packed.Header.Get("Content-Length"); length != fmt.Sprint(len(text(ask("GET", "Accept-Encoding", "gzip")))) || gzipTag == tag {
		t.Errorf("compressed: length %s, tags %s and %s", length, tag, gzipTag)
	}
	if z, err := gzip.NewReader(packed.Body); err != nil {
		t.Error(err)
	} else if b, err := io.ReadAll(z); err != nil || string(b) != plain {
		t.Errorf("unpacked: %d bytes, %v", len(b), err)
	}
	for accepts, want := range map[string]string{
		"gzip": "gzip", "x-gzip": "gzip", "GZIP ; q=1": "gzip", "*": "gzip", "deflate, *;q=0.1": "gzip", "gzip;q=0.001": "gzip",
		"": "", "gzip;q=0": "", "gzip; q=0.000": "", "*;q=0": "", "gzip;q=0, *": "", "br": "", "identity": "", ",;=,": "",
	} {
		if got := ask("HEAD", "Accept-Encoding", accepts).Header; got.Get("Content-Encoding") != want || got.Get("Vary") != "Accept-Encoding" {
			t.Errorf("%q: %q, %v", accepts, got.Get("Content-Encoding"), got)
		}
	}
	for _, c := range []struct {
		headers []string
		status  int
	}{
		{[]string{"If-None-Match", tag}, 304}, {[]string{"If-None-Match", "W/" + tag}, 304}, {[]string{"If-None-Match", `"a", W/"b",` + tag}, 304},
		{[]string{"If-None-Match", `"a"`, "If-None-Match", tag}, 304}, {[]string{"If-None-Match", "*"}, 304},
		{[]string{"If-None-Match", gzipTag}, 200}, {[]string{"If-None-Match", tag, "Accept-Encoding", "gzip"}, 200},
		{[]string{"If-None-Match", "W/" + gzipTag, "Accept-Encoding", "gzip"}, 304}, {[]string{"If-None-Match", tag[1:]}, 200}, {[]string{"If-None-Match", `"a"`}, 200},
	} {
		resp := ask("GET", c.headers...)
		if body := text(resp); resp.StatusCode != c.status || c.status != 200 && (body != "" || resp.Header.Get("Content-Encoding") != "" || resp.Header.Get("Content-Length") != "") {
			t.Errorf("%q: %d, %d bytes, %v", c.headers, resp.StatusCode, len(body), resp.Header)
		}
	}
	for asked, want := range map[string]string{
		"bytes=0-9": plain[:10], "bytes=100-199": plain[100:200], "bytes=-10": plain[len(plain)-10:], fmt.Sprintf("bytes=%d-", len(plain)-5): plain[len(plain)-5:],
		"bytes=0-": plain, "bytes=0-99999999": plain,
		// A server may leave out what it does not serve in parts.
		"bytes=0-0,5-5": plain, "bytes=9-2": plain, "bytes=99999999-": plain, "bytes=-0": plain, "bytes=-": plain, "bytes=a-b": plain, "lines=1-2": plain,
	} {
		resp := ask("GET", "Range", asked, "Accept-Encoding", "identity")
		if got := text(resp); got != want || (resp.StatusCode == 206) != (resp.Header.Get("Content-Range") != "") {
			t.Errorf("%s: %d, %d bytes instead of %d", asked, resp.StatusCode, len(got), len(want))
		}
	}
	if resp := ask("GET", "Range", "bytes=0-9", "If-Range", `"a"`); text(resp) != plain {
		t.Errorf("a part of another version: %d", resp.StatusCode)
	}
}

// Limits of what an answer costs beside what net/http needs.
const (
	maxAnswerTime  = 300 * time.Microsecond
	maxAnswerBytes = 4 << 10
)

// shapes are requests that anybody may send.
var shapes = map[string][]string{
	"plain": nil, "gzip": {"Accept-Encoding", "gzip"}, "part": {"Range", "bytes=1-"}, "end": {"Range", "bytes=-1000000"},
	"many parts": {"Range", "bytes=0-0" + strings.Repeat(",1-1", 3000)}, "many parts of all": {"Range", "bytes=0-" + strings.Repeat(",0-", 3000)},
	"tags": {"If-None-Match", `"a"` + strings.Repeat(`,"a"`, 3000)}, "codings": {"Accept-Encoding", strings.Repeat("a;q=0,", 2000)},
}

// nowhere is a client that forgets what it reads.
type nowhere struct {
	header http.Header
	size   int
}

func (n *nowhere) Header() http.Header         { return n.header }
func (n *nowhere) WriteHeader(int)             {}
func (n *nowhere) Write(b []byte) (int, error) { n.size += len(b); return len(b), nil }

// TestCost: once a page has been made, an answer takes little CPU and no memory of its own.
func TestCost(t *testing.T) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	mux := mounted()
	for _, path := range []string{"/", "/web/app.js", "/web/none", "/swagger", "/swagger/index.html", "/swagger/openapi.json", "/swagger/swagger-ui-bundle.js", "/swagger/swagger-ui.css", "/swagger/none"} {
		for name, headers := range shapes {
			r := httptest.NewRequest("GET", path, nil)
			for i := 0; i < len(headers); i += 2 {
				r.Header.Set(headers[i], headers[i+1])
			}
			ask := func() { mux.ServeHTTP(&nowhere{header: http.Header{}}, r) }
			ask()
			best := testkit.LeastThreadTime(ask)
			const times = 20
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			for range times {
				ask()
			}
			runtime.ReadMemStats(&after)
			bytes := int(after.TotalAlloc-before.TotalAlloc) / times
			if best > maxAnswerTime && best > testkit.Here(maxAnswerTime) || bytes > maxAnswerBytes {
				t.Errorf("%s, %s: %s and %d bytes", path, name, best, bytes)
			}
		}
	}
}

// entered counts the answers that are being written.
type entered struct {
	http.ResponseWriter
	writes *atomic.Int32
	once   bool
}

func (e *entered) Write(b []byte) (int, error) {
	if !e.once {
		e.once = true
		e.writes.Add(1)
	}
	return e.ResponseWriter.Write(b)
}

// TestUnread: clients that ask for much over HTTP/2 and let nothing through hold no page in memory for each of their requests.
func TestUnread(t *testing.T) {
	const conns, streams, maxHeld = 2, 100, 24 << 10 // bytes a request: a goroutine, a stream and its buffers
	mux := mounted()
	var writes atomic.Int32
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mux.ServeHTTP(&entered{ResponseWriter: w, writes: &writes}, r)
	}))
	server.EnableHTTP2 = true
	server.StartTLS()
	defer server.Close()
	for _, path := range []string{"/swagger/swagger-ui-bundle.js", "/swagger/openapi.json"} {
		mux.ServeHTTP(&nowhere{header: http.Header{}}, httptest.NewRequest("GET", path, nil)) // is made
		writes.Store(0)
		before := heap()
		var open []io.Closer
		for range conns {
			conn, err := tls.Dial("tcp", server.Listener.Addr().String(), &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}})
			if err != nil {
				t.Fatal(err)
			}
			open = append(open, conn)
			frame := func(kind, flags byte, stream int, payload string) []byte {
				n := len(payload)
				return append([]byte{0, byte(n >> 8), byte(n), kind, flags, 0, 0, byte(stream >> 8), byte(stream)}, payload...)
			}
			b := append([]byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"), frame(4, 0, 0, "\x00\x04\x00\x00\x00\x00")...) // SETTINGS: a window of 0
			b = append(b, frame(4, 1, 0, "")...)                                                                   // and theirs are taken
			for i := range streams {
				// GET, https, the path, the authority; the end of header and request
				b = append(b, frame(1, 5, 2*i+1, "\x82\x87\x04"+string(rune(len(path)))+path+"\x01\x01x")...)
			}
			if _, err := conn.Write(b); err != nil {
				t.Fatal(err)
			}
			go io.Copy(io.Discard, conn) // ends with the connection
		}
		for deadline := time.Now().Add(20 * time.Second); writes.Load() < conns*streams; time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("%d of %d answers are written", writes.Load(), conns*streams)
			}
		}
		if held := (heap() - before) / (conns * streams); held > maxHeld {
			t.Errorf("%s: %d bytes for each answer that nobody reads", path, held)
		} else {
			t.Logf("%s: %d bytes", path, held)
		}
		for _, conn := range open {
			conn.Close()
		}
		for deadline := time.Now().Add(20 * time.Second); runtime.NumGoroutine() > 20 && time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		}
	}
}

// heap is what is in use after a collection.
func heap() int {
	var m runtime.MemStats
	runtime.GC()
	runtime.GC() // also what pools kept
	runtime.ReadMemStats(&m)
	return int(m.HeapAlloc + m.StackInuse)
}
