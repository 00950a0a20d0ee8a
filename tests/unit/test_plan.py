"""The memory plan against hand arithmetic for two large models, and against what is really there for small ones."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from errata import plan as planning
from errata.editors.base import Pairs
from errata.editors.d4s.editor import D4S
from errata.editors.d4s.moments import Moments
from errata.editors.d4s.reading import read_base
from errata.editors.d4s.targets import optimise_targets
from errata.editors.rows import build_rows
from errata.edits import Edit
from errata.errors import InputError, ModelError
from errata.modeling.layout import find_layout
from errata.modeling.loading import Base, sketch_config, sketch_model
from errata.plan import (
    Plan,
    Room,
    count_activations,
    count_predictions,
    count_weights,
    make_plan,
    plan_neurons,
    read_bytes,
    spell_bytes,
)
from errata.profiles import PrepareOptions, Profile, SolveOptions
from errata.suggestions import suggest_profile

GIB = 2**30
_LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "max_position_embeddings": 4096,
    "vocab_size": 32_000,
    "dtype": "float16",
}
LLAMA_7B = {**_LLAMA, "hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32, "num_attention_heads": 32}
LLAMA_70B = {
    **_LLAMA,
    "hidden_size": 8192,
    "intermediate_size": 28_672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}
PLENTY = Room(2**60, 2**60, 2**60, False)


@pytest.fixture
def config_of(tmp_path: Path) -> Callable[[dict[str, Any]], str]:
    def write(config: dict[str, Any]) -> str:
        (tmp_path / "config.json").write_text(json.dumps(config))
        return str(tmp_path / "config.json")

    return write


def find(plan: Plan, begin: str) -> int:
    (size,) = (line.bytes for line in plan.lines if line.what.startswith(begin))
    return size


def test_neurons_of_a_7b_model_are_planned(config_of: Callable[..., str]) -> None:
    plan = plan_neurons(sketch_model(config_of(LLAMA_7B)), 30, PLENTY, edits=20_000)
    assert (plan.editor, plan.layers, plan.fits) == ("ireva", (30,), True)
    assert plan.pair_bytes == 3 * 2 * 4 * 4096, "keys and values of three tokens, float32"
    assert find(plan, "keys and values of 20,000 edits") == 20_000 * plan.pair_bytes
    small = plan_neurons(sketch_model(config_of(LLAMA_7B)), 30, Room(GIB, GIB, GIB, True), edits=20_000)
    assert not small.fits
    with pytest.raises(ModelError):
        small.require_fit()


def test_a_7b_model_is_planned_from_its_configuration(config_of: Callable[..., str]) -> None:
    begun = time.perf_counter()
    model = sketch_model(config_of(LLAMA_7B))
    suggested = suggest_profile("llama", 32)
    assert suggested is not None
    plan = make_plan(model, suggested.prepare.layers, "even", PLENTY, edits=20_000)
    assert time.perf_counter() - begun < 20
    assert (plan.family, plan.dtype, plan.layers, plan.shapes[0]) == ("llama", "float16", (4, 5, 6, 7, 8), (4096, 11_008))
    per_block = 4 * 4096 * 4096 + 3 * 4096 * 11_008 + 2 * 4096
    assert plan.parameters == 2 * 32_000 * 4096 + 32 * per_block + 4096 == 6_738_415_616
    frequencies = 2 * 4 * 64  # the only buffers: rotary frequencies, and those they began as
    assert find(plan, "weights") == 2 * plan.parameters + frequencies
    # algorithms.md §1.3: kk .97 GB and rk .36 GB per layer; an edit takes about .24 MB.
    assert (8 * 11_008**2, 8 * 4096 * 11_008) == (969_408_512, 360_710_144)
    assert plan.layer_bytes == 969_408_512 + 360_710_144
    assert plan.pair_bytes == 4 * (4096 + 5 * 11_008) == 236_544
    assert find(plan, "C of 5") == 5 * 4 * 11_008**2 and find(plan, "pairs of") == 20_000 * 236_544
    assert find(plan, "sums that are written") == 5 * plan.layer_bytes
    assert find(plan, "rk and kk of one layer") == 2 * plan.layer_bytes, "layer by layer, what it was and what it becomes"
    assert find(plan, "second moments C") == 5 * 969_408_512
    strips = [min(512, 11_008 - start) * (11_008 - start) for start in range(0, 11_008, 512)]
    assert find(plan, "one snapshot") == 5 * 8 * (sum(strips) + 4096 * 11_008)
    assert plan.fits


def test_a_70b_model_with_cross_moments(config_of: Callable[..., str]) -> None:
    plan = make_plan(sketch_model(config_of(LLAMA_70B)), range(10, 21), "refresh", PLENTY, edits=100_000)
    assert plan.parameters == 68_976_648_192
    squares, layers = 28_672**2, 11
    assert find(plan, "sums that are written") == 8 * (layers * (squares + 8192 * 28_672) + layers * (layers - 1) // 2 * squares)
    assert find(plan, "solved deltas of all layers") == 8 * layers * 8192 * 28_672
    assert find(plan, "C of 11") == layers * 4 * squares


def test_what_does_not_fit_is_refused_before_work(config_of: Callable[..., str]) -> None:
    model = sketch_model(config_of(LLAMA_7B))
    card, small = (Room(size * GIB, 64 * GIB, 500 * GIB, False) for size in (24, 8))
    fits = make_plan(model, (4, 5, 6, 7, 8), "even", card)
    assert fits.fits and 256 <= fits.chunk_tokens < 4_096, "fewer edits side by side"
    fits.require_fit()
    refused = make_plan(model, (4, 5, 6, 7, 8), "even", small)
    with pytest.raises(ModelError, match=r"room for weights \(always\): 12.6GiB in all on the device, found 8.0GiB; device_map"):
        refused.require_fit()
    spread = make_plan(model, (4, 5, 6, 7, 8), "even", small, offloads=True)
    parts = [line.bytes for line in spread.lines if line.what.startswith("weights")]
    assert spread.fits and sum(parts) == count_weights(model) and parts[0] < 8 * GIB < sum(parts)
    tight = make_plan(model, (4, 5, 6, 7, 8), "even", Room(80 * GIB, 5 * GIB, 500 * GIB, False), edits=20_000)
    assert not tight.hoards and not tight.fits and {line.place for line in tight.lines if not line.fits} == {"memory"}
    with pytest.raises(ModelError, match="found 1.0GiB; free some"):
        make_plan(model, (4, 5, 6, 7, 8), "even", Room(80 * GIB, 64 * GIB, GIB, False), edits=20_000).require_fit()


def test_on_a_cpu_device_and_memory_are_the_same_bytes(config_of: Callable[..., str]) -> None:
    model = sketch_model(config_of(LLAMA_7B))
    alone, shared = (make_plan(model, (4,), "single", Room(18 * GIB, 18 * GIB, 99 * GIB, same), edits=20_000) for same in (False, True))
    assert alone.fits and {line.phase for line in shared.lines if not line.fits} == {"solve"}


@pytest.mark.parametrize("edits", [5, 60], ids=["pairs", "sums"])
@pytest.mark.parametrize("spread", ["even", "refresh"])
def test_small_models_take_what_the_plan_says(any_base: Base, spread: str, edits: int) -> None:
    base, layers = any_base, (1, 2, 3)
    plan = make_plan(base.model, layers, spread, PLENTY, edits=edits)
    assert find(plan, "weights") == sum(tensor.nbytes for tensor in (*base.model.parameters(), *base.model.buffers()))
    sketched = sketch_config(base.model.config)
    # Weights of a sketch are as many; a configuration need not say their dtype.
    assert sum(p.numel() for p in sketched.parameters()) == sum(p.numel() for p in base.model.parameters()) == plan.parameters
    d_out, d_in = base.layout.read_weight(base.model, 1).shape
    c = torch.eye(d_in)
    moments = Moments(base.digest, "c", 0, 1, dict.fromkeys(layers, c))
    assert find(plan, "C of 3") == sum(each.nbytes for each in moments.c.values())
    prepare = PrepareOptions(layers=layers)
    solve = SolveOptions(lam=1.0, spread=spread, moments="m")  # type: ignore[arg-type]
    editor = D4S(Profile(base=base.digest, prepare=prepare, solve=solve), moments, base.layout)
    keys = {layer: torch.randn(edits, d_in) for layer in layers}
    pairs = Pairs(base.digest, prepare.digest, tuple((str(row),) for row in range(edits)), torch.randn(edits, d_out), keys)
    stored = sum(tensor.nbytes for tensor in pairs.to_tensors().values())
    assert find(plan, "pairs of") == stored == edits * plan.pair_bytes
    state = editor.merge(editor.empty_state(), pairs, None)
    assert find(plan, "one snapshot") == count_tensors(state.to_bytes())
    held = sum(tensor.nbytes for sums in (state.rk, state.kk, state.kx) for tensor in sums.values()) if state.pairs is None else stored
    assert (find(plan, "the pairs of") if edits == 5 else find(plan, "sums rk and kk") // 2) == held
    artifact = editor.solve(state)
    assert artifact is not None
    assert find(plan, "one artifact") == sum(delta.nbytes for delta in artifact.deltas.values()) == count_tensors(artifact.to_bytes())


def count_tensors(data: bytes) -> int:
    """Bytes of a safetensors file behind its header."""
    return len(data) - 8 - int.from_bytes(data[:8], "little")


def test_activations_are_about_what_autograd_keeps(any_base: Base) -> None:
    """Measured from the subject on, which half of the tokens are taken to be; without predictions, which a vocabulary beside such narrow
    layers would make nearly all of it."""
    base, contexts = any_base, ("{}", "{}", "{}")
    options = PrepareOptions(layers=(1,), steps=2, contexts=contexts)
    edits = [Edit(subject="Anna Keller", prompt="{} speaks the tongue of " + "her " * size, target_new="Danish") for size in range(1, 5)]
    units = [[build_rows(base.tokenizer, edit, contexts, base.span)] for edit in edits]
    reading = read_base(base, units, options.layers)
    known = {tensor.untyped_storage().data_ptr() for tensor in base.model.parameters()}
    past = [tensor for both in reading.suffix.past.values() for tensor in both]
    kept = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in past}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known and tensor.shape[-1:] != (base.model.config.vocab_size,):
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        optimise_targets(base, units, reading, options)
    suffix = reading.suffix.hidden.shape[0] * reading.suffix.hidden.shape[1]
    estimate = count_activations(base.model, base.layout, 1, 2 * suffix) - count_predictions(base.model, 2 * suffix)
    assert 1 < estimate / sum(kept.values()) < 5


def test_a_chunk_fits_or_is_as_small_as_it_gets(config_of: Callable[..., str]) -> None:
    model = sketch_model(config_of(LLAMA_7B))
    layout = find_layout(model)
    chosen = [planning.choose_chunk(model, layout, 8, free) for free in (2**60, 6 * GIB, 3 * GIB, 0)]
    assert chosen[0] == 4_096 and chosen[-1] == 256 and chosen == sorted(chosen, reverse=True)
    assert all(
        count_activations(model, layout, 8, tokens) <= free for tokens, free in zip(chosen[:3], (2**60, 6 * GIB, 3 * GIB), strict=True)
    )


@pytest.mark.parametrize(("text", "size"), [("24GiB", 24 * GIB), ("80 GB", 80 * 10**9), ("1.5TiB", 3 * 2**39), ("123", 123)])
def test_bytes_are_read(text: str, size: int) -> None:
    assert read_bytes(text) == size


def test_no_bytes() -> None:
    with pytest.raises(InputError, match="expected bytes such as 24GiB, found 'much'"):
        read_bytes("much")
    assert spell_bytes(int(12.6 * GIB)) == "12.6GiB"


@pytest.mark.parametrize("content", ["{}", "no json", json.dumps({"model_type": "bert"})])
def test_what_is_no_language_model_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match="expected"):
        find_layout(sketch_model(str(tmp_path)))


def test_the_sketch_of_a_stored_model_has_its_bytes(editable_folder: Path, editable: Base) -> None:
    assert count_weights(sketch_model(str(editable_folder))) == count_weights(editable.model)
    assert AutoConfig.from_pretrained(editable_folder).model_type == editable.model.config.model_type
