// The dashboard: asks api/v1/overview and api/v1/pipeline, says how old the numbers are, and sends test events. All its addresses are
// relative to the page's own: a proxy may have put it below any path.
import { Chart } from './chart.js'
import { element, money, number, pipeline, refused, totals } from './draw.js'
import { List } from './list.js'

const pollEvery = 5000, pollAtMost = 60_000, beforeEvery = 60_000, patience = 15_000 // ms; the API gives up on ClickHouse after 10 s
const $ = id => document.getElementById(id)
const controls = $('controls').elements
const charts = [new Chart('Events', g => g.total_count, number), new Chart('Unique users', g => g.unique_users, number), new Chart('Revenue', g => g.revenue, money)]
const lists = [new List('Channels'), new List('Events', choose), new List('Campaigns')]
$('charts').append(...charts.map(c => c.node))
$('lists').append(...lists.map(l => l.node))

const keptAs = `event-ingestion ${location.pathname} key` // below a path the storage is shared with others
let key = sessionStorage.getItem(keptAs) || ''
let timer, asked = 0
let shown = null // the last overview that was drawn, and when the API sent it
let before = null // of the period before: what was asked, when, and the answer
let ahead = 0 // ms that the API's clock is ahead of this one

class Refused extends Error {
  constructor(status, text) {
    super(text)
    this.status = status
  }
}

async function call(path, options = {}) {
  const answer = await fetch(path, { signal: AbortSignal.timeout(patience), ...options, headers: { ...options.headers, ...(key && { 'X-API-Key': key }) } })
  const body = await answer.json().catch(() => ({}))
  const date = Date.parse(answer.headers.get('Date'))
  if (Math.abs(date - Date.now() - ahead) > 2000) ahead = date - Date.now()
  if (!answer.ok) throw new Refused(answer.status, body.errors ? body.errors.map(e => e.message || e.error).join(', ') : body.detail || body.error || answer.statusText)
  return body
}

const now = () => Math.floor((Date.now() + ahead) / 1000)
const filters = () => new URLSearchParams({ ...(controls.channel.value && { channel: controls.channel.value }), ...(controls.event_name.value && { event_name: controls.event_name.value }) })
const overview = (from, to) => call(`api/v1/overview?from=${from}&to=${to}&${filters()}`)

// periodBefore asks for the period before, as far as the open one has come: a whole one would always be ahead. It changes
// little, so an answer is good for a while.
async function periodBefore(from, to, range) {
  const question = `${from} ${range} ${filters()}`
  if (before?.question !== question || Date.now() - before.when > Math.min(beforeEvery, 4 * range)) {
    const answer = await overview(from - range, to - range).catch(() => null)
    before = answer && { question, when: Date.now(), answer }
    return answer
  }
  return before.answer
}

async function refresh() {
  clearTimeout(timer)
  const mine = ++asked, started = Date.now()
  let took = 0
  // Whole buckets up to the open one: the chart begins with a whole one, and ClickHouse reads no raw events of a cut hour.
  const range = +controls.range.value, to = now(), step = range <= 3600 ? 60 : range <= 86400 ? 3600 : 86400
  const from = Math.floor(to / step) * step - range + step
  // The pipeline is drawn as soon as it is there: it needs no ClickHouse, which may let the others wait.
  const showPipeline = call('api/v1/pipeline').then(p => {
    if (mine === asked) {
      $('pipeline').replaceChildren(...pipeline(p))
      $('refused').hidden = !p.refusals.length
      const open = $('refused').querySelector('details')?.open // by the reader
      $('refused').replaceChildren(...refused(p))
      $('refused').querySelector('details').open = !!open
      links(p.links)
    }
    return p
  })
  const [pipelineAnswer, answer, earlier] = await Promise.allSettled([showPipeline, overview(from, to).finally(() => { took = Date.now() - started }), periodBefore(from, to, range)])
  if (mine !== asked) return // a later question is on its way
  let pause = pollEvery
  if (answer.status === 'fulfilled') {
    shown = { ...answer.value, at: now() }
    draw(shown, earlier.value)
    pause = Math.min(Math.max(pollEvery, 10 * took), pollAtMost) // a tenth of ClickHouse's time at most
  }
  const p = pipelineAnswer.value
  $('pipeline').classList.toggle('stale', !p)
  tell(answer.reason, p?.consumers)
  if (controls.auto.checked && !isLocked(answer.reason)) timer = setTimeout(refresh, pause)
}

// isLocked says whether another key would help: there is none, it is not valid, or it may only send.
const isLocked = error => error?.status === 401 || error?.status === 403

