// The dashboards as code: each panel's SQL runs on the real ClickHouse, as Grafana's data source would send it, and has to
// say what an independent count says.

package test

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"sort"
	"strconv"
	"strings"
	"testing"
	"time"
)

// dashboard is what the tests need of a dashboard's JSON.
type dashboard struct {
	Title, UID string
	Time       struct{ From, To string }
	Panels     []struct {
		ID          int
		Title, Type string
		Description string
		Datasource  struct{ UID string }
		GridPos     struct{ X, Y, W, H int }
		Targets     []struct {
			RawSQL     string `json:"rawSql"`
			Expr       string
			Datasource struct{ UID string }
		}
		FieldConfig struct {
			Defaults struct{ Unit, NoValue string }
		}
	}
	Templating struct {
		List []struct {
			Name  string
			Query string
		}
	}
}

func readDashboard(t *testing.T, name string) (d dashboard) {
	t.Helper()
	b, err := os.ReadFile("deploy/grafana/dashboards/" + name + ".json")
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(b, &d); err != nil {
		t.Fatal(err)
	}
	return d
}

// picked is what somebody has chosen on a dashboard. A variable that is absent is All.
type picked struct {
	from, to  int64
	variables map[string][]string
}

var (
	conditionalAll = regexp.MustCompile(`\$__conditionalAll\((.*?\)), \$(\w+)\)`)
	timeFilter     = regexp.MustCompile(`\$__timeFilter\((\w+)\)`)
	sqlString      = regexp.MustCompile(`\$\{(\w+):sqlstring\}`)
)

// expand does to a query what Grafana and its ClickHouse data source do: macros of time, the condition that All leaves
// out, and variables as quoted lists.
func (p picked) expand(sql string) string {
	sql = conditionalAll.ReplaceAllStringFunc(sql, func(s string) string {
		m := conditionalAll.FindStringSubmatch(s)
		if len(p.variables[m[2]]) == 0 {
			return "1=1"
		}
		return m[1]
	})
	sql = sqlString.ReplaceAllStringFunc(sql, func(s string) string {
		var quoted []string
		for _, v := range p.variables[sqlString.FindStringSubmatch(s)[1]] {
			quoted = append(quoted, "'"+strings.ReplaceAll(v, "'", "''")+"'")
		}
		return strings.Join(quoted, ",")
	})
	from, to := fmt.Sprintf("toDateTime(%d)", p.from), fmt.Sprintf("toDateTime(%d)", p.to)
	sql = timeFilter.ReplaceAllString(sql, "$1 >= "+from+" AND $1 <= "+to)
	return strings.NewReplacer("$__fromTime", from, "$__toTime", to).Replace(sql)
}

func TestGrafanaExpand(t *testing.T) {
	p := picked{from: 5, to: 9, variables: map[string][]string{"channel": {"web", "o'x"}}}
	for sql, want := range map[string]string{
		"a $__fromTime b $__toTime": "a toDateTime(5) b toDateTime(9)",
		"$__timeFilter(timestamp)":  "timestamp >= toDateTime(5) AND timestamp <= toDateTime(9)",
		"$__conditionalAll(channel IN (${channel:sqlstring}), $channel) AND x":    "channel IN ('web','o''x') AND x",
		"$__conditionalAll(name IN (${name:sqlstring}), $name) AND $__fromTime<9": "1=1 AND toDateTime(5)<9",
	} {
		if got := p.expand(sql); got != want {
			t.Errorf("%s: %s, want %s", sql, got, want)
		}
	}
}

// sold is an event of the fixture.
type sold struct {
	name, user, channel, campaign, currency string
	at                                      int64
	price                                   float64
}

