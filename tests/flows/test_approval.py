"""Versions that wait for a person: `policy.promote = "manual"`."""

from collections.abc import Callable
from typing import Any

import pytest

from errata.edits import Edit
from registry.models import CHALLENGER

pytestmark = pytest.mark.usefixtures("prefect_server")

Make = Callable[..., Edit]


@pytest.fixture
def manual(desk: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("ERRATA_POLICY__PROMOTE", "manual")
    return desk


def write(desk: Any, *edits: Edit) -> Any:
    desk.submit(f"file-{desk.open().head.seq}", *edits)
    return desk.apply()[-1]


def served(desk: Any) -> dict[str, int | None]:
    registry = desk.open_registry()
    found = {alias: registry.find_alias("main", alias) for alias in ("champion", CHALLENGER)}
    return {alias: version.commit if version else None for alias, version in found.items()}


def check(errata: Callable[..., Any]) -> None:
    ran = errata("rebuild", "--check")
    assert ran.code == 0, ran.out


def test_an_accepted_version_waits_until_somebody_approves_it(
    manual: Any, make_edit: Make, ask: Callable[[Edit], str], errata: Callable[..., Any]
) -> None:
    desk = manual
    write(desk, make_edit(0))
    assert (desk.open().head.champion, served(desk)) == (0, {"champion": None, CHALLENGER: 1})
    assert "commit 1 waits for" in errata("status").out
    write(desk, make_edit(1, answer=1))
    assert served(desk) == {"champion": None, CHALLENGER: 2}, "the next batch builds on what waits"
    first = errata("approve", "1", "--reason", "read it", "--yes")
    assert first.code == 0 and served(desk) == {"champion": 1, CHALLENGER: 2}
    assert ask(make_edit(0)) == "Paris" and ask(make_edit(1)) != "Rome"
    assert errata("approve", "head", "--yes").code == 2, "the promotion is no version"
    assert errata("approve", "v2", "--yes").code == 0
    assert served(desk) == {"champion": 2, CHALLENGER: None} and ask(make_edit(1)) == "Rome"
    assert errata("approve", "v2", "--yes").code == 0, "a second time changes nothing"
    head = desk.open().head
    assert (head.champion, head.challenger, head.accepted) == (2, None, 2)
    assert desk.open().log.read(3).reasons == ("read it",)
    told = errata("refuse", "v2", "--yes")
    assert told.code == 2 and "commit 2 is the champion, none waits" in told.err
    assert "waits for" not in errata("status").out
    check(errata)


def test_a_refused_version_leaves_and_its_edits_are_tried_again(
    manual: Any, make_edit: Make, ask: Callable[[Edit], str], errata: Callable[..., Any]
) -> None:
    desk = manual
    write(desk, make_edit(0), make_edit(1))
    errata("approve", "1", "--yes")
    live = desk.live()
    write(desk, make_edit(0, answer=2), make_edit(3))
    desk.withdraw(make_edit(1).edit_id)
    assert served(desk) == {"champion": 1, CHALLENGER: 4}
    ran = errata("refuse", "4", "--reason", "not these", "--yes")
    assert ran.code == 0 and "2 edits left, 2 are back" in ran.out, ran.out
    commit = desk.open().log.read(5)
    assert (commit.kind, commit.of, commit.target, commit.promoted) == ("refusal", 4, 1, True)
    assert (desk.live(), served(desk)) == (live, {"champion": 5, CHALLENGER: None})
    assert desk.read_manifest(5) == desk.read_manifest(1) and ask(make_edit(0)) == "Paris"
    assert len(desk.waiting()) == 1
    assert desk.apply()[-1].outcomes == {"live": 2, "replaced": 1}
    assert served(desk) == {"champion": 5, CHALLENGER: 6}
    assert errata("refuse", "head", "--drop", "--yes").code == 0
    assert (desk.live(), desk.waiting()) == (live, [])
    assert errata("approve", "6", "--yes").code == 2, "left behind"
    check(errata)


def test_nothing_else_promotes_what_waits(manual: Any, make_edit: Make, errata: Callable[..., Any]) -> None:
    """A compaction, a rebuild or an erasure is the same model in other objects: what waited still waits."""
    desk = manual
    write(desk, make_edit(0))
    errata("approve", "1", "--yes")
    write(desk, make_edit(1))
    assert errata("compact").code == 0
    assert served(desk) == {"champion": 1, CHALLENGER: 4}
    assert errata("approve", "4", "--yes").code == 0
    assert served(desk) == {"champion": 4, CHALLENGER: None}
    assert errata("rollback", "1", "--yes").code == 0
    assert served(desk) == {"champion": desk.open().head.seq, CHALLENGER: None}
    check(errata)


def test_what_waits_goes_on_waiting_when_later_batches_need_nobody(
    manual: Any, make_edit: Make, errata: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch builds on what waits: to promote it would be to approve what nobody has looked at."""
    desk = manual
    write(desk, make_edit(0))
    monkeypatch.setenv("ERRATA_POLICY__PROMOTE", "auto")
    write(desk, make_edit(1))
    assert served(desk) == {"champion": None, CHALLENGER: 2}
    assert errata("approve", "head", "--yes").code == 0
    write(desk, make_edit(2))
    assert served(desk) == {"champion": 4, CHALLENGER: None}
