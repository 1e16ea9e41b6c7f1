#!/bin/sh
# Example requests against a running system, with fresh timestamps. Usage: requests.sh [http://localhost:8080]
# Ends with 1 when an answer does not have the expected status.
base=${1:-http://localhost:8080}
now=$(date +%s)
from=$((now - 86400))
failed=0
events=$(mktemp) || exit 1
trap 'rm -f "$events" "$events.gz"' EXIT

# request NAME EXPECTED_STATUS CURL_ARGS...
request() {
	name=$1 expected=$2
	shift 2
	printf '\n### %s\n' "$name"
	answer=$(curl -s -m 30 -w '\n%{http_code}' "$@")
	printf '%s\n' "$answer"
	if [ "${answer##*
}" != "$expected" ]; then
		echo "expected status $expected"
		failed=1
	fi
}

json='Content-Type: application/json'
request "One event" 202 "$base/api/v1/events" -H "$json" -d '{
  "event_name": "product_view", "channel": "web", "campaign_id": "cmp_987", "user_id": "user_123", "timestamp": '"$now"',
  "tags": ["electronics", "homepage"],
  "metadata": {"product_id": "prod-789", "price": 129.99, "currency": "TRY", "referrer": "google"}}'
request "Several events" 202 "$base/api/v1/events/bulk" -H "$json" -d '{"events": [
  {"event_name": "product_view", "user_id": "user_123", "timestamp": '"$now"', "channel": "web"},
  {"event_name": "add_to_cart", "user_id": "user_456", "timestamp": '"$now"', "channel": "mobile_app"}]}'
request "Twice in a second: each has an insert_id of its own" 202 "$base/api/v1/events/bulk" -H "$json" -d '{"events": [
  {"event_name": "item_scanned", "user_id": "till_7", "timestamp": '"$now"', "insert_id": "receipt-1042-1"},
  {"event_name": "item_scanned", "user_id": "till_7", "timestamp": '"$now"', "insert_id": "receipt-1042-2"}]}'
printf '{"event_name":"search","user_id":"user_1","timestamp":%s}\n{"event_name":"search","user_id":"user_2","timestamp":%s}\n' "$now" "$now" >"$events"
request "Several events, one a line" 202 "$base/api/v1/events/bulk" -H 'Content-Type: application/x-ndjson' --data-binary "@$events"
gzip -c "$events" >"$events.gz"
request "The same, compressed" 202 "$base/api/v1/events/bulk" -H 'Content-Type: application/x-ndjson' -H 'Content-Encoding: gzip' --data-binary "@$events.gz"
request "Some good, some bad" 207 "$base/api/v1/events/bulk" -H "$json" -d '{"events": [
  {"event_name": "search", "user_id": "user_3", "timestamp": '"$now"'}, {"event_name": "search", "timestamp": '"$now"'}]}'
request "What a client of Segment sends" 200 "$base/v1/batch" -H "$json" -d '{"batch": [
  {"type": "track", "messageId": "m-'"$now"'", "userId": "user_123", "event": "product_view", "properties": {"price": 129.99, "currency": "TRY"}}]}'
request "Refused, with everything that is wrong" 400 "$base/api/v1/events" -H "$json" -d '{"event_name": "", "user_id": 42, "timestamp": 1, "channel": "television"}'
sleep 1
request "Metrics" 200 "$base/api/v1/metrics?event_name=product_view&from=$from&to=$now"
request "Metrics of one channel" 200 "$base/api/v1/metrics?event_name=product_view&from=$from&to=$now&channel=web"
for group in channel hour day campaign; do
	request "Metrics by $group" 200 "$base/api/v1/metrics?event_name=product_view&from=$from&to=$now&group_by=$group"
done
request "Everything at once, of the last day" 200 "$base/api/v1/overview"
request "Liveness" 200 "$base/health"
request "Readiness" 200 "$base/ready"
exit $failed
