// ClickHouse as a supervised child: started again when it dies, ended with dev.
//
// The child is clickhouse-local, told to listen (library.go says from where). clickhouse.go owns its process, its
// settings (clickhouse.xml) and its log, tells when it answers, and leaves the native port to the shield (shield.go). With
// -shards there are several, and each knows all of them as one cluster.

package main

import (
	"bytes"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"html"
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
)

// listenUntilEOF makes clickhouse-local a server: its last query reads stdin, which dev holds open. The end of stdin is
// a clean shutdown, which takes 30 ms; a query that sleeps would wake up every second and can only be killed.
const listenUntilEOF = "SYSTEM START LISTEN TCP; SYSTEM START LISTEN HTTP; SELECT * FROM file('-', LineAsString) FORMAT Null"

const (
	// A ClickHouse that dies is started again after a pause that doubles from the first to the longest, and begins anew
	// after a life of longLife.
	firstPause, longestPause = 100 * time.Millisecond, 5 * time.Second
	longLife                 = 10 * time.Second
	// fatalGrace is for the stack trace of a ClickHouse that has given itself up; it takes a few ms.
	fatalGrace = 100 * time.Millisecond

	// cleanTimeout is for the shutdown; foreign clients with running queries would hold it up for 5 s. Parts are
	// complete or invisible, so that a kill loses nothing that was acknowledged.
	cleanTimeout = 500 * time.Millisecond
	// askTimeout is for one attempt to get an answer.
	askTimeout = 2 * time.Second
)

// clusterName is what the servers of -shards are together.
const clusterName = "shards"

//go:embed clickhouse.xml
var clickhouseSettings []byte

// clickhouse is the supervised server.
type clickhouse struct {
	engine               engine
	dir, log, settings   string // the data, and two files beside it
	nativePort, httpPort int
	cluster              []int // native ports of the cluster's servers
	replicas             bool  // which are one shard
	taken                []int // all ports of the stack
	keepFree             int   // bytes of the disk that it leaves alone
	logLevel             string
	version              string // "" until it has answered once; written under mu

	mu      sync.Mutex     // guards what follows
	changed *sync.Cond     // of mu: any of what follows has changed
	child   *group         // nil while it is down
	stdin   io.WriteCloser // the child's
	port    int            // the child's own native port, behind the shield
	wanted  bool           // the supervisor brings it back
	asked   bool           // the end of this child was asked for: no surprise
	fatal   bool           // this child has given itself up
	ending  bool           // for good
	deaths  int            // by surprise

	shield *shield
	quit   chan struct{} // closed by end
	done   chan struct{} // closed when the supervisor has ended
}

// newClickHouse returns the server of a shard, counted from 0.
func newClickHouse(cfg *config, e engine, shard int) *clickhouse {
	name := "clickhouse"
	if shard > 0 {
		name = fmt.Sprintf("clickhouse-%d", shard+1)
	}
	c := &clickhouse{
		engine: e, nativePort: cfg.native[shard], httpPort: cfg.http[shard], cluster: cfg.native[:cfg.shards-cfg.later], replicas: cfg.replicas, taken: cfg.ports(), keepFree: cfg.keepFree * megabyte, logLevel: "warning",
		dir:      filepath.Join(cfg.data, name),
		log:      filepath.Join(cfg.data, name+".log"),
		settings: filepath.Join(cfg.data, name+".xml"),
		quit:     make(chan struct{}),
		done:     make(chan struct{}),
	}
	if cfg.verbose {
		c.logLevel = "debug"
	}
	c.changed = sync.NewCond(&c.mu)
	return c
}

