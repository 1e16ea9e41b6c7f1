// What is on the topics and in the tables: junk, rows that are refused, aggregates that are torn, a cluster's schema.

package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/twmb/franz-go/pkg/kgo"
)

// TestJunk: what is no event goes to the dead letters with its headers; what others write in their own way is
// understood; nothing stops a partition.
func TestJunk(t *testing.T) {
	t.Parallel()
	env := newSpace(t)
	p := startProgram(t, env)
	topic := space(env, "KAFKA_TOPIC")
	kafka, err := kgo.NewClient(kgo.SeedBrokers(kafkaBrokers(t)...), kgo.RecordPartitioner(kgo.ManualPartitioner()), kgo.ProducerBatchMaxBytes(10_000_000))
	if err != nil {
		t.Fatal(err)
	}
	defer kafka.Close()
	junk := map[string]string{ // value to part of the message
		"":                                    "empty",
		"not json":                            "JSON",
		"[1,2]":                               "JSON object",
		`{"event_name":5}`:                    "event_name must be a string",
		`{"event_name":"j"}`:                  "required",
		"\xff\xfe":                            "JSON",
		strings.Repeat("[", 100_000):          "nested",
		`{"x":"` + strings.Repeat("y", 4<<20): "JSON",
		`{"event_name":"j","user_id":"u","timestamp":-5}`: "1970",
	}
	now := time.Now().Unix()
	good := []string{
		fmt.Sprintf(`{"timestamp":%d,"user_id":"a","event_name":"j"}`, now),
		fmt.Sprintf(` { "metadata" : { } , "timestamp" : %d , "user_id" : "b" , "event_name" : "j" , "event_id" : "other" } `, now),
		fmt.Sprintf(`{"event_name":"j","user_id":"old","timestamp":%d}`, now-90*86400),
	}
	var records []*kgo.Record
	for value := range junk {
		records = append(records, &kgo.Record{Topic: topic, Partition: 3, Key: []byte("k"), Value: []byte(value)})
	}
	records = append(records, &kgo.Record{Topic: topic, Partition: 3}) // a tombstone
	for _, value := range good {
		records = append(records, &kgo.Record{Topic: topic, Partition: 3, Value: []byte(value)})
	}
	if err := kafka.ProduceSync(t.Context(), records...).FirstErr(); err != nil {
		t.Fatal(err)
	}
	p.await("understood", 20*time.Second, func() bool {
		_, _, answer := p.do("GET", fmt.Sprintf("%sevent_name=j&from=1&to=%d", metricsPath, now+1), "", "", nil)
		return strings.Contains(answer, `{"total_count":3,"unique_users":3,`)
	})
	letters := readTopic(t, topic+".dlq", len(junk)+1)
	for _, rec := range letters {
		h := map[string]string{}
		for _, kv := range rec.Headers {
			h[kv.Key] = string(kv.Value)
		}
		if h["error_type"] != "unmarshal_error" || h["original_topic"] != topic || h["original_partition"] != "3" || h["retry_count"] != "0" || h["final_retry_count"] != "0" || h["original_offset"] == "" {
			t.Errorf("headers of %.40q: %v", rec.Value, h)
		}
		for _, name := range []string{"failed_at", "last_retry_at", "sent_to_dlq_at"} {
			if _, err := time.Parse(time.RFC3339, h[name]); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
		if want := junk[string(rec.Value)]; !strings.Contains(h["error_message"], want) {
			t.Errorf("%.40q: error_message %q does not say %q", rec.Value, h["error_message"], want)
		}
	}
	p.terminate()
	again := startProgram(t, env) // nothing is read twice after a clean stop
	if n := len(readTopic(t, topic+".dlq", len(junk)+1)); n != len(junk)+1 {
		t.Errorf("%d dead letters after a restart", n)
	}
	again.terminate()
}

// TestRejectedRows: a real constraint refuses some rows. Their neighbours are stored, they are tried again, arrive when
// the constraint is gone, and are dead letters when it stays.
func TestRejectedRows(t *testing.T) {
	t.Parallel()
	env := newSpace(t, "MAX_RETRY_ATTEMPTS=2")
	p := startProgram(t, env)
	db, topic := space(env, "CLICKHOUSE_DATABASE"), space(env, "KAFKA_TOPIC")
	clickhouseQuery(t, "ALTER TABLE "+db+".events ADD CONSTRAINT late CHECK user_id NOT LIKE 'late%'")
	clickhouseQuery(t, "ALTER TABLE "+db+".events ADD CONSTRAINT never CHECK user_id NOT LIKE 'never%'")
	at := time.Now().Unix()
	const each = 200
	var body []byte
	for i := range each {
		for _, user := range []string{"fine", "late", "fine", "never"} {
			if user != "fine" && i%20 != 0 {
				continue
			}
			body = fmt.Appendf(body, `{"event_name":"r","user_id":"%s%d","timestamp":%d}`+"\n", user, i, at-int64(len(body)%1000))
		}
	}
	events := int64(bytes.Count(body, []byte("\n")))
	if status, _, answer := p.do("POST", bulkPath, ndjson, "", body); status != http.StatusAccepted {
		t.Fatal(status, answer)
	}
	const bad = each / 20 // of either kind
	accepted := time.Now().Unix()
	count := func(want int64) func() bool {
		return func() bool {
			_, _, answer := p.do("GET", fmt.Sprintf("%sevent_name=r&from=%d&to=%d", metricsPath, at-2000, at+1), "", "", nil)
			return strings.Contains(answer, fmt.Sprintf(`"total_count":%d,`, want))
		}
	}
	p.await("stored but for the rejected", 20*time.Second, count(events-2*bad))
	for look := time.Now(); time.Since(look) < 1500*time.Millisecond; time.Sleep(50 * time.Millisecond) { // well within the first delay
		if through := completeThrough(p); through >= accepted {
			t.Fatalf("complete through %d, and what was acknowledged at %d waits to be tried again", through, accepted)
		}
	}
	clickhouseQuery(t, "ALTER TABLE "+db+".events DROP CONSTRAINT late")
	p.await("stored with those that were late", 30*time.Second, count(events-bad))
	for _, rec := range readTopic(t, topic+".dlq", bad) {
		if !bytes.Contains(rec.Value, []byte(`"never`)) || header(rec, "error_type") != errorExhausted || header(rec, "retry_count") != "2" || header(rec, "final_retry_count") != "2" ||
			header(rec, "original_topic") != topic || !strings.Contains(header(rec, "error_message"), "never") || header(rec, "failed_at") == "" {
			t.Errorf("dead letter %s: %v", rec.Value, rec.Headers)
		}
	}
	p.await("audited as dead", 10*time.Second, func() bool { // when the retries are committed
		out, code := subcommand(t, env, "audit -json")
		return code == 0 && strings.Contains(out, fmt.Sprintf(`"dead_letters":%d,`, bad)) && strings.Contains(out, `"waiting":0}`)
	})
	// Once the reason is gone the letters are replayed, twice to no harm, and everything is where it should be.
	clickhouseQuery(t, "ALTER TABLE "+db+".events DROP CONSTRAINT never")
	for _, c := range []struct{ args, want string }{
		{"list -type max_retries_exhausted", fmt.Sprint(bad, " dead letters")},
		{"list -filter no-such-text", "0 dead letters"},
		{"replay -dry-run", fmt.Sprint(bad, " letters would be put back")},
		{"replay", fmt.Sprint(bad, " letters put back")},
		{"replay", fmt.Sprint(bad, " letters put back")},
	} {
		if out, code := subcommand(t, env, "dlq "+c.args); code != 0 || !strings.Contains(out, c.want) {
			t.Errorf("dlq %s: %d %s", c.args, code, out)
		}
	}
	if out, code := subcommand(t, env, "dlq list -type bogus"); code != 2 || !strings.Contains(out, errorExhausted) {
		t.Errorf("dlq list of a type that there is not: %d %s", code, out)
	}
	p.await("stored with those that were dead", 30*time.Second, count(events))
	drained(p)
	if out, code := subcommand(t, env, "audit"); code != 0 || !strings.Contains(out, fmt.Sprint(2*bad)) {
		t.Errorf("audit: %d\n%s", code, out)
	}
	if hourly := clickhouseQuery(t, "SELECT sum(event_count) FROM "+db+".events_hourly"); hourly != fmt.Sprint(events) {
		t.Errorf("events_hourly has %s, want %d", hourly, events)
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
		var d unequal
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

// TestRejectedOtherwise: a rejection that does not say which rows are bad, of rows in many blocks.
func TestRejectedOtherwise(t *testing.T) {
	t.Parallel()
	env := faultSpace(t, "MAX_RETRY_ATTEMPTS=0")
	p := startProgram(t, env)
	db, topic := space(env, "CLICKHOUSE_DATABASE"), space(env, "KAFKA_TOPIC")
	clickhouseQuery(t, "ALTER TABLE "+db+".events ADD CONSTRAINT bound CHECK length(range(if(startsWith(user_id, 'bad'), toUInt64(10000000000), 1))) > 0")
	var body []byte
	const events, bad = 600, 5
	for i := range events {
		user := "good"
		if i%(events/bad) == 7 {
			user = "bad"
		}
		body = fmt.Appendf(body, `{"event_name":"otherwise","user_id":"%s%d","timestamp":%d}`+"\n", user, i, time.Now().Unix())
	}
	if status, _, answer := p.do("POST", bulkPath, ndjson, "", body); status != http.StatusAccepted {
		t.Fatal(status, answer)
	}
	for _, rec := range readTopic(t, topic+".dlq", bad) {
		if !strings.Contains(string(rec.Value), `"user_id":"bad`) {
			t.Errorf("given up: %s", rec.Value)
		}
	}
	drained(p)
	mustCount(t, env, "otherwise", events-bad)
	if strings.Contains(p.log.String(), "VIOLATED_CONSTRAINT") {
		t.Error("ClickHouse said which rows are bad")
	}
}

// TestFsync: the setting reaches tables that are there, and is taken back.
func TestFsync(t *testing.T) {
	t.Parallel()
	env := newSpace(t)
	for value, want := range map[string]string{"true": "1", "false": "0"} {
		for _, own := range []string{value, "false"} { // a command, which has other settings, leaves it as it is
			st := newStore(settingsFrom(t, append(env, "CLICKHOUSE_FSYNC="+own)))
			st.decides = own == value
			if _, err := st.prepare(t.Context(), 0); err != nil {
				t.Fatal(err)
			}
		}
		if n := clickhouseQuery(t, "SELECT count() FROM system.tables WHERE database = '"+space(env, "CLICKHOUSE_DATABASE")+"' AND name IN ('events', 'events_hourly') AND create_table_query LIKE '%fsync_after_insert = "+want+", fsync_part_directory = "+want+"%'"); n != "2" {
			t.Errorf("CLICKHOUSE_FSYNC=%s: %s of 2 tables", value, n)
		}
	}
}

func TestDelays(t *testing.T) {
	for attempt, want := range map[int]time.Duration{1: 2 * time.Second, 2: 4 * time.Second, 3: 8 * time.Second, 4: 16 * time.Second, 5: 32 * time.Second, 6: time.Minute, 100: time.Minute} {
		if got := delayOf(attempt); got != want {
			t.Errorf("attempt %d waits %s, want %s", attempt, got, want)
		}
	}
}

// TestClusterSchema: replicas are not at hand; the server at least parses every statement for them.
func TestClusterSchema(t *testing.T) {
	cfg := settingsFrom(t, newSpace(t, "CLICKHOUSE_CLUSTER=main"))
	st := newStore(cfg)
	st.replicated = true
	replicated := 0
	for _, stmt := range schemaStatements {
		formatted := clickhouseQuery(t, "SELECT formatQuery('"+literalEscapes.Replace(st.sql(stmt))+"')")
		if !strings.Contains(formatted, "ON CLUSTER main") {
			t.Errorf("not on the cluster: %s", formatted)
		}
		replicated += strings.Count(formatted, "ENGINE = Replicated")
	}
	if len(schemaStatements) < 13 || replicated != 2 {
		t.Errorf("%d statements, %d replicated tables", len(schemaStatements), replicated)
	}
}

// TestToolArguments: what a subcommand does not understand is no reason to do something else.
func TestToolArguments(t *testing.T) {
	t.Parallel()
	env := newSpace(t)
	for _, args := range []string{"audit x", "reconcile dry-run", "reconcile -rebuild -dry-run", "rewind -to start x", "dlq list x", "dlq replay 0:17", "dlq show 0:17x", "dlq show 0:17 0:18", "audit -from 20 -to 10", "reconcile -from 20 -to 20", "audit -from 1795x"} {
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
