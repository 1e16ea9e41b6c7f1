// Tables of an earlier version: brought up to date at start, and events_hourly made anew while events come in, and while other
// commands would mend it.

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"sync"
	"testing"
	"time"
)

// oldTables makes the tables as they were with user states of 19 bits, with events of 40 days in them.
func oldTables(t *testing.T, env []string) (db string) {
	t.Helper()
	text, err := os.ReadFile("testdata/schema_19_bits.sql")
	if err != nil {
		t.Fatal(err)
	}
	st := newStore(settingsFrom(t, env))
	for stmt := range strings.SplitSeq(st.sql(string(text)), ";\n") {
		if strings.TrimSpace(stmt) != "" {
			clickhouseQuery(t, stmt)
		}
	}
	for part := range 3 {
		clickhouseQuery(t, fmt.Sprintf(`INSERT INTO %s.events (event_id, event_name, channel, campaign_id, user_id, timestamp, price)
			SELECT SHA256(toString(number)), ['old', 'purchase', 'older'][number %% 3 + 1], ['', 'web', 'api'][number %% 7 %% 3 + 1], concat('c', toString(number %% 20)), concat('u', toString(number %% 701)),
				now() - 86400 - number * 347, 2.5 FROM numbers(%d, 3000)`, st.database, part*3000))
	}
	return st.database
}

// answers are what every kind of question says about the events of oldTables, the newest of which is a day old.
func answers(p *program, until int64) string {
	var all strings.Builder
	for _, question := range []string{
		"metrics?event_name=old", "metrics?event_name=old&group_by=hour", "metrics?event_name=older&group_by=day&channel=web", "metrics?event_name=purchase&group_by=channel", "overview?",
	} {
		status, _, answer := p.do("GET", fmt.Sprintf("/api/v1/%s&from=%d&to=%d", question, until-35*daySeconds, until), "", "", nil)
		answer, _, _ = strings.Cut(answer, `,"complete_through"`)
		fmt.Fprintln(&all, status, answer)
	}
	return all.String()
}

func TestTablesChange(t *testing.T) {
	t.Parallel()
	env := newSpace(t)
	db := oldTables(t, env)
	clickhouseQuery(t, "SYSTEM STOP MERGES "+db+".events")
	clickhouseQuery(t, "SYSTEM STOP MERGES "+db+".events_hourly")
	look := func() string {
		return clickhouseQuery(t, fmt.Sprintf("SELECT arraySort(groupArray((table, name, modification_time))), (SELECT count() FROM system.mutations WHERE database = '%[1]s') FROM system.parts WHERE database = '%[1]s' AND active", db))
	}
	before := look()
	p := startProgram(t, env)
	if !strings.Contains(p.log.String(), "reconcile -rebuild") {
		t.Errorf("the log does not say what to do:\n%s", p.log)
	}
	for table, want := range map[string][]string{
		"events":           {"auto_statistics_types = \\'\\'", "CODEC(NONE)"},
		"events_hourly":    {"`last_at`", "auto_statistics_types = \\'\\'", "PROJECTION daily", "deduplicate_merge_projection_mode = \\'rebuild\\'", "uniqCombined64(19)"},
		"events_hourly_mv": {"uniqCombined64State(19)"},
	} {
		for _, text := range want {
			if has := clickhouseQuery(t, "SHOW CREATE TABLE "+db+"."+table); !strings.Contains(has, text) {
				t.Errorf("%s lacks %s: %s", table, text, has)
			}
		}
	}
	until := time.Now().Unix() - 86400
	want := clickhouseQuery(t, fmt.Sprintf("SELECT count(), uniqExact(user_id) FROM %s.events WHERE event_name = 'old' AND timestamp >= %d AND timestamp <= %d", db, until-35*daySeconds, until))
	if got := answers(p, until); !strings.HasPrefix(got, fmt.Sprintf(`200 {"total_count":%s,"unique_users":%s`, strings.Fields(want)[0], strings.Fields(want)[1])) || strings.Count(got, "200 ") != 5 {
		t.Errorf("with the old states: %s, want %s", got, want)
	}
	p.terminate()
	startProgram(t, env).terminate()
	if after := look(); after != before {
		t.Errorf("a start has rewritten parts:\n%s\n%s", before, after)
	}
}

