// A headless Chromium that looks at the dashboard page, and what its scripts have in common. What is wrong is collected: finish says it
// on stderr, and ends with 1.
import { readFile } from 'node:fs/promises'
import { createRequire } from 'node:module'
import { join } from 'node:path'
import { createInterface } from 'node:readline'

const modules = join(process.env.CLIENTS, 'node_modules')
const require = createRequire(modules + '/')
const { default: chromium } = await import(join(modules, '@sparticuz/chromium/build/esm/index.js'))
const { default: puppeteer } = await import(require.resolve('puppeteer-core'))
const axe = await readFile(join(modules, 'axe-core/axe.min.js'), 'utf8')
const patience = 90_000 // ms: after a slow answer the page pauses for up to 60 s

const executablePath = await chromium.executablePath(), all = []
// launch starts a browser. One has one process, and so one time zone.
export async function launch() {
  const browser = await puppeteer.launch({ args: chromium.args, executablePath, headless: 'shell' })
  all.push(browser)
  return browser
}
export const wrong = []
export const check = (what, ok) => { if (!ok) wrong.push(what) }

const lines = createInterface({ input: process.stdin })[Symbol.asyncIterator]()
// ask says a step on stdout, and waits for a line on stdin until the test has done its part.
export const ask = async step => { console.log(step); await lines.next() }

export async function finish() {
  for (const browser of all) await browser.close()
  for (const w of wrong) console.error(w)
  process.exit(wrong.length ? 1 : 0)
}

// open returns a new tab and what is done there. While isRefused is set, the test has taken something away, and the browser says so on
// its console.
export async function open(url, browser) {
  const tab = await browser.newPage(), it = { tab, isRefused: false }
  tab.on('console', m => { if (m.type() === 'error' && !it.isRefused) wrong.push('console: ' + m.text()) })
  tab.on('pageerror', e => wrong.push('script: ' + e.message))
  tab.on('request', r => { if (!r.url().startsWith(url) && !/^(data|blob):/.test(r.url())) wrong.push('a request to ' + r.url()) })
  it.text = selector => tab.$eval(selector, e => e.textContent)
  it.hidden = id => tab.$eval('#' + id, e => e.hidden)
  it.until = (what, condition, ...args) => tab.waitForFunction(condition, { timeout: patience }, ...args).catch(() => { throw new Error('never ' + what) })
  // look has axe look at the page in a width and a scheme.
  it.look = async (width, scheme) => {
    await tab.emulateMediaFeatures([{ name: 'prefers-color-scheme', value: scheme }])
    await tab.setViewport({ width, height: 900 })
    await it.until(`drew its charts ${width} px wide`, () => [...document.querySelectorAll('#charts .plot')].every(p => !p.clientWidth || +p.firstChild?.getAttribute('width') === p.clientWidth))
    check(`${width} px: the page is wider than its window`, await tab.evaluate(() => document.documentElement.scrollWidth <= innerWidth))
    check(`${width} px: a number does not fit its card`, await tab.evaluate(() => [...document.querySelectorAll('#totals b')].every(b => b.scrollWidth <= b.clientWidth)))
    if (!await tab.evaluate(() => 'axe' in window)) await tab.evaluate(axe)
    const found = await tab.evaluate(() => window.axe.run())
    for (const v of found.violations) wrong.push(`${width} px, ${scheme}: ${v.id}: ${v.nodes.map(n => n.target).join(' ')}: ${v.help}`)
  }
  return it
}
