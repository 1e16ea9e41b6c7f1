// Where ClickHouse comes from: a library that was named, else the `clickhouse` binary, else the library from npm.
//
// library.go finds or installs one of them, and runs the library: libchdb is ClickHouse in one file, and its
// chdb_query_cmdline is clickhouse-local's main.

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"
	"unsafe"

	"github.com/ebitengine/purego"
)

// libraryCommand is the hidden subcommand under which dev starts itself as ClickHouse: the library needs the main
// thread of its process, and takes that process down with it.
const libraryCommand = "clickhouse-from-library"

// libraryVersion is that of the npm packages @chdb/lib-*, which carry libchdb of ClickHouse 26.7. The Python packages
// of the same project do not export chdb_query_cmdline.
const libraryVersion = "26.7.3-stable.1"

// libraryPackages are npm's names for them. All need glibc on Linux.
var libraryPackages = map[string]string{
	"linux/amd64":  "@chdb/lib-linux-x64-gnu",
	"linux/arm64":  "@chdb/lib-linux-arm64-gnu",
	"darwin/amd64": "@chdb/lib-darwin-x64",
	"darwin/arm64": "@chdb/lib-darwin-arm64",
}

// engine is one of the two ways to run ClickHouse; the other is empty.
type engine struct {
	binary  string
	library string
}

// command returns clickhouse-local with its arguments.
func (e engine) command(args ...string) (*exec.Cmd, error) {
	if e.binary != "" {
		return exec.Command(e.binary, append([]string{"local"}, args...)...), nil
	}
	return selfCommand(append([]string{libraryCommand, e.library, "clickhouse"}, args...)...)
}

// findEngine looks for ClickHouse, and installs the library when there is none. The error says what to install.
func findEngine(ctx context.Context) (engine, error) {
	if path := os.Getenv("CLICKHOUSE_LIB"); path != "" {
		if _, err := os.Stat(path); err != nil {
			return engine{}, fmt.Errorf("CLICKHOUSE_LIB: %w", err)
		}
		return engine{library: path}, nil
	}
	if path, err := exec.LookPath("clickhouse"); err == nil {
		if err = canListen(ctx, path); err == nil {
			return engine{binary: path}, nil
		}
		progress("%s does not serve as clickhouse-local (26.6 and later do): %v; taking the library", path, err)
	}
	path, err := installLibrary(ctx)
	return engine{library: path}, err
}

// canListen tries whether a binary knows what listenUntilEOF needs.
func canListen(ctx context.Context, path string) error {
	const patience = 20 * time.Second // the file may have to be read first, 600 MB
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	out, err := exec.CommandContext(ctx, path, "local", "--listen_host", "127.0.0.1", "--tcp_port", "0", "--query", "SYSTEM START LISTEN TCP").CombinedOutput()
	if err != nil {
		line, _, _ := strings.Cut(strings.TrimSpace(string(out)), "\n")
		return fmt.Errorf("%w %s", err, line)
	}
	return nil
}

// installLibrary returns the path of libchdb in the user's cache, where it outlives clones and `make clean`. Two
// installs at once wait for each other, and one that breaks off leaves nothing that could be taken for a library.
func installLibrary(ctx context.Context) (string, error) {
	platform := runtime.GOOS + "/" + runtime.GOARCH
	pkg, ok := libraryPackages[platform]
	if !ok {
		return "", fmt.Errorf("no ClickHouse: there is no library for %s; install ClickHouse 26.6 or later, so that `clickhouse` is on the PATH", platform)
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", err
	}
	cache = filepath.Join(cache, "event-ingestion", "clickhouse")
	final := filepath.Join(cache, libraryVersion)
	library := filepath.Join(final, "node_modules", filepath.FromSlash(pkg), "libchdb.so")
	if _, err := os.Stat(library); err == nil { // Fast path: a rename has put it there whole
		return library, nil
	}
	npm, err := exec.LookPath("npm")
	if err != nil {
		return "", errors.New("no ClickHouse: install ClickHouse 26.6 or later (`clickhouse` on the PATH), or Node.js with npm, " +
			"which brings it as a library, or set CLICKHOUSE_LIB to a libchdb.so")
	}
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return "", err
	}
	unlock, err := lockInstall(ctx, filepath.Join(cache, "install.lock"))
	if err != nil {
		return "", err
	}
	defer unlock()
	if _, err := os.Stat(library); err == nil {
		return library, nil
	}
	partial := final + ".partial" // beside the final place, so that a rename is enough; under the lock
	os.RemoveAll(partial)
	defer os.RemoveAll(partial)
	if err := os.MkdirAll(partial, 0o755); err != nil {
		return "", err
	}
	if err := npmInstall(ctx, npm, partial, pkg+"@"+libraryVersion); err != nil {
		return "", err
	}
	if _, err := os.Stat(filepath.Join(partial, "node_modules", filepath.FromSlash(pkg), "libchdb.so")); err != nil {
		return "", fmt.Errorf("%s has no library in it: %w", pkg, err)
	}
	os.RemoveAll(final) // without a library it is of no use
	return library, os.Rename(partial, final)
}

