// The event alone: the rules, identity, JSON, and canonical encoding. Nothing here needs the stack.

package main

import (
	"bytes"
	"cmp"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"math"
	"os"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/event-ingestion/event-ingestion/internal/testkit"

	"github.com/ClickHouse/ch-go/proto"
	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/valyala/fastjson"
)

func TestEventID(t *testing.T) {
	// printf 'product_view|user_123|1795441976|web' | sha256sum
	const want = "b4ea2f6b0cce4ef075f8939f5d28df2f44873069a128e3173b9bc30bb7bccc2d"
	if id, _ := mustParse(t, new(eventParser), sampleEvent).id(nil); hex.EncodeToString(id[:]) != want {
		t.Errorf("id %x, want %s", id, want)
	}
	// printf 'product_view|user_123|1795441976|web|msg\|\\1' | sha256sum
	const wantFive = "7b75e5eda841356c089c0ac789b6419f7fc7ecdbfb04d3d1be70200612eebe01"
	if id, _ := mustParse(t, new(eventParser), strings.Replace(sampleEvent, "{", `{"insert_id":"msg|\\1",`, 1)).id(nil); hex.EncodeToString(id[:]) != wantFive {
		t.Errorf("with an insert_id %x, want %s", id, wantFive)
	}
	if id, _ := mustParse(t, new(eventParser), strings.Replace(sampleEvent, "{", `{"insert_id":"",`, 1)).id(nil); hex.EncodeToString(id[:]) != want {
		t.Errorf("with an empty insert_id %x, want %s", id, want)
	}
	ids := map[eventID]string{}
	for _, raw := range []string{
		sampleEvent,
		`{"event_name":"a|b","user_id":"c","timestamp":1}`,
		`{"event_name":"a","user_id":"b|c","timestamp":1}`,
		`{"event_name":"a\\","user_id":"b|c","timestamp":1}`,
		`{"event_name":"a\\|b","user_id":"c","timestamp":1}`,
		`{"event_name":"a","user_id":"b","timestamp":1,"channel":"web"}`,
		`{"event_name":"a","user_id":"b","timestamp":1}`,
		`{"event_name":"a","user_id":"b|1","timestamp":1}`,
		`{"event_name":"a","user_id":"b","timestamp":1,"insert_id":"web"}`,
		`{"event_name":"a","user_id":"b","timestamp":1,"insert_id":"|web"}`,
		`{"event_name":"a","user_id":"b","timestamp":1,"insert_id":"\\web"}`,
		`{"event_name":"a","user_id":"b","timestamp":1,"insert_id":"\\|web"}`,
		`{"event_name":"a","user_id":"b","timestamp":1,"channel":"web","insert_id":"web"}`,
	} {
		id, _ := mustParse(t, new(eventParser), raw).id(nil)
		if other, dup := ids[id]; dup {
			t.Errorf("%s and %s share an id", raw, other)
		}
		ids[id] = raw
	}
}

// TestControlCharacters: none is in a name, however it is sent, and nothing else is taken for one.
func TestControlCharacters(t *testing.T) {
	p := new(eventParser)
	for c := rune(0); c < 0x250; c++ {
		want := c < 0x20 || c >= 0x7f && c < 0xa0
		for _, field := range []string{`"event_name":"%s"`, `"user_id":"%s"`, `"campaign_id":"%s"`, `"insert_id":"%s"`, `"tags":["a","%s"]`} {
			forms := []string{fmt.Sprintf(`a\u%04x`, c), fmt.Sprintf(`\u%04xb`, c)}
			if c >= 0x20 && c != '"' && c != '\\' { // JSON has the others only so
				for at := range 20 { // eight bytes are looked at together
					forms = append(forms, strings.Repeat("a", at)+string(c)+strings.Repeat("z", 19-at))
				}
			}
			for _, form := range forms {
				_, problems, err := p.parse([]byte("{" + fmt.Sprintf(field, form) + "}"))
				is := slices.ContainsFunc(problems, func(of problem) bool {
					return strings.HasSuffix(of.message, fmt.Sprintf("contains the control character U+%04X", c))
				})
				if err != nil || is != want {
					t.Errorf("%s: %v %v", fmt.Sprintf(field, form), problems, err)
				}
			}
		}
	}
}

