package questions

import (
	"testing"
	"time"
)

// TestCalendar: the calendar has the offset of package time at every quarter of an hour, up to the last second that ClickHouse holds,
// and names hours, days and months as package time does.
func TestCalendar(t *testing.T) {
	for _, name := range []string{"", "UTC", "Europe/Istanbul", "America/New_York", "Australia/Lord_Howe", "Asia/Kolkata", "Africa/Cairo", "Africa/Casablanca", "Pacific/Apia", "Europe/London", "America/St_Johns"} {
		loc, err := Zone(name)
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range [][2]int64{{daySeconds, 1<<32 - 1}, {1772000000, 1780000000}, {2239000000, 2241000000}} {
			c := CalendarOf(loc, r[0], r[1])
			if len(c.starts) > 400 {
				t.Errorf("%s has %d offsets from %d to %d", name, len(c.starts), r[0], r[1])
			}
			step := max(quarter, (r[1]-r[0])/50000/quarter*quarter)
			for at := r[0]; at <= r[1]; at += step {
				local := time.Unix(at, 0).In(loc)
				_, offset := local.Zone()
				if got := c.offsets[c.segment(at)]; got != int64(offset) {
					t.Fatalf("%s at %d: offset %d, want %d", name, at, got, offset)
				}
				shown := at + int64(offset)
				hour := (shown+ahead)/hourSeconds*hourStep + int64(offset) + hourStep/2
				if key, _ := c.Key(Hour, hour); key != local.Format("2006-01-02T15:00:00Z07:00") {
					t.Fatalf("%s at %d: hour %s, want %s", name, at, key, local.Format("2006-01-02T15:00:00Z07:00"))
				}
				_, first := c.Key(Day, (shown+ahead)/daySeconds)
				if day := time.Unix(first, 0).In(loc); day.Format(time.DateOnly) != local.Format(time.DateOnly) || day.Add(-time.Second).Format(time.DateOnly) == local.Format(time.DateOnly) {
					t.Fatalf("%s at %d: the day of %s begins at %s", name, at, local, day)
				}
				_, first = c.Key(Month, int64(local.Year()*100+int(local.Month())))
				if month := time.Unix(first, 0).In(loc); month.Format("2006-01") != local.Format("2006-01") || month.Add(-time.Second).Format("2006-01") == local.Format("2006-01") {
					t.Fatalf("%s at %d: the month of %s begins at %s", name, at, local, month)
				}
			}
		}
	}
}
