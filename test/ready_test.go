// Starting, being ready and stopping: what can never work ends the program, what may heal is said in words, and whatever
// hangs, a stop comes to its end.

package test

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/event-ingestion/event-ingestion/internal/testkit"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kfake"
	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/kmsg"
)

const (
	queryConns = 8           // connections to ClickHouse for metrics
	readyAge   = time.Second // how old an answer of /ready may be
)

func TestWhatCanNeverWork(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name, says string
		env        []string
		brokers    []kfake.Opt
		control    func(*kfake.Cluster)
	}{
		{name: "session", says: "INVALID_SESSION_TIMEOUT", env: []string{"KAFKA_SESSION_TIMEOUT=1s"}}, // kfake takes 6 s and more
		{name: "retry session", says: "read the retry topic: ", env: []string{"KAFKA_SESSION_TIMEOUT=6s"}, control: func(k *kfake.Cluster) {
			k.ControlKey(int16(kmsg.JoinGroup), func(req kmsg.Request) (kmsg.Response, error, bool) {
				k.KeepControl()
				if !strings.HasSuffix(req.(*kmsg.JoinGroupRequest).Group, ".retry") {
					return nil, nil, false
				}
				resp := req.ResponseKind().(*kmsg.JoinGroupResponse)
				resp.ErrorCode = kerr.GroupAuthorizationFailed.Code
				return resp, nil, true
			})
		}},
		{name: "login", says: "SASL_AUTHENTICATION_FAILED", env: []string{"KAFKA_SASL_MECHANISM=PLAIN", "KAFKA_SASL_USERNAME=u", "KAFKA_SASL_PASSWORD=p"},
			brokers: []kfake.Opt{kfake.EnableSASL(), kfake.Superuser("PLAIN", "u", "other")}, control: func(k *kfake.Cluster) {
				k.ControlKey(int16(kmsg.SASLAuthenticate), func(req kmsg.Request) (kmsg.Response, error, bool) {
					k.KeepControl()
					resp := req.ResponseKind().(*kmsg.SASLAuthenticateResponse)
					resp.ErrorCode = kerr.SaslAuthenticationFailed.Code
					return resp, nil, true
				})
			}},
		{name: "topics", says: "TOPIC_AUTHORIZATION_FAILED", control: func(k *kfake.Cluster) {
			k.ControlKey(int16(kmsg.CreateTopics), func(req kmsg.Request) (kmsg.Response, error, bool) {
				k.KeepControl()
				resp := req.ResponseKind().(*kmsg.CreateTopicsResponse)
				for _, topic := range req.(*kmsg.CreateTopicsRequest).Topics {
					refused := kmsg.NewCreateTopicsResponseTopic()
					refused.Topic, refused.ErrorCode = topic.Topic, kerr.TopicAuthorizationFailed.Code
					resp.Topics = append(resp.Topics, refused)
				}
				return resp, nil, true
			})
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			brokers, err := kfake.NewCluster(append([]kfake.Opt{kfake.NumBrokers(2)}, c.brokers...)...)
			if err != nil {
				t.Fatal(err)
			}
			defer brokers.Close()
			if c.control != nil {
				c.control(brokers)
			}
			env := append(newSpace(t), c.env...)
			p := newProgram(t, append(env, "KAFKA_BROKERS="+strings.Join(brokers.ListenAddrs(), ",")))
			p.start()
			if code := p.ended(c.says); code != 1 || !strings.Contains(p.log.String(), c.says) {
				t.Errorf("exit code %d, and the log does not say %s:\n%s", code, c.says, p.log)
			}
		})
	}
}

// TestWrongLogin is the same for ClickHouse, whose embedded kind ends over a login that it refuses.
func TestWrongLogin(t *testing.T) {
	if isCluster() {
		t.Skip("the tests after this one need that ClickHouse")
	}
	alone(t)
	p := newProgram(t, append(newSpace(t), "CLICKHOUSE_USERNAME=nobody"))
	p.start()
	const says = "AUTHENTICATION_FAILED"
	if code := p.ended(says); code != 1 || !strings.Contains(p.log.String(), says) {
		t.Errorf("exit code %d, and the log does not say %s:\n%s", code, says, p.log)
	}
	control(t, "/clickhouse/start")
}

