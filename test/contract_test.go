// The contract, case by case, over real HTTP, Kafka protocol and ClickHouse: the routes, ids, and that the OpenAPI document says
// what the program does.

package test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/event-ingestion/event-ingestion/internal/testkit"

	"github.com/klauspost/compress/zstd"
)

func TestContract(t *testing.T) {
	t.Parallel()
	p := startProgram(t, newSpace(t))
	now := time.Now().Unix()
	expand := strings.NewReplacer(
		"$NOW", fmt.Sprint(now), "$FUTURE", fmt.Sprint(now+60), "$OLD", fmt.Sprint(now-31*86400), "$EDGE", fmt.Sprint(now-30*86400+5), "$MS", fmt.Sprint(now*1000),
		"$100", strings.Repeat("ö", 100), "$101", strings.Repeat("x", 101), "$17K", strings.Repeat("x", 17<<10), "$SPACES17K", strings.Repeat(" ", 17<<10),
		"$DEEP", strings.Repeat("[", 20000), "$21TAGS", `"a"`+strings.Repeat(`,"a"`, 20), "$20TAGS", `"a"`+strings.Repeat(`,"a"`, 19), "$MANY", strings.ReplaceAll(`{`+good+`}`+strings.Repeat(`,{`+good+`}`, 1000), "$NOW", fmt.Sprint(now)),
		"$NEST301", strings.Repeat("[", 301)+strings.Repeat("]", 301), "$65K", strings.Repeat("x", 65<<10), "$TAGS1000", strings.Repeat(`,"tags":0`, 1000),
		"$70K", strings.Repeat(" ", 70<<10), "$9M", strings.Repeat(" ", 9<<20),
	)
	for _, c := range []struct {
		name, method, path, contentType, body string
		status                                int
		want                                  string // parts of the answer, separated by …
	}{
		{"single", "POST", onePath, jsonCT, `{` + good + `}`, 202, `{"event_id":"…","status":"queued"}`},
		{"no content type", "POST", onePath, "", `{` + good + `}`, 202, `queued`},
		{"content type with charset", "POST", onePath, "Application/JSON; charset=utf-8", `{` + good + `}`, 202, `queued`},
		{"every field", "POST", onePath, jsonCT, `{` + good + `,"channel":"web","campaign_id":"c","tags":["a","b"],"metadata":{"price":1.5,"nested":{"a":[1,null]}}}`, 202, `queued`},
		{"spaces around", "POST", onePath, jsonCT, " \n{ " + good + " }\t\n", 202, `queued`},
		{"null is absent", "POST", onePath, jsonCT, `{` + good + `,"channel":null,"tags":null,"metadata":null,"campaign_id":null}`, 202, `queued`},
		{"unknown fields", "POST", onePath, jsonCT, `{` + good + `,"x":{"y":[]},"z":1}`, 202, `queued`},
		{"100 characters", "POST", onePath, jsonCT, `{"event_name":"$100","user_id":"$100","timestamp":$NOW,"campaign_id":"$100","tags":["$100"]}`, 202, `queued`},
		{"insert_id", "POST", onePath, jsonCT, `{` + good + `,"insert_id":"$100"}`, 202, `queued`},
		{"insert_id null", "POST", onePath, jsonCT, `{` + good + `,"insert_id":null}`, 202, `queued`},
		{"insert_id too long", "POST", onePath, jsonCT, `{` + good + `,"insert_id":"$101"}`, 400, `"field":"insert_id","code":"validation.max-length.error"`},
		{"insert_id type", "POST", onePath, jsonCT, `{` + good + `,"insert_id":7}`, 400, `"field":"insert_id","code":"validation.invalid-format.error"`},
		{"insert_id control character", "POST", onePath, jsonCT, `{` + good + `,"insert_id":"a\n"}`, 400, `"field":"insert_id","code":"validation.invalid-format.error"`},
		{"20 tags", "POST", onePath, jsonCT, `{` + good + `,"tags":[$20TAGS]}`, 202, `queued`},
		{"oldest", "POST", onePath, jsonCT, `{"event_name":"e","user_id":"u","timestamp":$EDGE}`, 202, `queued`},
		{"emoji escape", "POST", onePath, jsonCT, `{"event_name":"\ud83d\ude00","user_id":"u","timestamp":$NOW}`, 202, `queued`},

		{"empty", "POST", onePath, jsonCT, ``, 400, `{"error":"invalid request body","detail":"…"}`},
		{"not json", "POST", onePath, jsonCT, `{"event_name":`, 400, `"error":"invalid request body"`},
		{"trailing", "POST", onePath, jsonCT, `{` + good + `}x`, 400, `"error":"invalid request body"`},
		{"bad number", "POST", onePath, jsonCT, `{` + good + `,"metadata":{"a":01}}`, 400, `"error":"invalid request body"`},
		{"bad escape", "POST", onePath, jsonCT, `{` + good + `,"metadata":{"a":"\x"}}`, 400, `"error":"invalid request body"`},
		{"too deep", "POST", onePath, jsonCT, `{` + good + `,"x":$DEEP`, 400, `nested more than 300`},
		{"array", "POST", onePath, jsonCT, `[]`, 400, `must be a JSON object`},
		{"all missing", "POST", onePath, jsonCT, `{}`, 400, `"error":"validation failed"…"field":"event_name","code":"validation.required.error"…"field":"user_id","code":"validation.required.error"…"field":"timestamp","code":"validation.required.error"`},
		{"empty strings", "POST", onePath, jsonCT, `{"event_name":"","user_id":"","timestamp":$NOW}`, 400, `"event_name","code":"validation.required.error"…"user_id","code":"validation.required.error"`},
		{"all problems at once", "POST", onePath, jsonCT, `{"event_name":"$101","user_id":5,"timestamp":$OLD,"channel":"tv","tags":[1]}`, 400, `max-length.error…user_id","code":"validation.invalid-format.error…invalid-channel.error…tags[0] must be a string…timestamp-expired.error`},
		{"name too long", "POST", onePath, jsonCT, `{"event_name":"$101","user_id":"u","timestamp":$NOW}`, 400, `"field":"event_name","code":"validation.max-length.error"`},
		{"user too long", "POST", onePath, jsonCT, `{"event_name":"e","user_id":"$101","timestamp":$NOW}`, 400, `"field":"user_id","code":"validation.max-length.error"`},
		{"campaign too long", "POST", onePath, jsonCT, `{` + good + `,"campaign_id":"$101"}`, 400, `"field":"campaign_id","code":"validation.max-length.error"`},
		{"future", "POST", onePath, jsonCT, `{"event_name":"e","user_id":"u","timestamp":$FUTURE}`, 400, `validation.timestamp-future.error`},
		{"expired", "POST", onePath, jsonCT, `{"event_name":"e","user_id":"u","timestamp":$OLD}`, 400, `validation.timestamp-expired.error`},
		{"zero", "POST", onePath, jsonCT, `{"event_name":"e","user_id":"u","timestamp":0}`, 400, `validation.timestamp-expired.error`},
		{"milliseconds", "POST", onePath, jsonCT, `{"event_name":"e","user_id":"u","timestamp":$MS}`, 400, `validation.invalid-format.error…milliseconds`},
		{"timestamp string", "POST", onePath, jsonCT, `{"event_name":"e","user_id":"u","timestamp":"$NOW"}`, 400, `"field":"timestamp","code":"validation.invalid-format.error"`},
		{"timestamp with .0", "POST", onePath, jsonCT, `{"event_name":"e","user_id":"u","timestamp":$NOW.0}`, 202, `queued`},
		{"timestamp fraction", "POST", onePath, jsonCT, `{"event_name":"e","user_id":"u","timestamp":$NOW.5}`, 400, `"field":"timestamp","code":"validation.invalid-format.error"`},
		{"timestamp huge", "POST", onePath, jsonCT, `{"event_name":"e","user_id":"u","timestamp":99999999999999999999}`, 400, `"field":"timestamp","code":"validation.invalid-format.error"`},
		{"channel", "POST", onePath, jsonCT, `{` + good + `,"channel":"tv"}`, 400, `validation.invalid-channel.error`},
		{"channel type", "POST", onePath, jsonCT, `{` + good + `,"channel":1}`, 400, `"field":"channel","code":"validation.invalid-format.error"`},
		{"21 tags", "POST", onePath, jsonCT, `{` + good + `,"tags":[$21TAGS]}`, 400, `validation.max-tags.error`},
		{"tag too long", "POST", onePath, jsonCT, `{` + good + `,"tags":["a","$101"]}`, 400, `validation.tag-too-long.error","message":"tags[1]`},
		{"tags type", "POST", onePath, jsonCT, `{` + good + `,"tags":"a"}`, 400, `"field":"tags","code":"validation.invalid-format.error"`},
		{"metadata type", "POST", onePath, jsonCT, `{` + good + `,"metadata":[]}`, 400, `"field":"metadata","code":"validation.invalid-format.error"`},
		{"metadata size", "POST", onePath, jsonCT, `{` + good + `,"metadata":{"a":"$17K"}}`, 400, `"field":"metadata","code":"validation.max-length.error"`},
		{"metadata size as sent", "POST", onePath, jsonCT, `{` + good + `,"metadata":{"a":$SPACES17K1}}`, 400, `"field":"metadata","code":"validation.max-length.error"`},
		{"spaces outside metadata", "POST", onePath, jsonCT, `{` + good + `,$SPACES17K"metadata":{"a":1}}`, 202, `queued`},
		{"twice", "POST", onePath, jsonCT, `{` + good + `,"user_id":"v"}`, 400, `"field":"user_id","code":"validation.invalid-format.error"…more than once`},
		{"twice, one escaped", "POST", onePath, jsonCT, `{` + good + `,"user\u005fid":"v"}`, 400, `more than once`},
		{"control character", "POST", onePath, jsonCT, `{"event_name":"a\u0000b","user_id":"u","timestamp":$NOW}`, 400, `"field":"event_name","code":"validation.invalid-format.error"…U+0000`},
		{"delete character", "POST", onePath, jsonCT, `{"event_name":"e","user_id":"u\u007f","timestamp":$NOW}`, 400, `"field":"user_id","code":"validation.invalid-format.error"`},
		{"C1 control character", "POST", onePath, jsonCT, "{\"event_name\":\"a\u009b2J\",\"user_id\":\"u\",\"timestamp\":$NOW}", 400, `"field":"event_name","code":"validation.invalid-format.error"…U+009B`},
		{"control character in a tag", "POST", onePath, jsonCT, `{` + good + `,"tags":["\n"]}`, 400, `"field":"tags","code":"validation.invalid-format.error"`},
		{"invalid UTF-8", "POST", onePath, jsonCT, "{\"event_name\":\"\xff\",\"user_id\":\"u\",\"timestamp\":$NOW}", 400, `"field":"event_name","code":"validation.invalid-format.error"`},
		{"invalid UTF-8 in metadata", "POST", onePath, jsonCT, "{" + good + ",\"metadata\":{\"\xc3\":1}}", 400, `"field":"metadata","code":"validation.invalid-format.error"`},
		{"half a surrogate", "POST", onePath, jsonCT, `{"event_name":"e","user_id":"\ud83d","timestamp":$NOW}`, 400, `"field":"user_id","code":"validation.invalid-format.error"`},
		{"single too large", "POST", onePath, jsonCT, `{` + good + `}$70K`, 413, `"error":"request body too large"`},
		{"form", "POST", onePath, "application/x-www-form-urlencoded", `a=b`, 415, `"error":"unsupported content type"`},
		{"ndjson to single", "POST", onePath, ndjson, `{` + good + `}`, 415, `"error"`},

		{"bulk", "POST", bulkPath, jsonCT, `{"events":[{` + good + `},{` + good + `,"channel":"web"}]}`, 202, `{"success_count":2,"failed_count":0,"errors":[]}`},
		{"bulk with other members", "POST", bulkPath, jsonCT, ` { "a" : [1, {"b":"]}"}] , "events" : [ {` + good + `} ] , "c" : "\"" } `, 202, `"success_count":1`},
		{"bulk part", "POST", bulkPath, jsonCT, `{"events":[{` + good + `},{"user_id":"u","timestamp":$NOW},{` + good + `}]}`, 207, `{"success_count":2,"failed_count":1,"errors":[{"index":1,"error":"event_name is required","code":"validation.required.error","field":"event_name"}]}`},
		{"bulk none", "POST", bulkPath, jsonCT, `{"events":[{},5]}`, 400, `"success_count":0,"failed_count":2…"index":0…"index":1…must be a JSON object…"error":"validation failed"`},
		{"bulk empty", "POST", bulkPath, jsonCT, `{"events":[]}`, 400, `"error":"invalid request body"…missing or empty`},
		{"bulk missing", "POST", bulkPath, jsonCT, `{}`, 400, `missing or empty`},
		{"bulk not an array", "POST", bulkPath, jsonCT, `{"events":{}}`, 400, `in which \"events\" is an array`},
		{"bulk null", "POST", bulkPath, jsonCT, `{"events":null}`, 400, `in which \"events\" is an array`},
		{"bulk array only", "POST", bulkPath, jsonCT, `[{` + good + `}]`, 400, `must be a JSON object`},
		{"bulk twice, one escaped", "POST", bulkPath, jsonCT, `{"\u0065vents":[{` + good + `}],"events":[{` + good + `}]}`, 400, `more than once`},
		{"bulk escaped", "POST", bulkPath, jsonCT, `{"\u0065vents":[{` + good + `}]}`, 202, `"success_count":1`},
		{"bulk, one of 65 KiB", "POST", bulkPath, jsonCT, `{"events":[{` + good + `},{` + good + `,"x":"$65K"}]}`, 207, `"index":1,"error":"the event is larger than 64 KiB","code":"validation.max-length.error","field":""}`},
		{"bulk, one too deep", "POST", bulkPath, jsonCT, `{"events":[{` + good + `},{` + good + `,"x":$NEST301}]}`, 207, `"index":1,"error":"values are nested more than 300 deep","code":"validation.invalid-format.error"`},
		{"bulk, another member deep", "POST", bulkPath, jsonCT, `{"x":$NEST301,"events":[{` + good + `}]}`, 202, `"success_count":1`},
		{"ndjson, one of 65 KiB", "POST", bulkPath, ndjson, "{" + good + "}\n{" + good + `,"x":"$65K"}`, 207, `"index":1,"error":"the event is larger than 64 KiB","code":"validation.max-length.error"`},
		{"repeated fields", "POST", onePath, jsonCT, `{` + good + `$TAGS1000}`, 400, `"errors":[{"field":"tags","code":"validation.invalid-format.error","message":"tags must be an array of strings, not number"},{"field":"tags","code":"validation.invalid-format.error","message":"tags appears more than once"}…`},
		{"bulk twice", "POST", bulkPath, jsonCT, `{"events":[{` + good + `}],"events":[{` + good + `}]}`, 400, `more than once`},
		{"bulk too many", "POST", bulkPath, jsonCT, `{"events":[$MANY]}`, 400, `more than 1000`},
		{"bulk cut off", "POST", bulkPath, jsonCT, `{"events":[{` + good + `},{"event_name`, 400, `"error":"invalid request body"`},
		{"bulk not json late", "POST", bulkPath, jsonCT, `{"events":[{` + good + `},{"a":tru}]}`, 400, `events[1]`},
		{"bulk trailing", "POST", bulkPath, jsonCT, `{"events":[{` + good + `}]}]`, 400, `"error":"invalid request body"`},
		{"bulk too large", "POST", bulkPath, jsonCT, `{"events":[]$9M}`, 413, `"error"`},
		{"ndjson", "POST", bulkPath, ndjson, "{" + good + "}\r\n\n{" + good + "}", 202, `"success_count":2`},
		{"ndjson part", "POST", bulkPath, ndjson, "{" + good + "}\nnope\n{" + good + "}\n", 207, `"success_count":2,"failed_count":1…"index":1`},
		{"text", "POST", onePath, "text/plain;charset=UTF-8", `{` + good + `}`, 202, `queued`},
		{"text that is none", "POST", onePath, "text/plain", `event_name=e`, 400, `"error":"invalid request body"`},
		{"text bulk", "POST", bulkPath, "text/plain", ` {"x":[{}],"\u0065vents":[{` + good + `}]}`, 202, `"success_count":1`},
		{"text bulk cut off", "POST", bulkPath, "text/plain", `{"x":[{}],"events":[{` + good + `}`, 400, `"error":"invalid request body"`},
		{"text line", "POST", bulkPath, "text/plain", `{` + good + `}`, 202, `"success_count":1`},
		{"text lines", "POST", bulkPath, "text/plain", "\n{" + good + "}\n{}\n{" + good + "}", 207, `"success_count":2,"failed_count":1`},
		{"text array", "POST", bulkPath, "text/plain", `[{` + good + `}]`, 400, `must be a JSON object`},
		{"text that is no bulk", "POST", bulkPath, "text/plain", `hello`, 400, `"success_count":0,"failed_count":1`},
		{"text empty", "POST", bulkPath, "text/plain", ``, 400, `no line with an event`},
		{"ndjson, no space of JSON", "POST", bulkPath, ndjson, "{" + good + "}\n\u00a0{" + good + "}\n\v\n\t{" + good + "} \n", 207, `"success_count":2,"failed_count":2…"index":1…"index":2`},
		{"ndjson empty", "POST", bulkPath, ndjson, "\n\n", 400, `no line with an event`},
		{"mark", "POST", onePath, jsonCT, "\ufeff{}", 400, `byte order mark: send UTF-8 without one`},
		{"bulk mark", "POST", bulkPath, jsonCT, "\ufeff{}", 400, `byte order mark`},
		{"ndjson mark", "POST", bulkPath, ndjson, "\ufeff{}", 400, `byte order mark`},
		{"batch mark", "POST", "/v1/batch", jsonCT, "\ufeff{}", 400, `byte order mark`},
		{"track mark", "POST", "/v1/track", jsonCT, "\ufeff{}", 400, `byte order mark`},
		{"UTF-16", "POST", onePath, jsonCT, "\xff\xfe{\x00}\x00", 400, `byte order mark`},

		{"metrics", "GET", metricsPath + "event_name=nothing&from=1&to=$NOW", "", "", 200, `{"total_count":0,"unique_users":0,"complete_through":`},
		{"metrics grouped", "GET", metricsPath + "event_name=nothing&from=1&to=$NOW&group_by=day", "", "", 200, `"grouped_data":[]`},
		{"metrics before 1970", "GET", metricsPath + "event_name=e&from=-300&to=-50", "", "", 200, `"total_count":0`},
		{"metrics after 2106", "GET", metricsPath + "event_name=e&from=4294967296&to=4294967297&group_by=hour", "", "", 200, `"total_count":0`},
		{"metrics all missing", "GET", metricsPath, "", "", 400, `event_name","code":"validation.required.error"…"from","code":"validation.required.error"…"to","code":"validation.required.error"`},
		{"metrics range", "GET", metricsPath + "event_name=e&from=5&to=5", "", "", 400, `validation.invalid-range.error`},
		{"metrics channel", "GET", metricsPath + "event_name=e&from=5&to=6&channel=tv", "", "", 400, `validation.invalid-channel.error`},
		{"metrics group", "GET", metricsPath + "event_name=e&from=5&to=6&group_by=minute", "", "", 400, `validation.invalid-group-by.error`},
		{"metrics number", "GET", metricsPath + "event_name=e&from=x&to=6", "", "", 400, `"field":"from","code":"validation.invalid-format.error"`},
		{"metrics twice", "GET", metricsPath + "event_name=e&event_name=f&from=5&to=6", "", "", 400, `more than once`},
		{"metrics injection", "GET", metricsPath + "event_name=%27+OR+1%3D1+--%5C&from=1&to=$NOW", "", "", 200, `"total_count":0`},

		{"health", "GET", "/health", "", "", 200, `{"status":"ok"}`},
		{"ready", "GET", "/ready", "", "", 200, "\"kafka\":\"ok\",\n\"clickhouse\":\"ok\",\n\"consumers\":\"ok\""},
		{"unknown path", "GET", "/api/v2", "", "", 404, `"error":"not found"`},
		{"unclean path", "POST", "/api//v1/events", jsonCT, `{}`, 404, `"error":"not found"`},
		{"wrong method", "PUT", onePath, "", "", 405, `"error":"method not allowed"`},
		{"wrong method on metrics", "DELETE", "/api/v1/metrics", "", "", 405, `"error":"method not allowed"`},
	} {
		t.Run(c.name, func(t *testing.T) {
			p.t = t
			status, header, answer := p.do(c.method, expand.Replace(c.path), c.contentType, "", []byte(expand.Replace(c.body)))
			if status != c.status {
				t.Fatalf("status %d, want %d: %s", status, c.status, answer)
			}
			rest := answer
			for _, part := range strings.Split(expand.Replace(c.want), "…") {
				_, after, ok := strings.Cut(rest, part)
				if !ok {
					t.Fatalf("%q is not in order in %s", part, answer)
				}
				rest = after
			}
			if header.Get("Content-Type") != jsonCT || !json.Valid([]byte(answer)) {
				t.Errorf("not a JSON answer: %s %s", header.Get("Content-Type"), answer)
			}
			if status == 405 && header.Get("Allow") == "" {
				t.Error("405 without Allow")
			}
		})
	}
}

