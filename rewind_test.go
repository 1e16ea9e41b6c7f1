// What ClickHouse lost comes back from Kafka: a dropped partition, an older backup, a part that was never written.

package main

import (
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/twmb/franz-go/pkg/kadm"
	"github.com/twmb/franz-go/pkg/kgo"
)

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

// TestTornFarBack: an instance dies with as many rounds stored and not committed as there may be, and the last one is in events
// only. The next instance meets it among what it reads again, and mends it.
func TestTornFarBack(t *testing.T) {
	t.Parallel()
	const rows = 10
	env := faultSpace(t, "KAFKA_PARTITIONS=1", fmt.Sprint("WORKER_BATCH_SIZE=", rows))
	topic := space(env, "KAFKA_TOPIC")
	const events, anHour, uncommitted = 1000, 20, heldBlocks * rows
	begun := (time.Now().Unix()/hourSeconds - events/anHour - 1) * hourSeconds
	var body []byte
	for i := range int64(events) {
		body = fmt.Appendf(body, `{"event_name":"far","user_id":"u%d","timestamp":%d}`+"\n", i, begun+i/anHour*hourSeconds)
	}
	p := startProgram(t, env)
	if status, _, answer := p.do("POST", bulkPath, ndjson, "", body); status != http.StatusAccepted {
		t.Fatal(status, answer)
	}
	drained(p)
	p.terminate()
	clickhouseQuery(t, fmt.Sprintf("INSERT INTO %[1]s.events_hourly SELECT * REPLACE (-event_count AS event_count) FROM %[1]s.events_hourly WHERE hour >= %[2]d",
		space(env, "CLICKHOUSE_DATABASE"), begun+(events/anHour-2)*hourSeconds))
	kafka, err := kgo.NewClient(kgo.SeedBrokers(kafkaBrokers(t)...))
	if err != nil {
		t.Fatal(err)
	}
	defer kafka.Close()
	back := kadm.Offsets{}
	back.AddOffset(topic, 0, events-uncommitted, -1)
	if err := kadm.NewClient(kafka).CommitAllOffsets(t.Context(), space(env, "KAFKA_CONSUMER_GROUP"), back); err != nil {
		t.Fatal(err)
	}
	p = startProgram(t, env)
	drained(p)
	mustCount(t, env, "far", events)
}
