// A believable shop: thirty days of visits, so that a newcomer's first look at the dashboard is a good one.
//
// demo.go makes all events of -demo at the start: visits on a daily and a weekly curve, users who return, a funnel from view
// to purchase, campaigns that come and go. Every event has an insert_id of its own.

package load

import (
	"cmp"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"strconv"
	"time"
)

const (
	demoDays   = 30
	demoVisits = 1200 // a day, before the curves
)

// demoEvent is one event; the rest of it follows from the product.
type demoEvent struct {
	name, campaign, channel string
	user, product           int
	at                      int64 // Unix seconds
	price                   float64
}

// demo hands the events out in the order of their times.
type demo struct {
	events []demoEvent
	next   int
	counts map[string]*replayed
}

// demoHours is how busy each hour of the day is, in UTC.
var demoHours = [24]float64{.35, .2, .15, .12, .15, .3, .6, .9, 1.1, 1.2, 1.25, 1.3, 1.35, 1.25, 1.2, 1.2, 1.3, 1.5, 1.8, 2, 1.9, 1.6, 1.1, .65}

// demoCampaigns run from one day to another, counted back from now, and bring a share of the visits meanwhile.
var demoCampaigns = []struct {
	name        string
	from, until int
	share       float64
}{
	{"newsletter", 30, 0, .08}, {"autumn_sale", 30, 17, .2}, {"retargeting", 24, 0, .1}, {"influencer_mira", 14, 9, .15}, {"black_week", 6, 0, .3},
}

func newDemo(cfg *Config) *demo {
	rng := rand.New(rand.NewPCG(cfg.seed, 1))
	now := time.Now().Unix()
	d := &demo{counts: map[string]*replayed{}}
	for hour := demoDays*24 - 2; hour >= 0; hour-- { // the API takes nothing older than 30 days
		start := now - now%3600 - int64(hour)*3600
		at := time.Unix(start, 0).UTC()
		visits := demoVisits / 24. * demoHours[at.Hour()] * (1 + float64(demoDays*24-hour)/(demoDays*24)/3)
		if day := at.Weekday(); day == time.Saturday || day == time.Sunday {
			visits *= 1.3
		}
		for range int(visits * (.85 + .3*rng.Float64())) {
			d.visit(rng, start+rng.Int64N(3600), hour/24, now)
		}
	}
	slices.SortStableFunc(d.events, func(a, b demoEvent) int { return cmp.Compare(a.at, b.at) })
	return d
}

// visit adds what one user does within some minutes, up to now.
func (d *demo) visit(rng *rand.Rand, at int64, daysAgo int, now int64) {
	e := demoEvent{user: int(math.Pow(rng.Float64(), 1.7) * 9000), at: at} // some come often, most seldom
	e.channel = channels[0]
	if e.user%10 >= 4 { // a user keeps to a device
		e.channel = channels[1]
	}
	for _, c := range demoCampaigns {
		if daysAgo < c.from && daysAgo >= c.until && rng.Float64() < c.share {
			e.campaign = c.name
			break
		}
	}
	do := func(name string, price float64) {
		e.name, e.price = name, price
		if e.at <= now {
			d.events = append(d.events, e)
		}
		e.at += 5 + rng.Int64N(90)
	}
	do("page_view", 0)
	if rng.Float64() < .35 {
		do("search", 0)
	}
	for more := true; more; more = rng.Float64() < .55 {
		e.product = int(math.Pow(rng.Float64(), 2) * 400) // a few sell well
		price := math.Round(math.Exp(4+float64(e.product*7%40)/14)) + .9
		do("product_view", price)
		if rng.Float64() > .22 {
			continue
		}
		do("add_to_cart", price)
		if buys := .35 + .1*float64(len(e.campaign)%2); rng.Float64() < buys {
			do("purchase", price)
			if rng.Float64() < .08 { // the shop's back office
				e.channel = channels[2]
				do("refund_requested", price)
			}
			return
		}
	}
}

func (d *demo) append(body []byte, tickets []int64, separator byte) ([]byte, []int64, bool) {
	if d.next == len(d.events) {
		return body, tickets, false
	}
	n := d.next
	d.next++
	if n > 0 && len(tickets) > 0 {
		body = append(body, separator)
	}
	e := &d.events[n]
	body = fmt.Appendf(body, `{"event_name":%q,"channel":%q,"user_id":"user_%04d","timestamp":%d,"insert_id":"demo-%d-%d"`, e.name, e.channel, e.user, e.at, d.events[0].at, n)
	if e.campaign != "" {
		body = fmt.Appendf(body, `,"campaign_id":%q`, e.campaign)
	}
	if e.price > 0 {
		body = fmt.Appendf(body, `,"metadata":{"product_id":"prod-%03d","price":%s,"currency":"TRY"}`, e.product, strconv.FormatFloat(e.price, 'f', 2, 64))
	}
	return append(body, '}'), append(tickets, int64(n)), true
}

func (d *demo) accepted(ticket int64) {
	e := &d.events[ticket]
	s := replayedOf(d.counts, e.name)
	s.count++
	s.add(fmt.Sprint(e.user), e.at)
}

func (d *demo) expected() []expectation { return expectationsOf(d.counts) }

func (d *demo) where(ticket int64) string { return fmt.Sprintf("event %d", ticket) }
