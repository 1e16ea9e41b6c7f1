// Settings: environment variables, their defaults, limits and meanings, in one table.
//
// settings.go owns the table; `event-ingestion -h` prints it, loadSettings reads the environment by it, and a start
// with a bad value ends with one message that names every bad one. A secret may stand in a file that NAME_FILE names.

package main

import (
	"cmp"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"net/url"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/event-ingestion/event-ingestion/internal/env"
	"github.com/event-ingestion/event-ingestion/internal/questions"
	"github.com/event-ingestion/event-ingestion/internal/tokens"
)

// Limits that are no settings, of more than one part.
const (
	// maxHeaderBytes and readHeaderTimeout are of a connection to either listener.
	maxHeaderBytes    = 16 << 10
	readHeaderTimeout = 5 * time.Second
	// minInFlightBytes is the least MAX_IN_FLIGHT_BYTES: room for the bodies of four bulks.
	minInFlightBytes = 32 << 20
	// retryPartitions are those of events.retry: two for each of the five delays.
	retryPartitions = 10
)

// settings is what the environment says; see settingsTable for units and defaults.
type settings struct {
	serverHost                             string
	serverPort                             int
	readTimeout, writeTimeout, ackTimeout  time.Duration
	idleTimeout                            time.Duration
	maxConnections                         int
	maxInFlightBytes, maxInFlightPerClient int64
	clockSkew                              time.Duration
	adminAddr, role                        string
	apiKeys, writeKeys, corsOrigins        []string
	allowedHosts                           []string
	tlsCertFile, tlsKeyFile                string
	logLevel                               slog.Level
	logFormat                              string
	accessLog                              float64
	grafanaURL, kafkaUIURL                 string

	kafkaBrokers                                   []string
	kafkaTopic, kafkaGroup                         string
	kafkaPartitions, kafkaReplication, kafkaMinISR int
	kafkaLinger, kafkaSession                      time.Duration
	kafkaCompression                               string
	kafkaTLS                                       bool
	kafkaCA                                        *x509.CertPool // nil means the system's
	kafkaCertFile, kafkaKeyFile                    string
	kafkaSASL, kafkaUsername, kafkaPassword        string
	kafkaTokens                                    tokens.Source     // of OAUTHBEARER
	kafkaExtensions                                map[string]string // sent with a token

	clickhouseHost                         string
	clickhousePort                         int
	clickhouseDatabase, clickhouseCluster  string
	clickhouseUsername, clickhousePassword string
	clickhouseTLS, clickhouseFsync         bool
	clickhouseCA                           *x509.CertPool // nil means the system's
	retentionDays                          int
	revenue                                revenueRule
	metadataColumns                        []questions.Column

	workerCount, workerBatchSize   int
	workerBatchTimeout             time.Duration
	dedupeMemory, consumeMemory    int64
	retryWorkers, maxRetryAttempts int
	shutdownTimeout, shutdownDelay time.Duration
}

type setting struct {
	name, fallback, meaning string
	set                     func(string) error
}

// secrets are the settings that may be given as a file, and whose values no message repeats.
var secrets = []string{"API_KEYS", "WRITE_KEYS", "KAFKA_SASL_PASSWORD", "KAFKA_OAUTH_CLIENT_SECRET", "CLICKHOUSE_PASSWORD"}

