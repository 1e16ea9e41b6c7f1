// Sends COUNT events with Segment's client for Node. Usage: send.cjs URL KEY COUNT. Ends with 1 when the client gave one up.
const { Analytics } = require('@segment/analytics-node')

const [url, key, count] = [process.argv[2], process.argv[3], Number(process.argv[4])]
const analytics = new Analytics({ writeKey: key, host: url, maxRetries: 30, flushAt: 50, flushInterval: 500 })
const givenUp = []
analytics.on('error', (error) => givenUp.push(error))

async function main() {
  for (let i = 0; i < count; i++) {
    analytics.track({ userId: `u${i % 50}`, event: 'clients', properties: { n: i, price: 1.5, nested: { list: [1, true, null] } }, context: { campaign: { name: `c${i % 7}` } } })
    if (i % 200 === 199) {
      console.log(i + 1)
      await new Promise((resolve) => setTimeout(resolve, 200))
    }
  }
  await analytics.closeAndFlush({ timeout: 120000 })
  if (givenUp.length > 0) {
    console.error('given up:', givenUp)
    process.exit(1)
  }
}
main()
