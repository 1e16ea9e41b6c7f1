// Command event-ingestion takes events over HTTP, puts them on Kafka, moves them into ClickHouse and answers metrics.
//
// main.go reads the settings, puts the parts together, starts them in the order in which events flow and stops them in
// the same order: no new requests, then acknowledgements for those in flight, then rows, then offsets.

package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"runtime"
	"sync"
	"syscall"
	"time"

	"github.com/twmb/franz-go/pkg/kgo"
)

const usage = `event-ingestion takes events over HTTP and answers metrics about them.

  event-ingestion            serve; settings are environment variables, see below
  event-ingestion load       send events to a running system and report (load -h)
  event-ingestion audit      compare what Kafka acknowledged with what is stored, to the last event (audit -h)
  event-ingestion reconcile  make events_hourly agree with events (reconcile -h)
  event-ingestion rewind     read from Kafka again what ClickHouse lost (rewind -h)
  event-ingestion dlq        list, show and replay dead letters (dlq -h)
  event-ingestion healthcheck  exit 0 when the copy of this machine is ready, for containers
  event-ingestion version    print the version
  event-ingestion -h         this page

Settings:
`

func main() {
	command := ""
	if len(os.Args) > 1 {
		command = os.Args[1]
	}
	switch command {
	case "", "serve":
		os.Exit(serve())
	case "load":
		os.Exit(runLoad(os.Args[2:], os.Stdout, os.Stderr))
	case "audit":
		os.Exit(runAudit(os.Args[2:], os.Stdout, os.Stderr))
	case "reconcile":
		os.Exit(runReconcile(os.Args[2:], os.Stdout, os.Stderr))
	case "rewind":
		os.Exit(runRewind(os.Args[2:], os.Stdout, os.Stderr))
	case "dlq":
		os.Exit(runDLQ(os.Args[2:], os.Stdout, os.Stderr))
	case "healthcheck":
		os.Exit(runHealthcheck(os.Stderr))
	case "version", "-version", "--version":
		fmt.Println(version(), runtime.Version())
	case "-h", "-help", "--help", "help":
		fmt.Print(usage)
		printSettings(os.Stdout)
	default:
		fmt.Fprintf(os.Stderr, "unknown command %q; try event-ingestion -h\n", command)
		os.Exit(2)
	}
}

