"""The whole flow on a real Prefect server and a real MLflow, with a base of a hundred thousand parameters."""

import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.tiny_base import LENIENT, start_root
from errata.edits import Edit
from errata.manifests import Manifest
from errata.summary import BatchSummary, RollbackSummary, WithdrawalSummary
from registry.inbox import drop_file, list_waiting
from registry.models import ModelRegistry
from registry.release import Version, resolve_tracking
from registry.rows import Outcome
from registry.stream import Stream, open_stream


@dataclass(frozen=True)
class Desk:
    """A stream `main` and what people do with it."""

    root: Path
    cache: Path

    def open(self) -> Stream:
        return open_stream(str(self.root), "main", self.cache)

    def submit(self, name: str, *rows: Edit | dict[str, Any] | str) -> None:
        """Leave a file in the inbox, one line per row, as a producer does."""
        drop_file(self.open(), f"{name}.jsonl", write_lines(*rows))

    def apply(self, **options: Any) -> list[BatchSummary]:
        """Run the flow."""
        from flows.edit import apply_edits

        done: list[BatchSummary] = apply_edits("main", **options)
        return done

    def withdraw(self, *edits: str, **options: Any) -> WithdrawalSummary:
        """Run the flow, with a check of the weights."""
        from flows.undo import withdraw_edits

        summary: WithdrawalSummary = withdraw_edits("main", list(edits), **{"check": True, **options})
        return summary

    def roll_back(self, target: str | int, **options: Any) -> RollbackSummary:
        """Run the flow."""
        from flows.undo import rollback

        summary: RollbackSummary = rollback("main", str(target), **options)
        return summary

    def statuses(self) -> dict[str, str]:
        """Occurrence → status; a record that shares its occurrence with a judged one is left out."""
        judged = ("live", "replaced", "quarantined", "rejected", "dropped", "withdrawn", "reverted")
        return {row.occurrence: row.status for row in self.open().index.find_rows(*judged)}

    def live(self) -> dict[str, str]:
        """Id → target of every live edit."""
        stream = self.open()
        return {row.id: stream.read_record(row).edit.target_new for row in stream.index.find_rows("live")}

    def read_outcomes(self, seq: int) -> list[Outcome]:
        stream = self.open()
        return stream.read_outcomes(stream.log.read(seq))

    def read_manifest(self, seq: int) -> Manifest:
        stream = self.open()
        return Manifest.from_bytes(stream.objects.get(stream.log.read(seq).manifest or ""))

    def waiting(self) -> list[str]:
        return list_waiting(self.open())

    def versions(self) -> dict[int, Version]:
        """Commit → the version that shows it."""
        return {version.commit: version for version in self.open_registry().list_versions("main")}

    def open_registry(self) -> ModelRegistry:
        return ModelRegistry(*resolve_tracking(None, str(self.root)))


@dataclass(frozen=True)
class Ran:
    """What a command printed and how it ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@dataclass(frozen=True)
class LiveUp:
    """An `errata up` of a desk, in a process of its own."""

    desk: Desk
    process: subprocess.Popen[bytes]
    log: Path

    def wait_for(self, what: str, look: Callable[[], Any], patience: float = 300.0) -> Any:
        """What `look` finds, once it finds something."""
        end = time.monotonic() + patience
        while time.monotonic() < end:
            if found := look():
                return found
            assert self.process.poll() is None, f"errata up ended by itself:\n{self.log.read_text()}"
            time.sleep(0.3)
        raise AssertionError(f"waited for {what} in vain:\n{self.log.read_text()}")

    def read_state(self, wanted: str) -> Any:
        """Where everything is, if it has come so far."""
        states = [json.loads(path.read_text()) for path in (self.desk.cache / "up").glob("*/state.json")]
        return next((state for state in states if state["state"] == wanted and state["pid"] == self.process.pid), None)

    def wait_until_ready(self) -> Any:
        return self.wait_for("errata up", lambda: self.read_state("ready"))

    def wait_for_champion(self) -> Any:
        """The version in MLflow, through its server."""
        from mlflow import MlflowClient

        url = self.read_state("ready")["mlflow"]
        client = MlflowClient(url, registry_uri=url)

        def find() -> Any:
            found = client.search_registered_models(filter_string="name = 'main'")
            return found and found[0].aliases.get("champion")

        return client.get_model_version("main", self.wait_for("the champion", find))

    def ask_prefect(self, path: str, body: Any) -> Any:
        url = f"{self.read_state('ready')['prefect']}/api/{path}"
        request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def find_processes(self) -> list[psutil.Process]:
        """Every process that any `errata up` of this desk has started, directly or not."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("_ERRATA_UP", "").startswith(str(self.desk.cache)):
                    found.append(process)
            except (psutil.Error, OSError):
                continue
        return found


