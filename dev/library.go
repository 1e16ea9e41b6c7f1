// Where ClickHouse comes from: the `clickhouse` binary if there is one, else the embedded engine as a library.

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"
	"time"
)

// libraryVersion is the release of the npm packages @chdb/lib-* that carry libchdb; it speaks as ClickHouse 26.7.
const libraryVersion = "26.7.3-stable.1"

// engine is one of the two ways to run ClickHouse; the other is empty.
type engine struct {
	binary  string
	library string
}

// findClickHouse looks for an engine and installs the library when there is none. The error says what to install.
func findClickHouse(ctx context.Context) (engine, error) {
	if path := os.Getenv("CLICKHOUSE_LIB"); path != "" {
		if _, err := os.Stat(path); err != nil {
			return engine{}, fmt.Errorf("CLICKHOUSE_LIB: %w", err)
		}
		return engine{library: path}, nil
	}
	if path, err := exec.LookPath("clickhouse"); err == nil {
		return engine{binary: path}, nil
	}
	path, err := installLibrary(ctx)
	return engine{library: path}, err
}

// installLibrary returns the path of libchdb in the user's cache, where it outlives clones and `make clean`. Two
// installs at once wait for each other; a broken one leaves nothing behind.
func installLibrary(ctx context.Context) (string, error) {
	name, ok := map[string]string{
		"linux/amd64": "lib-linux-x64-gnu", "linux/arm64": "lib-linux-arm64-gnu",
		"darwin/amd64": "lib-darwin-x64", "darwin/arm64": "lib-darwin-arm64",
	}[runtime.GOOS+"/"+runtime.GOARCH]
	if !ok {
		return "", fmt.Errorf("no embedded ClickHouse for %s/%s: install ClickHouse, so that `clickhouse` is on the PATH", runtime.GOOS, runtime.GOARCH)
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", err
	}
	cache = filepath.Join(cache, "event-ingestion")
	final := filepath.Join(cache, "clickhouse-"+libraryVersion)
	library := filepath.Join(final, "node_modules", "@chdb", name, "libchdb.so")
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return "", err
	}
	lock, err := os.OpenFile(filepath.Join(cache, "install.lock"), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return "", err
	}
	defer lock.Close()
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil {
		return "", err
	}
	if _, err := os.Stat(library); err == nil {
		return library, nil
	}
	npm, err := exec.LookPath("npm")
	if err != nil {
		return "", errors.New("no ClickHouse found: install ClickHouse (so that `clickhouse` is on the PATH) or Node.js with npm, which brings it as a library")
	}
	partial := final + ".partial"
	os.RemoveAll(partial)
	defer os.RemoveAll(partial)
	if err := os.MkdirAll(partial, 0o755); err != nil {
		return "", err
	}
	pkg := "@chdb/" + name + "@" + libraryVersion
	if err := npmInstall(ctx, npm, partial, pkg); err != nil {
		return "", err
	}
	if err := os.Rename(partial, final); err != nil {
		return "", err
	}
	if _, err := os.Stat(library); err != nil {
		return "", fmt.Errorf("%s was installed without its library: %w", pkg, err)
	}
	return library, nil
}

// npmInstall installs one package into dir, with a line every few seconds of how much has arrived.
func npmInstall(ctx context.Context, npm, dir, pkg string) error {
	progress("installing ClickHouse as a library, once: %s, 543 MB on disk", pkg)
	cmd := exec.CommandContext(ctx, npm, "install", "--prefix", dir, "--no-audit", "--no-fund", "--ignore-scripts", "--loglevel=error", pkg)
	out, started := new(limitedOutput), time.Now()
	cmd.Stdout, cmd.Stderr = out, out
	done := make(chan error, 1)
	if err := cmd.Start(); err != nil {
		return err
	}
	go func() { done <- cmd.Wait() }() // ends with npm
	tick := time.NewTicker(3 * time.Second)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			progress("… %d MB unpacked after %.0f s", sizeMB(dir), time.Since(started).Seconds())
		case err := <-done:
			if err != nil {
				return fmt.Errorf("npm install %s: %w\n%s", pkg, err, out.b)
			}
			progress("installed in %.0f s", time.Since(started).Seconds())
			return nil
		}
	}
}

func sizeMB(dir string) int64 {
	var total int64
	filepath.WalkDir(dir, func(_ string, d os.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			if info, err := d.Info(); err == nil {
				total += info.Size()
			}
		}
		return nil
	})
	return total >> 20
}

// limitedOutput keeps the beginning of a child's output for an error message.
type limitedOutput struct{ b []byte }

func (o *limitedOutput) Write(p []byte) (int, error) {
	const most = 4 << 10
	o.b = append(o.b, p[:min(len(p), most-min(most, len(o.b)))]...)
	return len(p), nil
}
