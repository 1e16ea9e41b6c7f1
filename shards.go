// Shards: several ClickHouse servers that store one system's events.
//
// With CLICKHOUSE_CLUSTER the events of Kafka partition p are stored by shard p mod shards, so that all duplicates of an event
// meet on one server, and counting once is a matter of one server. shards.go owns who the servers are and that this
// placement never changes: each shard's table says in its comment which one it is. One server is the case of one shard.

package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"

	"github.com/ClickHouse/ch-go"
	"github.com/ClickHouse/ch-go/proto"
)

// shards returns a store for each shard of the cluster, in the order of their numbers; the store itself without a cluster.
func (s *store) shards(ctx context.Context) ([]*store, error) {
	if s.cluster == "" || s.number > 0 {
		return []*store{s}, nil
	}
	c, err := s.dial(ctx)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	var number proto.ColUInt32
	var host proto.ColStr
	var port proto.ColUInt16
	var replicas [][]string // by shard
	err = c.Do(ctx, eachRow(ch.Query{
		Body:       "SELECT shard_num, host_name, port FROM system.clusters WHERE cluster = {cluster:String} ORDER BY shard_num, replica_num",
		Parameters: []proto.Parameter{parameter("cluster", s.cluster)},
	}, func(i int) {
		if int(number[i]) > len(replicas) {
			replicas = append(replicas, nil)
		}
		replicas[len(replicas)-1] = append(replicas[len(replicas)-1], net.JoinHostPort(host.Row(i), strconv.Itoa(int(port[i]))))
	}, &number, &host, &port))
	if err != nil {
		return nil, fmt.Errorf("read the servers of CLICKHOUSE_CLUSTER: %w", err)
	}
	if len(replicas) == 0 {
		return nil, fmt.Errorf("CLICKHOUSE_CLUSTER=%s: %w at %s", s.cluster, errNoCluster, s.options.Address)
	}
	replicated := slices.ContainsFunc(replicas, func(list []string) bool { return len(list) > 1 })
	var all []*store
	for i, list := range replicas {
		shard := &store{options: s.options, database: s.database, cluster: s.cluster, fsync: s.fsync, keepDays: s.keepDays,
			number: i + 1, of: len(replicas), replicas: list, replicated: replicated}
		shard.options.Address = list[0]
		shard.userBits.Store(s.userBits.Load())
		all = append(all, shard)
	}
	return all, nil
}

var errNoCluster = errors.New("no cluster of that name is known")

// errPlacement is events that stand where this placement does not look for them. Only a person can decide what becomes of them.
var errPlacement = errors.New("events are placed by another number of shards or partitions")

// placement is the comment of a shard's events. One server needs none: it has whatever the topic has.
func (s *store) placement(partitions int) string {
	if s.of == 1 {
		return ""
	}
	return fmt.Sprintf("shard %d of %d, by partition of %d", s.number, s.of, partitions)
}

// checkPlacement compares what a shard's table says with what the cluster and the topic say now. place says that the table has
// no comment yet. A topic whose partitions are unknown, 0, is not compared.
func (s *store) checkPlacement(ctx context.Context, c asker, partitions int) (place bool, err error) {
	var comment proto.ColStr
	var rows proto.ColUInt64
	err = c.Do(ctx, ch.Query{
		Body: fmt.Sprintf("SELECT comment, toUInt64(ifNull((SELECT sum(rows) FROM system.parts WHERE active AND database = '%[1]s' AND table = 'events'), 0)) AS n"+
			" FROM system.tables WHERE database = '%[1]s' AND name = 'events'", s.database),
		Result: proto.Results{{Data: &comment}, {Data: &rows}},
	})
	if err != nil || partitions == 0 {
		return false, err
	}
	has, wanted := "", s.placement(partitions)
	if len(rows) > 0 {
		has = comment.First()
	}
	switch {
	case has == wanted:
		return false, nil
	case has == "" && (len(rows) == 0 || rows[0] == 0):
		return true, nil
	case has == "":
		has = "the only shard"
	case wanted == "":
		wanted = "the only shard"
	}
	return false, fmt.Errorf("%w: %s.events at %s is %q and would have to be %q; set back what was changed, or start with an empty CLICKHOUSE_DATABASE",
		errPlacement, s.database, s.options.Address, has, wanted)
}

// place writes the comment.
func (s *store) place(ctx context.Context, c asker, partitions int) error {
	return c.Do(ctx, ch.Query{Body: fmt.Sprintf("ALTER TABLE %s.events MODIFY COMMENT '%s'", s.database, s.placement(partitions))})
}

// name adds the shard to what is said of it, where there are several.
func (s *store) name(what string) string {
	if s.of == 1 {
		return what
	}
	return fmt.Sprintf("%s (shard %d of %d)", what, s.number, s.of)
}

// fromAll is the table for a query that reads all shards.
func (s *store) fromAll(table string) string {
	if s.cluster == "" {
		return s.database + "." + table
	}
	return "cluster('" + s.cluster + "', " + s.database + ", " + table + ")"
}

// aroundShards is what stands before and behind a subquery that each shard answers for itself, in one look at its tables.
func (s *store) aroundShards() (before, behind string) {
	if s.cluster == "" {
		return "", ""
	}
	return "cluster('" + s.cluster + "', view", ")"
}

// syncReplica waits until the replica that c asks has what others have acknowledged.
func (s *store) syncReplica(ctx context.Context, c asker) error {
	if !s.replicated {
		return nil
	}
	for _, table := range []string{"events", "events_hourly"} {
		if err := c.Do(ctx, ch.Query{Body: "SYSTEM SYNC REPLICA " + s.database + "." + table + " LIGHTWEIGHT"}); err != nil {
			return fmt.Errorf("wait for what other replicas have: %w", err)
		}
	}
	return nil
}

// shardOf finds the shard that an error of a query over all of them speaks of.
func shardOf(shards []*store, err error) *store {
	for _, s := range shards {
		if slices.ContainsFunc(s.replicas, func(address string) bool { return strings.Contains(err.Error(), "Received from "+address) }) {
			return s
		}
	}
	return shards[0]
}