// settingsTable is every setting of the program, in the order in which -h prints them.
func (c *settings) settingsTable() []setting {
	return []setting{
		{"SERVER_HOST", "", "address that the API listens on; empty means every interface", env.Text(&c.serverHost)},
		{"SERVER_PORT", "8080", "port of the API", env.Integer(&c.serverPort, 1, 65535)},
		{"SERVER_READ_TIMEOUT", "15s", "a request has to be read within this", env.Duration(&c.readTimeout, time.Second, time.Hour)},
		{"SERVER_WRITE_TIMEOUT", "30s", "an answer has to be written within this, counted from the end of the header", env.Duration(&c.writeTimeout, time.Second, time.Hour)},
		{"SERVER_IDLE_TIMEOUT", "2m", "a connection may wait for its next request for this long; longer than a proxy in front keeps its own, or that answers 502 now and then", env.Duration(&c.idleTimeout, time.Second, 24*time.Hour)},
		{"MAX_CONNECTIONS", "0", "connections of clients to the API at once; beyond it the one that is idle for the longest is closed; 0 is as many as open files and memory have room for", env.Integer(&c.maxConnections, 0, 1<<20)},
		{"ACK_TIMEOUT", "10s", "Kafka has to acknowledge a request's events within this, else 503; below SERVER_WRITE_TIMEOUT", env.Duration(&c.ackTimeout, time.Second, time.Hour)},
		{"MAX_IN_FLIGHT_BYTES", "67108864", "bytes that requests hold at once, bodies, records and answers, else 503", env.Integer(&c.maxInFlightBytes, minInFlightBytes, 1<<40)},
		{"MAX_IN_FLIGHT_BYTES_PER_CLIENT", "", "of these, what those of one key hold, or of one address without a key, else 429 to it alone; empty is an eighth, 0 no limit", eighthOf(&c.maxInFlightPerClient, &c.maxInFlightBytes)},
		{"CLOCK_SKEW", "1s", "a timestamp may be so far in the future, such as 5s: senders' clocks are ahead of this one", env.WholeSeconds(&c.clockSkew, 5*time.Minute)},
		{"ADMIN_ADDR", "127.0.0.1:6060", "listener for Prometheus /metrics and /debug/pprof/, or off", env.Matching(&c.adminAddr, "host:port or off", parseAddress)},
		{"ROLE", "all", "all; api serves HTTP and leaves consuming to others; consumer only consumes, and answers /health and /ready", env.OneOf(&c.role, "all", "api", "consumer")},
		{"API_KEYS", "", "comma-separated keys of 16 characters or more, one of which a request to /api/ or /v1/ has to bring; none, and no WRITE_KEYS, lets everybody in", env.ParsedBy(&c.apiKeys, parseKeys)},
		{"WRITE_KEYS", "", "comma-separated keys that may only send events, for pages and apps, whose keys are public", env.ParsedBy(&c.writeKeys, parseKeys)},
		{"CORS_ORIGINS", "", "comma-separated origins whose pages may call the API, such as https://shop.example; * is all of them", env.ParsedBy(&c.corsOrigins, parseOrigins)},
		{"ALLOWED_HOSTS", "", "comma-separated names, beside localhost and the machine's, under which clients may reach the admin listener and, over loopback while there are no keys, the API: any other could be a page's that leads to this machine", env.ParsedBy(&c.allowedHosts, parseHosts)},
		{"TLS_CERT_FILE", "", "certificate chain in PEM; with TLS_KEY_FILE the API speaks HTTPS", env.Text(&c.tlsCertFile)},
		{"TLS_KEY_FILE", "", "its private key in PEM; both are read again on SIGHUP", env.Text(&c.tlsKeyFile)},
		{"LOG_LEVEL", "info", "debug, info, warn or error", env.Matching(&c.logLevel, "debug, info, warn or error", parseLevel)},
		{"LOG_FORMAT", "text", "text or json", env.OneOf(&c.logFormat, "text", "json")},
		{"ACCESS_LOG", "0", "share of requests that are logged, 0 to 1; those that fail with 5xx are logged anyway, at most 10 a second", env.Matching(&c.accessLog, "a number from 0 to 1", parseShare)},
		{"GRAFANA_URL", "", "where the dashboard page links to for Grafana; empty leaves the link out", env.Matching(&c.grafanaURL, "an address such as http://localhost:3000", parseLink)},
		{"KAFKA_UI_URL", "", "the same for Kafka UI", env.Matching(&c.kafkaUIURL, "an address such as http://localhost:3000", parseLink)},

		{"KAFKA_BROKERS", "localhost:29092,localhost:29093", "comma-separated host:port of the first brokers to ask", env.Matching(&c.kafkaBrokers, "host:port,host:port,…, each port a number from 1 to 65535", parseAddresses)},
		{"KAFKA_TOPIC", "events", "main topic; retries go to TOPIC.retry, dead letters to TOPIC.dlq", env.Matching(&c.kafkaTopic, "a topic's name: letters, digits, '.', '_' and '-', at most 243 of them", parseTopic)},
		{"KAFKA_CONSUMER_GROUP", "event-consumers", "consumer group, shared by all instances of the program", env.Text(&c.kafkaGroup)},
		{"KAFKA_PARTITIONS", "20", "partitions of the main topic when it is created", env.Integer(&c.kafkaPartitions, 1, 10000)},
		{"KAFKA_REPLICATION_FACTOR", "2", "replicas of each partition of topics that are created", env.Integer(&c.kafkaReplication, 1, 100)},
		{"KAFKA_MIN_ISR", "2", "min.insync.replicas of topics that are created; 1 keeps accepting with a broker down", env.Integer(&c.kafkaMinISR, 1, 100)},
		{"KAFKA_LINGER", "1ms", "the producer waits this long for more records before it sends; 0 sends at once", env.Duration(&c.kafkaLinger, 0, time.Minute)},
		{"KAFKA_COMPRESSION", "snappy", "of produced batches: none, snappy, lz4 or zstd", env.OneOf(&c.kafkaCompression, "none", "snappy", "lz4", "zstd")},
		{"KAFKA_SESSION_TIMEOUT", "10s", "the group gives the partitions of an instance that died without a word to others after this", env.Duration(&c.kafkaSession, time.Second, time.Hour)},
		{"KAFKA_TLS", "false", "true speaks TLS to the brokers", env.Matching(&c.kafkaTLS, "true or false", parseBoolean)},
		{"KAFKA_TLS_CA_FILE", "", "certificates in PEM that sign those of the brokers; empty means the system's", env.ParsedBy(&c.kafkaCA, readCertificates)},
		{"KAFKA_TLS_CERT_FILE", "", "certificate chain in PEM that this program shows the brokers; read again for each connection", env.Text(&c.kafkaCertFile)},
		{"KAFKA_TLS_KEY_FILE", "", "its private key in PEM", env.Text(&c.kafkaKeyFile)},
		{"KAFKA_SASL_MECHANISM", "none", "none, PLAIN, SCRAM-SHA-256, SCRAM-SHA-512 or OAUTHBEARER", env.OneOf(&c.kafkaSASL, "none", "PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER")},
		{"KAFKA_SASL_USERNAME", "", "user of PLAIN and SCRAM", env.Text(&c.kafkaUsername)},
		{"KAFKA_SASL_PASSWORD", "", "its password", env.Text(&c.kafkaPassword)},
		{"KAFKA_OAUTH_TOKEN_FILE", "", "file with the token of OAUTHBEARER, which somebody else renews; read for each login", env.Text(&c.kafkaTokens.File)},
		{"KAFKA_OAUTH_TOKEN_URL", "", "or the address of an identity provider that gives tokens to clients (client_credentials)", env.Matching(&c.kafkaTokens.URL, "an address such as https://login.example/oauth2/token", parseLink)},
		{"KAFKA_OAUTH_CLIENT_ID", "", "this program's name there", env.Text(&c.kafkaTokens.ClientID)},
		{"KAFKA_OAUTH_CLIENT_SECRET", "", "its secret there", env.Text(&c.kafkaTokens.ClientSecret)},
		{"KAFKA_OAUTH_SCOPE", "", "scopes to ask for, separated by spaces", env.Text(&c.kafkaTokens.Scopes)},
		{"KAFKA_OAUTH_EXTENSIONS", "", "what the brokers want beside the token: name=value,…", env.Matching(&c.kafkaExtensions, "name=value,name=value,…, each name of letters", tokens.ParseExtensions)},

		{"CLICKHOUSE_HOST", "localhost", "host of ClickHouse", env.Matching(&c.clickhouseHost, "a name or an address, without the port, which is CLICKHOUSE_PORT", parseHost)},
		{"CLICKHOUSE_PORT", "9000", "native port of ClickHouse", env.Integer(&c.clickhousePort, 1, 65535)},
		{"CLICKHOUSE_DATABASE", "event_ingestion", "database; created when missing", env.Matching(&c.clickhouseDatabase, "at most 150 letters, digits and _, not starting with a digit, and not system, table or function", parseIdentifier)},
		{"CLICKHOUSE_USERNAME", "default", "user", env.Text(&c.clickhouseUsername)},
		{"CLICKHOUSE_PASSWORD", "", "password", env.Text(&c.clickhousePassword)},
		{"CLICKHOUSE_TLS", "false", "true speaks TLS to ClickHouse, whose port for it is usually 9440", env.Matching(&c.clickhouseTLS, "true or false", parseBoolean)},
		{"CLICKHOUSE_TLS_CA_FILE", "", "certificates in PEM that sign that of ClickHouse; empty means the system's", env.ParsedBy(&c.clickhouseCA, readCertificates)},
		{"CLICKHOUSE_CLUSTER", "", "name of a cluster that the server knows: events are spread over its servers by ClickHouse's Distributed engine", env.Matching(&c.clickhouseCluster, "a name without quotes and backslashes", parseCluster)},
		{"CLICKHOUSE_FSYNC", "false", "true has each insert wait for ClickHouse's disk, so that a power cut loses nothing of it; about an eighth of the highest rate", env.Matching(&c.clickhouseFsync, "true or false", parseBoolean)},
		{"RETENTION_DAYS", "0", "ClickHouse drops events, and what was counted of them, after so many days, a month at a time; at least 31, 0 keeps all", env.ParsedBy(&c.retentionDays, parseRetention)},
		{"PURCHASE_EVENTS", "purchase,Order Completed", "comma-separated event names whose metadata.price is revenue", env.ParsedBy(&c.revenue.Events, parseEventNames)},
		{"CURRENCY", "TRY", "currency of revenue: metadata.currency is that, in any case of letters, or absent", env.Matching(&c.revenue.Currency, "1 to 20 letters and digits", parseCurrency)},
		{"METADATA_COLUMNS", "", "comma-separated members of metadata that are asked for often, such as referrer,page.path: each gets a column of its own", env.ParsedBy(&c.metadataColumns, questions.ParseColumns)},

		{"WORKER_COUNT", "20", "workers; partition p belongs to worker p mod WORKER_COUNT", env.Integer(&c.workerCount, 1, 1000)},
		{"WORKER_BATCH_SIZE", "2000", "rows of a worker's block; a full block starts an insert", env.Integer(&c.workerBatchSize, 1, 100000)},
		{"WORKER_BATCH_TIMEOUT", "50ms", "a waiting row starts an insert after this", env.Duration(&c.workerBatchTimeout, time.Millisecond, time.Minute)},
		{"CONSUME_MEMORY", "134217728", "bytes that records may take between Kafka and ClickHouse, fetched, queued and in blocks", env.Integer(&c.consumeMemory, 1<<20, 1<<40)},
		{"DEDUPE_MEMORY", "268435456", "bytes for the ids of stored events, about 12 an id; events beyond it are looked up in ClickHouse", env.Integer(&c.dedupeMemory, 0, 1<<40)},
		{"RETRY_WORKER_COUNT", "1", "workers that put rejected records back when they are due; 0 leaves that to other instances", env.Integer(&c.retryWorkers, 0, retryPartitions)},
		{"MAX_RETRY_ATTEMPTS", "5", "retries after 2, 4, 8, 16, 32 s before a rejected record becomes a dead letter", env.Integer(&c.maxRetryAttempts, 0, 100)},
		{"SHUTDOWN_TIMEOUT", "8s", "a stop finishes requests and inserts within this; what is left is read from Kafka again", env.Duration(&c.shutdownTimeout, time.Second, time.Hour)},
		{"SHUTDOWN_DELAY", "0", "a stop first turns /ready to 503 and goes on serving for this long, so that a load balancer sees it", env.Duration(&c.shutdownDelay, 0, time.Hour)},
	}
}

