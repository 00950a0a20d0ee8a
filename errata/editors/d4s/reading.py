"""One pass over the base for many edits: keys, hidden states at the site, and what the optimisation of z reads again at every step."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from errata.editors.rows import EditRows
from errata.modeling.loading import Base
from errata.modeling.suffix import Suffix, cut_suffixes
from errata.modeling.tokens import find_pad, pad_rows
from errata.modeling.trace import capture_outputs, trace_inputs


@dataclass(frozen=True)
class Reading:
    """e edits of c contexts each, in u units that share a pair, as the base sees them. Most units are one edit."""

    keys: dict[int, torch.Tensor]
    """Layer → [u, d_in] float32, averaged over the contexts of an edit, then over the edits of a unit."""
    site: torch.Tensor
    """[u, d] float32: h, the bare prompt's hidden state at the site, averaged over the edits of a unit."""
    suffix: Suffix
    """e · c rows, edit by edit, then the essences that are not the beginning of a bare prompt."""
    essences: list[int]
    """Per unit, the row of `suffix` whose first column is the subject's last token in the essence prompt."""


@torch.no_grad()
def read_base(base: Base, units: Sequence[Sequence[EditRows]], layers: Sequence[int]) -> Reading:
    """Keys at every edited layer, hidden states at the site, cached keys and values of the blocks above.

    The key of an edit is half the bare prompt's and half the mean over the other contexts (MEMIT `compute_ks`; algorithms.md §1.2).
    """
    rows = [edit for unit in units for edit in unit]
    flat = [row.ids for edit in rows for row in edit.contexts]
    sites = [row.site for edit in rows for row in edit.contexts]
    split = len(flat)
    count = split // len(rows)
    essences = []
    first = 0
    for unit in units:
        # Edits of a unit have one subject, hence one essence.
        essence = unit[0].essence
        begun = [first + place for place, edit in enumerate(unit) if essence == edit.contexts[0].ids[: edit.contexts[0].site + 1]]
        first += len(unit)
        if begun:
            essences.append(begun[0] * count)
        else:
            essences.append(len(flat))
            flat.append(essence)
            sites.append(len(essence) - 1)
    every, at = torch.arange(split, device=base.device), torch.tensor(sites[:split], device=base.device)
    top = max(layers)
    ids, mask = pad_rows(flat, find_pad(base.tokenizer), "right", base.device)
    projections = {layer: base.layout.projection_of(base.model, layer) for layer in layers}
    with (
        trace_inputs(projections, lambda inputs: inputs[every, at].float()) as found,
        capture_outputs({top: base.layout.block(base.model, top)}, stop=True) as outputs,
    ):
        base.model.get_submodule(base.layout.body)(input_ids=ids, attention_mask=mask, use_cache=False)
    above = range(top + 1, base.layout.count_layers(base.model))
    suffix = cut_suffixes(base.model, base.layout, outputs[top], above, sites, [len(row) for row in flat])
    sizes = [len(unit) for unit in units]
    keys = {layer: _average_units(average_contexts(inputs.view(len(rows), count, -1)), sizes) for layer, inputs in found.items()}
    return Reading(keys, _average_units(suffix.hidden[0:split:count, 0].float(), sizes), suffix, essences)


@torch.no_grad()
def read_keys(base: Base, units: Sequence[Sequence[EditRows]], layer: int) -> torch.Tensor:
    """Keys [u, d_in] float32 at one layer, averaged as those of `read_base`, from the weights as they are now: with what is attached."""
    rows = [edit for unit in units for edit in unit]
    contexts = [row for edit in rows for row in edit.contexts]
    every = torch.arange(len(contexts), device=base.device)
    at = torch.tensor([row.site for row in contexts], device=base.device)
    ids, mask = pad_rows([row.ids for row in contexts], find_pad(base.tokenizer), "right", base.device)
    projection = {layer: base.layout.projection_of(base.model, layer)}
    with trace_inputs(projection, lambda inputs: inputs[every, at].float(), stop=True) as found:
        base.model.get_submodule(base.layout.body)(input_ids=ids, attention_mask=mask, use_cache=False)
    averaged = average_contexts(found[layer].view(len(rows), len(contexts) // len(rows), -1))
    return _average_units(averaged, [len(unit) for unit in units])


@torch.no_grad()
def read_contexts(
    base: Base, edits: Sequence[EditRows], layers: Sequence[int], output: nn.Module
) -> tuple[dict[int, torch.Tensor], torch.Tensor]:
    """Keys in every context, and what a module says at the site of the bare prompt, from the weights as they are now.

    Args:
        output: a block, or its MLP, at the highest layer; the pass ends there.

    Returns:
        Layer → [e, c, d_in] float32, which `average_contexts` takes; [e, d] float32.
    """
    contexts = [row for edit in edits for row in edit.contexts]
    every = torch.arange(len(contexts), device=base.device)
    at = torch.tensor([row.site for row in contexts], device=base.device)
    ids, mask = pad_rows([row.ids for row in contexts], find_pad(base.tokenizer), "right", base.device)
    projections = {layer: base.layout.projection_of(base.model, layer) for layer in layers}
    with (
        trace_inputs(projections, lambda inputs: inputs[every, at].float()) as found,
        capture_outputs({"output": output}, stop=True) as outputs,
    ):
        base.model.get_submodule(base.layout.body)(input_ids=ids, attention_mask=mask, use_cache=False)
    keys = {layer: inputs.view(len(edits), len(contexts) // len(edits), -1) for layer, inputs in found.items()}
    return keys, outputs["output"][every, at][:: len(contexts) // len(edits)].float()


def average_contexts(keys: torch.Tensor) -> torch.Tensor:
    """[e, c, d_in] → [e, d_in]: the mean of the bare context and of the mean of the others."""
    bare = keys[:, 0]
    return bare if keys.shape[1] == 1 else (bare + keys[:, 1:].mean(dim=1)) / 2


def _average_units(values: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """[e, d] → [u, d]: the mean over each run of `sizes` rows."""
    if len(sizes) == len(values):
        return values
    return torch.stack([part.mean(dim=0) for part in torch.split(values, list(sizes))])
