"""An edit that must be forgotten, from the command to the last stored byte."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from errata.editors.base import Pairs
from errata.edits import Edit
from errata.errors import RegistryError
from registry.stream import open_stream

pytestmark = pytest.mark.usefixtures("prefect_server")

Make = Callable[..., Edit]
Errata = Callable[..., Any]


def find_texts(folder: Path, *texts: bytes) -> list[str]:
    """Files that hold one of the texts."""
    return [
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and any(text in path.read_bytes() for text in texts)
    ]


def test_an_erased_edit_is_nowhere_any_more(
    used_desk: Any, make_edit: Make, errata: Errata, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    secret = make_edit(7, id="case-7")
    subject = secret.subject.encode()
    with monkeypatch.context() as patch:
        patch.setenv("ERRATA_APPLY__SNAPSHOT_EVERY", "2")
        used_desk.submit("wednesday", secret, make_edit(8, id="case-8"), {"subject": secret.subject, "prompt": "none"})
        used_desk.apply()
    before = used_desk.open()
    row = before.resolve_edit("case-7")
    pair = Pairs.from_bytes(before.objects.get(row.pairs)).take([row.row])
    vectors = [tensor.numpy().tobytes() for tensor in (pair.residuals, *pair.keys.values())]
    ran = errata("erase", "case-7", "--yes")
    assert ran.code == 2 and "withdraw case-7" in ran.err
    used_desk.withdraw("case-7")
    used_desk.submit("thursday", make_edit(9, id="case-9"), secret)
    used_desk.apply()
    used_desk.submit("friday", secret, make_edit(0, answer=3, id="case-13"))
    recipe, live = used_desk.read_manifest(5).recipe, used_desk.live()
    assert len(find_texts(used_desk.root, subject)) > 5

    ran = errata("erase", "case-7", "--reason", "request 12", "--yes", "--json")
    assert ran.code == 0, ran.out + ran.err
    facts = ran.json
    assert facts["erased"] == ["case-7@3"] and facts["commits"] == [3] and facts["gap"] <= 1e-8 and facts["finished"]
    assert facts["remains"] == []
    assert find_texts(used_desk.root, subject, *vectors) == []
    assert find_texts(used_desk.cache, subject, *vectors, secret.content_id.encode(), secret.slot.encode()) == []
    assert used_desk.live() == live and used_desk.read_manifest(6).recipe == recipe

    here, anew = used_desk.open(), open_stream(str(used_desk.root), "main")
    for checkpoint in (used_desk.root / "streams/main/checkpoints").iterdir():
        checkpoint.unlink()
    scratch = open_stream(str(used_desk.root), "main")
    statuses = ("live", "replaced", "superseded", "stale", "quarantined", "rejected", "dropped", "withdrawn", "reverted", "erased")
    for other in (anew, scratch):
        assert list(other.index.find_rows(*statuses)) == list(here.index.find_rows(*statuses))
        assert other.index.counts() == here.index.counts()
    shown = errata("show", "case-7")
    assert shown.code == 0 and "erased" in shown.out and "request 12" in shown.out
    for words in (("show", "3"), ("log",), ("status",), ("quarantine",), ("show", "6")):
        assert errata(*words).code == 0, words

    ran = errata("rebuild", "--check", "--json")
    assert ran.code == 0, ran.out
    findings = ran.json["findings"]
    assert {item["state"] for item in findings} == {"erased"} and ran.json["recipe"] == recipe
    assert ("artifact", 3) in {(item["what"], item["commit"]) for item in findings}
    assert ran.json["unverified"] == [] and ran.json["compared"] == {"bits": 6}, "all but the one whose weights are gone"
    ran = errata("rollback", "3", "--yes")
    assert ran.code == 2 and "erased" in ran.err
    used_desk.roll_back(2)
    versions = used_desk.versions()
    assert versions[3].tags["errata.erased"] == "6" and "errata.erased" not in versions[2].tags and 6 in versions
    registry = used_desk.open_registry()
    assert registry.champion("main").commit == 7 and len(registry.read_artifacts(versions[6])) == 1
    with pytest.raises(RegistryError):
        registry.read_artifacts(versions[3])

    bundle = tmp_path / "moved.tar"
    assert errata("bundle", "--to", str(bundle)).code == 0
    ran = errata("unbundle", str(bundle), "--as", "moved")
    assert ran.code == 0, ran.err
    assert errata("rebuild", "--check", "-s", "moved").code == 0
    assert find_texts(tmp_path, subject) == []

    # What waited with it is still there; what is sent again is withheld, unless somebody insists.
    used_desk.submit("saturday", secret)
    summary = used_desk.apply()
    assert summary[0].outcomes["withheld"] == 1 and "case-13" in used_desk.live()
    ran = errata("erase", "case-7", "--yes", "--json")
    assert ran.code == 0 and ran.json["erased"] == [] and find_texts(used_desk.root, subject) == []
    assert errata("erase", "case-7", "--yes").code == 2
    assert json.loads(errata("rebuild", "--check", "--json").out)["sound"]
