// Asking: what the page wants to know of the API, with the reader's key, and no more often than it costs. All addresses are relative to
// the page's own: a proxy may have put it below any path.
import { filtersOf, isMember, memberPrefix } from './view.js'

export const often = 5000, seldom = 30_000 // ms between two askings of what is cheap, and of what reads raw events
const pollAtMost = 60_000, patience = 15_000 // ms; the API gives up on ClickHouse after 10 s
const largest = 10 // groups of a kind, as the overview has
export const latest = 50, searched = 500 // events that the list asks for, and of how many it picks those that the API cannot filter

const keptAs = `event-ingestion ${location.pathname} key` // below a path the storage is shared with others

export const access = {
  key: sessionStorage.getItem(keptAs) || '',
  use(key) {
    this.key = key
    if (key) sessionStorage.setItem(keptAs, key)
    else sessionStorage.removeItem(keptAs)
  },
}

let ahead = 0 // ms that the API's clock is ahead of this one
export const now = () => Math.floor((Date.now() + ahead) / 1000)

// Refused is an answer that is none: its status, the fields that were wrong, and after how many seconds to ask again.
export class Refused extends Error {
  constructor(answer, body) {
    super(body.errors ? body.errors.map(e => e.message || e.error).join(', ') : body.detail || body.error || answer.statusText)
    this.status = answer.status
    this.fields = (body.errors || []).map(e => e.field)
    this.after = +answer.headers.get('Retry-After') || 0
  }
}

// keep has a number as it was sent where JavaScript would round it or write it otherwise, to be shown and not to be counted with.
const keep = (_, value, place) => typeof value === 'number' && JSON.rawJSON && place?.source !== String(value) ? JSON.rawJSON(place.source) : value

export async function call(path, { signal, headers, exact, ...options } = {}) {
  const timeout = AbortSignal.timeout(patience)
  const answer = await fetch(path, { signal: signal ? AbortSignal.any([timeout, signal]) : timeout, ...options, headers: { ...headers, ...(access.key && { 'X-API-Key': access.key }) } })
  const text = await answer.text()
  let body = {}
  try {
    body = JSON.parse(text, exact ? keep : undefined)
  } catch {
    if (answer.ok) throw new Error('an answer that is not JSON')
  }
  const date = Date.parse(answer.headers.get('Date'))
  if (Math.abs(date - Date.now() - ahead) > 2000) ahead = date - Date.now()
  if (!answer.ok) throw new Refused(answer, body)
  return body
}

// Question keeps its last answer while that is good: an answer that took long is good for ten times as long, so that one page takes
// a tenth of ClickHouse's time at most. A failure is kept as well.
export class Question {
  due = 0

  // ask returns the answer to what is described by about: the last one, or what asking returns.
  async ask(about, every, signal, asking) {
    about = JSON.stringify(about)
    if (about === this.about && Date.now() < this.due) return this.answer
    const started = Date.now(), answer = asking()
    const error = await answer.then(() => null, e => e)
    signal.throwIfAborted()
    const took = error && !(error instanceof Refused) ? 0 : Date.now() - started
    const pause = Math.max(error ? Math.min(every, seldom) : every, Math.min(10 * took, pollAtMost), 1000 * (error?.after || 0))
    Object.assign(this, { about, answer, due: Date.now() + pause })
    return answer
  }
}

const parameters = (...all) => new URLSearchParams(all.flatMap(o => Object.entries(o)).filter(([name, value]) => isMember(name) || value !== '' && value !== undefined))
const places = view => ({ event_name: view.event_name, channel: view.channel })
const metrics = (view, span, more, signal) =>
  call(`api/v1/metrics?${parameters({ from: span.from, to: span.to }, places(view), Object.fromEntries(filtersOf(view)), more)}`, { signal, exact: !!more.sum })

// figures is what the cards, charts and lists show, as the overview says it. With a filter that only the raw events know it is made of
// three questions to metrics, or one without the lists, and has no revenue and no minutes.
export async function figures(view, zone, span, signal, isWithLists = true) {
  const range = { from: span.from, to: span.to }, tz = zone.name
  if (!filtersOf(view).length) return call(`api/v1/overview?${parameters(range, places(view), { tz })}`, { signal })
  const bucket = span.to - span.from <= 3 * 86400 ? 'hour' : 'day'
  const kinds = isWithLists ? [bucket, 'channel', 'campaign'] : [bucket]
  const [series, channels, campaigns] = await Promise.all(kinds.map(group_by => metrics(view, span, { group_by, tz }, signal)))
  return {
    ...range, bucket, series: series.grouped_data,
    total_count: series.total_count, unique_users: series.unique_users, complete_through: series.complete_through,
    event_names: [{ key: view.event_name, total_count: series.total_count }], channels: channels?.grouped_data,
    campaigns: campaigns?.grouped_data.filter(g => g.key).slice(0, largest),
  }
}

export const breakdown = (view, span, event_name, signal) => metrics({ ...view, event_name }, span, { group_by: view.by, sum: view.sum }, signal)

// events is a page of the newest. By tags and members of metadata the API does not filter, so the page picks them out of more.
export async function events(view, span, signal) {
  const { campaign_id, user_id, before } = view, isPicked = picks(view)
  const to = Math.min(view.until || Infinity, span.to), from = span.from < to ? span.from : to - (span.to - span.from) // of a pause long ago
  const more = { campaign_id, user_id, before, limit: isPicked ? searched : latest }
  const page = await call(`api/v1/events?${parameters({ from, to }, places(view), more)}`, { signal, exact: true })
  return isPicked ? { ...page, searched: page.events.length, events: page.events.filter(isPicked) } : page
}

// picks is how the events are told that the API does not filter, null where it filters all.
export function picks(view) {
  const members = filtersOf(view).filter(([name]) => isMember(name))
  if (!view.tag && !members.length) return null
  return e => (!view.tag || e.tags?.includes(view.tag)) && members.every(([name, value]) => textOf(e.metadata, name) === [...value].slice(0, 500).join(''))
}

// textOf is the text of a member, as metrics has it: at most 500 characters. A dot in a name stands behind a backslash.
function textOf(metadata, name) {
  let value = metadata
  for (const part of name.slice(memberPrefix.length).match(/(\\.|[^.\\])+/gs) || []) value = memberOf(value, part.replace(/\\(.)/gs, '$1'))
  return [...textOfValue(value)].slice(0, 500).join('')
}

const memberOf = (value, name) => isObject(value) && Object.hasOwn(value, name) ? value[name] : undefined
export const isObject = value => value !== null && typeof value === 'object' && !Array.isArray(value) && !JSON.isRawJSON?.(value)
export const textOfValue = value => value === undefined || value === null ? '' : typeof value === 'string' ? value : JSON.stringify(value)
