-- The tables. Applied at every start, on every server: each statement is idempotent, and none rewrites a part, so that a start is as
-- fast with a billion rows. A statement ends with a semicolon at the end of a line.
--
-- events is the last of the three that an insert needs: no row can come before everything is there that counts it.
--
-- {database} is replaced by the setting CLICKHOUSE_DATABASE. {events} and {events_hourly} are the rows of all servers; of erasures and
-- the like each server has a copy. Statements
-- with {cluster} are only for CLICKHOUSE_CLUSTER; where its shards have replicas, {Replicated} and {path} make the engines
-- Replicated ones. DEFINE is ours: it names what later definitions and the program use.

--
-- {purchase events}, {currency} in lower case, and {revenue rule}, a text with both, are the settings PURCHASE_EVENTS and CURRENCY.

DEFINE {is revenue} AS event_name IN ({purchase events}) AND lower(currency) IN ({currency}, '');

DEFINE {revenue of events} AS sumIf(toDecimal128(price, 4), {is revenue});

-- The ids of a set of events, added up, the first 64 bits of each. With the count it says whether two sets are the same.
DEFINE {id sum of events} AS sumWithOverflow(reinterpretAsUInt64(event_id));

-- What is counted of events: by the view at insert, in the cut hours of a query, by reconcile.
DEFINE {counts of events} AS
    toInt64(count()) AS event_count,
    uniqCombined64State(17)(user_id) AS unique_users_state,
    {revenue of events} AS revenue,
    uniqCombined64StateIf(12)(campaign_id, campaign_id != '') AS campaigns_state,
    max(timestamp) AS last_at,
    {id sum of events} AS id_sum;

DEFINE {counted} AS
    event_name,
    channel,
    toStartOfHour(timestamp) AS hour,
    {counts of events};

-- What the view counts of the rows of an insert.
DEFINE {view} AS
    SELECT {counted}
    FROM {database}.events
    GROUP BY event_name, channel, hour;

-- The same for rows that are already counted.
DEFINE {added up} AS
    sum(event_count) AS event_count,
    uniqCombined64MergeState(17)(unique_users_state) AS unique_users_state,
    sum(revenue) AS revenue,
    uniqCombined64MergeState(12)(campaigns_state) AS campaigns_state,
    max(last_at) AS last_at,
    sumWithOverflow(id_sum) AS id_sum;

-- The column names of both.
DEFINE {counts} AS event_count, unique_users_state, revenue, campaigns_state, last_at, id_sum;

-- Where hours between {from} and {to} are recounted.
DEFINE {recounts of the range} AS {database}.recounts WHERE first <= {to:UInt32} AND last >= {from:UInt32};

-- 0, or an error when there are some.
DEFINE {settled} AS (SELECT throwIf(count() > 0, 'these hours are being recounted') FROM {recounts of the range});

-- The whole hours of a range, from and to included: [first_hour, end_hour). The last hour is whole, too, when it has no event
-- from after the end, as when the end is now. A query sees one snapshot of a table, so events that come in meanwhile are in
-- neither place. While hours of the range are recounted there is no answer.
DEFINE {whole hours} AS
    intDiv({from:UInt32} + 3599, 3600) * 3600 + {settled} AS first_hour,
    intDiv({to:UInt32} + 1, 3600) * 3600 AS last_hour,
    last_hour + if({nothing after}, 3600, 0) AS end_hour;

-- And its whole days: [first_day, end_day).
DEFINE {whole days} AS
    {whole hours},
    intDiv({from:UInt32} + 86399, 86400) * 86400 AS first_day,
    intDiv({to:UInt32} + 1, 86400) * 86400 AS end_day;

-- A range is cut into these three; the first is read from the projection daily.
DEFINE {in whole days} AS toStartOfDay(hour) >= first_day AND toStartOfDay(hour) < end_day;
DEFINE {in whole hours} AS hour >= first_hour AND hour < end_hour AND (hour < first_day OR hour >= end_day);
DEFINE {in seconds} AS timestamp >= {from:UInt32} AND timestamp <= {to:UInt32} AND (timestamp < first_hour OR timestamp >= end_hour);

-- What the seconds have, in the columns of events_hourly.
DEFINE {cut hours} AS
    SELECT {counted}
    FROM {events}
    WHERE {in seconds}
    GROUP BY event_name, channel, hour;

-- The views mean the same to whoever asks, whatever the asker's profile has. clickhouse.go says so for the program's own queries.
DEFINE {as meant} AS
    SETTINGS
        group_by_use_nulls = 0, enable_global_with_statement = 1, aggregate_functions_null_for_empty = 0,
        empty_result_for_aggregation_by_empty_set = 0, prefer_column_name_to_alias = 0;

-- What a command has noted outlives a power cut, whatever CLICKHOUSE_FSYNC says.
DEFINE {on disk} AS fsync_after_insert = 1, fsync_part_directory = 1;

CREATE DATABASE IF NOT EXISTS {database};

