"""What an edit is foretold to cost, from the flow to the screen, and batches that wait because of it."""

from collections.abc import Callable
from typing import Any

import pytest

from errata.edits import Edit, Risk
from errata.evaluation.risk import measure_risks
from registry.rows import BatchRow

pytestmark = pytest.mark.usefixtures("prefect_server")

Make = Callable[..., Edit]


@pytest.fixture
def foretold(editable_folder: Any) -> Callable[[Edit], Risk]:
    """The risk of an edit on the base of the desk."""
    from errata.modeling.loading import load_base

    base = load_base(str(editable_folder), device="cpu")
    return lambda edit: measure_risks(base, [edit], batch_tokens=2_048)[edit.edit_id]


@pytest.fixture
def hold(desk: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    return lambda most: monkeypatch.setenv("ERRATA_POLICY__MAX_RISK", str(most))


def write(desk: Any, *edits: Edit) -> Any:
    desk.submit(f"file-{desk.open().head.seq}", *edits)
    return desk.apply()[-1]


def read_batch(desk: Any, seq: int) -> dict[str, BatchRow]:
    stream = desk.open()
    return {row.edit.edit_id: row for row in stream.read_batch(stream.log.read(seq))}


def test_every_edit_that_is_to_be_written_has_its_risk(
    used_desk: Any, make_edit: Make, foretold: Callable[[Edit], Risk], errata: Callable[..., Any]
) -> None:
    rows = read_batch(used_desk, 2)
    for name, row in rows.items():
        assert row.risk == (None if name == "case-2" else foretold(row.edit)), "the second case-2 is a duplicate"
    assert rows["case-4"].risk is not None, "refused by the gate, and measured all the same"
    facts = errata("show", "case-3", "--json").json
    risk = foretold(make_edit(0, answer=1, id="case-3"))
    assert facts["risk"] == {"perplexity": risk.perplexity, "tokens": risk.tokens, "figure": pytest.approx(risk.figure)}
    told = errata("show", "case-3").out
    assert f"{risk.figure:.1f} nats" in told and "1 token" in told
    batch = errata("show", "2", "--json").json["risks"]
    figures = sorted(row.risk.figure for row in rows.values() if row.risk)
    assert (batch["edits"], batch["worst"]) == (4, pytest.approx(figures[-1])) and batch["edit"] == "case-4"
    assert batch["median"] == pytest.approx((figures[1] + figures[2]) / 2)
    assert f"{batch['median']:.1f} / {batch['worst']:.1f} nats" in errata("show", "2").out
    assert errata("show", "0", "--json").json["risks"] is None, "nothing was written"
    page = used_desk.root.parent / "report.html"
    assert errata("report", "--to", str(page)).code == 0
    assert f"Risk: {batch['median']:.1f} / {batch['worst']:.1f} nats" in page.read_text()


def test_a_retry_measures_anew_and_an_erasure_forgets(used_desk: Any, make_edit: Make, errata: Callable[..., Any]) -> None:
    old = read_batch(used_desk, 2)["case-4"].risk
    assert errata("quarantine", "retry", "case-4").code == 0
    used_desk.apply()
    assert read_batch(used_desk, 3)["case-4"].risk == old
    used_desk.withdraw("case-2")
    assert read_batch(used_desk, 1)["case-2"].risk is not None
    assert errata("erase", "case-2", "--yes").code == 0
    row = read_batch(used_desk, 1)["case-2"]
    assert row.erased and row.risk is None, "whoever guesses a text could confirm it"
    assert errata("show", "case-2", "--json").json["risk"] is None
    assert errata("rebuild", "--check").code == 0


def test_without_a_threshold_nothing_waits(desk: Any, make_edit: Make, errata: Callable[..., Any]) -> None:
    done = write(desk, make_edit(0), make_edit(1))
    assert done.decision == "accept" and done.risks.edits == 2 and desk.open().head.champion == 1
    assert errata("status", "--json").json["held"] == []


def test_a_batch_over_the_threshold_waits_and_what_builds_on_it(
    desk: Any,
    make_edit: Make,
    foretold: Callable[[Edit], Risk],
    hold: Callable[[float], None],
    ask: Callable[[Edit], str],
    errata: Callable[..., Any],
) -> None:
    first, second = make_edit(0), make_edit(1)
    write(desk, make_edit(4))
    hold(foretold(first).figure)
    assert write(desk, first).decision == "accept", "as great is not greater"
    assert desk.open().head.champion == 2
    hold(foretold(second).figure - 0.01)
    desk.submit("held", second)
    ran = errata("apply", "--yes")
    head, commit = desk.open().head, desk.open().log.read(3)
    assert ran.code == 0 and (head.champion, head.challenger, head.accepted) == (2, 3, 3)
    assert (commit.kind, commit.decision, commit.promoted) == ("edits", "hold", False)
    reason = f"held: risk {foretold(second).figure:.1f} of edit {second.edit_id} over {foretold(second).figure - 0.01:g} (policy.max_risk)"
    assert commit.reasons[0] == reason
    for told in (ran.out, errata("status").out, errata("show", "3").out):
        assert "held: risk" in told and second.edit_id in told
    assert errata("status", "--json").json["held"] == [{"commit": 3, "reason": reason}]
    assert ask(first) == "Paris" and ask(second) != "Paris"
    assert desk.live().keys() >= {first.edit_id, second.edit_id}, "accepted all the same"

    hold(1e9)
    assert write(desk, make_edit(5)).decision == "accept"
    desk.withdraw(make_edit(4).edit_id)
    head = desk.open().head
    assert (head.champion, head.challenger) == (2, 5), "neither may promote what waits beneath it"
    assert errata("status", "--json").json["held"] == [{"commit": 3, "reason": reason}]
    approved = errata("approve", "5", "--yes")
    assert approved.code == 0 and "held: risk" in approved.out
    assert desk.open().head.champion == 5 and ask(second) == "Paris" and "held" not in errata("status").out
    assert write(desk, make_edit(6)).decision == "accept" and desk.open().head.champion == desk.open().head.seq, "the way is free again"
    assert errata("rebuild", "--check").code == 0


def test_a_held_batch_can_be_refused(desk: Any, make_edit: Make, hold: Callable[[float], None], errata: Callable[..., Any]) -> None:
    write(desk, make_edit(0))
    live = desk.live()
    hold(0)
    assert write(desk, make_edit(1), make_edit(2)).decision == "hold"
    assert "and of 1 more" in desk.open().log.read(2).reasons[0]
    assert errata("refuse", "2", "--drop", "--yes").code == 0
    assert desk.live() == live and desk.open().head.challenger is None and errata("status", "--json").json["held"] == []
    assert errata("rebuild", "--check").code == 0


def test_a_risky_edit_that_is_refused_holds_nothing(
    desk: Any, make_edit: Make, foretold: Callable[[Edit], Risk], hold: Callable[[float], None]
) -> None:
    """Only what goes live can cost."""
    good, bad = make_edit(0), make_edit(6, prompt="{} has long been living in", target_new="Zqx wvut")
    assert foretold(bad).figure > foretold(good).figure
    hold(foretold(good).figure)
    done = write(desk, good, bad)
    assert (done.decision, done.outcomes) == ("accept", {"live": 1, "quarantined": 1})
    assert (done.risks.edit, done.risks.worst) == (bad.edit_id, foretold(bad).figure)
    assert desk.open().head.champion == 1