// TestFixedProfile: a profile that has settings otherwise than the program means them, and forbids to change them, is told by all of
// their names, and only by theirs.
func TestFixedProfile(t *testing.T) {
	t.Parallel()
	for _, role := range []string{"all", "api"} {
		p := newProgram(t, append(newSpace(t), "CLICKHOUSE_USERNAME=fixed", "ROLE="+role))
		p.start()
		const says = "does not let the program change settings: group_by_use_nulls is 1, and has to be 0; insert_deduplicate is 1, and has to be 0; take away"
		if code := p.ended(says); code != 1 || !strings.Contains(p.log.String(), says) {
			t.Errorf("exit code %d, and the log does not say %s:\n%s", code, says, p.log)
		}
	}
}

// TestCausesAreTold: a broker that hangs up on a wrong password, and a ClickHouse that is not there, are named in /ready and,
// each once, in the log; when they heal the program goes on.
func TestCausesAreTold(t *testing.T) {
	t.Parallel()
	env := newSpace(t, "CLICKHOUSE_PORT=1", "SERVER_PORT="+freePort(t))
	p := newProgram(t, env)
	p.start()
	says := func(part string) func() bool {
		return func() bool {
			resp, err := http.Get(p.url + "/ready")
			if err != nil {
				return false
			}
			defer resp.Body.Close()
			var b bytes.Buffer
			b.ReadFrom(resp.Body)
			return resp.StatusCode == http.StatusServiceUnavailable && strings.Contains(b.String(), part)
		}
	}
	p.await("said", 20*time.Second, says(`"consumers":"not started yet: prepare the tables: connect to ClickHouse at 127.0.0.1:1: `))
	p.await("said", 20*time.Second, says(`"clickhouse":"connect to ClickHouse at 127.0.0.1:1: `))
	p.terminate()
	if n := strings.Count(p.log.String(), "prepare the tables"); n != 1 {
		t.Errorf("told %d times:\n%s", n, p.log)
	}

	brokers, err := kfake.NewCluster(kfake.EnableSASL(), kfake.Superuser("SCRAM-SHA-256", "u", "right"))
	if err != nil {
		t.Fatal(err)
	}
	defer brokers.Close()
	p.env = append(env, "KAFKA_BROKERS="+strings.Join(brokers.ListenAddrs(), ","), "KAFKA_SASL_MECHANISM=SCRAM-SHA-256", "KAFKA_SASL_USERNAME=u", "KAFKA_SASL_PASSWORD=wrong")
	p.start()
	p.await("said", 20*time.Second, says(`"kafka":"no broker keeps the connection`))
	p.await("said", 20*time.Second, says(`"consumers":"not started yet: prepare the topics: no broker keeps the connection`))
	p.terminate()
	if n := strings.Count(p.log.String(), "KAFKA_SASL_MECHANISM"); n != 1 {
		t.Errorf("told %d times:\n%s", n, p.log)
	}
}

// TestReadyBesideSlowQueries: every connection of the metrics pool hangs, and more; /ready has its own.
func TestReadyBesideSlowQueries(t *testing.T) {
	t.Parallel()
	slow := newProxy(t, clickhouseAddress(t), nil)
	p := startProgram(t, newSpace(t, "CLICKHOUSE_PORT="+slow.port()))
	slow.deaf.Store(true) // the connections of /ready and of the inserter are from before
	var hanging sync.WaitGroup
	for range 2 * queryConns {
		hanging.Go(func() { // ends with queryTimeout
			if status := p.status(metricsPath + "event_name=x&from=1&to=2"); status != http.StatusServiceUnavailable {
				t.Errorf("a query that hangs: %d", status)
			}
		})
	}
	answered := make(chan struct{})
	go func() { hanging.Wait(); close(answered) }() // ends with them
	for running := true; running; {
		select {
		case <-answered:
			running = false
		case <-time.After(100 * time.Millisecond):
			if status, _, answer := p.do("GET", "/ready", "", "", nil); status != http.StatusOK {
				t.Fatalf("beside slow queries: %d %s", status, answer)
			}
		}
	}
}

