// The events themselves: listed by pages and exported, each stored event once, and taken again with the same ids.

package test

import (
	"encoding/json"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/event-ingestion/event-ingestion/internal/testkit"
)

// listed is an event of a page.
type listed struct {
	ID        string          `json:"event_id"`
	Name      string          `json:"event_name"`
	User      string          `json:"user_id"`
	At        int64           `json:"timestamp"`
	Channel   string          `json:"channel"`
	Campaign  string          `json:"campaign_id"`
	InsertID  string          `json:"insert_id"`
	Tags      []string        `json:"tags"`
	Metadata  json.RawMessage `json:"metadata"`
	Received  time.Time       `json:"received_at"`
	Unchanged json.RawMessage `json:"-"`
}

// page asks for one page of events.
func (p *program) page(query url.Values) (events []listed, next string) {
	p.t.Helper()
	status, _, answer := p.ask("GET", onePath+"?"+query.Encode(), nil)
	var a struct {
		Events []json.RawMessage
		Next   string
	}
	if err := json.Unmarshal([]byte(answer), &a); err != nil || status != 200 {
		p.t.Fatalf("%s: %d %.300s", query.Encode(), status, answer)
	}
	for _, raw := range a.Events {
		e := listed{Unchanged: raw}
		if err := json.Unmarshal(raw, &e); err != nil {
			p.t.Fatal(err)
		}
		events = append(events, e)
	}
	return events, a.Next
}

// pages asks for all of them, and calls between after each.
func (p *program) pages(query url.Values, between func()) (events []listed) {
	p.t.Helper()
	query.Del("before")
	for {
		page, next := p.page(query)
		if events = append(events, page...); next == "" {
			return events
		}
		query.Set("before", next)
		between()
	}
}

func queryOf(parameters ...any) url.Values {
	q := url.Values{}
	for i := 0; i < len(parameters); i += 2 {
		q.Set(parameters[i].(string), fmt.Sprint(parameters[i+1]))
	}
	return q
}

// TestEventPages: pages of any size neither miss nor repeat an event that was stored when the first was asked for, while others come in
// at both ends and in between; many events share a second, some rows are there twice.
func TestEventPages(t *testing.T) {
	t.Parallel()
	env := newSpace(t)
	p := startProgram(t, env)
	db := space(env, "CLICKHOUSE_DATABASE")
	for _, table := range []string{"events", "events_hourly"} {
		clickhouseQuery(t, "SYSTEM STOP MERGES "+db+"."+table)
	}
	now := time.Now().Unix()
	// Bursts of a second, single events days apart, and everything in between.
	insert := func(label string, rows int, at string) {
		clickhouseQuery(t, fmt.Sprintf("INSERT INTO %s.events (event_id, event_name, channel, user_id, timestamp, campaign_id) SELECT SHA256(concat('%s', toString(number))), ['a', 'b', 'c'][number %% 3 + 1], "+
			"['web', ''][number %% 2 + 1], concat('u', toString(number %% 7)), toDateTime(%d - %s), if(number %% 5 = 0, 'c', '') FROM numbers(%d)", db, label, now, at, rows))
	}
	insert("burst", 300, "7")
	insert("spread", 400, "number * number * 13 % 2000000")
	insert("twice", 50, "number * 100")
	insert("twice", 50, "number * 100")
	type key struct {
		at int64
		id string
	}
	stored := func(where string) (all []key) {
		answer := clickhouseQuery(t, fmt.Sprintf("SELECT DISTINCT toUnixTimestamp(timestamp), lower(hex(event_id)) FROM %s.events WHERE %s ORDER BY timestamp DESC, event_id DESC", db, where))
		for line := range strings.SplitSeq(answer, "\n") {
			var k key
			if line != "" {
				fmt.Sscan(line, &k.at, &k.id)
				all = append(all, k)
			}
		}
		return all
	}
	month := now - 30*daySeconds
	everything := stored("1")
	for _, c := range []struct {
		where string
		query url.Values
	}{
		{"1", queryOf("from", month, "limit", 1000)}, {"1", queryOf("from", month, "limit", 7)}, {fmt.Sprintf("timestamp >= %d", now-daySeconds), queryOf("to", now)},
		{"event_name = 'a'", queryOf("from", month, "event_name", "a", "limit", 13)}, {"user_id = 'u3' AND channel = 'web'", queryOf("from", month, "user_id", "u3", "channel", "web", "limit", 3)},
		{"campaign_id = 'c'", queryOf("from", month, "campaign_id", "c", "limit", 1)}, {fmt.Sprintf("timestamp BETWEEN %d AND %d", now-7, now-6), queryOf("from", now-7, "to", now-6, "limit", 11)},
		{"0", queryOf("from", month, "event_name", "none' OR 1=1 --")}, {"0", queryOf("from", 1, "to", 2)},
	} {
		var got []key
		for _, e := range p.pages(c.query, func() {}) {
			got = append(got, key{e.At, e.ID})
		}
		if want := stored(c.where); !slices.Equal(got, want) {
			t.Errorf("%s: %d events, want %d", c.query.Encode(), len(got), len(want))
		}
	}
	came := 0
	seen := map[key]int{}
	for _, e := range p.pages(queryOf("from", month, "to", now, "limit", 20), func() {
		insert(fmt.Sprint("late", came), 30, "number * number * 29 % 3000")
		came++
	}) {
		seen[key{e.At, e.ID}]++
	}
	for k, times := range seen {
		if times != 1 {
			t.Errorf("%v came %d times", k, times)
		}
	}
	for _, k := range everything {
		if seen[k] != 1 {
			t.Errorf("%v was stored, and came %d times", k, seen[k])
		}
	}
	if came < 30 || len(seen) <= len(everything) {
		t.Errorf("%d pages, %d events", came, len(seen))
	}
	insert("ahead", 5, "(-100)")
	if events, _ := p.page(queryOf("to", now+200)); len(events) != 50 || events[0].At != now+100 {
		t.Errorf("%d events, the first %+v", len(events), events[0])
	}
	for query, field := range map[string]string{"limit=0": "limit", "limit=1001": "limit", "limit=x": "limit", "limit=": "limit", "before=": "before", "before=%21": "before", "before=AAAA": "before", "from=5&to=5": "to",
		"from=x": "from", "channel=tv": "channel", "tz=UTC": "tz", "group_by=day": "group_by", "user_id=%FF": "user_id", "before=" + strings.Repeat("_", 64): ""} {
		status, _, answer := p.ask("GET", onePath+"?"+query, nil)
		if field == "" && status == 200 {
			continue
		}
		if status != 400 || !strings.Contains(answer, `"field":"`+field+`"`) {
			t.Errorf("%s: %d %s", query, status, answer)
		}
	}
}

