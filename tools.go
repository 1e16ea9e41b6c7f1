// Subcommands for operators: audit, reconcile, rewind and dlq.
//
// tools.go owns what they have in common: flags, settings, exit codes. Each has a file of its own.

package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"strings"
	"time"
)

// tool is a subcommand: it adds its flags and returns what to do once they are parsed.
type tool func(*flag.FlagSet) toolRun

type toolRun func(ctx context.Context, cfg *settings, args []string, w io.Writer) error

var tools = map[string]tool{
	"audit": auditTool, "reconcile": reconcileTool, "rewind": rewindTool,
	"dlq list": dlqListTool, "dlq show": dlqShowTool, "dlq replay": dlqReplayTool,
}

// errDiffers ends a subcommand with 1 when its output has said all there is to say.
var errDiffers = errors.New("what was compared differs")

// badArgument is an error that ends a subcommand with 2.
type badArgument struct{ error }

// runTool runs a subcommand and returns its exit code: 0, 1 when it failed or found a difference, 2 for arguments or
// settings that are wrong.
func runTool(name string, args []string, stdout, stderr io.Writer) int {
	if name == "dlq" {
		if len(args) == 0 || tools["dlq "+args[0]] == nil {
			fmt.Fprint(stderr, dlqUsage)
			return 2
		}
		name, args = "dlq "+args[0], args[1:]
	}
	fs := flag.NewFlagSet(name, flag.ContinueOnError)
	fs.SetOutput(stderr)
	run := tools[name](fs)
	if err := fs.Parse(args); errors.Is(err, flag.ErrHelp) {
		return 0
	} else if err != nil {
		return 2
	}
	if fs.NArg() > 0 && name != "dlq show" { // "dlq replay 0:17" would put all letters back
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
	if err != errDiffers {
		fmt.Fprintf(stderr, "%s: %v\n", name, err)
	}
	if bad := (badArgument{}); errors.As(err, &bad) {
		return 2
	}
	return 1
}

// timeRange is what -from and -to say: Unix seconds or RFC 3339, from included, to excluded.
type timeRange struct{ from, to int64 }

// flags adds -from and -to. The default is everything that the API can have accepted.
func (r *timeRange) flags(fs *flag.FlagSet) {
	now := time.Now().Unix()
	r.from, r.to = now-maxAgeSeconds-86400, now+hourSeconds
	at := func(dst *int64) func(string) error {
		return func(s string) error {
			if _, err := fmt.Sscan(s, dst); err == nil && !strings.ContainsAny(s, "-:T") {
				return nil
			}
			t, err := time.Parse(time.RFC3339, s)
			*dst = t.Unix()
			return err
		}
	}
	fs.Func("from", "first second of event time, Unix or RFC 3339 (default 31 days ago)", at(&r.from))
	fs.Func("to", "second after the last (default in an hour)", at(&r.to))
}
