"""The first command on a new machine finds no cache folder at all."""

from pathlib import Path

import pytest

from errata.settings import load_settings
from flows.prefect_server import ready_prefect


def test_prefect_gets_a_home_where_nothing_is_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_HOME", raising=False)
    ready_prefect(load_settings(cache=tmp_path / "not" / "yet"))
    assert (tmp_path / "not" / "yet" / "prefect").is_dir()


def test_a_home_that_is_given_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_HOME", "/elsewhere")
    ready_prefect(load_settings(cache=tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()
