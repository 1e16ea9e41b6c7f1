// The SQL recipes of deploy/README.md: each is run as it stands there, on events whose answers are worked out here by hand.

package test

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"
)

var (
	recipeTitle = regexp.MustCompile(`(?m)^### (.+)$`)
	recipeSQL   = regexp.MustCompile("(?ms)^```sql\n(.*?)^```$")
)

// TestRecipes runs them where a row stands once, where each row has a duplicate that waits for a merge, and both on three servers.
func TestRecipes(t *testing.T) {
	t.Parallel()
	t.Run("one server", func(t *testing.T) {
		t.Parallel()
		testRecipes(t, faultSpace(t))
	})
	t.Run("three servers", func(t *testing.T) {
		if isCluster() {
			t.Skip("has no stack of its own there")
		}
		alone(t, "-shards", "3")
		testRecipes(t, serversSpace(t))
	})
}

func testRecipes(t *testing.T, env []string) {
	p := startProgram(t, env)
	db := space(env, "CLICKHOUSE_DATABASE")
	monday := time.Now().UTC().Truncate(24 * time.Hour)
	monday = monday.AddDate(0, 0, -(int(monday.Weekday())+6)%7-21) // so that all of it is over and at most 29 days old
	day := func(n int) string { return monday.AddDate(0, 0, n).Format(time.DateOnly) }
	at := func(n, hour, minute int) int64 {
		return monday.AddDate(0, 0, n).Unix() + int64(hour)*hourSeconds + int64(minute)*60
	}

	var events []byte
	happened := func(user, name string, at int64, more string) {
		events = fmt.Appendf(events, `{"user_id":%q,"event_name":%q,"timestamp":%d,"channel":"web"%s}`+"\n", user, name, at, more)
	}
	const shoes = `,"campaign_id":"spring","tags":["new"],"metadata":{"product_id":"shoes","price":100.5,"currency":"TRY"}`
	happened("ada", "product_view", at(0, 10, 0), "")
	happened("ada", "add_to_cart", at(0, 10, 5), "")
	happened("ada", "purchase", at(0, 10, 10), shoes)
	happened("ada", "purchase", at(8, 12, 0), `,"campaign_id":"spring","metadata":{"product_id":"hat","price":20}`)
	happened("bob", "product_view", at(0, 0, 0), "")  // the range begins
	happened("bob", "add_to_cart", at(0, 11, 30), "") // and no purchase
	happened("bob", "product_view", at(15, 9, 0), "")
	happened("cyd", "add_to_cart", at(1, 8, 0), "") // in the wrong order
	happened("cyd", "product_view", at(1, 9, 0), "")
	happened("dee", "product_view", at(1, 9, 0), "")
	happened("dee", "add_to_cart", at(2, 9, 1), "")   // more than a day later
	happened("eve", "product_view", at(-1, 9, 0), "") // not new in the range
	happened("eve", "purchase", at(3, 9, 0), `,"campaign_id":"spring","metadata":{"product_id":"shoes","price":999,"currency":"USD"}`)
	happened("fay", "Order Completed", at(3, 10, 0), `,"metadata":{"product_id":"hat","price":"20.25","currency":"try"}`)
	happened("fay", "purchase", at(3, 10, 5), `,"campaign_id":"spring","metadata":{"product_id":"hat","price":0.75}`)
	happened("fay", "purchase", at(20, 0, 0), `,"campaign_id":"spring","metadata":{"product_id":"hat","price":5000}`) // the range has ended
	happened("gil", "product_view", at(9, 9, 0), "")
	happened("gil", "product_view", at(16, 9, 0), "")
	for range 2 { // the second time all of them are repeats
		if status, _, answer := p.do("POST", bulkPath, ndjson, "", events); status != http.StatusAccepted {
			t.Fatal(status, answer)
		}
	}
	drained(p)
	id := eventID("purchase", "ada", at(0, 10, 10), "web")
	stored := clickhouseQuery(t, fmt.Sprintf("SELECT created_at, toUnixTimestamp(created_at) - %d FROM %s.events_all WHERE event_id = unhex('%s')", at(0, 10, 10), db, id))

	answers := func(rows int) map[string][]string { // by the recipe's title, rows of columns
		return map[string][]string{
			"Revenue by campaign and day": {
				day(0) + " spring 1 100.5",
				day(3) + "  1 20.25", // of no campaign
				day(3) + " spring 1 0.75",
				day(8) + " spring 1 20",
			},
			"Funnel: view, cart, purchase": {"1 view 5", "2 cart 2", "3 purchase 1"}, // ada bob cyd dee gil, ada bob, ada
			"Retention by week": {
				day(0) + " 0 5", // ada bob cyd dee fay
				day(0) + " 1 1", // ada
				day(0) + " 2 1", // bob
				day(7) + " 0 1", // gil
				day(7) + " 1 1",
			},
			"New users by day":        {day(0) + " 2", day(1) + " 2", day(3) + " 1", day(9) + " 1"},
			"Top products by revenue": {"shoes 1 100.5", "hat 3 41"},
			"The whole story of an event": {fmt.Sprintf(`purchase ada web spring  ['new'] {"product_id":"shoes","price":100.5,"currency":"TRY"} %s 10:10:00 %s %d 100.5`,
				day(0), strings.ReplaceAll(stored, "\t", " "), rows)},
		}
	}
	mustAnswer := func(rows int) {
		t.Helper()
		want := answers(rows)
		recipes := readRecipes(t)
		for title, sql := range recipes {
			got := runRecipe(t, db, sql, map[string]string{"from": day(0), "to": day(20), "id": id})
			if rows, known := want[title]; !known {
				t.Errorf("%s: nothing is known of its answer", title)
			} else if got != strings.Join(rows, "\n") {
				t.Errorf("%s: it answers\n%s\nwant\n%s", title, got, strings.Join(rows, "\n"))
			}
		}
		for title := range want {
			if _, known := recipes[title]; !known {
				t.Errorf("%s: deploy/README.md has no such recipe", title)
			}
		}
	}
	mustAnswer(1)
	// The duplicates of all servers stand on the first one, where nothing merges.
	clickhouseQuery(t, fmt.Sprintf("INSERT INTO %s.events SELECT * REPLACE (created_at + 1 AS created_at) FROM %[1]s.events_all", db))
	mustAnswer(2)
}

