// Read your write: what an answer says is stored can be queried at once, and nobody waits for ever.

package main

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

func TestWaitStored(t *testing.T) {
	t.Parallel()
	p := startProgram(t, newSpace(t))
	counts := func(name string, want int) {
		t.Helper()
		_, _, answer := p.do("GET", fmt.Sprintf("%sevent_name=%s&from=1&to=%d", metricsPath, name, time.Now().Unix()+10), "", "", nil)
		if !strings.HasPrefix(answer, fmt.Sprintf(`{"total_count":%d,`, want)) {
			t.Errorf("%d events of %s are said to be stored: %s", want, name, answer)
		}
	}
	line := func(name string) string { return string(freshEvent(name)) + "\n" }
	for _, c := range []struct {
		name, path, media, body string
		status, counted         int
		want                    string
	}{
		{"one", onePath, jsonCT, line("one"), 200, 1, `","status":"stored"}`},
		{"bulk", bulkPath, ndjson, line("bulk") + line("bulk"), 200, 2, `{"success_count":2,"failed_count":0,"errors":[],"status":"stored"}`},
		{"part", bulkPath, ndjson, line("part") + "{}\n" + line("part"), 207, 2, `}]}],"status":"stored"}`},
		{"none", bulkPath, ndjson, "{}\n", 400, 0, `"error":"validation failed"}`},
		{"track", "/v1/track", jsonCT, `{"event":"track","userId":"u"}`, 200, 1, `{"success":true,"errors":[],"status":"stored"}`},
		{"bad", onePath, jsonCT, "{}", 400, 0, `"code":"validation.required.error"`},
	} {
		for i := 1; ; i++ {
			status, _, answer := p.do("POST", c.path+"?wait=stored", c.media, "", []byte(c.body))
			late := status < 400 && !strings.Contains(answer, "stored") // after 5 s: the same events again
			if late && i < 10 {
				continue
			}
			if status != c.status || !strings.Contains(answer, c.want) {
				t.Errorf("%s: %d %s", c.name, status, answer)
			}
			break
		}
		counts(c.name, c.counted)
	}
	for _, path := range []string{onePath + "?wait=stared", bulkPath + "?wait=stared", onePath + "?wait=", onePath + "?x&wait", "/v1/track?wait=stared"} {
		if status, _, answer := p.do("POST", path, jsonCT, "", []byte(line("no"))); status != 400 || !strings.Contains(answer, `{"field":"wait","code":"validation.invalid-format.error"`) {
			t.Errorf("%s: %d %s", path, status, answer)
		}
	}
	var senders sync.WaitGroup
	var stored atomic.Int32
	for i := range 40 { // at any moment of a round and of a look
		senders.Go(func() { // ends with the answer
			time.Sleep(time.Duration(i) * 17 * time.Millisecond)
			name := fmt.Sprint("many", i)
			if status, _, answer := p.do("POST", onePath+"?wait=stored", jsonCT, "", freshEvent(name)); status == 200 {
				stored.Add(1)
				counts(name, 1)
			} else if status != 202 {
				t.Errorf("%d %s", status, answer)
			}
		})
	}
	if senders.Wait(); stored.Load() == 0 {
		t.Error("nobody was told that anything is stored")
	}
}

// TestWaitEnds: who waits for what does not come gets 202, after the time is up or when the program stops.
func TestWaitEnds(t *testing.T) {
	alone(t)
	p := startProgram(t, newSpace(t))
	t.Cleanup(func() { control(t, "/clickhouse/start") })
	control(t, "/clickhouse/stop")
	if status, _, answer := p.do("POST", onePath+"?wait=stored", jsonCT, "", freshEvent("w")); status != 202 || !strings.HasSuffix(answer, `"status":"queued"}`) {
		t.Errorf("%d %s", status, answer)
	}
	if status, _, answer := p.do("POST", bulkPath+"?wait=stored", ndjson, "", freshEvent("w")); status != 202 || answer != `{"success_count":1,"failed_count":0,"errors":[]}` {
		t.Errorf("%d %s", status, answer)
	}
	answered := make(chan string, 1)
	go func() { // ends with the answer
		status, _, answer := p.do("POST", onePath+"?wait=stored", jsonCT, "", freshEvent("w"))
		answered <- fmt.Sprint(status, answer)
	}()
	p.await("acknowledged", 20*time.Second, func() bool { return totalOf(readTopicEnds(t, p.env, "")) == 3 })
	p.terminate()
	if answer := <-answered; !strings.HasPrefix(answer, "202") || strings.Contains(p.log.String(), "cut off") {
		t.Errorf("at a stop: %s", answer)
	}
}

// TestStoredSignal: each waits for its own moment, all by one wake-up.
func TestStoredSignal(t *testing.T) {
	var s storedSignal
	base := time.Now()
	at := func(n int) time.Time { return base.Add(time.Duration(n)) }
	told := make(chan int, 10)
	for n := range 10 {
		go func() { // ends when the signal has passed its moment
			if s.wait(context.Background(), at(n)) {
				told <- n
			}
		}()
	}
	for n := range 10 {
		if s.advance(at(n)); len(told) > 0 {
			t.Fatalf("%d was told at %d", <-told, n)
		}
		if s.advance(at(n + 1)); <-told != n {
			t.Fatalf("another one than %d was told", n)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if s.wait(ctx, at(10)) || !s.wait(ctx, at(9)) {
		t.Error("a client that is gone is told what is not stored, or not what is")
	}
	s.end()
	if s.wait(context.Background(), at(10)) || !s.wait(context.Background(), at(9)) {
		t.Error("at the end")
	}
}
