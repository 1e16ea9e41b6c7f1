package main

import (
	"context"
	"sync/atomic"
	"testing"
	"time"

	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/kmsg"
)

const (
	waitedTopic = "waited"
	waitedParts = 6
)

// member is a consumer in a group, and how many partitions it has.
type member struct {
	*kgo.Client
	has atomic.Int32
}

// startMember joins the group with the shortest session; each rebalance waits for it as long as slow says.
func startMember(t *testing.T, b *brokers, slow time.Duration) *member {
	t.Helper()
	m := new(member)
	var err error
	m.Client, err = kgo.NewClient(
		kgo.SeedBrokers(b.addresses()), kgo.ConsumerGroup("g"), kgo.ConsumeTopics(waitedTopic), kgo.Balancers(kgo.RangeBalancer()),
		kgo.SessionTimeout(minSession), kgo.HeartbeatInterval(minSession/4),
		kgo.OnPartitionsAssigned(func(_ context.Context, _ *kgo.Client, got map[string][]int32) {
			m.has.Store(int32(len(got[waitedTopic])))
		}),
		kgo.OnPartitionsRevoked(func(context.Context, *kgo.Client, map[string][]int32) {
			m.has.Store(0)
			time.Sleep(slow) // longer than the session: the fault itself
		}),
	)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(m.Close)
	return m
}

// share waits until each of the members has its share of all partitions, sooner than franz-go would try again by itself.
func share(t *testing.T, members ...*member) {
	t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		n := 0
		for _, m := range members {
			if int(m.has.Load()) == waitedParts/len(members) {
				n++
			}
		}
		if n == len(members) {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d of %d members have their share of the partitions", n, len(members))
		}
	}
}

func startBrokers(t *testing.T) *brokers {
	t.Helper()
	ports, err := freePorts(1)
	if err != nil {
		t.Fatal(err)
	}
	b := &brokers{ports: ports, dir: t.TempDir()}
	if err := b.start(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.stop)
	admin, err := kgo.NewClient(kgo.SeedBrokers(b.addresses()))
	if err != nil {
		t.Fatal(err)
	}
	defer admin.Close()
	req := kmsg.NewPtrCreateTopicsRequest()
	topic := kmsg.NewCreateTopicsRequestTopic()
	topic.Topic, topic.NumPartitions, topic.ReplicationFactor = waitedTopic, waitedParts, 1
	req.Topics = append(req.Topics, topic)
	if _, err := req.RequestWith(t.Context(), admin); err != nil {
		t.Fatal(err)
	}
	return b
}

// TestWaitingMember: a member stays in the group while it waits longer than its session for another one to join.
func TestWaitingMember(t *testing.T) {
	t.Parallel()
	b := startBrokers(t)
	slow := startMember(t, b, 2*minSession)
	share(t, slow)
	waits := startMember(t, b, 0)
	share(t, slow, waits)
	share(t, slow, waits, startMember(t, b, 0))
}

// TestDeadWaitingMember: one that dies while it waits holds the others up for no longer than its session.
func TestDeadWaitingMember(t *testing.T) {
	t.Parallel()
	b := startBrokers(t)
	slow := startMember(t, b, 2*minSession)
	share(t, slow)
	dies, err := kgo.NewClient(kgo.SeedBrokers(b.addresses()))
	if err != nil {
		t.Fatal(err)
	}
	defer dies.Close()
	join := kmsg.NewPtrJoinGroupRequest()
	join.Group, join.ProtocolType = "g", "consumer"
	join.SessionTimeoutMillis, join.RebalanceTimeoutMillis = int32(minSession.Milliseconds()), 60_000
	protocol := kmsg.NewJoinGroupRequestProtocol()
	protocol.Name = kgo.RangeBalancer().ProtocolName()
	protocol.Metadata = kgo.RangeBalancer().JoinGroupMetadata([]string{waitedTopic}, nil, 0)
	join.Protocols = append(join.Protocols, protocol)
	named, err := join.RequestWith(t.Context(), dies)
	if err != nil {
		t.Fatal(err)
	}
	join.MemberID = named.MemberID
	ctx, cancel := context.WithTimeout(t.Context(), minSession) // it waits for the slow one, and is gone before that has come
	defer cancel()
	if resp, err := join.RequestWith(ctx, dies); err == nil {
		t.Fatalf("the member did not have to wait: error code %d", resp.ErrorCode)
	}
	dies.Close()
	share(t, slow)
}
