// The command line: what dev is told, checked before anything starts.

package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
)

// The kinds of Kafka that there are.
const (
	kindEmbedded = "embedded"
	kindCluster  = "cluster"
)

const usage = `dev runs a command with what the program needs around it: two Kafka-protocol brokers and a ClickHouse, or several.

  dev [flags] -- CMD ARGS…   start both, wait until they answer, run CMD, stop everything with it;
                             ends with CMD's exit code
  dev [-data DIR] stop       stop the dev that runs on DIR and wait until it is gone

CMD finds in its environment KAFKA_BROKERS, CLICKHOUSE_HOST, CLICKHOUSE_PORT, CLICKHOUSE_HTTP_PORT,
CLICKHOUSE_USERNAME, CLICKHOUSE_PASSWORD and DEV_CONTROL, where fault tests take parts of the stack away;
DEV_KAFKA_NODES names the brokers of a cluster that can be killed one by one, DEV_COMMAND is dev itself.
With -shards, CLICKHOUSE_CLUSTER names the cluster that the servers make, and CLICKHOUSE_HTTP_PORT lists their ports.
ClickHouse is the library CLICKHOUSE_LIB if that is set, else a recent clickhouse from the PATH, else a library
that npm brings once. -kafka cluster needs Java 17 and, once, Maven.

Flags:
`

const (
	megabyte = 1_000_000
	// defaultKeepFree, in MB, is two seconds of a disk that is being filled as fast as it can be, and little for a laptop.
	defaultKeepFree = 1000
	// minDisk, in MB, is enough for empty tables and a journal.
	minDisk = 256
	// maxShards is as many servers as a machine may try to hold.
	maxShards = 16
)

// config is what the command line says.
type config struct {
	data       string
	ephemeral  bool
	kafka      string // kindEmbedded or kindCluster
	compose    string
	kafkaPorts []int
	shards     int   // servers of ClickHouse
	later      int   // of these, so many join the cluster only when a test says so
	replicas   bool  // the servers are one shard
	nativePort int   // as the command line says it
	httpPort   int   // the same
	native     []int // one a shard
	http       []int
	keepFree   int  // MB
	disk       int  // MB of a disk that forgets what was not flushed, 0 for none
	kafkaFsync bool // brokers acknowledge what is on the disk
	verbose    bool

	stop bool     // the stop subcommand
	args []string // CMD and its arguments
}

func (cfg *config) ports() []int {
	return slices.Concat(cfg.native, cfg.http, cfg.kafkaPorts)
}

