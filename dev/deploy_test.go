// The other files of deploy/ and the Dockerfile, each given to the program that will read it, where that is here.

package main

import (
	"bytes"
	"cmp"
	"debug/elf"
	"encoding/xml"
	"errors"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/moby/patternmatcher"
	"github.com/moby/patternmatcher/ignorefile"
)

// TestDockerfileBuilds follows the build stage: the files that .dockerignore leaves, copied into an empty directory, and
// the RUN lines run by a shell there. What comes out is one static binary that starts.
func TestDockerfileBuilds(t *testing.T) {
	root := t.TempDir()
	env, dir := os.Environ(), root
	stages := 0
	for _, in := range dockerfile(t) {
		rest := strings.Join(in[1:], " ")
		switch in[0] {
		case "FROM":
			stages++
		case "ARG": // BuildKit's, for the platform
			env = append(env, strings.NewReplacer("TARGETOS", "TARGETOS="+runtime.GOOS, "TARGETARCH", "TARGETARCH="+runtime.GOARCH).Replace(rest))
		case "WORKDIR":
			dir = filepath.Join(root, rest)
			if err := os.MkdirAll(dir, 0o755); err != nil {
				t.Fatal(err)
			}
		case "COPY":
			if stages == 1 {
				copyContext(t, in[1:len(in)-1], dir)
			}
		case "RUN":
			cmd := exec.Command("sh", "-ec", strings.ReplaceAll(rest, " /out/", " "+root+"/out/"))
			cmd.Dir, cmd.Env = dir, env
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Fatalf("RUN %s: %v\n%s", rest, err, out)
			}
		}
	}
	binary := filepath.Join(root, "out", "event-ingestion")
	if out, err := exec.Command(binary, "-h").Output(); err != nil || !bytes.Contains(out, []byte("KAFKA_BROKERS")) {
		t.Errorf("event-ingestion -h: %v\n%s", err, out)
	}
	if f, err := elf.Open(binary); err == nil {
		defer f.Close()
		for _, p := range f.Progs {
			if p.Type == elf.PT_INTERP {
				t.Error("the binary needs a dynamic linker, which the image does not have")
			}
		}
	} else if runtime.GOOS == "linux" {
		t.Error(err)
	}
	changelog, _ := os.ReadFile("../CHANGELOG.md")
	newest := regexp.MustCompile(`(?m)^## (\d+\.\d+\.\d+)`).FindSubmatch(changelog)
	if out, err := exec.Command(binary, "version").Output(); err != nil || newest == nil || !bytes.HasPrefix(out, newest[1]) {
		t.Errorf("event-ingestion version: %s, %v; CHANGELOG.md's is %s", out, err, newest)
	}
	if licenses, err := os.ReadFile(filepath.Join(dir, "deploy", "LICENSES.txt")); err != nil || len(licenses) == 0 {
		t.Errorf("the image has no licences: %v", err)
	}
	// The health check of image and stack: 1 says not ready, 2 would say that there is no such command.
	cmd := exec.Command(binary, "healthcheck")
	cmd.Env = []string{"SERVER_PORT=1"}
	if out, err := cmd.CombinedOutput(); exitStatus(err) != 1 {
		t.Errorf("event-ingestion healthcheck without a server: %v\n%s", err, out)
	}
}

// TestDockerfileImage: what the image is made from is pinned, and it does not run as root.
func TestDockerfileImage(t *testing.T) {
	pinned := regexp.MustCompile(`:\d+\.\d+\.\d+|@sha256:[0-9a-f]{64}`)
	last := map[string]string{}
	for _, in := range dockerfile(t) {
		rest := strings.Join(in[1:], " ")
		if last[in[0]] = rest; in[0] == "FROM" && !pinned.MatchString(rest) {
			t.Errorf("FROM %s: neither a full version nor a digest", rest)
		}
	}
	if user := last["USER"]; user == "" || strings.HasPrefix(user, "0") || strings.HasPrefix(user, "root") {
		t.Errorf("USER %q", user)
	}
	if check := last["HEALTHCHECK"]; !strings.HasSuffix(check, `CMD ["/event-ingestion", "healthcheck"]`) {
		t.Errorf("HEALTHCHECK %s", check)
	}
	goMod, err := os.ReadFile("../go.mod")
	if err != nil {
		t.Fatal(err)
	}
	minor := regexp.MustCompile(`(?m)^go (\d+\.\d+)`).FindSubmatch(goMod)[1]
	if file, err := os.ReadFile("../deploy/Dockerfile"); err != nil || !bytes.Contains(file, append([]byte("golang:"), minor...)) {
		t.Errorf("the image is not built with Go %s: %v", minor, err)
	}
}

