// Messages into events: each field's way.

package segment

import (
	"bytes"
	"encoding/json"
	"reflect"
	"strings"
	"testing"
	"time"
	"unicode/utf8"
)

// now is the time of receipt, as the tests' messages would have it: 2026-11-23T13:52:56Z.
const now = 1795441976

// members is a Members of encoding/json.
func members(object []byte, do func(name, value []byte, isText bool)) {
	d := json.NewDecoder(bytes.NewReader(object))
	if start, _ := d.Token(); start != json.Delim('{') {
		return
	}
	for d.More() {
		name, _ := d.Token()
		var value json.RawMessage
		d.Decode(&value)
		do([]byte(name.(string)), value, utf8.Valid(value))
	}
}

func TestMapping(t *testing.T) {
	const at = `"timestamp":"2026-11-23T13:52:50.999Z"`
	tr := &Translator{Members: members, MaxMetadata: 16 << 10}
	for _, c := range []struct {
		kind, message string
		want          string // the event, or "" when it is not stored
	}{
		{"track", `{"event":"e","userId":"u","messageId":"m1",` + at + `}`, `{"event_name":"e","user_id":"u","timestamp":1795441970,"channel":"api","insert_id":"m1"}`},
		{"batch", `{"type":"track","event":"e","userId":"u",` + at + `}`, `{"event_name":"e","user_id":"u","timestamp":1795441970,"channel":"api"}`},
		{"batch", `{"type":"page","userId":"u",` + at + `}`, `{"event_name":"page","user_id":"u","timestamp":1795441970,"channel":"api"}`},
		{"track", `{"event":"e","anonymousId":"a",` + at + `}`, `{"event_name":"e","user_id":"a","timestamp":1795441970,"channel":"api"}`},
		{"track", `{"event":"e","userId":"","anonymousId":"a",` + at + `}`, `{"event_name":"e","user_id":"a","timestamp":1795441970,"channel":"api"}`},
		{"track", `{"event":"e","userId":null,"anonymousId":"a",` + at + `}`, `{"event_name":"e","user_id":"a","timestamp":1795441970,"channel":"api"}`},
		{"track", `{"event":"e","userId":"u","anonymousId":7,` + at + `}`, `{"event_name":"e","user_id":"u","timestamp":1795441970,"channel":"api"}`},
		{"track", `{"event":"e","userId":"u"}`, `{"event_name":"e","user_id":"u","timestamp":1795441976,"channel":"api"}`},
		{"track", `{"event":"e","userId":"u","sentAt":"2026-11-23T00:00:00Z","originalTimestamp":"2026-11-23T13:52:50Z"}`, `{"event_name":"e","user_id":"u","timestamp":1795441970,"channel":"api"}`},
		{"track", `{"event":"e","userId":"u","timestamp":"2026-11-23T16:52:50.123456+03:00"}`, `{"event_name":"e","user_id":"u","timestamp":1795441970,"channel":"api"}`},
		{"track", `{"event":"e","userId":"u","timestamp":"2026-11-23T13:52:50.5"}`, `{"event_name":"e","user_id":"u","timestamp":1795441970,"channel":"api"}`},
		{"track", `{"event":"e","userId":"u","timestamp":"2026-11-23"}`, `{"event_name":"e","user_id":"u","timestamp":1795392000,"channel":"api"}`},
		{"track", `{"event":"e","userId":"u","channel":"browser",` + at + `}`, `{"event_name":"e","user_id":"u","timestamp":1795441970,"channel":"web"}`},
		{"track", `{"event":"e","userId":"u","channel":"mobile","context":{"library":{"name":"analytics.js"}},` + at + `}`, `{"event_name":"e","user_id":"u","timestamp":1795441970,"channel":"mobile_app"}`},
		{"track", `{"event":"e","userId":"u","channel":"tv","context":{"library":{"name":"analytics.js"}},` + at + `}`, `{"event_name":"e","user_id":"u","timestamp":1795441970,"channel":"web"}`},
		{"track", `{"event":"e","userId":"u","context":{"library":{"version":"1","name":"analytics-react-native"}},` + at + `}`, `{"event_name":"e","user_id":"u","timestamp":1795441970,"channel":"mobile_app"}`},
		{"track", `{"event":"e","userId":"u","context":{"library":{"name":"analytics-kotlin"},"campaign":{"name":"c","source":"s"}},` + at + `}`, `{"event_name":"e","user_id":"u","timestamp":1795441970,"channel":"mobile_app","campaign_id":"c","metadata":{"context":{"campaign":{"source":"s"}}}}`},
		{"track", `{"event":"e","userId":"u","context":[1],"properties": { "a" : [1.50, true, {"b":null}] },` + at + `}`, `{"event_name":"e","user_id":"u","timestamp":1795441970,"channel":"api","metadata":{"a":[1.50,true,{"b":null}]}}`},
		{"page", `{"name":"Home","category":"c","userId":"u","properties":{"url":"/"},` + at + `}`, `{"event_name":"page","user_id":"u","timestamp":1795441970,"channel":"api","metadata":{"name":"Home","category":"c","url":"/"}}`},
		{"page", `{"name":"Home","userId":"u","properties":{ },` + at + `}`, `{"event_name":"page","user_id":"u","timestamp":1795441970,"channel":"api","metadata":{"name":"Home"}}`},
		{"screen", `{"name":"S","userId":"u","properties":{"name":"mine"},` + at + `}`, `{"event_name":"screen","user_id":"u","timestamp":1795441970,"channel":"api","metadata":{"name":"mine"}}`},
		// Numbers are the texts that they were sent as.
		{"track", `{"event":"e","userId":42,` + at + `}`, `{"event_name":"e","user_id":"42","timestamp":1795441970,"channel":"api"}`},
		{"track", `{"event":0,"userId":-1,"messageId":1.50,"anonymousId":"a","context":{"campaign":{"name":7}},` + at + `}`, `{"event_name":"0","user_id":"-1","timestamp":1795441970,"channel":"api","campaign_id":"7","insert_id":"1.50"}`},
		{"track", `{"event":"e","anonymousId":0,` + at + `}`, `{"event_name":"e","user_id":"0","timestamp":1795441970,"channel":"api"}`},
		{"track", `{"event":"e","userId":12345678901234567890,` + at + `}`, `{"event_name":"e","user_id":"12345678901234567890","timestamp":1795441970,"channel":"api"}`},
		// Channels.
		{"track", `{"event":"e","userId":"u","channel":"web",` + at + `}`, `{"event_name":"e","user_id":"u","timestamp":1795441970,"channel":"web"}`},
		{"track", `{"event":"e","userId":"u","channel":"mobile_app","context":{"library":{"name":"analytics.js"}},` + at + `}`, `{"event_name":"e","user_id":"u","timestamp":1795441970,"channel":"mobile_app"}`},
		{"track", `{"event":"e","userId":"u","channel":"api","context":{"library":{"name":"analytics.js"}},` + at + `}`, `{"event_name":"e","user_id":"u","timestamp":1795441970,"channel":"api"}`},
		// A campaign's name is cut to 100 characters, whatever they take.
		{"track", `{"event":"e","userId":"u","context":{"campaign":{"name":"` + strings.Repeat("ş", 101) + `"}},` + at + `}`, `{"event_name":"e","user_id":"u","timestamp":1795441970,"channel":"api","campaign_id":"` + strings.Repeat("ş", 100) + `"}`},
		{"track", `{"event":"e","userId":"u","context":{"campaign":{"name":"` + strings.Repeat(`\ud83d\ude00`, 99) + `\n\u0041\"x"}},` + at + `}`, `{"event_name":"e","user_id":"u","timestamp":1795441970,"channel":"api","campaign_id":"` + strings.Repeat(`\ud83d\ude00`, 99) + `\n"}`},
		{"track", `{"event":"e","userId":"u","context":{"campaign":{"name":"` + strings.Repeat(`\\`, 100) + `"}},` + at + `}`, `{"event_name":"e","user_id":"u","timestamp":1795441970,"channel":"api","campaign_id":"` + strings.Repeat(`\\`, 100) + `"}`},
		{"track", `{"event":"e","userId":"u","context":{"campaign":{"name":` + strings.Repeat(`7`, 101) + `}},` + at + `}`, `{"event_name":"e","user_id":"u","timestamp":1795441970,"channel":"api","campaign_id":"` + strings.Repeat(`7`, 100) + `"}`},
		// The context goes into metadata, as far as it was sent, unless the properties have one.
		{"page", `{"userId":"u","name":"Home","properties":{ "url" : "/" },"context":{"page":{"path":"/p","referrer":"r","title":"T","search":"?q","url":"x"},"campaign":{"name":"c","source":"s","medium":"m","term":"t","content":"k","id":"i"},"locale":"tr-TR","ip":"1.2.3.4","userAgent":"ua"},` + at + `}`,
			`{"event_name":"page","user_id":"u","timestamp":1795441970,"channel":"api","campaign_id":"c","metadata":{"name":"Home","url":"/","context":{"page":{"path":"/p","referrer":"r","title":"T"},"campaign":{"source":"s","medium":"m","term":"t","content":"k"},"locale":"tr-TR"}}}`},
		{"track", `{"event":"e","userId":"u","context":{"page":{"title":404,"path":null,"referrer":{"x":1}},"locale":[1]},` + at + `}`, `{"event_name":"e","user_id":"u","timestamp":1795441970,"channel":"api","metadata":{"context":{"page":{"title":404}}}}`},
		{"track", `{"event":"e","userId":"u","properties":{"context":"own"},"context":{"locale":"tr"},` + at + `}`, `{"event_name":"e","user_id":"u","timestamp":1795441970,"channel":"api","metadata":{"context":"own"}}`},
		{"track", `{"event":"e","userId":"u","properties":null,"context":{"locale":"tr"},` + at + `}`, `{"event_name":"e","user_id":"u","timestamp":1795441970,"channel":"api","metadata":{"context":{"locale":"tr"}}}`},
		{"track", `{"event":"e","userId":"u","properties":{"x":"` + strings.Repeat("x", 16<<10-10) + `"},"context":{"locale":"tr"},` + at + `}`, `{"event_name":"e","user_id":"u","timestamp":1795441970,"channel":"api","metadata":{"x":"` + strings.Repeat("x", 16<<10-10) + `"}}`},
		{"track", `{"event":"e","userId":"u","context":{"locale":"` + strings.Repeat("x", 17<<10) + `"},` + at + `}`, `{"event_name":"e","user_id":"u","timestamp":1795441970,"channel":"api"}`},
		// What was paid.
		{"track", `{"event":"e","userId":"u","properties":{"price":1,"revenue":2,"total":3},` + at + `}`, `{"event_name":"e","user_id":"u","timestamp":1795441970,"channel":"api","metadata":{"price":1,"revenue":2,"total":3}}`},
		{"track", `{"event":"e","userId":"u","properties":{"total":3.10,"revenue":"2.50"},` + at + `}`, `{"event_name":"e","user_id":"u","timestamp":1795441970,"channel":"api","metadata":{"price":"2.50","total":3.10,"revenue":"2.50"}}`},
		{"track", `{"event":"e","userId":"u","properties":{"revenue":null,"total":3},` + at + `}`, `{"event_name":"e","user_id":"u","timestamp":1795441970,"channel":"api","metadata":{"price":3,"revenue":null,"total":3}}`},
		{"track", `{"event":"e","userId":"u","properties":{"revenue":{"v":1},"total":[3]},` + at + `}`, `{"event_name":"e","user_id":"u","timestamp":1795441970,"channel":"api","metadata":{"revenue":{"v":1},"total":[3]}}`},
		{"identify", `{"userId":"u","traits":{"a":1}}`, ``},
		{"batch", `{"type":"alias","userId":5}`, ``},
	} {
		for range 2 { // the second time through a dirty translator
			got, problems, stored := tr.Append([]byte("x"), []byte(c.message), c.kind, now)
			if stored != (c.want != "") || len(problems) > 0 || got[0] != 'x' || stored && !same(t, got[1:], c.want) {
				t.Errorf("%s %.300s:\n got %s %v\nwant %s", c.kind, c.message, got, problems, c.want)
			}
		}
	}
}

