#!/bin/sh
# Sends events, one JSON object a line on standard input, as many as there are: send.sh http://localhost:8080 KEY <events.ndjson
# Give each an insert_id: curl sends again when there is no answer, on 429 and on 503, and what is sent again is counted once.
set -eu
parts=$(mktemp -d)
trap 'rm -rf "$parts"' EXIT
split -l 1000 - "$parts/"
for part in "$parts"/*; do
	curl -sS --fail-with-body -m 60 --retry 10 --retry-all-errors -H "X-API-Key: $2" \
		-H 'Content-Type: application/x-ndjson' --data-binary "@$part" "$1/api/v1/events/bulk"
done
