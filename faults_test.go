// What must not lose an event: a stop under load, ClickHouse away, Kafka away, copies that come and go, junk.

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/twmb/franz-go/pkg/kgo"
)

// control asks the embedded stack to take a part away or to give it back.
func control(t testing.TB, action string) {
	t.Helper()
	resp, err := http.Post(os.Getenv("DEV_CONTROL")+action, "", nil)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		t.Fatalf("%s: %s", action, resp.Status)
	}
}

// tortureFactor is TORTURE from the environment: how many times more often `make torture` kills.
func tortureFactor() int {
	n, _ := strconv.Atoi(os.Getenv("TORTURE"))
	return max(n, 1)
}

// space returns the value of a variable in a space's environment.
func space(env []string, name string) string {
	value := ""
	for _, kv := range env { // the last one counts, as in a process's environment
		if v, ok := strings.CutPrefix(kv, name+"="); ok {
			value = v
		}
	}
	return value
}

// mustHold compares the raw table, too: the metrics endpoint reads the aggregate.
func mustHold(t testing.TB, env []string, l *loader) {
	t.Helper()
	db := space(env, "CLICKHOUSE_DATABASE")
	want := fmt.Sprint(l.src.expected()[0].count)
	var got, hourly string
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		got = clickhouseQuery(t, fmt.Sprintf("SELECT uniqExact(event_id) FROM %s.events WHERE event_name = '%s'", db, l.cfg.event))
		hourly = clickhouseQuery(t, fmt.Sprintf("SELECT sum(event_count) FROM %s.events_hourly WHERE event_name = '%s'", db, l.cfg.event))
		if got == want && hourly == want {
			break
		}
		if time.Now().After(deadline) { // after a double fault the aggregate is mended a moment later
			t.Fatalf("accepted %s, events has %s, events_hourly %s", want, got, hourly)
		}
	}
	ledger, err := readLedger(t.Context(), settingsFrom(t, env), timeRange{0, maxUnixSeconds})
	if err != nil {
		t.Fatal(err)
	}
	if ledger.difference() != 0 || ledger.rows != ledger.aggregated || ledger.stored == 0 {
		var out bytes.Buffer
		ledger.print(&out)
		t.Fatalf("the ledger does not balance:\n%s", &out)
	}
}

func TestStopUnderLoad(t *testing.T) {
	env := newSpace(t)
	for round := range 3 {
		p := startProgram(t, env)
		l, done := loadInto(t, p.url, 3000, 1500*time.Millisecond, "-retries", "0")
		p.await("under load", 10*time.Second, func() bool { return l.ok.Load() > 500 })
		p.terminate()
		done()
		next := startProgram(t, env)
		l.refused, l.examples = map[string]int{}, nil // what the stopped program could not take is not its loss
		l.unknown.Store(0)
		mustAgree(t, l, next.url)
		mustHold(t, env, l)
		next.terminate()
		t.Logf("round %d: %d accepted", round, l.ok.Load())
	}
}

func TestClickHouseAwayUnderLoad(t *testing.T) {
	env := newSpace(t)
	p := startProgram(t, env)
	away := 10 * time.Second
	l, done := loadInto(t, p.url, 3000, away+3*time.Second)
	p.await("under load", 10*time.Second, func() bool { return l.ok.Load() > 1000 })
	control(t, "/clickhouse/stop")
	before := l.ok.Load()
	if status := p.status(metricsPath + "event_name=e&from=1&to=2"); status != http.StatusServiceUnavailable {
		t.Errorf("metrics without ClickHouse: status %d", status)
	}
	if p.status("/health") != http.StatusOK || p.status("/ready") != http.StatusServiceUnavailable {
		t.Error("health has to stay, ready has to go")
	}
	time.Sleep(away) // the fault itself, not a wait for something
	control(t, "/clickhouse/start")
	if accepted := l.ok.Load() - before; accepted < 3000 {
		t.Errorf("only %d accepted while ClickHouse was away", accepted)
	}
	done()
	mustAgree(t, l, p.url)
	mustHold(t, env, l)
}

// TestClickHouseKilledUnderLoad: an insert whose answer is lost is repeated under its token, and counted once.
func TestClickHouseKilledUnderLoad(t *testing.T) {
	env := newSpace(t)
	p := startProgram(t, env)
	l, done := loadInto(t, p.url, 5000, 8*time.Second)
	for range 4 {
		target := l.ok.Load() + 3000
		p.await("under load", 20*time.Second, func() bool { return l.ok.Load() > target })
		control(t, "/clickhouse/kill")
	}
	done()
	control(t, "/clickhouse/start")
	mustAgree(t, l, p.url)
	mustHold(t, env, l)
}

