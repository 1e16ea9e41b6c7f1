// What the commands reconcile and reshard have in common. The others are package ops.

package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"strconv"
	"time"

	"github.com/ClickHouse/ch-go"
	"github.com/ClickHouse/ch-go/proto"
	"github.com/twmb/franz-go/pkg/kadm"
	"github.com/twmb/franz-go/pkg/kerr"
)

// tool is a subcommand: it adds its flags and returns what to do once they are parsed.
type tool func(*flag.FlagSet) toolRun

type toolRun func(ctx context.Context, cfg *settings, args []string, w io.Writer) error

var tools = map[string]tool{"reconcile": reconcileTool, "reshard": reshardTool}

// badArgument is an error that ends a subcommand with 2.
type badArgument struct{ error }

// runTool runs a subcommand and returns its exit code: 0, 1 when it failed, 2 for arguments or settings that are
// wrong.
func runTool(name string, args []string, stdout, stderr io.Writer) int {
	fs := flag.NewFlagSet(name, flag.ContinueOnError)
	fs.SetOutput(stderr)
	run := tools[name](fs)
	if err := fs.Parse(args); errors.Is(err, flag.ErrHelp) {
		return 0
	} else if err != nil {
		return 2
	}
	if fs.NArg() > 0 {
		fmt.Fprintf(stderr, "%s: unexpected argument %q\n", name, fs.Arg(0))
		return 2
	}
	cfg, err := loadSettings(os.Getenv)
	if err != nil {
		fmt.Fprintln(stderr, err)
		return 2
	}
	err = run(context.Background(), cfg, fs.Args(), stdout)
	if err == nil {
		return 0
	}
	fmt.Fprintf(stderr, "%s: %v\n", name, err)
	if _, bad := errors.AsType[badArgument](err); bad {
		return 2
	}
	return 1
}

// exclusively runs a change of tables or offsets when no other one runs: a query with an id of its own runs as long, and ClickHouse
// refuses another one with that id. The query ends with its connection, however the command ends, and the change with the query.
// A dry run changes nothing, and waits for nobody.
func exclusively(ctx context.Context, cfg *settings, dryRun bool, change func(context.Context) error) error {
	if dryRun {
		return change(ctx)
	}
	shards, err := newStore(cfg).shards(ctx)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	for attempt := 0; ; attempt++ {
		c, err := shards[0].dial(ctx)
		if err != nil {
			return err
		}
		runs, ended := make(chan struct{}, 1), make(chan error, 1)
		go func() { // ends with the connection
			ended <- c.Do(ctx, eachRow(ch.Query{
				QueryID: "tables " + cfg.clickhouseDatabase,
				Body:    "SELECT sleepEachRow(0.1) FROM system.numbers SETTINGS max_block_size = 1, max_execution_time = 0",
			}, func(int) { notify(runs, struct{}{}) }, new(proto.ColUInt8)))
		}()
		select {
		case <-runs:
			defer c.Close()
			go func() { // ends with the connection
				<-ended
				cancel()
			}()
			return change(ctx)
		case err = <-ended:
			c.Close()
		}
		switch {
		case !ch.IsErr(err, proto.ErrQueryWithSameIDIsAlreadyRunning):
			return err
		case attempt == 20: // what has just ended lets go within two seconds
			return errors.New("another command changes the tables: wait for its end")
		}
		if err := sleep(ctx, minBackoff); err != nil {
			return err
		}
	}
}

// timeRange is what -from and -to say: Unix seconds or RFC 3339, from included, to excluded.
type timeRange struct{ from, to int64 }

// flags adds -from and -to. The default is everything that the API can have accepted.
func (r *timeRange) flags(fs *flag.FlagSet) {
	now := time.Now().Unix()
	r.from, r.to = now-maxAgeSeconds-86400, now+hourSeconds
	at := func(dst *int64) func(string) error {
		return func(s string) error {
			n, err := strconv.ParseInt(s, 10, 64)
			if err != nil {
				var t time.Time
				t, err = time.Parse(time.RFC3339, s)
				n = t.Unix()
			}
			*dst = n
			return err
		}
	}
	fs.Func("from", "first second of event time, Unix or RFC 3339 (default 31 days ago)", at(&r.from))
	fs.Func("to", "second after the last (default in an hour)", at(&r.to))
}

func (r *timeRange) check() error {
	if r.from >= r.to {
		return badArgument{fmt.Errorf("-to %d has to be after -from %d", r.to, r.from)}
	}
	return nil
}

// mustBeIdle refuses a group with members: they would commit over what is set here.
func mustBeIdle(ctx context.Context, admin *kadm.Client, group string) error {
	groups, err := whole(admin.DescribeGroups(ctx, group))
	if err != nil && !errors.Is(err, kerr.GroupIDNotFound) { // nobody has ever joined it
		return fmt.Errorf("describe group %s: %w", group, err)
	}
	if members := groups[group].Members; len(members) > 0 {
		return fmt.Errorf("group %s has members, %d of them, such as one at %s: stop the program first, or wait until the group has missed those that were killed",
			group, len(members), members[0].ClientHost)
	}
	return nil
}
