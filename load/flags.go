// The flags of the subcommand, and what they may be.

package load

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"math"
	"net/url"
	"os"
	"strconv"
	"strings"
	"time"
)

// Config is what the flags say.
type Config struct {
	URL         string
	rate        float64 // events a second, 0 = as fast as the connections go
	duration    time.Duration
	bulk        int
	connections int
	dup         float64
	users       int
	Event       string // event_name of what is sent
	seed        uint64
	insertIDs   bool
	gzip        bool
	apiKey      string
	retries     int
	maxP99      time.Duration
	verify      bool
	verifyWait  time.Duration
	file        string
	demo        bool
	reportFile  string
	json        bool
}

// Parse reads the flags of the subcommand.
func Parse(args []string, stderr io.Writer) (*Config, error) {
	c := new(Config)
	fs := flag.NewFlagSet("load", flag.ContinueOnError)
	fs.SetOutput(stderr)
	fs.StringVar(&c.URL, "url", "http://127.0.0.1:8080", "base address of the API")
	fs.Float64Var(&c.rate, "rate", 2000, "events a second, open loop; 0 sends as fast as the connections allow")
	fs.DurationVar(&c.duration, "duration", 30*time.Second, "how long to send")
	fs.IntVar(&c.bulk, "bulk", 100, "events a request, 1 to 1000; 1 uses the single endpoint; 1000 with -file")
	fs.IntVar(&c.connections, "connections", 64, "most requests in flight")
	fs.Float64Var(&c.dup, "dup", 0, "share of events that repeat an earlier one, 0 to 1")
	fs.IntVar(&c.users, "users", 10000, "distinct users")
	fs.StringVar(&c.Event, "event", "", "event_name; default is one of this run's own, so that -verify sees nothing else")
	fs.Uint64Var(&c.seed, "seed", 1, "which events -dup repeats: the same seed, the same events")
	fs.BoolVar(&c.insertIDs, "insert-ids", false, "give each event an insert_id; groups of ten then differ in nothing else")
	fs.BoolVar(&c.gzip, "gzip", false, "compress request bodies")
	fs.StringVar(&c.apiKey, "api-key", os.Getenv("API_KEY"), "sent as X-API-Key; better from the environment, API_KEY, where ps does not show it")
	fs.IntVar(&c.retries, "retries", 3, "tries again after a 503 or a lost answer")
	fs.DurationVar(&c.maxP99, "max-p99", 0, "exit 1 when the latency's p99 is beyond this; 0 means any will do")
	fs.BoolVar(&c.verify, "verify", false, "measure freshness and compare the metrics endpoint with what was accepted")
	fs.DurationVar(&c.verifyWait, "verify-timeout", time.Minute, "how long the counts may take to agree")
	fs.StringVar(&c.file, "file", "", "send this file of NDJSON instead of made-up events, once, at -rate")
	fs.BoolVar(&c.demo, "demo", false, "send thirty days of a believable shop instead, about 183,000 events, once, as fast as it goes")
	fs.StringVar(&c.reportFile, "report", "", "write a page with rate and latency over time to this file")
	fs.BoolVar(&c.json, "json", false, "report as JSON")
	if err := fs.Parse(args); err != nil {
		return nil, err
	}
	switch {
	case fs.NArg() > 0:
		return nil, fmt.Errorf("unexpected argument %q", fs.Arg(0))
	case c.bulk < 1 || c.bulk > maxBulkEvents:
		return nil, fmt.Errorf("-bulk %d: has to be 1 to %d", c.bulk, maxBulkEvents)
	case !(c.rate >= 0) || math.IsInf(c.rate, 1):
		return nil, fmt.Errorf("-rate %g: has to be positive, or 0 for as fast as it goes", c.rate)
	case c.connections < 1 || c.users < 1 || c.duration <= 0:
		return nil, errors.New("-connections, -users and -duration have to be positive")
	case c.dup < 0 || c.dup >= 1:
		return nil, fmt.Errorf("-dup %g: has to be from 0 to below 1", c.dup)
	case c.retries < 0:
		return nil, fmt.Errorf("-retries %d: has to be positive, or 0 for none", c.retries)
	case c.maxP99 < 0:
		return nil, fmt.Errorf("-max-p99 %s: has to be positive, or 0 for any", c.maxP99)
	}
	if u, err := url.Parse(c.URL); err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" {
		return nil, fmt.Errorf("-url %s: has to be an address such as http://127.0.0.1:8080", c.URL)
	}
	if c.file != "" && c.demo {
		return nil, errors.New("-file and -demo: only one of them can be sent")
	}
	if c.ends() && !isSet(fs, "bulk") {
		c.bulk = maxBulkEvents
	}
	if c.demo && !isSet(fs, "rate") {
		c.rate = 0
	}
	if c.demo && !isSet(fs, "connections") {
		c.connections = 8
	}
	if days := c.spreadDays(); !c.ends() && days > maxSpreadDays {
		return nil, fmt.Errorf("-users %d: distinct events at this rate would reach %.0f days into the past, and 30 is the most the API takes; use more users", c.users, days)
	}
	if c.Event == "" {
		c.Event = "load_" + strconv.FormatInt(time.Now().UnixMilli(), 36)
	}
	c.URL = strings.TrimSuffix(c.URL, "/")
	return c, nil
}

// ends says whether the events run out by themselves.
func (c *Config) ends() bool { return c.file != "" || c.demo }

func isSet(fs *flag.FlagSet, name string) (set bool) {
	fs.Visit(func(f *flag.Flag) { set = set || f.Name == name })
	return set
}

// maxSpreadDays leaves a day of the API's 30 for the run itself and its retries.
const maxSpreadDays = 29

// spreadDays is how far back the Generator's timestamps reach: a user has one event a channel and second, or ten with
// -insert-ids.
func (c *Config) spreadDays() float64 {
	rate := c.rate
	if rate == 0 {
		rate = flatOutRate
	}
	return rate * c.duration.Seconds() / float64(c.perSecond()) / (24 * 60 * 60)
}

// perSecond is how many events of the Generator have the same timestamp.
func (c *Config) perSecond() int {
	n := c.users * len(channels)
	if c.insertIDs {
		n *= sameButInsertID
	}
	return n
}
