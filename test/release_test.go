// What is given to others: a version that the program says, binaries with checksums, and the licences of what is in them.

package test

import (
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"debug/elf"
	"debug/macho"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"

	swagger "github.com/swaggest/swgui/v5/static"
)

const licensesFile = "deploy/LICENSES.txt"

// changelogVersion is CHANGELOG.md's newest version.
func changelogVersion(t *testing.T) (version string, isReleased bool) {
	t.Helper()
	b, err := os.ReadFile("CHANGELOG.md")
	if err != nil {
		t.Fatal(err)
	}
	var versions []string
	headings := regexp.MustCompile(`(?m)^## (.*)$`).FindAllStringSubmatch(string(b), -1)
	for i, h := range headings {
		m := regexp.MustCompile(`^(\d+\.\d+\.\d+) \(\d{4}-\d\d-\d\d\)$`).FindStringSubmatch(h[1])
		switch {
		case m != nil:
			versions = append(versions, m[1])
		case i > 0 || h[1] != "Unreleased":
			t.Errorf("CHANGELOG.md: %q is no version and its day, 1.2.3 (2026-01-31)", h[1])
		}
	}
	if len(versions) == 0 {
		t.Fatal("CHANGELOG.md has no version")
	}
	return versions[0], headings[0][1] != "Unreleased"
}

// TestRelease: each platform's binary is one of that platform, needs no library of a Linux, and has its checksum and the licences beside
// it; the one for this machine says CHANGELOG.md's version. A tag that is another version ends it before anything is built.
func TestRelease(t *testing.T) {
	if testing.Short() {
		t.Skip("compiles the program for four platforms")
	}
	t.Parallel()
	version, isReleased := changelogVersion(t)
	dist := t.TempDir()
	release := func(tag string) (string, error) {
		cmd := exec.Command("dev/scripts/release.sh")
		cmd.Env = append(os.Environ(), "DIST="+dist, "TAG="+tag)
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	if out, err := release("v9.9.9"); err == nil || !strings.Contains(out, "v9.9.9") || !strings.Contains(out, version) {
		t.Errorf("with another tag: %v %s", err, out)
	}
	if left, _ := os.ReadDir(dist); len(left) > 0 {
		t.Errorf("with another tag there is %v", left)
	}
	if out, err := release(""); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if given, err := exec.Command("dev/scripts/version.sh").Output(); err != nil || isReleased && string(given) != version+"\n" || !isReleased && !strings.HasPrefix(string(given), version+"+dev") {
		t.Errorf("version.sh says %q, CHANGELOG.md %s: %v", given, version, err)
	} else {
		version = strings.TrimSpace(string(given))
	}
	sums, err := os.ReadFile(filepath.Join(dist, "SHA256SUMS"))
	if err != nil {
		t.Fatal(err)
	}
	names := []string{"LICENSES.txt"}
	for _, platform := range []string{"darwin-amd64", "darwin-arm64", "linux-amd64", "linux-arm64"} {
		names = append(names, "event-ingestion-"+version+"-"+platform)
	}
	entries, _ := os.ReadDir(dist)
	if len(entries) != len(names)+1 || strings.Count(string(sums), "\n") != len(names) {
		t.Errorf("dist has %v, SHA256SUMS:\n%s", entries, sums)
	}
	for _, name := range names {
		b, err := os.ReadFile(filepath.Join(dist, name))
		if err != nil {
			t.Error(err)
			continue
		}
		if !strings.Contains(string(sums), fmt.Sprintf("%x  %s\n", sha256.Sum256(b), name)) {
			t.Errorf("the checksum of %s is not %x:\n%s", name, sha256.Sum256(b), sums)
		}
		machine := ""
		if f, err := elf.NewFile(bytes.NewReader(b)); err == nil {
			machine = map[elf.Machine]string{elf.EM_X86_64: "linux-amd64", elf.EM_AARCH64: "linux-arm64"}[f.Machine]
			if slices.ContainsFunc(f.Progs, func(p *elf.Prog) bool { return p.Type == elf.PT_INTERP }) {
				t.Errorf("%s needs a dynamic linker", name)
			}
		} else if f, err := macho.NewFile(bytes.NewReader(b)); err == nil {
			machine = map[macho.Cpu]string{macho.CpuAmd64: "darwin-amd64", macho.CpuArm64: "darwin-arm64"}[f.Cpu]
		}
		if name != "LICENSES.txt" && !strings.HasSuffix(name, "-"+machine) || machine != "" && bytes.Contains(b, []byte(mustAbs(t, "."))) {
			t.Errorf("%s is of %q, or knows this machine's paths", name, machine)
		}
	}
	for _, argument := range []string{"version", "-version", "--version"} {
		out, err := exec.Command(filepath.Join(dist, "event-ingestion-"+version+"-"+runtime.GOOS+"-"+runtime.GOARCH), argument).Output()
		if err != nil || string(out) != version+" "+runtime.Version()+"\n" {
			t.Errorf("%s: %q, %v; want %s", argument, out, err, version)
		}
	}
}

func mustAbs(t *testing.T, path string) string {
	t.Helper()
	absolute, err := filepath.Abs(path)
	if err != nil {
		t.Fatal(err)
	}
	return absolute
}

// linked is a module, or the standard library, with the directories of those of its packages that are in the program.
type linked struct{ name, root string }

// linkedPackages are the directories of all that is linked into the program on any platform that is released, by module.
func linkedPackages(t *testing.T) map[linked][]string {
	t.Helper()
	all := map[linked][]string{}
	root, err := exec.Command("go", "env", "GOROOT").Output()
	if err != nil {
		t.Fatal(err)
	}
	for _, platform := range []string{"linux amd64", "linux arm64", "darwin amd64", "darwin arm64"} {
		system, machine, _ := strings.Cut(platform, " ")
		cmd := exec.Command("go", "list", "-deps", "-json=Dir,Standard,Module", ".")
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS="+system, "GOARCH="+machine)
		out, err := cmd.Output()
		if err != nil {
			t.Fatal(err)
		}
		for d := json.NewDecoder(bytes.NewReader(out)); ; {
			var p struct {
				Dir      string
				Standard bool
				Module   *struct {
					Path, Version, Dir string
					Main               bool
				}
			}
			if err := d.Decode(&p); err == io.EOF {
				break
			} else if err != nil {
				t.Fatal(err)
			}
			switch {
			case p.Standard:
				all[linked{"The Go standard library and runtime", strings.TrimSpace(string(root))}] = nil // one licence for all of it
			case !p.Module.Main:
				m := linked{p.Module.Path + " " + p.Module.Version, p.Module.Dir}
				all[m] = append(all[m], p.Dir)
			}
		}
	}
	return all
}

// licenseTexts are the licences of a module: each file that says one, at its root and in the directories down to its packages.
func licenseTexts(t *testing.T, m linked, packages []string) (texts string) {
	t.Helper()
	isLicense := regexp.MustCompile(`(?i)^(licen[cs]e|copying|notice|patents)([.-].*)?$`)
	dirs := map[string]bool{m.root: true}
	for _, dir := range packages {
		for ; len(dir) > len(m.root); dir = filepath.Dir(dir) {
			dirs[dir] = true
		}
	}
	var files []string
	for dir := range dirs {
		entries, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			if !e.IsDir() && isLicense.MatchString(e.Name()) {
				files = append(files, filepath.Join(dir, e.Name()))
			}
		}
	}
	slices.Sort(files)
	var seen []string
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		text := strings.TrimSpace(strings.ReplaceAll(string(b), "\r\n", "\n")) + "\n"
		if !slices.Contains(seen, text) { // the same one further down
			seen = append(seen, text)
			texts += "\n" + text
		}
	}
	if texts == "" {
		t.Errorf("%s has no licence that is found", m.name)
	}
	return texts
}

