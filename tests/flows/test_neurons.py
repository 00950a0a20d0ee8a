"""A stream whose editor is iReVa, through everything that people do with a stream."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pytest

from errata.editors.base import Pairs
from errata.edits import Edit

pytestmark = pytest.mark.usefixtures("prefect_server")

LAYER = 2
"""Of the editable base's three."""

Make = Callable[..., Edit]
Errata = Callable[..., Any]


@pytest.fixture
def template(empty_neuron_root: Path) -> Path:
    return empty_neuron_root


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are closed after four neurons."""
    monkeypatch.setattr("errata.editors.ireva.state.BLOCK", 4)


def find_bytes(folder: Path, *parts: bytes) -> list[str]:
    """Files that hold one of the parts."""
    return [
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and any(part in path.read_bytes() for part in parts)
    ]


def check(errata: Errata) -> dict[str, Any]:
    ran = errata("rebuild", "--check", "--json")
    assert ran.code == 0, ran.out + ran.err
    return dict(ran.json)


def test_edits_come_go_and_come_back(desk: Any, make_edit: Make, errata: Errata, ask: Callable[[Edit], str]) -> None:
    first, second = make_edit(0, id="first"), make_edit(1, id="second")
    long = make_edit(2, id="long", target_new=" ".join(["so"] * 40))
    desk.submit("monday", first, second, long)
    (batch,) = desk.apply()
    assert batch.decision == "accept" and desk.statuses()["long@1"] == "rejected"
    (refusal,) = [outcome for outcome in desk.read_outcomes(1) if outcome.occurrence == "long@1"]
    assert "expected a target of at most 16 tokens" in refusal.reason
    assert ask(first).startswith(first.target_new.split()[0]) and ask(second).startswith(second.target_new.split()[0])

    withdrawal = desk.withdraw("first")
    assert withdrawal.decision == "accept" and withdrawal.measured.exactness.relative == 0.0
    assert not ask(first).startswith(first.target_new.split()[0]) and ask(second).startswith(second.target_new.split()[0])

    new = make_edit(1, answer=3, id="newer")
    desk.submit("tuesday", new)
    desk.apply()
    assert desk.statuses()["second@1"] == "replaced" and ask(new).startswith(new.target_new.split()[0])
    desk.roll_back(1)
    assert ask(first).startswith(first.target_new.split()[0]) and ask(second).startswith(second.target_new.split()[0])
    facts = check(errata)
    assert facts["findings"] == [] and facts["compared"] == {"bits": 5}


def test_another_gate_is_adopted_and_tombstones_go_with_a_compaction(
    desk: Any, make_edit: Make, errata: Errata, tmp_path: Path, ask: Callable[[Edit], str]
) -> None:
    desk.submit("monday", *(make_edit(number, id=f"case-{number}") for number in range(4)))
    desk.apply()
    desk.withdraw("case-3")
    profile = tmp_path / "gate.json"
    profile.write_text(json.dumps({"editor": "ireva", "prepare": {"layer": LAYER}, "solve": {"theta": 0.9, "gain": 100.0}}))
    ran = errata("adopt", "main", "--profile", str(profile), "--json")
    assert ran.code == 0 and ran.json["decision"] == "accept", ran.out + ran.err
    size = len(desk.open().objects.get(desk.read_manifest(3).artifacts[0]))
    ran = errata("compact", "--json")
    assert ran.code == 0 and ran.json["gap"] == 0.0, ran.out + ran.err
    assert len(desk.open().objects.get(desk.read_manifest(4).artifacts[0])) < size
    kept = make_edit(0)
    assert ask(kept).startswith(kept.target_new.split()[0])
    assert check(errata)["findings"] == []
    wrong = tmp_path / "wrong.json"
    wrong.write_text(json.dumps({"prepare": {"layers": [1]}, "lam": 1.0}))
    ran = errata("adopt", "main", "--profile", str(wrong))
    assert ran.code == 2 and "expected one for the editor 'ireva', found one for 'd4s'" in ran.err
    ran = errata("export", "head", "--to", str(tmp_path / "out"))
    assert ran.code == 2 and "no plain model folder can hold" in ran.err and not (tmp_path / "out").exists()


@pytest.mark.usefixtures("small_blocks")
def test_versions_share_what_does_not_change(
    desk: Any, make_edit: Make, errata: Errata, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edits = [make_edit(number, id=f"case-{number}") for number in range(15)]
    for day in range(5):
        desk.submit(f"day-{day}", *edits[3 * day : 3 * day + 3])
        desk.apply()
    parts = [desk.read_manifest(seq).layers[0].parts for seq in range(1, 6)]
    assert len(parts[-1]) >= 2 and all(later[: len(earlier)] == earlier for earlier, later in zip(parts, parts[1:], strict=False))
    files = [path.name for path in (desk.root / "mlartifacts").rglob("*.safetensors")]
    assert all(files.count(f"{digest}.safetensors") == 1 for digest in parts[-1]), "each part is in MLflow once, whoever needs it"

    model = mlflow.pyfunc.load_model("models:/main/1")
    service = model.unwrap_python_model()
    prompts = [edit.rewrite_prompt for edit in edits]
    old = model.predict(prompts, params={"max_new_tokens": 1})
    assert service.update("champion") == 5
    new = model.predict(prompts, params={"max_new_tokens": 1})
    assert old[:3] == new[:3] and old[6:] != new[6:]
    assert [answer.strip() for answer in new] == [edit.target_new.split()[0] for edit in edits]

    out = tmp_path / "model"
    ran = errata("export", "head", "--to", str(out), "--pyfunc", "--json")
    assert ran.code == 0 and ran.json["folder"] == str(out), ran.out + ran.err
    elsewhere = tmp_path / "carried"
    shutil.move(out, elsewhere)
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'nothing.db'}")
    assert mlflow.pyfunc.load_model(str(elsewhere)).predict(prompts, params={"max_new_tokens": 1}) == new
    mlflow.set_tracking_uri(f"sqlite:///{desk.root / 'mlflow.db'}")
    assert errata("export", "head", "--to", str(elsewhere), "--pyfunc").code == 2, "there is something"
    ran = errata("export", "0", "--to", str(tmp_path / "none"), "--pyfunc")
    assert ran.code == 2 and "the base itself" in ran.err

    ran = errata("bundle", "--to", str(tmp_path / "bundle.tar"))
    assert ran.code == 0, ran.out + ran.err
    victim = desk.root / "streams/main/objects" / parts[-1][0]
    victim.unlink()
    ran = errata("rebuild", "--check", "--json")
    assert ran.code != 0 and {item["state"] for item in ran.json["findings"]} == {"mendable"}
    assert errata("rebuild").code == 0 and victim.is_file()
    assert check(errata)["findings"] == []

    ran = errata("unbundle", str(tmp_path / "bundle.tar"), "--root", str(tmp_path / "elsewhere"))
    assert ran.code == 0, ran.out + ran.err
    monkeypatch.setenv("ERRATA_ROOT", str(tmp_path / "elsewhere"))
    facts = check(errata)
    assert facts["findings"] == [] and facts["compared"] == {"bits": 6}


@pytest.mark.usefixtures("small_blocks")
def test_an_archived_version_gets_its_blocks_back(
    desk: Any, make_edit: Make, errata: Errata, ask: Callable[[Edit], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ERRATA_KEEP__RECENT", "1")
    monkeypatch.setenv("ERRATA_KEEP__DAILY_DAYS", "0")
    edits = [make_edit(number, id=f"case-{number}") for number in range(9)]
    for day in range(3):
        desk.submit(f"day-{day}", *edits[3 * day : 3 * day + 3])
        desk.apply()
    desk.withdraw("case-0", "case-1")
    assert errata("compact").code == 0  # other blocks: nobody but the old versions needs theirs
    objects, old = desk.open().objects, desk.read_manifest(4).layers[0]
    assert errata("gc").code == 0
    for path in (desk.root / "streams").rglob("*"):
        if path.is_file():
            moment = path.stat().st_mtime - 2 * 86_400
            os.utime(path, (moment, moment))
    assert errata("gc").code == 0
    assert not objects.exists(old.artifact) and not all(map(objects.exists, old.parts))
    assert check(errata)["findings"] == []
    assert errata("rebuild", "--to", "4").code == 0
    assert all(map(objects.exists, old.stored))
    desk.roll_back(4)
    assert ask(edits[2]).startswith(edits[2].target_new.split()[0])


@pytest.mark.usefixtures("small_blocks")
def test_an_erased_edit_leaves_no_tombstone(desk: Any, make_edit: Make, errata: Errata) -> None:
    secret = make_edit(7, id="case-7")
    desk.submit("monday", *(make_edit(number, id=f"case-{number}") for number in range(4)), secret)
    desk.apply()
    opened = desk.open()
    row = opened.resolve_edit("case-7")
    pair = Pairs.from_bytes(opened.objects.get(row.pairs)).take([row.row])
    vectors = [tensor.numpy().tobytes() for tensor in pair.keys.values()]
    desk.withdraw("case-7")
    desk.submit("tuesday", make_edit(5, id="case-5"))
    desk.apply()
    assert len(find_bytes(desk.root, *vectors)) > 2
    live = desk.live()
    ran = errata("erase", "case-7", "--reason", "request 12", "--yes", "--json")
    assert ran.code == 0, ran.out + ran.err
    assert ran.json["commits"] == [1, 2, 3], "the tombstone was in every version since"
    assert find_bytes(desk.root, secret.subject.encode(), *vectors) == [] and find_bytes(desk.cache, *vectors) == []
    assert desk.live() == live
    findings = check(errata)["findings"]
    assert {item["state"] for item in findings} == {"erased"}
    desk.submit("wednesday", make_edit(8, id="case-8"))
    assert [batch.decision for batch in desk.apply()] == ["accept"]
    assert {item["state"] for item in check(errata)["findings"]} == {"erased"}
    shutil.rmtree(desk.cache)
    assert errata("status").code == 0


def test_live_edits_move_to_another_layer_and_into_another_stream(
    desk: Any, make_edit: Make, errata: Errata, tmp_path: Path, ask: Callable[[Edit], str]
) -> None:
    edits = [make_edit(number, id=f"case-{number}") for number in range(3)]
    desk.submit("monday", *edits)
    desk.apply()
    profile = tmp_path / "trained.json"
    trained = {"theta": 0.75, "gain": 80.0, "steps": 2}
    profile.write_text(json.dumps({"editor": "ireva", "prepare": {"layer": 1, "retrofit": trained}, "solve": {"theta": 0.75}}))
    ran = errata("rebase", "main", "--profile", str(profile), "--yes", "--json")
    assert ran.code == 0 and ran.json["decision"] == "accept" and ran.json["live"] == 3, ran.out + ran.err
    assert desk.read_manifest(2).layers[0].editor == "ireva"
    assert check(errata)["findings"] == []
    deep = tmp_path / "deep.json"
    deep.write_text(json.dumps({"editor": "ireva", "prepare": {"layer": 7}}))
    ran = errata("rebase", "main", "--profile", str(deep), "--yes")
    assert ran.code == 2 and "expected a layer from 0 to 2" in ran.err
    desk.roll_back(1)
    assert ask(edits[0]).startswith(edits[0].target_new.split()[0])

    folder = json.loads(errata("status", "--json").out)
    ran = errata("init", "--stream", "other", "--editor", "ireva", "--base", str(folder["base"]["source"]))
    assert ran.code == 0, ran.out + ran.err
    ran = errata("merge", "main", "other", "--yes", "--json")
    assert ran.code == 0, ran.out + ran.err
    answers = errata("ask", edits[1].rewrite_prompt, "--stream", "other", "--json")
    assert edits[1].target_new.split()[0] in answers.out
