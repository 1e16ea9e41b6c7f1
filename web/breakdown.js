// Breakdown is one event by the values of a property, a tag, a campaign or the channel, with users and the sum of a property. It reads raw
// events, so it is asked when it is wanted, and then seldom.
import { element, number, visible } from './draw.js'
import { membersOf } from './events.js'
import { List } from './list.js'
import { filtering, isMember, memberPrefix } from './view.js'

const words = ['channel', 'campaign', 'tag']
const mostPaths = 200
const decimal = new Intl.NumberFormat('en', { maximumFractionDigits: 18 })
const textOf = sum => sum?.rawJSON ?? String(sum ?? 0) // an exact decimal, which a number may not hold

// pathOf and wordOf turn what the reader writes into the API's word and back: what is none of the words is a property.
const pathOf = text => !text || words.includes(text) || isMember(text) ? text : memberPrefix + text
const wordOf = path => isMember(path) && !words.includes(path.slice(memberPrefix.length)) ? path.slice(memberPrefix.length) : path

export class Breakdown {
  // go leads to the view with some changes, again asks anew.
  constructor(node, go, again) {
    Object.assign(this, { node, paths: new Map(), offered: -1 })
    const field = (name, label, placeholder) => {
      const input = element('input', { type: 'search', name, list: `${name}-paths`, placeholder, maxlength: 300, autocomplete: 'off', size: 22 })
      return [input, element('label', {}, label, ' ', input, element('datalist', { id: `${name}-paths` }))]
    }
    const [by, byLabel] = field('by', 'Break down by', 'campaign, tag, a property'), [sum, sumLabel] = field('sum', 'with the sum of', 'a property')
    this.again = element('button', { type: 'button', class: 'quiet' }, 'Ask again')
    this.again.addEventListener('click', again)
    this.form = element('form', { 'aria-label': 'Breakdown' }, byLabel, sumLabel, this.again)
    Object.assign(this, { by, sum, result: element('div'), total: element('p', { class: 'soft' }), said: element('p', { class: 'soft', role: 'status' }) })
    const choose = () => go({ by: pathOf(by.value), sum: sum.value && !isMember(sum.value) ? memberPrefix + sum.value : sum.value })
    this.form.addEventListener('submit', e => { e.preventDefault(); choose() })
    this.form.addEventListener('change', choose)
    for (const input of [by, sum]) input.addEventListener('search', choose) // also when it is cleared
    node.append(this.form, this.result, this.total, this.said)
    this.offer([])
  }

  // look brings the form to the view; what is being typed stays.
  look(view) {
    if (document.activeElement !== this.by) this.by.value = wordOf(view.by)
    if (document.activeElement !== this.sum) this.sum.value = view.sum.slice(memberPrefix.length)
    this.again.hidden = !view.by
    if (!view.by) this.clear('')
  }

  // clear takes the last answer away, and says why.
  clear(text) {
    this.result.replaceChildren()
    this.total.textContent = this.about = ''
    this.say(text)
  }

  // offer has the fields name what the events that were seen have.
  offer(events) {
    for (const [path, value] of events.flatMap(e => membersOf(e.metadata))) {
      const isNumber = typeof value === 'number' || !!value?.rawJSON
      if (this.paths.size < mostPaths) this.paths.set(path, this.paths.get(path) || isNumber)
    }
    if (this.paths.size === this.offered) return // a list may be open
    this.offered = this.paths.size
    const option = value => element('option', { value })
    this.form.querySelector('#by-paths').replaceChildren(...words.map(option), ...[...this.paths.keys()].map(wordOf).map(option))
    this.form.querySelector('#sum-paths').replaceChildren(...[...this.paths].filter(([, isNumber]) => isNumber).map(([path]) => option(path.slice(memberPrefix.length))))
  }

  // show draws the answer to what about describes, of an event, as of a time.
  show(answer, about, event_name, view, at) {
    Object.assign(this, { answer, about, view })
    const kind = `${view.by} ${view.sum}`
    if (this.kind !== kind) {
      const columns = [['Events', g => number.format(g.total_count), g => g.total_count], ['Users', g => number.format(g.unique_users), g => g.unique_users]]
      if (view.sum) columns.push([`Sum of ${visible(view.sum.slice(memberPrefix.length))}`, g => decimal.format(textOf(g.sum)), g => textOf(g.sum)])
      this.list = new List(visible(wordOf(view.by)), columns)
      this.list.node.className = ''
      this.list.node.insertBefore(element('div', { class: 'scroll', tabindex: 0, role: 'region', 'aria-label': 'Groups' }, this.list.table), this.list.none)
      this.kind = kind
    }
    const groups = answer.grouped_data
    this.list.title.textContent = `${visible(event_name)} by ${visible(wordOf(view.by))}`
    const field = { campaign: 'campaign_id' }[view.by] || view.by
    this.list.show(groups, `${answer.truncated ? 'the 1,000 largest values' : `${number.format(groups.length)} values`}, as of ${at}`,
      key => key || isMember(field) ? filtering(view, { event_name, [field]: key }) : undefined)
    if (this.result.firstChild !== this.list.node) this.result.replaceChildren(this.list.node)
    const total = `${number.format(answer.total_count)} events of ${number.format(answer.unique_users)} users`
    this.total.textContent = total + (view.sum ? `, the sum is ${decimal.format(textOf(answer.sum))}` : '')
    this.say('')
  }

  say(text) {
    if (this.said.textContent !== text) this.said.textContent = text
  }
}