func TestKafkaAway(t *testing.T) {
	env := newSpace(t, "ACK_TIMEOUT=1s")
	p := startProgram(t, env)
	event := func() []byte {
		return fmt.Appendf(nil, `{"event_name":"k","user_id":"u%d","timestamp":%d}`, time.Now().UnixNano(), time.Now().Unix())
	}
	control(t, "/kafka/stop")
	status, header, answer := p.do("POST", onePath, jsonCT, "", event())
	if status != http.StatusServiceUnavailable || header.Get("Retry-After") == "" {
		t.Errorf("single: %d %v %s", status, header, answer)
	}
	status, header, answer = p.do("POST", bulkPath, ndjson, "", append(append(event(), "\n{}\n"...), event()...))
	if status != http.StatusServiceUnavailable || header.Get("Retry-After") == "" || strings.Count(answer, `"code":"unavailable"`) != 2 {
		t.Errorf("bulk: %d %v %s", status, header, answer)
	}
	if p.status("/health") != http.StatusOK || p.status("/ready") != http.StatusServiceUnavailable {
		t.Error("health has to stay, ready has to go")
	}
	control(t, "/kafka/start")
	p.await("accepting again", 30*time.Second, func() bool {
		status, _, _ := p.do("POST", onePath, jsonCT, "", event())
		return status == http.StatusAccepted
	})
	l, done := loadInto(t, p.url, 2000, time.Second)
	done()
	mustAgree(t, l, p.url)
	mustHold(t, env, l)
}

// TestKilledUnderLoad: kill -9 of the program at random moments. The client resends what has no answer, the next copy
// reads again what was not committed: everything is counted once.
func TestKilledUnderLoad(t *testing.T) {
	killUnderLoad(t, 20*tortureFactor(), func() {}, "-dup", "0.2")
}

// TestPowerCut: the program and ClickHouse die together.
func TestPowerCut(t *testing.T) {
	killUnderLoad(t, 10*tortureFactor(), func() { control(t, "/clickhouse/kill") })
}

// killUnderLoad kills the program, and first whatever also does, so many times.
func killUnderLoad(t *testing.T, times int, also func(), loadFlags ...string) {
	env := newSpace(t)
	p := startProgram(t, env)
	l, done := loadInto(t, p.url, 4000, time.Hour, loadFlags...)
	for range times {
		target := l.ok.Load() + 1 + rand.Int64N(1500)
		p.await("under load", 20*time.Second, func() bool { return l.ok.Load() >= target })
		time.Sleep(rand.N(60 * time.Millisecond)) // any moment of a round
		also()
		p = p.killAndRestart()
	}
	l.stop()
	done()
	mustAgree(t, l, p.url)
	mustHold(t, env, l)
}

// TestResent: three clients send the same file at once, and one of them again after a restart.
func TestResent(t *testing.T) {
	env := newSpace(t)
	p := startProgram(t, env)
	path := filepath.Join(t.TempDir(), "events.ndjson")
	var lines []byte
	now := time.Now().Unix()
	const events = 6000
	for i := range events { // over 20 days, with a third of the lines twice in the file itself
		n := i - i%3/2
		lines = fmt.Appendf(lines, `{"event_name":"resent","user_id":"u%d","timestamp":%d}`+"\n", n%700, now-int64(n)*288)
	}
	if err := os.WriteFile(path, lines, 0o600); err != nil {
		t.Fatal(err)
	}
	send := func() *loader {
		cfg, err := parseLoadFlags([]string{"-url", p.url, "-file", path, "-rate", "0", "-bulk", "500", "-connections", "4"}, io.Discard)
		if err != nil {
			t.Fatal(err)
		}
		src, err := openReplay(path)
		if err != nil {
			t.Fatal(err)
		}
		l := newLoader(cfg, src)
		l.send(context.Background(), io.Discard)
		return l
	}
	var clients sync.WaitGroup
	for range 3 {
		clients.Go(func() { send() })
	}
	clients.Wait()
	p.terminate()
	p = startProgram(t, env)
	l := send()
	if l.ok.Load() != events {
		t.Fatalf("%d accepted", l.ok.Load())
	}
	drained(p)
	mustAgree(t, l, p.url)
	want := fmt.Sprint(events * 2 / 3)
	if got := clickhouseQuery(t, fmt.Sprintf("SELECT sum(event_count) FROM %s.events_hourly", space(env, "CLICKHOUSE_DATABASE"))); got != want {
		t.Fatalf("events_hourly has %s, want %s", got, want)
	}
}

