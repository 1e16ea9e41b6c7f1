// ClickHouse: how to reach it, how to ask it, which of its errors mean what, and the tables.
//
// clickhouse.go owns schema.sql, which it applies to every server at each start, and the settings that all queries share. With
// CLICKHOUSE_CLUSTER there are several servers, and ClickHouse's own Distributed tables lead to all of them: the program writes
// and asks through those, and never chooses a server.

package main

import (
	"context"
	"crypto/tls"
	_ "embed"
	"encoding/json"
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
	"github.com/event-ingestion/event-ingestion/internal/profile"
	"github.com/event-ingestion/event-ingestion/internal/questions"
)

// clickhouse knows how to reach the server of CLICKHOUSE_HOST, or another one of its cluster.
type clickhouse struct {
	options    ch.Options
	database   string
	cluster    string      // CLICKHOUSE_CLUSTER, empty for one server
	replicated atomic.Bool // a shard of the cluster has several servers
	fsync      string      // 1 when an insert waits for the disk, else 0
	keepDays   int         // RETENTION_DAYS
	revenue    *atomic.Pointer[revenueRule]
	columns    []questions.Column // METADATA_COLUMNS
	decides    bool               // about these four: an instance that stores does; a command, or ROLE=api, may not have them set
}

// askTimeout bounds one attempt to ask or to insert. A healthy insert takes 30 ms; one that waits for merges, seconds.
const askTimeout = 60 * time.Second

