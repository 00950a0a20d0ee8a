"""`errata up`, as somebody lives with it: it is killed and started again, a file is dropped, the schedule does the rest, Ctrl-C ends it."""

import signal
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from errata.edits import Edit


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
    assert len(writers) == 9 and set(writers) == {"errata-main"}

    with urllib.request.urlopen(state["metrics"], timeout=10) as answer:
        assert 'errata_champion_commit{stream="main"} 1.0' in answer.read().decode()

    # A second one says where the first one is.
    second = launch("up")
    assert second.process.wait(timeout=60) == 0
    told = second.log.read_text()
    assert state["prefect"] in told and state["mlflow"] in told and str(up.process.pid) in told

    # Ctrl-C ends everything.
    up.process.send_signal(signal.SIGINT)
    assert up.process.wait(timeout=60) == 0
    assert up.find_processes() == []
    assert not (home / "state.json").exists()
    told = up.log.read_text()
    assert "ready: main served" in told and "commit 1: edits, accept; it is the champion" in told and "Traceback" not in told


def test_without_a_stream_it_says_what_to_do(launch: Callable[..., Any]) -> None:
    up = launch(ERRATA_ROOT="elsewhere")
    assert up.process.wait(timeout=60) == 2
    assert "errata init" in up.log.read_text() and "Traceback" not in up.log.read_text()
