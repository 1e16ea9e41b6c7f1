// The control endpoint: how a fault test takes parts of the stack away and gives them back.
//
//	POST /clickhouse/kill      kill -9; comes back by itself
//	POST /clickhouse/stop      kill -9; stays down
//	POST /clickhouse/start     returns when it answers queries
//	POST /clickhouse/pause     SIGSTOP: connections stay open and nothing answers
//	POST /clickhouse/resume    SIGCONT
//	                           of one server: /clickhouse/2/kill and so on, counted from 1; else all of them
//	POST /clickhouse/join      the servers of -later join the cluster; each server starts over for it, one after the other
//	POST /kafka/stop           closes both brokers and every connection; of a cluster, kill -9 of every node
//	POST /kafka/kill/{node}    kill -9 of one node of a cluster; DEV_KAFKA_NODES has the names
//	POST /kafka/start          the same ports and data; returns when all brokers answer
//	POST /kafka/cut            every connection of now takes in one more request and breaks instead of answering;
//	                           not with a cluster
//
// 200 and one line of JSON, or 409 and what went wrong. What is so already (stop, start) is no error.

package main

import (
	"errors"
	"fmt"
	"net"
	"net/http"
	"syscall"
)

// serveControl serves on a free port of loopback, which is in Addr, until Close.
func serveControl(kafka kafka, shards []*clickhouse) (*http.Server, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	mux := http.NewServeMux()
	actions := map[string]func(*http.Request) error{
		"/kafka/stop":        func(*http.Request) error { kafka.stop(); return nil },
		"/kafka/start":       func(r *http.Request) error { return kafka.start(r.Context()) },
		"/kafka/kill/{node}": func(r *http.Request) error { return kafka.kill(r.PathValue("node")) },
		"/kafka/cut":         func(*http.Request) error { return kafka.cut() },
	}
	for verb, action := range map[string]func(*clickhouse, *http.Request) error{
		"kill":   func(ch *clickhouse, _ *http.Request) error { return ch.kill() },
		"stop":   func(ch *clickhouse, _ *http.Request) error { ch.down(); return nil },
		"start":  func(ch *clickhouse, r *http.Request) error { return ch.up(r.Context()) },
		"pause":  func(ch *clickhouse, _ *http.Request) error { return ch.signal(syscall.SIGSTOP) },
		"resume": func(ch *clickhouse, _ *http.Request) error { return ch.signal(syscall.SIGCONT) },
	} {
		actions["/clickhouse/"+verb] = func(r *http.Request) (err error) {
			for _, ch := range shards {
				err = errors.Join(err, action(ch, r))
			}
			return err
		}
		for i, ch := range shards {
			actions[fmt.Sprintf("/clickhouse/%d/%s", i+1, verb)] = func(r *http.Request) error { return action(ch, r) }
		}
	}
	actions["/clickhouse/join"] = func(r *http.Request) (err error) {
		var all []int
		for _, ch := range shards {
			all = append(all, ch.nativePort)
		}
		for _, ch := range shards {
			err = errors.Join(err, ch.join(r.Context(), all))
		}
		return err
	}
	for path, action := range actions {
		mux.HandleFunc("POST "+path, func(w http.ResponseWriter, r *http.Request) {
			if err := action(r); err != nil {
				http.Error(w, err.Error(), http.StatusConflict)
				return
			}
			w.Header().Set("Content-Type", "application/json")
			fmt.Fprintln(w, `{"status":"ok"}`)
		})
	}
	s := &http.Server{Addr: l.Addr().String(), Handler: mux}
	go s.Serve(l) // ends with Close
	return s, nil
}
