// Users of ClickHouse whose profiles would change what the program's queries mean.

package main

import (
	"testing"
	"time"

	"github.com/ClickHouse/ch-go"
	"github.com/ClickHouse/ch-go/proto"
)

// TestProfileThatChangesQueries: events that nobody remembers are looked up and counted once, and inserts wait while tables are
// exchanged.
func TestProfileThatChangesQueries(t *testing.T) {
	t.Parallel()
	env := append(faultSpace(t), "CLICKHOUSE_USERNAME=odd", "DEDUPE_MEMORY=0")
	p := startProgram(t, env)
	const events = 3000
	now := time.Now().Unix()
	bodies := numbered("odd", events, 500, func(i int) int64 { return now - int64(i)*3 })
	for range 2 {
		postAll(t, p, bodies)
		drained(p)
	}
	mustCount(t, env, "odd", events)
	l, done := loadInto(t, p.url, 1000, time.Hour)
	for range 2 {
		if out, code := subcommand(t, env, "reconcile -rebuild"); code != 0 {
			t.Error(out)
		}
	}
	l.Stop()
	done()
	drained(p)
	mustAgree(t, l, p.url)
	mustCount(t, env, "odd", events)
}

// TestProfileThatCutsAnswers: an answer is whole, or an error.
func TestProfileThatCutsAnswers(t *testing.T) {
	t.Parallel()
	cfg := settingsFrom(t, append(newSpace(t), "CLICKHOUSE_USERNAME=narrow"))
	c, err := newStore(cfg).dial(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	n := 0
	err = c.Do(t.Context(), eachRow(ch.Query{Body: "SELECT number FROM numbers(1000) SETTINGS max_block_size = 100"}, func(int) { n++ }, new(proto.ColUInt64)))
	if !ch.IsErr(err, proto.ErrTooManyRowsOrBytes) {
		t.Errorf("%d of 1000 rows: %v", n, err)
	}
}
