// What is revenue: one rule, in the column, the view, the overview and Grafana's queries, and what follows when it changes.

package test

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"
)

// moneyOf is what each place says of purchases and revenue. since begins an hour.
func moneyOf(p *program, since int64) (all []string) {
	p.t.Helper()
	for _, to := range []int64{since + 3*3600 - 1, since + 1800} { // whole hours, and the cut one that is counted from events
		var a struct {
			Purchases int64       `json:"purchases"`
			Revenue   json.Number `json:"revenue"`
			Currency  string      `json:"currency"`
		}
		_, _, answer := p.do("GET", fmt.Sprintf("/api/v1/overview?from=%d&to=%d", since, to), "", "", nil)
		if err := json.Unmarshal([]byte(answer), &a); err != nil {
			p.t.Errorf("%v: %s", err, answer)
		}
		all = append(all, fmt.Sprintf("%d events, %s %s", a.Purchases, a.Revenue, a.Currency))
	}
	return append(all, hourlyRevenue(p, since), clickhouseQuery(p.t, "SELECT sum(price) FROM "+space(p.env, "CLICKHOUSE_DATABASE")+".purchases"))
}

// hourlyRevenue is what events_hourly has, of whole hours.
func hourlyRevenue(p *program, since int64) string {
	p.t.Helper()
	return clickhouseQuery(p.t, fmt.Sprintf("SELECT sum(revenue) FROM %s.events_between(from = %d, to = %d)", space(p.env, "CLICKHOUSE_DATABASE"), since, since+3*3600-1))
}

func TestRevenue(t *testing.T) {
	t.Parallel()
	env := newSpace(t)
	p := startProgram(t, env)
	since := (time.Now().Unix()/3600 - 48) * 3600
	prices, n := map[string]string{}, 0
	send := func(p *program, event, metadata, want string) {
		t.Helper()
		n++
		body := fmt.Appendf(nil, `{"event_name":%q,"user_id":"u%d","timestamp":%d,"metadata":%s}`, event, n, since+int64(n), metadata)
		if status, _, answer := p.ask("POST", onePath, body); status != 202 {
			t.Fatal(status, answer)
		}
		prices[fmt.Sprint("u", n)] = want
	}
	for _, c := range []struct{ event, metadata, price string }{
		// Revenue: 1 + 2 + 4 + 8 + 16 + 32 + 9999999999999.99 + 0.0001.
		{"purchase", `{"price":1}`, "1"}, {"purchase", `{"price":2,"currency":null}`, "2"}, {"Order Completed", `{"price":"4","currency":"TRY"}`, "4"}, {"purchase", `{"currency":"tRy","price":8.00}`, "8"},
		{"purchase", `{"curr\u0065ncy":"\u0074ry","\u0070rice":16}`, "16"}, {"purchase", `{"price":32,"price":"x","currency":"TRY","currency":"USD"}`, "32"},
		{"purchase", `{"price":9999999999999.99}`, "9999999999999.99"}, {"purchase", `{"price":1e-4}`, "0.0001"},
		// None.
		{"purchase", `{"price":64,"currency":840}`, "64"}, {"purchase", `{"price":64,"currency":{"code":"TRY"}}`, "64"}, {"purchase", `{"price":64,"currency":["TRY"]}`, "64"}, {"purchase", `{"price":64,"currency":true}`, "64"},
		{"purchase", `{"price":64,"currency":"` + strings.Repeat("TRY", 500) + `"}`, "64"}, {"purchase", `{"price":64,"curr\u0065ncy":"USD"}`, "64"}, {"purchase", `{"price":64,"currency":"TRY "}`, "64"},
		{"purchase", `{"price":100000000000000}`, "0"}, {"purchase", `{"price":"x"}`, "0"}, {"purchase", `{"price":[1]}`, "0"}, {"Purchase", `{"price":64}`, "64"}, {"order completed", `{"price":64}`, "64"},
		{"purchase", `{"price":99999999999999.9999,"currency":"EUR"}`, "99999999999999.9999"},
	} {
		send(p, c.event, c.metadata, c.price)
	}
	drained(p)
	for row := range strings.Lines(clickhouseQuery(t, "SELECT user_id, price FROM "+space(env, "CLICKHOUSE_DATABASE")+".events_all")) {
		user, price, _ := strings.Cut(strings.TrimSpace(row), "\t")
		if price != prices[user] {
			t.Errorf("%s: price %s, want %s", user, price, prices[user])
		}
	}
	const revenue = "10000000000062.9901"
	if got := moneyOf(p, since); !slices.Equal(got, []string{"19 events, " + revenue + " TRY", "19 events, " + revenue + " TRY", revenue, revenue}) {
		t.Errorf("%q", got)
	}

	// Another rule: what comes from then on is counted by it, and what was counted before once it is recounted.
	p.terminate()
	changed := append(slices.Clone(env), `PURCHASE_EVENTS=order completed, it's a "sale" \ {database} ₺`, "CURRENCY=eur")
	p = startProgram(t, changed)
	if !strings.Contains(p.log.String(), "changes what is revenue") {
		t.Errorf("the change is not said:\n%s", p.log)
	}
	send(p, `it's a "sale" \ {database} ₺`, `{"price":5,"currency":"EUR"}`, "5")
	send(p, `purchase`, `{"price":7,"currency":"EUR"}`, "7")
	drained(p)
	if got := hourlyRevenue(p, since); got != "10000000000067.9901" {
		t.Errorf("%s before a recount", got)
	}
	// A command that does not have the settings goes by the tables.
	if out, code := subcommand(t, env, fmt.Sprintf("reconcile -recount -from %d -to %d", since, since+7200)); code != 0 {
		t.Fatal(code, out)
	}
	want := []string{"2 events, 69 eur", "2 events, 69 eur", "69", "69"}
	if got := moneyOf(p, since); !slices.Equal(got, want) {
		t.Errorf("recounted: %q", got)
	}
	// So does an instance that only serves the API.
	api := startProgram(t, append(slices.Clone(env), "ROLE=api"))
	if got := moneyOf(api, since); !slices.Equal(got, want) {
		t.Errorf("ROLE=api: %q", got)
	}
	api.terminate()
	p.terminate()
	p = startProgram(t, changed) // the same again changes nothing
	if strings.Contains(p.log.String(), "changes what is revenue") {
		t.Errorf("a change is said:\n%s", p.log)
	}
	if got := moneyOf(p, since); !slices.Equal(got, want) {
		t.Errorf("after a restart: %q", got)
	}
}
