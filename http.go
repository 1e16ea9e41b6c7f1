// The HTTP server: routes, time limits, and the form of every answer.
//
// http.go owns the route table, what every request has (an id, a place in the counters and in the log), and the
// append-style writers that ingest.go and query.go answer with. Every answer is JSON with a Content-Length, every error
// has an "error" string and the request's id. It asks access.go who is let in, and writes the answer to the others. It owns the bound on
// the connections of clients.

package main

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net/http"
	"net/url"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"github.com/event-ingestion/event-ingestion/internal/conns"
)

const (
	typeJSON   = "application/json"
	typeNDJSON = "application/x-ndjson"
	typeText   = "text/plain"
)

// retryAfterSeconds is how long a refused client should wait: about the time of a broker's failover.
const retryAfterSeconds = "2"

const (
	// faultAgain is the time between two lines about requests that fail in the same way; the second one says how many there were.
	faultAgain = time.Minute
	// maxFaults bounds the ways that are remembered; beyond it all are forgotten and logged anew. Causes of our own are few.
	maxFaults = 200
)

// route is one line of the API: a method, a path, its handler, and the name of its counters.
type route struct {
	method, path, name string
	handler            http.HandlerFunc
}

// newServer returns the API's server, not yet listening. Unknown paths get 404, known paths with another method 405.
func newServer(addr string, routes []route, cfg *settings, ac *access, st *stats) *http.Server {
	mux := http.NewServeMux()
	methods := map[string][]string{}
	for _, rt := range routes {
		counts := st.route(rt.name)
		mux.HandleFunc(rt.method+" "+rt.path, func(w http.ResponseWriter, r *http.Request) {
			w.(*exchange).route = counts
			if rt.method == http.MethodGet && r.ContentLength != 0 {
				// Over HTTP/2 a MiB of it would lie in memory, in nobody's budget, for as long as the answer takes.
				writeError(w, http.StatusBadRequest, "invalid request", r.Method+" has no body here")
				return
			}
			rt.handler(w, r)
		})
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
	mux.HandleFunc("/", notFound)
	other, logged := st.route("other"), &requestLog{share: cfg.accessLog}
	return &http.Server{
		Addr: addr,
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			x := &exchange{ResponseWriter: w, route: other, started: time.Now()}
			x.begin(r)
			if len(r.URL.Path) <= maxPath {
				if tidy := tidyPath(r.URL.Path); tidy != r.URL.Path {
					r.URL.Path, r.URL.RawPath = tidy, ""
				}
			}
			var instead verdict
			x.client, instead = ac.admits(x.Header(), r)
			switch p := r.URL.Path; {
			case instead.status != 0:
				writeVerdict(x, instead)
			case p == "" || p[0] != '/' || len(p) > maxPath || len(p) > 1 && path.Clean(p) != strings.TrimSuffix(p, "/"):
				notFound(x, r) // the mux would answer an unclean path with an HTML redirect
			default:
				mux.ServeHTTP(x, r)
			}
			x.end(r, logged)
			if x.status == 0 { // the client seems gone: the server would tell it 200
				panic(http.ErrAbortHandler)
			}
		}),
		ReadHeaderTimeout: readHeaderTimeout,
		ReadTimeout:       cfg.readTimeout,
		WriteTimeout:      cfg.writeTimeout,
		IdleTimeout:       cfg.idleTimeout,
		MaxHeaderBytes:    maxHeaderBytes - 4<<10, // net/http adds as much
		TLSConfig:         ac.tls,
		ConnState:         newConnections(cfg, st).Changed,
		ErrorLog:          slog.NewLogLogger(slog.Default().Handler(), slog.LevelDebug), // what clients do wrong
	}
}

// newConnections counts the connections of clients, of which there are so many at the most.
func newConnections(cfg *settings, st *stats) *conns.Limit {
	closed := st.set.NewCounter(st.named("event_ingestion_connections_closed_total", "Connections of clients that were closed because there were more than MAX_CONNECTIONS."))
	limit := conns.New(cfg.maxConnections, cfg.tlsCertFile != "", closed.Inc)
	st.set.NewGauge(st.named("event_ingestion_connections", "Connections of clients at the moment."), func() float64 { return float64(limit.Open()) })
	return limit
}

// exchange is one request and its answer: the writer that every handler gets, with what is to be counted and logged.
type exchange struct {
	http.ResponseWriter
	id      string // X-Request-Id
	route   *routeStats
	client  client // by its key; zero without a valid one
	status  int
	cause   string // of an error
	noted   bool   // the events that are refused have been counted
	started time.Time
}

// requestID is what is taken from a client as X-Request-Id: nothing that could forge a line of the log.
var requestID = regexp.MustCompile(`^[0-9A-Za-z._-]{1,64}$`)

