// Paths into metadata: which member is meant, and the SQL that reads it.

package questions

import (
	"errors"
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"unicode/utf8"
)

const (
	// maxPathBytes and maxPathDepth bound what is asked of every row.
	maxPathBytes = 300
	maxPathDepth = 10
	// MaxValue is by how many of its first characters a value is told from others: an answer of 1,000 groups is bounded.
	MaxValue = 500
	// maxColumns bounds METADATA_COLUMNS: every inserted row is read once for each.
	maxColumns = 20
)

// ParsePath cuts the path of a member, such as page.path, into names. A dot or backslash of a name stands behind a backslash.
func ParsePath(path string) (names []string, err error) {
	if len(path) > maxPathBytes || !utf8.ValidString(path) {
		return nil, fmt.Errorf("has to be text of at most %d bytes", maxPathBytes)
	}
	name, escaped := "", false
	for _, r := range path + "." {
		switch {
		case escaped:
			name, escaped = name+string(r), false
		case r == '\\':
			escaped = true
		case r == '.' && name == "":
			return nil, errors.New("has a member without a name; members are joined by dots")
		case r == '.':
			names, name = append(names, name), ""
		default:
			name += string(r)
		}
	}
	switch {
	case escaped || name != "":
		return nil, errors.New(`ends with a backslash; a dot in a name is written \. and a backslash \\`)
	case len(names) > maxPathDepth:
		return nil, fmt.Errorf("is deeper than %d members", maxPathDepth)
	}
	return names, nil
}

// Column is a member of metadata that the table has a column of its own for.
type Column struct{ Path, Name string }

// plainPath is what can be declared: its column's name needs no escapes but backticks, and belongs to one path only.
var plainPath = regexp.MustCompile(`^[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*$`)

// ParseColumns reads a list of paths, separated by commas.
func ParseColumns(list string) (columns []Column, err error) {
	seen := map[string]bool{}
	for path := range strings.SplitSeq(list, ",") {
		if path = strings.TrimSpace(path); path == "" {
			continue
		}
		_, bad := ParsePath(path)
		switch {
		case bad != nil:
			return nil, fmt.Errorf("%q %w", path, bad)
		case !plainPath.MatchString(path):
			return nil, fmt.Errorf("%q has to be names of letters, digits and _, joined by dots", path)
		case seen[path]:
			return nil, fmt.Errorf("%q is there twice", path)
		}
		seen[path] = true
		columns = append(columns, Column{path, "metadata_" + strings.ReplaceAll(path, ".", "/")})
	}
	if len(columns) > maxColumns {
		return nil, fmt.Errorf("has %d members, and at most %d may be", len(columns), maxColumns)
	}
	return columns, nil
}

// Quoted is the column's name in SQL.
func (c Column) Quoted() string { return "`" + c.Name + "`" }

// Raw is the SQL for what the column holds.
func (c Column) Raw() string { return Member("'" + strings.ReplaceAll(c.Path, ".", "', '") + "'") }

// Member is the SQL for a member of metadata as JSON, empty without it. names are the SQL of its path's names, with commas.
//
// ClickHouse's parser gives up a document with a number beyond a double, and rounds a number to a double. Slow path: numbers of such a
// document are made texts, which are exact. The pattern steps over texts whole, so that it finds no number inside of one.
func Member(names string) string {
	return strings.NewReplacer("{raw}", "JSONExtractRaw(metadata, "+names+")", "{names}", names).Replace(
		`if({raw} = '' AND metadata != '' AND NOT isValidJSON(metadata) OR length({raw}) > 15 AND match({raw}, '^-?[0-9]'),` +
			` replaceRegexpAll(JSONExtractRaw(replaceRegexpOne(replaceRegexpAll(metadata,` +
			` '((?:[^"0-9-]|"(?:[^"\\\\]|\\\\.)*")*)(-?[0-9][0-9.eE+-]*|$)', '\\1"number:\\2"'), '("number:")+$', ''), {names}),` +
			` '"number:([^"]*)"', '\\1'), {raw})`)
}

// MemberOf is the SQL for the member at a path: its column, or its place in metadata, where value makes a parameter of a name.
func MemberOf(columns []Column, path string, value func(string) string) (string, error) {
	names, err := ParsePath(path)
	for _, column := range columns {
		if column.Path == path {
			return column.Quoted(), err
		}
	}
	for i := range names {
		names[i] = value(names[i])
	}
	return Member(strings.Join(names, ", ")), err
}

// Text is the SQL for the text of a member, of which raw is its JSON: a text as it is, anything else as JSON, null like nothing. No
// text in it has to be parsed unless it has an escape.
func Text(raw string) string {
	text := strings.NewReplacer("{raw}", raw).Replace(`multiIf(NOT startsWith({raw}, '"'), if({raw} = 'null', '', {raw}),` +
		` position({raw}, '\\') = 0, substring({raw}, 2, length({raw}) - 2), JSONExtractString({raw}))`)
	return strings.NewReplacer("{text}", text, "{most}", strconv.Itoa(MaxValue)).Replace("if(length({text}) > {most}, substringUTF8({text}, 1, {most}), {text})")
}

// Sum is the SQL for the exact sum of members, of which raw is their JSON: numbers only, down to 18 decimals.
func Sum(raw string) string { return "sum(toDecimal256OrZero(" + raw + ", 18))" }

// Cut is a value as Text has it.
func Cut(value string) string {
	if len(value) > MaxValue {
		if runes := []rune(value); len(runes) > MaxValue {
			return string(runes[:MaxValue])
		}
	}
	return value
}
