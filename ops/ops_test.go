// The door: what is told of arguments and settings, and with which exit code.

package ops

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
)

// TestArguments: what a command does not understand is no reason to do something else. None of these reaches a store.
func TestArguments(t *testing.T) {
	for _, c := range []struct {
		args string
		code int
		says string
	}{
		{"audit x", 2, `audit: unexpected argument "x"`},
		{"audit -from 20 -to 10", 2, "audit: -to 10 has to be after -from 20"},
		{"audit -from 20 -to 20", 2, "-to 20 has to be after"},
		{"audit -from 1795x", 2, "invalid value"},
		{"audit -memory 0", 2, "-memory 0 has to be at least 1"},
		{"audit -h", 0, "several passes"},
		{"rewind -to start x", 2, "unexpected argument"},
		{"rewind", 2, `-to "" has to be a time that has been`},
		{"rewind -to 2999-01-31T14:00:00Z", 2, "a time that has been"},
		{"rewind -to 1969-01-31T14:00:00Z", 2, "a time that has been"},
		{"dlq", 2, "dlq list "},
		{"dlq lost", 2, "dlq list "},
		{"dlq -h", 0, "without it, -type and -filter: all letters"},
		{"dlq help", 0, "without it, -type and -filter: all letters"},
		{"dlq list x", 2, "dlq list: unexpected argument"},
		{"dlq list -type bogus", 2, "unmarshal_error insert_failed max_retries_exhausted"},
		{"dlq list -since -1h", 2, "cannot be negative"},
		{"dlq list -limit -1", 2, "cannot be negative"},
		{"dlq list -h", 0, "unmarshal_error, insert_failed or max_retries_exhausted"},
		{"dlq replay 0:17", 2, `dlq replay: unexpected argument "0:17"`},
		{"dlq show", 2, `dlq show: "" is not PARTITION:OFFSET`},
		{"dlq show 0:17x", 2, "is not PARTITION:OFFSET"},
		{"dlq show 0:17 0:18", 2, "is not PARTITION:OFFSET"},
		{"dlq show 00:17", 2, "is not PARTITION:OFFSET"},
		{"healthcheck -h", 0, "ready, else 1"},
		{"healthcheck now", 2, "unexpected argument"},
		{"nonsense", 2, `unknown command "nonsense"; try event-ingestion -h`},
	} {
		var stdout, stderr bytes.Buffer
		code := Run(strings.Fields(c.args), func() (System, error) { return System{}, nil }, &stdout, &stderr)
		if code != c.code || !strings.Contains(stdout.String()+stderr.String(), c.says) {
			t.Errorf("%s: %d %s%s", c.args, code, &stdout, &stderr)
		}
		if code == 2 && stdout.Len() > 0 {
			t.Errorf("%s: what is wrong stands where answers go", c.args)
		}
	}
}

// TestBadSettings: they are told as they are, and are looked at last.
func TestBadSettings(t *testing.T) {
	bad := func() (System, error) { return System{}, errors.New("bad settings:\nX=1") }
	for args, want := range map[string]string{"dlq list": "bad settings:\nX=1\n", "dlq list x": "dlq list: unexpected argument \"x\"\n"} {
		var stderr bytes.Buffer
		if code := Run(strings.Fields(args), bad, io.Discard, &stderr); code != 2 || stderr.String() != want {
			t.Errorf("%s: %d %s", args, code, &stderr)
		}
	}
}

func TestHealthcheck(t *testing.T) {
	ready := true
	answer := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/ready" || !ready {
			http.Error(w, "kafka is away", http.StatusServiceUnavailable)
		}
	})
	plain, secret := httptest.NewServer(answer), httptest.NewTLSServer(answer)
	defer plain.Close()
	defer secret.Close()
	port := func(s *httptest.Server) string { return s.URL[strings.LastIndex(s.URL, ":"):] }
	check := func(listen string, tls bool) (string, int) {
		var stderr bytes.Buffer
		code := Run([]string{"healthcheck"}, func() (System, error) { return System{Listen: listen, TLS: tls}, nil }, io.Discard, &stderr)
		return stderr.String(), code
	}
	for _, host := range []string{"", "0.0.0.0", "[::]", "127.0.0.1", "localhost"} {
		if said, code := check(host+port(plain), false); code != 0 || said != "" {
			t.Errorf("%q: %d %s", host, code, said)
		}
	}
	if said, code := check(port(secret), true); code != 0 {
		t.Errorf("HTTPS: %d %s", code, said)
	}
	ready = false
	if said, code := check(port(plain), false); code != 1 || !strings.Contains(said, "healthcheck: kafka is away") {
		t.Errorf("not ready: %d %s", code, said)
	}
	plain.Close()
	if said, code := check(port(plain), false); code != 1 || !strings.Contains(said, "refused") {
		t.Errorf("nobody there: %d %s", code, said)
	}
}

// TestVisible: nothing that a client made up steers a terminal, and JSON stays what it says.
func TestVisible(t *testing.T) {
	for text, want := range map[string]string{
		"a\tb\n": "a\tb\n", "ö😀\u00a0\n": "ö😀\u00a0\n", "\x1b[2J": `\u001b[2J`, "\u009b2J\u0080\u009f": `\u009b2J\u0080\u009f`, "\x7f\r": `\u007f\u000d`, "\xff": "\xff",
	} {
		var b bytes.Buffer
		if n, err := (visible{&b}).Write([]byte(text)); n != len(text) || err != nil || b.String() != want {
			t.Errorf("%q: %q, %d %v", text, b.String(), n, err)
		}
	}
	var b bytes.Buffer
	const hostile = "\u009b31m\x1b]0;\x7f"
	json.NewEncoder(visible{&b}).Encode(map[string]string{"event": hostile})
	var back map[string]string
	if err := json.Unmarshal(b.Bytes(), &back); err != nil || back["event"] != hostile || bytes.ContainsAny(b.Bytes(), "\u009b\x1b\x7f") {
		t.Errorf("%q: %v %q", b.String(), err, back)
	}
	if got := cell(hostile + "\t\n"); strings.ContainsAny(got, "\u009b\x1b\x7f\t\n") {
		t.Errorf("%q", got)
	}
}
