// Package ops has the commands that operators run beside the system: audit, dlq, erase, export, healthcheck, import, reconcile and rewind.
//
// A command knows the system by one value, System. ops.go owns that door, the list of commands, their exit codes, and healthcheck,
// which is the smallest command and shows what one looks like. tables.go has what commands share that ask ClickHouse, records.go
// what those share that read Kafka.
//
// A new command takes three things: a func such as healthcheck, a line in commands, and a line in the usage of main.go.
package ops

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strconv"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/ClickHouse/ch-go"
	"github.com/twmb/franz-go/pkg/kgo"
)

// System is what the commands know of the system. A command may use less: healthcheck reaches neither store.
type System struct {
	Topic, Group, Database string // the main topic, beside which are TOPIC.retry and TOPIC.dlq; the consumer group; ClickHouse's database
	Listen                 string // host:port of the API; an empty host is every interface
	TLS                    bool   // the API speaks HTTPS
	// ClickHouse is the host of ClickHouse, with whom to log in there.
	ClickHouse, Username, Password string

	// Kafka makes a client that reaches the brokers. Its caller closes it.
	Kafka func(clientID string, opts ...kgo.Opt) (*kgo.Client, error)
	// Connect calls f with a connection to the server of ClickHouse that answers for all. The connection ends with f, or with ctx.
	Connect func(ctx context.Context, f func(Conn) error) error
	// EachServer is Connect for every server of the cluster, one after the other and always in the same order, up to the first
	// error. Without a cluster it is Connect.
	EachServer func(ctx context.Context, f func(Conn) error) error
	// SQL fills in the braces of schema.sql: {database}, {events}, {events_hourly}, {erasures} and so on.
	SQL func(text string) string
	// Decode reads a record's value: the event's id, its time in Unix seconds and its user, who is valid until the next call. The
	// error says why the value is no event. It serves one goroutine.
	Decode func(value []byte) (id [32]byte, at int64, userID []byte, err error)
	// CheckLine checks a line of an import by every rule of an event but that of its age; with segment it is a message of Segment's
	// protocol. value is the event as the topic has it, nil for a message that is not stored; the rest is as with Decode. refused has
	// field, code and message of what is wrong. It serves one goroutine.
	CheckLine func(line []byte, segment bool) (value []byte, id [32]byte, at int64, userID []byte, refused [][3]string)
	// SyncReplicas waits until each server has what other replicas of its shard have. Without replicas there is nothing to wait for.
	SyncReplicas func(ctx context.Context) error
	// Differences is the SQL of a subquery, with braces: events minus events_hourly, of the hours and of what differs that two
	// conditions name. AddDifferences is the statement that mends, with a subquery behind it; MendingID is the id of its query, which
	// the program looks for; Inserting are the settings of an insert.
	Differences               func(hours, differs string) string
	AddDifferences, MendingID string
	Inserting                 func() []ch.Setting
}

// Conn runs a query on a connection: it is the method Do of a client of ch-go.
type Conn func(ctx context.Context, q ch.Query) error

// command adds its flags and returns what to do once they are parsed.
type command func(*flag.FlagSet) action

// action does it. args is what stands behind the flags, for those of takeArguments; w is where answers go. An error ends the
// command with 1, or with 2 when it is a badArgument.
type action func(ctx context.Context, sys System, args []string, w io.Writer) error

var commands = map[string]command{
	"audit":       audit,
	"dlq list":    dlqList,
	"dlq show":    dlqShow,
	"dlq replay":  dlqReplay,
	"erase":       erase,
	"export":      export,
	"healthcheck": healthcheck,
	"import":      importFiles,
	"reconcile":   reconcile,
	"rewind":      rewind,
}

// groups are the commands that have commands of their own, and their usage.
var groups = map[string]string{"dlq": dlqUsage}

// takeArguments are the commands that take more than flags. The others refuse it: "dlq replay 0:17" would put all letters back.
var takeArguments = []string{"dlq show", "import"}

// errDiffers ends a command with 1 when its output has said all there is to say.
var errDiffers = errors.New("what was compared differs")

// badArgument is an error that ends a command with 2.
type badArgument struct{ error }

