// Segment's protocol over HTTP: keys, answers, and bodies that mean harm.

package test

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"
)

func TestSegment(t *testing.T) {
	t.Parallel()
	p := startProgram(t, newSpace(t, "API_KEYS="+firstKey+","+secondKey))
	basic := func(key string) string {
		return "Authorization: Basic " + base64.StdEncoding.EncodeToString([]byte(key+":"))
	}
	item := func(more string) string {
		return fmt.Sprintf(`{"type":"track","event":"s","userId":"u","timestamp":%q%s}`, time.Now().UTC().Format(time.RFC3339Nano), more)
	}
	batch := func(more string, items ...string) string {
		return `{"batch":[` + strings.Join(items, ",") + `]` + more + `}`
	}
	inBody := `,"writeKey":"` + secondKey + `"`
	for _, c := range []struct {
		name, path, body, header string
		status                   int
		want                     string
	}{
		{"batch", "/v1/batch", batch("", item(""), item(`,"messageId":"1"`)), basic(firstKey), 200, `{"success":true,"errors":[]}`},
		{"b", "/v1/b", batch("", item("")), basic(firstKey), 200, `{"success":true,"errors":[]}`},
		{"import", "/v1/import", batch("", item("")), basic(secondKey), 200, `{"success":true,"errors":[]}`},
		{"track", "/v1/track", item(""), basic(firstKey), 200, `{"success":true,"errors":[]}`},
		{"identify", "/v1/i", `{"userId":"u"}`, basic(firstKey), 200, `{"success":true,"errors":[]}`},
		{"page with a slash", "/v1/p", item(`,"name":"x"`), basic(firstKey), 200, `{"success":true,"errors":[]}`},
		{"one bad, one good", "/v1/batch", batch("", item(""), `{"type":"track","userId":"u"}`), basic(firstKey), 200, `{"success":true,"errors":[{"index":1,"field":"event_name","code":"validation.required.error","error":"event_name is required"}]}`},
		{"key in the body", "/v1/batch", batch(inBody, item("")), "X-A: b", 200, `"success":true`},
		{"key in the message", "/v1/t", item(inBody), "X-A: b", 200, `"success":true`},
		{"key in each message", "/v1/b", batch("", item(inBody)), "X-A: b", 200, `"success":true`},
		{"empty key in the message", "/v1/b", batch(inBody, item(`,"writeKey":""`)), "X-A: b", 200, `"success":true`},
		{"key as everywhere", "/v1/b", batch("", item("")), "X-API-Key: " + firstKey, 200, `"success":true`},
		{"as text", "/v1/t", item(inBody), "Content-Type: text/plain", 200, `"success":true`},
		{"no key", "/v1/batch", batch("", item("")), "X-A: b", 401, `"error":"unauthorized"`},
		{"wrong key", "/v1/batch", batch(inBody, item("")), basic("wrong"), 401, `"error":"unauthorized"`},
		{"wrong key in the body", "/v1/batch", batch(`,"writeKey":"wrong"`, item("")), "X-A: b", 401, `"error":"unauthorized"`},
		{"no JSON", "/v1/batch", `{"batch":[`, basic(firstKey), 400, `"error":"invalid request body"`},
		{"no batch", "/v1/batch", item(""), basic(firstKey), 400, `\"batch\" is missing or empty`},
		{"not an object", "/v1/track", `[]`, basic(firstKey), 400, `"error":"invalid request body"`},
		{"too large", "/v1/track", item(`,"x":"` + strings.Repeat("x", 65<<10) + `"`), basic(firstKey), 413, `"error"`},
		{"one too large", "/v1/batch", batch("", item(`,"x":"`+strings.Repeat("x", 65<<10)+`"`), item("")), basic(firstKey), 200, `"code":"validation.max-length.error"`},
		{"form", "/v1/track", item(""), "Content-Type: application/x-www-form-urlencoded", 415, `"error"`},
		{"basic elsewhere", onePath, string(freshEvent("s")), basic(firstKey), 401, `"error":"unauthorized"`},
	} {
		status, _, answer := p.ask("POST", c.path, []byte(c.body), c.header)
		if status != c.status || !strings.Contains(answer, c.want) || !json.Valid([]byte(answer)) {
			t.Errorf("%s: %d %s, want %d %s", c.name, status, answer, c.status, c.want)
		}
	}
}

// TestSegmentHostile: what no client of Segment sends gets 200 with errors, 400 or 413, and nothing else.
func TestSegmentHostile(t *testing.T) {
	t.Parallel()
	p := startProgram(t, newSpace(t))
	values := []string{`null`, `true`, `0`, `-1`, `1e400`, `""`, `"x"`, `[]`, `{}`, `[{}]`, `{"a":{"b":[1]}}`, `{"name":{"name":1}}`, `"\u0000"`, `"\ud800"`, "\"\xff\"",
		`"` + strings.Repeat("x", 70<<10) + `"`, strings.Repeat("[", 400) + strings.Repeat("]", 400), strings.Repeat("[", 1e5), strings.Repeat("7", 1e5), `"2026-11-23T13:52:50Z"`, `1795441970`, `01`, `nul`}
	fields := []string{"type", "event", "userId", "anonymousId", "timestamp", "originalTimestamp", "channel", "context", "properties", "messageId", "name", "category", "writeKey", "batch", "sentAt", "integrations", "x"}
	tried, seen := 0, map[int]int{}
	try := func(path, body string) {
		tried++
		status, _, answer := p.ask("POST", path, []byte(body))
		if seen[status]++; status != 200 && status != 400 && status != 413 || !json.Valid([]byte(answer)) {
			t.Errorf("%s %.100s: %d %.200s", path, body, status, answer)
		}
	}
	for _, field := range fields {
		for _, value := range values {
			message := `{"type":"page","userId":"u","` + field + `":` + value + `}`
			try("/v1/batch", `{"batch":[`+message+`,{"type":"track","event":"e","userId":"u"}]}`)
			try("/v1/batch", `{"`+field+`":`+value+`,"batch":[{"type":"track","event":"e","userId":"u","`+field+`":`+value+`}]}`)
			try("/v1/page", message)
		}
	}
	try("/v1/batch", `{"batch":[`+strings.Repeat(`{},`, 100_000)+`{}]}`)
	try("/v1/batch", `{"batch":[`+strings.Repeat(`{},`, 999)+`{}]}`)
	try("/v1/batch", `{"batch":[{"type":"track"`+strings.Repeat(`,"userId":0`, 100_000)+`}]}`)
	try("/v1/batch", "\x00")
	for _, value := range []string{`"` + strings.Repeat("x", 5<<20) + `"`, strings.Repeat("[", 5<<20), strings.Repeat("7", 5<<20)} {
		try("/v1/batch", `{"batch":[{"type":"page","userId":"u","properties":`+value+`}]}`)
	}
	t.Logf("%d bodies, by status %v", tried, seen)
	if status, _, answer := p.ask("POST", "/v1/t", []byte(`{"event":"e","userId":"u"}`)); status != http.StatusOK || answer != `{"success":true,"errors":[]}` {
		t.Errorf("afterwards: %d %s", status, answer)
	}
}
