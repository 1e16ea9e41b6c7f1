// Several ClickHouse servers: the same faults, and what only they can have.

package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/event-ingestion/event-ingestion/load"
	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// TestShards runs on three servers. Each part has a database of its own.
func TestShards(t *testing.T) {
	if isCluster() {
		t.Skip("has no stack of its own there")
	}
	alone(t, "-shards", "3")
	t.Run("killed", testShardsKilled)
	if tortureFactor() > 1 {
		t.Run("instances", testShardsInstances)
	}
	t.Run("away", testShardAway)
	t.Run("unknown", testShardsUnknown)
	t.Run("emptied", testShardEmptied)
	t.Run("changed", testShardsChanged)
	t.Run("grown", testShardsGrown)
}

// TestShardBalancer: instances come and go. Every partition soon has one owner, never two, the owners have equally many, and few
// of them share a shard.
func TestShardBalancer(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ shards, partitions int }{{2, 20}, {3, 20}, {3, 7}, {4, 100}, {5, 3}} {
		b := balancers(c.shards)[0]
		has := map[string][]int32{} // by member
		rebalance := func() (moved int) {
			var members []kmsg.JoinGroupResponseMember
			owner := map[int32]string{}
			for id, owned := range has {
				members = append(members, kmsg.JoinGroupResponseMember{MemberID: id, ProtocolMetadata: b.JoinGroupMetadata([]string{"t"}, map[string][]int32{"t": owned}, 1)})
				for _, p := range owned {
					owner[p] = id
				}
			}
			group, _, err := b.MemberBalancer(members)
			if err != nil {
				t.Fatal(err)
			}
			plan, err := group.(kgo.GroupMemberBalancerOrError).BalanceOrError(map[string]int32{"t": int32(c.partitions)})
			if err != nil {
				t.Fatal(err)
			}
			for _, a := range plan.IntoSyncAssignment() {
				got, err := b.ParseSyncAssignment(a.MemberAssignment)
				if err != nil {
					t.Fatal(err)
				}
				has[a.MemberID] = got["t"]
				for _, p := range got["t"] {
					switch owner[p] {
					case a.MemberID:
					case "":
						moved++
					default:
						t.Errorf("%+v: %s is given %d, which %s has", c, a.MemberID, p, owner[p])
					}
					owner[p] = a.MemberID
				}
			}
			return moved
		}
		for step, n := range []int{1, 2, 3, 4, 5, 6, 4, 3, 2, 3, 2, 1} {
			for i := range 6 {
				id := fmt.Sprint("member", i)
				if _, is := has[id]; is && i >= n {
					delete(has, id)
				} else if !is && i < n {
					has[id] = nil
				}
			}
			moved := rebalance()
			moved += rebalance()
			if again := rebalance(); again > 0 {
				t.Errorf("%+v, step %d: %d more are moved after two rounds", c, step, again)
			}
			if step > 0 && moved > c.partitions/2+1 {
				t.Errorf("%+v, step %d to %d members: %d moved", c, step, n, moved)
			}
			all, inserters := 0, map[string]bool{}
			for id, owned := range has {
				all += len(owned)
				if least := c.partitions / n; len(owned) < least || len(owned) > least+1 {
					t.Errorf("%+v, %d members: %s has %d", c, n, id, len(owned))
				}
				for _, p := range owned {
					inserters[fmt.Sprint(id, " ", int(p)%c.shards)] = true
				}
			}
			if all != c.partitions || len(inserters) > n+c.shards-1 {
				t.Errorf("%+v, %d members: %d partitions have an owner, %d inserters", c, n, all, len(inserters))
			}
		}
	}
}

