// Dead letters: what is selected, how it is shown, and what goes back.

package ops

import (
	crand "crypto/rand"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/twmb/franz-go/pkg/kadm"
	"github.com/twmb/franz-go/pkg/kgo"
)

// TestLetterJSON: what is no text is neither hidden nor invented.
func TestLetterJSON(t *testing.T) {
	for value, want := range map[string]string{
		`{"a":1}`:  `{"headers":{"h":"1"},"key":"k","offset":17,"partition":3,"value":"{\"a\":1}"}`,
		"":         `{"headers":{"h":"1"},"key":"k","offset":17,"partition":3,"value":""}`,
		"\xff\xfe": `{"headers":{"h":"1"},"key":"k","offset":17,"partition":3,"value":"","value_base64":"//4="}`,
	} {
		rec := &kgo.Record{Partition: 3, Offset: 17, Key: []byte("k"), Value: []byte(value), Headers: []kgo.RecordHeader{{Key: "h", Value: []byte("1")}}}
		if got, err := json.Marshal(letterJSON(rec)); err != nil || string(got) != want {
			t.Errorf("%q: %s %v", value, got, err)
		}
	}
}

// TestReplayed: three headers are set, whoever set them before, and the others stay.
func TestReplayed(t *testing.T) {
	letter := &kgo.Record{Topic: "t.dlq", Key: []byte("another"), Value: []byte("v"), Headers: []kgo.RecordHeader{
		{Key: "retry_count", Value: []byte("5")}, {Key: "replay_count", Value: []byte("1")}, {Key: "failed_at", Value: []byte("then")},
		{Key: "retry_count", Value: []byte("6")}, {Key: "replayed_at", Value: []byte("then")},
	}}
	id := [32]byte{0xab}
	again := replayed(letter, "t", id, 2)
	if again.Topic != "t" || string(again.Key) != hex.EncodeToString(id[:]) || string(again.Value) != "v" || len(again.Headers) != 4 ||
		header(again, "retry_count") != "0" || header(again, "replay_count") != "2" || header(again, "replayed_at") == "then" || header(again, "failed_at") != "then" {
		t.Errorf("%+v", again)
	}
	if header(letter, "retry_count") != "5" {
		t.Error("the letter itself was changed")
	}
}

// TestLetters goes through the three commands.
func TestLetters(t *testing.T) {
	t.Parallel()
	s := newStand(t)
	s.produce(".dlq", 0, []string{"a 1700000000"}, "error_type", "max_retries_exhausted", "error_message", "no\troom", "original_topic", s.Topic, "sent_to_dlq_at", "then\x1b")
	s.produce(".dlq", 1, []string{"b 1700000000"}, "error_type", "max_retries_exhausted", "replay_count", "2")
	s.produce(".dlq", 1, []string{"c 1700000000"}, "error_type", "insert_failed", "replay_count", fmt.Sprint(maxReplays))
	s.produce(".dlq", 1, []string{"junk"}, "error_type", "unmarshal_error")

	s.run(0, "dlq list", "LETTER", "4 dead letters", `"no\troom"`, `then\x1b`)
	for flags, n := range map[string]int{
		"-type max_retries_exhausted": 2, "-type unmarshal_error": 1, "-filter c": 1, "-filter room": 1, "-filter nothing": 0, "-limit 3": 3, "-since 1h": 4, "-since 1ns": 0,
	} {
		s.run(0, "dlq list "+flags, fmt.Sprint(n, " dead letters\n"))
		if out := s.run(0, "dlq list -json "+flags); strings.Count(out, "\n") != n {
			t.Errorf("%s: %d letters are\n%s", flags, n, out)
		}
	}
	s.run(0, "dlq show 1:2", `"value": "junk"`, `"error_type": "unmarshal_error"`)
	s.run(1, "dlq show 1:3", "dlq show: there is no letter 1:3")

	s.run(0, "dlq replay -dry-run", "2 letters would be put back; left out: 1 that are no event, 1 replayed 3 times already")
	if n := len(s.records("")); n != 0 {
		t.Errorf("a dry run has put %d letters back", n)
	}
	seen := func(want string) { // which letters are seen to be replayed
		t.Helper()
		var got []string
		for line := range strings.Lines(s.run(0, "dlq list")) {
			if cells := strings.Fields(line); len(cells) > 0 && slices.Contains(cells, "yes") {
				got = append(got, cells[0])
			}
		}
		if slices.Sort(got); strings.Join(got, " ") != want {
			t.Errorf("replayed: %q, want %q", got, want)
		}
		if n := strings.Count(s.run(0, "dlq list -json"), `"replayed":true`); n != len(got) {
			t.Errorf("%d are replayed as JSON", n)
		}
	}
	seen("")
	s.run(0, "dlq replay -filter a", "1 letters put back; left out: ")
	seen("0:0")
	s.run(0, "dlq replay -limit 1", "1 letters put back; left out: ")
	s.run(0, "dlq replay", "2 letters put back; left out: 1 that are no event, 1 replayed 3 times already")
	seen("0:0 1:0")
	again := s.records("")
	if len(again) != 4 {
		t.Errorf("%d records are back", len(again))
	}
	for _, rec := range again {
		id, _, _, err := s.Decode(rec.Value)
		if err != nil || string(rec.Key) != hex.EncodeToString(id[:]) || header(rec, "retry_count") != "0" || header(rec, "replayed_at") == "" || header(rec, "error_type") == "" {
			t.Errorf("%+v %v", rec, err)
		}
	}
	if n := len(s.records(".dlq")); n != 4 {
		t.Errorf("%d letters are left of 4", n)
	}
}