-- The hours that `reconcile -recount` is counting anew at the moment: none, or one row. Questions about them wait.
CREATE TABLE IF NOT EXISTS {database}.recounts
(
    first DateTime('UTC'),
    last  DateTime('UTC') COMMENT 'the last second'
)
ENGINE = MergeTree
ORDER BY first
SETTINGS {on disk};

-- Whom `erase` has erased: rows of these users that happened up to then are not stored any more, wherever they come from. A user who is
-- erased again has another row.
CREATE TABLE IF NOT EXISTS {database}.erasures
(
    user      FixedString(32) COMMENT 'SHA-256 of user_id',
    up_to     DateTime('UTC') COMMENT 'what happened up to this second is erased',
    erased_at DateTime('UTC') DEFAULT now()
)
ENGINE = MergeTree
ORDER BY user
SETTINGS {on disk};

-- The hours that an erasure has still to count anew: none but while it runs, or after it was cut off.
CREATE TABLE IF NOT EXISTS {database}.erasing
(
    hour DateTime('UTC')
)
ENGINE = MergeTree
ORDER BY hour
SETTINGS {on disk};

-- One row per event_name, channel and hour: what the metrics endpoint and the dashboards read.
--
-- The projection has the same per day, in every merged part and so never out of step with it: a month is 30 states to merge, not
-- 720. A part that was just inserted has a few rows and does without, which saves a seventh of the CPU of a small insert.
CREATE TABLE IF NOT EXISTS {database}.events_hourly
(
    event_name         LowCardinality(String),
    channel            LowCardinality(String),
    hour               DateTime('UTC'),
    -- Signed, so that a reconciliation can take back what was counted twice.
    event_count        SimpleAggregateFunction(sum, Int64),
    -- 17 bits: exact to about 4,000 users, 0.3 % error beyond, at most 96 KiB a row. Queries and merges pay for bits.
    unique_users_state AggregateFunction(uniqCombined64(17), String),
    revenue            SimpleAggregateFunction(sum, Decimal(38, 4)) COMMENT 'of purchases in TRY',
    campaigns_state    AggregateFunction(uniqCombined64(12), LowCardinality(String)),
    last_at            SimpleAggregateFunction(max, DateTime('UTC')) COMMENT 'timestamp of the newest event',
    id_sum             SimpleAggregateFunction(sumWithOverflow, UInt64) COMMENT 'of the first 64 bits of each event_id: with event_count it says whether these are the same events',
    PROJECTION daily
    (
        SELECT event_name, channel, toStartOfDay(hour), {added up}
        GROUP BY event_name, channel, toStartOfDay(hour)
    )
)
ENGINE = {Replicated}AggregatingMergeTree{path}
PARTITION BY toYYYYMM(hour)
ORDER BY (event_name, channel, hour)
SETTINGS
    min_bytes_for_wide_part = 67108864,
    -- States are large: a query over a few hours unpacks half as much.
    index_granularity_bytes = 1048576,
    materialize_projections_on_insert = 0, materialize_projections_on_merge = 1, deduplicate_merge_projection_mode = 'rebuild',
    auto_statistics_types = '', non_replicated_deduplication_window = 0, ttl_only_drop_parts = 1, materialize_ttl_recalculate_only = 1;

-- Its columns are named so that it can be made before events. Its comment is the rule by which it counts revenue: when the settings
-- say another one, the program changes both. What was counted before stays.
CREATE MATERIALIZED VIEW IF NOT EXISTS {database}.events_hourly_mv TO {database}.events_hourly
(
    event_name LowCardinality(String), channel LowCardinality(String), hour DateTime('UTC'), event_count Int64,
    unique_users_state AggregateFunction(uniqCombined64(17), String), revenue Decimal(38, 4),
    campaigns_state AggregateFunction(uniqCombined64(12), LowCardinality(String)), last_at DateTime('UTC'), id_sum UInt64
)
AS {view}
COMMENT {revenue rule};

