// The dashboard: asks what the view is about, says how old the numbers are, and sends test events.
import { access, breakdown, call, events, figures, now, often, picks, Question, Refused, seldom } from './ask.js'
import { Breakdown } from './breakdown.js'
import { Chart } from './chart.js'
import { element, money, number, pipeline, refused, totals, visible } from './draw.js'
import { Events } from './events.js'
import { largest, List } from './list.js'
import { addressOf, filtering, filtersOf, isMember, memberPrefix, spanOf, viewOf, zoneOf } from './view.js'
import { browsers, Zone } from './zone.js'

const beforeEvery = 60_000 // ms; the period before changes little
const $ = id => document.getElementById(id)
const controls = $('controls').elements
const charts = [new Chart('Events', g => g.total_count, number), new Chart('Unique users', g => g.unique_users, number), new Chart('Revenue', g => g.revenue, money)]
const lists = [['channel', 'Channels'], ['event_name', 'Events'], ['campaign_id', 'Campaigns']].map(([field, title]) => ({ field, list: new List(title) }))
const latest = new Events($('events'), go), broken = new Breakdown($('breakdown'), go, () => { asked.breakdown.due = 0; refresh() })
const asked = { figures: new Question(), before: new Question(), events: new Question(), breakdown: new Question() }
$('charts').append(...charts.map(c => c.node))
$('lists').append(...lists.map(l => l.list.node))

let view, zone
let timer, round = new AbortController() // of questions, which the next round ends
let shown = null // the last figures that were drawn, and when the API sent them
let unknownZone = false // to the API

// refresh asks what is due, one round after the other.
async function refresh() {
  clearTimeout(timer)
  round.abort()
  const mine = round = new AbortController(), { signal } = mine
  if (document.hidden) return // until it is looked at
  const span = spanOf(view, zone, now()), isOfRows = filtersOf(view).length > 0, isOfOne = !isOfRows || view.event_name !== ''
  const isDear = isOfRows || [span.from, span.to].some(at => zone.offset(at) % 3600 !== 0) // hours that are not UTC's are counted from raw events
  const about = [view.range, view.from, view.to, zone.name, view.event_name, view.channel, filtersOf(view)]
  const general = isOfOne ? view : { ...view, ...Object.fromEntries(filtersOf(view).map(([name]) => [name, isMember(name) ? undefined : ''])) }
  const askFigures = (question, of, every) =>
    question.ask(isOfOne ? about : about.slice(0, -1), every, signal, () => figures(general, zone, of, signal, of === span))
  // The pipeline is drawn as soon as it is there: it needs no ClickHouse, which may let the others wait.
  const [pipelineAnswer, answer, earlier] = await Promise.allSettled([
    showPipeline(signal), askFigures(asked.figures, span, isDear ? seldom : often), askFigures(asked.before, span.before, beforeEvery), showEvents(span, about, signal),
  ])
  if (signal.aborted) return // a later round is on its way
  if (answer.reason?.fields?.includes('tz') && !unknownZone) {
    unknownZone = true
    return look()
  }
  if (answer.status === 'fulfilled' && answer.value !== shown?.answer) {
    shown = { answer: answer.value, at: now(), isOfOne, about: String(about) }
    draw(answer.value, earlier.value, isOfOne)
  }
  tell(answer.reason, pipelineAnswer.value?.consumers, shown?.about === String(about))
  if (answer.status === 'fulfilled') await showBreakdown(span, about, signal)
  mine.abort() // what a failed part has left behind
  if (mine === round && view.live === '1' && !document.hidden && !isLocked(answer.reason)) timer = setTimeout(refresh, often)
}

async function showPipeline(signal) {
  const p = await call('api/v1/pipeline', { signal }).catch(e => {
    if (!signal.aborted) $('pipeline').classList.add('stale')
    throw e
  })
  if (signal.aborted) return p
  $('pipeline').classList.remove('stale')
  $('pipeline').replaceChildren(...pipeline(p))
  showRefused(p)
  links(p.links)
  return p
}

// showRefused leaves the table alone while it is the same: the reader may have opened and scrolled it.
function showRefused(p) {
  const said = JSON.stringify([p.refused, p.refusals, zone.name])
  $('refused').hidden = !p.refusals.length
  if ($('refused').said === said) return
  $('refused').said = said
  const isOpen = $('refused').querySelector('details')?.open
  $('refused').replaceChildren(...refused(p, zone))
  $('refused').querySelector('details').open = !!isOpen
}

async function showEvents(span, about, signal) {
  const isPaused = !!(view.until || view.before), every = isPaused ? Infinity : picks(view) ? seldom : often
  try {
    const page = await asked.events.ask([about, view.until, view.before], every, signal, () => events(view, span, signal))
    if (page === latest.page && view === latest.view) return
    latest.show(page, view, zone)
    broken.offer(page.events)
    $('events').hidden = false
  } catch (e) {
    if (signal.aborted || isLocked(e)) return
    latest.say(`The list cannot be read: ${why(e)}`)
    $('events').hidden = false
  }
}

