// Members of consumer groups that wait for the others: kfake forgets about them what Kafka remembers.
//
// A member that waits for the answer to its join or sync sends no heartbeats, and Kafka asks for none until it has answered.
// kfake's session timer goes on: after the session timeout the member is out of the group, is never answered, and waits for
// over a minute. One that dies while it waits has no timer at all in kfake, and holds the group up for a minute. waiting.go
// sends heartbeats for whoever waits, which cures both: the timer starts, is put off, and runs out once nobody waits.

package main

import (
	"context"
	"sync"
	"time"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kfake"
	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// waiting sends the heartbeats, until ctx ends.
type waiting struct {
	ctx    context.Context
	kafka  *kgo.Client
	mu     sync.Mutex             // guards groups
	groups map[string]generations // by the group's id
}

// generations are the newest of a group that its members have named, and that its leader has assigned partitions for.
type generations struct{ seen, synced int32 }

// watchWaiting makes a cluster treat waiting members as Kafka does, until the function that it returns is called.
func watchWaiting(c *kfake.Cluster) (stop func(), err error) {
	kafka, err := kgo.NewClient(kgo.SeedBrokers(c.ListenAddrs()...))
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	w := &waiting{ctx: ctx, kafka: kafka, groups: map[string]generations{}}
	for _, key := range []kmsg.Key{kmsg.JoinGroup, kmsg.SyncGroup, kmsg.Heartbeat} {
		c.ControlKey(key.Int16(), func(req kmsg.Request) (kmsg.Response, error, bool) {
			w.see(req)
			return nil, nil, false // kfake answers
		})
	}
	return func() { cancel(); kafka.Close() }, nil
}

// see is told of each request before kfake carries it out, one after the other.
func (w *waiting) see(req kmsg.Request) {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch req := req.(type) {
	case *kmsg.JoinGroupRequest:
		if req.MemberID != "" {
			beats := w.beats(req.Group, req.MemberID, w.groups[req.Group].seen)
			go func() { // ends when the others have joined, or the member is gone
				for beats() == kerr.RebalanceInProgress.Code {
				}
			}()
		}
	case *kmsg.SyncGroupRequest:
		g := w.groups[req.Group]
		g.seen = max(g.seen, req.Generation)
		if len(req.GroupAssignment) > 0 { // only the leader's has any
			g.synced = max(g.synced, req.Generation)
		}
		w.groups[req.Group] = g
		beats := w.beats(req.Group, req.MemberID, req.Generation)
		go func() { // ends when the leader has assigned, the others join again, or the member is gone
			for !w.assigned(req.Group, req.Generation) && beats() == 0 {
			}
		}()
	case *kmsg.HeartbeatRequest:
		g := w.groups[req.Group]
		g.seen = max(g.seen, req.Generation)
		w.groups[req.Group] = g
	}
}

func (w *waiting) assigned(group string, generation int32) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.groups[group].synced >= generation
}

// beats returns a function that waits for a part of the shortest session and sends a heartbeat. It returns Kafka's error code,
// or -1 when there is no answer.
func (w *waiting) beats(group, member string, generation int32) func() int16 {
	req := kmsg.NewPtrHeartbeatRequest()
	req.Group, req.MemberID, req.Generation = group, member, generation
	return func() int16 {
		select {
		case <-w.ctx.Done():
			return -1
		case <-time.After(minSession / 4):
		}
		resp, err := req.RequestWith(w.ctx, w.kafka)
		if err != nil {
			return -1
		}
		return resp.ErrorCode
	}
}
