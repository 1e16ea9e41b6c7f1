// What is to go, goes: old parts by their TTL, an erased user by the recipe of deploy/README.md.

package main

import (
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"
)

// TestRetention: the TTL follows the setting, on tables that are there, and ClickHouse then drops what is too old from both.
func TestRetention(t *testing.T) {
	t.Parallel()
	env := newSpace(t)
	db := space(env, "CLICKHOUSE_DATABASE")
	start := func(days string) {
		t.Helper()
		if _, err := newStore(settingsFrom(t, append(env, "RETENTION_DAYS="+days))).prepare(t.Context(), 0); err != nil {
			t.Fatal(err)
		}
	}
	start("0")
	old := time.Now().AddDate(0, 0, -100).Unix()
	for i, at := range []int64{old, old + 1, time.Now().Unix()} {
		clickhouseQuery(t, fmt.Sprintf("INSERT INTO %s.events (event_id, event_name, timestamp) VALUES ('%d', 'kept', %d)", db, i, at))
	}
	mustCount(t, env, "kept", 3)
	ttls := func() string {
		return clickhouseQuery(t, "SELECT arrayStringConcat(groupArray(extract(create_table_query, ' TTL (.*?) SETTINGS')), ';') FROM (SELECT * FROM system.tables WHERE database = '"+db+"' AND name IN ('events', 'events_hourly') ORDER BY name)")
	}
	start("50")
	if got := ttls(); got != "timestamp + toIntervalDay(50);hour + toIntervalDay(50)" {
		t.Errorf("ttl %s", got)
	}
	mutations := func() string {
		return clickhouseQuery(t, "SELECT count() FROM system.mutations WHERE database = '"+db+"'")
	}
	before := mutations()
	start("50")
	if after := mutations(); after != before {
		t.Errorf("a start without a change: %s mutations, %s before", after, before)
	}
	for _, table := range []string{"events", "events_hourly"} { // what ClickHouse does by itself every few hours
		clickhouseQuery(t, "ALTER TABLE "+db+"."+table+" MODIFY SETTING merge_with_ttl_timeout = 0")
		for deadline := time.Now().Add(time.Minute); clickhouseQuery(t, "SELECT count() FROM "+db+"."+table) != "1"; time.Sleep(50 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("%s keeps what is too old", table)
			}
		}
	}
	mustCount(t, env, "kept", 1)
	start("0")
	if got := ttls(); got != ";" {
		t.Errorf("ttl %s", got)
	}
}

// TestErasure follows the recipe word by word while events come in.
func TestErasure(t *testing.T) {
	t.Parallel()
	env := newSpace(t)
	db := space(env, "CLICKHOUSE_DATABASE")
	p := startProgram(t, env)
	var body []byte
	for i := range 300 {
		body = fmt.Appendf(body, `{"event_name":"erase","user_id":"user_%d","timestamp":%d,"metadata":{"price":2}}`+"\n", 120+i%10, time.Now().Unix()-int64(i)*400)
	}
	postAll(t, p, [][]byte{body})
	drained(p)
	mustCount(t, env, "erase", 300)
	l, done := loadInto(t, p.url, 300, time.Hour)
	doc, err := os.ReadFile("deploy/README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, recipe, _ := strings.Cut(string(doc), "Erasing a user")
	recipe, _, _ = strings.Cut(recipe, "\n```\n")
	said := ""
	for _, m := range regexp.MustCompile(`(?m)^(clickhouse client --query "(.*)"|event-ingestion (.*?)( +#.*)?)$`).FindAllStringSubmatch(recipe, -1) {
		if m[2] != "" {
			clickhouseQuery(t, strings.ReplaceAll(m[2], "event_ingestion.", db+"."))
			continue
		}
		if strings.HasPrefix(m[3], "audit") {
			l.Stop()
			done()
			drained(p)
		}
		out, code := subcommand(t, env, m[3])
		if said += m[3] + ";"; code != 0 {
			t.Fatalf("%s: %d %s", m[3], code, out)
		}
	}
	if said != "reconcile -rebuild;audit -erased user_123;" {
		t.Fatalf("the recipe is %q", said)
	}
	mustCount(t, env, "erase", 270)
	if got := clickhouseQuery(t, "SELECT uniqCombined64Merge(17)(unique_users_state) FROM "+db+".events_hourly WHERE event_name = 'erase'"); got != "9" {
		t.Errorf("%s users are left, want 9", got)
	}
	if out, _ := subcommand(t, env, "reconcile -dry-run"); !strings.Contains(out, "0 rows of events_hourly differ") {
		t.Error(out)
	}
	mustAgree(t, l, p.url)
}
