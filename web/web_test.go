// The pages by themselves: what is served, how, and what is not.

package web

import (
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
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
		if resp, _ := get(path); resp.Header.Get("Location") != "/swagger/index.html" {
			t.Errorf("%s leads to %q", path, resp.Header.Get("Location"))
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
