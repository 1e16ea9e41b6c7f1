// Refusals are seen: on every route they are counted, kept and said, and whoever looks learns nothing else of an event.

package test

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"
)

// shownRefusals is what GET /api/v1/pipeline has of them.
type shownRefusals struct {
	Refused []struct {
		Route, Code, Field string
		Events             int
	}
	Refusals []shownRefusal
}

type shownRefusal struct {
	Time                        time.Time
	Route, Code, Field, Message string
	Name                        string `json:"event_name"`
}

// scrape is what Prometheus reads.
func scrape(t *testing.T, admin string) string {
	t.Helper()
	resp, err := http.Get("http://" + admin + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	text, _ := io.ReadAll(resp.Body)
	return string(text)
}

func TestRefusals(t *testing.T) {
	t.Parallel()
	admin := "127.0.0.1:" + freePort(t)
	started := time.Now()
	p := startProgram(t, newSpace(t, "ADMIN_ADDR="+admin, "API_KEYS="+firstKey, "WRITE_KEYS="+secondKey))
	now := time.Now().Unix()
	const secret = "hidden5ecret"
	good := fmt.Sprintf(`{"event_name":"good","user_id":%q,"timestamp":%d}`, secret, now)
	bad := func(more string) string {
		return fmt.Sprintf(`{"event_name":"named","user_id":"%s","timestamp":%d,"metadata":{"x":"%s"}%s}`, secret, now, secret, more)
	}
	message := func(more string) string {
		return fmt.Sprintf(`{"type":"track","event":"named","userId":"%s"%s}`, secret, more)
	}
	want := map[string]int{}
	send := func(path, kind, body string, status int, refused ...string) {
		t.Helper()
		for _, one := range refused {
			want[one]++
		}
		if got, _, answer := p.ask("POST", path, []byte(body), "Content-Type: "+kind, "X-API-Key: "+secondKey); got != status {
			t.Errorf("%s %.100s: %d %s, want %d", path, body, got, answer, status)
		}
	}
	const required, format, length, channel, future = "validation.required.error", "validation.invalid-format.error", "validation.max-length.error", "validation.invalid-channel.error", "validation.timestamp-future.error"
	const one, many = "application/json", "application/x-ndjson"
	send(onePath, one, good, 202)
	send(onePath, one, `{"event_name":"named"}`, 400, "events "+required+" user_id")
	send(onePath, one, bad(`,"channel":"`+secret+`"`), 400, "events "+channel+" channel")
	send(onePath, one, bad(`,"`+secret+`":"\ud800"`), 400, "events "+format+" other")
	send(onePath, one, `{"event_name":`, 400, "events "+format+" ")
	send(onePath, one, bad(`,"x":"`+strings.Repeat("x", 65<<10)+`"`), 413, "events "+length+" ")
	send(onePath, "application/xml", good, 415, "events "+format+" ")
	send(bulkPath, one, `{"events":[`+good+`,`+bad(`,"tags":5`)+`,`+bad(`,"tags":5`)+`,[]]}`, 207, "bulk "+format+" tags", "bulk "+format+" tags", "bulk "+format+" ")
	send(bulkPath, many, bad(`,"campaign_id":"`+strings.Repeat("x", 101)+`"`)+"\n"+secret, 400, "bulk "+length+" campaign_id", "bulk "+format+" ")
	send(bulkPath, one, `{"events":[]}`, 400, "bulk "+format+" ")
	send(bulkPath, one, `{"events":[`+bad(`,"tags":5`)+`,`, 400, "bulk "+format+" ") // how many there were nobody knows
	send("/v1/t", one, message(`,"timestamp":"2126-01-01T00:00Z"`), 200, "segment "+future+" timestamp")
	send("//v1/batch/", one, `{"batch":[`+message("")+`,{"type":"`+secret+`"},{"type":"track","userId":true}]}`, 200, "segment "+format+" type", "segment "+format+" user_id")
	send("/v1/p", one, message(`,"userId":"`+secret+`"`), 200, "segment "+format+" other")
	send("/v1/batch", one, `[`+message("")+`]`, 400, "segment "+format+" ")

	var shown shownRefusals
	ask := func() (answer string) {
		_, _, answer = p.ask("GET", "/api/v1/pipeline", nil, "X-API-Key: "+firstKey)
		shown = shownRefusals{}
		if err := json.Unmarshal([]byte(answer), &shown); err != nil {
			t.Errorf("%v: %s", err, answer)
		}
		return answer
	}
	answer := ask()
	got := map[string]int{}
	for _, r := range shown.Refused {
		got[r.Route+" "+r.Code+" "+r.Field] = r.Events
	}
	text := scrape(t, admin)
	for what, n := range want {
		of := strings.SplitN(what, " ", 3)
		if line := fmt.Sprintf("event_ingestion_refused_total{route=%q,code=%q,field=%q} %d\n", of[0], of[1], of[2], n); got[what] != n || !strings.Contains(text, line) {
			t.Errorf("%s: %d in the pipeline, want %d, and in metrics %s", what, got[what], n, line)
		}
	}
	if len(got) != len(want) {
		t.Errorf("counted are %v, want %v", got, want)
	}
	all := 0
	for _, n := range want {
		all += n
	}
	if newest := shown.Refusals[0]; len(shown.Refusals) != min(all, 20) || newest.Route != "segment" || newest.Code != format || !strings.Contains(newest.Message, "JSON object") || newest.Time.Unix() < now || newest.Time.Unix() > time.Now().Unix()+1 {
		t.Errorf("%d refusals, the newest is %+v", len(shown.Refusals), newest)
	}
	if !slices.ContainsFunc(shown.Refusals, func(r shownRefusal) bool {
		return r.Route == "bulk" && r.Field == "campaign_id" && r.Name == "named" && r.Message == "campaign_id has 101 characters, the limit is 100"
	}) {
		t.Errorf("a refused event is not named: %s", answer)
	}

	// Many more: the last 20 are kept, each text is short, and the counters do not multiply with what senders make up.
	before := strings.Count(scrape(t, admin), "event_ingestion_refused_total{")
	for round := range 5 {
		var lines strings.Builder
		for i := range 1000 {
			fmt.Fprintf(&lines, `{"event_name":"%s","user_id":"u","timestamp":%d,"%s%d_%d":"\ud800"}`+"\n", strings.Repeat("ş", 101+i), now, secret, round, i)
		}
		send(bulkPath, many, lines.String(), 400)
	}
	answer = ask()
	if n := strings.Count(scrape(t, admin), "event_ingestion_refused_total{"); n != before || len(shown.Refusals) != 20 {
		t.Errorf("%d counters, were %d; %d refusals", n, before, len(shown.Refusals))
	}
	for _, r := range shown.Refusals {
		if len([]rune(r.Name)) > 100 || len([]rune(r.Message)) > 100 {
			t.Errorf("long: %+v", r)
		}
	}
	if strings.Contains(answer, secret) || strings.Contains(p.log.String(), secret) {
		t.Errorf("what was sent is shown:\n%s\n%s", answer, p.log)
	}
	said, seconds := strings.Count(p.log.String(), "events are refused"), int(time.Since(started)/time.Second)
	if said < 1 || said > seconds+1 {
		t.Errorf("%d lines in %d s:\n%s", said, seconds, p.log)
	}
	if status, _, _ := p.ask("GET", "/api/v1/pipeline", nil, "X-API-Key: "+secondKey); status != 403 {
		t.Errorf("a write key reads what was refused: %d", status)
	}
	if !strings.Contains(text, `event_ingestion_refused_total{route="segment",code="validation.required.error",field="timestamp"} 0`+"\n") {
		t.Error("a counter is not there before the first refusal, and an alert would not see that")
	}
}
