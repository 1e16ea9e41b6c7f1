package questions

import (
	"context"
	"sync"

	"github.com/ClickHouse/ch-go"
	"github.com/ClickHouse/ch-go/proto"
)

// Do runs a query. It may try again, and calls reset before each try.
type Do func(ctx context.Context, reset func(), q ch.Query) error

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

// Together runs the tasks at once. The first error ends them all, and is returned.
func Together(ctx context.Context, tasks ...func(context.Context) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var waiting sync.WaitGroup
	for _, task := range tasks {
		waiting.Go(func() {
			if err := task(ctx); err != nil {
				cancel(err)
			}
		})
	}
	waiting.Wait()
	return context.Cause(ctx)
}
