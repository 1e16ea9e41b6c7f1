// Questions in the asker's time zone and by what an event says: each answer against a count of the test's own.

package test

import (
	"encoding/json"
	"fmt"
	"maps"
	"math/big"
	"net/http"
	"net/url"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
)

// answered is an answer of metrics or overview.
type answered struct {
	Total     int64       `json:"total_count"`
	Users     int64       `json:"unique_users"`
	Sum       json.Number `json:"sum"`
	Groups    []groupOf   `json:"grouped_data"`
	Series    []groupOf   `json:"series"`
	Truncated bool        `json:"truncated"`
}

type groupOf struct {
	Key   string      `json:"key"`
	Total int64       `json:"total_count"`
	Users *int64      `json:"unique_users"`
	Sum   json.Number `json:"sum"`
}

// question asks for an answer; parameters are names and values, in turns.
func (p *program) question(path string, parameters ...string) (a answered) {
	p.t.Helper()
	values := url.Values{}
	for i := 0; i < len(parameters); i += 2 {
		values.Set(parameters[i], parameters[i+1])
	}
	var status int
	var answer string
	p.await("answered", time.Minute, func() bool { // where many tests share a machine a question may take longer than it may
		status, _, answer = p.ask("GET", path+"?"+values.Encode(), nil)
		return status != http.StatusServiceUnavailable
	})
	if err := json.Unmarshal([]byte(answer), &a); err != nil || status != 200 {
		p.t.Fatalf("%s?%s: %d %s", path, values.Encode(), status, answer)
	}
	return a
}

// firstSecond is the first second that has the same text in a zone's clocks, looked for in steps that divide every offset.
func firstSecond(at int64, loc *time.Location, layout string) time.Time {
	t := time.Unix(at/900*900, 0).In(loc)
	for want := t.Format(layout); t.Add(-900*time.Second).Format(layout) == want; {
		t = t.Add(-900 * time.Second)
	}
	return t
}

