// For operators: readiness, Prometheus metrics, pprof.
//
// admin.go owns the admin listener, which is for loopback or a private network: it has no access control.

package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/pprof"
	"os"
	"sync/atomic"
	"time"

	"github.com/twmb/franz-go/pkg/kgo"
)

// readyTimeout bounds all dependency checks of one /ready.
const readyTimeout = 3 * time.Second

// readiness answers GET /ready.
type readiness struct {
	kafka    *kgo.Client
	metrics  *metricsAPI
	consumer atomic.Pointer[consumer] // nil until it runs
	stopping atomic.Bool
	consumes bool // by its ROLE
}

func (rd *readiness) serve(w http.ResponseWriter, r *http.Request) {
	ctx, cancel := context.WithTimeout(r.Context(), readyTimeout)
	defer cancel()
	checks := []struct {
		name string
		err  error
	}{
		{"kafka", rd.brokers(ctx)},
		{"clickhouse", rd.metrics.ping(ctx)},
		{"consumers", rd.consuming()},
	}
	if !rd.consumes {
		checks = checks[:2]
	}
	status, word := http.StatusOK, "ready"
	if rd.stopping.Load() {
		status, word = http.StatusServiceUnavailable, "stopping"
	}
	body := []byte(nil)
	for _, c := range checks {
		text := "ok"
		if c.name == "clickhouse" && rd.metrics.store.broken.words() != "" { // it answers all the same
			text = rd.metrics.store.broken.words()
		}
		if c.err != nil {
			status, word, text = http.StatusServiceUnavailable, "not ready", firstLine(c.err.Error())
		}
		body = append(body, ",\n"...)
		body = appendString(body, c.name)
		body = append(body, ':')
		body = appendString(body, text)
	}
	b := appendString([]byte(`{"status":`), word)
	if status != http.StatusOK {
		b = append(b, `,"error":"not ready to serve"`...)
	}
	writeJSON(w, status, append(append(b, body...), "}\n"...))
}

func (rd *readiness) brokers(ctx context.Context) error {
	err := rd.kafka.Ping(ctx)
	if errors.Is(err, io.EOF) {
		return fmt.Errorf("no broker keeps the connection (%w); look at KAFKA_TLS and KAFKA_SASL_MECHANISM, user and password", err)
	}
	return err
}

func (rd *readiness) consuming() error {
	c := rd.consumer.Load()
	if c == nil {
		return fmt.Errorf("not started: the tables or topics are not there yet")
	}
	if c.assigned.Load() == 0 {
		return fmt.Errorf("no partitions assigned yet")
	}
	return nil
}

// serveHealth answers GET /health: the process answers. It asks no dependency, so that an outage of one does not
// make an orchestrator kill the copies that still accept events.
func serveHealth(w http.ResponseWriter, _ *http.Request) {
	writeJSON(w, http.StatusOK, []byte(`{"status":"ok"}`))
}

// newAdminServer serves Prometheus text and profiles.
func newAdminServer(addr string, st *stats) *http.Server {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /metrics", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
		st.write(w)
	})
	mux.HandleFunc("GET /debug/pprof/", pprof.Index)
	mux.HandleFunc("GET /debug/pprof/cmdline", pprof.Cmdline)
	mux.HandleFunc("GET /debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("GET /debug/pprof/symbol", pprof.Symbol)
	mux.HandleFunc("GET /debug/pprof/trace", pprof.Trace)
	return &http.Server{Addr: addr, Handler: mux, ReadHeaderTimeout: readHeaderTimeout, MaxHeaderBytes: maxHeaderBytes}
}

// runHealthcheck asks the API of this machine whether it is ready, for containers that have no curl. It takes the port and
// TLS from the same settings as the program and returns the exit code.
func runHealthcheck(stderr io.Writer) int {
	cfg, err := loadSettings(os.Getenv)
	if err != nil {
		fmt.Fprintln(stderr, err)
		return 2
	}
	host, scheme := cfg.serverHost, "http"
	if ip := net.ParseIP(host); host == "" || ip.IsUnspecified() {
		host = "localhost"
	}
	if cfg.tlsCertFile != "" {
		scheme = "https"
	}
	client := http.Client{ // the certificate is for another name than localhost
		Timeout: readyTimeout + time.Second, Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}}
	resp, err := client.Get(scheme + "://" + net.JoinHostPort(host, fmt.Sprint(cfg.serverPort)) + "/ready")
	if err != nil {
		fmt.Fprintln(stderr, "healthcheck:", err)
		return 1
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		io.Copy(stderr, resp.Body)
		return 1
	}
	return 0
}
