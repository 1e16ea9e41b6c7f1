// Who may call the API: keys, the browsers' origins, the certificate.
//
// access.go decides, and http.go answers. It owns what can change while the program runs: SIGHUP reads the keys and the
// certificate again.

package main

import (
	"crypto/sha256"
	"crypto/tls"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"slices"
	"strings"
	"sync/atomic"
)

// segmentPrefix is where the routes of Segment's protocol are.
const segmentPrefix = "/v1/"

// tidyPath is a path without the slashes that Segment's clients put at the end or double, as they join a host and a path; that of
// another route as it is. It comes before everything that looks at a path.
func tidyPath(path string) string {
	if !strings.Contains(path, "//") && !strings.HasSuffix(path, "/") { // Fast path
		return path
	}
	parts := strings.FieldsFunc(path, func(r rune) bool { return r == '/' })
	if tidy := "/" + strings.Join(parts, "/"); strings.HasPrefix(path, "/") && strings.HasPrefix(tidy, segmentPrefix) {
		return tidy
	}
	return path
}

// access decides about requests before they reach a handler.
type access struct {
	keys    atomic.Pointer[map[client]rights] // by the key's hash; empty lets everybody do everything
	origins []string
	hosts   []string // that requests may be for, beside those of loopback; lower case
	cert    atomic.Pointer[tls.Certificate]
	tls     *tls.Config // nil without TLS
}

// rights is what a key allows.
type rights int

const (
	mayNothing rights = iota
	maySend           // sends events and reads nothing: a key in a page is public
	mayAll
)

// client identifies a sender: by the hash of a valid key, else by address. An IPv6 address counts as its /64 network,
// because one host has all of it.
type client [sha256.Size]byte

// clientAt is whoever sends from an address, as of http.Request.RemoteAddr. Behind a proxy, that is the proxy's.
func clientAt(remoteAddr string) (c client) {
	from, err := netip.ParseAddrPort(remoteAddr)
	if err != nil {
		return client{} // a socket without addresses: all its clients count as one
	}
	addr := from.Addr().Unmap()
	network, _ := addr.Prefix(min(addr.BitLen(), 64)) // an address of IPv4 as it is
	bytes := network.Addr().As16()
	copy(c[:], bytes[:])
	return c
}

// verdict is what is to be answered instead of what was asked for; the zero value lets a request in.
type verdict struct {
	status          int
	message, detail string // of an error
}

func newAccess(cfg *settings) (*access, error) {
	a := &access{origins: cfg.corsOrigins, hosts: slices.Clone(cfg.allowedHosts)}
	if name, err := os.Hostname(); err == nil {
		short, _, _ := strings.Cut(name, ".")
		a.hosts = append(a.hosts, strings.ToLower(name), strings.ToLower(short))
	}
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
	if ip := net.ParseIP(cfg.serverHost); cfg.isOpen() && cfg.serverHost != "localhost" && (ip == nil || !ip.IsLoopback()) {
		slog.Warn("the API listens beyond loopback and lets everybody in; set API_KEYS and WRITE_KEYS, or SERVER_HOST=127.0.0.1")
	}
	return a, nil
}

// load replaces the keys and the certificate; on an error both stay as they were.
func (a *access) load(cfg *settings) error {
	var cert tls.Certificate
	if cfg.tlsCertFile != "" {
		var err error
		if cert, err = tls.LoadX509KeyPair(cfg.tlsCertFile, cfg.tlsKeyFile); err != nil {
			return fmt.Errorf("load the certificate (TLS_CERT_FILE, TLS_KEY_FILE): %w", err)
		}
	}
	a.cert.Store(&cert)
	keys := map[client]rights{}
	for _, k := range cfg.writeKeys {
		keys[sha256.Sum256([]byte(k))] = maySend
	}
	for _, k := range cfg.apiKeys {
		keys[sha256.Sum256([]byte(k))] = mayAll
	}
	a.keys.Store(&keys)
	return nil
}

