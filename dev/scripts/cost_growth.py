"""How cost grows with the rate: CPU, freshness, inserts, parts and memory, as a table and a plot.

    make build bin/dev
    bin/dev -ephemeral -- python3 dev/scripts/cost_growth.py bin/event-ingestion [-seconds 30] [-rates 1000,2000,…] [-plot cost.svg]

Each rate runs open loop, in bulks of a twentieth of a second, against a program of its own on tables of its own. CPU is
what the program and ClickHouse used for an event, in µs; freshness is from the 202 to the answer that counts the event.
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
    url = f"http://127.0.0.1:{os.environ['CLICKHOUSE_HTTP_PORT']}/"
    return urllib.request.urlopen(url, data=query.encode()).read().decode().strip()


def clickhouse_pid():
    want = f"--http_port\0{os.environ['CLICKHOUSE_HTTP_PORT']}".encode()
    for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if want in path.read_bytes():
                return int(path.parent.name)
        except OSError:
            pass  # it has ended
    raise SystemExit("no ClickHouse: run this under bin/dev")


def cpu_seconds(pid):
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def metrics(admin):
    text = urllib.request.urlopen(f"http://{admin}/metrics").read().decode()
    return {m[1]: float(m[2]) for m in re.finditer(r"^([a-z_]+) ([0-9.e+]+)$", text, re.M)}


def measure(binary, rate, seconds, port):
    name = f"growth_{rate}_{os.getpid()}"
    admin = f"127.0.0.1:{port + 1}"
    env = dict(os.environ, SERVER_HOST="127.0.0.1", SERVER_PORT=str(port), ADMIN_ADDR=admin,
               CLICKHOUSE_DATABASE=name, KAFKA_TOPIC=name, KAFKA_CONSUMER_GROUP=name)
    program = subprocess.Popen([binary], env=env, stderr=subprocess.DEVNULL)
    try:
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ready")
                break
            except OSError:
                time.sleep(0.1)
        ch = clickhouse_pid()
        before = cpu_seconds(program.pid), cpu_seconds(ch), time.time()
        out = subprocess.run([binary, "load", "-url", f"http://127.0.0.1:{port}", "-rate", str(rate), "-duration", f"{seconds}s",
                              "-bulk", str(max(1, min(1000, rate // 20))), "-users", "100000", "-verify", "-json"],
                             capture_output=True, text=True)
        report = json.loads(out.stdout)
        took = time.time() - before[2]
        after = cpu_seconds(program.pid), cpu_seconds(ch)
        m = metrics(admin)
        n = report["accepted"]
        parts = int(clickhouse(f"SELECT count() FROM system.parts WHERE active AND database = '{name}'"))
        return {"events/s": rate, "stored": "all" if out.returncode == 0 else "NOT ALL",
                "program µs": (after[0] - before[0]) / n * 1e6, "ClickHouse µs": (after[1] - before[1]) / n * 1e6,
                "freshness p50 ms": report["freshness_ms"]["p50"], "freshness p99 ms": report["freshness_ms"]["p99"],
                "inserts/s": m["event_ingestion_inserts_total"] / took, "parts": parts,
                "resident MB": m["process_resident_memory_peak_bytes"] / 1e6}
    finally:
        program.send_signal(signal.SIGTERM)
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
    p.add_argument("-plot")
    p.add_argument("-port", type=int, default=21480)
    args = p.parse_args()
    rows = []
    for rate in map(int, args.rates.split(",")):
        rows.append(measure(args.binary, rate, args.seconds, args.port))
        if len(rows) == 1:
            print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
        print("| " + " | ".join(v if isinstance(v, str) else f"{v:.1f}" if isinstance(v, float) else f"{v:,}" for v in rows[-1].values()) + " |", flush=True)
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