// Run runs the command that args begin with and returns its exit code: 0, 1 when it failed or found a difference, 2 for
// arguments or settings that are wrong. system is called once the arguments are parsed; its error is about settings.
func Run(args []string, system func() (System, error), stdout, stderr io.Writer) int {
	stderr = visible{stderr} // errors repeat what records and rows hold
	name, args := args[0], args[1:]
	if usage, is := groups[name]; is {
		if len(args) == 1 && slices.Contains([]string{"help", "-h", "-help", "--help"}, args[0]) {
			fmt.Fprint(stdout, usage)
			return 0
		}
		if len(args) == 0 || commands[name+" "+args[0]] == nil {
			fmt.Fprint(stderr, usage)
			return 2
		}
		name, args = name+" "+args[0], args[1:]
	}
	define := commands[name]
	if define == nil {
		fmt.Fprintf(stderr, "unknown command %q; try event-ingestion -h\n", name)
		return 2
	}
	fs := flag.NewFlagSet(name, flag.ContinueOnError)
	fs.SetOutput(stderr)
	do := define(fs)
	if err := fs.Parse(args); errors.Is(err, flag.ErrHelp) {
		return 0
	} else if err != nil {
		return 2
	}
	if fs.NArg() > 0 && !slices.Contains(takeArguments, name) {
		fmt.Fprintf(stderr, "%s: unexpected argument %q\n", name, fs.Arg(0))
		return 2
	}
	sys, err := system()
	if err != nil {
		fmt.Fprintln(stderr, err)
		return 2
	}
	err = do(context.Background(), sys, fs.Args(), stdout)
	if err == nil {
		return 0
	}
	if err != errDiffers {
		fmt.Fprintf(stderr, "%s: %v\n", name, err)
	}
	if _, bad := errors.AsType[badArgument](err); bad {
		return 2
	}
	return 1
}

// healthcheckTimeout is a second more than the program takes to answer /ready, whatever hangs.
const healthcheckTimeout = 4 * time.Second

// healthcheck asks the API of this machine whether it is ready, for containers that have no curl.
func healthcheck(fs *flag.FlagSet) action {
	fs.Usage = func() {
		fmt.Fprintln(fs.Output(), "healthcheck exits 0 when the instance of this machine is ready, else 1 and says why; it takes no flags, and the program's settings")
	}
	return func(ctx context.Context, sys System, _ []string, _ io.Writer) error {
		host, port, err := net.SplitHostPort(sys.Listen)
		if err != nil {
			return err
		}
		if ip := net.ParseIP(host); host == "" || ip.IsUnspecified() {
			host = "localhost"
		}
		scheme := "http"
		if sys.TLS {
			scheme = "https"
		}
		client := http.Client{ // the certificate is for another name than localhost
			Timeout: healthcheckTimeout, Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}}
		resp, err := client.Get(scheme + "://" + net.JoinHostPort(host, port) + "/ready")
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			said, _ := io.ReadAll(resp.Body)
			return errors.New(string(said))
		}
		return nil
	}
}

// visible writes text for a terminal: a control character of a client's could move its cursor, or worse, so that it is written as JSON
// and Go escape it. A character has to be within one call of Write, as those of package json and fmt.Fprintf are.
type visible struct{ w io.Writer }

func (v visible) Write(b []byte) (int, error) {
	isControl := func(r rune) bool { return r != '\n' && r != '\t' && unicode.IsControl(r) }
	if !bytes.ContainsFunc(b, isControl) { // Fast path
		return v.w.Write(b)
	}
	var shown []byte
	for at := 0; at < len(b); {
		r, n := utf8.DecodeRune(b[at:])
		if isControl(r) {
			shown = fmt.Appendf(shown, `\u%04x`, r)
		} else {
			shown = append(shown, b[at:at+n]...)
		}
		at += n
	}
	if _, err := v.w.Write(shown); err != nil {
		return 0, err
	}
	return len(b), nil
}

// cell is text of a client's, or of whoever wrote a record, as one cell of a table.
func cell(text string) string {
	quoted := strconv.QuoteToGraphic(text)
	return quoted[1 : len(quoted)-1]
}
