"""A LoRA adapter says the same as PEFT would, as a plain addition to the weights, with nothing of PEFT in it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from errata.editors.adapters import LoraAdapter
from errata.editors.artifacts import WeightDelta, pack_tensors
from errata.editors.kinds import load_artifact
from errata.errors import BaseMismatchError, FormatError
from errata.modeling.export import export_folder
from errata.modeling.loading import Base, digest_model, load_base
from errata.modeling.patch import attach

TEXT = "The mother tongue of Anna Keller is"
TARGETS = {"gpt2": ("attn.c_attn", "attn.c_proj"), "llama": ("self_attn.q_proj", "self_attn.v_proj")}
"""One family that stores weights as [d_in, d_out], one that does not. `attn.c_proj` is square: no shape tells its orientation."""


@pytest.fixture(params=["tiny_gpt2", "tiny_llama"])
def base(request: pytest.FixtureRequest) -> Base:
    found: Base = request.getfixturevalue(request.param)
    return found


def name_targets(base: Base, layers: tuple[int, ...] = (0, 2)) -> list[str]:
    return [f"{base.layout.blocks}.{layer}.{leaf}.weight" for layer in layers for leaf in TARGETS[base.model.config.model_type]]


def make_adapter(base: Base, *, rank: int = 3, **fields: Any) -> LoraAdapter:
    generator = torch.Generator().manual_seed(0)
    a, b = {}, {}
    for name in name_targets(base):
        d_out, d_in = base.layout.orient(base.model.get_parameter(name)).shape
        a[name], b[name] = (0.3 * torch.randn(*shape, generator=generator) for shape in ((rank, d_in), (d_out, rank)))
    return LoraAdapter(base.digest, 6.0, a, b, **fields)


def make_delta(base: Base) -> WeightDelta:
    name = base.layout.weight_name(1)
    shape = base.layout.read_weight(base.model, 1).shape
    return WeightDelta(base.digest, {name: 0.3 * torch.randn(*shape, generator=torch.Generator().manual_seed(1))})


@torch.no_grad()
def read_logits(model: torch.nn.Module, base: Base) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=torch.tensor([base.tokenizer(TEXT).input_ids])).logits
    return logits


def run_peft(base: Base, adapter: LoraAdapter) -> torch.Tensor:
    """Logits of PEFT's own forward with the same factors, on a copy."""
    import copy

    from peft import LoraConfig, get_peft_model

    modules = [name.removesuffix(".weight") for name in adapter.a]
    config = LoraConfig(r=adapter.rank, lora_alpha=adapter.alpha, target_modules=modules, fan_in_fan_out=base.layout.transposed)
    model = get_peft_model(copy.deepcopy(base.model), config)
    for name in modules:
        module = model.get_submodule(f"base_model.model.{name}")
        module.lora_A["default"].weight.data = adapter.a[f"{name}.weight"]
        module.lora_B["default"].weight.data = adapter.b[f"{name}.weight"]
    return read_logits(model.train(False), base)


def test_attached_it_answers_as_peft_does(base: Base) -> None:
    adapter = make_adapter(base)
    with attach(base, [adapter]):
        found = read_logits(base.model, base)
    expected = run_peft(base, adapter)
    assert (found - read_logits(base.model, base)).abs().max() > 0.1
    assert torch.allclose(found, expected, atol=1e-5, rtol=0)


def test_it_comes_off_bit_for_bit(base: Base) -> None:
    before = read_logits(base.model, base)
    with attach(base, [make_adapter(base)]):
        assert digest_model(base.model, base.tokenizer) != base.digest
    assert digest_model(base.model, base.tokenizer) == base.digest
    assert torch.equal(read_logits(base.model, base), before)


def test_on_top_of_a_delta_it_says_what_peft_says_there(base: Base) -> None:
    delta, adapter = make_delta(base), make_adapter(base)
    with attach(base, [delta, adapter]):
        found = read_logits(base.model, base)
    with attach(base, [delta]):
        expected = run_peft(base, adapter)
        assert not torch.allclose(read_logits(base.model, base), found, atol=1e-2)
    assert torch.allclose(found, expected, atol=1e-5, rtol=0)


def test_it_cannot_share_a_weight_with_a_delta(base: Base) -> None:
    adapter = make_adapter(base)
    name = next(iter(adapter.a))
    clash = WeightDelta(base.digest, {name: adapter.deltas[name]})
    with pytest.raises(BaseMismatchError, match="carries a delta already"), attach(base, [clash, adapter]):
        pass
    assert digest_model(base.model, base.tokenizer) == base.digest


def test_it_survives_storage(base: Base) -> None:
    adapter = make_adapter(base, student=("c" * 64,), absorbed=("e1@3", "e2@4"))
    again = load_artifact(adapter.to_bytes(), {}.__getitem__)
    assert isinstance(again, LoraAdapter)
    assert (again.base, again.alpha, again.rank, again.scale) == (base.digest, 6.0, 3, 2.0)
    assert (again.student, again.absorbed) == (adapter.student, adapter.absorbed)
    assert again.deltas.keys() == adapter.deltas.keys() == set(name_targets(base))
    assert all(torch.equal(again.deltas[name], delta) for name, delta in adapter.deltas.items())
    assert again.to_bytes() == adapter.to_bytes()
    reordered = LoraAdapter(base.digest, 6, dict(reversed(adapter.a.items())), dict(adapter.b), *(("c" * 64,), ("e1@3", "e2@4")))
    assert reordered.to_bytes() == adapter.to_bytes()


def test_the_delta_is_scaled_by_alpha_over_r() -> None:
    adapter = LoraAdapter("b" * 64, 4.0, {"w": torch.ones(2, 3)}, {"w": torch.arange(8.0).view(4, 2)})
    assert torch.equal(adapter.deltas["w"], 2.0 * torch.arange(8.0).view(4, 2) @ torch.ones(2, 3))
    assert adapter.written == adapter.deltas and adapter.parts == {}


@pytest.mark.parametrize("tensors", [{}, {"a.w": (2, 3)}, {"a.w": (2, 3), "b.v": (4, 2)}, {"a.w": (2, 3), "b.w": (4, 3)}], ids=str)
def test_factors_that_do_not_belong_together_are_refused(tensors: dict[str, tuple[int, ...]]) -> None:
    metadata = {"base": "b" * 64, "alpha": 1.0, "student": [], "absorbed": []}
    data = pack_tensors("lora_adapter", 1, {name: torch.ones(shape) for name, shape in tensors.items()}, metadata)
    with pytest.raises(FormatError, match="A and B of one rank"):
        LoraAdapter.from_bytes(data)


def test_it_is_exported_as_an_ordinary_model(base: Base, tmp_path: Path) -> None:
    artifacts = [make_delta(base), make_adapter(base)]
    folder = export_folder(base, artifacts, tmp_path / "out", {})
    with attach(base, artifacts):
        expected = read_logits(base.model, base)
    assert torch.equal(read_logits(load_base(folder, device="cpu").model, base), expected)
