# send("http://localhost:8080", "KEY", [{"event_name": "view", "user_id": "u1"}]) returns when Kafka has the events, at most 1000.
import http.client, json, time, urllib.request, uuid
def send(url, key, events, pause=0.2):
    events = [{"timestamp": int(time.time()), "insert_id": str(uuid.uuid4()), **e} for e in events]  # once: sent again, it is the same event
    headers = {"Content-Type": "application/json", "X-API-Key": key}
    while True:
        try:
            request = urllib.request.Request(url + "/api/v1/events/bulk", json.dumps({"events": events}).encode(), headers)
            answer = json.load(urllib.request.urlopen(request, timeout=30))
            if not any(e["code"] == "unavailable" for e in answer["errors"]): return answer
        except (OSError, http.client.IncompleteRead, http.client.BadStatusLine) as e:  # no answer, a part of one, or one that says no
            code = getattr(e, "code", 503)
            if code != 429 and code < 500: e.msg = e.read().decode(); raise  # not valid, or the key is not
        time.sleep(pause)
        pause = min(2 * pause, 10)