// loadSettings reads every setting from getenv (os.Getenv's form). The error names all bad values, a line each.
func loadSettings(getenv func(string) string) (*settings, error) {
	c := new(settings)
	var bad []error
	for _, s := range c.settingsTable() {
		value, err := getenv(s.name), error(nil)
		shown := fmt.Sprintf("%s=%q", s.name, value)
		if slices.Contains(secrets, s.name) {
			value, err = orFile(getenv, s.name)
			shown = s.name
		}
		if err == nil {
			err = s.set(cmp.Or(value, s.fallback))
		}
		if err != nil {
			bad = append(bad, fmt.Errorf("%s: %w", shown, err))
		}
	}
	contradicts := func(is bool, format string, values ...any) {
		if is {
			bad = append(bad, fmt.Errorf(format, values...))
		}
	}
	if len(bad) == 0 { // else they may have no values
		contradicts((c.tlsCertFile == "") != (c.tlsKeyFile == ""), "TLS_CERT_FILE and TLS_KEY_FILE: only one of them is set, HTTPS needs both")
		contradicts((c.kafkaCertFile == "") != (c.kafkaKeyFile == ""), "KAFKA_TLS_CERT_FILE and KAFKA_TLS_KEY_FILE: only one of them is set, a certificate needs both")
		contradicts(c.kafkaCertFile != "" && !c.kafkaTLS, "KAFKA_TLS_CERT_FILE: needs KAFKA_TLS=true, or nobody sees the certificate")
		from, byToken := &c.kafkaTokens, c.kafkaSASL == "OAUTHBEARER"
		contradicts(c.kafkaSASL != "none" && !byToken && (c.kafkaUsername == "" || c.kafkaPassword == ""),
			"KAFKA_SASL_MECHANISM=%s: needs KAFKA_SASL_USERNAME and KAFKA_SASL_PASSWORD", c.kafkaSASL)
		contradicts((c.kafkaSASL == "none" || byToken) && c.kafkaUsername != "", "KAFKA_SASL_USERNAME: needs KAFKA_SASL_MECHANISM PLAIN or SCRAM, or nobody logs in by it")
		contradicts(byToken && (from.File == "") == (from.URL == ""), "KAFKA_SASL_MECHANISM=OAUTHBEARER: needs KAFKA_OAUTH_TOKEN_FILE or KAFKA_OAUTH_TOKEN_URL, one of them")
		contradicts(from.URL != "" && (from.ClientID == "" || from.ClientSecret == ""), "KAFKA_OAUTH_TOKEN_URL: needs KAFKA_OAUTH_CLIENT_ID and KAFKA_OAUTH_CLIENT_SECRET")
		contradicts(!byToken && from.File+from.URL != "", "KAFKA_OAUTH_TOKEN_FILE, KAFKA_OAUTH_TOKEN_URL: need KAFKA_SASL_MECHANISM=OAUTHBEARER, or nobody logs in by a token")
		contradicts(c.kafkaMinISR > c.kafkaReplication,
			"KAFKA_MIN_ISR=%d: cannot be above KAFKA_REPLICATION_FACTOR=%d, nothing would ever be acknowledged", c.kafkaMinISR, c.kafkaReplication)
		contradicts(slices.ContainsFunc(c.writeKeys, func(k string) bool { return slices.Contains(c.apiKeys, k) }),
			"WRITE_KEYS: one of them is in API_KEYS, too, and could read what is stored")
		contradicts(c.kafkaLinger >= c.ackTimeout, "KAFKA_LINGER=%s: has to be below ACK_TIMEOUT=%s, or nothing is acknowledged in time", c.kafkaLinger, c.ackTimeout)
		contradicts(c.ackTimeout >= c.writeTimeout, "ACK_TIMEOUT=%s: has to be below SERVER_WRITE_TIMEOUT=%s, or the answer cannot be sent", c.ackTimeout, c.writeTimeout)
	}
	if len(bad) > 0 {
		return nil, fmt.Errorf("bad settings:\n%w", errors.Join(bad...))
	}
	return c, nil
}

