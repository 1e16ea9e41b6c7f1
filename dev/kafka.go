// The brokers: franz-go's kfake, two of them in this process, with their logs on disk; or a cluster (cluster.go).
//
// kafka.go owns kfake's cluster and its directory. kfake does in one goroutine what a cluster does in many processes:
// the replicas of a partition are one log, always in sync, and both brokers come and go together.

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"sync"
	"time"

	"github.com/twmb/franz-go/pkg/kfake"
)

// brokerConfigs are those of the compose stack where kfake knows them. What is acknowledged is in the page cache then,
// as with Kafka: it survives the end of dev in any way, not that of the machine.
var brokerConfigs = map[string]string{
	"default.replication.factor": "2",
	"min.insync.replicas":        "2",
	"message.max.bytes":          "10485760", // a producer may batch up to 10 MB; kfake's own limit is 1 MB
	// Nothing is deleted by age: a stack that was off for a week still has its events, and knows which were consumed.
	"log.retention.ms":          "-1",
	"offsets.retention.minutes": "5256000", // ten years; 0 and -1 would mean at once
	// A start reads every log, one segment a partition at a time: small segments bound the memory of that.
	"log.segment.bytes": "16777216",
}

// minSession is the shortest session timeout that a group may ask for: tests that kill a copy need not wait Kafka's 6 s
// until it is missed.
const minSession = time.Second

// kafka is what dev starts, takes away and gives back: brokers or a cluster.
type kafka interface {
	start(context.Context) error // whatever does not run, on the same ports and data; returns when all of it answers
	stop()                       // all of it
	kill(node string) error      // one node
	cut() error                  // the connections of now, at their next answers
	addresses() string           // host:port, separated by commas
	names() string               // of the nodes that kill takes, "" when there are none
}

// newKafka returns what -kafka says, not yet started.
func newKafka(ctx context.Context, cfg *config) (kafka, error) {
	if cfg.kafka == kindCluster {
		return newCluster(ctx, cfg)
	}
	return &brokers{ports: cfg.kafkaPorts, dir: filepath.Join(cfg.data, "kafka"), fsync: cfg.kafkaFsync, verbose: cfg.verbose}, nil
}

// brokers is kfake's cluster, running or not.
type brokers struct {
	ports   []int
	dir     string
	fsync   bool
	verbose bool

	mu       sync.Mutex // guards cluster
	cluster  *kfake.Cluster
	stopMore func() // what runs beside the cluster
	clients  cuttable
}

func (b *brokers) addresses() string { return loopbackAddresses(b.ports) }

func (b *brokers) names() string { return "" }

func (b *brokers) kill(string) error {
	return errors.New("these brokers are one process: only `dev -kafka cluster` has nodes that can be killed")
}

func (b *brokers) cut() error { b.clients.cut(); return nil }

func loopbackAddresses(ports []int) string {
	var list []string
	for _, p := range ports {
		list = append(list, fmt.Sprintf("127.0.0.1:%d", p))
	}
	return strings.Join(list, ",")
}

// start opens the cluster on its ports and on what the last one left in dir, and returns when it answers. Started
// already: nothing to do. kfake reads every log first: 0.3 s a GB and some hundred MB of memory after a clean end; 0.6 to
// 3 s a GB, and as much memory as the logs have, after a kill.
func (b *brokers) start(context.Context) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.cluster != nil {
		return nil
	}
	patience := time.AfterFunc(2*time.Second, func() { progress("kafka is reading its logs in %s", b.dir) })
	defer patience.Stop()
	options := []kfake.Opt{
		kfake.NumBrokers(len(b.ports)),
		kfake.Ports(b.ports...),
		kfake.DataDir(b.dir),
		kfake.GroupMinSessionTimeout(minSession),
		kfake.BrokerConfigs(brokerConfigs),
		kfake.WithLogger(kafkaLog{b.verbose}),
		kfake.ListenFn(b.clients.listen),
	}
	if b.fsync {
		options = append(options, kfake.SyncWrites())
	}
	c, err := kfake.NewCluster(options...)
	if err != nil {
		return fmt.Errorf("start the Kafka brokers on %s with data in %s: %w", b.addresses(), b.dir, err)
	}
	if len(c.ListenAddrs()) != len(b.ports) { // answered by the goroutine that answers clients
		c.Close()
		return errors.New("the Kafka brokers do not listen")
	}
	if b.stopMore, err = watchWaiting(c); err != nil {
		c.Close()
		return fmt.Errorf("watch the consumer groups: %w", err)
	}
	b.cluster = c
	debug.FreeOSMemory() // what the logs were read into
	return nil
}

// stop closes the cluster and every connection to it. Stopped already: nothing to do.
func (b *brokers) stop() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.cluster != nil {
		b.stopMore()
		b.cluster.Close()
		b.cluster = nil
	}
}

// kafkaLog passes on what kfake says about its own state: errors, and warnings that a write to disk has failed. Its
// warnings about clients are for those who ask for everything.
type kafkaLog struct{ verbose bool }

func (l kafkaLog) Logf(level kfake.LogLevel, format string, args ...any) {
	aboutClient := strings.HasPrefix(format, "consumer") || strings.HasPrefix(format, "OffsetCommit") || strings.HasPrefix(format, "txn")
	switch {
	case l.verbose && level <= kfake.LogLevelInfo, level <= kfake.LogLevelError, level <= kfake.LogLevelWarn && !aboutClient:
		fmt.Fprintf(os.Stderr, "dev: kafka: "+format+"\n", args...)
	}
}
