// The loads of tests: what sends while something dies, and what is asked meanwhile.

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/event-ingestion/event-ingestion/load"
)

// loads counts the loads of tests: every other one sends insert_ids.
var loads atomic.Int32

// loadInto sends made-up events to url and returns the loader for its counts. It runs in the background until done.
func loadInto(tb testing.TB, url string, rate float64, d time.Duration, more ...string) (l *load.Loader, done func()) {
	tb.Helper()
	rate *= float64(min(tortureFactor(), 3)) // where there is time, more is in flight when something dies
	args := []string{"-url", url, "-rate", fmt.Sprint(rate), "-duration", d.String(), "-bulk", "50", "-connections", "16", "-users", "500", "-retries", "100"}
	t, isTest := tb.(*testing.T)
	if isTest { // a benchmark measures without
		args = append(args, "-dup", "0.1", fmt.Sprintf("-insert-ids=%t", loads.Add(1)%2 == 0))
	}
	args = append(args, more...)
	cfg, err := load.Parse(args, io.Discard)
	if err != nil {
		tb.Fatal(err)
	}
	cfg.Event = fmt.Sprintf("%s_%d", cfg.Event, time.Now().UnixNano())
	if l, err = load.New(cfg); err != nil {
		tb.Fatal(err)
	}
	finished := make(chan struct{})
	go func() { // ends after d, or l.Stop
		defer close(finished)
		l.Send(context.Background(), io.Discard)
	}()
	if isTest {
		var watching sync.WaitGroup
		watching.Go(func() { mustBeHonest(t, l, url, finished) }) // ends with the load
		t.Cleanup(watching.Wait)
	}
	tb.Cleanup(l.Stop)
	return l, func() { <-finished }
}

// mustBeHonest fails the test when complete_through says that something is counted which is not, or groups that are not what the
// total is, at any time until done.
func mustBeHonest(t *testing.T, l *load.Loader, url string, done <-chan struct{}) {
	type note struct{ second, acknowledged int64 }
	var notes []note
	var a load.MetricsAnswer
	tick := time.NewTicker(sampleInterval) // complete_through moves no faster, and a query is 20 ms of CPU
	defer tick.Stop()
	for n := 0; ; n++ {
		select {
		case <-done:
			return
		case <-tick.C:
		}
		acknowledged := l.Distinct()
		notes = append(notes, note{time.Now().Unix(), acknowledged})
		resp, err := http.Get(fmt.Sprintf("%s%sevent_name=%s&from=1&to=%d&group_by=%s", url, metricsPath, l.Config.Event, time.Now().Unix()+100,
			[]string{"", "hour", "campaign", "day", "channel"}[n%5]))
		if err != nil {
			continue // the fault
		}
		a.Through, a.Groups = 0, nil
		answered := resp.StatusCode == http.StatusOK && json.NewDecoder(resp.Body).Decode(&a) == nil
		resp.Body.Close()
		sum := int64(0)
		for _, g := range a.Groups {
			sum += g.Total
		}
		if answered && n%5 > 0 && sum != a.Total {
			t.Errorf("%d are counted in all, %d in the groups of question %d", a.Total, sum, n%5)
		}
		for answered && len(notes) > 0 && notes[0].second <= a.Through {
			if a.Total < notes[0].acknowledged {
				t.Errorf("complete through %d, and %d of the %d events acknowledged then are counted", a.Through, a.Total, notes[0].acknowledged)
			}
			notes = notes[1:]
		}
	}
}

// mustAgree fails the test unless the metrics endpoint counts exactly what the loader had accepted.
func mustAgree(t testing.TB, l *load.Loader, url string) {
	t.Helper()
	l.Config.URL = url
	var out bytes.Buffer
	if code := l.Report(&out, l.Verify(&out)); code != 0 {
		t.Fatalf("counts differ:\n%s", &out)
	}
	if l.OK.Load() == 0 {
		t.Fatal("nothing was accepted")
	}
}
