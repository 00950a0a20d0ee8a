"""A version's folder in MLflow's format, which loads wherever MLflow does."""

import os
import warnings
from collections.abc import Mapping
from pathlib import Path

from registry.release import Release, copy_code, list_requirements, write_version

# MLflow reads these while it is imported.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
os.environ.setdefault("MLFLOW_CONFIGURE_LOGGING", "false")  # its lines go where those of the process go, not to a handler of its own

from mlflow import pyfunc
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # advice to give an input example, which MLflow would load the whole model to try
        pyfunc.save_model(
            path=str(folder),
            python_model=str(copy_code(work)),
            artifacts={"version": str(write_version(work, release, reference, parts))},
            code_paths=[str(work / "errata")],
            model_config={"device": "auto"},
            signature=_SIGNATURE,
            pip_requirements=list_requirements(),
            mlflow_model=Model(run_id=run_id, model_id=model_id),
        )
    return folder
