// What only a real cluster can show: one broker dies under load while the other lives, and comes back. `make
// test-cluster` runs these; the embedded brokers are one process.

package test

import (
	"fmt"
	"net/http"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/event-ingestion/event-ingestion/load"
	"github.com/twmb/franz-go/pkg/kadm"
	"github.com/twmb/franz-go/pkg/kgo"
)

const (
	// electionTimeout is ample for what a dead broker costs: 9 s until it is missed, and moments for new leaders.
	electionTimeout = 60 * time.Second
	offsetsTopic    = "__consumer_offsets"
)

// kafkaCluster is the cluster under test, seen as an administrator.
type kafkaCluster struct {
	t     *testing.T
	admin *kadm.Client
	nodes []string // brokers that can be killed
}

// isCluster says whether the stack's brokers are processes of their own.
func isCluster() bool { return os.Getenv("DEV_KAFKA_NODES") != "" }

// newKafkaCluster skips the test when the stack's brokers are one process.
func newKafkaCluster(t *testing.T) *kafkaCluster {
	t.Helper()
	if !isCluster() {
		t.Skip("needs a cluster: make test-cluster")
	}
	alone(t)
	client, err := kgo.NewClient(kgo.SeedBrokers(kafkaBrokers(t)...))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(client.Close)
	return &kafkaCluster{t, kadm.NewClient(client), strings.Split(os.Getenv("DEV_KAFKA_NODES"), ",")}
}

// kill ends one broker with -9. It is back at the end of the test, however that ends.
func (c *kafkaCluster) kill(node string) {
	c.t.Helper()
	c.t.Cleanup(func() { control(c.t, "/kafka/start") })
	control(c.t, "/kafka/kill/"+node)
}

// inSync is how many of the topic's partitions have so many replicas in sync; -1 while the cluster does not say.
func (c *kafkaCluster) inSync(topic string, replicas int) int {
	details, err := c.admin.ListTopics(c.t.Context(), topic)
	if err != nil || details.Error() != nil {
		return -1
	}
	n := 0
	for _, p := range details[topic].Partitions {
		if len(p.ISR) == replicas {
			n++
		}
	}
	return n
}

// brokers is how many the cluster has at the moment.
func (c *kafkaCluster) brokers() int {
	b, _ := c.admin.ListBrokers(c.t.Context())
	return len(b)
}

// stored counts the loader's rows.
func stored(t *testing.T, env []string, l *load.Loader) int64 {
	t.Helper()
	n, err := strconv.ParseInt(clickhouseQuery(t, fmt.Sprintf("SELECT count() FROM %s.events WHERE event_name = '%s'", space(env, "CLICKHOUSE_DATABASE"), l.Config.Event)), 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// TestBrokerKilledGoesOn: with KAFKA_MIN_ISR=1, for the group's offsets too as in the compose stack, events are accepted
// and stored while either broker is dead, once its partitions have new leaders. Nothing is lost when it comes back.
func TestBrokerKilledGoesOn(t *testing.T) {
	c := newKafkaCluster(t)
	env := faultSpace(t, "KAFKA_MIN_ISR=1")
	p := startProgram(t, env)
	one := "1"
	set := []kadm.AlterConfig{{Op: kadm.SetConfig, Name: "min.insync.replicas", Value: &one}}
	if r, err := c.admin.AlterTopicConfigs(t.Context(), set, offsetsTopic); err != nil || r[0].Err != nil {
		t.Fatal(r, err)
	}
	t.Cleanup(func() {
		set[0].Op = kadm.DeleteConfig
		c.admin.AlterTopicConfigs(t.Context(), set, offsetsTopic)
	})
	l, done := loadInto(t, p.url, 2000, time.Hour)
	for _, node := range c.nodes {
		p.await("every partition on both brokers", electionTimeout, func() bool {
			return c.inSync(space(env, "KAFKA_TOPIC"), 2) == 20 && c.inSync(offsetsTopic, 2) > 0 && c.inSync(offsetsTopic, 1) == 0
		})
		target := l.OK.Load() + 2000
		p.await("under load", 20*time.Second, func() bool { return l.OK.Load() > target })
		c.kill(node)
		killed := time.Now()
		target = l.OK.Load() + 10_000 // more than was in flight
		p.await("accepting with "+node+" dead", electionTimeout, func() bool { return l.OK.Load() > target })
		accepted := time.Since(killed).Round(time.Second / 10)
		p.await("storing with "+node+" dead", electionTimeout, func() bool { return stored(t, env, l) > target })
		if n := c.brokers(); n != 1 {
			t.Errorf("%d brokers, %s was to be dead all the time", n, node)
		}
		t.Logf("%s: 10000 events accepted %s after kill -9, stored after %s", node, accepted, time.Since(killed).Round(time.Second/10))
		control(t, "/kafka/start")
	}
	l.Stop()
	done()
	l.Forgive() // 503 during an election is an honest answer
	mustHold(p, l)
}

// TestBrokerKilledRefuses: with KAFKA_MIN_ISR=2 nothing is acknowledged that is on one broker only: 503 with Retry-After
// from the kill until the broker is back, and then the same clients get through.
func TestBrokerKilledRefuses(t *testing.T) {
	c := newKafkaCluster(t)
	env := faultSpace(t, "KAFKA_MIN_ISR=2", "ACK_TIMEOUT=1s")
	p := startProgram(t, env)
	l, done := loadInto(t, p.url, 2000, time.Hour)
	for _, node := range c.nodes {
		p.await("every partition on both brokers", electionTimeout, func() bool { return c.inSync(space(env, "KAFKA_TOPIC"), 2) == 20 })
		target := l.OK.Load() + 2000
		p.await("under load", 40*time.Second, func() bool { return l.OK.Load() > target })
		c.kill(node)
		refused := func() bool {
			event := fmt.Appendf(nil, `{"event_name":"k","user_id":"u%d","timestamp":%d}`, time.Now().UnixNano(), time.Now().Unix())
			status, header, _ := p.do("POST", onePath, jsonCT, "", event)
			return status == http.StatusServiceUnavailable && header.Get("Retry-After") != ""
		}
		p.await("refusing", 10*time.Second, refused)
		before := l.OK.Load()
		p.await("with one broker only", electionTimeout, func() bool {
			return c.brokers() == 1 && c.inSync(space(env, "KAFKA_TOPIC"), 1) == 20
		})
		for range 3 { // a second each, with leaders for every partition: not the election, the rule
			if !refused() {
				t.Errorf("accepted with %s dead", node)
			}
		}
		if n := l.OK.Load() - before; n > 0 {
			t.Errorf("%d events accepted with %s dead", n, node)
		}
		if status := p.status("/health"); status != http.StatusOK {
			t.Errorf("health: %d", status)
		}
		control(t, "/kafka/start")
	}
	target := l.OK.Load() + 2000
	p.await("accepting again", electionTimeout, func() bool { return l.OK.Load() > target })
	l.Stop()
	done()
	l.Forgive()
	mustHold(p, l)
}
