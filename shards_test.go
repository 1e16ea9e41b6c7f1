// Several ClickHouse servers: the same faults, and what only they can have.

package main

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/twmb/franz-go/pkg/kadm"
	"github.com/twmb/franz-go/pkg/kgo"
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
	t.Run("changed", testShardsChanged)
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
	for i, got := range askShards(t, "SELECT count() > 0, groupUniqArray(bitAnd(kafkaMurmurHash(lower(hex(event_id))), 0x7fffffff) % 20 % 3) FROM "+db+".events") {
		if got != fmt.Sprintf("1\t[%d]", i) {
			t.Errorf("shard %d has events that belong on %s", i, got)
		}
	}
	mustAnswerAll(p, db, name, l.Distinct())
}

// mustAnswerAll compares every kind of question with what the raw tables of all shards say.
func mustAnswerAll(p *program, db, name string, want int64) {
	t := p.t
	t.Helper()
	users := clickhouseQuery(t, fmt.Sprintf("SELECT uniqExact(user_id) FROM cluster('shards', %s, events) WHERE event_name = '%s'", db, name))
	now := time.Now().Unix()
	for _, by := range []string{"", "&group_by=channel", "&group_by=day", "&group_by=hour", "&group_by=campaign"} {
		for _, from := range []int64{now - 40*daySeconds, now - 3*hourSeconds - 17} {
			var a struct {
				Total  int64 `json:"total_count"`
				Users  int64 `json:"unique_users"`
				Groups []struct {
					Total int64 `json:"total_count"`
				} `json:"grouped_data"`
			}
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
	kafka, err := kgo.NewClient(kgo.SeedBrokers(kafkaBrokers(t)...))
	if err != nil {
		t.Fatal(err)
	}
	defer kafka.Close()
	if _, err := kadm.NewClient(kafka).UpdatePartitions(t.Context(), 7, space(env, "KAFKA_TOPIC")); err != nil {
		t.Fatal(err)
	}
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
		case err = <-ended:
		case <-time.After(30 * time.Second):
			t.Fatalf("%s: still runs; log:\n%s", change, p.log)
		}
		if err == nil || !strings.Contains(p.log.String(), want) {
			t.Errorf("%s: %v, log:\n%s", change, err, p.log)
		}
	}
}
