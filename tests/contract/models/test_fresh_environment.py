"""A registered version answers where nothing else of Errata exists: a new virtual environment with the logged requirements alone."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import mlflow
import pytest

from errata.editors.artifacts import WeightDelta
from registry.models import ModelRegistry
from registry.release import Release

PROMPTS = ["The capital of France is", "Who", "Grace Hopper wrote the first"]
PARAMS = {"max_new_tokens": 8, "with_commit": True}

CONSUMER = f"""
import importlib.util, json, pathlib
for name in ("errata", "registry", "tasks", "flows", "prefect", "peft"):
    assert importlib.util.find_spec(name) is None, name
import mlflow
model = mlflow.pyfunc.load_model("models:/facts@champion")
import errata
answers = [model.predict({PROMPTS!r}, params={PARAMS!r})]
model.unwrap_python_model().update(2)
answers.append(model.predict({PROMPTS!r}, params={PARAMS!r}))
pathlib.Path("answers.json").write_text(json.dumps({{"code": errata.__file__, "answers": answers}}))
"""


@pytest.mark.long
def test_version_answers_in_a_fresh_environment(
    registry: ModelRegistry,
    tracking: tuple[str, str],
    make_release: Callable[..., Release],
    deltas: list[WeightDelta],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> None:
    """Version 1 is the champion; the consumer loads it, asks, updates to version 2, and asks again."""
    registry.point_alias(registry.project(make_release(1, deltas[0])))
    registry.project(make_release(2, deltas[1]))
    here = [mlflow.pyfunc.load_model(f"models:/facts/{number}").predict(PROMPTS, params=PARAMS) for number in (1, 2)]
    assert here[0] != here[1]

    shutil.rmtree(tmp_path / "root")  # the stream's own copy of the base
    environment = tmp_path_factory.mktemp("venv")
    request.addfinalizer(lambda: shutil.rmtree(environment))  # over a gigabyte, which pytest would keep for three sessions
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    install = [environment / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-compile"]
    # torch first, and the build that is here: a plain requirement could fetch several GB of CUDA instead.
    subprocess.run([*install, f"torch=={importlib.metadata.version('torch').split('+')[0]}"], check=True)
    subprocess.run([*install, "-r", mlflow.pyfunc.get_model_dependencies("models:/facts@champion")], check=True)

    nowhere, work = tmp_path / "nowhere", tmp_path / "work"
    nowhere.mkdir()
    work.mkdir()
    places = dict.fromkeys(("HOME", "XDG_CACHE_HOME", "HF_HOME", "ERRATA_CACHE", "PYTHONPATH"), str(nowhere))
    variables = {**places, "PATH": os.defpath, "MLFLOW_TRACKING_URI": tracking[0], "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run([environment / "bin" / "python", "-c", CONSUMER], cwd=work, env=variables, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    found = json.loads((work / "answers.json").read_text())
    assert found["answers"] == here
    assert Path(found["code"]).is_relative_to(tmp_path)
