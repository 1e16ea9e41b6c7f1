// The HTTP server: routes, time limits, and the form of every answer.
//
// http.go owns the route table and the append-style writers that ingest.go and query.go answer with. Every answer is
// JSON with a Content-Length, every error has an "error" string.

package main

import (
	"net/http"
	"path"
	"strconv"
	"strings"
	"time"
)

const (
	typeJSON   = "application/json"
	typeNDJSON = "application/x-ndjson"
)

// Limits of a connection. Read and write timeouts are settings.
const (
	maxHeaderBytes    = 16 << 10
	readHeaderTimeout = 5 * time.Second
	idleTimeout       = 2 * time.Minute
)

// route is one line of the API: a method, a path and who answers.
type route struct {
	method, path string
	handler      http.HandlerFunc
}

// newServer returns the API's server, not yet listening. Unknown paths get 404, known paths with another method 405.
func newServer(addr string, routes []route, cfg *settings) *http.Server {
	mux := http.NewServeMux()
	methods := map[string][]string{}
	for _, rt := range routes {
		mux.HandleFunc(rt.method+" "+rt.path, rt.handler)
		methods[rt.path] = append(methods[rt.path], rt.method)
		if rt.method == http.MethodGet {
			methods[rt.path] = append(methods[rt.path], http.MethodHead)
		}
	}
	for p, allowed := range methods {
		allow := strings.Join(allowed, ", ")
		mux.HandleFunc(p, func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Allow", allow)
			writeError(w, http.StatusMethodNotAllowed, "method not allowed", r.URL.Path+" takes "+allow)
		})
	}
	notFound := func(w http.ResponseWriter, r *http.Request) {
		writeError(w, http.StatusNotFound, "not found", "nothing is at "+r.URL.Path)
	}
	mux.HandleFunc("/", notFound)
	return &http.Server{
		Addr: addr,
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			// The mux would answer an unclean path with an HTML redirect.
			if p := r.URL.Path; p == "" || p[0] != '/' || len(p) > 1 && path.Clean(p) != strings.TrimSuffix(p, "/") {
				notFound(w, r)
				return
			}
			mux.ServeHTTP(w, r)
		}),
		ReadHeaderTimeout: readHeaderTimeout,
		ReadTimeout:       cfg.readTimeout,
		WriteTimeout:      cfg.writeTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeaderBytes,
	}
}

// jsonHeader is shared by every answer: setting the map entry directly saves the canonicalisation and the slice.
var jsonHeader = []string{typeJSON}

func writeJSON(w http.ResponseWriter, status int, body []byte) {
	h := w.Header()
	h["Content-Type"] = jsonHeader
	h["Content-Length"] = []string{strconv.Itoa(len(body))}
	w.WriteHeader(status)
	w.Write(body) // an error here means that the client is gone: nobody is left to tell
}

// writeError answers {"error":…,"detail":…}.
func writeError(w http.ResponseWriter, status int, message, detail string) {
	b := append(make([]byte, 0, 256), `{"error":`...)
	b = appendString(b, message)
	if detail != "" {
		b = append(b, `,"detail":`...)
		b = appendString(b, strings.ToValidUTF8(detail, "�"))
	}
	writeJSON(w, status, append(b, '}'))
}

func writeUnavailable(w http.ResponseWriter, detail string) {
	w.Header().Set("Retry-After", retryAfterSeconds)
	writeError(w, http.StatusServiceUnavailable, "service unavailable", detail)
}

// writeProblems answers 400 with every broken rule.
func writeProblems(w http.ResponseWriter, problems []problem) {
	b := append(make([]byte, 0, 512), `{"error":"validation failed","errors":`...)
	b = appendProblems(b, problems)
	writeJSON(w, http.StatusBadRequest, append(b, '}'))
}

func appendProblems(dst []byte, problems []problem) []byte {
	dst = append(dst, '[')
	for i, p := range problems {
		if i > 0 {
			dst = append(dst, ',')
		}
		dst = append(dst, `{"field":`...)
		dst = appendString(dst, p.field)
		dst = append(dst, `,"code":"`...)
		dst = append(dst, p.code...)
		dst = append(dst, `","message":`...)
		dst = appendString(dst, p.message)
		dst = append(dst, '}')
	}
	return append(dst, ']')
}
