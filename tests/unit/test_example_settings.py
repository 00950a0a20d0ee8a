"""`deployments/errata.example.toml` shows every setting there is, with its default."""

import os
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from errata.settings import Settings, load_settings

EXAMPLE = Path(__file__).parents[2] / "deployments" / "errata.example.toml"
LOCAL = {
    *("device_map", "threads", "actor", "cache", "compute.address", "mlflow.tracking_uri", "watch.ability_set", "watch.norm_ratio"),
    *("memory.floor", "memory.pool", "policy.max_risk", "distill.lr", "distill.targets", "distill.top_k", "distill.max_steps"),
}
"""Settings whose default depends on the machine, or is to have none: the example shows a possible value and says so."""


def uncomment() -> str:
    return re.sub(r"^# (?=[a-z_]+ = )", "", EXAMPLE.read_text(), flags=re.MULTILINE)


def flatten(values: dict[str, Any], before: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= flatten(value, f"{before}{name}.") if isinstance(value, dict) else {before + name: value}
    return flat


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in os.environ:
        if name.startswith("ERRATA_"):
            monkeypatch.delenv(name)


def test_as_it_stands_it_changes_nothing(tmp_path: Path) -> None:
    without = load_settings()
    (tmp_path / "errata.toml").write_text(EXAMPLE.read_text())
    assert load_settings() == without
    assert flatten(tomllib.loads(EXAMPLE.read_text())) == {}


def test_it_shows_every_setting_with_its_default(tmp_path: Path) -> None:
    shown = flatten(tomllib.loads(uncomment()))
    defaults = flatten({name: value.model_dump() if isinstance(value, BaseModel) else value for name, value in load_settings()})
    assert shown.keys() == defaults.keys()
    assert {name: value for name, value in shown.items() if name not in LOCAL} == {
        name: value for name, value in defaults.items() if name not in LOCAL
    }


def test_uncommented_it_loads(tmp_path: Path) -> None:
    (tmp_path / "errata.toml").write_text(uncomment())
    settings = load_settings()
    assert isinstance(settings, Settings)
    assert settings.threads == 4
    assert settings.mlflow.tracking_uri == "http://localhost:5000"


def test_every_setting_is_explained() -> None:
    blocks = [block.splitlines() for block in EXAMPLE.read_text().split("\n\n")]
    for block in blocks:
        if re.match(r"# [a-z_]+ = ", block[-1]):
            assert len(block) > 1 and block[-2].startswith("## "), block[-1]