// TestMetricsAfterRestart: a restart of ClickHouse closes every connection of the metrics pool. Whoever asks next is answered.
func TestMetricsAfterRestart(t *testing.T) {
	t.Parallel()
	between := newProxy(t, clickhouseAddress(t), nil)
	p := startProgram(t, newSpace(t, "CLICKHOUSE_PORT="+between.port(), "ROLE=api"))
	const question = metricsPath + "event_name=x&from=1&to=2"
	p.await("tables", 20*time.Second, func() bool { return p.status(question) == http.StatusOK })
	var asking sync.WaitGroup
	for range 8 * queryConns {
		asking.Go(func() { p.status(question) })
	}
	asking.Wait()
	between.cutAnswers()
	if status, _, answer := p.do("GET", question, "", "", nil); status != http.StatusOK {
		t.Errorf("%d %s", status, answer)
	}
}

// TestReadyWithOneBroker: a broker that hangs does not make Kafka as a whole unready.
func TestReadyWithOneBroker(t *testing.T) {
	t.Parallel()
	brokers, silence := silentBrokers(t)
	p := startProgram(t, newSpace(t, "KAFKA_BROKERS="+brokers, "ROLE=api"))
	silence(1)
	for range 3 {
		if status, _, answer := p.do("GET", "/ready", "", "", nil); status != http.StatusOK {
			t.Errorf("%d %s", status, answer)
		}
		time.Sleep(readyAge) // until the answer is too old
	}
	silence(2)
	p.await("unready", 20*time.Second, func() bool {
		_, _, answer := p.do("GET", "/ready", "", "", nil)
		return strings.Contains(answer, `"kafka":"no broker has answered in 3s"`)
	})
}

// TestReadyIsShared: however many ask, Kafka and ClickHouse are asked once a second.
func TestReadyIsShared(t *testing.T) {
	t.Parallel()
	slow := newProxy(t, clickhouseAddress(t), nil)
	p := startProgram(t, newSpace(t, "CLICKHOUSE_PORT="+slow.port()))
	slow.silent.Store(true)
	var asking sync.WaitGroup
	p.await("noticed", 20*time.Second, func() bool { return p.status("/ready") == http.StatusServiceUnavailable })
	for range 50 { // one after the other they would need 450 s
		asking.Go(func() {
			for range 3 {
				_, _, answer := p.do("GET", "/ready", "", "", nil)
				if !strings.Contains(answer, `"kafka":"ok"`) || !strings.Contains(answer, "ClickHouse at 127.0.0.1:") {
					t.Error(answer)
				}
				time.Sleep(readyAge) // until the answer is too old
			}
		})
	}
	done := make(chan struct{})
	go func() { asking.Wait(); close(done) }() // ends with them
	select {
	case <-done:
	case <-time.After(90 * time.Second):
		t.Fatal("each /ready asks for itself")
	}
}

// TestStopWhateverHangs: with rows and dead letters on their way and one thing that hangs for a minute or for ever.
func TestStopWhateverHangs(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name string
		hang func(t *testing.T, p *program, clickhouse *proxy, silence func(int))
	}{
		{"nothing", func(*testing.T, *program, *proxy, func(int)) {}},
		{"clickhouse silent", func(_ *testing.T, p *program, clickhouse *proxy, _ func(int)) {
			clickhouse.silent.Store(true)
			go p.status(metricsPath + "event_name=x&from=1&to=2") // ends with the program
			httpPost(p.url+onePath, string(testkit.FreshEvent("after")))
		}},
		{"brokers silent", func(_ *testing.T, _ *program, _ *proxy, silence func(int)) { silence(2) }},
		{"both silent", func(_ *testing.T, _ *program, clickhouse *proxy, silence func(int)) {
			clickhouse.silent.Store(true)
			silence(2)
		}},
		{"client stuck", func(t *testing.T, p *program, _ *proxy, _ func(int)) {
			conn, err := net.Dial("tcp", strings.TrimPrefix(p.url, "http://"))
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { conn.Close() })
			fmt.Fprintf(conn, "POST %s HTTP/1.1\r\nHost: x\r\nContent-Type: %s\r\nContent-Length: 100\r\n\r\n{", onePath, jsonCT)
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			clickhouse := newProxy(t, clickhouseAddress(t), nil)
			brokers, silence := silentBrokers(t)
			env := newSpace(t, "CLICKHOUSE_PORT="+clickhouse.port(), "KAFKA_BROKERS="+brokers, "SHUTDOWN_TIMEOUT=2s")
			p := startProgram(t, env)
			kafka, err := kgo.NewClient(kgo.SeedBrokers(strings.Split(brokers, ",")...))
			if err != nil {
				t.Fatal(err)
			}
			defer kafka.Close()
			l, _ := loadInto(t, p.url, 2000, time.Hour, "-retries", "0")
			p.await("under load", 20*time.Second, func() bool { return l.OK.Load() > 500 })
			var junk []*kgo.Record
			for range 2000 { // one dead letter after the other
				junk = append(junk, &kgo.Record{Topic: space(env, "KAFKA_TOPIC"), Value: []byte("junk")})
			}
			if err := kafka.ProduceSync(t.Context(), junk...).FirstErr(); err != nil {
				t.Fatal(err)
			}
			c.hang(t, p, clickhouse, silence)
			p.cmd.Process.Signal(syscall.SIGTERM)
			if code := p.ended(c.name); code != 0 {
				t.Errorf("exit code %d", code)
			}
		})
	}
}

