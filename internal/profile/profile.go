// Package profile has the settings that the program sends with its queries, so that they mean what they say whatever the profile of
// ClickHouse's user has.
package profile

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/ClickHouse/ch-go"
	"github.com/ClickHouse/ch-go/proto"
)

// Shared are those of every query: it means what it says, whatever the profile of CLICKHOUSE_USERNAME has, or an older
// compatibility. An answer is whole, of all servers, or an error; a view without a target refuses an insert. An insert into a Distributed
// table is done when every server has its rows. A server that is part of its own cluster would be read in the query's own process, and
// not as the others. TestProfiles looks for what is missing here, among all that there are.
var Shared = Of(map[string]string{
	"0": "limit offset extremes use_query_cache ignore_materialized_views_with_dropped_target_table skip_unavailable_shards prefer_localhost_replica " +
		"aggregate_functions_null_for_empty empty_result_for_aggregation_by_empty_set data_type_default_nullable prefer_column_name_to_alias " +
		"group_by_use_nulls discard_query_data force_optimize_projection inject_random_order_for_select_without_order_by asterisk_include_virtual_columns make_distributed_plan " +
		"input_format_native_decode_types_in_binary_format output_format_native_encode_types_in_binary_format",
	"1": "distributed_foreground_insert force_grouping_standard_compatibility enable_global_with_statement",
	"throw": "read_overflow_mode read_overflow_mode_leaf group_by_overflow_mode sort_overflow_mode result_overflow_mode set_overflow_mode " +
		"distinct_overflow_mode join_overflow_mode transfer_overflow_mode timeout_overflow_mode timeout_overflow_mode_leaf",
})

// Insert are those of every insert, beside the shared ones: it is done when it is acknowledged.
//
// ClickHouse's own deduplication of inserts is off: it remembers a block before the part is in place, so that an insert may be
// answered "known" and not be there, and what was lost with a broken part could never be stored again. deduplicate_insert
// overrides insert_deduplicate where it exists, and is on.
var Insert = Of(map[string]string{
	"0":       "async_insert insert_deduplicate send_profile_events", // of which the last one is a third of a round's garbage
	"disable": "deduplicate_insert",
})

// Round are those of a round's insert, beside Insert: merges sort duplicates out anyway, which saves a quarter of the
// CPU; other producers' events may be of any age, and of many months; and all of a round is gathered before parts are written.
var Round = Of(map[string]string{
	"0":           "optimize_on_insert materialized_views_ignore_errors max_partitions_per_insert_block",
	wholeRound:    "min_insert_block_size_rows min_insert_block_size_bytes",
	insertSilence: "receive_timeout",
})

// Question are those of metrics and the overview, beside the shared ones.
var Question = Of(map[string]string{"0": "enable_positional_arguments", queryLimit: "max_execution_time", strconv.Itoa(QuestionMemory): "max_memory_usage"})

// QuestionMemory bounds what ClickHouse takes for one question, in bytes: a month by the hour takes a quarter.
const QuestionMemory = 1 << 30

const (
	// wholeRound is more rows and bytes than a round has.
	wholeRound = "1000000000000"
	// insertSilence, in seconds, is how long ClickHouse waits for the next block of an insert: an instance that is paused in
	// the middle of one holds the next owner of its partitions up for so long.
	insertSilence = "20"
	// queryLimit, in seconds, is queryTimeout on the server.
	queryLimit = "10"
)

var ErrFixed = errors.New("the profile of CLICKHOUSE_USERNAME does not let the program change settings")

// Check names the settings that the user's profile has otherwise than the program means them, and forbids to change: every query
// that sends them would fail. do runs a query without any of these settings.
func Check(ctx context.Context, do func(context.Context, ch.Query) error) error {
	means := map[string]string{}
	for _, s := range slices.Concat(Shared, Insert, Round, Question) {
		means[s.Key] = s.Value
	}
	var fixed []string
	var name, value proto.ColStr
	err := do(ctx, ch.Query{
		Body:   "SELECT name, value FROM system.settings WHERE readonly ORDER BY name",
		Result: proto.Results{{Data: &name}, {Data: &value}},
		OnResult: func(_ context.Context, b proto.Block) error {
			for i := range b.Rows {
				if needed, sent := means[name.Row(i)]; sent && needed != value.Row(i) {
					fixed = append(fixed, fmt.Sprintf("%s is %s, and has to be %s", name.Row(i), value.Row(i), needed))
				}
			}
			return nil
		},
	})
	if err == nil && len(fixed) > 0 {
		err = fmt.Errorf("%w: %s; take away its constraints", ErrFixed, strings.Join(fixed, "; "))
	}
	return err
}

// Of makes settings of their names, by value, and sorts them.
func Of(names map[string]string) (settings []ch.Setting) {
	for value, keys := range names {
		for key := range strings.FieldsSeq(keys) {
			settings = append(settings, ch.Setting{Key: key, Value: value})
		}
	}
	slices.SortFunc(settings, func(a, b ch.Setting) int { return cmp.Compare(a.Key, b.Key) })
	return settings
}
