// Chart is one figure along time: a line, what it is at the cursor, the period before, and the same as a table and as CSV. It stays while
// its numbers change, and so do its cursor and the focus.
import { csvButton } from './csv.js'
import { compact, element } from './draw.js'

const mostBuckets = 1000 // of which those without events are drawn, too

// buckets fills the buckets of which nothing came with zeros. Each is [start, value, whether the range has all of it].
function buckets(o, zone, value) {
  const known = new Map(o.series.map(g => [Date.parse(g.key) / 1000, value(g)])), all = []
  const seconds = { minute: 60, hour: 3600, day: 86400 }[o.bucket], isLong = (o.to - o.from) / seconds > mostBuckets
  for (let at = zone.startOf(o.bucket, isLong ? Math.min(o.to, ...known.keys()) : o.from), next; at <= o.to; at = next) {
    next = zone.next(o.bucket, at)
    all.push([at, known.get(at) || 0, at >= o.from && next <= o.to + 1])
  }
  return all
}

// ticks are at most five whole, round numbers from 0 to most or a little beyond.
function ticks(most) {
  const raw = most / 4, size = 10 ** Math.floor(Math.log10(raw))
  const step = Math.max([1, 2, 2.5, 5, 10].find(m => m * size >= raw) * size, 1)
  return Array.from({ length: Math.ceil(most / step - 1e-9) + 1 }, (_, i) => i * step)
}

const height = 190, left = 46, right = 8, top = 8, bottom = 22

export class Chart {
  constructor(title, value, format) {
    Object.assign(this, { title, value, format, at: null })
    this.heading = element('h2')
    this.readout = element('p', { class: 'readout' })
    this.plot = element('div', { class: 'plot', tabindex: 0, role: 'slider', 'aria-label': title, 'aria-valuemin': 0 })
    this.rows = element('tbody')
    const csv = csvButton(`${title} along time`, () =>
      [[`${this.o.bucket} from`, title, 'before'], ...this.points.map((p, i) => [this.zone.iso(p[0]), p[1], this.before[i]])])
    this.node = element('figure', { class: 'card' }, element('div', { class: 'head' }, this.heading, csv), this.readout, this.plot,
      element('details', {}, element('summary', {}, 'As a table'), element('table', {}, element('thead', {}, element('tr', {}, element('th', { scope: 'col' }, 'From'), element('th', { scope: 'col' }, title))), this.rows)))
    this.plot.addEventListener('pointermove', e => this.point(e))
    this.plot.addEventListener('pointerdown', e => this.point(e))
    this.plot.addEventListener('pointerleave', e => e.pointerType === 'mouse' && this.move(null))
    this.plot.addEventListener('keydown', e => this.press(e))
    new ResizeObserver(() => this.draw()).observe(this.plot)
  }

  // show draws what the overview says, and beside each bucket the one of the same place in the period before.
  show(o, before, zone) {
    Object.assign(this, { o, zone, points: buckets(o, zone, this.value) })
    this.before = before?.series.length ? buckets(before, zone, this.value).map(p => p[1]) : []
    if (Math.abs(this.before.length - this.points.length) > 1) this.before = [] // not as long: the first months of all
    this.heading.textContent = `${this.title} by ${o.bucket}`
    this.rows.replaceChildren(...this.points.map(p => element('tr', {}, element('th', { scope: 'row' }, this.when(p)), element('td', {}, this.format.format(p[1])))))
    this.draw()
  }

  when([at]) {
    const isYears = this.o.to - this.o.from > 300 * 86400
    const day = { month: 'short', day: 'numeric', ...(isYears && { year: 'numeric' }) }, time = { hour: '2-digit', minute: '2-digit' }
    return this.zone.text(at, this.o.bucket === 'day' ? day : this.o.to - this.o.from > 86400 ? { ...day, ...time } : time)
  }

  draw() {
    const width = this.plot.clientWidth
    if (!this.points || !width) return
    const before = this.before.length ? this.points.map((_, i) => this.before[i] || 0) : []
    const scale = ticks(Math.max(...this.points.map(p => p[1]), ...before, 1)), most = scale.at(-1), n = this.points.length
    this.x = i => n === 1 ? (left + width - right) / 2 : left + i * (width - left - right) / (n - 1)
    const y = v => top + (1 - v / most) * (height - top - bottom)
    const path = list => 'M' + list.map(([i, v]) => `${this.x(i).toFixed(1)},${y(v).toFixed(1)}`).join('L')
    const all = this.points.map((p, i) => [i, p[1]])
    const first = this.points.findIndex(p => p[2]), last = this.points.findLastIndex(p => p[2])
    const every = Math.ceil(n / Math.max(2, Math.floor((width - left) / (this.o.bucket === 'hour' ? 125 : 90))))
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
    const p = this.points.at(i), x = this.x(i < 0 ? this.points.length - 1 : i), before = this.before.at(i < 0 ? this.points.length - 1 : i)
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
