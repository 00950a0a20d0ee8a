"""What MLflow shows follows the log: the same after any interruption, once per commit, and checked before it is promoted."""

import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlflow import MlflowClient

from errata.editors.artifacts import WeightDelta
from errata.editors.kinds import load_artifact
from errata.errors import RegistryError, UnknownNameError
from errata.modeling.loading import Base
from errata.modeling.patch import attach
from registry.models import ModelRegistry
from registry.release import Release, Version, resolve_tracking
from registry.verification import verify_logits

MakeRelease = Callable[..., Release]


class Killed(BaseException):
    """Not an Exception: nothing on the way may handle it."""


def project_and_promote(registry: ModelRegistry, release: Release) -> None:
    registry.point_alias(registry.project(release))


def list_files(folder: Path, name: str) -> list[Path]:
    return [path for path in folder.rglob(name) if path.is_file()]


def test_version_shows_its_commit(
    registry: ModelRegistry, tracking: tuple[str, str], make_release: MakeRelease, deltas: list[WeightDelta], tmp_path: Path
) -> None:
    release = make_release(1, deltas[0])
    version = registry.project(release)
    assert (version.number, version.commit, version.uri) == (1, 1, "models:/facts/1")
    assert version.tags["errata.commit"] == "1"
    assert version.tags["errata.manifest"] == release.manifest
    assert version.tags["errata.recipe"] == release.recipe
    assert version.tags["errata.edits_live"] == "3"
    assert version.tags["errata.efficacy"] == "0.75"
    client = MlflowClient(tracking[0])
    run = client.get_run(version.run)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"editor": "d4s", "lam": "0.1"}
    assert run.data.metrics == release.metrics
    report = Path(client.download_artifacts(version.run, "report.json", str(tmp_path)))
    assert report.read_bytes() == release.report
    assert {file.path for file in client.list_artifacts(version.run)} == {"report.json", "norms.png"}


def test_projecting_again_finds_the_version(registry: ModelRegistry, make_release: MakeRelease, deltas: list[WeightDelta]) -> None:
    first = registry.project(make_release(1, deltas[0]))
    second = registry.project(make_release(2, deltas[1]))
    assert registry.project(make_release(1, deltas[0])) == first
    assert registry.find_version("facts", 2) == second == registry.read_version("facts", 2)
    assert registry.list_versions("facts") == [second, first]


