// Package web is what a browser gets: the dashboard at /, Swagger UI at /swagger/ and the API's document.
//
// It owns what is embedded: everything comes from the binary, no page loads anything from elsewhere. The pages need no key;
// what they show comes from the API, with the key that their reader types in. Whoever mounts Pages decides everything else.
package web

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"fmt"
	"io"
	"io/fs"
	"mime"
	"net/http"
	"path"
	"strconv"
	"strings"
	"time"

	"github.com/klauspost/compress/gzhttp"
	"github.com/klauspost/compress/gzip"
	swagger "github.com/swaggest/swgui/v5/static"
)

//go:embed *.html *.css *.js *.svg openapi.json
var embedded embed.FS

// exampleNow, exampleISO and exampleYesterday stand in openapi.json wherever an example needs a recent time: events older than 30
// days are refused, and "Try it out" has to work as it is.
const (
	exampleNow       = "1767225600"
	exampleISO       = "2026-01-01T00:00:00.123Z" // as Segment's clients write it
	exampleYesterday = "1767139200"
)

// What a page may do. Swagger UI sets styles by itself; nothing may be framed, and nothing comes from another host.
const (
	pagePolicy    = "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
	swaggerPolicy = "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)

// Pages returns the handlers of GET, by pattern of http.ServeMux without the method. Files are compressed for browsers that
// take it; notFound answers for those that are not there.
func Pages(notFound http.HandlerFunc) map[string]http.Handler {
	page := gzhttp.GzipHandler(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { servePage(w, r, notFound) }))
	return map[string]http.Handler{
		"/{$}":               page,
		"/web/{file}":        page,
		"/swagger":           http.HandlerFunc(toSwagger),
		"/swagger/{file...}": gzhttp.GzipHandler(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { serveSwagger(w, r, notFound) })),
	}
}

// servePage answers with a file of the dashboard.
func servePage(w http.ResponseWriter, r *http.Request, notFound http.HandlerFunc) {
	name := cmp.Or(r.PathValue("file"), "index.html")
	body, err := embedded.ReadFile(name)
	if err != nil {
		notFound(w, r)
		return
	}
	writeFile(w, r, name, pagePolicy, body)
}

// toSwagger leads to Swagger UI's page by a relative address, which holds below any path that a proxy has put the pages at. http.Redirect
// would make it absolute.
func toSwagger(w http.ResponseWriter, r *http.Request) {
	to := "index.html"
	if !strings.HasSuffix(r.URL.Path, "/") {
		to = "swagger/" + to
	}
	w.Header().Set("Location", to)
	w.WriteHeader(http.StatusFound)
}

// serveSwagger answers with our own page, start script and document, and with Swagger UI's own files otherwise.
func serveSwagger(w http.ResponseWriter, r *http.Request, notFound http.HandlerFunc) {
	name := r.PathValue("file")
	var body []byte
	var err error
	switch name {
	case "":
		toSwagger(w, r)
		return
	case "index.html":
		body, err = embedded.ReadFile("swagger.html")
	case "swagger-initializer.js", "openapi.json":
		body, err = embedded.ReadFile(name)
	default:
		body, err = swaggerFile(name)
	}
	if err != nil {
		notFound(w, r)
		return
	}
	if name == "openapi.json" {
		now := time.Now().Unix()
		body = bytes.ReplaceAll(body, []byte(exampleNow), strconv.AppendInt(nil, now, 10))
		body = bytes.ReplaceAll(body, []byte(exampleISO), time.Unix(now, 0).UTC().AppendFormat(nil, "2006-01-02T15:04:05.000Z"))
		body = bytes.ReplaceAll(body, []byte(exampleYesterday), strconv.AppendInt(nil, now-24*60*60, 10))
	}
	writeFile(w, r, name, swaggerPolicy, body)
}

// swaggerFile returns a file of Swagger UI, which the package has compressed.
func swaggerFile(name string) ([]byte, error) {
	f, err := swagger.FS.Open(name + ".gz")
	if err != nil {
		return fs.ReadFile(swagger.FS, name)
	}
	defer f.Close()
	unzipped, err := gzip.NewReader(f)
	if err != nil {
		return nil, err
	}
	return io.ReadAll(unzipped)
}

// writeFile answers with a file of the binary, or 304 when the browser has it.
func writeFile(w http.ResponseWriter, r *http.Request, name, policy string, body []byte) {
	sum := sha256.Sum256(body)
	h := w.Header()
	h.Set("ETag", fmt.Sprintf("%q", hex.EncodeToString(sum[:8])))
	h.Set("Cache-Control", "no-cache") // ask again each time: the next version has the same names
	h.Set("Content-Security-Policy", policy)
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Referrer-Policy", "no-referrer")
	if t := mime.TypeByExtension(path.Ext(name)); t != "" {
		h.Set("Content-Type", t)
	}
	http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(body))
}