// TestStopWithKafkaAway: the brokers are gone before the signal comes.
func TestStopWithKafkaAway(t *testing.T) {
	alone(t)
	p := startProgram(t, newSpace(t, "SHUTDOWN_TIMEOUT=2s"))
	control(t, "/kafka/stop")
	defer control(t, "/kafka/start")
	p.cmd.Process.Signal(syscall.SIGTERM)
	if code := p.ended("Kafka away"); code != 0 {
		t.Errorf("exit code %d", code)
	}
}

// TestStandingStill: nothing can be stored, records wait, and /ready stays 200 and says since when, why and how many; the log
// says the cause once; when it is over everything is as before.
func TestStandingStill(t *testing.T) {
	t.Parallel()
	port := freePort(t)
	env := newSpace(t, "ADMIN_ADDR=127.0.0.1:"+port)
	p := startProgram(t, env)
	db := space(env, "CLICKHOUSE_DATABASE")
	clickhouseQuery(t, "RENAME TABLE "+db+".events TO "+db+".elsewhere")
	for range 12 {
		var body []byte
		for range 100 {
			body = append(append(body, testkit.FreshEvent("s")...), '\n')
		}
		if status, _, answer := p.do("POST", bulkPath, ndjson, "", body); status != http.StatusAccepted {
			t.Fatal(status, answer)
		}
	}
	stalled := regexp.MustCompile(`"consumers":"stalled \d+ s: [a-z ]+: .*UNKNOWN_TABLE.*, 1,200 waiting"`)
	p.await("said", 30*time.Second, func() bool {
		status, _, answer := p.do("GET", "/ready", "", "", nil)
		return status == http.StatusOK && stalled.MatchString(answer)
	})
	page := func() string {
		resp, err := http.Get("http://127.0.0.1:" + port + "/metrics")
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		b, _ := io.ReadAll(resp.Body)
		return string(b)
	}
	if regexp.MustCompile(`(?m)^event_ingestion_stored_behind_seconds 0$`).MatchString(page()) {
		t.Error("the gauge says that storing goes on")
	}
	if n := strings.Count(p.log.String(), "UNKNOWN_TABLE"); n > 2 {
		t.Errorf("told %d times:\n%s", n, p.log)
	}
	clickhouseQuery(t, "RENAME TABLE "+db+".elsewhere TO "+db+".events")
	p.await("over", 30*time.Second, func() bool {
		_, _, answer := p.do("GET", "/ready", "", "", nil)
		return strings.Contains(answer, `"consumers":"ok"`)
	})
	drained(p)
	p.await("over", 30*time.Second, func() bool { return strings.Contains(page(), "\nevent_ingestion_stored_behind_seconds 0\n") })
	if n := clickhouseQuery(t, "SELECT count() FROM "+db+".events"); n != "1200" {
		t.Errorf("%s rows", n)
	}
}

// ended waits for the end of a program that was told to stop, or has stopped by itself, and returns its exit code.
func (p *program) ended(why string) int {
	p.t.Helper()
	done := make(chan struct{})
	go func() { // ends with the program, which ends with the test
		p.cmd.Wait()
		close(done)
	}()
	select {
	case <-done:
	case <-time.After(30 * time.Second): // several times what a stop may take, and half of what hangs would
		p.t.Fatalf("%s: does not end; log:\n%s", why, p.log)
	}
	return p.cmd.ProcessState.ExitCode()
}
