// import: the events of another system, of any age.
//
// A line is checked by every rule of an event but that of its age, and goes onto the topic under its own key, where it meets its worker
// and the dedupe as every other event does: importing a file again counts nothing twice. What is read is put in the order of its time,
// some at a time: a round of the program then has rows of one month or two, and an insert makes a part for each. Memory is bounded,
// however long the files and their lines are. pace.go has it go no faster than leaves live events fresh.

package ops

import (
	"bufio"
	"bytes"
	"cmp"
	"compress/gzip"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/twmb/franz-go/pkg/kadm"
	"github.com/twmb/franz-go/pkg/kgo"
)

const (
	// maxLine is what the API takes as one event, in bytes.
	maxLine = 64 << 10
	// sortEvents and sortBytes are how much is put in order at a time.
	sortEvents, sortBytes = 50_000, 24 << 20
	// onTheirWay and onTheirWayBytes bound what the brokers have not acknowledged yet.
	onTheirWay, onTheirWayBytes = 10_000, 16 << 20
	// zstdWindow is the largest window of a file that is taken: 2^27 is what `zstd --long` makes.
	zstdWindow = 128 << 20
	// importTimeout is how long the brokers have to acknowledge an event.
	importTimeout = time.Minute
)

func importFiles(fs *flag.FlagSet) action {
	dryRun := fs.Bool("dry-run", false, "only check, and say what would be refused")
	segment := fs.Bool("segment", false, "a line is a message of Segment's protocol instead of an event")
	refused := fs.String("refused", "", "write what is refused, and why, to this file: a JSON object a line")
	fs.Usage = func() {
		fmt.Fprintln(fs.Output(), "import [-dry-run] [-segment] [-refused FILE] FILE…   put events of any age on the topic, one of JSON a line\n"+
			"A FILE may be compressed by gzip or zstd; - is standard input. What is imported twice is counted once. It ends with 1 when something was refused.")
		fs.PrintDefaults()
	}
	return func(ctx context.Context, sys System, files []string, w io.Writer) (err error) {
		if len(files) == 0 {
			return badArgument{errors.New("which FILE? - is standard input")}
		}
		i := &importer{System: sys, segment: *segment, refused: map[string]int64{}}
		if i.show, err = newProgress(w, files); err != nil {
			return err
		}
		if *refused != "" {
			f, err := os.Create(*refused)
			if err != nil {
				return err
			}
			defer f.Close()
			i.refusals = bufio.NewWriter(f)
		}
		if i.erased, err = sys.erasures(ctx); err != nil {
			return err
		}
		if !*dryRun {
			stop, err := i.connect(ctx)
			if err != nil {
				return err
			}
			defer stop()
		}
		err = i.run(ctx, files)
		i.tell(w, *dryRun)
		if err == nil && len(i.refused) > 0 {
			err = errDiffers
		}
		return err
	}
}

// importer imports files, one after the other.
type importer struct {
	System
	segment  bool
	erased   erased
	refusals *bufio.Writer // nil when nobody wants to know
	kafka    *kgo.Client   // nil for a dry run
	pace     *pace
	show     *progress

	sorting  []imported
	bytes    int            // of these
	sending  sync.WaitGroup // what is not acknowledged yet
	accepted atomic.Int64   // by the brokers, or by a dry run
	failure  atomic.Pointer[error]

	refused  map[string]int64 // by the code of the first problem
	notKept  int64            // messages of kinds that are not stored
	ofErased int64
}

// imported is a checked event that waits for its turn.
type imported struct {
	at         int64
	key, value []byte
}

