// Several ClickHouse servers: the same faults, what only they can have, and one more of them while events come in.

package test

import (
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/event-ingestion/event-ingestion/internal/testkit"

	"github.com/event-ingestion/event-ingestion/load"
)

// serversSpace is a faultSpace on several servers, which take a round with longer pauses.
func serversSpace(t testing.TB, more ...string) []string {
	t.Helper()
	return faultSpace(t, append([]string{"WORKER_BATCH_TIMEOUT=200ms"}, more...)...)
}

// TestServers runs on three servers. Each part has a database of its own.
func TestServers(t *testing.T) {
	if isCluster() {
		t.Skip("has no stack of its own there")
	}
	alone(t, "-shards", "3")
	t.Run("killed", testServersKilled)
	t.Run("instances", testServersInstances)
	t.Run("away", testServerAway)
	t.Run("one alone", testOneOfServers)
	t.Run("emptied", testServerEmptied)
}

// testServersKilled: the program and single servers are killed under load with repeats. Every server has events, each once, and all
// answers are over all servers.
func testServersKilled(t *testing.T) {
	env := serversSpace(t)
	p := startProgram(t, env)
	l, done := loadInto(t, p.url, 2000, time.Hour, "-dup", "0.2")
	for i := range 4 * testkit.TortureFactor() {
		target := l.OK.Load() + 1000
		p.await("under load", 30*time.Second, func() bool { return l.OK.Load() > target })
		if i%2 == 0 {
			p = p.killAndRestart()
		} else {
			control(t, fmt.Sprintf("/clickhouse/%d/kill", i/2%3+1))
		}
	}
	l.Stop()
	done()
	control(t, "/clickhouse/start")
	mustHold(p, l)
	mustBeSpread(t, env, 3)
	mustAnswerAll(p, l.Config.Event, l.Distinct())
}

// mustBeSpread fails the test unless each of so many servers has events.
func mustBeSpread(t *testing.T, env []string, servers int) {
	t.Helper()
	counts := askShards(t, "SELECT count() FROM "+space(env, "CLICKHOUSE_DATABASE")+".events")
	if len(counts) != servers || slices.Contains(counts, "0") {
		t.Errorf("the servers have %q events", counts)
	}
}

// mustAnswerAll compares every kind of question with what the raw tables of all servers say.
func mustAnswerAll(p *program, name string, want int64) {
	t, db := p.t, space(p.env, "CLICKHOUSE_DATABASE")
	t.Helper()
	users := clickhouseQuery(t, fmt.Sprintf("SELECT uniqExact(user_id) FROM cluster('shards', %s, events) WHERE event_name = '%s'", db, name))
	now := time.Now().Unix()
	const hour, day = 3600, 86400
	for _, by := range []string{"", "&group_by=channel", "&group_by=day", "&group_by=hour", "&group_by=campaign"} {
		for _, from := range []int64{now - 40*day, now - 5*hour - 17} {
			var a load.MetricsAnswer
			_, _, answer := p.do("GET", fmt.Sprintf("%sevent_name=%s&from=%d&to=%d%s", metricsPath, name, from, now, by), "", "", nil)
			if err := json.Unmarshal([]byte(answer), &a); err != nil || a.Total != want || fmt.Sprint(a.Users) != users {
				t.Errorf("%s from %d: %v, %.300s, want %d of %s users", by, from, err, answer, want, users)
			}
			sum := int64(0)
			for _, g := range a.Groups {
				sum += g.Total
			}
			if by != "" && sum != want {
				t.Errorf("%s from %d: the groups have %d, want %d", by, from, sum, want)
			}
		}
	}
	for _, span := range []int64{hour / 2, day, 30 * day} {
		var o struct {
			Total int64 `json:"total_count"`
		}
		status, _, answer := p.do("GET", fmt.Sprintf("/api/v1/overview?from=%d&to=%d&event_name=%s", now-span, now, name), "", "", nil)
		stored := clickhouseQuery(t, fmt.Sprintf("SELECT count() FROM cluster('shards', %s, events) WHERE event_name = '%s' AND timestamp >= %d AND timestamp <= %d", db, name, now-span, now))
		if err := json.Unmarshal([]byte(answer), &o); err != nil || status != http.StatusOK || fmt.Sprint(o.Total) != stored {
			t.Errorf("overview of %d s: %d %v %.300s, want %s", span, status, err, answer, stored)
		}
	}
	for _, view := range []string{"events_between", "events_between_by_day"} {
		got := clickhouseQuery(t, fmt.Sprintf("SELECT sum(event_count) FROM %s.%s(from = %d, to = %d) WHERE event_name = '%s'", db, view, now-40*day, now, name))
		if got != fmt.Sprint(want) {
			t.Errorf("%s has %s, want %d", view, got, want)
		}
	}
}

