// What is to go, goes: old parts by their TTL. Settings reach tables that are there.

package test

import (
	"fmt"
	"testing"
	"time"
)

// TestRetention: the TTL follows the setting, on tables that are there, and ClickHouse then drops what is too old from both.
func TestRetention(t *testing.T) {
	t.Parallel()
	env := newSpace(t)
	db := space(env, "CLICKHOUSE_DATABASE")
	run := func(more ...string) { startProgram(t, append(env[:len(env):len(env)], more...)).terminate() }
	start := func(days string) {
		t.Helper()
		run("RETENTION_DAYS=" + days)
	}
	start("0")
	now := time.Now().UTC()
	gone := time.Date(now.Year(), now.Month()-3, 1, 0, 0, 0, 0, time.UTC)
	// Of last month, which goes as a whole, its first day alone is more than 31 days ago.
	partly := time.Date(now.Year(), now.Month()-1, 1, 0, 0, 0, 0, time.UTC)
	for i, at := range []time.Time{gone, gone.Add(time.Second), partly, time.Date(now.Year(), now.Month(), 0, 23, 0, 0, 0, time.UTC), now} {
		clickhouseQuery(t, fmt.Sprintf("INSERT INTO %s.events (event_id, event_name, timestamp) VALUES ('%d', 'kept', %d)", db, i, at.Unix()))
	}
	clickhouseQuery(t, "OPTIMIZE TABLE "+db+".events_hourly FINAL") // which merges the month; events keeps a part for each row
	mustCount(t, env, "kept", 5)
	ttls := func() string {
		return clickhouseQuery(t, "SELECT arrayStringConcat(groupArray(extract(create_table_query, ' TTL (.*?) SETTINGS')), ';') FROM (SELECT * FROM system.tables WHERE database = '"+db+"' AND name IN ('events', 'events_hourly') ORDER BY name)")
	}
	start("31")
	want := "(toStartOfMonth(timestamp) + toIntervalMonth(1)) + toIntervalDay(31);(toStartOfMonth(hour) + toIntervalMonth(1)) + toIntervalDay(31)"
	if got := ttls(); got != want {
		t.Errorf("ttl %s", got)
	}
	mutations := func() string {
		return clickhouseQuery(t, "SELECT count() FROM system.mutations WHERE database = '"+db+"'")
	}
	before := mutations()
	start("31")
	run("RETENTION_DAYS=0", "ROLE=api") // which does not decide
	if out, code := subcommand(t, env, "reconcile"); code != 0 {
		t.Error(out)
	}
	if after := mutations(); after != before {
		t.Errorf("a start without a change: %s mutations, %s before", after, before)
	}
	for table, column := range map[string]string{"events": "timestamp", "events_hourly": "hour"} { // what ClickHouse does by itself every few hours
		clickhouseQuery(t, "ALTER TABLE "+db+"."+table+" MODIFY SETTING merge_with_ttl_timeout = 0")
		for deadline := time.Now().Add(time.Minute); clickhouseQuery(t, "SELECT countIf(toDate("+column+") < '"+partly.Format(time.DateOnly)+"') FROM "+db+"."+table) != "0"; time.Sleep(50 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("%s keeps what is too old", table)
			}
		}
	}
	mustCount(t, env, "kept", 3)
	if _, code := subcommand(t, env, fmt.Sprintf("reconcile -recount -from %d -to %d", time.Now().Unix()-90*86400, time.Now().Unix()-86400)); code != 0 || ttls() != want {
		t.Errorf("after a recount, which has not the setting: exit code %d, ttl %s", code, ttls())
	}
	mustCount(t, env, "kept", 3)
	start("0")
	if got := ttls(); got != ";" {
		t.Errorf("ttl %s", got)
	}
}

// TestFsync: the setting reaches tables that are there, and is taken back.
func TestFsync(t *testing.T) {
	t.Parallel()
	env := newSpace(t)
	for value, want := range map[string]string{"true": "1", "false": "0"} {
		startProgram(t, append(env[:len(env):len(env)], "CLICKHOUSE_FSYNC="+value)).terminate()
		startProgram(t, append(env[:len(env):len(env)], "CLICKHOUSE_FSYNC=false", "ROLE=api")).terminate() // leaves it as it is
		if n := clickhouseQuery(t, "SELECT count() FROM system.tables WHERE database = '"+space(env, "CLICKHOUSE_DATABASE")+"' AND name IN ('events', 'events_hourly') AND create_table_query LIKE '%fsync_after_insert = "+want+", fsync_part_directory = "+want+"%'"); n != "2" {
			t.Errorf("CLICKHOUSE_FSYNC=%s: %s of 2 tables", value, n)
		}
	}
}
