// Sends COUNT events with Segment's client for browsers, from a page on another origin in headless Chromium. Usage:
// send.mjs URL KEY COUNT PAGE_PORT. The last 40 wait for a line on stdin and leave with the page.
import { createReadStream } from 'node:fs'
import { createServer } from 'node:http'
import { createRequire } from 'node:module'
import { join } from 'node:path'

const modules = join(process.env.CLIENTS, 'node_modules')
const require = createRequire(modules + '/')
const { default: chromium } = await import(join(modules, '@sparticuz/chromium/build/esm/index.js'))
const { default: puppeteer } = await import(require.resolve('puppeteer-core'))
const script = join(modules, '@segment/analytics-next/dist/umd/index.js')

const [url, key, count, port] = [process.argv[2], process.argv[3], Number(process.argv[4]), Number(process.argv[5])]
const last = 40
const settings = { integrations: { 'Segment.io': { apiKey: key, apiHost: url.replace('http://', '') + '/v1', protocol: 'http', deliveryStrategy: { strategy: 'batching', config: { size: 50, timeout: 300, maxRetries: 40 } } } } }
const page = `<script src="/analytics.js"></script><script>
  const analytics = AnalyticsNext.AnalyticsBrowser.load({ writeKey: ${JSON.stringify(key)}, cdnSettings: ${JSON.stringify(settings)} })
  const send = (i) => analytics.track('clients', { n: i, price: 1.5, nested: { list: [1, true, null] } }, { userId: 'u' + i % 50, context: { campaign: { name: 'c' + i % 7 } } })
</script>`
createServer((req, res) => {
  if (req.url === '/analytics.js') createReadStream(script).pipe(res)
  else res.setHeader('Content-Type', 'text/html').end(page)
}).listen(port, '127.0.0.1')

const browser = await puppeteer.launch({ args: chromium.args.filter((a) => a !== '--disable-web-security'), executablePath: await chromium.executablePath(), headless: 'shell' })
const tab = await browser.newPage()
await tab.goto(`http://127.0.0.1:${port}/`)
for (let i = 0; i < count - last; i++) {
  await tab.evaluate((i) => void send(i), i)
  if (i % 200 === 199) console.log(i + 1)
}
console.log(count - last)
await new Promise((resolve) => process.stdin.once('data', resolve))
await tab.evaluate(async (from, to) => { for (let i = from; i < to; i++) await send(i) }, count - last, count)
await tab.goto('about:blank')
console.log(count)
await new Promise((resolve) => process.stdin.once('data', resolve))
await browser.close()
process.exit(0) // stdin and the page's connection are still open
