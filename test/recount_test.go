// Hours are counted anew: while events come in, whatever dies, and nobody sees a half of it.

package test

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/event-ingestion/event-ingestion/internal/testkit"
)

// recountSpace is an instance with events of some hours, which events_hourly counts wrongly: more events, other users, another revenue.
// Their first and last hours begin at from and to.
func recountSpace(t *testing.T) (p *program, from, to int64) {
	t.Helper()
	env := faultSpace(t)
	db := space(env, "CLICKHOUSE_DATABASE")
	p = startProgram(t, env)
	from = time.Now().Unix()/3600*3600 - 30*3600
	to = from + 27*3600 // more than are recounted at once
	var bodies [][]byte
	for hour := from; hour <= to; hour += 3600 {
		var body []byte
		for i := range 20 {
			body = fmt.Appendf(body, `{"event_name":"purchase","user_id":"u%d","timestamp":%d,"channel":"web","metadata":{"price":1.5}}`+"\n", i, hour+int64(i))
		}
		bodies = append(bodies, body)
	}
	postAll(t, p, bodies)
	drained(p)
	clickhouseQuery(t, fmt.Sprintf("INSERT INTO %s.events (event_id, event_name, user_id, timestamp, channel, price) SELECT SHA256(toString((number, stranger))), 'purchase', concat('stranger', toString(stranger)), number, 'web', 2"+
		" FROM (SELECT number, arrayJoin(range(5)) AS stranger FROM numbers(%d, %d, 3600))", db, from, to-from+1))
	clickhouseQuery(t, "ALTER TABLE "+db+".events DELETE WHERE startsWith(user_id, 'stranger') SETTINGS mutations_sync = 2") // as an erasure does
	return p, from, to
}

// counted is an answer by hour.
type counted struct {
	Total  int64 `json:"total_count"`
	Users  int64 `json:"unique_users"`
	Groups []struct {
		Total int64 `json:"total_count"`
		Users int64 `json:"unique_users"`
	} `json:"grouped_data"`
}

// askCounted is the answer about the hours, and whether there is one.
func askCounted(p *program, from, to int64) (a counted, answered bool) {
	p.t.Helper()
	status, _, answer := p.do("GET", fmt.Sprintf("%sevent_name=purchase&from=%d&to=%d&group_by=hour", metricsPath, from, to+3599), "", "", nil)
	if err := json.Unmarshal([]byte(answer), &a); status == http.StatusOK && err == nil {
		return a, true
	}
	if status != http.StatusServiceUnavailable || !strings.Contains(answer, "being recounted") {
		p.t.Errorf("%d %s", status, answer)
	}
	return a, false
}

// mustBeCounted fails the test unless both tables agree about the hours, users and revenue included.
func mustBeCounted(p *program, from, to int64) {
	t := p.t
	t.Helper()
	hours := (to-from)/3600 + 1
	if a, answered := askCounted(p, from, to); !answered || a.Total != 20*hours || a.Users != 20 {
		t.Errorf("%v, %d events of %d users, want %d of 20", answered, a.Total, a.Users, 20*hours)
	}
	got := clickhouseQuery(t, "SELECT sum(event_count), uniqCombined64Merge(17)(unique_users_state), toFloat64(sum(revenue)) FROM "+space(p.env, "CLICKHOUSE_DATABASE")+".events_hourly WHERE event_name = 'purchase'")
	if want := fmt.Sprintf("%d\t20\t%d", 20*hours, 30*hours); got != want {
		t.Errorf("events_hourly has %q, want %q", got, want)
	}
}

