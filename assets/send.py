# send("http://localhost:8080", "KEY", [{"event_name": "view", "user_id": "u1"}]) returns when Kafka has the events, at most 1000.
import json, time, urllib.error, urllib.request, uuid
def send(url, key, events, pause=0.2):
    events = [{"timestamp": int(time.time()), "insert_id": str(uuid.uuid4()), **e} for e in events]  # once: sent again, it is the same event
    headers = {"Content-Type": "application/json", "X-API-Key": key}
    while True:
        try:
            request = urllib.request.Request(url + "/api/v1/events/bulk", json.dumps({"events": events}).encode(), headers)
            answer = json.load(urllib.request.urlopen(request, timeout=30))
            if not any(e["code"] == "unavailable" for e in answer["errors"]): return answer
        except OSError as e:  # no answer, or one that says no
            if getattr(e, "code", 503) not in (429, 503): raise
        time.sleep(pause)
        pause = min(2 * pause, 10)
