"""Where things are in each model family: one table instead of tests on model names.

A layout is data. Every other module asks it for blocks, edited projections, final norm and head, so that a new family is a new row.
"""

from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import PreTrainedModel

from errata.errors import UnknownArchitectureError


@dataclass(frozen=True)
class ModelLayout:
    """Module paths of one family. Paths within a block are relative to the block."""

    body: str
    """The transformer without its head; called with token ids it returns final hidden states."""
    blocks: str
    """The list of blocks."""
    projection: str
    """Within a block: the MLP output projection, whose weight is edited. Its input is the key."""
    transposed: bool
    """True where the projection's weight is stored [d_in, d_out] (GPT-2's Conv1D) instead of [d_out, d_in]."""
    norm: str
    """Final norm, between the last block and the head."""
    head: str
    rotary: str | None
    """Module that turns positions into the rotary embeddings that blocks expect, where blocks expect them."""
    cache: str = "past_key_values"
    """What a block calls its cache."""
    mlp_norm: str | None = None
    """Within a block: the norm between attention's output and the MLP. None where the MLP runs beside attention and does not see it."""

    def block(self, model: PreTrainedModel, layer: int) -> nn.Module:
        """Block `layer`.

        Raises:
            UnknownArchitectureError: the model has no such layer.
        """
        blocks = model.get_submodule(self.blocks)
        assert isinstance(blocks, nn.ModuleList)
        if not 0 <= layer < len(blocks):
            raise UnknownArchitectureError(f"expected a layer in 0..{len(blocks) - 1} of this {model.config.model_type}, found {layer}")
        return blocks[layer]

    def count_layers(self, model: PreTrainedModel) -> int:
        blocks = model.get_submodule(self.blocks)
        assert isinstance(blocks, nn.ModuleList)
        return len(blocks)

    def projection_of(self, model: PreTrainedModel, layer: int) -> nn.Module:
        return self.block(model, layer).get_submodule(self.projection)

    def mlp_of(self, model: PreTrainedModel, layer: int) -> nn.Module:
        """The MLP that `projection` ends. It treats every position alone."""
        return self.block(model, layer).get_submodule(self.projection.rpartition(".")[0])

    def weight_name(self, layer: int) -> str:
        """Full parameter name of the edited weight of `layer`."""
        return f"{self.blocks}.{layer}.{self.projection}.weight"

    def split_name(self, name: str) -> tuple[int, str]:
        """The layer that a parameter belongs to, and which of its modules: empty for the one that edits are written into."""
        layer, _, rest = name.removeprefix(f"{self.blocks}.").partition(".")
        module = rest.removesuffix(".weight")
        return int(layer), "" if module == self.projection else module

    def read_weight(self, model: PreTrainedModel, layer: int) -> torch.Tensor:
        """The edited weight as [d_out, d_in], a view of the parameter."""
        weight = model.get_parameter(self.weight_name(layer)).detach()
        return weight.T if self.transposed else weight

    def orient(self, delta: torch.Tensor) -> torch.Tensor:
        """[d_out, d_in] as the parameter is stored."""
        return delta.T if self.transposed else delta


_GPT2 = ModelLayout(
    body="transformer",
    blocks="transformer.h",
    projection="mlp.c_proj",
    transposed=True,
    norm="transformer.ln_f",
    head="lm_head",
    rotary=None,
    mlp_norm="ln_2",
)
_LLAMA = ModelLayout(
    body="model",
    blocks="model.layers",
    projection="mlp.down_proj",
    transposed=False,
    norm="model.norm",
    head="lm_head",
    rotary="model.rotary_emb",
    mlp_norm="post_attention_layernorm",
)

_GPTJ = replace(_GPT2, projection="mlp.fc_out", transposed=False, cache="layer_past", mlp_norm=None)
_NEOX = ModelLayout(
    body="gpt_neox",
    blocks="gpt_neox.layers",
    projection="mlp.dense_4h_to_h",
    transposed=False,
    norm="gpt_neox.final_layer_norm",
    head="lm_head",
    rotary="gpt_neox.rotary_emb",
    cache="layer_past",
    mlp_norm="post_attention_layernorm",
)

LAYOUTS = {
    "gpt2": _GPT2,
    "gptj": _GPTJ,
    "gpt_neo": replace(_GPTJ, projection="mlp.c_proj", mlp_norm="ln_2"),
    "gpt_neox": _NEOX,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "phi": replace(_LLAMA, projection="mlp.fc2", norm="model.final_layernorm", mlp_norm=None),
}
"""By `config.model_type`. A family is added here once its row has been tried end to end."""


def find_layout(model: PreTrainedModel) -> ModelLayout:
    """The layout of a model.

    Raises:
        UnknownArchitectureError: the family has no row in `LAYOUTS`, or the row does not fit this model.
    """
    family = model.config.model_type
    layout = LAYOUTS.get(family)
    if layout is None:
        raise UnknownArchitectureError(
            f"expected a model of one of the families {', '.join(sorted(LAYOUTS))}, found {family!r}; "
            "a family is a row of LAYOUTS in errata/modeling/layout.py"
        )
    if getattr(model.config, "use_parallel_residual", False):
        layout = replace(layout, mlp_norm=None)
    try:
        for path in (layout.body, layout.norm, layout.head):
            model.get_submodule(path)
        layout.projection_of(model, 0)
    except AttributeError as error:
        raise UnknownArchitectureError(f"the {family!r} row of LAYOUTS does not fit this model: {error}") from None
    return layout