// begin names the request: as the client did, or at random.
func (x *exchange) begin(r *http.Request) {
	if given := r.Header["X-Request-Id"]; len(given) == 1 && requestID.MatchString(given[0]) {
		x.id = given[0]
	} else {
		x.id = hex.EncodeToString(binary.BigEndian.AppendUint64(nil, rand.Uint64()))
	}
	x.Header()["X-Request-Id"] = []string{x.id}
}

// end counts the request and, when it is its turn, logs it.
func (x *exchange) end(r *http.Request, logged *requestLog) {
	took := time.Since(x.started)
	x.route.count(x.status, took)
	times := logged.takes(x.status, x.route.name, x.cause)
	if times > 0 && x.route.name != "ready" { // which answers 503 until it is
		line := []any{"id", x.id, "method", r.Method, "path", r.URL.Path, "status", x.status, "ms", float64(took.Microseconds()) / 1000, "from", r.RemoteAddr}
		if x.cause != "" && x.status >= http.StatusInternalServerError { // others' may have what was sent
			line = append(line, "cause", x.cause)
		}
		if times > 1 {
			line = append(line, "times", times)
		}
		slog.Info("request", line...)
	}
}

// requestLog decides which requests are logged: a share of all, and of those that fail in the same way one a minute.
type requestLog struct {
	share float64    // ACCESS_LOG
	mu    sync.Mutex // guards told
	told  map[fault]telling
}

// fault is a way to fail. cause is how its text begins, up to what may differ from request to request.
type fault struct {
	route  string
	status int
	cause  string
}

// telling is when a fault was logged, and how often it has happened since.
type telling struct {
	at    time.Time
	times int
}

// takes says whether the request is logged: 0 is no, and a larger number for how many it stands, with those that were not logged
// before it.
func (l *requestLog) takes(status int, route, cause string) (times int) {
	if status >= http.StatusInternalServerError {
		if end := strings.IndexAny(cause, ":0123456789"); end >= 0 {
			cause = cause[:end]
		}
		way, now := fault{route, status, cause}, time.Now()
		l.mu.Lock()
		defer l.mu.Unlock()
		t := l.told[way]
		if t.times++; now.Sub(t.at) >= faultAgain {
			times, t = t.times, telling{at: now}
		}
		if l.told == nil || len(l.told) >= maxFaults {
			l.told = map[fault]telling{}
		}
		l.told[way] = t
		return times
	}
	if l.share > 0 && rand.Float64() < l.share {
		return 1
	}
	return 0
}

// clientOf is who is charged for a request: whoever's key it has, else whoever sends from its address.
func clientOf(w http.ResponseWriter, r *http.Request) client {
	if x, ok := w.(*exchange); ok && x.client != (client{}) {
		return x.client
	}
	return clientAt(r.RemoteAddr)
}

func (x *exchange) WriteHeader(status int) {
	if x.status == 0 {
		x.status = status
	}
	x.ResponseWriter.WriteHeader(status)
}

func (x *exchange) Write(b []byte) (int, error) {
	if x.status == 0 {
		x.status = http.StatusOK
	}
	return x.ResponseWriter.Write(b)
}

// Unwrap is how http.ResponseController finds the connection's writer.
func (x *exchange) Unwrap() http.ResponseWriter { return x.ResponseWriter }

// jsonHeader is shared by every answer: setting the map entry directly saves the canonicalisation and the slice.
var jsonHeader = []string{typeJSON}

// writeJSON answers with the parts of a JSON text, one after the other.
func writeJSON(w http.ResponseWriter, status int, parts ...[]byte) {
	length := 0
	for _, part := range parts {
		length += len(part)
	}
	h := w.Header()
	h["Content-Type"] = jsonHeader
	h["Content-Length"] = []string{strconv.Itoa(length)}
	w.WriteHeader(status)
	for _, part := range parts {
		w.Write(part) // an error here means that the client is gone: nobody is left to tell
	}
}

// jsonOf is v as JSON, with characters of HTML as they are.
func jsonOf(v any) []byte {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	e.Encode(v) // to memory, of types that can be encoded
	return bytes.TrimSpace(b.Bytes())
}

// maxPath is more than any route has, in bytes: nothing looks at a longer path, and no answer repeats more of it.
const maxPath = 200

func notFound(w http.ResponseWriter, r *http.Request) {
	p := r.URL.Path
	if len(p) > maxPath {
		p = p[:maxPath] + "…"
	}
	writeError(w, http.StatusNotFound, "not found", "nothing is at "+p)
}

// noteCause says why a request fails, for its line in the log.
func noteCause(w http.ResponseWriter, cause string) {
	if x, ok := w.(*exchange); ok {
		x.cause = cause
	}
}

// writeError answers {"error":…,"detail":…}.
func writeError(w http.ResponseWriter, status int, message, detail string) {
	cause := cmp.Or(detail, message)
	if status < http.StatusInternalServerError && detail != "" {
		cause = message + ": " + detail
	}
	noteCause(w, cause)
	b := append(make([]byte, 0, 256), `{"error":`...)
	b = appendString(b, message)
	if detail != "" {
		b = append(b, `,"detail":`...)
		b = appendString(b, strings.ToValidUTF8(detail, "�"))
	}
	writeJSON(w, status, appendRequestID(b, w))
}

