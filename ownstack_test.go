// Stacks of a test's own: a test that takes a part away does so where nobody else misses it, and beside the others.

package main

import (
	"bufio"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
)

// stacks holds the stacks that tests have for themselves, by the test's name; nil is the shared one while nobody else uses it.
var stacks sync.Map // string to *ownStack

// ownStack is an embedded stack that one test may break.
type ownStack struct {
	t      testing.TB
	args   []string // of dev
	env    []string // what dev tells its command
	cmd    *exec.Cmd
	ending io.Closer // its command's stdin
	log    *logBuffer
}

// alone lets the test run beside others with a stack of its own. On a real cluster, of which there is only one, the test
// has to itself what all share: it is not parallel there. more are flags of dev.
func alone(t *testing.T, more ...string) {
	t.Helper()
	if os.Getenv("DEV_COMMAND") == "" || isCluster() {
		stacks.Store(t.Name(), (*ownStack)(nil))
		return
	}
	t.Parallel()
	startOwnStack(t, append([]string{"-data", t.TempDir()}, more...)...)
}

// startOwnStack starts a stack, which ends with the test or with this process. Everything that the test asks of the stack
// (newSpace, clickhouseQuery, control) is then asked of this one.
func startOwnStack(t testing.TB, args ...string) *ownStack {
	t.Helper()
	s := &ownStack{t: t, log: new(logBuffer)}
	s.args = append(args, "-kafka-ports", stackPort(t)+","+stackPort(t), "-clickhouse-port", stackPort(t), "-clickhouse-http-port", stackPort(t),
		"--", "sh", "-c", "env; echo; read end")
	s.start()
	stacks.Store(t.Name(), s)
	t.Cleanup(func() {
		stacks.Delete(t.Name())
		s.ending.Close()
		s.cmd.Wait()
		if t.Failed() {
			t.Logf("log of the test's own stack:\n%.4000s", s.log)
		}
	})
	return s
}

// start runs the stack and waits until it answers.
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
	s.ending, s.env = stdin, nil
	for lines := bufio.NewScanner(stdout); lines.Scan() && lines.Text() != ""; {
		s.env = append(s.env, lines.Text())
	}
	if space(s.env, "DEV_CONTROL") == "" {
		s.t.Fatalf("the stack does not start:\n%s", s.log)
	}
}

// stackOf is the stack that the test, or the one that it is a part of, has for itself.
func stackOf(t testing.TB) (own *ownStack, is bool) {
	for test := t.Name(); ; test = test[:strings.LastIndexByte(test, '/')] {
		if s, is := stacks.Load(test); is {
			return s.(*ownStack), true
		}
		if !strings.Contains(test, "/") {
			return nil, false
		}
	}
}

func init() {
	stackEnv = func(t testing.TB, name string) string {
		if own, _ := stackOf(t); own != nil {
			return space(own.env, name)
		}
		return os.Getenv(name)
	}
}

// portsGiven counts what stackPort has tried, from a place of this process's own: no port is given twice.
var portsGiven atomic.Int64

var firstPort = rand.Int64N(4000)

// stackPort is a free port, and so are the two behind it, which a stack of three shards takes. They are from below the kernels'
// own ranges: an outgoing connection must not take one while a part of the stack is down.
func stackPort(t testing.TB) string {
	t.Helper()
	for range 100 {
		port, free := 20000+(firstPort+portsGiven.Add(1))%4000*3, 0
		for i := range int64(3) {
			if l, err := net.Listen("tcp", fmt.Sprint("127.0.0.1:", port+i)); err == nil {
				l.Close()
				free++
			}
		}
		if free == 3 {
			return fmt.Sprint(port)
		}
	}
	t.Fatal("no free port")
	return ""
}
