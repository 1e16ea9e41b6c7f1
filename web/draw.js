// Drawing: what everything on the page is made of, and the parts that are drawn anew each time: cards, the pipeline, refusals.

export const number = new Intl.NumberFormat('en')
const whole = new Intl.NumberFormat('en', { maximumFractionDigits: 0 })
// money is in the currency that the API says, which Intl may not know.
export const money = { currency: '', format: n => `${money.currency}\u00a0${whole.format(n)}` }
export const compact = new Intl.NumberFormat('en', { notation: 'compact', maximumFractionDigits: 1 })
const percent = new Intl.NumberFormat('en', { style: 'percent', maximumFractionDigits: 0, signDisplay: 'exceptZero' })

const svgNames = new Set(['svg', 'path', 'rect', 'line', 'text', 'circle'])

// A name is whatever a client sent: what has no shape, or turns the text around it, is shown as its escape.
export const visible = text => text.replace(/[\u0000-\u001f\u007f-\u009f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g, c => `\\u${c.charCodeAt(0).toString(16).padStart(4, '0')}`)

export function element(name, attributes = {}, ...children) {
  const e = svgNames.has(name) ? document.createElementNS('http://www.w3.org/2000/svg', name) : document.createElement(name)
  for (const [k, v] of Object.entries(attributes)) if (v !== undefined) e.setAttribute(k, v)
  e.append(...children)
  return e
}

// totals draws a card a figure, with the change since the period before where that had anything.
export function totals(o, before) {
  return [['Events', 'total_count', number], ['Unique users', 'unique_users', number], ['Purchases', 'purchases', number], ['Revenue', 'revenue', money], ['Active campaigns', 'active_campaigns', number]].filter(([, field]) => field in o).map(([name, field, format]) => {
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

export const table = (names, rows) =>
  element('table', {}, element('thead', {}, element('tr', {}, ...names.map(n => element('th', { scope: 'col' }, n)))),
    element('tbody', {}, ...rows.map(cells => element('tr', {}, ...cells.map(c => element('td', {}, c))))))

// refused lists how many events were refused by code, with where that was, and the last of them.
export function refused(p, zone) {
  const codes = new Map()
  for (const r of p.refused) codes.set(r.code, [...(codes.get(r.code) || []), r])
  const sum = of => of.reduce((n, r) => n + r.events, 0)
  const byCode = [...codes].sort(([, a], [, b]) => sum(b) - sum(a))
  const where = of => of.map(r => `${r.route}, ${r.field || 'the body'}: ${number.format(r.events)}`).join('; ')
  const time = text => zone.text(Date.parse(text) / 1000, { month: 'short', day: 'numeric', hour: '2-digit', minute: '2-digit', second: '2-digit' })
  return [
    element('h2', {}, `${number.format(sum(p.refused))} refused `, element('small', {}, `by instance ${p.instance} since its start; they are not stored`)),
    table(['Code', 'Events', 'Where'], byCode.map(([code, of]) => [code, number.format(sum(of)), where(of)])),
    element('details', {}, element('summary', {}, `The last ${p.refusals.length}`),
      element('div', { class: 'scroll', tabindex: 0, role: 'region', 'aria-label': 'The last refused events' }, table(['At', 'Code', 'Route', 'Event', 'Why'], p.refusals.map(r => [time(r.time), r.code, r.route, visible(r.event_name), visible(r.message)])))),
  ]
}

function sparkline(values) {
  const most = Math.max(...values, 1e-9), step = 100 / Math.max(values.length - 1, 1)
  const line = values.map((v, i) => `${(100 - (values.length - 1 - i) * step).toFixed(1)},${(20 - 18 * v / most).toFixed(1)}`).join('L')
  return element('svg', { class: 'spark', viewBox: '0 0 100 21', preserveAspectRatio: 'none', 'aria-hidden': 'true' }, ...(line ? [element('path', { class: 'line', d: `M${line}` })] : []))
}
