"""Jobs in forked children, and their deaths: before or after the n-th step that leaves a trace, or at any moment of the clock.

The interpreter that forks has everything imported, no threads, and has touched no model. Steps that leave a trace are writes to storage,
to the local tables and to MLflow; between two of them it makes no difference where a process dies.
"""

import json
import logging
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

AHEAD = timedelta(days=2)
"""How far ahead the storage's clock is where everything stored is to be old."""
_MLFLOW = (
    *("create_experiment", "create_run", "log_batch", "log_artifact", "set_terminated", "create_logged_model", "log_model_artifacts"),
    *("log_outputs", "finalize_logged_model", "create_registered_model", "create_model_version", "set_model_version_tag"),
    "set_registered_model_alias",
)


class Trap(NamedTuple):
    """Where a process dies."""

    step: int
    """From 1."""
    after: bool


class Ended(NamedTuple):
    """What became of a job."""

    status: int
    """Negative for a signal."""
    result: Any
    """What it returned, through JSON; None where it did not come so far."""


def import_everything() -> None:
    """The flows as plain functions, which need no server. To be called before anything else imports them."""
    import tasks._task

    tasks._task.stage = lambda function: function
    import matplotlib.figure  # noqa: F401
    from mlflow.utils import requirements_utils

    import flows.edit
    import flows.keep
    import flows.replay
    import flows.undo
    import registry.models
    import registry.storage.s3  # noqa: F401

    requirements_utils._init_packages_to_modules_map()  # for each version MLflow would look through all installed packages
    for module in (flows.edit, flows.replay, flows.undo):
        module.get_run_logger = lambda: logging.getLogger("chaos")  # type: ignore[attr-defined]


def fork(job: Callable[[], Any], folder: Path, kill_after: float | None = None) -> Ended:
    """Run a job in a process of its own, and kill it after so many seconds. What it prints goes to `output.txt` in the folder."""
    child = begin(job, folder)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)  # nobody has waited for it yet: it is our child still, dead or alive
    return end(child, folder)


def begin(job: Callable[[], Any], folder: Path) -> int:
    """The process that runs a job from now on; one in each folder at a time."""
    answer = folder / "answer.json"
    answer.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        _work(job, folder, answer)
    return child


def end(child: int, folder: Path) -> Ended:
    """Wait for the process that `begin` gave."""
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return Ended(status, json.loads((folder / "answer.json").read_text()) if status == 0 else None)


def _work(job: Callable[[], Any], folder: Path, answer: Path) -> None:
    status = 1
    try:
        output = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        result = job()
        answer.write_text(json.dumps(result))
        status = 0
    except BaseException:  # noqa: BLE001  whatever it is, it must not unwind into the parent's loop
        with (folder / "output.txt").open("a") as file:
            traceback.print_exc(file=file)
    finally:
        os._exit(status)


def lay_trap(trap: Trap | None) -> list[str]:
    """Kill this process at a step. Returns the steps it takes, which grow."""
    from registry.index import Index
    from registry.runs import MlflowClient
    from registry.storage.local import LocalStorage
    from registry.storage.s3 import S3Storage

    taken: list[str] = []
    named = {LocalStorage: ("_write", "_link", "delete", "renew"), S3Storage: ("create", "delete", "renew"), Index: ("apply",)}
    for owner, names in {**named, MlflowClient: _MLFLOW}.items():
        for name in names:
            setattr(owner, name, _count(getattr(owner, name), f"{owner.__name__}.{name}", taken, trap))
    return taken


def _count(real: Callable[..., Any], name: str, taken: list[str], trap: Trap | None) -> Callable[..., Any]:
    def step(*values: Any, **options: Any) -> Any:
        taken.append(name)
        due = trap is not None and len(taken) == trap.step
        if due and trap and not trap.after:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            return real(*values, **options)
        finally:
            if due:
                os.kill(os.getpid(), signal.SIGKILL)

    return step


@contextmanager
def storage_ahead() -> Iterator[None]:
    """For a storage whose clock says that everything in it was stored long ago."""
    from registry.storage.base import PROBES, Entry
    from registry.storage.local import LocalStorage
    from registry.storage.s3 import S3Storage

    reals = {owner: owner.find for owner in (LocalStorage, S3Storage)}

    def shift(real: Callable[..., Entry | None]) -> Callable[..., Entry | None]:
        def find(self: Any, key: str) -> Entry | None:
            found = real(self, key)
            return Entry(key, found.size, found.modified + AHEAD) if found and key.startswith(PROBES) else found

        return find

    try:
        for owner, real in reals.items():
            owner.find = shift(real)  # type: ignore[method-assign]
        yield
    finally:
        for owner, real in reals.items():
            owner.find = real  # type: ignore[method-assign]
