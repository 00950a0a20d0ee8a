"""The whole flow on a real Prefect server and a real MLflow, with a base of 150,000 parameters."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from errata.edits import Edit
from errata.profiles import PrepareOptions
from errata.settings import load_settings
from errata.summary import BatchSummary
from registry.stream import Stream, open_stream

LENIENT = {"MAX_NORM_RATIO": "1e9", "MAX_LOCALITY_KL": "1e9", "MIN_RETENTION": "0", "MAX_RETENTION_DROP": "1", "MIN_SPECIFICITY": "0"}
"""What a random base cannot keep. Whether edits take is judged as ever."""


@dataclass(frozen=True)
class Desk:
    """A stream `main` and what a user does with it."""

    root: Path
    cache: Path

    def open(self) -> Stream:
        return open_stream(str(self.root), "main", self.cache)

    def submit(self, name: str, *rows: Edit | dict[str, Any] | str) -> None:
        """Leave a file in the inbox, one line per row, as a producer does."""
        from registry.inbox import drop_file

        assert drop_file(self.open(), f"{name}.jsonl", write_lines(*rows)) == f"{name}.jsonl"

    def apply(self, **options: Any) -> list[BatchSummary]:
        from flows.edit import apply_edits

        return apply_edits("main", **options)

    def live(self) -> dict[str, str]:
        """Occurrence → target of every live edit."""
        stream = self.open()
        return {row.occurrence: stream.read_record(row).edit.target_new for row in stream.index.find_rows("live")}

    def statuses(self) -> dict[str, str]:
        stream = self.open()
        every = ("live", "replaced", "superseded", "stale", "quarantined", "rejected", "dropped", "withdrawn")
        return {row.occurrence: row.status for row in stream.index.find_rows(*every)}

    def waiting(self) -> list[str]:
        from registry.inbox import list_waiting

        return list_waiting(self.open())


def write_lines(*rows: Edit | dict[str, Any] | str) -> bytes:
    def write(row: Edit | dict[str, Any] | str) -> str:
        if isinstance(row, Edit):
            return row.model_dump_json(exclude_none=True)
        return row if isinstance(row, str) else json.dumps(row)

    return "".join(write(row) + "\n" for row in rows).encode()


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[None]:
    from prefect.testing.utilities import prefect_test_harness

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DO_NOT_TRACK", "1")
        patch.setenv("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
        with prefect_test_harness(server_startup_timeout=120):
            yield


@pytest.fixture(scope="session")
def empty_root(
    tmp_path_factory: pytest.TempPathFactory, editable_folder: Path, editable_options: PrepareOptions, sentences: Any, empty_mlflow: Path
) -> Path:
    """A root with the stream `main`, which has no edits, and an empty MLflow."""
    from tasks.onboarding import start_stream

    home = tmp_path_factory.mktemp("template")
    profile, corpus = home / "profile.json", home / "corpus.txt"
    profile.write_text(json.dumps({"prepare": editable_options.model_dump(mode="json"), "lam": 1.0, "origin": "test"}))
    corpus.write_text("\n".join(sentences))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)  # an errata.toml of the checkout is none of our business
        settings = load_settings(root=str(home / "root"), cache=home / "cache", device="cpu", threads=1)
        start_stream(settings, str(editable_folder), profile=profile, corpus=corpus)
    shutil.copy(empty_mlflow, home / "root" / "mlflow.db")
    return home / "root"


@pytest.fixture
def desk(empty_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    import mlflow
    import torch

    root, cache = tmp_path / "root", tmp_path / "cache"
    shutil.copytree(empty_root, root)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    place = {"ROOT": str(root), "CACHE": str(cache), "DEVICE": "cpu", "THREADS": "1", "ACTOR": "ann"}
    for name, value in {**place, **{f"GATE__{budget}": value for budget, value in LENIENT.items()}}.items():
        monkeypatch.setenv(f"ERRATA_{name}", value)
    monkeypatch.setattr(sys, "path", list(sys.path))  # loading a model version puts its code there
    threads, tracking = torch.get_num_threads(), mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{root / 'mlflow.db'}")
    yield Desk(root, cache)
    mlflow.set_tracking_uri(tracking)
    torch.set_num_threads(threads)


@pytest.fixture
def ask(desk: Desk) -> Callable[[str], str]:
    """The champion's answer to a prompt, through plain MLflow."""
    import mlflow

    def ask(prompt: str) -> str:
        model = mlflow.pyfunc.load_model("models:/main@champion")
        return str(model.predict([prompt], params={"max_new_tokens": 2})[0]).strip()

    return ask
