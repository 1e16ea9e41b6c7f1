// An audit beside ingestion: it judges a moment that is settled, and ends.

package test

import (
	"encoding/json"
	"fmt"
	"testing"
	"time"

	"github.com/event-ingestion/event-ingestion/internal/testkit"
)

// TestAuditBesideIngestion: while events come in, some of which ClickHouse rejects until they are dead letters, every audit balances. One
// event that is missing in the table, or one that is counted twice, is found all the same.
//
// `make torture` does it five times at 6,000 events a second, which is what two cores audit beside the race detector. Each time has a topic of
// its own: on one that grows an audit takes longer and longer. TORTURE=17 with a program that was built without the detector, in
// EVENT_INGESTION_BINARY, does it at 20,000 a second.
func TestAuditBesideIngestion(t *testing.T) {
	t.Parallel()
	for range min(testkit.TortureFactor(), 5) {
		auditBesideIngestion(t, float64(testkit.MoreInTorture(500, 1200)))
	}
}

func auditBesideIngestion(t *testing.T, rate float64) {
	env := faultSpace(t, "MAX_RETRY_ATTEMPTS=2", "KAFKA_SESSION_TIMEOUT=30s") // nobody dies here, and a slow machine is no reason to start over
	db := space(env, "CLICKHOUSE_DATABASE")
	p := startProgram(t, env)
	clickhouseQuery(t, "ALTER TABLE "+db+".events ADD CONSTRAINT fiftieth CHECK event_name = 'kept' OR cityHash64(event_id) % 50 != 0")
	at := time.Now().Unix() - 5*hourSeconds
	postAll(t, p, numbered("kept", 100, 100, func(int) int64 { return at }))
	l, done := loadInto(t, p.url, rate, time.Hour, "-users", "20000", "-bulk", "200")
	var a struct {
		Stored, Difference, Unequal, Waiting, Unread int64
		Letters                                      int64 `json:"dead_letters"`
		Nowhere                                      []string
	}
	audit := func(want int) {
		t.Helper()
		out, code := subcommand(t, env, "audit -json")
		if err := json.Unmarshal([]byte(out), &a); code != want || err != nil {
			t.Fatalf("ended with %d, not %d: %s", code, want, out)
		}
	}
	p.await("dead letters", time.Minute, func() bool { audit(0); return a.Letters > 0 })
	for range 4 {
		audit(0)
	}
	lost := eventID("kept", "u7", at, "")
	clickhouseQuery(t, fmt.Sprintf("ALTER TABLE %s.events DELETE WHERE event_id = unhex('%s') SETTINGS mutations_sync = 2", db, lost))
	if audit(1); a.Difference != 1 || a.Unequal != 1 || len(a.Nowhere) != 1 || a.Nowhere[0] != lost {
		t.Errorf("without an event: %+v", a)
	}
	clickhouseQuery(t, fmt.Sprintf("INSERT INTO %[1]s.events_hourly SELECT * REPLACE (toInt64(2) AS event_count) FROM %[1]s.events_hourly WHERE event_name = 'kept' LIMIT 1", db))
	if audit(1); a.Difference != 1 || a.Unequal != 3 {
		t.Errorf("with an hour that counts two more: %+v", a)
	}
	l.Stop()
	done()
	p.terminate()
	t.Logf("at the end %d stored, %d dead letters, %d waiting", a.Stored, a.Letters, a.Waiting)
}