// readRecipes returns the SQL of the section by the titles. Each title has one block.
func readRecipes(t *testing.T) map[string]string {
	t.Helper()
	doc, err := os.ReadFile("deploy/README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, found := strings.Cut(string(doc), "\n## SQL recipes\n")
	section, _, _ = strings.Cut(section, "\n## ")
	recipes := map[string]string{}
	starts := recipeTitle.FindAllStringSubmatchIndex(section, -1)
	for i, at := range starts {
		end := len(section)
		if i+1 < len(starts) {
			end = starts[i+1][0]
		}
		blocks := recipeSQL.FindAllStringSubmatch(section[at[1]:end], -1)
		if len(blocks) != 1 {
			t.Fatalf("%s has %d blocks of SQL", section[at[2]:at[3]], len(blocks))
		}
		recipes[section[at[2]:at[3]]] = blocks[0][1]
	}
	if blocks := strings.Count(section, "```sql\n"); !found || len(recipes) == 0 || blocks != len(recipes) {
		t.Fatalf("%d titles, %d blocks of SQL", len(recipes), blocks)
	}
	return recipes
}

// runRecipe sends it as deploy/README.md says, with the parameters that it names, and returns its rows.
func runRecipe(t *testing.T, db, sql string, parameters map[string]string) string {
	t.Helper()
	query := url.Values{"database": {db}}
	for name, value := range parameters {
		if strings.Contains(sql, "{"+name+":") {
			query.Set("param_"+name, value)
		}
	}
	port, _, _ := strings.Cut(stackEnv(t, "CLICKHOUSE_HTTP_PORT"), ",")
	resp, err := http.Post("http://127.0.0.1:"+port+"/?"+query.Encode(), "", bytes.NewReader([]byte(sql)))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("%s%d %s %v", sql, resp.StatusCode, answer, err)
	}
	return strings.ReplaceAll(strings.TrimSuffix(string(answer), "\n"), "\t", " ")
}
