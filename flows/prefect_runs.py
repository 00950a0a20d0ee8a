"""What the Prefect server of `errata up` has been doing, over HTTP: without Prefect's client, which takes seconds to import."""

import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any

from errata.errors import ErrataError
from flows.children import open_local

_PATIENCE = 10.0
"""Seconds for an answer."""
_PAUSES = (0.5, 1.0, 2.0, 4.0)
"""Seconds between tries while the server is busy."""
_WARNING = 30
_SHOWN = ("RUNNING", "COMPLETED", "FAILED", "CRASHED", "CANCELLED")


def call_server(api: str, method: str, path: str, body: Any = None) -> Any:
    """One request, and its answer's JSON.

    Raises:
        OSError: no answer, or a refusal.
    """
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{api}/{path}", data, {"Content-Type": "application/json"}, method=method)
    for pause in (*_PAUSES, None):
        try:
            answer = open_local(request, _PATIENCE)
            break
        except urllib.error.HTTPError as error:
            if error.code == HTTPStatus.NOT_FOUND and method == "DELETE":
                return None
            if error.code != HTTPStatus.SERVICE_UNAVAILABLE or pause is None:
                raise
            time.sleep(pause)  # its database is locked: its own services write much when it has just started
    return json.loads(answer) if answer else None


def settle_past(api: str) -> int:
    """Close what an `up` that was killed has left open, before a worker comes: it would hold the limit of its stream for good.

    Scheduled runs whose time went by while nothing ran are removed: the next one applies all that waits.

    Returns:
        How many runs were closed.

    Raises:
        ErrataError: the server refuses.
    """
    try:
        return _settle(api)
    except OSError as error:
        raise ErrataError(f"Prefect at {api}: expected runs that were left open to be closed, found a fault ({error})") from error


def _settle(api: str) -> int:
    closed = close_runs(api, "errata up was ended while it ran")
    now = datetime.now(UTC).isoformat()
    while missed := [run for run in _find_runs(api, "SCHEDULED", expected_start_time={"before_": now}) if run["auto_scheduled"]]:
        for run in missed:
            call_server(api, "DELETE", f"flow_runs/{run['id']}")
    return closed


def close_runs(api: str, why: str) -> int:
    """Close the deployments' runs that nothing carries out any more, and free the limits they hold: a run that its worker had claimed and
    not begun when it was killed holds the limit of its stream until its lease ends, which are five minutes of Prefect's.

    Returns:
        How many runs were closed.

    Raises:
        OSError: no answer, or a refusal.
    """
    left = _find_runs(api, "RUNNING", "PENDING", "CANCELLING", deployment_id={"is_null_": False})
    for run in left:
        call_server(api, "POST", f"flow_runs/{run['id']}/set_state", {"state": {"type": "CRASHED", "message": why}, "force": True})
    for limit in call_server(api, "POST", "v2/concurrency_limits/filter", {}):
        call_server(api, "PATCH", f"v2/concurrency_limits/{limit['id']}", {"active_slots": 0})
    return len(left)


def read_news(api: str, seen: dict[str, str], since: str) -> Iterator[tuple[str, str]]:
    """Time and text of what has happened: changes of runs, and warnings that they logged.

    Args:
        seen: state of each run and whatever else was told; kept up to date.
        since: ISO time; nothing older is told.
    """
    flows = {flow["id"]: flow["name"] for flow in call_server(api, "POST", "flows/filter", {})}
    names = {}
    for run in reversed(_find_runs(api, *_SHOWN, order="START_TIME_DESC", start_time={"after_": since})):
        names[run["id"]] = name = name_run(flows.get(run["flow_id"], "?"), run)
        if seen.get(run["id"]) == run["state_name"]:
            continue
        seen[run["id"]] = run["state_name"]
        how = f" after {run['total_run_time']:.1f} s" if run["end_time"] else ""
        why = f": {run['state']['message']}" if run["state_type"] in ("FAILED", "CRASHED") and run["state"]["message"] else ""
        yield run["end_time"] or run["start_time"], f"{name}  {run['state_name'].lower()}{how}{why}"
    wanted = {"level": {"ge_": _WARNING}, "timestamp": {"after_": since}}
    for row in call_server(api, "POST", "logs/filter", {"logs": wanted, "sort": "TIMESTAMP_DESC", "limit": 50})[::-1]:
        if row["id"] not in seen:
            seen[row["id"]] = "told"
            yield row["timestamp"], f"{names.get(row['flow_run_id'], 'a run')}  {row['message'].splitlines()[0][:300]}"


def find_next(api: str) -> str | None:
    """The next scheduled run in words."""
    runs = _find_runs(api, "SCHEDULED", order="EXPECTED_START_TIME_ASC", limit=1)
    if not runs:
        return None
    flow = call_server(api, "GET", f"flows/{runs[0]['flow_id']}")["name"]
    return f"{name_run(flow, runs[0])} at {show_time(runs[0]['expected_start_time'])}"


def name_run(flow: str, run: dict[str, Any]) -> str:
    """Its flow and its stream."""
    parameters = run["parameters"]
    return f"{flow}/{parameters.get('stream') or parameters.get('into') or '?'}"


def show_time(moment: str) -> str:
    """An ISO time as the time of day here."""
    return f"{datetime.fromisoformat(moment).astimezone():%H:%M:%S}"


def _find_runs(api: str, *states: str, order: str = "ID_DESC", limit: int = 100, **filters: Any) -> list[dict[str, Any]]:
    wanted = {"state": {"type": {"any_": list(states)}}, **filters}
    found: list[dict[str, Any]] = call_server(api, "POST", "flow_runs/filter", {"flow_runs": wanted, "sort": order, "limit": limit})
    return found
