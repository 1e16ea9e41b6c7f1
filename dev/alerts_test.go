// The alerts: Prometheus' rules say what Grafana's do, each of them fires when it has to, and the stack's Prometheus has them.

package main

import (
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"
)

const (
	grafanaAlerts = "../deploy/grafana/provisioning/alerting/alerts.yml"
	alertRules    = "../deploy/prometheus-rules.yml"
	alertTests    = "testdata/alerts.yml"
)

// alert is what both files say of one.
type alert struct {
	Name, Expr, For     string
	Labels, Annotations map[string]string
}

func readYAML(t *testing.T, file string, into any) {
	t.Helper()
	b, err := os.ReadFile(file)
	if err == nil {
		err = yaml.Unmarshal(b, into)
	}
	if err != nil {
		t.Fatalf("%s: %v", file, err)
	}
}

// alertsOfGrafana are Grafana's in the form of Prometheus': the name is the uid's words joined, the threshold stands behind the query.
func alertsOfGrafana(t *testing.T) (alerts []alert, interval string) {
	t.Helper()
	var file struct {
		Groups []struct {
			Interval string
			Rules    []struct {
				UID, Title          string
				Condition, For      string
				Labels, Annotations map[string]string
				Data                []struct {
					RefID         string `yaml:"refId"`
					DatasourceUID string `yaml:"datasourceUid"`
					Model         struct {
						Expr, Expression string
						Instant          bool
						Conditions       []struct {
							Evaluator struct {
								Type   string
								Params []int64
							}
						}
					}
				}
			}
		}
	}
	readYAML(t, grafanaAlerts, &file)
	for _, r := range file.Groups[0].Rules {
		name := ""
		for _, word := range strings.Split(r.UID, "-") {
			name += strings.ToUpper(word[:1]) + word[1:]
		}
		asked, compared := r.Data[0].Model, r.Data[1].Model
		if len(r.Data) != 2 || r.Condition != r.Data[1].RefID || compared.Expression != r.Data[0].RefID || !asked.Instant || r.Data[0].DatasourceUID != "event-ingestion-prometheus" || r.Title == "" {
			t.Errorf("%s is not one instant question and one comparison: %+v", r.UID, r.Data)
			continue
		}
		e := compared.Conditions[0].Evaluator
		sign := map[string]string{"gt": ">", "lt": "<"}[e.Type]
		if r.For == "0s" {
			r.For = ""
		}
		alerts = append(alerts, alert{name, fmt.Sprintf("(%s) %s %d", asked.Expr, sign, e.Params[0]), r.For, r.Labels, r.Annotations})
	}
	return alerts, file.Groups[0].Interval
}

func alertsOfPrometheus(t *testing.T) (alerts []alert, interval string) {
	t.Helper()
	var file struct {
		Groups []struct {
			Interval string
			Rules    []struct {
				Alert, Expr, For    string
				Labels, Annotations map[string]string
			}
		}
	}
	readYAML(t, alertRules, &file)
	for _, r := range file.Groups[0].Rules {
		alerts = append(alerts, alert{r.Alert, r.Expr, r.For, r.Labels, r.Annotations})
	}
	return alerts, file.Groups[0].Interval
}

func TestAlertsEqual(t *testing.T) {
	theirs, often := alertsOfGrafana(t)
	ours, interval := alertsOfPrometheus(t)
	if len(ours) != len(theirs) || len(ours) < 10 || often != interval {
		t.Fatalf("Grafana has %d alerts every %s, Prometheus %d every %s", len(theirs), often, len(ours), interval)
	}
	for i, a := range ours {
		if fmt.Sprint(a) != fmt.Sprint(theirs[i]) {
			t.Errorf("Prometheus:\n%+v\nGrafana:\n%+v", a, theirs[i])
		}
		if severity := a.Labels["severity"]; severity != "warning" && severity != "critical" || a.Annotations["summary"] == "" || a.Annotations["description"] == "" {
			t.Errorf("%s lacks something: %v %v", a.Name, a.Labels, a.Annotations)
		}
		// $labels would do in Prometheus, but Grafana takes a dollar in its files for a variable of the environment.
		for _, text := range append([]string{a.Expr}, a.Annotations["summary"], a.Annotations["description"]) {
			if strings.Contains(text, "$") {
				t.Errorf("%s: a dollar in %s", a.Name, text)
			}
			for _, m := range regexp.MustCompile(`\{\{ (.*?) \}\}`).FindAllStringSubmatch(text, -1) {
				label, is := strings.CutPrefix(m[1], ".Labels.")
				if by := regexp.MustCompile(`by \((.*?)\)`).FindStringSubmatch(a.Expr); !is || by == nil || !strings.Contains(", "+by[1]+",", ", "+label+",") {
					t.Errorf("%s: %s is no label of its series", a.Name, m[0])
				}
			}
		}
	}
}

// TestAlertsFire has promtool evaluate the rules over the series of testdata/alerts.yml, where each of them fires once and stays quiet
// once.
func TestAlertsFire(t *testing.T) {
	b, err := os.ReadFile(alertTests)
	if err != nil {
		t.Fatal(err)
	}
	alerts, _ := alertsOfPrometheus(t)
	for _, a := range alerts {
		if !strings.Contains(string(b), `alertname="`+a.Name+`"`) {
			t.Errorf("%s never fires in %s", a.Name, alertTests)
		}
		for _, metric := range regexp.MustCompile(`\b(event_ingestion_\w+|ClickHouse\w+|up)\b`).FindAllString(a.Expr, -1) {
			if strings.Count(string(b), metric) < 2 {
				t.Errorf("%s has %s not twice", alertTests, metric)
			}
		}
	}
	checkWith(t, "promtool", "test", "rules", alertTests)
}

// TestAlertsLoaded: Prometheus finds the rules where prometheus.yml says, in deploy/ and in the stack, and keeps what they ask for.
func TestAlertsLoaded(t *testing.T) {
	var config struct {
		RuleFiles []string `yaml:"rule_files"`
	}
	readYAML(t, "../deploy/prometheus.yml", &config)
	if fmt.Sprint(config.RuleFiles) != "[prometheus-rules.yml]" {
		t.Fatalf("rule_files: %v", config.RuleFiles)
	}
	mounts := map[string]string{}
	for _, v := range stack(t, nil, composeFile).Services["prometheus"].Volumes {
		mounts[v.Target] = v.Source
	}
	if source := mounts["/etc/prometheus/prometheus-rules.yml"]; mounts["/etc/prometheus/prometheus.yml"] == "" || !strings.HasSuffix(source, "deploy/prometheus-rules.yml") {
		t.Errorf("Prometheus has %v", mounts)
	}
	checkWith(t, "promtool", "check", "config", "../deploy/prometheus.yml") // and the rules that it names
}