-- One row per event. The sorting key answers "which of these ids are here?" by primary key, and the cut hours of a metrics
-- query by event_name and time. ReplacingMergeTree merges away a duplicate that got past the dedupe.
CREATE TABLE IF NOT EXISTS {database}.events
(
    -- Ids are random bytes: compressing them gains nothing, and a lookup would have to unpack them.
    event_id    FixedString(32)          COMMENT 'SHA-256 of event_name|user_id|timestamp|channel and, when there is one, |insert_id, raw; lower(hex(event_id)) is the API''s event_id' CODEC(NONE),
    event_name  LowCardinality(String),
    channel     LowCardinality(String)   COMMENT 'web, mobile_app, api or empty',
    campaign_id LowCardinality(String),
    user_id     String                   CODEC(ZSTD(1)),
    insert_id   String                   COMMENT 'the sender''s own id of the event, or empty' CODEC(ZSTD(1)),
    -- Queries by campaign unpack the timestamp of every row: DoubleDelta takes nearly three times the CPU for that, and saves 0.4
    -- bytes an event.
    timestamp   DateTime('UTC')          CODEC(T64, LZ4),
    tags        Array(LowCardinality(String)),
    metadata    String                   COMMENT 'a JSON object, or empty' CODEC(ZSTD(1)),
    price       Decimal(18, 4)           COMMENT 'metadata.price, 0 when absent or no number',
    currency    LowCardinality(String)   COMMENT 'metadata.currency',
    created_at  DateTime64(3, 'UTC')     DEFAULT now64(3) COMMENT 'when ClickHouse got the row' CODEC(DoubleDelta, LZ4)
)
ENGINE = {Replicated}ReplacingMergeTree{path}
PARTITION BY toYYYYMM(timestamp)
ORDER BY (event_name, timestamp, event_id)
SETTINGS
    -- Parts below this size keep all columns in one file: a third less CPU for a small insert.
    min_bytes_for_wide_part = 67108864,
    -- A lookup unpacks one granule per id: less than half of the CPU of 8192 rows, and inserts cost the same. It cannot be
    -- changed later: an existing table keeps its own.
    index_granularity = 1024,
    -- Merges are more than half of what inserts cost: with a base of 10 instead of 5 a row goes through fewer of them, and the
    -- table has up to twice as many parts.
    merge_selector_base = 10,
    -- Statistics of every part, the server's default, are for joins and would cost 0.4 µs an event for nothing.
    auto_statistics_types = '',
    -- ClickHouse does not remember inserted blocks: the program knows what is stored, and what was lost may have to be inserted again.
    non_replicated_deduplication_window = 0,
    -- With RETENTION_DAYS the program gives both tables a TTL: a part is dropped once all of it is too old, and none is rewritten.
    ttl_only_drop_parts = 1, materialize_ttl_recalculate_only = 1;

-- A table from before the column was there: its events have an id and not what it was made of.
ALTER TABLE {database}.events ADD COLUMN IF NOT EXISTS insert_id String COMMENT 'the sender''s own id of the event, or empty' CODEC(ZSTD(1)) AFTER user_id;

-- For each member of METADATA_COLUMNS, as JSON. Rows from before are read from metadata until the column is filled in, which happens
-- once and in the background. A member that is not declared any more keeps its column: ALTER TABLE … DROP COLUMN takes it away.
ALTER TABLE {database}.events ADD COLUMN IF NOT EXISTS {column} String MATERIALIZED {member} CODEC(ZSTD(1));

ALTER TABLE {database}.events MATERIALIZE COLUMN {column};

-- {fsync} is the setting CLICKHOUSE_FSYNC; merged parts need none, because their sources are kept for 8 minutes.
--
-- Without it a power cut empties the parts of the last half minute, hundreds of them under load. ClickHouse is to put them aside and go
-- on, because what they had comes back from Kafka; with more than 100 it would not load the table.
DEFINE {after a power cut} AS fsync_after_insert = {fsync}, fsync_part_directory = {fsync}, max_suspicious_broken_parts = 10000;

ALTER TABLE {database}.events MODIFY SETTING {after a power cut};

ALTER TABLE {database}.events_hourly MODIFY SETTING {after a power cut};

-- What leads to all servers. A row's server follows from its id; a lookup asks all, so that the cluster may grow.
CREATE OR REPLACE TABLE {database}.events_distributed AS {database}.events
ENGINE = Distributed({cluster}, {database}, events, reinterpretAsUInt64(event_id));

CREATE OR REPLACE TABLE {database}.events_hourly_distributed AS {database}.events_hourly
ENGINE = Distributed({cluster}, {database}, events_hourly, rand());

-- What happened from one Unix second to another, both included, in the columns of events_hourly: whole hours from there, the
-- cut hours at both ends from events. Use:
-- SELECT sum(event_count) FROM events_between(from = 1767139200, to = 1767225600) WHERE channel = 'web'
CREATE OR REPLACE VIEW {database}.events_between AS
SELECT * FROM
(
    WITH
        {whole hours}
    SELECT event_name, channel, hour, {counts}
    FROM {events_hourly}
    WHERE hour >= first_hour AND hour < end_hour
    UNION ALL
    {cut hours}
)
{as meant};

-- The same for queries that do not need the hour, ten times as fast over a month: a whole day has its first hour.
CREATE OR REPLACE VIEW {database}.events_between_by_day AS
SELECT * FROM
(
    WITH
        {whole days}
    SELECT event_name, channel, day AS hour, {counts}
    FROM
    (
        SELECT event_name, channel, toStartOfDay(hour) AS day, {added up}
        FROM {events_hourly}
        WHERE {in whole days}
        GROUP BY event_name, channel, toStartOfDay(hour)
    )
    UNION ALL
    SELECT event_name, channel, hour, {counts}
    FROM {events_hourly}
    WHERE {in whole hours}
    UNION ALL
    {cut hours}
)
{as meant};

-- The rows of events on all servers.
CREATE OR REPLACE VIEW {database}.events_all AS
SELECT * FROM {events};

-- What counts as a purchase: its names, and those events whose price is revenue.
CREATE OR REPLACE VIEW {database}.purchase_events AS
SELECT arrayJoin([{purchase events}]) AS event_name;

CREATE OR REPLACE VIEW {database}.purchases AS
SELECT * FROM {events} WHERE {is revenue};
