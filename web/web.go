// Package web is what a browser gets: the dashboard at /, Swagger UI at /swagger/ and the API's document.
//
// It owns what is embedded: everything comes from the binary, no page loads anything from elsewhere. The pages need no key;
// what they show comes from the API, with the key that their reader types in. Whoever mounts Pages decides everything else.
//
// Whoever has no key may ask for them without end, so a file is unpacked, compressed and hashed when it is first asked for, and
// all answers are written from the same bytes: one takes microseconds of CPU and no memory, however slowly it is read.
package web

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"io"
	"io/fs"
	"mime"
	"net/http"
	"path"
	"strconv"
	"strings"
	"sync"
	"time"

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

// documentAge is how old the times in the document may be: it is made anew, at most once in this time, for everybody.
const documentAge = time.Minute

// Pages returns the handlers of GET, by pattern of http.ServeMux without the method. Files are compressed for browsers that
// take it; notFound answers for those that are not there.
func Pages(notFound http.HandlerFunc) map[string]http.Handler {
	dashboard, ui := map[string]func() *file{}, map[string]func() *file{}
	for _, name := range names(embedded) {
		dashboard[name] = sync.OnceValue(func() *file { return newFile(name, pagePolicy, read(embedded, name), nil) })
	}
	for _, packed := range names(swagger.FS) {
		name := strings.TrimSuffix(packed, ".gz")
		ui[name] = sync.OnceValue(func() *file { return swaggerFile(name, packed) })
	}
	ui["index.html"] = sync.OnceValue(func() *file { return newFile("index.html", swaggerPolicy, read(embedded, "swagger.html"), nil) })
	const starts = "swagger-initializer.js"
	ui[starts] = sync.OnceValue(func() *file { return newFile(starts, swaggerPolicy, read(embedded, starts), nil) })
	ui["openapi.json"] = new(document).latest
	serve := func(files map[string]func() *file) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			if f := files[cmp.Or(r.PathValue("file"), "index.html")]; f != nil {
				f().serve(w, r)
			} else {
				notFound(w, r)
			}
		}
	}
	files := serve(ui)
	return map[string]http.Handler{
		"/{$}":        serve(dashboard),
		"/web/{file}": serve(dashboard),
		"/swagger":    http.HandlerFunc(toSwagger),
		"/swagger/{file...}": http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.PathValue("file") == "" {
				toSwagger(w, r)
			} else {
				files(w, r)
			}
		}),
	}
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

// names are those of the files at the top of what is embedded, which can be listed and read.
func names(of fs.FS) []string {
	all, _ := fs.Glob(of, "*.*")
	return all
}

func read(from fs.FS, name string) []byte {
	b, _ := fs.ReadFile(from, name)
	return b
}

// file is what a browser gets, made once and shared by all answers.
type file struct {
	policy, media string
	plain, gzip   []byte   // gzip is nil when that would save nothing
	tag, gzipTag  []string // ETag; two forms of a file are two things to a cache
}

// newFile prepares a file. compressed is plain in gzip, or nil.
func newFile(name, policy string, plain, compressed []byte) *file {
	if compressed == nil {
		var b bytes.Buffer
		z, _ := gzip.NewWriterLevel(&b, gzip.BestCompression)
		z.Write(plain) // to memory, and so is what Close writes
		z.Close()
		compressed = b.Bytes()
	}
	if len(compressed) > len(plain)*9/10 {
		compressed = nil
	}
	sum := sha256.Sum256(plain)
	tag := hex.EncodeToString(sum[:8])
	return &file{policy: policy, media: cmp.Or(mime.TypeByExtension(path.Ext(name)), "application/octet-stream"),
		plain: plain, gzip: compressed, tag: []string{`"` + tag + `"`}, gzipTag: []string{`"` + tag + `-gzip"`}}
}

// swaggerFile prepares a file of Swagger UI. The package has compressed most of them: these bytes are sent as they are.
func swaggerFile(name, packed string) *file {
	b := read(swagger.FS, packed)
	if name == packed {
		return newFile(name, swaggerPolicy, b, nil)
	}
	unzipped, err := gzip.NewReader(bytes.NewReader(b))
	if err != nil {
		panic("what is embedded as " + packed + " is not gzip: " + err.Error())
	}
	plain, _ := io.ReadAll(unzipped)
	return newFile(name, swaggerPolicy, plain, b)
}

// document is openapi.json with times of now in its examples.
type document struct {
	mu   sync.Mutex // guards what follows; its holder makes the document while others wait, for milliseconds
	made time.Time
	file *file
}

