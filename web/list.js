// List is the largest groups of one kind.
import { element, number, visible } from './draw.js'

const largest = 10 // the API names no more groups of a kind

// A row stays while its numbers change, and so does the focus on it. choose, when given, is what a click does.
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
