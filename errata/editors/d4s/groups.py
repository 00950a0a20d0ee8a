"""Key groups: edits whose keys are nearly equal ask one place for several things, and their sum gives it the mean of them (MEMIT-Merge,
arXiv 2502.07322; algorithms.md §T 5). They share one z, which is optimised over all their prompts, and one pair."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial

import torch

from errata.editors.rows import EditRows
from errata.modeling.loading import Base
from errata.modeling.tokens import find_pad, pad_rows
from errata.modeling.trace import trace_inputs

_ROWS = 128
"""Prompts read in one pass: they end at their subjects, so they are short."""
NEARLY_EQUAL = 0.95
"""Cosine of two bare keys above which their pairs would average (design §5)."""


@torch.no_grad()
def read_bare_keys(base: Base, rows: Sequence[EditRows], layers: Sequence[int]) -> dict[int, torch.Tensor]:
    """Layer → [e, d_in] float32: inputs of the edited projection at the subject's last token of each edit's bare prompt."""
    projections = {layer: base.layout.projection_of(base.model, layer) for layer in layers}
    parts: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers}
    for start in range(0, len(rows), _ROWS):
        bare = [edit.contexts[0].ids[: edit.contexts[0].site + 1] for edit in rows[start : start + _ROWS]]
        every = torch.arange(len(bare), device=base.device)
        last = torch.tensor([len(ids) - 1 for ids in bare], device=base.device)
        ids, mask = pad_rows(bare, find_pad(base.tokenizer), "right", base.device)
        with trace_inputs(projections, partial(_pick, every, last), stop=True) as found:
            base.model.get_submodule(base.layout.body)(input_ids=ids, attention_mask=mask, use_cache=False)
        for layer, keys in found.items():
            parts[layer].append(keys.cpu())
    return {layer: torch.cat(keys) for layer, keys in parts.items()}


def _pick(rows: torch.Tensor, columns: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    return inputs[rows, columns].float()


def group_keys(names: Sequence[str], keys: Mapping[int, torch.Tensor]) -> list[tuple[int, ...]]:
    """Which of n keys belong together: those of equal names that a chain of nearly equal keys connects, in every layer.

    Args:
        names: [n]; keys of different names are never nearly equal, and are not compared.
        keys: layer → [n, d_in].

    Returns:
        Indices, each once, in ascending order; most stand alone.
    """
    unit = {layer: torch.nn.functional.normalize(found.double(), dim=1) for layer, found in keys.items()}
    alike = defaultdict(list)
    for index, name in enumerate(names):
        alike[name].append(index)
    groups: list[tuple[int, ...]] = []
    for members in alike.values():
        near = torch.stack([found[members] @ found[members].T for found in unit.values()]).amin(dim=0) > NEARLY_EQUAL
        groups += [tuple(members[place] for place in part) for part in _connect(near)]
    return sorted(groups)


def _connect(near: torch.Tensor) -> list[list[int]]:
    """Connected components of a symmetric boolean matrix [m, m]."""
    waiting, parts = set(range(len(near))), []
    while waiting:
        part, edge = set[int](), {min(waiting)}
        while edge:
            part |= edge
            waiting -= edge
            edge = {other for place in edge for other in near[place].nonzero().flatten().tolist()} & waiting
        parts.append(sorted(part))
    return parts
