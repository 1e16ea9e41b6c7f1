// An erased user is gone, from both tables, and stays away; nothing else changes.

package test

import (
	"fmt"
	"net/http"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/event-ingestion/event-ingestion/internal/testkit"

	"github.com/twmb/franz-go/pkg/kgo"
)

// erasedUser is one of the ten of erasureSpace, user_120 to user_129; each has 30 events in as many hours.
const erasedUser = "user_123"

func erasureSpace(t *testing.T) *program {
	t.Helper()
	p := startProgram(t, faultSpace(t))
	postAll(t, p, [][]byte{erasureEvents(time.Now().Unix())})
	drained(p)
	mustCount(t, p.env, "erase", 300)
	return p
}

func erasureEvents(now int64) (body []byte) {
	for i := range 300 {
		body = fmt.Appendf(body, `{"event_name":"erase","user_id":"user_%d","timestamp":%d,"metadata":{"price":2}}`+"\n", 120+i%10, now-int64(i)*400)
	}
	return body
}

// mustBeErased fails the test unless nothing is left of the user, the others have what they had, and an audit says so by itself.
func mustBeErased(p *program) {
	t := p.t
	t.Helper()
	db := space(p.env, "CLICKHOUSE_DATABASE")
	drained(p)
	mustCount(t, p.env, "erase", 270)
	if got := clickhouseQuery(t, "SELECT uniqCombined64Merge(17)(unique_users_state) FROM "+db+".events_hourly WHERE event_name = 'erase'"); got != "9" {
		t.Errorf("%s users are left, want 9", got)
	}
	if got := clickhouseQuery(t, "SELECT (SELECT count() FROM "+db+".events WHERE user_id = '"+erasedUser+"' AND event_name != 'after'), (SELECT count() FROM "+db+".erasing), (SELECT count() FROM "+db+".recounts)"); got != "0\t0\t0" {
		t.Errorf("rows of the user, hours of an erasure, hours that are recounted: %s", got)
	}
	if out, code := subcommand(t, p.env, "audit"); code != 0 {
		t.Errorf("audit: %d %s", code, out)
	}
}

