// The progress of a command that reads files.

package ops

import (
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"time"
)

// progress says how far the files have been read: a bar on a terminal, else a line now and then.
type progress struct {
	w        io.Writer
	terminal bool
	total    int64        // bytes of all files; 0 when one of them is standard input
	read     int64        // of them; only who reads touches it
	done     atomic.Int64 // of these, what has been dealt with
	refused  atomic.Int64
	begun    time.Time
}

const (
	barWidth  = 30
	barPause  = 500 * time.Millisecond
	linePause = 10 * time.Second
)

func newProgress(w io.Writer, files []string) (*progress, error) {
	p := &progress{w: w, begun: time.Now()}
	if f, is := w.(*os.File); is {
		if info, err := f.Stat(); err == nil {
			p.terminal = info.Mode()&os.ModeCharDevice != 0
		}
	}
	for _, file := range files {
		if file == "-" {
			continue
		}
		info, err := os.Stat(file)
		if err != nil {
			return nil, err
		}
		p.total += info.Size()
	}
	if slices.Contains(files, "-") {
		p.total = 0
	}
	return p, nil
}

// counted is r with its bytes counted as read.
func (p *progress) counted(r io.Reader) io.Reader { return countedReader{r, &p.read} }

type countedReader struct {
	io.Reader
	n *int64
}

func (r countedReader) Read(b []byte) (n int, err error) {
	n, err = r.Reader.Read(b)
	*r.n += int64(n)
	return n, err
}

// begin shows what words says until the func that it returns is called.
func (p *progress) begin(words func() string) (end func()) {
	stop, stopped := make(chan struct{}), make(chan struct{})
	every := linePause
	if p.terminal {
		every = barPause
	}
	go func() { // ends with stop
		defer close(stopped)
		tick := time.NewTicker(every)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				p.print(words())
			case <-stop:
				if p.terminal {
					p.print(words())
					fmt.Fprintln(p.w)
				}
				return
			}
		}
	}()
	return func() {
		close(stop)
		<-stopped
	}
}

func (p *progress) print(words string) {
	share, left, bar := "", "", ""
	if read := min(p.done.Load(), p.total); p.total > 0 {
		part := float64(read) / float64(p.total)
		share = fmt.Sprintf("%3.0f %%  ", 100*part)
		if full := int(barWidth * part); p.terminal {
			bar = "[" + strings.Repeat("=", full) + strings.Repeat(" ", barWidth-full) + "] "
		}
		if took := time.Since(p.begun); part > 0 && part < 1 {
			left = ", " + (time.Duration(float64(took) * (1 - part) / part)).Round(time.Second).String() + " left"
		}
	}
	if p.terminal {
		fmt.Fprintf(p.w, "\r%s%s%s%s\x1b[K", bar, share, words, left)
		return
	}
	fmt.Fprintf(p.w, "%s%s%s\n", share, words, left)
}
