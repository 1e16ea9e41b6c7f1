// The tables: schema.sql, applied at every start.
//
// schema.go owns schema.sql, its placeholders, and what tables have of the settings. It changes no row.

package main

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/ClickHouse/ch-go"
	"github.com/ClickHouse/ch-go/proto"
)

//go:embed schema.sql
var schemaSQL string

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
	for _, step := range []func(*session){(*session).prepareTables, (*session).prepareViews} {
		var steps sync.WaitGroup
		for i, sh := range shards {
			if failed[i] == nil {
				steps.Go(func() { // ends with ctx
					failed[i] = sh.session(ctx, io.Discard, step)
				})
			}
		}
		steps.Wait()
		if err := errors.Join(failed...); errors.Is(err, errPlacement) || !slices.Contains(failed, nil) {
			return nil, err
		} else if unplaced := slices.ContainsFunc(shards, func(sh *store) bool { return sh.unplaced }); err != nil && unplaced {
			return nil, fmt.Errorf("the first start needs every shard: %w", err)
		} else if placed := slices.ContainsFunc(shards, func(sh *store) bool { return !sh.unplaced }); !placed && s.idle != nil {
			// Who consumes already does not know of the cluster, or a table would say so.
			if err := s.idle(ctx); err != nil {
				return nil, err
			}
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

// prepareLate is prepare for a shard that did not answer then.
func (s *store) prepareLate(ctx context.Context, c asker) error {
	if !s.late.Load() {
		return nil
	}
	steps := session{ctx: ctx, store: s, conn: c}
	steps.prepareTables()
	steps.prepareViews()
	s.late.Store(steps.err != nil)
	return steps.err
}

// prepareTables is prepare for all but the views and the placement of one shard.
func (s *session) prepareTables() {
	if err := s.store.attach(s.ctx, s.conn); err != nil { // a real fault shows in the next query
		slog.Debug("attach tables", "error", err)
	}
	s.store.rebuilding = s.has(tableNext, tableRebuilt, eventsMoved) // before the states, which change with its end
	s.do(s.store.readStates)
	s.do(s.store.checkPlacement)
	if s.err != nil {
		return
	}
	if s.store.rebuilding { // and it may be about to exchange the tables: nothing to be changed beside that
		slog.Warn("tables are being made anew and stay as they are; when no `event-ingestion reconcile -rebuild` or reshard runs, run it again: it finishes what one has begun")
		return
	}
	s.makeTables()
	if bits := s.store.userBits.Load(); s.err == nil && bits != wantedUserBits {
		slog.Warn("events_hourly has user states of another precision, which works and is slow; `event-ingestion reconcile -rebuild` makes it anew from events while ingestion goes on",
			"bits", bits, "wanted", wantedUserBits)
	}
}

// prepareViews does what prepareTables left.
func (s *session) prepareViews() {
	if s.store.unplaced {
		s.do(s.store.place)
	}
	if !s.store.rebuilding {
		s.makeViews()
	}
}

// makeTables runs the statements of schema.sql, but for those of makeViews, and sees to the retention.
func (s *session) makeTables() {
	s.adopt()
	s.apply(false)
	for table, column := range map[string]string{"events": "timestamp", "events_hourly": "hour"} {
		s.during("apply RETENTION_DAYS to "+table, func() { s.applyRetention(table, column) })
	}
}

// makeViews makes those that read all shards.
func (s *session) makeViews() { s.apply(true) }

func (s *session) apply(views bool) {
	s.during("apply schema.sql", func() {
		for _, stmt := range schemaStatements {
			if strings.Contains(stmt, "CREATE OR REPLACE VIEW") == views {
				s.change(stmt)
			}
		}
	})
}

// daysOf and fsyncOf find what two settings have made of a statement that makes a table.
var (
	daysOf  = regexp.MustCompile(` TTL .*toIntervalDay\((\d+)\) SETTINGS `)
	fsyncOf = regexp.MustCompile(`fsync_after_insert = (\d)`)
)

// adopt takes CLICKHOUSE_FSYNC and RETENTION_DAYS from the tables, unless this program decides about them.
func (s *session) adopt() {
	if s.store.decides {
		return
	}
	made := s.madeBy("events")
	if s.err != nil || made == "" {
		return
	}
	if m := fsyncOf.FindStringSubmatch(made); m != nil {
		s.store.fsync = m[1]
	}
	s.store.keepDays = 0
	if m := daysOf.FindStringSubmatch(made); m != nil {
		s.store.keepDays, s.err = strconv.Atoi(m[1])
	}
}

// madeBy is the statement that makes a table as it is; empty when there is none.
func (s *session) madeBy(table string) (statement string) {
	var made proto.ColStr
	s.ask(ch.Query{Body: "SELECT create_table_query FROM system.tables WHERE database = '{database}' AND name = '" + table + "'"},
		func(i int) { statement = made.Row(i) }, &made)
	return statement
}

// applyRetention gives a table the TTL that RETENTION_DAYS asks for, or takes it away. All of a month has one time to go, or the
// two tables, whose parts are merged differently, would differ for up to a month. A change has ClickHouse look at every part
// once, without writing its rows again (materialize_ttl_recalculate_only); without a change nothing happens.
func (s *session) applyRetention(table, column string) {
	made := s.madeBy(table)
	if s.err != nil || made == "" {
		return
	}
	_, ttl, _ := strings.Cut(made, " TTL ")
	has, _, _ := strings.Cut(ttl, " SETTINGS ")
	wanted, change := "", "REMOVE TTL"
	if s.store.keepDays > 0 {
		wanted = fmt.Sprintf("(toStartOfMonth(%s) + toIntervalMonth(1)) + toIntervalDay(%d)", column, s.store.keepDays)
		change = "MODIFY TTL " + wanted
	}
	if has == wanted || has != "" && !s.store.decides {
		return
	}
	slog.Warn("RETENTION_DAYS changes a table", "table", table, "ttl", wanted, "before", has)
	s.change("ALTER TABLE {database}." + table + "{on cluster} " + change)
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
	} else { // the setting is one of meant
		each := "cluster('" + s.cluster + "', "
		fill = append(fill, "{events}", each+s.database+", events)", "{events_hourly}", each+s.database+", events_hourly)",
			"{each shard}", each+"view", "{/each shard}", ")", "{from every shard}", "\nSETTINGS prefer_localhost_replica = 0")
	}
	return strings.NewReplacer(fill...).Replace(text)
}
