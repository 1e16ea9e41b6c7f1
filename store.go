// ClickHouse: how to reach it, the schema, and which of its errors mean what.

package main

import (
	"context"
	"crypto/tls"
	_ "embed"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ClickHouse/ch-go"
	"github.com/ClickHouse/ch-go/proto"
)

//go:embed schema.sql
var schemaSQL string

// store knows how to reach ClickHouse.
type store struct {
	options  ch.Options
	database string
	cluster  string       // CLICKHOUSE_CLUSTER
	fsync    string       // 1 when an insert waits for the disk, else 0
	keepDays int          // RETENTION_DAYS
	userBits atomic.Int32 // precision of the user states that events_hourly has: queries have to say the same
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

// prepare finds the shards and brings their tables up to date: it runs schema.sql, statement by statement. A table whose user
// states have another precision keeps it, and everything says that precision, until `reconcile -rebuild` has made the table
// anew. The topic has so many partitions, 0 when that does not matter. A shard that does not answer is prepared later, by
// whoever reaches it first. The error is errPlacement when events were placed otherwise.
func (s *store) prepare(ctx context.Context, partitions int) (shards []*store, err error) {
	if shards, err = s.shards(ctx); err != nil {
		return nil, err
	}
	if len(shards) > 1 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, shardsTimeout)
		defer cancel()
	}
	for _, sh := range shards {
		sh.partitions = partitions
	}
	failed := make([]error, len(shards))
	// A view of all shards can be made when all have the tables.
	for _, step := range []func(*store, context.Context, asker) error{(*store).prepareTables, (*store).prepareViews} {
		var steps sync.WaitGroup
		for i, sh := range shards {
			if failed[i] == nil {
				steps.Go(func() { // ends with ctx
					failed[i] = sh.connected(ctx, func(c asker) error { return step(sh, ctx, c) })
				})
			}
		}
		steps.Wait()
		if err := errors.Join(failed...); errors.Is(err, errPlacement) || !slices.Contains(failed, nil) {
			return nil, err
		} else if unplaced := slices.ContainsFunc(shards, func(sh *store) bool { return sh.unplaced }); err != nil && unplaced {
			return nil, fmt.Errorf("the first start needs every shard: %w", err)
		}
	}
	for i, sh := range shards {
		if failed[i] != nil {
			slog.Warn(sh.name("a server does not answer, the others go on"), "error", failed[i])
			sh.late.Store(true)
		} else {
			s.userBits.Store(sh.userBits.Load())
		}
	}
	return shards, nil
}

// shardsTimeout bounds prepare with several shards: those that answer wait for the others.
const shardsTimeout = 10 * time.Second

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

// prepareLate is prepare for a shard that did not answer then.
func (s *store) prepareLate(ctx context.Context, c asker) error {
	if !s.late.Load() {
		return nil
	}
	err := s.prepareTables(ctx, c)
	if err == nil {
		err = s.prepareViews(ctx, c)
	}
	s.late.Store(err != nil)
	return err
}

// prepareTables is prepare for all but the views and the placement of one shard.
func (s *store) prepareTables(ctx context.Context, c asker) (err error) {
	if err := s.attach(ctx, c); err != nil { // a real fault shows in the next query
		slog.Debug("attach tables", "error", err)
	}
	if s.rebuilding, err = s.has(ctx, c, tableNext, tableRebuilt, eventsMoved); err != nil { // before the states, which change with its end
		return err
	}
	if err := s.readStates(ctx, c); err != nil {
		return err
	}
	if s.unplaced, err = s.checkPlacement(ctx, c); err != nil {
		return err
	}
	if s.rebuilding { // and it may be about to exchange the tables: nothing to be changed beside that
		slog.Warn("tables are being made anew and stay as they are; when no `event-ingestion reconcile -rebuild` or reshard runs, run it again: it finishes what one has begun")
		return nil
	}
	if err := s.makeTables(ctx, c); err != nil {
		return err
	}
	if bits := s.userBits.Load(); bits != wantedUserBits {
		slog.Warn("events_hourly has user states of another precision, which works and is slow; `event-ingestion reconcile -rebuild` makes it anew from events while ingestion goes on",
			"bits", bits, "wanted", wantedUserBits)
	}
	return nil
}

// prepareViews does what prepareTables left.
func (s *store) prepareViews(ctx context.Context, c asker) error {
	if s.unplaced {
		if err := s.place(ctx); err != nil {
			return fmt.Errorf("note which shard this is: %w", err)
		}
		s.unplaced = false
	}
	if s.rebuilding {
		return nil
	}
	return s.makeViews(ctx, c)
}

// makeTables runs the statements of schema.sql, but for those of makeViews, and sees to the retention.
func (s *store) makeTables(ctx context.Context, c asker) error {
	if err := s.apply(ctx, c, false); err != nil {
		return err
	}
	for table, column := range map[string]string{"events": "timestamp", "events_hourly": "hour"} {
		if err := s.applyRetention(ctx, c, table, column); err != nil {
			return fmt.Errorf("apply RETENTION_DAYS to %s: %w", table, err)
		}
	}
	return nil
}

// makeViews makes those that read all shards.
func (s *store) makeViews(ctx context.Context, c asker) error { return s.apply(ctx, c, true) }

