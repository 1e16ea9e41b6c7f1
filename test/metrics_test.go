// What is asked of the events: each answer against a count of the test's own.

package test

import (
	"encoding/json"
	"fmt"
	"math"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/event-ingestion/event-ingestion/load"
)

// TestMetrics compares the endpoint with an independent count over ranges that cut hours at either end.
func TestMetrics(t *testing.T) {
	t.Parallel()
	p := startProgram(t, newSpace(t))
	type sent struct {
		user, channel, campaign string
		at                      int64
	}
	base := (time.Now().Unix()/86400 - 3) * 86400 // midnight, three days ago
	var all []sent
	var body []byte
	for i := range int64(1000) {
		e := sent{fmt.Sprintf("u%d", i*7%90), []string{"web", "mobile_app", "api", ""}[i%4], fmt.Sprintf("c%d", i%3), base + i*173}
		all = append(all, e)
		body = fmt.Appendf(body, `{"event_name":"m","user_id":%q,"channel":%q,"campaign_id":%q,"timestamp":%d}`+"\n", e.user, e.channel, e.campaign, e.at)
	}
	if status, _, answer := p.do("POST", bulkPath, ndjson, "", body); status != 202 {
		t.Fatal(status, answer)
	}
	p.await("stored", 10*time.Second, func() bool {
		_, _, answer := p.do("GET", fmt.Sprintf("%sevent_name=m&from=%d&to=%d", metricsPath, base, base+3*86400), "", "", nil)
		return strings.Contains(answer, `"total_count":1000,`)
	})
	keys := map[string]func(sent) string{
		"":         func(sent) string { return "" },
		"channel":  func(e sent) string { return e.channel },
		"campaign": func(e sent) string { return e.campaign },
		"hour":     func(e sent) string { return time.Unix(e.at, 0).UTC().Format("2006-01-02T15:00:00Z") },
		"day":      func(e sent) string { return time.Unix(e.at, 0).UTC().Format("2006-01-02T00:00:00Z") },
	}
	for _, r := range [][2]int64{
		{base, base + 3*86400}, {base, base + 1}, {base, base + 3599}, {base, base + 3600}, {base - 1, base + 3600}, {base + 1, base + 3599},
		{base + 173, base + 346}, {base + 174, base + 345}, {base + 1800, base + 1801}, {base + 1800, base + 5400}, {base + 3599, base + 7200}, {base + 1000, base + 100000}, {1, time.Now().Unix() + 1e6},
	} {
		for groupBy, key := range keys {
			for _, channel := range []string{"", "web"} {
				count, users, groups := int64(0), map[string]bool{}, map[string]int64{}
				for _, e := range all {
					if e.at >= r[0] && e.at <= r[1] && (channel == "" || channel == e.channel) {
						count++
						users[e.user] = true
						groups[key(e)]++
					}
				}
				path := fmt.Sprintf("%sevent_name=m&from=%d&to=%d&channel=%s&group_by=%s", metricsPath, r[0], r[1], channel, groupBy)
				_, _, answer := p.do("GET", path, "", "", nil)
				var a load.MetricsAnswer
				if err := json.Unmarshal([]byte(answer), &a); err != nil {
					t.Fatal(err, answer)
				}
				if a.Total != count || a.Users != int64(len(users)) {
					t.Errorf("%s: got %d events %d users, want %d, %d", path, a.Total, a.Users, count, len(users))
				}
				if groupBy != "" {
					got := map[string]int64{}
					for _, g := range a.Groups {
						got[g.Key] = g.Total
					}
					if fmt.Sprint(got) != fmt.Sprint(groups) {
						t.Errorf("%s: groups %v, want %v", path, got, groups)
					}
				}
			}
		}
	}
	drained(p) // complete_through has to get to now while nothing is sent
}

