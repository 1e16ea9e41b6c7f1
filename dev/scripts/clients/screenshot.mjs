// Takes the picture of the dashboard that README.md shows. Usage: screenshot.mjs URL FILE.png
import { createRequire } from 'node:module'
import { join } from 'node:path'

const modules = join(process.env.CLIENTS, 'node_modules')
const { default: chromium } = await import(join(modules, '@sparticuz/chromium/build/esm/index.js'))
const { default: puppeteer } = await import(createRequire(modules + '/').resolve('puppeteer-core'))
const [url, path] = process.argv.slice(2)
const browser = await puppeteer.launch({ args: chromium.args, executablePath: await chromium.executablePath(), headless: 'shell' })
const tab = await browser.newPage()
await tab.setViewport({ width: 1280, height: 600 })
await tab.goto(url)
await tab.waitForFunction(() => document.querySelectorAll('#totals b').length === 5 && document.querySelector('#pipeline .spark path') && document.querySelector('#charts path.before') &&
  document.querySelector('#breakdown tbody td') && document.querySelector('#events tbody td'))
await tab.screenshot({ path, fullPage: true })
await browser.close()
