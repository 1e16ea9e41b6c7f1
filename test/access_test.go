// Who is let in, by key, origin, certificate and role, and that no secret is told.

package test

import (
	"bufio"
	"bytes"
	"cmp"
	"crypto/ecdsa"
	"crypto/elliptic"
	crand "crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/event-ingestion/event-ingestion/internal/testkit"

	"github.com/twmb/franz-go/pkg/kfake"
)

const (
	firstKey  = "key-one-0123456789abcdef"
	secondKey = "key-two-0123456789abcdef"
)

func TestKeys(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "keys")
	os.WriteFile(file, []byte(firstKey+"\n"+secondKey+"\n"), 0o600)
	p := startProgram(t, newSpace(t, "API_KEYS_FILE="+file))
	for _, c := range []struct {
		name, header string
		status       int
	}{
		{"none", "X-Other: 1", 401}, {"empty", "X-API-Key: ", 401}, {"empty bearer", "Authorization: Bearer ", 401},
		{"wrong", "X-API-Key: key-six-0123456789abcdef", 401}, {"shorter", "X-API-Key: " + firstKey[:len(firstKey)-1], 401},
		{"longer", "X-API-Key: " + firstKey + "0", 401}, {"other case", "X-API-Key: " + strings.ToUpper(firstKey), 401},
		{"both in one", "X-API-Key: " + firstKey + "," + secondKey, 401}, {"basic", "Authorization: Basic " + firstKey, 401},
		{"no scheme", "Authorization: " + firstKey, 401}, {"hash", "X-API-Key: 0000000000000000000000000000000000000000000000000000000000000000", 401},
		{"first", "X-API-Key: " + firstKey, 202}, {"second", "X-API-Key: " + secondKey, 202},
		{"bearer", "Authorization: Bearer " + secondKey, 202}, {"lower-case scheme", "Authorization: bearer " + firstKey, 202},
	} {
		status, header, answer := p.ask("POST", onePath, testkit.FreshEvent("k"), c.header)
		if status != c.status {
			t.Errorf("%s: %d %s, want %d", c.name, status, answer, c.status)
		}
		if status == 401 && (header.Get("WWW-Authenticate") == "" || !strings.HasPrefix(answer, `{"error":"unauthorized"`)) {
			t.Errorf("%s: %v %s", c.name, header, answer)
		}
	}
	for _, path := range []string{"/api/v1/metrics?event_name=k&from=1&to=2", "/api/v1/none", "/api/"} {
		if status, _, _ := p.ask("GET", path, nil); status != 401 {
			t.Errorf("%s without a key: %d", path, status)
		}
	}
	for _, path := range []string{"/health", "/ready"} {
		if status, _, answer := p.ask("GET", path, nil); status != 200 {
			t.Errorf("%s without a key: %d %s", path, status, answer)
		}
	}
	third := "key-three-0123456789abcdef"
	os.WriteFile(file, []byte(secondKey+"\n"+third), 0o600)
	p.cmd.Process.Signal(syscall.SIGHUP)
	p.await("rotated", 5*time.Second, func() bool {
		status, _, _ := p.ask("POST", onePath, testkit.FreshEvent("k"), "X-API-Key: "+third)
		return status == 202
	})
	if status, _, _ := p.ask("POST", onePath, testkit.FreshEvent("k"), "X-API-Key: "+firstKey); status != 401 {
		t.Errorf("a removed key: %d", status)
	}
	os.Remove(file)
	p.cmd.Process.Signal(syscall.SIGHUP)
	p.await("told", 5*time.Second, func() bool { return strings.Contains(p.log.String(), "stay as they were") })
	if status, _, _ := p.ask("POST", onePath, testkit.FreshEvent("k"), "X-API-Key: "+third); status != 202 {
		t.Errorf("after a failed reload: %d", status)
	}
}

