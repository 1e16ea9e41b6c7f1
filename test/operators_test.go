// The commands of operators: audit, rewind, reconcile, dlq.

package test

import (
	crand "crypto/rand"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/twmb/franz-go/pkg/kadm"
	"github.com/twmb/franz-go/pkg/kfake"
	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// TestAuditOfHours: one hour lacks what another has too much of.
func TestAuditOfHours(t *testing.T) {
	t.Parallel()
	env := newSpace(t)
	p := startProgram(t, env)
	begun := (time.Now().Unix()/hourSeconds - 5) * hourSeconds
	postAll(t, p, numbered("hours", 400, 400, func(i int) int64 { return begun + int64(i%2)*hourSeconds }))
	drained(p)
	if out, code := subcommand(t, env, "audit"); code != 0 {
		t.Error(code, out)
	}
	for i, n := range []int64{-100, 100} {
		clickhouseQuery(t, fmt.Sprintf("INSERT INTO %[1]s.events_hourly SELECT * REPLACE (toInt64(%[2]d) AS event_count) FROM %[1]s.events_hourly WHERE hour = %[3]d LIMIT 1",
			space(env, "CLICKHOUSE_DATABASE"), n, begun+int64(i)*hourSeconds))
	}
	if out, code := subcommand(t, env, "audit"); code != 1 || !strings.Contains(out, "counted too few or too many, hour by hour  200") {
		t.Error(code, out)
	}
}

// TestAuditInPasses: what is read in many passes, for want of memory, is what is read in one.
func TestAuditInPasses(t *testing.T) {
	t.Parallel()
	env := newSpace(t)
	p := startProgram(t, env)
	at := time.Now().Unix() - hourSeconds
	const events = 15_000 // more than a MiB holds
	bodies := numbered("passes", events, 1000, func(int) int64 { return at })
	postAll(t, p, append(bodies, bodies[0]))
	drained(p)
	clickhouseQuery(t, fmt.Sprintf("DELETE FROM %s.events WHERE user_id = 'u7'", space(env, "CLICKHOUSE_DATABASE")))
	read := func(memory string) string {
		out, code := subcommand(t, env, "audit -json -memory "+memory)
		if code != 1 { // an event is nowhere
			t.Errorf("%d %s", code, out)
		}
		return out
	}
	whole := read("1024")
	for _, want := range []string{`"distinct_events":15000,`, `"stored":14999,`, `"nowhere":["` + eventID("passes", "u7", at, "") + `"]`, `"duplicates":1000,`} {
		if !strings.Contains(whole, want) {
			t.Errorf("%s lacks %s", whole, want)
		}
	}
	if passes := read("1"); passes != whole {
		t.Errorf("in one pass %s, in several %s", whole, passes)
	}
}

// TestAuditOfReplays: a letter that came back and was stored is no end of its event, once both tables have lost it.
func TestAuditOfReplays(t *testing.T) {
	t.Parallel()
	env := newSpace(t, "MAX_RETRY_ATTEMPTS=0")
	db := space(env, "CLICKHOUSE_DATABASE")
	p := startProgram(t, env)
	clickhouseQuery(t, "ALTER TABLE "+db+".events ADD CONSTRAINT good CHECK user_id != 'bad'")
	event := fmt.Appendf(nil, `{"event_name":"letter","user_id":"bad","timestamp":%d}`, time.Now().Unix()-2*hourSeconds)
	if status, _, answer := p.do("POST", onePath, jsonCT, "", event); status != http.StatusAccepted {
		t.Fatal(status, answer)
	}
	drained(p)
	audit := func(wantCode int, want string) {
		t.Helper()
		if out, code := subcommand(t, env, "audit -json"); code != wantCode || !strings.Contains(out, want) {
			t.Error(code, out)
		}
	}
	audit(0, `"dead_letters":1`)
	clickhouseQuery(t, "ALTER TABLE "+db+".events DROP CONSTRAINT good")
	if out, code := subcommand(t, env, "dlq replay"); code != 0 {
		t.Fatal(out)
	}
	p.awaitCount("letter", 1)
	drained(p)
	audit(0, `"dead_letters":0`)
	for _, table := range []string{"events", "events_hourly"} {
		clickhouseQuery(t, "TRUNCATE TABLE "+db+"."+table)
	}
	audit(1, `"difference":1`)
}

// TestAuditBesideRetention: what is still to be read expires. Nobody waits for it.
func TestAuditBesideRetention(t *testing.T) {
	t.Parallel()
	brokers, err := kfake.NewCluster(kfake.NumBrokers(2), kfake.GroupMinSessionTimeout(time.Second))
	if err != nil {
		t.Fatal(err)
	}
	defer brokers.Close()
	env := newSpace(t, "KAFKA_BROKERS="+strings.Join(brokers.ListenAddrs(), ","), "KAFKA_PARTITIONS=1")
	makeTables(t, env)
	kafka, err := kgo.NewClient(kgo.SeedBrokers(brokers.ListenAddrs()...))
	if err != nil {
		t.Fatal(err)
	}
	defer kafka.Close()
	topic := space(env, "KAFKA_TOPIC")
	const records = 4
	for range records { // of which one or two fill a fetch
		rec := &kgo.Record{Topic: topic, Key: []byte("k"), Value: make([]byte, 900_000)}
		crand.Read(rec.Value)
		if err := kafka.ProduceSync(t.Context(), rec).FirstErr(); err != nil {
			t.Fatal(err)
		}
	}
	var fetched atomic.Int32
	brokers.ControlKey(int16(kmsg.Fetch), func(r kmsg.Request) (kmsg.Response, error, bool) {
		brokers.KeepControl()
		if asks := slices.ContainsFunc(r.(*kmsg.FetchRequest).Topics, func(t kmsg.FetchRequestTopic) bool { return len(t.Partitions) > 0 }); !asks || fetched.Add(1) != 2 {
			return nil, nil, false
		}
		brokers.SleepControl(func() { // the reader has the first of them, and asks for more
			all := kadm.Offsets{topic: {0: {Topic: topic, At: records}}}
			if _, err := kadm.NewClient(kafka).DeleteRecords(t.Context(), all); err != nil {
				t.Error(err)
			}
		})
		return nil, nil, false
	})
	out, code := subcommand(t, env, "audit -json")
	if code != 0 || fetched.Load() < 2 || strings.Contains(out, fmt.Sprintf(`"no_event":%d,`, records)) {
		t.Errorf("after %d fetches: %d %s", fetched.Load(), code, out)
	}
}

// TestRewind: events are lost in one table, in both, or are as they were at an earlier time; after a rewind both tables
// have each of them once.
func TestRewind(t *testing.T) {
	t.Parallel()
	env := faultSpace(t)
	db := space(env, "CLICKHOUSE_DATABASE")
	p := startProgram(t, env)
	sent := 0
	send := func(n int) {
		var body []byte
		for range n {
			body = fmt.Appendf(body, `{"event_name":"rewound","user_id":"u%d","timestamp":%d}`+"\n", sent, time.Now().Unix()-int64(sent)*2000)
			sent++
		}
		if status, _, answer := p.do("POST", bulkPath, ndjson, "", body); status != http.StatusAccepted {
			t.Fatal(status, answer)
		}
		drained(p)
	}
	// each runs a query for every monthly partition of a table.
	each := func(table, query string) {
		for partition := range strings.SplitSeq(clickhouseQuery(t, "SELECT DISTINCT partition_id FROM system.parts WHERE active AND database = '"+db+"' AND table = '"+table+"'"), "\n") {
			if partition != "" {
				clickhouseQuery(t, fmt.Sprintf(query, db, partition))
			}
		}
	}
	send(250)
	for _, table := range []string{"events", "events_hourly"} { // a backup
		clickhouseQuery(t, fmt.Sprintf("CREATE TABLE %[1]s.%[2]s_backup AS %[1]s.%[2]s", db, table))
		each(table, "ALTER TABLE %[1]s."+table+"_backup REPLACE PARTITION ID '%[2]s' FROM %[1]s."+table)
	}
	second := time.Now()
	p.await("another second", 5*time.Second, func() bool { return time.Now().Unix() > second.Unix() })
	send(250)
	for what, lose := range map[string]func(){
		"nothing":                     func() {},
		"partitions of events":        func() { each("events", "ALTER TABLE %s.events DROP PARTITION ID '%s'") },
		"partitions of events_hourly": func() { each("events_hourly", "ALTER TABLE %s.events_hourly DROP PARTITION ID '%s'") },
		"both tables": func() {
			clickhouseQuery(t, "TRUNCATE TABLE "+db+".events")
			clickhouseQuery(t, "TRUNCATE TABLE "+db+".events_hourly")
		},
		"what came after the backup": func() {
			for _, table := range []string{"events", "events_hourly"} {
				clickhouseQuery(t, "TRUNCATE TABLE "+db+"."+table)
				each(table+"_backup", "ALTER TABLE %[1]s."+table+" REPLACE PARTITION ID '%[2]s' FROM %[1]s."+table+"_backup")
			}
		},
	} {
		if out, code := subcommand(t, env, "rewind -to start"); code != 1 || !strings.Contains(out, "members") {
			t.Errorf("while consumers run: %d %s", code, out)
		}
		p.terminate()
		lose()
		to := "start"
		if what == "what came after the backup" {
			to = second.UTC().Format(time.RFC3339)
		}
		if out, code := subcommand(t, env, "rewind -dry-run -to "+to); code != 0 || !strings.Contains(out, "would be read again") {
			t.Errorf("%s, dry run: %d %s", what, code, out)
		}
		out, code := subcommand(t, env, "rewind -to "+to)
		if code != 0 {
			t.Fatalf("%s: %d %s", what, code, out)
		}
		p = startProgram(t, env)
		drained(p)
		mustCount(t, env, "rewound", int64(sent))
		t.Logf("lost %s: %s", what, out[strings.LastIndex(strings.TrimSpace(out), "\n")+1:])
	}
	for args, want := range map[string]string{"": "has to be a time", "-to yesterday": "has to be a time", "-to 1960-01-01T00:00:00Z": "has to be a time", "-to 2100-01-01T00:00:00Z": "has to be a time"} {
		if out, code := subcommand(t, env, "rewind "+args); code != 2 || !strings.Contains(out, want) {
			t.Errorf("%q: %d %s", args, code, out)
		}
	}
}

// TestReconcile: an aggregate that lost an hour and counted another twice is mended, once.
func TestReconcile(t *testing.T) {
	t.Parallel()
	env := newSpace(t)
	p := startProgram(t, env)
	db := space(env, "CLICKHOUSE_DATABASE")
	var body []byte
	at := time.Now().Unix()/3600*3600 - 7200
	for i := range 100 {
		body = fmt.Appendf(body, `{"event_name":"purchase","user_id":"u%d","timestamp":%d,"campaign_id":"c%d","metadata":{"price":2.5,"currency":"TRY"}}`+"\n", i, at+int64(i%2)*3600+int64(i), i%3)
	}
	if status, _, answer := p.do("POST", bulkPath, ndjson, "", body); status != http.StatusAccepted {
		t.Fatal(status, answer)
	}
	drained(p)
	const figures = "SELECT sum(event_count), sum(revenue), uniqCombined64Merge(17)(unique_users_state), uniqCombined64Merge(12)(campaigns_state) FROM "
	want := clickhouseQuery(t, figures+db+".events_hourly")
	clickhouseQuery(t, fmt.Sprintf("INSERT INTO %s.events_hourly SELECT * FROM %[1]s.events_hourly WHERE hour = %d SETTINGS insert_deduplicate = 0", db, at))
	clickhouseQuery(t, fmt.Sprintf("ALTER TABLE %s.events_hourly DELETE WHERE hour = %d SETTINGS mutations_sync = 1", db, at+3600))
	p.await("quiet for long enough", 30*time.Second, func() bool {
		out, _ := subcommand(t, env, "reconcile -dry-run")
		return strings.Contains(out, "2 rows of events_hourly differ")
	})
	lines, code := subcommand(t, env, "reconcile -dry-run -json")
	for line := range strings.Lines(lines) {
		var d struct {
			Event    string `json:"event_name"`
			InEvents int64  `json:"in_events"`
			InHourly int64  `json:"in_events_hourly"`
		}
		if err := json.Unmarshal([]byte(line), &d); err != nil || d.Event != "purchase" || d.InEvents != 50 || d.InHourly != 100 && d.InHourly != 0 {
			t.Errorf("%v %s", err, line)
		}
	}
	if code != 0 || strings.Count(lines, "\n") != 2 {
		t.Errorf("%d %s", code, lines)
	}
	if out, code := subcommand(t, env, "audit -json"); code != 0 && code != 1 || !json.Valid([]byte(out)) || !strings.Contains(out, `"distinct_events":100,`) {
		t.Errorf("%d %s", code, out)
	}
	if out, code := subcommand(t, env, "reconcile"); code != 0 || !strings.Contains(out, "2 rows") {
		t.Fatalf("%d %s", code, out)
	}
	if out, code := subcommand(t, env, "reconcile"); code != 0 || !strings.Contains(out, "0 rows") {
		t.Errorf("a second time: %d %s", code, out)
	}
	if got := clickhouseQuery(t, figures+db+".events_hourly"); got != want {
		t.Errorf("mended to %s, want %s", got, want)
	}
}

// TestReplayOfMuch: letters of one partition that together are more than the brokers take at once, and one that is more than
// they take by default.
func TestReplayOfMuch(t *testing.T) {
	t.Parallel()
	env := newSpace(t, "KAFKA_COMPRESSION=none")
	p := startProgram(t, env)
	topic := space(env, "KAFKA_TOPIC")
	kafka, err := kgo.NewClient(kgo.SeedBrokers(kafkaBrokers(t)...), kgo.ProducerBatchMaxBytes(10_000_000), kgo.ProducerBatchCompression(kgo.NoCompression()))
	if err != nil {
		t.Fatal(err)
	}
	defer kafka.Close()
	for i := range 15 {
		size := 700 << 10
		if i == 0 {
			size = 2 << 20
		}
		letter := fmt.Sprintf(`{"event_name":"much","user_id":"u","timestamp":%d,"unread":"%s"}`, time.Now().Unix()/3600*3600, strings.Repeat("x", size))
		if err := kafka.ProduceSync(t.Context(), &kgo.Record{Topic: topic + ".dlq", Value: []byte(letter)}).FirstErr(); err != nil {
			t.Fatal(err)
		}
	}
	if out, code := subcommand(t, env, "dlq replay"); code != 0 || !strings.Contains(out, "15 letters put back") {
		t.Errorf("dlq replay: %d %s", code, out)
	}
	p.await("stored once", 20*time.Second, func() bool {
		return clickhouseQuery(t, "SELECT count(), sum(event_count) FROM "+space(env, "CLICKHOUSE_DATABASE")+".events_hourly") == "1\t1"
	})
}

// TestToolArguments: what a subcommand does not understand is no reason to do something else.
func TestToolArguments(t *testing.T) {
	t.Parallel()
	env := newSpace(t)
	for _, args := range []string{"audit x", "reconcile dry-run", "reconcile -recount", "reconcile -recount -from 1 -to 2 -dry-run", "reconcile -rebuild", "rewind -to start x", "dlq list x", "dlq replay 0:17", "dlq show 0:17x", "dlq show 0:17 0:18", "audit -from 20 -to 10", "reconcile -from 20 -to 20", "audit -from 1795x"} {
		if out, code := subcommand(t, env, args); code != 2 || !strings.Contains(out, ": ") {
			t.Errorf("%s: %d %s", args, code, out)
		}
	}
	for args, want := range map[string]string{"dlq -h": "without it, -type and -filter: all letters", "healthcheck -h": "ready, else 1"} {
		if out, code := subcommand(t, env, args); code != 0 || !strings.Contains(out, want) {
			t.Errorf("%s: %d %s", args, code, out)
		}
	}
}
