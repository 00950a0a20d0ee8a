"""A stream on a base of 16 bits: what casting loses stands where people look."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.tiny_base import start_root
from errata.edits import Edit

pytestmark = pytest.mark.usefixtures("prefect_server")


def test_a_version_says_what_casting_loses(
    desk: Any, errata: Callable[..., Any], editable_folder: Path, tmp_path: Path, make_edit: Callable[..., Edit]
) -> None:
    coarse = tmp_path / "coarse"
    AutoModelForCausalLM.from_pretrained(editable_folder, dtype=torch.bfloat16).save_pretrained(coarse)
    AutoTokenizer.from_pretrained(editable_folder).save_pretrained(coarse)
    database = (desk.root / "mlflow.db").read_bytes()
    shutil.rmtree(desk.root)
    start_root(str(desk.root), coarse, tmp_path)
    (desk.root / "mlflow.db").write_bytes(database)
    desk.submit("monday", *(make_edit(person) for person in range(5)))
    (summary,) = desk.apply()
    assert summary.decision == "accept"
    facts = errata("show", "1", "--json").json
    (casting,) = facts["casting"].values()
    assert 0 < casting["error"] < 0.1 and 0 <= casting["lost"] < 0.1
    assert f"{casting['error']:.1%} off" in errata("show", "1").out
    version = desk.versions()[1]
    assert MlflowClient().get_run(version.run).data.metrics["cast_error"] == pytest.approx(casting["error"])
    assert f"layer 1 {casting['error']:.1%} off" in errata("watch").out
