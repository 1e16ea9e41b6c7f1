// The brokers: franz-go's kfake, two of them in this process, with their log on disk.

package main

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/twmb/franz-go/pkg/kfake"
)

type brokers struct {
	ports   []int
	dir     string
	verbose bool

	mu      sync.Mutex // guards cluster
	cluster *kfake.Cluster
}

func (b *brokers) addresses() string {
	var list []string
	for _, p := range b.ports {
		list = append(list, fmt.Sprintf("127.0.0.1:%d", p))
	}
	return strings.Join(list, ",")
}

// start opens the cluster on its ports and on what the last one left in dir. Acknowledged records are in the page
// cache then, as in Kafka: they survive the end of dev in any way, not that of the machine.
func (b *brokers) start() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.cluster != nil {
		return errors.New("the brokers are running")
	}
	level := kfake.LogLevelError
	if b.verbose {
		level = kfake.LogLevelInfo
	}
	c, err := kfake.NewCluster(
		kfake.NumBrokers(len(b.ports)),
		kfake.Ports(b.ports...),
		kfake.DataDir(b.dir),
		kfake.GroupMinSessionTimeout(time.Second), // tests that kill a copy need not wait long for it to be missed
		kfake.BrokerConfigs(map[string]string{
			"default.replication.factor": "2",
			"min.insync.replicas":        "2",
			"message.max.bytes":          "10485760",
			"log.retention.ms":           "-1",
		}),
		kfake.WithLogger(kfake.BasicLogger(os.Stderr, level)),
	)
	if err != nil {
		return fmt.Errorf("start the Kafka brokers on %s with data in %s: %w", b.addresses(), b.dir, err)
	}
	b.cluster = c
	return nil
}

func (b *brokers) stop() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.cluster == nil {
		return errors.New("the brokers are not running")
	}
	b.cluster.Close()
	b.cluster = nil
	return nil
}
