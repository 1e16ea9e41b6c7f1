// Instances that come and go, sleep, or have nothing to do.

package test

import (
	"net/http"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/event-ingestion/event-ingestion/internal/testkit"
)

// TestInstancesComeAndGo: partitions move under load, back and forth, and every event is stored once.
func TestInstancesComeAndGo(t *testing.T) {
	t.Parallel()
	comeAndGo(t, faultSpace(t))
}

func comeAndGo(t *testing.T, env []string) {
	first := startProgram(t, env)
	l, done := loadInto(t, first.url, 2000, time.Hour)
	for range 2 {
		second := startProgram(t, env)
		target := l.OK.Load() + 2000
		second.await("shared", 30*time.Second, func() bool { return l.OK.Load() > target })
		second.terminate()
	}
	l.Stop()
	done()
	mustHold(first, l)
}

// TestPausedInstance: an instance sleeps beyond its session and wakes up with blocks that somebody else has stored meanwhile, or
// in the middle of an insert that somebody else waits for.
func TestPausedInstance(t *testing.T) {
	t.Parallel()
	env := faultSpace(t)
	first := startProgram(t, env)
	second := startProgram(t, env)
	l, done := loadInto(t, first.url, 1500, time.Hour)
	for range testkit.MoreInTorture(4, 5) {
		target := l.OK.Load() + 1000
		first.await("under load", 20*time.Second, func() bool { return l.OK.Load() > target })
		second.cmd.Process.Signal(syscall.SIGSTOP)
		time.Sleep(2500 * time.Millisecond) // beyond KAFKA_SESSION_TIMEOUT: the fault itself
		second.cmd.Process.Signal(syscall.SIGCONT)
		second.await("back", 20*time.Second, func() bool { return second.status("/ready") == http.StatusOK })
	}
	l.Stop()
	done()
	mustHold(first, l)
}

// TestSpareInstance: an instance beyond the number of partitions has nothing to consume, and serves all the same.
func TestSpareInstance(t *testing.T) {
	t.Parallel()
	env := newSpace(t, "KAFKA_PARTITIONS=1")
	first := startProgram(t, env)
	spare := startProgram(t, env) // and is ready
	if status, _, answer := spare.do("POST", onePath, jsonCT, "", testkit.FreshEvent("spare")); status != http.StatusAccepted {
		t.Fatal(status, answer)
	}
	drained(first)
	first.terminate()
	spare.await("everything is its own", 30*time.Second, func() bool { return strings.Contains(spare.log.String(), "all=1") })
}
