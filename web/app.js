// The dashboard: asks /api/v1/overview and draws what it says. Nothing is computed here that the API does not say.
'use strict'

const $ = id => document.getElementById(id)
const number = new Intl.NumberFormat('en')
const money = new Intl.NumberFormat('en', { style: 'currency', currency: 'TRY', currencyDisplay: 'code', maximumFractionDigits: 0 })
const short = new Intl.NumberFormat('en', { notation: 'compact', maximumFractionDigits: 1 })
let key = sessionStorage.getItem('key') || ''
let timer, asked = 0

function element(name, attributes, ...children) {
  const e = ['svg', 'path', 'rect', 'title'].includes(name) ? document.createElementNS('http://www.w3.org/2000/svg', name) : document.createElement(name)
  for (const [k, v] of Object.entries(attributes || {})) e.setAttribute(k, v)
  e.append(...children)
  return e
}

async function call(path, options = {}) {
  const headers = { ...options.headers }
  if (key) headers['X-API-Key'] = key
  const answer = await fetch(path, { ...options, headers })
  const body = await answer.json().catch(() => ({}))
  if (answer.status === 401) {
    key = ''
    sessionStorage.removeItem('key')
    $('login').hidden = false
    $('key').focus()
  }
  if (!answer.ok) throw new Error(`${answer.status}: ${body.errors ? body.errors.map(e => e.message || e.error).join(', ') : body.detail || body.error || answer.statusText}`)
  return body
}

async function refresh() {
  clearTimeout(timer)
  const mine = ++asked
  const started = Date.now()
  const range = +document.querySelector('input[name=range]:checked').value
  const to = Math.floor(Date.now() / 1000)
  try {
    const health = fetch('/ready').then(answer => answer.json()).catch(() => ({})) // says why events wait, whatever its status
    const o = await call(`/api/v1/overview?from=${to - range}&to=${to}&channel=${$('channel').value}`)
    const consumers = (await health).consumers || 'ok'
    if (mine !== asked) return // a later question is on its way
    $('login').hidden = true
    draw(o)
    const behind = o.complete_through ? Math.max(0, Math.round(Date.now() / 1000 - o.complete_through)) : null
    const fresh = behind === null ? 'catching up with a backlog' : `complete to ${behind} s ago`
    say(consumers === 'ok' ? fresh : `${fresh}; ${consumers}`, consumers !== 'ok')
  } catch (e) {
    if (mine === asked) say(e instanceof TypeError ? 'the API does not answer' : e.message, true)
  }
  $('main').setAttribute('aria-busy', 'false')
  if ($('auto').checked) timer = setTimeout(refresh, Math.max(5000, 10 * (Date.now() - started))) // a tenth of its time at most
}

function say(text, bad) {
  $('state').textContent = text
  $('state').classList.toggle('bad', !!bad)
}

function draw(o) {
  $('totals').replaceChildren(...[
    ['Events', number.format(o.total_count)], ['Unique users', number.format(o.unique_users)], ['Purchases', number.format(o.purchases)],
    ['Revenue', money.format(o.revenue)], ['Active campaigns', number.format(o.active_campaigns)],
  ].map(([name, value]) => element('div', { class: 'card' }, element('span', {}, name), element('b', {}, value))))
  $('charts').replaceChildren(
    chart('Events', o, g => g.total_count, number), chart('Unique users', o, g => g.unique_users, number), chart('Revenue', o, g => g.revenue, money))
  $('lists').replaceChildren(list('Channels', o.channels), list('Events', o.event_names), list('Campaigns', o.campaigns))
}

// buckets fills the hours or days of which nothing came with zeros.
function buckets(o, value) {
  const step = o.bucket === 'day' ? 86400 : 3600
  const known = new Map(o.series.map(g => [Date.parse(g.key) / 1000, value(g)]))
  const all = []
  for (let at = Math.floor(o.from / step) * step; at <= o.to; at += step) all.push([at, known.get(at) || 0])
  return all
}

function chart(title, o, value, format) {
  const points = buckets(o, value)
  const card = element('div', { class: 'card' }, element('h2', {}, title, ' by ', o.bucket))
  const most = Math.max(...points.map(p => p[1]))
  if (!most) {
    card.append(element('p', { class: 'empty' }, 'nothing in this range'))
    return card
  }
  const width = 300, height = 100, step = width / Math.max(points.length - 1, 1)
  const xy = points.map((p, i) => `${points.length === 1 ? width / 2 : i * step},${height - p[1] / most * (height - 4)}`)
  const line = points.length === 1 ? `M0,${xy[0].split(',')[1]}H${width}` : 'M' + xy.join('L')
  const when = at => new Date(at * 1000).toLocaleString([], o.bucket === 'day' ? { month: 'short', day: 'numeric', timeZone: 'UTC' } : { weekday: 'short', hour: '2-digit', minute: '2-digit' })
  const svg = element('svg', { viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: 'none', role: 'img', 'aria-label': `${title}, at most ${format.format(most)}` },
    element('path', { class: 'area', d: `${line}V${height}H0Z` }), element('path', { class: 'line', d: line }),
    ...points.map((p, i) => element('rect', { x: Math.max(0, (i - .5) * step), y: 0, width: step, height }, element('title', {}, `${when(p[0])}: ${format.format(p[1])}`))))
  card.append(svg, element('div', { class: 'axis' }, element('span', {}, when(points[0][0])), element('span', {}, `at most ${short.format(most)}`), element('span', {}, when(points.at(-1)[0]))))
  return card
}

function bar(share) {
  return element('svg', { class: 'bar', viewBox: '0 0 100 1', preserveAspectRatio: 'none', 'aria-hidden': 'true' }, element('rect', { width: 100 * share, height: 1 }))
}

function list(title, groups) {
  const card = element('div', { class: 'card' }, element('h2', {}, title))
  if (!groups.length) {
    card.append(element('p', { class: 'empty' }, 'none'))
    return card
  }
  const most = Math.max(...groups.map(g => g.total_count), 1)
  card.append(element('table', {}, element('tbody', {}, ...groups.map(g => element('tr', {},
    element('th', { scope: 'row', title: g.key }, g.key || 'none', bar(g.total_count / most)),
    element('td', {}, number.format(g.total_count)))))))
  return card
}

$('controls').addEventListener('change', refresh)
$('controls').addEventListener('submit', e => e.preventDefault())
$('login').addEventListener('submit', e => {
  e.preventDefault()
  key = $('key').value
  sessionStorage.setItem('key', key)
  $('key').value = ''
  refresh()
})
$('send').addEventListener('submit', async e => {
  e.preventDefault()
  const form = Object.fromEntries(new FormData(e.target))
  const event = { event_name: form.event_name, user_id: form.user_id, channel: form.channel, campaign_id: form.campaign_id, timestamp: Math.floor(Date.now() / 1000) }
  if (form.price) event.metadata = { price: +form.price, currency: 'TRY' }
  const out = $('sent')
  try {
    const answer = await call('/api/v1/events', { method: 'POST', headers: { 'Content-Type': 'application/json' }, body: JSON.stringify(event) })
    out.textContent = `${answer.status}: ${answer.event_id.slice(0, 12)}…`
    out.classList.remove('bad')
    setTimeout(refresh, 500)
  } catch (err) {
    out.textContent = err.message
    out.classList.add('bad')
  }
})
for (const a of document.querySelectorAll('a[data-port]')) a.href = `${location.protocol}//${location.hostname}:${a.dataset.port}/`
document.addEventListener('visibilitychange', () => document.hidden ? clearTimeout(timer) : refresh())
refresh()