const (
	licensesIntro = "What is in the program beside its own source, and under which licence: the Go modules that are linked in, from the addresses that their\n" +
		"names are, and Swagger UI, which is embedded. Made by `make licenses`, but for the part on Swagger UI, which is kept as it is.\n"
	rule         = "\n================================================================================\n"
	swaggerTitle = "Swagger UI "
)

// TestLicenses: deploy/LICENSES.txt has the licence of everything that is linked in or embedded, of this version, and of nothing else. With
// LICENSES=write it writes the file.
func TestLicenses(t *testing.T) {
	b, err := os.ReadFile(licensesFile)
	if err != nil {
		t.Fatal(err)
	}
	_, ofSwagger, is := strings.Cut(string(b), rule+swaggerTitle)
	if !is {
		t.Fatalf("%s has no part on Swagger UI", licensesFile)
	}
	modules := linkedPackages(t)
	if len(modules) < 20 {
		t.Fatalf("only %d modules found", len(modules))
	}
	var parts []string
	for m, packages := range modules {
		parts = append(parts, rule+m.name+"\n"+licenseTexts(t, m, packages))
	}
	slices.Sort(parts)
	want := licensesIntro + strings.Join(parts, "") + rule + swaggerTitle + ofSwagger
	if os.Getenv("LICENSES") == "write" {
		if err := os.WriteFile(licensesFile, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
	} else if want != string(b) {
		for _, part := range parts {
			if name, _, _ := strings.Cut(strings.TrimPrefix(part, rule), "\n"); !strings.Contains(string(b), part) {
				t.Errorf("%s: the licence of %s is not there, or another one", licensesFile, name)
			}
		}
		t.Errorf("%s is not what is linked in: run `make licenses` and look at the difference", licensesFile)
	}

	// What is embedded: the bundle says its version, and points at the licences of what is in it.
	f, err := swagger.FS.Open("swagger-ui-bundle.js.gz")
	if err != nil {
		t.Fatal(err)
	}
	unzipped, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	bundle, err := io.ReadAll(unzipped)
	if err != nil {
		t.Fatal(err)
	}
	sum := fmt.Sprintf("%x", sha256.Sum256(bundle))
	for _, said := range []string{sum, "Apache License", "SmartBear", "swagger-ui-bundle.js.LICENSE.txt", "React", "Facebook, Inc. and its affiliates"} {
		if !strings.Contains(ofSwagger, said) {
			t.Errorf("%s says nothing of %q for the Swagger UI that is embedded", licensesFile, said)
		}
	}
	embedded, err := swagger.FS.ReadDir(".")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range embedded {
		if !strings.Contains(ofSwagger, strings.TrimSuffix(e.Name(), ".gz")) {
			t.Errorf("%s does not name %s", licensesFile, e.Name())
		}
	}
}