// drained returns when everything that was acknowledged before the call is stored.
func drained(p *program) {
	p.t.Helper()
	second := time.Now().Unix()
	p.await("drained", 20*time.Second, func() bool {
		var a struct {
			Through int64 `json:"complete_through"`
		}
		_, _, answer := p.do("GET", metricsPath+"event_name=x&from=1&to=2", "", "", nil)
		json.Unmarshal([]byte(answer), &a)
		return a.Through >= second
	})
}

// TestCopiesComeAndGo: partitions move under load, back and forth, and every event is stored once.
func TestCopiesComeAndGo(t *testing.T) {
	env := newSpace(t)
	first := startProgram(t, env)
	l, done := loadInto(t, first.url, 5000, 8*time.Second)
	for range 2 {
		second := startProgram(t, env)
		target := l.ok.Load() + 4000
		second.await("shared", 20*time.Second, func() bool { return l.ok.Load() > target })
		second.terminate()
	}
	done()
	mustAgree(t, l, first.url)
	mustHold(t, env, l)
}

// TestPausedCopy: a copy sleeps beyond its session and wakes up with blocks that somebody else has stored meanwhile, or
// in the middle of an insert that somebody else waits for.
func TestPausedCopy(t *testing.T) {
	env := newSpace(t)
	first := startProgram(t, env)
	second := startProgram(t, env)
	db := space(env, "CLICKHOUSE_DATABASE")
	clickhouseQuery(t, "SYSTEM STOP MERGES "+db+".events") // a copy in the raw table stays visible
	l, done := loadInto(t, first.url, 5000, time.Hour)
	for range 5 * tortureFactor() {
		target := l.ok.Load() + 2000
		first.await("under load", 20*time.Second, func() bool { return l.ok.Load() > target })
		second.cmd.Process.Signal(syscall.SIGSTOP)
		time.Sleep(2500 * time.Millisecond) // beyond KAFKA_SESSION_TIMEOUT: the fault itself
		second.cmd.Process.Signal(syscall.SIGCONT)
		second.await("back", 20*time.Second, func() bool { return second.status("/ready") == http.StatusOK })
	}
	l.stop()
	done()
	mustAgree(t, l, first.url)
	if n := clickhouseQuery(t, "SELECT count() - uniqExact(event_id) FROM "+db+".events"); n != "0" {
		t.Errorf("%s events were stored twice", n)
	}
	mustHold(t, env, l)
}

// TestKafkaAwayUnderLoad: the brokers stop and come back; the client resends what was not acknowledged.
func TestKafkaAwayUnderLoad(t *testing.T) {
	env := newSpace(t, "ACK_TIMEOUT=1s")
	p := startProgram(t, env)
	l, done := loadInto(t, p.url, 3000, time.Hour)
	for range 3 {
		target := l.ok.Load() + 2000
		p.await("under load", 40*time.Second, func() bool { return l.ok.Load() > target })
		control(t, "/kafka/stop")
		time.Sleep(1500 * time.Millisecond) // beyond ACK_TIMEOUT: the fault itself
		control(t, "/kafka/start")
	}
	target := l.ok.Load() + 2000
	p.await("under load again", 40*time.Second, func() bool { return l.ok.Load() > target })
	l.stop()
	done()
	l.refused, l.examples = map[string]int{}, nil // 503 to the end is an honest answer
	mustAgree(t, l, p.url)
	mustHold(t, env, l)
}

// TestAnswersCut: a proxy in front of ClickHouse lets requests through and cuts the connection before the answer.
func TestAnswersCut(t *testing.T) {
	cut := newCutter(t, "127.0.0.1:"+os.Getenv("CLICKHOUSE_PORT"))
	env := newSpace(t, "CLICKHOUSE_PORT="+cut.port())
	p := startProgram(t, env)
	l, done := loadInto(t, p.url, 4000, time.Hour, "-dup", "0.1")
	for range 30 {
		target := l.ok.Load() + 300
		p.await("under load", 20*time.Second, func() bool { return l.ok.Load() > target })
		cut.answers()
	}
	l.stop()
	done()
	mustAgree(t, l, p.url)
	mustHold(t, env, l)
}

