// Messages into events: each field's way.

package segment

import (
	"bytes"
	"encoding/json"
	"reflect"
	"strings"
	"testing"
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
		{"track", `{"event":"e","userId":"u","context":{"library":{"name":"analytics-kotlin"},"campaign":{"name":"c","source":"s"}},` + at + `}`, `{"event_name":"e","user_id":"u","timestamp":1795441970,"channel":"mobile_app","campaign_id":"c"}`},
		{"track", `{"event":"e","userId":"u","context":[1],"properties": { "a" : [1.50, true, {"b":null}] },` + at + `}`, `{"event_name":"e","user_id":"u","timestamp":1795441970,"channel":"api","metadata":{"a":[1.50,true,{"b":null}]}}`},
		{"page", `{"name":"Home","category":"c","userId":"u","properties":{"url":"/"},` + at + `}`, `{"event_name":"page","user_id":"u","timestamp":1795441970,"channel":"api","metadata":{"name":"Home","category":"c","url":"/"}}`},
		{"page", `{"name":"Home","userId":"u","properties":{ },` + at + `}`, `{"event_name":"page","user_id":"u","timestamp":1795441970,"channel":"api","metadata":{"name":"Home"}}`},
		{"screen", `{"name":"S","userId":"u","properties":{"name":"mine"},` + at + `}`, `{"event_name":"screen","user_id":"u","timestamp":1795441970,"channel":"api","metadata":{"name":"mine"}}`},
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
	got, problems, _ := tr.Append(nil, []byte(`{"userId":5,"event":["x"],"messageId":"\u0000","properties": [ 1 ],"context":{"campaign":{"name":{}}}}`), "track", now)
	const want = `{"event_name":["x"],"user_id":5,"campaign_id":{},"insert_id":"\u0000","metadata":[ 1 ],"channel":"api","timestamp":1795441976}`
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
		{"page", `{"name":"` + strings.Repeat("x", 17<<10) + `","userId":"u"}`, "metadata would have"},
		{"page", `{"name":"` + strings.Repeat("x", 10<<10) + `","category":"` + strings.Repeat("x", 10<<10) + `","userId":"u"}`, "with name and category"},
	} {
		got, problems, stored := tr.Append(nil, []byte(c.message), c.kind, now)
		if len(problems) != 1 || !strings.Contains(problems[0].Message, c.want) || !strings.HasPrefix(problems[0].Message, problems[0].Field+" ") || !stored || !json.Valid(got) {
			t.Errorf("%.100s: %v, want %s", c.message, problems, c.want)
		}
	}
}
