// Rows that ClickHouse rejects, and their neighbours.
//
// A rejected insert stores nothing, so the bad rows have to be found. The error for a constraint has its expression, which
// ClickHouse evaluates: one query a block finds all rows that break it. For any other error the round is halved until the bad
// rows stand alone. They go to the retry topic; their neighbours are stored.

package main

import (
	"context"
	"fmt"
	"regexp"
	"slices"

	"github.com/ClickHouse/ch-go"
	"github.com/ClickHouse/ch-go/proto"
	"github.com/twmb/franz-go/pkg/kgo"
)

// dropRejected takes the bad rows out of a rejected round, or stores it in two halves. The error is ctx's.
func (ins *inserter) dropRejected(ctx context.Context, rejection error) error {
	if err := ins.persist(ctx, "look up a rejected round", func() error { return ins.settle(ctx) }); err != nil {
		return err
	}
	round := slices.DeleteFunc(slices.Clone(ins.round), func(b *block) bool { return b.rows() == 0 })
	single := ins.rows() == 1
	var bad []*kgo.Record
	for _, b := range round {
		rows := ins.violators(ctx, b, rejection)
		b.filter(func(row int) bool {
			if _, violates := slices.BinarySearch(rows, row); !violates && !single {
				return true
			}
			bad = append(bad, b.records[row])
			ins.dedupe.forget(b.id(row), b.at(row)) // because it comes back
			return false
		})
	}
	switch {
	case len(bad) > 0:
		return ins.rejected(ctx, bad, firstLine(rejection.Error()))
	case len(round) > 0:
		return ins.halve(ctx, round)
	}
	return nil
}

// violated finds the expression in ClickHouse's message for error 469, see
// https://github.com/ClickHouse/ClickHouse/blob/master/src/Processors/Transforms/CheckConstraintsTransform.cpp.
var violated = regexp.MustCompile(`(?s)is violated at row \d+\. Expression: \((.*)\)\. Column values: `)

// violators returns the rows that break the constraint which the rejection names: ClickHouse evaluates its expression over the
// block. None for another rejection, and when that fails.
func (ins *inserter) violators(ctx context.Context, b *block, rejection error) (bad []int) {
	m := violated.FindStringSubmatch(rejection.Error())
	if m == nil {
		return nil
	}
	number, got := make(proto.ColUInt32, b.rows()), proto.ColUInt32{}
	for i := range number {
		number[i] = uint32(i)
	}
	err := ins.Do(ctx, eachRow(ch.Query{
		Body:          fmt.Sprintf("SELECT row_number FROM rejected WHERE NOT (%s) ORDER BY row_number", m[1]),
		ExternalTable: "rejected",
		ExternalData:  append(slices.Clone(b.columns), proto.InputColumn{Name: "row_number", Data: &number}),
	}, func(i int) { bad = append(bad, int(got[i])) }, &got))
	if err != nil {
		return nil
	}
	return bad
}

// halve stores each half of a round by itself and leaves none. A bad row costs two inserts per halving.
func (ins *inserter) halve(ctx context.Context, round []*block) error {
	first, second := round[:len(round)/2], round[len(round)/2:]
	if len(first) == 0 {
		all, middle := round[0], round[0].rows()/2
		first, second = []*block{all.part(0, middle)}, []*block{all.part(middle, all.rows())}
	}
	for _, half := range [][]*block{first, second} {
		ins.round = append(ins.round[:0], half...)
		if err := ins.insertRows(ctx); err != nil {
			return err
		}
	}
	ins.round = ins.round[:0]
	return nil
}

// part is a block of the rows [from, end).
func (b *block) part(from, end int) *block {
	part := newBlock(end - from)
	for row := from; row < end; row++ {
		part.append(b.id(row), b.event(row), b.records[row])
	}
	return part
}