// stopAfter cancels a context when the n-th line is written to it.
type stopAfter struct {
	bytes.Buffer
	n    int
	stop context.CancelFunc
}

func (s *stopAfter) Write(b []byte) (int, error) {
	if s.n -= bytes.Count(b, []byte("\n")); s.n <= 0 {
		s.stop()
	}
	return s.Buffer.Write(b)
}

// TestRebuild: events_hourly is made anew under load, cut off at each of its steps and begun again. Whoever asks meanwhile
// is told the same numbers all the time, and in the end every event is counted once.
func TestRebuild(t *testing.T) {
	t.Parallel()
	env := newSpace(t)
	db := oldTables(t, env)
	p := startProgram(t, env)
	cfg := settingsFrom(t, env)
	l, done := loadInto(t, p.url, 300, time.Hour)
	until := time.Now().Unix() - 86400
	want := answers(p, until)

	var asking sync.WaitGroup
	asked := make(chan struct{})
	asking.Go(func() { // ends with asked
		for {
			select {
			case <-asked:
				return
			case <-time.After(50 * time.Millisecond): // five queries at a time, all the time, would take half of what there is
				if got := answers(p, until); got != want {
					t.Errorf("while the table is made anew:\n%s\nwant\n%s", got, want)
					return
				}
			}
		}
	})
	for n := 1; ; n++ {
		ctx, cancel := context.WithCancel(t.Context())
		out := &stopAfter{n: n, stop: cancel}
		err := rebuildHourly(ctx, cfg, out)
		cancel()
		if err == nil && out.n > 0 { // it was not cut off
			break
		}
		if err != nil && !errors.Is(err, context.Canceled) {
			t.Fatalf("cut off at line %d: %v\n%s", n, err, &out.Buffer)
		}
		if n > 30 {
			t.Fatalf("it has no end:\n%s", &out.Buffer)
		}
	}
	if out, code := subcommand(t, env, "reconcile -rebuild"); code != 0 || !strings.Contains(out, "0 of its rows had to be mended") {
		t.Errorf("once more: %d %s", code, out)
	}
	close(asked)
	asking.Wait()
	l.Stop()
	done()
	drained(p)
	mustAgree(t, l, p.url)
	if got := answers(p, until); got != want {
		t.Errorf("afterwards:\n%s\nwant\n%s", got, want)
	}
	counts := strings.Fields(clickhouseQuery(t, fmt.Sprintf("SELECT count(), uniqExact(event_id), (SELECT sum(event_count) FROM %[1]s.events_hourly) FROM %[1]s.events FINAL", db)))
	if counts[0] != counts[1] || counts[1] != counts[2] {
		t.Errorf("%s rows, %s events, %s counted", counts[0], counts[1], counts[2])
	}
	if n, err := reconcile(t.Context(), newStore(cfg), timeRange{0, maxUnixSeconds}.hours(), 0, true, func(unequal) {}); n != 0 || err != nil {
		t.Errorf("%d rows differ, %v", n, err)
	}
	if got := clickhouseQuery(t, fmt.Sprintf("SELECT arraySort(groupArray(name)) FROM system.tables WHERE database = '%s'", db)); got != "['events','events_all','events_between','events_between_by_day','events_hourly','events_hourly_mv']" {
		t.Errorf("left behind: %s", got)
	}
	if has := clickhouseQuery(t, "SHOW CREATE TABLE "+db+".events_hourly"); !strings.Contains(has, "uniqCombined64(17)") || strings.Contains(has, "(19)") {
		t.Errorf("made anew as %s", has)
	}
}

// newTables makes the tables as they are, with events of two days in them that ClickHouse got an hour ago.
func newTables(t *testing.T, env []string) *store {
	t.Helper()
	st := preparedStore(t, settingsFrom(t, env))
	clickhouseQuery(t, fmt.Sprintf("INSERT INTO %s.events (created_at, event_id, event_name, user_id, timestamp) SELECT now64(3) - 3600, SHA256(toString(number)), 'e', toString(number %% 99), %d - number FROM numbers(150000)", st.database, time.Now().Unix()-4000))
	return st
}

