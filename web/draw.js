// Drawing: cards, charts, sparklines and lists, out of what the API says. Nothing here asks or remembers anything but
// where the reader has put a chart's cursor.

export const number = new Intl.NumberFormat('en')
export const money = new Intl.NumberFormat('en', { style: 'currency', currency: 'TRY', currencyDisplay: 'code', maximumFractionDigits: 0 })
const compact = new Intl.NumberFormat('en', { notation: 'compact', maximumFractionDigits: 1 })
const percent = new Intl.NumberFormat('en', { style: 'percent', maximumFractionDigits: 0, signDisplay: 'exceptZero' })

const svgNames = new Set(['svg', 'path', 'rect', 'line', 'text', 'circle'])

export function element(name, attributes = {}, ...children) {
  const e = svgNames.has(name) ? document.createElementNS('http://www.w3.org/2000/svg', name) : document.createElement(name)
  for (const [k, v] of Object.entries(attributes)) if (v !== undefined) e.setAttribute(k, v)
  e.append(...children)
  return e
}

// totals draws a card a figure, with the change since the period before where that had anything.
export function totals(o, before) {
  return [['Events', 'total_count', number], ['Unique users', 'unique_users', number], ['Purchases', 'purchases', number], ['Revenue', 'revenue', money], ['Active campaigns', 'active_campaigns', number]].map(([name, field, format]) => {
    const ratio = o[field] / before?.[field] // of nothing: NaN or Infinity
    const note = Number.isFinite(ratio) ? `${percent.format(ratio - 1)} vs the period before` : '\u00a0'
    return element('div', { class: 'card' }, element('span', {}, name), element('b', {}, format.format(o[field])), element('small', {}, note))
  })
}

// pipeline draws a cell a series, with the last value and a sparkline.
export function pipeline(p) {
  const cells = [
    ['accepted', 'Accepted', v => `${compact.format(v)}/s`], ['stored', 'Stored', v => `${compact.format(v)}/s`], ['duplicates', 'Duplicates', v => `${compact.format(v)}/s`],
    ['lag', 'Waiting on Kafka', v => number.format(v)], ['freshness_seconds', 'Freshness', v => `${v < 10 ? v.toFixed(1) : Math.round(v)} s`],
    ['retries', 'Waiting for a retry', v => number.format(v)], ['dead_letters', 'Dead letters, 5 min', v => number.format(v), values => values.reduce((a, b) => a + b, 0)],
  ].map(([name, label, format, value = values => values.at(-1)]) => {
    const values = p.series[name] || []
    return element('div', {}, element('span', {}, label), element('b', {}, values.length ? format(value(values)) : '–'), sparkline(values))
  })
  return [element('h2', {}, 'Pipeline ', element('small', {}, `instance ${p.instance}, last 5 minutes`)), element('div', { class: 'strip' }, ...cells)]
}

function sparkline(values) {
  const most = Math.max(...values, 1e-9), step = 100 / Math.max(values.length - 1, 1)
  const line = values.map((v, i) => `${(100 - (values.length - 1 - i) * step).toFixed(1)},${(20 - 18 * v / most).toFixed(1)}`).join('L')
  return element('svg', { class: 'spark', viewBox: '0 0 100 21', preserveAspectRatio: 'none', 'aria-hidden': 'true' }, ...(line ? [element('path', { class: 'line', d: `M${line}` })] : []))
}

const steps = { minute: 60, hour: 3600, day: 86400 }

// buckets fills the buckets of which nothing came with zeros. Each is [start, value, whether the range has all of it].
function buckets(o, value) {
  const step = steps[o.bucket], known = new Map(o.series.map(g => [Date.parse(g.key) / 1000, value(g)])), all = []
  for (let at = Math.floor(o.from / step) * step; at <= o.to; at += step) all.push([at, known.get(at) || 0, at >= o.from && at + step <= o.to + 1])
  return all
}

// ticks are at most five whole, round numbers from 0 to most or a little beyond.
function ticks(most) {
  const raw = most / 4, size = 10 ** Math.floor(Math.log10(raw))
  const step = Math.max([1, 2, 2.5, 5, 10].find(m => m * size >= raw) * size, 1)
  return Array.from({ length: Math.ceil(most / step - 1e-9) + 1 }, (_, i) => i * step)
}