// eraseCommand is what deploy/README.md says, without the program's name.
func eraseCommand(t *testing.T) string {
	t.Helper()
	doc, err := os.ReadFile("deploy/README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, recipe, _ := strings.Cut(string(doc), "Erasing a user")
	recipe, _, _ = strings.Cut(recipe, "\n```\n")
	var said []string
	for _, m := range regexp.MustCompile(`(?m)^(\w.*?)( +#.*)?$`).FindAllStringSubmatch(recipe[strings.Index(recipe, "```"):], -1) {
		said = append(said, m[1])
	}
	if !slices.Equal(said, []string{"event-ingestion erase -user " + erasedUser}) {
		t.Fatalf("the recipe is %q", said)
	}
	return strings.TrimPrefix(said[0], "event-ingestion ")
}

// TestErasure follows the recipe while events come in. What the user does later is stored; what was done before is not, when it is
// sent again, imported, put back from the dead letters, or read from Kafka once more.
func TestErasure(t *testing.T) {
	t.Parallel()
	p := erasureSpace(t)
	env, db := p.env, space(p.env, "CLICKHOUSE_DATABASE")
	kafka, err := kgo.NewClient(kgo.SeedBrokers(kafkaBrokers(t)...), kgo.RecordPartitioner(kgo.ManualPartitioner()))
	if err != nil {
		t.Fatal(err)
	}
	defer kafka.Close()
	for i, user := range []string{erasedUser, "user_124", erasedUser} { // letters, of which Kafka can delete the first alone
		value := fmt.Appendf(nil, `{"event_name":"letter","user_id":%q,"timestamp":%d}`, user, time.Now().Unix()-60-int64(i))
		if err := kafka.ProduceSync(t.Context(), &kgo.Record{Topic: space(env, "KAFKA_TOPIC") + ".dlq", Value: value}).FirstErr(); err != nil {
			t.Fatal(err)
		}
	}
	command := eraseCommand(t)
	out, code := subcommand(t, env, command+" -dry-run")
	if code != 0 || !strings.Contains(out, "30 rows of 30 hours; 2 dead letters, 0 records on the retry topic") || !strings.Contains(out, "records of this user stay until 2") {
		t.Errorf("a dry run: %d %s", code, out)
	}
	mustCount(t, env, "erase", 300)
	l, done := loadInto(t, p.url, 300, time.Hour, "-users", "100")
	out, code = subcommand(t, env, command)
	if code != 0 || !strings.Contains(out, ".dlq: 1 records of this user stay until 2") || !strings.Contains(out, "30 hours are counted anew") || !strings.Contains(out, "none of them comes back") {
		t.Fatalf("%d %s", code, out)
	}
	upTo, err := time.Parse(time.RFC3339, regexp.MustCompile(`happened up to (\S+) is left out`).FindStringSubmatch(out)[1])
	if err != nil {
		t.Fatal(err)
	}
	l.Stop()
	done()
	mustBeErased(p)
	mustAgree(t, l, p.url)
	again := fmt.Appendf(nil, `{"event_name":"before","user_id":%q,"timestamp":%d}`+"\n"+`{"event_name":"after","user_id":%[1]q,"timestamp":%[3]d}`, erasedUser, upTo.Unix(), upTo.Unix()+1)
	postAll(t, p, [][]byte{again})
	if out, code := subcommand(t, env, "import "+written(t, "another.ndjson", again)); code != 0 {
		t.Errorf("import: %d %s", code, out)
	}
	if out, code := subcommand(t, env, "dlq replay"); code != 0 || !strings.HasPrefix(out, "1 letters put back") || !strings.Contains(out, "1 of erased users") {
		t.Errorf("dlq replay: %d %s", code, out)
	}
	p.awaitCount("letter", 1)
	mustBeErased(p)
	mustCount(t, env, "before", 0)
	mustCount(t, env, "after", 1)

	p.terminate()
	for _, table := range []string{"events", "events_hourly"} { // which are lost
		clickhouseQuery(t, "TRUNCATE TABLE "+db+"."+table)
	}
	if out, code := subcommand(t, env, "rewind -to start"); code != 0 {
		t.Fatalf("rewind: %d %s", code, out)
	}
	p = startProgram(t, env)
	mustBeErased(p)
	mustCount(t, env, "after", 1)
	mustAgree(t, l, p.url)

	statements := clickhouseQuery(t, "SELECT count() FROM system.mutations WHERE database = '"+db+"' AND position(command, '"+erasedUser+"') > 0")
	if statements != "0" {
		t.Errorf("%s statements name the user", statements)
	}
	if out, code := subcommand(t, env, "erase -dry-run"); code != 2 || !strings.Contains(out, "-user is needed") {
		t.Errorf("without a user: %d %s", code, out)
	}
}

// TestErasureKilled: the command is killed at many moments while the user's events come in again and again. Run once more it ends
// exactly, and a second time does nothing.
func TestErasureKilled(t *testing.T) {
	t.Parallel()
	p := erasureSpace(t)
	now := time.Now().Unix()
	erase := eraseCommand(t)
	stop := make(chan struct{})
	sent := make(chan int)
	go func() { // ends with stop
		n := 0
		for ; ; n++ {
			select {
			case <-stop:
				sent <- n
				return
			case <-time.After(20 * time.Millisecond):
			}
			resp, err := http.Post(p.url+bulkPath, ndjson, strings.NewReader(fmt.Sprintf(`{"event_name":"again","user_id":%q,"timestamp":%d}`, erasedUser, now-int64(n))))
			if err == nil {
				resp.Body.Close()
			}
		}
	}()
	for i := range testkit.MoreInTorture(4, 20) {
		cmd := command(t, p.env, strings.Fields(erase)...)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		kill := time.AfterFunc(5*time.Second+time.Duration(200+i*250%2000)*time.Millisecond, func() { cmd.Process.Kill() }) // the fault itself; 5 s is what an erasure waits
		cmd.Wait()
		kill.Stop()
	}
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(100 * time.Millisecond) {
		out, code := subcommand(t, p.env, erase)
		if code == 0 {
			break
		}
		if time.Now().After(deadline) || !strings.Contains(out, "another command") {
			t.Fatalf("%d %s", code, out)
		}
	}
	close(stop)
	n := <-sent
	mustBeErased(p)
	mustCount(t, p.env, "again", 0)
	if out, code := subcommand(t, p.env, erase); code != 0 || !strings.Contains(out, "0 rows of 0 hours") || !strings.Contains(out, "0 hours are counted anew") {
		t.Errorf("once more: %d %s", code, out)
	}
	t.Logf("%d events of the user were sent meanwhile", n)
}
