// What is on the topics and cannot be stored: junk, rows that ClickHouse refuses, for a time or for ever, records that are too large.

package test

import (
	"bytes"
	crand "crypto/rand"
	"fmt"
	"net/http"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/event-ingestion/event-ingestion/internal/testkit"

	"github.com/twmb/franz-go/pkg/kadm"
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
	letters := testkit.ReadTopic(t, kafkaBrokers(t), topic+".dlq", len(junk)+1)
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
	if n := len(testkit.ReadTopic(t, kafkaBrokers(t), topic+".dlq", len(junk)+1)); n != len(junk)+1 {
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
	for _, rec := range testkit.ReadTopic(t, kafkaBrokers(t), topic+".dlq", bad) {
		if !bytes.Contains(rec.Value, []byte(`"never`)) || header(rec, "error_type") != "max_retries_exhausted" || header(rec, "retry_count") != "2" || header(rec, "final_retry_count") != "2" ||
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
	if out, code := subcommand(t, env, "dlq list -type bogus"); code != 2 || !strings.Contains(out, "max_retries_exhausted") {
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
	for _, rec := range testkit.ReadTopic(t, kafkaBrokers(t), topic+".dlq", bad) {
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

// TestManyRejected: a constraint refuses a tenth of the rows, all the time. The others arrive, and all of the tenth become
// dead letters.
func TestManyRejected(t *testing.T) {
	t.Parallel()
	env := faultSpace(t, "MAX_RETRY_ATTEMPTS=1")
	p := startProgram(t, env)
	clickhouseQuery(t, "ALTER TABLE "+space(env, "CLICKHOUSE_DATABASE")+".events ADD CONSTRAINT tenth CHECK user_id NOT LIKE '%0'")
	at := time.Now().Unix()
	const events = 20_000
	postAll(t, p, numbered("tenth", events, 500, func(i int) int64 { return at - int64(i%3000) }))
	p.await("stored but for the rejected", time.Minute, func() bool {
		return clickhouseQuery(t, "SELECT count() FROM "+space(env, "CLICKHOUSE_DATABASE")+".events") == fmt.Sprint(events*9/10)
	})
	drained(p)
	mustCount(t, env, "tenth", events*9/10)
	dead := map[string]bool{}
	for _, rec := range testkit.ReadTopic(t, kafkaBrokers(t), space(env, "KAFKA_TOPIC")+".dlq", events/10) {
		dead[string(rec.Key)] = true
	}
	if len(dead) != events/10 {
		t.Errorf("%d dead letters, want %d", len(dead), events/10)
	}
}

// TestPutOffByAnotherClock: who put a record off has a clock that is ahead. It waits no longer for that, and nothing behind it does.
func TestPutOffByAnotherClock(t *testing.T) {
	t.Parallel()
	env := faultSpace(t)
	p := startProgram(t, env)
	kafka, err := kgo.NewClient(kgo.SeedBrokers(kafkaBrokers(t)...))
	if err != nil {
		t.Fatal(err)
	}
	defer kafka.Close()
	for _, ahead := range []time.Duration{time.Hour, 0} {
		rec := &kgo.Record{Topic: space(env, "KAFKA_TOPIC") + ".retry", Key: []byte("k"), Value: testkit.FreshEvent("ahead"), Timestamp: time.Now().Add(ahead)}
		if err := kafka.ProduceSync(t.Context(), rec).FirstErr(); err != nil {
			t.Fatal(err)
		}
	}
	drained(p)
	mustCount(t, env, "ahead", 2)
}

// TestTooLarge: topics that take less than the main one. A batch that is too large goes record by record, and a record that is
// too large is a dead letter, cut until it fits, with what it was in its headers.
func TestTooLarge(t *testing.T) {
	t.Parallel()
	env := newSpace(t, "MAX_RETRY_ATTEMPTS=5")
	db, topic := space(env, "CLICKHOUSE_DATABASE"), space(env, "KAFKA_TOPIC")
	p := startProgram(t, env)
	clickhouseQuery(t, "ALTER TABLE "+db+".events ADD CONSTRAINT none CHECK event_name != 'refused'")
	kafka, err := kgo.NewClient(kgo.SeedBrokers(kafkaBrokers(t)...), kgo.ProducerBatchCompression(kgo.NoCompression()))
	if err != nil {
		t.Fatal(err)
	}
	defer kafka.Close()
	limit := "20000"
	if _, err := kadm.NewClient(kafka).AlterTopicConfigs(t.Context(), []kadm.AlterConfig{{Name: "max.message.bytes", Value: &limit}}, topic+".retry", topic+".dlq"); err != nil {
		t.Fatal(err)
	}
	noise := make([]byte, 37_000) // in hexadecimal digits, which cannot be compressed to less than these
	crand.Read(noise)
	event := func(user string, size int, more ...kgo.RecordHeader) *kgo.Record {
		return &kgo.Record{Topic: topic, Headers: more, Value: fmt.Appendf(nil, `{"event_name":"refused","user_id":%q,"timestamp":%d,"unread":"%.*x"}`, user, time.Now().Unix(), size/2, noise)}
	}
	large := event("large", 74_000, kgo.RecordHeader{Key: "strange", Value: noise[:30_000]})
	records := []*kgo.Record{large}
	for i := range 20 {
		records = append(records, event(fmt.Sprint("small", i), 10_000))
	}
	for _, rec := range records { // of one partition, one batch each
		if err := kafka.ProduceSync(t.Context(), rec).FirstErr(); err != nil {
			t.Fatal(err)
		}
	}
	letter := testkit.ReadTopic(t, kafkaBrokers(t), topic+".dlq", 1)[0]
	if header(letter, "value_truncated_from") != fmt.Sprint(len(large.Value)) || header(letter, "error_type") != "insert_failed" || !strings.Contains(header(letter, "error_message"), "do not take") ||
		len(letter.Value) == 0 || !bytes.HasPrefix(large.Value, letter.Value) {
		t.Errorf("%d bytes, %.100v", len(letter.Value), letter.Headers)
	}
	put := map[string]bool{}
	for _, rec := range testkit.ReadTopic(t, kafkaBrokers(t), topic+".retry", 20) { // each for the first time, or some for the second already
		put[string(rec.Value)] = true
	}
	p.await("put off", 20*time.Second, func() bool {
		for _, rec := range testkit.ReadTopic(t, kafkaBrokers(t), topic+".retry", len(put)) {
			put[string(rec.Value)] = true
		}
		return len(put) >= 20
	})
	if len(put) != 20 || put[string(large.Value)] {
		t.Errorf("%d records are put off, want 20", len(put))
	}
}

// TestNoValuesInWords: whatever ClickHouse says of rows, what they have in them is not in the log, not on /ready, and not in the
// headers of what is put aside. Who may not read is told what does not work, and since when, and not why.
func TestNoValuesInWords(t *testing.T) {
	t.Parallel()
	const key = "key-of-a-reader-0123456789"
	env := newSpace(t, "MAX_RETRY_ATTEMPTS=1", "API_KEYS="+key)
	p := startProgram(t, env)
	db := space(env, "CLICKHOUSE_DATABASE")
	send := func(name string) {
		t.Helper()
		var body []byte
		for i := range 40 {
			body = fmt.Appendf(body, `{"event_name":%q,"user_id":"secret%d","timestamp":%d,"metadata":{"card":"4111-%d"}}`+"\n", name, i, time.Now().Unix(), i)
		}
		if status, _, answer := p.ask("POST", bulkPath, body, "X-API-Key: "+key, "Content-Type: "+ndjson); status != http.StatusAccepted {
			t.Fatal(status, answer)
		}
	}
	words := func(names ...string) string {
		for _, name := range names {
			if strings.Contains(name, "secret") || strings.Contains(name, "4111") {
				t.Fatalf("values of rows: %s", name)
			}
		}
		return strings.Join(names, "\n")
	}
	ready := func(headers ...string) string {
		_, _, answer := p.ask("GET", "/ready", nil, headers...)
		return answer
	}

	clickhouseQuery(t, "ALTER TABLE "+db+".events ADD CONSTRAINT known CHECK user_id = 'known'")
	clickhouseQuery(t, "ALTER TABLE "+db+".events ADD CONSTRAINT cards CHECK metadata NOT LIKE '%4%'")
	send("constraint")
	for _, rec := range testkit.ReadTopic(t, kafkaBrokers(t), space(env, "KAFKA_TOPIC")+".dlq", 40) {
		if said := header(rec, "error_message"); !strings.Contains(words(said), "VIOLATED_CONSTRAINT") {
			t.Errorf("error_message %q", said)
		}
		words(ready())
	}
	if !strings.Contains(p.log.String(), "VIOLATED_CONSTRAINT") {
		t.Errorf("not said:\n%s", p.log)
	}

	for _, constraint := range []string{"known", "cards"} {
		clickhouseQuery(t, "ALTER TABLE "+db+".events DROP CONSTRAINT "+constraint)
	}
	clickhouseQuery(t, "CREATE MATERIALIZED VIEW "+db+".numbers ENGINE = Memory AS SELECT toInt64(user_id) AS n FROM "+db+".events WHERE event_name = 'parsed'")
	send("parsed") // rows get into events before the view fails
	p.await("said", 30*time.Second, func() bool { return strings.Contains(words(p.log.String()), "CANNOT_PARSE_") })
	clickhouseQuery(t, "DROP TABLE "+db+".numbers SYNC")
	p.await("stored", time.Minute, func() bool {
		return clickhouseQuery(t, "SELECT count() FROM "+db+".events WHERE event_name = 'parsed'") == "40"
	})

	clickhouseQuery(t, "RENAME TABLE "+db+".events TO "+db+".elsewhere")
	send("waiting")
	p.await("said to a reader", 30*time.Second, func() bool {
		return regexp.MustCompile(`"consumers":"stalled \d+ s: [a-z ]+: .*UNKNOWN_TABLE.*, \d+ waiting"`).MatchString(words(ready("X-API-Key: " + key)))
	})
	if answer := ready(); !regexp.MustCompile(`"consumers":"stalled \d+ s: [a-z ]+ fails since 20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ, \d+ waiting"`).MatchString(answer) || strings.Contains(answer, "UNKNOWN_TABLE") || strings.Contains(answer, db) {
		t.Errorf("without a key: %s", answer)
	}
	clickhouseQuery(t, "RENAME TABLE "+db+".events_hourly TO "+db+".away")
	p.await("not ready", 30*time.Second, func() bool {
		return strings.Contains(ready("X-API-Key: "+key), `"clickhouse":"handle packet: UNKNOWN_TABLE`)
	})
	if answer := ready(); !regexp.MustCompile(`"clickhouse":"does not answer as it should since 20\d\d-`).MatchString(answer) || strings.Contains(answer, db) {
		t.Errorf("without a key: %s", answer)
	}
	clickhouseQuery(t, "RENAME TABLE "+db+".away TO "+db+".events_hourly, "+db+".elsewhere TO "+db+".events")
	p.await("stored", time.Minute, func() bool {
		return clickhouseQuery(t, "SELECT count() FROM "+db+".events WHERE event_name = 'waiting'") == "40"
	})
	words(p.log.String())
}
