// ClickHouse: how to reach it, how to ask it, and which of its errors mean what.

package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/ClickHouse/ch-go"
	"github.com/ClickHouse/ch-go/proto"
)

// store knows how to reach ClickHouse.
type store struct {
	options  ch.Options
	database string
	cluster  string                      // CLICKHOUSE_CLUSTER
	fsync    string                      // 1 when an insert waits for the disk, else 0
	keepDays int                         // RETENTION_DAYS
	decides  bool                        // about these two: an instance that stores does; a command, or ROLE=api, may not have them set
	idle     func(context.Context) error // fails when an instance consumes; nil when nobody can
	userBits atomic.Int32                // precision of the user states that events_hourly has: queries have to say the same
	broken   brokenParts

	number, of int          // of the shard, from 1, and of how many; number is 0 of a store that stands for all
	replicas   []string     // addresses of the shard's servers
	current    atomic.Int32 // which of them is asked
	replicated bool         // a shard of the cluster has several, and the engines are Replicated
	partitions int          // of the topic, 0 when that does not matter
	late       atomic.Bool  // the shard did not answer when the others were prepared: prepareLate has to be called
	unplaced   bool         // its table does not say yet which shard it is
	rebuilding bool         // tables were being made anew when it was prepared, or that was cut off
}

// meant are the settings of every query: it means what it says, whatever the profile of CLICKHOUSE_USERNAME has. An answer is whole,
// of all shards, or an error; and a view without a target refuses an insert. A shard that the server itself is would be read in the
// query's own process, and not from one snapshot.
var meant = func() (settings []ch.Setting) {
	for value, keys := range map[string]string{
		"0": "limit offset extremes use_query_cache ignore_materialized_views_with_dropped_target_table skip_unavailable_shards prefer_localhost_replica " +
			"aggregate_functions_null_for_empty empty_result_for_aggregation_by_empty_set data_type_default_nullable prefer_column_name_to_alias",
		"throw": "read_overflow_mode read_overflow_mode_leaf group_by_overflow_mode sort_overflow_mode result_overflow_mode set_overflow_mode " +
			"distinct_overflow_mode join_overflow_mode transfer_overflow_mode timeout_overflow_mode timeout_overflow_mode_leaf",
	} {
		for key := range strings.FieldsSeq(keys) {
			settings = append(settings, ch.Setting{Key: key, Value: value})
		}
	}
	return settings
}()

// wantedUserBits is the precision of user states in a table that is made: see schema.sql.
const wantedUserBits = 17

func newStore(cfg *settings) *store {
	st := &store{
		database: cfg.clickhouseDatabase,
		cluster:  cfg.clickhouseCluster,
		fsync:    "0",
		keepDays: cfg.retentionDays,
		options: ch.Options{
			Address:          net.JoinHostPort(cfg.clickhouseHost, strconv.Itoa(cfg.clickhousePort)),
			User:             cfg.clickhouseUsername,
			Password:         cfg.clickhousePassword,
			ClientName:       "event-ingestion",
			DialTimeout:      3 * time.Second,
			HandshakeTimeout: 10 * time.Second,
			ReadTimeout:      insertTimeout,
			Settings:         meant,
		},
	}
	if cfg.clickhouseTLS {
		st.options.TLS = &tls.Config{RootCAs: cfg.clickhouseCA}
	}
	if cfg.clickhouseFsync {
		st.fsync = "1"
	}
	st.replicas, st.of = []string{st.options.Address}, 1
	st.userBits.Store(wantedUserBits)
	return st
}

// dial connects to the replica that answered last, or to the next one that answers.
func (s *store) dial(ctx context.Context) (*ch.Client, error) {
	var failures []error
	for range s.replicas {
		options, current := s.options, s.current.Load()
		options.Address = s.replicas[int(current)%len(s.replicas)]
		c, err := ch.Dial(ctx, options)
		if err == nil {
			return c, nil
		}
		failures = append(failures, fmt.Errorf("connect to ClickHouse at %s: %w", options.Address, err))
		s.current.CompareAndSwap(current, current+1)
	}
	return nil, errors.Join(failures...)
}