// testServersInstances: partitions move between instances under load, whose memory is little.
func testServersInstances(t *testing.T) {
	comeAndGo(t, serversSpace(t, "WORKER_COUNT=7", "KAFKA_PARTITIONS=13", "DEDUPE_MEMORY=300000"))
}

// testServerAway: a server stops, with queues so small that they fill. Storing and questions wait for it, accepting goes on, /ready
// says it, also after a start; then all is stored, once.
func testServerAway(t *testing.T) {
	env := serversSpace(t, "CONSUME_MEMORY=2000000")
	p := startProgram(t, env)
	l, done := loadInto(t, p.url, 1000, time.Hour, "-dup", "0.1")
	p.await("under load", 20*time.Second, func() bool { return l.OK.Load() > 1000 })
	control(t, "/clickhouse/2/stop")
	unready := func() bool {
		status, _, answer := p.do("GET", "/ready", "", "", nil)
		return status == http.StatusServiceUnavailable && strings.Contains(answer, `"kafka":"ok"`)
	}
	p.await("not ready", 30*time.Second, unready)
	if status := p.status(metricsPath + "event_name=e&from=1&to=2"); status != http.StatusServiceUnavailable {
		t.Errorf("metrics without a server: status %d", status)
	}
	target := l.OK.Load() + 1000
	p.await("accepted without the server", 20*time.Second, func() bool { return l.OK.Load() > target })
	p.cmd.Process.Kill()
	p.cmd.Wait()
	p.start() // and starts without the server
	target = l.OK.Load() + 1000
	p.await("accepted after a start without the server", 20*time.Second, func() bool { return l.OK.Load() > target })
	p.await("not ready", 30*time.Second, unready)
	control(t, "/clickhouse/2/start")
	l.Stop()
	done()
	p.await("ready", time.Minute, func() bool { return p.status("/ready") == http.StatusOK })
	mustHold(p, l)
}

// testOneOfServers: an instance that knows nothing of the cluster would store on one server and look there only. It does not start,
// with the reason, and neither does one that names a cluster that is not there.
func testOneOfServers(t *testing.T) {
	env := newSpace(t)
	makeTables(t, env)
	for change, want := range map[string]string{"CLICKHOUSE_CLUSTER=": "its tables belong to a cluster", "CLICKHOUSE_CLUSTER=other": "no cluster of that name"} {
		p := newProgram(t, append(slices.Clone(env), change))
		p.start()
		ended := make(chan error, 1)
		go func() { ended <- p.cmd.Wait() }() // ends with the program
		select {
		case err := <-ended:
			if err == nil || !strings.Contains(p.log.String(), want) {
				t.Errorf("%s: %v, log:\n%s", change, err, p.log)
			}
		case <-time.After(30 * time.Second):
			t.Fatalf("%s: still runs; log:\n%s", change, p.log)
		}
	}
}

