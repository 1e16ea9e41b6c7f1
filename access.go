// Who may call the API: keys, the browsers' origins, the certificate.
//
// access.go owns what can change while the program runs: SIGHUP reads the keys and the certificate again.

package main

import (
	"crypto/sha256"
	"crypto/subtle"
	"crypto/tls"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"time"
)

// access decides about requests before they reach a handler.
type access struct {
	keys      atomic.Pointer[[][sha256.Size]byte] // hashes of API_KEYS: all have one length, so comparing tells nothing
	origins   []string
	cert      atomic.Pointer[tls.Certificate]
	tls       *tls.Config // nil without TLS
	logShare  float64     // ACCESS_LOG
	faultLogs atomic.Int64
	second    atomic.Int64 // that faultLogs counts in
}

// maxFaultLogs is how many failed requests are logged a second.
const maxFaultLogs = 10

func newAccess(cfg *settings) (*access, error) {
	a := &access{origins: cfg.corsOrigins, logShare: cfg.accessLog}
	if err := a.load(cfg); err != nil {
		return nil, err
	}
	if cfg.tlsCertFile != "" {
		a.tls = &tls.Config{
			MinVersion:     tls.VersionTLS12,
			NextProtos:     []string{"h2", "http/1.1"},
			GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return a.cert.Load(), nil },
		}
	}
	if ip := net.ParseIP(cfg.serverHost); len(cfg.apiKeys) == 0 && cfg.serverHost != "localhost" && (ip == nil || !ip.IsLoopback()) {
		slog.Warn("the API listens beyond loopback and lets everybody in; set API_KEYS, or SERVER_HOST=127.0.0.1")
	}
	return a, nil
}

// load takes in keys and certificate; on an error everything stays as it was.
func (a *access) load(cfg *settings) error {
	var cert tls.Certificate
	if cfg.tlsCertFile != "" {
		var err error
		if cert, err = tls.LoadX509KeyPair(cfg.tlsCertFile, cfg.tlsKeyFile); err != nil {
			return fmt.Errorf("load the certificate (TLS_CERT_FILE, TLS_KEY_FILE): %w", err)
		}
	}
	hashes := make([][sha256.Size]byte, len(cfg.apiKeys))
	for i, k := range cfg.apiKeys {
		hashes[i] = sha256.Sum256([]byte(k))
	}
	a.cert.Store(&cert)
	a.keys.Store(&hashes)
	return nil
}

// reload is what SIGHUP does: keys and certificate as the settings and files are now. Everything else needs a restart.
func (a *access) reload() {
	cfg, err := loadSettings(os.Getenv)
	if err == nil && len(cfg.apiKeys) == 0 && len(*a.keys.Load()) > 0 {
		err = fmt.Errorf("there are no API_KEYS any more; opening the API needs a restart")
	}
	if err == nil {
		err = a.load(cfg)
	}
	if err != nil {
		slog.Error("keys and certificate stay as they were", "error", err)
		return
	}
	slog.Info("read again", "api_keys", len(cfg.apiKeys), "certificate", cfg.tlsCertFile)
}

// admits lets a request through, or answers it: a browser's preflight, or one without a valid key.
func (a *access) admits(w http.ResponseWriter, r *http.Request) bool {
	if origin := r.Header.Get("Origin"); len(a.origins) > 0 {
		h := w.Header()
		h.Add("Vary", "Origin") // also without one: a cache must not give this answer to a page
		if origin != "" && (slices.Contains(a.origins, "*") || slices.Contains(a.origins, origin)) {
			h.Set("Access-Control-Allow-Origin", origin)
			h.Set("Access-Control-Expose-Headers", "Retry-After, X-Request-Id")
			if r.Method == http.MethodOptions && r.Header.Get("Access-Control-Request-Method") != "" {
				h.Set("Access-Control-Allow-Methods", "GET, HEAD, POST")
				// X-Retry-Count is what Segment's client for browsers adds when it sends again.
				h.Set("Access-Control-Allow-Headers", "Authorization, Content-Encoding, Content-Type, X-API-Key, X-Request-Id, X-Retry-Count")
				h.Set("Access-Control-Max-Age", "600")
				w.WriteHeader(http.StatusNoContent)
				return false
			}
		}
	}
	given := keyOf(r)
	switch {
	case strings.HasPrefix(r.URL.Path, "/api/"):
	case strings.HasPrefix(r.URL.Path, "/v1/") && given != "": // else segment.go looks for it in the body
	default:
		return true
	}
	if a.knows(given) {
		return true
	}
	a.refuse(w, given)
	return false
}

// keyOf is the key in a request's header, empty when there is none. Segment's clients send it as a user without a password.
func keyOf(r *http.Request) string {
	if key := r.Header.Get("X-API-Key"); key != "" {
		return key
	}
	if user, _, ok := r.BasicAuth(); ok && strings.HasPrefix(r.URL.Path, "/v1/") {
		return user
	}
	if scheme, token, _ := strings.Cut(r.Header.Get("Authorization"), " "); strings.EqualFold(scheme, "Bearer") {
		return strings.TrimSpace(token)
	}
	return ""
}

// knows says whether a key lets its sender in; without API_KEYS any does.
func (a *access) knows(given string) bool {
	keys := *a.keys.Load()
	hash, valid := sha256.Sum256([]byte(given)), 0
	for i := range keys { // all of them, so that the time does not say which
		valid |= subtle.ConstantTimeCompare(hash[:], keys[i][:])
	}
	return valid == 1 || len(keys) == 0
}

// refuse answers a request whose key is not known.
func (a *access) refuse(w http.ResponseWriter, given string) {
	w.Header().Set("WWW-Authenticate", `Bearer realm="event-ingestion"`)
	detail := "the key is not valid"
	if given == "" {
		detail = "send a key as Authorization: Bearer KEY, or as X-API-Key: KEY"
	}
	writeError(w, http.StatusUnauthorized, "unauthorized", detail)
}

// logs decides whether a request is logged.
func (a *access) logs(status int) bool {
	if status >= http.StatusInternalServerError {
		now := time.Now().Unix()
		if a.second.Swap(now) != now {
			a.faultLogs.Store(0)
		}
		if a.faultLogs.Add(1) <= maxFaultLogs {
			return true
		}
	}
	return a.logShare > 0 && rand.Float64() < a.logShare
}
