"""What answers from memory before it is written, what is folded into an adapter, and how the tiers of one version live with each other."""

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from benchmarks.tiny_base import start_root, write_reader
from errata.edits import Edit
from errata.manifests import Layer

pytestmark = pytest.mark.usefixtures("prefect_server")

Make = Callable[..., Edit]
Errata = Callable[..., Any]
UNREADABLE = "Zqx wvut"
"""Nothing that the base ever reads off a fact."""


@pytest.fixture(scope="session")
def reader_root(tmp_path_factory: pytest.TempPathFactory, empty_mlflow: Path) -> Path:
    """A root on a base that reads facts in front of a question; neurons, which leave it able to."""
    home = tmp_path_factory.mktemp("reader")
    (home / "base").mkdir()
    write_reader(home / "base")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        start_root(str(home / "root"), home / "base", home, editor="ireva")
    shutil.copy(empty_mlflow, home / "root" / "mlflow.db")
    return home / "root"


@pytest.fixture
def template(reader_root: Path) -> Path:
    return reader_root


@pytest.fixture(autouse=True)
def tiny_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """What so small a base has room for, and what it takes to move it."""
    for name, value in {"MEMORY__DEMONSTRATIONS": "1", "DISTILL__EPOCHS": "60", "DISTILL__LR": "0.02", "DISTILL__VALIDATION": "0"}.items():
        monkeypatch.setenv(f"ERRATA_{name}", value)


@pytest.fixture
def say(desk: Any) -> Callable[..., list[str]]:
    """The first words that the champion answers, through plain MLflow, in one call."""
    import mlflow

    def say(*prompts: str) -> list[str]:
        model = mlflow.pyfunc.load_model("models:/main@champion")
        return [str(text).split()[0] for text in model.predict(list(prompts), params={"max_new_tokens": 4})]

    return say


def remember(**options: Any) -> Any:
    from flows.remember import remember_edits

    return remember_edits("main", **options)


def distil(**options: Any) -> Any:
    from flows.distill import distill_edits

    return distill_edits("main", **options)


def tiers(desk: Any) -> tuple[int, int, int]:
    """Live edits in the weights, in the adapter, in memory."""
    from registry.tiers import describe_tiers

    found = describe_tiers(desk.open())
    return found["weights"], found["adapter"], found["memory"]


def above(desk: Any, seq: int) -> dict[str, Layer]:
    return {layer.editor: layer for layer in desk.read_manifest(seq).above}


def check(errata: Errata) -> None:
    ran = errata("rebuild", "--check", "--json")
    assert ran.code == 0 and ran.json["findings"] == [], ran.out + ran.err


