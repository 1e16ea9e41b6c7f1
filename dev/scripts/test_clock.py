#!/usr/bin/env python3
"""The program's tests at other hours: make test-clock.

Each CLOCK is a start in UTC: HH:MM today, MM-DDTHH:MM this year, month-end or month-start (the last and the first minutes of
a month), or +SECONDS and -SECONDS from now. The tests and the program run with a copy of the standard library's time.go
whose Now adds CLOCK_SHIFT seconds. The stack around them, ClickHouse's now() with it, keeps the machine's clock.

usage: test_clock.py CLOCK… [-- FLAGS of go test]
"""

import datetime
import json
import os
import subprocess
import sys
import tempfile
import time

READS_CLOCK = "func Now() Time {\n\tsec, nsec, mono := runtimeNow()\n"
SHIFTS_CLOCK = READS_CLOCK + "\tsec += clockShift\n"
IMPORTS = 'import (\n'
DECLARES = """
var clockShift = func() int64 {
	s, _ := syscall.Getenv("CLOCK_SHIFT")
	n, err := atoi(s)
	if err != nil {
		return 0
	}
	return int64(n)
}()
"""


def overlay(directory):
    """Writes the copy of time.go, and returns the file that tells go of it."""
    goroot = subprocess.check_output(["go", "env", "GOROOT"], text=True).strip()
    original = os.path.join(goroot, "src", "time", "time.go")
    with open(original) as f:
        text = f.read()
    for what in READS_CLOCK, IMPORTS:
        if text.count(what) != 1:
            sys.exit(f"{original} reads the clock in another way: {what!r} is not in it once")
    text = text.replace(READS_CLOCK, SHIFTS_CLOCK).replace(IMPORTS, IMPORTS + '\t"syscall"\n') + DECLARES
    copy, table = os.path.join(directory, "time.go"), os.path.join(directory, "overlay.json")
    with open(copy, "w") as f:
        f.write(text)
    with open(table, "w") as f:
        json.dump({"Replace": {original: copy}}, f)
    return table


def start_of(clock, now):
    """The time at which the tests believe to begin."""
    if clock[0] in "+-":
        return now + datetime.timedelta(seconds=int(clock))
    month = now.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    if clock == "month-start":
        return month + datetime.timedelta(seconds=20)
    if clock == "month-end":
        return (month + datetime.timedelta(days=32)).replace(day=1) - datetime.timedelta(minutes=3)
    date, _, hour = clock.rpartition("T")
    hour = datetime.time.fromisoformat(hour)
    day = datetime.date.fromisoformat(f"{now.year}-{date}") if date else now.date()
    return datetime.datetime.combine(day, hour, now.tzinfo)


def main():
    clocks, flags = sys.argv[1:], []
    if "--" in clocks:
        at = clocks.index("--")
        clocks, flags = clocks[:at], clocks[at + 1:]
    results = []
    with tempfile.TemporaryDirectory() as directory:
        table = overlay(directory)
        for clock in clocks:
            # In GOFLAGS, so that what the tests build has it, too.
            env = dict(os.environ, GOFLAGS=f"{os.environ.get('GOFLAGS', '')} -overlay={table}".strip())
            subprocess.run(["go", "test", "-race", "-run", "^$", ".", "./test"], env=env, check=True)  # built before the clock starts
            now = datetime.datetime.now(datetime.timezone.utc)
            start = start_of(clock, now)
            env["CLOCK_SHIFT"] = str(round((start - now).total_seconds()))
            print(f"--- {clock}: from {start:%Y-%m-%d %H:%M:%S} UTC, CLOCK_SHIFT={env['CLOCK_SHIFT']}", flush=True)
            began = time.monotonic()
            code = subprocess.run(["bin/dev", "-ephemeral", "--", "go", "test", "-race", "-count=1", "-parallel", "6", "-timeout", "20m", *flags, ".", "./test"], env=env).returncode
            results.append((clock, f"{start:%Y-%m-%d %H:%M:%S}", "ok" if code == 0 else "FAIL", f"{time.monotonic() - began:.0f} s"))
    for line in results:
        print("{:12} {}  {:4} {}".format(*line))
    sys.exit(any(line[2] == "FAIL" for line in results))


if __name__ == "__main__":
    main()
