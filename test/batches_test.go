// Kafka as others set it up: topics that take little, batches that take much, records of a newer version, and logins by token and
// certificate.

package test

import (
	"bytes"
	crand "crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/event-ingestion/event-ingestion/internal/testkit"

	"github.com/twmb/franz-go/pkg/kadm"
	"github.com/twmb/franz-go/pkg/kfake"
	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// setLimit sets max.message.bytes of topics.
func setLimit(t *testing.T, brokers []string, limit string, topics ...string) {
	t.Helper()
	kafka, err := kgo.NewClient(kgo.SeedBrokers(brokers...))
	if err != nil {
		t.Fatal(err)
	}
	defer kafka.Close()
	if _, err := kadm.NewClient(kafka).AlterTopicConfigs(t.Context(), []kadm.AlterConfig{{Name: "max.message.bytes", Value: &limit}}, topics...); err != nil {
		t.Fatal(err)
	}
}

// noisyEvent is an event of about so many bytes, that no codec makes shorter than half of it.
func noisyEvent(name string, size int) []byte {
	noise := make([]byte, size/2)
	crand.Read(noise)
	return fmt.Appendf(nil, `{"event_name":%q,"user_id":"%x","timestamp":%d,"metadata":{"noise":"%x"}}`, name, noise[:8], time.Now().Unix(), noise)
}

// bulkOf is a bulk of events.
func bulkOf(events ...[]byte) []byte {
	return fmt.Appendf(nil, `{"events":[%s]}`, bytes.Join(events, []byte(",")))
}

// TestSmallTopic: a topic that takes little gets all that it can take, and what it can never take is refused for good, by name. The
// limit may change while the program runs.
func TestSmallTopic(t *testing.T) {
	t.Parallel()
	for name, seen := range map[string]bool{"seen": true, "not seen": false} { // by a user who may describe topics, and by one who may not
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			smallTopic(t, seen)
		})
	}
}

func smallTopic(t *testing.T, seen bool) {
	brokers, err := kfake.NewCluster(kfake.NumBrokers(2), kfake.GroupMinSessionTimeout(time.Second))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(brokers.Close)
	if !seen {
		brokers.ControlKey(int16(kmsg.DescribeConfigs), func(req kmsg.Request) (kmsg.Response, error, bool) {
			brokers.KeepControl()
			resp := req.ResponseKind().(*kmsg.DescribeConfigsResponse)
			for _, asked := range req.(*kmsg.DescribeConfigsRequest).Resources {
				refused := kmsg.NewDescribeConfigsResponseResource()
				refused.ResourceType, refused.ResourceName, refused.ErrorCode = asked.ResourceType, asked.ResourceName, 29 // TOPIC_AUTHORIZATION_FAILED
				resp.Resources = append(resp.Resources, refused)
			}
			return resp, nil, true
		})
	}
	env := newSpace(t, "KAFKA_BROKERS="+strings.Join(brokers.ListenAddrs(), ","), "KAFKA_PARTITIONS=1")
	topic := space(env, "KAFKA_TOPIC")
	startProgram(t, env).terminate()
	setLimit(t, brokers.ListenAddrs(), "8000", topic)
	p := startProgram(t, env)
	if seen {
		p.await("said", 20*time.Second, func() bool {
			return strings.Contains(p.log.String(), "takes less than the 64 KiB") && strings.Contains(p.log.String(), "max.message.bytes=8000")
		})
	}

	var many [][]byte
	for i := range 300 { // 300 KB for one partition
		many = append(many, noisyEvent(fmt.Sprint("many", i), 700))
	}
	repeated := func(want int, path string, body []byte) (answer string) { // as a client does at 503; only who may not see the limit needs it
		t.Helper()
		status := 0
		p.await(fmt.Sprint(path, " answered ", want), 30*time.Second, func() bool {
			status, _, answer = p.do("POST", path, jsonCT, "", body)
			return status != 503 || seen
		})
		if status != want {
			t.Errorf("%s: %d %.300s, want %d", path, status, answer, want)
		}
		return answer
	}
	repeated(202, bulkPath, bulkOf(many...))
	large := noisyEvent("large", 15_000)
	for _, c := range []struct {
		path string
		body []byte
		want int
		says []string
	}{
		{onePath, large, 413, []string{`"error":"event too large"`, "max.message.bytes"}},
		{bulkPath, bulkOf(noisyEvent("a", 100), large, noisyEvent("b", 100)), 207, []string{`"success_count":2,"failed_count":1,"errors":[{"index":1,`, "max.message.bytes", "validation.max-length.error"}},
		{bulkPath, bulkOf(large), 400, []string{`"failed_count":1`}},
		{"/v1/track", fmt.Appendf(nil, `{"type":"track","event":"s","userId":"u","properties":{"noise":%q}}`, bytes.Repeat([]byte("z"), 15_000)), 200, []string{`"index":0`, "max.message.bytes", "validation.max-length.error"}},
		{onePath, noisyEvent("fits", 6000), 202, nil},
	} {
		if c.path == onePath && c.want == 202 && !seen {
			continue // it has been halved to less
		}
		answer := repeated(c.want, c.path, c.body)
		for _, text := range c.says {
			if !strings.Contains(answer, text) {
				t.Errorf("%s: %q is not in %.500s", c.path, text, answer)
			}
		}
	}
	if status := p.status("/ready"); status != 200 {
		t.Errorf("ready: %d", status)
	}
	if seen { // it changes, both ways
		setLimit(t, brokers.ListenAddrs(), "100000", topic)
		p.await("taken", 30*time.Second, func() bool { status, _, _ := p.do("POST", onePath, jsonCT, "", large); return status == 202 })
		setLimit(t, brokers.ListenAddrs(), "8000", topic)
		p.await("refused again", 30*time.Second, func() bool { status, _, _ := p.do("POST", onePath, jsonCT, "", large); return status == 413 })
	}
	repeated(202, bulkPath, bulkOf(many...))
	if status, _, answer := p.do("POST", bulkPath+"?wait=stored", jsonCT, "", bulkOf(many...)); status != 200 {
		t.Errorf("stored: %d %.300s", status, answer)
	}
	mustCount(t, env, "many7", 1)
}

