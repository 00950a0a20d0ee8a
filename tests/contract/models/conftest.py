"""A real MLflow on SQLite, copied for each test, and a tiny random GPT-2 in two sets of weights."""

import shutil
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import mlflow
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from errata.editors.artifacts import WeightDelta
from errata.modeling.loading import Base, load_base
from registry.models import ModelRegistry
from registry.release import Release
from registry.shared import BaseRef, fetch_base, put_base
from registry.storage.local import LocalStorage

TEXT = [
    "The capital of France is Paris, and the capital of Italy is Rome.",
    "Ada Lovelace wrote the first program; Grace Hopper wrote the first compiler.",
    "Who lives in the town of Delft? Maria lives in Delft.",
]


def _write_model(folder: Path, seed: int) -> Path:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=320, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)
    torch.manual_seed(seed)
    # Wide initial weights: a model this small then answers different prompts differently.
    config = GPT2Config(
        vocab_size=tokenizer.get_vocab_size(), n_positions=64, n_embd=32, n_layer=2, n_head=2, initializer_range=0.4, eos_token_id=0
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _write_model(tmp_path_factory.mktemp("model"), seed=0)


@pytest.fixture(scope="session")
def other_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another base of the same shape."""
    return _write_model(tmp_path_factory.mktemp("other"), seed=1)


@pytest.fixture(scope="session")
def base(model_folder: Path) -> Base:
    return load_base(model_folder, device="cpu")


@pytest.fixture(scope="session")
def deltas(base: Base) -> list[WeightDelta]:
    """Artifacts for the base, each of which changes most answers."""
    name = base.layout.weight_name(1)
    shape = base.layout.read_weight(base.model, 1).shape
    return [WeightDelta(base.digest, {name: torch.randn(shape, generator=torch.Generator().manual_seed(seed))}) for seed in range(3)]


@pytest.fixture
def tracking(empty_mlflow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, str]]:
    """Tracking URI and artifact root of an empty MLflow, in a folder whose name needs quoting; also what `models:/` means here."""
    home = tmp_path / "ml flow"
    home.mkdir()
    shutil.copy(empty_mlflow, home)
    uri = f"sqlite:///{home / 'mlflow.db'}"
    monkeypatch.setattr(sys, "path", list(sys.path))  # loading a version puts its code there
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)  # put back after the test
    mlflow.set_tracking_uri(uri)
    yield uri, (home / "mlartifacts").as_uri()
    mlflow.set_tracking_uri(None)  # type: ignore[arg-type]  # takes the variable back that it has set, too


@pytest.fixture
def registry(tracking: tuple[str, str]) -> ModelRegistry:
    return ModelRegistry(*tracking)


@pytest.fixture
def make_release(base: Base, model_folder: Path, tmp_path: Path) -> Callable[..., Release]:
    """Commits of the stream `facts`: number, then artifacts."""
    storage = LocalStorage(tmp_path / "root")
    ref = put_base(storage, BaseRef(kind="folder", source="test", digest=base.digest), model_folder)
    plot = tmp_path / "plot.png"
    plot.write_bytes(b"\x89PNG")

    def make(commit: int, *artifacts: WeightDelta) -> Release:
        return Release(
            parts=[()] * len(artifacts),
            remembers=False,
            read_part={}.__getitem__,
            stream="facts",
            commit=commit,
            time=datetime(2026, 11, 20, tzinfo=UTC),
            recipe="r" * 64,
            manifest=str(commit) * 64,
            base=ref,
            base_folder=fetch_base(storage, base.digest, tmp_path / "cache"),
            artifacts=[artifact.to_bytes() for artifact in artifacts],
            counts={"edits_live": 3 * commit},
            parameters={"editor": "d4s", "lam": 0.1},
            metrics={"efficacy": 0.75, "norms.h1.mean_abs_ratio": 1.5},
            report=b'{"format":1}',
            plot=plot,
        )

    return make
