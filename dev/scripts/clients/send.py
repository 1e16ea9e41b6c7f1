"""Sends COUNT events with Segment's client for Python. Usage: send.py URL KEY COUNT. Ends with 1 when the client gave one up."""

import sys
import time

import segment.analytics as analytics

url, key, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
given_up = []
analytics.write_key, analytics.host, analytics.gzip = key, url, True
analytics.max_retries = 20
analytics.on_error = lambda error, items: given_up.append((error, len(items)))

for i in range(count):
    analytics.track(f"u{i % 50}", "clients", {"n": i, "price": 1.5, "nested": {"list": [1, True, None]}}, context={"campaign": {"name": f"c{i % 7}"}})
    if i % 200 == 199:
        print(i + 1, flush=True)
        time.sleep(0.2)
analytics.shutdown()
sys.exit(f"given up: {given_up}" if given_up else 0)
