// Where Apache Kafka comes from: Maven, once a version, into the user's cache beside ClickHouse's library.

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
)

// copyJars is Maven's goal that puts a project's dependencies into a directory.
const copyJars = "org.apache.maven.plugins:maven-dependency-plugin:3.8.1:copy-dependencies"

// kafkaPOM asks for the brokers, and for a logger that writes to stderr: Kafka itself only brings the interface.
const kafkaPOM = `<project xmlns="http://maven.apache.org/POM/4.0.0">
  <modelVersion>4.0.0</modelVersion>
  <groupId>dev</groupId><artifactId>kafka</artifactId><version>1</version><packaging>pom</packaging>
  <dependencies>
    <dependency><groupId>org.apache.kafka</groupId><artifactId>kafka_2.13</artifactId><version>%s</version></dependency>
    <dependency><groupId>org.slf4j</groupId><artifactId>slf4j-simple</artifactId><version>1.7.36</version></dependency>
  </dependencies>
</project>
`

// installKafka returns the directory with the jars of a version. Like installLibrary: installs wait for each other, and
// one that breaks off leaves nothing behind that could be taken for Kafka.
func installKafka(ctx context.Context, version string) (string, error) {
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", err
	}
	cache = filepath.Join(cache, "event-ingestion", "kafka")
	final := filepath.Join(cache, version)
	jars := filepath.Join(final, "jars")
	if _, err := os.Stat(jars); err == nil { // Fast path: a rename has put it there whole
		return jars, nil
	}
	mvn, err := exec.LookPath("mvn")
	if err != nil {
		return "", errors.New("no Kafka: install Maven (`mvn` on the PATH), which brings it")
	}
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return "", err
	}
	unlock, err := lockInstall(ctx, filepath.Join(cache, "install.lock"))
	if err != nil {
		return "", err
	}
	defer unlock()
	if _, err := os.Stat(jars); err == nil {
		return jars, nil
	}
	partial := final + ".partial"
	os.RemoveAll(partial)
	defer os.RemoveAll(partial)
	if err := os.MkdirAll(partial, 0o755); err != nil {
		return "", err
	}
	if err := os.WriteFile(filepath.Join(partial, "pom.xml"), fmt.Appendf(nil, kafkaPOM, version), 0o644); err != nil {
		return "", err
	}
	progress("installing Apache Kafka %s, once: 44 MB", version)
	if err := mvnCopy(ctx, mvn, partial); err != nil {
		return "", err
	}
	return jars, os.Rename(partial, final)
}

// mvnCopy runs copyJars in dir.
func mvnCopy(ctx context.Context, mvn, dir string) error {
	log, err := os.Create(filepath.Join(dir, "mvn.log"))
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := exec.Command(mvn, "-B", "-q", copyJars, "-DoutputDirectory=jars", "-DincludeScope=runtime")
	cmd.Dir, cmd.Stdout, cmd.Stderr = dir, log, log
	g, err := startGroup(cmd)
	if err != nil {
		return fmt.Errorf("%s: %w", mvn, err)
	}
	stop := context.AfterFunc(ctx, func() { g.signal(syscall.SIGKILL) })
	defer stop()
	if err := g.wait(); err != nil {
		return fmt.Errorf("mvn %s: %w\n%s", copyJars, err, tail(log.Name()))
	}
	return nil
}
