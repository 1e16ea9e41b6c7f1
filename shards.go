// Shards: several ClickHouse servers that store one system's events.
//
// With CLICKHOUSE_CLUSTER the events of Kafka partition p are stored by shard p mod shards, so that all duplicates of an event
// meet on one server, and counting once is a matter of one server. shards.go owns who the servers are, that this
// placement never changes (each shard's table says in its comment which one it is), and which instance gets which shard's
// partitions. One server is the case of one shard.

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"

	"github.com/ClickHouse/ch-go"
	"github.com/ClickHouse/ch-go/proto"
	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// shards returns a store for each shard of the cluster, in the order of their numbers; the store itself without a cluster.
func (s *store) shards(ctx context.Context) (all []*store, err error) {
	if s.cluster == "" || s.number > 0 {
		return []*store{s}, nil
	}
	var number proto.ColUInt32
	var host proto.ColStr
	var port proto.ColUInt16
	var replicas [][]string // by shard
	servers := eachRow(ch.Query{
		Body:       "SELECT shard_num, host_name, port FROM system.clusters WHERE cluster = {cluster:String} ORDER BY shard_num, replica_num",
		Parameters: []proto.Parameter{parameter("cluster", s.cluster)},
	}, func(i int) {
		if int(number[i]) > len(replicas) {
			replicas = append(replicas, nil)
		}
		replicas[len(replicas)-1] = append(replicas[len(replicas)-1], net.JoinHostPort(host.Row(i), strconv.Itoa(int(port[i]))))
	}, &number, &host, &port)
	if err := s.connected(ctx, func(c asker) error { return c.Do(ctx, servers) }); err != nil {
		return nil, fmt.Errorf("read the servers of CLICKHOUSE_CLUSTER: %w", err)
	}
	if len(replicas) == 0 {
		return nil, fmt.Errorf("CLICKHOUSE_CLUSTER=%s: %w at %s", s.cluster, errNoCluster, s.options.Address)
	}
	replicated := slices.ContainsFunc(replicas, func(list []string) bool { return len(list) > 1 })
	for i, list := range replicas {
		shard := &store{options: s.options, database: s.database, cluster: s.cluster, fsync: s.fsync, keepDays: s.keepDays, decides: s.decides,
			number: i + 1, of: len(replicas), replicas: list, replicated: replicated}
		shard.userBits.Store(s.userBits.Load())
		all = append(all, shard)
	}
	return all, nil
}

var errNoCluster = errors.New("no cluster of that name is known")

// errPlacement is events that stand where this placement does not look for them. Only a person can decide what becomes of them.
var errPlacement = errors.New("events are placed by another number of shards or partitions")

// placement is the comment of a shard's events. One server needs none: it has whatever the topic has.
func (s *store) placement() string {
	if s.of == 1 {
		return ""
	}
	return fmt.Sprintf(placementForm, s.number, s.of, s.partitions)
}

const placementForm = "shard %d of %d, by partition of %d"

// checkPlacement compares what a shard's table says with what the cluster and the topic say now, and sets unplaced: the table
// says nothing yet, or does not exist.
func (s *store) checkPlacement(ctx context.Context, c asker) error {
	s.unplaced = false
	if s.partitions == 0 {
		return nil
	}
	has, rows, err := s.placementAt(ctx, c)
	if err != nil {
		return err
	}
	wanted := s.placement()
	if has == "" && rows > 0 && s.replicated { // a comment is not replicated: this replica may have come later
		s.eachReplica(ctx, func(c asker) error {
			comment, _, err := s.placementAt(ctx, c)
			has = cmp.Or(has, comment)
			return err
		})
		s.unplaced = has == wanted && wanted != ""
	}
	switch {
	case has == wanted:
		return nil
	case has == "" && rows == 0:
		s.unplaced = true
		return nil
	}
	return fmt.Errorf("%w: %s.events at %s is %q and would have to be %q; set back what was changed, or run `event-ingestion reshard`",
		errPlacement, s.database, s.replicas[0], cmp.Or(has, "the only shard"), cmp.Or(wanted, "the only shard"))
}

// placementAt is what the table of one server says, empty when nothing, and how many rows it has.
func (s *store) placementAt(ctx context.Context, c asker) (comment string, rows uint64, err error) {
	var comments, engines proto.ColStr
	var counts proto.ColUInt64
	err = c.Do(ctx, eachRow(ch.Query{
		Body: fmt.Sprintf("SELECT comment, engine, toUInt64(ifNull((SELECT sum(rows) FROM system.parts WHERE active AND database = '%[1]s' AND table = 'events'), 0))"+
			" FROM system.tables WHERE database = '%[1]s' AND name = 'events'", s.database),
	}, func(i int) {
		if rows = counts[i]; strings.HasPrefix(comments.Row(i), "shard ") { // else it is somebody's own
			comment = comments.Row(i)
		}
		if s.replicated && !strings.HasPrefix(engines.Row(i), "Replicated") {
			comment = "a table without replicas"
		}
	}, &comments, &engines, &counts))
	return comment, rows, err
}

