// The real thing: Apache Kafka as docker-compose.yml sets it up, a process a node, on ports of loopback.
//
// cluster.go owns the nodes' processes and directories. compose.go derives their properties; what differs from the stack
// is only where they listen, where they store, how much memory they take, and the shortest session (minSession). Unlike
// kfake's, these brokers hold replicas that fall behind and elect leaders, and one can die while the other lives.

package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/kmsg"
)

const (
	// nodeHeap is enough for tests; three of them and ClickHouse fit a laptop.
	nodeHeap = "384m"
	// clusterTimeout bounds a start: 5 s on an idle machine, and 9 s more when a broker was killed, because the
	// controller waits until it is missed (broker.session.timeout.ms) before it takes it back.
	clusterTimeout = 90 * time.Second
)

// cluster is a set of nodes, each running or not.
type cluster struct {
	ports   []int // of the brokers, as clients see them
	dir     string
	verbose bool
	jars    string
	java    string
	nodes   []*kafkaNode

	mu      sync.Mutex // guards running
	running map[string]*group
	spawns  chan func() // run one after another on a thread that lives as long as dev
}

// newCluster reads the nodes from a compose file and finds or installs their Kafka.
func newCluster(ctx context.Context, cfg *config) (*cluster, error) {
	p, err := loadStack(ctx, os.Environ(), cfg.compose)
	if err != nil {
		return nil, err
	}
	nodes, version, err := kafkaNodes(p)
	if err != nil {
		return nil, err
	}
	if err := toLoopback(nodes, cfg.kafkaPorts); err != nil {
		return nil, fmt.Errorf("the Kafka nodes of %s: %w", cfg.compose, err)
	}
	c := &cluster{
		ports: cfg.kafkaPorts, dir: filepath.Join(cfg.data, "kafka-cluster"), verbose: cfg.verbose, nodes: nodes,
		running: map[string]*group{}, spawns: make(chan func()),
	}
	if c.java, err = exec.LookPath("java"); err != nil {
		return nil, errors.New("no Java: a Kafka cluster needs Java 17 or later on the PATH")
	}
	if c.jars, err = installKafka(ctx, version); err != nil {
		return nil, err
	}
	for _, n := range nodes {
		n.properties["log.dirs"] = filepath.Join(c.dir, n.name)
		n.properties["group.min.session.timeout.ms"] = strconv.FormatInt(minSession.Milliseconds(), 10)
		if err := c.writeProperties(n); err != nil {
			return nil, err
		}
	}
	go func() { // ends with dev: Linux ends children with the thread that started them
		runtime.LockOSThread()
		for spawn := range c.spawns {
			spawn()
		}
	}()
	return c, nil
}

func (c *cluster) addresses() string { return loopbackAddresses(c.ports) }

// names lists the brokers, which is what kill takes.
func (c *cluster) names() string {
	var names []string
	for _, n := range c.nodes {
		if n.isBroker() {
			names = append(names, n.name)
		}
	}
	return strings.Join(names, ",")
}

// start runs the nodes that do not run, on what they have stored, and returns when all brokers answer and know of each
// other.
func (c *cluster) start(ctx context.Context) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	var formats sync.WaitGroup
	failed := make([]error, len(c.nodes))
	for i, n := range c.nodes {
		formats.Go(func() { failed[i] = c.format(n) }) // ends with the tool
	}
	formats.Wait()
	if err := errors.Join(failed...); err != nil {
		return err
	}
	for _, n := range c.nodes {
		if c.running[n.name] != nil {
			continue
		}
		if err := c.spawn(n); err != nil {
			return fmt.Errorf("start %s: %w", n.name, err)
		}
	}
	return c.waitReady(ctx)
}

// format gives a new node its directory, and leaves one that has it alone.
func (c *cluster) format(n *kafkaNode) error {
	if _, err := os.Stat(filepath.Join(n.properties["log.dirs"], "meta.properties")); err == nil {
		return nil
	}
	out, err := c.tool("kafka.tools.StorageTool", "format", "--cluster-id", n.cluster, "--config", c.config(n)).CombinedOutput()
	if err != nil {
		return fmt.Errorf("format the storage of %s: %w\n%s", n.name, err, out)
	}
	return nil
}