// strangeBatch is a compressor that has something else to say than what it was given.
type strangeBatch []byte

func (b strangeBatch) Compress(*bytes.Buffer, []byte, ...kgo.CompressFlag) ([]byte, kgo.CompressionCodecType) {
	return b, kgo.CodecGzip
}

// gzipOfZeros is one record whose value is so many megabytes of zeros. A gzip text may have many members.
func gzipOfZeros(megabytes int) []byte {
	rest := binary.AppendVarint([]byte{0, 0, 0, 1}, int64(megabytes)<<20) // attributes, time, offset, no key
	all := testkit.Gzipped(append(binary.AppendVarint(nil, int64(len(rest)+megabytes<<20+1)), rest...))
	all = append(all, bytes.Repeat(testkit.Gzipped(make([]byte, 1<<20)), megabytes)...)
	return append(all, testkit.Gzipped([]byte{0})...) // no headers
}

// TestBatchBombs: a batch of another producer that is 700 MB when it is decompressed, and one that cannot be decompressed, cost the
// program no more than CONSUME_MEMORY, and are passed over with a dead letter that says where they are. What is beside and behind them
// is stored, also behind a restart, and commands read past them.
func TestBatchBombs(t *testing.T) {
	t.Parallel()
	env := newSpace(t, "KAFKA_PARTITIONS=1", "CONSUME_MEMORY=67108864", "DEDUPE_MEMORY=16777216")
	topic := space(env, "KAFKA_TOPIC")
	p := startBinary(t, lean(t), env)
	produce := func(to string, batch []byte) {
		t.Helper()
		opts := []kgo.Opt{kgo.SeedBrokers(kafkaBrokers(t)...), kgo.RecordPartitioner(kgo.ManualPartitioner())}
		if batch != nil {
			opts = append(opts, kgo.WithCompressor(strangeBatch(batch)))
		}
		kafka, err := kgo.NewClient(opts...)
		if err != nil {
			t.Fatal(err)
		}
		defer kafka.Close()
		if err := kafka.ProduceSync(t.Context(), &kgo.Record{Topic: to, Value: make([]byte, 900<<10)}).FirstErr(); err != nil {
			t.Fatal(err)
		}
	}
	send := func(name string, want int) {
		t.Helper()
		if status, _, answer := p.do("POST", onePath+"?wait=stored", jsonCT, "", testkit.FreshEvent(name)); status != want {
			t.Errorf("%s: %d %s", name, status, answer)
		}
	}
	before := peakMemory(t, p)
	send("first", 200)
	bomb := gzipOfZeros(700)
	produce(topic, bomb)
	produce(topic, []byte("no gzip at all"))
	p.do("POST", onePath, jsonCT, "", testkit.FreshEvent("behind"))
	produce(topic, bomb)
	produce(topic+".retry", bomb)
	letters := testkit.ReadTopic(t, kafkaBrokers(t), topic+".dlq", 4)
	found := map[string]bool{}
	for _, letter := range letters {
		at := header(letter, "original_topic") + "/" + header(letter, "original_partition") + ":" + header(letter, "original_offset")
		why := header(letter, "error_message")
		if found[at] || header(letter, "error_type") != "unmarshal_error" || !strings.Contains(why, "CONSUME_MEMORY") || !strings.Contains(why, "partition 0") {
			t.Errorf("%s: %s", at, why)
		}
		found[at] = true
	}
	for _, at := range []string{topic + "/0:1", topic + "/0:2", topic + "/0:4", topic + ".retry/0:0"} {
		if !found[at] {
			t.Errorf("no letter about %s: %v", at, found)
		}
	}
	p.await("behind them", 20*time.Second, func() bool {
		return clickhouseQuery(t, "SELECT count() FROM "+space(env, "CLICKHOUSE_DATABASE")+".events WHERE event_name = 'behind'") == "1"
	})
	send("last", 200)
	took := peakMemory(t, p) - before
	t.Logf("%d MB at most, %d MB before", (before+took)>>20, before>>20)
	if took > 128<<20 {
		t.Errorf("%d MB for batches of 700 MB", took>>20)
	}

	p.terminate() // what was passed over is committed: no second letter
	p = startBinary(t, lean(t), p.env)
	send("again", 200)
	if out, code := subcommand(t, env, "dlq list"); code != 0 || !strings.Contains(out, "4 dead letters") {
		t.Errorf("%d:\n%s", code, out)
	}
	if out, code := subcommand(t, env, "audit"); code != 0 || !strings.Contains(out, "records that are no event  3") {
		t.Errorf("%d:\n%s", code, out)
	}
}

