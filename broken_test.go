// Parts of ClickHouse that cannot be read any more: noticed, put aside, and what they had is back in the end.

package main

import (
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/ClickHouse/ch-go"
	"github.com/ClickHouse/ch-go/proto"
)

// brokenSpace is a space with some thousand events, in many parts or merged into one.
func brokenSpace(t *testing.T, merged bool) (p *program, sent func(n int) int64) {
	t.Helper()
	env := newSpace(t)
	db := space(env, "CLICKHOUSE_DATABASE")
	if _, err := newStore(settingsFrom(t, env)).prepare(t.Context(), 0); err != nil {
		t.Fatal(err)
	}
	for _, table := range []string{"events", "events_hourly"} {
		clickhouseQuery(t, "SYSTEM STOP MERGES "+db+"."+table)
	}
	p = startProgram(t, env)
	total := 0
	sent = func(n int) int64 {
		var body []byte
		at := time.Now().Unix()
		for range n {
			body = fmt.Appendf(body, `{"event_name":"broken","user_id":"u%d","timestamp":%d}`+"\n", total, at-int64(total))
			total++
		}
		if len(body) > 0 {
			postAll(t, p, [][]byte{body})
		}
		return int64(total)
	}
	for range 4 {
		want := fmt.Sprint(sent(500))
		p.await("stored in both tables", 20*time.Second, func() bool { // which an insert fills one after the other
			return clickhouseQuery(t, "SELECT (SELECT count() FROM "+db+".events), (SELECT sum(event_count) FROM "+db+".events_hourly)") == want+"\t"+want
		})
	}
	if merged {
		for _, table := range []string{"events", "events_hourly"} {
			clickhouseQuery(t, "SYSTEM START MERGES "+db+"."+table)
			clickhouseQuery(t, "OPTIMIZE TABLE "+db+"."+table+" FINAL")
			clickhouseQuery(t, "SYSTEM STOP MERGES "+db+"."+table)
		}
	}
	return p, sent
}

// breakPart makes all files of a table's largest live part empty, one that was merged where there is one.
func breakPart(t *testing.T, db, table string) (name string) {
	t.Helper()
	path := clickhouseQuery(t, "SELECT path FROM system.parts WHERE active AND database = '"+db+"' AND table = '"+table+"' ORDER BY level > 0 DESC, rows DESC, max_time DESC LIMIT 1")
	if err := filepath.WalkDir(path, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		return os.Truncate(path, 0)
	}); err != nil {
		t.Skip("ClickHouse's files are not here:", err)
	}
	return filepath.Base(path)
}

// askPart asks for the last seconds of a part of events. Nothing of them is in a whole hour, or at least the first of them is
// not, so that the answer has to read the part.
func askPart(t *testing.T, p *program, name string) (status int, answer string) {
	t.Helper()
	var from, to int64
	fmt.Sscan(clickhouseQuery(t, "SELECT greatest(toUnixTimestamp(min_time), toUnixTimestamp(max_time) - 50), toUnixTimestamp(max_time) + 1 FROM system.parts WHERE active AND table = 'events' AND name = '"+name+
		"' AND database = '"+space(p.env, "CLICKHOUSE_DATABASE")+"'"), &from, &to)
	status, _, answer = p.do("GET", fmt.Sprintf("%sevent_name=broken&from=%d&to=%d", metricsPath, from, to), "", "", nil)
	return status, answer
}

// TestBrokenMerged: the files of a merged part are empty while the program runs. Whoever meets it first, a lookup, a query
// or a look at an hour, it is put aside, what was merged into it is back, and nothing is lost.
func TestBrokenMerged(t *testing.T) {
	t.Parallel()
	for _, table := range []string{"events", "events_hourly"} {
		t.Run(table, func(t *testing.T) {
			t.Parallel()
			p, send := brokenSpace(t, true)
			db := space(p.env, "CLICKHOUSE_DATABASE")
			name := breakPart(t, db, table)
			clickhouseQuery(t, "SYSTEM DROP MARK CACHE")
			clickhouseQuery(t, "SYSTEM DROP UNCOMPRESSED CACHE")
			var status int
			var answer string
			if table == "events" {
				status, answer = askPart(t, p, name)
			} else { // its whole hours
				status, _, answer = p.do("GET", fmt.Sprintf("%sevent_name=broken&from=%d&to=%d", metricsPath, time.Now().Unix()-7000, time.Now().Unix()+7000), "", "", nil)
			}
			named := status == http.StatusServiceUnavailable && strings.Contains(answer, name)
			if !named && !strings.Contains(p.log.String(), "is detached and attached") { // somebody else met it first
				t.Errorf("%d %s", status, answer)
			}
			send(500)
			p.await("mended", 30*time.Second, func() bool { return strings.Contains(p.log.String(), "is put aside") })
			all := send(100)
			drained(p)
			mustCount(t, p.env, "broken", all)
			for _, want := range []string{"ClickHouse has a broken part\" table=" + table + " part=" + name, "are back"} {
				if !strings.Contains(p.log.String(), want) {
					t.Errorf("the log lacks %q:\n%s", want, p.log)
				}
			}
		})
	}
}