// printSettings writes the table for -h.
func printSettings(w io.Writer) {
	for _, s := range new(settings).settingsTable() {
		fmt.Fprintf(w, "  %-31s %s (default %q)\n", s.name, s.meaning, s.fallback)
	}
	fmt.Fprintf(w, "\nA duration has a unit, such as 50ms, 10s or 1m; a bare number is seconds.\n%s may stand in a file instead: NAME_FILE is its path.\n", strings.Join(secrets, ", "))
}

// isOpen says whether nobody needs a key.
func (c *settings) isOpen() bool { return len(c.apiKeys)+len(c.writeKeys) == 0 }

// orFile returns the value of a secret, from the environment or from the file that NAME_FILE names.
func orFile(getenv func(string) string, name string) (string, error) {
	value, path := getenv(name), getenv(name+"_FILE")
	if path == "" {
		return value, nil
	}
	if value != "" {
		return "", fmt.Errorf("%s_FILE is set, too; one of them has to go", name)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return "", fmt.Errorf("read %s_FILE: %w", name, err)
	}
	if value = strings.TrimSpace(string(b)); value == "" {
		return "", fmt.Errorf("the file %s of %s_FILE is empty", path, name)
	}
	return value, nil
}

// minKeyLength keeps out keys that can be guessed.
const minKeyLength = 16