// TestUnknownMember: an event with a field of a newer version is stored, and whoever operates the older one can see what it lacks.
func TestUnknownMember(t *testing.T) {
	t.Parallel()
	admin := freePort(t)
	env := newSpace(t, "ADMIN_ADDR=127.0.0.1:"+admin)
	p := startProgram(t, env)
	kafka, err := kgo.NewClient(kgo.SeedBrokers(kafkaBrokers(t)...), kgo.RecordPartitioner(kgo.StickyKeyPartitioner(nil)))
	if err != nil {
		t.Fatal(err)
	}
	defer kafka.Close()
	at := time.Now().Unix()
	for i := range 30 {
		strange := `"device":{"os":1},"session\n":"s"`
		if i == 29 {
			strange = `"third":[]`
		}
		id := sha256.Sum256(fmt.Appendf(nil, "newer|u%d|%d|", i, at))
		rec := &kgo.Record{Topic: space(env, "KAFKA_TOPIC"), Key: hex.AppendEncode(nil, id[:])}
		rec.Value = fmt.Appendf(nil, `{"event_name":"newer","user_id":"u%d","timestamp":%d,%s}`, i, at, strange)
		if err := kafka.ProduceSync(t.Context(), rec).FirstErr(); err != nil {
			t.Fatal(err)
		}
	}
	p.await("stored", 20*time.Second, func() bool {
		return clickhouseQuery(t, "SELECT count() FROM "+space(env, "CLICKHOUSE_DATABASE")+".events WHERE event_name = 'newer'") == "30"
	})
	if n := metric(t, admin, "event_ingestion_unknown_members_total"); n != 59 {
		t.Errorf("%g unknown members are counted", n)
	}
	if n := strings.Count(p.log.String(), "does not know"); n != 3 || !strings.Contains(p.log.String(), "member=third") || !strings.Contains(p.log.String(), "member=device") {
		t.Errorf("%d lines in the log", n)
	}
}

