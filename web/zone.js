// Time zones: when hours and days begin on the clocks of one, and how a moment reads there. Moments are Unix seconds. The API numbers
// hours and days by the same rules.

const day = 86400

export const browsers = Intl.DateTimeFormat().resolvedOptions().timeZone || 'UTC'

export class Zone {
  // A name that the browser does not know is a RangeError.
  constructor(name) {
    this.name = name
    const parts = { year: 'numeric', month: 'numeric', day: 'numeric', hour: 'numeric', minute: 'numeric', second: 'numeric' }
    this.clock = new Intl.DateTimeFormat('en-US', { ...parts, timeZone: name, hourCycle: 'h23' })
  }

  // offset is how many seconds the zone's clocks are ahead of UTC.
  offset(at) {
    const p = Object.fromEntries(this.clock.formatToParts(at * 1000).map(p => [p.type, +p.value]))
    return Date.UTC(p.year, p.month - 1, p.day, p.hour, p.minute, p.second) / 1000 - at
  }

  // begin is when a day begins, by its midnight in UTC. Clocks may skip midnight or show it twice, so both offsets around it are tried.
  begin(midnight) {
    const shows = at => Math.floor((at + this.offset(at)) / day) * day
    const tried = [midnight - day, midnight + day].map(near => midnight - this.offset(near))
    return Math.min(...tried.filter(at => shows(at) === midnight))
  }

  startOf(unit, at) {
    if (unit === 'minute') return at - at % 60
    const local = at + this.offset(at)
    return unit === 'hour' ? at - local % 3600 : this.begin(local - local % day)
  }

  // next is where the unit after the one that starts there begins.
  next(unit, start) {
    return unit === 'minute' ? start + 60 : unit === 'hour' ? this.startOf(unit, start + 3600) : this.days(start, 1)
  }

  // days is the start of a day some days later, or earlier: a day may have 23 to 25 hours, so noon is aimed at.
  days(start, n) {
    return this.startOf('day', start + n * day + day / 2)
  }

  // date is the day as a date field has it, and startOfDate its begin.
  date(at) {
    return new Date((at + this.offset(at)) * 1000).toISOString().slice(0, 10)
  }

  startOfDate(date) {
    return this.begin(Date.parse(`${date}T00:00Z`) / 1000)
  }

  // iso is the moment as RFC 3339 with the zone's offset.
  iso(at) {
    const offset = this.offset(at), minutes = Math.floor(Math.abs(offset) / 60), two = n => String(n).padStart(2, '0')
    return `${new Date((at + offset) * 1000).toISOString().slice(0, 19)}${offset < 0 ? '-' : '+'}${two(Math.floor(minutes / 60))}:${two(minutes % 60)}`
  }

  text(at, options) {
    return new Date(at * 1000).toLocaleString('en-GB', { ...options, timeZone: this.name })
  }
}
