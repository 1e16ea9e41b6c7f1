// What audit must not overlook.

package ops

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math"
	"reflect"
	"strings"
	"testing"
	"time"
)

var always = timeRange{0, math.MaxUint32}

// TestAuditInPasses: what is read in many passes, for want of memory, is what is read in one.
func TestAuditInPasses(t *testing.T) {
	t.Parallel()
	s := newStand(t)
	at := time.Now().Unix() - hourSeconds
	var events []string
	for i := range 400 {
		events = append(events, fmt.Sprint("u", i, " ", at))
	}
	s.produce("", 0, events[:200])
	s.produce("", 1, append(events[200:], events[:100]...))
	s.produce("", 1, []string{"junk"})
	s.produce(".dlq", 1, []string{events[8], "junk"})
	s.produce(".retry", 0, events[9:11])
	s.query(fmt.Sprintf("INSERT INTO {events} SELECT SHA256(concat('u', toString(number), ' %d')), 'e', '', concat('u', toString(number)), %[1]d FROM numbers(400) WHERE number NOT IN (7, 8, 9)", at))
	read := func(most int) *ledger {
		l, err := s.readLedger(t.Context(), always, most)
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	whole := read(math.MaxInt)
	if whole.records != 500 || whole.distinct != 400 || whole.junk != 1 || whole.in != [...]int64{onTopic: 1, inDeadLetters: 1, inRetry: 1, inTable: 397} ||
		len(whole.nowhere) != 1 || whole.rows != 397 || whole.unequal != 397 {
		t.Errorf("%+v", whole)
	}
	if passes := read(30); !reflect.DeepEqual(passes, whole) {
		t.Errorf("in one pass %+v, in several %+v", whole, passes)
	}
}

// TestAuditEnds: 0 when everything is where it belongs, 1 and the ids when something is not.
func TestAuditEnds(t *testing.T) {
	t.Parallel()
	s := newStand(t)
	at := time.Now().Unix()/hourSeconds*hourSeconds - 2*hourSeconds
	event := func(user string) string { return fmt.Sprint(user, " ", at) }
	s.produce("", 0, []string{event("a"), event("b"), event("b")})
	s.store(event("a"), event("b"))
	s.run(0, "audit", "records on the topic  3", "duplicates  1", "stored  2", "difference  0", "counted in events_hourly  2")
	var figures map[string]any
	if err := json.Unmarshal([]byte(s.run(0, "audit -json")), &figures); err != nil || figures["records"] != 3. || figures["difference"] != 0. {
		t.Error(figures, err)
	}
	s.produce("", 0, []string{event("lost")})
	id, _, _, _ := s.Decode([]byte(event("lost")))
	s.run(1, "audit", "difference  1", fmt.Sprintf("nowhere: %x", id))
	s.run(0, fmt.Sprint("audit -to ", at)) // it is later than that
	s.erase("lost", at-1)
	s.run(1, "audit", "difference  1") // it is later than that
	s.erase("lost", at)
	s.run(0, "audit", "records on the topic  3") // it is no matter any more
	s.erase("a", at-1)
	s.run(0, "audit", "rows of erased users  0")
	s.erase("a", at)
	s.run(1, "audit", "rows of erased users  1") // and this one is still there
	quoted := `o'h\ara`
	s.store(event(quoted))
	s.erase(quoted, at)
	s.run(1, "audit", "rows of erased users  2")
	s.erase("b", at)
	s.query("ALTER TABLE {events} DELETE WHERE user_id != 'c' SETTINGS mutations_sync = 2")
	s.run(1, "audit", "rows of erased users  0", "counted too few or too many, hour by hour  3")
}

// TestAuditOfLetters: a letter is an event's end, unless the letter has come back since.
func TestAuditOfLetters(t *testing.T) {
	id := [32]byte{1}
	for _, c := range []struct {
		about  string
		letter int16 // how often it had come back when it became a letter
		topic  []int16
		want   whereabouts
	}{
		{"dead", 0, []int16{0}, inDeadLetters},
		{"replayed, and lost", 0, []int16{0, 1}, onTopic},
		{"replayed, and dead again", 1, []int16{1, 0}, inDeadLetters},
	} {
		p := &ledgerPass{last: math.MaxUint64, most: 1, tallies: map[[32]byte]tally{}}
		for _, replays := range c.topic {
			p.note(id, 0, onTopic, replays)
		}
		p.note(id, 0, inDeadLetters, c.letter)
		p.note([32]byte{2}, 0, inDeadLetters, 0) // older than what the topic still holds
		if got := p.tallies[id]; len(p.tallies) != 1 || got.in != c.want || int(got.records) != len(c.topic) {
			t.Errorf("%s: %+v", c.about, p.tallies)
		}
	}
}

// TestPassGivesAway: a pass that finds too many keeps the lower part of its range, and forgets nothing of that.
func TestPassGivesAway(t *testing.T) {
	p := &ledgerPass{last: math.MaxUint64, most: 10, tallies: map[[32]byte]tally{}}
	for i := range 256 {
		p.note([32]byte{byte(i)}, 0, onTopic, 0)
	}
	if n := len(p.tallies); n > 10 || n != int(p.last>>56)+1 {
		t.Errorf("%d events up to %016x", n, p.last)
	}
}

// TestManyNowhere: ten ids are printed, and a sign that there are more.
func TestManyNowhere(t *testing.T) {
	p := &ledgerPass{last: math.MaxUint64, most: 20, tallies: map[[32]byte]tally{}}
	for i := range 20 {
		p.note([32]byte{byte(i)}, 0, onTopic, 0)
	}
	l := new(ledger)
	l.add(p)
	var out bytes.Buffer
	l.print(&out, false)
	if l.difference() != 20 || strings.Count(out.String(), "nowhere: ") != maxNowhere || !strings.HasSuffix(out.String(), "…\n") {
		t.Error(out.String())
	}
}
