// A full disk, under ClickHouse or under Kafka, and tables that refuse every row for some seconds.

package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// ownStack is an embedded stack of a test's own, of which one part has a small disk.
type ownStack struct {
	t      *testing.T
	args   []string
	disk   string // where the small disk is mounted
	cmd    *exec.Cmd
	ending io.Closer // its command's stdin
	log    *logBuffer
}

// startOwnStack mounts a disk of so many MB under a part, kafka or clickhouse, and lets the environment of this process
// point to the stack until the test ends.
func startOwnStack(t *testing.T, part string, megabytes, keepFree int) *ownStack {
	t.Helper()
	if os.Getenv("DEV_COMMAND") == "" || isCluster() {
		t.Skip("needs the embedded stack")
	}
	dir := t.TempDir()
	s := &ownStack{t: t, disk: filepath.Join(dir, part), log: new(logBuffer)}
	if err := os.Mkdir(s.disk, 0o755); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("mount", "-t", "tmpfs", "-o", fmt.Sprintf("size=%dm", megabytes), "tmpfs", s.disk).CombinedOutput(); err != nil {
		t.Skipf("no small disk can be mounted here, which needs root: %v %s", err, out)
	}
	t.Cleanup(func() {
		if out, err := exec.Command("umount", "-l", s.disk).CombinedOutput(); err != nil {
			t.Errorf("umount: %v %s", err, out)
		}
	})
	brokers, native, http := stackPort(t)+","+stackPort(t), stackPort(t), stackPort(t)
	s.args = []string{"-data", dir, "-kafka-ports", brokers, "-clickhouse-port", native, "-clickhouse-http-port", http,
		"-keep-free", fmt.Sprint(keepFree), "--", "sh", "-c", `echo "$KAFKA_BROKERS $DEV_CONTROL"; read end`}
	t.Setenv("CLICKHOUSE_PORT", native)
	t.Setenv("CLICKHOUSE_HTTP_PORT", http)
	s.start()
	t.Cleanup(func() {
		s.ending.Close()
		s.cmd.Wait()
		if t.Failed() {
			t.Logf("log of the test's own stack:\n%.4000s", s.log)
		}
	})
	return s
}

// start runs the stack and waits until it answers. It ends with its stdin, and so with this process.
func (s *ownStack) start() {
	s.t.Helper()
	s.cmd = exec.Command(os.Getenv("DEV_COMMAND"), s.args...)
	s.cmd.Stderr = s.log
	stdin, err := s.cmd.StdinPipe()
	if err != nil {
		s.t.Fatal(err)
	}
	stdout, err := s.cmd.StdoutPipe()
	if err != nil {
		s.t.Fatal(err)
	}
	if err := s.cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	s.ending = stdin
	line, err := bufio.NewReader(stdout).ReadString('\n')
	brokers, control, ok := strings.Cut(strings.TrimSpace(line), " ")
	if err != nil || !ok {
		s.t.Fatalf("the stack does not start: %q %v", line, err)
	}
	s.t.Setenv("KAFKA_BROKERS", brokers)
	s.t.Setenv("DEV_CONTROL", control)
}

// killAndRestart ends the whole stack with -9.
func (s *ownStack) killAndRestart() {
	s.t.Helper()
	s.cmd.Process.Kill()
	s.cmd.Wait()
	s.ending.Close()
	s.start()
}

// stackPort is a free port from below the kernels' own ranges: an outgoing connection must not take it while a part of the
// stack is down.
func stackPort(t *testing.T) string {
	t.Helper()
	for range 100 {
		port := fmt.Sprint(20000 + rand.IntN(12000))
		if l, err := net.Listen("tcp", "127.0.0.1:"+port); err == nil {
			l.Close()
			return port
		}
	}
	t.Fatal("no free port")
	return ""
}