// same compares two events, whatever the order of their members.
func same(t *testing.T, got []byte, want string) bool {
	var a, b map[string]any
	if err := json.Unmarshal(got, &a); err != nil {
		t.Errorf("%s: %v", got, err)
	}
	if err := json.Unmarshal([]byte(want), &b); err != nil {
		t.Fatal(want, err)
	}
	return reflect.DeepEqual(a, b)
}

// TestCopies: what an event's own rules refuse is handed on as it was sent, so that they can say so.
func TestCopies(t *testing.T) {
	tr := &Translator{Members: members, MaxMetadata: 16 << 10}
	got, problems, _ := tr.Append(nil, []byte(`{"userId":true,"event":["x"],"messageId":"\u0000","properties": [ 1 ],"context":{"campaign":{"name":{}}}}`), "track", now)
	const want = `{"event_name":["x"],"user_id":true,"campaign_id":{},"insert_id":"\u0000","metadata":[ 1 ],"channel":"api","timestamp":1795441976}`
	if string(got) != want || len(problems) > 0 {
		t.Errorf("%s %v, want %s", got, problems, want)
	}
}

func TestProblems(t *testing.T) {
	tr := &Translator{Members: members, MaxMetadata: 16 << 10}
	for _, c := range []struct{ kind, message, want string }{
		{"batch", `{"event":"e","userId":"u"}`, "type must be track"},
		{"batch", `{"type":"t","event":"e","userId":"u"}`, "type must be track"},
		{"track", `{"event":"e","userId":"u","userId":"v"}`, "userId appears more than once"},
		{"track", `{"event":"e","userId":"u","writeKey":"v","writeKey":"v"}`, "writeKey appears more than once"},
		{"track", "{\"event\":\"e\",\"userId\":\"\xff\"}", "userId is not valid UTF-8 text"},
		{"track", `{"event":"e","userId":"u","timestamp":1795441970}`, "timestamp must be a time of ISO 8601"},
		{"track", `{"event":"e","userId":"u","timestamp":"yesterday"}`, "timestamp must be a time of ISO 8601"},
		{"track", `{"event":"e","userId":"u","timestamp":""}`, "timestamp must be a time of ISO 8601"},
		{"track", `{"event":"e","userId":"u","properties":{"revenue":1,"x":"` + strings.Repeat("x", 16<<10-21) + `"}}`, "with name and category or price"},
		{"page", `{"name":"` + strings.Repeat("x", 17<<10) + `","userId":"u"}`, "metadata would have"},
		{"page", `{"name":"` + strings.Repeat("x", 10<<10) + `","category":"` + strings.Repeat("x", 10<<10) + `","userId":"u"}`, "with name and category"},
	} {
		got, problems, stored := tr.Append(nil, []byte(c.message), c.kind, now)
		if len(problems) != 1 || !strings.Contains(problems[0].Message, c.want) || !strings.HasPrefix(problems[0].Message, problems[0].Field+" ") || !stored || !json.Valid(got) {
			t.Errorf("%.100s: %v, want %s", c.message, problems, c.want)
		}
	}
}

