// What happened in a range, as subqueries for schema.sql's tables and definitions, which are named in braces.

package questions

import "strings"

// ByDay is a subquery: what happened in the range {from} to {to}, by a key made of event_name, channel and the day of hour.
// The view events_between_by_day answers the same questions, for five times the CPU over a month: merging user states takes
// the most time, and here each is merged once.
func ByDay(key, where string) string {
	return strings.NewReplacer("{key}", key, "{where}", where).Replace(
		"(WITH {whole days} SELECT {key} AS key, {added up} FROM {events_hourly}" +
			" WHERE {in whole days} AND {where} GROUP BY key" +
			" UNION ALL SELECT {key} AS key, {added up} FROM {events_hourly} WHERE {in whole hours} AND {where} GROUP BY key" +
			" UNION ALL SELECT {key} AS key, {counts of events} FROM (SELECT *, toStartOfHour(timestamp) AS hour FROM {events})" +
			" WHERE {in seconds} AND {where} GROUP BY key)")
}

// InRange are the events of the raw table in the range.
const InRange = "timestamp >= {from:UInt32} AND timestamp <= {to:UInt32}"
