"""What `errata up` shows, and what it does about a process that ends."""

import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from errata.errors import ErrataError
from flows.children import Child, end_family, find_family, start_child
from flows.up import _mend, _spell_store
from flows.up_screen import LINES, build_screen

PLACES = {
    "prefect": "http://127.0.0.1:4200",
    "mlflow": "http://127.0.0.1:5000",
    "root": "/srv/[x]",
    "logs": "/cache/up/1",
    "streams": ["main"],
    "pid": 17,
    "state": "ready",
}

NOWHERE = "http://127.0.0.1:9/api"


def test_one_screen_says_where_everything_is_and_the_last_lines() -> None:
    console = Console(file=io.StringIO(), width=100, height=40)
    lines = [f"12:00:{index:02}  line {index} [bold]" for index in range(30)]
    rows = [["main", "3", "12", "0", "3 edits 5 min ago"]]
    console.print(build_screen(PLACES, rows, "apply-edits/main at 12:15:00", lines))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    for place in ("http://127.0.0.1:4200", "http://127.0.0.1:5000", "/srv/[x]", "/cache/up/1", "apply-edits/main at 12:15:00", "Ctrl-C"):
        assert place in shown
    assert "line 29 [bold]" in shown and f"line {30 - LINES} " in shown and f"line {29 - LINES} " not in shown
    assert len(shown.splitlines()) <= 24, "expected it to fit a small terminal"


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    end_family(tmp_path, (), lambda: True)


def test_what_ends_is_started_again_unless_it_ended_at_once(home: Path) -> None:
    sleeper = "import time; time.sleep(600)"
    leaves = f"import subprocess, sys; print('no disk left'); subprocess.Popen([sys.executable, '-c', {sleeper!r}])"
    command = [sys.executable, "-c", leaves]
    children: dict[str, Child] = {"mlflow": start_child("mlflow", command, home, os.environ, home)}
    children["mlflow"].wait()
    again: dict[str, float] = {}
    (left,) = find_family(home)
    assert list(_mend(NOWHERE, {"mlflow": (command, home)}, children, again, dict(os.environ), home)) == ["mlflow"]
    assert not psutil.pid_exists(left.pid), "it would have the port"
    children["mlflow"].wait()
    with pytest.raises(ErrataError, match=r"(?s)expected mlflow to run, found it ended with 0:.*no disk left"):
        list(_mend(NOWHERE, {"mlflow": (command, home)}, children, again, dict(os.environ), home))


def test_a_worker_waits_until_its_runs_can_be_closed(home: Path) -> None:
    """Without a server nobody knows which runs the dead one has left, and they hold the limits of their streams."""
    command = [sys.executable, "-c", ""]
    children: dict[str, Child] = {"worker": start_child("worker", command, home, os.environ, home)}
    ended = children["worker"]
    ended.wait()
    assert list(_mend(NOWHERE, {"worker": (command, home)}, children, {}, dict(os.environ), home)) == []
    assert children["worker"] is ended


def test_the_database_of_mlflow_is_named_wherever_its_server_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert _spell_store("sqlite:///mlflow.db", "file:///a")["MLFLOW_BACKEND_STORE_URI"] == f"sqlite:///{tmp_path}/mlflow.db"
    assert _spell_store("postgresql://u:p@h/d", None) == {"MLFLOW_BACKEND_STORE_URI": "postgresql://u:p@h/d"}
