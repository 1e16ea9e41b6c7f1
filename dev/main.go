// Command dev is the embedded stack: Kafka-protocol brokers and a real ClickHouse around one command.
//
// main.go owns the order of start and stop: lock, disk, ports, brokers, ClickHouse, control, CMD, and the same way back. CMD
// learns the addresses from its environment, under the names that the program reads; the program itself knows nothing
// of dev.

package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// init pins main to the process's first thread: libchdb has to run there, and what Linux ends together with the thread
// that started it (child_linux.go) lives as long as dev.
func init() { runtime.LockOSThread() }

const (
	// graceTimeout is how long CMD may take to end after a signal before it is killed. The program's own limit is 8 s
	// (SHUTDOWN_TIMEOUT), so that only a stuck one meets this.
	graceTimeout = 8500 * time.Millisecond
	// readyTimeout bounds the start of ClickHouse, which takes a second when it has little data.
	readyTimeout = 60 * time.Second
	// temporaryPrefix begins the name of the data directory of an -ephemeral dev.
	temporaryPrefix = "event-ingestion-dev-"
	// noDisk is what dev says where -disk does not work.
	noDisk = "no disk that forgets can be made here"
	// exitInterrupted is what a shell makes of an end by SIGINT.
	exitInterrupted = 130
	// exitNotFound is what a shell says when there is no such command.
	exitNotFound = 127
)

func main() {
	switch {
	case len(os.Args) == 2 && os.Args[1] == guardCommand:
		os.Exit(runGuard())
	case len(os.Args) == 4 && os.Args[1] == diskCommand:
		if err := runDisk(os.Args[2], os.Args[3]); err != nil {
			progress("%v", err)
			os.Exit(1)
		}
		os.Exit(0)
	case len(os.Args) > 2 && os.Args[1] == libraryCommand:
		os.Exit(runLibrary(os.Args[2], os.Args[3:]))
	}
	cfg, err := parseFlags(os.Args[1:], os.Stderr)
	switch {
	case errors.Is(err, flag.ErrHelp):
		os.Exit(0)
	case err != nil:
		progress("%v; dev -h explains", err)
		os.Exit(2)
	case cfg.stop:
		os.Exit(stopOther(cfg.data))
	}
	code, err := run(cfg)
	if err != nil {
		progress("%v", err)
	}
	os.Exit(code)
}

// run starts the stack, runs CMD, stops everything and returns CMD's exit code; with an error, CMD has not run.
func run(cfg *config) (code int, err error) {
	if _, err := exec.LookPath(cfg.args[0]); err != nil {
		return exitNotFound, err
	}
	if cfg.disk > 0 {
		if err := leaveMounts(); err != nil {
			return 1, fmt.Errorf("%s: %w", noDisk, err)
		}
	}
	signals := make(chan os.Signal, 4) // for CMD, which gets the first and is killed at the second
	signal.Notify(signals, endSignals()...)
	ctx, cancel := signal.NotifyContext(context.Background(), endSignals()...) // for what waits before CMD runs
	defer cancel()
	defer func() {
		if err != nil && ctx.Err() != nil {
			code, err = exitInterrupted, errors.New("interrupted before the command ran")
		}
	}()

	if cfg.ephemeral {
		if err := cfg.makeEphemeral(); err != nil {
			return 1, err
		}
		defer os.RemoveAll(cfg.data)
	}
	if cfg.data, err = filepath.Abs(cfg.data); err != nil {
		return 1, err
	}
	lock, err := lockData(cfg.data)
	if err != nil {
		return 1, err
	}
	defer lock.release()
	if cfg.disk > 0 {
		d, err := startDisk(ctx, cfg.data, cfg.disk)
		if err != nil {
			return 1, fmt.Errorf("%s: %w", noDisk, err)
		}
		defer d.stop()
		cfg.data = d.mounted
	}
	if err := portsFree(cfg.ports()); err != nil {
		return 1, fmt.Errorf("%w\nother ports: %s -kafka-ports 19092,19093 -clickhouse-port 19000 -clickhouse-http-port 18123 -- %s", err, os.Args[0], strings.Join(cfg.args, " "))
	}
	engine, err := findEngine(ctx)
	if err != nil {
		return 1, err
	}

	kafka, err := newKafka(ctx, cfg)
	if err != nil {
		return 1, err
	}
	started := time.Now()
	defer kafka.stop()
	if err := kafka.start(ctx); err != nil {
		return 1, err
	}
	progress("kafka ready on %s (%s)", kafka.addresses(), since(started))

	var shards []*clickhouse
	for i := range cfg.shards {
		started = time.Now()
		ch := newClickHouse(cfg, engine, i)
		if err := ch.start(ctx); err != nil {
			return 1, err
		}
		defer ch.end(cfg.ephemeral)
		shards = append(shards, ch)
		progress("clickhouse %s ready on 127.0.0.1:%d, http %d (%s)", ch.version, ch.nativePort, ch.httpPort, since(started))
	}

	control, err := serveControl(kafka, shards)
	if err != nil {
		return 1, err
	}
	defer control.Close()
	self, err := os.Executable()
	if err != nil {
		return 1, err
	}
	cluster := ""
	if len(shards) > 1 {
		cluster = clusterName
	}
	return runCommand(cfg.args, signals, []string{
		"KAFKA_BROKERS=" + kafka.addresses(),
		"DEV_KAFKA_NODES=" + kafka.names(),
		"CLICKHOUSE_HOST=127.0.0.1",
		"CLICKHOUSE_PORT=" + strconv.Itoa(cfg.native[0]),
		"CLICKHOUSE_HTTP_PORT=" + joinPorts(cfg.http),
		"CLICKHOUSE_CLUSTER=" + cluster,
		"CLICKHOUSE_USERNAME=default",
		"CLICKHOUSE_PASSWORD=",
		"DEV_CONTROL=http://" + control.Addr,
		"DEV_COMMAND=" + self,
	})
}