// asker runs a query: a connection, or a pool of them.
type asker interface {
	Do(ctx context.Context, q ch.Query) error
}

// eachRow has the query's columns decoded into these, by their order, and calls row with the number of each row in them.
func eachRow(q ch.Query, row func(i int), columns ...proto.ColResult) ch.Query {
	results := make(proto.Results, len(columns))
	for i, c := range columns {
		results[i].Data = c
	}
	q.Result = results
	q.OnResult = func(_ context.Context, b proto.Block) error {
		for i := range b.Rows {
			row(i)
		}
		return nil
	}
	return q
}

// number runs a query that answers one UInt64.
func number(ctx context.Context, a asker, q ch.Query) (n uint64, err error) {
	var answer proto.ColUInt64
	answered := false
	err = a.Do(ctx, eachRow(q, func(i int) { n, answered = answer[i], true }, &answer))
	if err == nil && !answered {
		err = fmt.Errorf("no number was answered to %s", q.Body)
	}
	return n, err
}

// connected calls f with a connection of its own, which is closed when ctx is done.
func (s *store) connected(ctx context.Context, f func(asker) error) error {
	c, err := s.dial(ctx)
	if err != nil {
		return err
	}
	defer c.Close()
	defer context.AfterFunc(ctx, func() { c.Close() })() // ch-go looks at ctx between two packets only
	if err = f(c); err != nil && ctx.Err() != nil {
		return ctx.Err() // and not that the connection is closed
	}
	return err
}

// session is steps on one server, of which each needs those before it. Its first error stays: after it nothing is asked,
// changed or said, every number is 0, and no wait lasts.
type session struct {
	ctx   context.Context
	store *store
	conn  asker
	out   io.Writer
	err   error
}

// session takes steps on a connection of their own, and returns their first error, with the shard's name.
func (s *store) session(ctx context.Context, out io.Writer, steps func(*session)) error {
	err := s.connected(ctx, func(c asker) error {
		r := session{ctx: ctx, store: s, conn: c, out: out}
		steps(&r)
		return r.err
	})
	if err != nil && s.of > 1 {
		err = fmt.Errorf("%s: %w", s.name("ClickHouse"), err)
	}
	return err
}

// inTurn takes the steps one after the other, each on all shards before the next.
func inTurn(ctx context.Context, shards []*store, out io.Writer, steps ...func(*session)) error {
	for _, step := range steps {
		for _, st := range shards {
			if err := st.session(ctx, out, step); err != nil {
				return err
			}
		}
	}
	return nil
}

// do takes a step.
func (s *session) do(step func(context.Context, asker) error) {
	if s.err == nil {
		s.err = step(s.ctx, s.conn)
	}
}

func (s *session) fail(why string) {
	s.do(func(context.Context, asker) error { return errors.New(why) })
}

func (s *session) say(what string) {
	if s.err == nil {
		fmt.Fprintln(s.out, s.store.name(what))
	}
}

// during takes steps, and says of their error what was attempted.
func (s *session) during(what string, steps func()) {
	if s.err != nil {
		return
	}
	if steps(); s.err != nil {
		s.err = fmt.Errorf("%s: %w", what, s.err)
	}
}

// run runs a query, with the braces of schema.sql.
func (s *session) run(q ch.Query) {
	q.Body = s.store.sql(q.Body)
	s.do(func(ctx context.Context, c asker) error { return c.Do(ctx, q) })
}

// ask is run for a query that answers, see eachRow.
func (s *session) ask(q ch.Query, row func(i int), columns ...proto.ColResult) {
	s.run(eachRow(q, row, columns...))
}

// insert is run for an INSERT … SELECT.
func (s *session) insert(q ch.Query) {
	q.Settings = append(q.Settings, s.store.inserting()...)
	s.run(q)
}

