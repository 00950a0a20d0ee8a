"""Models written as folders: the base with its edits, and nothing else changed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from errata.editors.artifacts import WeightDelta
from errata.errors import InputError, ModelError
from errata.modeling.export import export_folder
from errata.modeling.loading import Base, load_base
from errata.modeling.patch import attach

NOTE = {"stream": "main", "commit": 3}


def make_delta(base: Base, layer: int = 1, scale: float = 0.1) -> WeightDelta:
    torch.manual_seed(1)
    return WeightDelta(base.digest, {base.layout.weight_name(layer): scale * torch.randn(base.layout.read_weight(base.model, layer).shape)})


def read_logits(base: Base) -> torch.Tensor:
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.inference_mode():
        return base.model(input_ids=ids).logits


@pytest.mark.parametrize("name", ["tiny_gpt2", "tiny_llama"])
def test_a_folder_is_base_plus_edits(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    base = request.getfixturevalue(name)
    delta, before = make_delta(base), read_logits(base)
    with attach(base, [delta]):
        expected = read_logits(base)
    folder = export_folder(base, [delta], tmp_path / "model", NOTE)
    exported = load_base(folder, device="cpu")
    assert torch.equal(read_logits(exported), expected) and not torch.equal(expected, before)
    assert torch.equal(read_logits(base), before), "the base is as it was"
    assert exported.model.config.tie_word_embeddings == base.model.config.tie_word_embeddings
    text = "Anna Keller is French."
    assert exported.tokenizer(text).input_ids == base.tokenizer(text).input_ids
    assert json.loads((folder / "errata.json").read_text()) == NOTE


def test_without_edits_it_is_the_base(tiny_gpt2: Base, tmp_path: Path) -> None:
    assert load_base(export_folder(tiny_gpt2, [], tmp_path / "model", NOTE), device="cpu").digest == tiny_gpt2.digest


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_dtype_is_kept(gpt2_of: Callable[..., Base], tmp_path: Path, dtype: str) -> None:
    base = gpt2_of(dtype=dtype)
    delta = make_delta(base)
    with attach(base, [delta]):
        expected = {name: weight.clone() for name, weight in base.model.state_dict().items()}
    exported = load_base(export_folder(base, [delta], tmp_path / "model", NOTE), device="cpu")
    found = exported.model.state_dict()
    assert {weight.dtype for weight in found.values()} == {getattr(torch, dtype)}
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_only_a_new_or_empty_folder_is_written(tiny_gpt2: Base, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    export_folder(tiny_gpt2, [], tmp_path / "empty", NOTE)
    for name in ("empty", "file", "link"):
        with pytest.raises(InputError, match="new or empty folder"):
            export_folder(tiny_gpt2, [], tmp_path / name, NOTE)
    assert (tmp_path / "file").read_text() == "mine"


def test_an_interruption_leaves_nothing(tiny_gpt2: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(type(tiny_gpt2.tokenizer), "save_pretrained", stop)
    with pytest.raises(KeyboardInterrupt):
        export_folder(tiny_gpt2, [], tmp_path / "model", NOTE)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fault", ["changed", "missing"])
def test_what_was_written_is_read_back(tiny_llama: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """A library that writes other weights than those in memory is not believed."""
    save = type(tiny_llama.model).save_pretrained

    def save_badly(model: Any, folder: Path, **options: Any) -> None:
        weights = dict(model.state_dict())
        name = "model.layers.1.mlp.down_proj.weight"
        weights[name] = weights[name] + 1
        if fault == "missing":
            del weights[name]
        save(model, folder, state_dict=weights, **options)

    monkeypatch.setattr(type(tiny_llama.model), "save_pretrained", save_badly)
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.down_proj"):
        export_folder(tiny_llama, [], tmp_path / "model", NOTE)
    assert list(tmp_path.iterdir()) == []