// showBreakdown is of the largest event while none is chosen.
async function showBreakdown(span, about, signal) {
  const name = view.event_name || shown.answer.event_names[0]?.key
  $('breakdown').hidden = !name
  if (!view.by || !name) return
  about = JSON.stringify([about, name, view.by, view.sum])
  if (about !== broken.about) broken.clear('asking …')
  try {
    const answer = await asked.breakdown.ask(about, seldom, signal, () => breakdown(view, span, name, signal))
    if (answer !== broken.answer || view !== broken.view) broken.show(answer, about, name, view, clock(now()))
  } catch (e) {
    if (!signal.aborted && !isLocked(e)) broken.say(`The breakdown cannot be read: ${why(e)}`)
  }
}

// isLocked says whether another key would help: there is none, it is not valid, or it may only send.
const isLocked = error => error?.status === 401 || error?.status === 403
const why = error => error instanceof Refused ? `${error.message} (${error.status}).` : 'The API does not answer.'

// tell says what is wrong, once: a screen reader hears the banner when it changes. isOfView says whether the numbers are what the view asks for.
function tell(error, consumers, isOfView) {
  let text = ''
  if (isLocked(error)) {
    if (access.key) text = why(error) // without one the form says enough
    if ($('login').hidden) {
      access.use('')
      $('login').hidden = false
      $('key').focus()
    }
  } else if (error) {
    text = why(error)
    if (shown) text += isOfView ? ` These numbers are from ${clock(shown.at)}.` : ' These numbers are still those of another view.'
    if (error.status === 503) text += ' Accepted events are safe; they are counted when it is over.'
  } else {
    $('login').hidden = true
    if (consumers && consumers !== 'ok') text = `Storing stands still, at least in part: ${consumers.replace(/^stalled \d+ s(: |, )/, '')}. Accepted events wait on Kafka.`
  }
  const steady = text.replace(/[\d,]+ waiting/, 'records waiting') // a count that moves is no news
  if ($('banner').dataset.said !== steady) {
    $('banner').dataset.said = steady
    $('banner').textContent = text
  }
  $('main').classList.toggle('stale', !!error && !!shown)
  age()
}

const clock = second => zone.text(second, { hour: '2-digit', minute: '2-digit', second: '2-digit' })

// age counts every second, whatever the API does.
function age() {
  if (!shown) return
  const through = shown.answer.complete_through
  const seconds = through && Math.max(0, now() - through)
  $('through').textContent = !through ? 'catching up with a backlog' : `complete to ${seconds < 120 ? `${seconds} s` : seconds < 7200 ? `${Math.floor(seconds / 60)} min` : `${Math.floor(seconds / 3600)} h`} ago`
  $('through').classList.toggle('bad', !through || seconds > 30)
}

// draw shows the figures, or, where they need one event, which there are to choose from.
function draw(o, earlier, isOfOne) {
  money.currency = o.currency || money.currency
  $('empty').hidden = o.total_count > 0 || !!view.channel || !!view.event_name || !isOfOne
  $('curl').textContent = `curl -X POST ${element('a', { href: 'api/v1/events' }).href} -H 'Content-Type: application/json'${access.key && " -H 'X-API-Key: …'"} \\\n  -d '{"event_name":"product_view","user_id":"user_123","channel":"web","timestamp":'$(date +%s)'}'`
  $('choose').hidden = isOfOne
  $('totals').hidden = $('charts').hidden = $('lists').hidden = !isOfOne
  if (!view.event_name) options(o.event_names.map(g => g.key))
  if (!isOfOne) {
    const of = o.event_names.map(({ key }) => element('a', { href: filtering(view, { event_name: key }) }, visible(key)))
    $('choose').replaceChildren(element('h2', {}, 'Numbers with these filters are of one event'), element('p', {}, ...of.flatMap(link => [link, ' '])))
    return
  }
  $('totals').replaceChildren(...totals(o, earlier))
  charts[1].node.hidden = o.bucket === 'minute' // too dear to count by the minute
  charts[2].node.hidden = !('revenue' in o)
  for (const c of charts) if (!c.node.hidden) c.show(o, earlier, zone)
  drawLists()
}

function drawLists() {
  const o = shown.answer
  for (const [i, groups] of [o.channels, o.event_names, o.campaigns].entries()) {
    const { field, list } = lists[i]
    list.show(groups, groups.length < largest ? '' : `the ${largest} largest`, key => key && filtering(view, { [field]: key }))
  }
}