// tell says what is wrong, once: a screen reader hears the banner when it changes.
function tell(error, consumers) {
  let text = ''
  if (isLocked(error)) {
    if (key) text = `${error.message} (${error.status}).` // without one the form says enough
    if ($('login').hidden) {
      key = ''
      sessionStorage.removeItem(keptAs)
      $('login').hidden = false
      $('key').focus()
    }
  } else if (error) {
    text = error instanceof Refused ? `${error.message} (${error.status}).` : 'The API does not answer.'
    if (shown) text += ` These numbers are from ${clock(shown.at)}.`
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

const clock = second => new Date(second * 1000).toLocaleTimeString('en-GB')

// age counts every second, whatever the API does.
function age() {
  if (!shown) return $('age').replaceChildren()
  const through = shown.complete_through
  const seconds = through && Math.max(0, now() - through)
  $('age').textContent = !through ? 'catching up with a backlog' : `complete to ${seconds < 120 ? `${seconds} s` : seconds < 7200 ? `${Math.floor(seconds / 60)} min` : `${Math.floor(seconds / 3600)} h`} ago`
  $('age').classList.toggle('bad', !through || seconds > 30)
}

function draw(o, earlier) {
  money.currency = o.currency
  const filtered = filters().size > 0
  $('empty').hidden = o.total_count > 0 || filtered
  $('curl').textContent = `curl -X POST ${element('a', { href: 'api/v1/events' }).href} -H 'Content-Type: application/json'${key && " -H 'X-API-Key: …'"} \\\n  -d '{"event_name":"product_view","user_id":"user_123","channel":"web","timestamp":'$(date +%s)'}'`
  $('totals').replaceChildren(...totals(o, earlier))
  $('charts').hidden = $('lists').hidden = false
  for (const c of charts) c.show(o, earlier)
  charts[1].node.hidden = o.bucket === 'minute' // too dear to count by the minute
  if (!controls.event_name.value) options(o.event_names.map(g => g.key))
  for (const [i, groups] of [o.channels, o.event_names, o.campaigns].entries()) lists[i].show(groups)
}

// options offers the largest event names; any other can be typed. It leaves the list alone while that is the same: it may be open.
function options(names) {
  if (names.join('\n') === [...$('names').options].map(o => o.value).join('\n')) return
  $('names').replaceChildren(...names.map(name => element('option', { value: name })))
}

function choose(name) {
  controls.event_name.value = name
  remember()
  refresh()
}

function links(all) {
  const nav = $('links')
  if (nav.children.length === 1) nav.append(...all.map(l => element('a', { href: l.url }, l.name)))
}

// The choice stands in the address, so that it survives a reload and can be sent to somebody.
function remember() {
  history.replaceState(null, '', `#${new URLSearchParams({ range: controls.range.value, channel: controls.channel.value, event_name: controls.event_name.value })}`)
}

function recall() {
  for (const [name, value] of new URLSearchParams(location.hash.slice(1))) {
    if (['range', 'channel', 'event_name'].includes(name)) controls[name].value = value
  }
  if (!controls.range.value) controls.range.value = 86400
  if (controls.channel.selectedIndex < 0) controls.channel.value = '' // the address names a channel that there is not
}

// send says what became of the event in an output beside its button.
async function send(event, said) {
  said.textContent = 'sending …'
  said.classList.remove('bad')
  try {
    const answer = await call('api/v1/events?wait=stored', { method: 'POST', headers: { 'Content-Type': 'application/json' }, body: JSON.stringify({ ...event, timestamp: now() }) })
    said.textContent = `${answer.status}: ${answer.event_id.slice(0, 12)}…`
    refresh()
  } catch (e) {
    said.textContent = e instanceof Refused ? e.message : 'The API does not answer.'
    said.classList.add('bad')
  }
}

$('controls').addEventListener('change', () => { remember(); refresh() })
controls.event_name.addEventListener('search', () => choose(controls.event_name.value)) // also when it is cleared
$('controls').addEventListener('submit', e => e.preventDefault())
$('login').addEventListener('submit', e => {
  e.preventDefault()
  key = $('key').value
  sessionStorage.setItem(keptAs, key)
  $('key').value = ''
  $('login').hidden = true
  refresh()
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
document.addEventListener('visibilitychange', () => document.hidden ? clearTimeout(timer) : refresh())
setInterval(() => shown && age(), 1000)
addEventListener('hashchange', () => { recall(); refresh() }) // somebody's address, opened in this tab
recall()
refresh()