// TestEventIDs: the answer, the record's key and the row have the id that the contract says, whatever is in the fields.
func TestEventIDs(t *testing.T) {
	t.Parallel()
	env := newSpace(t)
	p := startProgram(t, env)
	now := time.Now().Unix()
	if got, want := eventID("product_view", "user_123", 1795441976, "web"), "b4ea2f6b0cce4ef075f8939f5d28df2f44873069a128e3173b9bc30bb7bccc2d"; got != want {
		t.Fatalf("the test's own id is %s, want %s", got, want) // printf 'product_view|user_123|1795441976|web' | sha256sum
	}
	var all []string
	for _, e := range []struct{ name, user, channel, insertID string }{
		{"view", "u", "web", ""}, {"view", "u", "", ""}, {"a|b", "c", "", ""}, {"a", "b|c", "", ""}, {`a\`, "b|c", "", ""}, {`a\|b`, "c", "", ""}, {"ü😀", `"`, "api", ""},
		{"view", "u", "web", "1"}, {"view", "u", "", "web"}, {"view", "u", "", `\|web`}, {"view", "u", "", "|web"}, {"view", "u", "mobile_app", "ö"},
	} {
		sent := map[string]any{"event_name": e.name, "user_id": e.user, "timestamp": now, "channel": e.channel}
		want := eventID(e.name, e.user, now, e.channel)
		if e.insertID != "" {
			sent["insert_id"], want = e.insertID, eventID(e.name, e.user, now, e.channel, e.insertID)
		}
		body, _ := json.Marshal(sent)
		if status, _, answer := p.do("POST", onePath, jsonCT, "", body); status != 202 || answer != `{"event_id":"`+want+`","status":"queued"}` {
			t.Errorf("%s: %d %s, want %s", body, status, answer, want)
		}
		all = append(all, want)
	}
	slices.Sort(all)
	var keys []string
	for _, rec := range testkit.ReadTopic(t, kafkaBrokers(t), space(env, "KAFKA_TOPIC"), len(all)) {
		keys = append(keys, string(rec.Key))
	}
	if slices.Sort(keys); !slices.Equal(keys, all) {
		t.Errorf("keys %q, want %q", keys, all)
	}
	drained(p)
	rows := clickhouseQuery(t, "SELECT lower(hex(event_id)) AS id FROM "+space(env, "CLICKHOUSE_DATABASE")+".events ORDER BY id")
	if want := strings.Join(all, "\n"); rows != want {
		t.Errorf("rows %s, want %s", rows, want)
	}
}

func TestContentEncoding(t *testing.T) {
	t.Parallel()
	p := startProgram(t, newSpace(t))
	body := fmt.Appendf(nil, `{"events":[{"event_name":"e","user_id":"u","timestamp":%d}]}`, time.Now().Unix())
	bomb := bytes.Repeat([]byte(" "), 50<<20)
	gz, zs := testkit.Gzipped(body), testkit.Zstded(body)
	single, _ := zstd.NewWriter(nil, zstd.WithSingleSegment(true))
	for _, c := range []struct {
		name, encoding string
		body           []byte
		status         int
	}{
		{"gzip", "gzip", gz, 202},
		{"zstd", "zstd", zs, 202},
		{"gzip again, from the pool", "gzip", gz, 202},
		{"zstd again, from the pool", "zstd", zs, 202},
		{"identity", "identity", body, 202},
		{"deflate", "deflate", body, 415},
		{"gzip cut off", "gzip", gz[:len(gz)-5], 400},
		{"zstd cut off", "zstd", zs[:len(zs)-5], 400},
		{"gzip that is none", "gzip", body, 400},
		{"zstd that is none", "zstd", body, 400},
		{"gzip after a broken one", "gzip", gz, 202},
		{"gzip bomb", "gzip", testkit.Gzipped(bomb), 413},
		{"zstd bomb", "zstd", testkit.Zstded(bomb), 413},
		{"zstd after a bomb", "zstd", zs, 202},
		{"zstd that states its size", "zstd", single.EncodeAll(bomb, nil), 413},
	} {
		if status, _, answer := p.do("POST", bulkPath, jsonCT, c.encoding, c.body); status != c.status {
			t.Errorf("%s: status %d, want %d: %s", c.name, status, c.status, answer)
		}
	}
	var wide bytes.Buffer
	z, _ := zstd.NewWriter(&wide, zstd.WithWindowSize(16<<20))
	z.Write(body)
	z.Flush() // the size is not known when the frame begins
	z.Close()
	if status, _, answer := p.do("POST", bulkPath, jsonCT, "zstd", wide.Bytes()); status != 400 || !strings.Contains(answer, "larger than 8 MiB") {
		t.Errorf("a wide window: %d %s", status, answer)
	}
}

// TestClockSkew: an event from a clock that is ahead is taken, up to the setting, and counted when its time has come.
func TestClockSkew(t *testing.T) {
	t.Parallel()
	p := startProgram(t, newSpace(t, "CLOCK_SKEW=1m"))
	body := func(at int64) []byte { return fmt.Appendf(nil, `{"event_name":"s","user_id":"u","timestamp":%d}`, at) }
	count := func(path string) (now int64, counted bool) {
		now = time.Now().Unix()
		status, _, answer := p.do("GET", fmt.Sprintf(path, now-60, now), "", "", nil)
		if status != 200 {
			t.Fatal(status, answer)
		}
		return now, strings.Contains(answer, `"total_count":1,`)
	}
	ahead := time.Now().Unix() + 5
	if status, _, answer := p.do("POST", onePath, jsonCT, "", body(ahead)); status != 202 {
		t.Fatal(status, answer)
	}
	drained(p)
	for _, path := range []string{metricsPath + "event_name=s&from=%d&to=%d", metricsPath + "event_name=s&from=%d&to=%d&group_by=hour", "/api/v1/overview?from=%d&to=%d"} {
		p.await("counted", 30*time.Second, func() bool {
			now, counted := count(path)
			if counted != (now >= ahead) {
				t.Fatalf("%s: at %d an event of %d is counted: %v", path, now, ahead, counted)
			}
			return counted
		})
	}
	if status, _, answer := p.do("POST", onePath, jsonCT, "", body(time.Now().Unix()+70)); status != 400 || !strings.Contains(answer, "validation.timestamp-future.error") {
		t.Errorf("beyond it: %d %s", status, answer)
	}
	if status, _, answer := p.do("POST", bulkPath, ndjson, "", slices.Concat(body(time.Now().Unix()+50), []byte("\n"), body(time.Now().Unix()+150))); status != 207 || !strings.Contains(answer, "validation.timestamp-future.error") {
		t.Errorf("bulk: %d %s", status, answer)
	}
}

// TestDocumentStatuses produces every status that the document has, and no other.
func TestDocumentStatuses(t *testing.T) {
	alone(t)
	doc, _ := testkit.ReadDocument(t, "web/openapi.json")
	want := map[string]bool{}
	for path, methods := range doc.Paths {
		for method, op := range methods {
			for status := range op.Responses {
				want[strings.ToUpper(method)+" "+path+" "+status] = true
			}
		}
	}
	p := startProgram(t, newSpace(t, "API_KEYS="+firstKey, "WRITE_KEYS="+secondKey, "ACK_TIMEOUT=1s", "MAX_IN_FLIGHT_BYTES_PER_CLIENT=100000"))
	got := map[string]bool{}
	try := func(method, path, contentType, body string, headers ...string) {
		status, _, _ := p.ask(method, path, []byte(body), append(headers, "Content-Type: "+contentType)...)
		path, _, _ = strings.Cut(path, "?")
		got[fmt.Sprintf("%s %s %d", method, path, status)] = true
		if status == http.StatusMethodNotAllowed { // stands with the methods that are there
			delete(got, fmt.Sprintf("%s %s %d", method, path, status))
			for m := range doc.Paths[path] {
				got[fmt.Sprintf("%s %s %d", strings.ToUpper(m), path, status)] = true
			}
		}
	}
	key := "X-API-Key: " + firstKey
	event := func() string { return string(testkit.FreshEvent("d")) }
	const metrics, overview, pipeline = "/api/v1/metrics", "/api/v1/overview", "/api/v1/pipeline"
	asked := metrics + "?event_name=d&from=1&to=2"
	for _, path := range []string{onePath, bulkPath} {
		try("POST", path, jsonCT, event())
		try("POST", path, jsonCT, "{", key)
		try("POST", path, "text/html", "x", key)
		try("POST", path, "text/plain", "x", key, "Origin: https://other.example")
		try("POST", path, jsonCT, strings.Repeat(" ", 9<<20), key)
		try("PUT", path, jsonCT, "", key)
	}
	try("POST", onePath, jsonCT, event(), key)
	try("POST", bulkPath, ndjson, event(), key)
	try("POST", bulkPath, ndjson, event()+"\n{}", key)
	for path, body := range map[string]string{onePath: event(), bulkPath: event() + "\n" + event()} {
		media := map[string]string{onePath: jsonCT, bulkPath: ndjson}[path]
		p.await("stored", time.Minute, func() bool { // 202 when it takes longer than 5 s
			try("POST", path+"?wait=stored", media, body, key)
			return got["POST "+path+" 200"]
		})
	}
	segmentParts := []string{"batch", "track", "page", "screen", "identify", "group", "alias"}
	for _, part := range segmentParts {
		message := `{"event":"d","userId":"u"}`
		if part == "batch" {
			message = `{"batch":[` + message + `]}`
		}
		path := "/v1/" + part
		try("POST", path, jsonCT, message)
		try("POST", path, jsonCT, message, key)
		try("POST", path, jsonCT, "{", key)
		try("POST", path, "text/html", "x", key)
		try("POST", path, "text/plain", "x", key, "Origin: https://other.example")
		try("POST", path, jsonCT, strings.Repeat(" ", 9<<20), key)
		try("PUT", path, jsonCT, "", key)
	}
	for _, path := range []string{asked, overview, pipeline, onePath} {
		try("GET", path, "", "")
		try("GET", path, "", "", key)
		try("GET", path, "", "", "X-API-Key: "+secondKey)
		try("DELETE", path, "", "", key)
	}
	try("GET", metrics, "", "", key)
	try("GET", overview+"?from=x", "", "", key)
	try("GET", pipeline+"?x=1", "", "", key)
	try("GET", onePath+"?limit=0", "", "", key)
	for _, path := range []string{"/health", "/ready"} {
		try("GET", path, "", "")
		try("POST", path, "", "")
	}
	var slow []net.Conn
	p.await("too much in flight", 20*time.Second, func() bool {
		conn, err := net.Dial("tcp", strings.TrimPrefix(p.url, "http://")) // one that is refused itself leaves it to the next
		if err != nil {
			t.Fatal(err)
		}
		slow = append(slow, conn)
		fmt.Fprintf(conn, "POST %s HTTP/1.1\r\nHost: x\r\n%s\r\nContent-Length: 1000000\r\n\r\n%s", bulkPath, key, strings.Repeat(" ", 200_000))
		status, _, _ := p.ask("POST", onePath, []byte(event()), key)
		return status == http.StatusTooManyRequests
	})
	try("POST", onePath, jsonCT, event(), key)
	try("POST", bulkPath, ndjson, event(), key)
	for _, part := range segmentParts {
		try("POST", "/v1/"+part, jsonCT, "{}", key)
	}
	for _, conn := range slow {
		conn.Close()
	}
	p.await("gone", 10*time.Second, func() bool {
		status, _, _ := p.ask("POST", onePath, []byte(event()), key)
		return status == http.StatusAccepted
	})
	control(t, "/clickhouse/pause")
	impatient := &http.Client{Timeout: 300 * time.Millisecond} // a question that is let in waits for ten seconds
	p.await("too many questions waiting", time.Minute, func() bool {
		p.flood(50, asked, key)
		question, err := http.NewRequest("GET", p.url+asked, nil)
		if err != nil {
			t.Fatal(err)
		}
		question.Header.Set("X-API-Key", firstKey)
		resp, err := impatient.Do(question)
		if err != nil {
			return false
		}
		resp.Body.Close()
		if resp.StatusCode == http.StatusTooManyRequests { // until those that wait have waited for long enough
			try("GET", asked, "", "", key)
			try("GET", overview, "", "", key)
		}
		return got["GET "+metrics+" 429"] && got["GET "+overview+" 429"]
	})
	control(t, "/clickhouse/resume")
	control(t, "/kafka/stop")
	try("POST", onePath, jsonCT, event(), key)
	try("POST", bulkPath, ndjson, event(), key)
	try("POST", "/v1/batch", jsonCT, `{"batch":[{"type":"track","event":"d","userId":"u"}]}`, key)
	for _, part := range []string{"track", "page", "screen"} {
		try("POST", "/v1/"+part, jsonCT, `{"event":"d","userId":"u"}`, key)
	}
	try("GET", "/ready", "", "")
	control(t, "/kafka/start")
	control(t, "/clickhouse/stop")
	try("GET", asked, "", "", key)
	try("GET", overview, "", "", key)
	try("GET", onePath, "", "", key)
	control(t, "/clickhouse/start")
	for s := range want {
		if !got[s] {
			t.Errorf("%s is documented and was not produced", s)
		}
	}
	for s := range got {
		if !want[s] {
			t.Errorf("%s was produced and is not documented", s)
		}
	}
}
