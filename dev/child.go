// Children: CMD and ClickHouse, each in a process group of its own that does not outlive dev.
//
// A group begins with a guard, which is this program again. The guard waits on a pipe whose other end only dev has:
// when dev ends without a word (kill -9) the pipe ends, and the guard kills the group, with everything that the child
// has started in it. Linux kills the child itself even before that (child_linux.go).
//
// child.go owns groups, and what children say on stderr.

package main

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"sync"
	"syscall"
)

// guardCommand is the hidden subcommand under which dev starts itself as a guard.
const guardCommand = "guard-a-process-group"

// group is a running child, its guard, and whatever the child has started.
type group struct {
	cmd   *exec.Cmd
	guard *exec.Cmd // leads the group: the group's id is its pid, taken until it has been waited for

	mu    sync.Mutex // guards ended
	ended bool       // the id may belong to others
}

// startGroup starts cmd in a new group; wait has to follow. Call it on a thread that lives as long as the child may.
func startGroup(cmd *exec.Cmd) (*group, error) {
	guard, err := selfCommand(guardCommand)
	if err != nil {
		return nil, err
	}
	guard.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if _, err := guard.StdinPipe(); err != nil { // closed by Wait, or with dev
		return nil, err
	}
	if err := guard.Start(); err != nil {
		return nil, fmt.Errorf("start a guard: %w", err)
	}
	cmd.SysProcAttr = childAttr(guard.Process.Pid)
	if err := cmd.Start(); err != nil {
		guard.Process.Kill()
		guard.Wait()
		return nil, err
	}
	return &group{cmd: cmd, guard: guard}, nil
}

// selfCommand is this program with other arguments.
func selfCommand(args ...string) (*exec.Cmd, error) {
	path, err := selfPath()
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(path, args...)
	cmd.Args[0] = os.Args[0] // for the eyes of ps
	return cmd, nil
}

// wait waits for the child, kills what it has left behind in the group, and returns exec.Cmd.Wait's error.
func (g *group) wait() error {
	err := g.cmd.Wait()
	g.mu.Lock()
	g.ended = true
	syscall.Kill(-g.guard.Process.Pid, syscall.SIGKILL)
	g.mu.Unlock()
	g.guard.Wait()
	return err
}

// signal sends s to every process of the group; the guard takes notice of SIGKILL only.
func (g *group) signal(s syscall.Signal) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.ended {
		return os.ErrProcessDone
	}
	return syscall.Kill(-g.guard.Process.Pid, s)
}

// runGuard is the guard.
func runGuard() int {
	if syscall.Getpgrp() != os.Getpid() {
		return 2 // started by hand: the group is somebody else's
	}
	signal.Ignore(os.Interrupt, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT)
	io.Copy(io.Discard, os.Stdin)
	syscall.Kill(0, syscall.SIGKILL) // the whole group, the guard too
	return 1
}

// stderrWatch puts a child's stderr into its log, but for what ClickHouse itself logs there: only that it gives up.
type stderrWatch struct {
	path  string
	fatal func() // called once
	once  sync.Once
}

func (w *stderrWatch) Write(p []byte) (int, error) {
	if bytes.Contains(p, []byte("<Fatal>")) {
		w.once.Do(w.fatal)
		return len(p), nil
	}
	if f, err := os.OpenFile(w.path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644); err == nil {
		f.Write(p)
		f.Close()
	}
	return len(p), nil
}

// tail returns the last lines of a log.
func tail(path string) string {
	const most = 800 // bytes
	b, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	if len(b) > most {
		b = b[len(b)-most:]
	}
	return strings.TrimSpace(string(b))
}
