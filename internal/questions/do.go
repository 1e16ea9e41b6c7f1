package questions

import (
	"cmp"
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ClickHouse/ch-go"
	"github.com/ClickHouse/ch-go/proto"

	"github.com/event-ingestion/event-ingestion/internal/troubles"
)

// Do runs a query. It may try again, and calls reset before each try.
type Do func(ctx context.Context, reset func(), q ch.Query) error

// ErrCut is an answer that is cut off before it ends, or throws rows away: a setting of the profile does that.
var ErrCut = errors.New("ClickHouse answers with fewer rows than it has; look at the profile of CLICKHOUSE_USERNAME for what throws rows away")

// ErrRecounted is the answer while hours of the range are recounted.
var ErrRecounted = errors.New("these hours are being recounted")

const (
	// pause is the time between two answers while hours are recounted or a table is detached by a person, for patience.
	pause    = 50 * time.Millisecond
	patience = time.Second
)

// Patiently asks, and again for a second while the error is one that passes. Nobody holds a turn meanwhile.
func Patiently(ctx context.Context, ask func() ([]byte, error)) (body []byte, err error) {
	passes := func() bool {
		return errors.Is(err, ErrRecounted) || ch.IsErr(err, proto.ErrUnknownTable, proto.ErrFunctionThrowIfValueIsNonZero)
	}
	body, err = ask()
	for asked := time.Now(); passes() && time.Since(asked) < patience && troubles.Sleep(ctx, pause) == nil; {
		body, err = ask()
	}
	return body, err
}

// all is EachRow for a query whose last column, beside these, says how many rows it has.
func (do Do) all(ctx context.Context, reset func(), q ch.Query, row func(i int), columns ...proto.ColResult) error {
	var rows proto.ColUInt64
	var answered, expected uint64
	err := do(ctx, func() {
		answered, expected = 0, 1
		reset()
	}, EachRow(q, func(i int) {
		answered, expected = answered+1, rows[i]
		row(i)
	}, append(columns, &rows)...))
	if err == nil && answered != expected {
		err = ErrCut
	}
	return err
}

// EachRow has the query's columns decoded into these, by their order, and calls row with the number of each row in them.
func EachRow(q ch.Query, row func(i int), columns ...proto.ColResult) ch.Query {
	q.Result = make(proto.Results, len(columns))
	for i, c := range columns {
		q.Result.(proto.Results)[i].Data = c
	}
	q.OnResult = func(_ context.Context, b proto.Block) error {
		for i := range b.Rows {
			row(i)
		}
		return nil
	}
	return q
}

// Together runs the tasks at once. The first error ends them all, and is returned. ErrRecounted lets the others end by themselves:
// whoever asks again soon needs their connections, which an end in the middle of a query costs.
func Together(ctx context.Context, tasks ...func(context.Context) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var recounts atomic.Int64
	var waiting sync.WaitGroup
	for _, task := range tasks {
		waiting.Go(func() {
			switch err := task(ctx); {
			case errors.Is(err, ErrRecounted):
				recounts.Add(1)
			case err != nil:
				cancel(err)
			}
		})
	}
	waiting.Wait()
	return cmp.Or(context.Cause(ctx), recounted(recounts.Load()))
}

// recounted is ErrRecounted when there are recounts: a number in an answer, because an exception takes ClickHouse far longer.
func recounted(recounts int64) error {
	if recounts > 0 {
		return ErrRecounted
	}
	return nil
}
