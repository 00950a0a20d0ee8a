"""`errata ask --why` and `errata trace`: what a person reads names the right edits, and the shares stand in MLflow."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pytest

from errata.edits import Edit
from registry.undoing import list_served

pytestmark = pytest.mark.usefixtures("prefect_server")

Make = Callable[..., Edit]
Run = Callable[..., Any]


@pytest.fixture
def neurons(desk: Any, errata: Run, editable_folder: Path, make_edit: Make, tmp_path: Path) -> str:
    """A stream of neurons in which one of four edits is withdrawn; its name."""
    assert errata("init", "--stream", "neurons", "--base", str(editable_folder), "--editor", "ireva").code == 0
    rows = [make_edit(person, answer=person, id=f"case-{person}") for person in range(4)]
    (tmp_path / "edits.jsonl").write_text("".join(row.model_dump_json(exclude_none=True) + "\n" for row in rows))
    assert errata("submit", "edits.jsonl", "--stream", "neurons").code == 0
    assert errata("apply", "--stream", "neurons", "--yes").code == 0
    assert errata("withdraw", "case-3", "--stream", "neurons", "--yes").code == 0
    return "neurons"


def test_why_names_the_neuron(neurons: str, errata: Run, make_edit: Make) -> None:
    prompts = [make_edit(0).rewrite_prompt, make_edit(3).rewrite_prompt, "Something else"]
    words = ["ask", "--why", *prompts, "--max-new-tokens", "1", "--stream", neurons]
    fired, tombstone, none = errata(*words, "--json").json
    (token,) = fired["tokens"]
    (edit,) = token["neuron"]["edits"]
    assert (token["told"], edit["occurrence"], edit["prompt"], edit["target"]) == ("fired", "case-0@1", prompts[0], "Paris")
    assert (token["neuron"]["token"], token["neuron"]["live"], token["threshold"]) == (1, True, pytest.approx(0.75))
    assert token["cosine"] == pytest.approx(1, abs=1e-3) and token["margin"] > 0
    assert token["rival"]["edits"][0]["occurrence"] in {"case-1@1", "case-2@1", "case-3@1"}
    assert token["probability"] > token["base_probability"]
    assert fired["champion"] == "Paris" != fired["base"] and (fired["neurons"], fired["near"], fired["deltas"]) == (4, [], {})
    assert tombstone["tokens"][0]["told"] == "tombstone" and tombstone["champion"] == tombstone["base"]
    assert tombstone["tokens"][0]["neuron"]["edits"][0]["status"] == "withdrawn"
    assert none["tokens"][0]["told"] == "none" and none["champion"] == none["base"]
    said = errata(*words).out
    assert f"fired: token 1 of case-0@1 {prompts[0]} → Paris" in said
    assert f"caught by a tombstone, nothing added: token 1 of case-3@1 {prompts[1]}" in said and "(withdrawn)" in said
    assert "none fired; nearest, 0." in said and "below θ" in said


def test_why_names_the_nearest_keys(used_desk: Any, errata: Run, make_edit: Make) -> None:
    edited = make_edit(0).rewrite_prompt
    (row,) = errata("ask", edited, "--why", "--max-new-tokens", "1", "--json").json
    nearest = row["near"][0]
    assert [edit["occurrence"] for edit in nearest["edits"]] == ["case-3@2"] and nearest["edits"][0]["target"] == "Rome"
    assert nearest["cosine"] == pytest.approx(1, abs=1e-4) and nearest["layers"].keys() == {"1"} == row["deltas"].keys()
    assert row["compared"] == len(desk_live(used_desk)) and row["deltas"]["1"] > 0
    assert row["tokens"][0]["probability"] > row["tokens"][0]["base_probability"]
    said = errata("ask", edited, "--why", "--max-new-tokens", "1").out
    assert f"nearest of {row['compared']} live keys" in said and f"case-3@2 {edited} → Rome" in said
    (plain,) = errata("ask", edited, "--max-new-tokens", "1", "--json").json
    assert plain == {name: row[name] for name in ("prompt", "base", "champion")}


def desk_live(desk: Any) -> list[str]:
    return [row.occurrence for row in desk.open().index.find_rows("live")]


def test_why_of_a_stream_without_edits(desk: Any, errata: Run) -> None:
    (row,) = errata("ask", "The home of Bo Lind", "--why", "--max-new-tokens", "2", "--json").json
    assert row["champion"] == row["base"] and (row["neurons"], row["compared"], row["near"], row["at"]) == (0, 0, [], None)
    assert "no edit is live" in errata("ask", "The home of Bo Lind", "--why").out


def test_edits_of_neurons_are_switched_off(neurons: str, errata: Run, desk: Any) -> None:
    facts = errata("trace", neurons, "--json").json
    measured = facts["measured"]
    assert (facts["commit"], measured["live"], measured["retrieve_success"], measured["consistency"]) == (
        2,
        3,
        {"edits": 3, "percent": 100.0},
        {"edits": 3, "percent": 100.0},
    )
    version = desk.open_registry().champion(neurons)
    metrics = mlflow.get_run(version.run).data.metrics
    assert (version.commit, metrics["trace.retrieve_success"], metrics["trace.consistency"], metrics["trace.edits"]) == (2, 100, 100, 3)
    said = errata("trace", neurons, "--sample", "2")
    assert said.code == 0 and "100.0 %: the answer changes" in said.out and "2 edits, each alone" in said.out


def test_edits_in_weights_are_switched_off(used_desk: Any, errata: Run) -> None:
    before = (used_desk.open().head, desk_live(used_desk))
    facts = errata("trace", "--sample", "3", "--seed", "1", "--json").json
    measured = facts["measured"]
    assert (measured["live"], measured["retrieve_success"]["edits"], facts["seed"]) == (len(before[1]), 3, 1)
    assert measured["retrieve_success"]["percent"] == 100
    assert "trace.retrieve_success" in mlflow.get_run(used_desk.versions()[2].run).data.metrics
    assert (used_desk.open().head, desk_live(used_desk)) == before
    assert errata("trace", "--sample", "0").code == 2


def test_nothing_live_is_nothing_to_switch_off(desk: Any, errata: Run) -> None:
    ran = errata("trace", "--json")
    assert ran.code == 0 and ran.json["measured"]["retrieve_success"] == {"edits": 0, "percent": None}
    assert "–" in errata("trace").out


def test_the_champions_edits_are_meant_while_another_version_waits(
    desk: Any, errata: Run, make_edit: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk.submit("one", make_edit(0), make_edit(1))
    desk.apply()
    old = desk.open()
    pairs = {(row.pairs, row.row) for row in old.index.find_rows("live")}
    monkeypatch.setenv("ERRATA_POLICY__PROMOTE", "manual")
    desk.submit("two", make_edit(0, answer=1), make_edit(2))
    desk.apply()
    stream = desk.open()
    assert (stream.head.champion, stream.head.challenger) == (1, 2)
    assert {(served.pairs, served.line) for served in list_served(stream)} == pairs
    facts = errata("trace", "--json").json
    assert (facts["commit"], facts["measured"]["live"], facts["measured"]["retrieve_success"]["edits"]) == (1, 2, 2)
    (row,) = errata("ask", make_edit(0).rewrite_prompt, "--why", "--max-new-tokens", "1", "--json").json
    assert (row["compared"], row["champion"], row["near"][0]["edits"][0]["target"]) == (2, "Paris", "Paris")
