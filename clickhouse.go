// ClickHouse: how to reach it, how to ask it, which of its errors mean what, and the tables.
//
// clickhouse.go owns schema.sql, which it applies to every server at each start, and the settings that all queries share. With
// CLICKHOUSE_CLUSTER there are several servers, and ClickHouse's own Distributed tables lead to all of them: the program writes
// and asks through those, and never chooses a server.

package main

import (
	"cmp"
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
	"sync/atomic"
	"time"

	"github.com/ClickHouse/ch-go"
	"github.com/ClickHouse/ch-go/proto"
)

// clickhouse knows how to reach the server of CLICKHOUSE_HOST, or another one of its cluster.
type clickhouse struct {
	options    ch.Options
	database   string
	cluster    string      // CLICKHOUSE_CLUSTER, empty for one server
	replicated atomic.Bool // a shard of the cluster has several servers
	fsync      string      // 1 when an insert waits for the disk, else 0
	keepDays   int         // RETENTION_DAYS
	decides    bool        // about these two: an instance that stores does; a command, or ROLE=api, may not have them set
}

// askTimeout bounds one attempt to ask or to insert. A healthy insert takes 30 ms; one that waits for merges, seconds.
const askTimeout = 60 * time.Second

// sharedSettings are those of every query: it means what it says, whatever the profile of CLICKHOUSE_USERNAME has, or an older
// compatibility. An answer is whole, of all servers, or an error; a view without a target refuses an insert. An insert into a Distributed
// table is done when every server has its rows. A server that is part of its own cluster would be read in the query's own process, and
// not as the others. TestProfiles looks for what is missing here, among all that there are.
var sharedSettings = settingsOf(map[string]string{
	"0": "limit offset extremes use_query_cache ignore_materialized_views_with_dropped_target_table skip_unavailable_shards prefer_localhost_replica " +
		"aggregate_functions_null_for_empty empty_result_for_aggregation_by_empty_set data_type_default_nullable prefer_column_name_to_alias " +
		"group_by_use_nulls discard_query_data force_optimize_projection inject_random_order_for_select_without_order_by asterisk_include_virtual_columns " +
		"input_format_native_decode_types_in_binary_format output_format_native_encode_types_in_binary_format",
	"1": "distributed_foreground_insert force_grouping_standard_compatibility enable_global_with_statement",
	"throw": "read_overflow_mode read_overflow_mode_leaf group_by_overflow_mode sort_overflow_mode result_overflow_mode set_overflow_mode " +
		"distinct_overflow_mode join_overflow_mode transfer_overflow_mode timeout_overflow_mode timeout_overflow_mode_leaf",
})

// insertSettings are those of every insert, beside the shared ones: it is done when it is acknowledged.
//
// ClickHouse's own deduplication of inserts is off: it remembers a block before the part is in place, so that an insert may be
// answered "known" and not be there, and what was lost with a broken part could never be stored again. deduplicate_insert
// overrides insert_deduplicate where it exists, and is on.
var insertSettings = settingsOf(map[string]string{
	"0":       "async_insert insert_deduplicate send_profile_events", // of which the last one is a third of a round's garbage
	"disable": "deduplicate_insert",
})

// roundSettings are those of a round's insert, beside insertSettings: merges sort duplicates out anyway, which saves a quarter of the
// CPU; other producers' events may be of any age, and of many months; and all of a round is gathered before parts are written.
var roundSettings = settingsOf(map[string]string{
	"0":           "optimize_on_insert materialized_views_ignore_errors max_partitions_per_insert_block",
	wholeRound:    "min_insert_block_size_rows min_insert_block_size_bytes",
	insertSilence: "receive_timeout",
})

// questionSettings are those of metrics and the overview, beside the shared ones.
var questionSettings = settingsOf(map[string]string{"0": "enable_positional_arguments", queryLimit: "max_execution_time"})

const (
	// wholeRound is more rows and bytes than a round has.
	wholeRound = "1000000000000"
	// insertSilence, in seconds, is how long ClickHouse waits for the next block of an insert: an instance that is paused in
	// the middle of one holds the next owner of its partitions up for so long.
	insertSilence = "20"
	// queryLimit, in seconds, is queryTimeout on the server.
	queryLimit = "10"
)

var errFixed = errors.New("the profile of CLICKHOUSE_USERNAME does not let the program change settings")

