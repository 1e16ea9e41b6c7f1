// The cluster: that it is the stack's, and that one broker can die and come back.

package main

import (
	"fmt"
	"maps"
	"net/http"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/twmb/franz-go/pkg/kgo"
)

// TestNodesOnLoopback: on the way to loopback nothing changes but addresses, and each address leads to its listener.
func TestNodesOnLoopback(t *testing.T) {
	shipped, version, err := kafkaNodes(stack(t, nil, composeFile))
	if err != nil {
		t.Fatal(err)
	}
	moved, _, err := kafkaNodes(stack(t, nil, composeFile))
	if err != nil {
		t.Fatal(err)
	}
	if err := toLoopback(moved, []int{1001, 1002}); err != nil {
		t.Fatal(err)
	}
	if !regexp.MustCompile(`^4\.\d+\.\d+$`).MatchString(version) {
		t.Errorf("Kafka %s", version)
	}
	local := regexp.MustCompile(`^(([A-Z]+://|[1-3]@)127\.0\.0\.1:\d+,?)+$`)
	taken := map[string]string{}
	for i, n := range moved {
		changed := []string{"listeners", "advertised.listeners", "controller.quorum.voters"}
		for name, value := range n.properties {
			switch {
			case !slices.Contains(changed, name) && value != shipped[i].properties[name]:
				t.Errorf("%s: %s is %s, shipped with %s", n.name, name, value, shipped[i].properties[name])
			case slices.Contains(changed, name) && !local.MatchString(value):
				t.Errorf("%s: %s is %s", n.name, name, value)
			}
		}
		if len(n.properties) != len(shipped[i].properties) {
			t.Errorf("%s: properties %v", n.name, slices.Sorted(maps.Keys(n.properties)))
		}
		for _, l := range strings.Split(n.properties["listeners"], ",") {
			name, address, _ := strings.Cut(l, "://")
			if other := taken[address]; other != "" {
				t.Errorf("%s and %s listen on %s", n.name, other, address)
			}
			taken[address] = n.name
			told := n.properties["advertised.listeners"]
			if name == "CONTROLLER" {
				told = n.properties["controller.quorum.voters"]
			}
			if !strings.Contains(told+",", address+",") {
				t.Errorf("%s: nobody is told of %s", n.name, l)
			}
		}
		if port := fmt.Sprint("HOST://127.0.0.1:", 1001+i); n.isBroker() && !strings.Contains(n.properties["listeners"], port) {
			t.Errorf("%s: clients do not find it: %s", n.name, n.properties["listeners"])
		}
	}
	for _, ports := range [][]int{{1001}, {1001, 1002, 1003}} {
		nodes, _, _ := kafkaNodes(stack(t, nil, composeFile))
		if err := toLoopback(nodes, ports); err == nil {
			t.Errorf("two published ports on %d", len(ports))
		}
	}
}

func TestPropertyName(t *testing.T) {
	for variable, want := range map[string]string{"KAFKA_NODE_ID": "node.id", "KAFKA_A__B_C": "a_b.c", "KAFKA_A___B": "a-b"} {
		if got := propertyName(variable); got != want {
			t.Errorf("%s: %s, want %s", variable, got, want)
		}
	}
}

// TestCluster: a broker dies and comes back, then all of them; what was acknowledged is there.
func TestCluster(t *testing.T) {
	if os.Getenv("DEV_TEST_CLUSTER") == "" {
		t.Skip("starts a real cluster: make test-cluster")
	}
	d := start(t, []string{"-ephemeral", "-kafka", "cluster", "-compose", composeFile}, ``, `sleep 69`)
	if d.env["DEV_KAFKA_NODES"] != "kafka-1,kafka-2" {
		t.Errorf("DEV_KAFKA_NODES=%s", d.env["DEV_KAFKA_NODES"])
	}
	producer := d.client(t, kgo.RequiredAcks(kgo.AllISRAcks()))
	createTopic(t, producer)
	produce(t, producer, 0, 100)
	for i, node := range []string{"kafka-1", "kafka-2"} {
		d.control(t, "/kafka/kill/"+node, http.StatusOK)
		d.control(t, "/kafka/kill/"+node, http.StatusConflict)
		d.control(t, "/kafka/start", http.StatusOK)
		produce(t, producer, 100+i*100, 200+i*100)
	}
	d.control(t, "/kafka/stop", http.StatusOK)
	d.control(t, "/kafka/start", http.StatusOK)
	produce(t, producer, 300, 400)
	if got := d.consume(t, 400); got != "0…399" {
		t.Errorf("consumed %s", got)
	}
	d.control(t, "/kafka/kill/clickhouse", http.StatusConflict)
	if strings.Contains(d.out.String(), "ended") {
		t.Errorf("ends that were not asked for:\n%s", d.out)
	}
}
