// What a request meets before its events: settings and bodies.

package main

import (
	"bytes"
	"fmt"
	"net/http/httptest"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/event-ingestion/event-ingestion/batches"
)

func TestSettings(t *testing.T) {
	env := map[string]string{"SERVER_PORT": "99999", "WORKER_BATCH_TIMEOUT": "soon", "KAFKA_BROKERS": "nohost", "CLICKHOUSE_HOST": "localhost:9000", "CLICKHOUSE_DATABASE": "a;b", "LOG_LEVEL": "loud"}
	_, err := loadSettings(func(k string) string { return env[k] })
	for name := range env {
		if err == nil || !strings.Contains(err.Error(), name+"=") {
			t.Errorf("%s is not named in: %v", name, err)
		}
	}
	cfg, err := loadSettings(func(string) string { return "" })
	if err != nil || cfg.workerCount != 20 || cfg.workerBatchSize != 2000 || cfg.workerBatchTimeout != 50*time.Millisecond || cfg.serverPort != 8080 {
		t.Errorf("defaults: %+v, %v", cfg, err)
	}
	contradict := map[string]string{"KAFKA_MIN_ISR": "3", "KAFKA_LINGER": "10s", "KAFKA_SASL_USERNAME": "u", "TLS_KEY_FILE": "f"}
	_, err = loadSettings(func(k string) string { return contradict[k] })
	for name := range contradict {
		if err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("that %s contradicts another one is not said: %v", name, err)
		}
	}
	if _, err := loadSettings(func(k string) string { return map[string]string{"CLICKHOUSE_HOST": "::1"}[k] }); err != nil {
		t.Error(err)
	}
	const firstKey, secondKey = "key-one-0123456789abcdef", "key-two-0123456789abcdef"
	both := map[string]string{"API_KEYS": secondKey + "," + firstKey, "WRITE_KEYS": firstKey}
	if _, err := loadSettings(func(k string) string { return both[k] }); err == nil || !strings.Contains(err.Error(), "WRITE_KEYS") || strings.Contains(err.Error(), firstKey) {
		t.Errorf("a key that may do everything, and only send: %v", err)
	}
	for _, c := range []struct{ name, value string }{
		{"API_KEYS", " , "}, {"WRITE_KEYS", ","}, // no key lets everybody in
		{"KAFKA_BROKERS", "a:b"}, {"KAFKA_BROKERS", "a:9092,b:0"}, {"KAFKA_BROKERS", "a:65536"}, {"CLICKHOUSE_HOST", "[::1]:9000"}, {"CLICKHOUSE_HOST", "http://localhost"},
		{"KAFKA_SASL_USERNAME", "u"}, {"KAFKA_LINGER", "10s"}, {"RETENTION_DAYS", "30"},
		{"CORS_ORIGINS", "https://a.example,https://Shop.example"}, {"CORS_ORIGINS", "https://shop.example:443"}, {"CORS_ORIGINS", "http://maça.example"}, {"CORS_ORIGINS", "null"},
		{"KAFKA_OAUTH_TOKEN_URL", "http://login.example/token"}, {"KAFKA_OAUTH_TOKEN_FILE", "f"}, {"KAFKA_OAUTH_TOKEN_URL", "login.example"}, {"KAFKA_OAUTH_EXTENSIONS", "a"},
		{"KAFKA_SASL_MECHANISM", "OAUTHBEARER"}, {"KAFKA_SASL_MECHANISM", "PLAIN"}, {"KAFKA_TLS_CERT_FILE", "f"}, {"KAFKA_TLS_KEY_FILE", "f"},
		{"CLOCK_SKEW", "1.5s"}, {"KAFKA_TOPIC", "a b"}, {"KAFKA_TOPIC", ".."}, {"KAFKA_TOPIC", strings.Repeat("t", 244)},
		{"CLICKHOUSE_DATABASE", "Table"}, {"CLICKHOUSE_DATABASE", "function"}, {"CLICKHOUSE_DATABASE", "system"}, {"CLICKHOUSE_DATABASE", strings.Repeat("d", 151)},
	} {
		_, err := loadSettings(func(k string) string { return map[string]string{c.name: c.value}[k] })
		if err == nil || !strings.Contains(err.Error(), c.name) {
			t.Errorf("%s=%q: %v", c.name, c.value, err)
		}
	}
	readme, err := os.ReadFile("deploy/README.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range new(settings).settingsTable() {
		if !strings.Contains(string(readme), "`"+s.name+"`") {
			t.Errorf("deploy/README.md does not explain %s", s.name)
		}
	}
}

// TestTinyBlocks: a zstd body of half a million blocks, each with tables of its own, would take seconds to decompress. One that was
// flushed after each event is fine.
func TestTinyBlocks(t *testing.T) {
	t.Parallel()
	in := newIngester(new(batches.Producer), &settings{maxInFlightBytes: 1 << 30, ackTimeout: time.Minute}, &newStats().ingest, nil)
	event := freshEvent("b")
	flushed := bytes.Repeat(zstded(event), maxBulkEvents)
	// A frame with a block of 16 spaces, and blocks that repeat 3 of them: no literals, one sequence, three tables, its states.
	tables := "\x28\xb5\x2f\xfd\x00\x58" + "\x82\x00\x00 " +
		strings.Repeat("\x6c\x00\x00"+"\x00"+"\x01\xa8"+"\xe4\xff"+"\xe3\x7f"+"\xe4\xff"+"\x00\x00\x00\x04", 500_000) + "\x01\x00\x00"
	for _, c := range []struct {
		body []byte
		size int
		want string
	}{{flushed, maxBulkEvents * len(event), ""}, {[]byte(tables), 0, "zstd blocks are too small"}} {
		r := httptest.NewRequest("POST", bulkPath, bytes.NewReader(c.body))
		r.Header.Set("Content-Encoding", "zstd")
		acc := in.bodies.Open(client{})
		body, err := readBody(acc, r, maxBulkBody, time.Minute)
		if got := fmt.Sprint(err); len(body.Bytes()) != c.size || err == nil != (c.want == "") || !strings.Contains(got, c.want) {
			t.Errorf("%d bytes, of %d compressed: %v, want %q", len(body.Bytes()), len(c.body), err, c.want)
		}
		acc.Put(&body)
		acc.Close()
	}
}