// TestNothingAfterTo: events of this very moment and around it, asked for up to each of these seconds, of everything that
// answers, with merges stopped. What is from after `to` is in no answer, and everything else is in each.
func TestNothingAfterTo(t *testing.T) {
	t.Parallel()
	env := newSpace(t)
	p := startProgram(t, env)
	db := space(env, "CLICKHOUSE_DATABASE")
	clickhouseQuery(t, "SYSTEM STOP MERGES "+db+".events")
	clickhouseQuery(t, "SYSTEM STOP MERGES "+db+".events_hourly")
	newest := time.Now().Unix()
	hour := newest / hourSeconds * hourSeconds
	var times []int64 // each with a user of its own
	for i := range int64(10) {
		times = append(times, newest-i, hour-1-i, hour+i*(newest-hour)/10, newest-3*daySeconds+i*daySeconds/3)
	}
	seen := map[int64]bool{}
	for i, at := range times { // several inserts, so that there are several rows an hour
		if seen[at] = true; i%7 != 0 && i != len(times)-1 {
			continue
		}
		var body []byte
		for at := range seen {
			body = fmt.Appendf(body, `{"event_name":"n","user_id":"u%d","timestamp":%d,"channel":"web"}`+"\n", at, at)
		}
		if status, _, answer := p.do("POST", bulkPath, ndjson, "", body); status != http.StatusAccepted {
			t.Fatal(status, answer)
		}
	}
	drained(p)
	if got := clickhouseQuery(t, fmt.Sprintf("SELECT count(), uniqExact(event_id), (SELECT sum(event_count) FROM %[1]s.events_between(from = 0, to = 4000000000)) FROM %[1]s.events_all", db)); got != fmt.Sprintf("%d\t%d\t%d", len(seen), len(seen), len(seen)) {
		t.Fatalf("%s, want %d of each", got, len(seen))
	}
	ends := []int64{newest + 1, newest, newest - 1, newest - 3, hour + 1, hour, hour - 1, hour - 2, newest - daySeconds, newest - 2*daySeconds - 5*hourSeconds}
	for i, from := range []int64{newest - 4*daySeconds, hour - 1, hour - hourSeconds, hour, newest - 40} {
		for _, to := range ends {
			if to <= from {
				continue
			}
			want := 0
			for at := range seen {
				if at >= from && at <= to {
					want++
				}
			}
			groupings := []string{"", "hour", "channel", "day", "campaign"}
			if i > 1 { // the others are asked like the total
				groupings = groupings[:2]
			}
			for _, groupBy := range groupings {
				path := fmt.Sprintf("%sevent_name=n&from=%d&to=%d&group_by=%s", metricsPath, from, to, groupBy)
				if _, _, answer := p.do("GET", path, "", "", nil); !strings.HasPrefix(answer, fmt.Sprintf(`{"total_count":%d,"unique_users":%d,`, want, want)) {
					t.Errorf("%s: %s, want %d", path, answer, want)
				}
			}
			path := fmt.Sprintf("/api/v1/overview?from=%d&to=%d", from, to)
			if _, _, answer := p.do("GET", path, "", "", nil); !strings.Contains(answer, fmt.Sprintf(`"total_count":%d,"unique_users":%d,`, want, want)) {
				t.Errorf("%s: %s, want %d", path, answer, want)
			}
			for _, view := range []string{"events_between", "events_between_by_day"} {
				sql := fmt.Sprintf("SELECT sum(event_count), uniqCombined64Merge(17)(unique_users_state) FROM %s.%s(from = %d, to = %d)", db, view, from, to)
				if got := clickhouseQuery(t, sql); got != fmt.Sprintf("%d\t%d", want, want) {
					t.Errorf("%s: %s, want %d", sql, got, want)
				}
			}
		}
	}
}

// maxCampaigns is how many campaigns an answer has at most.
const maxCampaigns = 1000