// start runs the child and its supervisor and waits until it answers. A child that dies before it has answered once is
// an error: the next would do the same.
func (c *clickhouse) start(ctx context.Context) error {
	if err := os.MkdirAll(c.dir, 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(c.settings, c.settingsXML(), 0o644); err != nil {
		return err
	}
	var err error
	if c.shield, err = serveShield(c.nativePort, c.childPort); err != nil {
		return err
	}
	c.wanted = true
	go c.supervise() // ends with end
	version, err := c.waitReady(ctx, func() bool { return c.deaths > 0 })
	if err != nil {
		c.end(true)
		return fmt.Errorf("ClickHouse does not start: %w; the end of %s:\n%s", err, c.log, tail(c.log))
	}
	c.mu.Lock()
	c.version = version
	c.mu.Unlock()
	if free, err := c.ask(ctx, "SELECT free_space FROM system.disks"); err == nil && free == "0" { // beyond what is kept free
		progress("%s is nearly full: ClickHouse leaves the last %d MB of its disk alone, and stores nothing until there is more; "+
			"free some, or give it less to keep: KEEP_FREE_MB=100", c.dir, c.keepFree/megabyte)
	}
	return nil
}

// settingsXML is clickhouse.xml, with the cluster of all servers when there are several.
func (c *clickhouse) settingsXML() []byte {
	if len(c.cluster) == 1 {
		return clickhouseSettings
	}
	const end = "</clickhouse>"
	start, between := "<shard>", "</shard><shard>"
	if c.replicas {
		start, between = "<shard><internal_replication>true</internal_replication>", ""
	}
	var servers []string
	for _, port := range c.cluster {
		servers = append(servers, fmt.Sprintf("<replica><host>127.0.0.1</host><port>%d</port></replica>", port))
	}
	cluster := fmt.Sprintf("<remote_servers><%s>%s%s</shard></%[1]s></remote_servers>\n", clusterName, start, strings.Join(servers, between))
	return bytes.Replace(clickhouseSettings, []byte(end), []byte(cluster+end), 1)
}

// join makes the server one of a cluster of all servers. A clickhouse-local reads its settings only when it starts.
func (c *clickhouse) join(ctx context.Context, cluster []int) error {
	c.down()
	c.cluster = cluster
	if err := os.WriteFile(c.settings, c.settingsXML(), 0o644); err != nil {
		return err
	}
	return c.up(ctx)
}

// childPort is where the shield passes connections on to.
func (c *clickhouse) childPort() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.port
}

// supervise keeps a child running while one is wanted. It alone starts children, always on the same thread: Linux
// would end a child together with the thread that started it.
func (c *clickhouse) supervise() {
	runtime.LockOSThread()
	defer close(c.done)
	pause := firstPause
	for {
		c.mu.Lock()
		for !c.wanted && !c.ending {
			c.changed.Wait()
		}
		if c.ending {
			c.mu.Unlock()
			return
		}
		err := c.spawn()
		child, started := c.child, time.Now()
		c.mu.Unlock()
		if err == nil {
			err = child.wait()
		}

		c.mu.Lock()
		surprise := !c.asked
		if surprise {
			c.deaths++
		}
		if c.fatal {
			err = errors.New("it gave itself up")
		}
		c.child, c.asked, c.fatal = nil, false, false
		wanted, silent := c.wanted, c.version == ""
		c.mu.Unlock()
		c.changed.Broadcast()
		if !surprise || !wanted {
			continue
		}
		if time.Since(started) > longLife {
			pause = firstPause
		}
		if !silent { // start tells about a child that has never answered
			progress("clickhouse ended (%v), see %s; starting it again in %s", err, c.log, pause)
		}
		select {
		case <-time.After(pause):
		case <-c.quit:
		}
		pause = min(2*pause, longestPause)
	}
}

