// What audit must not overlook.

package main

import (
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"
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

// TestAuditOfReplays: a letter that came back and was stored is no end of its event, once both tables have lost it.
func TestAuditOfReplays(t *testing.T) {
	t.Parallel()
	env := newSpace(t, "MAX_RETRY_ATTEMPTS=0")
	db := newTables(t, env).database
	clickhouseQuery(t, "ALTER TABLE "+db+".events ADD CONSTRAINT good CHECK user_id != 'bad'")
	p := startProgram(t, env)
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