// TestExport: what was sent is listed and exported as it was, and what is exported has the same ids when another system takes it. A page
// of large events is bounded.
func TestExport(t *testing.T) {
	t.Parallel()
	env := newSpace(t)
	p := startProgram(t, env)
	base := time.Now().Unix() - 5000
	var sent []string
	metadata := func(i int) string {
		return fmt.Sprintf(`{"n":%d.10,"big":12345678901234567890.5,"text":"<&>\u2028 é \" \\ %s","list":[null,true,{}]}`, i, strings.Repeat("x", i%3*5000))
	}
	for i := range 600 {
		e := map[string]any{"event_name": []string{"view", `o'dd "name" \|`}[i%2], "user_id": fmt.Sprint("u\\|", i%7), "timestamp": base + int64(i/2), "metadata": json.RawMessage(metadata(i))}
		if i%3 > 0 {
			e["insert_id"] = fmt.Sprintf(`id|\%d é`, i)
		}
		if i%4 == 0 {
			e["channel"], e["campaign_id"], e["tags"] = "web", "c|", []string{"a", "", `"`}
		}
		var b strings.Builder
		encoder := json.NewEncoder(&b)
		encoder.SetEscapeHTML(false)
		encoder.Encode(e)
		sent = append(sent, b.String())
	}
	for part := range slices.Chunk(sent, 300) {
		if status, _, answer := p.do("POST", bulkPath, ndjson, "", []byte(strings.Join(part, ""))); status != 202 {
			t.Fatal(status, answer)
		}
	}
	drained(p)
	all := p.pages(queryOf("from", base, "limit", 1000), func() {})
	pages := 0
	p.pages(queryOf("from", base, "limit", 1000), func() { pages++ })
	byKey := map[string]listed{}
	for _, e := range all {
		byKey[fmt.Sprint(e.Name, e.User, e.At, e.InsertID)] = e
	}
	for _, text := range sent {
		var want listed
		json.Unmarshal([]byte(text), &want)
		got := byKey[fmt.Sprint(want.Name, want.User, want.At, want.InsertID)]
		if string(got.Metadata) != string(want.Metadata) || got.Channel != want.Channel || got.Campaign != want.Campaign || !slices.Equal(got.Tags, want.Tags) || len(got.ID) != 64 || time.Since(got.Received).Abs() > time.Hour {
			t.Errorf("%.300s\nis listed as\n%.300s", text, got.Unchanged)
		}
	}
	if len(all) != len(byKey) {
		t.Errorf("%d events are listed, %d of them different", len(all), len(byKey))
	}
	out, code := subcommand(t, env, fmt.Sprintf("export -from %d", base))
	lines := strings.Split(strings.TrimSpace(out), "\n")
	if code != 0 || len(lines) != len(all) {
		t.Fatalf("exit code %d, %d lines of %d: %.500s", code, len(lines), len(all), out)
	}
	for i, line := range lines {
		if line != string(all[i].Unchanged) {
			t.Errorf("line %d is\n%.300s, listed is\n%.300s", i, line, all[i].Unchanged)
		}
	}
	other := newSpace(t)
	q := startProgram(t, other)
	for part := range slices.Chunk(lines, 300) {
		if status, _, answer := q.do("POST", bulkPath, ndjson, "", []byte(strings.Join(part, "\n"))); status != 202 {
			t.Fatal(status, answer)
		}
	}
	drained(q)
	again := q.pages(queryOf("from", base, "limit", 1000), func() {})
	if len(again) != len(all) {
		t.Fatalf("%d events, want %d", len(again), len(all))
	}
	for i := range again {
		got, want := again[i], all[i]
		if got.ID != want.ID || got.InsertID != want.InsertID || string(got.Metadata) != string(want.Metadata) {
			t.Errorf("%.200s\ncame back as\n%.200s", want.Unchanged, got.Unchanged)
		}
	}
	if out, code := subcommand(t, env, fmt.Sprintf("export -from %d -to %d -event-name view", base+10, base+20)); code != 0 || strings.Count(out, `"event_name":"view"`) != 10 || strings.Count(out, "\n") != 10 {
		t.Errorf("%d %.300s", code, out)
	}
	for args, want := range map[string]string{"export -format csv": "ndjson or parquet", "export -from 5 -to 5": "-to", "export x": "unexpected argument", "export -from x": "-from", "export -from -10 -to -5": "1970"} {
		if out, code := subcommand(t, env, args); code != 2 || !strings.Contains(out, want) {
			t.Errorf("%s: %d %s", args, code, out)
		}
	}
	if out, code := subcommand(t, env, "export -format parquet -clickhouse-url http://127.0.0.1:1"); code != 1 || !strings.Contains(out, "-clickhouse-url") {
		t.Errorf("no ClickHouse there: %d %s", code, out)
	}

	// Events as large as they can be: a page ends early.
	var large []string
	for i := range 600 {
		large = append(large, fmt.Sprintf(`{"event_name":"large","user_id":"u%d","timestamp":%d,"metadata":{"x":"%s"}}`+"\n", i, base+int64(i)%3, strings.Repeat("y", 16000)))
	}
	for part := range slices.Chunk(large, 300) {
		if status, _, answer := p.do("POST", bulkPath, ndjson, "", []byte(strings.Join(part, ""))); status != 202 {
			t.Fatal(status, answer)
		}
	}
	drained(p)
	first, next := p.page(queryOf("from", base, "event_name", "large", "limit", 1000))
	if len(first) < 200 || len(first) > 300 || next == "" {
		t.Errorf("%d events of 16 KB on a page", len(first))
	}
	ids := map[string]bool{}
	for _, e := range p.pages(queryOf("from", base, "event_name", "large", "limit", 1000), func() {}) {
		ids[e.ID] = true
	}
	if len(ids) != 600 {
		t.Errorf("%d large events, want 600", len(ids))
	}
}

