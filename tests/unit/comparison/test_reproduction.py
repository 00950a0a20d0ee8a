"""Two runs of one comparison, number by number."""

from collections.abc import Mapping
from pathlib import Path

import pandas as pd
import pytest
import typer

from benchmarks.reproduction import find_left, read_both, run

KEY = {"method": "d4s", "batch": 1, "edits": 100}


def write(folder: Path, values: Mapping[tuple[str, int], float | None]) -> Path:
    folder.mkdir()
    rows = [{**KEY, "measure": measure, "seed": seed, "value": value} for (measure, seed), value in values.items()]
    pd.DataFrame(rows).to_parquet(folder / "points.parquet")
    return folder


def test_a_mean_within_the_streams_spread_is_reproduced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = write(tmp_path / "first", {("efficacy", 0): 0.8, ("efficacy", 1): 0.9, ("write_seconds", 0): 1.0})
    second = write(tmp_path / "second", {("efficacy", 0): 0.82, ("efficacy", 1): 0.9, ("write_seconds", 0): 3.0})
    with pytest.raises(typer.Exit) as ended:
        run(first, second)
    assert ended.value.exit_code == 0
    told = capsys.readouterr().out
    assert "2 numbers of 2 cells are in both: 1 are equal to the bit" in told
    assert "efficacy: 1 differ, by 0.02 at most" in told and "write_seconds: second ÷ first 3.00" in told


def test_a_mean_that_leaves_the_spread_is_told_and_ends_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = write(tmp_path / "first", {("efficacy", 0): 0.8, ("efficacy", 1): 0.9})
    second = write(tmp_path / "second", {("efficacy", 0): 0.7, ("efficacy", 1): 0.7})
    with pytest.raises(typer.Exit) as ended:
        run(first, second)
    assert ended.value.exit_code == 1
    assert "outside the spread: d4s, batches of 1, after 100: efficacy 0.85, then 0.7" in capsys.readouterr().out


def test_only_what_both_measured_is_compared(tmp_path: Path) -> None:
    first = write(tmp_path / "first", {("efficacy", 0): 0.8, ("portability", 0): None, ("specificity", 0): 1.0})
    second = write(tmp_path / "second", {("efficacy", 0): 0.8, ("portability", 0): 0.5})
    both = read_both(first, second)
    assert set(both.measure) == {"efficacy"}
    assert find_left(both).empty
