// The report as a page: rate and latency over time, in one file that needs nothing else.

package load

import (
	"bytes"
	"context"
	"fmt"
	"html"
	"os"
	"strings"
	"time"
)

// second is what happened in one second of the run.
type second struct {
	accepted, retries float64
	p50, p99, longest float64 // ms
}

// timeline collects seconds.
type timeline struct {
	latency *histogram // of the second that runs; guarded by the loader's mu
	seconds []second   // only run writes it
}

// run takes one second after another until ctx is done.
func (t *timeline) run(ctx context.Context, l *Loader) {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for ok, retried := int64(0), int64(0); ; {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		l.mu.Lock()
		h := t.latency
		t.latency = newHistogram()
		l.mu.Unlock()
		ms := func(q float64) float64 { return float64(h.quantile(q).Microseconds()) / 1000 }
		nowOK, nowRetried := l.OK.Load(), l.Retried.Load()
		t.seconds = append(t.seconds, second{float64(nowOK - ok), float64(nowRetried - retried), ms(.5), ms(.99), ms(1)})
		ok, retried = nowOK, nowRetried
	}
}

// line is a curve of a chart.
type line struct {
	Name, Class, Path string
}

// curve scales values to a chart of 1000 by 200, with most at the top.
func curve(name, class string, most float64, seconds []second, value func(second) float64) line {
	var path strings.Builder
	for i, s := range seconds {
		fmt.Fprintf(&path, "%c%.1f,%.1f", "ML"[min(i, 1)], float64(i)*1000/float64(max(len(seconds)-1, 1)), 200-200*value(s)/max(most, 1e-9))
	}
	return line{name, class, path.String()}
}

// chart is one of the page's charts.
type chart struct {
	Title, Unit string
	Most        float64
	Lines       []line
}

// newChart draws curves below one top. names are the curves', in the order of values.
func newChart(title, unit string, seconds []second, names []string, values ...func(second) float64) chart {
	c := chart{Title: title, Unit: unit}
	for _, s := range seconds {
		for _, v := range values {
			c.Most = max(c.Most, v(s))
		}
	}
	for i, v := range values {
		c.Lines = append(c.Lines, curve(names[i], fmt.Sprint("c", i), c.Most, seconds, v))
	}
	return c
}

// writePage writes the report to a file.
func (l *Loader) writePage(path string, checks []Check) error {
	var text, page bytes.Buffer
	asText := *l.Config
	asText.json = false
	was := l.Config
	l.Config = &asText
	l.Report(&text, checks)
	l.Config = was
	s := l.timeline.seconds
	fmt.Fprintf(&page, pageHead, html.EscapeString(l.Config.URL), l.start.UTC().Format(time.RFC3339), len(s))
	for _, c := range []chart{
		newChart("Accepted events", "/s", s, []string{"accepted", "requests sent again"}, func(s second) float64 { return s.accepted }, func(s second) float64 { return s.retries }),
		newChart("Latency from the intended time, a request", " ms", s, []string{"p50", "p99", "longest"}, func(s second) float64 { return s.p50 }, func(s second) float64 { return s.p99 }, func(s second) float64 { return s.longest }),
	} {
		c.write(&page)
	}
	fmt.Fprintf(&page, "<pre>%s</pre>\n</html>\n", html.EscapeString(text.String()))
	return os.WriteFile(path, page.Bytes(), 0o644)
}

// write writes the chart as a figure. Titles and names are this file's own.
func (c *chart) write(page *bytes.Buffer) {
	fmt.Fprintf(page, `<figure><figcaption>%s`, c.Title)
	for _, l := range c.Lines {
		fmt.Fprintf(page, ` <b class="%s">%s</b>`, l.Class, l.Name)
	}
	fmt.Fprintf(page, "<br><span>top: %.4g%s</span></figcaption>\n", c.Most, c.Unit)
	fmt.Fprintf(page, `<svg viewBox="0 0 1000 200" preserveAspectRatio="none" role="img" aria-label="%s, at most %.4g%s">`, c.Title, c.Most, c.Unit)
	for _, l := range c.Lines {
		fmt.Fprintf(page, `<path class="%s" d="%s"/>`, l.Class, l.Path)
	}
	page.WriteString("</svg></figure>\n")
}

// pageHead takes the URL, the start and the seconds. It is no html/template: that would make the binary 4 MB larger.
const pageHead = `<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Load on %[1]s</title>
<style>
:root { color-scheme: light dark; --text: #1b2330; --soft: #566173; --line: #dde2ea; --c0: #2257d6; --c1: #b45309; --c2: #9f1d5a; }
@media (prefers-color-scheme: dark) { :root { --text: #e6eaf1; --soft: #9aa6b8; --line: #2b3444; --c0: #7aa7ff; --c1: #f0a04b; --c2: #f08abf; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
pre { overflow-x: auto; } p, figcaption span { color: var(--soft); }
figure { margin: 2rem 0; } svg { width: 100%%; height: 12rem; overflow: visible; border-bottom: 1px solid var(--line); border-top: 1px solid var(--line); }
path { fill: none; stroke-width: 2; vector-effect: non-scaling-stroke; } .c0 { stroke: var(--c0); color: var(--c0); } .c1 { stroke: var(--c1); color: var(--c1); } .c2 { stroke: var(--c2); color: var(--c2); }
b.c0, b.c1, b.c2 { font-weight: 400; margin-left: 1rem; }
</style>
<h1>Load on %[1]s</h1>
<p>from %[2]s, %[3]d s</p>
`
