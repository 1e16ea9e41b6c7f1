// What moves while an audit reads.

package ops

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/twmb/franz-go/pkg/kgo"
)

// atQuestion calls each func before the audit asks ClickHouse for the first time, the second time and so on.
func (s *stand) atQuestion(do ...func()) {
	connect := s.Connect
	s.Connect = func(ctx context.Context, f func(Conn) error) error {
		if len(do) > 0 {
			now := do[0]
			if do = do[1:]; now != nil {
				now()
			}
		}
		return connect(ctx, f)
	}
}

// TestAuditOfWhatMoves: an event that has been read on the topic is nowhere else while topics and tables are read one after the other,
// because it moves. It is where it has gone to, and lost only when it is nowhere then.
func TestAuditOfWhatMoves(t *testing.T) {
	t.Parallel()
	at := time.Now().Unix() - 2*hourSeconds
	event := fmt.Sprint("moves ", at)
	for _, c := range []struct {
		about  string
		idle   bool // the group has no members
		move   func(s *stand)
		in     whereabouts
		late   int64
		endsIn int
	}{
		{"into the table", false, func(s *stand) { s.move(func(s *stand) { s.store(event) }) }, inTable, 0, 0},
		{"to the dead letters", false, func(s *stand) { s.produce(".dlq", 1, []string{event}) }, inDeadLetters, 0, 0},
		{"to the retry topic", false, func(s *stand) { s.produce(".retry", 1, []string{event}) }, inRetry, 0, 0},
		{"back onto the topic", false, func(s *stand) { s.produce("", 1, []string{event}) }, toBeRead, 1, 0},
		{"back onto the topic, where nobody reads it", true, func(s *stand) { s.produce("", 1, []string{event}) }, onTopic, 1, 1},
		{"nowhere", false, func(*stand) {}, onTopic, 0, 1},
	} {
		t.Run(c.about, func(t *testing.T) {
			t.Parallel()
			s := newStand(t)
			s.produce("", 0, []string{event})
			if !c.idle {
				member, err := s.Kafka("member", kgo.ConsumerGroup(s.Group), kgo.ConsumeTopics(s.Topic), kgo.DisableAutoCommit())
				if err != nil {
					t.Fatal(err)
				}
				defer member.Close()
				member.PollFetches(t.Context())
				member.CommitOffsetsSync(t.Context(), map[string]map[int32]kgo.EpochOffset{s.Topic: {0: {Epoch: -1, Offset: 1}}}, nil)
			} else {
				s.commit(map[int32]int64{0: 1})
			}
			s.atQuestion(nil, func() { c.move(s) }) // the first is about erasures
			l, err := s.readLedger(t.Context(), always, 10)
			if err != nil {
				t.Fatal(err)
			}
			var want [inTable + 1]int64
			if want[c.in] = 1; l.in != want || l.late != c.late || l.difference() != int64(c.endsIn) || l.records != 1 {
				t.Errorf("%+v", l)
			}
		})
	}
}

// move does what asks ClickHouse itself.
func (s *stand) move(do func(*stand)) {
	connect := s.Connect
	s.Connect = s.EachServer
	do(s)
	s.Connect = connect
}

// TestAuditOfHoursInFlux: an hour of which an insert stands in one table alone for a moment agrees; one that stays as it is differs.
func TestAuditOfHoursInFlux(t *testing.T) {
	t.Parallel()
	s := newStand(t)
	hour := time.Now().Unix()/hourSeconds*hourSeconds - 2*hourSeconds
	s.store(fmt.Sprint("a ", hour), fmt.Sprint("b ", hour-hourSeconds))
	s.query(fmt.Sprintf("INSERT INTO {events_hourly} VALUES ('e', '', %d, 3)", hour-hourSeconds))
	pending := 0
	insert := func(events int) func() { // into events; and into events_hourly what the insert before has left
		return func() {
			s.move(func(s *stand) {
				s.query(fmt.Sprintf("INSERT INTO {events_hourly} VALUES ('e', '', %d, %d)", hour, pending))
				s.query(fmt.Sprintf("INSERT INTO {events} SELECT SHA256(toString(number)), 'e', '', '', %d FROM numbers(%d, %d)", hour, events*100, events))
				pending = events
			})
		}
	}
	s.atQuestion(insert(1), nil, insert(2), nil, insert(3), nil, insert(0)) // each look is two questions but the first
	l := new(ledger)
	if err := l.compareTables(t.Context(), s.System, always); err != nil {
		t.Fatal(err)
	}
	if l.rows != 8 || l.aggregated != 11 || l.unequal != 3 {
		t.Errorf("%+v", l)
	}
}
