// Package load sends events to a running system at a fixed rate and reports what became of them: `event-ingestion load`.
//
// It is a client: it knows the system's API and nothing of its code.
//
// load.go owns the senders and the booking of answers: every event sent ends as accepted, refused or unknown, once. flags.go
// says what the flags are, pacer.go when a request is due, events.go makes the events, verify.go knows what a right answer of the metrics
// endpoint would be.

package load

import (
	"bytes"
	"cmp"
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
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// Limits of the API.
const (
	maxBulkEvents = 1000
	maxEventBytes = 64 << 10
	maxBulkBytes  = 8 << 20
)

const (
	typeJSON   = "application/json"
	typeNDJSON = "application/x-ndjson"
	// codeUnavailable is the API's code for a good event that Kafka did not acknowledge: it is sent again.
	codeUnavailable = "unavailable"
)

// Run is the subcommand. It returns the exit code: 0 when all is well, 1 when something was refused, lost or
// counted wrongly, or the run is short of what it was to do, 2 for bad flags.
func Run(args []string, stdout, stderr io.Writer) int {
	cfg, err := Parse(args, stderr)
	if errors.Is(err, flag.ErrHelp) {
		return 0
	}
	if err != nil {
		fmt.Fprintln(stderr, "load:", err)
		return 2
	}
	l, err := New(cfg)
	if err != nil {
		fmt.Fprintln(stderr, "load:", err)
		return 2
	}
	if cfg.reportFile != "" { // better now than after an hour
		if err := os.WriteFile(cfg.reportFile, nil, 0o644); err != nil {
			fmt.Fprintln(stderr, "load: -report:", err)
			return 2
		}
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := l.greet(ctx); err != nil {
		fmt.Fprintln(stderr, "load:", err)
		return 1
	}
	l.Send(ctx, stderr)
	var checks []Check
	if cfg.verify {
		checks = l.Verify(stderr)
	}
	code := l.Report(stdout, checks)
	if cfg.reportFile != "" {
		if err := l.writePage(cfg.reportFile, checks); err != nil {
			fmt.Fprintln(stderr, "load:", err)
			code = 1
		}
	}
	for _, why := range l.shortOf(ctx.Err() != nil) {
		fmt.Fprintln(stderr, "load:", why)
		code = 1
	}
	return code
}

// greet finds out whether anything listens at the address, so that nobody waits through all retries to learn that nothing does.
func (l *Loader) greet(ctx context.Context) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, l.Config.URL+"/health", nil)
	if err != nil {
		return err
	}
	resp, err := l.client.Do(req)
	if errors.Is(err, syscall.ECONNREFUSED) {
		return fmt.Errorf("nothing listens at %s: is `make run` up? With another SERVER_PORT, say that here, too (-url)", l.Config.URL)
	} else if err == nil {
		resp.Body.Close()
	}
	return nil // of the rest the run itself has a story to tell
}

// shortOf says what the run failed to reach, whatever was counted: a script must not take it for a measurement.
func (l *Loader) shortOf(interrupted bool) (why []string) {
	if interrupted {
		why = append(why, "interrupted")
	}
	if r, is := l.src.(*replay); is && r.broken != "" {
		why = append(why, r.broken)
	}
	if due := l.sent.Load() + l.unsent; l.unsent*100 > due {
		why = append(why, fmt.Sprintf("%d of %d events could not be sent in time", l.unsent, due))
	}
	if p99 := l.latency.quantile(0.99); l.Config.maxP99 > 0 && p99 > l.Config.maxP99 {
		why = append(why, fmt.Sprintf("the latency's p99, %s, is beyond -max-p99 %s", p99.Round(time.Millisecond), l.Config.maxP99))
	}
	return why
}

// source hands out events and remembers which were accepted. A batch is a run of tickets from append.
type source interface {
	// append adds the next event to body and its ticket to tickets; false at the end.
	append(body []byte, tickets []int64, separator byte) ([]byte, []int64, bool)
	accepted(ticket int64)
	// expected says what the metrics endpoint should answer, an entry for each question.
	expected() []expectation
	where(ticket int64) string
}