// fill takes all of the disk for a time, gives some MB back now and then and takes them again: what is being written then
// is cut off.
func (s *ownStack) fill(d time.Duration) {
	s.t.Helper()
	path := filepath.Join(s.disk, "filler")
	f, err := os.Create(path)
	if err != nil {
		s.t.Fatal(err)
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
				s.t.Fatal(err)
			}
		}
		time.Sleep(100 * time.Millisecond) // the fault itself, as is the next one
		size = max(0, size-8<<20)
		if err := f.Truncate(size); err != nil {
			s.t.Fatal(err)
		}
		time.Sleep(rand.N(20 * time.Millisecond))
	}
}

// TestDiskFullKafka: the brokers cannot write for some seconds. What cannot be kept is refused, what was acknowledged is
// there after a kill of the whole stack.
func TestDiskFullKafka(t *testing.T) {
	s := startOwnStack(t, "kafka", 200, 100)
	env := faultSpace(t, "ACK_TIMEOUT=1s")
	p := startProgram(t, env)
	l, done := loadInto(t, p.url, 3000, time.Hour)
	for range tortureFactor() {
		target := l.ok.Load() + 3000
		p.await("under load", time.Minute, func() bool { return l.ok.Load() > target })
		before := l.retried.Load()
		s.fill(3 * time.Second)
		if l.retried.Load() == before {
			t.Error("nothing was refused")
		}
	}
	target := l.ok.Load() + 3000
	p.await("under load again", time.Minute, func() bool { return l.ok.Load() > target })
	l.stop()
	done()
	l.refused, l.examples = map[string]int{}, nil // 503 to the end is an honest answer
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
	s := startOwnStack(t, "clickhouse", 600, keepFree)
	env := newSpace(t)
	db := space(env, "CLICKHOUSE_DATABASE")
	p := startProgram(t, env)
	l, done := loadInto(t, p.url, 5000, time.Hour)
	fills, broken, noticed := 1, 0, 0
	if tortureFactor() > 1 {
		fills = 5 * tortureFactor()
	}
	for range fills {
		target := l.ok.Load() + 2000
		p.await("under load", time.Minute, func() bool { return l.ok.Load() > target })
		s.fill(time.Duration(500+rand.IntN(2500)) * time.Millisecond)
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
	l.stop()
	done()
	t.Logf("%d MB kept free: %d of %d fills left parts with empty files", keepFree, broken, fills)
	if broken > 0 && keepFree > 0 {
		t.Error("parts were broken")
	}
	if !strings.Contains(p.log.String(), "NOT_ENOUGH_SPACE") {
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

// TestRefusedForSeconds: ClickHouse refuses each insert for some seconds, and then takes them again.
func TestRefusedForSeconds(t *testing.T) {
	for code, fault := range map[string]struct{ begin, end string }{
		"TOO_MANY_PARTS": {"ALTER TABLE %s.events MODIFY SETTING parts_to_delay_insert = 1, parts_to_throw_insert = 1",
			"ALTER TABLE %s.events MODIFY SETTING parts_to_delay_insert = 100000, parts_to_throw_insert = 100000"},
		"UNKNOWN_TABLE": {"RENAME TABLE %[1]s.events TO %[1]s.away", "RENAME TABLE %[1]s.away TO %[1]s.events"},
	} {
		t.Run(code, func(t *testing.T) {
			t.Parallel()
			env := faultSpace(t)
			p := startProgram(t, env)
			l, done := loadInto(t, p.url, 3000, time.Hour)
			for range tortureFactor() {
				target := l.ok.Load() + 2000
				p.await("under load", 20*time.Second, func() bool { return l.ok.Load() > target })
				clickhouseQuery(t, fmt.Sprintf(fault.begin, space(env, "CLICKHOUSE_DATABASE")))
				p.await("refused", 10*time.Second, func() bool { return strings.Contains(p.log.String(), code) })
				time.Sleep(2 * time.Second) // the fault itself
				clickhouseQuery(t, fmt.Sprintf(fault.end, space(env, "CLICKHOUSE_DATABASE")))
				drained(p)
			}
			l.stop()
			done()
			mustHold(p, l)
		})
	}
}
