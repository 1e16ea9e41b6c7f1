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
	if r.peek() != '{' {
		return errNotEnvelope(list)
	}
	r.eat('{')
	events, found := 0, false
	for n := 0; ; n++ {
		if more, err := r.more(n, '}'); err != nil {
			return err
		} else if !more {
			break
		}
		k, err := r.key()
		if err != nil {
			return err
		}
		if !k.is(list) {
			v, err := r.value()
			if err != nil {
				return err
			}
			if other != nil {
				other(k, v)
			}
			continue
		}
		if found {
			return fmt.Errorf("%q appears more than once", list)
		}
		found = true
		if r.peek() != '[' {
			return errNotEnvelope(list)
		}
		if events, err = eachElement(r, do); err != nil {
			return err
		}
	}
	if err := r.end(); err != nil {
		return err
	}
	if events == 0 {
		return errNoEvents(list)
	}
	return nil
}

// isEnvelope says whether a body is {"events":…} rather than an event a line, judging by its first object. A body that is not
// JSON but begins like an envelope counts as one: the error is then about the body, not about its lines.
func isEnvelope(body []byte) bool {
	r := jsonReader{b: body}
	if !r.eat('{') {
		return false
	}
	for n := 0; ; n++ {
		if more, err := r.more(n, '}'); err != nil || !more {
			return err != nil
		}
		k, err := r.key()
		if err != nil || k.is("events") {
			return true
		}
		if _, err := r.value(); err != nil {
			return true
		}
	}
}

func errNoEvents(list string) error {
	return fmt.Errorf("%q is missing or empty: send 1 to 1000 events", list)
}

func errNotEnvelope(list string) error {
	return fmt.Errorf("the body must be a JSON object with an %q array", list)
}

// eachElement calls do with r at each of the array's elements, of which it allows maxBulkEvents.
func eachElement(r *jsonReader, do func(*jsonReader) error) (n int, err error) {
	r.eat('[')
	for ; ; n++ {
		if more, err := r.more(n, ']'); err != nil || !more {
			return n, err
		}
		if n == maxBulkEvents {
			return n, errTooManyEvents
		}
		if err := do(r); err != nil {
			return n, err
		}
	}
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