const height = 190, left = 46, right = 8, top = 8, bottom = 22

// Chart is one figure of the page. It stays while its numbers change, and so do its cursor and the focus.
export class Chart {
  constructor(title, value, format) {
    Object.assign(this, { title, value, format, at: null })
    this.heading = element('h2')
    this.readout = element('p', { class: 'readout' })
    this.plot = element('div', { class: 'plot', tabindex: 0, role: 'slider', 'aria-label': title, 'aria-valuemin': 0 })
    this.rows = element('tbody')
    this.node = element('figure', { class: 'card' }, this.heading, this.readout, this.plot,
      element('details', {}, element('summary', {}, 'As a table'), element('table', {}, element('thead', {}, element('tr', {}, element('th', { scope: 'col' }, 'From'), element('th', { scope: 'col' }, title))), this.rows)))
    this.plot.addEventListener('pointermove', e => this.point(e))
    this.plot.addEventListener('pointerdown', e => this.point(e))
    this.plot.addEventListener('pointerleave', e => e.pointerType === 'mouse' && this.move(null))
    this.plot.addEventListener('keydown', e => this.press(e))
    new ResizeObserver(() => this.draw()).observe(this.plot)
  }

  show(o, before) {
    this.o = o
    this.points = buckets(o, this.value)
    const shift = before ? o.from - before.from : 0
    this.before = new Map((before?.series || []).map(g => [Date.parse(g.key) / 1000 + shift, this.value(g)]))
    this.heading.textContent = `${this.title} by ${o.bucket}`
    this.rows.replaceChildren(...this.points.map(p => element('tr', {}, element('th', { scope: 'row' }, this.when(p)), element('td', {}, this.format.format(p[1])))))
    this.draw()
  }

  when([at]) {
    const day = { month: 'short', day: 'numeric' }
    return new Date(at * 1000).toLocaleString('en-GB', this.o.bucket === 'day' ? { ...day, timeZone: 'UTC' } : this.o.to - this.o.from > 86400 ? { ...day, hour: '2-digit', minute: '2-digit' } : { hour: '2-digit', minute: '2-digit' })
  }

  draw() {
    const width = this.plot.clientWidth
    if (!this.points || !width) return
    const before = this.before.size ? this.points.map(p => this.before.get(p[0]) || 0) : []
    const scale = ticks(Math.max(...this.points.map(p => p[1]), ...before, 1)), most = scale.at(-1), n = this.points.length
    this.x = i => n === 1 ? (left + width - right) / 2 : left + i * (width - left - right) / (n - 1)
    const y = v => top + (1 - v / most) * (height - top - bottom)
    const path = list => 'M' + list.map(([i, v]) => `${this.x(i).toFixed(1)},${y(v).toFixed(1)}`).join('L')
    const all = this.points.map((p, i) => [i, p[1]])
    const first = this.points.findIndex(p => p[2]), last = this.points.findLastIndex(p => p[2])
    const every = Math.ceil(n / Math.max(2, Math.floor((width - left) / 90)))
    const svg = element('svg', { width, height, 'aria-hidden': 'true' },
      ...scale.flatMap(v => [element('line', { class: 'grid', x1: left, x2: width - right, y1: y(v), y2: y(v) }), element('text', { x: left - 6, y: y(v) + 4, 'text-anchor': 'end' }, compact.format(v))]),
      ...this.points.flatMap((p, i) => i % every ? [] : [element('text', { x: this.x(i), y: height - 5, 'text-anchor': i === 0 ? 'start' : this.x(i) > width - 40 ? 'end' : 'middle' }, this.when(p))]),
      element('path', { class: 'area', d: `${path(all)}L${this.x(n - 1)},${y(0)}L${this.x(0)},${y(0)}Z` }))
    if (before.length) svg.append(element('path', { class: 'before', d: path(before.map((v, i) => [i, v])) }))
    if (first >= 0) svg.append(element('path', { class: 'line', d: path(all.slice(first, last + 1)) }))
    for (const part of [all.slice(0, first + 1), all.slice(Math.max(last, 0))]) if (part.length > 1) svg.append(element('path', { class: 'line open', d: path(part) }))
    if (n === 1 || !this.points[n - 1][2]) svg.append(element('circle', { class: 'open', cx: this.x(n - 1), cy: y(this.points[n - 1][1]), r: 3.5 }))
    this.cursor = element('line', { class: 'cursor', y1: top, y2: height - bottom })
    svg.append(this.cursor)
    this.plot.replaceChildren(svg)
    this.plot.setAttribute('aria-valuemax', n - 1)
    this.read()
  }