// grafanaFixture sends events over five days through the program, each twice, and returns the distinct ones.
func grafanaFixture(t *testing.T) (database string, base int64, all []sold) {
	env := newSpace(t)
	p := startProgram(t, env)
	base = (time.Now().Unix()/daySeconds - 9) * daySeconds
	var body []byte
	for i := range int64(1000) {
		e := sold{
			[]string{"product_view", "purchase", "add_to_cart", "it's"}[i%4], fmt.Sprint("u", i*7%83), []string{"", "web", "api", "mobile_app"}[i/4%4],
			fmt.Sprint("c", i%17), []string{"TRY", "", "EUR"}[i/16%3], base + i*433, float64(i%50) + 0.5,
		}
		if e.campaign == "c0" {
			e.campaign = ""
		}
		if i%10 == 9 { // at the edges of hours
			e.at = base + i/10*hourSeconds - i%3/2
		}
		all = append(all, e)
		body = fmt.Appendf(body, `{"event_name":%q,"user_id":%q,"channel":%q,"campaign_id":%q,"timestamp":%d,"metadata":{"price":%v,"currency":%q}}`+"\n", e.name, e.user, e.channel, e.campaign, e.at, e.price, e.currency)
	}
	for range 2 {
		if status, _, answer := p.do("POST", bulkPath, ndjson, "", body); status != 202 {
			t.Fatal(status, answer)
		}
	}
	drained(p)
	seen := map[string]bool{}
	all = slices.DeleteFunc(all, func(e sold) bool {
		id := fmt.Sprint(e.name, e.user, e.channel, e.at)
		defer func() { seen[id] = true }()
		return seen[id]
	})
	return space(env, "CLICKHOUSE_DATABASE"), base, all
}

// ask runs a panel's query as Grafana would, in the data source's default database.
func (p picked) ask(t *testing.T, database, sql string) (rows [][]string) {
	t.Helper()
	resp, err := http.Post("http://127.0.0.1:"+stackEnv(t, "CLICKHOUSE_HTTP_PORT")+"/?database="+url.QueryEscape(database), "text/plain", strings.NewReader(p.expand(sql)))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	answer, _ := io.ReadAll(resp.Body)
	if resp.StatusCode != 200 {
		t.Fatalf("%s: %s", p.expand(sql), answer)
	}
	for line := range strings.Lines(string(answer)) {
		rows = append(rows, strings.Split(strings.TrimSuffix(line, "\n"), "\t"))
	}
	return rows
}

// tally is the independent count of a set of events.
type tally struct {
	events           int
	users, campaigns map[string]bool
	revenue, orders  float64 // of purchases in TRY
	channels         map[string]int
}

func newTally() *tally {
	return &tally{users: map[string]bool{}, campaigns: map[string]bool{}, channels: map[string]int{}}
}

func (c *tally) add(e sold) {
	c.events++
	c.users[e.user] = true
	c.channels[e.channel]++
	if e.campaign != "" {
		c.campaigns[e.campaign] = true
	}
	if e.name == "purchase" && e.currency != "EUR" {
		c.revenue += e.price
		c.orders++
	}
}

// expectPanel is what a panel has to show for the events.
func expectPanel(title string, events []sold) (rows [][]string) {
	total, purchases := newTally(), 0
	groups := map[string]*tally{}
	key := func(sold) string { return "" }
	switch title {
	case "Events Over Time", "Unique Users Over Time", "Revenue Over Time":
		key = func(e sold) string { return time.Unix(e.at, 0).UTC().Truncate(time.Hour).Format(time.DateTime) }
	case "Events by Channel":
		key = func(e sold) string {
			if e.channel == "" {
				return "none"
			}
			return e.channel
		}
	case "Events by Type", "Events by Type and Channel":
		key = func(e sold) string { return e.name }
	case "Top 10 Campaigns":
		key = func(e sold) string { return e.campaign }
	}
	for _, e := range events {
		total.add(e)
		if e.name == "purchase" {
			purchases++
		}
		if title == "Top 10 Campaigns" && e.campaign == "" {
			continue
		}
		if groups[key(e)] == nil {
			groups[key(e)] = newTally()
		}
		groups[key(e)].add(e)
	}
	one := func(v any) [][]string { return [][]string{{fmt.Sprint(v)}} }
	switch title {
	case "Total Events (24h)":
		return one(total.events)
	case "Unique Users (24h)":
		return one(len(total.users))
	case "Purchases (24h)":
		return one(purchases)
	case "Active Campaigns (24h)":
		return one(len(total.campaigns))
	case "Total Revenue (24h)":
		return one(total.revenue)
	case "Average Order Value":
		return one(total.revenue / max(total.orders, 1))
	}
	for k, c := range groups {
		switch title {
		case "Unique Users Over Time":
			rows = append(rows, []string{k, fmt.Sprint(len(c.users))})
		case "Revenue Over Time":
			rows = append(rows, []string{k, fmt.Sprint(c.revenue)})
		case "Events by Type and Channel":
			rows = append(rows, []string{k, fmt.Sprint(c.channels["web"]), fmt.Sprint(c.channels["mobile_app"]), fmt.Sprint(c.channels["api"]), fmt.Sprint(c.channels[""])})
		default:
			rows = append(rows, []string{k, fmt.Sprint(c.events)})
		}
	}
	sort.Slice(rows, func(i, j int) bool {
		a, b := groups[rows[i][0]], groups[rows[j][0]]
		if !strings.HasSuffix(title, "Over Time") && a.events != b.events {
			return a.events > b.events
		}
		return rows[i][0] < rows[j][0]
	})
	if title == "Top 10 Campaigns" {
		rows = rows[:min(len(rows), 10)]
	}
	return rows
}

