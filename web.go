// Pages for a browser: the dashboard at /, Swagger UI at /swagger/, the API's document.
//
// web.go owns what is embedded: everything comes from the binary, no page loads anything from elsewhere. The pages need no
// key; what they show comes from the API, with the key that their reader types in.

package main

import (
	"bytes"
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
	"time"

	"github.com/klauspost/compress/gzhttp"
	"github.com/klauspost/compress/gzip"
	swagger "github.com/swaggest/swgui/v5/static"
)

//go:embed web
var webFiles embed.FS

// exampleNow and exampleYesterday stand in openapi.json wherever an example needs a recent time: events older than 30
// days are refused, and "Try it out" has to work as it is.
const (
	exampleNow       = "1767225600"
	exampleYesterday = "1767139200"
)

// What a page may do. Swagger UI sets styles by itself; nothing may be framed, and nothing comes from another host.
const (
	pagePolicy    = "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
	swaggerPolicy = "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)

func pages() []route {
	page, swagger := gzhttp.GzipHandler(http.HandlerFunc(servePage)), gzhttp.GzipHandler(http.HandlerFunc(serveSwagger))
	return []route{
		{http.MethodGet, "/{$}", "pages", page},
		{http.MethodGet, "/web/{file}", "pages", page},
		{http.MethodGet, "/swagger", "pages", toSwagger},
		{http.MethodGet, "/swagger/{file...}", "pages", swagger},
	}
}

func servePage(w http.ResponseWriter, r *http.Request) {
	name := r.PathValue("file")
	if name == "" {
		name = "index.html"
	}
	body, err := webFiles.ReadFile("web/" + name)
	if err != nil {
		writeError(w, http.StatusNotFound, "not found", "nothing is at "+r.URL.Path)
		return
	}
	writeFile(w, r, name, pagePolicy, body)
}

func toSwagger(w http.ResponseWriter, r *http.Request) {
	http.Redirect(w, r, "/swagger/index.html", http.StatusFound)
}

// serveSwagger answers with our own page, start script and document, and with Swagger UI's own files otherwise.
func serveSwagger(w http.ResponseWriter, r *http.Request) {
	name := r.PathValue("file")
	var body []byte
	var err error
	switch name {
	case "":
		toSwagger(w, r)
		return
	case "index.html":
		body, err = webFiles.ReadFile("web/swagger.html")
	case "swagger-initializer.js", "openapi.json":
		body, err = webFiles.ReadFile("web/" + name)
	default:
		body, err = swaggerFile(name)
	}
	if err != nil {
		writeError(w, http.StatusNotFound, "not found", "nothing is at "+r.URL.Path)
		return
	}
	if name == "openapi.json" {
		now := time.Now().Unix()
		body = bytes.ReplaceAll(body, []byte(exampleNow), strconv.AppendInt(nil, now, 10))
		body = bytes.ReplaceAll(body, []byte(exampleYesterday), strconv.AppendInt(nil, now-daySeconds, 10))
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
