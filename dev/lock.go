// One dev a data directory: the lock on it, and `dev stop`, which ends the one that holds the lock.
//
// The kernel drops the lock with its holder, however that ends. The pid in the file is only for people and for stop: it
// means nothing while nobody holds the lock.

package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"time"
)

const (
	// stopTimeout is how long `dev stop` waits: graceTimeout and the stop of ClickHouse and the brokers.
	stopTimeout = 10 * time.Second
	// lockPatience outlasts the moment for which `dev stop` holds the lock to see whether it is free.
	lockPatience = 300 * time.Millisecond
	lockPoll     = 50 * time.Millisecond
	// abandonedAfter is ample for the moment between the making of a temporary directory and its lock.
	abandonedAfter = time.Minute
)

// dataLock keeps a second dev out of a data directory.
type dataLock struct{ f *os.File }

func lockData(dir string) (*dataLock, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(filepath.Join(dir, "dev.lock"), os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return nil, err
	}
	for deadline := time.Now().Add(lockPatience); ; time.Sleep(lockPoll) {
		if locked, err := tryLock(f); err != nil {
			f.Close()
			return nil, fmt.Errorf("lock %s: %w", f.Name(), err)
		} else if locked {
			break
		}
		if time.Now().After(deadline) {
			defer f.Close()
			return nil, fmt.Errorf("%s is in use by another dev, pid %d: `make stop` or `dev -data %s stop` ends it", dir, readPid(f), dir)
		}
	}
	f.Truncate(0)
	if _, err := f.WriteAt(strconv.AppendInt(nil, int64(os.Getpid()), 10), 0); err != nil {
		f.Close()
		return nil, err
	}
	return &dataLock{f}, nil
}

func (l *dataLock) release() {
	l.f.Truncate(0)
	l.f.Close()
}

// tryLock reports whether f is locked now; the lock goes with the file.
func tryLock(f *os.File) (bool, error) {
	err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
	if errors.Is(err, syscall.EWOULDBLOCK) {
		return false, nil
	}
	return err == nil, err
}

// removeAbandoned removes the temporary data of devs that were killed: directories that are not locked and old enough to
// have been locked.
func removeAbandoned(parent string) {
	dirs, _ := filepath.Glob(filepath.Join(parent, temporaryPrefix+"*"))
	for _, dir := range dirs {
		info, err := os.Stat(dir)
		if err != nil || time.Since(info.ModTime()) < abandonedAfter {
			continue
		}
		f, err := os.OpenFile(filepath.Join(dir, "dev.lock"), os.O_RDWR, 0)
		if err != nil {
			continue
		}
		if locked, _ := tryLock(f); locked {
			os.RemoveAll(dir)
		}
		f.Close()
	}
}

// readPid returns 0 when there is none.
func readPid(f *os.File) int {
	b := make([]byte, 20)
	n, _ := f.ReadAt(b, 0)
	pid, _ := strconv.Atoi(string(bytes.TrimSpace(b[:n])))
	return pid
}

// stopOther ends the dev that holds the lock of dir, waits until it is gone, and returns the exit code.
func stopOther(dir string) int {
	f, err := os.OpenFile(filepath.Join(dir, "dev.lock"), os.O_RDWR, 0)
	if errors.Is(err, os.ErrNotExist) {
		progress("nothing is running on %s", dir)
		return 0
	}
	if err != nil {
		progress("%v", err)
		return 1
	}
	defer f.Close()
	signalled, seen := 0, 0
	for deadline := time.Now().Add(stopTimeout); time.Now().Before(deadline); time.Sleep(lockPoll) {
		locked, err := tryLock(f)
		switch {
		case err != nil:
			progress("lock %s: %v", f.Name(), err)
			return 1
		case locked && signalled == 0:
			progress("nothing is running on %s", dir)
			return 0
		case locked:
			progress("stopped, pid %d", signalled)
			return 0
		}
		// A dev that has just taken the lock has not written its pid yet, and the one in the file may belong to
		// anybody by now: believe it when it is still there a moment later.
		pid := readPid(f)
		if signalled == 0 && pid > 0 && pid == seen {
			if err := syscall.Kill(pid, syscall.SIGTERM); err != nil {
				progress("signal pid %d: %v", pid, err)
				return 1
			}
			signalled = pid
		}
		seen = pid
	}
	progress("pid %d has not ended within %s: `kill -9 %[1]d` ends it hard, without loss of what was acknowledged", readPid(f), stopTimeout)
	return 1
}
