// What operators are told: request ids, the log, the metrics page.

package test

import (
	"bytes"
	"encoding/json"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"
)

func TestRequestIDs(t *testing.T) {
	t.Parallel()
	p := startProgram(t, newSpace(t, "ACCESS_LOG=1", "LOG_FORMAT=json"))
	_, header, answer := p.ask("POST", onePath, []byte(`{}`), "X-Request-Id: trace-1.a_B")
	if header.Get("X-Request-Id") != "trace-1.a_B" || !strings.Contains(answer, `"request_id":"trace-1.a_B"`) {
		t.Errorf("given: %v %s", header, answer)
	}
	for _, forged := range []string{`a" level="ERROR`, strings.Repeat("x", 65), "a b", "ü"} {
		if _, header, _ := p.ask("GET", "/health", nil, "X-Request-Id: "+forged); len(header.Get("X-Request-Id")) != 16 {
			t.Errorf("%q: %v", forged, header)
		}
	}
	for _, path := range []string{"/none", "/web/none", "/swagger/none"} {
		if _, header, answer := p.ask("GET", path, nil); !strings.Contains(answer, `"request_id":"`+header.Get("X-Request-Id")+`"`) {
			t.Errorf("made: %v %s", header, answer)
		}
	}
	found := false
	for line := range strings.Lines(p.log.String()) {
		var entry struct {
			Msg, ID, Path string
			Status        int
		}
		if err := json.Unmarshal([]byte(line), &entry); err != nil {
			t.Errorf("not JSON: %s", line)
		}
		found = found || entry.Msg == "request" && entry.ID == "trace-1.a_B" && entry.Status == 400 && entry.Path == onePath
	}
	if !found {
		t.Errorf("the request is not in the log:\n%s", p.log)
	}
}

// metricNames are all metrics that the program's source names.
func metricNames(t *testing.T) map[string]bool {
	t.Helper()
	names := map[string]bool{}
	files, err := filepath.Glob("*.go")
	if err != nil || len(files) == 0 {
		t.Fatal("no source here", err)
	}
	for _, file := range files {
		source, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if !strings.HasSuffix(file, "_test.go") {
			for _, m := range regexp.MustCompile("[\"`](event_ingestion_[a-z_]+)").FindAllSubmatch(source, -1) {
				names[string(m[1])] = true
			}
		}
	}
	if len(names) < 25 {
		t.Fatalf("only %d metrics found", len(names))
	}
	return names
}

// TestMetricsPage: every metric is there with its meaning, histograms are ones, and the numbers are those of the load.
func TestMetricsPage(t *testing.T) {
	t.Parallel()
	port := freePort(t)
	env := newSpace(t, "ADMIN_ADDR=127.0.0.1:"+port)
	p := startProgram(t, env)
	l, done := loadInto(t, p.url, 1000, time.Second, "-dup", "0.5")
	done()
	mustAgree(t, l, p.url)
	drained(p)
	p.do("POST", onePath, jsonCT, "", []byte(`{}`))
	p.do("GET", "/none", "", "", nil)
	resp, err := http.Get("http://127.0.0.1:" + port + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	page, _ := io.ReadAll(resp.Body)
	sums, kinds := map[string]float64{}, map[string]string{}
	for line := range strings.Lines(string(page)) {
		line = strings.TrimSpace(line)
		if rest, ok := strings.CutPrefix(line, "# TYPE "); ok {
			name, kind, _ := strings.Cut(rest, " ")
			if kinds[name] != "" {
				t.Errorf("%s stands in two places", name)
			}
			kinds[name] = kind
		} else if rest, ok := strings.CutPrefix(line, "# HELP event_ingestion_"); ok && strings.Contains(rest, "VictoriaMetrics") {
			t.Errorf("nobody says what event_ingestion_%s is", rest)
		} else if !strings.HasPrefix(line, "#") {
			value, err := strconv.ParseFloat(line[strings.LastIndexByte(line, ' ')+1:], 64)
			if err != nil {
				t.Error(err)
			}
			series := line[:strings.LastIndexByte(line, ' ')]
			family, _, labelled := strings.Cut(series, "{")
			sums[series] += value
			if labelled {
				sums[family] += value
			}
		}
	}
	for name := range metricNames(t) {
		if kinds[name] == "" {
			t.Errorf("%s is missing", name)
		}
		if (kinds[name] == "counter") != strings.HasSuffix(name, "_total") {
			t.Errorf("%s is a %s", name, kinds[name])
		}
	}
	sent := float64(l.OK.Load())
	distinct := float64(l.Distinct())
	for name, want := range map[string]float64{
		"event_ingestion_events_accepted_total": sent, "event_ingestion_rows_stored_total": distinct,
		"event_ingestion_records_consumed_total": sent, "event_ingestion_duplicates_total": sent - distinct,
		"event_ingestion_events_refused_total": 1, `event_ingestion_http_requests_total{route="events",code="400"}`: 1,
		`event_ingestion_http_requests_total{route="other",code="404"}`: 1, "event_ingestion_partitions_assigned": 20,
		"event_ingestion_consumer_lag_records": 0, "event_ingestion_in_flight_bytes": 0, "event_ingestion_dead_letters_total": 0,
		`event_ingestion_consumer_lag_records{partition="19"}`: 0,
	} {
		if got, ok := sums[name]; !ok || got != want {
			t.Errorf("%s is %v, want %v", name, got, want)
		}
	}
	if n := sums[`event_ingestion_freshness_seconds_bucket{le="60"}`]; n == 0 || n != sums["event_ingestion_freshness_seconds_count"] {
		t.Errorf("freshness has %v in its buckets, %v in all", n, sums["event_ingestion_freshness_seconds_count"])
	}
	if promtool, err := exec.LookPath("promtool"); err == nil { // Debian's prometheus has it
		check := exec.Command(promtool, "check", "metrics")
		check.Stdin = bytes.NewReader(page)
		if out, err := check.CombinedOutput(); err != nil && check.ProcessState.ExitCode() != 3 { // 3: it does not like a name
			t.Errorf("promtool: %v\n%s", err, out)
		}
	}
}