// reload is what SIGHUP does: it reads the keys and the certificate again. Everything else needs a restart.
func (a *access) reload() {
	cfg, err := loadSettings(os.Getenv)
	if err == nil && cfg.isOpen() && len(*a.keys.Load()) > 0 {
		err = fmt.Errorf("there are no keys any more; opening the API needs a restart")
	}
	if err == nil {
		err = a.load(cfg)
	}
	if err != nil {
		slog.Error("keys and certificate stay as they were", "error", err)
		return
	}
	slog.Info("read again", "api_keys", len(cfg.apiKeys), "write_keys", len(cfg.writeKeys), "certificate", cfg.tlsCertFile)
}

// admits decides about a request, and says whose key it has: none for a browser's preflight, for one from a page that may not send,
// and for one without a valid key. h are the answer's headers, which get what browsers have to know.
func (a *access) admits(h http.Header, r *http.Request) (client, verdict) {
	if len(*a.keys.Load()) == 0 {
		if local := localAddress(r); local.IsLoopback() && !a.hasHost(r.Host, local) {
			return client{}, misdirected(r)
		}
	}
	if v := a.crosses(h, r); v.status != 0 {
		return client{}, v
	}
	given := keyOf(r)
	inBody := strings.HasPrefix(r.URL.Path, segmentPrefix) && given == "" // where Segment's clients may have it
	if isOpen := !strings.HasPrefix(r.URL.Path, "/api/") && !strings.HasPrefix(r.URL.Path, segmentPrefix); isOpen || inBody {
		return client{}, verdict{}
	}
	may, key := a.rightsOf(given)
	switch {
	case may == mayAll, may == maySend && takesEvents(r):
		return key, verdict{}
	case may == maySend:
		return key, verdict{http.StatusForbidden, "forbidden", "this key is one of WRITE_KEYS and may only send events"}
	}
	return key, unknownKey(given)
}

// localAddress is that of this end of the request's connection.
func localAddress(r *http.Request) netip.Addr {
	to, _ := r.Context().Value(http.LocalAddrContextKey).(*net.TCPAddr)
	if to == nil {
		return netip.Addr{}
	}
	addr, _ := netip.AddrFromSlice(to.IP)
	return addr.Unmap()
}

// hasHost says whether a request over this local address may have this Host. Otherwise a page could read whatever loopback lets its
// reader see: it has its name lead to this machine for a moment, and is then of the same origin as what answers there. Only a name can be
// made to lead elsewhere, so that addresses are fine, but on loopback those of others. A client without a Host is no browser.
func (a *access) hasHost(given string, local netip.Addr) bool {
	host := strings.Trim(given, "[]")
	if name, _, err := net.SplitHostPort(given); err == nil {
		host = name
	}
	host = strings.ToLower(strings.TrimSuffix(host, "."))
	if host == "" || host == "localhost" || strings.HasSuffix(host, ".localhost") || slices.Contains(a.hosts, host) {
		return true
	}
	ip, err := netip.ParseAddr(host)
	return err == nil && (ip.Unmap().IsLoopback() || !local.IsLoopback())
}

func misdirected(r *http.Request) verdict {
	return verdict{http.StatusMisdirectedRequest, "misdirected request", fmt.Sprintf("ALLOWED_HOSTS does not have the host %.200q", r.Host)}
}