// TestWriteKeys: they send, by header or in the URL, and get nothing else; rotated like the others.
func TestWriteKeys(t *testing.T) {
	t.Parallel()
	const all, third = "key-all-0123456789abcdef", "key-&+%-0123456789abcdef" // a key may need escapes in a URL
	file := filepath.Join(t.TempDir(), "keys")
	os.WriteFile(file, []byte(firstKey+"\n"+secondKey+"\n"), 0o600)
	p := startProgram(t, newSpace(t, "API_KEYS="+all, "WRITE_KEYS_FILE="+file, "ACCESS_LOG=1", "LOG_LEVEL=debug"))
	asked := metricsPath + "event_name=w&from=1&to=2"
	for _, c := range []struct {
		method, path, header string
		status               int
	}{
		{"POST", onePath, "X-API-Key: " + firstKey, 202}, {"POST", bulkPath, "Authorization: Bearer " + secondKey, 202},
		{"POST", "/v1/track", "X-API-Key: " + firstKey, 200}, {"POST", "/v1/batch?key=" + firstKey, "", 400}, {"GET", "/v1/track", "X-API-Key: " + firstKey, 403},
		{"POST", onePath + "?key=" + firstKey, "", 202}, {"POST", bulkPath + "?x=1&key=" + secondKey + "&key=2", "", 202},
		{"POST", onePath + "?key=" + all, "", 202}, {"POST", onePath + "?key=wrong-0123456789abcdef", "", 401},
		{"POST", onePath + "?key=", "", 401}, {"POST", onePath + "?Key=" + firstKey, "", 401}, {"POST", onePath + "?key=%zz" + firstKey, "", 401},
		{"POST", onePath + "?key=" + firstKey, "X-API-Key: wrong-0123456789abcdef", 401}, // a header counts for more
		{"GET", asked, "X-API-Key: " + all, 200}, {"GET", asked, "X-API-Key: " + firstKey, 403}, {"GET", asked + "&key=" + firstKey, "", 401},
		{"GET", asked + "&key=" + all, "", 401}, {"GET", "/api/v1/overview", "X-API-Key: " + firstKey, 403}, {"HEAD", asked, "X-API-Key: " + firstKey, 403},
		{"GET", onePath, "X-API-Key: " + firstKey, 403}, {"PUT", onePath, "X-API-Key: " + firstKey, 403}, {"POST", "/api/v1/metrics", "X-API-Key: " + firstKey, 403},
		{"GET", onePath + "?key=" + firstKey, "", 401}, {"GET", "/api/v1/none", "X-API-Key: " + firstKey, 403}, {"GET", "/health", "X-API-Key: " + firstKey, 200},
	} {
		var body []byte
		contentType := jsonCT
		if c.method == "POST" {
			body = testkit.FreshEvent("w")
		}
		if strings.HasPrefix(c.path, bulkPath) {
			contentType = ndjson
		}
		status, header, answer := p.ask(c.method, c.path, body, "Content-Type: "+contentType, cmp.Or(c.header, "X-Other: 1"))
		if status != c.status || status == 403 && c.method != "HEAD" && !strings.HasPrefix(answer, `{"error":"forbidden"`) {
			t.Errorf("%s %s %s: %d %s, want %d", c.method, c.path, c.header, status, answer, c.status)
		}
		for _, key := range []string{firstKey, secondKey, all} {
			if strings.Contains(answer+fmt.Sprint(header), key) {
				t.Errorf("%s %s is told in %s %v", c.method, c.path, answer, header)
			}
		}
	}
	os.WriteFile(file, []byte(third), 0o600)
	p.cmd.Process.Signal(syscall.SIGHUP)
	p.await("rotated", 5*time.Second, func() bool {
		status, _, _ := p.ask("POST", onePath+"?key="+url.QueryEscape(third), testkit.FreshEvent("w"))
		return status == 202
	})
	if status, _, _ := p.ask("POST", onePath+"?key="+firstKey, testkit.FreshEvent("w")); status != 401 {
		t.Errorf("a removed key: %d", status)
	}
	p.terminate()
	if log := p.log.String(); strings.Contains(log, "0123456789abcdef") || !strings.Contains(log, "path=/api/v1/events ") {
		t.Errorf("a key is in the log, or nothing is:\n%s", log)
	}
}