// TestExportParquet: ClickHouse reads what it has written, and finds what is stored.
func TestExportParquet(t *testing.T) {
	t.Parallel()
	env := newSpace(t)
	p := startProgram(t, env)
	var body []byte
	for range 500 {
		body = append(append(body, testkit.FreshEvent("parquet")...), '\n')
	}
	if status, _, answer := p.do("POST", bulkPath, ndjson, "", body); status != 202 {
		t.Fatal(status, answer)
	}
	drained(p)
	first, _, _ := strings.Cut(stackEnv(t, "CLICKHOUSE_HTTP_PORT"), ",")
	file := filepath.Join(t.TempDir(), "events.parquet")
	cmd := command(t, env, "export", "-event-name", "parquet", "-format", "parquet", "-clickhouse-url", "http://127.0.0.1:"+first)
	out, err := cmd.Output()
	if err != nil || len(out) < 1000 || string(out[:4]) != "PAR1" || string(out[len(out)-4:]) != "PAR1" {
		t.Fatalf("%v, %d bytes: %.300s", err, len(out), out)
	}
	if err := os.WriteFile(file, out, 0o600); err != nil {
		t.Fatal(err)
	}
	// The file is sent along as the rows of an insert.
	db := space(env, "CLICKHOUSE_DATABASE")
	clickhouseQuery(t, "CREATE TABLE "+db+".copy (event_id String, event_name String, user_id String, timestamp UInt32, channel String, campaign_id String, insert_id String, tags Array(String), metadata String, received_at DateTime64(3)) ENGINE = Memory")
	clickhouseQuery(t, "INSERT INTO "+db+".copy FORMAT Parquet\n"+string(out))
	same := clickhouseQuery(t, fmt.Sprintf("SELECT count(), countIf((event_id, user_id, timestamp, metadata) IN (SELECT lower(hex(event_id)), user_id, toUnixTimestamp(timestamp), metadata FROM %[1]s.events)) FROM %[1]s.copy", db))
	if same != "500\t500" {
		t.Errorf("%s of 500 events are as they are stored", same)
	}
}
