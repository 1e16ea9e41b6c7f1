// The document has the routes and the codes that the program has.

package main

import (
	"encoding/json"
	"os"
	"slices"
	"sort"
	"strings"
	"testing"
)

// document is what the tests need of openapi.json.
type document struct {
	Paths map[string]map[string]struct {
		Responses map[string]any
	}
}

func readDocument(t *testing.T) (doc document, text string) {
	t.Helper()
	b, err := os.ReadFile("web/openapi.json")
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(b, &doc); err != nil {
		t.Fatal(err)
	}
	return doc, string(b)
}

// TestDocumentRoutes: every route of the API is in the document, and the reverse; so is every code of an error.
func TestDocumentRoutes(t *testing.T) {
	doc, text := readDocument(t)
	var documented, routed []string
	for path, methods := range doc.Paths {
		for method := range methods {
			documented = append(documented, strings.ToUpper(method)+" "+path)
		}
	}
	s := &system{cfg: &settings{role: "all"}, metrics: newMetricsAPI(nil, nil, nil), ready: &readiness{}}
	for _, rt := range s.routes(nil) {
		short := rt.name == "segment" && (len(rt.path) == len("/v1/t") || rt.path == "/v1/import") // stands with the whole name
		if rt.name != "pages" && !short {
			routed = append(routed, rt.method+" "+rt.path)
		}
	}
	sort.Strings(documented)
	sort.Strings(routed)
	if !slices.Equal(documented, routed) {
		t.Errorf("documented %v, routed %v", documented, routed)
	}
	for _, code := range []string{codeRequired, codeMaxLength, codeFuture, codeExpired, codeInvalidChannel, codeMaxTags,
		codeTagTooLong, codeInvalidFormat, codeInvalidRange, codeInvalidGroupBy, codeUnavailable} {
		if !strings.Contains(text, `"`+code+`"`) {
			t.Errorf("%s is not in the document", code)
		}
	}
}