// serve runs the system until SIGINT or SIGTERM and returns the exit code. A second signal ends it at once.
func serve() int {
	cfg, err := loadSettings(os.Getenv)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 2
	}
	options := &slog.HandlerOptions{Level: cfg.logLevel}
	slog.SetDefault(slog.New(slog.NewTextHandler(os.Stderr, options)))
	if cfg.logFormat == "json" {
		slog.SetDefault(slog.New(slog.NewJSONHandler(os.Stderr, options)))
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

// system is one copy of the program, put together.
type system struct {
	cfg       *settings
	stats     *stats
	store     *store
	producer  *kgo.Client
	watermark *watermark
	metrics   *metricsAPI
	ready     *readiness
	access    *access
	api       *http.Server
	admin     *http.Server
	listener  net.Listener // of the API
	adminL    net.Listener // nil when ADMIN_ADDR is off
}

// newSystem opens the listeners and the producer; nothing runs yet and no dependency has to be there.
func newSystem(cfg *settings) (*system, error) {
	s := &system{cfg: cfg, stats: newStats(), store: newStore(cfg)}
	addr := net.JoinHostPort(cfg.serverHost, fmt.Sprint(cfg.serverPort))
	var err error
	if s.access, err = newAccess(cfg); err != nil {
		return nil, err
	}
	if s.listener, err = net.Listen("tcp", addr); err != nil {
		return nil, fmt.Errorf("listen for the API (SERVER_PORT): %w", err)
	}
	if cfg.adminAddr != "" {
		if s.adminL, err = net.Listen("tcp", cfg.adminAddr); err != nil {
			return nil, fmt.Errorf("listen for the admin pages (ADMIN_ADDR): %w", err)
		}
	}
	if s.producer, err = newProducer(cfg); err != nil {
		return nil, fmt.Errorf("set up the Kafka producer: %w", err)
	}
	s.watermark = newWatermark(s.producer, cfg)
	s.metrics = newMetricsAPI(s.store, s.watermark)
	s.ready = &readiness{kafka: s.producer, metrics: s.metrics, consumes: cfg.role != "api"}
	in := newIngester(s.producer, cfg, &s.stats.ingest)
	s.api = newServer(addr, s.routes(in), cfg, s.access, s.stats)
	s.admin = newAdminServer(cfg.adminAddr, s.stats)
	s.stats.set.NewGauge("event_ingestion_broken_parts_total", func() float64 { return float64(s.store.broken.total.Load()) })
	s.stats.watch(&s.ready.consumer, s.watermark, &in.bodies)
	return s, nil
}

// routes is everything that the API's listener answers, by ROLE.
func (s *system) routes(in *ingester) []route {
	routes := []route{
		{http.MethodGet, "/health", "health", serveHealth},
		{http.MethodGet, "/ready", "ready", s.ready.serve},
	}
	if s.cfg.role != "consumer" {
		routes = append(routes,
			route{http.MethodPost, "/api/v1/events", "events", in.serveOne},
			route{http.MethodPost, "/api/v1/events/bulk", "bulk", in.serveBulk},
			route{http.MethodGet, "/api/v1/metrics", "metrics", s.metrics.serve},
			route{http.MethodGet, "/api/v1/overview", "overview", s.metrics.serveOverview},
		)
		routes = append(routes, pages()...)
	}
	return routes
}

// run serves until ctx is done and then stops within SHUTDOWN_TIMEOUT.
func (s *system) run(ctx context.Context) error {
	serving := make(chan error, 2)
	go func() { // ends with Shutdown
		if s.access.tls != nil {
			serving <- s.api.ServeTLS(s.listener, "", "")
		} else {
			serving <- s.api.Serve(s.listener)
		}
	}()
	hup := make(chan os.Signal, 1)
	if s.cfg.tlsCertFile != "" || os.Getenv("API_KEYS_FILE") != "" { // else the end of a terminal ends the program
		signal.Notify(hup, syscall.SIGHUP)
		defer signal.Stop(hup)
	}
	if s.adminL != nil {
		go func() { serving <- s.admin.Serve(s.adminL) }() // ends with Close
	}
	slog.Info("listening", "api", s.listener.Addr().String(), "admin", s.cfg.adminAddr)

	// Each stage has a context of its own: the next one goes on while the one before it ends.
	consuming, stopConsuming := context.WithCancel(context.Background())
	defer stopConsuming()
	var stages sync.WaitGroup
	deadline := func() (context.Context, context.CancelFunc) {
		return context.WithTimeout(context.Background(), s.cfg.shutdownTimeout/2)
	}
	stages.Go(func() { s.consume(consuming, deadline) }) // ends with stopConsuming
	var err error
	for running := true; running; {
		select {
		case <-hup:
			s.access.reload()
			continue
		case <-ctx.Done():
		case err = <-serving:
		}
		running = false
	}

	s.ready.stopping.Store(true)
	if err == nil && s.cfg.shutdownDelay > 0 {
		slog.Info("not ready any more, still serving", "for", s.cfg.shutdownDelay)
		time.Sleep(s.cfg.shutdownDelay)
	}
	slog.Info("stopping: first requests, then rows, then offsets")
	end, cancel := deadline()
	defer cancel()
	if e := s.api.Shutdown(end); e != nil {
		s.api.Close()
		slog.Warn("requests were cut off, their clients have no answer and will send again", "error", e)
	}
	stopConsuming()
	stages.Wait()
	s.producer.Close()
	s.metrics.close()
	s.admin.Close()
	slog.Info("stopped")
	if errors.Is(err, http.ErrServerClosed) {
		err = nil
	}
	return err
}

// consume waits for Kafka and ClickHouse, prepares both, and runs the consumer. The API accepts events meanwhile.
func (s *system) consume(ctx context.Context, deadline func() (context.Context, context.CancelFunc)) {
	partitions := 0
	if !untilDone(ctx, "topics", func() (err error) { partitions, err = ensureTopics(ctx, s.producer, s.cfg); return err }) {
		return
	}
	var sampling sync.WaitGroup
	sampling.Go(func() { s.watermark.run(ctx) }) // ends with ctx
	defer sampling.Wait()
	if !untilDone(ctx, "tables", func() error { return s.store.applySchema(ctx) }) {
		return
	}
	if s.cfg.role == "api" {
		<-ctx.Done()
		return
	}
	side, err := newSideways(s.cfg, &s.stats.sideways)
	if err != nil {
		slog.Error("producer beside the main way cannot be set up", "error", err)
		return
	}
	defer side.close()
	var retrying sync.WaitGroup
	defer retrying.Wait()
	for range s.cfg.retryWorkers {
		w, err := newRetryWorker(s.cfg, side)
		if err != nil {
			slog.Error("retry worker cannot be set up", "error", err)
			return
		}
		retrying.Go(func() { w.run(ctx) }) // ends with ctx
	}
	for ctx.Err() == nil {
		c, err := newConsumer(s.cfg, s.store, partitions, side, &s.stats.store)
		if err != nil {
			slog.Error("consumer cannot be set up", "error", err)
			return
		}
		s.ready.consumer.Store(c)
		c.run(ctx, deadline)
	}
}

// untilDone repeats prepare until it succeeds; false when ctx ended first.
func untilDone(ctx context.Context, what string, prepare func() error) bool {
	for pause := minBackoff; ; pause = min(2*pause, maxBackoff) {
		err := prepare()
		if err == nil {
			return true
		}
		if ctx.Err() != nil {
			return false
		}
		slog.Warn("not ready yet, will try again", "what", what, "in", pause, "error", err)
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return false
		}
	}
}
