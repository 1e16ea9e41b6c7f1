// This program beside what else could do its work: `make bench-peers` prints one table of medians.
//
// Every way stores events in tables of the same schema, in turns, for at least 10 s: a burst would leave the merges to the next one.
// It begins when no merge runs. Events a second are those until the last row can be counted; the CPU of each process for an event is
// that until the merges of these rows have come to rest.

package test

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"text/tabwriter"
	"time"

	"github.com/event-ingestion/event-ingestion/load"
)

// way is a way of storing events. store sends them for sendFor, or moves n that wait, into a database that has the tables, sets the run's
// n to how many there are, and returns when they are on their way; pid is the process that does it, 0 when there is none but the client
// and ClickHouse.
type way struct {
	name    string
	waiting int // events that wait on the topic before the run; of a way that is too quick for them there are more the next time
	store   func(r *run) (pid int)
}

// otherWays are commands that move the JSON records of KAFKA_TOPIC into CLICKHOUSE_DATABASE until they are killed. They
// find their addresses in the environment, as the program does.
var otherWays = map[string][]string{}

const (
	atLeast       = 10 * time.Second
	sendFor       = 12 * time.Second
	waitingEvents = 4_000_000
)

// Two ways get the same bytes: what they are called here is what they are compared by.
const (
	ours, theirs          = "the same lines", "ClickHouse HTTP, async_insert, the same lines"
	ourDrain, drainEngine = "drain", "drain by ClickHouse's Kafka engine"
)

// run is one run of one way.
type run struct {
	b     *testing.B
	env   []string
	db    string
	n     int               // events
	begin func(pid int) int // is called when all is prepared and the work begins
}

func BenchmarkPeers(b *testing.B) {
	ways := []way{
		{"bulk 1000", 0, sendBulks("-bulk", "1000")},
		{"bulk 1000, insert_id", 0, sendBulks("-bulk", "1000", "-insert-ids")},
		{"/v1/batch 1000", 0, sendSegmentBatches},
		{"bulk 100", 0, sendBulks("-bulk", "100")},
		{"bulk 1000, gzip", 0, sendBulks("-bulk", "1000", "-gzip")},
		{"single, 128 connections", 0, sendBulks("-bulk", "1", "-connections", "128")},
		{ours, 0, sendLines},
		{theirs, 0, sendLinesToClickHouse},
		{ourDrain, waitingEvents, drainByProgram},
		{drainEngine, waitingEvents, drainByEngine},
	}
	for name, command := range otherWays {
		ways = append(ways, way{"drain by " + name, waitingEvents, drainBy(command)})
	}
	ways = slices.DeleteFunc(ways, func(w way) bool { return !strings.Contains(w.name, os.Getenv("WAYS")) })
	speed, cpu := make([][]float64, len(ways)), make([][4][]float64, len(ways))
	for b.Loop() {
		for i := range ways {
			rate, costs := ways[i].measure(b)
			speed[i] = append(speed[i], rate)
			for part, c := range costs {
				cpu[i][part] = append(cpu[i][part], c)
			}
		}
	}
	t := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, "\tevents/s\tµs an event\tprogram\tClickHouse\tbrokers\tclient\t")
	for i, p := range ways {
		var parts [4]float64
		for part := range parts {
			parts[part] = median(cpu[i][part])
		}
		fmt.Fprintf(t, "%s\t%.0f\t%.1f\t%.1f\t%.1f\t%.1f\t%.1f\t\n", p.name, median(speed[i]), parts[0]+parts[1]+parts[2]+parts[3], parts[0], parts[1], parts[2], parts[3])
	}
	t.Flush()
	for _, pair := range [][2]string{{ours, theirs}, {ourDrain, drainEngine}} {
		i, j := slices.IndexFunc(ways, func(w way) bool { return w.name == pair[0] }), slices.IndexFunc(ways, func(w way) bool { return w.name == pair[1] })
		if i >= 0 && j >= 0 {
			cost := func(i int) float64 { // of whoever stores: without the client, which is the same
				return median(cpu[i][0]) + median(cpu[i][1]) + median(cpu[i][2])
			}
			fmt.Printf("%s: %.2f times what is stored by %s, at %.2f of its CPU\n", pair[0], median(speed[i])/median(speed[j]), pair[1], cost(i)/cost(j))
		}
	}
}