// testShardsKilled: the program and single shards are killed under load. Every event is on its own shard, and all answers are
// over all shards.
func testShardsKilled(t *testing.T) {
	env := faultSpace(t)
	p := startProgram(t, env)
	l, done := loadInto(t, p.url, 2000, time.Hour)
	for i := range 4 * tortureFactor() {
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
	db, name := space(env, "CLICKHOUSE_DATABASE"), l.Config.Event
	mustBePlaced(t, db, 20)
	mustAnswerAll(p, db, name, l.Distinct())
}

// mustBePlaced fails the test unless each of the three shards has some events, and only those that belong there.
func mustBePlaced(t *testing.T, db string, partitions int) {
	t.Helper()
	for i, got := range askShards(t, fmt.Sprintf("SELECT count() > 0, groupUniqArray(bitAnd(kafkaMurmurHash(lower(hex(event_id))), 0x7fffffff) %% %d %% 3) FROM %s.events", partitions, db)) {
		if got != fmt.Sprintf("1\t[%d]", i) {
			t.Errorf("shard %d has events that belong on %s", i, got)
		}
	}
}

// mustAnswerAll compares every kind of question with what the raw tables of all shards say.
func mustAnswerAll(p *program, db, name string, want int64) {
	t := p.t
	t.Helper()
	users := clickhouseQuery(t, fmt.Sprintf("SELECT uniqExact(user_id) FROM cluster('shards', %s, events) WHERE event_name = '%s'", db, name))
	now := time.Now().Unix()
	for _, by := range []string{"", "&group_by=channel", "&group_by=day", "&group_by=hour", "&group_by=campaign"} {
		for _, from := range []int64{now - 40*daySeconds, now - 5*hourSeconds - 17} {
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
	for _, span := range []int64{hourSeconds / 2, daySeconds, 30 * daySeconds} {
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
		got := clickhouseQuery(t, fmt.Sprintf("SELECT sum(event_count) FROM %s.%s(from = %d, to = %d) WHERE event_name = '%s'", db, view, now-40*daySeconds, now, name))
		if got != fmt.Sprint(want) {
			t.Errorf("%s has %s, want %d", view, got, want)
		}
	}
}

// testShardsInstances: partitions of every shard move between instances under load.
func testShardsInstances(t *testing.T) {
	comeAndGo(t, faultSpace(t, "WORKER_COUNT=7", "KAFKA_PARTITIONS=13", "DEDUPE_MEMORY=300000"))
}

// testShardAway: a shard stops, with queues so small that they fill. The others go on, metrics are refused, and it mends itself.
func testShardAway(t *testing.T) {
	env := faultSpace(t, "CONSUME_MEMORY=2000000")
	db := space(env, "CLICKHOUSE_DATABASE")
	p := startProgram(t, env)
	l, done := loadInto(t, p.url, 1000, time.Hour)
	p.await("under load", 20*time.Second, func() bool { return l.OK.Load() > 1000 })
	control(t, "/clickhouse/2/stop")
	p.await("stalled in words", 30*time.Second, func() bool {
		_, _, answer := p.do("GET", "/ready", "", "", nil)
		return strings.Contains(answer, "stalled") && strings.Contains(answer, "(shard 2 of 3)")
	})
	if status := p.status("/ready"); status != http.StatusOK {
		t.Errorf("/ready answers %d while the other shards store", status)
	}
	if status := p.status(metricsPath + "event_name=e&from=1&to=2"); status != http.StatusServiceUnavailable {
		t.Errorf("metrics without a shard: status %d", status)
	}
	ports := strings.Split(stackEnv(t, "CLICKHOUSE_HTTP_PORT"), ",")
	for _, port := range []string{ports[0], ports[2]} { // everything of these shards that is accepted now is stored soon
		stored := func() (n int64) {
			fmt.Sscan(queryAt(t, port, "SELECT count() FROM "+db+".events"), &n)
			return n
		}
		before, accepted := stored(), l.Distinct()
		p.await("stored beside the shard that is away", 20*time.Second, func() bool { return stored() > before+500 })
		t.Logf("port %s stored 500 while %d were accepted", port, l.Distinct()-accepted)
		if n := l.Distinct() - accepted; n > 13_000 {
			t.Errorf("%d events were accepted until 500 of this shard were stored", n)
		}
	}
	p = p.killAndRestart() // and starts without the shard
	port, accepted := ports[0], l.Distinct()
	before := queryAt(t, port, "SELECT count() FROM "+db+".events")
	p.await("stored after a start without the shard", 20*time.Second, func() bool {
		return queryAt(t, port, "SELECT count() FROM "+db+".events") != before && l.Distinct() > accepted
	})
	control(t, "/clickhouse/2/start")
	l.Stop()
	done()
	mustHold(p, l)
}

// testShardsChanged: what would have events looked for on the wrong shard is refused, with the reason.
func testShardsChanged(t *testing.T) {
	env := faultSpace(t, "KAFKA_PARTITIONS=5")
	p := startProgram(t, env)
	if status, _, answer := p.do("POST", onePath, jsonCT, "", freshEvent("changed")); status != http.StatusAccepted {
		t.Fatal(status, answer)
	}
	drained(p)
	growTopic(t, env, 7)
	p.await("refused in words", 30*time.Second, func() bool {
		_, _, answer := p.do("GET", "/ready", "", "", nil)
		return strings.Contains(answer, "by partition of 7")
	})
	if status, _, answer := p.do("POST", onePath, jsonCT, "", freshEvent("changed")); status != http.StatusAccepted {
		t.Error("the API stopped accepting:", status, answer)
	}
	p.terminate()
	for change, want := range map[string]string{"CLICKHOUSE_CLUSTER=": "the only shard", "CLICKHOUSE_CLUSTER=shards": "by partition of 7", "CLICKHOUSE_CLUSTER=other": "no cluster of that name"} {
		p := &program{t: t, env: append(env[:len(env):len(env)], change, "SERVER_PORT="+freePort(t))}
		p.start()
		ended := make(chan error, 1)
		go func() { ended <- p.cmd.Wait() }()
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

// testShardsUnknown: an instance that knows nothing of the cluster consumes, and has stored nothing yet. One that does waits for
// its end, and the other is refused from then on.
func testShardsUnknown(t *testing.T) {
	env := newSpace(t)
	alone := startProgram(t, append(env[:len(env):len(env)], "CLICKHOUSE_CLUSTER="))
	p := &program{t: t, env: append(env[:len(env):len(env)], "SERVER_PORT="+freePort(t))}
	p.url = "http://127.0.0.1:" + space(p.env, "SERVER_PORT")
	p.start()
	p.await("refused in words", 30*time.Second, func() bool { return strings.Contains(p.log.String(), "stop the program first") })
	alone.terminate()
	p.await("ready", time.Minute, func() bool { return p.status("/ready") == http.StatusOK })
	if status, _, answer := p.do("POST", onePath, jsonCT, "", freshEvent("unknown")); status != http.StatusAccepted {
		t.Fatal(status, answer)
	}
	drained(p)
	mustCount(t, env, "unknown", 1)
	alone.start()
	if err := alone.cmd.Wait(); err == nil || !strings.Contains(alone.log.String(), "the only shard") {
		t.Errorf("%v, log:\n%s", err, alone.log)
	}
}

// testShardEmptied: a shard comes back without its disk, while another instance consumes and after the only one has started.
func testShardEmptied(t *testing.T) {
	env := newSpace(t)
	db := space(env, "CLICKHOUSE_DATABASE")
	second := strings.Split(stackEnv(t, "CLICKHOUSE_HTTP_PORT"), ",")[1]
	p, beside := startProgram(t, env), startProgram(t, env)
	drained(p)
	queryAt(t, second, "DROP DATABASE "+db+" SYNC")
	p.terminate()
	p = startProgram(t, env)
	p.terminate()
	beside.terminate()
	queryAt(t, second, "DROP DATABASE "+db+" SYNC")
	control(t, "/clickhouse/2/stop")
	p = &program{t: t, env: append(env[:len(env):len(env)], "SERVER_PORT="+freePort(t))}
	p.url = "http://127.0.0.1:" + space(p.env, "SERVER_PORT")
	p.start()
	p.await("without a shard", time.Minute, func() bool { return strings.Contains(p.log.String(), "the others go on") })
	control(t, "/clickhouse/2/start")
	p.await("with its tables", time.Minute, func() bool {
		return queryAt(t, second, "SELECT count() FROM system.tables WHERE database = '"+db+"' AND name = 'events'") == "1"
	})
}

// testShardsGrown: events of one server are placed on three while others come in, and again when the topic has more
// partitions. The command is killed wherever it says something, and an instance accepts and answers meanwhile.
func testShardsGrown(t *testing.T) {
	env := newSpace(t, "CLICKHOUSE_CLUSTER=", "KAFKA_PARTITIONS=7")
	db := space(env, "CLICKHOUSE_DATABASE")
	p := startProgram(t, env)
	now := time.Now().Unix()
	history := func(p *program) {
		postAll(t, p, numbered("history", 2000, 500, func(i int) int64 { return now - int64(i%4)*9*daySeconds - int64(i) }))
	}
	history(p)
	l, done := loadInto(t, p.url, 1000, time.Hour)
	p.await("under load", 20*time.Second, func() bool { return l.OK.Load() > 1000 })
	if out, code := subcommand(t, append(env, "CLICKHOUSE_CLUSTER=shards"), "reshard"); code != 1 || !strings.Contains(out, "members") {
		t.Errorf("while an instance consumes: %d %s", code, out)
	}
	p.cmd.Process.Kill()
	p.cmd.Wait()
	env = append(env, "CLICKHOUSE_CLUSTER=shards")
	api := startBinary(t, "", append(env[:len(env):len(env)], "ROLE=api", "SERVER_PORT="+p.url[strings.LastIndex(p.url, ":")+1:]))
	reshardKilled(t, env)
	p = startProgram(t, env)
	p.await("all that came in meanwhile is stored", time.Minute, func() bool { return completeThrough(p) >= time.Now().Unix()-5 })
	l.Stop()
	done()
	mustHold(p, l)
	mustCount(t, env, "history", 2000)
	mustBePlaced(t, db, 7)
	mustAnswerAll(p, db, l.Config.Event, l.Distinct())
	mustAgree(t, l, api.url)

	growTopic(t, env, 10)
	p.terminate()
	if out, code := subcommand(t, env, "reshard"); code != 0 {
		t.Fatalf("%d %s", code, out)
	}
	p = startProgram(t, env)
	history(p) // once more
	drained(p)
	mustCount(t, env, "history", 2000)
	mustCount(t, env, l.Config.Event, l.Distinct())
	mustBePlaced(t, db, 10)
}

// reshardKilled runs the command until it succeeds: each time it is killed at a later line of what it prints, in torture at each.
func reshardKilled(t *testing.T, env []string) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(100 * time.Millisecond) {
		out, code := subcommand(t, env, "reshard -dry-run")
		if code == 0 && strings.Contains(out, "WILL HAVE") {
			break
		}
		if time.Now().After(deadline) { // a killed instance is a member of the group for KAFKA_SESSION_TIMEOUT
			t.Fatalf("dry run: %d %s", code, out)
		}
	}
	for lines := 1; ; lines += 7 - 3*min(tortureFactor(), 2) {
		cmd := exec.Command(os.Args[0], "reshard")
		cmd.Env = append(append(os.Environ(), asProgram+"=1"), env...)
		stdout, err := cmd.StdoutPipe()
		if err == nil {
			cmd.Stderr = cmd.Stdout
			err = cmd.Start()
		}
		if err != nil {
			t.Fatal(err)
		}
		scanner, out := bufio.NewScanner(stdout), ""
		for n := 0; scanner.Scan(); {
			out += scanner.Text() + "\n"
			if n++; n == lines {
				cmd.Process.Kill()
			}
		}
		if err := cmd.Wait(); err == nil {
			break
		} else if cmd.ProcessState.Exited() {
			t.Fatalf("%v\n%s", err, out)
		}
		newStore(settingsFrom(t, env)).prepare(t.Context(), 7) // as an instance that starts now
	}
	if out, code := subcommand(t, env, "reshard"); code != 0 || !strings.Contains(out, "every event is where it belongs") {
		t.Errorf("run again: %d %s", code, out)
	}
}
