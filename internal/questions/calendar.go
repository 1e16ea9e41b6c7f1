// Package questions has what questions about stored events need: what events_hourly answers and what of it is kept, the hours, days and
// months of a time zone, paths into metadata, and pages of events.
//
// calendar.go is the first: it numbers the hours, days and months of a zone in SQL, and gives a number its name. Go's time package
// alone decides what a zone's clocks show. ClickHouse only adds the offsets that it is given, so the two cannot differ.
package questions

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
	_ "time/tzdata" // the program runs where there are no files: 450 KiB of the binary
)

const (
	hourSeconds = 3600
	daySeconds  = 24 * hourSeconds
	quarter     = 15 * 60
	// longestMonth is how long before a range the first of its months may begin, a zone's offset included.
	longestMonth = 33 * daySeconds
	// ahead makes the numbers of hours and days positive, whatever the offset.
	ahead = 2 * daySeconds
	// hourStep is more than all offsets: the number of an hour has it so many times, and the offset.
	hourStep = 4 * daySeconds
)

// Calendar is what a zone's clocks show in a range: from each of starts on, Unix seconds, so many seconds are added to UTC.
type Calendar struct {
	starts, offsets []int64
}

// Zone finds a name of the IANA database, such as Europe/Istanbul. None is UTC.
func Zone(name string) (*time.Location, error) {
	if name == "Local" { // of this machine, which is nobody's question
		return nil, fmt.Errorf("unknown time zone %s", name)
	}
	return time.LoadLocation(name)
}

// CalendarOf is the zone's calendar from one Unix second to another, both included.
func CalendarOf(zone *time.Location, from, to int64) *Calendar {
	c := new(Calendar)
	for at := from - longestMonth; ; {
		t := time.Unix(at, 0).In(zone)
		_, offset := t.Zone()
		if n := len(c.offsets); n == 0 || c.offsets[n-1] != int64(offset) { // a zone may change its name alone
			c.starts, c.offsets = append(c.starts, at), append(c.offsets, int64(offset))
		}
		_, end := t.ZoneBounds()
		// On the last day of a leap year after 2037 package time has the end in the past: clocks change at quarters of an hour.
		if at = max(end.Unix(), (at/quarter+1)*quarter); end.IsZero() || at > to {
			return c
		}
	}
}

// WholeHours says whether every hour of the calendar is an hour of UTC.
func (c *Calendar) WholeHours() bool {
	for i, offset := range c.offsets {
		if offset%hourSeconds != 0 || i > 0 && c.starts[i]%hourSeconds != 0 {
			return false
		}
	}
	return true
}

// IsUTC says whether the zone's clocks show UTC all the time.
func (c *Calendar) IsUTC() bool { return len(c.offsets) == 1 && c.offsets[0] == 0 }

// offset is the SQL for what is added at a moment, the SQL of a DateTime.
func (c *Calendar) offset(at string) string {
	last := len(c.offsets) - 1
	if last == 0 {
		return strconv.FormatInt(c.offsets[0], 10)
	}
	var b strings.Builder
	b.WriteString("multiIf(")
	for i, offset := range c.offsets[:last] {
		fmt.Fprintf(&b, "toUnixTimestamp(%s) < %d, %d, ", at, c.starts[i+1], offset)
	}
	fmt.Fprintf(&b, "%d)", c.offsets[last])
	return b.String()
}

// Units of a calendar.
const (
	Minute = "minute"
	Hour   = "hour"
	Day    = "day"
	Month  = "month"
)

