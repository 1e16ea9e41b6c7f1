// The forms of a time.
//
// time.go reads what languages write when they are asked for ISO 8601 or RFC 3339: Java leaves out seconds that are zero, Python has a
// space for the T, Postgres hours alone for a zone, others no signs between the digits. It owns no list of forms: each part may have
// either form, whatever the others have.

package segment

import "time"

// digitsOf reads n digits at the start of s, at most two or four.
func digitsOf(s []byte, n int) (value int, rest []byte, ok bool) {
	if len(s) < n {
		return 0, nil, false
	}
	for _, c := range s[:n] {
		if c < '0' || c > '9' {
			return 0, nil, false
		}
		value = 10*value + int(c-'0')
	}
	return value, s[n:], true
}

// then reads two digits behind a sign, which may be left out.
func then(s []byte, sign byte) (value int, rest []byte, ok bool) {
	if len(s) > 0 && s[0] == sign {
		s = s[1:]
	}
	return digitsOf(s, 2)
}

// unixOf is the Unix second that a text names, rounded down: a date, T, t or a space, hours and minutes, seconds and their fraction or
// neither, and a zone or none, which is UTC. A date alone is its first second. ok is false for whatever else it is.
func unixOf(s []byte) (second int64, ok bool) {
	year, s, ok := digitsOf(s, 4)
	isBasic := ok && len(s) > 0 && s[0] != '-'
	month, s, isMonth := then(s, '-')
	day, s, isDay := then(s, '-')
	if !ok || !isMonth || !isDay || month < 1 || month > 12 || day < 1 {
		return 0, false
	}
	date := time.Date(year, time.Month(month), day, 0, 0, 0, 0, time.UTC)
	if date.Day() != day { // the 30th of February
		return 0, false
	}
	if len(s) == 0 {
		return date.Unix(), !isBasic
	}
	if s[0]|0x20 != 't' && s[0] != ' ' {
		return 0, false
	}
	hour, s, ok := digitsOf(s[1:], 2)
	minute, s, isMinute := then(s, ':')
	if !ok || !isMinute || minute > 59 {
		return 0, false
	}
	seconds := 0
	if len(s) > 0 && (s[0] == ':' || s[0]-'0' <= 9) {
		if seconds, s, ok = then(s, ':'); !ok {
			return 0, false
		}
		if len(s) > 0 && (s[0] == '.' || s[0] == ',') { // ISO 8601 has either
			_, s, ok = digitsOf(s[1:], 1)
			for len(s) > 0 && s[0]-'0' <= 9 {
				s = s[1:]
			}
		}
	}
	// The end of a day is hour 24 in ISO 8601, and a leap second has number 60 in RFC 3339.
	if !ok || seconds > 60 || hour > 24 || hour == 24 && minute+seconds > 0 {
		return 0, false
	}
	offset, ok := zoneOf(s)
	return date.Unix() + int64(hour*3600+minute*60+seconds-offset), ok
}

// zoneOf reads a zone to the end of the text, in seconds that it is ahead of UTC.
func zoneOf(s []byte) (ahead int, ok bool) {
	if len(s) == 0 || len(s) == 1 && s[0]|0x20 == 'z' {
		return 0, true
	}
	sign := 1
	switch s[0] {
	case '-':
		sign = -1
	case '+':
	default:
		return 0, false
	}
	hours, s, ok := digitsOf(s[1:], 2)
	minutes := 0
	if ok && len(s) > 0 {
		minutes, s, ok = then(s, ':')
	}
	return sign * (hours*3600 + minutes*60), ok && len(s) == 0 && hours < 24 && minutes < 60
}