// lockInstall waits for its turn to install.
func lockInstall(ctx context.Context, path string) (unlock func() error, err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	for waiting := false; ; waiting = true {
		locked, err := tryLock(f)
		if err != nil {
			f.Close()
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
		if locked {
			return f.Close, nil
		}
		if !waiting {
			progress("waiting for another dev to install ClickHouse")
		}
		select {
		case <-ctx.Done():
			f.Close()
			return nil, ctx.Err()
		case <-time.After(lockPoll):
		}
	}
}

// npmInstall installs one package into dir, with a line every few seconds of how much has arrived.
func npmInstall(ctx context.Context, npm, dir, pkg string) error {
	const every = 3 * time.Second
	progress("installing ClickHouse as a library, once: %s, 543 MB on disk", pkg)
	started := time.Now()
	out, err := os.Create(filepath.Join(dir, "npm.log"))
	if err != nil {
		return err
	}
	defer out.Close()
	cmd := exec.Command(npm, "install", "--prefix", dir, "--no-audit", "--no-fund", "--no-update-notifier", "--ignore-scripts", "--loglevel=error", pkg)
	cmd.Stdout, cmd.Stderr = out, out
	g, err := startGroup(cmd)
	if err != nil {
		return fmt.Errorf("%s: %w", npm, err)
	}
	ended := make(chan error, 1)
	go func() { ended <- g.wait() }() // ends with npm
	tick := time.NewTicker(every)
	defer tick.Stop()
	interrupt := ctx.Done()
	for {
		select {
		case <-tick.C:
			progress("… %d MB after %s", sizeOf(dir)>>20, since(started))
		case <-interrupt:
			g.signal(syscall.SIGKILL)
			interrupt = nil
		case err := <-ended:
			if err != nil {
				return fmt.Errorf("npm install %s: %w\n%s", pkg, err, tail(out.Name()))
			}
			progress("ClickHouse installed in %s (%s)", filepath.Dir(dir), since(started))
			return nil
		}
	}
}

// sizeOf returns the bytes of the files below dir.
func sizeOf(dir string) (total int64) {
	filepath.WalkDir(dir, func(_ string, d os.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			if info, err := d.Info(); err == nil {
				total += info.Size()
			}
		}
		return nil
	})
	return total
}

// pinned is what C keeps pointers to: the arguments, for the life of the process. A Pinner that is collected before it is
// unpinned ends the process, so it must not be a local.
var pinned runtime.Pinner

// runLibrary is ClickHouse: it loads libchdb and returns the process's exit code when the last query has ended, which
// is when stdin has. args[0] is its argv[0]. Everything on stderr ends up in clickhouse.log.
func runLibrary(library string, args []string) int {
	handle, err := purego.Dlopen(library, purego.RTLD_NOW|purego.RTLD_GLOBAL)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	// chdb_result *chdb_query_cmdline(int argc, char **argv); const char *chdb_result_error(chdb_result *)
	var query func(argc int32, argv unsafe.Pointer) unsafe.Pointer
	var resultError func(result unsafe.Pointer) string
	for name, f := range map[string]any{"chdb_query_cmdline": &query, "chdb_result_error": &resultError} {
		symbol, err := purego.Dlsym(handle, name)
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		purego.RegisterFunc(f, symbol)
	}

	argv := make([]*byte, len(args)+1)
	for i, a := range args {
		b := append([]byte(a), 0)
		argv[i] = &b[0]
		pinned.Pin(argv[i])
	}
	pinned.Pin(&argv[0])
	result := query(int32(len(args)), unsafe.Pointer(&argv[0]))
	if result == nil {
		return 1
	}
	if message := resultError(result); message != "" {
		fmt.Fprintln(os.Stderr, message)
		return 1
	}
	return 0
}
