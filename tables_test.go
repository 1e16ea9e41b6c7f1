// What is on the topics and in the tables: junk, rows that are refused, aggregates that are torn, a cluster's schema.

package main

import (
	"strings"
	"testing"
)

// TestClusterSchema: replicas are not at hand; the server at least parses every statement for them.
func TestClusterSchema(t *testing.T) {
	cfg := settingsFrom(t, newSpace(t, "CLICKHOUSE_CLUSTER=main"))
	st := newStore(cfg)
	st.replicated = true
	replicated := 0
	for _, stmt := range schemaStatements {
		formatted := clickhouseQuery(t, "SELECT formatQuery('"+literalEscapes.Replace(st.sql(stmt))+"')")
		if !strings.Contains(formatted, "ON CLUSTER main") {
			t.Errorf("not on the cluster: %s", formatted)
		}
		replicated += strings.Count(formatted, "ENGINE = Replicated")
	}
	if len(schemaStatements) < 13 || replicated != 2 {
		t.Errorf("%d statements, %d replicated tables", len(schemaStatements), replicated)
	}
}