func TestTimes(t *testing.T) {
	const second, minute = 1796066789, 1796066760 // 2026-11-30T19:26:29Z, and without the seconds
	for text, want := range map[string]int64{
		"2026-11-30T19:26Z": minute, "2026-11-30T22:26+03:00": minute, "2026-11-30T22:26:29+03": second, "2026-11-30 19:26:29.123456+00:00": second,
		"2026-11-30 19:26:29+00": second, "2026-11-30 19:26:29Z": second, "2026-11-30t19:26:29z": second, "20261130T192629Z": second,
		"20261130T1926Z": minute, "20261130T192629.5+0300": second - 3*3600, "20261130 1926": minute, "2026-11-30T19:26": minute,
		"2026-11-30T19:26:29": second, "2026-11-30T19:26:29.": 0, "2026-11-30T19:26:29,999Z": second, "2026-11-30T19:26:29." + strings.Repeat("9", 900) + "z": second,
		"2026-11-30T13:56:29-05:30": second, "2026-11-30T13:56:29-0530": second, "2026-11-30T19:26:29-00:00": second, "2026-11-30T19:26:29+00:00": second,
		"2026-11-30T19:26:29+23:59": second - 86340, "2026-11-30T24:00Z": 1796083200, "2026-12-01": 1796083200, "2024-02-29T00:00Z": 1709164800,
		"2016-12-31T23:59:60Z": 1483228800, "1969-12-31T23:59:59.5Z": -1, "0001-01-01T00:00:00Z": -62135596800, "9999-12-31T23:59:59Z": 253402300799,
	} {
		if got, ok := unixOf([]byte(text)); got != want && ok || ok != (want != 0) {
			t.Errorf("%.40s: %d %v, want %d", text, got, ok, want)
		}
	}
	for _, text := range []string{
		"", "2026", "2026-11", "2026-11-3", "20261130", "2026-11-30T", "2026-11-30T19", "2026-11-30T19Z", "2026-11-30T19:2", "2026-11-30T19:26:2Z", "2026-11-30T19:26:", "2026-11-30T19:26ZZ",
		"2026-13-01T00:00Z", "2026-00-01T00:00Z", "2026-02-29T00:00Z", "2026-11-31T00:00Z", "2026-11-00T00:00Z", "2026-11-30T25:00Z", "2026-11-30T24:01Z", "2026-11-30T19:60Z", "2026-11-30T19:26:61Z",
		"2026-11-30T19:26:29+", "2026-11-30T19:26:29+3", "2026-11-30T19:26:29+03:", "2026-11-30T19:26:29+03:0", "2026-11-30T19:26:29+03:000", "2026-11-30T19:26:29+24:00", "2026-11-30T19:26:29+03:60", "2026-11-30T19:26:29 +03",
		"2026-11-30_19:26Z", "2026/11/30T19:26Z", " 2026-11-30T19:26Z", "2026-11-30T19:26Z ", "2026-11-30T19:26.5Z", "+2026-11-30T19:26Z", "-026-11-30T19:26Z", "1796066789", "1796066789000", "yesterday", "2026-11-30T19:26:29\x00", "２026-11-30T19:26Z",
		"2026-11-30T-9:26Z", "2026-11-30\x1419:26Z",
	} {
		if got, ok := unixOf([]byte(text)); ok {
			t.Errorf("%q: %d", text, got)
		}
	}
}

// FuzzTimes: what Go's own reader understands, too, is the same second.
func FuzzTimes(f *testing.F) {
	for _, text := range []string{"2026-11-30T19:26:29Z", "2026-11-30T22:26:29.5+03:00", "2026-11-30T19:26:29", "0000-02-29T00:00:00-00:01"} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		got, ok := unixOf([]byte(text))
		for _, form := range []string{time.RFC3339, "2006-01-02T15:04:05", "20060102T150405Z0700", time.DateOnly} {
			if at, err := time.Parse(form, text); err == nil && ok && got != at.Unix() {
				t.Errorf("%q: %d, want %d", text, got, at.Unix())
			}
		}
	})
}