// parseKeys takes API keys, separated by commas or the ends of lines.
func parseKeys(s string) ([]string, error) {
	list := strings.FieldsFunc(s, func(r rune) bool { return r == ',' || unicode.IsSpace(r) })
	for i, k := range list {
		if len(k) < minKeyLength {
			return nil, fmt.Errorf("key %d of %d is shorter than %d characters", i+1, len(list), minKeyLength)
		}
		if strings.ContainsFunc(k, func(r rune) bool { return r < '!' || r > '~' }) { // which no header carries
			return nil, fmt.Errorf("key %d of %d has characters beyond ASCII", i+1, len(list))
		}
	}
	if s != "" && len(list) == 0 { // no key would let everybody in
		return nil, errors.New("there is no key in it")
	}
	return list, nil
}

// parseOrigins takes what a browser can send: it writes hosts in lower case and ASCII, and leaves the scheme's own port out.
func parseOrigins(s string) ([]string, error) {
	list := strings.FieldsFunc(s, func(r rune) bool { return r == ',' || r == ' ' })
	for _, o := range list {
		_, ok := parseLink(o)
		u, _ := url.Parse(o)
		if o != "*" && !(ok && u.Scheme+"://"+u.Host == o) {
			return nil, fmt.Errorf("%q has to be scheme://host or scheme://host:port, or *", o)
		}
		isOther := func(r rune) bool { return r > unicode.MaxASCII || unicode.IsUpper(r) }
		if own := map[string]string{"http": "80", "https": "443"}; o != "*" && (u.Port() == own[u.Scheme] || strings.ContainsFunc(o, isOther)) {
			return nil, fmt.Errorf("%q is no origin that a browser sends: lower case, xn--… for other letters, no :80 after http and no :443 after https", o)
		}
	}
	return list, nil
}

