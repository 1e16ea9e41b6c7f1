// Freshness: what complete_through says is stored at that moment, through every fault, and it does not stand still for what will
// never be stored. What an answer says is stored can be queried at once, and nobody waits for ever.

package test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/event-ingestion/event-ingestion/internal/testkit"

	"github.com/twmb/franz-go/pkg/kadm"
	"github.com/twmb/franz-go/pkg/kgo"
)

// acknowledged is what a sender was told: an event, and the Unix second in which its answer came.
type acknowledged struct {
	mu sync.Mutex // guards at
	at []int64    // by number of the event; 0 where there was no answer, or none yet
}

// mustBeHonest asks for complete_through and then for what is stored: every event that was answered up to that second has
// to be there.
func (a *acknowledged) mustBeHonest(p *program, db string) {
	p.t.Helper()
	through := int64(0)
	if p.status("/health") == 200 { // not killed a moment ago
		through = completeThrough(p)
	}
	stored := map[string]bool{}
	for user := range strings.Lines(clickhouseQuery(p.t, "SELECT DISTINCT user_id FROM "+db+".events WHERE event_name = 'honest'")) {
		stored[strings.TrimSpace(user)] = true
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	for i, at := range a.at {
		if at != 0 && at <= through && !stored[fmt.Sprint("u", i)] {
			p.t.Fatalf("complete through %d, and event %d, acknowledged at %d, is not stored", through, i, at)
		}
	}
}

// send posts one event after the other until ctx is done.
func (a *acknowledged) send(ctx context.Context, p *program) {
	pace := time.NewTicker(5 * time.Millisecond)
	defer pace.Stop()
	for i := 0; ctx.Err() == nil; i++ {
		<-pace.C
		a.mu.Lock()
		a.at = append(a.at, 0)
		a.mu.Unlock()
		status := 0
		for status != 202 && ctx.Err() == nil { // nobody answers while an instance is killed
			if resp, err := httpPost(p.url+onePath, fmt.Sprintf(`{"event_name":"honest","user_id":"u%d","timestamp":%d}`, i, time.Now().Unix())); err == nil {
				status = resp
			}
		}
		if status == 202 {
			a.mu.Lock()
			a.at[i] = time.Now().Unix()
			a.mu.Unlock()
		}
	}
}

// TestCompleteThroughIsHonest: rows that are rejected and stored later, an instance that is killed, ClickHouse away.
func TestCompleteThroughIsHonest(t *testing.T) {
	alone(t)
	env := newSpace(t, "SERVER_PORT="+freePort(t), "MAX_RETRY_ATTEMPTS=20")
	p := startProgram(t, env)
	db := space(env, "CLICKHOUSE_DATABASE")
	ctx, stop := context.WithCancel(t.Context())
	var told acknowledged
	var sending sync.WaitGroup
	sending.Go(func() { told.send(ctx, p) }) // ends with stop
	defer sending.Wait()
	defer stop()
	until := func(what string, fault func(), over func() bool) {
		fault()
		p.await(what, time.Minute, func() bool {
			time.Sleep(lookInterval / 2)
			told.mustBeHonest(p, db)
			return over()
		})
	}
	catchesUp := func() func() bool {
		second := time.Now().Unix() + 1
		return func() bool { return completeThrough(p) >= second }
	}
	for range testkit.TortureFactor() {
		until("complete", func() {}, catchesUp())
		clickhouseQuery(t, "ALTER TABLE "+db+".events ADD CONSTRAINT seldom CHECK user_id NOT LIKE '%77'")
		before := readTopicEnds(t, env, ".retry")
		rejected := func(times int) func() bool { // a record has been, since before
			return func() bool {
				const delayPartitions = 2 // of the retry topic, for each delay
				p := (times - 1) * delayPartitions
				return testkit.TotalOf(readTopicEnds(t, env, ".retry")[p:p+delayPartitions]) > testkit.TotalOf(before[p:p+delayPartitions])
			}
		}
		until("rejected twice", func() {}, rejected(2))
		until("killed", func() { p.cmd.Process.Kill(); p.cmd.Wait(); p.start() }, func() bool { return p.status("/ready") == 200 })
		until("rejected three times", func() {}, rejected(3))
		clickhouseQuery(t, "ALTER TABLE "+db+".events DROP CONSTRAINT seldom")
		until("complete with the rejected", func() {}, catchesUp())
		control(t, "/clickhouse/kill")
		control(t, "/clickhouse/start")
		time.Sleep(rand.N(50 * time.Millisecond)) // any moment of a round
		until("complete after ClickHouse's death", func() {}, catchesUp())
	}
}

// TestCompleteThroughGoesOn: records that expire before anybody reads them, and topics that are deleted and made again with
// fewer records than the group had committed, do not freeze it.
func TestCompleteThroughGoesOn(t *testing.T) {
	t.Parallel()
	if isCluster() {
		t.Skip("a cluster deletes topics and records in its own time")
	}
	env := newSpace(t)
	topic := space(env, "KAFKA_TOPIC")
	kafka, err := kgo.NewClient(kgo.SeedBrokers(kafkaBrokers(t)...))
	if err != nil {
		t.Fatal(err)
	}
	defer kafka.Close()
	admin := kadm.NewClient(kafka)
	send := func(p *program, n int) {
		t.Helper()
		var body []byte
		for range n {
			body = append(append(body, testkit.FreshEvent("g")...), '\n')
		}
		if status, _, answer := p.do("POST", bulkPath, ndjson, "", body); status != 202 {
			t.Fatal(status, answer)
		}
	}
	p := startProgram(t, env)
	send(p, 300)
	drained(p)
	p.terminate()

	api := startProgram(t, append(env, "ROLE=api"))
	send(api, 300)
	for _, name := range []string{topic, topic + ".retry"} {
		if name != topic { // a record whose time came and went
			rec := &kgo.Record{Topic: name, Value: []byte("{}")}
			if err := kafka.ProduceSync(t.Context(), rec).FirstErr(); err != nil {
				t.Fatal(err)
			}
		}
		ends, err := admin.ListEndOffsets(t.Context(), name)
		if err != nil {
			t.Fatal(err)
		}
		if deleted, err := admin.DeleteRecords(t.Context(), ends.Offsets()); err != nil || deleted.Error() != nil {
			t.Fatal(err, deleted.Error())
		}
	}
	drained(api)

	p = startProgram(t, env)
	for _, name := range []string{topic, topic + ".retry"} {
		if _, err := admin.DeleteTopics(t.Context(), name); err != nil {
			t.Fatal(err)
		}
	}
	for _, without := range []*program{p, api} { // their clients would go on asking for the old ones
		const says = "a topic was deleted"
		if code := without.ended(says); code != 1 || !strings.Contains(without.log.String(), says) {
			t.Errorf("exit code %d, and the log does not say %s:\n%s", code, says, without.log)
		}
	}
	p, api = startProgram(t, env), startProgram(t, append(env, "ROLE=api"))
	send(p, 20)
	drained(p)
	drained(api)
	if n := clickhouseQuery(t, "SELECT count() FROM "+space(env, "CLICKHOUSE_DATABASE")+".events"); n != "320" {
		t.Errorf("%s events are stored, want 320", n)
	}
}

// TestGrowthIsNotClaimed: a topic grows, and every second record moves to a partition that cannot be read for a while. Neither
// those who saw it grow nor an instance that starts afterwards claims these records.
func TestGrowthIsNotClaimed(t *testing.T) {
	t.Parallel()
	env := faultSpace(t, "KAFKA_PARTITIONS=1")
	topic := space(env, "KAFKA_TOPIC")
	between := newProxy(t, clickhouseAddress(t), nil)
	p := startProgram(t, append(slices.Clone(env), "CLICKHOUSE_PORT="+between.port()))
	drained(p)
	between.shut.Store(true)
	between.cutAnswers()
	const events = 400
	now := time.Now().Unix()
	postAll(t, p, numbered("claim", events, events, func(i int) int64 { return now - int64(i%300) }))
	answered := time.Now().Unix()
	time.Sleep(8 * lookInterval) // looks that know of one partition, and of all events there
	growTopic(t, env, 2)
	other, err := kgo.NewClient(kgo.SeedBrokers(kafkaBrokers(t)...), kgo.TransactionalID(topic+"-other"), kgo.RecordPartitioner(kgo.ManualPartitioner()))
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	if err := other.BeginTransaction(); err != nil {
		t.Fatal(err)
	}
	if err := other.ProduceSync(t.Context(), &kgo.Record{Topic: topic, Partition: 1, Value: []byte("open")}).FirstErr(); err != nil {
		t.Fatal(err)
	}
	p.await("seen to grow", 20*time.Second, func() bool { return strings.Contains(p.log.String(), "more partitions than before") })
	later := startProgram(t, append(slices.Clone(env), "ROLE=api"))
	between.shut.Store(false)
	stored := func() string {
		return clickhouseQuery(t, "SELECT count() FROM "+space(env, "CLICKHOUSE_DATABASE")+".events")
	}
	p.await("half of them stored", time.Minute, func() bool { n, _ := strconv.Atoi(stored()); return n > events/3 })
	for range 12 { // looks, a quarter of a second apart
		for _, q := range []*program{p, later} {
			if through := completeThrough(q); through > answered && stored() != fmt.Sprint(events) {
				t.Fatalf("acknowledged by %d; complete_through says %d and %s of %d are stored", answered, through, stored(), events)
			}
		}
		time.Sleep(lookInterval)
	}
	if err := other.EndTransaction(t.Context(), kgo.TryAbort); err != nil {
		t.Fatal(err)
	}
	for _, q := range []*program{p, later} {
		drained(q)
	}
	mustCount(t, env, "claim", events)
}

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
	line := func(name string) string { return string(testkit.FreshEvent(name)) + "\n" }
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
	for i := range 30 { // at any moment of a round and of a look; fewer than one client's questions may wait
		senders.Go(func() { // ends with the answer
			time.Sleep(time.Duration(i) * 17 * time.Millisecond)
			name := fmt.Sprint("many", i)
			if status, _, answer := p.do("POST", onePath+"?wait=stored", jsonCT, "", testkit.FreshEvent(name)); status == 200 {
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
	if status, _, answer := p.do("POST", onePath+"?wait=stored", jsonCT, "", testkit.FreshEvent("w")); status != 202 || !strings.HasSuffix(answer, `"status":"queued"}`) {
		t.Errorf("%d %s", status, answer)
	}
	if status, _, answer := p.do("POST", bulkPath+"?wait=stored", ndjson, "", testkit.FreshEvent("w")); status != 202 || answer != `{"success_count":1,"failed_count":0,"errors":[]}` {
		t.Errorf("%d %s", status, answer)
	}
	answered := make(chan string, 1)
	go func() { // ends with the answer
		status, _, answer := p.do("POST", onePath+"?wait=stored", jsonCT, "", testkit.FreshEvent("w"))
		answered <- fmt.Sprint(status, answer)
	}()
	p.await("acknowledged", 20*time.Second, func() bool { return testkit.TotalOf(readTopicEnds(t, p.env, "")) == 3 })
	p.terminate()
	if answer := <-answered; !strings.HasPrefix(answer, "202") || strings.Contains(p.log.String(), "cut off") {
		t.Errorf("at a stop: %s", answer)
	}
}
