// Where a rewind goes, and what it refuses.

package ops

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/twmb/franz-go/pkg/kadm"
	"github.com/twmb/franz-go/pkg/kgo"
)

// offsets are the group's, by partition.
func (s *stand) offsets() (at [2]int64) {
	s.t.Helper()
	committed, err := committedOf(s.t.Context(), s.admin, s.Group, s.Topic)
	if err != nil {
		s.t.Fatal(err)
	}
	for p := range at {
		o, _ := committed.Lookup(s.Topic, int32(p))
		at[p] = o.At
	}
	return at
}

// TestRewind: the tables agree before the group is set back, and nothing is set back when they do not.
func TestRewind(t *testing.T) {
	t.Parallel()
	s := newStand(t)
	s.produce("", 0, []string{"a", "b", "c"})
	s.produce("", 1, []string{"d"})
	s.run(0, "rewind -to start", "\n0 records would be read again") // nobody has read anything
	s.commit(map[int32]int64{0: 3, 1: 0})
	s.run(0, "rewind -to start -dry-run", "3 records would be read again")
	s.run(0, "rewind -to "+time.Now().UTC().Format(time.RFC3339Nano), "\n0 records would be read again")
	if got := s.offsets(); got != [2]int64{3, 0} {
		t.Errorf("the group was set back to %v", got)
	}
	connect := s.Connect
	s.Connect = func(context.Context, func(Conn) error) error { return errors.New("the tables are away") }
	s.run(1, "rewind -to start", "before anything is read again: the tables are away")
	if got := s.offsets(); got != [2]int64{3, 0} {
		t.Errorf("the group was set back to %v", got)
	}
	s.Connect = connect
	s.run(0, "rewind -to start", "0 rows of events_hourly mended; 3 records will be read again")
	if got := s.offsets(); got != [2]int64{0, 0} {
		t.Errorf("the group was set back to %v", got)
	}
}

// TestRewindRefuses: a group that is at work, and a time of which the log has lost something.
func TestRewindRefuses(t *testing.T) {
	t.Parallel()
	s := newStand(t)
	begun := time.Now().Add(-time.Minute)
	s.produce("", 0, []string{"a", "b", "c"})
	if targets, err := rewindTargets(t.Context(), s.admin, s.Topic, begun); err != nil || targets[s.Topic][0].At != 0 {
		t.Error(targets, err)
	}
	if targets, err := rewindTargets(t.Context(), s.admin, s.Topic, time.Now().Add(time.Minute)); err != nil || targets[s.Topic][0].At != 3 {
		t.Error(targets, err)
	}
	if _, err := s.admin.DeleteRecords(t.Context(), kadm.Offsets{s.Topic: {0: {Topic: s.Topic, Partition: 0, At: 2}}}); err != nil {
		t.Fatal(err)
	}
	s.run(1, fmt.Sprint("rewind -dry-run -to ", begun.UTC().Format(time.RFC3339)), "later than -to: what was before is gone; use -to start")
	if targets, err := rewindTargets(t.Context(), s.admin, s.Topic, time.Time{}); err != nil || targets[s.Topic][0].At != 2 {
		t.Error(targets, err)
	}

	member, err := s.Kafka("member", kgo.ConsumerGroup(s.Group), kgo.ConsumeTopics(s.Topic))
	if err != nil {
		t.Fatal(err)
	}
	defer member.Close()
	member.PollFetches(t.Context())
	s.run(1, "rewind -to start", "has members, 1 of them", "stop the program first")
}