// measure returns events a second and CPU µs an event of the program, ClickHouse, the brokers and the client, of a run that was long
// enough.
func (p *way) measure(b *testing.B) (rate float64, cpu [4]float64) {
	for {
		took, rate, cpu := p.once(b)
		if took >= atLeast {
			return rate, cpu
		}
		if p.waiting == 0 {
			b.Fatalf("%s took %s: sendFor is too short", p.name, took)
		}
		b.Logf("%s: %d waiting events took %s: once more, with more", p.name, p.waiting, took)
		p.waiting = int(float64(p.waiting) * 1.3 * atLeast.Seconds() / took.Seconds())
	}
}

// mergesRest waits until no merge has run for a second: one that ends is often the cause of the next.
func mergesRest(b *testing.B) {
	for quiet := 0; quiet < 10; time.Sleep(100 * time.Millisecond) {
		if quiet++; clickhouseQuery(b, "SELECT count() FROM system.merges") != "0" {
			quiet = 0
		}
	}
}

func (p *way) once(b *testing.B) (took time.Duration, rate float64, cpu [4]float64) {
	env := newSpace(b, oneClient)
	makeTables(b, env)
	mergesRest(b)
	ch := processWith(b, "--http_port\x00"+os.Getenv("CLICKHOUSE_HTTP_PORT"))
	started, before := time.Time{}, [4]float64{}
	r := &run{b, env, space(env, "CLICKHOUSE_DATABASE"), p.waiting, func(pid int) int {
		before = [4]float64{cpuSeconds(pid), cpuSeconds(ch), cpuSeconds(parentOf(ch)), ownSeconds()}
		started = time.Now()
		return pid
	}}
	pid := p.store(r)
	for r.count() < r.n {
		if time.Since(started) > 20*time.Minute {
			b.Fatalf("%s: %d of %d events are stored", p.name, r.count(), r.n)
		}
		time.Sleep(20 * time.Millisecond)
	}
	took = time.Since(started)
	mergesRest(b)
	after := [4]float64{cpuSeconds(pid), cpuSeconds(ch), cpuSeconds(parentOf(ch)), ownSeconds()}
	for i := range cpu {
		cpu[i] = (after[i] - before[i]) / float64(r.n) * 1e6
	}
	if n := r.count(); n != r.n {
		b.Logf("%s: %d rows for %d events", p.name, n, r.n)
	}
	if pid != 0 {
		syscall.Kill(pid, syscall.SIGTERM)
	}
	clickhouseQuery(b, "DROP DATABASE "+r.db)
	return took, float64(r.n) / took.Seconds(), cpu
}

func (r *run) count() int {
	n, _ := strconv.Atoi(clickhouseQuery(r.b, "SELECT count() FROM "+r.db+".events"))
	return n
}

// sendBulks sends flat out to the program for sendFor, over 16 connections unless told otherwise.
func sendBulks(flags ...string) func(*run) int {
	return func(r *run) int {
		p := startProgram(r.b, r.env)
		pid := r.begin(p.cmd.Process.Pid)
		l, done := loadInto(r.b, p.url, 0, sendFor, append([]string{"-users", "10000000"}, flags...)...)
		done()
		r.n = int(l.OK.Load())
		return pid
	}
}

// flatOut posts bodies of 1000 events, the n-th of which event appends, over 16 connections for sendFor. A body that is refused for a
// while is sent again.
func (r *run) flatOut(url, contentType, head, tail string, event func(body []byte, n int64) []byte) {
	var clients sync.WaitGroup
	var next, stored atomic.Int64
	end := time.Now().Add(sendFor)
	for range 16 {
		clients.Go(func() { // ends after sendFor
			for body := []byte(nil); time.Now().Before(end); {
				body = append(body[:0], head...)
				first := next.Add(1000) - 1000
				for n := first; n < first+1000; n++ {
					body = event(body, n)
				}
				body = append(body[:len(body)-1], tail...)
				for status := http.StatusServiceUnavailable; status == http.StatusServiceUnavailable; {
					resp, err := http.Post(url, contentType, bytes.NewReader(body))
					if err != nil {
						r.b.Error(err)
						return
					}
					answer, _ := io.ReadAll(resp.Body)
					resp.Body.Close()
					if status = resp.StatusCode; status > 299 && status != http.StatusServiceUnavailable {
						r.b.Errorf("%s: %s", resp.Status, answer)
						return
					}
				}
				stored.Add(1000)
			}
		})
	}
	clients.Wait()
	r.n = int(stored.Load())
}

