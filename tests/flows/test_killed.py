"""The promises of design §4, with the process killed at each moment of a batch: no accepted edit is lost, none is applied twice, a
reader never sees half a version, and the champion's weights are what the log says.

Pairs that a killed run had stored and noted are not computed again.
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from errata.edits import Edit
from errata.manifests import Manifest, PairRef, extend_recipe, start_recipe
from registry.models import ModelRegistry
from registry.release import resolve_tracking
from registry.stream import Stream, open_stream

SCRIPT = Path(__file__).with_name("killed_runs.py")
_spec = importlib.util.spec_from_file_location("killed_runs", SCRIPT)
assert _spec and _spec.loader
_script = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_script)
MOMENTS = _script.MOMENTS
COMMITTED = ("committed", "not-shown", "half-a-version", "alias-behind")
"""Moments after which the batch is in the log."""


@pytest.fixture(scope="module")
def second(make_edit: Callable[..., Edit]) -> list[Edit]:
    """The batch that is killed: it replaces one of the three live edits, repeats one and adds two."""
    return [make_edit(0, answer=2), make_edit(1), make_edit(3), make_edit(4)]


@pytest.fixture(scope="module")
def places(
    tmp_path_factory: pytest.TempPathFactory, empty_root: Path, make_edit: Callable[..., Edit], second: list[Edit], gate: dict[str, str]
) -> Path:
    work = tmp_path_factory.mktemp("killed")
    batches = {"first": [make_edit(person) for person in range(3)], "second": second}
    lines = {name: "".join(edit.model_dump_json(exclude_none=True) + "\n" for edit in edits) for name, edits in batches.items()}
    given = {"root": str(empty_root), "work": str(work), **lines}
    clean = {name: value for name, value in os.environ.items() if not name.startswith("ERRATA_") and name != "MLFLOW_TRACKING_URI"}
    variables = {**clean, **gate, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(SCRIPT.parents[2])}
    run = subprocess.run([sys.executable, SCRIPT], input=json.dumps(given), env=variables, cwd=work, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    assert (work / "never" / "status").read_text() == "0", run.stderr[-3000:]
    return work


def look(place: Path, root: str = "root") -> Stream:
    return open_stream(str(place / root), "main", None)


def read_statuses(stream: Stream) -> dict[str, str]:
    return {row.occurrence: row.status for row in stream.index.find_rows("live", "replaced", "quarantined", "rejected")}


def read_manifest(stream: Stream) -> Manifest:
    return Manifest.from_bytes(stream.objects.get(stream.head.manifest))


def rebuild(stream: Stream) -> tuple[bytes, str]:
    """Artifact and recipe of the head, from what the log says was added and removed and nothing else."""
    from errata.candidates import read_pairs
    from errata.editors.catalogue import make_editor
    from errata.editors.d4s.moments import Moments
    from errata.modeling.loading import load_base
    from errata.profiles import Profile
    from registry.shared import fetch_base, get_moments, get_profile

    head = stream.head
    profile = Profile.model_validate_json(get_profile(stream.storage, head.base, head.profile))
    moments = Moments.from_bytes(get_moments(stream.storage, profile.solve.moments))
    layout = load_base(fetch_base(stream.storage, head.base, Path("unused")), device="cpu").layout
    editor = make_editor(head.editors[0], profile, moments, layout)
    state, recipe = editor.empty_state(), start_recipe(head.base, head.profile, editor.name, editor.version, editor.options)
    places: dict[str, PairRef] = {}
    for seq in range(1, head.seq + 1):
        outcomes = stream.read_outcomes(stream.log.read(seq))
        removed = [places.pop(row.occurrence or "") for row in outcomes if row.outcome == "replaced"]
        live = {row.occurrence or "": PairRef(pairs=row.pairs or "", row=row.row or 0) for row in outcomes if row.outcome == "live"}
        places |= live
        blocks = {"remove": read_pairs(stream.objects, removed), "add": read_pairs(stream.objects, list(live.values()))}
        state = editor.merge(state, blocks["add"], blocks["remove"])
        for op, block in blocks.items():
            recipe = extend_recipe(recipe, op, block.digest_rows() if block else ())
    artifact = editor.solve(state)
    assert artifact is not None
    return artifact.to_bytes(), recipe


@pytest.mark.parametrize("moment", MOMENTS)
def test_the_next_run_finishes_the_work_once(places: Path, second: list[Edit], make_edit: Callable[..., Edit], moment: str) -> None:
    place = places / moment
    assert (place / "status").read_text() == str(-signal.SIGKILL)
    stream = look(place)
    assert read_statuses(stream) == {
        f"{make_edit(0).edit_id}@1": "replaced",
        f"{make_edit(1).edit_id}@1": "live",
        f"{make_edit(2).edit_id}@1": "live",
        f"{second[0].edit_id}@2": "live",
        f"{second[2].edit_id}@2": "live",
        f"{second[3].edit_id}@2": "live",
    }
    assert stream.head.seq == stream.head.champion == 2
    assert list(stream.storage.list(stream.key("inbox/"))) == []
    assert all(stream.objects.get(use.digest) for seq in (1, 2) for use in stream.log.read(seq).files)
    # To the bit what an undisturbed run gives, and what the log alone gives.
    manifest, undisturbed = read_manifest(stream), read_manifest(look(places / "never"))
    assert manifest == undisturbed
    assert rebuild(stream) == (stream.objects.get(manifest.artifacts[0]), manifest.recipe)


@pytest.mark.parametrize("moment", MOMENTS)
def test_stored_pairs_are_not_computed_again(places: Path, second: list[Edit], moment: str) -> None:
    prepared = json.loads((places / moment / "prepared.json").read_text())
    wanted = [edit.edit_id for edit in (second[0], *second[2:])]
    assert prepared == (wanted if moment == "pairs-stored" else [])


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_reader_sees_whole_versions_only(places: Path, moment: str) -> None:
    stream = look(places / moment, "killed")
    assert stream.head.seq == (2 if moment in COMMITTED else 1)
    assert stream.index.counts()["live"] == (5 if moment in COMMITTED else 3)
    artifact, recipe = rebuild(stream)
    manifest = read_manifest(stream)
    assert (stream.objects.get(manifest.artifacts[0]), manifest.recipe) == (artifact, recipe)


@pytest.mark.parametrize(("root", "shown"), [("killed", 1), ("root", 2)])
@pytest.mark.parametrize("moment", MOMENTS)
def test_mlflow_serves_a_version_of_the_log(places: Path, moment: str, root: str, shown: int) -> None:
    home = places / moment / root
    stream, registry = look(places / moment, root), ModelRegistry(*resolve_tracking(f"sqlite:///{home / 'mlflow.db'}", str(home)))
    champion: Any = registry.champion("main")
    assert champion.commit == shown
    manifest = Manifest.from_bytes(stream.objects.get(champion.tags["errata.manifest"]))
    assert registry.read_artifacts(champion) == [stream.objects.get(digest) for digest in manifest.artifacts]
    commits = [version.commit for version in registry.list_versions("main")]
    assert len(commits) == len(set(commits)) and commits[-1] == 1
    if root == "root":
        assert commits == [2, 1]
