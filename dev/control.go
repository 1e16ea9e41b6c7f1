// The control endpoint: how a fault test takes parts of the stack away and gives them back.
//
//	POST /clickhouse/kill | stop | start | pause | resume     kill: -9, comes back; stop: -9, stays down
//	POST /kafka/stop | start

package main

import (
	"fmt"
	"net"
	"net/http"
	"syscall"
)

func serveControl(kafka *brokers, ch *clickhouse) (*http.Server, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	mux := http.NewServeMux()
	for path, action := range map[string]func(*http.Request) error{
		"/clickhouse/kill":   func(*http.Request) error { return ch.down(true) },
		"/clickhouse/stop":   func(*http.Request) error { return ch.down(false) },
		"/clickhouse/start":  func(r *http.Request) error { return ch.up(r.Context()) },
		"/clickhouse/pause":  func(*http.Request) error { return ch.signal(syscall.SIGSTOP) },
		"/clickhouse/resume": func(*http.Request) error { return ch.signal(syscall.SIGCONT) },
		"/kafka/stop":        func(*http.Request) error { return kafka.stop() },
		"/kafka/start":       func(*http.Request) error { return kafka.start() },
	} {
		mux.HandleFunc("POST "+path, func(w http.ResponseWriter, r *http.Request) {
			if err := action(r); err != nil {
				http.Error(w, err.Error(), http.StatusConflict)
				return
			}
			fmt.Fprintln(w, `{"status":"ok"}`)
		})
	}
	s := &http.Server{Addr: l.Addr().String(), Handler: mux}
	go s.Serve(l) // ends with Close
	return s, nil
}