// TestAskedWhileDetached: who asks for metrics while a table is detached waits for it, and is answered.
func TestAskedWhileDetached(t *testing.T) {
	t.Parallel()
	p, send := brokenSpace(t, false)
	db := space(p.env, "CLICKHOUSE_DATABASE")
	want := fmt.Sprintf(`"total_count":%d`, send(0))
	for range 3 {
		clickhouseQuery(t, "DETACH TABLE "+db+".events_hourly SYNC")
		answered := make(chan string, 1)
		go func() { // ends with the answer
			_, _, answer := p.do("GET", fmt.Sprintf("%sevent_name=broken&from=%d&to=%d", metricsPath, time.Now().Unix()-7000, time.Now().Unix()), "", "", nil)
			answered <- answer
		}()
		p.await("the query has found no table", 10*time.Second, func() bool {
			return clickhouseQuery(t, "SELECT count() FROM system.errors WHERE name = 'UNKNOWN_TABLE' AND last_error_message LIKE '%"+db+".events_hourly%'") == "1"
		})
		clickhouseQuery(t, "ATTACH TABLE IF NOT EXISTS "+db+".events_hourly")
		if answer := <-answered; !strings.Contains(answer, want) {
			t.Errorf("%s instead of %s", answer, want)
		}
	}
}

// TestBrokenGone: a part of acknowledged inserts is emptied, while ClickHouse is down or while it runs, and nothing was
// merged into it. In events_hourly it is counted again; in events the rows are gone, and the log says how to bring them
// back.
func TestBrokenGone(t *testing.T) {
	alone(t)
	for _, c := range []struct {
		table  string
		killed bool
	}{{"events", true}, {"events", false}, {"events_hourly", true}} {
		t.Run(fmt.Sprint(c.table, " killed ", c.killed), func(t *testing.T) {
			p, send := brokenSpace(t, false)
			db := space(p.env, "CLICKHOUSE_DATABASE")
			name := breakPart(t, db, c.table)
			if c.killed {
				control(t, "/clickhouse/kill")
				control(t, "/clickhouse/start")
			} else {
				clickhouseQuery(t, "SYSTEM DROP MARK CACHE")
				askPart(t, p, name)
			}
			all := send(500)
			p.await("noticed", 30*time.Second, func() bool {
				return strings.Contains(p.log.String(), "is put aside") && strings.Contains(p.log.String(), name)
			})
			drained(p)
			if c.table == "events" {
				m := regexp.MustCompile(`event-ingestion rewind (-to \S+?)"`).FindStringSubmatch(p.log.String())
				if m == nil || (m[1] == "-to start") != c.killed {
					t.Fatal("how to bring the rows back:", m)
				}
				if got := clickhouseQuery(t, "SELECT count() - (SELECT sum(event_count) FROM "+db+".events_hourly) FROM "+db+".events"); got != "0" {
					t.Errorf("%s rows more in events than in events_hourly", got)
				}
				p.terminate()
				out, code := subcommand(t, p.env, "rewind "+m[1])
				if code != 0 {
					t.Fatalf("rewind %s: %d %s", m[1], code, out)
				}
				t.Logf("rewind %s: %s", m[1], out[strings.LastIndex(strings.TrimSpace(out), "\n")+1:])
				p = startProgram(t, p.env)
				drained(p)
			}
			mustCount(t, p.env, "broken", all)
		})
	}
}