// TestManyCampaigns: of more than the largest 1,000 the rest is left out, and the answer says so.
func TestManyCampaigns(t *testing.T) {
	t.Parallel()
	env := newSpace(t)
	p := startProgram(t, env)
	insert := func(from, n int) { // campaign c0 once, c1 twice and so on to c9
		clickhouseQuery(t, fmt.Sprintf("INSERT INTO %s.events (event_id, event_name, campaign_id, user_id, timestamp) "+
			"SELECT SHA256(concat(toString(number), 'x', toString(k))), 'n', concat('c', toString(number)), toString(k), toDateTime(%d) FROM numbers(%d, %d) ARRAY JOIN range(if(number < 10, number + 1, 1)) AS k",
			space(env, "CLICKHOUSE_DATABASE"), time.Now().Unix()-60, from, n))
	}
	ask := func() (a load.MetricsAnswer, truncated bool) {
		_, _, answer := p.do("GET", fmt.Sprintf("%sevent_name=n&from=1&to=%d&group_by=campaign", metricsPath, time.Now().Unix()), "", "", nil)
		if err := json.Unmarshal([]byte(answer), &a); err != nil {
			t.Fatal(err, answer)
		}
		return a, strings.Contains(answer, `"truncated":true`)
	}
	insert(0, maxCampaigns)
	if a, truncated := ask(); a.Total != maxCampaigns+45 || len(a.Groups) != maxCampaigns || truncated || a.Groups[0].Key != "c9" || a.Groups[0].Total != 10 {
		t.Errorf("of %d events %d campaigns, the first %+v; truncated %v", a.Total, len(a.Groups), a.Groups[0], truncated)
	}
	insert(maxCampaigns, 500)
	if a, truncated := ask(); a.Total != maxCampaigns+545 || len(a.Groups) != maxCampaigns || !truncated || a.Groups[0].Key != "c9" {
		t.Errorf("of %d events %d campaigns, the first %+v; truncated %v", a.Total, len(a.Groups), a.Groups[0], truncated)
	}
}

// TestQueryParameters: what is unknown, malformed or there twice is said, all at once, by both endpoints.
func TestQueryParameters(t *testing.T) {
	t.Parallel()
	p := startProgram(t, newSpace(t))
	malformed := func(path string) (fields []string, answer string) {
		status, _, answer := p.do("GET", path, "", "", nil)
		var a struct {
			Errors []struct{ Field, Code string }
		}
		if err := json.Unmarshal([]byte(answer), &a); err != nil || (status == 200) != (len(a.Errors) == 0) || status != 200 && status != 400 {
			t.Errorf("%s: %d %s", path, status, answer)
		}
		for _, problem := range a.Errors {
			if problem.Code == "validation.invalid-format.error" {
				fields = append(fields, problem.Field)
			}
		}
		return fields, answer
	}
	for query, want := range map[string]string{
		"channel=web;x":           "query",
		"%zz=1":                   "query",
		"from=%":                  "query",
		"groupby=hour":            "groupby",
		"b=1&a=2":                 "a b",
		"channel=web&channel=api": "channel",
		"key=1":                   "key",
		"":                        "",
		"channel=":                "",
		"from=1&to=2&channel=web": "",
	} {
		if got, answer := malformed("/api/v1/overview?" + query); strings.Join(got, " ") != want {
			t.Errorf("overview?%s: %s, want %s", query, answer, want)
		}
		if bad, answer := malformed(metricsPath + "event_name=x&from=1&to=2&" + query); len(bad) > 0 != (want != "" || strings.HasPrefix(query, "from=1")) {
			t.Errorf("metrics?%s: %s", query, answer)
		}
	}
}

