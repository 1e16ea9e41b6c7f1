// The view: what the reader has chosen to see. All of it stands in the address, so that it survives a reload and can be sent to somebody.
// A link to another view is an address, too.
import { browsers, Zone } from './zone.js'

// usual is the view of a bare address. Beside these names there are metadata.PATH, the values that members have to have; an empty one
// is of events without the member.
const usual = {
  range: '86400', from: '', to: '', tz: '', // a range up to now, or dates, both included, of a zone
  event_name: '', channel: '', campaign_id: '', user_id: '', tag: '',
  by: '', sum: '', // the breakdown, as metrics has group_by and sum
  until: '', before: '', row: '', // the list of events: paused at a Unix second, behind a page's end, the open event's id
  live: '1',
}
const allowed = {
  range: /^(3600|86400|604800|2592000)$/, from: /^\d{4}-\d\d-\d\d$/, to: /^\d{4}-\d\d-\d\d$/, channel: /^(web|mobile_app|api)$/, by: /^(channel|campaign|tag|metadata\..+)$/s,
  sum: /^metadata\..+$/s, until: /^\d{1,10}$/, before: /^[\w-]+$/, row: /^[0-9a-f]{64}$/, live: /^[01]$/,
}

export const memberPrefix = 'metadata.'
export const isMember = name => name.startsWith(memberPrefix)

const isDay = text => !Number.isNaN(Date.parse(text)) && new Date(text).toISOString().startsWith(text)

// viewOf reads an address. What makes no sense in it is as if it were not there.
export function viewOf(hash) {
  const view = { ...usual }
  for (const [name, value] of new URLSearchParams(hash.slice(1))) {
    const isOne = name !== 'from' && name !== 'to' || isDay(value)
    if (isMember(name) || Object.hasOwn(usual, name) && isOne && (allowed[name] || /./s).test(value)) view[name] = value
  }
  if (view.from > view.to && view.to) view.to = view.from
  return view
}

// addressOf is the view with some changes, of which undefined takes a filter away. It has a range or dates at least: a bare # would lead
// to the top of the page.
export function addressOf(view, changes = {}) {
  const all = { ...view, ...changes }, has = name => all[name] !== undefined && (isMember(name) || all[name] !== usual[name])
  return `#${new URLSearchParams(Object.entries(all).filter(([name]) => name === 'range' ? !all.from && !all.to : has(name)))}`
}

// filtering is the view with another filter: another list of events, which goes on from its newest.
export const filtering = (view, changes) => addressOf(view, { ...changes, until: '', before: '', row: '' })

// zoneOf is the zone whose hours and days are meant: the reader's, but for dates that somebody else has chosen.
export function zoneOf(view) {
  try {
    return new Zone(view.tz || browsers)
  } catch {
    return new Zone(browsers)
  }
}

const rowFilters = ['campaign_id', 'user_id', 'tag']

// filtersOf are the filters that only the raw events know, by name: numbers by them come from metrics, which are of one event_name, and dear.
export const filtersOf = view => Object.entries(view).filter(([name, value]) => isMember(name) ? value !== undefined : rowFilters.includes(name) && value)

// spanOf is the range in Unix seconds, both included, up to now at most, and the period before as far as this one has come: a whole one
// would always be ahead. It begins with a whole bucket, so that ClickHouse reads no raw events of a cut hour.
export function spanOf(view, zone, now) {
  const today = zone.startOf('day', now)
  let from, to = now, earlier
  if (view.from || view.to) {
    from = zone.startOfDate(view.from || view.to)
    const end = view.to ? zone.next('day', zone.startOfDate(view.to)) : zone.next('day', today)
    to = Math.max(Math.min(end - 1, now), from + 1)
    earlier = zone.days(from, -Math.max(1, Math.round((end - from) / 86400)))
  } else if (view.range > 86400) {
    from = zone.days(today, 1 - view.range / 86400)
    earlier = zone.days(from, -view.range / 86400)
  } else {
    const unit = view.range > 3600 ? 'hour' : 'minute'
    from = zone.startOf(unit, now) - view.range + (unit === 'hour' ? 3600 : 60)
    earlier = from - view.range
  }
  return { from, to, before: { from: earlier, to: Math.min(earlier + to - from, from - 1) } }
}