def _find_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def write_lines(*rows: Edit | dict[str, Any] | str) -> bytes:
    def write(row: Edit | dict[str, Any] | str) -> str:
        if isinstance(row, Edit):
            return row.model_dump_json(exclude_none=True)
        return row if isinstance(row, str) else json.dumps(row)

    return "".join(write(row) + "\n" for row in rows).encode()


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a throw-away Prefect server, which this process's flows use. `prefect_test_harness` would start one without schedulers."""
    from prefect.logging.handlers import APILogHandler
    from prefect.settings import (
        PREFECT_API_URL,
        PREFECT_LOGGING_LEVEL,
        PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW,
        temporary_settings,
    )

    home = tmp_path_factory.mktemp("prefect")
    port = _find_port()
    url = f"http://127.0.0.1:{port}/api"
    variables = {"PREFECT_HOME": str(home), "DO_NOT_TRACK": "1", "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "NO_PROXY": "127.0.0.1"}
    variables |= {"PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "2", "PREFECT_LOGGING_SERVER_LEVEL": "WARNING"}
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port), "--no-ui"]
    with (home / "server.log").open("wb") as log:
        server = subprocess.Popen(command, env={**os.environ, **variables}, stdout=log, stderr=subprocess.STDOUT)
    try:
        _wait_until_healthy(server, url, home / "server.log")
        quiet = {PREFECT_LOGGING_LEVEL: "WARNING", PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW: "ignore"}
        with temporary_settings({PREFECT_API_URL: url, **quiet}):
            yield url
            APILogHandler().flush()  # what is left goes to a server that is gone, with patience, when the interpreter ends
    finally:
        server.terminate()
        server.wait()


def _wait_until_healthy(server: subprocess.Popen[bytes], url: str, log: Path, patience: float = 240.0) -> None:
    end = time.monotonic() + patience
    while time.monotonic() < end and server.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(f"no Prefect server at {url}:\n{log.read_text()[-3000:]}")


@pytest.fixture(scope="session")
def empty_root(tmp_path_factory: pytest.TempPathFactory, editable_folder: Path, empty_mlflow: Path) -> Path:
    """A root with the stream `main`, which has no edits, and an empty MLflow."""
    home = tmp_path_factory.mktemp("template")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)  # an errata.toml of the checkout is none of our business
        start_root(str(home / "root"), editable_folder, home)
    shutil.copy(empty_mlflow, home / "root" / "mlflow.db")
    return home / "root"


@pytest.fixture(scope="session")
def gate() -> dict[str, str]:
    """Variables under which the gate asks only whether edits take, with what else a reproducible run needs."""
    budgets = {f"ERRATA_GATE__{budget}": value for budget, value in LENIENT.items()}
    return {**budgets, "ERRATA_DEVICE": "cpu", "ERRATA_THREADS": "1", "ERRATA_ACTOR": "ann"}


@pytest.fixture(scope="session")
def empty_neuron_root(tmp_path_factory: pytest.TempPathFactory, editable_folder: Path, empty_mlflow: Path) -> Path:
    """As `empty_root`, with iReVa as the editor."""
    home = tmp_path_factory.mktemp("template")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        start_root(str(home / "root"), editable_folder, home, editor="ireva")
    shutil.copy(empty_mlflow, home / "root" / "mlflow.db")
    return home / "root"


@pytest.fixture
def template(empty_root: Path) -> Path:
    """What the root of a `desk` is copied from. A module of tests about another kind of stream has its own."""
    return empty_root


