// A page's sender: const track = sender('http://localhost:8080', 'WRITE_KEY'); track({event_name: 'view', user_id: 'u1', channel: 'web'})
function sender(url, key) {
  let queue = []
  const bulk = `${url}/api/v1/events/bulk?key=${encodeURIComponent(key)}`, text = events => new Blob([JSON.stringify({events})], {type: 'text/plain'})
  const take = n => text(queue.slice(0, n)).size < 60000 || n < 2 ? queue.splice(0, n) : take(n >> 1) // 64 KB leave a page that goes
  const flush = async () => {
    const events = take(100), body = text(events), post = {method: 'POST', keepalive: body.size < 60000, body}
    const [status, said] = events.length ? await fetch(bulk, post).then(async a => [a.status, await a.text()]).catch(() => [503]) : [202, '']
    if (status === 429 || status >= 500 || said.includes('"unavailable"')) queue = events.concat(queue) // by insert_id they are counted once
    else if (status !== 202) console.warn(`events were refused for good: ${status} ${said}`)
  }
  setInterval(flush, 1000)
  addEventListener('pagehide', () => { while (queue.length && navigator.sendBeacon(bulk, text(take(100)))); })
  return event => queue.push({timestamp: Math.floor(Date.now() / 1000), insert_id: `${Date.now()}-${Math.random()}`, ...event})
}
