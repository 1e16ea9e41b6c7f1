// A store that was lost: ClickHouse comes back without its tables, and Kafka has what was in them. Nobody is told that everything
// is stored, and it is, once, without a person.

package test

import (
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/event-ingestion/event-ingestion/internal/testkit"
)

// lostEvents are stored in the space, some of them sent twice, before the store is lost.
const lostEvents = 3000

const goesBack = "the group goes back to the start of the topic"

// loseStore stores events by an instance of its own and takes the tables away. It returns the question that counts them.
func loseStore(t *testing.T, env []string) (question string) {
	t.Helper()
	p := startProgram(t, env)
	now := time.Now().Unix()
	bodies := numbered("lost", lostEvents, 250, func(i int) int64 { return now - int64(i%20)*86400 - int64(i) })
	postAll(t, p, append(bodies, bodies[:3]...))
	drained(p)
	p.terminate()
	dropTables(t, env)
	if strings.Contains(p.log.String(), goesBack) {
		t.Errorf("the first start of all:\n%s", p.log)
	}
	return fmt.Sprintf("%sevent_name=lost&from=%d&to=%d", metricsPath, now-30*86400, now+10)
}

func dropTables(t *testing.T, env []string) {
	t.Helper()
	askShards(t, "DROP DATABASE "+space(env, "CLICKHOUSE_DATABASE")+" SYNC")
}

// comesBack waits until all that was lost is stored again. No answer before that claims to be complete, and /ready does not say that
// nothing is stored.
func comesBack(t *testing.T, p *program, question string) {
	t.Helper()
	total, looked, since := int64(-1), time.Now(), time.Now() // since then at the earliest rows have come
	p.await("all is stored again", 2*time.Minute, func() bool {
		before := looked
		looked = time.Now()
		status, _, answer := p.do("GET", question, "", "", nil)
		var a struct {
			Total   int64  `json:"total_count"`
			Through *int64 `json:"complete_through"`
		}
		if json.Unmarshal([]byte(answer), &a); status == http.StatusOK && a.Total < lostEvents && a.Through != nil {
			t.Errorf("%d of %d events are there: %s", a.Total, lostEvents, answer)
		}
		if status == http.StatusOK && a.Total != total {
			total, since = a.Total, before
		}
		_, _, ready := p.do("GET", "/ready", "", "", nil)
		var seconds int
		if _, text, stalled := strings.Cut(ready, `"stalled `); stalled {
			fmt.Sscan(text, &seconds)
		}
		const oneInsert = 10 * time.Second // its rows may be seen before it ends
		if time.Duration(seconds)*time.Second > time.Since(since)+oneInsert {
			t.Errorf("%d of %d events are there, the last ones came %s ago at most, and /ready says %s", total, lostEvents, time.Since(since), ready)
		}
		return status == http.StatusOK && a.Total == lostEvents && a.Through != nil
	})
	mustCount(t, p.env, "lost", lostEvents)
	if out, code := subcommand(t, p.env, "audit"); code != 0 {
		t.Error(code, out)
	}
}

// TestStoreLost: it comes back by itself, said in the log. A start that dies between the two, the group that goes back and the tables
// that are made, changes nothing, and neither does an API that stands by.
func TestStoreLost(t *testing.T) {
	t.Parallel()
	env := newSpace(t)
	question := loseStore(t, env)
	p := newProgram(t, env)
	p.start()
	p.await("the group goes back", time.Minute, func() bool { return strings.Contains(p.log.String(), goesBack) })
	p.cmd.Process.Kill()
	p.cmd.Wait()
	if n := clickhouseQuery(t, "SELECT count() FROM system.tables WHERE name = 'events' AND database = '"+space(env, "CLICKHOUSE_DATABASE")+"'"); n != "0" {
		t.Log("the tables were there before the program was killed")
	}
	api := newProgram(t, append(slices.Clone(env), "ROLE=api", "SERVER_PORT="+freePort(t)))
	api.start()
	p = startProgram(t, env)
	comesBack(t, p, question)
	comesBack(t, api, question)
	p.terminate()
	p = startProgram(t, env)
	if strings.Contains(p.log.String(), goesBack) {
		t.Errorf("once more:\n%s", p.log)
	}
	mustCount(t, env, "lost", lostEvents)
}

