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

	"github.com/event-ingestion/event-ingestion/internal/testkit"
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
		{"one bad, one good", "/v1/batch", batch("", item(""), `{"type":"track","userId":"u"}`), basic(firstKey), 200, `{"success":false,"errors":[{"index":1,"field":"event_name","code":"validation.required.error","error":"event_name is required"}]}`},
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
		{"all refused", "/v1/track", `{"userId":"u"}`, basic(firstKey), 200, `{"success":false,"errors":[{"index":0,"field":"event_name",`},
		{"slash at the end", "/v1/import/", batch("", item("")), basic(firstKey), 200, `{"success":true,"errors":[]}`},
		{"slash doubled", "//v1/batch", batch("", item("")), basic(firstKey), 200, `{"success":true,"errors":[]}`},
		{"both", "//v1//import//", batch(inBody, item("")), "X-A: b", 200, `{"success":true,"errors":[]}`},
		{"key in the address", "//v1/t/?key=" + firstKey, item(""), "X-A: b", 200, `{"success":true,"errors":[]}`},
		{"slash doubled, no key", "//v1//batch/", batch("", item("")), "X-A: b", 401, `"error":"unauthorized"`},
		{"slash doubled elsewhere", "//api/v1/events", string(testkit.FreshEvent("s")), "X-API-Key: " + firstKey, 404, `"error":"not found"`},
		{"slash at the end elsewhere", "/api/v1/events/", string(testkit.FreshEvent("s")), "X-API-Key: " + firstKey, 404, `"error":"not found"`},
		{"nothing there", "/v1//x/", item(""), basic(firstKey), 404, `"error":"not found"`},
		{"up and down", "/v1/x/../batch/", item(""), basic(firstKey), 404, `"error":"not found"`},
		{"form", "/v1/track", item(""), "Content-Type: application/x-www-form-urlencoded", 415, `"error"`},
		{"basic elsewhere", onePath, string(testkit.FreshEvent("s")), basic(firstKey), 401, `"error":"unauthorized"`},
	} {
		status, _, answer := p.ask("POST", c.path, []byte(c.body), c.header)
		if status != c.status || !strings.Contains(answer, c.want) || !json.Valid([]byte(answer)) {
			t.Errorf("%s: %d %s, want %d %s", c.name, status, answer, c.status, c.want)
		}
	}
}

// TestSegmentAhead: a client whose clock is ahead loses nothing. What is in the future is stored at its own time, and counted when that
// has come, by every kind of question; beyond 24 h, and on /api/v1, it is refused.
func TestSegmentAhead(t *testing.T) {
	t.Parallel()
	p := startProgram(t, newSpace(t))
	now := time.Now().Unix()
	send := func(at int64) string {
		_, _, answer := p.ask("POST", "/v1/t", fmt.Appendf(nil, `{"event":"ahead","userId":"u%d","timestamp":%q}`, at, time.Unix(at, 0).UTC().Format(time.RFC3339)))
		return answer
	}
	count := func(to int64, more string) string {
		_, _, answer := p.ask("GET", fmt.Sprintf("%sevent_name=ahead&from=%d&to=%d%s", metricsPath, now-86400, to, more), nil)
		total, _, _ := strings.Cut(strings.TrimPrefix(answer, `{"total_count":`), ",")
		return total
	}
	soon, far := now+20, now+23*3600
	for _, at := range []int64{now, soon, far} {
		if answer := send(at); answer != `{"success":true,"errors":[]}` {
			t.Errorf("%d s ahead: %s", at-now, answer)
		}
	}
	drained(p)
	for _, more := range []string{"", "&group_by=hour", "&group_by=day", "&group_by=channel", "&group_by=campaign"} {
		for to, want := range map[int64]string{now: "1", soon - 1: "1", soon: "2", far - 1: "2", far: "3"} {
			if got := count(to, more); got != want {
				t.Errorf("to now+%d%s: %s, want %s", to-now, more, got, want)
			}
		}
	}
	if _, _, answer := p.ask("GET", fmt.Sprintf("/api/v1/overview?to=%d", now), nil); !strings.Contains(answer, `"total_count":1,"unique_users":1,`) {
		t.Errorf("overview: %s", answer)
	}
	p.await("counted when its time has come", time.Minute, func() bool { return count(time.Now().Unix(), "") == "2" })
	if answer := send(time.Now().Unix() + 86400 + 60); !strings.Contains(answer, `{"success":false,"errors":[{"index":0,"field":"timestamp","code":"validation.timestamp-future.error"`) {
		t.Errorf("more than a day ahead: %s", answer)
	}
	if status, _, answer := p.ask("POST", onePath, fmt.Appendf(nil, `{"event_name":"ahead","user_id":"u","timestamp":%d}`, time.Now().Unix()+60)); status != 400 || !strings.Contains(answer, "validation.timestamp-future.error") {
		t.Errorf("/api/v1: %d %s", status, answer)
	}
}

