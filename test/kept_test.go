// What an instance keeps of its answers is never wrong: it answers as the tables do, whatever changes them and whoever.

package test

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/event-ingestion/event-ingestion/internal/testkit"
)

// TestKeptAnswers asks an instance at random, mostly what it was asked before or nearly that, and ClickHouse for the same, while late
// events, another instance, erasures, mendings, recounts and a retention change the tables. Merges are stopped every other time.
func TestKeptAnswers(t *testing.T) {
	t.Parallel()
	env := newSpace(t)
	p := startProgram(t, env)
	db := space(env, "CLICKHOUSE_DATABASE")
	random := rand.New(rand.NewPCG(1, uint64(time.Now().UnixNano())))
	now := time.Now().Unix()
	begin := now/daySeconds*daySeconds - 5*daySeconds
	inserted := 0
	insert := func(events, users int, from, to int64) { // as another instance does
		clickhouseQuery(t, fmt.Sprintf("INSERT INTO %s.events (event_id, event_name, channel, user_id, timestamp) SELECT SHA256(toString(number)), ['a','b'][1 + number %% 2], ['web','api',''][1 + intHash32(number) %% 3],"+
			" concat('u', toString(intHash64(number) %% %d)), %d + intHash64(number + 7) %% %d FROM numbers(%d, %d) SETTINGS optimize_on_insert = 0, async_insert = 0",
			db, users, from, to-from, inserted, events))
		inserted += events
	}
	recount := func(from, to int64) {
		if out, code := subcommand(t, env, fmt.Sprintf("reconcile -recount -from %d -to %d", from, to)); code != 0 {
			t.Fatal(code, out)
		}
	}
	insert(60_000, 9000, begin, now) // more users than a state has one by one
	changes := map[string]func(){
		"late events":   func() { at := begin + random.Int64N(now-begin-3600); insert(1+random.IntN(50), 9000, at, at+3600) },
		"events of now": func() { insert(1+random.IntN(50), 9000, now-600, now) },
		"this instance": func() {
			postAll(t, p, [][]byte{fmt.Appendf(nil, `{"event_name":"a","user_id":"own%d","timestamp":%d,"channel":"web"}`+"\n", random.Int(), now-random.Int64N(4*daySeconds))})
			drained(p)
		},
		"an erasure": func() {
			if out, code := subcommand(t, env, fmt.Sprintf("erase -user u%d", random.IntN(9000))); code != 0 {
				t.Fatal(code, out)
			}
		},
		"a mending": func() { // an event too many in one hour, and in another one that counts instead of the right one
			at := (begin + random.Int64N(now-begin-2*3600)) / 3600 * 3600
			clickhouseQuery(t, fmt.Sprintf("INSERT INTO %[1]s.events_hourly SELECT * REPLACE (toInt64(0) AS event_count, toUInt64(3) AS id_sum) FROM %[1]s.events_hourly WHERE hour = %[2]d LIMIT 1", db, at))
			clickhouseQuery(t, fmt.Sprintf("INSERT INTO %[1]s.events_hourly SELECT * REPLACE (toInt64(1) AS event_count) FROM %[1]s.events_hourly WHERE hour = %[2]d LIMIT 1", db, at+3600))
		},
		"an exchange": func() { // of an event for one of somebody who is there already: as many events as before, and a user less
			at := (begin + random.Int64N(now-begin-2*3600)) / 3600 * 3600
			of := fmt.Sprintf("FROM %s.events WHERE event_name = 'a' AND channel = 'web' AND timestamp >= %d AND timestamp < %d", db, at, at+3600)
			gone := clickhouseQuery(t, "SELECT hex(argMin(event_id, user_id)) "+of)
			clickhouseQuery(t, fmt.Sprintf("INSERT INTO %s.events (event_id, event_name, channel, user_id, timestamp) SELECT SHA256('exchange%d'), 'a', 'web', max(user_id), max(timestamp) %s", db, random.Int(), of))
			clickhouseQuery(t, fmt.Sprintf("ALTER TABLE %s.events DELETE WHERE event_id = unhex('%s') SETTINGS mutations_sync = 2", db, gone))
			recount(at, at+1)
		},
		"a reconcile": func() {
			if out, code := subcommand(t, env, fmt.Sprintf("reconcile -from %d -to %d", begin, now-60)); code != 0 {
				t.Fatal(code, out)
			}
		},
		"a recount": func() {
			at := begin + random.Int64N(now-begin)
			recount(at, at+2*3600)
		},
		"a retention": func() {
			begin += 3600 * random.Int64N(6)
			clickhouseQuery(t, fmt.Sprintf("ALTER TABLE %s.events DELETE WHERE timestamp < %d SETTINGS mutations_sync = 2", db, begin/3600*3600))
			clickhouseQuery(t, fmt.Sprintf("ALTER TABLE %s.events_hourly DELETE WHERE hour < %d SETTINGS mutations_sync = 2", db, begin/3600*3600))
		},
		"nothing": func() {},
	}
	names := make([]string, 0, len(changes))
	for name := range changes {
		names = append(names, name)
	}
	slices.Sort(names)
	ranges := [][2]int64{{begin - daySeconds, now}, {begin + 12345, now}, {begin + 3*3600, now - daySeconds}, {begin + 86400, now - 3600}, {now - 7200, now}, {now - 2*daySeconds - 17, now - 5}}
	for round := range testkit.MoreInTorture(18, 60) {
		clickhouseQuery(t, "SYSTEM START MERGES "+db+".events_hourly") // or nothing can be deleted
		change := names[random.IntN(len(names))]
		if round < len(names) {
			change = names[round]
		}
		changes[change]()
		if round%2 == 0 {
			clickhouseQuery(t, "SYSTEM STOP MERGES "+db+".events_hourly")
		} else {
			clickhouseQuery(t, "OPTIMIZE TABLE "+db+".events_hourly FINAL") // with the projection
		}
		for range 12 {
			r := ranges[random.IntN(len(ranges))]
			q := keptQuestion{name: []string{"a", "b", ""}[random.IntN(3)], channel: []string{"", "web"}[random.IntN(2)], zone: []string{"UTC", "Europe/Istanbul"}[random.IntN(2)],
				by: []string{"", "channel", "hour", "day", "month"}[random.IntN(5)], from: r[0] + random.Int64N(3), to: r[1] - random.Int64N(3)}
			if got, want := q.ask(p), q.count(t, db); got != want {
				t.Fatalf("round %d, after %s: %+v\ngot\n%s\nwant\n%s", round, change, q, got, want)
			}
		}
	}
}

