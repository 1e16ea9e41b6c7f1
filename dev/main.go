// Command dev is the embedded stack: Kafka-protocol brokers and a real ClickHouse around one command.
//
//	dev [flags] -- CMD ARGS…   start both, wait until they answer, run CMD, end everything with it
//	dev [flags] stop           end the dev that uses the same data directory
//
// main.go owns the order of start and stop, and the lock on the data directory. CMD learns the addresses from its
// environment, under the names that the program reads; the program itself knows nothing of dev.

package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net"
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

// init pins main to the process's first thread: libchdb has to run there.
func init() { runtime.LockOSThread() }

const (
	// stopTimeout is how long `dev stop` waits, and about twice what a stop takes.
	stopTimeout = 20 * time.Second
	// graceTimeout is how long CMD may take to end after a signal before it is killed.
	graceTimeout = 9 * time.Second
	// readyTimeout bounds the start of ClickHouse, which takes a second when it has little data.
	readyTimeout = 60 * time.Second
)

type config struct {
	data       string
	ephemeral  bool
	kafkaPorts []int
	nativePort int
	httpPort   int
	verbose    bool
}

func main() {
	if len(os.Args) > 2 && os.Args[1] == clickhouseCommand {
		os.Exit(runClickHouse(os.Args[2], os.Args[3:]))
	}
	cfg, args := parseFlags()
	if len(args) == 1 && args[0] == "stop" {
		os.Exit(stopOther(cfg.data))
	}
	code, err := run(cfg, args)
	if err != nil {
		fmt.Fprintln(os.Stderr, "dev:", err)
		os.Exit(max(code, 1))
	}
	os.Exit(code)
}

func parseFlags() (*config, []string) {
	cfg := new(config)
	data := os.Getenv("DATA_DIR")
	if data == "" {
		data = ".data"
	}
	var kafkaPorts string
	flag.StringVar(&cfg.data, "data", data, "directory for the data; DATA_DIR sets the default")
	flag.BoolVar(&cfg.ephemeral, "ephemeral", false, "free ports and a temporary data directory, removed at the end")
	flag.StringVar(&kafkaPorts, "kafka-ports", "29092,29093", "port of each broker")
	flag.IntVar(&cfg.nativePort, "clickhouse-port", 9000, "ClickHouse's native port")
	flag.IntVar(&cfg.httpPort, "clickhouse-http-port", 8123, "ClickHouse's HTTP port")
	flag.BoolVar(&cfg.verbose, "v", false, "the brokers' log too")
	flag.Usage = func() {
		fmt.Fprint(flag.CommandLine.Output(), "dev [flags] -- CMD ARGS…   run CMD with two Kafka-protocol brokers and a ClickHouse\ndev [flags] stop           end the dev that uses the same data directory\n\n")
		flag.PrintDefaults()
	}
	flag.Parse()
	for _, s := range strings.Split(kafkaPorts, ",") {
		port, err := strconv.Atoi(strings.TrimSpace(s))
		if err != nil || port < 0 || port > 65535 {
			fmt.Fprintf(os.Stderr, "dev: -kafka-ports %q: has to be port,port\n", kafkaPorts)
			os.Exit(2)
		}
		cfg.kafkaPorts = append(cfg.kafkaPorts, port)
	}
	args := flag.Args()
	if len(args) == 0 {
		flag.Usage()
		os.Exit(2)
	}
	return cfg, args
}

// run starts the stack, runs the command and returns its exit code.
func run(cfg *config, args []string) (int, error) {
	if cfg.ephemeral {
		if err := cfg.makeEphemeral(); err != nil {
			return 1, err
		}
		defer os.RemoveAll(cfg.data)
	}
	lock, err := lockData(cfg.data)
	if err != nil {
		return 1, err
	}
	defer lock.release()
	if err := portsFree(append([]int{cfg.nativePort, cfg.httpPort}, cfg.kafkaPorts...)); err != nil {
		return 1, err
	}
	// From here on a signal ends the stack in order instead of dev at once.
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()

	engine, err := findClickHouse(ctx)
	if err != nil {
		return 1, err
	}
	kafka := &brokers{ports: cfg.kafkaPorts, dir: filepath.Join(cfg.data, "kafka"), verbose: cfg.verbose}
	if err := kafka.start(); err != nil {
		return 1, err
	}
	defer kafka.stop()
	progress("kafka ready on %s", kafka.addresses())
	ch := &clickhouse{engine: engine, dir: filepath.Join(cfg.data, "clickhouse"), nativePort: cfg.nativePort, httpPort: cfg.httpPort}
	if err := ch.start(ctx); err != nil {
		return 1, err
	}
	defer ch.stop()
	progress("clickhouse %s ready on 127.0.0.1:%d, http %d", ch.version, cfg.nativePort, cfg.httpPort)
	control, err := serveControl(kafka, ch)
	if err != nil {
		return 1, err
	}
	defer control.Close()
	return runCommand(ctx, args, []string{
		"KAFKA_BROKERS=" + kafka.addresses(),
		"CLICKHOUSE_HOST=127.0.0.1",
		"CLICKHOUSE_PORT=" + strconv.Itoa(cfg.nativePort),
		"CLICKHOUSE_HTTP_PORT=" + strconv.Itoa(cfg.httpPort),
		"CLICKHOUSE_USERNAME=default",
		"CLICKHOUSE_PASSWORD=",
		"DEV_CONTROL=http://" + control.Addr,
	})
}