func sameRows(got, want [][]string) bool {
	return slices.EqualFunc(got, want, func(a, b []string) bool {
		return slices.EqualFunc(a, b, func(x, y string) bool {
			f, errF := strconv.ParseFloat(x, 64)
			g, errG := strconv.ParseFloat(y, 64)
			return x == strings.ReplaceAll(y, "'", `\'`) || errF == nil && errG == nil && f-g < 1e-6 && g-f < 1e-6
		})
	})
}

func TestGrafanaPanels(t *testing.T) {
	t.Parallel()
	database, base, all := grafanaFixture(t)
	d := readDashboard(t, "business")
	if d.Title != "Event Ingestion - Business Metrics" || d.Time.From != "now-24h" || len(d.Panels) != 13 {
		t.Errorf("%s from %s with %d panels", d.Title, d.Time.From, len(d.Panels))
	}
	for _, r := range [][2]int64{{base, base + 2*daySeconds - 1}, {base + 1234, base + 100_000}, {base + 7300, base + 7400}, {base - 9*daySeconds, base - 5*daySeconds}, {base - 5, time.Now().Unix()}} {
		for _, variables := range []map[string][]string{
			{}, {"channel": {"web"}}, {"channel": {"web", "api"}, "event_name": {"purchase", "it's"}}, {"event_name": {"product_view"}}, {"event_name": {"') OR 1=1 --"}},
		} {
			p := picked{r[0], r[1], variables}
			var events []sold
			for _, e := range all {
				if e.at >= r[0] && e.at <= r[1] && (variables["channel"] == nil || slices.Contains(variables["channel"], e.channel)) &&
					(variables["event_name"] == nil || slices.Contains(variables["event_name"], e.name)) {
					events = append(events, e)
				}
			}
			for _, panel := range d.Panels {
				got, want := p.ask(t, database, panel.Targets[0].RawSQL), expectPanel(panel.Title, events)
				if !sameRows(got, want) {
					t.Errorf("%s, %d to %d, %v:\ngot  %v\nwant %v", panel.Title, r[0]-base, r[1]-base, variables, got, want)
				}
			}
		}
	}
	all4 := picked{base, base + 5*daySeconds, nil}.ask(t, database, d.Templating.List[1].Query)
	if fmt.Sprint(all4) != `[[add_to_cart] [it\'s] [product_view] [purchase]]` {
		t.Errorf("the variable offers %v", all4)
	}
}

// alertExprs are the expressions of a file of alerts, Grafana's or Prometheus'.
func alertExprs(t *testing.T, file string) (exprs []string) {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range regexp.MustCompile(`expr: ("(?:[^"\\]|\\.)*")`).FindAllStringSubmatch(string(b), -1) {
		expr, err := strconv.Unquote(m[1])
		if err != nil {
			t.Fatal(err)
		}
		exprs = append(exprs, expr)
	}
	if len(exprs) < 10 || len(exprs) != strings.Count(string(b), "expr:") {
		t.Fatalf("%s: %d expressions found", file, len(exprs))
	}
	return exprs
}

