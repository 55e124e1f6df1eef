"""`helm test`: one synthetic page on its way, from a run to the server and to every Alertmanager the server tells.

Runs in the server's image as ``python -c``, so it needs nothing but the standard library. Its Pod gives it
OPTWATCH_SERVER, OPTWATCH_ALERTMANAGER_URL (comma separated, may be empty) and ALERT_SECONDS.
"""

import json
import os
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid

# Straight to the addresses given: a proxy of the node has no part in the way that is tested.
direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def ask(url, body=None):
    """GET, or POST where there is a body; the JSON of the answer. Ends the test with what was wrong."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})  # noqa: S310 - from the chart
    try:
        with direct.open(request, timeout=10) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        sys.exit(f"FAILED: {url} answered {error.code}: {error.read(2000).decode(errors='replace')}")
    except (OSError, ValueError) as error:
        sys.exit(f"FAILED: {url} cannot be used: {error}")


server = os.environ["OPTWATCH_SERVER"]
alertmanagers = [url.strip().rstrip("/") for url in os.environ["OPTWATCH_ALERTMANAGER_URL"].split(",") if url.strip()]
run_id = f"helm-test-{uuid.uuid4().hex[:12]}"
run = {"schema": 1, "id": run_id, "name": "helm test", "project": "helm-test", "started_at": time.time()}
event = {
    "id": str(uuid.uuid4()),
    "run_id": run_id,
    "kind": "nonfinite",
    "severity": "critical",
    "occurred_at": time.time(),
    "summary": "A synthetic page of `helm test`: nothing is wrong, and nothing has to be done.",
    "runbook": "TrainingNonFinite",
}

ask(f"{server}/api/v1/runs", run)
answer = ask(f"{server}/api/v1/events", {"schema": 1, "events": [event]})
if answer["accepted"] != 1:
    sys.exit(f"FAILED: the server did not keep the event: {answer}")
seen = ask(f"{server}/api/v1/runs/{run_id}/events")["events"]
if [found["id"] for found in seen] != [event["id"]]:
    sys.exit(f"FAILED: the event was accepted and is not among those of its run: {seen}")
print(f"the server has run {run_id} and its event: {server}/runs/{run_id}", flush=True)

deadline = time.monotonic() + float(os.environ["ALERT_SECONDS"])
wanted = urllib.parse.quote(f'run_id="{run_id}"')
for url in alertmanagers:
    while not (alerts := ask(f"{url}/api/v2/alerts?filter={wanted}")):
        if time.monotonic() > deadline:
            sys.exit(f"FAILED: {url} has no alert of the run after {os.environ['ALERT_SECONDS']} s")
        time.sleep(0.5)
    print(f"{url} has {alerts[0]['labels']['alertname']}", flush=True)
if not alertmanagers:
    print("alertmanagerUrls is empty: the way from the server to a person was not tested", flush=True)

# Else it would be called lost in half a minute, and page once more.
ask(f"{server}/api/v1/runs/{run_id}/finish", {"schema": 1, "status": "cancelled", "reason": "end of helm test"})