// checkProfile names the settings that the user's profile has otherwise than the program means them, and forbids to change: every query
// that sends them would fail.
func (c *clickhouse) checkProfile(ctx context.Context) error {
	bare := &clickhouse{options: c.options}
	bare.options.Settings = nil
	means := map[string]string{}
	for _, s := range slices.Concat(sharedSettings, insertSettings, roundSettings, questionSettings) {
		means[s.Key] = s.Value
	}
	var fixed []string
	var name, value proto.ColStr
	err := bare.connected(func(conn asker) error {
		return conn.Do(ctx, eachRow(ch.Query{Body: "SELECT name, value FROM system.settings WHERE readonly ORDER BY name"}, func(i int) {
			if needed, sent := means[name.Row(i)]; sent && needed != value.Row(i) {
				fixed = append(fixed, fmt.Sprintf("%s is %s, and has to be %s", name.Row(i), value.Row(i), needed))
			}
		}, &name, &value))
	})
	if err == nil && len(fixed) > 0 {
		err = fmt.Errorf("%w: %s; take away its constraints", errFixed, strings.Join(fixed, "; "))
	}
	return err
}

// settingsOf makes settings of their names, by value, and sorts them.
func settingsOf(names map[string]string) (settings []ch.Setting) {
	for value, keys := range names {
		for key := range strings.FieldsSeq(keys) {
			settings = append(settings, ch.Setting{Key: key, Value: value})
		}
	}
	slices.SortFunc(settings, func(a, b ch.Setting) int { return cmp.Compare(a.Key, b.Key) })
	return slices.Clip(settings) // whoever appends gets a copy
}

func newClickHouse(cfg *settings) *clickhouse {
	c := &clickhouse{
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
			ReadTimeout:      askTimeout,
			Settings:         sharedSettings,
		},
	}
	if cfg.clickhouseTLS {
		c.options.TLS = &tls.Config{RootCAs: cfg.clickhouseCA}
	}
	if cfg.clickhouseFsync {
		c.fsync = "1"
	}
	return c
}

// asker runs a query: a connection, or a pool of them.
type asker interface {
	Do(ctx context.Context, q ch.Query) error
}

// connection is made when a query needs it. It is dropped when a query fails: whatever state it is in, the next query starts
// clean. It is for one goroutine at a time.
type connection struct {
	to     *clickhouse
	client *ch.Client // nil before the first query, and after one that failed
}

// Do runs a query within ctx.
func (c *connection) Do(ctx context.Context, q ch.Query) (err error) {
	if c.client == nil || c.client.IsClosed() {
		if c.client, err = ch.Dial(ctx, c.to.options); err != nil {
			c.client = nil
			return fmt.Errorf("connect to ClickHouse at %s: %w", c.to.options.Address, err)
		}
	}
	client := c.client
	stop := context.AfterFunc(ctx, func() { client.Close() }) // ch-go looks at ctx between two packets only
	err = client.Do(ctx, q)
	if !stop() || err != nil {
		c.close()
	}
	if _, answered := ch.AsException(err); err != nil && !answered && ctx.Err() != nil {
		return fmt.Errorf("ClickHouse at %s has not answered in time: %w", c.to.options.Address, ctx.Err()) // and not that the connection is closed
	}
	return err
}

func (c *connection) close() {
	if c.client != nil {
		c.client.Close()
		c.client = nil
	}
}

// connected calls f with a connection of its own.
func (c *clickhouse) connected(f func(asker) error) error {
	conn := connection{to: c}
	defer conn.close()
	return f(&conn)
}

// servers are those of the cluster, each to be reached by itself; the one server without a cluster.
func (c *clickhouse) servers(ctx context.Context) (all []*clickhouse, err error) {
	if c.cluster == "" {
		return []*clickhouse{c}, nil
	}
	var replica proto.ColUInt32
	var host proto.ColStr
	var port proto.ColUInt16
	replicated := false
	query := eachRow(ch.Query{
		Body:       "SELECT replica_num, host_name, port FROM system.clusters WHERE cluster = {cluster:String} ORDER BY shard_num, replica_num",
		Parameters: []proto.Parameter{parameter("cluster", c.cluster)},
	}, func(i int) {
		server := &clickhouse{options: c.options, database: c.database, cluster: c.cluster, fsync: c.fsync, keepDays: c.keepDays, decides: c.decides}
		server.options.Address = net.JoinHostPort(host.Row(i), strconv.Itoa(int(port[i])))
		replicated = replicated || replica[i] > 1
		all = append(all, server)
	}, &replica, &host, &port)
	if err := c.connected(func(conn asker) error { return conn.Do(ctx, query) }); err != nil {
		return nil, fmt.Errorf("read the servers of CLICKHOUSE_CLUSTER: %w", err)
	}
	if len(all) == 0 {
		return nil, fmt.Errorf("CLICKHOUSE_CLUSTER=%s: %w at %s", c.cluster, errNoCluster, c.options.Address)
	}
	for _, server := range append(all, c) {
		server.replicated.Store(replicated)
	}
	return all, nil
}