func newClickHouse(cfg *settings) *clickhouse {
	c := &clickhouse{
		database: cfg.clickhouseDatabase,
		cluster:  cfg.clickhouseCluster,
		fsync:    "0",
		keepDays: cfg.retentionDays,
		revenue:  new(atomic.Pointer[revenueRule]),
		columns:  cfg.metadataColumns,
		options: ch.Options{
			Address:          net.JoinHostPort(cfg.clickhouseHost, strconv.Itoa(cfg.clickhousePort)),
			User:             cfg.clickhouseUsername,
			Password:         cfg.clickhousePassword,
			ClientName:       "event-ingestion",
			DialTimeout:      3 * time.Second,
			HandshakeTimeout: 10 * time.Second,
			ReadTimeout:      askTimeout,
			Settings:         profile.Shared,
		},
	}
	if cfg.clickhouseTLS {
		c.options.TLS = &tls.Config{RootCAs: cfg.clickhouseCA}
	}
	if cfg.clickhouseFsync {
		c.fsync = "1"
	}
	c.revenue.Store(&cfg.revenue)
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
	query := questions.EachRow(ch.Query{
		Body:       "SELECT replica_num, host_name, port FROM system.clusters WHERE cluster = {cluster:String} ORDER BY shard_num, replica_num",
		Parameters: []proto.Parameter{questions.Parameter("cluster", c.cluster)},
	}, func(i int) {
		server := &clickhouse{options: c.options, database: c.database, cluster: c.cluster, fsync: c.fsync, keepDays: c.keepDays, revenue: c.revenue, columns: c.columns, decides: c.decides}
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

// inserting are the settings of every insert; a majority of a shard's replicas has it when it is acknowledged.
func (c *clickhouse) inserting() []ch.Setting {
	if !c.replicated.Load() {
		return profile.Insert
	}
	return append(slices.Clone(profile.Insert), ch.Setting{Key: "insert_quorum", Value: "auto"}, ch.Setting{Key: "insert_quorum_parallel", Value: "1"})
}

var errNoCluster = errors.New("no cluster of that name is known")

// errPartOfCluster is a table that leads to several servers, met by an instance that would store on one of them and look there only.
var errPartOfCluster = errors.New("its tables belong to a cluster")

// clickhouseIsHopeless says whether no retry cures an error: these settings do not work with this server.
func clickhouseIsHopeless(err error) bool {
	return errors.Is(err, errPartOfCluster) || errors.Is(err, errNoCluster) || errors.Is(err, profile.ErrFixed) || ch.IsErr(err, proto.ErrAuthenticationFailed)
}

// lacksTables says whether a query failed because a server of the cluster has no tables: it has just joined, or lost its disk. The
// server that passes a query on says so in words.
func (c *clickhouse) lacksTables(err error) bool {
	return c.cluster != "" && (ch.IsErr(err, proto.ErrUnknownTable, proto.ErrUnknownDatabase) ||
		ch.IsErr(err, proto.ErrAllConnectionTriesFailed) && strings.Contains(err.Error(), "There is no table"))
}

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
// all servers, each once; {events anywhere} those of every replica; {erasures}, {processes} and {parts} what every server says.
func (c *clickhouse) sql(text string) string {
	text = strings.NewReplacer(definitions...).Replace(text) // what is defined may have the braces below
	fill := []string{"{database}", c.database, "{cluster}", "'" + c.cluster + "'", "{Replicated}", "", "{path}", ""}
	if c.replicated.Load() { // {shard} and {replica} are macros of each server
		copy(fill[len(fill)-4:], []string{"{Replicated}", "Replicated", "{path}", "('/clickhouse/tables/{shard}/" + c.database + "/{table}', '{replica}')"})
	}
	if c.cluster == "" {
		fill = append(fill, "{events}", c.database+".events", "{events_hourly}", c.database+".events_hourly",
			"{events anywhere}", c.database+".events", "{erasures}", c.database+".erasures", "{processes}", "system.processes", "{parts}", "system.parts",
			"{nothing after}", "(SELECT max(last_at) FROM "+c.database+".events_hourly WHERE hour = last_hour) <= {to:UInt32}")
	} else { // the servers are asked at different moments: what comes in meanwhile may be after the end of a range
		everywhere := "clusterAllReplicas('" + c.cluster + "', "
		fill = append(fill, "{events}", c.database+".events_distributed", "{events_hourly}", c.database+".events_hourly_distributed",
			"{events anywhere}", everywhere+c.database+", events)", "{erasures}", everywhere+c.database+", erasures)", "{processes}", everywhere+"system, processes)", "{parts}", everywhere+"system, parts)",
			"{nothing after}", "0")
	}
	rule := c.revenue.Load()
	names := strings.ReplaceAll(questions.Literal(strings.Join(rule.Events, "\x00")), "\x00", "', '")
	fill = append(fill, "{purchase events}", names, "{currency}", questions.Literal(strings.ToLower(rule.Currency)), "{revenue rule}", questions.Literal(rule.text()))
	return strings.NewReplacer(fill...).Replace(text)
}

// checkProfile asks with none of the program's settings which of them the user's profile forbids to change.
func (c *clickhouse) checkProfile(ctx context.Context) error {
	bare := &clickhouse{options: c.options}
	bare.options.Settings = nil
	return bare.connected(func(conn asker) error { return profile.Check(ctx, conn.Do) })
}

// has says whether a server has the table events, the last one that is made, and whether one has something in events_hourly.
func (c *clickhouse) has(ctx context.Context) (events, counts bool, err error) {
	if err := c.checkProfile(ctx); err != nil { // before the first query that sends settings
		return false, false, err
	}
	err = c.eachServer(ctx, func(server *clickhouse, conn asker) error {
		var name proto.ColStr
		return conn.Do(ctx, questions.EachRow(ch.Query{
			Body: c.sql("SELECT name FROM system.tables WHERE database = '{database}' AND (name = 'events' OR name = 'events_hourly' AND total_rows > 0)"),
		}, func(i int) {
			events, counts = events || name.Row(i) == "events", counts || name.Row(i) == "events_hourly"
		}, &name))
	})
	return events, counts, err
}

// viewTable is the view that counts, and comments on the rule by which it does.
const viewTable = "events_hourly_mv"

// adoptRevenue has questions go by the rule of the tables, if they have one.
func (c *clickhouse) adoptRevenue(ctx context.Context, conn asker) error {
	text, err := c.known(ctx, conn, "comment", viewTable)
	if rule := new(revenueRule); err == nil && json.Unmarshal([]byte(text), rule) == nil && len(rule.Events) > 0 {
		c.revenue.Store(rule)
	}
	return err
}

// applyRevenue has the view count by the rule that the settings say, from now on.
func (c *clickhouse) applyRevenue(ctx context.Context, conn asker) error {
	has, err := c.known(ctx, conn, "comment", viewTable)
	if err != nil || has == c.revenue.Load().text() {
		return err
	}
	slog.Warn("PURCHASE_EVENTS or CURRENCY changes what is revenue; hours that are counted stay as they are until reconcile -recount", "rule", c.revenue.Load().text(), "before", has)
	return conn.Do(ctx, ch.Query{Body: c.sql("ALTER TABLE {database}." + viewTable + " MODIFY COMMENT {revenue rule}, MODIFY QUERY {view}")})
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
	missing, err := c.missingColumns(ctx, conn)
	if err != nil {
		return err
	}
	for _, stmt := range schemaStatements {
		if strings.Contains(stmt, "{cluster}") && c.cluster == "" {
			continue
		}
		for _, stmt := range perColumn(stmt, missing) {
			// The view is made before the table that it reads, so that no insert ever finds that table without it.
			q := ch.Query{Body: strings.ReplaceAll(c.sql(stmt), "{fsync}", fsync), Settings: []ch.Setting{{Key: "allow_materialized_view_with_bad_select", Value: "1"}}}
			err := conn.Do(ctx, q)
			if ch.IsErr(err, proto.ErrQueryIsProhibited) { // which ClickHouse says without a name, and no query can change
				err = fmt.Errorf("%w: allow_ddl is 0, and has to be 1: %w", profile.ErrFixed, err)
			}
			if err != nil {
				return fmt.Errorf("apply schema.sql: %w", err)
			}
		}
	}
	if err := c.applyRevenue(ctx, conn); err != nil {
		return fmt.Errorf("apply PURCHASE_EVENTS and CURRENCY: %w", err)
	}
	for table, column := range map[string]string{"events": "timestamp", "events_hourly": "hour"} {
		if err := c.applyRetention(ctx, conn, table, column, keepDays); err != nil {
			return fmt.Errorf("apply RETENTION_DAYS to %s: %w", table, err)
		}
	}
	return nil
}

// missingColumns are those of METADATA_COLUMNS that the table events does not have.
func (c *clickhouse) missingColumns(ctx context.Context, conn asker) (missing []questions.Column, err error) {
	made, err := c.madeBy(ctx, conn, "events")
	for _, column := range c.columns {
		if !strings.Contains(made, column.Quoted()+" String") {
			missing = append(missing, column)
		}
	}
	return missing, err
}

// perColumn is the statement, once for each column if it is one of columns.
func perColumn(stmt string, columns []questions.Column) (statements []string) {
	if !strings.Contains(stmt, "{column}") {
		return []string{stmt}
	}
	for _, column := range columns {
		statements = append(statements, strings.NewReplacer("{column}", column.Quoted(), "{member}", column.Raw()).Replace(stmt))
	}
	return statements
}

// daysOf and fsyncOf find what two settings have made of a statement that makes a table.
var (
	daysOf  = regexp.MustCompile(` TTL .*toIntervalDay\((\d+)\) SETTINGS `)
	fsyncOf = regexp.MustCompile(`fsync_after_insert = (\d)`)
)

// adopt looks at the tables as they are. It takes CLICKHOUSE_FSYNC, RETENTION_DAYS and what is revenue from them, unless this program decides about
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
	if err = c.adoptRevenue(ctx, conn); err != nil {
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
	return c.known(ctx, conn, "create_table_query", table)
}

// known is what system.tables has of a table in a column of texts; empty when there is no such table.
func (c *clickhouse) known(ctx context.Context, conn asker, column, table string) (text string, err error) {
	var answer proto.ColStr
	err = conn.Do(ctx, questions.EachRow(ch.Query{
		Body: c.sql("SELECT " + column + " FROM system.tables WHERE database = '{database}' AND name = '" + table + "'"),
	}, func(i int) { text = answer.Row(i) }, &answer))
	return text, err
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