// spawn starts a node's process, under mu. One that ends without being asked to is told about and stays away.
func (c *cluster) spawn(n *kafkaNode) error {
	log, err := os.OpenFile(c.log(n), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := c.tool("kafka.Kafka", c.config(n))
	cmd.Stdout, cmd.Stderr = log, log
	started := make(chan error)
	var g *group
	c.spawns <- func() {
		var err error
		g, err = startGroup(cmd)
		started <- err
	}
	if err := <-started; err != nil {
		return err
	}
	c.running[n.name] = g
	go func() { // ends with the node
		err := g.wait()
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.running[n.name] == g {
			delete(c.running, n.name)
			progress("%s ended (%v), see %s", n.name, err, c.log(n))
		}
	}()
	return nil
}

// tool runs a class of Kafka's.
func (c *cluster) tool(class string, args ...string) *exec.Cmd {
	level := "warn"
	if c.verbose {
		level = "info"
	}
	return exec.Command(c.java, append([]string{"-Xms" + nodeHeap, "-Xmx" + nodeHeap, "-XX:+UseSerialGC",
		"-Dorg.slf4j.simpleLogger.defaultLogLevel=" + level, "-cp", filepath.Join(c.jars, "*"), class}, args...)...)
}

func (c *cluster) config(n *kafkaNode) string { return filepath.Join(c.dir, n.name+".properties") }
func (c *cluster) log(n *kafkaNode) string    { return filepath.Join(c.dir, n.name+".log") }

func (c *cluster) writeProperties(n *kafkaNode) error {
	if err := os.MkdirAll(n.properties["log.dirs"], 0o755); err != nil {
		return err
	}
	var b strings.Builder
	for _, name := range slices.Sorted(maps.Keys(n.properties)) {
		fmt.Fprintf(&b, "%s=%s\n", name, n.properties[name])
	}
	return os.WriteFile(c.config(n), []byte(b.String()), 0o644)
}

// stop kills every node, and returns when they are gone. What was acknowledged is in the page cache.
func (c *cluster) stop() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for name := range maps.Clone(c.running) {
		c.takeDown(name)
	}
}

// kill kills one node with -9; start brings it back.
func (c *cluster) kill(name string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.running[name] == nil {
		return fmt.Errorf("%q is not running; the brokers are %s", name, c.names())
	}
	c.takeDown(name)
	return nil
}

func (c *cluster) cut() error {
	return errors.New("a cluster's connections are not ours to cut: kill a node instead")
}

// takeDown kills a running node, under mu, and waits until its ports are free.
func (c *cluster) takeDown(name string) {
	g := c.running[name]
	delete(c.running, name)
	g.signal(syscall.SIGKILL)
	for g.signal(0) == nil { // wait, elsewhere, sees the end
		time.Sleep(5 * time.Millisecond)
	}
}

// waitReady asks each broker until it names all of them: a broker is named once it takes part.
func (c *cluster) waitReady(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, clusterTimeout)
	defer cancel()
	for _, address := range strings.Split(c.addresses(), ",") {
		for {
			n, err := brokersKnownTo(ctx, address)
			if err == nil && n == len(c.ports) {
				break
			}
			for _, n := range c.nodes {
				if g := c.running[n.name]; g.signal(0) != nil {
					return fmt.Errorf("%s has ended; the end of %s:\n%s", n.name, c.log(n), tail(c.log(n)))
				}
			}
			select {
			case <-ctx.Done():
				return fmt.Errorf("%s does not see %d brokers within %s: %v; logs are in %s", address, len(c.ports), clusterTimeout, err, c.dir)
			case <-time.After(100 * time.Millisecond):
			}
		}
	}
	return nil
}

// brokersKnownTo asks one broker how many there are.
func brokersKnownTo(ctx context.Context, address string) (int, error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	client, err := kgo.NewClient(kgo.SeedBrokers(address))
	if err != nil {
		return 0, err
	}
	defer client.Close()
	seeds := client.SeedBrokers()
	resp, err := seeds[0].Request(ctx, kmsg.NewPtrMetadataRequest())
	if err != nil {
		return 0, err
	}
	return len(resp.(*kmsg.MetadataResponse).Brokers), nil
}