func (d *document) latest() *file {
	d.mu.Lock()
	defer d.mu.Unlock()
	if now := time.Now(); d.file == nil || now.Sub(d.made) >= documentAge {
		d.made = now
		body := bytes.ReplaceAll(read(embedded, "openapi.json"), []byte(exampleNow), strconv.AppendInt(nil, now.Unix(), 10))
		body = bytes.ReplaceAll(body, []byte(exampleISO), now.Truncate(time.Second).UTC().AppendFormat(nil, "2006-01-02T15:04:05.000Z"))
		body = bytes.ReplaceAll(body, []byte(exampleYesterday), strconv.AppendInt(nil, now.Unix()-24*60*60, 10))
		d.file = newFile("openapi.json", swaggerPolicy, body, nil)
	}
	return d.file
}

// Values of headers that every file has: setting the map's entry saves a slice for each.
var (
	noCache    = []string{"no-cache"} // ask again each time: the next version has the same names
	noSniff    = []string{"nosniff"}
	noReferrer = []string{"no-referrer"}
)

// serve answers with the file, with a part of it, or 304 when the browser has it.
func (f *file) serve(w http.ResponseWriter, r *http.Request) {
	h := w.Header()
	h["Cache-Control"], h["X-Content-Type-Options"], h["Referrer-Policy"] = noCache, noSniff, noReferrer
	h["Content-Security-Policy"], h["Content-Type"] = []string{f.policy}, []string{f.media}
	h.Add("Vary", "Accept-Encoding")
	// Only what is understood of the request's headers is passed on: many ranges at once would cost a header and a copy for each of
	// thousands. Whoever asks for those gets the whole file, which the standard allows.
	asked := &http.Request{Method: r.Method, Header: http.Header{}}
	answer, tag := &whole{ResponseWriter: w, body: f.plain}, f.tag
	if isOneRange(r.Header.Get("Range"), len(f.plain)) {
		asked.Header["Range"], asked.Header["If-Range"] = r.Header["Range"], r.Header["If-Range"]
	} else if f.gzip != nil && takesGzip(r.Header.Get("Accept-Encoding")) {
		answer.body, answer.encoding, tag = f.gzip, "gzip", f.gzipTag
	}
	h["Etag"] = tag
	for _, has := range r.Header["If-None-Match"] { // a list; W/ before a tag does not matter
		if has == "*" || strings.Contains(has, tag[0]) {
			asked.Header["If-None-Match"] = tag
		}
	}
	http.ServeContent(answer, asked, "", time.Time{}, bytes.NewReader(answer.body))
}

// whole is the writer of an answer whose body is there already: nothing of it is copied.
type whole struct {
	http.ResponseWriter
	body     []byte
	encoding string // of the body
}

func (w *whole) WriteHeader(status int) {
	if status == http.StatusOK && w.encoding != "" {
		w.Header().Set("Content-Encoding", w.encoding)
		w.Header().Set("Content-Length", strconv.Itoa(len(w.body))) // which ServeContent leaves out
	}
	w.ResponseWriter.WriteHeader(status)
}

// ReadFrom is called by io.CopyN in ServeContent, which would otherwise take a buffer of 32 KiB for as long as the client reads.
func (w *whole) ReadFrom(src io.Reader) (int64, error) {
	if part, is := src.(*io.LimitedReader); is {
		if of, is := part.R.(*bytes.Reader); is {
			at := len(w.body) - of.Len()
			n, err := w.Write(w.body[at:min(at+int(part.N), len(w.body))])
			return int64(n), err
		}
	}
	return io.Copy(w.ResponseWriter, src)
}

// isOneRange says whether a header asks for a single range, which a body of size bytes has.
func isOneRange(header string, size int) bool {
	spec, is := strings.CutPrefix(header, "bytes=")
	from, to, isRange := strings.Cut(spec, "-")
	if !is || !isRange || strings.Contains(to, ",") {
		return false
	}
	if from == "" { // the last bytes
		n, err := strconv.Atoi(to)
		return err == nil && n > 0
	}
	first, err := strconv.Atoi(from)
	last := first
	if err == nil && to != "" {
		last, err = strconv.Atoi(to)
	}
	return err == nil && 0 <= first && first <= last && first < size
}

// takesGzip says whether a client of that Accept-Encoding takes gzip. What it likes better does not matter: there is only gzip.
func takesGzip(accepts string) bool {
	takes := false
	for part := range strings.SplitSeq(accepts, ",") {
		coding, weight, _ := strings.Cut(part, ";")
		_, q, _ := strings.Cut(weight, "=")
		refuses := strings.Trim(q, "0. ") == "" && q != ""
		switch strings.ToLower(strings.TrimSpace(coding)) {
		case "gzip", "x-gzip":
			return !refuses
		case "*":
			takes = !refuses
		}
	}
	return takes
}