func TestCORS(t *testing.T) {
	t.Parallel()
	p := startProgram(t, newSpace(t, "CORS_ORIGINS=https://shop.example, http://localhost:5173", "API_KEYS="+firstKey))
	preflight := []string{"Access-Control-Request-Method: POST", "Access-Control-Request-Headers: content-type,x-api-key"}
	status, header, _ := p.ask("OPTIONS", onePath, nil, append(preflight, "Origin: https://shop.example")...)
	if status != 204 || header.Get("Access-Control-Allow-Origin") != "https://shop.example" || header.Get("Vary") != "Origin" ||
		!strings.Contains(header.Get("Access-Control-Allow-Headers"), "X-API-Key") || !strings.Contains(header.Get("Access-Control-Allow-Methods"), "POST") {
		t.Errorf("preflight: %d %v", status, header)
	}
	for _, origin := range []string{"https://evil.example", "https://shop.example.evil.example", "http://shop.example", "null"} {
		status, header, answer := p.ask("OPTIONS", onePath, nil, append(preflight, "Origin: "+origin)...)
		if status != 403 || header.Get("Access-Control-Allow-Origin") != "" || !strings.Contains(answer, "it is not in CORS_ORIGINS") {
			t.Errorf("%s: %d %v %s", origin, status, header, answer)
		}
	}
	if _, header, _ := p.ask("GET", "/health", nil); header.Get("Vary") != "Origin" || header.Get("Access-Control-Allow-Origin") != "" {
		t.Errorf("without an origin: %v", header)
	}
	status, header, _ = p.ask("POST", onePath, testkit.FreshEvent("c"), "Origin: http://localhost:5173", "X-API-Key: "+firstKey)
	if status != 202 || header.Get("Access-Control-Allow-Origin") != "http://localhost:5173" {
		t.Errorf("request: %d %v", status, header)
	}
	beacon := append(preflight, "Origin: https://shop.example")
	if _, header, _ = p.ask("OPTIONS", onePath, nil, beacon...); header.Get("Access-Control-Allow-Credentials") != "true" {
		t.Errorf("a beacon's preflight: %v", header)
	}
	if _, header, _ = p.ask("OPTIONS", metricsPath, nil, "Access-Control-Request-Method: GET", "Origin: https://shop.example"); header.Get("Access-Control-Allow-Credentials") != "" {
		t.Errorf("a question's preflight: %v", header)
	}
	own := "Origin: " + p.url
	for _, c := range []struct {
		contentType, origin string
		status              int
	}{
		{"text/plain;charset=UTF-8", "Origin: https://shop.example", 202}, {"text/plain", "Origin: https://evil.example", 403}, {"TEXT/Plain", "Origin: null", 403},
		{"", "Origin: https://evil.example", 403}, {"", "X-Other: 1", 202}, {"text/plain", own, 202}, {"text/plain", own + "0", 403},
		{jsonCT, "Origin: https://evil.example", 202}, // of no browser: that would have asked
	} {
		headers := []string{c.origin, "X-API-Key: " + firstKey}
		if c.contentType != "" {
			headers = append(headers, "Content-Type: "+c.contentType)
		}
		if status, _, answer := p.ask("POST", onePath, testkit.FreshEvent("c"), headers...); status != c.status {
			t.Errorf("%q %s: %d %s, want %d", c.contentType, c.origin, status, answer, c.status)
		}
	}
	if status, header, _ := p.ask("POST", onePath, testkit.FreshEvent("c"), "Origin: http://localhost:5173"); status != 401 || header.Get("Access-Control-Allow-Origin") == "" {
		t.Errorf("a page has to see that its key is missing: %d %v", status, header)
	}
}

