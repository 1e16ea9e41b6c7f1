// List is the groups of one kind, the largest first. Each leads to a view with only that group, and stays while its numbers change, so
// that the focus does. Somebody may have made up the names: they are text, and shown by visible.
import { csvButton } from './csv.js'
import { element, number, visible } from './draw.js'

export const largest = 10 // the overview names no more groups of a kind

const heading = cells => element('thead', {}, element('tr', {}, ...cells.map(name => element('th', { scope: 'col' }, name))))

export class List {
  // columns are the figures beside a name: what they are called, and what a group has of them.
  constructor(title, columns = [['Events', g => number.format(g.total_count), g => g.total_count]]) {
    Object.assign(this, { columns, rows: new Map(), groups: [] })
    this.title = element('span', {}, title)
    this.note = element('small')
    this.body = element('tbody')
    this.none = element('p', { class: 'soft' }, 'none in this range')
    this.csv = csvButton(title, () =>
      [[title, ...this.columns.map(c => c[0])], ...this.groups.map(g => [g.key, ...this.columns.map(c => c[2](g))])])
    this.table = element('table', {}, ...(columns.length > 1 ? [heading([title, ...columns.map(c => c[0])])] : []), this.body)
    this.node = element('div', { class: 'card' }, element('div', { class: 'head' }, element('h2', {}, this.title, ' ', this.note), this.csv), this.table, this.none)
  }

  // show draws the groups; link, when given, is the address that a group leads to, or nothing.
  show(groups, note = '', link = () => undefined) {
    this.groups = groups
    this.note.textContent = note
    const most = Math.max(...groups.map(g => g.total_count), 1)
    this.rows = new Map(groups.map(g => [g.key, this.rows.get(g.key) || this.row(g.key)]))
    for (const g of groups) {
      const { bar, cells, label, name } = this.rows.get(g.key), to = link(g.key)
      bar.setAttribute('width', 100 * g.total_count / most)
      this.columns.forEach(([, shown], i) => { cells[i].textContent = shown(g) })
      label.title = to ? `Only ${name}` : name
      if (to) label.setAttribute('href', to)
      else label.removeAttribute('href')
    }
    const nodes = [...this.rows.values()].map(r => r.node)
    this.table.hidden = this.csv.hidden = !nodes.length
    this.none.hidden = nodes.length > 0
    if (nodes.length === this.body.children.length && nodes.every((n, i) => n === this.body.children[i])) return
    const focused = document.activeElement
    this.body.replaceChildren(...nodes)
    if (this.body.contains(focused)) focused.focus()
  }

  row(key) {
    const name = visible(key) || 'none', label = element('a', {}, name)
    const bar = element('rect', { height: 1 }), cells = this.columns.map(() => element('td'))
    const node = element('tr', {}, element('th', { scope: 'row' }, label, element('svg', { class: 'bar', viewBox: '0 0 100 1', preserveAspectRatio: 'none', 'aria-hidden': 'true' }, bar)), ...cells)
    return { node, name, label, bar, cells }
  }
}
