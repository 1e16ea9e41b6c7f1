#!/bin/sh
# Sends events, one JSON object a line on standard input, as many as there are: send.sh http://localhost:8080 KEY <events.ndjson
# Give each an insert_id: what is sent again, for want of an answer, on 429, 5xx or "unavailable", is counted once.
set -eu
parts=$(mktemp -d) failed=0
trap 'rm -rf "$parts"' EXIT
split -l 1000 - "$parts/"
for part in $(ls "$parts"); do
	while answer=$(curl -sS -m 60 -w ' %{http_code}' -H "X-API-Key: $2" -H 'Content-Type: application/x-ndjson' \
		--data-binary "@$parts/$part" "$1/api/v1/events/bulk" || echo " 000"); do case $answer in
		*' 202') echo "$answer"; break ;;
		*' 000' | *' 429' | *' 5'?? | *'"code":"unavailable"'*) sleep 1 ;;
		*) echo "$answer" >&2; failed=1; break ;; esac; done # some are not valid, or the key is not
done; exit $failed