// sendSegmentBatches sends what Segment's clients would.
func sendSegmentBatches(r *run) int {
	p := startProgram(r.b, r.env)
	pid := r.begin(p.cmd.Process.Pid)
	at := time.Now().UTC().Format("2006-01-02T15:04:05.000Z")
	r.flatOut(p.url+"/v1/batch", jsonCT, `{"batch":[`, `],"writeKey":"k"}`, func(body []byte, n int64) []byte {
		return fmt.Appendf(body, `{"type":"track","event":"batch","userId":"user_%d","messageId":"node-next-1795441976-%d","timestamp":"%s","properties":{"product_id":"prod-%d","price":%d.99,"currency":"TRY","referrer":"google"},"context":{"campaign":{"name":"cmp_%d"},"library":{"name":"@segment/analytics-node","version":"3.1.0"}}},`,
			n, n, at, n%1000, 10+n%490, n%50)
	})
	return pid
}

// line makes an event and a line's end: of an hour before at, every one of another user.
func line(at int64) func(body []byte, n int64) []byte {
	return func(body []byte, n int64) []byte {
		body = append(body, `{"event_name":"product_view","channel":"web","campaign_id":"cmp_`...)
		body = strconv.AppendInt(body, n%50, 10)
		body = append(body, `","user_id":"user_`...)
		body = strconv.AppendInt(body, n, 10)
		body = append(body, `","timestamp":`...)
		body = strconv.AppendInt(body, at-n*7%3600, 10)
		body = append(body, `,"tags":["electronics","homepage"],"metadata":{"product_id":"prod-`...)
		body = strconv.AppendInt(body, n%1000, 10)
		body = append(body, `","price":`...)
		body = strconv.AppendInt(body, 10+n%490, 10)
		return append(body, `.99,"currency":"TRY","referrer":"google"}}`+"\n"...)
	}
}

// sendLines sends bulks of lines to the program.
func sendLines(r *run) int {
	p := startProgram(r.b, r.env)
	pid := r.begin(p.cmd.Process.Pid)
	r.flatOut(p.url+bulkPath, ndjson, "", "\n", line(time.Now().Unix()))
	return pid
}

// sendLinesToClickHouse is what a client gets without this system: the same bytes to ClickHouse's own HTTP interface, which collects the
// inserts of all connections by itself and answers when they are stored. The id, which the program makes, is a default there.
func sendLinesToClickHouse(r *run) int {
	clickhouseQuery(r.b, "ALTER TABLE "+r.db+".events MODIFY COLUMN event_id DEFAULT SHA256(concat(event_name, '|', user_id, '|', toString(toUnixTimestamp(timestamp)), '|', channel))")
	r.begin(0)
	query := "INSERT INTO " + r.db + ".events (event_name, channel, campaign_id, user_id, timestamp, tags, metadata) FORMAT JSONEachRow"
	r.flatOut("http://127.0.0.1:"+os.Getenv("CLICKHOUSE_HTTP_PORT")+"/?async_insert=1&wait_for_async_insert=1&input_format_json_read_objects_as_strings=1&query="+strings.ReplaceAll(query, " ", "+"),
		ndjson, "", "\n", line(time.Now().Unix()))
	return 0
}

// jsonRows is so many events as bodies for postRows, each of rowsPerInsert.
func jsonRows(gen *load.Generator, events, rowsPerInsert int) (bodies [][]byte) {
	for first := 0; first < events; first += rowsPerInsert {
		var body []byte
		for i := range rowsPerInsert {
			n := int64(first + i)
			body = fmt.Appendf(body, `{"event_id":"%032d",`, n)
			start := len(body)
			body = append(gen.Event(body, n), '\n')
			body = append(body[:start], body[start+1:]...) // one brace is enough
		}
		bodies = append(bodies, body)
	}
	return bodies
}