// TestRecount: questions find the old figure, the new one, or none, while events come in, into the last of the hours, too.
func TestRecount(t *testing.T) {
	t.Parallel()
	p, from, to := recountSpace(t)
	hours := (to-from)/3600 + 1
	l, done := loadInto(t, p.url, 500, time.Hour)
	ended := make(chan string, 1)
	go func() { // ends with the command
		out, code := subcommand(t, p.env, fmt.Sprintf("reconcile -recount -from %d -to %d", from, time.Now().Unix()+3600))
		ended <- fmt.Sprintf("%d %s", code, out)
	}()
	var asked, none atomic.Int64
	before, after := 25*hours, 20*hours
	deadline := time.Now().Add(time.Minute)
	var askers sync.WaitGroup
	for range 4 {
		askers.Go(func() { // ends with the new figure
			for ; ; asked.Add(1) {
				a, answered := askCounted(p, from, to)
				if !answered {
					none.Add(1)
				} else if rest := before - a.Total; rest < 0 || rest > before-after || rest%5 != 0 {
					t.Errorf("%d events, want %d, %d, or hours of both", a.Total, before, after)
				}
				for _, g := range a.Groups {
					if !(g.Total == 25 && g.Users == 25 || g.Total == 20 && g.Users == 20) {
						t.Errorf("an hour has %d events of %d users", g.Total, g.Users)
					}
				}
				if answered && a.Total == after {
					return
				}
				if time.Now().After(deadline) {
					t.Error("not recounted within a minute")
					return
				}
			}
		})
	}
	askers.Wait()
	if said := <-ended; !strings.HasPrefix(said, "0 ") || !strings.Contains(said, "hours are counted anew") {
		t.Errorf("the command: %s", said)
	}
	l.Stop()
	done()
	mustBeCounted(p, from, to)
	mustHold(p, l)
	t.Logf("%d questions, %d without an answer", asked.Load(), none.Load())
}

// TestRecountKilled: the command is killed at many moments, while events of the hours come in late. Run again it ends exactly.
func TestRecountKilled(t *testing.T) {
	t.Parallel()
	p, from, to := recountSpace(t)
	args := fmt.Sprintf("reconcile -recount -from %d -to %d", from, to+3600)
	for i := range 8 {
		cmd := command(t, p.env, strings.Fields(args)...)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		time.AfterFunc(time.Duration(150+50*i)*time.Millisecond, func() { cmd.Process.Kill() }) // the fault itself
		cmd.Wait()
		late := fmt.Appendf(nil, `{"event_name":"late","user_id":"u%d","timestamp":%d}`+"\n", i, from+int64(i))
		postAll(t, p, [][]byte{late})
	}
	drained(p) // also beside what the last one left
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(100 * time.Millisecond) {
		out, code := subcommand(t, p.env, args)
		if code == 0 {
			break
		}
		if time.Now().After(deadline) || !strings.Contains(out, "another command") {
			t.Fatalf("%d %s", code, out)
		}
	}
	mustBeCounted(p, from, to)
	mustCount(t, p.env, "late", 8)
	if out, code := subcommand(t, p.env, "reconcile -dry-run"); code != 0 || !strings.Contains(out, "0 rows of events_hourly differ") {
		t.Error(out)
	}
}

// TestRecountTorn: ClickHouse dies under load while hours are recounted, the one that is written to among them. An insert may be torn
// then, and the command fails; run again it ends, and all is counted once.
func TestRecountTorn(t *testing.T) {
	alone(t)
	p, from, to := recountSpace(t)
	l, done := loadInto(t, p.url, 1000, time.Hour, "-dup", "0.1")
	args := fmt.Sprintf("reconcile -recount -from %d -to %d", from, time.Now().Unix()+3600)
	for range 3 * testkit.TortureFactor() {
		target := l.OK.Load() + 500
		p.await("under load", 30*time.Second, func() bool { return l.OK.Load() > target })
		cmd := command(t, p.env, strings.Fields(args)...)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		p.await("hours are recounted", 20*time.Second, func() bool {
			return clickhouseQuery(t, "SELECT count() FROM "+space(p.env, "CLICKHOUSE_DATABASE")+".recounts") == "1"
		})
		control(t, "/clickhouse/kill")
		control(t, "/clickhouse/start")
		cmd.Wait()
	}
	if out, code := subcommand(t, p.env, args); code != 0 {
		t.Fatalf("%d %s", code, out)
	}
	l.Stop()
	done()
	mustHold(p, l)
	mustBeCounted(p, from, to)
}

