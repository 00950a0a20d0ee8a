"""`errata up`, as somebody lives with it: it is killed and started again, a file is dropped, the schedule does the rest, Ctrl-C ends it."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from errata.edits import Edit

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-c", "from flows.console import main; main()"]
PATIENCE = 300.0


def wait_for(what: str, look: Callable[[], Any], process: subprocess.Popen[bytes], log: Path) -> Any:
    """What `look` finds, once it finds something."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if found := look():
            return found
        assert process.poll() is None, f"errata up ended by itself:\n{log.read_text()}"
        time.sleep(0.3)
    raise AssertionError(f"waited for {what} in vain:\n{log.read_text()}")


def find_marked(home: Path) -> list[psutil.Process]:
    """Every process that this `up` has started, directly or not."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("_ERRATA_UP") == str(home):
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def ask_prefect(state: Mapping[str, Any], path: str, body: Any) -> Any:
    request = urllib.request.Request(f"{state['prefect']}/api/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30) as answer:
        return json.load(answer)


@pytest.fixture
def variables(desk: Any) -> dict[str, str]:
    """Of a person at the desk. The server of the other tests must not matter."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    return {**inherited, "PYTHONPATH": str(ROOT), "PREFECT_API_URL": "http://127.0.0.1:9/api", "OMP_NUM_THREADS": "1"}


@pytest.fixture
def start(desk: Any, variables: dict[str, str], tmp_path: Path) -> Iterator[Callable[[], subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []

    def run() -> subprocess.Popen[bytes]:
        with (tmp_path / "up.log").open("ab") as log:
            command = [*COMMAND, "up", "--every", "10"]
            process = subprocess.Popen(command, cwd=tmp_path, env=variables, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.wait()
    for home in (desk.cache / "up").glob("*"):
        for process in find_marked(home):
            process.kill()


@pytest.mark.slow
def test_a_life(desk: Any, start: Any, variables: dict[str, str], tmp_path: Path, make_edit: Callable[..., Edit]) -> None:
    from mlflow import MlflowClient

    log = tmp_path / "up.log"

    def read_state(wanted: str = "ready") -> Any:
        states = [json.loads(path.read_text()) for path in (desk.cache / "up").glob("*/state.json")]
        return next((state for state in states if state["state"] == wanted), None)

    # One is killed while it starts. Its servers outlive it.
    first = start()
    home = Path(wait_for("the first one", lambda: read_state("starting"), first, log)["logs"])
    wait_for("its servers", lambda: len(find_marked(home)) >= 2, first, log)
    first.kill()
    first.wait()
    left = find_marked(home)
    assert left

    # The next one ends them, and is up.
    up = start()
    state = wait_for("errata up", lambda: (found := read_state()) and found["pid"] == up.pid and found, up, log)
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in left)
    assert state["prefect"].startswith("http://127.0.0.1:") and state["mlflow"].startswith("http://127.0.0.1:")

    # A file is dropped. Nobody starts anything: the schedule does.
    desk.submit("monday", make_edit(0, id="case-1"), make_edit(1, id="case-2"))
    client = MlflowClient(state["mlflow"], registry_uri=state["mlflow"])

    def find_champion() -> Any:
        found = client.search_registered_models(filter_string="name = 'main'")
        return found[0].aliases.get("champion") if found else None

    number = wait_for("the champion", find_champion, up, log)
    assert client.get_model_version("main", number).tags["errata.commit"] == "1"
    assert desk.live() == {"case-1": "Paris", "case-2": "Paris"}
    assert desk.waiting() == []
    runs = ask_prefect(state, "flow_runs/filter", {"flow_runs": {"state": {"type": {"any_": ["RUNNING", "COMPLETED"]}}}})
    assert runs and all(run["auto_scheduled"] for run in runs)
    deployments = ask_prefect(state, "deployments/filter", {})
    writers = [deployment["global_concurrency_limit"]["name"] for deployment in deployments if "writer" in deployment["tags"]]
    assert len(writers) == 7 and set(writers) == {"errata-main"}

    # A second one says where the first one is.
    second = subprocess.run([*COMMAND, "up"], cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=60)
    assert second.returncode == 0, second.stderr
    assert state["prefect"] in second.stdout and state["mlflow"] in second.stdout and str(up.pid) in second.stdout

    # Ctrl-C ends everything.
    up.send_signal(signal.SIGINT)
    assert up.wait(timeout=60) == 0
    assert find_marked(home) == []
    assert not (home / "state.json").exists()
    told = log.read_text()
    assert "ready: main served" in told and "commit 1: edits, accept; it is the champion" in told and "Traceback" not in told


def test_without_a_stream_it_says_what_to_do(variables: dict[str, str], tmp_path: Path) -> None:
    command = [*COMMAND, "up"]
    run = subprocess.run(command, cwd=tmp_path, env={**variables, "ERRATA_ROOT": "elsewhere"}, capture_output=True, text=True)
    assert run.returncode == 2
    assert "errata init" in run.stderr and "Traceback" not in run.stderr
