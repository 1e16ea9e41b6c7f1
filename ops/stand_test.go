// The stand: a topic, a group and two tables of the test's own on the embedded stack, and a System over them. An event is here a
// user and a second, and its id the hash of both: the commands do not care.

package ops

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/ClickHouse/ch-go"
	"github.com/twmb/franz-go/pkg/kadm"
	"github.com/twmb/franz-go/pkg/kgo"
)

type stand struct {
	t testing.TB
	System
	kafka *kgo.Client
	admin *kadm.Client
}

// newStand makes three topics and the two tables.
func newStand(t testing.TB) *stand {
	t.Helper()
	if os.Getenv("KAFKA_BROKERS") == "" {
		if testing.Short() {
			t.Skip("needs the embedded stack")
		}
		t.Fatal("needs the embedded stack: run `make test`, or give -short to leave these tests out")
	}
	name := fmt.Sprintf("ops%d_%d", os.Getpid(), time.Now().UnixNano())
	s := &stand{t: t}
	connect := func(ctx context.Context, f func(Conn) error) error {
		client, err := ch.Dial(ctx, ch.Options{Address: net.JoinHostPort("127.0.0.1", os.Getenv("CLICKHOUSE_PORT"))})
		if err != nil {
			return err
		}
		defer client.Close()
		defer context.AfterFunc(ctx, func() { client.Close() })()
		if err = f(client.Do); ctx.Err() != nil {
			err = ctx.Err()
		}
		return err
	}
	s.System = System{
		Topic: name, Group: name, Database: name,
		Kafka: func(clientID string, opts ...kgo.Opt) (*kgo.Client, error) {
			return kgo.NewClient(append(opts, kgo.ClientID(clientID), kgo.SeedBrokers(strings.Split(os.Getenv("KAFKA_BROKERS"), ",")...))...)
		},
		Connect: connect, EachServer: connect,
		SQL: strings.NewReplacer("{database}", name, "{events}", name+".events", "{events_hourly}", name+".events_hourly", "{erasures}", name+".erasures", "{processes}", "system.processes").Replace,
		Decode: func(value []byte) (id [32]byte, at int64, userID []byte, err error) {
			if n, _ := fmt.Sscanf(string(value), "%s %d", &userID, &at); n < 2 {
				return id, 0, nil, errors.New("no event")
			}
			return sha256.Sum256(value), at, userID, nil
		},
		SyncReplicas: func(context.Context) error { return nil },
		Inserting:    func() []ch.Setting { return nil },
		Differences: func(string, string) string {
			return "(SELECT '' AS event_name, '' AS channel, toDateTime(0, 'UTC') AS hour, toInt64(0) AS event_count, toInt64(0) AS aggregated FROM numbers(0))"
		},
	}
	var err error
	if s.kafka, err = s.Kafka("test", kgo.RecordPartitioner(kgo.ManualPartitioner()), kgo.ProducerBatchMaxBytes(maxBatchBytes)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.kafka.Close)
	s.admin = kadm.NewClient(s.kafka)
	for _, suffix := range suffixes {
		if _, err := s.admin.CreateTopic(t.Context(), 2, 1, nil, name+suffix); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() { s.query("DROP DATABASE {database}") })
	s.query("CREATE DATABASE {database}")
	s.query("CREATE TABLE {events} (event_id FixedString(32), event_name String, channel String, user_id String, timestamp DateTime('UTC')) ENGINE MergeTree ORDER BY event_id")
	s.query("CREATE TABLE {events_hourly} (event_name String, channel String, hour DateTime('UTC'), event_count Int64) ENGINE MergeTree ORDER BY hour")
	s.query("CREATE TABLE {erasures} (user FixedString(32), up_to DateTime('UTC')) ENGINE MergeTree ORDER BY user")
	return s
}

// erase has a user erased up to a second, without deleting anything.
func (s *stand) erase(user string, upTo int64) {
	s.t.Helper()
	s.query(fmt.Sprintf("INSERT INTO {erasures} VALUES (SHA256(unhex('%x')), %d)", user, upTo))
}

// query changes tables, also when the test has ended.
func (s *stand) query(sql string) {
	s.t.Helper()
	ctx := context.WithoutCancel(s.t.Context())
	if err := s.Connect(ctx, func(do Conn) error { return do(ctx, ch.Query{Body: s.SQL(sql)}) }); err != nil {
		s.t.Fatal(sql, err)
	}
}

// store puts an event into both tables.
func (s *stand) store(events ...string) {
	s.t.Helper()
	for _, event := range events {
		id, at, user, _ := s.Decode([]byte(event))
		s.query(fmt.Sprintf("INSERT INTO {events} VALUES (unhex('%x'), 'e', '', unhex('%x'), %d)", id, user, at))
		s.query(fmt.Sprintf("INSERT INTO {events_hourly} VALUES ('e', '', %d, 1)", at/hourSeconds*hourSeconds))
	}
}

// produce puts records with these values into a partition of a topic; headers are key and value, in turns.
func (s *stand) produce(suffix string, partition int32, values []string, headers ...string) {
	s.t.Helper()
	for _, value := range values {
		rec := &kgo.Record{Topic: s.Topic + suffix, Partition: partition, Value: []byte(value)}
		for i := 0; i < len(headers); i += 2 {
			rec.Headers = append(rec.Headers, kgo.RecordHeader{Key: headers[i], Value: []byte(headers[i+1])})
		}
		if err := s.kafka.ProduceSync(s.t.Context(), rec).FirstErr(); err != nil {
			s.t.Fatal(err)
		}
	}
}

// run runs a command and fails the test unless it ends with the code and has written each text.
func (s *stand) run(code int, args string, want ...string) (out string) {
	s.t.Helper()
	var b bytes.Buffer
	got := Run(strings.Fields(args), func() (System, error) { return s.System, nil }, &b, &b)
	for _, text := range want {
		if !strings.Contains(b.String(), text) {
			s.t.Errorf("%s: %q is not in it:\n%s", args, text, &b)
		}
	}
	if got != code {
		s.t.Errorf("%s ends with %d, not %d:\n%s", args, got, code, &b)
	}
	return b.String()
}

// records are those of a topic, in the order of their partitions.
func (s *stand) records(suffix string) (recs []*kgo.Record) {
	s.t.Helper()
	if err := s.readRecords(s.t.Context(), s.Topic+suffix, "", func(rec *kgo.Record) error { recs = append(recs, rec); return nil }); err != nil {
		s.t.Fatal(err)
	}
	return recs
}
