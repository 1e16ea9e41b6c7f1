// Stores that are away: ClickHouse, Kafka, or tables that refuse every row for some seconds.

package test

import (
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/event-ingestion/event-ingestion/internal/testkit"
)

func TestClickHouseAwayUnderLoad(t *testing.T) {
	alone(t)
	env := faultSpace(t)
	p := startProgram(t, env)
	away := 10 * time.Second
	l, done := loadInto(t, p.url, 1000, away+3*time.Second)
	p.await("under load", 10*time.Second, func() bool { return l.OK.Load() > 1000 })
	control(t, "/clickhouse/stop")
	before := l.OK.Load()
	if status := p.status(metricsPath + "event_name=e&from=1&to=2"); status != http.StatusServiceUnavailable {
		t.Errorf("metrics without ClickHouse: status %d", status)
	}
	p.await("unready", 20*time.Second, func() bool { return p.status("/ready") == http.StatusServiceUnavailable })
	if p.status("/health") != http.StatusOK {
		t.Error("health has to stay")
	}
	time.Sleep(away) // the fault itself, not a wait for something
	control(t, "/clickhouse/start")
	if accepted := l.OK.Load() - before; accepted < 3000 {
		t.Errorf("only %d accepted while ClickHouse was away", accepted)
	}
	done()
	mustHold(p, l)
}

func TestKafkaAway(t *testing.T) {
	alone(t)
	env := faultSpace(t, "ACK_TIMEOUT=1s")
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
	p.await("unready", 20*time.Second, func() bool { return p.status("/ready") == http.StatusServiceUnavailable })
	if p.status("/health") != http.StatusOK {
		t.Error("health has to stay")
	}
	control(t, "/kafka/start")
	p.await("accepting again", 30*time.Second, func() bool {
		status, _, _ := p.do("POST", onePath, jsonCT, "", event())
		return status == http.StatusAccepted
	})
	l, done := loadInto(t, p.url, 2000, time.Second)
	done()
	mustHold(p, l)
}

// TestKafkaAwayUnderLoad: the brokers stop and come back; the client resends what was not acknowledged.
func TestKafkaAwayUnderLoad(t *testing.T) {
	alone(t)
	env := faultSpace(t, "ACK_TIMEOUT=1s")
	p := startProgram(t, env)
	l, done := loadInto(t, p.url, 1500, time.Hour)
	for range 3 {
		target := l.OK.Load() + 1000
		p.await("under load", 40*time.Second, func() bool { return l.OK.Load() > target })
		control(t, "/kafka/stop")
		time.Sleep(1500 * time.Millisecond) // beyond ACK_TIMEOUT: the fault itself
		control(t, "/kafka/start")
	}
	target := l.OK.Load() + 1000
	p.await("under load again", 40*time.Second, func() bool { return l.OK.Load() > target })
	l.Stop()
	done()
	l.Forgive() // 503 to the end is an honest answer
	mustHold(p, l)
}

// TestRefusedForSeconds: ClickHouse refuses each insert for some seconds, and then takes them again.
func TestRefusedForSeconds(t *testing.T) {
	t.Parallel()
	for code, fault := range map[string]struct{ begin, end string }{
		"TOO_MANY_PARTS": {"ALTER TABLE %s.events MODIFY SETTING parts_to_delay_insert = 1, parts_to_throw_insert = 1",
			"ALTER TABLE %s.events MODIFY SETTING parts_to_delay_insert = 100000, parts_to_throw_insert = 100000"},
		"UNKNOWN_TABLE": {"RENAME TABLE %[1]s.events TO %[1]s.away", "RENAME TABLE %[1]s.away TO %[1]s.events"},
	} {
		t.Run(code, func(t *testing.T) {
			t.Parallel()
			env := faultSpace(t)
			p := startProgram(t, env)
			l, done := loadInto(t, p.url, 1500, time.Hour)
			for range testkit.TortureFactor() {
				target := l.OK.Load() + 1000
				p.await("under load", 20*time.Second, func() bool { return l.OK.Load() > target })
				clickhouseQuery(t, fmt.Sprintf(fault.begin, space(env, "CLICKHOUSE_DATABASE")))
				p.await("refused", 10*time.Second, func() bool { return strings.Contains(p.log.String(), code) })
				time.Sleep(2 * time.Second) // the fault itself
				clickhouseQuery(t, fmt.Sprintf(fault.end, space(env, "CLICKHOUSE_DATABASE")))
				drained(p)
			}
			l.Stop()
			done()
			mustHold(p, l)
		})
	}
}