// TestLoginByToken: brokers that demand OAUTHBEARER and a certificate get both, also when they are renewed; a wrong token is said in words.
func TestLoginByToken(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	certFile, keyFile, pair := newCertificate(t, dir, "brokers")
	known := x509.NewCertPool()
	pem, err := os.ReadFile(certFile)
	if err != nil || !known.AppendCertsFromPEM(pem) {
		t.Fatal(err)
	}
	brokers, err := kfake.NewCluster(kfake.NumBrokers(2), kfake.GroupMinSessionTimeout(time.Second), kfake.EnableSASL(), kfake.Superuser("PLAIN", "u", "p"),
		kfake.TLS(&tls.Config{Certificates: []tls.Certificate{pair}, ClientCAs: known, ClientAuth: tls.RequireAndVerifyClientCert}))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(brokers.Close)
	var good, logins atomic.Int64 // the number of the token that is taken
	good.Store(1)
	brokers.ControlKey(int16(kmsg.SASLHandshake), func(req kmsg.Request) (kmsg.Response, error, bool) {
		brokers.KeepControl()
		if r := req.(*kmsg.SASLHandshakeRequest); r.Mechanism == "OAUTHBEARER" { // kfake goes on as if it were PLAIN
			r.Mechanism = "PLAIN"
		}
		return nil, nil, false
	})
	brokers.ControlKey(int16(kmsg.SASLAuthenticate), func(req kmsg.Request) (kmsg.Response, error, bool) {
		brokers.KeepControl()
		r := req.(*kmsg.SASLAuthenticateRequest)
		if string(r.SASLAuthBytes) == fmt.Sprintf("n,,\x01auth=Bearer token-%d\x01pool=7\x01\x01", good.Load()) {
			logins.Add(1)
			r.SASLAuthBytes = []byte("\x00u\x00p")
		} else {
			r.SASLAuthBytes = []byte("\x00u\x00wrong")
		}
		return nil, nil, false
	})
	tokenFile := filepath.Join(dir, "token")
	os.WriteFile(tokenFile, []byte("token-1\n"), 0o600)
	var asked atomic.Int64
	provider := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if id, secret, _ := r.BasicAuth(); id != "ingest" || secret != "oauth-secret-4711" || r.FormValue("scope") != "kafka" {
			w.WriteHeader(http.StatusUnauthorized)
			fmt.Fprint(w, `{"error":"invalid_client"}`)
			return
		}
		asked.Add(1)
		json.NewEncoder(w).Encode(map[string]any{"access_token": fmt.Sprint("token-", good.Load()), "token_type": "Bearer", "expires_in": 3600})
	}))
	t.Cleanup(provider.Close)
	secure := []string{"KAFKA_BROKERS=" + strings.Join(brokers.ListenAddrs(), ","), "KAFKA_TLS=true", "KAFKA_TLS_CA_FILE=" + certFile,
		"KAFKA_SASL_MECHANISM=OAUTHBEARER", "KAFKA_OAUTH_EXTENSIONS=pool=7"}
	certificate := []string{"KAFKA_TLS_CERT_FILE=" + certFile, "KAFKA_TLS_KEY_FILE=" + keyFile}
	byFile, byEndpoint := "KAFKA_OAUTH_TOKEN_FILE="+tokenFile, []string{"KAFKA_OAUTH_TOKEN_URL=" + provider.URL, "KAFKA_OAUTH_CLIENT_ID=ingest", "KAFKA_OAUTH_SCOPE=kafka"}

	for name, more := range map[string][]string{"file": {byFile}, "endpoint": append(byEndpoint, "KAFKA_OAUTH_CLIENT_SECRET=oauth-secret-4711")} {
		env := append(append(newSpace(t, secure...), certificate...), more...)
		p := startProgram(t, env)
		l, done := loadInto(t, p.url, 500, time.Second)
		done()
		mustHold(p, l)
		if strings.Contains(p.log.String(), "oauth-secret") {
			t.Errorf("%s: the secret is in the log", name)
		}
		p.terminate()
	}
	if asked.Load() == 0 || logins.Load() < 10 {
		t.Errorf("%d tokens, %d logins", asked.Load(), logins.Load())
	}

	for says, more := range map[string][]string{
		"KAFKA_SASL_MECHANISM": append(certificate, byFile),                                                             // it is an old one now
		"invalid_client":       append(append([]string{"KAFKA_OAUTH_CLIENT_SECRET=no"}, certificate...), byEndpoint...), //
		"certificate":          {byFile},
		"no such file":         append(certificate, byFile+".none"),
	} {
		good.Store(2)
		p := newProgram(t, append(newSpace(t, secure...), more...))
		p.start()
		p.await("told: "+says, 20*time.Second, func() bool { return strings.Contains(p.log.String(), says) })
		p.cmd.Process.Kill()
		p.cmd.Wait()
	}
}
