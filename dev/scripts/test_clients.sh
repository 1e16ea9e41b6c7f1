#!/bin/sh
# Sends with the real clients of Segment's protocol through kills, an absent Kafka and lost answers: make test-clients, or
# CLIENT=go make test-clients for one of them. They go into the user's cache, pinned; the Go one is a module of its own, so
# that the program's go.mod does not have it.
set -eu
cache=${XDG_CACHE_HOME:-$HOME/.cache}/event-ingestion/clients-python2.4.0-node3.1.0-browser1.84.3-axe4.14.1
if [ "${1:-}" = browser ]; then # where make test finds the browser that make test-page has installed, if it has
	[ ! -d "$cache/node_modules/axe-core" ] || ! command -v node >/dev/null || echo "$cache"
	exit
fi
for tool in python3 npm node go; do
	command -v $tool >/dev/null || { echo "missing: $tool"; exit 1; }
done
if [ ! -x "$cache/venv/bin/python" ]; then
	python3 -m venv "$cache/venv"
	"$cache/venv/bin/pip" install -q segment-analytics-python==2.4.0 || { rm -rf "$cache/venv"; exit 1; }
fi
if [ ! -d "$cache/node_modules/@segment/analytics-node" ]; then
	npm install --silent --no-fund --no-audit --prefix "$cache" @segment/analytics-node@3.1.0 \
		@segment/analytics-next@1.84.3 puppeteer-core@24.43.1 @sparticuz/chromium@147.0.0 axe-core@4.14.1
fi
if [ "${1:-}" = screenshot ]; then # of what `make demo` has filled: make screenshot
	CLIENTS=$cache exec node dev/scripts/clients/screenshot.mjs "http://localhost:${SERVER_PORT:-8080}/#range=604800&by=metadata.product_id&sum=metadata.price" assets/dashboard.png
fi
(cd dev/scripts/clients && CGO_ENABLED=0 go build -o "$cache/go-client" .)
CLIENTS=$cache PAGE_MODULES=$cache go test -race -count=1 -v -timeout 20m -run "${TESTS:-TestPage(Below|View)?$|TestClients/${CLIENT:-}}" ./test