// place writes the comment, on every replica.
func (s *store) place(ctx context.Context, _ asker) error {
	err := s.eachReplica(ctx, func(c asker) error {
		return c.Do(ctx, ch.Query{Body: fmt.Sprintf("ALTER TABLE %s.events MODIFY COMMENT '%s'", s.database, s.placement())})
	})
	if s.unplaced = err != nil; err != nil {
		return fmt.Errorf("note which shard this is: %w", err)
	}
	return nil
}

// eachReplica calls f for each server of the shard, with a connection of its own.
func (s *store) eachReplica(ctx context.Context, f func(asker) error) error {
	var failures []error
	for _, address := range s.replicas {
		one := &store{options: s.options, replicas: []string{address}}
		failures = append(failures, one.connected(ctx, f))
	}
	return errors.Join(failures...)
}

// name adds the shard to what is said of it, where there are several.
func (s *store) name(what string) string {
	if s.of == 1 {
		return what
	}
	return fmt.Sprintf("%s (shard %d of %d)", what, s.number, s.of)
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

// most is the largest answer of the shard's servers to a query that answers a number; the one of a itself without replicas. A
// replica that does not answer is taken for dead.
func (s *store) most(ctx context.Context, a asker, q ch.Query) (n uint64, err error) {
	if !s.replicated {
		return number(ctx, a, q)
	}
	answered := false
	err = s.eachReplica(ctx, func(c asker) error {
		m, err := number(ctx, c, q)
		n, answered = max(n, m), answered || err == nil
		return err
	})
	if answered {
		err = nil
	}
	return n, err
}

// noteBroken lets the shard know that an error of a query over all of them speaks of.
func noteBroken(shards []*store, err error) {
	for _, s := range shards {
		if len(shards) == 1 || slices.ContainsFunc(s.replicas, func(address string) bool { return strings.Contains(err.Error(), "Received from "+address+".") }) {
			s.broken.note(err)
		}
	}
}

// balancers are how the group's leader spreads partitions over the instances: so that few move and, where there are several
// shards, so that few instances insert into one.
func balancers(shards int) []kgo.GroupBalancer {
	sticky := kgo.CooperativeStickyBalancer()
	if shards == 1 {
		return []kgo.GroupBalancer{sticky}
	}
	return []kgo.GroupBalancer{shardBalancer{sticky, shards}, sticky} // of which the group takes the first that all members know
}

// shardBalancer puts the partitions in the order of their shards, cuts them into as many runs as there are members, and gives each
// run to the member that has the most of it. Three instances and three shards are three inserters and not nine, of which each
// would insert a ninth at the price of a third.
type shardBalancer struct {
	kgo.GroupBalancer // speaks the protocol
	shards            int
}

func (shardBalancer) ProtocolName() string { return "cooperative-by-shard" }

func (b shardBalancer) MemberBalancer(members []kmsg.JoinGroupResponseMember) (kgo.GroupMemberBalancer, map[string]struct{}, error) {
	group, err := kgo.NewConsumerBalancer(b, members)
	return group, group.MemberTopics(), err
}

// Balance plans for the whole group, of which all members read the one topic.
func (b shardBalancer) Balance(group *kgo.ConsumerBalancer, topics map[string]int32) kgo.IntoSyncAssignment {
	type fit struct{ member, run, common int } // how many partitions of the run the member has already
	plan := group.NewPlan()
	for topic, partitions := range topics {
		runs := b.runs(int(partitions), len(group.Members()))
		var fits []fit
		for m := range group.Members() {
			_, meta := group.MemberAt(m)
			for r, run := range runs {
				fits = append(fits, fit{m, r, commonOf(meta, topic, run)})
			}
		}
		slices.SortStableFunc(fits, func(a, b fit) int { return cmp.Compare(b.common, a.common) })
		served, given := map[int]bool{}, map[int]bool{}
		for _, f := range fits {
			if !served[f.member] && !given[f.run] {
				served[f.member], given[f.run] = true, true
				plan.AddPartitions(&group.Members()[f.member], topic, runs[f.run])
			}
		}
	}
	plan.AdjustCooperative(group) // what has to move is let go first, and given away by the next plan
	return plan
}

// runs cuts the partitions, those of the first shard first, into n runs of nearly the same length.
func (b shardBalancer) runs(partitions, n int) (runs [][]int32) {
	var ordered []int32
	for shard := range b.shards {
		for p := shard; p < partitions; p += b.shards {
			ordered = append(ordered, int32(p))
		}
	}
	for left := n; left > 0; left-- {
		length := (len(ordered) + left - 1) / left
		runs = append(runs, slices.Clone(ordered[:length]))
		ordered = ordered[length:]
	}
	return runs
}

// commonOf counts the partitions of a run that a member has.
func commonOf(member *kmsg.ConsumerMemberMetadata, topic string, run []int32) (n int) {
	for _, owned := range member.OwnedPartitions {
		if owned.Topic == topic {
			for _, p := range owned.Partitions {
				if slices.Contains(run, p) {
					n++
				}
			}
		}
	}
	return n
}