// writeVerdict answers what access has decided.
func writeVerdict(w http.ResponseWriter, v verdict) {
	switch v.status {
	case http.StatusNoContent:
		w.WriteHeader(v.status)
		return
	case http.StatusUnauthorized:
		w.Header().Set("WWW-Authenticate", `Bearer realm="event-ingestion"`)
	}
	writeError(w, v.status, v.message, v.detail)
}

// onlyOurHosts lets through what has a Host of ours, whether there are keys or not: the admin listener has no other control.
func onlyOurHosts(ac *access, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !ac.hasHost(r.Host, localAddress(r)) {
			writeVerdict(w, misdirected(r))
			return
		}
		next.ServeHTTP(w, r)
	})
}

func writeUnavailable(w http.ResponseWriter, detail string) {
	w.Header().Set("Retry-After", retryAfterSeconds)
	writeError(w, http.StatusServiceUnavailable, "service unavailable", detail)
}

// writeProblems answers 400 with every broken rule.
func writeProblems(w http.ResponseWriter, problems []problem) {
	noteCause(w, problems[0].message)
	b := append(make([]byte, 0, 512), `{"error":"validation failed","errors":[`...)
	b = append(appendProblems(b, problems, "{", "message"), ']')
	writeJSON(w, http.StatusBadRequest, appendRequestID(b, w))
}

// appendRequestID ends an error's object with the request's id.
func appendRequestID(b []byte, w http.ResponseWriter) []byte {
	if id := w.Header()["X-Request-Id"]; len(id) == 1 { // w may be what compresses pages, and no exchange
		b = append(b, `,"request_id":"`...)
		b = append(b, id[0]...)
		b = append(b, '"')
	}
	return append(b, '}')
}

// appendProblems appends an object for each problem, which begins with first and has the message under this name.
func appendProblems(dst []byte, problems []problem, first, message string) []byte {
	for i, p := range problems {
		if i > 0 {
			dst = append(dst, ',')
		}
		dst = append(dst, first...)
		dst = append(dst, `"field":`...)
		dst = appendString(dst, p.field)
		dst = append(dst, `,"code":"`...)
		dst = append(dst, p.code...)
		dst = append(dst, `","`...)
		dst = append(dst, message...)
		dst = append(dst, `":`...)
		dst = appendString(dst, p.message)
		dst = append(dst, '}')
	}
	return dst
}

// queryCheck collects what is wrong with the parameters of a request.
type queryCheck struct {
	values   url.Values
	problems []problem
	noRange  bool // from or to is wrong by itself
}

// memberPrefix begins what names a member of metadata. memberParameters, where it is known, stands for all such names.
const (
	memberPrefix     = "metadata."
	memberParameters = memberPrefix + "PATH"
)

// newQueryCheck parses a query that may have each known parameter once. Unknown ones are named in alphabetical order, so that
// the answer does not depend on chance.
func newQueryCheck(rawQuery string, known ...string) *queryCheck {
	v, err := url.ParseQuery(rawQuery)
	c := &queryCheck{values: v}
	if err != nil { // it leaves out what it cannot parse
		c.fail("query", codeInvalidFormat, "cannot be parsed: "+err.Error())
	}
	for _, name := range slices.Sorted(maps.Keys(v)) {
		switch {
		case !slices.Contains(known, name) && !(strings.HasPrefix(name, memberPrefix) && slices.Contains(known, memberParameters)):
			c.fail(name, codeInvalidFormat, "is not a parameter; there are "+cmp.Or(strings.Join(known, ", "), "none"))
		case len(v[name]) > 1:
			c.fail(name, codeInvalidFormat, "appears more than once")
		}
	}
	return c
}

func (c *queryCheck) fail(field, code, message string) {
	if len(c.problems) < maxProblems {
		c.problems = append(c.problems, problem{field, code, field + " " + message})
	}
}

// text reads a parameter that may be absent.
func (c *queryCheck) text(name string) string {
	s := c.values.Get(name)
	if !utf8.ValidString(s) {
		c.fail(strings.ToValidUTF8(name, "�"), codeInvalidFormat, "is not valid UTF-8 text")
	}
	return s
}

// seconds reads a required parameter.
func (c *queryCheck) seconds(name string) int64 {
	s := c.values.Get(name)
	n, err := strconv.ParseInt(s, 10, 64)
	switch {
	case s == "":
		c.fail(name, codeRequired, "is required")
	case err != nil:
		c.fail(name, codeInvalidFormat, "must be an integer of Unix seconds")
	case n >= minMilliseconds:
		c.fail(name, codeInvalidFormat, "looks like milliseconds or finer, send Unix seconds")
	default:
		return n
	}
	c.noRange = true
	return 0
}