// dockerfile returns the instructions of ../deploy/Dockerfile as words, continued lines joined.
func dockerfile(t *testing.T) (instructions [][]string) {
	t.Helper()
	b, err := os.ReadFile("../deploy/Dockerfile")
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range strings.Split(strings.ReplaceAll(string(b), "\\\n", " "), "\n") {
		if words := strings.Fields(line); len(words) > 0 && !strings.HasPrefix(words[0], "#") {
			instructions = append(instructions, words)
		}
	}
	return instructions
}

// copyContext copies files of the build's context, "." being all of it: what git would track, less .dockerignore.
func copyContext(t *testing.T, sources []string, dir string) {
	t.Helper()
	ignore, err := os.Open("../.dockerignore")
	if err != nil {
		t.Fatal(err)
	}
	defer ignore.Close()
	patterns, err := ignorefile.ReadAll(ignore)
	if err != nil {
		t.Fatal(err)
	}
	matcher, err := patternmatcher.New(patterns)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("git", "ls-files", "-co", "--exclude-standard")
	cmd.Dir = ".."
	list, err := cmd.Output()
	if err != nil {
		t.Fatalf("git ls-files: %v", err)
	}
	for _, name := range strings.Fields(string(list)) {
		ignored, err := matcher.MatchesOrParentMatches(name)
		if err != nil {
			t.Fatal(err)
		}
		if ignored || sources[0] != "." && !strings.Contains(strings.Join(sources, " "), name) {
			continue
		}
		b, err := os.ReadFile(filepath.Join("..", name))
		if errors.Is(err, fs.ErrNotExist) { // deleted, and not yet committed
			continue
		}
		to := filepath.Join(dir, name)
		if err == nil {
			err = os.MkdirAll(filepath.Dir(to), 0o755)
		}
		if err == nil {
			err = os.WriteFile(to, b, 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// TestClickHouseConfig starts ClickHouse with the stack's files beside its own and asks it what it has made of them.
func TestClickHouseConfig(t *testing.T) {
	data := t.TempDir()
	for _, name := range []string{"config.xml", "users.xml"} {
		b, err := os.ReadFile("../deploy/clickhouse/" + name)
		if err != nil {
			t.Fatal(err)
		}
		b = bytes.ReplaceAll(b, []byte("/var/lib/clickhouse/"), []byte(data+"/"))
		// ClickHouse merges what is in NAME.d beside its NAME.xml, as it does with the image's config.d.
		if err := os.MkdirAll(filepath.Join(data, "clickhouse.d"), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(data, "clickhouse.d", name), b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	d := start(t, onPorts(t, data), ``, `sleep 68`)

	// Sections are no server settings; what is in them is looked at below, or read by the server of the image only.
	sections := map[string]bool{"logger": true, "prometheus": true, "backups": true, "storage_configuration": true}
	logs := ""
	for _, s := range settingsIn(t, "../deploy/clickhouse/config.xml", "clickhouse") {
		switch {
		case strings.HasSuffix(s.name, "_log"):
			if !s.removed {
				logs += s.name + "\n"
			}
		case !sections[s.name]:
			if got := d.query(t, "SELECT value FROM system.server_settings WHERE name = '"+s.name+"'"); got != s.value {
				t.Errorf("server setting %s is %q, want %s", s.name, got, s.value)
			}
		}
	}
	for _, s := range settingsIn(t, "../deploy/clickhouse/users.xml", "clickhouse", "profiles", "default") {
		if got := d.query(t, "SELECT value FROM system.settings WHERE name = '"+s.name+"'"); got != s.value {
			t.Errorf("setting %s is %q, want %s", s.name, got, s.value)
		}
	}
	if got := d.query(t, "SELECT keep_free_space FROM system.disks"); got != "5000000000" {
		t.Errorf("ClickHouse keeps %s bytes free", got)
	}
	d.query(t, "CREATE DATABASE b")
	d.query(t, "CREATE TABLE b.t (x UInt8) ENGINE = MergeTree ORDER BY x")
	d.query(t, "INSERT INTO b.t VALUES (42)")
	d.query(t, "SYSTEM FLUSH LOGS")
	if got := d.query(t, "SELECT name FROM system.tables WHERE database = 'system' AND name LIKE '%\\_log' AND create_table_query LIKE '%toIntervalDay(14)%' ORDER BY name DESC"); got != strings.TrimSpace(logs) {
		t.Errorf("system logs that end after 14 days: %q, want %q", got, logs)
	}

	// README's backup and the way back.
	d.query(t, "BACKUP DATABASE b TO File('one')")
	d.query(t, "DROP DATABASE b SYNC")
	d.query(t, "RESTORE DATABASE b FROM File('one')")
	if got := d.query(t, "SELECT x FROM b.t"); got != "42" {
		t.Errorf("restored %q", got)
	}
	if got, err := d.ask("BACKUP DATABASE b TO File('" + t.TempDir() + "')"); err == nil {
		t.Errorf("a backup outside of its directory: %s", got)
	}
}

type xmlSetting struct {
	name, value string
	removed     bool
}

// settingsIn returns the elements directly below a path of elements; those with children have no value.
func settingsIn(t *testing.T, file string, path ...string) (list []xmlSetting) {
	t.Helper()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var at []string
	for d := xml.NewDecoder(f); ; {
		token, err := d.Token()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatalf("%s: %v", file, err)
		}
		switch e := token.(type) {
		case xml.StartElement:
			if strings.Join(at, "/") == strings.Join(path, "/") {
				list = append(list, xmlSetting{name: e.Name.Local, removed: len(e.Attr) > 0 && e.Attr[0].Name.Local == "remove"})
			}
			at = append(at, e.Name.Local)
		case xml.EndElement:
			at = at[:len(at)-1]
		case xml.CharData:
			if n := len(list); n > 0 && len(at) == len(path)+1 && strings.Join(at[:len(path)], "/") == strings.Join(path, "/") {
				list[n-1].value += strings.TrimSpace(string(e))
			}
		}
	}
	if len(list) == 0 {
		t.Fatalf("%s: nothing in %v", file, path)
	}
	return list
}

// TestUnit: systemd takes the unit, and gives the program the time that it needs for a stop.
func TestUnit(t *testing.T) {
	b, err := os.ReadFile("../deploy/event-ingestion.service")
	if err != nil {
		t.Fatal(err)
	}
	unit := map[string]string{}
	for _, line := range strings.Split(string(b), "\n") {
		if name, value, ok := strings.Cut(line, "="); ok && !strings.HasPrefix(line, "#") {
			unit[name] = value
		}
	}
	stop, err := time.ParseDuration(unit["TimeoutStopSec"] + "s")
	if limit := programDefault(t, "SHUTDOWN_TIMEOUT"); err != nil || stop <= limit {
		t.Errorf("TimeoutStopSec=%s, SHUTDOWN_TIMEOUT %s", unit["TimeoutStopSec"], limit)
	}
	for name, want := range map[string]string{"KillSignal": "SIGTERM", "DynamicUser": "yes", "NoNewPrivileges": "yes", "ProtectSystem": "strict", "LimitNOFILE": "65536", "Restart": "always"} {
		if unit[name] != want {
			t.Errorf("%s=%s, want %s", name, unit[name], want)
		}
	}
	if unit["ExecStart"] != "/usr/local/bin/event-ingestion" || unit["EnvironmentFile"] == "" {
		t.Errorf("ExecStart=%s, EnvironmentFile=%s", unit["ExecStart"], unit["EnvironmentFile"])
	}
	// systemd looks whether the program is there.
	copied := filepath.Join(t.TempDir(), "event-ingestion.service")
	if err := os.WriteFile(copied, bytes.Replace(b, []byte("ExecStart="+unit["ExecStart"]), []byte("ExecStart="+os.Args[0]), 1), 0o644); err != nil {
		t.Fatal(err)
	}
	checkWith(t, "systemd-analyze", "verify", "--man=no", copied)
}

func TestBalancerConfig(t *testing.T) {
	checkWith(t, "haproxy", "-c", "-q", "-f", "../deploy/haproxy.cfg")
}

func TestProxyConfig(t *testing.T) {
	checkWith(t, "nginx", "-t", "-q", "-e", "stderr", "-g", "pid "+t.TempDir()+"/pid;", "-c", fileAt(t, "../deploy/nginx.conf"))
}

func fileAt(t *testing.T, path string) string {
	t.Helper()
	absolute, err := filepath.Abs(path)
	if err != nil {
		t.Fatal(err)
	}
	return absolute
}

// checkWith runs the checker of a file's own program, where that is installed.
func checkWith(t *testing.T, program string, args ...string) {
	t.Helper()
	path, err := exec.LookPath(program)
	if err != nil {
		t.Skipf("%s is not installed (Debian's package %s has it): the file is not checked here", program,
			cmp.Or(map[string]string{"promtool": "prometheus", "systemd-analyze": "systemd"}[program], program))
	}
	out, err := exec.Command(path, args...).CombinedOutput()
	if err != nil || program == "systemd-analyze" && len(bytes.TrimSpace(out)) > 0 { // it only warns about unknown keys
		t.Errorf("%s %s: %v\n%s", program, strings.Join(args, " "), err, out)
	}
}
