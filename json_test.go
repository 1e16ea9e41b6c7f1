// The reader of JSON, beside encoding/json.

package main

import (
	"bytes"
	"encoding/json"
	"testing"
)

func FuzzJSON(f *testing.F) {
	for _, seed := range []string{sampleEvent, ` [ 1 , -0.5e+3 , "\ud83d\ude00\n\/" , { } , [ ] , null , true , false ] `, `[[[[`, `{"a":01}`, `{"a":1,}`, `[1 2]`, `"\ud800"`, `{"a"}`, `[}`, `-`, `1.`, `2e`} {
		f.Add([]byte(seed))
	}
	var r jsonReader
	f.Fuzz(func(t *testing.T, text []byte) {
		r.reset(text)
		v := r.value()
		err := r.end()
		if valid := json.Valid(text); valid != (err == nil) && v.depth < 10000 {
			t.Fatalf("error %v, encoding/json says valid is %v: %q", err, valid, text)
		}
		if err != nil {
			return
		}
		var want bytes.Buffer
		json.Compact(&want, text)
		if got := v.appendCompact(nil); !bytes.Equal(got, want.Bytes()) {
			t.Fatalf("%q is compact as %q, want %q", text, got, want.Bytes())
		}
		if v.kind == '"' && !v.badText {
			var want string
			json.Unmarshal(text, &want)
			if got := v.text(new([]byte)); string(got) != want {
				t.Fatalf("%q reads %q, want %q", text, got, want)
			}
		}
	})
}
