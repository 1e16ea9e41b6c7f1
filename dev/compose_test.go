// What can be said about the compose stack without a Docker daemon: compose's own library accepts it, and it says what
// README and the program say.

package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/compose-spec/compose-go/v2/types"
)

const (
	composeFile = "../docker-compose.yml"
	scaleFile   = "../deploy/compose.scale.yml"
)

// stack loads the files with nothing set: the documented defaults.
func stack(t *testing.T, env []string, files ...string) *types.Project {
	t.Helper()
	p, err := loadStack(t.Context(), env, files...)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// eachStack runs a check on the stack of one instance and on that of three.
func eachStack(t *testing.T, check func(t *testing.T, p *types.Project)) {
	t.Run("one instance", func(t *testing.T) { check(t, stack(t, nil, composeFile)) })
	t.Run("three instances", func(t *testing.T) { check(t, stack(t, nil, composeFile, scaleFile)) })
}

// instances are the services that run the program.
func instances(p *types.Project) (names []string) {
	for _, name := range p.ServiceNames() {
		if p.Services[name].Build != nil {
			names = append(names, name)
		}
	}
	return names
}

// TestComposeServices: every service can be watched, comes back, is bounded, and says which version it is.
func TestComposeServices(t *testing.T) {
	pinned := regexp.MustCompile(`:v?\d+\.\d+\.\d+[^:]*$`)
	eachStack(t, func(t *testing.T, p *types.Project) {
		for _, name := range p.ServiceNames() {
			s := p.Services[name]
			if s.Build == nil && !pinned.MatchString(s.Image) {
				t.Errorf("%s: image %q has no full version", name, s.Image)
			}
			if h := s.HealthCheck; h == nil || h.Disable || len(h.Test) < 2 || h.Interval == nil || h.Timeout == nil || h.StartPeriod == nil {
				t.Errorf("%s: health check %v", name, h)
			}
			if s.Restart != "unless-stopped" {
				t.Errorf("%s: restart %q", name, s.Restart)
			}
			if s.MemLimit == 0 {
				t.Errorf("%s: no memory limit", name)
			}
			if s.Logging == nil || s.Logging.Options["max-size"] == "" || s.Logging.Options["max-file"] == "" {
				t.Errorf("%s: its log is not rotated", name)
			}
			if s.ContainerName != "" {
				t.Errorf("%s: a container name stands in the way of a second stack", name)
			}
			for on, d := range s.DependsOn {
				if d.Condition != types.ServiceConditionHealthy {
					t.Errorf("%s: does not wait until %s is healthy", name, on)
				}
			}
		}
	})
}

// TestComposeAddresses: what README promises is published once, and only the API beyond this machine.
func TestComposeAddresses(t *testing.T) {
	eachStack(t, func(t *testing.T, p *types.Project) {
		by := map[string]string{}
		for _, name := range p.ServiceNames() {
			for _, port := range p.Services[name].Ports {
				if other := by[port.Published]; other != "" {
					t.Errorf("port %s is published by %s and %s", port.Published, other, name)
				}
				by[port.Published] = name
				if open := port.HostIP != "127.0.0.1"; open != (port.Published == "8080") {
					t.Errorf("%s: port %s on %q", name, port.Published, port.HostIP)
				}
			}
		}
		for _, port := range strings.Fields("8080 29092 29093 8123 9000 9090 3000 9091 6060") {
			if by[port] == "" {
				t.Errorf("nobody has port %s", port)
			}
		}
	})
}

// TestComposeFilesExist: what is mounted from the host is in the repository, and each named volume is declared and used.
func TestComposeFilesExist(t *testing.T) {
	eachStack(t, func(t *testing.T, p *types.Project) {
		used := map[string]bool{}
		for _, name := range p.ServiceNames() {
			for _, v := range p.Services[name].Volumes {
				if v.Type == types.VolumeTypeVolume {
					used[v.Source] = true
					continue
				}
				if _, err := os.Stat(v.Source); err != nil || !v.ReadOnly {
					t.Errorf("%s: mount of %s: read-only %t, %v", name, v.Source, v.ReadOnly, err)
				}
			}
		}
		for name := range p.Volumes {
			if !used[name] {
				t.Errorf("volume %s is not used", name)
			}
		}
	})
}

// goRuntime are variables that the program's runtime reads; `event-ingestion -h` does not print them.
var goRuntime = []string{"GOMEMLIMIT"}

// TestComposeEnvironment: the program is given settings that it knows, with values that it takes.
func TestComposeEnvironment(t *testing.T) {
	binary := buildProgram(t, "..")
	help, err := exec.Command(binary, "-h").Output()
	if err != nil {
		t.Fatal(err)
	}
	eachStack(t, func(t *testing.T, p *types.Project) {
		for _, name := range instances(p) {
			// One bad value more makes the program name every bad value, and end.
			env := []string{"MAX_RETRY_ATTEMPTS=x"}
			for key, value := range p.Services[name].Environment {
				if !regexp.MustCompile(`(?m)^  `+key+` `).Match(help) && !slices.Contains(goRuntime, key) {
					t.Errorf("%s: %s is not among the settings of event-ingestion -h", name, key)
				}
				env = append(env, key+"="+*value)
			}
			cmd := exec.Command(binary)
			cmd.Env = env
			out, err := cmd.CombinedOutput()
			if exitStatus(err) != 2 || strings.Count(string(out), "\n") != 2 || !strings.Contains(string(out), "MAX_RETRY_ATTEMPTS") {
				t.Errorf("%s: %v\n%s", name, err, out)
			}
		}
	})
}

// TestComposeStop: containers are stopped after the program's own limit, not before it.
func TestComposeStop(t *testing.T) {
	limit := programDefault(t, "SHUTDOWN_TIMEOUT")
	eachStack(t, func(t *testing.T, p *types.Project) {
		for _, name := range instances(p) {
			grace := p.Services[name].StopGracePeriod
			if grace == nil || time.Duration(*grace) <= limit {
				t.Errorf("%s: stop_grace_period %v, SHUTDOWN_TIMEOUT %s", name, grace, limit)
			}
		}
	})
}

// TestComposePasswords: what .env says arrives everywhere, and the default is the documented one.
func TestComposePasswords(t *testing.T) {
	for env, want := range map[string]string{"": "clickhouse123", "CLICKHOUSE_PASSWORD=other": "other"} {
		p := stack(t, []string{env}, composeFile, scaleFile)
		for _, name := range append(instances(p), "clickhouse", "grafana") {
			if got := p.Services[name].Environment["CLICKHOUSE_PASSWORD"]; got == nil || *got != want {
				t.Errorf("%q: password of %s is %v, want %s", env, name, got, want)
			}
		}
	}
	for name, fallback := range map[string]string{"API_KEYS": "", "WRITE_KEYS": "", "CORS_ORIGINS": "", "CLOCK_SKEW": "1s", "RETENTION_DAYS": "0"} {
		for env, want := range map[string]string{"": fallback, name + "=31": "31"} {
			p := stack(t, []string{env}, composeFile, scaleFile)
			for _, instance := range instances(p) {
				if got := p.Services[instance].Environment[name]; got == nil || *got != want {
					t.Errorf("%q: %s of %s is %v, want %q", env, name, instance, got, want)
				}
			}
		}
	}
	p := stack(t, []string{"KAFKA_MIN_ISR=1"}, composeFile)
	if broker, program := p.Services["kafka-1"].Environment["KAFKA_MIN_INSYNC_REPLICAS"], p.Services["event-ingestion"].Environment["KAFKA_MIN_ISR"]; *broker != "1" || *program != "1" {
		t.Errorf("KAFKA_MIN_ISR=1: brokers %s, program %s", *broker, *program)
	}
}

// TestComposeKafka: three voters, two brokers, each reachable from inside and outside, and factors that two can hold.
func TestComposeKafka(t *testing.T) {
	nodes, _, err := kafkaNodes(stack(t, nil, composeFile))
	if err != nil {
		t.Fatal(err)
	}
	var voters []string
	brokers := 0
	for _, n := range nodes {
		voters = append(voters, fmt.Sprintf("%s@%s:9093", n.properties["node.id"], n.name))
		if n.isBroker() {
			brokers++
		}
	}
	if len(nodes) != 3 || brokers != 2 {
		t.Fatalf("%d nodes, %d brokers", len(nodes), brokers)
	}
	for _, n := range nodes {
		shared := map[string]string{
			"controller.quorum.voters":                         strings.Join(voters, ","),
			"controller.listener.names":                        "CONTROLLER",
			"default.replication.factor":                       "2",
			"min.insync.replicas":                              "2",
			"offsets.topic.replication.factor":                 "2",
			"transaction.state.log.replication.factor":         "2",
			"transaction.state.log.min.isr":                    "2",
			"share.coordinator.state.topic.replication.factor": "2",
			"share.coordinator.state.topic.min.isr":            "2",
			"unclean.leader.election.enable":                   "false",
			"log.dirs":                                         "/var/lib/kafka/data",
		}
		for name, want := range shared {
			if got := n.properties[name]; got != want {
				t.Errorf("%s: %s is %q, want %q", n.name, name, got, want)
			}
		}
		if n.cluster != nodes[0].cluster || len(n.cluster) != 22 {
			t.Errorf("%s: cluster id %q", n.name, n.cluster)
		}
		mustReach(t, n)
	}
	if err := toLoopback(nodes, []int{1, 2}); err != nil { // fails where an address leads nowhere
		t.Error(err)
	}
}

// mustReach checks one node's listeners against each other and against what is published.
func mustReach(t *testing.T, n *kafkaNode) {
	t.Helper()
	ports := map[string]int{}
	listeners, err := endpoints(n.properties["listeners"])
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range listeners {
		ports[l.name] = l.port
		if !strings.Contains(","+n.properties["listener.security.protocol.map"], ","+l.name+":") {
			t.Errorf("%s: listener %s has no protocol", n.name, l.name)
		}
	}
	if ports["CONTROLLER"] != 9093 || !n.isBroker() && (len(ports) != 1 || n.properties["advertised.listeners"] != "") {
		t.Errorf("%s: listeners %v", n.name, ports)
	}
	if !n.isBroker() {
		return
	}
	advertised, err := endpoints(n.properties["advertised.listeners"])
	if err != nil {
		t.Fatal(err)
	}
	hosts := map[string]string{"INTERNAL": n.name, "HOST": "localhost"}
	for _, a := range advertised {
		container := a.port
		if a.host == "localhost" {
			container = n.published[a.port]
		}
		if a.host != hosts[a.name] || container != ports[a.name] {
			t.Errorf("%s: advertises %s, listens on %d", n.name, a, ports[a.name])
		}
		delete(hosts, a.name)
	}
	if len(hosts) > 0 || n.properties["inter.broker.listener.name"] != "INTERNAL" {
		t.Errorf("%s: not advertised: %v", n.name, hosts)
	}
}

// TestComposeClients: the program and Kafka UI ask brokers under addresses that these advertise inside the stack.
func TestComposeClients(t *testing.T) {
	eachStack(t, func(t *testing.T, p *types.Project) {
		nodes, _, err := kafkaNodes(p)
		if err != nil {
			t.Fatal(err)
		}
		var want []string
		for _, n := range nodes {
			if n.isBroker() {
				want = append(want, n.name+":19092")
			}
		}
		lists := []string{*p.Services["kafka-ui"].Environment["KAFKA_CLUSTERS_0_BOOTSTRAPSERVERS"]}
		for _, name := range instances(p) {
			lists = append(lists, *p.Services[name].Environment["KAFKA_BROKERS"])
		}
		for _, list := range lists {
			if list != strings.Join(want, ",") {
				t.Errorf("brokers %s, want %s", list, want)
			}
		}
		for _, name := range instances(p) { // deploy/prometheus.yml asks this name on the port of ADMIN_ADDR
			n := p.Services[name].Networks["default"]
			if n == nil || !slices.Contains(n.Aliases, "instances") || *p.Services[name].Environment["ADMIN_ADDR"] != ":6060" {
				t.Errorf("%s: Prometheus does not find it", name)
			}
		}
	})
	b, err := os.ReadFile("../deploy/prometheus.yml")
	if err != nil {
		t.Fatal(err)
	}
	if !regexp.MustCompile(`names: \[instances\]\s+type: A\s+port: 6060\b`).Match(b) {
		t.Error("deploy/prometheus.yml does not ask instances:6060")
	}
}

// buildProgram builds the program of a directory and returns the binary's path.
func buildProgram(t *testing.T, dir string) string {
	t.Helper()
	binary := filepath.Join(t.TempDir(), "event-ingestion")
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "go", "build", "-o", binary, ".")
	cmd.Dir, cmd.Env = dir, append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("go build in %s: %v\n%s", dir, err, out)
	}
	return binary
}

// programDefault is the default of one of the program's settings that is a duration.
func programDefault(t *testing.T, name string) time.Duration {
	t.Helper()
	source, err := os.ReadFile("../settings.go")
	if err != nil {
		t.Fatal(err)
	}
	m := regexp.MustCompile(`\{"` + name + `", "([^"]+)"`).FindSubmatch(source)
	if m == nil {
		t.Fatalf("settings.go has no %s", name)
	}
	d, err := time.ParseDuration(string(m[1]))
	if err != nil {
		t.Fatal(err)
	}
	return d
}