// makeEphemeral replaces ports and directory by ones that nobody else has.
func (cfg *config) makeEphemeral() (err error) {
	if cfg.data, err = os.MkdirTemp("", "event-ingestion-dev-"); err != nil {
		return err
	}
	ports, err := freePorts(len(cfg.kafkaPorts) + 2)
	if err != nil {
		return err
	}
	cfg.nativePort, cfg.httpPort, cfg.kafkaPorts = ports[0], ports[1], ports[2:]
	return nil
}

// runCommand runs CMD in a process group of its own, so that a Ctrl-C on the terminal reaches it once, through dev.
func runCommand(ctx context.Context, args, env []string) (int, error) {
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), env...)
	cmd.SysProcAttr = childAttr()
	if err := cmd.Start(); err != nil {
		return 127, fmt.Errorf("start %s: %w", args[0], err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }() // ends with CMD
	select {
	case err := <-ended:
		return exitCode(err)
	case <-ctx.Done():
	}
	again := make(chan os.Signal, 1)
	signal.Notify(again, os.Interrupt, syscall.SIGTERM)
	syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM)
	select {
	case err := <-ended:
		return exitCode(err)
	case <-again:
		progress("second signal: killing %s", args[0])
	case <-time.After(graceTimeout):
		progress("%s does not end: killing it", args[0])
	}
	syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
	return exitCode(<-ended)
}

// exitCode is CMD's, or 128 plus the signal that ended it, as a shell says it.
func exitCode(err error) (int, error) {
	var exit *exec.ExitError
	if !errors.As(err, &exit) {
		return 0, err
	}
	if status, ok := exit.Sys().(syscall.WaitStatus); ok && status.Signaled() {
		return 128 + int(status.Signal()), nil
	}
	return exit.ExitCode(), nil
}

// dataLock keeps a second dev out of a data directory. The lock decides, which the kernel drops with its holder; the
// pid inside is only for people and for `dev stop`.
type dataLock struct{ f *os.File }

func lockData(dir string) (*dataLock, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(filepath.Join(dir, "dev.lock"), os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		pid := readPid(f)
		f.Close()
		return nil, fmt.Errorf("%s is in use by another dev, pid %d; `make stop` ends it", dir, pid)
	}
	f.Truncate(0)
	f.WriteAt([]byte(strconv.Itoa(os.Getpid())), 0)
	return &dataLock{f}, nil
}

func (l *dataLock) release() {
	l.f.Truncate(0)
	l.f.Close()
}

func readPid(f *os.File) int {
	b := make([]byte, 20)
	n, _ := f.ReadAt(b, 0)
	pid, _ := strconv.Atoi(strings.TrimSpace(string(b[:n])))
	return pid
}

// stopOther ends the dev that holds the lock of dir, and waits until it is gone.
func stopOther(dir string) int {
	f, err := os.OpenFile(filepath.Join(dir, "dev.lock"), os.O_RDWR, 0)
	if err != nil {
		progress("nothing is running")
		return 0
	}
	defer f.Close()
	deadline := time.Now().Add(stopTimeout)
	for signalled := false; time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		if syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB) == nil {
			if signalled {
				progress("stopped")
			} else {
				progress("nothing is running")
			}
			return 0
		}
		if pid := readPid(f); !signalled && pid > 0 {
			if err := syscall.Kill(pid, syscall.SIGTERM); err != nil {
				progress("cannot signal pid %d: %v", pid, err)
				return 1
			}
			signalled = true
		}
	}
	progress("pid %d has not ended within %s", readPid(f), stopTimeout)
	return 1
}

func freePorts(n int) ([]int, error) {
	var ports []int
	for range n {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		defer l.Close() // all at the end: no port comes twice
		ports = append(ports, l.Addr().(*net.TCPAddr).Port)
	}
	return ports, nil
}

func progress(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "dev: "+format+"\n", args...)
}