// TestTimeZones: hours, days and months of zones, on days when clocks change and on others.
func TestTimeZones(t *testing.T) {
	t.Parallel()
	env := newSpace(t)
	p := startProgram(t, env)
	type row struct {
		at   int64
		user string
	}
	var rows []row
	at := func(text string) int64 {
		t, err := time.Parse(time.RFC3339, text)
		if err != nil {
			panic(err)
		}
		return t.Unix()
	}
	changes := map[string][]int64{ // the zones, and moments around which all are asked
		"America/New_York":    {at("2026-03-08T07:00:00Z"), at("2025-11-02T06:00:00Z")},
		"Australia/Lord_Howe": {at("2026-04-04T15:00:00Z"), at("2025-10-04T15:30:00Z")},
		"Africa/Cairo":        {at("2026-04-23T22:00:00Z"), at("2025-10-30T21:00:00Z")}, // at midnight
		"Europe/Istanbul":     {at("2026-02-28T21:00:00Z")},
		"Asia/Kolkata":        nil, "Asia/Kathmandu": nil, "America/St_Johns": nil, "Europe/London": nil, "Pacific/Apia": nil, "UTC": nil, "": nil,
	}
	for _, moments := range changes {
		for _, moment := range moments {
			for s := moment - 40*hourSeconds; s < moment+40*hourSeconds; s += 613 {
				rows = append(rows, row{s, fmt.Sprint("u", s%89)})
			}
			rows = append(rows, row{moment, "x"}, row{moment - 1, "y"})
		}
	}
	slices.SortFunc(rows, func(a, b row) int { return int(a.at - b.at) })
	rows = slices.CompactFunc(rows, func(a, b row) bool { return a.at == b.at })
	var values []string
	for _, r := range rows {
		values = append(values, fmt.Sprintf("(SHA256('%d'), 'z', '%s', %d)", r.at, r.user, r.at))
	}
	clickhouseQuery(t, "INSERT INTO "+space(env, "CLICKHOUSE_DATABASE")+".events (event_id, event_name, user_id, timestamp) VALUES "+strings.Join(values, ","))

	check := func(zone string, from, to int64, unit string) {
		t.Helper()
		loc, err := time.LoadLocation(zone)
		if err != nil {
			t.Fatal(err)
		}
		known := map[string]string{}
		keyOf := func(at int64) string {
			local := time.Unix(at, 0).In(loc)
			layout := map[string]string{"minute": "2006-01-02T15:04:00Z07:00", "hour": "2006-01-02T15:00:00Z07:00", "day": "2006-01-02", "month": "2006-01"}[unit]
			text := local.Format(layout)
			if unit == "minute" || unit == "hour" {
				return text
			}
			if known[text] == "" {
				known[text] = firstSecond(at, loc, layout).Format(time.RFC3339)
			}
			return known[text]
		}
		var keys []string
		counts, users, all := map[string]int64{}, map[string]map[string]bool{}, map[string]bool{}
		for _, r := range rows {
			if r.at < from || r.at > to {
				continue
			}
			key := keyOf(r.at)
			if counts[key]++; users[key] == nil {
				users[key] = map[string]bool{}
				keys = append(keys, key)
			}
			users[key][r.user], all[r.user] = true, true
		}
		compare := func(path string, got []groupOf, withUsers bool) {
			t.Helper()
			var gotKeys []string
			for _, g := range got {
				gotKeys = append(gotKeys, g.Key)
				if g.Total != counts[g.Key] || withUsers && *g.Users != int64(len(users[g.Key])) {
					t.Errorf("%s %s %d to %d by %s: %s has %d events, want %d of %d users", path, zone, from, to, unit, g.Key, g.Total, counts[g.Key], len(users[g.Key]))
				}
			}
			if !slices.Equal(gotKeys, keys) {
				t.Errorf("%s %s %d to %d by %s: keys\n%q, want\n%q", path, zone, from, to, unit, gotKeys, keys)
			}
		}
		if unit != "minute" {
			a := p.question("/api/v1/metrics", "event_name", "z", "from", fmt.Sprint(from), "to", fmt.Sprint(to), "tz", zone, "group_by", unit)
			compare("metrics", a.Groups, true)
			if a.Users != int64(len(all)) {
				t.Errorf("%s: %d users, want %d", zone, a.Users, len(all))
			}
		}
		if bucket := map[bool]string{true: "hour", false: "day"}[to-from <= 3*daySeconds]; to-from < hourSeconds && unit == "minute" || to-from >= hourSeconds && unit == bucket {
			compare("overview", p.question("/api/v1/overview", "from", fmt.Sprint(from), "to", fmt.Sprint(to), "tz", zone).Series, unit != "minute")
		}
	}
	for zone, own := range changes {
		for _, moment := range append(slices.Clone(own), changes["Europe/Istanbul"]...) {
			check(zone, moment-40*hourSeconds, moment+40*hourSeconds, "day")
			check(zone, moment-20*hourSeconds-7, moment+20*hourSeconds+11, "hour")
			check(zone, moment-1700, moment+1700, "minute")
		}
		check(zone, rows[0].at+1234, rows[len(rows)-1].at-54321, "month")
	}
	check("America/New_York", 0, 1<<32-1, "hour")
	check("Australia/Lord_Howe", 0, 1<<32-1, "day")
	for _, zone := range []string{"Local", "Europe/Nowhere", "../etc/passwd", "/etc/localtime", "europe/ISTANBUL'", "\xff", "UTC'", "Europe"} {
		for _, path := range []string{"/api/v1/metrics?event_name=z&from=1&to=2&group_by=day&", "/api/v1/overview?"} {
			if status, _, answer := p.ask("GET", path+"tz="+url.QueryEscape(zone), nil); status != 400 || !strings.Contains(answer, `"field":"tz","code":"validation.invalid-format.error"`) {
				t.Errorf("%q: %d %s", zone, status, answer)
			}
		}
	}
}

// told is an event with metadata, and what the test knows of it: the texts of some members, and the price if it is a number.
type told struct {
	metadata, channel, campaign, user string
	tags                              []string
	texts                             map[string]string
	price                             string
	at                                int64
}

