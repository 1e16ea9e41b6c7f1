// Command event-ingestion takes events over HTTP, puts them on Kafka, moves them into ClickHouse and answers metrics.
//
// main.go reads the settings, puts the parts together, starts them in the order in which events flow and stops them in
// the same order: no new requests, then acknowledgements for those in flight, then rows, then offsets.

package main

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/twmb/franz-go/pkg/kgo"

	"github.com/event-ingestion/event-ingestion/internal/batches"
	"github.com/event-ingestion/event-ingestion/load"
	"github.com/event-ingestion/event-ingestion/ops"
	"github.com/event-ingestion/event-ingestion/web"
)

const usage = `event-ingestion takes events over HTTP and answers metrics about them.

  event-ingestion            serve; settings are environment variables, see below
  event-ingestion load       send events to a running system and report (load -h)
  event-ingestion audit      compare what Kafka acknowledged with what is stored, to the last event (audit -h)
  event-ingestion reconcile  make events_hourly agree with events (reconcile -h)
  event-ingestion rewind     read from Kafka again what ClickHouse lost (rewind -h)
  event-ingestion export     write the events of a range as NDJSON or Parquet (export -h)
  event-ingestion dlq        list, show and replay dead letters (dlq -h)
  event-ingestion erase      remove a user's events (erase -h)
  event-ingestion import     take over another system's events, of any age (import -h)
  event-ingestion healthcheck  exit 0 when the instance of this machine is ready, for containers
  event-ingestion version    print the version
  event-ingestion -h         this page

Settings:
`

// helpFlags are what package flag takes for a request for help.
var helpFlags = []string{"-h", "-help", "--help"}

func main() {
	command := ""
	if len(os.Args) > 1 {
		command = os.Args[1]
	}
	if alone := []string{"serve", "version", "help"}; len(os.Args) > 2 && slices.Contains(alone, command) {
		if !slices.Contains(helpFlags, os.Args[2]) {
			fmt.Fprintf(os.Stderr, "%s: unexpected argument %q\n", command, os.Args[2])
			os.Exit(2)
		}
		command = "help"
	}
	switch command {
	case "", "serve":
		os.Exit(serve())
	case "load":
		os.Exit(load.Run(os.Args[2:], os.Stdout, os.Stderr))
	case "version", "-version", "--version":
		fmt.Println(version(), runtime.Version())
	case "-h", "-help", "--help", "help":
		fmt.Print(usage)
		printSettings(os.Stdout)
	default:
		os.Exit(ops.Run(os.Args[1:], operated, os.Stdout, os.Stderr))
	}
}

// restMemory is for what no setting bounds: connections, clients of Kafka and ClickHouse, the runtime.
const restMemory = 64 << 20

// serve runs the system until SIGINT or SIGTERM and returns the exit code. A second signal ends it at once.
func serve() int {
	cfg, err := loadSettings(os.Getenv)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 2
	}
	slog.SetDefault(cfg.logger(os.Stderr))
	if os.Getenv("GOMEMLIMIT") == "" { // the garbage collector works harder before the budgets and what it needs itself are passed
		debug.SetMemoryLimit(cfg.maxInFlightBytes + cfg.consumeMemory + cfg.dedupeMemory + restMemory)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop)
	sys, err := newSystem(cfg)
	if err == nil {
		err = sys.run(ctx)
	}
	if err != nil {
		slog.Error("stopped", "error", err)
		return 1
	}
	return 0
}

// system is one instance of the program, put together.
type system struct {
	cfg        *settings
	stats      *stats
	clickhouse *clickhouse
	broken     *brokenParts
	lacking    chan struct{}     // a server of the cluster has no tables
	partitions int               // of the main topic; only consume's goroutine looks
	producer   *kgo.Client       // asks, and produces while nothing is known of what the topic takes
	events     *batches.Producer // of the API
	watermark  *watermark
	metrics    *metricsAPI
	ready      *readiness
	pipeline   *pipeline
	access     *access
	api        *http.Server
	admin      *http.Server
	listener   net.Listener              // of the API
	adminL     net.Listener              // nil when ADMIN_ADDR is off
	failed     context.Context           // is done, with the cause, once something can never work, which ends run
	fail       context.CancelCauseFunc   // ends failed; only the first cause counts
	stopBy     atomic.Pointer[time.Time] // when a stop has to be over, nil before it begins
}