// options offers the largest event names; any other can be typed. It leaves the list alone while that is the same: it may be open.
function options(names) {
  if (names.join('\n') === [...$('names').options].map(o => o.value).join('\n')) return
  $('names').replaceChildren(...names.map(name => element('option', { value: name })))
}

function links(all) {
  const nav = $('links')
  if (nav.children.length === 1) nav.append(...all.map(l => element('a', { href: l.url }, l.name)))
}

// go leads to the view with some changes, as a link would.
function go(changes) {
  const address = addressOf(view, changes)
  if (address === addressOf(view)) return
  history.pushState(null, '', address)
  look()
}

// look reads the view from the address, brings everything that stands to it, and asks for the rest.
function look() {
  view = viewOf(location.hash)
  zone = unknownZone ? new Zone('UTC') : zoneOf(view)
  for (const r of controls.range) r.checked = !view.from && !view.to && r.value === view.range
  for (const name of ['from', 'to', 'event_name', 'channel']) controls[name].value = view[name]
  controls.live.checked = view.live === '1'
  const mine = element('a', { href: addressOf(view, { tz: view.from || view.to ? browsers : '' }) }, `or ${browsers}`)
  const other = zone.name === browsers ? [] : unknownZone ? [`, as the API does not know ${browsers}`] : [', ', mine]
  $('zone').replaceChildren(`times in ${zone.name}`, ...other)
  const names = { campaign_id: 'campaign', user_id: 'user' }
  const isAtFilters = $('filters').contains(document.activeElement)
  $('filters').replaceChildren(...filtersOf(view).map(([name, value]) => {
    const said = `${names[name] || visible(isMember(name) ? name.slice(memberPrefix.length) : name)} ${value ? `= ${visible(value)}` : 'is not there'}`
    return element('li', {}, said, ' ', element('a', { href: filtering(view, { [name]: isMember(name) ? undefined : '' }), 'aria-label': `Without the filter ${said}` }, '×'))
  }))
  $('filters').hidden = !filtersOf(view).length
  if (isAtFilters) ($('filters').querySelector('a') || controls.event_name).focus()
  latest.show(latest.page, view, zone) // the same page, until the view's own is there
  broken.look(view)
  if (shown?.isOfOne) drawLists()
  refresh()
}

// choose makes a view of the controls. Dates are of a zone, which the address then names for whoever it is sent to.
function choose(e) {
  const changes = { event_name: controls.event_name.value, channel: controls.channel.value, live: controls.live.checked ? '1' : '0' }
  if (e.target !== controls.live) Object.assign(changes, { until: '', before: '', row: '' })
  if (e.target.name === 'range') Object.assign(changes, { range: e.target.value, from: '', to: '', tz: '' })
  if (e.target.type === 'date') {
    const { from, to } = controls, other = e.target === from ? to : from
    if (from.value && to.value && from.value > to.value) other.value = e.target.value
    Object.assign(changes, { from: from.value, to: to.value, tz: from.value || to.value ? zone.name : '' })
  }
  history.replaceState(null, '', addressOf(view, changes))
  look()
}

// again asks for everything, due or not: something has changed.
function again() {
  for (const question of Object.values(asked)) question.due = 0
  refresh()
}

// send says what became of the event in an output beside its button.
async function send(event, said) {
  said.textContent = 'sending …'
  said.classList.remove('bad')
  try {
    const answer = await call('api/v1/events?wait=stored', { method: 'POST', headers: { 'Content-Type': 'application/json' }, body: JSON.stringify({ ...event, timestamp: now() }) })
    said.textContent = `${answer.status}: ${answer.event_id.slice(0, 12)}…`
    again()
  } catch (e) {
    said.textContent = e instanceof Refused ? e.message : 'The API does not answer.'
    said.classList.add('bad')
  }
}

$('controls').addEventListener('change', choose)
controls.event_name.addEventListener('search', choose) // also when it is cleared
$('controls').addEventListener('submit', e => e.preventDefault())
$('login').addEventListener('submit', e => {
  e.preventDefault()
  access.use($('key').value)
  $('key').value = ''
  $('login').hidden = true
  again()
})
$('send').addEventListener('submit', e => {
  e.preventDefault()
  const { price, campaign_id, ...event } = Object.fromEntries(new FormData(e.target))
  send({ ...event, ...(campaign_id && { campaign_id }), ...(price && { metadata: { price: +price } }) }, $('sent'))
})
$('first').addEventListener('click', () => send({ event_name: 'product_view', user_id: 'user_123', channel: 'web' }, $('first-sent')))
$('copy').addEventListener('click', async () => {
  await navigator.clipboard.writeText($('curl').textContent).then(() => { $('copy').textContent = 'Copied' }, () => getSelection().selectAllChildren($('curl')))
})
document.addEventListener('visibilitychange', refresh)
setInterval(age, 1000)
addEventListener('hashchange', look) // a link, the way back, or somebody's address opened in this tab
look()
