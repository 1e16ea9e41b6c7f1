// What audit must not overlook.

package main

import (
	"context"
	crand "crypto/rand"
	"fmt"
	"math"
	"net/http"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/twmb/franz-go/pkg/kadm"
	"github.com/twmb/franz-go/pkg/kgo"
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
	bodies := numbered("passes", 400, 100, func(int) int64 { return at })
	postAll(t, p, append(bodies, bodies[0]))
	drained(p)
	clickhouseQuery(t, fmt.Sprintf("DELETE FROM %s.events WHERE user_id = 'u7'", space(env, "CLICKHOUSE_DATABASE")))
	read := func(most int) *ledger {
		l, err := readLedger(t.Context(), settingsFrom(t, env), timeRange{0, maxUnixSeconds}, nil, most)
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	whole := read(math.MaxInt)
	if whole.records < 500 || whole.distinct != 400 || whole.at[inTable] != 399 || len(whole.nowhere) != 1 {
		t.Errorf("%+v", whole)
	}
	if passes := read(30); !reflect.DeepEqual(passes, whole) {
		t.Errorf("in one pass %+v, in several %+v", whole, passes)
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

// TestAuditBesideRetention: what is still to be read expires. Nobody waits for it.
func TestAuditBesideRetention(t *testing.T) {
	t.Parallel()
	cfg := settingsFrom(t, newSpace(t))
	side := newTestSideProducer(t, cfg)
	const records = 4
	for range records { // of which one or two fill a fetch
		rec := &kgo.Record{Topic: cfg.kafkaTopic, Key: []byte("k"), Value: make([]byte, 900_000)}
		crand.Read(rec.Value)
		if side.produce(t.Context(), []*kgo.Record{rec}) != nil {
			t.Fatal("not acknowledged")
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	err := readRecords(ctx, cfg, cfg.kafkaTopic, "", func(rec *kgo.Record) error {
		all := kadm.Offsets{cfg.kafkaTopic: {rec.Partition: {Topic: cfg.kafkaTopic, Partition: rec.Partition, At: records}}}
		_, err := kadm.NewClient(side.kafka).DeleteRecords(ctx, all)
		return err
	})
	if err != nil {
		t.Error(err)
	}
}
