// Stores that are full: a disk without room under ClickHouse or under Kafka.

package test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/event-ingestion/event-ingestion/internal/testkit"
)

// smallDisk mounts a disk of so many MB under a part, kafka or clickhouse, of a stack of the test's own.
func smallDisk(t *testing.T, part string, megabytes, keepFree int) (s *ownStack, disk string) {
	t.Helper()
	if os.Getenv("DEV_COMMAND") == "" || isCluster() {
		t.Skip("needs the embedded stack")
	}
	t.Parallel()
	dir := t.TempDir()
	disk = filepath.Join(dir, part)
	if err := os.Mkdir(disk, 0o755); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("mount", "-t", "tmpfs", "-o", fmt.Sprintf("size=%dm", megabytes), "tmpfs", disk).CombinedOutput(); err != nil {
		t.Skipf("no small disk can be mounted here, which needs root: %v %s", err, out)
	}
	t.Cleanup(func() {
		if out, err := exec.Command("umount", "-l", disk).CombinedOutput(); err != nil {
			t.Errorf("umount: %v %s", err, out)
		}
	})
	return startOwnStack(t, "-data", dir, "-keep-free", fmt.Sprint(keepFree)), disk
}

// fill takes all of the disk for a time, gives some MB back now and then and takes them again: what is being written then
// is cut off.
func fill(t *testing.T, disk string, d time.Duration) {
	t.Helper()
	path := filepath.Join(disk, "filler")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer os.Remove(path)
	defer f.Close()
	size := int64(0)
	chunk := make([]byte, 4<<20)
	for end := time.Now().Add(d); time.Now().Before(end); {
		for _, piece := range [][]byte{chunk, chunk[:4<<10]} { // to the last page
			for err = nil; err == nil; {
				var n int
				n, err = f.WriteAt(piece, size)
				size += int64(n)
			}
			if !errors.Is(err, syscall.ENOSPC) {
				t.Fatal(err)
			}
		}
		time.Sleep(100 * time.Millisecond) // the fault itself, as is the next one
		size = max(0, size-8<<20)
		if err := f.Truncate(size); err != nil {
			t.Fatal(err)
		}
		time.Sleep(rand.N(20 * time.Millisecond))
	}
}

// TestDiskFullKafka: the brokers cannot write for some seconds. What cannot be kept is refused, what was acknowledged is
// there after a kill of the whole stack.
func TestDiskFullKafka(t *testing.T) {
	s, disk := smallDisk(t, "kafka", 200, 100)
	env := faultSpace(t, "ACK_TIMEOUT=1s")
	p := startProgram(t, env)
	l, done := loadInto(t, p.url, 1500, time.Hour)
	for range testkit.TortureFactor() {
		target := l.OK.Load() + 1500
		p.await("under load", time.Minute, func() bool { return l.OK.Load() > target })
		before := l.Retried.Load()
		for n := 0; l.Retried.Load() == before; n++ {
			if n == 20 {
				t.Fatal("nothing was refused")
			}
			fill(t, disk, 3*time.Second)
		}
	}
	target := l.OK.Load() + 1500
	p.await("under load again", time.Minute, func() bool { return l.OK.Load() > target })
	l.Stop()
	done()
	l.Forgive() // 503 to the end is an honest answer
	p.cmd.Process.Kill()
	p.cmd.Wait()
	s.killAndRestart()
	mustHold(startProgram(t, env), l)
}

// TestDiskFullClickHouse: another process fills ClickHouse's disk to the last byte and frees it, merges go on. Inserts fail
// and are repeated, and no part is left whose files are empty. DISK_KEEP_FREE=0 counts how many are without the room that
// is kept free, and mends after each.
func TestDiskFullClickHouse(t *testing.T) {
	keepFree := 100
	fmt.Sscan(os.Getenv("DISK_KEEP_FREE"), &keepFree)
	_, disk := smallDisk(t, "clickhouse", 600, keepFree)
	env := newSpace(t)
	db := space(env, "CLICKHOUSE_DATABASE")
	p := startProgram(t, env)
	l, done := loadInto(t, p.url, 2000, time.Hour)
	fills, broken, noticed := 1, 0, 0
	if testkit.TortureFactor() > 1 {
		fills = 5 * testkit.TortureFactor()
	}
	refused := func() bool { return strings.Contains(p.log.String(), "NOT_ENOUGH_SPACE") }
	for n := 0; n < fills || !refused() && n < fills+5; n++ { // a consumer that starts over may miss one
		target := l.OK.Load() + 1000
		p.await("under load", time.Minute, func() bool { return l.OK.Load() > target })
		fill(t, disk, time.Duration(500+rand.IntN(2500))*time.Millisecond)
		if list := emptyParts(t, db); len(list) > 0 || strings.Count(p.log.String(), "has a broken part") > noticed {
			noticed = strings.Count(p.log.String(), "has a broken part")
			t.Log("empty:", list, "noticed so far:", noticed)
			broken++
			for _, table := range []string{"events", "events_hourly"} {
				clickhouseQuery(t, "DETACH TABLE IF EXISTS "+db+"."+table+" SYNC")
				clickhouseQuery(t, "ATTACH TABLE IF NOT EXISTS "+db+"."+table)
			}
		}
		drained(p)
	}
	l.Stop()
	done()
	t.Logf("%d MB kept free: %d of %d fills left parts with empty files", keepFree, broken, fills)
	if broken > 0 && keepFree > 0 {
		t.Error("parts were broken")
	}
	if !refused() {
		t.Error("no insert failed for want of space")
	}
	mustHold(p, l)
}

// emptyParts are the directories of the live parts that have rows and an empty file for them.
func emptyParts(t *testing.T, db string) (list []string) {
	t.Helper()
	for path := range strings.SplitSeq(clickhouseQuery(t, "SELECT path FROM system.parts WHERE active AND rows > 0 AND database = '"+db+"'"), "\n") {
		if info, err := os.Stat(filepath.Join(path, "data.bin")); err == nil && info.Size() == 0 {
			list = append(list, path)
		}
	}
	return list
}