// TestTextsAnywhere: a text is written as JSON that stands for it, and its pipes are escaped, wherever a character stands.
func TestTextsAnywhere(t *testing.T) {
	for c := rune(0); c < 0x250; c++ {
		for at := range 20 {
			text := strings.Repeat("a", at) + string(c) + strings.Repeat("z", 19-at)
			var back string
			for _, written := range [][]byte{appendString(nil, text), appendString(nil, []byte(text))} {
				if err := json.Unmarshal(written, &back); err != nil || back != text {
					t.Fatalf("%q is written as %s: %v", text, written, err)
				}
			}
			want := strings.NewReplacer(`|`, `\|`, `\`, `\\`).Replace(text)
			if got := appendEscapedPipes(nil, []byte(text)); string(got) != want {
				t.Fatalf("%q is escaped as %q", text, got)
			}
		}
	}
}

func TestCanonicalEncoding(t *testing.T) {
	const shuffled = ` { "insert_id" : "i\u007c" , "metadata" : { "b" : [ 1 , 2.50 , "\u00e9\n" ] } , "x":1, "tags" : [ "q\"" ] , "timestamp" : 7 , "user_id" : "\u00fc" , "event_name" : "e" } `
	const want = `{"event_name":"e","user_id":"ü","timestamp":7,"insert_id":"i|","tags":["q\""],"metadata":{"b":[1,2.50,"\u00e9\n"]}}`
	p := new(eventParser)
	for range 2 { // the second time through a dirty parser
		if got := appendEvent(nil, mustParse(t, p, shuffled)); string(got) != want {
			t.Errorf("got  %s\nwant %s", got, want)
		}
		if got := appendEvent(nil, mustParse(t, p, sampleEvent)); !json.Valid(got) {
			t.Errorf("not JSON: %s", got)
		}
	}
}

// TestFields: each field of an event gets through to ClickHouse's columns, and stands in both documents. It fails when a field
// has been forgotten somewhere on its way.
func TestFields(t *testing.T) {
	values := map[string][2]string{ // two different ones for each field, as JSON
		"event_name": {`"a"`, `"b"`}, "user_id": {`"a"`, `"b"`}, "timestamp": {`1`, `2`}, "channel": {`"web"`, `"api"`},
		"campaign_id": {`"a"`, `"b"`}, "tags": {`["a"]`, `["b"]`}, "metadata": {`{"a":1}`, `{"a":2}`}, "insert_id": {`"a"`, `"b"`},
	}
	columns := map[string]string{"insert_id": "event_id"} // where a field is that has no column under its own name
	if n := reflect.TypeFor[event]().NumField(); n != len(fieldNames) {
		t.Errorf("event has %d fields, fieldNames %d", n, len(fieldNames))
	}
	_, document := testkit.ReadDocument(t, "web/openapi.json")
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	for bit, name := range fieldNames {
		if got := fieldByName([]byte(name)); got != 1<<bit || got.name() != name {
			t.Errorf("%s is field %b by name, which is called %s", name, got, got.name())
		}
		if !strings.Contains(document, `"`+name+`":`) || !strings.Contains(string(readme), "\n| "+name+" |") {
			t.Errorf("%s is not in web/openapi.json or not in README.md", name)
		}
		var sent, stored [2]string
		for i, value := range values[name] {
			members := fmt.Sprintf("%q:%s", name, value)
			for _, required := range []string{"event_name", "user_id", "timestamp"} {
				if required != name {
					members += fmt.Sprintf(",%q:%s", required, values[required][0])
				}
			}
			ev := mustParse(t, new(eventParser), "{"+members+"}")
			encoded := appendEvent(nil, ev)
			again := mustParse(t, new(eventParser), string(encoded))
			if !reflect.DeepEqual(ev, again) {
				t.Errorf("%s: sent as {%s}, on Kafka %s", name, members, encoded)
			}
			b := newBlock(2)
			id, _ := again.id(nil)
			b.append(&id, again, &kgo.Record{})
			b.append(&id, again, &kgo.Record{})
			var column proto.Buffer
			for _, c := range b.part(1, 2).columns { // as small rounds are copied
				if c.Name == cmp.Or(columns[name], name) {
					c.Data.EncodeColumn(&column)
				}
			}
			sent[i], stored[i] = string(encoded), string(column.Buf)
		}
		if sent[0] == sent[1] {
			t.Errorf("%s is not on Kafka: %s", name, sent[0])
		}
		if stored[0] == stored[1] {
			t.Errorf("%s is not in its column", name)
		}
	}
}

// TestMaxEncoded: an event of which every byte is escaped takes what maxEncoded says, less a byte for each tag and one more.
func TestMaxEncoded(t *testing.T) {
	var ev event
	quotes := bytes.Repeat([]byte(`"`), maxTextChars)
	for i := range reflect.TypeFor[event]().NumField() {
		field := reflect.ValueOf(&ev).Elem().Field(i)
		switch to := reflect.NewAt(field.Type(), field.Addr().UnsafePointer()).Interface().(type) {
		case *[]byte:
			*to = quotes
		case *[][]byte:
			*to = slices.Repeat([][]byte{quotes}, maxTags)
		case *int64:
			*to = math.MinInt64
		default:
			t.Fatalf("give %T a value that takes the most bytes", to)
		}
	}
	encoded := appendEvent(nil, &ev)
	if got, want := ev.maxEncoded(), len(encoded)+maxTags+1; got != want {
		t.Errorf("maxEncoded is %d, want %d", got, want)
	}
}

// FuzzEvent: whatever parses is encoded as JSON that parses to the same event, with the same id and encoding; and a
// parser that has seen it is as good as new.
func FuzzEvent(f *testing.F) {
	for _, seed := range []string{sampleEvent, `{}`, `{"event_name":"\ud83d\ude00","user_id":"\\|","timestamp":-0}`, `{"metadata":{"a\u0000":"\u007f\ud800"}}`, `[[[[`, `{"tags":["",""],"channel":"api"}`, strings.Replace(sampleEvent, "{", `{"insert_id":"\\|\u00fc",`, 1)} {
		f.Add([]byte(seed))
	}
	dirty, dirtyHollow := new(eventParser), new(eventParser)
	f.Fuzz(func(t *testing.T, raw []byte) {
		ev, problems, err := dirty.parse(raw)
		if err == nil != (json.Valid(raw) && isObject(raw)) && err != errEventTooDeep {
			t.Fatalf("error %v, encoding/json says valid is %v: %q", err, json.Valid(raw), raw)
		}
		if err != nil {
			return
		}
		if _, hollow, _ := dirtyHollow.parse([]byte(withValues(raw))); !slices.Equal(problems, hollow) {
			t.Fatalf("%q has the problems %v, and %v when it is hollow", raw, problems, hollow)
		}
		if len(problems) > 0 {
			return
		}
		encoded := appendEvent(nil, ev)
		id, _ := ev.id(nil)
		if hollow := mustParse(t, dirtyHollow, withValues(raw)); !bytes.Equal(encoded, appendEvent(nil, hollow)) {
			t.Fatalf("%q is %q when it is hollow", raw, appendEvent(nil, hollow))
		}
		if !json.Valid(encoded) || !utf8.Valid(encoded) {
			t.Fatalf("%q is encoded as %q", raw, encoded)
		}
		again := mustParse(t, new(eventParser), string(encoded))
		id2, _ := again.id(nil)
		if second := appendEvent(nil, again); id != id2 || !bytes.Equal(second, encoded) {
			t.Fatalf("%q became %q", encoded, second)
		}
	})
}

// withValues is an event with so many values that fastjson gets it hollow.
func withValues(raw []byte) string {
	members := string(raw[:bytes.LastIndexByte(raw, '}')])
	if strings.TrimSpace(members) != "{" {
		members += ","
	}
	return members + `"many":[0` + strings.Repeat(",0", maxValues) + `]}`
}

// TestKeptParser: a parser that has read events of ever other shapes is as small as maxValues says.
func TestKeptParser(t *testing.T) {
	p := new(eventParser)
	parse := func(kind string, before, within int) {
		item := map[string]string{"array": "0", "object": `"":0`}[kind]
		item = strings.Repeat(item+",", within) + item
		if item = "[" + item + "]"; kind == "object" {
			item = "{" + item[1:len(item)-1] + "}"
		}
		if _, _, err := p.parse([]byte(`{"x":[` + strings.Repeat("0,", before) + item + `]}`)); err != nil {
			t.Fatal(err)
		}
	}
	heap := func() int {
		var m runtime.MemStats
		runtime.GC()
		runtime.GC()
		runtime.ReadMemStats(&m)
		return int(m.HeapAlloc)
	}
	before := heap()
	for slot := range maxValues {
		for within := range maxValues {
			parse("array", slot, within)
			parse("object", slot, within)
		}
	}
	for range 100 {
		parse("array", 0, 30_000)
		parse("object", 0, 30_000)
	}
	parse("array", 0, 0) // lets go of the large text
	kept := heap() - before
	if t.Logf("the parser keeps %d bytes", kept); kept > 128<<10 {
		t.Error("which is too much")
	}
	runtime.KeepAlive(p)
}

func isObject(raw []byte) bool {
	raw = bytes.TrimLeft(raw, " \t\r\n")
	return len(raw) > 0 && raw[0] == '{'
}

// FuzzEventID: two events share an id only when all its fields are the same.
func FuzzEventID(f *testing.F) {
	f.Add("a|b", "c", int64(1), "", "a", "b|c", int64(1), "")
	f.Add(`a\`, "|b", int64(1), "", "a", `\|b`, int64(1), "")
	f.Add("a", "b", int64(1), "", "a", "b", int64(1), "x")
	f.Add("a", "b", int64(1), "x|", "a", "b", int64(1), `x\|`)
	f.Fuzz(func(t *testing.T, name1, user1 string, at1 int64, insert1, name2, user2 string, at2 int64, insert2 string) {
		a := &event{name: []byte(name1), userID: []byte(user1), timestamp: at1, insertID: []byte(insert1)}
		b := &event{name: []byte(name2), userID: []byte(user2), timestamp: at2, insertID: []byte(insert2)}
		idA, _ := a.id(nil)
		idB, _ := b.id(nil)
		if same := name1 == name2 && user1 == user2 && at1 == at2 && insert1 == insert2; same != (idA == idB) {
			t.Fatalf("%q %q %d %q and %q %q %d %q: same is %v, the ids say %v", name1, user1, at1, insert1, name2, user2, at2, insert2, same, !same)
		}
	})
}

// FuzzJSON: the skimmer, fastjson behind it, and encoding/json agree.
func FuzzJSON(f *testing.F) {
	for _, seed := range []string{sampleEvent, ` [ 1 , -0.5e+3 , "\ud83d\ude00\n\/" , { } , [ ] , null , true , false ] `, `[[[[`, `{"a":01}`, `{"a":1,}`, `[1 2]`, `"\ud800"`, `{"a"}`, `[}`, `-`, `1.`, `2e`} {
		f.Add([]byte(seed))
	}
	var r skimmer
	var fast fastjson.Parser
	f.Fuzz(func(t *testing.T, text []byte) {
		r.reset(text)
		v := r.value()
		err := r.end()
		if valid := json.Valid(text); valid != (err == nil) && v.depth < 10000 {
			t.Fatalf("error %v, encoding/json says valid is %v: %q", err, valid, text)
		}
		if err != nil {
			return
		}
		if v.depth >= maxDepth {
			return // which fastjson does not read
		}
		tree, err := fast.ParseBytes(text)
		if err != nil {
			t.Fatalf("fastjson does not read %q: %v", text, err)
		}
		var want bytes.Buffer
		json.Compact(&want, text)
		got := tree.MarshalTo(nil)
		if !bytes.Equal(got, want.Bytes()) {
			t.Fatalf("%q is compact as %q, want %q", text, got, want.Bytes())
		}
		if compact := !v.spaced; compact != (len(v.raw) == want.Len()) {
			t.Fatalf("%q is compact: %v", text, compact)
		}
		if v.raw[0] == '"' && !v.badText {
			var want string
			json.Unmarshal(text, &want)
			if got := r.word(v.raw); string(got) != want {
				t.Fatalf("%q reads %q, want %q", text, got, want)
			}
			if got, _ := tree.StringBytes(); string(got) != want {
				t.Fatalf("fastjson reads %q as %q, want %q", text, got, want)
			}
		}
	})
}

// FuzzSplitBulk: cutting agrees with encoding/json about what the events are.
func FuzzSplitBulk(f *testing.F) {
	for _, seed := range []string{`{"events":[{"a":1},{"b":"]}\\"}]}`, ` { "x" : [ ] , "events" : [ 1 , "," ] } `, `{"events":[1,]}`, `{"events":[`, `{"events":[[}]]}`} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		var pieces [][]byte
		r := skimmer{b: body}
		if err := r.eachEvent("events", maxBulkEvents, nil, func() error {
			v := r.value()
			pieces = append(pieces, v.raw)
			return r.err
		}); err != nil {
			return
		}
		var want struct{ Events []json.RawMessage }
		if err := json.Unmarshal(body, &want); err != nil {
			t.Fatalf("cut %q without complaint, encoding/json says %v", body, err)
		}
		var names map[string]json.RawMessage
		if json.Unmarshal(body, &names); len(names["events"]) == 0 || strings.Count(strings.ToLower(string(body)), "events") > 1 {
			return // encoding/json folds the case of names and takes the last of two
		}
		if len(pieces) != len(want.Events) {
			t.Fatalf("%q: %d pieces, want %d", body, len(pieces), len(want.Events))
		}
		for i := range pieces {
			if !bytes.Equal(bytes.TrimSpace(pieces[i]), bytes.TrimSpace(want.Events[i])) {
				t.Fatalf("%q: piece %d is %q, want %q", body, i, pieces[i], want.Events[i])
			}
		}
	})
}