// parseHosts takes names as a Host header has them, without ports, and returns them in lower case.
func parseHosts(s string) (hosts []string, err error) {
	for host := range strings.SplitSeq(strings.ToLower(s), ",") {
		if host = strings.TrimSpace(host); strings.ContainsAny(host, "/:[]* ") {
			return nil, fmt.Errorf("%q is no host: write a name without scheme, port and path", host)
		} else if host != "" {
			hosts = append(hosts, host)
		}
	}
	return hosts, nil
}

// readCertificates reads a file of them.
func readCertificates(path string) (*x509.CertPool, error) {
	if path == "" {
		return nil, nil
	}
	b, err := os.ReadFile(path)
	pool := x509.NewCertPool()
	if err == nil && !pool.AppendCertsFromPEM(b) {
		err = errors.New("has no certificate in PEM")
	}
	return pool, err
}

// parseRetention takes 0, or more days than an event may be old when it is accepted.
func parseRetention(s string) (days int, err error) {
	const least, most = maxAgeSeconds/daySeconds + 1, 100 * 365
	if s != "0" && env.Integer(&days, least, most)(s) != nil {
		err = fmt.Errorf("has to be 0, or an integer from %d to %d", least, most)
	}
	return days, err
}

// eighthOf takes a number of bytes, or nothing for an eighth of the whole, which has been set before.
func eighthOf(dst, whole *int64) func(string) error {
	return func(s string) error {
		return env.Integer(dst, 0, 1<<40)(cmp.Or(s, strconv.FormatInt(*whole/8, 10)))
	}
}

