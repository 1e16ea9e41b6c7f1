// Tokens: when a new one is asked for, what is sent, and what an error says.

package tokens

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestFile: a file is read each time, because somebody else renews it.
func TestFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "token")
	s := &Source{File: path}
	for _, c := range []struct{ content, want, says string }{
		{"first\n", "first", ""}, {"second", "second", ""}, {" \n", "", path + ": it is empty"},
	} {
		os.WriteFile(path, []byte(c.content), 0o600)
		if got, err := s.Get(t.Context()); got != c.want || (err == nil) != (c.says == "") || err != nil && !strings.HasSuffix(err.Error(), c.says) {
			t.Errorf("%q: %q %v", c.content, got, err)
		}
	}
	os.Remove(path)
	if _, err := s.Get(t.Context()); err == nil || !strings.Contains(err.Error(), path) {
		t.Error(err)
	}
}

// TestEndpoint: a token is used for four fifths of its life, and one without a life once.
func TestEndpoint(t *testing.T) {
	asked, life := 0, ""
	endpoint := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked++
		if id, secret, _ := r.BasicAuth(); id != "i%3Ad" || secret != "s+%26" || r.FormValue("grant_type") != "client_credentials" || r.FormValue("scope") != "a b" {
			t.Errorf("asked with %s:%s, %v", id, secret, r.Form)
		}
		fmt.Fprintf(w, `{"access_token":"t%d","token_type":"Bearer"%s}`, asked, life)
	}))
	defer endpoint.Close()
	s := &Source{URL: endpoint.URL, ClientID: "i:d", ClientSecret: "s &", Scopes: "a b"}
	get := func(want string) {
		t.Helper()
		if got, err := s.Get(t.Context()); got != want || err != nil {
			t.Errorf("%q %v, want %q", got, err, want)
		}
	}
	get("t1")
	get("t2")
	life = `,"expires_in":3600`
	get("t3")
	if left := time.Until(s.until); left > 48*time.Minute || left < 47*time.Minute {
		t.Errorf("used for %s of an hour", left)
	}
	get("t3")
	s.until = time.Now()
	get("t4")
	life = `,"expires_in":1e300`
	s.until = time.Now()
	get("t5")
	if left := time.Until(s.until); left > maxLife {
		t.Errorf("used for %s", left)
	}
}

// TestRefused: the error says who refused what, and not the secret.
func TestRefused(t *testing.T) {
	for answer, says := range map[string]string{
		`{"error":"invalid_client","error_description":"no such client"}`: `it answers 401 Unauthorized "invalid_client" "no such client"`,
		`<html>`:             "it answers 401 Unauthorized",
		`200 <html>`:         "its answer is not that of RFC 6749",
		`200 {"expires_in":`: "its answer is not that of RFC 6749",
		`200 {}`:             "it is empty",
	} {
		endpoint := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			body, good := strings.CutPrefix(answer, "200 ")
			if !good {
				w.WriteHeader(http.StatusUnauthorized)
			}
			fmt.Fprint(w, body)
		}))
		s := &Source{URL: endpoint.URL, ClientID: "id", ClientSecret: "the secret"}
		if got, err := s.Get(t.Context()); got != "" || err == nil || !strings.Contains(err.Error(), says) || !strings.Contains(err.Error(), endpoint.URL) || strings.Contains(err.Error(), "the secret") {
			t.Errorf("%s: %q %v", answer, got, err)
		}
		endpoint.Close()
		if _, err := s.Get(t.Context()); err == nil || strings.Count(err.Error(), endpoint.URL) != 1 {
			t.Errorf("gone: %v", err)
		}
	}
}

func TestParseExtensions(t *testing.T) {
	for given, want := range map[string]string{
		"": "map[]", "logicalCluster=lkc-1, identityPoolId=pool=1": "map[identityPoolId:pool=1 logicalCluster:lkc-1]",
		"a": "", "=b": "", "auth=x": "", "a=b,": "", "a1=b": "", "a=b\x01": "",
	} {
		if got, ok := ParseExtensions(given); ok != (want != "") || ok && fmt.Sprint(got) != want {
			t.Errorf("%q: %v %v", given, got, ok)
		}
	}
}