// Loader sends and counts.
type Loader struct {
	Config *Config
	Stop   context.CancelFunc // ends Send early
	Took   time.Duration      // set by Send

	src    source
	client *http.Client
	ended  context.Context
	start  time.Time
	unsent int64 // events that were due when all connections were busy; set at the end of send

	pace    *pacer       // set by send
	sent    atomic.Int64 // events, including repeats by -dup but no retries
	OK      atomic.Int64 // events that were accepted
	Retried atomic.Int64 // requests
	Unknown atomic.Int64 // events without an answer

	srcMu     sync.Mutex // guards src while senders run
	mu        sync.Mutex // guards what follows
	latency   *histogram
	freshness *histogram
	timeline  timeline
	Refused   map[string]int // events, by code; to be read when Send has returned
	examples  []string
	noAnswer  map[string]int // events, by why
}

// New returns a loader of made-up events, or of the file that the flags name.
func New(cfg *Config) (*Loader, error) {
	var src source = NewGenerator(cfg)
	if cfg.demo {
		src = newDemo(cfg)
	} else if cfg.file != "" {
		var err error
		if src, err = openReplay(cfg.file); err != nil {
			return nil, err
		}
	}
	ended, stop := context.WithCancel(context.Background())
	return &Loader{
		Stop: stop, ended: ended,
		Config: cfg, src: src, latency: newHistogram(), freshness: newHistogram(), timeline: timeline{latency: newHistogram()}, Refused: map[string]int{}, noAnswer: map[string]int{},
		client: &http.Client{Timeout: time.Minute, Transport: &http.Transport{MaxIdleConnsPerHost: cfg.connections + 8, DisableCompression: true}},
	}, nil
}

// Distinct is how many different events were accepted so far.
func (l *Loader) Distinct() (n int64) {
	l.srcMu.Lock()
	defer l.srcMu.Unlock()
	for _, e := range l.src.expected() {
		n += e.count
	}
	return n
}

// Forgive forgets what was refused or had no answer, because a fault was meant to cause it.
func (l *Loader) Forgive() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.Refused, l.examples, l.noAnswer = map[string]int{}, nil, map[string]int{}
	l.Unknown.Store(0)
}

// Send runs the senders until the schedule or the source ends, or ctx is done: an interrupted run still reports.
func (l *Loader) Send(ctx context.Context, stderr io.Writer) {
	l.start = time.Now()
	end := l.Config.duration
	if l.Config.ends() {
		end = 0
	}
	l.pace = newPacer(l.start, l.Config.rate, l.Config.bulk, end)
	sending, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(l.ended, cancel)()
	var senders, others sync.WaitGroup
	for range l.Config.connections {
		senders.Go(func() { (&sender{l: l}).run(sending, ctx) }) // ends with sending, the schedule or the source
	}
	watching, done := context.WithCancel(ctx)
	others.Go(func() { l.progress(watching, stderr) }) // ends with the senders
	others.Go(func() { l.timeline.run(watching, l) })  // ends with the senders
	if l.Config.verify && !l.Config.ends() {
		others.Go(func() { l.probe(watching) }) // ends with the senders
	}
	senders.Wait()
	l.Took = time.Since(l.start)
	done()
	others.Wait()
	if interrupted := ctx.Err() != nil || l.ended.Err() != nil; !l.Config.ends() && !interrupted {
		l.unsent = l.pace.unclaimed(l.start.Add(l.Took)) * int64(l.Config.bulk)
	}
	if l.unsent > 0 {
		fmt.Fprintf(stderr, "load: %d events were due and not sent:\n      all %d connections were busy;\n      latency does not count them\n", l.unsent, l.Config.connections)
	}
}

// exchange is one try. wait is what Retry-After asks for. gzip's magic number tells a compressed body, because no JSON text
// begins with it; the probe's bodies are never compressed.
func (l *Loader) exchange(path, media string, body []byte) (status int, answer []byte, wait time.Duration, err error) {
	wait = 200 * time.Millisecond
	req, err := http.NewRequest(http.MethodPost, l.Config.URL+path, bytes.NewReader(body))
	if err != nil {
		return 0, nil, wait, err
	}
	req.Header.Set("Content-Type", media)
	if bytes.HasPrefix(body, []byte{0x1f, 0x8b}) {
		req.Header.Set("Content-Encoding", "gzip")
	}
	l.authorize(req)
	resp, err := l.client.Do(req)
	if err != nil {
		return 0, nil, wait, err
	}
	defer resp.Body.Close()
	if s, err := strconv.Atoi(resp.Header.Get("Retry-After")); err == nil && s >= 0 {
		wait = time.Duration(s) * time.Second
	}
	answer, err = io.ReadAll(resp.Body)
	return resp.StatusCode, answer, wait, err
}