// crosses decides about a preflight, and whether the page that a request comes from may send it. The preflight of a page that may
// not is told what the request would be: a 401 would send whoever looks for the cause after the key.
func (a *access) crosses(h http.Header, r *http.Request) verdict {
	origin := r.Header.Get("Origin")
	if len(a.origins) > 0 {
		h.Add("Vary", "Origin") // also without an Origin: a cache must not give this answer to a page
	}
	if origin == "" {
		return verdict{}
	}
	_, host, _ := strings.Cut(origin, "://")
	isOwnPage := host != "" && host == r.Host // under the name that the client used
	switch method := r.Header.Get("Access-Control-Request-Method"); {
	case slices.Contains(a.origins, "*") || slices.Contains(a.origins, origin):
		h.Set("Access-Control-Allow-Origin", origin)
		h.Set("Access-Control-Expose-Headers", "Retry-After, X-Request-Id")
		if r.Method == http.MethodPost || method == http.MethodPost { // a beacon sends credentials; they are ignored here
			h.Set("Access-Control-Allow-Credentials", "true")
		}
		if r.Method == http.MethodOptions && method != "" {
			h.Set("Access-Control-Allow-Methods", "GET, HEAD, POST")
			// X-Retry-Count is what Segment's client for browsers adds when it sends again.
			h.Set("Access-Control-Allow-Headers", "Authorization, Content-Encoding, Content-Type, X-API-Key, X-Request-Id, X-Retry-Count")
			h.Set("Access-Control-Max-Age", "600")
			return verdict{status: http.StatusNoContent}
		}
	case !isOwnPage && (r.Method == http.MethodPost && isUnasked(r) || r.Method == http.MethodOptions && method != ""):
		return verdict{http.StatusForbidden, "forbidden", "pages of this origin may not send events: it is not in CORS_ORIGINS"}
	}
	return verdict{}
}

// isUnasked says whether a browser sends a POST of r's type from any page without asking first: of the types that a form can
// have, this API takes only text.
func isUnasked(r *http.Request) bool {
	given := r.Header.Get("Content-Type")
	media, _, _ := strings.Cut(given, ";")
	return given == "" || strings.EqualFold(strings.TrimSpace(media), "text/plain")
}

// takesEvents says whether a request goes to a route that takes events.
func takesEvents(r *http.Request) bool {
	p := r.URL.Path
	return r.Method == http.MethodPost && (p == "/api/v1/events" || p == "/api/v1/events/bulk" || strings.HasPrefix(p, segmentPrefix))
}

// keyOf returns the request's key, empty without one. Segment's clients send it as a user name without a password. A key in
// the URL ends up in browser histories and other people's logs, so it counts only where events are taken.
func keyOf(r *http.Request) string {
	if key := r.Header.Get("X-API-Key"); key != "" {
		return key
	}
	if user, _, ok := r.BasicAuth(); ok && strings.HasPrefix(r.URL.Path, segmentPrefix) {
		return user
	}
	if scheme, token, _ := strings.Cut(r.Header.Get("Authorization"), " "); strings.EqualFold(scheme, "Bearer") {
		return strings.TrimSpace(token)
	}
	if r.URL.RawQuery != "" && takesEvents(r) {
		key, _ := queryValue(r.URL.RawQuery, "key")
		return key
	}
	return ""
}

// queryValue returns the query's first value for name, empty when it cannot be decoded. It builds no map.
func queryValue(rawQuery, name string) (value string, is bool) {
	for pair := range strings.SplitSeq(rawQuery, "&") {
		if n, v, _ := strings.Cut(pair, "="); n == name {
			v, _ = url.QueryUnescape(v)
			return v, true
		}
	}
	return "", false
}

// mayKnow says whether whoever asks may know everything: keys are not set, or the request has one for all.
func (a *access) mayKnow(r *http.Request) bool {
	may, _ := a.rightsOf(keyOf(r))
	return may == mayAll
}

// rightsOf says what a key allows and whose it is. When no keys are set, everybody may do everything, and a key is nobody's. The
// time that looking up a hash takes tells nothing of the keys.
func (a *access) rightsOf(given string) (rights, client) {
	keys := *a.keys.Load()
	if len(keys) == 0 {
		return mayAll, client{}
	}
	hash := client(sha256.Sum256([]byte(given)))
	if may := keys[hash]; may != mayNothing {
		return may, hash
	}
	return mayNothing, client{}
}

// unknownKey is the verdict on a request whose key is not known, or absent.
func unknownKey(given string) verdict {
	if given == "" {
		return verdict{http.StatusUnauthorized, "unauthorized", "send a key as Authorization: Bearer KEY, or as X-API-Key: KEY"}
	}
	return verdict{http.StatusUnauthorized, "unauthorized", "the key is not valid"}
}
