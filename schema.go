// The tables: schema.sql, applied at every start.
//
// schema.go owns schema.sql, its placeholders, and what tables have of the settings. It changes no row.

package main

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
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
	if err := s.adopt(ctx, c); err != nil {
		return err
	}
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

// ttlOf finds the TTL in a statement that makes a table, daysOf and fsyncOf what two settings have made of it.
var (
	ttlOf   = regexp.MustCompile(` TTL (.*?) SETTINGS `)
	daysOf  = regexp.MustCompile(` TTL .*toIntervalDay\((\d+)\) SETTINGS `)
	fsyncOf = regexp.MustCompile(`fsync_after_insert = (\d)`)
)

// adopt takes CLICKHOUSE_FSYNC and RETENTION_DAYS from the tables, unless this program decides about them.
func (s *store) adopt(ctx context.Context, c asker) error {
	if s.decides {
		return nil
	}
	made, err := s.madeBy(ctx, c, "events")
	if err != nil || made == "" {
		return err
	}
	if m := fsyncOf.FindStringSubmatch(made); m != nil {
		s.fsync = m[1]
	}
	s.keepDays = 0
	if m := daysOf.FindStringSubmatch(made); m != nil {
		s.keepDays, err = strconv.Atoi(m[1])
	}
	return err
}

// madeBy is the statement that makes a table as it is; empty when there is none.
func (s *store) madeBy(ctx context.Context, c asker, table string) (statement string, err error) {
	var made proto.ColStr
	err = c.Do(ctx, eachRow(ch.Query{
		Body: s.sql("SELECT create_table_query FROM system.tables WHERE database = '{database}' AND name = '" + table + "'"),
	}, func(i int) { statement = made.Row(i) }, &made))
	return statement, err
}

// applyRetention gives a table the TTL that RETENTION_DAYS asks for, or takes it away. All of a month has one time to go, or the
// two tables, whose parts are merged differently, would differ for up to a month. A change has ClickHouse look at every part
// once, without writing its rows again (materialize_ttl_recalculate_only); without a change nothing happens.
func (s *store) applyRetention(ctx context.Context, c asker, table, column string) error {
	made, err := s.madeBy(ctx, c, table)
	if err != nil || made == "" {
		return err
	}
	has, wanted, change := "", "", "REMOVE TTL"
	if m := ttlOf.FindStringSubmatch(made); m != nil {
		has = m[1]
	}
	if s.keepDays > 0 {
		wanted = fmt.Sprintf("(toStartOfMonth(%s) + toIntervalMonth(1)) + toIntervalDay(%d)", column, s.keepDays)
		change = "MODIFY TTL " + wanted
	}
	if has == wanted || has != "" && !s.decides {
		return nil
	}
	slog.Warn("RETENTION_DAYS changes a table", "table", table, "ttl", wanted, "before", has)
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
	} else { // the setting is one of meant
		each := "cluster('" + s.cluster + "', "
		fill = append(fill, "{events}", each+s.database+", events)", "{events_hourly}", each+s.database+", events_hourly)",
			"{each shard}", each+"view", "{/each shard}", ")", "{from every shard}", "\nSETTINGS prefer_localhost_replica = 0")
	}
	return strings.NewReplacer(fill...).Replace(text)
}
