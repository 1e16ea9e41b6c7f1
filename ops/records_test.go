// Reading a topic as far as it reaches.

package ops

import (
	"context"
	crand "crypto/rand"
	"errors"
	"testing"
	"time"

	"github.com/twmb/franz-go/pkg/kadm"
	"github.com/twmb/franz-go/pkg/kgo"
)

// TestReadBesideRetention: what is still to be read expires. Nobody waits for it.
func TestReadBesideRetention(t *testing.T) {
	t.Parallel()
	s := newStand(t)
	const records = 4
	for range records { // of which one or two fill a fetch
		value := make([]byte, 900_000)
		crand.Read(value)
		s.produce("", 0, []string{string(value)})
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	err := s.readRecords(ctx, s.Topic, "", func(rec *kgo.Record) error {
		all := kadm.Offsets{s.Topic: {rec.Partition: {Topic: s.Topic, Partition: rec.Partition, At: records}}}
		_, err := s.admin.DeleteRecords(ctx, all)
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

// TestReadWhatIsLeft: what a group has committed is left out, a group that nobody has joined has committed nothing, and an error
// ends the reading.
func TestReadWhatIsLeft(t *testing.T) {
	t.Parallel()
	s := newStand(t)
	s.produce("", 0, []string{"a", "b", "c"})
	s.produce("", 1, []string{"d"})
	read := func(group string) (values string) {
		t.Helper()
		if err := s.readRecords(t.Context(), s.Topic, group, func(rec *kgo.Record) error { values += string(rec.Value); return nil }); err != nil {
			t.Fatal(err)
		}
		return values
	}
	if got := read(s.Group); len(got) != 4 {
		t.Errorf("before anybody has joined: %q", got)
	}
	s.commit(map[int32]int64{0: 2, 1: 1})
	if got := read(s.Group); got != "c" {
		t.Errorf("what is left is %q", got)
	}
	if got := read(""); len(got) != 4 {
		t.Errorf("all is %q", got)
	}
	enough, n := errors.New("enough"), 0
	err := s.readRecords(t.Context(), s.Topic, "", func(*kgo.Record) error { n++; return enough })
	if err != enough || n != 1 {
		t.Error(err, n)
	}
	if err := s.readRecords(t.Context(), s.Topic+".none", "", nil); err == nil {
		t.Error("a topic that does not exist is read")
	}
}

// commit sets the group's offsets of the main topic, by partition.
func (s *stand) commit(at map[int32]int64) {
	s.t.Helper()
	offsets := kadm.Offsets{}
	for p, o := range at {
		offsets.AddOffset(s.Topic, p, o, -1)
	}
	if err := s.admin.CommitAllOffsets(s.t.Context(), s.Group, offsets); err != nil {
		s.t.Fatal(err)
	}
}
