"""Two machines that apply to one stream at once. `test_faults.py` starts this in an interpreter of its own, without threads.

Called with the kind of storage and a folder; prints how the machines ended, their conflicts and commits, and what is wrong afterwards.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.chaos import Command, leave_file, open_place
from benchmarks.deaths import begin, end, fork, import_everything
from benchmarks.expected import Expected
from benchmarks.invariants import Account, check_stream
from benchmarks.tiny_base import build_edit

FILES = [[build_edit(2 * number), build_edit(2 * number + 1)] for number in range(5)] + [[build_edit(0, answer=1), build_edit(11)]]
"""The last one replaces an edit of the first."""


def main() -> None:
    import_everything()
    home = Path(sys.argv[2])
    with open_place(sys.argv[1], home) as root:
        os.environ["ERRATA_APPLY__BATCH_SIZE"] = "2"
        batches = [Command("apply", edits=edits, file=f"{number}.jsonl") for number, edits in enumerate(FILES)]
        for batch in batches:
            fork(lambda batch=batch: leave_file(root, batch), home)
        machines = [home / name for name in ("one", "other")]
        for machine in machines:
            machine.mkdir()
        children = [begin(lambda machine=machine: apply_beside(machine, machines), machine) for machine in machines]
        ended = [end(child, machine) for child, machine in zip(children, machines, strict=True)]
        told = fork(lambda: look(batches), home)
    output = "".join((place / "output.txt").read_text()[-2000:] for place in (home, *machines))
    sys.stdout.write(json.dumps({"machines": [item.result for item in ended], "wrong": told.result, "output": output}))


def apply_beside(machine: Path, machines: list[Path]) -> dict[str, int]:
    """Apply all that waits, and do not make the first commit before the other machine is about to make its own."""
    import flows.edit
    from errata.errors import ConflictError

    os.environ["ERRATA_CACHE"] = str(machine / "cache")
    commit, told = flows.edit.commit_batch, {"commits": 0, "conflicts": 0}

    def meet(*values: Any) -> Any:
        (machine / "ready").touch()
        while not all((other / "ready").exists() for other in machines):
            time.sleep(0.01)
        try:
            done = commit(*values)
        except ConflictError:
            told["conflicts"] += 1
            raise
        told["commits"] += 1
        return done

    flows.edit.commit_batch = meet
    flows.edit.apply_edits.fn("main")
    return told


def look(batches: list[Command]) -> list[str]:
    from registry.history import open_history

    expected, account = Expected(), Account()
    account.read_on(open_history(os.environ["ERRATA_ROOT"], "main"))
    for batch in batches:
        batch.tell(expected, account.list_refused(0))
    return check_stream(expected, account, whole=True)


if __name__ == "__main__":
    main()