// TestStoreLostBeside: the store is lost while an instance consumes. Nobody who starts beside it makes tables, for then nobody would
// know: they are not ready, and say what to do. When it has been done, all comes back by itself.
func TestStoreLostBeside(t *testing.T) {
	t.Parallel()
	env := newSpace(t)
	question := loseStore(t, env)
	first := startProgram(t, env)
	comesBack(t, first, question)
	dropTables(t, env)
	others := []*program{newProgram(t, append(slices.Clone(env), "SERVER_PORT="+freePort(t))), newProgram(t, append(slices.Clone(env), "ROLE=api", "SERVER_PORT="+freePort(t)))}
	for _, p := range others {
		p.start()
		p.await("said", time.Minute, func() bool {
			resp, err := http.Get(p.url + "/ready")
			if err != nil {
				return false
			}
			resp.Body.Close()
			status, _, answer := p.do("GET", "/ready", "", "", nil)
			return status == http.StatusServiceUnavailable && strings.Contains(answer, "ClickHouse has no tables, and group ") && strings.Contains(answer, "Stop all instances that consume, 1 of them")
		})
		if status, _, answer := p.do("GET", "/api/v1/pipeline", "", "", nil); status != http.StatusOK || strings.Contains(answer, `"complete_through":1`) {
			t.Errorf("%d %s", status, answer)
		}
		if status := p.status(question); status != http.StatusServiceUnavailable {
			t.Errorf("metrics without tables: %d", status)
		}
		if status, _, answer := p.do("POST", onePath, jsonCT, "", testkit.FreshEvent("meanwhile")); status != http.StatusAccepted {
			t.Errorf("%d %s", status, answer)
		}
	}
	first.terminate()
	for _, p := range others {
		comesBack(t, p, question)
		mustCount(t, env, "meanwhile", int64(len(others)))
	}
}

// TestEventsLost: only the raw table is lost. What Kafka has would be counted twice, so a person has to choose.
func TestEventsLost(t *testing.T) {
	t.Parallel()
	env := newSpace(t)
	question := loseStore(t, env)
	p := startProgram(t, env)
	comesBack(t, p, question)
	p.terminate()
	askShards(t, "DROP TABLE "+space(env, "CLICKHOUSE_DATABASE")+".events SYNC")
	p = newProgram(t, env)
	p.start()
	p.await("said", time.Minute, func() bool { return strings.Contains(p.log.String(), "or drop events_hourly: then") })
	if status, _, answer := p.do("GET", "/ready", "", "", nil); status != http.StatusServiceUnavailable || !strings.Contains(answer, "or drop events_hourly: then") {
		t.Errorf("%d %s", status, answer)
	}
	askShards(t, "DROP TABLE "+space(env, "CLICKHOUSE_DATABASE")+".events_hourly SYNC")
	comesBack(t, p, question)
}

// TestOtherGroup: what another group has not read is not lost, where the tables are there, and where there have never been any.
func TestOtherGroup(t *testing.T) {
	t.Parallel()
	env := newSpace(t)
	p := startProgram(t, env)
	now := time.Now().Unix()
	postAll(t, p, numbered("other", 1000, 500, func(i int) int64 { return now - int64(i) }))
	drained(p)
	p.terminate()
	again := startProgram(t, append(slices.Clone(env), "KAFKA_CONSUMER_GROUP="+space(env, "KAFKA_CONSUMER_GROUP")+"-2"))
	drained(again)
	if strings.Contains(p.log.String()+again.log.String(), goesBack) {
		t.Errorf("nothing was lost:\n%s%s", p.log, again.log)
	}
	mustCount(t, env, "other", 1000)
}