def test_an_edit_answers_from_memory_until_the_next_batch_writes_it(
    desk: Any, make_edit: Make, errata: Errata, say: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, other = make_edit(0, 0, 0, id="first"), make_edit(1, 1, 2, id="second"), make_edit(5, 2, 1)
    desk.submit("monday", first, second)
    monkeypatch.setenv("ERRATA_POLICY__MAX_RISK", "0")
    (batch,) = remember()
    monkeypatch.delenv("ERRATA_POLICY__MAX_RISK")
    assert (batch.decision, batch.commit, batch.outcomes, batch.risks) == ("accept", 1, {"live": 2}, None), "memory costs no weights"
    assert desk.open().log.read(1).kind == "memory" and not desk.open().log.read(1).pairs and not desk.waiting()
    assert desk.read_manifest(1).layers[0].artifact is None, "no weight was written"
    (unedited,) = [row["base"].split()[0] for row in errata("ask", other.rewrite_prompt, "--json").json]
    # One call of prompts in and out of scope; a question in other words about the subject is in.
    asked = say(first.rewrite_prompt, other.rewrite_prompt, f"It is said. {second.rewrite_prompt}")
    assert asked == [first.target_new, unedited, second.target_new]
    status = errata("status", "--json").json
    assert status["tiers"] == {"weights": 0, "adapter": 0, "memory": 2, "unconsolidated": 2, "oldest_seconds": pytest.approx(30, abs=30)}
    assert "2 in memory; 2 nowhere else, the oldest for" in errata("status").out
    (why,) = errata("ask", "--why", f"It is said. {first.rewrite_prompt}", "--json").json
    assert why["memory"]["case"] == 2 and why["memory"]["fact"]["id"] == "first" and why["memory"]["names"] == [first.subject]
    assert why["memory"]["scores"][0]["similarity"] >= why["memory"]["floor"]
    assert "case 2: it names the subject of one fact" in errata("ask", "--why", f"It is said. {first.rewrite_prompt}").out
    assert remember() == []
    shown = errata("show", "first", "--json").json
    assert shown["tiers"] == ["memory"] and shown["shares_pair"] == [] and "answers from" in errata("show", "first").out

    desk.submit("tuesday", make_edit(2, 2, 3, id="third"))
    (batch,) = desk.apply()
    assert batch.outcomes == {"live": 3, "replaced": 2} and batch.risks.edits == 3
    assert desk.statuses() == {"first@1": "replaced", "second@1": "replaced", "first@2": "live", "second@2": "live", "third@2": "live"}
    assert tiers(desk) == (3, 0, 0) and above(desk, 2) == {}
    assert say(first.rewrite_prompt, second.rewrite_prompt) == [first.target_new, second.target_new]
    desk.roll_back(1)
    assert tiers(desk) == (0, 0, 2) and say(first.rewrite_prompt) == [first.target_new]
    check(errata)


def test_what_memory_cannot_answer_waits_for_the_batch_and_is_tried_once(desk: Any, make_edit: Make, errata: Errata) -> None:
    desk.submit("monday", make_edit(0, id="good"), make_edit(1, id="unreadable", target_new=UNREADABLE), {"subject": "Bo"})
    batches = remember()
    assert [(batch.decision, batch.commit, batch.outcomes) for batch in batches] == [("accept", 1, {"live": 1, "refused": 1})]
    assert desk.waiting() == ["monday.jsonl"] and remember() == [], "what was tried is not tried again"
    ran = errata("remember")
    assert ran.code == 0 and "nothing waits in the inbox of main that memory has not tried" in ran.out
    desk.submit("tuesday", make_edit(2, id="alone", target_new=UNREADABLE))
    (batch,) = remember()
    assert batch.commit is None and desk.open().head.seq == 1, "nothing is committed where there is nothing to say"
    (batch,) = desk.apply()
    assert desk.waiting() == [] and batch.outcomes["live"] >= 1 and desk.statuses()["good@2"] == "live"
    check(errata)


def test_what_a_batch_refuses_goes_on_answering_from_memory(
    desk: Any, make_edit: Make, monkeypatch: pytest.MonkeyPatch, say: Callable[..., list[str]]
) -> None:
    edit = make_edit(0, id="stubborn")
    desk.submit("monday", edit)
    remember()
    # Neurons that do nothing: the candidate is as good as memory, but they are not what answers.
    with monkeypatch.context() as patch:
        patch.setattr("errata.editors.neurons.NeuronPatch.attach", lambda self, base: nullcontext())
        desk.apply()
    assert desk.statuses()["stubborn@1"] == "live"
    assert tiers(desk) == (0, 0, 1) and say(edit.rewrite_prompt) == [edit.target_new]
    assert desk.apply() == [], "and is not tried again under the same settings"


def test_edits_are_replaced_withdrawn_and_erased_from_memory_alone(
    desk: Any, make_edit: Make, errata: Errata, say: Callable[..., list[str]]
) -> None:
    first, second, third = make_edit(0, 0, 0, id="first"), make_edit(1, 1, 2, id="second"), make_edit(2, 2, 3, id="third")
    desk.submit("monday", first, second, third)
    remember()
    newer = make_edit(0, 0, 2, id="newer")
    desk.submit("tuesday", newer)
    (batch,) = remember()
    assert batch.outcomes == {"live": 1, "replaced": 1} and say(first.rewrite_prompt) == [newer.target_new]
    withdrawn = desk.withdraw("second")
    assert withdrawn.decision == "accept" and withdrawn.measured.exactness.relative == 0.0
    assert tiers(desk) == (0, 0, 2) and say(second.rewrite_prompt, third.rewrite_prompt)[1] == third.target_new
    assert "nothing was put before it" in errata("ask", "--why", second.rewrite_prompt).out
    desk.roll_back(1)
    assert say(first.rewrite_prompt, second.rewrite_prompt) == [first.target_new, second.target_new]
    desk.withdraw("second")
    ran = errata("erase", "second", "--yes", "--json")
    assert ran.code == 0 and ran.json["finished"], ran.out + ran.err
    subject = second.subject.encode()
    left = [path for path in (desk.root / "streams" / "main").rglob("*") if path.is_file() and subject in path.read_bytes()]
    assert left == [] and say(third.rewrite_prompt) == [third.target_new]
    assert {finding["state"] for finding in errata("rebuild", "--check", "--json").json["findings"]} == {"erased"}


def test_an_adapter_takes_edits_in_and_goes_with_the_first_that_leaves(
    desk: Any, make_edit: Make, errata: Errata, say: Callable[..., list[str]]
) -> None:
    written = [make_edit(number, number % 4, number, id=f"w{number}") for number in range(3)]
    desk.submit("monday", *written)
    desk.apply()
    remembered = make_edit(4, 1, 2, id="remembered")
    desk.submit("tuesday", remembered)
    remember()
    assert tiers(desk) == (3, 0, 1)
    ran = errata("distill", "--json")
    assert ran.code == 0 and ran.json["decision"] == "accept", ran.out + ran.err
    facts = ran.json
    assert (facts["commit"], facts["taught"], facts["went_on"]) == (3, 4, False)
    commit = desk.open().log.read(3)
    assert (commit.kind, commit.of, commit.absorbed) == ("distillation", 2, 4) and "4 of 4 live edits take" in commit.reasons[0]
    # The adapter knows what only memory knew; the weights beneath are those of before.
    assert tiers(desk) == (3, 4, 0) and set(above(desk, 3)) == {"distillmike"}
    assert desk.read_manifest(3).layers[0] == desk.read_manifest(2).layers[0]
    assert say(remembered.rewrite_prompt, written[0].rewrite_prompt) == [remembered.target_new, written[0].target_new]
    assert not any((desk.cache / "distill").rglob("*.safetensors")), "prompts of edits do not stay in the cache"
    ran = errata("distill")
    assert ran.code == 0 and "the adapter was taught all live edits" in ran.out

    summary = desk.withdraw("w1")
    assert summary.decision == "accept" and "The adapter is dropped: it had absorbed w1" in " ".join(summary.reasons)
    assert tiers(desk) == (2, 0, 1), "what only the adapter knew is remembered again"
    assert say(remembered.rewrite_prompt) == [remembered.target_new]
    summary = distil()
    assert summary.decision == "accept" and not summary.went_on and summary.taught == 3
    check(errata)


def test_an_adapter_is_carried_by_whatever_leaves_its_edits_alone(
    desk: Any, make_edit: Make, errata: Errata, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It hardly changes anything, so that neurons, which are keyed to the base, fire under it."""
    monkeypatch.setenv("ERRATA_DISTILL__LR", "1e-5")
    monkeypatch.setenv("ERRATA_DISTILL__EPOCHS", "1")
    desk.submit("monday", *(make_edit(number, number % 4, number, id=f"w{number}") for number in range(3)))
    desk.apply()
    desk.submit("tuesday", make_edit(4, 1, 2, id="remembered"))
    remember()
    first = distil()
    assert (first.decision, first.taught, first.absorbed) == ("accept", 4, 3)
    assert tiers(desk) == (3, 3, 1), "what it has not learned stays in memory"
    desk.submit("wednesday", make_edit(6, 3, 1, id="more"))
    desk.apply()
    adapter = {"distillmike": above(desk, 3)["distillmike"]}
    assert above(desk, 4).items() >= adapter.items() and desk.statuses()["more@4"] == "live" and tiers(desk)[:2] == (5, 3)
    ran = errata("compact", "--json")
    assert ran.code == 0 and above(desk, 5) == above(desk, 4), ran.out + ran.err
    desk.withdraw("more")
    assert above(desk, 6).items() >= adapter.items()
    check(errata)
    # A rollback to before it: the newest adapter whose edits are all live is gone on from.
    desk.roll_back(2)
    assert tiers(desk) == (3, 0, 1) and above(desk, 7).keys() == {"mike"}
    assert distil().went_on
    desk.submit("thursday", make_edit(0, 0, 3, id="newer"))
    desk.apply()
    assert desk.statuses()["w0@1"] == "replaced" and "distillmike" not in above(desk, 9)
    check(errata)


def test_batches_go_on_while_an_adapter_is_trained(desk: Any, make_edit: Make) -> None:
    from tasks.distilling import commit_distillation, judge_distillation, order_distillation, stack_adapter, train_adapter

    desk.submit("monday", *(make_edit(number, number % 4, number, id=f"case-{number}") for number in range(3)))
    remember()
    order = order_distillation("main", False)
    assert order is not None
    trained = train_adapter("main", order)
    desk.submit("tuesday", make_edit(7, 2, 1, id="meanwhile"))
    remember()
    stacked = stack_adapter("main", trained)
    assert stacked is not None
    done = commit_distillation("main", stacked[0], trained, judge_distillation("main", stacked[1]))
    assert done.decision == "accept" and tiers(desk) == (0, 3, 1), "what came meanwhile is in memory still"
    desk.withdraw("case-1")
    assert stack_adapter("main", trained) is None, "an edit that it has absorbed is gone: it has to be trained again"


@pytest.mark.parametrize(("dies_in", "committed"), [("commit_batch", 0), ("project_versions", 1)])
def test_a_run_that_ends_in_the_middle_is_made_up_for(
    desk: Any, make_edit: Make, say: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch, dies_in: str, committed: int
) -> None:
    edit = make_edit(0, id="first")
    desk.submit("monday", edit)

    def die(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(f"flows.edit.{dies_in}", die)
        remember()
    assert desk.open().head.seq == committed and desk.versions() == {}
    remember()
    assert desk.statuses() == {"first@1": "live"} and set(desk.versions()) == {1} and say(edit.rewrite_prompt) == [edit.target_new]


def test_memory_may_hold_everything(desk: Any, make_edit: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ERRATA_MEMORY__HOLDS", "all")
    desk.submit("monday", make_edit(0, id="first"), make_edit(1, 1, 2, id="second"))
    desk.apply()
    assert tiers(desk) == (2, 0, 2)
    desk.withdraw("first")
    assert tiers(desk) == (1, 0, 1)
    monkeypatch.setenv("ERRATA_MEMORY__HOLDS", "pending")
    desk.submit("tuesday", make_edit(3, 2, 1, id="third"))
    desk.apply()
    assert tiers(desk) == (2, 0, 0), "what the settings say now holds from the next commit on"


def test_demonstrations_come_from_a_file_of_training_edits(
    desk: Any, make_edit: Make, errata: Errata, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from errata.editors.memory import EditMemory

    pool = tmp_path / "pool.jsonl"
    training = [make_edit(number, id=f"pool-{number}") for number in (8, 9)]
    pool.write_text("".join(f"{edit.model_dump_json(exclude_none=True)}\n" for edit in training))
    monkeypatch.setenv("ERRATA_MEMORY__POOL", str(pool))
    desk.submit("monday", make_edit(0, id="first"))
    ran = errata("remember", "--json")
    assert ran.code == 0 and ran.json[0]["outcomes"] == {"live": 1}, ran.out + ran.err
    stream = desk.open()
    memory = EditMemory.from_bytes(stream.objects.get(above(desk, 1)["mike"].artifact or ""), stream.objects.get)
    assert [fact.id for fact in memory.choose_demonstrations(memory.facts["first@1"])] in (["pool-8"], ["pool-9"])
    monkeypatch.setenv("ERRATA_MEMORY__POOL", str(tmp_path / "none.jsonl"))
    desk.withdraw("first")
    desk.submit("tuesday", make_edit(1, id="second"))
    ran = errata("remember")
    assert ran.code == 2 and "none.jsonl: expected a readable file of edits" in ran.err


def test_what_no_pairs_lead_back_to_is_kept_with_archived_versions(desk: Any, make_edit: Make, errata: Errata) -> None:
    from datetime import UTC, datetime, timedelta

    from registry.collection import survey_stream
    from registry.history import open_history

    desk.submit("monday", make_edit(0, id="first"))
    remember()
    desk.apply()
    distil()
    desk.withdraw("first")
    survey = survey_stream(open_history(str(desk.root), "main"), 1, 0, datetime.now(UTC), timedelta(hours=1))
    needed = {layer.artifact for seq in (1, 3) for layer in above(desk, seq).values()}
    assert len(needed) == 2 and needed <= survey.needed.keys()
    assert set(survey.given_up) == {desk.read_manifest(2).layers[0].artifact}


def test_a_base_that_does_not_read_teaches_nothing(desk: Any, make_edit: Make, errata: Errata, monkeypatch: pytest.MonkeyPatch) -> None:
    from errata.retrieval import demonstrations

    first, second = make_edit(0, 0, 0, id="first"), make_edit(1, 1, 2, id="second")
    desk.submit("monday", first, second)
    desk.apply()
    # A layout that this base was never taught.
    monkeypatch.setattr(demonstrations, "_spell_fact", lambda fact: f"{fact.target} ")
    ran = errata("distill", "--json")
    assert ran.code == 3 and (ran.json["decision"], ran.json["commit"], desk.open().head.seq) == ("reject", None, 1)
    assert ran.json["reasons"][0].startswith("Memory answers 0 of 2 live edits: this base does not take facts from its context")


def test_there_has_to_be_something_to_distil(desk: Any, errata: Errata) -> None:
    ran = errata("distill")
    assert ran.code == 0 and "nothing to distil in main" in ran.out


def test_an_edit_that_an_adapter_spoils_answers_from_memory(
    desk: Any, make_edit: Make, errata: Errata, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was written, and answered; now the adapter lies over it. So small a base cannot read through such an adapter: where the answer is
    looked for is all that is asked here."""
    import tasks.distilling

    first, second = make_edit(0, 0, 0, id="first"), make_edit(1, 1, 2, id="second")
    desk.submit("monday", first, second)
    desk.apply()
    monkeypatch.setattr(tasks.distilling, "find_answered_by", lambda settings, base, artifacts, edits: [True, False])
    summary = distil()
    assert (summary.decision, summary.taught, summary.absorbed) == ("accept", 2, 1)
    assert tiers(desk) == (2, 1, 1)
    assert errata("ask", "--why", second.rewrite_prompt, "--json").json[0]["memory"]["fact"]["id"] == "second"
    assert distil() is None, "it was taught all there is"
    desk.withdraw("second")
    assert tiers(desk) == (1, 1, 0)
    check(errata)


def test_edits_that_come_are_not_refused_for_an_adapter(desk: Any, make_edit: Make, errata: Errata, say: Callable[..., list[str]]) -> None:
    """Neurons are keyed to what the base sees. What this adapter does to that keeps those that come later from firing."""
    first, second, third = make_edit(0, 0, 0, id="first"), make_edit(1, 1, 2, id="second"), make_edit(3, 3, 1, id="third")
    desk.submit("monday", first, second)
    desk.apply()
    assert distil().decision == "accept" and tiers(desk)[1] > 0
    desk.submit("tuesday", third)
    (batch,) = desk.apply()
    assert batch.decision == "accept" and batch.reasons[0] == "The adapter is dropped: edits that come do not take under it."
    assert tiers(desk) == (3, 0, 0)
    assert say(*(edit.rewrite_prompt for edit in (first, second, third))) == [edit.target_new for edit in (first, second, third)]
    check(errata)