// TestOneCommandAtATime: a command that changes tables says that another one is at it, or waits its turn. Several at once mend an
// hour once.
func TestOneCommandAtATime(t *testing.T) {
	t.Parallel()
	p, from, to := recountSpace(t)
	p.terminate()
	db := space(p.env, "CLICKHOUSE_DATABASE")
	recount := fmt.Sprintf("reconcile -recount -from %d -to %d", from, to+3600)
	atOnce := func(commands ...string) (done int64) {
		var running sync.WaitGroup
		var n atomic.Int64
		for _, args := range commands {
			running.Go(func() {
				if out, code := subcommand(t, p.env, args); code == 0 {
					n.Add(1)
				} else if code != 1 || !strings.Contains(out, "another command changes the tables") {
					t.Errorf("%s: %d %s", args, code, out)
				}
			})
		}
		running.Wait()
		return n.Load()
	}
	ctx, release := context.WithCancel(t.Context())
	defer release()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://127.0.0.1:"+stackEnv(t, "CLICKHOUSE_HTTP_PORT")+"/?query_id=tables+"+db,
		strings.NewReader("SELECT sleepEachRow(0.1) FROM system.numbers SETTINGS max_block_size = 1"))
	if err != nil {
		t.Fatal(err)
	}
	held := make(chan struct{})
	go func() { // ends with release
		defer close(held)
		if resp, err := http.DefaultClient.Do(req); err == nil {
			io.Copy(io.Discard, resp.Body)
			resp.Body.Close()
		}
	}()
	p.await("held", 20*time.Second, func() bool {
		return clickhouseQuery(t, "SELECT count() FROM system.processes WHERE query_id = 'tables "+db+"'") == "1"
	})
	if n := atOnce("reconcile", recount, "rewind -to start", "reconcile -dry-run"); n != 1 {
		t.Errorf("%d of three and a dry run did what another one was at", n)
	}
	release()
	<-held
	clickhouseQuery(t, "KILL QUERY WHERE query_id = 'tables "+db+"' SYNC")
	for _, commands := range [][]string{{"reconcile -from 0", "reconcile -from 0", "reconcile -from 0"}, {"reconcile -from 0", recount}, {recount, recount}} {
		p.await("quiet", 30*time.Second, func() bool { // what was written a moment ago is no difference yet
			return clickhouseQuery(t, "SELECT count() FROM system.parts WHERE active AND database = '"+db+"' AND modification_time > now() - 11") == "0"
		})
		clickhouseQuery(t, fmt.Sprintf("INSERT INTO %s.events_hourly SELECT * FROM %[1]s.events_hourly", db)) // all of it twice
		if atOnce(commands...) == 0 {
			t.Errorf("all of %q were refused", commands)
		}
		mustCount(t, p.env, "purchase", 20*((to-from)/3600+1))
	}
}

// TestReconcileBesideSlowInsert: an insert stands in events for longer than the command takes for quiet, and in events_hourly not yet.
func TestReconcileBesideSlowInsert(t *testing.T) {
	t.Parallel()
	env := newSpace(t)
	makeTables(t, env)
	db := space(env, "CLICKHOUSE_DATABASE")
	for i := range 5 {
		clickhouseQuery(t, fmt.Sprintf("ALTER TABLE %s.events_hourly ADD CONSTRAINT slow%d CHECK sleepEachRow(2.5) = 0", db, i))
	}
	ended := make(chan error, 1)
	go func() { // ends with the insert
		resp, err := http.Post("http://127.0.0.1:"+stackEnv(t, "CLICKHOUSE_HTTP_PORT"), "text/plain", strings.NewReader(fmt.Sprintf(
			"INSERT INTO %s.events (event_id, event_name, user_id, timestamp) SETTINGS async_insert = 0 VALUES (SHA256('slow'), 'slow', 'u', now() - 7200)", db)))
		if err == nil && resp.StatusCode != http.StatusOK {
			err = fmt.Errorf("status %d", resp.StatusCode)
		}
		ended <- err
	}()
	stands := fmt.Sprintf("SELECT count() FROM %s.events WHERE event_name = 'slow' AND created_at < now64(3) - 10.5", db)
	for deadline := time.Now().Add(time.Minute); clickhouseQuery(t, stands) == "0" && time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
	}
	out, code := subcommand(t, env, "reconcile")
	if err := <-ended; code != 0 || err != nil {
		t.Errorf("the command or the insert failed: %d %s %v", code, out, err)
	}
	mustCount(t, env, "slow", 1)
}
