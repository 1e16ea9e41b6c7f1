// Looks at what a reader may choose on the dashboard page: events, filters, breakdowns, dates, the address, CSV. Usage: view.mjs URL KEY DATE
// DAYS.json, with what the test has sent: see TestPageView. DATE is a day in the zone of the browser, and the file has days of several zones.
import { mkdtemp, readFile, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { check, finish, launch, open, wrong } from './browser.mjs'

const [url, key, date, days] = process.argv.slice(2)
const browser = await launch(), it = await open(url, browser), { tab, text, until, look } = it
const hostile = '=<b>x</b>\u202e', shownHostile = '=<b>x</b>\\u202e'

// asked counts the questions by their kind. Two of a kind that are still wanted never wait at once, but for the figures and those of the
// period before, each of which is up to three.
const asked = {}
const kindOf = address => address.includes('group_by=metadata') ? 'breakdown' : /api\/v1\/(\w+)/.exec(address)?.[1]
tab.on('request', r => { if (kindOf(r.url()) && r.method() === 'GET') asked[kindOf(r.url())] = (asked[kindOf(r.url())] || 0) + 1 })
await tab.exposeFunction('overlap', what => wrong.push(what))
const watch = kindOf => {
  const atMost = { overview: 2, pipeline: 1, events: 1, breakdown: 1, metrics: 4 }, waiting = new Set(), ask = window.fetch
  window.fetch = (address, options) => {
    const kind = kindOf(address), one = { kind, signal: options.signal }
    waiting.add(one)
    const n = [...waiting].filter(other => other.kind === kind && !other.signal.aborted).length
    if (n > atMost[kind]) window.overlap(`${n} questions of ${kind} at once: ${address}`)
    const answer = ask(address, options)
    answer.finally(() => waiting.delete(one)).catch(() => {})
    return answer
  }
}
await tab.evaluateOnNewDocument(`(${watch})(${kindOf})`)
let answer = null // what a test makes of a question
await tab.setRequestInterception(true)
tab.on('request', r => answer?.(r) || r.continue())

const send = event => fetch(`${url}/api/v1/events?wait=stored`, { method: 'POST', headers: { 'X-API-Key': key, 'Content-Type': 'application/json' }, body: JSON.stringify({ timestamp: Math.floor(Date.now() / 1000), ...event }) })
const total = n => until(`counted ${n}`, n => document.querySelector('#totals b')?.textContent === n && !document.getElementById('totals').hidden, String(n))
const rows = n => until(`listed ${n} events`, n => document.querySelectorAll('#events button.open').length === n, n)
const groups = n => until(`broke down into ${n}`, n => document.querySelectorAll('#breakdown tbody tr').length === n, n)
const names = selector => tab.$$eval(selector, all => all.map(e => e.textContent))
const click = (selector, name) => tab.$$eval(selector, (all, name) => all.find(e => e.textContent === name).click(), name).catch(() => { throw new Error(`${name} is not among ${selector}`) })
// awaited waits until something is so here, and not in the browser.
const awaited = async (what, condition) => {
  for (const end = Date.now() + 90_000; !condition(); await tab.evaluate(() => new Promise(requestAnimationFrame))) if (Date.now() > end) throw new Error('never ' + what)
}
// redrawn waits until a tab has drawn its cards anew so many times: the clock of what has to stay as it is.
const redrawn = async (on, times) => {
  for (; times > 0; times--) {
    const card = await on.tab.$('#totals .card')
    await on.until('drew the cards anew', card => !card.isConnected, card)
  }
}
const enter = async on => {
  on.isRefused = true
  await on.until('asked for a key', () => !document.getElementById('login').hidden)
  await on.tab.type('#key', key)
  await on.tab.keyboard.press('Enter')
  await on.until('let in', () => document.getElementById('login').hidden && document.querySelector('#totals b') && !document.getElementById('events').hidden)
  on.isRefused = false
}

try {
  // The browser's zone, in what is asked and on the page; its days are those of the program's calendar.
  await tab.emulateTimezone('Asia/Tokyo')
  const overviews = []
  tab.on('request', r => { if (kindOf(r.url()) === 'overview') overviews.push(new URL(r.url()).searchParams.get('tz')) })
  await tab.goto(url + '/')
  await enter(it)
  check(`the zone is ${overviews} in questions, and "${await text('#zone')}" on the page`, overviews.every(tz => tz === 'Asia/Tokyo') && await text('#zone') === 'times in Asia/Tokyo')
  const off = await tab.evaluate(async zones => {
    const { Zone } = await import(new URL('web/zone.js', document.baseURI)), off = []
    for (const [name, starts] of Object.entries(zones)) {
      const zone = new Zone(name)
      starts.slice(0, -1).forEach((start, i) => {
        const next = starts[i + 1]
        for (const at of [start, start + 1, (start + next) / 2, next - 1]) if (zone.startOf('day', at) !== start) off.push(`${name} ${start} at ${at}`)
        if (zone.next('day', start) !== next || zone.days(next, -1) !== start || zone.startOfDate(zone.date(start)) !== start) off.push(`${name} ${start} and the next`)
      })
    }
    return off
  }, JSON.parse(await readFile(days, 'utf8')))
  check(`days begin elsewhere: ${off.slice(0, 5)} and so on, ${off.length}`, !off.length)

  // What others have made up is text, and a row's JSON is what is stored, to the last digit.
  await rows(17)
  check('a name is not shown as it is', (await names('#events td.event_name a')).includes(shownHostile) && (await names('#lists a')).includes(shownHostile))
  const first = await tab.$$eval('#events tr', (all, name) => all.findIndex(tr => tr.querySelector('.event_name a')?.textContent === name), shownHostile)
  await tab.evaluate(i => document.querySelectorAll('#events tr')[i].querySelector('button').focus(), first)
  await tab.keyboard.press('Enter')
  await until('opened a row', () => document.querySelector('#events .detail pre'))
  const json = await text('#events .detail pre')
  check(`the JSON is ${json}`, json.includes('12345678901234567890.10') && json.includes('\\u0085') && json.includes('"a.b"') && JSON.parse(json).event_name === hostile)
  check('the open row is not marked, or not in the address', await tab.$eval('#events [aria-expanded=true]', e => e === document.activeElement) && /row=[0-9a-f]{64}/.test(tab.url()) && /until=\d+/.test(tab.url()))
  check('a name has become HTML', !await tab.$('main b b, main th b, main td b, main pre b, main img, main script'))
  const members = await names('#events .detail a')
  check(`an event leads to ${members}`, members.includes('a\\.b.c = true') && members.includes('said = \\u0085<i>') && members.includes('tag = <i>'))
  for (const [width, scheme] of [[1280, 'light'], [390, 'dark'], [390, 'light'], [1280, 'dark']]) await look(width, scheme)

  // Refusals, by code and the last of them.
  check(`refused: ${await text('#refused tbody')}`, await text('#refused tbody') === 'validation.required.error2events, user_id: 2')
  await tab.click('#refused summary')
  check('the last refused', (await names('#refused details td')).includes('<u>'))
  await look(390, 'light')

  // While it is paused the list asks nothing and stays; the numbers go on.
  const asks = asked.events
  await send({ event_name: 'late', user_id: 'late', channel: 'api' })
  await total(18)
  await redrawn(it, 1)
  check('a paused list asks', asked.events === asks)
  check('a paused list moves', !(await names('#events td.event_name a')).includes('late'))
  await tab.click('#pause')
  await until('went on', () => document.querySelector('#events td.event_name a').textContent === 'late' && !document.querySelector('#events .detail'))
  await tab.goBack()
  await until('went back', () => document.querySelector('#events .detail') && document.querySelector('#events td.event_name a').textContent !== 'late')
  await tab.goForward()
  await rows(18)

  // A user, of all events: numbers are of one, which there is a choice of.
  await click('#events td.user_id a', 'u1')
  await rows(7)
  await until('offered events', () => !document.getElementById('choose').hidden && document.getElementById('totals').hidden)
  check(`the filter is said as ${await text('#filters')}`, await text('#filters') === 'user = u1 ×')
  await look(390, 'light')
  await click('#choose a', 'order')
  await total(6)
  check('the numbers of a user have a revenue', !(await names('#totals span')).includes('Revenue'))
  await tab.focus('#filters a')
  await tab.keyboard.press('Enter')
  await total(12)
  check('the focus is lost with a filter', await tab.evaluate(() => document.activeElement.name === 'event_name'))

  // A breakdown: exact, its values are filters, and it is asked when it is wanted and not with every card.
  await tab.type('[name=by]', 'plan')
  await tab.type('[name=sum]', 'price')
  await tab.keyboard.press('Enter')
  await until('added up', () => document.querySelector('#breakdown thead th:nth-child(4)') && document.querySelectorAll('#breakdown tbody tr').length === 3)
  const cells = await tab.$$eval('#breakdown tbody tr', all => all.map(tr => [tr.querySelector('a').textContent, ...[...tr.querySelectorAll('td')].map(td => td.textContent)].join(' ')))
  check(`broken down: ${cells}`, JSON.stringify(cells) === '["pro 6 2 0.6","=1+1 4 1 0.8","none 2 1 0.3"]')
  check(`together: ${await text('#breakdown > p')}`, await text('#breakdown > p') === '12 events of 2 users, the sum is 1.7')
  check(`the address is ${tab.url()}`, tab.url().includes('by=metadata.plan') && tab.url().includes('sum=metadata.price'))
  for (const [width, scheme] of [[390, 'dark'], [1280, 'light']]) await look(width, scheme)
  const broken = asked.breakdown
  await redrawn(it, 3)
  check('a breakdown is asked with the cards', asked.breakdown - broken <= 1)
  const known = asked.breakdown
  await click('#breakdown button', 'Ask again')
  await awaited('asked again', () => asked.breakdown > known)
  for (const [name, n] of [['pro', 6], ['none', 2]]) {
    await click('#breakdown th a', name)
    await total(n)
    await rows(n)
    check(`of ${name} there is ${await text('#filters')}`, await text('#filters') === (n === 6 ? 'plan = pro ×' : 'plan is not there ×'))
    await tab.goBack()
    await total(12)
    await groups(3)
  }

  // Dates are days of the zone, and the address has all of the view: somebody elsewhere sees the same.
  await tab.evaluate(date => {
    for (const name of ['from', 'to']) document.forms.controls.elements[name].value = date
    document.forms.controls.elements.from.dispatchEvent(new Event('change', { bubbles: true }))
  }, date)
  await total(1)
  await rows(1)
  await tab.click('#events button.open')
  await until('opened a row', () => document.querySelector('#events .detail pre'))
  const hours = await tab.$$eval('#charts figure:first-child tbody tr', all => all.map(tr => tr.textContent))
  check(`the hours of the day: ${hours}`, hours.length === 24 && hours[0].endsWith('1'))
  const seen = () => ['#totals .card:first-child', '#lists', '#breakdown .scroll', '#events .scroll', '#filters', '#charts .readout'].map(s => document.querySelector(s).textContent).join(' | ')
  const colleague = await open(url, await launch())
  await colleague.tab.emulateTimezone('America/New_York')
  await colleague.tab.goto(tab.url())
  await enter(colleague)
  await colleague.until('broke down', () => document.querySelector('#breakdown tbody tr') && document.querySelector('#events .detail'))
  const [mine, theirs] = [await tab.evaluate(seen), await colleague.tab.evaluate(seen)]
  check(`a colleague sees\n${theirs}\nand not\n${mine}`, mine === theirs)
  check(`a colleague's zone is "${await colleague.text('#zone')}"`, await colleague.text('#zone') === 'times in Asia/Tokyo, or America/New_York')
  await colleague.tab.click('#zone a')
  await colleague.until('took its own zone', () => document.getElementById('zone').textContent === 'times in America/New_York')

  // CSV of a chart, a list, a breakdown and the events.
  const dir = await mkdtemp(join(tmpdir(), 'csv'))
  await tab.goto(url + '/#range=86400&by=metadata.plan&sum=metadata.price&event_name=order')
  await total(12)
  await groups(3)
  const session = await browser.target().createCDPSession()
  await session.send('Browser.setDownloadBehavior', { behavior: 'allow', downloadPath: dir, eventsEnabled: true })
  const save = async selector => {
    const name = new Promise(resolve => session.once('Browser.downloadWillBegin', e => resolve(e.suggestedFilename)))
    const saved = new Promise(resolve => { const done = e => { if (e.state === 'completed') { session.off('Browser.downloadProgress', done); resolve() } }; session.on('Browser.downloadProgress', done) })
    await tab.$eval(selector, e => e.click())
    await saved
    return (await readFile(join(dir, await name), 'utf8')).split('\r\n')
  }
  const chart = await save('#charts figure:first-child button')
  check(`the chart as CSV: ${chart}`, chart[0] === 'hour from,Events,before' && chart.length === 26 && /^\d{4}-\d\d-\d\dT\d\d:00:00\+09:00,\d+,/.test(chart[1]) && chart.slice(1, -1).reduce((n, line) => n + +line.split(',')[1], 0) === 12)
  const plans = await save('#breakdown .head button')
  check(`the breakdown as CSV: ${plans}`, JSON.stringify(plans) === JSON.stringify(['plan,Events,Users,Sum of price', 'pro,6,2,0.6', "'=1+1,4,1,0.8", ',2,1,0.3', '']))
  await tab.goto(url + '/#range=604800')
  await total(21)
  check('a list as CSV has a formula', (await save('#lists .card:nth-child(2) button')).includes(`'${shownHostile},1`))
  const events = await save('#events .head button:last-child')
  check(`events as CSV: ${events}`, events.length === 23 && events.some(line => line.includes(`,'${shownHostile},<img src=x>,`) && line.includes('12345678901234567890.10')))
  await rm(dir, { recursive: true })

  // Each part says what it does not get, and goes on.
  it.isRefused = true
  const refuse = (kind, status, error, headers = {}) => { answer = r => kindOf(r.url()) === kind && r.respond({ status, contentType: 'application/json', headers, body: JSON.stringify({ error }) }).then(() => true, () => true) }
  for (const [kind, status, error, where, more, said = ''] of [
    ['breakdown', 503, 'narrow the range', '#breakdown [role=status]', 'channel='], ['events', 429, 'too many requests', '#events [role=status]', 'sum=metadata.price'],
    ['overview', 503, 'over there', '#banner', 'channel=api', ' These numbers are still those of another view.'],
  ]) {
    refuse(kind, status, error, { 'Retry-After': '1' })
    await tab.goto(url + '/#range=3600&by=metadata.plan&event_name=order&' + more)
    await until(`said that ${kind} is refused`, (where, said) => document.querySelector(where)?.textContent.includes(said), where, `${error} (${status}).${said}`)
    await look(390, 'light')
    answer = null
    if (kind === 'breakdown') await click('#breakdown button', 'Ask again')
    await until(`went on with ${kind}`, where => document.querySelector(where).textContent === '', where)
  }
  it.isRefused = false

  // A question that is no longer wanted is given up, and a tab that nobody sees asks nothing.
  const held = []
  answer = r => r.url().includes('metadata.other') && !!held.push(r)
  await tab.goto(url + '/#by=metadata.other&event_name=order')
  await until('asked', () => document.querySelector('#breakdown [role=status]').textContent === 'asking …')
  await awaited('asked', () => held.length)
  let isGivenUp = false
  tab.on('requestfailed', r => { isGivenUp ||= r === held[0] })
  answer = null
  await tab.evaluate(() => { location.hash = 'by=metadata.plan&event_name=order' })
  await awaited('gave a question up', () => isGivenUp)
  await groups(3)
  await redrawn(it, 1)
  const see = isHidden => tab.evaluate(isHidden => {
    Object.defineProperty(document, 'hidden', { configurable: true, value: isHidden })
    document.dispatchEvent(new Event('visibilitychange'))
  }, isHidden)
  await see(true)
  const before = JSON.stringify(asked)
  await redrawn(colleague, 2)
  check(`a hidden tab asks: ${before}, then ${JSON.stringify(asked)}`, JSON.stringify(asked) === before)
  await see(false)
  await redrawn(it, 1)

  // A zone that the API does not know.
  it.isRefused = true
  const unknown = { status: 400, contentType: 'application/json', body: '{"error":"validation failed","errors":[{"field":"tz","message":"tz must be a name"}]}' }
  answer = r => r.url().includes('tz=Asia') && r.respond(unknown).then(() => true, () => true)
  await tab.reload()
  await until('took UTC', () => document.querySelector('#totals b') && document.getElementById('zone').textContent === 'times in UTC, as the API does not know Asia/Tokyo')
} catch (e) {
  wrong.push(e.message)
}
await finish()
