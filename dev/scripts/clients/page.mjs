// Looks at the dashboard page in headless Chromium, as a person would: from no key and no events to a ClickHouse that goes and comes back.
// Usage: page.mjs URL KEY WRITE-KEY. Where the test has to do something it asks.
import { ask, check, finish, launch, open, wrong } from './browser.mjs'

const [url, key, writeKey] = process.argv.slice(2)
const it = await open(url, await launch()), { tab, text, hidden, until, look } = it
const spans = [] // seconds that each question was about: what is shown, the period before, what is shown …
tab.on('request', r => {
  const u = new URL(r.url())
  if (u.pathname.endsWith('/overview') && u.search) spans.push(u.searchParams.get('to') - u.searchParams.get('from'))
})

try {
  // Without a key the page asks for one, and leaves the reader's focus alone.
  it.isRefused = true
  await tab.goto(url + '/#channel=tv')
  await until('asked for a key', () => !document.getElementById('login').hidden)
  check('a channel that there is not leaves the box blank', await tab.$eval('[name=channel]', e => e.selectedIndex === 0))
  check('the key field has no focus', await tab.evaluate(() => document.activeElement.id === 'key'))
  check(`the period before has ${spans[1]} s, the one that is shown ${spans[0]} s`, spans[1] === spans[0])
  await look(360, 'dark')
  for (const [bad, said] of [['nonsense', /key/], [writeKey, /may only send/]]) {
    await tab.type('#key', bad)
    await tab.keyboard.press('Enter')
    await until(`said what is wrong with the key, like ${said}`, said => new RegExp(said).test(document.getElementById('banner').textContent) && !document.getElementById('login').hidden, said.source)
  }
  await tab.type('#key', key)
  await tab.keyboard.press('Enter')
  await until('let in', () => document.getElementById('login').hidden && document.querySelector('#totals b'))
  it.isRefused = false

  check('the empty state is not shown', !await hidden('empty') && (await text('#curl')).includes(url + '/api/v1/events'))
  await look(1280, 'light')
  it.isRefused = true
  await tab.setOfflineMode(true)
  await tab.click('#first')
  await until('said that the test event was not taken', () => document.getElementById('first-sent').classList.contains('bad'))
  check('what became of the test event is not to be seen', await tab.$eval('#first-sent', e => e.checkVisibility()))
  await until('dimmed the pipeline', () => document.getElementById('pipeline').classList.contains('stale'))
  await look(390, 'light')
  await look(1280, 'light')
  await tab.setOfflineMode(false)
  await until('brightened the pipeline', () => !document.getElementById('pipeline').classList.contains('stale'))
  it.isRefused = false
  await tab.click('#first')
  await until('counted the test event', () => document.querySelector('#totals b').textContent === '1')
  check('the empty state stays', await hidden('empty'))

  await ask('empty state seen')
  await until('showed what was sent', () => document.querySelector('#totals b').textContent === '1,001')
  const shown = await tab.$$eval('#totals b', all => all.map(b => b.textContent))
  const answer = await tab.evaluate(key => fetch('api/v1/overview', { headers: { 'X-API-Key': key } }).then(r => r.json()), key)
  const number = new Intl.NumberFormat('en'), want = [answer.total_count, answer.unique_users, answer.purchases, Math.round(answer.revenue), answer.active_campaigns].map(n => number.format(n))
  check(`cards ${shown}, the API says ${want}`, shown.every((s, i) => s.replace(/^TRY\s/, '') === want[i]))
  check('a list that is cut does not say so, or a whole one does', JSON.stringify(await tab.$$eval('#lists h2 small', all => all.map(e => e.textContent))) === '["","","the 10 largest"]')
  check('a table behind the chart differs', (await tab.$$eval('#charts figure:first-child td', all => all.reduce((n, td) => n + +td.textContent.replaceAll(',', ''), 0))) >= 1000)
  for (const [width, scheme] of [[360, 'dark'], [1280, 'dark'], [2560, 'light'], [360, 'light']]) await look(width, scheme)
  check('the last five minutes are not drawn', await tab.$('#pipeline .spark path'))

  // The cursor moves by keys and by pointer, and outlives a refresh.
  await tab.focus('#charts .plot')
  const open = await text('#charts .readout')
  check(`the open bucket is not marked: ${open}`, open.includes('so far'))
  await tab.keyboard.press('ArrowLeft')
  await tab.keyboard.press('ArrowLeft')
  const before = await text('#charts .readout')
  check('keys do not move the cursor', before !== open)
  const old = await tab.$('#charts .plot svg')
  await until('drew a chart anew', svg => !svg.isConnected, old)
  check('a refresh moves the cursor', await text('#charts .readout') === before && await tab.evaluate(() => document.activeElement.className === 'plot'))
  const box = await (await tab.$('#charts .plot')).boundingBox()
  await tab.mouse.move(box.x + box.width / 2, box.y + 50)
  check('the pointer does not move the cursor', await text('#charts .readout') !== before)

  // So does the focus on an event's name.
  await tab.focus('#lists a')
  const card = await tab.$('#totals .card')
  await until('drew the cards anew', card => !card.isConnected, card)
  check('a refresh takes the focus from a list', await tab.evaluate(() => document.activeElement.matches('#lists a')))

  // A filter by a click on an event's name, kept in the address.
  await tab.$$eval('#lists a', all => all.find(b => b.textContent === 'purchase').click())
  await until('filtered', () => document.querySelectorAll('#lists .card:nth-child(2) tr').length === 1)
  check('the choice is not in the address', tab.url().includes('event_name=purchase'))

  // Another address in the same tab is another choice.
  await tab.evaluate(() => { location.hash = 'range=3600&channel=&event_name=view' })
  await until('followed the address', () => document.querySelector('#charts h2').textContent === 'Events by minute' && document.querySelector('#lists .card:nth-child(2) th').textContent === 'view')

  // While ClickHouse lets the numbers wait, the pipeline is there, and the page says that it asks.
  const held = []
  const hold = r => r.url().includes('/overview') ? held.push(r) : r.continue()
  await tab.setRequestInterception(true)
  tab.on('request', hold)
  await tab.reload()
  await until('drew the pipeline first', () => document.querySelector('#pipeline .spark') && document.getElementById('through').textContent === 'asking …')
  tab.off('request', hold)
  for (const r of held) await r.continue()
  await tab.setRequestInterception(false)
  await until('drew the numbers', () => document.querySelector('#totals b'))

  // ClickHouse away: the numbers stay, dimmed, and the banner says from when they are.
  it.isRefused = true
  await ask('filtered')
  await until('said what is wrong', () => document.getElementById('main').classList.contains('stale') && /These numbers are from .* Accepted events are safe/.test(document.getElementById('banner').textContent))
  await until('said that the list of events cannot be read', () => /cannot be read: .*503/.test(document.querySelector('#events [role=status]').textContent))
  const age = await text('#through')
  await look(1280, 'dark')
  await look(360, 'light')
  await until('counted the age', was => document.getElementById('through').textContent !== was, age)
  await ask('stale')
  await until('recovered', () => !document.getElementById('main').classList.contains('stale') && document.getElementById('banner').textContent === '')

  // Swagger UI, by the page's link: what is tried out there is sent to where the page was found.
  it.isRefused = true // it asks for an icon's default name
  await tab.click('#links a')
  await until('opened Swagger UI', () => document.querySelector('#operations-default-get_health, [id$=get_health], .opblock'))
  await tab.evaluate(() => [...document.querySelectorAll('.opblock-summary-control')].find(b => b.textContent.includes('/health')).click())
  await until('opened an operation', () => document.querySelector('.try-out__btn'))
  await tab.click('.try-out__btn')
  await until('took it to be tried out', () => document.querySelector('.execute'))
  await tab.click('.execute')
  await until('tried it out', () => document.querySelector('.live-responses-table .response-col_status'))
  const tried = await text('.request-url')
  check(`what is tried out goes to ${tried}`, tried.includes(url + '/health') && (await text('.live-responses-table .response .response-col_status')).startsWith('200'))
} catch (e) {
  wrong.push(e.message)
}
await finish()