// TestOffsets: runs grow together, whatever the order, and are the same when they are read again. The oldest are left out of too many.
func TestOffsets(t *testing.T) {
	var o offsets
	all := rand.Perm(300)
	for i, n := range all {
		o = o.with(int64(n)).with(int64(n))
		again := parseOffsets(o.String())
		for at := range int64(302) {
			if want := slices.Contains(all[:i+1], int(at)); o.has(at) != want || again.has(at) != want {
				t.Fatalf("%v: %d is in it: %t, %v", o, at, o.has(at), again)
			}
		}
	}
	if o.String() != "0-299" || parseOffsets("0-299,301").with(300).String() != "0-301" {
		t.Error(o)
	}
	for n := range int64(5000) {
		o = o.with(1000 + 2*n)
	}
	if text := o.String(); len(text) > maxMetadata || !parseOffsets(text).has(10998) || parseOffsets(text).has(0) {
		t.Errorf("%d bytes, %.20s", len(text), text)
	}
	for _, text := range []string{"", "x", "1,1", "5-4", "3,2", "1-", "1-2,3"} {
		if o := parseOffsets(text); o != nil {
			t.Errorf("%q: %v", text, o)
		}
	}
}

// TestLargeLetters: letters that together are more than the brokers take at once, and one that is more than they take by default.
func TestLargeLetters(t *testing.T) {
	t.Parallel()
	s := newStand(t)
	s.letters(2<<20, 700<<10, 700<<10, 700<<10, 1, 1)
	s.run(0, "dlq replay", "6 letters put back")
	if n := len(s.records("")); n != 6 {
		t.Errorf("%d of 6 are back", n)
	}
}

// TestRefusedLetters: this topic takes the letters one by one, but not a batch of two, and not the largest.
func TestRefusedLetters(t *testing.T) {
	t.Parallel()
	s := newStand(t)
	most := fmt.Sprint(300 << 10)
	if _, err := s.admin.AlterTopicConfigs(t.Context(), []kadm.AlterConfig{{Name: "max.message.bytes", Value: &most}}, s.Topic); err != nil {
		t.Fatal(err)
	}
	s.letters(200<<10, 200<<10, 200<<10, 200<<10) // two of them are in one of the two partitions
	s.run(0, "dlq replay", "4 letters put back")
	if n := len(s.records("")); n != 4 {
		t.Errorf("%d of 4 are back", n)
	}
	s.letters(400 << 10)
	s.run(1, "dlq replay", "some letters were not acknowledged, it is safe to run this again: MESSAGE_TOO_LARGE")
}

// letters puts letters of about so many bytes into the first partition.
func (s *stand) letters(sizes ...int) {
	for i, size := range sizes {
		noise := make([]byte, size/2)
		crand.Read(noise)
		s.produce(".dlq", 0, []string{fmt.Sprintf("u 170000000%d %x", i, noise)})
	}
}