// makeEphemeral replaces the directory and the ports by some that nobody else has.
func (cfg *config) makeEphemeral() (err error) {
	removeAbandoned(os.TempDir())
	if cfg.data, err = os.MkdirTemp("", temporaryPrefix); err != nil {
		return err
	}
	ports, err := freePorts(2*cfg.shards + len(cfg.kafkaPorts))
	if err != nil {
		os.RemoveAll(cfg.data)
		return err
	}
	cfg.native, cfg.http, cfg.kafkaPorts = ports[:cfg.shards:cfg.shards], ports[cfg.shards:2*cfg.shards:2*cfg.shards], ports[2*cfg.shards:]
	return nil
}

func joinPorts(ports []int) string {
	var list []string
	for _, port := range ports {
		list = append(list, strconv.Itoa(port))
	}
	return strings.Join(list, ",")
}

// runCommand runs CMD with more environment and returns its exit code. The first signal is passed on, once, to the
// whole group, as a terminal does it; at the second, or when CMD takes too long, the group is killed.
func runCommand(args []string, signals <-chan os.Signal, env []string) (int, error) {
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), env...)
	g, err := startGroup(cmd)
	if err != nil {
		return exitNotFound, fmt.Errorf("start %s: %w", args[0], err)
	}
	ended := make(chan error, 1)
	go func() { ended <- g.wait() }() // ends with CMD
	var late <-chan time.Time
	for {
		select {
		case err := <-ended:
			return exitCode(err)
		case s := <-signals:
			if late != nil {
				progress("second signal: killing %s", args[0])
				g.signal(syscall.SIGKILL)
				continue
			}
			g.signal(s.(syscall.Signal))
			late = time.After(graceTimeout)
		case <-late:
			progress("%s has not ended within %s: killing it", args[0], graceTimeout)
			g.signal(syscall.SIGKILL)
		}
	}
}

// exitCode is CMD's, or 128 plus the signal that ended it, as a shell says it.
func exitCode(err error) (int, error) {
	var exit *exec.ExitError
	switch {
	case err == nil:
		return 0, nil
	case !errors.As(err, &exit):
		return 1, err
	}
	if status, ok := exit.Sys().(syscall.WaitStatus); ok && status.Signaled() {
		return 128 + int(status.Signal()), nil
	}
	return exit.ExitCode(), nil
}

// endSignals are those that ask dev to stop. One that was ignored when dev started (nohup) stays ignored.
func endSignals() []os.Signal {
	signals := []os.Signal{os.Interrupt, syscall.SIGTERM}
	if !signal.Ignored(syscall.SIGHUP) {
		signals = append(signals, syscall.SIGHUP)
	}
	return signals
}

// progress tells the person at the terminal, on stderr: stdout is CMD's.
func progress(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "dev: "+format+"\n", args...)
}

func since(t time.Time) string { return fmt.Sprintf("%.1fs", time.Since(t).Seconds()) }
