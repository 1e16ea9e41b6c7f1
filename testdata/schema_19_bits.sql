-- The tables, in the order in which an event meets them. Applied at every start: each statement is idempotent.
-- {database} is replaced by the setting CLICKHOUSE_DATABASE; with CLICKHOUSE_CLUSTER the other braces say ON CLUSTER and
-- Replicated, else nothing. A statement ends with a semicolon at the end of a line.

CREATE DATABASE IF NOT EXISTS {database}{on cluster};

-- One row an event. The sorting key answers "which of these ids are here?" by primary key, and the cut hours of a
-- metrics query by event_name and time. ReplacingMergeTree merges away a copy that got past the dedupe.
CREATE TABLE IF NOT EXISTS {database}.events{on cluster}
(
    event_id    FixedString(32)          COMMENT 'SHA-256 of event_name|user_id|timestamp|channel, raw; lower(hex(event_id)) is the API''s event_id',
    event_name  LowCardinality(String),
    channel     LowCardinality(String)   COMMENT 'web, mobile_app, api or empty',
    campaign_id LowCardinality(String),
    user_id     String                   CODEC(ZSTD(1)),
    timestamp   DateTime('UTC')          CODEC(DoubleDelta, LZ4),
    tags        Array(LowCardinality(String)),
    metadata    String                   COMMENT 'a JSON object, or empty' CODEC(ZSTD(1)),
    price       Decimal(18, 4)           COMMENT 'metadata.price, 0 when absent or no number',
    currency    LowCardinality(String)   COMMENT 'metadata.currency',
    created_at  DateTime64(3, 'UTC')     DEFAULT now64(3) COMMENT 'when ClickHouse got the row' CODEC(DoubleDelta, LZ4)
)
ENGINE = {replicated}ReplacingMergeTree
PARTITION BY toYYYYMM(timestamp)
ORDER BY (event_name, timestamp, event_id)
SETTINGS
    -- An insert whose answer was lost is sent again with the same token; this many tokens are remembered.
    non_replicated_deduplication_window = 10000,
    replicated_deduplication_window = 10000,
    -- Parts below this size keep all columns in one file: a third less CPU for a small insert.
    min_bytes_for_wide_part = 67108864;

-- One row an event_name, channel and hour: what the metrics endpoint and the dashboards read.
CREATE TABLE IF NOT EXISTS {database}.events_hourly{on cluster}
(
    event_name         LowCardinality(String),
    channel            LowCardinality(String),
    hour               DateTime('UTC'),
    -- Signed, so that a reconciliation can take back what was counted twice.
    event_count        SimpleAggregateFunction(sum, Int64),
    -- 19 bits: exact to 16,384 users (18 bits: 8,192), 0.14 % error beyond, at most 384 KiB a row.
    unique_users_state AggregateFunction(uniqCombined64(19), String),
    revenue            SimpleAggregateFunction(sum, Decimal(38, 4)) COMMENT 'of purchases in TRY',
    campaigns_state    AggregateFunction(uniqCombined64(12), LowCardinality(String))
)
ENGINE = {replicated}AggregatingMergeTree
PARTITION BY toYYYYMM(hour)
ORDER BY (event_name, channel, hour)
SETTINGS non_replicated_deduplication_window = 10000, replicated_deduplication_window = 10000, min_bytes_for_wide_part = 67108864;

CREATE MATERIALIZED VIEW IF NOT EXISTS {database}.events_hourly_mv{on cluster} TO {database}.events_hourly AS
SELECT
    event_name,
    channel,
    toStartOfHour(timestamp) AS hour,
    toInt64(count()) AS event_count,
    uniqCombined64State(19)(user_id) AS unique_users_state,
    sumIf(toDecimal128(price, 4), event_name = 'purchase' AND currency IN ('TRY', '')) AS revenue,
    uniqCombined64StateIf(12)(campaign_id, campaign_id != '') AS campaigns_state
FROM {database}.events
GROUP BY event_name, channel, hour;

-- What happened from one Unix second to another, both included, in the columns of events_hourly: whole hours from there, cut
-- hours at both ends from events. When the end is now, the last hour counts as whole: no event is from later. Use:
-- SELECT sum(event_count) FROM events_between(from = 1767139200, to = 1767225600) WHERE channel = 'web'
CREATE OR REPLACE VIEW {database}.events_between{on cluster} AS
WITH
    toStartOfHour(toDateTime({from:UInt32}, 'UTC') + 3599) AS first_whole,
    if({to:UInt32} + 5 >= toUnixTimestamp(now()), toStartOfHour(toDateTime({to:UInt32}, 'UTC')) + 3600, toStartOfHour(toDateTime({to:UInt32}, 'UTC') + 1)) AS end_whole
SELECT event_name, channel, hour, event_count, unique_users_state, revenue, campaigns_state
FROM {database}.events_hourly
WHERE hour >= first_whole AND hour < end_whole
UNION ALL
SELECT
    event_name,
    channel,
    toStartOfHour(timestamp) AS hour,
    toInt64(count()) AS event_count,
    uniqCombined64State(19)(user_id) AS unique_users_state,
    sumIf(toDecimal128(price, 4), event_name = 'purchase' AND currency IN ('TRY', '')) AS revenue,
    uniqCombined64StateIf(12)(campaign_id, campaign_id != '') AS campaigns_state
FROM {database}.events
WHERE timestamp >= toDateTime({from:UInt32}, 'UTC') AND timestamp <= toDateTime({to:UInt32}, 'UTC')
    AND (timestamp < first_whole OR timestamp >= end_whole OR first_whole >= end_whole)
GROUP BY event_name, channel, hour;