// parseFlags takes everything before the first `--` as flags and the rest as CMD. After flag.ErrHelp the usage is on
// out; every other error is for the caller to print.
func parseFlags(args []string, out io.Writer) (*config, error) {
	cfg := new(config)
	data := os.Getenv("DATA_DIR")
	if data == "" {
		data = ".data"
	}
	keepFree := defaultKeepFree
	if mb := os.Getenv("KEEP_FREE_MB"); mb != "" {
		var err error
		if keepFree, err = strconv.Atoi(mb); err != nil {
			return nil, fmt.Errorf("KEEP_FREE_MB %q is no number", mb)
		}
	}
	var kafkaPorts string
	fs := flag.NewFlagSet("dev", flag.ContinueOnError)
	fs.StringVar(&cfg.data, "data", data, "keep the data in `DIR`; DATA_DIR sets the default")
	fs.BoolVar(&cfg.ephemeral, "ephemeral", false, "free ports and a temporary data directory, removed at the end: for tests")
	fs.StringVar(&cfg.kafka, "kafka", kindEmbedded, "`KIND` of brokers: embedded, in this process; or cluster, Apache Kafka as the compose file sets it up")
	fs.StringVar(&cfg.compose, "compose", "docker-compose.yml", "`FILE` that a cluster is derived from")
	fs.StringVar(&kafkaPorts, "kafka-ports", "29092,29093", "a broker on each of these `PORTS` of 127.0.0.1")
	fs.IntVar(&cfg.shards, "shards", 1, "so many ClickHouse servers, `N`, each a shard of one cluster")
	fs.IntVar(&cfg.later, "later", 0, "of these, the last `N` are no part of the cluster until /clickhouse/join")
	fs.BoolVar(&cfg.replicas, "replicas", false, "the servers are one shard, as if their tables were replicated, which takes a Keeper")
	fs.IntVar(&cfg.nativePort, "clickhouse-port", 9000, "ClickHouse's native `PORT`; more servers have the ports behind it")
	fs.IntVar(&cfg.httpPort, "clickhouse-http-port", 8123, "ClickHouse's HTTP `PORT`; more servers have the ports behind it")
	fs.IntVar(&cfg.keepFree, "keep-free", keepFree, "ClickHouse leaves the last so many `MB` of its disk alone; KEEP_FREE_MB sets the default")
	fs.IntVar(&cfg.disk, "disk", 0, "the stores are on a disk of their own, of so many `MB`, which forgets what was not flushed when dev is killed: a power cut; takes Linux and root")
	fs.BoolVar(&cfg.kafkaFsync, "kafka-fsync", false, "embedded brokers acknowledge what is on the disk, where Kafka has it in the page caches of several machines")
	fs.BoolVar(&cfg.verbose, "v", false, "log more: the brokers here, ClickHouse in DIR/clickhouse.log")
	fs.SetOutput(io.Discard) // else Parse buries its error under the whole usage

	flags, command := args, false
	if i := slices.Index(args, "--"); i >= 0 {
		flags, cfg.args, command = args[:i], args[i+1:], true
	}
	if err := fs.Parse(flags); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			fmt.Fprint(out, usage)
			fs.SetOutput(out)
			fs.PrintDefaults()
		}
		return nil, err
	}
	switch {
	case !command && fs.NArg() == 1 && fs.Arg(0) == "stop":
		cfg.stop = true
		return cfg, nil
	case fs.NArg() > 0:
		return nil, fmt.Errorf("%q is neither `stop` nor, behind `--`, a command", fs.Arg(0))
	case len(cfg.args) == 0:
		return nil, errors.New("no command")
	}
	if cfg.kafka != kindEmbedded && cfg.kafka != kindCluster {
		return nil, fmt.Errorf("-kafka %q is neither %s nor %s", cfg.kafka, kindEmbedded, kindCluster)
	}
	var chosen []string // what -ephemeral chooses by itself
	fs.Visit(func(f *flag.Flag) {
		if f.Name == "data" || strings.HasSuffix(f.Name, "-port") || strings.HasSuffix(f.Name, "-ports") {
			chosen = append(chosen, "-"+f.Name)
		}
	})
	if cfg.ephemeral && len(chosen) > 0 {
		return nil, fmt.Errorf("-ephemeral chooses the directory and the ports: leave out %s", strings.Join(chosen, ", "))
	}
	for _, s := range strings.Split(kafkaPorts, ",") {
		port, err := strconv.Atoi(strings.TrimSpace(s))
		if err != nil {
			return nil, fmt.Errorf("-kafka-ports %q is not a list of port numbers", kafkaPorts)
		}
		cfg.kafkaPorts = append(cfg.kafkaPorts, port)
	}
	if cfg.shards < 1 || cfg.shards > maxShards {
		return nil, fmt.Errorf("-shards %d has to be 1 to %d", cfg.shards, maxShards)
	}
	if cfg.later < 0 || cfg.later > 0 && cfg.later >= cfg.shards-1 || cfg.later > 0 && cfg.replicas {
		return nil, fmt.Errorf("-later %d leaves no cluster: -shards %d has to be two more, without -replicas", cfg.later, cfg.shards)
	}
	if cfg.disk < 0 || cfg.disk > 0 && cfg.disk < minDisk {
		return nil, fmt.Errorf("-disk %d has to be %d or more", cfg.disk, minDisk)
	}
	for i := range cfg.shards {
		cfg.native, cfg.http = append(cfg.native, cfg.nativePort+i), append(cfg.http, cfg.httpPort+i)
	}
	if cfg.keepFree < 0 {
		return nil, fmt.Errorf("-keep-free %d has to be 0 or more", cfg.keepFree)
	}
	for i, port := range cfg.ports() {
		if port < 1 || port > 65535 {
			return nil, fmt.Errorf("port %d has to be 1 to 65535", port)
		}
		if slices.Contains(cfg.ports()[:i], port) {
			return nil, fmt.Errorf("port %d is given twice", port)
		}
	}
	return cfg, nil
}
