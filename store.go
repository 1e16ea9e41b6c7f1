// ClickHouse: how to reach it, the schema, and which of its errors mean what.

package main

import (
	"context"
	"crypto/tls"
	_ "embed"
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"
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
	cluster  string // of replicas, or empty
	broken   brokenParts
}

func newStore(cfg *settings) *store {
	st := &store{
		database: cfg.clickhouseDatabase,
		cluster:  cfg.clickhouseCluster,
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
		st.options.TLS = &tls.Config{RootCAs: cfg.clickhouseCA, ServerName: cfg.clickhouseHost}
	}
	return st
}

func (s *store) dial(ctx context.Context) (*ch.Client, error) {
	c, err := ch.Dial(ctx, s.options)
	if err != nil {
		return nil, fmt.Errorf("connect to ClickHouse at %s: %w", s.options.Address, err)
	}
	return c, nil
}

// applySchema runs schema.sql, statement by statement.
func (s *store) applySchema(ctx context.Context) error {
	c, err := s.dial(ctx)
	if err != nil {
		return err
	}
	defer c.Close()
	for _, stmt := range s.schema() {
		if err := c.Do(ctx, ch.Query{Body: stmt}); err != nil {
			return fmt.Errorf("apply schema.sql: %w", err)
		}
	}
	return nil
}

// schema returns the statements of schema.sql, for one server or for a cluster of replicas. A replicated table finds its
// place in Keeper by the server's default_replica_path and default_replica_name.
func (s *store) schema() (statements []string) {
	onCluster, replicated := "", ""
	if s.cluster != "" {
		onCluster, replicated = " ON CLUSTER '"+s.cluster+"'", "Replicated"
	}
	text := strings.NewReplacer("{database}", s.database, "{on cluster}", onCluster, "{replicated}", replicated).Replace(schemaSQL)
	for stmt := range strings.SplitSeq(text, ";\n") {
		if strings.TrimSpace(stmt) != "" {
			statements = append(statements, stmt)
		}
	}
	return statements
}

// exactly are the settings without which a replica may not have what another one acknowledged: inserts go to a majority,
// one after another, and a read that decides what is counted sees all of them.
func (s *store) exactly() []ch.Setting {
	if s.cluster == "" {
		return nil
	}
	return []ch.Setting{
		{Key: "insert_quorum", Value: "auto"}, {Key: "insert_quorum_parallel", Value: "0"},
		{Key: "select_sequential_consistency", Value: "1"},
	}
}

// processes is the table of running queries, of every replica.
func (s *store) processes() string {
	if s.cluster == "" {
		return "system.processes"
	}
	return "clusterAllReplicas('" + s.cluster + "', system.processes)"
}

// rejections are ClickHouse's codes for "this data, never", by
// https://github.com/ClickHouse/ClickHouse/blob/master/src/Common/ErrorCodes.cpp. Everything else is taken for
// transient: trying again in vain holds up, giving up in error loses.
var rejections = []proto.Error{
	proto.ErrViolatedConstraint, proto.ErrTypeMismatch, proto.ErrCannotConvertType, proto.ErrIncorrectData,
	proto.ErrArgumentOutOfBound, proto.ErrValueIsOutOfRangeOfDataType, proto.ErrDecimalOverflow,
	proto.ErrTooLargeStringSize, proto.ErrTooLargeArraySize,
}

func isRejection(err error) bool {
	e, ok := ch.AsException(err)
	return ok && slices.Contains(rejections, e.Code)
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
