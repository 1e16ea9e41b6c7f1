// Parts of ClickHouse that cannot be read any more: the program says which one and what brings its rows back, and that does.

package test

import (
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// brokenSpace is a space with some thousand events, in many parts or merged into one.
func brokenSpace(t *testing.T, merged bool) (p *program, sent func(n int) int64) {
	t.Helper()
	env := newSpace(t, "ADMIN_ADDR=127.0.0.1:"+freePort(t))
	db := space(env, "CLICKHOUSE_DATABASE")
	p = startProgram(t, env)
	for _, table := range []string{"events", "events_hourly"} {
		clickhouseQuery(t, "SYSTEM STOP MERGES "+db+"."+table)
	}
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
	clickhouseQuery(t, "SYSTEM DROP MARK CACHE")
	clickhouseQuery(t, "SYSTEM DROP UNCOMPRESSED CACHE")
	return filepath.Base(path)
}

// askBroken asks for what has to be read from the part: the last seconds of one of events, which are in no whole hour, or all hours.
func askBroken(p *program, table, name string) (status int, answer string) {
	p.t.Helper()
	from, to := time.Now().Unix()-7000, time.Now().Unix()+7000
	if table == "events" {
		fmt.Sscan(clickhouseQuery(p.t, "SELECT greatest(toUnixTimestamp(min_time), toUnixTimestamp(max_time) - 50), toUnixTimestamp(max_time) + 1 FROM system.parts WHERE active AND table = 'events' AND name = '"+name+
			"' AND database = '"+space(p.env, "CLICKHOUSE_DATABASE")+"'"), &from, &to)
	}
	status, _, answer = p.do("GET", fmt.Sprintf("%sevent_name=broken&from=%d&to=%d", metricsPath, from, to), "", "", nil)
	return status, answer
}

// mustBeNamed fails the test unless the part is named once in the log, in /ready and in the counter, with what to do. It returns the
// two statements.
func mustBeNamed(p *program, table, name string) (statements []string) {
	p.t.Helper()
	p.await("named", 20*time.Second, func() bool { return strings.Contains(p.log.String(), "ClickHouse has a broken part") })
	detach := "DETACH TABLE " + space(p.env, "CLICKHOUSE_DATABASE") + "." + table + " SYNC"
	attach := "ATTACH TABLE " + space(p.env, "CLICKHOUSE_DATABASE") + "." + table
	_, _, ready := p.do("GET", "/ready", "", "", nil)
	for _, text := range []string{p.log.String(), ready} {
		if !strings.Contains(text, name) || !strings.Contains(text, detach+"; "+attach) || !strings.Contains(text, "8 minutes") {
			p.t.Errorf("it lacks the part %s, or what to do:\n%s", name, text)
		}
	}
	if !strings.Contains(ready, `"status":"ready"`) {
		p.t.Errorf("not ready: %s", ready)
	}
	if n := strings.Count(p.log.String(), "ClickHouse has a broken part"); n != 1 {
		p.t.Errorf("it is said %d times", n)
	}
	_, port, _ := strings.Cut(space(p.env, "ADMIN_ADDR"), ":")
	if n := metric(p.t, port, "event_ingestion_broken_parts_total"); n != 1 {
		p.t.Errorf("%v are counted", n)
	}
	return []string{detach, attach}
}

// putAside runs the statements, and awaits that nobody speaks of the part any more.
func putAside(p *program, statements []string) {
	p.t.Helper()
	for _, sql := range statements {
		clickhouseQuery(p.t, sql)
	}
	p.await("as if nothing had been", 20*time.Second, func() bool {
		_, _, ready := p.do("GET", "/ready", "", "", nil)
		return strings.Contains(ready, `"clickhouse":"ok"`)
	})
}

// TestBrokenMerged: the files of a merged part are empty while the program runs. It goes on storing, and the two statements that it
// says bring back what was merged.
func TestBrokenMerged(t *testing.T) {
	t.Parallel()
	for _, table := range []string{"events", "events_hourly"} {
		t.Run(table, func(t *testing.T) {
			t.Parallel()
			p, send := brokenSpace(t, true)
			name := breakPart(t, space(p.env, "CLICKHOUSE_DATABASE"), table)
			if status, answer := askBroken(p, table, name); status != http.StatusServiceUnavailable || !strings.Contains(answer, name) {
				t.Errorf("%d %s", status, answer)
			}
			send(500)
			putAside(p, mustBeNamed(p, table, name))
			all := send(100)
			drained(p)
			mustCount(t, p.env, "broken", all)
		})
	}
}

// TestBrokenGone: nothing was merged into the part, and its rows are gone. What the program says brings them back: a rewind those of
// events, a reconciliation those of events_hourly.
func TestBrokenGone(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ table, command string }{{"events", "rewind -to start"}, {"events_hourly", "reconcile"}} {
		t.Run(c.table, func(t *testing.T) {
			t.Parallel()
			p, send := brokenSpace(t, false)
			name := breakPart(t, space(p.env, "CLICKHOUSE_DATABASE"), c.table)
			askBroken(p, c.table, name)
			statements := mustBeNamed(p, c.table, name)
			if !strings.Contains(p.log.String(), "event-ingestion "+c.command) {
				t.Errorf("the log lacks %q:\n%s", c.command, p.log)
			}
			putAside(p, statements)
			all := send(100)
			drained(p)
			if c.table == "events" {
				p.terminate()
			} else {
				time.Sleep(11 * time.Second) // reconcile leaves out what was written just now
			}
			if out, code := subcommand(t, p.env, c.command); code != 0 {
				t.Fatalf("%d %s", code, out)
			}
			if c.table == "events" {
				p = startProgram(t, p.env)
				drained(p)
			}
			mustCount(t, p.env, "broken", all)
		})
	}
}

// TestBrokenUnderLoad: a merged part breaks while two instances store and queries run, and a person puts it aside. No insert is counted
// in one table only while the other one is detached.
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
			first.await("named", time.Minute, func() bool {
				askBroken(first, table, name)
				return strings.Contains(first.log.String()+second.log.String(), name)
			})
			clickhouseQuery(t, "DETACH TABLE "+db+"."+table+" SYNC")
			target := l.OK.Load() + 500
			first.await("accepted without the table", 20*time.Second, func() bool { return l.OK.Load() > target })
			clickhouseQuery(t, "ATTACH TABLE "+db+"."+table)
			target = l.OK.Load() + 1500
			first.await("under load again", 20*time.Second, func() bool { return l.OK.Load() > target })
			l.Stop()
			done()
			mustHold(first, l)
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
