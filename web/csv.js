// CSV of what a chart or a list shows: RFC 4180, in UTF-8, with a line of names.
import { element, visible } from './draw.js'

// A text that a spreadsheet would take for a formula gets an apostrophe before it: whoever sends events chooses what it says.
const cell = value => {
  let text = visible(String(value ?? ''))
  if (typeof value === 'string' && /^[=+\-@]/.test(text) && !/^[+-]?[\d.]+$/.test(text)) text = `'${text}`
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text
}

export const csv = rows => rows.map(row => row.map(cell).join(',') + '\r\n').join('')

// csvButton saves what rows returns at the moment, under that name.
export function csvButton(title, rows) {
  const button = element('button', { type: 'button', class: 'quiet', 'aria-label': `CSV of ${title}` }, 'CSV')
  button.addEventListener('click', () => {
    const url = URL.createObjectURL(new Blob([csv(rows())], { type: 'text/csv' }))
    element('a', { href: url, download: `${title.toLowerCase().replaceAll(/[^a-z0-9]+/g, '-')}.csv` }).click()
    setTimeout(() => URL.revokeObjectURL(url), 60_000) // the browser has begun to save it by then
  })
  return button
}