  // read says what the cursor is at, or the last bucket without one.
  read() {
    const i = this.at === null ? -1 : this.points.findIndex(p => p[0] === this.at)
    const p = this.points.at(i), x = this.x(i < 0 ? this.points.length - 1 : i), before = this.before.get(p[0])
    this.cursor.toggleAttribute('hidden', i < 0)
    this.cursor.setAttribute('x1', x)
    this.cursor.setAttribute('x2', x)
    const said = `${this.when(p)}: ${this.format.format(p[1])}${p[2] ? '' : ' so far'}${before === undefined ? '' : `, ${this.format.format(before)} before`}`
    this.readout.textContent = said
    this.plot.setAttribute('aria-valuenow', i < 0 ? this.points.length - 1 : i)
    this.plot.setAttribute('aria-valuetext', said)
  }

  move(i) {
    if (!this.points) return
    this.at = i === null ? null : this.points[Math.min(Math.max(i, 0), this.points.length - 1)][0]
    this.read()
  }

  point(e) {
    if (!this.points) return
    const box = this.plot.getBoundingClientRect()
    this.move(Math.round((e.clientX - box.left - left) / Math.max(1, box.width - left - right) * (this.points.length - 1)))
  }

  press(e) {
    if (!this.points) return
    const n = this.points.length, i = this.at === null ? n - 1 : this.points.findIndex(p => p[0] === this.at)
    const to = { ArrowLeft: i - 1, ArrowRight: i + 1, ArrowDown: i - 1, ArrowUp: i + 1, Home: 0, End: n - 1, PageUp: i + 6, PageDown: i - 6, Escape: null }[e.key]
    if (to === undefined) return
    e.preventDefault()
    this.move(to)
  }
}

const largest = 10 // the API names no more groups of a kind

// A name is whatever a client sent: what has no shape, or turns the text around it, is shown as its escape.
const visible = text => text.replace(/[\u0000-\u001f\u007f-\u009f\u200b\u200e\u200f\u2028-\u202e\u2066-\u2069]/g, c => `\\u${c.charCodeAt(0).toString(16).padStart(4, '0')}`)

// List is the largest groups of one kind; choose, when given, is what a click on one does. A row stays while its numbers
// change, and so does the focus on it.
export class List {
  constructor(title, choose) {
    Object.assign(this, { choose, rows: new Map() })
    this.body = element('tbody')
    this.none = element('p', { class: 'soft' }, 'none in this range')
    this.cut = element('small', { hidden: '' }, `the ${largest} largest`)
    this.node = element('div', { class: 'card' }, element('h2', {}, `${title} `, this.cut), element('table', {}, this.body), this.none)
  }

  show(groups) {
    this.cut.hidden = groups.length < largest
    const most = Math.max(...groups.map(g => g.total_count), 1)
    this.rows = new Map(groups.map(g => [g.key, this.rows.get(g.key) || this.row(g.key)]))
    for (const g of groups) {
      const { bar, count } = this.rows.get(g.key)
      bar.setAttribute('width', 100 * g.total_count / most)
      count.textContent = number.format(g.total_count)
    }
    const nodes = [...this.rows.values()].map(r => r.node)
    this.none.hidden = nodes.length > 0
    if (nodes.length === this.body.children.length && nodes.every((n, i) => n === this.body.children[i])) return
    const focused = document.activeElement
    this.body.replaceChildren(...nodes)
    if (this.body.contains(focused)) focused.focus()
  }

  row(key) {
    const name = visible(key) || 'none'
    const label = this.choose && key ? element('button', { type: 'button', title: `Only ${name}` }, name) : element('span', { title: name }, name)
    if (this.choose && key) label.addEventListener('click', () => this.choose(key))
    const bar = element('rect', { height: 1 }), count = element('td')
    const node = element('tr', {}, element('th', { scope: 'row' }, label, element('svg', { class: 'bar', viewBox: '0 0 100 1', preserveAspectRatio: 'none', 'aria-hidden': 'true' }, bar)), count)
    return { node, bar, count }
  }
}