// spawn starts a child, under mu.
func (c *clickhouse) spawn() error {
	ports, err := freePorts(1, c.taken...)
	if err != nil {
		return err
	}
	c.port = ports[0]
	cmd, err := c.engine.command(
		"--path", c.dir, "--config-file", c.settings, "--log-level", c.logLevel,
		"--listen_host", "127.0.0.1", "--tcp_port", strconv.Itoa(c.port), "--http_port", strconv.Itoa(c.httpPort),
		"--query", listenUntilEOF)
	if err != nil {
		return err
	}
	cmd.Env = append(os.Environ(), "DEV_CLICKHOUSE_LOG="+html.EscapeString(c.log), "DEV_CLICKHOUSE_CONFIG="+html.EscapeString(c.settings), "DEV_CLICKHOUSE_KEEP_FREE="+strconv.Itoa(c.keepFree))
	cmd.Stderr = &stderrWatch{path: c.log, fatal: func() { c.abandon(cmd) }}
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	child, err := startGroup(cmd)
	if err != nil {
		stdin.Close()
		return err
	}
	c.child, c.stdin = child, stdin
	return nil
}

// abandon kills a child that has given itself up. A failed login on the native port does that to clickhouse-local: it
// then hangs for 4 s or more before it ends.
func (c *clickhouse) abandon(cmd *exec.Cmd) {
	time.AfterFunc(fatalGrace, func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.child != nil && c.child.cmd == cmd {
			c.fatal = true
			c.child.signal(syscall.SIGKILL)
		}
	})
}

// kill kills the child, and the supervisor brings it back if it is wanted. Returns when the child is gone.
func (c *clickhouse) kill() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.child == nil {
		return errors.New("ClickHouse is not running")
	}
	c.takeDown()
	return nil
}

// takeDown kills the running child and waits until it is gone, under mu.
func (c *clickhouse) takeDown() {
	child := c.child
	c.asked = true
	child.signal(syscall.SIGKILL)
	for c.child == child {
		c.changed.Wait()
	}
}

// down kills the child if there is one, and keeps it down.
func (c *clickhouse) down() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.wanted = false
	if c.child != nil {
		c.takeDown()
	}
}

// up wants a child and returns when it answers.
func (c *clickhouse) up(ctx context.Context) error {
	c.mu.Lock()
	c.wanted = true
	c.mu.Unlock()
	c.changed.Broadcast()
	_, err := c.waitReady(ctx, func() bool { return c.ending })
	return err
}

// signal sends s to the child alone: a stopped guard would guard nothing.
func (c *clickhouse) signal(s syscall.Signal) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.child == nil {
		return errors.New("ClickHouse is not running")
	}
	return c.child.cmd.Process.Signal(s)
}

// end shuts ClickHouse down for good: at once, or with cleanTimeout to do it in order.
func (c *clickhouse) end(atOnce bool) {
	c.mu.Lock()
	c.wanted, c.ending = false, true
	close(c.quit)
	if c.child != nil {
		child := c.child
		c.asked = true
		c.stdin.Close()
		late := time.AfterFunc(cleanTimeout, func() { child.signal(syscall.SIGKILL) })
		if atOnce {
			child.signal(syscall.SIGKILL)
		}
		for c.child == child {
			c.changed.Wait()
		}
		late.Stop()
	}
	c.mu.Unlock()
	c.changed.Broadcast()
	c.shield.Close()
	<-c.done
}

// waitReady asks until a query is answered with the version, or hopeless (called under mu) says that none will be.
func (c *clickhouse) waitReady(ctx context.Context, hopeless func() bool) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, readyTimeout)
	defer cancel()
	for {
		version, err := c.ask(ctx, "SELECT version()")
		if err == nil {
			return version, nil
		}
		c.mu.Lock()
		giveUp := hopeless()
		c.mu.Unlock()
		if giveUp {
			return "", errors.New("it has ended")
		}
		select {
		case <-ctx.Done():
			return "", fmt.Errorf("no answer within %s: %w", readyTimeout, err)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// ask answers a query that returns one value. The native port listens by then: it is opened first.
func (c *clickhouse) ask(ctx context.Context, query string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	url := fmt.Sprintf("http://127.0.0.1:%d/", c.httpPort)
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, url, strings.NewReader(query))
	if err != nil {
		return "", err
	}
	req.Close = true // an idle connection would hold up the shutdown
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
