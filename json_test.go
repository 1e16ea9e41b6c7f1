// The reader of JSON, beside encoding/json.

package main

import (
	"bytes"
	"encoding/json"
	"testing"

	"github.com/valyala/fastjson"
)

func FuzzJSON(f *testing.F) {
	for _, seed := range []string{sampleEvent, ` [ 1 , -0.5e+3 , "\ud83d\ude00\n\/" , { } , [ ] , null , true , false ] `, `[[[[`, `{"a":01}`, `{"a":1,}`, `[1 2]`, `"\ud800"`, `{"a"}`, `[}`, `-`, `1.`, `2e`} {
		f.Add([]byte(seed))
	}
	var r skimmer
	var fast fastjson.Parser
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
		if v.depth >= maxDepth {
			return // which fastjson does not read
		}
		tree, err := fast.ParseBytes(text)
		if err != nil {
			t.Fatalf("fastjson does not read %q: %v", text, err)
		}
		var want bytes.Buffer
		json.Compact(&want, text)
		got := tree.MarshalTo(nil)
		if !bytes.Equal(got, want.Bytes()) {
			t.Fatalf("%q is compact as %q, want %q", text, got, want.Bytes())
		}
		if compact := !v.spaced; compact != (len(v.raw) == want.Len()) {
			t.Fatalf("%q is compact: %v", text, compact)
		}
		if v.raw[0] == '"' && !v.badText {
			var want string
			json.Unmarshal(text, &want)
			if got := r.word(v.raw); string(got) != want {
				t.Fatalf("%q reads %q, want %q", text, got, want)
			}
			if got, _ := tree.StringBytes(); string(got) != want {
				t.Fatalf("fastjson reads %q as %q, want %q", text, got, want)
			}
		}
	})
}