// parseTopic takes what Kafka does, and leaves room for ".retry" in the 249 characters that it allows.
func parseTopic(s string) (string, bool) {
	other := strings.Trim(s, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")
	return s, other == "" && strings.Trim(s, ".") != "" && len(s) <= 249-len(".retry")
}

// parseEventNames takes names that an event can have, but for those with a comma.
func parseEventNames(s string) ([]string, error) {
	list := strings.Split(s, ",")
	for i, name := range list {
		list[i] = strings.TrimSpace(name)
		if n := len([]rune(list[i])); n == 0 || n > maxTextChars || !utf8.ValidString(name) || strings.ContainsFunc(name, unicode.IsControl) {
			return nil, fmt.Errorf("name %d of %d has to have 1 to %d characters, and no control characters", i+1, len(list), maxTextChars)
		}
	}
	return list, nil
}

func parseCurrency(s string) (string, bool) {
	other := strings.Trim(s, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789")
	return s, other == "" && s != "" && len(s) <= 20
}

func parseLink(s string) (string, bool) {
	u, err := url.Parse(s)
	return s, s == "" || err == nil && u.Host != "" && (u.Scheme == "http" || u.Scheme == "https")
}

func parseBoolean(s string) (bool, bool) {
	b, err := strconv.ParseBool(s)
	return b, err == nil
}

func parseLevel(s string) (slog.Level, bool) {
	var l slog.Level
	err := l.UnmarshalText([]byte(s))
	return l, err == nil
}

func parseShare(s string) (float64, bool) {
	f, err := strconv.ParseFloat(s, 64)
	return f, err == nil && f >= 0 && f <= 1
}

func parseAddress(s string) (string, bool) {
	if s == "off" {
		return "", true
	}
	_, _, err := net.SplitHostPort(s)
	return s, err == nil
}

func parseAddresses(s string) ([]string, bool) {
	list := strings.Split(s, ",")
	for i, a := range list {
		list[i] = strings.TrimSpace(a)
		_, port, err := net.SplitHostPort(list[i])
		if err == nil {
			_, err = strconv.ParseUint(port, 10, 16)
		}
		if err != nil || port == "0" {
			return nil, false
		}
	}
	return list, true
}

// parseHost takes a name, or an address of IPv4 or IPv6.
func parseHost(s string) (string, bool) {
	_, err := netip.ParseAddr(s)
	return s, err == nil || !strings.ContainsAny(s, ":/[]")
}

// parseCluster takes what can stand between quotes in SQL.
func parseCluster(s string) (string, bool) { return s, !strings.ContainsAny(s, "'\\`\"") }

// parseIdentifier takes what can stand in SQL without quotes, also behind INSERT INTO, with room for the tables' names in those of files; the
// schema puts the database there so.
func parseIdentifier(s string) (string, bool) {
	reserved := slices.Contains([]string{"system", "table", "function"}, strings.ToLower(s))
	return s, sqlName.MatchString(s) && !reserved
}

var sqlName = regexp.MustCompile(`^[a-zA-Z_]\w{0,149}$`)

// logger writes what LOG_LEVEL and LOG_FORMAT ask for.
func (cfg *settings) logger(w io.Writer) *slog.Logger {
	options := &slog.HandlerOptions{Level: cfg.logLevel, ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
		if err, is := a.Value.Any().(error); is { // ch-go's would print their stacks
			a.Value = slog.StringValue(err.Error())
		}
		return a
	}}
	if cfg.logFormat == "json" {
		return slog.New(slog.NewJSONHandler(w, options))
	}
	return slog.New(slog.NewTextHandler(w, options))
}