// newSystem opens the listeners and the producer; nothing runs yet and no dependency has to be there.
func newSystem(cfg *settings) (*system, error) {
	s := &system{cfg: cfg, stats: newStats(), clickhouse: newClickHouse(cfg), broken: &brokenParts{database: cfg.clickhouseDatabase}, lacking: make(chan struct{}, 1)}
	s.failed, s.fail = context.WithCancelCause(context.Background())
	s.clickhouse.decides = cfg.role != "api"
	addr := net.JoinHostPort(cfg.serverHost, fmt.Sprint(cfg.serverPort))
	var err error
	if s.access, err = newAccess(cfg); err != nil {
		return nil, err
	}
	if s.listener, err = net.Listen("tcp", addr); err != nil {
		return nil, fmt.Errorf("listen for the API (SERVER_HOST, SERVER_PORT): %w", err)
	}
	if cfg.adminAddr != "" {
		if s.adminL, err = net.Listen("tcp", cfg.adminAddr); err != nil {
			return nil, fmt.Errorf("listen for the admin pages (ADMIN_ADDR): %w", err)
		}
	}
	if s.producer, err = newProducer(cfg); err != nil {
		return nil, fmt.Errorf("set up the Kafka producer: %w", err)
	}
	s.events = batches.NewProducer(cfg.kafkaTopic, maxEventBytes, s.producer, func(limits kgo.Opt) (*kgo.Client, error) { return newProducer(cfg, limits) })
	s.watermark = newWatermark(s.producer, cfg, s.stats.store.lastOf)
	s.metrics = newMetricsAPI(s.clickhouse, s.watermark.completeThrough, s.queryFailed)
	quick := newClickHouse(cfg) // hangs no longer than its question may
	quick.options.HandshakeTimeout, quick.options.ReadTimeout = readyTimeout, readyTimeout
	s.ready = &readiness{client: s.producer, clickhouse: quick, conn: connection{to: quick}, broken: s.broken, failed: s.queryFailed,
		stalled: s.watermark.stalled, trouble: s.stats.troubles.Oldest, consumes: cfg.role != "api",
		mayKnow: s.access.mayKnow}
	host, _ := os.Hostname()
	s.pipeline = newPipeline(cfg, net.JoinHostPort(host, fmt.Sprint(cfg.serverPort)), s.stats, s.watermark.behind, func() string {
		words, _ := s.ready.consuming(true)
		return words
	})
	in := newIngester(s.events, cfg, &s.stats.ingest, s.watermark.awaitStored)
	s.api = newServer(addr, s.routes(in), cfg, s.access, s.stats)
	s.api.RegisterOnShutdown(s.watermark.endWaiting)
	s.admin = newAdminServer(cfg.adminAddr, s.stats)
	s.admin.Handler = onlyOurHosts(s.access, s.admin.Handler)
	s.stats.watch(watched{
		lags: s.watermark.partitionLags, through: s.watermark.completeThrough, inFlight: in.bodies.Used,
		behind: func() time.Duration {
			worst, _, _ := s.watermark.stalled(s.stats.troubles.Oldest().What != "")
			return worst
		},
		broken:   func() uint64 { return uint64(s.broken.total.Load()) },
		assigned: s.ofConsumer(func(c *consumer) int64 { return c.assigned.Load() }),
		ids:      s.ofConsumer(func(c *consumer) int64 { return c.inserter.dedupe.bytes.Load() }),
		minutes:  s.ofConsumer(func(c *consumer) int64 { return c.inserter.dedupe.sets.Load() }),
	})
	return s, nil
}

// ofConsumer is a number of the consumer's, 0 while there is none.
func (s *system) ofConsumer(number func(*consumer) int64) func() int64 {
	return func() int64 {
		if c := s.ready.consumer.Load(); c != nil {
			return number(c)
		}
		return 0
	}
}

// routes is everything that the API's listener answers, by ROLE.
func (s *system) routes(in *ingester) []route {
	routes := []route{
		{http.MethodGet, "/health", "health", serveHealth},
		{http.MethodGet, "/ready", "ready", s.ready.serve},
	}
	if s.cfg.role != "consumer" {
		routes = append(routes,
			route{http.MethodPost, "/api/v1/events", routeEvents, in.noting(routeEvents, in.serveOne)},
			route{http.MethodPost, "/api/v1/events/bulk", routeBulk, in.noting(routeBulk, in.serveBulk)},
			route{http.MethodGet, "/api/v1/events", "list", s.metrics.serveEvents},
			route{http.MethodGet, "/api/v1/metrics", "metrics", s.metrics.serve},
			route{http.MethodGet, "/api/v1/overview", "overview", newOverviewAPI(s.metrics).serve},
			route{http.MethodGet, "/api/v1/pipeline", "pipeline", servePipeline(s.pipeline)},
		)
		routes = append(routes, in.segmentRoutes(s.access)...)
		for path, page := range web.Pages(notFound) {
			routes = append(routes, route{http.MethodGet, path, "pages", page.ServeHTTP})
		}
	}
	return routes
}

