"""The same work in this process and on a Ray cluster of two processes gives the same bytes."""

import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from errata.edits import Edit

SHARDS = 4


def find_ray() -> list[int]:
    """Processes of any Ray cluster that descend from this one."""
    return [process.pid for process in psutil.Process().children(recursive=True) if "ray" in " ".join(process.cmdline()[:2])]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Two nodes of one CPU on this machine, which `RayTaskRunner` finds by itself."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))  # else Ray writes one into the user's home
        root = str(Path(__file__).parents[2])
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])))
        node = {"num_cpus": 1, "num_gpus": 0}
        made = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
        try:
            made.add_node(**node)
            patch.setenv("RAY_ADDRESS", made.address)
            yield
        finally:
            ray.shutdown()
            made.shutdown()
    assert find_ray() == []


@pytest.fixture
def corpus(tmp_path: Path, sentences: Any) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text("\n".join(sentences))
    return path


@pytest.mark.long
def test_both_runners_give_equal_bytes(
    desk: Any,
    corpus: Path,
    make_edit: Callable[..., Edit],
    prepared: list[str],
    cluster: None,
    prefect_server: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Second moments in shards, and the pairs of a batch of several chunks."""
    from flows.measure import measure_moments

    monkeypatch.setattr("errata.candidates._CHUNK", 3)
    edits = [make_edit(person) for person in range(6)] + [make_edit(0, relation=1), make_edit(6, relation=1)]
    apart = tmp_path / "apart"
    shutil.copytree(desk.root, apart)
    desk.submit("monday", *edits)
    desk.apply()
    base = desk.open().head.base
    moments = measure_moments(base, [0, 1], str(corpus), 2_000, SHARDS)
    assert sorted(prepared) == sorted(edit.edit_id for edit in edits)

    prepared.clear()
    elsewhere = replace(desk, root=apart)
    monkeypatch.setenv("ERRATA_ROOT", str(apart))
    monkeypatch.setenv("ERRATA_MLFLOW__TRACKING_URI", f"sqlite:///{apart / 'mlflow.db'}")
    monkeypatch.setenv("ERRATA_COMPUTE__RUNNER", "ray")
    monkeypatch.setattr("tasks.measuring.sum_part", lambda *_values: pytest.fail("summed in this process"))
    elsewhere.submit("monday", *edits)
    elsewhere.apply()
    assert measure_moments(base, [0, 1], str(corpus), 2_000, SHARDS) == moments
    assert prepared == []
    here, there = desk.open(), elsewhere.open()
    assert len(here.log.read(1).pairs) > 1
    assert there.log.read(1).pairs == here.log.read(1).pairs
    assert elsewhere.read_manifest(1) == desk.read_manifest(1)
