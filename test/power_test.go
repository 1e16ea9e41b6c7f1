// Power cuts: what was not flushed to the disk is gone, under the brokers and under ClickHouse at once. The disk is a real block
// device with a real file system (dev/disk_linux.go), and dies with the stack.

package test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/event-ingestion/event-ingestion/internal/testkit"
)

// noDisk says why this machine has no disk that forgets: empty when it has one.
var noDisk = sync.OnceValue(func() string {
	out, err := exec.Command(os.Getenv("DEV_COMMAND"), "-ephemeral", "-disk", "512", "--", "true").CombinedOutput()
	if err != nil {
		return string(out)
	}
	return ""
})

// kafkaKeeps has the brokers keep what they have acknowledged, as replicas do whose machines do not all go dark at once.
const kafkaKeeps = "-kafka-fsync"

// onForgettingDisk starts a stack on a disk that forgets.
func onForgettingDisk(t *testing.T, more ...string) *ownStack {
	t.Helper()
	if os.Getenv("DEV_COMMAND") == "" || isCluster() {
		t.Skip("needs the embedded stack")
	}
	t.Parallel()
	switch why := noDisk(); {
	case strings.Contains(why, "no disk that forgets"):
		t.Skip(why)
	case why != "":
		t.Fatal(why)
	}
	return startOwnStack(t, append([]string{"-data", t.TempDir(), "-disk", "3000", "-keep-free", "100"}, more...)...)
}

// underPowerCuts cuts the power of the stack some times while events come in, and that of the program unless it survives. When the
// stack is there again, afterwards is called with how many rows were stored just before, and then the program is started. In the end
// everything that was acknowledged is stored, once, in both tables.
func underPowerCuts(t *testing.T, s *ownStack, env []string, survives func() bool, afterwards func(cut time.Time, stored int64)) {
	p := startProgram(t, env)
	l, done := loadInto(t, p.url, 1000, time.Hour)
	cuts := testkit.MoreInTorture(2, 4)
	for n := range cuts {
		if n > 0 && rand.IntN(2) == 0 {
			drained(p) // else what the last cut took is lost again on its way back
		}
		// Up to some seconds: a journal is committed every 5 s, and then new files are there, and empty.
		before, events := l.OK.Load(), 500+rand.Int64N(8000*int64(min(testkit.TortureFactor(), 3)))
		half, target := before+rand.Int64N(events), before+events
		p.await("under load", 2*time.Minute, func() bool { return l.OK.Load() >= half })
		if n > 0 && rand.IntN(2) == 0 {
			writeBack(t, s)
		}
		p.await("under load", 2*time.Minute, func() bool { return l.OK.Load() >= target })
		if n == 0 {
			drained(p) // so that there is something to lose
		}
		stored := countEvents(t, env)
		lives := survives()
		if !lives {
			p.cmd.Process.Kill()
			p.cmd.Wait()
		}
		cut := time.Now()
		s.killAndRestart()
		afterwards(cut, stored)
		if !lives {
			p = startBinary(t, p.binary, p.env)
		}
	}
	l.Stop()
	done()
	mustHold(p, l)
	t.Logf("%d cuts, %d accepted, %d distinct: all are stored, once", cuts, l.OK.Load(), l.Distinct())
}

// writeBack has the disk take everything that was written so far, as half a minute would.
func writeBack(t *testing.T, s *ownStack) {
	t.Helper()
	mounted := fmt.Sprintf("/proc/%d/root%s/mounted", s.cmd.Process.Pid, s.args[1]) // dev's mounts are its own
	if out, err := exec.Command("sync", "-f", mounted).CombinedOutput(); err != nil {
		t.Fatalf("sync: %v %s", err, out)
	}
}

// powerSpace has fewer partitions: these brokers flush them one after the other.
func powerSpace(t *testing.T, fsync bool) []string {
	t.Helper()
	return newSpace(t, "KAFKA_PARTITIONS=4", "CLICKHOUSE_FSYNC="+strconv.FormatBool(fsync))
}

// TestPowerCutFsync: with CLICKHOUSE_FSYNC a power cut takes nothing, whether the program dies with the stores or not. Nobody has to
// do anything but start what does not run.
func TestPowerCutFsync(t *testing.T) {
	s := onForgettingDisk(t, kafkaKeeps)
	env := powerSpace(t, true)
	lives := false
	survives := func() bool { lives = rand.IntN(3) == 0; return lives }
	underPowerCuts(t, s, env, survives, func(time.Time, int64) {
		if lives {
			return
		}
		if missing, unread, _ := stoppedAudit(t, env); missing != unread {
			t.Errorf("%d committed events are gone", missing-unread)
		}
	})
}