// testServerEmptied: a server comes back without its disk while an instance runs. It gets its tables, and what Kafka has is back
// after a rewind.
func testServerEmptied(t *testing.T) {
	env := newSpace(t, "WORKER_BATCH_TIMEOUT=200ms")
	p := startProgram(t, env)
	bodies := numbered("emptied", 1000, 250, func(i int) int64 { return time.Now().Unix() - int64(i) })
	postAll(t, p, bodies)
	drained(p)
	second := strings.Split(stackEnv(t, "CLICKHOUSE_HTTP_PORT"), ",")[1]
	testkit.QueryAt(t, second, "DROP DATABASE "+space(env, "CLICKHOUSE_DATABASE")+" SYNC")
	if status, _, answer := p.do("POST", onePath, jsonCT, "", testkit.FreshEvent("after")); status != http.StatusAccepted {
		t.Fatal(status, answer)
	}
	p.await("its tables are there", time.Minute, func() bool {
		p.status("/ready") // which asks every server
		return testkit.QueryAt(t, second, "SELECT count() FROM system.tables WHERE database = '"+space(env, "CLICKHOUSE_DATABASE")+"' AND name = 'events'") == "1"
	})
	drained(p)
	p.terminate()
	if out, code := subcommand(t, env, "rewind -to start"); code != 0 {
		t.Fatal(code, out)
	}
	p = startProgram(t, env)
	drained(p)
	mustCount(t, env, "emptied", 1000)
	mustCount(t, env, "after", 1)
}

// TestServersGrow: a third server joins the cluster's definition while events come in, with repeats of what the first two have, from
// before and after, and with two instances, one of which remembers nothing.
func TestServersGrow(t *testing.T) {
	if isCluster() {
		t.Skip("has no stack of its own there")
	}
	alone(t, "-shards", "3", "-later", "1")
	env := newSpace(t, "WORKER_BATCH_TIMEOUT=200ms")
	first, second := startProgram(t, env), startProgram(t, append(slices.Clone(env), "DEDUPE_MEMORY=0"))
	now := time.Now().Unix()
	history := numbered("history", 2000, 500, func(i int) int64 { return now - int64(i%4)*9*86400 - int64(i) })
	postAll(t, first, history)
	l, done := loadInto(t, first.url, 1000, time.Hour, "-dup", "0.2")
	first.await("under load", 20*time.Second, func() bool { return l.OK.Load() > 2000 })
	control(t, "/clickhouse/join")
	target := l.OK.Load() + 5000
	first.await("under load beside the new server", time.Minute, func() bool { return l.OK.Load() > target })
	postAll(t, second, history)
	l.Stop()
	done()
	mustHold(first, l)
	mustBeSpread(t, env, 3)
	mustCount(t, env, "history", 2000)
	mustAnswerAll(second, l.Config.Event, l.Distinct())
}

// TestReplicas: a shard has two servers, whose tables are plain ones: an event is on the one or on the other. A lookup finds what
// only the second has.
func TestReplicas(t *testing.T) {
	if isCluster() {
		t.Skip("has no stack of its own there")
	}
	alone(t, "-shards", "2", "-replicas")
	env := newSpace(t, "DEDUPE_MEMORY=0", "WORKER_BATCH_TIMEOUT=20ms")
	for i := range 2 { // the tables, as if each server were the only one: Replicated engines need a Keeper
		port, _ := strconv.Atoi(space(env, "CLICKHOUSE_PORT"))
		makeTables(t, append(slices.Clone(env), "CLICKHOUSE_CLUSTER=", fmt.Sprint("CLICKHOUSE_PORT=", port+i)))
	}
	p := startProgram(t, env)
	const events = 400
	bodies := numbered("replica", events, 10, func(i int) int64 { return time.Now().Unix() - int64(i) })
	stored := func() (rows []string, sum int) {
		rows = askShards(t, "SELECT count() FROM "+space(env, "CLICKHOUSE_DATABASE")+".events")
		for _, n := range rows {
			var rows int
			fmt.Sscan(n, &rows)
			sum += rows
		}
		return rows, sum
	}
	for i, body := range bodies { // one after the other: each is a round, and ClickHouse chooses a server for it
		postAll(t, p, [][]byte{body})
		p.await("stored", 20*time.Second, func() bool { _, n := stored(); return n >= 10*(i+1) })
	}
	if rows, n := stored(); n != events || slices.Contains(rows, "0") {
		t.Fatalf("the servers have %q events", rows)
	}
	for range 2 {
		postAll(t, p, bodies)
	}
	postAll(t, p, [][]byte{testkit.FreshEvent("last")})
	p.await("stored", 20*time.Second, func() bool { _, n := stored(); return n > events })
	if rows, n := stored(); n != events+1 {
		t.Errorf("the servers have %q events, want %d and one more", rows, events)
	}
}