// TestMetricsOddNames: a name that means something to SQL, TSV or a URL is a name like any other.
func TestMetricsOddNames(t *testing.T) {
	t.Parallel()
	p := startProgram(t, newSpace(t))
	names := []string{`it's`, `'`, `\`, `\'`, `a\b`, `\n`, `|\|`, `x|y`, `{event_name:String}`, `') OR 1=1 --`, `%27`, `a b+c&d=e`, `"quoted"`, "ünïcode 😀", `\N`, `\0`, `\ud800`}
	for _, name := range names {
		body, _ := json.Marshal(map[string]any{"event_name": name, "user_id": "u'\\", "timestamp": time.Now().Unix(), "campaign_id": name})
		if status, _, answer := p.do("POST", onePath, jsonCT, "", body); status != http.StatusAccepted {
			t.Fatal(status, answer)
		}
	}
	drained(p)
	ask := func(name string) (a load.MetricsAnswer) {
		path := fmt.Sprintf("%sevent_name=%s&from=1&to=%d&group_by=campaign", metricsPath, url.QueryEscape(name), time.Now().Unix())
		status, _, answer := p.do("GET", path, "", "", nil)
		if err := json.Unmarshal([]byte(answer), &a); err != nil || status != http.StatusOK {
			t.Errorf("%q: %d %s", name, status, answer)
		}
		return a
	}
	for _, name := range names {
		if a := ask(name); a.Total != 1 || len(a.Groups) != 1 || a.Groups[0].Key != name {
			t.Errorf("%q: %+v", name, a)
		}
	}
	for _, name := range []string{"\n", "a\tb", "x\x00y", "\r\b\f"} { // cannot be stored, may be asked
		if a := ask(name); a.Total != 0 {
			t.Errorf("%q: %+v", name, a)
		}
	}
}

func TestOverview(t *testing.T) {
	t.Parallel()
	p := startProgram(t, newSpace(t))
	type sent struct {
		name, user, channel, campaign, currency string
		at                                      int64
		price                                   float64
	}
	now := time.Now().Unix()
	base := (now/daySeconds - 9) * daySeconds // 900 events reach 7.2 days further: none is of the last 24 hours, at any hour
	var all []sent
	var body []byte
	for i := range int64(900) {
		e := sent{[]string{"view", "purchase", "cart"}[i%3], fmt.Sprint("u", i*7%83), []string{"", "web", "api"}[i/3%3], fmt.Sprint("c", i%13), []string{"TRY", "", "USD"}[i/9%3], base + i*691, float64(i) + 0.25}
		if e.campaign == "c0" {
			e.campaign = ""
		}
		all = append(all, e)
		body = fmt.Appendf(body, `{"event_name":%q,"user_id":%q,"channel":%q,"campaign_id":%q,"timestamp":%d,"metadata":{"price":%v,"currency":%q}}`+"\n", e.name, e.user, e.channel, e.campaign, e.at, e.price, e.currency)
	}
	for range 2 { // the second time they are duplicates
		if status, _, answer := p.do("POST", bulkPath, ndjson, "", body); status != 202 {
			t.Fatal(status, answer)
		}
	}
	drained(p)
	for _, r := range [][2]int64{{base, base + 9*daySeconds}, {base + 3600, base + 3600 + 3599}, {base + 100, base + 200000}, {base + 7200, base + 10799}, {base + 691, base + 1383}, {base + 1, base + 2}, {base - 50, base + 100000}} {
		for _, filter := range []struct{ channel, name string }{{"", ""}, {"web", ""}, {"", "purchase"}, {"api", "view"}} {
			var total sum
			groups := map[string]map[string]*sum{"channels": {}, "event_names": {}, "campaigns": {}, "series": {}}
			bucket, width := "hour", time.Hour
			if r[1]-r[0] > 3*daySeconds {
				bucket, width = "day", 24*time.Hour
			} else if r[1]-r[0] < 3600 {
				bucket, width = "minute", time.Minute
			}
			campaigns := map[string]bool{}
			for _, e := range all {
				if e.at < r[0] || e.at > r[1] || filter.channel != "" && e.channel != filter.channel || filter.name != "" && e.name != filter.name {
					continue
				}
				revenue, at := 0.0, time.Unix(e.at, 0).UTC().Truncate(width)
				if e.name == "purchase" && e.currency != "USD" {
					revenue = e.price
				}
				total.add(e.user, revenue)
				keys := map[string]string{"channels": e.channel, "event_names": e.name, "series": at.Format(time.RFC3339)}
				if e.campaign != "" {
					keys["campaigns"] = e.campaign
					campaigns[e.campaign] = true
				}
				for kind, key := range keys {
					if groups[kind][key] == nil {
						groups[kind][key] = new(sum)
					}
					groups[kind][key].add(e.user, revenue)
				}
			}
			path := fmt.Sprintf("/api/v1/overview?from=%d&to=%d&channel=%s&event_name=%s", r[0], r[1], filter.channel, filter.name)
			status, _, answer := p.do("GET", path, "", "", nil)
			var a map[string]any
			if err := json.Unmarshal([]byte(answer), &a); err != nil || status != 200 {
				t.Fatal(status, answer)
			}
			if a["total_count"] != float64(total.count) || a["unique_users"] != float64(len(total.users)) || math.Abs(a["revenue"].(float64)-total.revenue) > 0.001 ||
				a["active_campaigns"] != float64(len(campaigns)) || a["bucket"] != bucket {
				t.Errorf("%s: %s; want %d events, %d users, revenue %v, %d campaigns", path, answer, total.count, len(total.users), total.revenue, len(campaigns))
			}
			for kind, want := range groups {
				list := a[kind].([]any)
				if len(list) != min(len(want), 10) && kind != "series" || kind == "series" && len(list) != len(want) {
					t.Errorf("%s: %d %s, want %d", path, len(list), kind, len(want))
				}
				for _, g := range list {
					g := g.(map[string]any)
					w := want[g["key"].(string)]
					if w == nil || g["total_count"] != float64(w.count) || kind == "series" && bucket != "minute" && g["unique_users"] != float64(len(w.users)) || kind != "campaigns" && math.Abs(g["revenue"].(float64)-w.revenue) > 0.001 {
						t.Errorf("%s: %s %v, want %+v", path, kind, g, w)
					}
				}
			}
		}
	}
	for query, want := range map[string]string{"from=x": "validation.invalid-format.error", "from=5&to=5": "validation.invalid-range.error", "channel=tv": "validation.invalid-channel.error", "to=1795441976000": "validation.invalid-format.error", "from=1&from=2": "validation.invalid-format.error", "from=": "validation.required.error"} {
		if status, _, answer := p.do("GET", "/api/v1/overview?"+query, "", "", nil); status != 400 || !strings.Contains(answer, want) {
			t.Errorf("%s: %d %s", query, status, answer)
		}
	}
	for _, query := range []string{"from=-300&to=-50", "from=-9223372036854775808&to=0", "from=-1&to=99999999999", "to=-1", "from=0&to=4294967296"} {
		if status, _, answer := p.do("GET", "/api/v1/overview?"+query, "", "", nil); status != 200 {
			t.Errorf("%s: %d %s", query, status, answer)
		}
	}
	if status, _, answer := p.do("GET", "/api/v1/overview", "", "", nil); status != 200 || !strings.Contains(answer, `"total_count":0,`) {
		t.Errorf("of the last day: %d %s", status, answer)
	}
}

// TestLargeRevenue: prices as large as they can be stored, of which nine are more than 64 bits hold.
func TestLargeRevenue(t *testing.T) {
	t.Parallel()
	env := newSpace(t)
	p := startProgram(t, env)
	clickhouseQuery(t, fmt.Sprintf("INSERT INTO %s.events (event_id, event_name, timestamp, price) SELECT SHA256(toString(number)), 'purchase', toDateTime(%d), toDecimal64('99999999999999.9999', 4) FROM numbers(30)", space(env, "CLICKHOUSE_DATABASE"), time.Now().Unix()-60))
	if status, _, answer := p.do("GET", "/api/v1/overview", "", "", nil); status != 200 || !json.Valid([]byte(answer)) || strings.Count(answer, `"revenue":2999999999999999.997`) != 4 {
		t.Errorf("%d %s", status, answer)
	}
}

// sum is an independent count.
type sum struct {
	count   int
	users   map[string]bool
	revenue float64
}

func (s *sum) add(user string, revenue float64) {
	if s.users == nil {
		s.users = map[string]bool{}
	}
	s.count++
	s.users[user] = true
	s.revenue += revenue
}