@pytest.fixture
def desk(template: Path, gate: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    import mlflow
    import torch

    root, cache = tmp_path / "root", tmp_path / "cache"
    shutil.copytree(template, root)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for name, value in {**gate, "ERRATA_ROOT": str(root), "ERRATA_CACHE": str(cache)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "path", list(sys.path))  # loading a model version puts its code there
    threads = torch.get_num_threads()
    mlflow.set_tracking_uri(f"sqlite:///{root / 'mlflow.db'}")
    yield Desk(root, cache)
    mlflow.set_tracking_uri(None)  # type: ignore[arg-type]  # takes the variable back that it has set, too
    torch.set_num_threads(threads)


@pytest.fixture
def launch(desk: Desk, tmp_path: Path) -> Iterator[Callable[..., LiveUp]]:
    """Start `errata up` as a person at the desk does, with a fast schedule unless other words are given."""
    root = Path(__file__).parents[2]
    started: list[LiveUp] = []

    def launch(*words: str, **variables: str) -> LiveUp:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
        # A server that is meant for other work must not be touched.
        path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
        ours = {"PYTHONPATH": path, "PREFECT_API_URL": "http://127.0.0.1:9/api", "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1"}
        ports = [f"--port-{name}={_find_port()}" for name in ("prefect", "mlflow")]  # the usual ones are for one test at a time
        command = [sys.executable, "-c", "from flows.console import main; main()", *(words or ("up", "--every", "10", *ports))]
        log = tmp_path / f"up-{len(started)}.log"
        with log.open("wb") as file:
            process = subprocess.Popen(command, cwd=tmp_path, env={**inherited, **ours, **variables}, stdout=file, stderr=file)
        started.append(LiveUp(desk, process, log))
        return started[-1]

    yield launch
    for up in started:
        up.process.kill()
        up.process.wait()
        for process in up.find_processes():
            process.kill()


@pytest.fixture(scope="session")
def used_root(
    tmp_path_factory: pytest.TempPathFactory, empty_root: Path, gate: dict[str, str], make_edit: Callable[..., Edit], prefect_server: str
) -> Path:
    """A root whose stream `main` has two commits, both shown in MLflow.

    Commit 1: case-1, case-2 and case-11 live. Commit 2: case-1 replaced by case-3, case-4 quarantined, one record refused, one a
    duplicate, two more live, whose ids are digests.
    """
    home = tmp_path_factory.mktemp("used")
    desk = Desk(home / "root", home / "cache")
    shutil.copytree(empty_root, desk.root)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        for name, value in {**gate, "ERRATA_ROOT": str(desk.root), "ERRATA_CACHE": str(desk.cache)}.items():
            patch.setenv(name, value)
        patch.setattr(sys, "path", list(sys.path))
        desk.submit("monday", make_edit(0, id="case-1"), make_edit(1, id="case-2"), make_edit(2, id="case-11"))
        desk.apply()
        unreachable = {"prompt": "{} has long been living in", "target_new": "Zqx wvut"}
        good = [make_edit(0, answer=1, id="case-3"), make_edit(4), make_edit(5)]
        desk.submit("tuesday", *good, make_edit(6, id="case-4", **unreachable), make_edit(1, id="case-2"), {"subject": "Bo"})
        desk.apply()
    return desk.root


@pytest.fixture
def used_desk(desk: Desk, used_root: Path) -> Desk:
    """The stream of `used_root`, to do with as one likes."""
    shutil.rmtree(desk.root)
    shutil.copytree(used_root, desk.root)
    return desk


@pytest.fixture
def errata(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ran]:
    """The command, run in this process, since its imports cost more than its work. It may fail, but never with a traceback.

    Call it with the words of the command line; `stdin` is what is piped into it, `typed` what a person answers at a terminal.
    """
    from flows import commandline, console

    def run(*words: str, stdin: bytes = b"", typed: str | None = None) -> Ran:
        capsys.readouterr()
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
            patch.setattr(sys, "argv", ["errata", *words])
            patch.setattr(commandline.out, "_width", 200)  # whoever imported it first may have had another terminal
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin if typed is None else typed.encode())))
            for end in (sys.stdin, sys.stdout):
                patch.setattr(end, "isatty", lambda: typed is not None)
            console.main()
        printed = capsys.readouterr()
        assert "Traceback" not in printed.out + printed.err
        return Ran(int(ended.value.code or 0), printed.out, printed.err)

    # Tables fold no words. The others are what the command sets where they are not: for this process, too.
    for name, value in {
        "COLUMNS": "200",
        "PREFECT_LOGGING_LEVEL": "CRITICAL",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "0",
        "DO_NOT_TRACK": "1",
    }.items():
        monkeypatch.setenv(name, value)
    return run


@pytest.fixture
def ask(desk: Desk) -> Callable[[Edit], str]:
    """What the champion answers to an edit's prompt, through plain MLflow."""
    import mlflow

    def ask(edit: Edit) -> str:
        model = mlflow.pyfunc.load_model("models:/main@champion")
        return str(model.predict([edit.rewrite_prompt], params={"max_new_tokens": 1})[0]).strip()

    return ask


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ids of the edits that pairs were computed for, as it goes on."""
    from errata.editors.d4s.editor import D4S

    ids: list[str] = []
    real = D4S.prepare

    def prepare(self: D4S, base: Any, edits: Any, *rest: Any) -> Any:
        ids.extend(edit.edit_id for edit in edits)
        return real(self, base, edits, *rest)

    monkeypatch.setattr(D4S, "prepare", prepare)
    return ids