// run serves until ctx is done and then stops within SHUTDOWN_TIMEOUT.
func (s *system) run(ctx context.Context) error {
	go func() { // ends with Shutdown
		if s.access.tls != nil {
			s.fail(s.api.ServeTLS(s.listener, "", ""))
		} else {
			s.fail(s.api.Serve(s.listener))
		}
	}()
	hup := make(chan os.Signal, 1)
	if s.cfg.tlsCertFile != "" || os.Getenv("API_KEYS_FILE") != "" || os.Getenv("WRITE_KEYS_FILE") != "" { // else the end of a terminal ends the program
		signal.Notify(hup, syscall.SIGHUP)
		defer signal.Stop(hup)
	}
	if s.adminL != nil {
		go func() { s.fail(s.admin.Serve(s.adminL)) }() // ends with Close
	}
	slog.Info("listening", "api", s.listener.Addr().String(), "admin", s.cfg.adminAddr)

	// Each stage has a context of its own: the next one goes on while the one before it ends.
	consuming, stopConsuming := context.WithCancel(context.Background())
	defer stopConsuming()
	var stages sync.WaitGroup // both end with stopConsuming
	stages.Go(func() { s.consume(consuming) })
	stages.Go(func() { s.pipeline.run(consuming) })
	var err error
	for running := true; running; {
		select {
		case <-hup:
			s.access.reload()
		case <-ctx.Done():
			running = false
		case <-s.failed.Done():
			running, err = false, context.Cause(s.failed)
		}
	}

	s.ready.stopping.Store(true)
	if err == nil && s.cfg.shutdownDelay > 0 {
		slog.Info("not ready any more, still serving", "for", s.cfg.shutdownDelay)
		time.Sleep(s.cfg.shutdownDelay)
	}
	s.stop(func() { stopConsuming(); stages.Wait() })
	return err
}

// stop ends what run has begun, in the order in which events flow; endConsuming returns when rows and offsets are safe.
func (s *system) stop(endConsuming func()) {
	slog.Info("stopping: first requests, then rows, then offsets")
	by := time.Now().Add(s.cfg.shutdownTimeout)
	s.stopBy.Store(&by)
	var hanging atomic.Value // the stage that has not ended
	stopped := make(chan struct{})
	go func() { // ends when everything has stopped; the process may be gone before that
		defer close(stopped)
		hanging.Store("requests")
		end, cancel := context.WithDeadline(context.Background(), by.Add(-s.cfg.shutdownTimeout/2))
		defer cancel()
		if e := s.api.Shutdown(end); e != nil {
			s.api.Close()
			slog.Warn("requests were cut off, their clients have no answer and will send again", "error", e)
		}
		hanging.Store("rows and offsets")
		endConsuming()
		hanging.Store("the producer")
		s.events.Close()
		s.producer.Close()
		hanging.Store("metrics queries")
		s.metrics.close()
		s.admin.Close()
	}()
	select {
	case <-stopped:
		slog.Info("stopped")
	case <-time.After(time.Until(by)): // whatever hangs: nothing is lost, what was not committed is read again
		slog.Warn("stopped at SHUTDOWN_TIMEOUT without waiting for more", "hanging", hanging.Load())
	}
}

// finish is what a stage has to put its things in order: most of what is left of a stop, or, when the consumer starts over,
// half of SHUTDOWN_TIMEOUT. The last eighth is for leaving groups and closing connections.
func (s *system) finish() (context.Context, context.CancelFunc) {
	by := time.Now().Add(s.cfg.shutdownTimeout / 2)
	if stop := s.stopBy.Load(); stop != nil {
		by = stop.Add(-s.cfg.shutdownTimeout / 8)
	}
	return context.WithDeadline(context.Background(), by)
}

// trouble notes what has failed and will be tried again, unless it is hopeless: then it ends the system, with the reason. What
// has worked before is never hopeless: a broker that comes up may say so for a moment.
func (s *system) trouble(what string, err error) {
	s.stats.troubles.Note(what, err)
	s.endIfHopeless(what, err)
}

