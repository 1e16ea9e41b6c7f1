# Everything a person does with this directory. `make help` lists it.
# What a target needs beyond Go it installs itself or names: ClickHouse comes from PATH or, through npm, as a library.

DATA_DIR ?= .data
export DATA_DIR

# The embedded stack's ports: make run KAFKA_PORTS=19092,19093, or from the environment, as SERVER_PORT and ADMIN_ADDR are.
KAFKA_PORTS          ?= 29092,29093
CLICKHOUSE_PORT      ?= 9000
CLICKHOUSE_HTTP_PORT ?= 8123

GO_FILES := $(wildcard *.go internal/*/*.go load/*.go ops/*.go segment/*.go web/*) schema.sql go.mod go.sum CHANGELOG.md
DEV      := bin/dev
APP      := bin/event-ingestion

# What `version` says: CHANGELOG.md's newest version; +dev and the commit when there are changes after it.
VERSION := $(shell dev/scripts/version.sh)
LDFLAGS := -s -w -X main.release=$(VERSION)

# make up SCALE=1: three instances of the program behind a load balancer.
COMPOSE := docker compose -f docker-compose.yml $(if $(SCALE),-f deploy/compose.scale.yml)

.PHONY: help run stores stop demo build up down logs test test-cluster test-clock torture fuzz bench bench-peers profile lint clean test-api test-clients test-page screenshot release licenses

STACK      = $(DEV) -kafka-ports $(KAFKA_PORTS) -clickhouse-port $(CLICKHOUSE_PORT) -clickhouse-http-port $(CLICKHOUSE_HTTP_PORT)
SAY_STORES = echo "Kafka      localhost:$(subst $(COMMA),$(COMMA)localhost:,$(KAFKA_PORTS))"; \
	echo "ClickHouse http://localhost:$(CLICKHOUSE_HTTP_PORT) (native $(CLICKHOUSE_PORT)), database $${CLICKHOUSE_DATABASE:-event_ingestion}, user default, no password"
# What a command has to know when ports are not the usual ones.
COMMA      := ,
COMMAND_ENV = $(if $(filter 29092$(COMMA)29093,$(KAFKA_PORTS)),,KAFKA_BROKERS=localhost:$(subst $(COMMA),$(COMMA)localhost:,$(KAFKA_PORTS)) )$(if $(filter 9000,$(CLICKHOUSE_PORT)),,CLICKHOUSE_PORT=$(CLICKHOUSE_PORT) )

help: ## this list
	@awk -F':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

run: $(APP) $(DEV) ## the whole system on the embedded stack; Ctrl-C or `make stop` ends it
	@echo "Dashboard  http://localhost:$${SERVER_PORT:-8080}/"
	@echo "API        http://localhost:$${SERVER_PORT:-8080}/api/v1   (/swagger/index.html, /health, /ready)"
	@$(SAY_STORES)
	@echo "Admin      http://$${ADMIN_ADDR:-127.0.0.1:6060}/metrics, /debug/pprof/"
	@$(STACK) -- $(APP)

stores: $(APP) $(DEV) ## the stores of `make run` without the program, for commands that need it stopped; Ctrl-C or `make stop` ends them
	@$(SAY_STORES)
	@echo "Commands   $(COMMAND_ENV)$(APP) rewind -h, in another terminal"
	@$(STACK) -- sh -c 'trap "exit 0" INT TERM; tail -f /dev/null & wait'

stop: $(DEV) ## end what `make run` started, cleanly
	@$(DEV) stop

demo: $(APP) ## thirty days of a believable shop into what `make run` started
	$(APP) load -demo -url http://localhost:$${SERVER_PORT:-8080}

build: $(APP) ## the one static binary, bin/event-ingestion

$(APP): $(GO_FILES)
	CGO_ENABLED=0 go build -trimpath -ldflags='$(LDFLAGS)' -o $@ .

$(DEV): $(wildcard dev/*.go) dev/clickhouse.xml dev/go.mod dev/go.sum
	cd dev && CGO_ENABLED=0 go build -trimpath -o ../$@ .

release: ## the program for Linux and macOS, amd64 and arm64, with licences and checksums, into dist/; a tag has to be CHANGELOG.md's version
	dev/scripts/release.sh

licenses: ## deploy/LICENSES.txt anew, after a change of go.mod
	LICENSES=write go test -run 'TestLicenses$$' -count=1 ./test

up: ## the production stack in containers: Kafka, ClickHouse, Grafana, the program; SCALE=1 for three instances
	$(COMPOSE) up -d --build --wait
	@$(COMPOSE) ps

down: ## stop the production stack; its data stays in Docker's volumes
	$(COMPOSE) down

logs: ## follow what the production stack says
	$(COMPOSE) logs -f --tail=100

test: $(DEV) ## all tests, with the race detector, on an embedded stack of their own
	cd dev && go test -race ./...
	PAGE_MODULES=$$(dev/scripts/test_clients.sh browser) $(DEV) -ephemeral -- go test -race -count=1 -parallel 6 -timeout 40m $(TESTFLAGS) ./...

test-cluster: $(DEV) ## the program's tests on a real Kafka cluster, set up as docker-compose.yml says; needs Java 17 and Maven
	cd dev && DEV_TEST_CLUSTER=1 go test -race -count=1 -v -run 'TestCluster' .
	$(DEV) -ephemeral -kafka cluster -- go test -race -count=1 -timeout 40m $(TESTFLAGS) ./...

test-api: $(APP) $(DEV) ## the OpenAPI document validated, and the running program fuzzed by it
	$(DEV) -ephemeral -- dev/scripts/test_api.sh $(APP)

test-clients: $(DEV) ## the real clients of Segment's protocol for Python, Node, Go and browsers, through faults; needs npm, python3 and Linux
	$(DEV) -ephemeral -- dev/scripts/test_clients.sh

test-page: $(DEV) ## the dashboard page in headless Chromium, as in make test once this has installed it
	TESTS='TestPage(Below|View)?$$' $(DEV) -ephemeral -- dev/scripts/test_clients.sh

screenshot: ## README's picture of the dashboard, of what `make run` and `make demo` show
	dev/scripts/test_clients.sh screenshot

# Midnight passes within the second and the fourth run, a month ends within the fourth.
SHIFTS ?= 12:00 23:56 00:01 month-end month-start 12-31T12:00

test-clock: $(DEV) ## the program's tests at other hours, half an hour; SHIFTS="12:00 23:56" chooses, TESTFLAGS='-run X' narrows
	dev/scripts/test_clock.py $(SHIFTS) -- $(TESTFLAGS)

torture: $(DEV) ## the tests that kill things, with five times as many kills; TORTURE=n for more
	TORTURE=$${TORTURE:-5} $(DEV) -ephemeral -- go test -race -count=1 -timeout 80m -v -run 'Kill|Power|Servers|Replicas|Recount|Paused|Away|Answers|Instances|Torn|Stop|Model|Disk|Refused|Broken|Cost' . ./test

fuzz: ## each fuzz target for FUZZTIME (default 20s)
	for t in $$(go test -list '^Fuzz' . | grep '^Fuzz'); do go test -run '^$$' -fuzz "^$$t$$" -fuzztime $${FUZZTIME:-20s} . || exit 1; done

bench: $(DEV) ## all benchmarks on an embedded stack; BENCH=regexp chooses
	$(DEV) -ephemeral -- go test -run '^$$' -bench '$(or $(BENCH),.)' -skip Peers -benchmem -timeout 30m . ./test

bench-peers: $(DEV) ## this program beside other ways into the same tables: medians of RUNS (default 5) runs of 10 s or more each, 40 minutes; WAYS=drain for those with that word
	$(DEV) -ephemeral -- go test -run '^$$' -bench Peers -benchtime $(or $(RUNS),5)x -timeout 160m ./test

profile: $(DEV) ## CPU and memory profile of an event's way, from a body to rows: cpu.pprof, mem.pprof; BENCH=regexp chooses
	$(DEV) -ephemeral -- go test -run '^$$' -bench '$(or $(BENCH),BodyToRecords|RecordToRow|Insert)' -cpuprofile cpu.pprof -memprofile mem.pprof .
	@echo "look at them with: go tool pprof -http=: cpu.pprof"

lint: ## gofmt, vet, staticcheck, govulncheck, the Kubernetes manifest, the workflow
	@test -z "$$(gofmt -l .)" || { gofmt -l . ; echo "run gofmt -w ."; exit 1; }
	go vet ./... && (cd dev && go vet ./...) && cd dev/scripts/clients && go vet ./...
	go run honnef.co/go/tools/cmd/staticcheck@v0.8.2 ./...
	cd dev && go run honnef.co/go/tools/cmd/staticcheck@v0.8.2 ./...
	dev/scripts/check_kubernetes.sh
	go run github.com/rhysd/actionlint/cmd/actionlint@v1.7.12 -shellcheck= -pyflakes=
	@out=$$(go run golang.org/x/vuln/cmd/govulncheck@v1.9.0 ./... 2>&1) || case "$$out" in \
		*"fetching vulnerabilities"*) echo "govulncheck left out: its database cannot be reached" ;; \
		*) echo "$$out"; exit 1 ;; esac

clean: ## what was built and the data of `make run`
	@test ! -x $(DEV) || $(DEV) stop
	rm -rf bin dist "$(DATA_DIR)" *.pprof *.test