// eachServer calls f for every server of the cluster, with a connection of its own, in a fixed order and up to the first error, which
// names the server.
func (c *clickhouse) eachServer(ctx context.Context, f func(server *clickhouse, conn asker) error) error {
	servers, err := c.servers(ctx)
	if err != nil {
		return err
	}
	for _, server := range servers {
		err := server.connected(func(conn asker) error { return f(server, conn) })
		if err != nil && len(servers) > 1 {
			return fmt.Errorf("ClickHouse at %s: %w", server.options.Address, err)
		}
		if err != nil {
			return err
		}
	}
	return nil
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

// inserting are the settings of every insert; a majority of a shard's replicas has it when it is acknowledged.
func (c *clickhouse) inserting() []ch.Setting {
	if !c.replicated.Load() {
		return insertSettings
	}
	return append(slices.Clone(insertSettings), ch.Setting{Key: "insert_quorum", Value: "auto"}, ch.Setting{Key: "insert_quorum_parallel", Value: "1"})
}

var errNoCluster = errors.New("no cluster of that name is known")

// errPartOfCluster is a table that leads to several servers, met by an instance that would store on one of them and look there only.
var errPartOfCluster = errors.New("its tables belong to a cluster")

// clickhouseIsHopeless says whether no retry cures an error: these settings do not work with this server.
func clickhouseIsHopeless(err error) bool {
	return errors.Is(err, errPartOfCluster) || errors.Is(err, errNoCluster) || errors.Is(err, errFixed) || ch.IsErr(err, proto.ErrAuthenticationFailed)
}

// lacksTables says whether a query failed because a server of the cluster has no tables: it has just joined, or lost its disk. The
// server that passes a query on says so in words.
func (c *clickhouse) lacksTables(err error) bool {
	return c.cluster != "" && (ch.IsErr(err, proto.ErrUnknownTable, proto.ErrUnknownDatabase) ||
		ch.IsErr(err, proto.ErrAllConnectionTriesFailed) && strings.Contains(err.Error(), "There is no table"))
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

//go:embed schema.sql
var schemaSQL string

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

// sql fills in the braces of schema.sql, which the program's own queries have, too. {events} and {events_hourly} are the rows of
// all servers, each once; {events anywhere} those of every replica, {processes} and {parts} what every server says.
func (c *clickhouse) sql(text string) string {
	text = strings.NewReplacer(definitions...).Replace(text) // what is defined may have the braces below
	fill := []string{"{database}", c.database, "{cluster}", "'" + c.cluster + "'", "{Replicated}", "", "{path}", ""}
	if c.replicated.Load() { // {shard} and {replica} are macros of each server
		copy(fill[len(fill)-4:], []string{"{Replicated}", "Replicated", "{path}", "('/clickhouse/tables/{shard}/" + c.database + "/{table}', '{replica}')"})
	}
	if c.cluster == "" {
		fill = append(fill, "{events}", c.database+".events", "{events_hourly}", c.database+".events_hourly",
			"{events anywhere}", c.database+".events", "{processes}", "system.processes", "{parts}", "system.parts",
			"{nothing after}", "(SELECT max(last_at) FROM "+c.database+".events_hourly WHERE hour = last_hour) <= {to:UInt32}")
	} else { // the servers are asked at different moments: what comes in meanwhile may be after the end of a range
		everywhere := "clusterAllReplicas('" + c.cluster + "', "
		fill = append(fill, "{events}", c.database+".events_distributed", "{events_hourly}", c.database+".events_hourly_distributed",
			"{events anywhere}", everywhere+c.database+", events)", "{processes}", everywhere+"system, processes)", "{parts}", everywhere+"system, parts)",
			"{nothing after}", "0")
	}
	return strings.NewReplacer(fill...).Replace(text)
}

// has says whether a server has the table events, the last one that is made, and whether one has something in events_hourly.
func (c *clickhouse) has(ctx context.Context) (events, counts bool, err error) {
	if err := c.checkProfile(ctx); err != nil { // before the first query that sends settings
		return false, false, err
	}
	err = c.eachServer(ctx, func(server *clickhouse, conn asker) error {
		var name proto.ColStr
		return conn.Do(ctx, eachRow(ch.Query{
			Body: c.sql("SELECT name FROM system.tables WHERE database = '{database}' AND (name = 'events' OR name = 'events_hourly' AND total_rows > 0)"),
		}, func(i int) {
			events, counts = events || name.Row(i) == "events", counts || name.Row(i) == "events_hourly"
		}, &name))
	})
	return events, counts, err
}

// makeTables brings the tables of every server up to date. A server that has joined the cluster gets its own.
func (c *clickhouse) makeTables(ctx context.Context) error {
	return c.eachServer(ctx, func(server *clickhouse, conn asker) error { return server.applySchema(ctx, conn) })
}

// applySchema runs schema.sql, statement by statement, on one server, and sees to the retention.
func (c *clickhouse) applySchema(ctx context.Context, conn asker) error {
	fsync, keepDays, err := c.adopt(ctx, conn)
	if err != nil {
		return err
	}
	for _, stmt := range schemaStatements {
		if strings.Contains(stmt, "{cluster}") && c.cluster == "" {
			continue
		}
		// The view is made before the table that it reads, so that no insert ever finds that table without it.
		q := ch.Query{Body: c.sql(strings.ReplaceAll(stmt, "{fsync}", fsync)), Settings: []ch.Setting{{Key: "allow_materialized_view_with_bad_select", Value: "1"}}}
		err := conn.Do(ctx, q)
		if ch.IsErr(err, proto.ErrQueryIsProhibited) { // which ClickHouse says without a name, and no query can change
			err = fmt.Errorf("%w: allow_ddl is 0, and has to be 1: %w", errFixed, err)
		}
		if err != nil {
			return fmt.Errorf("apply schema.sql: %w", err)
		}
	}
	for table, column := range map[string]string{"events": "timestamp", "events_hourly": "hour"} {
		if err := c.applyRetention(ctx, conn, table, column, keepDays); err != nil {
			return fmt.Errorf("apply RETENTION_DAYS to %s: %w", table, err)
		}
	}
	return nil
}

// daysOf and fsyncOf find what two settings have made of a statement that makes a table.
var (
	daysOf  = regexp.MustCompile(` TTL .*toIntervalDay\((\d+)\) SETTINGS `)
	fsyncOf = regexp.MustCompile(`fsync_after_insert = (\d)`)
)

// adopt looks at the tables as they are. It takes CLICKHOUSE_FSYNC and RETENTION_DAYS from them, unless this program decides about
// them, and refuses to store on one server of a cluster.
func (c *clickhouse) adopt(ctx context.Context, conn asker) (fsync string, keepDays int, err error) {
	fsync, keepDays = c.fsync, c.keepDays
	leads, err := c.madeBy(ctx, conn, "events_distributed")
	if err == nil && leads != "" && c.cluster == "" {
		err = fmt.Errorf("CLICKHOUSE_CLUSTER is empty, and ClickHouse at %s: %w; set it, or drop %s.events_distributed once no other server has events",
			c.options.Address, errPartOfCluster, c.database)
	}
	if c.decides || err != nil {
		return fsync, keepDays, err
	}
	made, err := c.madeBy(ctx, conn, "events")
	if m := fsyncOf.FindStringSubmatch(made); m != nil {
		fsync = m[1]
	}
	if m := daysOf.FindStringSubmatch(made); m != nil && err == nil {
		keepDays, err = strconv.Atoi(m[1])
	} else if made != "" {
		keepDays = 0
	}
	return fsync, keepDays, err
}

// madeBy is the statement that makes a table as it is; empty when there is none.
func (c *clickhouse) madeBy(ctx context.Context, conn asker, table string) (statement string, err error) {
	var made proto.ColStr
	err = conn.Do(ctx, eachRow(ch.Query{
		Body: c.sql("SELECT create_table_query FROM system.tables WHERE database = '{database}' AND name = '" + table + "'"),
	}, func(i int) { statement = made.Row(i) }, &made))
	return statement, err
}

// applyRetention gives a table the TTL that RETENTION_DAYS asks for, or takes it away. All of a month has one time to go, or the
// two tables, whose parts are merged differently, would differ for up to a month. A change has ClickHouse look at every part
// once, without writing its rows again (materialize_ttl_recalculate_only); without a change nothing happens.
func (c *clickhouse) applyRetention(ctx context.Context, conn asker, table, column string, keepDays int) error {
	made, err := c.madeBy(ctx, conn, table)
	if err != nil {
		return err
	}
	_, ttl, _ := strings.Cut(made, " TTL ")
	has, _, _ := strings.Cut(ttl, " SETTINGS ")
	wanted, change := "", "REMOVE TTL"
	if keepDays > 0 {
		wanted = fmt.Sprintf("(toStartOfMonth(%s) + toIntervalMonth(1)) + toIntervalDay(%d)", column, keepDays)
		change = "MODIFY TTL " + wanted
	}
	if has == wanted || has != "" && !c.decides {
		return nil
	}
	slog.Warn("RETENTION_DAYS changes a table", "table", table, "ttl", wanted, "before", has)
	return conn.Do(ctx, ch.Query{Body: "ALTER TABLE " + c.database + "." + table + " " + change})
}
