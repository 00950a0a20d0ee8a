"""`errata up`, as somebody lives with it: it is killed and started again, a file is dropped, the schedule does the rest, Ctrl-C ends it."""

import json
import signal
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from errata.edits import Edit
from flows.prefect_runs import call_server


@pytest.mark.slow
def test_a_life(desk: Any, launch: Callable[..., Any], make_edit: Callable[..., Edit]) -> None:

    # One is killed while it starts. Its servers outlive it.
    first = launch()
    home = Path(first.wait_for("the first one", lambda: first.read_state("starting"))["logs"])
    first.wait_for("its servers", lambda: len(first.find_processes()) >= 2)
    first.process.kill()
    first.process.wait()
    left = first.find_processes()
    assert left

    # The next one ends them, and is up.
    up = launch()
    state = up.wait_until_ready()
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in left)
    assert state["prefect"].startswith("http://127.0.0.1:") and state["mlflow"].startswith("http://127.0.0.1:")

    # A file is dropped. Nobody starts anything: the schedule does.
    desk.submit("monday", make_edit(0, id="case-1"), make_edit(1, id="case-2"))
    assert up.wait_for_champion().tags["errata.commit"] == "1"
    assert desk.live() == {"case-1": "Paris", "case-2": "Paris"}
    assert desk.waiting() == []
    runs = up.ask_prefect("flow_runs/filter", {"flow_runs": {"state": {"type": {"any_": ["RUNNING", "COMPLETED"]}}}})
    assert runs and all(run["auto_scheduled"] for run in runs)
    deployments = up.ask_prefect("deployments/filter", {})
    writers = [deployment["global_concurrency_limit"]["name"] for deployment in deployments if "writer" in deployment["tags"]]
    assert len(writers) == 11 and set(writers) == {"errata-main"}

    with urllib.request.urlopen(state["metrics"], timeout=10) as answer:
        assert 'errata_champion_commit{stream="main"} 1.0' in answer.read().decode()

    # A second one says where the first one is.
    second = launch("up")
    assert second.process.wait(timeout=60) == 0
    told = second.log.read_text()
    assert state["prefect"] in told and state["mlflow"] in told and str(up.process.pid) in told

    # A worker is killed that had claimed a run and not begun it. Another one comes, and the stream goes on.
    deployment = next(item for item in deployments if item["name"] == "main" and "apply" in item["entrypoint"])
    claimed = up.wait_for("a claim", lambda: claim_run(up, deployment["id"]))
    worker = next(process for process in up.find_processes() if "worker" in process.cmdline())
    worker.kill()
    desk.submit("tuesday", make_edit(2, id="case-3"))
    up.wait_for("the next commit", lambda: desk.open().head.seq >= 2)
    found = up.ask_prefect("flow_runs/filter", {"flow_runs": {"id": {"any_": [claimed]}}})
    assert [run["state_type"] for run in found] == ["CRASHED"]

    # What runs write to the worker's output is JSON, line by line.
    lines = [json.loads(line) for line in (home / "worker.log").read_text().splitlines() if line.startswith("{")]
    assert any("commit_batch" in str(line.get("message")) for line in lines)

    # Ctrl-C ends everything.
    up.process.send_signal(signal.SIGINT)
    assert up.process.wait(timeout=60) == 0
    assert up.find_processes() == []
    assert not (home / "state.json").exists()
    told = up.log.read_text()
    assert "ready: main served" in told and "commit 1: edits, accept; it is the champion" in told and "Traceback" not in told


def claim_run(up: Any, deployment: str) -> str | None:
    """A run as a worker leaves it that dies before it has begun it: it holds the limit of its stream."""
    api = f"{up.read_state('ready')['prefect']}/api"  # which is busy now and then: `call_server` waits
    run = call_server(api, "POST", f"deployments/{deployment}/create_flow_run", {})
    state = call_server(api, "POST", f"flow_runs/{run['id']}/set_state", {"state": {"type": "PENDING"}})["state"]
    return run["id"] if state and state["type"] == "PENDING" else None


def test_without_a_stream_it_says_what_to_do(launch: Callable[..., Any]) -> None:
    up = launch(ERRATA_ROOT="elsewhere")
    assert up.process.wait(timeout=60) == 2
    assert "errata init" in up.log.read_text() and "Traceback" not in up.log.read_text()