// TestPowerCutRewind: without it, what was committed on Kafka is missing in ClickHouse. What deploy/README.md says brings it back.
func TestPowerCutRewind(t *testing.T) {
	s := onForgettingDisk(t, kafkaKeeps)
	env := powerSpace(t, false)
	taken, lost := int64(0), int64(0)
	var to time.Time // of later rewinds as well: what the first one brings back is stored late, and may be lost again
	underPowerCuts(t, s, env, func() bool { return false }, func(cut time.Time, stored int64) {
		broken := clickhouseQuery(t, "SELECT count() FROM system.detached_parts WHERE database = '"+space(env, "CLICKHOUSE_DATABASE")+"'")
		missing, unread, rows := stoppedAudit(t, env)
		taken, lost = taken+max(0, stored-rows), lost+missing-unread
		if to.IsZero() {
			to = cut.Add(-time.Minute)
		}
		out, code := subcommand(t, env, "rewind -to "+to.UTC().Format(time.RFC3339))
		if code != 0 {
			t.Fatal(code, out)
		}
		t.Logf("of %d rows %d are left; %d committed events are gone, %d were not read yet; %s parts are put aside; %s",
			stored, rows, missing-unread, unread, broken, lastLine(out))
	})
	t.Logf("%d rows and %d committed events were gone, and came back", taken, lost)
	if taken == 0 {
		t.Error("the cuts took nothing")
	}
}

// TestPowerCutOfAllBrokers: Kafka acknowledges what is in the page caches of its replicas. When all of them lose their power at once,
// events are gone that nobody else has. After a rewind what Kafka has left is stored, once, in both tables, and so is what comes then.
func TestPowerCutOfAllBrokers(t *testing.T) {
	s := onForgettingDisk(t)
	env := powerSpace(t, true)
	db := space(env, "CLICKHOUSE_DATABASE")
	p := startProgram(t, env)
	acknowledged, gone := 0, 0
	cuts := testkit.MoreInTorture(2, 4)
	for n := range cuts {
		name := fmt.Sprint("dark", n)
		now := time.Now().Unix()
		bodies := numbered(name, 2000+rand.IntN(20_000), 100, func(int) int64 { return now })
		postAll(t, p, bodies)
		p.cmd.Process.Kill()
		p.cmd.Wait()
		to := time.Now().Add(-time.Minute).UTC().Format(time.RFC3339)
		s.killAndRestart()
		if out, code := subcommand(t, env, "rewind -to "+to); code != 0 {
			t.Fatal(code, out)
		}
		p = startBinary(t, p.binary, p.env)
		postAll(t, p, numbered(name+" after", 1000, 100, func(int) int64 { return now }))
		drained(p)
		mustCount(t, env, name+" after", 1000)
		kept, _ := strconv.Atoi(clickhouseQuery(t, "SELECT count() FROM "+db+".events WHERE event_name = '"+name+"'"))
		mustCount(t, env, name, int64(kept))
		if out, code := subcommand(t, env, "audit"); code != 0 {
			t.Error(code, out)
		}
		sent := 0
		for _, body := range bodies {
			sent += bytes.Count(body, []byte("\n"))
		}
		acknowledged, gone = acknowledged+sent, gone+sent-kept
	}
	t.Logf("%d cuts, %d acknowledged before them, %d of these gone for good", cuts, acknowledged, gone)
}

// countEvents is how many rows there are.
func countEvents(t *testing.T, env []string) (rows int64) {
	t.Helper()
	fmt.Sscan(clickhouseQuery(t, "SELECT count() FROM "+space(env, "CLICKHOUSE_DATABASE")+".events"), &rows)
	return rows
}

func lastLine(s string) string {
	s = strings.TrimSpace(s)
	return s[strings.LastIndexByte(s, '\n')+1:]
}

// stoppedAudit says, while no instance is at work, how many events are missing in ClickHouse, how many of these have not been read
// yet, and how many rows there are.
func stoppedAudit(t *testing.T, env []string) (missing, unread, rows int64) {
	t.Helper()
	var a struct {
		Difference, Unread int64
		Rows               int64 `json:"distinct_rows"`
	}
	out, code := subcommand(t, env, "audit -json")
	if err := json.Unmarshal([]byte(out), &a); err != nil || code > 1 {
		t.Fatal(code, out)
	}
	return a.Difference, a.Unread, a.Rows
}
