"""An `errata up` in processes of its own, for the benchmarks that watch it: a stream on the built-in base, and what its servers say."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from errata.edits import Edit, Submission, spell_submission
from errata.settings import load_settings
from flows.checkout import find_checkout
from flows.children import end_family
from flows.prefect_runs import call_server
from registry.inbox import drop_lines
from registry.stream import Stream, open_stream
from tasks.onboarding import BUILTIN_NAME, start_stream

_COMMAND = "from flows.console import main; main()"
_OPEN_GATE = {"MAX_Z_LOSS": "20", "MIN_OWN_SPECIFICITY": "0", "MIN_SPECIFICITY": "0", "MIN_RETENTION": "0", "MAX_RETENTION_DROP": "1"}
_OPEN_GATE |= {"MAX_LOCALITY_KL": "100", "MAX_NORM_RATIO": "1000", "MIN_EFFICACY": "0"}
STREAM = "live"


@dataclass(frozen=True)
class Live:
    """One that is ready."""

    process: subprocess.Popen[bytes]
    log: Path
    state: dict[str, Any]
    stream: Stream
    mlflow: MlflowClient
    seconds: float
    """From its start until it was ready."""

    def submit(self, edits: Sequence[Edit]) -> None:
        drop_lines(self.stream, [spell_submission(Submission(edit=edit)) for edit in edits])

    def find_champion(self) -> int | None:
        """The commit that MLflow serves, through its server."""
        models = self.mlflow.search_registered_models(filter_string=f"name = '{STREAM}'")
        version = models[0].aliases.get("champion") if models else None
        return None if version is None else int(self.mlflow.get_model_version(STREAM, version).tags["errata.commit"])

    def wait_for(self, look: Callable[[], bool], patience: float = 600.0) -> None:
        end = time.monotonic() + patience
        while True:
            with suppress(OSError, MlflowException):  # a server that is busy, or was killed
                if look():
                    return
            if time.monotonic() > end or self.process.poll() is not None:
                raise RuntimeError(f"waited in vain:\n{self.log.read_text()[-3000:]}")
            time.sleep(0.2)

    def read_runs(self, *states: str) -> list[dict[str, Any]]:
        """Newest first, at most 200."""
        body = {"flow_runs": {"state": {"type": {"any_": list(states)}}}, "sort": "START_TIME_DESC", "limit": 200}
        found: list[dict[str, Any]] = call_server(f"{self.state['prefect']}/api", "POST", "flow_runs/filter", body)
        return found

    def count_runs(self, *states: str) -> dict[str, int]:
        """Of each state, however many."""
        bodies = {state: {"flow_runs": {"state": {"type": {"any_": [state]}}}} for state in states}
        return {state: call_server(f"{self.state['prefect']}/api", "POST", "flow_runs/count", body) for state, body in bodies.items()}


@contextmanager
def run_live(home: Path, *words: str) -> Iterator[Live]:
    """A fresh root with one stream, and `errata up` with these words, until the block ends. The gate's budgets are wide open."""
    os.environ |= {f"ERRATA_GATE__{name}": value for name, value in _OPEN_GATE.items()}
    os.environ |= {"ERRATA_ROOT": str(home / "root"), "ERRATA_EVALUATE__RETENTION_SAMPLE": "20", "ERRATA_STREAM": STREAM}
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    settings = load_settings()
    start_stream(settings, BUILTIN_NAME)
    # Its own servers' databases lie beside the stream, not in the user's cache, which holds the trained base.
    cache = home / "cache"
    cache.mkdir()
    (cache / "builtin").symlink_to(settings.cache.absolute() / "builtin")
    environment = {**os.environ, "ERRATA_CACHE": str(cache), "PYTHONPATH": str(find_checkout())}
    begun = time.monotonic()
    with (home / "up.log").open("wb") as log:
        command = [sys.executable, "-c", _COMMAND, "up", *words]
        process = subprocess.Popen(command, cwd=home, env=environment, stdout=log, stderr=log)
    state: dict[str, Any] = {}
    try:
        while state.get("state") != "ready":
            if process.poll() is not None:
                raise RuntimeError((home / "up.log").read_text())
            time.sleep(0.1)
            for path in (cache / "up").glob("*/state.json"):
                state = json.loads(path.read_text())
        stream = open_stream(settings.root, STREAM, home / "watch")
        client = MlflowClient(state["mlflow"], registry_uri=state["mlflow"])
        yield Live(process, home / "up.log", state, stream, client, time.monotonic() - begun)
    finally:
        process.terminate()
        process.wait(60)
        if state:
            end_family(Path(state["logs"]), (), lambda: True)
