// ClickHouse: how to reach it, the schema, and which of its errors mean what.

package main

import (
	"context"
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
}

func newStore(cfg *settings) *store {
	return &store{
		database: cfg.clickhouseDatabase,
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
	for _, stmt := range strings.Split(strings.ReplaceAll(schemaSQL, "{database}", s.database), ";\n") {
		if strings.TrimSpace(stmt) == "" {
			continue
		}
		if err := c.Do(ctx, ch.Query{Body: stmt}); err != nil {
			return fmt.Errorf("apply schema.sql: %w", err)
		}
	}
	return nil
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
