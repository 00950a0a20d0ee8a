"""`errata bench` as a user calls it: the table, what is kept between two calls, and what a wrong word leads to."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from mlflow import MlflowClient

from benchmarks.tiny_base import PEOPLE, SENTENCES, build_edit, choose_options, write_base
from errata.edits import Probe
from registry.release import resolve_tracking

COUNT = 6


@pytest.fixture(autouse=True)
def own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow leaves its last address in the environment, and torch its threads."""
    monkeypatch.setenv("ERRATA_ROOT", str(tmp_path / "root"))
    monkeypatch.setenv("ERRATA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("ERRATA_THREADS", "1")


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A base of one's own with a profile, a corpus and edits, as options."""
    folder = tmp_path_factory.mktemp("bench")
    write_base(folder / "base")
    profile = {"prepare": choose_options().model_dump(mode="json"), "lam": 1.0, "origin": "test"}
    (folder / "profile.json").write_text(json.dumps(profile))
    (folder / "corpus.txt").write_text("\n".join(SENTENCES))
    edits = [
        build_edit(
            person,
            answer=person,
            target_true="Bern" if person % 4 != 3 else "Rome",
            relation_id="P1",
            paraphrase_prompts=(f"And the home of {PEOPLE[person]}", f"Yet the home of {PEOPLE[person]}"),
            neighborhood_prompts=(Probe(prompt=f"The sport of {PEOPLE[person - 9]}", answers=("golf",)),),
        )
        for person in range(12)
    ]
    lines = [edit.model_dump_json(exclude_none=True) for edit in edits]
    (folder / "edits.jsonl").write_text("\n".join([*lines, "{broken"]))
    options = {"base": "base", "profile": "profile.json", "corpus": "corpus.txt", "data": "edits.jsonl"}
    return [part for name, file in options.items() for part in (f"--{name}", str(folder / file))]


def count_runs(root: Path) -> int:
    client = MlflowClient(resolve_tracking(None, str(root))[0])
    experiments = client.search_experiments(filter_string="name LIKE 'errata/comparisons/%'")
    return len(client.search_runs([experiment.experiment_id for experiment in experiments]))


@pytest.mark.slow
def test_a_table_is_made_once_and_grows(
    errata: Callable[..., Any], given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = ["--edits", str(COUNT), "--batch", "1,3", "--seeds", "2", "--out", str(tmp_path / "report"), "--jobs", "1", "--json"]

    def bench(methods: str) -> dict[str, Any]:
        ran = errata("bench", "--methods", methods, *given, *size)
        assert ran.code == 0, ran.err
        return ran.json

    first = bench("memit,d4s")
    assert first["measured"] == 2 + 2 * 2 * 2  # the base once per seed, the others with both sizes of batches
    again = bench("memit,d4s")
    assert again["measured"] == 0
    assert again["cells"] == first["cells"]
    grown = bench("memit,d4s,rome")
    assert grown["measured"] == 2, "a method that writes edit by edit is measured once per seed"
    assert count_runs(tmp_path / "root") == 1 + 12

    last = {(item["cell"]["method"], item["cell"]["batch"], item["cell"]["seed"]): item["points"][-1] for item in grown["cells"]}
    assert last["base", 1, 0]["values"]["efficacy"] < 0.5 < last["d4s", 3, 0]["values"]["efficacy"]
    assert all(point["edits"] == COUNT for point in last.values())
    assert all(point["values"]["specificity"] is not None for point in last.values())
    text = (tmp_path / "report" / "report.md").read_text()
    assert "errata bench --methods memit,d4s,rome" in text
    points = pd.read_parquet(tmp_path / "report" / "points.parquet")
    assert set(points.method) == {"base", "d4s", "memit", "rome"}
    fresh = errata("bench", "--methods", "d4s", *given, *size, "--afresh").json
    found = {
        (item["cell"]["batch"], item["cell"]["seed"]): item["points"][-1] for item in fresh["cells"] if item["cell"]["method"] == "d4s"
    }
    for (batch, seed), point in found.items():
        before = last["d4s", batch, seed]["values"]
        assert {name: point["values"][name] for name in ("efficacy", "specificity", "norm_ratio")} == {
            name: before[name] for name in ("efficacy", "specificity", "norm_ratio")
        }, "equal commands give equal figures"


@pytest.mark.slow
def test_an_interrupted_comparison_goes_on(
    errata: Callable[..., Any], given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["bench", "--methods", "memit", *given, "--edits", str(COUNT), "--batch", "1", "--seeds", "10", "--json"]
    words += ["--out", str(tmp_path / "report"), "--jobs"]
    command = [sys.executable, "-c", "import sys; from flows.console import main; sys.exit(main())", *words, "2"]

    def list_cells() -> list[Path]:
        return list((tmp_path / "cache" / "comparisons").glob("*/cell-*.json"))

    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    end = time.monotonic() + 240
    while len(list_cells()) < 2 and time.monotonic() < end:
        assert process.poll() is None, process.communicate()[1].decode()
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err.decode()
    kept = len(list_cells())
    assert 2 <= kept < 20
    told = errata(*words, "1").json
    assert told["measured"] == 20 - kept
    assert len(told["cells"]) == 20


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--methods", "mimit"], "methods: expected 'all' or some of base"),
        (["--batch", "0"], "batch: expected numbers such as 1,10,100, found '0'"),
        (["--batch", ""], "batch: expected numbers such as 1,10,100, found ''"),
        (["--edits", "5", "--batch", "10"], "batch: expected at most the 5 edits of a stream, found 10"),
        (["--kind", "odd"], "kind: expected 'slots', 'distinct' or 'mixed', found 'odd'"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl: expected a file of edits, found none"),
    ],
)
def test_a_wrong_word_is_answered_with_one_line(errata: Callable[..., Any], options: list[str], said: str) -> None:
    ran = errata("bench", *options)
    assert ran.code == 2
    assert said in " ".join(ran.err.split())
    assert "Traceback" not in ran.err


def test_a_quick_comparison_of_what_is_named(errata: Callable[..., Any], given: list[str], tmp_path: Path) -> None:
    words = ["bench", "--quick", "--methods", "memit", *given, "--edits", "5", "--seeds", "1", "--jobs", "1", "--json"]
    cells = [cell["cell"] for cell in errata(*words, "--out", str(tmp_path / "report")).json["cells"]]
    assert {(cell["method"], cell["batch"], cell["seed"]) for cell in cells} == {("base", 1, 0), ("memit", 1, 0)}, "no batches of 20 edits"


def test_more_edits_than_there_are(errata: Callable[..., Any], given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = errata("bench", *given, "--edits", "50", "--batch", "1", "--jobs", "1")
    assert ran.code == 2
    assert "expected at least 50 edits that this base can be asked about, found 12" in " ".join(ran.err.split())