// newCertificate writes a certificate for localhost, signed by itself, and returns the files.
func newCertificate(t *testing.T, dir, name string) (certFile, keyFile string, pair tls.Certificate) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), crand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name}, NotAfter: time.Now().Add(time.Hour),
		DNSNames: []string{"localhost"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(crand.Reader, &template, &template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	certPEM := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	keyPEM := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER})
	certFile, keyFile = filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	os.WriteFile(certFile, certPEM, 0o600)
	os.WriteFile(keyFile, keyPEM, 0o600)
	pair, err = tls.X509KeyPair(certPEM, keyPEM)
	if err != nil {
		t.Fatal(err)
	}
	return certFile, keyFile, pair
}

func TestTLS(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	certFile, keyFile, _ := newCertificate(t, dir, "first")
	port := freePort(t)
	env := newSpace(t, "TLS_CERT_FILE="+certFile, "TLS_KEY_FILE="+keyFile, "SERVER_PORT="+port)
	p := newProgram(t, env)
	p.url = "https://127.0.0.1:" + port
	p.start()
	healthy := func() bool {
		_, code := subcommand(t, env, "healthcheck")
		return code == 0
	}
	p.await("healthy", 30*time.Second, healthy)
	served := func() string {
		roots := x509.NewCertPool()
		b, _ := os.ReadFile(certFile)
		roots.AppendCertsFromPEM(b)
		conn, err := tls.Dial("tcp", "127.0.0.1:"+port, &tls.Config{RootCAs: roots})
		if err != nil {
			return err.Error()
		}
		defer conn.Close()
		fmt.Fprintf(conn, "GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
		if answer, _ := io.ReadAll(conn); !bytes.Contains(answer, []byte(`{"status":"ok"}`)) {
			return string(answer)
		}
		return conn.ConnectionState().PeerCertificates[0].Subject.CommonName
	}
	if got := served(); got != "first" {
		t.Fatal(got)
	}
	newCertificate(t, dir, "second")
	p.cmd.Process.Signal(syscall.SIGHUP)
	p.await("renewed", 5*time.Second, func() bool { return served() == "second" })
	p.terminate()
	if healthy() {
		t.Error("healthy after the end")
	}
}

// TestSecureDependencies: SCRAM and TLS towards Kafka, TLS towards ClickHouse, counted to the last event; and a wrong
// password is said in words.
func TestSecureDependencies(t *testing.T) {
	t.Parallel()
	certFile, _, pair := newCertificate(t, t.TempDir(), "dependencies")
	config := &tls.Config{Certificates: []tls.Certificate{pair}}
	password := "scram-secret-4711"
	brokers, err := kfake.NewCluster(kfake.NumBrokers(2), kfake.GroupMinSessionTimeout(time.Second), kfake.TLS(config), kfake.EnableSASL(), kfake.Superuser("SCRAM-SHA-512", "ingest", password))
	if err != nil {
		t.Fatal(err)
	}
	defer brokers.Close()
	secure := newProxy(t, clickhouseAddress(t), config).port()
	env := newSpace(t, "KAFKA_BROKERS="+strings.Join(brokers.ListenAddrs(), ","), "KAFKA_TLS=true", "KAFKA_TLS_CA_FILE="+certFile,
		"KAFKA_SASL_MECHANISM=SCRAM-SHA-512", "KAFKA_SASL_USERNAME=ingest", "KAFKA_SASL_PASSWORD="+password,
		"CLICKHOUSE_HOST=localhost", "CLICKHOUSE_PORT="+secure, "CLICKHOUSE_TLS=true", "CLICKHOUSE_TLS_CA_FILE="+certFile)
	p := startProgram(t, env)
	l, done := loadInto(t, p.url, 1000, time.Second)
	done()
	mustHold(p, l)

	wrong := newProgram(t, append(env, "KAFKA_SASL_PASSWORD=no"))
	wrong.start()
	wrong.await("said", 20*time.Second, func() bool {
		resp, err := http.Get(wrong.url + "/ready")
		if err != nil {
			return false
		}
		defer resp.Body.Close()
		answer, _ := io.ReadAll(resp.Body)
		return resp.StatusCode == 503 && strings.Contains(string(answer), "KAFKA_SASL")
	})
}

func TestRoles(t *testing.T) {
	t.Parallel()
	env := newSpace(t, "SHUTDOWN_DELAY=1s")
	api := startProgram(t, append(env, "ROLE=api"))
	consumer := startProgram(t, append(env, "ROLE=consumer"))
	l, done := loadInto(t, api.url, 2000, 2*time.Second)
	if status, _, _ := consumer.do("POST", onePath, jsonCT, "", testkit.FreshEvent("r")); status != 404 {
		t.Errorf("a consumer takes events: %d", status)
	}
	if _, _, answer := api.do("GET", "/ready", "", "", nil); strings.Contains(answer, "consumers") {
		t.Errorf("an API instance asks for consumers: %s", answer)
	}
	done()
	mustHold(api, l)

	api.cmd.Process.Signal(syscall.SIGTERM)
	api.await("unready", 5*time.Second, func() bool { return api.status("/ready") == 503 })
	if status, _, answer := api.do("POST", onePath, jsonCT, "", testkit.FreshEvent("r")); status != 202 {
		t.Errorf("not served in SHUTDOWN_DELAY: %d %s", status, answer)
	}
	if err := api.cmd.Wait(); err != nil {
		t.Error(err)
	}
	consumer.terminate()
}

// TestSecretsAreNotTold: whatever goes wrong, keys and passwords stay out of the log and of messages.
func TestSecretsAreNotTold(t *testing.T) {
	t.Parallel()
	secrets := []string{firstKey, "clickhouse-secret-4711", "kafka-secret-4711", "sent-by-a-client-4711"}
	admin := freePort(t)
	env := append(newSpace(t), "ADMIN_ADDR=127.0.0.1:"+admin, "LOG_LEVEL=debug", "ACCESS_LOG=1", "API_KEYS="+secrets[0], "CLICKHOUSE_PASSWORD="+secrets[1],
		"CLICKHOUSE_PORT=1", "KAFKA_BROKERS=127.0.0.1:1", "KAFKA_SASL_MECHANISM=PLAIN", "KAFKA_SASL_USERNAME=u", "KAFKA_SASL_PASSWORD="+secrets[2], "ACK_TIMEOUT=1s")
	p := newProgram(t, env)
	p.start()
	p.await("up", 10*time.Second, func() bool { return p.status("/health") == 200 })
	var told strings.Builder
	for _, key := range []string{secrets[0], secrets[3]} {
		for _, path := range []string{metricsPath + "event_name=x&from=1&to=2", "/api/none", "/ready"} {
			_, _, answer := p.ask("GET", path, nil, "X-API-Key: "+key, "Authorization: Bearer "+key)
			told.WriteString(answer)
		}
		_, _, answer := p.ask("POST", onePath, testkit.FreshEvent("s"), "X-API-Key: "+key)
		told.WriteString(answer)
		_, _, answer = p.ask("POST", onePath+"?key="+key, testkit.FreshEvent("s"))
		told.WriteString(answer)
		if conn, err := net.Dial("tcp", strings.TrimPrefix(p.url, "http://")); err == nil { // what is no request
			fmt.Fprintf(conn, "POST %s?key=%s HTTP/1.1\r\nHost: x\r\nContent-Length: x\r\n\r\n", onePath, key)
			b, _ := io.ReadAll(conn)
			told.Write(b)
			conn.Close()
		}
	}
	if resp, err := http.Get("http://127.0.0.1:" + admin + "/metrics"); err != nil {
		t.Error(err)
	} else {
		b, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		told.Write(b)
	}
	p.terminate()
	told.WriteString(p.log.String())
	bad := command(t, []string{"API_KEYS=" + secrets[0] + ",short-4711", "SERVER_PORT=x", "CLICKHOUSE_PASSWORD=" + secrets[1], "CLICKHOUSE_PASSWORD_FILE=/none"})
	out, _ := bad.CombinedOutput()
	told.Write(out)
	if !strings.Contains(string(out), "API_KEYS") || !strings.Contains(string(out), "SERVER_PORT") || !strings.Contains(string(out), "CLICKHOUSE_PASSWORD_FILE") {
		t.Errorf("bad settings are not all named: %s", out)
	}
	if !strings.Contains(told.String(), "ClickHouse") || !strings.Contains(told.String(), "request") {
		t.Errorf("nothing was said: %s", &told)
	}
	for _, s := range append(secrets, "short-4711") {
		if strings.Contains(told.String(), s) {
			t.Errorf("%s is told", s)
		}
	}
}

// TestHosts: a page whose name is made to lead to this machine reads nothing here, and sends nothing: without keys over loopback, and
// from the admin listener in any case. Under the names that are ours everything answers, whatever the port.
func TestHosts(t *testing.T) {
	t.Parallel()
	name, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	short, _, _ := strings.Cut(name, ".")
	admin := freePort(t)
	open := startProgram(t, newSpace(t, "ADMIN_ADDR=127.0.0.1:"+admin, "ALLOWED_HOSTS= Shop.example,b.example", "CORS_ORIGINS=*"))
	adminOfKeyed := freePort(t)
	keyed := startProgram(t, newSpace(t, "ADMIN_ADDR=127.0.0.1:"+adminOfKeyed, "API_KEYS="+firstKey))
	ask := func(at, method, path, host string) (status int, answer string) {
		conn, err := net.Dial("tcp", at)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		fmt.Fprintf(conn, "%s %s HTTP/1.1\r\nHost: %s\r\nOrigin: http://%s\r\nContent-Length: 0\r\nConnection: close\r\n\r\n", method, path, host, host)
		resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		b, _ := io.ReadAll(resp.Body)
		return resp.StatusCode, string(b)
	}
	_, port, _ := strings.Cut(strings.TrimPrefix(open.url, "http://"), ":")
	ours := []string{"127.0.0.1:" + port, "127.0.0.1", "127.8.9.1:1", "localhost", "LocalHost:" + port, "localhost.", "a.localhost:99", "[::1]:" + port, "[::1]", name, short + ":8080", strings.ToUpper(name), "shop.example", "SHOP.example:443", "b.example."}
	theirs := []string{"evil.example", "evil.example:" + port, "127.0.0.1.evil.example", "localhost.evil.example", "evil-localhost", "notlocalhost", "192.0.2.1", "[2001:db8::1]:80", "x.shop.example", "a,b.example", "[evil]", "localhost:1:2"}
	refused := func(where string, status int, answer string) {
		t.Helper()
		if status != http.StatusMisdirectedRequest || !strings.HasPrefix(answer, `{"error":"misdirected request","detail":"ALLOWED_HOSTS does not have the host`) || !json.Valid([]byte(answer)) {
			t.Errorf("%s: %d %s", where, status, answer)
		}
	}
	api, keyedAPI := strings.TrimPrefix(open.url, "http://"), strings.TrimPrefix(keyed.url, "http://")
	for _, host := range theirs {
		for _, path := range []string{"POST " + onePath, "POST /v1/batch", "GET " + metricsPath + "event_name=e&from=1&to=2", "GET /api/v1/pipeline", "GET /", "GET /ready", "GET /none"} {
			method, path, _ := strings.Cut(path, " ")
			status, answer := ask(api, method, path, host)
			refused(host+" "+path, status, answer)
		}
		for _, at := range []string{admin, adminOfKeyed} {
			for _, path := range []string{"/metrics", "/debug/pprof/cmdline"} {
				status, answer := ask("127.0.0.1:"+at, "GET", path, host)
				refused(host+" admin "+path, status, answer)
			}
		}
		if status, answer := ask(keyedAPI, "GET", "/health", host); status != 200 { // a page has no key
			t.Errorf("%s with keys: %d %s", host, status, answer)
		}
	}
	for _, host := range ours {
		if status, answer := ask(api, "GET", metricsPath+"event_name=e&from=1&to=2", host); status != 200 {
			t.Errorf("%s: %d %s", host, status, answer)
		}
		if status, answer := ask("127.0.0.1:"+admin, "GET", "/metrics", host); status != 200 {
			t.Errorf("%s, admin: %d %.100s", host, status, answer)
		}
	}
}
