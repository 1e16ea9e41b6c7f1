// A page's sender: const track = sender('http://localhost:8080', 'WRITE_KEY'); track({event_name: 'view', user_id: 'u1', channel: 'web'})
function sender(url, key, queue = [], pause = 500, told = false) {
  const bulk = `${url}/api/v1/events/bulk?key=${encodeURIComponent(key)}`, text = events => new Blob([JSON.stringify({events})], {type: 'text/plain'})
  const take = n => text(queue.slice(0, n)).size < 60000 || n < 2 ? queue.splice(0, n) : take(n >> 1) // 64 KB leave a page that goes
  const flush = async () => {
    const events = take(100), body = text(events), post = {method: 'POST', keepalive: body.size < 60000, body}
    const [status, said] = events.length ? await fetch(bulk, post).then(async a => [a.status, await a.text()]).catch(() => [0, 'no answer: CORS_ORIGINS may lack this page']) : [202, '']
    const again = status === 0 || status === 429 || status >= 500 || said.includes('"code":"unavailable"') // by insert_id they are counted once
    if (status !== 202 && !(again && told)) console.warn(`events ${again ? 'wait' : 'were refused for good'}: ${status} ${said}`)
    if (told = again) queue = events.concat(queue)
    setTimeout(flush, pause = again ? Math.min(2 * pause, 60000) : 500)
  }
  flush(addEventListener('pagehide', () => { while (queue.length && navigator.sendBeacon(bulk, text(take(100)))); }))
  return event => queue.length < 10000 && queue.push({timestamp: Math.floor(Date.now() / 1000), insert_id: `${Date.now()}-${Math.random()}`, ...event})
}