// TestSegmentBatches: 5,000 messages are taken, one more is not, and what is stored is what was sent.
func TestSegmentBatches(t *testing.T) {
	t.Parallel()
	env := newSpace(t)
	p := startProgram(t, env)
	const most = 5000
	batch := func(from, n int) []byte {
		body := []byte(`{"batch":[`)
		for i := range n {
			body = fmt.Appendf(body, `{"type":"track","event":"b","userId":%d,"properties":{"total":%d.25}},`, from+i, i)
		}
		return append(body[:len(body)-1], `]}`...)
	}
	if status, _, answer := p.ask("POST", "/v1/batch", batch(0, most)); status != 200 || answer != `{"success":true,"errors":[]}` {
		t.Errorf("%d %.200s", status, answer)
	}
	if status, _, answer := p.ask("POST", "/v1/batch", batch(most, most+1)); status != 400 || !strings.Contains(answer, "more than 5000 events") {
		t.Errorf("%d %.200s", status, answer)
	}
	if status, _, answer := p.ask("POST", "/v1/batch", append(batch(0, 1), make([]byte, 8<<20)...)); status != 413 {
		t.Errorf("%d %.200s", status, answer)
	}
	drained(p)
	p.awaitCount("b", most)
	if got := clickhouseQuery(t, "SELECT count(), uniqExact(user_id), sum(toUInt64(user_id)), sum(price) FROM "+space(env, "CLICKHOUSE_DATABASE")+".events_all"); got != fmt.Sprintf("%d\t%d\t%d\t%v", most, most, most*(most-1)/2, most*(most-1)/2+most/4) {
		t.Error("stored are ", got)
	}
}

// TestSegmentHostile: what no client of Segment sends gets 200 with errors, 400 or 413, and nothing else.
func TestSegmentHostile(t *testing.T) {
	t.Parallel()
	p := startProgram(t, newSpace(t))
	values := []string{`null`, `true`, `0`, `-1`, `1e400`, `""`, `"x"`, `[]`, `{}`, `[{}]`, `{"a":{"b":[1]}}`, `{"name":{"name":1}}`, `"\u0000"`, `"\ud800"`, "\"\xff\"",
		`"` + strings.Repeat("x", 70<<10) + `"`, strings.Repeat("[", 400) + strings.Repeat("]", 400), strings.Repeat("[", 1e5), strings.Repeat("7", 1e5), `"2026-11-23T13:52:50Z"`, `1795441970`, `01`, `nul`}
	fields := []string{"type", "event", "userId", "anonymousId", "timestamp", "originalTimestamp", "channel", "context", "properties", "messageId", "name", "category", "writeKey", "batch", "sentAt", "integrations", "x",
		`context":{"page":{"path":1},"locale`, `context":{"locale":"tr"},"x`, `properties":{"revenue`, `properties":{"context`}
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
			value += strings.Repeat("}", strings.Count(field, "{")-strings.Count(field, "}"))
			message := `{"type":"page","userId":"u","` + field + `":` + value + `}`
			try("/v1/batch", `{"batch":[`+message+`,{"type":"track","event":"e","userId":"u"}]}`)
			try("/v1/batch", `{"`+field+`":`+value+`,"batch":[{"type":"track","event":"e","userId":"u","`+field+`":`+value+`}]}`)
			try("/v1/page", message)
		}
	}
	try("/v1/batch", `{"batch":[`+strings.Repeat(`{},`, 100_000)+`{}]}`)
	try("/v1/batch", `{"batch":[`+strings.Repeat(`{},`, 999)+`{}]}`)
	try("/v1/batch", `{"batch":[`+strings.Repeat(`{"type":"track","event":"`+strings.Repeat("x", 1500)+`"},`, 4999)+`{}]}`)
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