// change runs statements that answer nothing: with replicas, each when every one has done it.
func (s *session) change(statements ...string) {
	for _, stmt := range statements {
		q := ch.Query{Body: stmt}
		if s.store.replicated {
			q.Settings = []ch.Setting{{Key: "distributed_ddl_output_mode", Value: "none"}} // else it answers a row a replica
		}
		s.run(q)
	}
}

// dropTable drops a table of any size: ClickHouse would refuse one of more than 50 GB.
func (s *session) dropTable(name string) {
	s.change("DROP TABLE IF EXISTS {database}." + name + "{on cluster} SYNC SETTINGS max_table_size_to_drop = 0")
}

// number asks for one UInt64.
func (s *session) number(sql string) (n int64) {
	s.do(func(ctx context.Context, c asker) error {
		answer, err := number(ctx, c, ch.Query{Body: s.store.sql(sql)})
		n = int64(answer)
		return err
	})
	return n
}

// has says whether one of the tables exists.
func (s *session) has(tables ...string) (is bool) {
	s.during("look for tables", func() {
		names := strings.Join(tables, "', '")
		is = s.number("SELECT count() FROM system.tables WHERE database = '{database}' AND name IN ('"+names+"')") > 0
	})
	return is
}

// now is the server's clock, in Unix milliseconds.
func (s *session) now() int64 { return s.number("SELECT toUInt64(toUnixTimestamp64Milli(now64(3)))") }

// saysOtherStates is whether a query failed because events_hourly was made anew since readStates: the query says another
// precision than the table has.
func saysOtherStates(err error) bool {
	return ch.IsErr(err, proto.ErrIllegalTypeOfArgument, proto.ErrNoCommonType, proto.ErrCannotConvertType, proto.ErrTypeMismatch)
}

// inserting are the settings of every insert: it is done when it is acknowledged, and a majority of the shard's replicas has it.
//
// ClickHouse's own deduplication of inserts is off: it remembers a block before the part is in place, so that an insert may be
// answered "known" and not be there, and what was lost with a broken part could never be stored again.
func (s *store) inserting() []ch.Setting {
	settings := []ch.Setting{
		{Key: "async_insert", Value: "0"},
		{Key: "insert_deduplicate", Value: "0"},
		{Key: "deduplicate_insert", Value: "disable"}, // where it exists it overrides the one above, and is on
	}
	if s.replicated {
		settings = append(settings, ch.Setting{Key: "insert_quorum", Value: "auto"}, ch.Setting{Key: "insert_quorum_parallel", Value: "1"})
	}
	return settings
}

// rejections are ClickHouse's codes for "this data, never", by
// https://github.com/ClickHouse/ClickHouse/blob/master/src/Common/ErrorCodes.cpp. Everything else is taken for
// transient: trying again in vain holds up, giving up in error loses.
var rejections = []proto.Error{
	proto.ErrViolatedConstraint, proto.ErrTypeMismatch, proto.ErrCannotConvertType, proto.ErrIncorrectData,
	proto.ErrArgumentOutOfBound, proto.ErrValueIsOutOfRangeOfDataType, proto.ErrDecimalOverflow,
	proto.ErrTooLargeStringSize, proto.ErrTooLargeArraySize,
}

// parameter is a query parameter of type String. The server takes the value for a quoted literal, and what is in the
// quotes for a field of TSV: each layer has its escapes. ch-go's Parameters knows neither.
func parameter(key, value string) proto.Parameter {
	return proto.Parameter{Key: key, Value: "'" + literalEscapes.Replace(tsvEscapes.Replace(value)) + "'"}
}

var (
	tsvEscapes     = strings.NewReplacer(`\`, `\\`, "\n", `\n`, "\r", `\r`, "\t", `\t`, "\b", `\b`, "\f", `\f`, "\x00", `\0`)
	literalEscapes = strings.NewReplacer(`\`, `\\`, `'`, `\'`)
)

func firstLine(s string) string {
	s, _, _ = strings.Cut(s, "\n")
	return s
}