// postRows inserts each body over ClickHouse's own HTTP interface, so many at once, and returns when all are answered.
func postRows(b testing.TB, database, settings string, connections int, bodies [][]byte) {
	b.Helper()
	query := "INSERT INTO " + database + ".events (event_id, event_name, channel, campaign_id, user_id, timestamp, tags, metadata) FORMAT JSONEachRow"
	url := "http://127.0.0.1:" + os.Getenv("CLICKHOUSE_HTTP_PORT") + "/?" + settings + "&input_format_json_read_objects_as_strings=1&query=" + strings.ReplaceAll(query, " ", "+")
	var inserts sync.WaitGroup
	slots := make(chan struct{}, connections)
	for _, body := range bodies {
		slots <- struct{}{}
		inserts.Go(func() { // ends with its insert
			defer func() { <-slots }()
			resp, err := http.Post(url, "application/json", bytes.NewReader(body))
			if err != nil {
				b.Error(err)
				return
			}
			defer resp.Body.Close()
			if answer, _ := io.ReadAll(resp.Body); resp.StatusCode != http.StatusOK {
				b.Errorf("%s", answer)
			}
		})
	}
	inserts.Wait()
}

// fillTopic puts the run's events on its topic: an instance that only takes them does.
func (r *run) fillTopic() {
	p := startProgram(r.b, append(r.env, "ROLE=api"))
	l, done := loadInto(r.b, p.url, 0, time.Hour, "-users", "10000000", "-bulk", "1000")
	p.await("taken", 5*time.Minute, func() bool { return l.OK.Load() >= int64(r.n) })
	l.Stop()
	done()
	r.n = int(l.OK.Load())
	p.terminate()
}

func drainByProgram(r *run) int {
	r.fillTopic()
	r.begin(0) // its start counts, too
	p := newProgram(r.b, r.env)
	p.start()
	return p.cmd.Process.Pid
}

// drainByEngine is ClickHouse's own consumer, with as many of them as two cores take and blocks as large as it likes.
func drainByEngine(r *run) int {
	r.fillTopic()
	columns := "event_name String, channel String, campaign_id String, user_id String, timestamp UInt32, tags Array(String), metadata String"
	clickhouseQuery(r.b, fmt.Sprintf("CREATE TABLE %s.queue (%s) ENGINE = Kafka('%s', '%s', '%s_engine', 'JSONEachRow') SETTINGS kafka_num_consumers = 2, kafka_thread_per_consumer = 1, kafka_max_block_size = 100000, kafka_poll_max_batch_size = 100000, input_format_json_read_objects_as_strings = 1",
		r.db, columns, os.Getenv("KAFKA_BROKERS"), space(r.env, "KAFKA_TOPIC"), r.db))
	r.begin(0)
	clickhouseQuery(r.b, fmt.Sprintf("CREATE MATERIALIZED VIEW %[1]s.queue_mv TO %[1]s.events AS SELECT SHA256(concat(event_name, '|', user_id, '|', toString(timestamp), '|', channel)) AS event_id, event_name, channel, campaign_id, user_id, timestamp, tags, metadata FROM %[1]s.queue", r.db))
	return 0
}

func drainBy(command []string) func(*run) int {
	return func(r *run) int {
		r.fillTopic()
		r.begin(0)
		cmd := exec.Command(command[0], command[1:]...)
		cmd.Env = append(os.Environ(), r.env...)
		if err := cmd.Start(); err != nil {
			r.b.Fatal(err)
		}
		r.b.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
		return cmd.Process.Pid
	}
}

// processWith returns the process whose command line, arguments separated by NUL, contains what.
func processWith(b *testing.B, what string) int {
	paths, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, path := range paths {
		if line, _ := os.ReadFile(path); strings.Contains(string(line), what) {
			pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(path)))
			return pid
		}
	}
	b.Fatalf("no process with %q: needs /proc and the embedded stack", what)
	return 0
}

func parentOf(pid int) int {
	fields := statOf(pid)
	if len(fields) < 2 {
		return 0
	}
	parent, _ := strconv.Atoi(fields[1])
	return parent
}

// statOf is /proc/PID/stat from the state on.
func statOf(pid int) []string {
	stat, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	_, rest, _ := strings.Cut(string(stat), ") ")
	return strings.Fields(rest)
}

// cpuSeconds is what a process has used, 0 when there is none. The kernel counts in hundredths.
func cpuSeconds(pid int) float64 {
	fields := statOf(pid)
	if pid == 0 || len(fields) < 13 {
		return 0
	}
	user, _ := strconv.ParseFloat(fields[11], 64)
	system, _ := strconv.ParseFloat(fields[12], 64)
	return (user + system) / 100
}

func ownSeconds() float64 {
	var u syscall.Rusage
	syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano()).Seconds()
}

func median(v []float64) float64 {
	slices.Sort(v)
	return v[len(v)/2]
}
