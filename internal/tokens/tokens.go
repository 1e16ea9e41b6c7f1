// Package tokens gets the tokens that this program logs in with by OAUTHBEARER: from a file, which somebody else renews, or from the
// endpoint of an identity provider, by the grant client_credentials (RFC 6749, 4.4).
package tokens

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strings"
	"sync"
	"time"
	"unicode"
)

const (
	// timeout bounds one question to the endpoint, and maxAnswer its answer in bytes.
	timeout   = 10 * time.Second
	maxAnswer = 1 << 20
	// maxLife is how long a token is used at the most, whatever the endpoint says.
	maxLife = 24 * time.Hour
)

// Source is where tokens come from: File, or else URL with the rest. Its methods are for anybody at any time.
type Source struct {
	File                                string
	URL, ClientID, ClientSecret, Scopes string // Scopes are separated by spaces, empty for the client's default

	mu    sync.Mutex // guards what follows; its holder asks while the others wait for the answer
	token string
	until time.Time // the token is used up to then, four fifths of its life
}

// Get returns a token, which the brokers take now. The error says where it should have come from, and never a secret.
func (s *Source) Get(ctx context.Context) (token string, err error) {
	from := s.File
	if s.File != "" {
		var b []byte
		b, err = os.ReadFile(s.File)
		token = strings.TrimSpace(string(b))
	} else {
		if from = s.URL; strings.Contains(from, "@") { // with a password, perhaps
			from = "KAFKA_OAUTH_TOKEN_URL"
		}
		token, err = s.kept(ctx)
	}
	if err == nil && token == "" {
		err = errors.New("it is empty")
	}
	if err != nil {
		return "", fmt.Errorf("get a token for the login by OAUTHBEARER from %s: %w", from, err)
	}
	return token, nil
}

// kept is the last token while it is good, else a new one.
func (s *Source) kept(ctx context.Context) (string, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if time.Now().Before(s.until) {
		return s.token, nil
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	asked := time.Now()
	token, life, err := s.ask(ctx)
	if err == nil {
		s.token, s.until = token, asked.Add(min(life, maxLife)/5*4)
	}
	return token, err
}

// ask returns a token of the endpoint and how long it lives, 0 when that is not said.
func (s *Source) ask(ctx context.Context) (token string, life time.Duration, err error) {
	form := url.Values{"grant_type": {"client_credentials"}}
	if s.Scopes != "" {
		form.Set("scope", s.Scopes)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, s.URL, strings.NewReader(form.Encode()))
	if err != nil {
		return "", 0, err
	}
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	req.Header.Set("Accept", "application/json")
	req.SetBasicAuth(url.QueryEscape(s.ClientID), url.QueryEscape(s.ClientSecret)) // RFC 6749, 2.3.1
	resp, err := http.DefaultClient.Do(req)
	if why := new(url.Error); errors.As(err, &why) {
		err = why.Err // without the address, which is said anyway
	}
	if err != nil {
		return "", 0, err
	}
	defer resp.Body.Close()
	var answer struct {
		Token string  `json:"access_token"`
		Life  float64 `json:"expires_in"` // seconds
		Error string  `json:"error"`
		More  string  `json:"error_description"`
	}
	err = json.NewDecoder(io.LimitReader(resp.Body, maxAnswer)).Decode(&answer)
	switch {
	case resp.StatusCode != http.StatusOK:
		return "", 0, fmt.Errorf("it answers %s %.100q %.200q", resp.Status, answer.Error, answer.More)
	case err != nil:
		return "", 0, fmt.Errorf("its answer is not that of RFC 6749: %w", err)
	}
	return answer.Token, time.Duration(min(max(answer.Life, 0), maxLife.Seconds()) * float64(time.Second)), nil
}

// ParseExtensions reads what goes with a token (RFC 7628, 3.1), name=value,…; false when that is no list of them.
func ParseExtensions(s string) (map[string]string, bool) {
	all := map[string]string{}
	for pair := range strings.SplitSeq(s, ",") {
		name, value, is := strings.Cut(strings.TrimSpace(pair), "=")
		isOther := func(r rune) bool { return r > unicode.MaxASCII || !unicode.IsLetter(r) }
		if s != "" && (!is || name == "" || name == "auth" || strings.ContainsFunc(name, isOther) || strings.ContainsFunc(value, unicode.IsControl)) {
			return nil, false
		} else if is {
			all[name] = value
		}
	}
	return all, true
}
