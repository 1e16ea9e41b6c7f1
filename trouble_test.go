// What the log is told of something that goes on failing.

package main

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestTroubles(t *testing.T) {
	synctest.Test(t, func(t *testing.T) { // time passes when everybody sleeps
		var log bytes.Buffer
		was := slog.Default()
		slog.SetDefault(slog.New(slog.NewTextHandler(&log, nil)))
		defer slog.SetDefault(was)
		lines := func() int {
			n := strings.Count(log.String(), "\n")
			log.Reset()
			return n
		}
		tr := newTroubles()
		if got := tr.oldest(); got != "" {
			t.Errorf("at first: %q", got)
		}
		for i := range 1200 { // two minutes
			tr.note("insert", fmt.Errorf("port %d: no space\nstack", i))
			time.Sleep(100 * time.Millisecond)
		}
		if n := lines(); n != 2 {
			t.Errorf("%d lines in two minutes, want 2", n)
		}
		tr.note("insert", errors.New("too many parts"))
		tr.note("look up", errors.New("away"))
		if n := lines(); n != 2 {
			t.Errorf("%d lines for two other causes", n)
		}
		if got := tr.oldest(); got != "insert: too many parts" {
			t.Error(got)
		}
		tr.clear("insert")
		tr.clear("insert")
		if got := tr.oldest(); got != "look up: away" {
			t.Error(got)
		}
		if n := lines(); n != 1 {
			t.Errorf("%d lines for what works again", n)
		}
		for range 100 { // comes and goes: neither is told again so soon
			tr.note("insert", errors.New("too many parts"))
			tr.clear("insert")
		}
		if n := lines(); n != 0 {
			t.Errorf("%d lines for what comes and goes", n)
		}
		for i := range 3 * maxTold {
			tr.note("insert", errors.New(strings.Repeat("x", i)))
		}
		if len(tr.told) > maxTold {
			t.Errorf("%d causes are remembered", len(tr.told))
		}
	})
}
