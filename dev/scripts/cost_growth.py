"""How cost grows with the rate, shards and instances: CPU, freshness, inserts, parts and memory, as a table and a plot.

    make build bin/dev
    bin/dev -ephemeral -- python3 dev/scripts/cost_growth.py bin/event-ingestion [-seconds 30] [-rates 1000,2000,…] [-plot cost.svg]
    bin/dev -ephemeral -shards 3 -- python3 dev/scripts/cost_growth.py bin/event-ingestion -rates 20000,0 -instances 1,2,3

Each rate runs open loop, in bulks of a twentieth of a second, against instances of the program on tables of their own; rate 0
is as fast as it goes, in bulks of 1000. CPU is what all instances and all ClickHouse servers used for an event, in µs; freshness
is from the 202 to the answer that counts the event.
"""

import argparse
import json
import os
import pathlib
import re
import signal
import subprocess
import time
import urllib.request


def clickhouse(query):
    """Asks each server, and returns the answers."""
    return [urllib.request.urlopen(f"http://127.0.0.1:{port}/", data=query.encode()).read().decode().strip()
            for port in os.environ["CLICKHOUSE_HTTP_PORT"].split(",")]


def clickhouse_pids():
    pids = []
    for port in os.environ["CLICKHOUSE_HTTP_PORT"].split(","):
        want = f"--http_port\0{port}".encode()
        for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
            try:
                if want in path.read_bytes():
                    pids.append(int(path.parent.name))
                    break
            except OSError:
                pass  # it has ended
        else:
            raise SystemExit("no ClickHouse: run this under bin/dev")
    return pids


def cpu_seconds(pids):
    total = 0
    for pid in pids:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()
        total += int(fields[11]) + int(fields[12])
    return total / os.sysconf("SC_CLK_TCK")


def metrics(ports):
    """The sums over all instances."""
    sums = {}
    for port in ports:
        text = urllib.request.urlopen(f"http://127.0.0.1:{port + 1}/metrics").read().decode()
        for m in re.finditer(r"^([a-z_]+) ([0-9.e+]+)$", text, re.M):
            sums[m[1]] = sums.get(m[1], 0) + float(m[2])
    return sums


def await_true(url, true):
    while True:
        try:
            if true(json.load(urllib.request.urlopen(url))):
                return
        except OSError:
            pass
        time.sleep(0.02)


def measure(binary, rate, seconds, port, instances):
    name = f"growth_{rate}_{instances}_{os.getpid()}"
    ports = [port + 2 * i for i in range(instances)]
    programs = [subprocess.Popen([binary], stderr=subprocess.DEVNULL, env=dict(
        os.environ, SERVER_HOST="127.0.0.1", SERVER_PORT=str(p), ADMIN_ADDR=f"127.0.0.1:{p + 1}", MAX_IN_FLIGHT_BYTES_PER_CLIENT="0",
        CLICKHOUSE_DATABASE=name, KAFKA_TOPIC=name, KAFKA_CONSUMER_GROUP=name)) for p in ports]
    pids = [p.pid for p in programs]
    try:
        for p in ports:
            await_true(f"http://127.0.0.1:{p}/ready", lambda answer: answer["status"] == "ready")
        ch = clickhouse_pids()
        before = cpu_seconds(pids), cpu_seconds(ch), time.time()
        out = subprocess.run([binary, "load", "-url", f"http://127.0.0.1:{port}", "-rate", str(rate), "-duration", f"{seconds}s",
                              "-bulk", str(max(1, min(1000, rate // 20)) if rate else 1000), "-users", "100000", "-verify", "-json"],
                             capture_output=True, text=True)
        report = json.loads(out.stdout)
        took = time.time() - before[2]
        after = cpu_seconds(pids), cpu_seconds(ch)
        m = metrics(ports)
        n = report["accepted"]
        parts = sum(map(int, clickhouse(f"SELECT count() FROM system.parts WHERE active AND database = '{name}'")))
        return {"shards": len(ch), "instances": instances, "events/s": rate or int(n / took), "stored": "all" if out.returncode == 0 else "NOT ALL",
                "program µs": (after[0] - before[0]) / n * 1e6, "ClickHouse µs": (after[1] - before[1]) / n * 1e6,
                "freshness p50 ms": report["freshness_ms"]["p50"], "freshness p99 ms": report["freshness_ms"]["p99"],
                "inserts/s": m["event_ingestion_inserts_total"] / took, "parts": parts,
                "resident MB": m["process_resident_memory_peak_bytes"] / 1e6}
    finally:
        for program in programs:
            program.send_signal(signal.SIGTERM)
        for program in programs:
            program.wait()
        clickhouse(f"DROP DATABASE IF EXISTS {name}")


def plot(rows, path):
    """Writes an SVG: each column over the rate, both on logarithmic axes, each curve scaled to its own largest value."""
    import math
    columns = ["program µs", "ClickHouse µs", "freshness p99 ms", "inserts/s", "resident MB"]
    colours = ["#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed"]
    low, high = math.log(rows[0]["events/s"]), math.log(rows[-1]["events/s"])
    parts = ['<svg xmlns="http://www.w3.org/2000/svg" width="760" height="420" font-family="sans-serif" font-size="12">',
             '<rect width="760" height="420" fill="white"/>']
    for row in rows:
        x = 60 + 500 * (math.log(row["events/s"]) - low) / (high - low)
        parts.append(f'<line x1="{x:.0f}" y1="20" x2="{x:.0f}" y2="380" stroke="#ddd"/><text x="{x:.0f}" y="398" text-anchor="middle">{row["events/s"]:,}</text>')
    for i, (column, colour) in enumerate(zip(columns, colours)):
        top = max(row[column] for row in rows)
        points = " ".join(f'{60 + 500 * (math.log(row["events/s"]) - low) / (high - low):.0f},{380 - 350 * row[column] / top:.0f}' for row in rows)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<text x="580" y="{40 + 20 * i}" fill="{colour}">{column}, at most {top:.0f}</text>')
    parts.append('<text x="310" y="415" text-anchor="middle">events a second</text></svg>')
    pathlib.Path(path).write_text("\n".join(parts))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("binary")
    p.add_argument("-seconds", type=int, default=30)
    p.add_argument("-rates", default="1000,2000,5000,10000,20000,40000")
    p.add_argument("-instances", default="1")
    p.add_argument("-plot")
    p.add_argument("-port", type=int, default=21480)
    args = p.parse_args()
    rows = []
    for rate, instances in ((int(r), int(i)) for r in args.rates.split(",") for i in args.instances.split(",")):
        rows.append(measure(args.binary, rate, args.seconds, args.port, instances))
        if len(rows) == 1:
            print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
        print("| " + " | ".join(v if isinstance(v, str) else f"{v:.1f}" if isinstance(v, float) else f"{v:,}" for v in rows[-1].values()) + " |", flush=True)
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
