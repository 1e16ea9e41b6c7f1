// Package env makes values of the environment's texts: each of its functions returns one that reads a text into dst, and whose error
// says what the text has to be.
package env

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Text takes every text.
func Text(dst *string) func(string) error {
	return func(s string) error { *dst = s; return nil }
}

// OneOf takes one of these.
func OneOf(dst *string, allowed ...string) func(string) error {
	return Matching(dst, "one of "+strings.Join(allowed, ", "), func(s string) (string, bool) { return s, slices.Contains(allowed, s) })
}

// Integer takes an integer from least to most.
func Integer[T int | int64](dst *T, least, most T) func(string) error {
	return Matching(dst, fmt.Sprintf("an integer from %d to %d", least, most), func(s string) (T, bool) {
		n, err := strconv.ParseInt(s, 10, 64)
		return T(n), err == nil && T(n) >= least && T(n) <= most
	})
}

// Duration takes a duration from least to most, such as 50ms; a bare number is seconds.
func Duration(dst *time.Duration, least, most time.Duration) func(string) error {
	return Matching(dst, fmt.Sprintf("a duration such as 50ms or 10s, from %s to %s", least, most), func(s string) (time.Duration, bool) {
		if _, err := strconv.Atoi(s); err == nil {
			s += "s" // a bare number is seconds
		}
		d, err := time.ParseDuration(s)
		return d, err == nil && d >= least && d <= most
	})
}

// WholeSeconds takes a duration of whole seconds, at most so many.
func WholeSeconds(dst *time.Duration, most time.Duration) func(string) error {
	return Matching(dst, fmt.Sprintf("whole seconds such as 5s, at most %s", most), func(s string) (d time.Duration, ok bool) {
		err := Duration(&d, 0, most)(s)
		return d, err == nil && d%time.Second == 0
	})
}

// ParsedBy takes what parse reads; the error is parse's.
func ParsedBy[T any](dst *T, parse func(string) (T, error)) func(string) error {
	return func(s string) (err error) {
		*dst, err = parse(s)
		return err
	}
}

// Matching takes what parse reads. When parse cannot read the text, the error says what it has to be.
func Matching[T any](dst *T, wants string, parse func(string) (T, bool)) func(string) error {
	return func(s string) error {
		value, ok := parse(s)
		if !ok {
			return errors.New("has to be " + wants)
		}
		*dst = value
		return nil
	}
}
