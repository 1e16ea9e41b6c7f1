package questions

import (
	"strconv"
	"strings"

	"github.com/ClickHouse/ch-go/proto"
)

// Filter says which events a question is about. Empty texts leave nothing out.
type Filter struct {
	EventName, Channel, Campaign, User, Tag string

	members []string          // SQL: filters of metadata
	values  []proto.Parameter // of paths and values
}

// Value makes a parameter of a text and returns the SQL for it.
func (f *Filter) Value(text string) string {
	name := "value" + strconv.Itoa(len(f.values))
	f.values = append(f.values, Parameter(name, text))
	return "{" + name + ":String}"
}

// HasMember leaves out events of which a member of metadata, as JSON in SQL, is not this text.
func (f *Filter) HasMember(member, text string) {
	f.members = append(f.members, Text(member)+" = "+f.Value(Cut(text)))
}

// OfRows says whether only the raw table knows the events.
func (f *Filter) OfRows() bool {
	return f.Campaign != "" || f.User != "" || f.Tag != "" || len(f.members) > 0
}

// SQL is the condition, in terms of Parameters.
func (f *Filter) SQL() string {
	terms := []string{"1"}
	for _, by := range []struct{ value, term string }{
		{f.Channel, "channel = {channel:String}"}, {f.EventName, "event_name = {event_name:String}"},
		{f.Campaign, "campaign_id = {campaign_id:String}"}, {f.User, "user_id = {user_id:String}"}, {f.Tag, "has(tags, {tag:String})"},
	} {
		if by.value != "" {
			terms = append(terms, by.term)
		}
	}
	return strings.Join(append(terms, f.members...), " AND ")
}

// Parameters are what SQL and a range of Unix seconds need. No event lies outside what the column can hold.
func (f *Filter) Parameters(from, to int64) []proto.Parameter {
	second := func(n int64) string { return strconv.FormatInt(min(max(n, 0), maxSecond), 10) }
	return append([]proto.Parameter{
		Parameter("from", second(from)), Parameter("to", second(to)),
		Parameter("event_name", f.EventName), Parameter("channel", f.Channel),
		Parameter("campaign_id", f.Campaign), Parameter("user_id", f.User), Parameter("tag", f.Tag),
	}, f.values...)
}

// maxSecond is the last one that a DateTime holds.
const maxSecond = 1<<32 - 1

// Parameter is a query parameter of type String. The server takes the value for a quoted literal, and what is in the
// quotes for a field of TSV: each layer has its escapes. ch-go's Parameters knows neither.
func Parameter(key, value string) proto.Parameter {
	return proto.Parameter{Key: key, Value: Literal(tsvEscapes.Replace(value))}
}

// Literal is a text in SQL.
func Literal(s string) string { return "'" + literalEscapes.Replace(s) + "'" }

var (
	tsvEscapes     = strings.NewReplacer(`\`, `\\`, "\n", `\n`, "\r", `\r`, "\t", `\t`, "\b", `\b`, "\f", `\f`, "\x00", `\0`)
	literalEscapes = strings.NewReplacer(`\`, `\\`, `'`, `\'`)
)