func (l *Loader) authorize(req *http.Request) {
	if l.Config.apiKey != "" {
		req.Header.Set("X-API-Key", l.Config.apiKey)
	}
}

// eventError is an entry of an answer's errors. A single event's have no index, and 0 is right.
type eventError struct {
	Index   int
	Code    string
	Error   string
	Message string
}

// settle books what the answer decides and returns the indices of the events to send again, none when last.
func (l *Loader) settle(status int, answer []byte, tickets []int64, last bool) (again []int) {
	var a struct {
		Success int `json:"success_count"`
		Error   string
		Errors  []eventError
	}
	single := l.Config.bulk == 1 && l.Config.file == ""
	if !single || status != http.StatusAccepted {
		json.Unmarshal(answer, &a) // no JSON: no errors by index and no successes, which is dealt with below
	}
	failed := map[int]eventError{}
	for _, e := range a.Errors {
		if _, twice := failed[e.Index]; !twice && e.Index >= 0 && e.Index < len(tickets) {
			e.Error = cmp.Or(e.Error, e.Message)
			failed[e.Index] = e
		}
	}
	success := status == http.StatusAccepted || status == http.StatusMultiStatus
	if success && !single && a.Success != len(tickets)-len(failed) {
		// Accepted or not? The answer does not add up, and a guess would make -verify blame the wrong side.
		l.Unknown.Add(int64(len(tickets)))
		return nil
	}
	l.mu.Lock()
	for i, t := range tickets {
		e, is := failed[i]
		if !is && !success {
			e = eventError{Code: "HTTP " + strconv.Itoa(status), Error: a.Error}
			failed[i] = e
		} else if !is {
			continue
		}
		if retryable := e.Code == codeUnavailable || !is && (status == http.StatusServiceUnavailable || status == http.StatusTooManyRequests); retryable && !last {
			again = append(again, i)
		} else {
			l.refuse(e.Code, t, e.Error)
		}
	}
	l.mu.Unlock()
	l.srcMu.Lock()
	for i, t := range tickets {
		if _, is := failed[i]; !is {
			l.OK.Add(1)
			l.src.accepted(t)
		}
	}
	l.srcMu.Unlock()
	return again
}

// refuse counts a refused event and keeps the first few as examples; under mu.
func (l *Loader) refuse(code string, ticket int64, message string) {
	const most = 10
	l.Refused[code]++
	if len(l.examples) < most {
		l.examples = append(l.examples, fmt.Sprintf("%s: %s", l.src.where(ticket), message))
	}
}

// progress prints a line a second until ctx is done: over itself on a terminal, every 5 s elsewhere to keep logs short.
func (l *Loader) progress(ctx context.Context, stderr io.Writer) {
	period, begin, end := 5*time.Second, "", "\n"
	if f, ok := stderr.(*os.File); ok {
		if info, err := f.Stat(); err == nil && info.Mode()&os.ModeCharDevice != 0 {
			period, begin, end = time.Second, "\r", "  "
			defer fmt.Fprintln(stderr)
		}
	}
	tick := time.NewTicker(period)
	defer tick.Stop()
	for last := int64(0); ; {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		ok := l.OK.Load()
		l.mu.Lock()
		p99, refused := l.latency.quantile(0.99), 0
		for _, n := range l.Refused {
			refused += n
		}
		l.mu.Unlock()
		fmt.Fprintf(stderr, "%s%3.0f s  %d accepted  %.0f/s  %d refused  p99 %s%s",
			begin, time.Since(l.start).Seconds(), ok, float64(ok-last)/period.Seconds(), refused, p99.Round(time.Millisecond), end)
		last = ok
	}
}