func (s *store) apply(ctx context.Context, c asker, views bool) error {
	for _, stmt := range schemaStatements {
		if strings.Contains(stmt, "CREATE OR REPLACE VIEW") == views {
			if err := s.change(ctx, c, stmt); err != nil {
				return fmt.Errorf("apply schema.sql: %w", err)
			}
		}
	}
	return nil
}

// ttlOf finds the TTL in a statement that makes a table.
var ttlOf = regexp.MustCompile(` TTL (.*?) SETTINGS `)

// applyRetention gives a table the TTL that RETENTION_DAYS asks for, or takes it away. A change has ClickHouse look at every
// part once, without writing its rows again (materialize_ttl_recalculate_only); without a change nothing happens.
func (s *store) applyRetention(ctx context.Context, c asker, table, column string) error {
	var made proto.ColStr
	err := c.Do(ctx, ch.Query{
		Body:   fmt.Sprintf("SELECT create_table_query FROM system.tables WHERE database = '%s' AND name = '%s'", s.database, table),
		Result: proto.Results{{Data: &made}},
	})
	if err != nil || made.Rows() == 0 {
		return err
	}
	has, wanted, change := "", "", "REMOVE TTL"
	if m := ttlOf.FindStringSubmatch(made.First()); m != nil {
		has = m[1]
	}
	if s.keepDays > 0 {
		wanted = fmt.Sprintf("%s + toIntervalDay(%d)", column, s.keepDays)
		change = "MODIFY TTL " + wanted
	}
	if has == wanted {
		return nil
	}
	slog.Info("a table's retention changes", "table", table, "ttl", wanted)
	return s.change(ctx, c, "ALTER TABLE {database}."+table+"{on cluster} "+change)
}

// change runs a statement that answers nothing: with replicas, when every one has done it.
func (s *store) change(ctx context.Context, c asker, stmt string) error {
	q := ch.Query{Body: s.sql(stmt)}
	if s.replicated {
		q.Settings = []ch.Setting{{Key: "distributed_ddl_output_mode", Value: "none"}} // else it answers a row a replica
	}
	return c.Do(ctx, q)
}

// readStates sets userBits to what events_hourly has.
func (s *store) readStates(ctx context.Context, c asker) error {
	bits, err := number(ctx, c, ch.Query{Body: s.sql(`SELECT toUInt64(max(toInt32OrZero(extract(type, 'uniqCombined64.(\\d+).'))))
		FROM system.columns WHERE database = '{database}' AND table = 'events_hourly' AND name = 'unique_users_state'`)})
	if err != nil {
		return fmt.Errorf("look at the tables: %w", err)
	}
	if bits > 0 {
		s.userBits.Store(int32(bits))
	}
	return nil
}

// has says whether one of the tables exists.
func (s *store) has(ctx context.Context, c asker, tables ...string) (bool, error) {
	n, err := number(ctx, c, ch.Query{
		Body: s.sql("SELECT count() FROM system.tables WHERE database = '{database}' AND name IN ('" + strings.Join(tables, "', '") + "')"),
	})
	if err != nil {
		err = fmt.Errorf("look for tables: %w", err)
	}
	return n > 0, err
}

// schemaStatements are those of schema.sql, definitions its DEFINEs: name and text, in turns.
var schemaStatements, definitions = cutSchema(schemaSQL)

func cutSchema(text string) (statements, definitions []string) {
	for stmt := range strings.SplitSeq(text, ";\n") {
		if _, definition, ok := strings.Cut("\n"+stmt, "\nDEFINE "); ok {
			name, text, _ := strings.Cut(definition, " AS")
			definitions = append(definitions, name, strings.NewReplacer(definitions...).Replace(strings.TrimSpace(text)))
		} else if strings.TrimSpace(stmt) != "" {
			statements = append(statements, stmt)
		}
	}
	return statements, definitions
}

// statementsOf are those that make a table, with another name in its place.
func statementsOf(table, name string) (statements []string) {
	for _, stmt := range schemaStatements {
		if renamed := strings.Replace(stmt, " {database}."+table+"{on cluster}", " {database}."+name+"{on cluster}", 1); renamed != stmt {
			statements = append(statements, renamed)
		}
	}
	return statements
}

// sql fills in the braces of schema.sql, which the program's own queries have, too. A replicated table finds its place in
// Keeper by the server's default_replica_path and default_replica_name.
func (s *store) sql(text string) string {
	text = strings.NewReplacer(definitions...).Replace(text) // what is defined may name {database}
	onCluster, replicated := "", ""
	if s.replicated {
		onCluster, replicated = " ON CLUSTER '"+s.cluster+"'", "Replicated"
	}
	fill := []string{"{database}", s.database, "{on cluster}", onCluster, "{replicated}", replicated, "{fsync}", s.fsync,
		"{user bits}", strconv.Itoa(int(s.userBits.Load()))}
	if s.cluster == "" {
		fill = append(fill, "{events}", s.database+".events", "{events_hourly}", s.database+".events_hourly",
			"{each shard}", "", "{/each shard}", "", "{from every shard}", "")
	} else { // the setting is the first of everyShard
		each := "cluster('" + s.cluster + "', "
		fill = append(fill, "{events}", each+s.database+", events)", "{events_hourly}", each+s.database+", events_hourly)",
			"{each shard}", each+"view", "{/each shard}", ")", "{from every shard}", "\nSETTINGS prefer_localhost_replica = 0")
	}
	return strings.NewReplacer(fill...).Replace(text)
}

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

func isRejection(err error) bool { return ch.IsErr(err, rejections...) }

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