// TestKafkaAnswersCut: the brokers carry requests out and their answers are lost: what was produced is produced again
// under its sequence number, what was committed is committed again.
func TestKafkaAnswersCut(t *testing.T) {
	if isCluster() {
		t.Skip("the brokers of a cluster are killed instead, see cluster_test.go")
	}
	env := newSpace(t)
	p := startProgram(t, env)
	l, done := loadInto(t, p.url, 4000, time.Hour, "-dup", "0.1")
	for range 30 * tortureFactor() {
		target := l.ok.Load() + 300
		p.await("under load", 20*time.Second, func() bool { return l.ok.Load() > target })
		control(t, "/kafka/cut")
	}
	l.stop()
	done()
	mustAgree(t, l, p.url)
	mustHold(t, env, l)
}

// cutter is a TCP proxy whose connections can lose their answers.
type cutter struct {
	listener net.Listener
	mu       sync.Mutex // guards conns
	conns    map[net.Conn]*atomic.Bool
}

func newCutter(t *testing.T, target string) *cutter {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	c := &cutter{listener: l, conns: map[net.Conn]*atomic.Bool{}}
	t.Cleanup(func() { l.Close() })
	go func() { // ends with the listener
		for {
			client, err := l.Accept()
			if err != nil {
				return
			}
			server, err := net.Dial("tcp", target)
			if err != nil {
				client.Close()
				continue
			}
			mute := new(atomic.Bool)
			c.mu.Lock()
			c.conns[client] = mute
			c.mu.Unlock()
			go func() { io.Copy(server, client); server.Close() }() // ends with either side
			go func() {                                             // ends with either side
				defer client.Close()
				b := make([]byte, 32<<10)
				for {
					n, err := server.Read(b)
					if err != nil || mute.Load() {
						return // what the server said is never heard
					}
					if _, err := client.Write(b[:n]); err != nil {
						return
					}
				}
			}()
		}
	}()
	return c
}

func (c *cutter) port() string { return strconv.Itoa(c.listener.Addr().(*net.TCPAddr).Port) }

// answers makes every connection of now lose its next answer, and end with it.
func (c *cutter) answers() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, mute := range c.conns {
		mute.Store(true)
	}
	clear(c.conns)
}

