"""A few killed commands through `benchmarks.chaos`, where hundreds are killed; and what it looks for, it finds."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.expected import Expected
from benchmarks.invariants import Account, check_stream
from errata.edits import Edit, digest_of
from registry.history import open_history

Make = Callable[..., Edit]
HOME = Path(__file__).parents[2]


@pytest.mark.long
def test_commands_that_are_killed_are_made_up_for(tmp_path: Path) -> None:
    """In an interpreter of its own: what forks must have no threads."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("ERRATA_") or name == "ERRATA_TEST_S3_ENDPOINT"}
    variables = {**clean, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(HOME), "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-m", "benchmarks.chaos", "--kills", "12", "--seed", "1", "--check-every", "5"]
    run = subprocess.run(command, env=variables, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, (run.stdout + run.stderr)[-3000:]
    (row,) = [line for line in run.stdout.splitlines() if line.startswith("│ killed")]
    assert [cell.strip() for cell in row.split("│")[2:-1]] == ["6", "6"]


@pytest.fixture
def kept(desk: Any, make_edit: Make, prefect_server: str) -> tuple[Any, Expected]:
    """Two batches, the second of which replaces an edit, and what is expected of them."""
    expected = Expected()
    expected.remember(0)
    for seq, edits in enumerate(([make_edit(0), make_edit(1)], [make_edit(0, answer=2), make_edit(2), make_edit(1)]), 1):
        desk.submit(str(seq), *edits)
        expected.files[digest_of(desk.open().storage.read(f"streams/main/inbox/{seq}.jsonl"))] = len(edits)
        desk.apply()
        expected.apply(edits)
        expected.remember(seq)
    return desk, expected


def look(desk: Any, expected: Expected, *, whole: bool = False) -> list[str]:
    account = Account()
    account.read_on(open_history(str(desk.root), "main"))
    return check_stream(expected, account, whole=whole)


def test_nothing_is_wrong_with_what_was_done_rightly(kept: tuple[Any, Expected], make_edit: Make) -> None:
    desk, expected = kept
    assert look(desk, expected, whole=True) == []
    desk.withdraw(make_edit(2).edit_id)
    expected.withdraw([make_edit(2).edit_id])
    expected.remember(3)
    desk.roll_back(1)
    expected.roll_back(1)
    assert look(desk, expected, whole=True) == []
    assert {fact.edit.target_new for fact in expected.live} == {make_edit(0).target_new, make_edit(1).target_new}


def lose_an_edit(desk: Any, make_edit: Make) -> None:
    desk.withdraw(make_edit(1).edit_id)


def apply_one_more(desk: Any, make_edit: Make) -> None:
    desk.submit("more", make_edit(5))
    desk.apply()


def leave_a_file(desk: Any, make_edit: Make) -> None:
    desk.submit("late", make_edit(5))


def delete_an_object(desk: Any, _make_edit: Make) -> None:
    stream = desk.open()
    stream.objects.delete(stream.log.read(1).pairs[0])


def damage_an_artifact(desk: Any, _make_edit: Make) -> None:
    stream, (artifact,) = desk.open(), desk.read_manifest(2).artifacts
    stream.objects.delete(artifact)
    stream.storage.create(stream.key(f"objects/{artifact}"), b"other bytes")


def leave_a_gap(desk: Any, _make_edit: Make) -> None:
    stream = desk.open()
    stream.storage.create(stream.key("commits/00000004.json"), b"{}")


def move_the_alias(desk: Any, _make_edit: Make) -> None:
    desk.open_registry().point_alias(desk.versions()[1])


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (lose_an_edit, "lost: expected "),
        (apply_one_more, "twice: expected "),
        (leave_a_file, "inbox: late.jsonl waits still"),
        (delete_an_object, "objects: commit 1 needs "),
        (damage_an_artifact, "rebuild: commit 2: artifact "),
        (leave_a_gap, "log: it ends at 2, and there is "),
        (move_the_alias, "MLflow: expected commit 2 as champion, found 1"),
    ],
)
def test_what_is_wrong_is_told(kept: tuple[Any, Expected], make_edit: Make, harm: Callable[..., None], told: str) -> None:
    desk, expected = kept
    harm(desk, make_edit)
    wrong = look(desk, expected, whole=harm is damage_an_artifact)
    assert any(line.startswith(told) for line in wrong), wrong
