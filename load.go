// The load subcommand: events at a fixed rate against a running system, and what came of them.
//
// The loop is open: every request has an intended time, and latency counts from it, so that a system that stalls is
// not asked less often and its stall is not hidden. load.go owns the senders; loadgen.go makes the events and knows
// what a right answer of the metrics endpoint would be.

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/klauspost/compress/gzip"
)

type loadConfig struct {
	url         string
	rate        float64 // events a second, 0 = as fast as the connections go
	duration    time.Duration
	bulk        int
	connections int
	dup         float64
	users       int
	event       string
	gzip        bool
	apiKey      string
	retries     int
	verify      bool
	verifyWait  time.Duration
	file        string
	json        bool
}

func parseLoadFlags(args []string, stderr io.Writer) (*loadConfig, error) {
	c := new(loadConfig)
	fs := flag.NewFlagSet("load", flag.ContinueOnError)
	fs.SetOutput(stderr)
	fs.StringVar(&c.url, "url", "http://127.0.0.1:8080", "base address of the API")
	fs.Float64Var(&c.rate, "rate", 2000, "events a second, open loop; 0 sends as fast as the connections allow")
	fs.DurationVar(&c.duration, "duration", 30*time.Second, "how long to send")
	fs.IntVar(&c.bulk, "bulk", 100, "events a request, 1 to 1000; 1 uses the single endpoint")
	fs.IntVar(&c.connections, "connections", 64, "most requests in flight")
	fs.Float64Var(&c.dup, "dup", 0, "share of events that repeat an earlier one, 0 to 1")
	fs.IntVar(&c.users, "users", 10000, "distinct users")
	fs.StringVar(&c.event, "event", "", "event_name; default is one of this run's own, so that -verify sees nothing else")
	fs.BoolVar(&c.gzip, "gzip", false, "compress request bodies")
	fs.StringVar(&c.apiKey, "api-key", os.Getenv("API_KEY"), "sent as X-API-Key")
	fs.IntVar(&c.retries, "retries", 3, "tries again after a 503 or a lost answer")
	fs.BoolVar(&c.verify, "verify", false, "measure freshness and compare the metrics endpoint with what was accepted")
	fs.DurationVar(&c.verifyWait, "verify-timeout", time.Minute, "how long the counts may take to agree")
	fs.StringVar(&c.file, "file", "", "send this file of NDJSON instead of made-up events, once, at -rate")
	fs.BoolVar(&c.json, "json", false, "report as JSON")
	if err := fs.Parse(args); err != nil {
		return nil, err
	}
	switch {
	case fs.NArg() > 0:
		return nil, fmt.Errorf("unexpected argument %q", fs.Arg(0))
	case c.bulk < 1 || c.bulk > maxBulkEvents:
		return nil, fmt.Errorf("-bulk %d: has to be 1 to %d", c.bulk, maxBulkEvents)
	case c.rate < 0 || c.connections < 1 || c.users < 1 || c.duration <= 0:
		return nil, errors.New("-rate, -connections, -users and -duration have to be positive")
	case c.dup < 0 || c.dup >= 1:
		return nil, fmt.Errorf("-dup %g: has to be from 0 to below 1", c.dup)
	}
	if c.event == "" {
		c.event = "load_" + strconv.FormatInt(time.Now().UnixMilli(), 36)
	}
	c.url = strings.TrimSuffix(c.url, "/")
	return c, nil
}

