// Another system's events are taken over: of any age, each once, by the rules of every event, beside live ones.

package test

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/event-ingestion/event-ingestion/internal/testkit"
)

// written writes a file into a directory of the test's own.
func written(t *testing.T, name string, content []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestImport: three years of events, plain, as gzip and as zstd, beside live ones. Each is counted once, however often it is imported.
func TestImport(t *testing.T) {
	t.Parallel()
	env := newSpace(t)
	p := startProgram(t, env)
	events := int64(testkit.MoreInTorture(30_000, 200_000))
	const years = 3 * 365 * daySeconds
	now := time.Now().Unix()
	third := func(part int64) (lines []byte) { // in no order
		for i := part; i < events; i += 3 {
			lines = fmt.Appendf(lines, `{"event_name":"imported","user_id":"u%d","timestamp":%d,"channel":"web","campaign_id":"c%d","metadata":{"price":%d}}`+"\n", i%1000, now-60-i*7919%years, i%10, i%100)
		}
		return lines
	}
	files := []string{written(t, "a.ndjson", third(0)), written(t, "b", testkit.Gzipped(third(1))), written(t, "c.zst", testkit.Zstded(third(2)))}
	if out, code := subcommand(t, env, "import -dry-run "+strings.Join(files, " ")); code != 0 || !strings.Contains(out, fmt.Sprint(events, " events would be accepted")) {
		t.Fatalf("dry run: %d %s", code, out)
	}
	mustCount(t, env, "imported", 0)
	l, done := loadInto(t, p.url, 300, time.Hour)
	imported := func(files ...string) {
		t.Helper()
		cmd := command(t, env, append([]string{"import"}, files...)...)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v %s", err, out)
		} else {
			t.Logf("%s", out)
		}
	}
	begun := time.Now()
	imported(files...)
	t.Logf("%d events within %s", events, time.Since(begun).Round(time.Second))
	drained(p)
	mustCount(t, env, "imported", events)
	imported(files[1])
	l.Stop()
	done()
	drained(p)
	mustCount(t, env, "imported", events)
	mustAgree(t, l, p.url)
	if out, code := subcommand(t, env, "audit -from 1"); code != 0 {
		t.Errorf("audit: %d %s", code, out)
	}
	months := clickhouseQuery(t, "SELECT uniqExact(partition), count(), (SELECT uniqExact(toStartOfMonth(timestamp)) FROM "+space(env, "CLICKHOUSE_DATABASE")+".events) FROM system.parts WHERE active AND table = 'events' AND database = '"+space(env, "CLICKHOUSE_DATABASE")+"'")
	t.Logf("partitions, parts and months: %s", months)
}

// TestImportRefusals: every rule but the age; each refusal is counted by its code and written down with its line.
func TestImportRefusals(t *testing.T) {
	t.Parallel()
	env := newSpace(t)
	p := startProgram(t, env)
	now := time.Now().Unix()
	lines := []string{
		fmt.Sprintf("\ufeff"+`{"event_name":"old","user_id":"u","timestamp":%d}`+"\r", now-3*365*daySeconds),
		"",
		`{"event_name":"old","user_id":"u","timestamp":0}`,
		fmt.Sprintf(`{"event_name":"old","user_id":"u","timestamp":%d}`, now+hourSeconds),
		`{"event_name":"old","user_id":"u","timestamp":-5}`,
		`{"event_name":"old","user_id":"u","timestamp":5000000000}`,
		`{"event_name":"old"}`,
		`not json`,
		fmt.Sprintf(`{"event_name":"old","user_id":"u","timestamp":1,"channel":"tv","campaign_id":"%s"}`, strings.Repeat("x", 101)),
		`{"event_name":"` + strings.Repeat("y", 1<<20) + `"}`,
		`{"event_name":"old","user_id":"u","timestamp":1}`,
		`{"event_name":"old","user_id":"last","timestamp":1}`,
	}
	file, refused := written(t, "lines", []byte(strings.Join(lines, "\n"))), filepath.Join(t.TempDir(), "refused")
	out, code := subcommand(t, env, "import -refused "+refused+" "+file)
	for _, want := range []string{"4 events accepted", "2 refused: validation.invalid-format.error", "2 refused: validation.timestamp-future.error", "1 refused: validation.required.error",
		"1 refused: validation.invalid-channel.error", "1 refused: validation.max-length.error"} {
		if code != 1 || !strings.Contains(out, want) {
			t.Errorf("%d, %q is not in\n%s", code, want, out)
		}
	}
	drained(p)
	mustCount(t, env, "old", 4)
	b, err := os.ReadFile(refused)
	if err != nil {
		t.Fatal(err)
	}
	var at []int
	for line := range strings.Lines(string(b)) {
		var r struct {
			File   string
			Line   int
			Errors []struct{ Code, Error string }
			Text   string
		}
		if err := json.Unmarshal([]byte(line), &r); err != nil || r.File != file || len(r.Errors) == 0 || r.Errors[0].Error == "" || r.Line != 10 && r.Text != lines[r.Line-1] {
			t.Errorf("%v %.300s", err, line)
		}
		at = append(at, r.Line)
	}
	if fmt.Sprint(at) != "[4 5 6 7 8 9 10]" {
		t.Errorf("refused are lines %v", at)
	}
	for args, want := range map[string]string{"import": "which FILE", "import /no/such/file": "no such file", "import -dry-run " + written(t, "broken", testkit.Gzipped([]byte("{}"))[:8]): "EOF"} {
		if out, code := subcommand(t, env, args); code == 0 || !strings.Contains(out, want) {
			t.Errorf("%s: %d %s", args, code, out)
		}
	}
	p.terminate()
	if out, code := subcommand(t, env, "import "+file); code != 1 || !strings.Contains(out, "has no members: start the program") {
		t.Errorf("without a program: %d %s", code, out)
	}
}

// TestImportSegment: messages, from standard input. What is not in the file itself is no part of an event: a message without a time is
// refused, because it would be another event each time.
func TestImportSegment(t *testing.T) {
	t.Parallel()
	env := newSpace(t)
	p := startProgram(t, env)
	messages := `{"type":"track","event":"Order Completed","userId":"u1","timestamp":"2023-05-06T07:08:09.5Z","messageId":"m1","properties":{"revenue":5}}
{"type":"page","name":"Home","anonymousId":"a1","originalTimestamp":"2024-05-06T07:08:09Z","messageId":"m2"}
{"type":"identify","userId":"u1","timestamp":"2024-05-06T07:08:09Z"}
{"type":"track","event":"Order Completed","userId":"u1"}
[]
`
	for range 2 {
		cmd := command(t, env, "import", "-segment", "-")
		cmd.Stdin = strings.NewReader(messages)
		out, _ := cmd.CombinedOutput()
		for _, want := range []string{"2 events accepted", "1 refused: validation.required.error", "1 refused: validation.invalid-format.error", "1 messages of kinds that are not stored"} {
			if code := cmd.ProcessState.ExitCode(); code != 1 || !strings.Contains(string(out), want) {
				t.Errorf("%d, %q is not in\n%s", code, want, out)
			}
		}
		drained(p)
		mustCount(t, env, "Order Completed", 1)
		mustCount(t, env, "page", 1)
	}
}
