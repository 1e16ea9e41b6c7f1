// Rows that ClickHouse rejects, and their neighbours.
//
// A rejected insert stores nothing, so the bad rows have to be found. The error for a constraint has its expression, which
// ClickHouse evaluates over the round: one query finds all rows that break it. For any other error the round is halved until
// the bad rows stand alone. They go to the retry topic; their neighbours are stored.

package main

import (
	"context"
	"fmt"
	"regexp"

	"github.com/ClickHouse/ch-go"
	"github.com/ClickHouse/ch-go/proto"
)

// dropRejected takes the bad rows out of a rejected round. The error is ctx's.
func (ins *inserter) dropRejected(ctx context.Context, rejection error) error {
	if err := ins.persist(ctx, "look up a rejected round", func() error { return ins.settle(ctx) }); err != nil {
		return err
	}
	all := ins.merge()
	var bad []int
	if m := violated.FindStringSubmatch(rejection.Error()); m != nil {
		bad, _ = ins.violators(ctx, all, m[1]) // if that fails, the round is halved
	}
	switch {
	case len(bad) > 0:
	case all.rows() == 1:
		bad = []int{0}
	default:
		return ins.halve(ctx, all)
	}
	if err := ins.reject(ctx, all, bad, rejection); err != nil {
		return err
	}
	all.keep(others(bad, all.rows()))
	ins.round = append(ins.round[:0], all)
	return nil
}

// merge is the round as one block.
func (ins *inserter) merge() *block {
	all := newBlock(ins.rows())
	for _, b := range ins.round {
		all.copyRows(b, 0, b.rows())
	}
	return all
}

// violated finds the expression in ClickHouse's message for error 469, see
// https://github.com/ClickHouse/ClickHouse/blob/master/src/Processors/Transforms/CheckConstraintsTransform.cpp.
var violated = regexp.MustCompile(`(?s)is violated at row \d+\. Expression: \((.*)\)\. Column values: `)

// violators returns the rows that break a constraint: ClickHouse evaluates its expression over the block.
func (ins *inserter) violators(ctx context.Context, b *block, expression string) (bad []int, err error) {
	data := proto.Input{}
	for _, c := range b.columns {
		data = append(data, proto.InputColumn{Name: c.name, Data: c.column})
	}
	number, got := make(proto.ColUInt32, b.rows()), proto.ColUInt32{}
	for i := range number {
		number[i] = uint32(i)
	}
	err = ins.Do(ctx, eachRow(ch.Query{
		Body:          fmt.Sprintf("SELECT row_number FROM rejected WHERE NOT (%s) ORDER BY row_number", expression),
		ExternalTable: "rejected",
		ExternalData:  append(data, proto.InputColumn{Name: "row_number", Data: &number}),
	}, func(i int) { bad = append(bad, int(got[i])) }, &got))
	return bad, err
}

// reject puts off rows of the block. The dedupe forgets them, because they come back.
func (ins *inserter) reject(ctx context.Context, b *block, bad []int, why error) error {
	records := keepRows(append(b.records[:0:0], b.records...), bad)
	if err := ins.rejected(ctx, records, firstLine(why.Error())); err != nil {
		return err
	}
	for _, row := range bad {
		ins.dedupe.forget(b.id(row), b.at(row))
	}
	return nil
}

// halve stores each half of a block by itself and leaves an empty round. A bad row costs two inserts per halving.
func (ins *inserter) halve(ctx context.Context, all *block) error {
	middle := all.rows() / 2
	for _, half := range []*block{part(all, 0, middle), part(all, middle, all.rows())} {
		ins.round = append(ins.round[:0], half)
		if err := ins.storeRound(ctx); err != nil {
			return err
		}
	}
	ins.round = ins.round[:0]
	return nil
}

// part is a block of the rows [from, end) of another.
func part(all *block, from, end int) *block {
	b := newBlock(end - from)
	b.copyRows(all, from, end)
	return b
}

// copyRows appends the rows [from, end) of another block. Slow path: each record is parsed once more.
func (b *block) copyRows(other *block, from, end int) {
	var p eventParser
	for row := from; row < end; row++ {
		ev, _ := p.decode(other.records[row].Value) // the worker has parsed it without complaint
		b.append(other.id(row), ev, other.records[row])
	}
}

// others returns the numbers below n that are not in bad, which ascends.
func others(bad []int, n int) (rest []int) {
	for i := range n {
		if len(bad) > 0 && bad[0] == i {
			bad = bad[1:]
			continue
		}
		rest = append(rest, i)
	}
	return rest
}