// tellTales are events of every odd shape.
func tellTales() []told {
	long := strings.Repeat("é", 700)
	return []told{
		{metadata: `{"ref":"google","price":1.1,"page":{"path":"/a"}}`, texts: map[string]string{"ref": "google", "price": "1.1", "page.path": "/a", "page": `{"path":"/a"}`}, price: "1.1", tags: []string{"new", "red", "new"}},
		{metadata: `{"ref":"google","price":2.2,"page":{"path":"/b"}}`, texts: map[string]string{"ref": "google", "price": "2.2", "page.path": "/b", "page": `{"path":"/b"}`}, price: "2.2", tags: []string{"red"}, user: "u7"},
		{metadata: `{"ref":"bing","price":"3.3"}`, texts: map[string]string{"ref": "bing", "price": "3.3"}, channel: "web"},
		{metadata: `{"ref":42,"price":-0.30000000000000004}`, texts: map[string]string{"ref": "42", "price": "-0.30000000000000004"}, price: "-0.30000000000000004"},
		{metadata: `{"ref":"42","price":12345678901234567890.123456789}`, texts: map[string]string{"ref": "42", "price": "12345678901234567890.123456789"}, price: "12345678901234567890.123456789"},
		{metadata: `{"ref":true,"price":1e3}`, texts: map[string]string{"ref": "true", "price": "1000"}, price: "1000", campaign: "c1"},
		{metadata: `{"ref":null,"price":null}`},
		{metadata: `{"price":{"amount":5},"page":"/a"}`, texts: map[string]string{"price": `{"amount":5}`, "page": "/a"}},
		{metadata: `{"a.b":"dotted","a":{"b":"nested"},"Ref":"other case"}`, texts: map[string]string{"a.b": "nested", `a\.b`: "dotted"}},
		{metadata: `{"ref":"' OR 1=1 --","back\\slash":"\\","quote'\"":"\u0000\n\t"}`, texts: map[string]string{"ref": "' OR 1=1 --", `back\\slash`: `\`, `quote'"`: "\x00\n\t"}},
		{metadata: `{"ref":"{event_name:String}","deep":` + strings.Repeat(`{"d":`, 200) + `1` + strings.Repeat(`}`, 200) + `}`, texts: map[string]string{"ref": "{event_name:String}"}},
		{metadata: `{"huge":1e999,"ref":"beside a huge number","price":0.5,"n":[1,"2",3]}`, texts: map[string]string{"ref": "beside a huge number", "price": "0.5", "huge": "1e999", "n": `[1,"2",3]`}, price: "0.5"},
		{metadata: `{"big":123456789012345678901234567890,"ref":",\"ref\":12"}`, texts: map[string]string{"ref": `,"ref":12`, "big": "123456789012345678901234567890"}},
		{metadata: `{"ref":"` + long + `"}`, texts: map[string]string{"ref": long[:1000]}},
		{metadata: `{"ref":"` + long + `x"}`, texts: map[string]string{"ref": long[:1000]}},
		{metadata: `{}`}, {metadata: ``, campaign: "c1", tags: []string{"", "it's"}},
	}
}

// TestByProperty: groups, filters and sums by members of metadata, tags, campaigns and users; the same answers with columns of
// their own for some members, for rows from before and after.
func TestByProperty(t *testing.T) {
	t.Parallel()
	env := newSpace(t)
	var all []told
	now := time.Now().Unix()
	base := now - 10000
	send := func(p *program) {
		var body []byte
		for i, e := range tellTales() {
			if e.user == "" {
				e.user = fmt.Sprint("u", i%5)
			}
			e.at = base + int64(len(all))
			more := ""
			if e.metadata != "" {
				more = `,"metadata":` + e.metadata
			}
			tags, _ := json.Marshal(e.tags)
			body = fmt.Appendf(body, `{"event_name":"p","user_id":%q,"timestamp":%d,"channel":%q,"campaign_id":%q,"tags":%s%s}`+"\n",
				e.user, e.at, e.channel, e.campaign, tags, more)
			all = append(all, e)
		}
		if status, _, answer := p.do("POST", bulkPath, ndjson, "", body); status != 202 {
			t.Fatal(status, answer)
		}
		drained(p)
	}
	asked := 0
	check := func(p *program, groupBy, sum string, filters ...string) {
		t.Helper()
		text := func(e told, of string) string { return e.texts[strings.TrimPrefix(of, "metadata.")] }
		counts, users, sums := map[string]int64{}, map[string]map[string]bool{}, map[string]*big.Rat{}
		add := func(key string, e told) {
			if counts[key]++; users[key] == nil {
				users[key], sums[key] = map[string]bool{}, new(big.Rat)
			}
			users[key][e.user] = true
			if price, is := new(big.Rat).SetString(e.price); is {
				sums[key].Add(sums[key], price)
			}
		}
		const totally = "\x00 total"
		for _, e := range all {
			is := true
			for i := 0; i < len(filters); i += 2 {
				switch value := filters[i+1]; filters[i] {
				case "tag":
					is = is && slices.Contains(e.tags, value)
				case "campaign_id":
					is = is && e.campaign == value
				case "user_id":
					is = is && e.user == value
				case "channel":
					is = is && e.channel == value
				default:
					is = is && text(e, filters[i]) == value
				}
			}
			if !is {
				continue
			}
			add(totally, e)
			keys := map[string]bool{}
			switch groupBy {
			case "":
			case "tag":
				for _, tag := range e.tags {
					keys[tag] = true
				}
				if len(e.tags) == 0 {
					keys[""] = true
				}
			case "campaign":
				keys[e.campaign] = true
			case "channel":
				keys[e.channel] = true
			case "month":
				keys[time.Unix(e.at, 0).UTC().Format("2006-01")+"-01T00:00:00Z"] = true
			default:
				keys[text(e, groupBy)] = true
			}
			for key := range keys {
				add(key, e)
			}
		}
		parameters := append([]string{"event_name", "p", "from", fmt.Sprint(base - 1), "to", fmt.Sprint(now), "group_by", groupBy}, filters...)
		if sum != "" {
			parameters = append(parameters, "sum", sum)
		}
		a := p.question("/api/v1/metrics", parameters...)
		got := append(a.Groups, groupOf{totally, a.Total, &a.Users, a.Sum})
		seen := map[string]bool{}
		for _, g := range got {
			seen[g.Key] = true
			want, is := new(big.Rat), false
			if sum != "" {
				_, is = want.SetString(string(g.Sum))
			}
			if users[g.Key] == nil && g.Key == totally {
				users[g.Key], sums[g.Key] = map[string]bool{}, new(big.Rat)
			}
			if g.Total != counts[g.Key] || *g.Users != int64(len(users[g.Key])) || is != (sum != "") || is && want.Cmp(sums[g.Key]) != 0 {
				t.Errorf("%q: %q has %d events, %d users, sum %q; want %d, %d, %v", parameters, g.Key, g.Total, *g.Users, g.Sum, counts[g.Key], len(users[g.Key]), sums[g.Key])
			}
		}
		for key := range counts {
			if !seen[key] {
				t.Errorf("%q: no group %q; it has %q", parameters, key, slices.Sorted(maps.Keys(seen)))
			}
		}
		if groupBy != "month" && !slices.IsSortedFunc(a.Groups, func(a, b groupOf) int { return int(b.Total - a.Total) }) {
			t.Errorf("%q: not the largest first", parameters)
		}
		asked++
	}
	questions := func(p *program) {
		t.Helper()
		for _, by := range []string{"", "metadata.ref", "metadata.price", "metadata.page.path", "metadata.page", "metadata.a.b", `metadata.a\.b`, `metadata.back\\slash`, `metadata.quote'"`,
			"metadata.huge", "metadata.n", "metadata.big", "metadata.none", "tag", "campaign", "channel", "month"} {
			check(p, by, "metadata.price")
		}
		for i, filters := range [][]string{
			{"metadata.ref", "google"}, {"metadata.ref", "42"}, {"metadata.ref", "' OR 1=1 --"}, {"metadata.ref", ""}, {"metadata.ref", "google", "metadata.page.path", "/a"},
			{"tag", "red"}, {"tag", "it's"}, {"campaign_id", "c1"}, {"user_id", "u7"}, {"user_id", "u1", "channel", "web"}, {"metadata.price", "1.1", "tag", "new"}, {"tag", "nobody's"},
			{"metadata.ref", strings.Repeat("é", 500)}, {`metadata.quote'"`, "\x00\n\t"},
		} {
			check(p, []string{"metadata.ref", "tag", "month", ""}[i%4], []string{"", "metadata.price"}[i%2], filters...)
		}
		check(p, "metadata.ref", "")
		check(p, "tag", "")
		check(p, "campaign", "")
		check(p, "month", "")
	}
	p := startProgram(t, env)
	send(p)
	questions(p)
	p.terminate()
	p = startProgram(t, append(slices.Clone(env), "METADATA_COLUMNS=ref, page.path,price"))
	questions(p) // of rows from before
	send(p)
	questions(p)
	p.terminate()
	p = startProgram(t, append(slices.Clone(env), "METADATA_COLUMNS=ref,n"))
	questions(p)
	if columns := clickhouseQuery(t, "SELECT arraySort(groupArray(name)) FROM system.columns WHERE database = '"+space(env, "CLICKHOUSE_DATABASE")+"' AND table = 'events' AND name LIKE 'metadata_%'"); columns != "['metadata_n','metadata_page/path','metadata_price','metadata_ref']" {
		t.Errorf("columns %s", columns)
	}
	for query, want := range map[string]string{
		"group_by=metadata.":                             `"field":"group_by","code":"validation.invalid-group-by.error"`,
		"group_by=metadata..a":                           `"field":"group_by","code":"validation.invalid-group-by.error"`,
		"group_by=metadata":                              `"field":"group_by","code":"validation.invalid-group-by.error"`,
		"group_by=metadata.a%5C":                         `"field":"group_by","code":"validation.invalid-group-by.error"`,
		"group_by=metadata.%FF":                          `"field":"group_by","code":"validation.invalid-format.error"`,
		"group_by=metadata.a" + strings.Repeat(".a", 10): `"field":"group_by","code":"validation.invalid-group-by.error"`,
		"sum=metadata." + strings.Repeat("a", 301):       `"field":"sum","code":"validation.invalid-format.error"`,
		"sum=price":                                      `"field":"sum","code":"validation.invalid-format.error"`,
		"metadata.=1":                                    `"field":"metadata.","code":"validation.invalid-format.error"`,
		"metadata.a=1&metadata.a=2":                      `"field":"metadata.a","code":"validation.invalid-format.error"`,
		"metadata.a=%FF":                                 `"field":"metadata.a","code":"validation.invalid-format.error"`,
		"metadata.%FF=1":                                 `"code":"validation.invalid-format.error"`,
		"metadata.a=&metadata.b=&metadata.c=&metadata.d=&metadata.e=&metadata.f=": `"field":"metadata","code":"validation.invalid-format.error"`,
		"user_id=%FF": `"field":"user_id","code":"validation.invalid-format.error"`,
	} {
		status, _, answer := p.ask("GET", metricsPath+"event_name=p&from=1&to=2&"+query, nil)
		if status != 400 || !strings.Contains(answer, want) || !json.Valid([]byte(answer)) {
			t.Errorf("%s: %d %s, want %s", query, status, answer, want)
		}
	}
	if asked < 140 || !reflect.DeepEqual(p.question("/api/v1/metrics", "event_name", "none", "from", "1", "to", "2", "sum", "metadata.price").Sum, json.Number("0")) {
		t.Errorf("%d questions; nothing has no sum of 0", asked)
	}
}

// TestManyValues: of more than the largest 1,000 values the rest is left out, and the answer says so; what is too dear says what helps.
func TestManyValues(t *testing.T) {
	t.Parallel()
	env := newSpace(t)
	p := startProgram(t, env)
	db, now := space(env, "CLICKHOUSE_DATABASE"), time.Now().Unix()
	clickhouseQuery(t, fmt.Sprintf(`INSERT INTO %s.events (event_id, event_name, user_id, timestamp, tags, metadata) SELECT SHA256(toString(number)), 'v', 'u', %d, [concat('t', toString(number))], `+
		`concat('{"v":"', if(number < 3, 'often', toString(number)), repeat('x', 1000), '"}') FROM numbers(1200)`, db, now-60))
	for _, by := range []string{"metadata.v", "tag"} {
		a := p.question("/api/v1/metrics", "event_name", "v", "from", "1", "to", fmt.Sprint(now), "group_by", by)
		if a.Total != 1200 || len(a.Groups) != 1000 || !a.Truncated || by != "tag" && (a.Groups[0].Total != 3 || len(a.Groups[0].Key) != 500) {
			t.Errorf("%s: of %d events %d groups, truncated %v, the first %.50v", by, a.Total, len(a.Groups), a.Truncated, a.Groups[0])
		}
	}
	// Values of which ClickHouse would have to hold more than a question may take.
	clickhouseQuery(t, fmt.Sprintf(`INSERT INTO %s.events (event_id, event_name, user_id, timestamp, metadata) SELECT SHA256(toString(number)), 'dear', 'u', %d, `+
		`concat('{"v":"', toString(number), repeat('é', 490), '"}') FROM numbers(600000)`, db, now-60))
	status, header, answer := p.ask("GET", fmt.Sprintf("%sevent_name=dear&from=1&to=%d&group_by=metadata.v", metricsPath, now), nil)
	if status != 503 || header.Get("Retry-After") == "" || !strings.Contains(answer, "narrow the range, or declare the member of metadata in METADATA_COLUMNS") {
		t.Errorf("%d %.300s", status, answer)
	}
	if a := p.question("/api/v1/metrics", "event_name", "dear", "from", "1", "to", fmt.Sprint(now)); a.Total != 600000 {
		t.Errorf("%d events", a.Total)
	}
}
