"""Runs of the whole line that are killed, each followed by one that is not. `test_killed.py` starts this in an interpreter of its own,
which has no threads and has touched no model: its children are forked from it, so that everything is imported once.

Reads JSON from stdin (see `main`). For each moment M there are then, in the folder `work`:
    M/killed    the root as the killed process left it
    M/root      the root after the run that followed
    M/status, M/prepared.json    how the first one ended; which edits the second one computed pairs for
"""

import json
import os
import re
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

MOMENTS: dict[str, tuple[str, str, str]] = {
    # name: what is called, with which key, and whether death comes before or after it
    "pairs-stored": ("storage.create", "/prepared/", "before"),
    "pairs-noted": ("storage.create", "/prepared/", "after"),
    "merged": ("stage.judge_candidate", "", "before"),
    "all-but-committed": ("storage.create", "/commits/00000002", "before"),
    "committed": ("storage.create", "/commits/00000002", "after"),
    "not-shown": ("stage.project_versions", "", "before"),
    "half-a-version": ("registry._register", "", "before"),
    "alias-behind": ("registry.point_alias", "", "before"),
}


def main() -> None:
    """stdin: {"root": of a stream without edits, "work": folder, "first": lines applied beforehand, "second": lines applied and killed}."""
    import tasks._task

    tasks._task.stage = lambda function: function  # plain functions, which need no server
    import flows.edit  # noqa: F401
    import registry.models  # noqa: F401

    given = json.load(sys.stdin)
    work = Path(given["work"])
    shutil.copytree(given["root"], work / "first" / "root")
    fork(lambda: apply(work / "first", given["first"]))
    for moment in [*MOMENTS, "never"]:
        place = work / moment
        shutil.copytree(work / "first", place)
        status = fork(lambda place=place, moment=moment: apply(place, given["second"], moment))
        shutil.copytree(place / "root", place / "killed")
        fork(lambda place=place: apply(place, None))
        (place / "status").write_text(str(status))


def fork(job: Callable[[], None]) -> int:
    """Run a job in a process of its own; its exit status, negative for a signal."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            job()
            status = 0
        except Exception:  # noqa: BLE001  whatever it is, it must not unwind into the parent's loop
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def apply(place: Path, lines: str | None, moment: str = "never") -> None:
    """The flow on one root, after leaving `lines` in its inbox."""
    import flows.edit
    from errata.editors.d4s.editor import D4S
    from registry.inbox import drop_file
    from registry.stream import open_stream

    os.environ |= {"ERRATA_ROOT": str(place / "root"), "ERRATA_CACHE": str(place / "cache")}
    if lines is not None:
        drop_file(open_stream(str(place / "root"), "main"), f"{len(lines)}.jsonl", lines.encode())
    prepared: list[str] = []
    prepare = D4S.prepare

    def count(self: Any, base: Any, edits: Any, *rest: Any) -> Any:
        prepared.extend(edit.edit_id for edit in edits)
        return prepare(self, base, edits, *rest)

    D4S.prepare = count  # type: ignore[method-assign]
    if moment != "never":
        lay_trap(*MOMENTS[moment])
    flows.edit.apply_edits.fn("main")
    (place / "prepared.json").write_text(json.dumps(prepared))


def lay_trap(call: str, key: str, when: str) -> None:
    """Kill this process when `call` is reached with a key that contains `key`."""
    import flows.edit
    from registry.models import ModelRegistry
    from registry.storage.local import LocalStorage

    room, _, name = call.partition(".")
    owner: Any = {"storage": LocalStorage, "stage": flows.edit, "registry": ModelRegistry}[room]
    real = getattr(owner, name)

    def deadly(*values: Any, **options: Any) -> Any:
        due = room != "storage" or re.search(key, values[1])
        if due and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*values, **options)
        if due:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, deadly)


if __name__ == "__main__":
    main()
