// The shapes that events arrive in: one object, {"events":[…]}, or one event a line.
//
// envelope.go finds the events in a body and has each of them read in place, so that a body is read once, from front to back.
// Whatever surrounds the events must be JSON and is otherwise ignored.

package main

import (
	"bytes"
	"errors"
	"fmt"
)

// Limits of a bulk request, as the OpenAPI document has them.
const (
	maxBulkEvents = 1000
	maxEventBytes = maxSingleBody // of one event in it, as sent
)

var errTooManyEvents = errors.New("more than 1000 events: split the request")

// eachEvent calls do with r at each element of the array that list names, as in {"events":[…]}; do reads one value. The other
// members go to other, which may be nil.
func eachEvent(r *jsonReader, list string, other func(k, v jsonValue), do func(*jsonReader) error) error {
	if !r.eat('{') {
		return errNotEnvelope(list)
	}
	var k jsonValue
	events, found := 0, false
	for n := 0; r.key(n, &k); n++ {
		switch {
		case !k.is(list):
			if v := r.value(); other != nil && r.err == nil {
				other(k, v)
			}
		case found:
			return fmt.Errorf("%q appears more than once", list)
		case !r.eat('['):
			return errNotEnvelope(list)
		default:
			found = true
			for ; r.more(events, ']'); events++ {
				if events == maxBulkEvents {
					return errTooManyEvents
				}
				if err := do(r); err != nil {
					return err
				}
			}
		}
	}
	if r.end() == nil && events == 0 {
		return errNoEvents(list)
	}
	return r.err
}

// isEnvelope says whether a body is {"events":…} rather than an event a line, judging by its first object. A body that is not
// JSON but begins like an envelope counts as one: the error is then about the body, not about its lines.
func isEnvelope(body []byte) bool {
	var k jsonValue
	r := jsonReader{b: body}
	if !r.eat('{') {
		return false
	}
	for n := 0; r.key(n, &k); n++ {
		if k.is("events") {
			return true
		}
		r.value()
	}
	return r.err != nil
}

func errNoEvents(list string) error {
	return fmt.Errorf("%q is missing or empty: send 1 to 1000 events", list)
}

func errNotEnvelope(list string) error {
	return fmt.Errorf("the body must be a JSON object with an %q array", list)
}

// eachLine calls do with each line of an NDJSON body; blank lines are skipped.
func eachLine(body []byte, do func(line []byte) error) error {
	n := 0
	for len(body) > 0 {
		var line []byte
		if i := bytes.IndexByte(body, '\n'); i >= 0 {
			line, body = body[:i], body[i+1:]
		} else {
			line, body = body, nil
		}
		if line = bytes.TrimSpace(line); len(line) == 0 {
			continue
		}
		if n++; n > maxBulkEvents {
			return errTooManyEvents
		}
		if err := do(line); err != nil {
			return err
		}
	}
	if n == 0 {
		return errNoEvents("events")
	}
	return nil
}
