// The compose stack as dev reads it: the nodes of its Kafka cluster, with the properties that the image would give them.
//
// compose.go owns the way from docker-compose.yml to server.properties, and the move of a cluster that was written for
// containers to ports of loopback. cluster.go runs what comes out of it.

package main

import (
	"context"
	"fmt"
	"net"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/compose-spec/compose-go/v2/cli"
	"github.com/compose-spec/compose-go/v2/types"
)

// kafkaImage is the image that names the version; its last part is also that of the jars.
var kafkaImage = regexp.MustCompile(`^apache/kafka:(\d+\.\d+\.\d+)$`)

// notProperties are variables that begin with KAFKA_ and are for the image's scripts (KafkaDockerWrapper in Kafka's
// source has the list).
var notProperties = []string{
	"KAFKA_VERSION", "KAFKA_HEAP_OPTS", "KAFKA_LOG4J_OPTS", "KAFKA_OPTS", "KAFKA_JMX_OPTS", "KAFKA_JVM_PERFORMANCE_OPTS",
	"KAFKA_GC_LOG_OPTS", "KAFKA_LOG4J_ROOT_LOGLEVEL", "KAFKA_LOG4J_LOGGERS", "KAFKA_TOOLS_LOG4J_LOGLEVEL", "KAFKA_JMX_HOSTNAME",
}

// kafkaNode is one node as its service describes it.
type kafkaNode struct {
	name       string // the service's, and the host name in the stack's network
	cluster    string // CLUSTER_ID
	properties map[string]string
	published  map[int]int // port of the host to port of the container
}

// loadStack loads compose files as docker compose does, the first one's directory being the project's. env is what
// ${…} refers to, in os.Environ's form.
func loadStack(ctx context.Context, env []string, files ...string) (*types.Project, error) {
	dir, err := filepath.Abs(filepath.Dir(files[0]))
	if err != nil {
		return nil, err
	}
	opts, err := cli.NewProjectOptions(files, cli.WithWorkingDirectory(dir), cli.WithEnv(env), cli.WithDotEnv)
	if err != nil {
		return nil, err
	}
	p, err := opts.LoadProject(ctx)
	if err != nil {
		return nil, fmt.Errorf("load %s: %w", strings.Join(files, ", "), err)
	}
	return p, nil
}

// kafkaNodes returns the stack's Kafka nodes in the order of their names, and the version of Kafka.
func kafkaNodes(p *types.Project) (nodes []*kafkaNode, version string, err error) {
	for _, name := range p.ServiceNames() {
		s := p.Services[name]
		m := kafkaImage.FindStringSubmatch(s.Image)
		if m == nil {
			continue
		}
		if version != "" && version != m[1] {
			return nil, "", fmt.Errorf("%s has Kafka %s, others have %s", name, m[1], version)
		}
		version = m[1]
		n := &kafkaNode{name: name, properties: map[string]string{}, published: map[int]int{}}
		for key, value := range s.Environment {
			switch {
			case value == nil:
				return nil, "", fmt.Errorf("%s: %s has no value", name, key)
			case key == "CLUSTER_ID":
				n.cluster = *value
			case strings.HasPrefix(key, "KAFKA_") && !slices.Contains(notProperties, key):
				n.properties[propertyName(key)] = *value
			}
		}
		for _, port := range s.Ports {
			published, err := strconv.Atoi(port.Published)
			if err != nil {
				return nil, "", fmt.Errorf("%s: published port %q is not one number", name, port.Published)
			}
			n.published[published] = int(port.Target)
		}
		nodes = append(nodes, n)
	}
	slices.SortFunc(nodes, func(a, b *kafkaNode) int { return strings.Compare(a.name, b.name) })
	if len(nodes) == 0 {
		return nil, "", fmt.Errorf("%s has no service with an image apache/kafka:X.Y.Z", strings.Join(p.ComposeFiles, ", "))
	}
	return nodes, version, nil
}

// propertyName is the image's rule: KAFKA_A_B is a.b, two underscores are one, three are a dash.
func propertyName(variable string) string {
	name := strings.ToLower(strings.ReplaceAll(strings.TrimPrefix(variable, "KAFKA_"), "_", "."))
	return strings.ReplaceAll(strings.ReplaceAll(name, "...", "-"), "..", "_")
}

