// Events is the list of the newest events, with a row's JSON. A row stays while others come in, and so does the focus. Everything in it
// was made up by whoever sends events: it is text, and shown by visible.
import { isObject, now, textOfValue } from './ask.js'
import { csvButton } from './csv.js'
import { element, number, visible } from './draw.js'
import { addressOf, filtering, memberPrefix } from './view.js'

const columns = [['event_name', 'Event'], ['user_id', 'User'], ['channel', 'Channel'], ['campaign_id', 'Campaign']]
const deepest = 3, mostMembers = 30, mostShown = 60 // of metadata, that an event leads to, and of a value's characters

// membersOf are the members of metadata that are no objects, by their paths.
export function membersOf(metadata, prefix = memberPrefix, depth = 1) {
  return !isObject(metadata) ? [] : Object.entries(metadata).flatMap(([name, value]) => {
    const path = prefix + name.replace(/[\\.]/g, '\\$&')
    if (!name || value === null) return []
    return !isObject(value) ? [[path, value]] : depth < deepest ? membersOf(value, `${path}.`, depth + 1) : []
  })
}

export const jsonOf = event => JSON.stringify(event, null, 2).split('\n').map(visible).join('\n')

export class Events {
  // go leads to the view with some changes.
  constructor(node, go) {
    Object.assign(this, { node, go, rows: new Map(), page: { events: [] } })
    this.note = element('small')
    this.pause = element('button', { type: 'button', class: 'quiet', id: 'pause' })
    this.pause.addEventListener('click', () => go(this.isPaused() ? { until: '', before: '', row: '' } : { until: String(now()) }))
    this.older = element('a', { id: 'older' }, 'Older events')
    this.said = element('p', { class: 'soft', role: 'status' })
    this.body = element('tbody')
    this.csv = csvButton('Latest events', () => this.asRows())
    const heads = [['time', 'Time'], ...columns].map(([field, name]) => element('th', { scope: 'col', class: field }, name))
    this.table = element('table', {}, element('thead', {}, element('tr', {}, ...heads)), this.body)
    node.append(element('div', { class: 'head' }, element('h2', {}, 'Latest events ', this.note), this.pause, this.csv),
      element('div', { class: 'scroll', tabindex: 0, role: 'region', 'aria-label': 'Events' }, this.table), this.said, this.older)
  }

  // asRows is the page for CSV.
  asRows() {
    const fields = columns.map(([field]) => field), json = value => value === undefined ? '' : JSON.stringify(value)
    return [['time', ...fields, 'tags', 'metadata', 'event_id'],
      ...this.page.events.map(e => [this.zone.iso(e.timestamp), ...fields.map(field => e[field]), json(e.tags), json(e.metadata), e.event_id])]
  }

  isPaused() {
    return !!(this.view.until || this.view.before)
  }

  // show draws a page of events as the view has it.
  show(page, view, zone) {
    Object.assign(this, { page, view, zone })
    this.pause.textContent = this.isPaused() ? 'Go on' : 'Pause'
    this.note.textContent = !this.isPaused() ? '' : view.before ? 'paused, further back' : `paused at ${this.time(+view.until)}`
    this.rows = new Map(page.events.map(e => [e.event_id, this.rows.get(e.event_id) || this.row(e)]))
    const nodes = [...this.rows.values()].flatMap(row => this.showRow(row))
    if (nodes.length !== this.body.children.length || nodes.some((n, i) => n !== this.body.children[i])) {
      const focused = document.activeElement
      this.body.replaceChildren(...nodes)
      if (this.body.contains(focused)) focused.focus({ preventScroll: true })
      else this.body.querySelector('[aria-expanded=true]')?.scrollIntoView({ block: 'nearest' }) // which the address names
    }
    this.table.hidden = this.csv.hidden = !page.events.length
    const isPicked = page.searched > 0, found = number.format(page.events.length)
    this.say(isPicked ? `${found} of ${number.format(page.searched)} events have what the filters name` : page.events.length ? '' : 'none in this range')
    this.older.hidden = !page.next
    this.older.href = addressOf(view, { until: view.until || String(now()), before: page.next, row: '' })
  }

  // say is what is wrong, or what there is instead of events.
  say(text) {
    if (this.said.textContent !== text) this.said.textContent = text
  }

  time(at) {
    return this.zone.text(at, { month: 'short', day: 'numeric', hour: '2-digit', minute: '2-digit', second: '2-digit' })
  }

  row(event) {
    const open = element('button', { type: 'button', class: 'open', title: 'The event as JSON' })
    open.addEventListener('click', () => { // and pauses: what is read does not move
      this.go({ until: this.view.until || String(now()), row: this.view.row === event.event_id ? '' : event.event_id })
    })
    const links = [], cells = columns.map(([field]) => {
      if (!event[field]) return element('td', { class: field })
      const name = visible(event[field]), link = element('a', { title: `Only ${name}` }, name)
      links.push([link, { [field]: event[field] }])
      return element('td', { class: field }, link)
    })
    return { event, open, links, node: element('tr', {}, element('th', { scope: 'row', class: 'time' }, open), ...cells), detail: null }
  }

  // showRow brings a row to the view, and returns it with what is below it when it is open.
  showRow(row) {
    const isOpen = this.view.row === row.event.event_id
    if (isOpen && !row.detail) this.detail(row)
    row.open.textContent = this.time(row.event.timestamp)
    row.open.setAttribute('aria-expanded', isOpen)
    for (const [link, changes] of row.links) link.href = filtering(this.view, changes)
    return isOpen ? [row.node, row.detail] : [row.node]
  }

  // detail is an event as it is stored, with the ways to those that have the same tag or member.
  detail(row) {
    const { event } = row, json = element('pre', { tabindex: 0, role: 'region', 'aria-label': 'The event as JSON' }, jsonOf(event))
    const copy = element('button', { type: 'button', class: 'quiet' }, 'Copy'), below = element('p', {}, copy)
    copy.addEventListener('click', () => {
      navigator.clipboard.writeText(JSON.stringify(event, null, 2)).then(() => { copy.textContent = 'Copied' }, () => getSelection().selectAllChildren(json))
    })
    const tags = (event.tags || []).map(tag => ['tag', 'tag', tag])
    const members = membersOf(event.metadata).slice(0, mostMembers).map(([path, value]) => [path, path.slice(memberPrefix.length), textOfValue(value)])
    for (const [field, name, value] of [...tags, ...members]) {
      const link = element('a', {}, `${visible(name)} = ${visible(value).slice(0, mostShown)}`)
      row.links.push([link, { event_name: event.event_name, [field]: value }])
      below.append(below.children.length === 1 ? ' Only those with ' : ' ', link)
    }
    row.detail = element('tr', { class: 'detail' }, element('td', { colspan: columns.length + 1 }, json, below))
  }
}
