"""`errata calibrate` from the console, on bases that know nothing: it runs through, says so, goes on after an interruption, and what it
found is what a new stream takes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.tiny_base import SENTENCES, build_edit, write_base
from errata.calibration.facts import ENOUGH
from errata.calibration.gate_report import GateReport
from errata.profiles import NeuronProfile, Profile, parse_profile
from errata.settings import load_settings
from flows import calibrate as calibrate_flow
from flows.calibrate import calibrate_base, calibrate_gate, take_gate_step, take_step
from registry.calibrations import find_calibrated, open_objects
from registry.shared import get_profile
from registry.storage.base import open_storage
from tasks.onboarding import place_base

pytestmark = pytest.mark.usefixtures("prefect_server")

STORIES = Path(__file__).parents[3] / "shared" / "data" / "models" / "stories260K"


@pytest.fixture(autouse=True)
def own_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow leaves its last address in the environment."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_base(tmp_path / "base")


@pytest.fixture
def facts(tmp_path: Path) -> Path:
    """Edits that can be written into it, though it knows none of their old answers."""
    edits = [build_edit(person, answer=person, target_true="Bern") for person in range(16)]
    path = tmp_path / "facts.jsonl"
    path.write_text("\n".join(edit.model_dump_json(exclude_none=True) for edit in edits))
    return path


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text("\n".join(SENTENCES))
    return path


def read_profile(root: Path, digest: str) -> Profile | NeuronProfile:
    storage = open_storage(str(root))
    (key,) = [entry.key for entry in storage.list("shared/profiles/") if digest in entry.key]
    return parse_profile(get_profile(storage, key.split("/")[2], digest))


def count_runs(root: Path) -> int:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{root / 'mlflow.db'}")
    experiments = [found for found in client.search_experiments() if found.name.startswith("errata/calibrations/")]
    return len(client.search_runs([found.experiment_id for found in experiments], max_results=1_000))


@pytest.mark.slow
def test_it_goes_on_where_it_was_and_a_stream_takes_what_it_found(
    errata: Callable[..., Any], tmp_path: Path, base: Path, facts: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "root"
    monkeypatch.setenv("ERRATA_ROOT", str(root))
    words = ("calibrate", "--base", str(base), "--facts", str(facts), "--corpus", str(corpus), "--edits", "8", "--json")

    # The budget is over before it has begun: one place, and its curve.
    placed = place_base(load_settings(), str(base), None)
    told = calibrate_base(placed.ref.digest, str(facts), str(corpus), 0.0, 8)
    assert told.cut_short and told.steps == 2 and told.edits == 8
    assert told.known == 0 and told.effects == {} and "too few to trace" in told.remarks[0]
    assert [Path(figure).read_bytes()[:4] for figure in told.figures] == [b"\x89PNG"]
    assert count_runs(root) == told.trials + 1, "a run for each trial, and one for the search"

    # What the profile says is what was measured.
    profile = read_profile(root, told.profile)
    assert isinstance(profile, Profile)
    note = profile.calibration
    assert note is not None and note.chosen.lam == profile.solve.lam == told.lam
    assert note.chosen.layers == profile.prepare.layers and note.known == 0
    assert [point.lam for point in note.curve] == sorted(point.lam for point in note.curve) and len(note.curve) >= 5
    assert profile.max_norm_ratio is not None and profile.max_norm_ratio > note.growth[-1][1]

    # With more time it is interrupted, and goes on: what is measured is not measured again.
    taken = list[Any]()

    def take_some(*values: Any) -> Any:
        if len(taken) == 2:
            raise KeyboardInterrupt
        taken.append(take_step(*values))
        return taken[-1]

    with monkeypatch.context() as patch:
        patch.setattr(calibrate_flow, "take_step", take_some)
        assert errata(*words).code == 130
    assert [step.number for step in taken] == [3, 4]
    second = errata(*words)
    assert second.code == 0, second.err
    assert second.json["trials"] > told.trials and not second.json["cut_short"]
    assert count_runs(root) == second.json["trials"] + 1
    third = errata(*words)
    assert (third.json["trials"], third.json["lam"]) == (second.json["trials"], second.json["lam"])

    # A new stream takes the newest by itself.
    made = errata("init", "--stream", "main", "--base", str(base))
    assert made.code == 0, made.err
    assert find_calibrated(open_storage(str(root)), told.base, "d4s") == third.json["profile"]
    assert third.json["profile"][:12] in made.out


def test_a_gate_is_calibrated_goes_on_and_is_what_a_stream_of_neurons_takes(
    errata: Callable[..., Any], tmp_path: Path, base: Path, facts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "root"
    monkeypatch.setenv("ERRATA_ROOT", str(root))
    words = ("calibrate", "--editor", "ireva", "--base", str(base), "--facts", str(facts), "--edits", "8", "--json")

    # The budget is over before it has begun: one layer, the published one, at every gate.
    placed = place_base(load_settings(), str(base), None)
    told = calibrate_gate(placed.ref.digest, str(facts), 0.0, 8)
    assert told.cut_short and (told.steps, told.layer, told.edits) == (2, 2, 8)
    assert told.known == 0 and "too few" in told.remarks[0] and "have no paraphrases" in told.remarks[1]
    assert [read.layer for read in told.layers] == [1, 2]
    assert [Path(figure).read_bytes()[:4] for figure in told.figures] == [b"\x89PNG"] * 2
    assert count_runs(root) == told.trials + 1, "a run for each trial, and one for the search"

    # What the profile says is what was measured.
    profile = read_profile(root, told.profile)
    assert isinstance(profile, NeuronProfile) and profile.calibration is not None
    note, gate = profile.calibration, (profile.prepare.layer, profile.solve.theta, profile.solve.gain)
    assert gate == (told.layer, told.theta, told.gain) == (note.chosen.layer, note.chosen.theta, note.chosen.gain)
    assert (0.75, 80.0) in {(point.theta, point.gain) for point in (note.chosen, *note.rivals)}, "beside the published gate"
    assert {point.gain for point in note.curve} == {told.gain} and gate in {(p.layer, p.theta, p.gain) for p in note.curve}
    assert [point.gain for point in note.gains] == [20, 40, 80, 160] and {point.theta for point in note.gains} == {told.theta}
    report = GateReport.from_bytes(open_objects(open_storage(str(root)), told.base).get(note.report))
    assert report.write_note(note.report) == note and len(report.trials) == told.trials
    written = {edit.subject for edit in report.facts.search[: told.edits]}
    assert not written & {edit.subject for edit in report.facts.validation}

    # With more time it is interrupted, and goes on: what is measured is not measured again.
    taken = list[Any]()

    def take_some(*values: Any) -> Any:
        if len(taken) == 1:
            raise KeyboardInterrupt
        taken.append(take_gate_step(*values))
        return taken[-1]

    with monkeypatch.context() as patch:
        patch.setattr(calibrate_flow, "take_gate_step", take_some)
        assert errata(*words).code == 130
    assert [step.number for step in taken] == [3]
    second = errata(*words)
    assert second.code == 0, second.err
    assert second.json["trials"] > told.trials and not second.json["cut_short"]
    assert count_runs(root) == second.json["trials"] + 1
    third = errata(*words[:-1])
    assert third.code == 0 and f"{second.json['theta']:g}" in third.out and "errata init" in third.out

    # A new stream of neurons takes the newest by itself, and only that one.
    found = find_calibrated(open_storage(str(root)), told.base, "ireva")
    made = errata("init", "--stream", "main", "--base", str(base), "--editor", "ireva")
    assert made.code == 0, made.err
    assert found is not None and found[:12] in made.out
    assert find_calibrated(open_storage(str(root)), told.base, "d4s") is None


def test_bad_input_is_named(errata: Callable[..., Any], tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ERRATA_ROOT", str(tmp_path / "root"))
    missing = errata("calibrate", "--base", str(base), "--facts", str(tmp_path / "none.jsonl"))
    assert missing.code == 2 and "none.jsonl" in missing.err
    few = tmp_path / "few.jsonl"
    few.write_text(build_edit(0, target_true="Bern").model_dump_json(exclude_none=True))
    refused = errata("calibrate", "--base", str(base), "--facts", str(few))
    assert refused.code == 2 and f"at least {ENOUGH} edits" in refused.err and "Traceback" not in refused.err
    corpus = errata("calibrate", "--base", str(base), "--editor", "ireva", "--corpus", str(few))
    assert corpus.code == 2 and "expected none for ireva" in corpus.err
    other = errata("calibrate", "--base", str(base), "--editor", "rome")
    assert other.code == 2 and "expected one of d4s, ireva" in other.err
    nowhere = errata("calibrate", "--base", str(tmp_path / "nowhere"))
    assert nowhere.code == 2 and "nowhere" in nowhere.err


@pytest.mark.long
def test_a_real_checkpoint_that_knows_no_facts(errata: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not STORIES.is_dir():
        pytest.skip(f"no Llama checkpoint at {STORIES}")
    monkeypatch.setenv("ERRATA_ROOT", str(tmp_path / "root"))
    ran = errata("calibrate", "--base", str(STORIES), "--budget", "0.5", "--edits", "4")
    assert ran.code == 0, ran.err
    assert "The model knows 0 of" in " ".join(ran.out.split()) and "too few to trace" in " ".join(ran.out.split())
    assert "No corpus was given" in " ".join(ran.out.split())