// isBroker is false for a node that only votes.
func (n *kafkaNode) isBroker() bool {
	return slices.Contains(strings.Split(n.properties["process.roles"], ","), "broker")
}

// endpoint is one of NAME://host:port,…; host is empty for every interface.
type endpoint struct {
	name, host string
	port       int
}

func (e endpoint) String() string {
	return e.name + "://" + net.JoinHostPort(e.host, strconv.Itoa(e.port))
}

// endpoints takes a list of listeners apart.
func endpoints(list string) (parsed []endpoint, err error) {
	for _, item := range strings.Split(list, ",") {
		name, address, ok := strings.Cut(strings.TrimSpace(item), "://")
		host, port, err := net.SplitHostPort(address)
		n, nerr := strconv.Atoi(port)
		if !ok || err != nil || nerr != nil {
			return nil, fmt.Errorf("%q is not NAME://host:port", item)
		}
		parsed = append(parsed, endpoint{name, host, n})
	}
	return parsed, nil
}

// toLoopback rewrites the addresses of all nodes: a node's port of the container becomes one of 127.0.0.1. Ports that
// are published become those of hostPorts, in the order of the nodes; the others are free ones.
func toLoopback(nodes []*kafkaNode, hostPorts []int) error {
	type containerPort struct {
		node string
		port int
	}
	ports := map[containerPort]int{}
	published := map[int]int{} // port of the host to port of loopback
	for _, n := range nodes {
		for host, container := range n.published {
			if len(published) == len(hostPorts) {
				return fmt.Errorf("%d ports for more published ports than that", len(hostPorts))
			}
			port := hostPorts[len(published)]
			ports[containerPort{n.name, container}], published[host] = port, port
		}
	}
	if len(published) != len(hostPorts) {
		return fmt.Errorf("%d ports for %d published ones", len(hostPorts), len(published))
	}
	for _, n := range nodes {
		listeners, err := endpoints(n.properties["listeners"])
		if err != nil {
			return fmt.Errorf("listeners of %s: %w", n.name, err)
		}
		for i, l := range listeners {
			at := containerPort{n.name, l.port}
			if ports[at] == 0 {
				free, err := freePorts(1, hostPorts...)
				if err != nil {
					return err
				}
				ports[at] = free[0]
			}
			listeners[i].host, listeners[i].port = "127.0.0.1", ports[at]
		}
		n.properties["listeners"] = join(listeners)
	}
	at := func(host string, port int) (int, error) {
		to := ports[containerPort{host, port}]
		if host == "localhost" {
			to = published[port]
		}
		if to == 0 {
			return 0, fmt.Errorf("nobody listens on %s:%d", host, port)
		}
		return to, nil
	}
	for _, n := range nodes {
		if err := n.readdress(at); err != nil {
			return fmt.Errorf("%s: %w", n.name, err)
		}
	}
	return nil
}

// readdress rewrites what a node says to others: where it is, and where the voters are.
func (n *kafkaNode) readdress(at func(host string, port int) (int, error)) error {
	if n.isBroker() {
		advertised, err := endpoints(n.properties["advertised.listeners"])
		if err != nil {
			return err
		}
		for i, a := range advertised {
			if advertised[i].port, err = at(a.host, a.port); err != nil {
				return err
			}
			advertised[i].host = "127.0.0.1"
		}
		n.properties["advertised.listeners"] = join(advertised)
	}
	var voters []string
	for _, voter := range strings.Split(n.properties["controller.quorum.voters"], ",") {
		id, address, _ := strings.Cut(voter, "@")
		host, port, err := net.SplitHostPort(address)
		if err != nil {
			return fmt.Errorf("voter %q: %w", voter, err)
		}
		number, _ := strconv.Atoi(port)
		to, err := at(host, number)
		if err != nil {
			return fmt.Errorf("voter %q: %w", voter, err)
		}
		voters = append(voters, fmt.Sprintf("%s@127.0.0.1:%d", id, to))
	}
	n.properties["controller.quorum.voters"] = strings.Join(voters, ",")
	return nil
}

func join(list []endpoint) string {
	var s []string
	for _, e := range list {
		s = append(s, e.String())
	}
	return strings.Join(s, ",")
}