// runLoad is the subcommand; it returns the exit code: 0 when all is well, 1 when something was refused, lost or
// counted wrongly, 2 for bad flags.
func runLoad(args []string, stdout, stderr io.Writer) int {
	cfg, err := parseLoadFlags(args, stderr)
	if errors.Is(err, flag.ErrHelp) {
		return 0
	}
	if err != nil {
		fmt.Fprintln(stderr, "load:", err)
		return 2
	}
	var src eventSource = newGenerator(cfg)
	if cfg.file != "" {
		if src, err = openReplay(cfg.file); err != nil {
			fmt.Fprintln(stderr, "load:", err)
			return 2
		}
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	l := newLoader(cfg, src)
	l.send(ctx, stderr)
	var checks []loadCheck
	if cfg.verify {
		checks = l.verify(stderr)
	}
	return l.report(stdout, checks)
}

// eventSource hands out events and remembers which were accepted. A batch is a run of tickets from append.
type eventSource interface {
	// append adds the next event to body and its ticket to tickets; false at the end.
	append(body []byte, tickets []int64, separator byte) ([]byte, []int64, bool)
	accepted(ticket int64)
	// expected says what the metrics endpoint should answer, an entry for each question.
	expected() []expectation
	where(ticket int64) string
}

// loader sends and counts.
type loader struct {
	cfg    *loadConfig
	src    eventSource
	client *http.Client
	stop   context.CancelFunc // ends send early; set by newLoader
	ended  context.Context
	start  time.Time
	took   time.Duration

	requests atomic.Int64 // also the ticket of the next request's intended time
	sent     atomic.Int64
	ok       atomic.Int64
	retried  atomic.Int64
	unknown  atomic.Int64

	srcMu     sync.Mutex // guards src while senders run
	mu        sync.Mutex // guards what follows
	latency   *histogram
	freshness *histogram
	refused   map[string]int
	examples  []string
}

func newLoader(cfg *loadConfig, src eventSource) *loader {
	ended, stop := context.WithCancel(context.Background())
	return &loader{
		stop: stop, ended: ended,
		cfg: cfg, src: src, latency: newHistogram(), freshness: newHistogram(), refused: map[string]int{},
		client: &http.Client{Timeout: time.Minute, Transport: &http.Transport{MaxIdleConnsPerHost: cfg.connections + 8, DisableCompression: true}},
	}
}

// send runs the senders until the time is up, the source is dry, or ctx is done.
func (l *loader) send(ctx context.Context, stderr io.Writer) {
	l.start = time.Now()
	ctx, cancel := context.WithCancel(ctx)
	context.AfterFunc(l.ended, cancel)
	if l.cfg.file == "" {
		ctx, cancel = context.WithDeadline(ctx, l.start.Add(l.cfg.duration))
	}
	defer cancel()
	var senders, others sync.WaitGroup
	for range l.cfg.connections {
		senders.Go(func() { l.sender(ctx) }) // ends with ctx or the source
	}
	watching, done := context.WithCancel(ctx)
	others.Go(func() { l.progress(watching, stderr) }) // ends with the senders
	if l.cfg.verify && l.cfg.file == "" {
		others.Go(func() { l.probe(watching) }) // ends with the senders
	}
	senders.Wait()
	l.took = time.Since(l.start)
	done()
	others.Wait()
}

func (l *loader) sender(ctx context.Context) {
	var body, packed []byte
	var tickets []int64
	for {
		intended := time.Now()
		if l.cfg.rate > 0 {
			n := l.requests.Add(1) - 1
			intended = l.start.Add(time.Duration(float64(n) * float64(l.cfg.bulk) / l.cfg.rate * float64(time.Second)))
			if !sleepUntil(ctx, intended) {
				return
			}
		} else if ctx.Err() != nil {
			return
		}
		var more bool
		body, tickets, more = l.fill(body[:0], tickets[:0])
		if len(tickets) == 0 {
			return
		}
		l.sent.Add(int64(len(tickets)))
		packed = l.post(body, packed, tickets)
		l.mu.Lock()
		l.latency.add(time.Since(intended))
		l.mu.Unlock()
		if !more {
			return
		}
	}
}

func sleepUntil(ctx context.Context, t time.Time) bool {
	if d := time.Until(t); d > 0 {
		timer := time.NewTimer(d)
		defer timer.Stop()
		select {
		case <-timer.C:
		case <-ctx.Done():
			return false
		}
	}
	return ctx.Err() == nil
}

// fill makes the body of one request.
func (l *loader) fill(body []byte, tickets []int64) ([]byte, []int64, bool) {
	l.srcMu.Lock()
	defer l.srcMu.Unlock()
	bulk, more := l.cfg.bulk > 1 && l.cfg.file == "", true
	separator := byte('\n')
	if bulk {
		body, separator = append(body, `{"events":[`...), ','
	}
	for more && len(tickets) < l.cfg.bulk {
		body, tickets, more = l.src.append(body, tickets, separator)
	}
	if bulk {
		body = append(body, "]}"...)
	}
	return body, tickets, more
}

// post sends one request until it is answered for good.
func (l *loader) post(body, packed []byte, tickets []int64) []byte {
	path, media := "/api/v1/events/bulk", typeJSON
	if l.cfg.file != "" {
		media = typeNDJSON
	} else if l.cfg.bulk == 1 {
		path = "/api/v1/events"
	}
	if l.cfg.gzip {
		var b bytes.Buffer
		z, _ := gzip.NewWriterLevel(&b, gzip.BestSpeed)
		z.Write(body)
		z.Close()
		packed = b.Bytes()
		body = packed
	}
	for try := 0; ; try++ {
		status, answer, wait, err := l.exchange(path, media, body)
		if again := err != nil || status == http.StatusServiceUnavailable; again && try < l.cfg.retries {
			l.retried.Add(1)
			time.Sleep(wait)
			continue
		}
		if err != nil {
			l.unknown.Add(int64(len(tickets)))
			return packed
		}
		l.settle(status, answer, tickets)
		return packed
	}
}

func (l *loader) exchange(path, media string, body []byte) (status int, answer []byte, wait time.Duration, err error) {
	wait = 200 * time.Millisecond
	req, err := http.NewRequest(http.MethodPost, l.cfg.url+path, bytes.NewReader(body))
	if err != nil {
		return 0, nil, wait, err
	}
	req.Header.Set("Content-Type", media)
	if l.cfg.gzip {
		req.Header.Set("Content-Encoding", "gzip")
	}
	l.authorize(req)
	resp, err := l.client.Do(req)
	if err != nil {
		return 0, nil, wait, err
	}
	defer resp.Body.Close()
	if s, err := strconv.Atoi(resp.Header.Get("Retry-After")); err == nil {
		wait = time.Duration(s) * time.Second
	}
	answer, err = io.ReadAll(resp.Body)
	return resp.StatusCode, answer, wait, err
}

func (l *loader) authorize(req *http.Request) {
	if l.cfg.apiKey != "" {
		req.Header.Set("X-API-Key", l.cfg.apiKey)
	}
}

// settle books the answer of one request.
func (l *loader) settle(status int, answer []byte, tickets []int64) {
	var a struct {
		Error  string
		Errors []struct {
			Index       int
			Code, Error string
		}
	}
	failed := map[int]bool{}
	if status != http.StatusAccepted {
		json.Unmarshal(answer, &a) // an answer that is no JSON refuses everything, below
	}
	l.mu.Lock()
	for _, e := range a.Errors {
		if l.cfg.bulk == 1 && l.cfg.file == "" {
			e.Error, e.Index = a.Error, 0
		}
		if !failed[e.Index] && e.Index < len(tickets) {
			l.refuse(e.Code, tickets[e.Index], e.Error)
		}
		failed[e.Index] = true
	}
	if status != http.StatusAccepted && status != http.StatusMultiStatus {
		for i, t := range tickets {
			if !failed[i] {
				l.refuse(fmt.Sprintf("HTTP %d", status), t, a.Error)
				failed[i] = true
			}
		}
	}
	l.mu.Unlock()
	l.srcMu.Lock()
	for i, t := range tickets {
		if !failed[i] {
			l.ok.Add(1)
			l.src.accepted(t)
		}
	}
	l.srcMu.Unlock()
}

// refuse counts a refused event and keeps the first few as examples; under mu.
func (l *loader) refuse(code string, ticket int64, message string) {
	const most = 10
	l.refused[code]++
	if len(l.examples) < most {
		l.examples = append(l.examples, fmt.Sprintf("%s: %s", l.src.where(ticket), message))
	}
}

// progress prints a line a second until ctx is done.
func (l *loader) progress(ctx context.Context, stderr io.Writer) {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for last := int64(0); ; {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		ok := l.ok.Load()
		l.mu.Lock()
		p99 := l.latency.quantile(0.99)
		l.mu.Unlock()
		fmt.Fprintf(stderr, "load: %3.0f s  sent %d  accepted %d  %d/s  p99 %s\n",
			time.Since(l.start).Seconds(), l.sent.Load(), ok, ok-last, p99.Round(100*time.Microsecond))
		last = ok
	}
}
