// ClickHouse as a supervised child: started again when it dies, ended with dev.
//
// The child is clickhouse-local, told to listen: either the binary, or this program again with libchdb loaded. It has
// to be a process of its own, because the library needs the main thread and ends its process on a failed login.

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"github.com/ebitengine/purego"
)

// clickhouseCommand is the hidden subcommand under which dev starts itself as ClickHouse.
const clickhouseCommand = "clickhouse-child"

// listenForever makes clickhouse-local a server: the last query never ends and costs a wake-up a second.
const listenForever = "SYSTEM START LISTEN TCP; SYSTEM START LISTEN HTTP; " +
	"SELECT sleepEachRow(1) FROM system.numbers FORMAT Null SETTINGS max_block_size = 1, max_execution_time = 0"

// maxRestartPause bounds the pause before a ClickHouse that keeps dying is started again.
const maxRestartPause = 5 * time.Second

// clickhouse is the supervised server.
type clickhouse struct {
	engine               engine
	dir                  string
	nativePort, httpPort int
	version              string

	mu      sync.Mutex // guards what follows
	cmd     *exec.Cmd  // nil while it is down
	alive   *os.File   // our end of the pipe whose end the child notices
	ended   chan struct{}
	wanted  bool // the supervisor brings it back
	asked   bool // its end was asked for: no reason to wait before the next start
	stopped bool // for good
}

// start runs the child and its supervisor and waits until it answers.
func (c *clickhouse) start(ctx context.Context) error {
	if err := os.MkdirAll(c.dir, 0o755); err != nil {
		return err
	}
	c.mu.Lock()
	c.wanted = true
	err := c.spawn()
	c.mu.Unlock()
	if err != nil {
		return fmt.Errorf("start ClickHouse: %w", err)
	}
	go c.supervise() // ends with stop
	if err := c.waitReady(ctx, readyTimeout); err != nil {
		c.stop()
		return fmt.Errorf("ClickHouse does not answer, see %s: %w", c.logPath(), err)
	}
	return nil
}

func (c *clickhouse) logPath() string { return filepath.Join(filepath.Dir(c.dir), "clickhouse.log") }

// spawn starts the child, under mu.
func (c *clickhouse) spawn() error {
	log, err := os.OpenFile(c.logPath(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer log.Close()
	read, write, err := os.Pipe()
	if err != nil {
		return err
	}
	defer read.Close()
	args := []string{"--path", c.dir, "--listen_host", "127.0.0.1",
		"--tcp_port", strconv.Itoa(c.nativePort), "--http_port", strconv.Itoa(c.httpPort), "--query", listenForever}
	path := c.engine.binary
	if path != "" {
		args = append([]string{"local"}, args...)
	} else {
		if path, err = os.Executable(); err != nil {
			return err
		}
		args = append([]string{clickhouseCommand, c.engine.library, "clickhouse"}, args...)
	}
	cmd := exec.Command(path, args...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.ExtraFiles = []*os.File{read}
	cmd.SysProcAttr = childAttr()
	if err := cmd.Start(); err != nil {
		write.Close()
		return err
	}
	c.cmd, c.alive, c.ended = cmd, write, make(chan struct{})
	return nil
}

// supervise waits for the child and brings it back while it is wanted.
func (c *clickhouse) supervise() {
	runtime.LockOSThread() // the child's life hangs on the thread that started it
	for pause := 100 * time.Millisecond; ; {
		c.mu.Lock()
		cmd, ended, stopped := c.cmd, c.ended, c.stopped
		if cmd == nil && !stopped && c.wanted {
			if err := c.spawn(); err != nil {
				progress("start ClickHouse: %v", err)
			}
		}
		c.mu.Unlock()
		if stopped && cmd == nil {
			return
		}
		if cmd == nil {
			time.Sleep(20 * time.Millisecond)
			continue
		}
		started := time.Now()
		err := cmd.Wait()
		c.mu.Lock()
		c.cmd = nil
		c.alive.Close()
		close(ended)
		surprise := c.wanted && !c.stopped && !c.asked
		c.asked = false
		c.mu.Unlock()
		if surprise {
			if time.Since(started) > time.Minute {
				pause = 100 * time.Millisecond
			}
			progress("ClickHouse ended (%v), starting it again in %s", err, pause)
			time.Sleep(pause)
			pause = min(2*pause, maxRestartPause)
		}
	}
}

// down kills the child and waits for its end; restart says whether the supervisor brings it back. ClickHouse's parts
// are complete or invisible, so that a kill is as good as a shutdown, and faster.
func (c *clickhouse) down(restart bool) error {
	c.mu.Lock()
	cmd, ended := c.cmd, c.ended
	c.wanted, c.asked = restart, cmd != nil
	c.mu.Unlock()
	if cmd == nil {
		return errors.New("ClickHouse is not running")
	}
	cmd.Process.Kill()
	<-ended
	return nil
}

// up brings back a child that down took away, and returns when it answers.
func (c *clickhouse) up(ctx context.Context) error {
	c.mu.Lock()
	c.wanted = true
	c.mu.Unlock()
	return c.waitReady(ctx, readyTimeout)
}

func (c *clickhouse) signal(s syscall.Signal) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.cmd == nil {
		return errors.New("ClickHouse is not running")
	}
	return c.cmd.Process.Signal(s)
}

func (c *clickhouse) stop() {
	c.mu.Lock()
	c.stopped = true
	c.mu.Unlock()
	c.down(false)
}

// waitReady asks until a query is answered.
func (c *clickhouse) waitReady(ctx context.Context, timeout time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	for {
		version, err := c.ask(ctx)
		if err == nil {
			c.version = version
			return nil
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(20 * time.Millisecond):
		}
	}
}

func (c *clickhouse) ask(ctx context.Context) (string, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, fmt.Sprintf("http://127.0.0.1:%d/?query=SELECT+version()", c.httpPort), nil)
	if err != nil {
		return "", err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = errors.New(string(b))
	}
	return strings.TrimSpace(string(b)), err
}

// runClickHouse is the child: it loads libchdb and never returns while the server runs. args[0] is its argv[0].
func runClickHouse(library string, args []string) int {
	go func() { // ends the process when the pipe from dev closes: dev is gone, however that came
		io.Copy(io.Discard, os.NewFile(3, "alive"))
		syscall.Kill(os.Getpid(), syscall.SIGKILL)
	}()
	handle, err := purego.Dlopen(library, purego.RTLD_NOW|purego.RTLD_GLOBAL)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	var run func(argc int32, argv unsafe.Pointer) int32
	purego.RegisterLibFunc(&run, handle, "chdb_query_cmdline")
	var pin runtime.Pinner // C keeps the pointers for good
	argv := make([]*byte, len(args)+1)
	for i, a := range args {
		b := append([]byte(a), 0)
		argv[i] = &b[0]
		pin.Pin(argv[i])
	}
	pin.Pin(&argv[0])
	return int(run(int32(len(args)), unsafe.Pointer(&argv[0])))
}