STEPS = [
    "create_experiment",
    "create_run",
    "log_artifact",
    "create_logged_model",
    "log_model_artifacts",
    "log_outputs",
    "finalize_logged_model",
    "log_batch",
    "set_terminated",
    "create_registered_model",
    "create_model_version",
    "set_registered_model_alias",
]


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("step", STEPS)
def test_interrupted_projection_is_completed(
    step: str,
    after: bool,
    registry: ModelRegistry,
    tracking: tuple[str, str],
    make_release: MakeRelease,
    deltas: list[WeightDelta],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Stopped before and after the last call of each step that writes; the next projection leaves one of everything."""
    release = make_release(1, deltas[0])
    write = getattr(MlflowClient, step)

    def die(*args: Any, **kwargs: Any) -> None:
        if after:
            write(*args, **kwargs)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, step, die)
        with pytest.raises(Killed):
            project_and_promote(registry, release)
    project_and_promote(ModelRegistry(*tracking), release)

    (version,) = registry.list_versions("facts")
    assert registry.champion("facts") == version
    assert version.tags["errata.manifest"] == release.manifest
    client = MlflowClient(tracking[0])
    experiments = [client.get_experiment_by_name(name) for name in ("errata/streams/facts", "errata/bases")]
    for experiment in experiments:
        assert experiment is not None
        (run,) = client.search_runs([experiment.experiment_id])
        assert run.info.status == "FINISHED"
    assert len(client.get_metric_history(version.run, "efficacy")) == 1
    assert len(list_files(tmp_path / "ml flow", "model.safetensors")) == 1
    assert registry.read_artifacts(version) == list(release.artifacts)


def test_version_registered_without_tags_is_reused(
    registry: ModelRegistry,
    tracking: tuple[str, str],
    make_release: MakeRelease,
    deltas: list[WeightDelta],
) -> None:
    version = registry.project(make_release(1, deltas[0]))
    client = MlflowClient(tracking[0])
    for key in version.tags:
        client.delete_model_version_tag("facts", str(version.number), key)
    assert registry.list_versions("facts") == []
    assert registry.project(make_release(1, deltas[0])) == version
    assert registry.list_versions("facts") == [version]


def test_two_projectors_at_once_make_one_version(
    registry: ModelRegistry, tracking: tuple[str, str], make_release: MakeRelease, deltas: list[WeightDelta]
) -> None:
    release, barrier = make_release(1, deltas[0]), threading.Barrier(2)

    def project(mine: ModelRegistry) -> Version:
        barrier.wait()
        return mine.project(release)

    with ThreadPoolExecutor(2) as pool:
        made = list(pool.map(project, [registry, ModelRegistry(*tracking)]))
    assert registry.list_versions("facts") * 2 == made
    assert "dbutils" not in sys.modules, "MLflow leaves its stand-in there when it reads code in two threads at once"


def test_base_is_copied_once(registry: ModelRegistry, make_release: MakeRelease, deltas: list[WeightDelta], tmp_path: Path) -> None:
    for commit, delta in enumerate(deltas, start=1):
        registry.project(make_release(commit, delta))
    (weights,) = list_files(tmp_path / "ml flow", "model.safetensors")
    records = list_files(tmp_path / "ml flow", "version.json")
    assert len(records) == len(deltas)
    for record in records:
        assert f"runs:/{weights.parent.parent.parent.name}/base" in record.read_text()


def test_hub_base_is_referenced_by_its_revision(
    registry: ModelRegistry, make_release: MakeRelease, deltas: list[WeightDelta], tmp_path: Path
) -> None:
    release = make_release(1, deltas[0])
    hub = release.base.model_copy(update={"kind": "hub", "source": "some/model", "revision": "c0ffee", "files": {}})
    registry.project(replace(release, base=hub, base_folder=None))
    (record,) = list_files(tmp_path / "ml flow", "version.json")
    assert '"revision": "c0ffee"' in record.read_text()
    assert not list_files(tmp_path / "ml flow", "model.safetensors")


def test_alias_is_read_back(
    registry: ModelRegistry, make_release: MakeRelease, deltas: list[WeightDelta], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (registry.project(make_release(commit, deltas[commit])) for commit in (1, 2))
    assert registry.champion("facts") is None
    registry.point_alias(second)
    assert registry.champion("facts") == second
    registry.point_alias(first)
    assert registry.champion("facts") == first
    monkeypatch.setattr(MlflowClient, "set_registered_model_alias", lambda *args: None)
    with pytest.raises(RegistryError, match="expected facts@champion at version 2 after setting it, found 1"):
        registry.point_alias(second)


def test_unknown_names(registry: ModelRegistry, make_release: MakeRelease) -> None:
    assert registry.champion("nothing") is None
    assert registry.find_version("nothing", 1) is None
    assert registry.list_versions("nothing") == []
    registry.project(make_release(1))
    with pytest.raises(UnknownNameError, match="v7: expected a version of 'facts'"):
        registry.read_version("facts", 7)


def test_stream_of_another_root_is_refused(registry: ModelRegistry, make_release: MakeRelease, deltas: list[WeightDelta]) -> None:
    registry.project(make_release(1, deltas[0]))
    with pytest.raises(RegistryError, match="from another root is registered here"):
        registry.project(replace(make_release(1, deltas[1]), manifest="f" * 64))


def read_logits(base: Base, artifacts: Sequence[bytes]) -> np.ndarray[Any, Any]:
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    with attach(base, [load_artifact(data, {}.__getitem__) for data in artifacts]), torch.inference_mode():
        logits: np.ndarray[Any, Any] = base.model(ids).logits[:, -1].numpy()
    return logits


def test_version_is_verified_by_its_logits(
    registry: ModelRegistry, make_release: MakeRelease, deltas: list[WeightDelta], base: Base
) -> None:
    release = make_release(1, deltas[0])
    version = registry.project(release)
    verify_logits(registry, version, read_logits(base, release.artifacts), lambda data, _: read_logits(base, data))
    with pytest.raises(RegistryError, match="expected the logits of the candidate"):
        verify_logits(registry, version, read_logits(base, [deltas[1].to_bytes()]), lambda data, _: read_logits(base, data))
    with pytest.raises(RegistryError, match="the alias was not moved"):
        verify_logits(registry, version, read_logits(base, release.artifacts), lambda data, _: read_logits(base, data) * np.nan)


def test_damaged_artifact_is_noticed(registry: ModelRegistry, make_release: MakeRelease, deltas: list[WeightDelta], tmp_path: Path) -> None:
    version = registry.project(make_release(1, deltas[0]))
    (path,) = list_files(tmp_path / "ml flow", "0.safetensors")
    path.write_bytes(deltas[1].to_bytes())
    with pytest.raises(RegistryError, match="models:/facts/1: expected an artifact with sha256"):
        registry.read_artifacts(version)


def test_unreachable_server_is_an_error_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(RegistryError, match=r"MLflow at http://127\.0\.0\.1:9: expected to read facts@champion"):
        ModelRegistry("http://127.0.0.1:9").champion("facts")


def test_file_store_is_refused_with_a_reason(tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match="expected to connect, but: The filesystem tracking backend"):
        ModelRegistry(tmp_path.as_uri()).champion("facts")


def test_tracking_is_resolved_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "root"
    assert resolve_tracking(None, str(root)) == (f"sqlite:///{root}/mlflow.db", (root / "mlartifacts").as_uri())
    assert resolve_tracking(None, "s3://bucket/x") == (f"sqlite:///{tmp_path}/mlflow.db", (tmp_path / "mlartifacts").as_uri())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server:5000")
    assert resolve_tracking(None, str(root)) == ("http://server:5000", None)
    assert resolve_tracking("sqlite:///here.db", str(root)) == ("sqlite:///here.db", (tmp_path / "mlartifacts").as_uri())
    assert resolve_tracking("postgresql://db/x", "s3://bucket/x/") == ("postgresql://db/x", "s3://bucket/x/mlartifacts")