// connect makes the client, and refuses a group that has no members: nobody would store anything.
func (i *importer) connect(ctx context.Context) (stop func(), err error) {
	i.kafka, err = i.Kafka("event-ingestion-import", kgo.RecordPartitioner(kgo.StickyKeyPartitioner(nil)), kgo.ProducerLinger(10*time.Millisecond),
		kgo.ProducerBatchCompression(kgo.SnappyCompression()), kgo.RecordDeliveryTimeout(importTimeout),
		kgo.MaxBufferedRecords(onTheirWay), kgo.MaxBufferedBytes(onTheirWayBytes))
	if err != nil {
		return nil, err
	}
	admin := kadm.NewClient(i.kafka)
	if members, err := membersOf(ctx, admin, i.Group); err != nil || len(members) == 0 {
		i.kafka.Close()
		return nil, cmp.Or(err, fmt.Errorf("group %s has no members: start the program, which stores what is imported", i.Group))
	}
	watching, cancel := context.WithCancel(ctx)
	i.pace = newPace()
	done := make(chan struct{})
	go func() { // ends with watching
		defer close(done)
		i.pace.watch(watching, func(ctx context.Context) (committed, ends map[int32]int64, err error) { return i.reached(ctx, admin) })
	}()
	return func() {
		cancel()
		<-done
		i.kafka.Close()
	}, nil
}

// reached is how far the main topic is stored, and where it ends.
func (sys System) reached(ctx context.Context, admin *kadm.Client) (committed, ends map[int32]int64, err error) {
	answer, err := committedOf(ctx, admin, sys.Group, sys.Topic)
	if err != nil {
		return nil, nil, err
	}
	listed, err := wholeAnswer(admin.ListEndOffsets(ctx, sys.Topic))
	if err != nil {
		return nil, nil, err
	}
	committed, ends = map[int32]int64{}, map[int32]int64{}
	for p, o := range answer[sys.Topic] {
		committed[p] = o.At
	}
	for p, o := range listed[sys.Topic] {
		ends[p] = o.Offset
	}
	return committed, ends, nil
}

// run imports the files. When it fails, what is on its way is waited for, so that the counts are true.
func (i *importer) run(ctx context.Context, files []string) (err error) {
	defer i.show.begin(i.line)()
	for _, file := range files {
		if err = i.file(ctx, file); err != nil {
			err = fmt.Errorf("%q: %w; it is safe to run this again", file, err)
			break
		}
	}
	if err == nil {
		err = i.send(ctx)
	}
	i.sending.Wait()
	if failure := i.failure.Load(); failure != nil && err == nil {
		err = fmt.Errorf("%w; it is safe to run this again", *failure)
	}
	if i.refusals != nil {
		err = cmp.Or(err, i.refusals.Flush())
	}
	return err
}