// TestBrokenUnderLoad: a merged part breaks while two instances store and queries run. No insert is counted in one table only
// while the other one is detached.
func TestBrokenUnderLoad(t *testing.T) {
	t.Parallel()
	for _, table := range []string{"events", "events_hourly"} {
		t.Run(table, func(t *testing.T) {
			t.Parallel()
			env := newSpace(t)
			db := space(env, "CLICKHOUSE_DATABASE")
			first, second := startProgram(t, env), startProgram(t, env)
			l, done := loadInto(t, first.url, 1500, time.Hour)
			first.await("stored", 30*time.Second, func() bool {
				n, _ := strconv.Atoi(clickhouseQuery(t, "SELECT sum(event_count) FROM "+db+".events_hourly"))
				return n > 1500
			})
			clickhouseQuery(t, "OPTIMIZE TABLE "+db+"."+table+" FINAL")
			name := breakPart(t, db, table)
			clickhouseQuery(t, "SYSTEM DROP MARK CACHE")
			first.await("mended", time.Minute, func() bool {
				return strings.Contains(first.log.String()+second.log.String(), "is put aside")
			})
			target := l.OK.Load() + 1500
			first.await("under load again", 20*time.Second, func() bool { return l.OK.Load() > target })
			l.Stop()
			done()
			mustHold(first, l)
			if !strings.Contains(first.log.String()+second.log.String(), name) {
				t.Error("the log does not name the part")
			}
		})
	}
}

// TestBrokenNamed: ClickHouse's words name the part; an error of another kind names none, wherever it was met.
func TestBrokenNamed(t *testing.T) {
	const reading = "Empty marks file '/data/store/061/0613/%[1]s/data.cmrk4': 0, must be: 848: (while reading from part /data/store/061/0613/%[1]s/%[2]s in table db.%[3]s (0613a50c) located on disk default of type local, from mark 0)"
	for _, c := range []struct {
		code                proto.Error
		inside, table, want string
	}{
		{proto.ErrCorruptedData, "", "events", "events"},
		{proto.ErrCannotReadAllData, "daily.proj/", "events_hourly", "events_hourly"},
		{proto.ErrCorruptedData, "", "other_events", ""},
		{proto.ErrMemoryLimitExceeded, "", "events", ""},
	} {
		var b brokenParts
		for range 2 {
			b.note(fmt.Errorf("look up: %w", &ch.Exception{Code: c.code, Message: fmt.Sprintf(reading, "202611_1_4_1", c.inside, c.table)}))
		}
		var want []partName
		if c.want != "" {
			want = []partName{{c.want, "202611_1_4_1"}}
		}
		if got := b.waiting(); !slices.Equal(got, want) || int(b.total.Load()) != len(want) {
			t.Errorf("%v: found %v", c, got)
		}
	}
}

// TestBrokenUnread: a part that breaks on a full disk and that nobody reads is found by a check. The disk is not full here:
// the inserter is told that an insert failed for want of space.
func TestBrokenUnread(t *testing.T) {
	t.Parallel()
	cfg := settingsFrom(t, newSpace(t))
	st := preparedStore(t, cfg)
	for range 3 {
		clickhouseQuery(t, "INSERT INTO "+st.database+".events (event_id, event_name, timestamp) SELECT toString(rand64()), 'unread', now() FROM numbers(100)")
	}
	clickhouseQuery(t, "OPTIMIZE TABLE "+st.database+".events FINAL")
	name := breakPart(t, st.database, "events")
	in := newInserter(st, cfg, &newStats().store, nil, newRoundCall(), membership{alone: func() bool { return true }})
	in.repair(t.Context(), &ch.Exception{Code: proto.ErrNotEnoughSpace})
	in.repair(t.Context(), nil)
	for deadline := time.Now().Add(20 * time.Second); len(st.broken.waiting()) == 0; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("not found")
		}
	}
	if got := st.broken.waiting(); got[0] != (partName{"events", name}) || !strings.Contains(st.broken.words(), name) {
		t.Errorf("found %v", got)
	}
	in.mend(t.Context())
	if len(st.broken.waiting()) > 0 || st.broken.total.Load() != 1 {
		t.Errorf("waiting %v, %d in all", st.broken.waiting(), st.broken.total.Load())
	}
	mustCount(t, []string{"CLICKHOUSE_DATABASE=" + st.database}, "unread", 300)

	// The next one within ten minutes waits.
	in.store.broken.add(partName{"events", clickhouseQuery(t, "SELECT name FROM system.parts WHERE active AND table = 'events' AND database = '"+st.database+"' LIMIT 1")}, "a test", true)
	in.mend(t.Context())
	if len(st.broken.waiting()) != 1 {
		t.Errorf("waiting %v", st.broken.waiting())
	}

	// A mending that was cut off between the two statements is brought to its end by the next start.
	clickhouseQuery(t, "DETACH TABLE "+st.database+".events_hourly SYNC")
	if _, err := st.prepare(t.Context(), 0); err != nil {
		t.Fatal(err)
	}
	mustCount(t, []string{"CLICKHOUSE_DATABASE=" + st.database}, "unread", 300)
	in.conn.Close()
}
