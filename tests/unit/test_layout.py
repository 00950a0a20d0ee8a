"""The table of model families, tried against real models of each family."""

import pytest
import torch
from transformers import BertConfig, BertLMHeadModel

from errata.errors import UnknownArchitectureError
from errata.modeling.layout import LAYOUTS, find_layout
from errata.modeling.loading import Base
from errata.modeling.tokens import pad_rows
from errata.modeling.trace import capture_outputs, change_output, trace_inputs


@pytest.fixture
def base(any_base: Base) -> Base:
    return any_base


@torch.no_grad()
def test_norm_and_head_turn_the_last_block_into_logits(base: Base) -> None:
    layout, model = base.layout, base.model
    ids, _ = pad_rows([[3, 5, 7, 11]], 0, "right")
    last = layout.count_layers(model) - 1
    with capture_outputs({last: layout.block(model, last)}) as found:
        logits = model(input_ids=ids).logits
    rebuilt = model.get_submodule(layout.head)(model.get_submodule(layout.norm)(found[last]))
    assert torch.allclose(rebuilt, logits, atol=1e-5)


@torch.no_grad()
def test_the_projection_maps_keys_to_the_mlps_output(base: Base) -> None:
    """Key times the weight, read as [d_out, d_in], is what the MLP adds to the stream (but for a bias)."""
    layout, model = base.layout, base.model
    ids, _ = pad_rows([[3, 5, 7, 11]], 0, "right")
    projection = layout.projection_of(model, 1)
    with trace_inputs({1: projection}, lambda inputs: inputs) as keys, capture_outputs({1: layout.mlp_of(model, 1)}) as outputs:
        model(input_ids=ids)
    weight = layout.read_weight(model, 1)
    assert weight.shape == (outputs[1].shape[-1], keys[1].shape[-1])
    assert weight.shape[0] != weight.shape[1]
    bias = getattr(projection, "bias", None)
    expected = keys[1] @ weight.T + (0 if bias is None else bias)
    assert torch.allclose(outputs[1], expected, atol=1e-5)


@torch.no_grad()
def test_a_rank_one_delta_moves_its_key_by_its_residual(base: Base) -> None:
    layout, model = base.layout, base.model
    ids, _ = pad_rows([[3, 5, 7, 11]], 0, "right")
    mlp = layout.mlp_of(model, 1)
    with trace_inputs({1: layout.projection_of(model, 1)}, lambda inputs: inputs[0, 2]) as keys, capture_outputs({1: mlp}) as before:
        model(input_ids=ids)
    residual = torch.ones(layout.read_weight(model, 1).shape[0])
    parameter = model.get_parameter(layout.weight_name(1))
    original = parameter.data
    parameter.data = original + layout.orient(torch.outer(residual, keys[1]) / keys[1].square().sum())
    try:
        with capture_outputs({1: mlp}) as after:
            model(input_ids=ids)
    finally:
        parameter.data = original
    assert torch.allclose(after[1][0, 2] - before[1][0, 2], residual, atol=1e-4)


@torch.no_grad()
def test_mlps_treat_positions_alone(base: Base) -> None:
    """What `run_at` relies on."""
    mlp = base.layout.mlp_of(base.model, 0)
    hidden = torch.randn(2, 5, base.layout.read_weight(base.model, 0).shape[0])
    assert torch.allclose(mlp(hidden)[1, 3], mlp(hidden[1:, 3:4])[0, 0], atol=1e-6)


@torch.no_grad()
def test_blocks_return_their_hidden_states(base: Base) -> None:
    layout, model = base.layout, base.model
    ids, _ = pad_rows([[3, 5, 7]], 0, "right")
    plain = model(input_ids=ids).logits
    with change_output(layout.block(model, 1), lambda hidden: hidden + 1.0):
        assert not torch.allclose(model(input_ids=ids).logits, plain)
    assert torch.equal(model(input_ids=ids).logits, plain)


def test_a_layer_that_is_not_there(base: Base) -> None:
    count = base.layout.count_layers(base.model)
    for layer in (-1, count):
        with pytest.raises(UnknownArchitectureError, match=rf"0\.\.{count - 1} .* found {layer}"):
            base.layout.block(base.model, layer)


def test_an_unknown_family_names_the_table() -> None:
    model = BertLMHeadModel(
        BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, is_decoder=True)
    )
    with pytest.raises(UnknownArchitectureError, match=r"gpt2, .*llama, .*found 'bert'.*LAYOUTS") as raised:
        find_layout(model)
    assert raised.value.exit_code == 2


def test_a_row_that_does_not_fit_is_named(tiny_gpt2: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LAYOUTS, "gpt2", LAYOUTS["llama"])
    with pytest.raises(UnknownArchitectureError, match="'gpt2' row of LAYOUTS does not fit"):
        find_layout(tiny_gpt2.model)