// file imports one file, whichever way it is compressed.
func (i *importer) file(ctx context.Context, name string) error {
	f := os.Stdin
	if name != "-" {
		var err error
		if f, err = os.Open(name); err != nil {
			return err
		}
		defer f.Close()
	}
	raw := bufio.NewReaderSize(i.show.counted(f), maxLine)
	var text io.Reader = raw
	switch magic, _ := raw.Peek(4); {
	case bytes.HasPrefix(magic, []byte{0x1f, 0x8b}):
		z, err := gzip.NewReader(raw)
		if err != nil {
			return err
		}
		text = z
	case bytes.Equal(magic, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		z, err := zstd.NewReader(raw, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(zstdWindow), zstd.WithDecoderLowmem(true))
		if err != nil {
			return err
		}
		defer z.Close()
		text = z
	}
	return i.lines(ctx, name, text)
}

// lines imports a text. A line beyond maxLine is refused without being kept.
func (i *importer) lines(ctx context.Context, name string, text io.Reader) error {
	r := bufio.NewReaderSize(text, maxLine+len("\r\n"))
	for number := int64(1); ; number++ {
		line, err := r.ReadSlice('\n')
		long := false
		for ; err == bufio.ErrBufferFull; _, err = r.ReadSlice('\n') {
			long = true
		}
		if err != nil && err != io.EOF {
			return fmt.Errorf("line %d: %w", number, err)
		}
		if number == 1 {
			line = bytes.TrimPrefix(line, []byte("\ufeff"))
		}
		if line = bytes.TrimSpace(line); long {
			i.refuse(name, number, nil, [][3]string{{"", "validation.max-length.error", fmt.Sprintf("the line is larger than %d KiB", maxLine>>10)}})
		} else if len(line) > 0 {
			if e := i.event(ctx, name, number, line); e != nil {
				return e
			}
		}
		if err == io.EOF {
			return nil
		}
	}
}

// event checks a line and takes in what is good.
func (i *importer) event(ctx context.Context, name string, number int64, line []byte) error {
	value, id, at, user, problems := i.CheckLine(line, i.segment)
	switch {
	case len(problems) > 0:
		i.refuse(name, number, line, problems)
	case value == nil:
		i.notKept++
	case i.erased.has(user, at):
		i.ofErased++
	case i.kafka == nil:
		i.accepted.Add(1)
		i.show.done.Store(i.show.read)
	default:
		i.sorting = append(i.sorting, imported{at, hex.AppendEncode(nil, id[:]), value})
		if i.bytes += len(value); len(i.sorting) >= sortEvents || i.bytes >= sortBytes {
			return i.send(ctx)
		}
	}
	return nil
}

// refuse counts a line, and writes it down with all that is wrong.
func (i *importer) refuse(name string, number int64, line []byte, problems [][3]string) {
	i.refused[problems[0][1]]++
	i.show.refused.Add(1)
	if i.refusals == nil {
		return
	}
	type problem struct {
		Field string `json:"field"`
		Code  string `json:"code"`
		Error string `json:"error"`
	}
	entry := struct {
		File   string    `json:"file"`
		Line   int64     `json:"line"`
		Errors []problem `json:"errors"`
		Text   string    `json:"text"`
	}{File: name, Line: number, Text: string(line)}
	for _, p := range problems {
		entry.Errors = append(entry.Errors, problem{p[0], p[1], p[2]})
	}
	json.NewEncoder(i.refusals).Encode(entry) // an error stays with the writer, and Flush returns it
}

// send puts what has been read on the topic, in the order of its time.
func (i *importer) send(ctx context.Context) error {
	slices.SortStableFunc(i.sorting, func(a, b imported) int { return cmp.Compare(a.at, b.at) })
	from := i.show.done.Load()
	for n, ev := range i.sorting {
		if n%128 == 0 {
			i.show.done.Store(from + (i.show.read-from)*int64(n)/int64(len(i.sorting)))
		}
		if failure := i.failure.Load(); failure != nil {
			return *failure
		}
		if err := i.pace.wait(ctx); err != nil {
			return err
		}
		i.sending.Add(1)
		i.kafka.Produce(ctx, &kgo.Record{Topic: i.Topic, Key: ev.key, Value: ev.value}, func(_ *kgo.Record, err error) {
			if err != nil {
				i.failure.CompareAndSwap(nil, &err)
			} else {
				i.accepted.Add(1)
			}
			i.sending.Done()
		})
	}
	i.show.done.Store(i.show.read)
	clear(i.sorting)
	i.sorting, i.bytes = i.sorting[:0], 0
	return nil
}

// line is what a look at the progress says beside the share.
func (i *importer) line() string {
	at := ""
	if i.pace != nil {
		at = i.pace.words()
	}
	return fmt.Sprintf("%d accepted, %d refused%s", i.accepted.Load(), i.show.refused.Load(), at)
}

// tell ends with the counts.
func (i *importer) tell(w io.Writer, dryRun bool) {
	verb := "accepted"
	if dryRun {
		verb = "would be accepted"
	}
	fmt.Fprintf(w, "%d events %s\n", i.accepted.Load(), verb)
	for _, code := range slices.Sorted(maps.Keys(i.refused)) {
		fmt.Fprintf(w, "%d refused: %s\n", i.refused[code], code)
	}
	if i.notKept > 0 {
		fmt.Fprintf(w, "%d messages of kinds that are not stored\n", i.notKept)
	}
	if i.ofErased > 0 {
		fmt.Fprintf(w, "%d left out: their users were erased\n", i.ofErased)
	}
}