// TestAlertMetrics: what a rule of Prometheus asks for is there, of the program, of ClickHouse, or of Prometheus itself.
func TestAlertMetrics(t *testing.T) {
	names := metricNames(t)
	names["up"] = true
	names["ClickHouseAsyncMetrics_FilesystemMainPathAvailableBytes"] = true // of the disk with path in ClickHouse's config.xml; the embedded one has none of these
	for _, expr := range alertExprs(t, "deploy/prometheus-rules.yml") {
		found := 0
		for _, name := range regexp.MustCompile(`\b(event_ingestion_\w+|ClickHouse\w+|up)\b`).FindAllString(expr, -1) {
			if found++; !names[name] {
				t.Errorf("%s asks for %s, which there is not", expr, name)
			}
		}
		if found == 0 {
			t.Errorf("%s asks for nothing", expr)
		}
	}
}

// TestGrafanaFiles: panels stand beside each other, read from data sources that are provisioned, and ask for metrics that
// there are.
func TestGrafanaFiles(t *testing.T) {
	sources, err := os.ReadFile("deploy/grafana/provisioning/datasources/datasources.yml")
	if err != nil {
		t.Fatal(err)
	}
	var exprs []string
	for _, name := range []string{"business", "pipeline"} {
		d := readDashboard(t, name)
		ids, cells := map[int]bool{}, map[[2]int]string{}
		for _, p := range d.Panels {
			if ids[p.ID] || p.Description == "" || len(p.Targets) == 0 || p.FieldConfig.Defaults.Unit == "" || p.Type == "stat" && p.FieldConfig.Defaults.NoValue != "0" {
				t.Errorf("%s: panel %d %s lacks something", name, p.ID, p.Title)
			}
			ids[p.ID] = true
			for x := p.GridPos.X; x < p.GridPos.X+p.GridPos.W; x++ {
				for y := p.GridPos.Y; y < p.GridPos.Y+p.GridPos.H; y++ {
					if other := cells[[2]int{x, y}]; other != "" || x >= 24 {
						t.Fatalf("%s: %s lies over %s", name, p.Title, other)
					}
					cells[[2]int{x, y}] = p.Title
				}
			}
			for _, target := range p.Targets {
				if target.Datasource.UID != p.Datasource.UID || !strings.Contains(string(sources), "uid: "+target.Datasource.UID+"\n") {
					t.Errorf("%s: %s reads from %s", name, p.Title, target.Datasource.UID)
				}
				if target.Expr != "" {
					exprs = append(exprs, target.Expr)
				}
			}
		}
	}
	exprs = append(exprs, alertExprs(t, "deploy/grafana/provisioning/alerting/alerts.yml")...)
	if len(exprs) < 30 {
		t.Fatalf("only %d expressions found", len(exprs))
	}
	names := metricNames(t)
	var rules strings.Builder
	rules.WriteString("groups:\n- name: all\n  rules:\n")
	for i, expr := range exprs {
		expr = strings.ReplaceAll(expr, "$__rate_interval", "1m")
		fmt.Fprintf(&rules, "  - record: r%d\n    expr: %q\n", i, expr)
		for _, name := range regexp.MustCompile(`event_ingestion_\w+`).FindAllString(expr, -1) {
			if !names[strings.TrimSuffix(name, "_bucket")] {
				t.Errorf("%s asks for %s", expr, name)
			}
		}
	}
	promtool, err := exec.LookPath("promtool")
	if err != nil {
		t.Log("promtool, which Debian's prometheus has, is not here: expressions are not parsed")
		return
	}
	file := filepath.Join(t.TempDir(), "rules.yml")
	os.WriteFile(file, []byte(rules.String()), 0o600)
	if out, err := exec.Command(promtool, "check", "rules", "--lint=none", file).CombinedOutput(); err != nil {
		t.Errorf("promtool: %v\n%s", err, out)
	}
}