// SQL is the expression for the number of the unit that a moment, the SQL of a DateTime, is in. Key names the number.
func (c *Calendar) SQL(unit, at string) string {
	offset := c.offset(at)
	local := "(toInt64(toUnixTimestamp(" + at + ")) + " + offset + " + " + strconv.Itoa(ahead) + ")"
	switch unit {
	case Minute: // of every offset since 1972
		return "intDiv(toInt64(toUnixTimestamp(" + at + ")), 60) * 60"
	case Hour: // with its offset: a clock shows some hours twice
		return "intDiv" + local[:len(local)-1] + ", 3600) * " + strconv.Itoa(hourStep) + " + (" + offset + " + " + strconv.Itoa(hourStep/2) + ")"
	case Day:
		return "intDiv" + local[:len(local)-1] + ", 86400)"
	}
	return "toInt64(toYYYYMM(toDate32(intDiv" + local[:len(local)-1] + ", 86400) - " + strconv.Itoa(ahead/daySeconds) + ")))"
}

// Number is what SQL computes, of a Unix second in the calendar's range.
func (c *Calendar) Number(unit string, at int64) int64 {
	offset := c.offsets[c.segment(at)]
	local := at + offset + ahead
	switch unit {
	case Hour:
		return local/hourSeconds*hourStep + offset + hourStep/2
	case Day:
		return local / daySeconds
	}
	day := time.Unix((local/daySeconds-ahead/daySeconds)*daySeconds, 0).UTC()
	return int64(day.Year()*100 + int(day.Month()))
}

// starting are the Unix seconds between from and to at which a unit begins, of a calendar with whole hours: the first and the last one, 0
// when there is none, and all of them when these are at most so many.
func (c *Calendar) starting(unit string, from, to int64, most int64) (first, last int64, all []int64) {
	shortest := map[string]int64{Hour: hourSeconds, Day: 20 * hourSeconds, Month: 27 * daySeconds}[unit]
	next := func(at int64) int64 { // after one that is in a unit, or begins it
		number := c.Number(unit, at)
		for at = roundUp(at+1, hourSeconds); at <= to && c.Number(unit, at) == number; at += hourSeconds {
		}
		return at
	}
	if first = next(from); first > to {
		return 0, 0, nil
	}
	for last = roundDown(to, hourSeconds); last > first && c.Number(unit, last-hourSeconds) == c.Number(unit, to); last -= hourSeconds {
	}
	if (last-first)/shortest >= most {
		return first, last, nil
	}
	for at := first; at <= last; at = next(at + shortest - hourSeconds) {
		all = append(all, at)
	}
	return first, last, all
}

// Key is the RFC 3339 text of a unit by its number: its first second as the zone's clocks show it, and the Unix second of that. An
// hour whose begin a clock skips has the begin all the same.
func (c *Calendar) Key(unit string, number int64) (key string, at int64) {
	var offset int64
	switch unit {
	case Minute:
		at, offset = number, c.offsets[c.segment(number)]
	case Hour:
		offset = number%hourStep - hourStep/2
		at = number/hourStep*hourSeconds - ahead - offset
	case Day:
		at, offset = c.firstOf(number - ahead/daySeconds)
	case Month:
		first := time.Date(int(number/100), time.Month(number%100), 1, 0, 0, 0, 0, time.UTC)
		at, offset = c.firstOf(first.Unix() / daySeconds)
	}
	return time.Unix(at, 0).In(time.FixedZone("", int(offset))).Format(time.RFC3339), at
}

// segment is the index of the offset at a Unix second.
func (c *Calendar) segment(at int64) int {
	i, found := slices.BinarySearch(c.starts, at)
	if !found {
		i--
	}
	return max(i, 0)
}

// firstOf is the first second of a day, by its number since 1970, and the offset then. Clocks may skip midnight.
func (c *Calendar) firstOf(day int64) (at, offset int64) {
	for i, offset := range c.offsets {
		at := max(c.starts[i], day*daySeconds-offset)
		if shown := at + offset; shown >= day*daySeconds && shown < (day+1)*daySeconds && (i+1 == len(c.starts) || at < c.starts[i+1]) {
			return at, offset
		}
	}
	offset = c.offsets[c.segment(day*daySeconds)]
	return day*daySeconds - offset, offset
}
