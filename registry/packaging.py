"""A version's folder in MLflow's format, which loads wherever MLflow does."""

import os
import threading
import warnings
from collections.abc import Mapping
from pathlib import Path

from registry.release import PARTS_BESIDE, Release, copy_code, list_requirements, name_part, write_version

# MLflow reads these while it is imported.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
os.environ.setdefault("MLFLOW_CONFIGURE_LOGGING", "false")  # its lines go where those of the process go, not to a handler of its own

from mlflow import pyfunc
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

_saving = threading.Lock()
"""While MLflow reads our code it puts a stand-in for Databricks' `dbutils` among the modules: two threads at once leave it there."""
_SIGNATURE = ModelSignature(
    # Without a column name, lists, arrays, series and frames are all taken as they are.
    inputs=Schema([ColSpec("string")]),
    outputs=Schema([ColSpec("string")]),
    params=ParamSchema(
        [
            ParamSpec("max_new_tokens", "long", 32),
            ParamSpec("temperature", "double", 0.0),
            ParamSpec("top_p", "double", 1.0),
            ParamSpec("seed", "long", None),
            ParamSpec("with_commit", "boolean", False),
        ]
    ),
)


def build_model(work: Path, release: Release, reference: Mapping[str, str | None], parts: str | None, run_id: str, model_id: str) -> Path:
    """The version's folder in MLflow's format: the record and artifacts of the commit, and code that loads them anywhere."""
    folder = work / "model"
    version = write_version(work, release, reference, parts)
    _save_model(work, folder, {"version": str(version)}, Model(run_id=run_id, model_id=model_id), release)
    return folder


def export_model(work: Path, release: Release, target: Path) -> None:
    """A folder that `mlflow.pyfunc.load_model` loads with nothing else: as a version's, with the parts of its artifacts and, unless it is
    named by its hub id, the base.

    Args:
        work: an empty folder for what it is made of.
        target: where it goes; must not exist.
    """
    ref = release.base
    reference = {"kind": ref.kind, "digest": ref.digest, "source": ref.source, "revision": ref.revision}
    folders = {}
    if ref.kind != "hub":
        reference = {"kind": "beside", "digest": ref.digest}
        folders["base"] = str(release.base_folder)
    version = write_version(work, release, reference, PARTS_BESIDE if any(release.parts) else None)
    for digest in dict.fromkeys(digest for own in release.parts for digest in own):
        (version / PARTS_BESIDE).mkdir(exist_ok=True)
        (version / PARTS_BESIDE / name_part(digest)).write_bytes(release.read_part(digest))
    _save_model(work, target, {"version": str(version), **folders}, Model(), release)


def _save_model(work: Path, target: Path, folders: Mapping[str, str], model: Model, release: Release) -> None:
    with _saving, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # advice to give an input example, which MLflow would load the whole model to try
        pyfunc.save_model(
            path=str(target),
            python_model=str(copy_code(work)),
            artifacts=dict(folders),
            code_paths=[str(work / "errata")],
            model_config={"device": "auto"},
            signature=_SIGNATURE,
            pip_requirements=list_requirements(release),
            mlflow_model=model,
        )