// keptQuestion is one for metrics, or for the overview when it has no name.
type keptQuestion struct {
	name, channel, zone, by string
	from, to                int64
}

// ask returns the total, and the groups in order.
func (q *keptQuestion) ask(p *program) string {
	p.t.Helper()
	parameters := []string{"from", fmt.Sprint(q.from), "to", fmt.Sprint(q.to), "tz", q.zone}
	if q.channel != "" {
		parameters = append(parameters, "channel", q.channel)
	}
	path := "/api/v1/overview"
	if q.name != "" {
		path = "/api/v1/metrics"
		parameters = append(parameters, "event_name", q.name, "group_by", q.by)
	} else if q.by = "hour"; q.to-q.from > 3*daySeconds {
		q.by = "day"
	}
	a := p.question(path, parameters...)
	var lines []string
	for _, g := range append(a.Groups, a.Series...) {
		lines = append(lines, fmt.Sprint("=", g.Key, "\t", g.Total, "\t", *g.Users))
	}
	slices.Sort(lines)
	return strings.Join(append([]string{fmt.Sprint("total\t", a.Total, "\t", a.Users)}, lines...), "\n")
}

// count counts with ClickHouse's own calendar, from whole hours and the seconds at the ends.
func (q *keptQuestion) count(t *testing.T, db string) string {
	t.Helper()
	inZone := "toTimeZone(hour, '" + q.zone + "')"
	offset := map[string]string{"UTC": "Z", "Europe/Istanbul": "+03:00"}[q.zone]
	key := map[string]string{"": "''", "channel": "CAST(channel, 'String')", "hour": inZone, "day": "toStartOfDay(" + inZone + ")", "month": "toStartOfMonth(" + inZone + ")"}[q.by]
	if q.by == "hour" || q.by == "day" || q.by == "month" {
		key = "formatDateTime(" + key + ", '%Y-%m-%dT%H:00:00" + offset + "')"
	}
	where := "1"
	if q.name != "" {
		where += " AND event_name = '" + q.name + "'"
	}
	if q.channel != "" {
		where += " AND channel = '" + q.channel + "'"
	}
	from := fmt.Sprintf(" FROM %s.events_between(from = %d, to = %d) WHERE %s", db, q.from, q.to, where)
	const figures = "sum(event_count) AS n, uniqCombined64Merge(17)(unique_users_state)"
	all := "total\t" + clickhouseQuery(t, "SELECT "+figures+from)
	if q.by == "" {
		return all
	}
	lines := strings.Split(clickhouseQuery(t, "SELECT concat('=', "+key+") AS key, "+figures+from+" GROUP BY key HAVING n != 0"), "\n")
	lines = slices.DeleteFunc(lines, func(line string) bool { return line == "" })
	slices.Sort(lines)
	return strings.Join(append([]string{all}, lines...), "\n")
}