// TestJunk: what is no event goes to the dead letters with its headers; what others write in their own way is
// understood; nothing stops a partition.
func TestJunk(t *testing.T) {
	env := newSpace(t)
	p := startProgram(t, env)
	topic := space(env, "KAFKA_TOPIC")
	kafka, err := kgo.NewClient(kgo.SeedBrokers(strings.Split(os.Getenv("KAFKA_BROKERS"), ",")...), kgo.RecordPartitioner(kgo.ManualPartitioner()), kgo.ProducerBatchMaxBytes(10_000_000))
	if err != nil {
		t.Fatal(err)
	}
	defer kafka.Close()
	junk := map[string]string{ // value to part of the message
		"":                                    "empty",
		"not json":                            "JSON",
		"[1,2]":                               "JSON object",
		`{"event_name":5}`:                    "event_name must be a string",
		`{"event_name":"j"}`:                  "required",
		"\xff\xfe":                            "JSON",
		strings.Repeat("[", 100_000):          "nested",
		`{"x":"` + strings.Repeat("y", 4<<20): "JSON",
		`{"event_name":"j","user_id":"u","timestamp":-5}`: "1970",
	}
	now := time.Now().Unix()
	good := []string{
		fmt.Sprintf(`{"timestamp":%d,"user_id":"a","event_name":"j"}`, now),
		fmt.Sprintf(` { "metadata" : { } , "timestamp" : %d , "user_id" : "b" , "event_name" : "j" , "event_id" : "other" } `, now),
		fmt.Sprintf(`{"event_name":"j","user_id":"old","timestamp":%d}`, now-90*86400),
	}
	var records []*kgo.Record
	for value := range junk {
		records = append(records, &kgo.Record{Topic: topic, Partition: 3, Key: []byte("k"), Value: []byte(value)})
	}
	records = append(records, &kgo.Record{Topic: topic, Partition: 3}) // a tombstone
	for _, value := range good {
		records = append(records, &kgo.Record{Topic: topic, Partition: 3, Value: []byte(value)})
	}
	if err := kafka.ProduceSync(t.Context(), records...).FirstErr(); err != nil {
		t.Fatal(err)
	}
	p.await("understood", 20*time.Second, func() bool {
		_, _, answer := p.do("GET", fmt.Sprintf("%sevent_name=j&from=1&to=%d", metricsPath, now+1), "", "", nil)
		return strings.Contains(answer, `{"total_count":3,"unique_users":3,`)
	})
	letters := readTopic(t, topic+".dlq", len(junk)+1)
	for _, rec := range letters {
		h := map[string]string{}
		for _, kv := range rec.Headers {
			h[kv.Key] = string(kv.Value)
		}
		if h["error_type"] != "unmarshal_error" || h["original_topic"] != topic || h["original_partition"] != "3" || h["retry_count"] != "0" || h["final_retry_count"] != "0" || h["original_offset"] == "" {
			t.Errorf("headers of %.40q: %v", rec.Value, h)
		}
		for _, name := range []string{"failed_at", "last_retry_at", "sent_to_dlq_at"} {
			if _, err := time.Parse(time.RFC3339, h[name]); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
		if want := junk[string(rec.Value)]; !strings.Contains(h["error_message"], want) {
			t.Errorf("%.40q: error_message %q does not say %q", rec.Value, h["error_message"], want)
		}
	}
	p.terminate()
	again := startProgram(t, env) // nothing is read twice after a clean stop
	if n := len(readTopic(t, topic+".dlq", len(junk)+1)); n != len(junk)+1 {
		t.Errorf("%d dead letters after a restart", n)
	}
	again.terminate()
}

// TestRejectedRows: a real constraint refuses some rows. Their neighbours are stored, they are tried again, arrive when
// the constraint is gone, and are dead letters when it stays.
func TestRejectedRows(t *testing.T) {
	env := newSpace(t, "MAX_RETRY_ATTEMPTS=2")
	p := startProgram(t, env)
	db, topic := space(env, "CLICKHOUSE_DATABASE"), space(env, "KAFKA_TOPIC")
	clickhouseQuery(t, "ALTER TABLE "+db+".events ADD CONSTRAINT late CHECK user_id NOT LIKE 'late%'")
	clickhouseQuery(t, "ALTER TABLE "+db+".events ADD CONSTRAINT never CHECK user_id NOT LIKE 'never%'")
	at := time.Now().Unix()
	const each = 200
	var body []byte
	for i := range each {
		for _, user := range []string{"fine", "late", "fine", "never"} {
			if user != "fine" && i%20 != 0 {
				continue
			}
			body = fmt.Appendf(body, `{"event_name":"r","user_id":"%s%d","timestamp":%d}`+"\n", user, i, at-int64(len(body)%1000))
		}
	}
	events := int64(bytes.Count(body, []byte("\n")))
	if status, _, answer := p.do("POST", bulkPath, ndjson, "", body); status != http.StatusAccepted {
		t.Fatal(status, answer)
	}
	const bad = each / 20 // of either kind
	count := func(want int64) func() bool {
		return func() bool {
			_, _, answer := p.do("GET", fmt.Sprintf("%sevent_name=r&from=%d&to=%d", metricsPath, at-2000, at+1), "", "", nil)
			return strings.Contains(answer, fmt.Sprintf(`"total_count":%d,`, want))
		}
	}
	p.await("stored but for the rejected", 20*time.Second, count(events-2*bad))
	clickhouseQuery(t, "ALTER TABLE "+db+".events DROP CONSTRAINT late")
	p.await("stored with those that were late", 30*time.Second, count(events-bad))
	for _, rec := range readTopic(t, topic+".dlq", bad) {
		if !bytes.Contains(rec.Value, []byte(`"never`)) || header(rec, "error_type") != errorExhausted || header(rec, "retry_count") != "2" || header(rec, "final_retry_count") != "2" ||
			header(rec, "original_topic") != topic || !strings.Contains(header(rec, "error_message"), "never") || header(rec, "failed_at") == "" {
			t.Errorf("dead letter %s: %v", rec.Value, rec.Headers)
		}
	}
	// Once the reason is gone the letters are replayed, twice to no harm, and everything is where it should be.
	clickhouseQuery(t, "ALTER TABLE "+db+".events DROP CONSTRAINT never")
	for _, c := range []struct{ args, want string }{
		{"list -type max_retries_exhausted", fmt.Sprint(bad, " dead letters")},
		{"list -filter no-such-text", "0 dead letters"},
		{"replay -dry-run", fmt.Sprint(bad, " letters would be put back")},
		{"replay", fmt.Sprint(bad, " letters put back")},
		{"replay", fmt.Sprint(bad, " letters put back")},
	} {
		if out, code := subcommand(t, env, runDLQ, c.args); code != 0 || !strings.Contains(out, c.want) {
			t.Errorf("dlq %s: %d %s", c.args, code, out)
		}
	}
	p.await("stored with those that were dead", 30*time.Second, count(events))
	drained(p)
	if out, code := subcommand(t, env, runAudit, ""); code != 0 || !strings.Contains(out, fmt.Sprint(2*bad)) {
		t.Errorf("audit: %d\n%s", code, out)
	}
	if hourly := clickhouseQuery(t, "SELECT sum(event_count) FROM "+db+".events_hourly"); hourly != fmt.Sprint(events) {
		t.Errorf("events_hourly has %s, want %d", hourly, events)
	}
}

// subcommand runs one of the program's commands in the space and returns what it printed and its exit code.
func subcommand(t *testing.T, env []string, run func([]string, io.Writer, io.Writer) int, args string) (string, int) {
	t.Helper()
	for _, kv := range env {
		name, value, _ := strings.Cut(kv, "=")
		t.Setenv(name, value)
	}
	var out bytes.Buffer
	code := run(strings.Fields(args), &out, &out)
	return out.String(), code
}

// TestReconcile: an aggregate that lost an hour and counted another twice is mended, once.
func TestReconcile(t *testing.T) {
	env := newSpace(t)
	p := startProgram(t, env)
	db := space(env, "CLICKHOUSE_DATABASE")
	var body []byte
	at := time.Now().Unix()/3600*3600 - 7200
	for i := range 100 {
		body = fmt.Appendf(body, `{"event_name":"purchase","user_id":"u%d","timestamp":%d,"campaign_id":"c%d","metadata":{"price":2.5,"currency":"TRY"}}`+"\n", i, at+int64(i%2)*3600+int64(i), i%3)
	}
	if status, _, answer := p.do("POST", bulkPath, ndjson, "", body); status != http.StatusAccepted {
		t.Fatal(status, answer)
	}
	drained(p)
	const figures = "SELECT sum(event_count), sum(revenue), uniqCombined64Merge(19)(unique_users_state), uniqCombined64Merge(12)(campaigns_state) FROM "
	want := clickhouseQuery(t, figures+db+".events_hourly")
	clickhouseQuery(t, fmt.Sprintf("INSERT INTO %s.events_hourly SELECT * FROM %[1]s.events_hourly WHERE hour = %d SETTINGS insert_deduplicate = 0", db, at))
	clickhouseQuery(t, fmt.Sprintf("ALTER TABLE %s.events_hourly DELETE WHERE hour = %d SETTINGS mutations_sync = 1", db, at+3600))
	p.await("quiet for long enough", 30*time.Second, func() bool {
		out, _ := subcommand(t, env, runReconcile, "-dry-run")
		return strings.Contains(out, "2 rows of events_hourly differ")
	})
	if out, code := subcommand(t, env, runReconcile, ""); code != 0 || !strings.Contains(out, "2 rows") {
		t.Fatalf("%d %s", code, out)
	}
	if out, code := subcommand(t, env, runReconcile, ""); code != 0 || !strings.Contains(out, "0 rows") {
		t.Errorf("a second time: %d %s", code, out)
	}
	if got := clickhouseQuery(t, figures+db+".events_hourly"); got != want {
		t.Errorf("mended to %s, want %s", got, want)
	}
}

func TestDelays(t *testing.T) {
	for attempt, want := range map[int]time.Duration{1: 2 * time.Second, 2: 4 * time.Second, 3: 8 * time.Second, 4: 16 * time.Second, 5: 32 * time.Second, 6: time.Minute, 100: time.Minute} {
		if got := delayOf(attempt); got != want {
			t.Errorf("attempt %d waits %s, want %s", attempt, got, want)
		}
	}
}

// readTopic returns the records of a topic once there are n.
func readTopic(t testing.TB, topic string, n int) (records []*kgo.Record) {
	t.Helper()
	kafka, err := kgo.NewClient(kgo.SeedBrokers(strings.Split(os.Getenv("KAFKA_BROKERS"), ",")...), kgo.ConsumeTopics(topic))
	if err != nil {
		t.Fatal(err)
	}
	defer kafka.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	for len(records) < n {
		fetches := kafka.PollFetches(ctx)
		if ctx.Err() != nil {
			t.Fatalf("%d records on %s, want %d", len(records), topic, n)
		}
		records = append(records, fetches.Records()...)
	}
	return records
}