// endIfHopeless is trouble for what is noted elsewhere.
func (s *system) endIfHopeless(what string, err error) {
	if (kafkaIsHopeless(err) || clickhouseIsHopeless(err)) && !s.stats.troubles.HasWorked(what) {
		s.fail(fmt.Errorf("%s: %w", what, err))
	}
}

// queryFailed is told what ClickHouse says when a query fails.
func (s *system) queryFailed(err error) {
	s.broken.note(err)
	if s.clickhouse.lacksTables(err) {
		notify(s.lacking, struct{}{})
	}
}

// consume waits for Kafka and ClickHouse, prepares both, and stores what Kafka holds. The API accepts events meanwhile.
func (s *system) consume(ctx context.Context) {
	if !s.untilDone(ctx, "prepare the topics", s.prepareTopics) {
		return
	}
	var watching sync.WaitGroup
	defer watching.Wait()
	watching.Go(func() { s.watermark.run(ctx, s.stats.troubles) }) // ends with ctx, and so do the next
	watching.Go(func() { s.events.Run(ctx, func(err error) { s.stats.troubles.Note("ask what the topics take", err) }) })
	watching.Go(func() {
		if err := awaitDeletion(ctx, s.producer, s.cfg.kafkaTopic); err != nil {
			s.fail(fmt.Errorf("%w; its records are gone, and a start begins with the new one", err))
		}
	})
	makeTables := func(ctx context.Context) error { return s.watermark.prepareTables(ctx, s.clickhouse) }
	if !s.untilDone(ctx, prepareTables, makeTables) {
		return
	}
	watching.Go(func() { // ends with ctx
		for {
			select {
			case <-s.lacking:
				slog.Warn("a server of CLICKHOUSE_CLUSTER has no tables: it gets them")
				s.untilDone(ctx, prepareTables, makeTables)
			case <-ctx.Done():
				return
			}
		}
	})
	if s.cfg.role == "api" {
		<-ctx.Done()
		return
	}
	side, err := newSideProducer(s.cfg, &s.stats.side, s.events.Limits())
	if err != nil {
		s.fail(fmt.Errorf("set up the producer for the retry topic and the dead letters: %w", err))
		return
	}
	defer side.close()
	var retrying sync.WaitGroup
	defer retrying.Wait()
	for range s.cfg.retryWorkers {
		w, err := newRetryWorker(s.cfg, side, func(err error) { s.trouble(readRetries, err) })
		if err != nil {
			s.fail(fmt.Errorf("set up a retry worker: %w", err))
			return
		}
		retrying.Go(func() { w.run(ctx, s.finish) }) // ends with ctx
	}
	s.runConsumers(ctx, side)
}

// runConsumers runs one consumer after the other: each one that starts over is another one.
func (s *system) runConsumers(ctx context.Context, side *sideProducer) {
	for {
		c, err := newConsumer(s.cfg, s.clickhouse, s.queryFailed, s.partitions, func() int { return len(s.watermark.partitionLags()) }, side,
			&s.stats.store, func(err error) { s.trouble(readEvents, err) })
		if err != nil {
			s.fail(fmt.Errorf("set up the consumer: %w", err))
			return
		}
		s.ready.consumer.Store(c)
		c.run(ctx, s.finish)
		s.ready.consumer.Store(nil)
		if ctx.Err() != nil || !s.untilDone(ctx, "prepare the topics", s.prepareTopics) { // which may have grown
			return
		}
		side.refresh()
	}
}

func (s *system) prepareTopics(ctx context.Context) (err error) {
	if err = s.ready.brokers(ctx); err == nil { // says in a moment what an admin request finds out in a minute
		s.partitions, err = ensureTopics(ctx, s.producer, s.cfg)
	}
	if err == nil {
		err = s.events.Look(ctx)
	}
	return err
}

// prepareTimeout bounds one attempt to prepare something, so that what hangs is told.
const prepareTimeout = 20 * time.Second

// untilDone repeats prepare until it succeeds; false when ctx ended first.
func (s *system) untilDone(ctx context.Context, what string, prepare func(context.Context) error) bool {
	return s.stats.troubles.Until(ctx, what, func() error {
		attempt, cancel := context.WithTimeout(ctx, prepareTimeout)
		defer cancel()
		err := prepare(attempt)
		if err != nil && ctx.Err() == nil {
			s.endIfHopeless(what, err)
		}
		return err
	}) == nil
}
