// The pages by themselves: what is served, how, and what is not.

package web

import (
	"encoding/json"
	"io"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"net/url"
	"regexp"
	"strings"
	"testing"
)

func TestPages(t *testing.T) {
	mux := http.NewServeMux()
	for pattern, page := range Pages(func(w http.ResponseWriter, r *http.Request) {
		http.Error(w, "whoever mounts it says so", http.StatusNotFound)
	}) {
		mux.Handle("GET "+pattern, page)
	}
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
		"/": "<!doctype html>", "/web/app.js": "fetch(", "/web/icon.svg": "<svg", "/web/app.css": "{",
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