// tryQuery runs a statement that may fail, and says whether it did not.
func tryQuery(t *testing.T, sql string) bool {
	resp, err := http.Post("http://127.0.0.1:"+stackEnv(t, "CLICKHOUSE_HTTP_PORT"), "text/plain", strings.NewReader(sql))
	if err == nil {
		resp.Body.Close()
	}
	return err == nil && resp.StatusCode == http.StatusOK
}

// TestOneCommandAtATime: a command that changes tables says that another one is at it, or waits its turn. Several at once mend an
// hour once.
func TestOneCommandAtATime(t *testing.T) {
	t.Parallel()
	env := newSpace(t)
	db := newTables(t, env).database
	const refused = "another command changes the tables"
	atOnce := func(commands ...string) (done int) {
		var running sync.WaitGroup
		var mu sync.Mutex // guards done
		for _, args := range commands {
			running.Go(func() {
				out, code := subcommand(t, env, args)
				mu.Lock()
				defer mu.Unlock()
				if code == 0 {
					done++
				} else if code != 1 || !strings.Contains(out, refused) {
					t.Errorf("%s: %d %s", args, code, out)
				}
			})
		}
		running.Wait()
		return done
	}
	err := exclusively(t.Context(), settingsFrom(t, env), false, func(context.Context) error {
		if n := atOnce("reconcile", "reconcile -rebuild", "rewind -to start", "reconcile -dry-run"); n != 1 {
			t.Errorf("%d of three and a dry run did what another one was at", n)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, commands := range [][]string{
		{"reconcile -from 0", "reconcile -from 0", "reconcile -from 0"},
		{"reconcile -from 0", "reconcile -rebuild"},
	} {
		clickhouseQuery(t, fmt.Sprintf("INSERT INTO %s.events_hourly SELECT * FROM %[1]s.events_hourly", db)) // all of it twice
		if atOnce(commands...) == 0 {
			t.Errorf("all of %q were refused", commands)
		}
		countedOnce(t, db)
	}
}

// onLine does something when a line with a text is written for the first time, and only then lets the writer go on.
type onLine struct {
	text string
	do   func()
	done bool
}

func (o *onLine) Write(b []byte) (int, error) {
	if !o.done && bytes.Contains(b, []byte(o.text)) {
		o.done = true
		o.do()
	}
	return len(b), nil
}

// TestRebuildCutOffAtTheEnd: inserts go on again and the old table is not dropped yet when a rebuild dies. The next ones finish
// it beside inserts that never stop, none of which may find events without a view.
func TestRebuildCutOffAtTheEnd(t *testing.T) {
	t.Parallel()
	env := newSpace(t)
	db := newTables(t, env).database
	cfg := settingsFrom(t, env)
	ctx, stop := context.WithCancel(t.Context())
	var inserting sync.WaitGroup
	defer inserting.Wait()
	defer stop()
	for w := range 6 {
		inserting.Go(func() { // ends with stop
			for i := 0; ctx.Err() == nil; i++ {
				insert := fmt.Sprintf("INSERT INTO %s.events (event_id, event_name, user_id, timestamp) SETTINGS async_insert = 0 VALUES (SHA256('%d-%d'), 'many', 'u', now())", db, w, i)
				if !tryQuery(t, insert) { // they wait
					sleep(ctx, 10*time.Millisecond)
				}
			}
		})
	}
	for range 6 {
		ctx, cancel := context.WithCancel(t.Context())
		if err := rebuildHourly(ctx, cfg, &onLine{text: "inserts go on", do: cancel}); !errors.Is(err, context.Canceled) {
			t.Errorf("not cut off: %v", err)
		}
		cancel()
	}
	if err := rebuildHourly(t.Context(), cfg, io.Discard); err != nil {
		t.Error(err)
	}
	stop()
	inserting.Wait()
	countedOnce(t, db)
}

// TestTornWhileCounting: an insert dies between events and the table that a rebuild fills. The hour is mended, though it was
// written to a moment ago.
func TestTornWhileCounting(t *testing.T) {
	t.Parallel()
	env := newSpace(t)
	db := newTables(t, env).database
	tear := func() {
		next := db + "." + tableNext
		clickhouseQuery(t, "ALTER TABLE "+next+" ADD CONSTRAINT slow CHECK sleepEachRow(0.05) = 0")
		behind := func() bool {
			return clickhouseQuery(t, fmt.Sprintf("SELECT (SELECT count() FROM %s.events WHERE event_name = 'torn') > (SELECT sum(event_count) FROM %s WHERE event_name = 'torn')", db, next)) == "1"
		}
		for n := 0; !behind() && !t.Failed(); n++ {
			ended := make(chan bool, 1)
			go func() { // ends with KILL
				ended <- tryQuery(t, fmt.Sprintf("INSERT INTO %s.events (event_id, event_name, user_id, timestamp) SELECT SHA256('%d-' || toString(number)), 'torn', 'u', now() FROM numbers(100)"+
					" SETTINGS max_block_size = 1, min_insert_block_size_rows = 1, min_insert_block_size_bytes = 1", db, n))
			}()
			for deadline := time.Now().Add(20 * time.Second); !behind() && time.Now().Before(deadline); {
				sleep(t.Context(), 10*time.Millisecond)
			}
			clickhouseQuery(t, "KILL QUERY WHERE startsWith(query, 'INSERT INTO "+db+".events ') SYNC")
			if <-ended {
				t.Error("an insert was not killed")
			}
		}
		clickhouseQuery(t, "ALTER TABLE "+next+" DROP CONSTRAINT slow")
	}
	look := func() { countedOnce(t, db) } // whoever asks is told so from the exchange on
	out := io.MultiWriter(&onLine{text: "counting", do: tear}, &onLine{text: "the views are made anew", do: look})
	if err := rebuildHourly(t.Context(), settingsFrom(t, env), out); err != nil {
		t.Error(err)
	}
	look()
}

// TestRebuildAfterClockAhead: ClickHouse's clock was ahead when the table was made anew before.
func TestRebuildAfterClockAhead(t *testing.T) {
	t.Parallel()
	env := newSpace(t)
	db := newTables(t, env).database
	clickhouseQuery(t, fmt.Sprintf("ALTER TABLE %s.events_hourly MODIFY COMMENT '%d'", db, time.Now().Add(time.Hour).UnixMilli()))
	clickhouseQuery(t, fmt.Sprintf("INSERT INTO %[1]s.events_hourly SELECT * FROM %[1]s.events_hourly", db)) // all of it twice
	if err := rebuildHourly(t.Context(), settingsFrom(t, env), io.Discard); err != nil {
		t.Error(err)
	}
	countedOnce(t, db)
}

// TestReconcileBesideSlowInsert: an insert stands in events for longer than the command takes for quiet, and in events_hourly not yet.
func TestReconcileBesideSlowInsert(t *testing.T) {
	t.Parallel()
	st := newTables(t, newSpace(t))
	for i := range 2 {
		clickhouseQuery(t, fmt.Sprintf("ALTER TABLE %s.events_hourly ADD CONSTRAINT slow%d CHECK sleepEachRow(2.5) = 0", st.database, i))
	}
	ended := make(chan bool, 1)
	go func() { // ends with the insert
		ended <- tryQuery(t, fmt.Sprintf("INSERT INTO %s.events (event_id, event_name, user_id, timestamp) SETTINGS async_insert = 0 VALUES (SHA256('slow'), 'slow', 'u', now() - 7200)", st.database))
	}()
	const quiet = 1
	stands := fmt.Sprintf("SELECT count() FROM %s.events WHERE event_name = 'slow' AND created_at < now64(3) - %d", st.database, quiet)
	for deadline := time.Now().Add(time.Minute); clickhouseQuery(t, stands) == "0" && time.Now().Before(deadline); {
		sleep(t.Context(), 10*time.Millisecond)
	}
	if _, err := reconcile(t.Context(), st, timeRange{0, maxUnixSeconds}.hours(), quiet, false, func(unequal) {}); err != nil || !<-ended {
		t.Error("the command or the insert failed: ", err)
	}
	countedOnce(t, st.database)
}
