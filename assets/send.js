// A page's sender: const track = sender('http://localhost:8080', 'WRITE_KEY'); track({event_name: 'view', user_id: 'u1', channel: 'web'})
function sender(url, key) {
  let queue = []
  const bulk = `${url}/api/v1/events/bulk?key=${encodeURIComponent(key)}`, text = (events) => JSON.stringify({events})
  const flush = async () => {
    const events = queue.splice(0, 100)
    const answer = events.length && await fetch(bulk, {method: 'POST', keepalive: true, body: text(events)}).catch(() => null)
    const again = answer === null || answer && ([429, 503].includes(answer.status) || (await answer.text()).includes('"unavailable"'))
    if (again) queue = events.concat(queue) // by insert_id they are counted once, however often they are sent
  }
  setInterval(flush, 1000)
  addEventListener('pagehide', () => { while (queue.length) navigator.sendBeacon(bulk, text(queue.splice(0, 100))) })
  return (event) => queue.push({timestamp: Math.floor(Date.now() / 1000), insert_id: `${Date.now()}-${Math.random()}`, ...event})
}
