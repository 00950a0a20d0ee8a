"""Running only what a change at the edit site can reach: the blocks above it, from the site on (design §11).

Attention is causal, so positions before the site keep their keys and values; they are computed once per edit and read at every step.
The MLPs, most of the work, run at real positions only, and in the last block at those whose output is read.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from transformers import PreTrainedModel

from errata.modeling.layout import ModelLayout
from errata.modeling.trace import run_at

Past = dict[int, tuple[torch.Tensor, torch.Tensor]]
"""Block → keys and values [n, heads, p, d_head]."""


@dataclass(frozen=True)
class Suffix:
    """n rows from their site on, ready to run through the blocks above the site's."""

    hidden: torch.Tensor
    """[n, s, d] output of the site's block on the base; column 0 is the site."""
    past: Past
    """Blocks above → the p positions before the site, left-aligned."""
    mask: torch.Tensor
    """[n, 1, s, p + s] additive: which positions each position may attend to."""
    positions: torch.Tensor
    """[n, s] absolute positions."""
    real: torch.Tensor
    """[n, s] bool: false in the columns beyond a row's end, which hold anything."""

    def take(self, rows: torch.Tensor) -> Self:
        """The rows named."""
        past = {layer: (keys[rows], values[rows]) for layer, (keys, values) in self.past.items()}
        parts = {name: getattr(self, name)[rows] for name in ("hidden", "mask", "positions", "real")}
        return replace(self, past=past, **parts)

    def run(
        self, model: PreTrainedModel, layout: ModelLayout, shift: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor
    ) -> torch.Tensor:
        """Hidden states after the last block when something is added at the sites.

        Args:
            shift: [n, d] what is added.
            rows, columns: [m] the places that are read.

        Returns:
            [m, d], with gradients to `shift`.
        """
        hidden = torch.cat([(self.hidden[:, 0] + shift.to(self.hidden.dtype)).unsqueeze(1), self.hidden[:, 1:]], dim=1)
        asked = torch.zeros_like(self.real)
        asked[rows, columns] = True
        blocks = _Blocks(model, layout, list(self.past), self.positions, self.mask)
        return blocks.run(hidden, _PrefixCache(self.past), self.real, asked)[rows, columns]


class _PrefixCache:
    """The part of a transformers cache that attention calls: it reads a stored prefix, or stores what it sees of a block without one."""

    def __init__(self, past: Past) -> None:
        self.past = past

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if layer not in self.past:
            self.past[layer] = (keys, values)
            return keys, values
        past_keys, past_values = self.past[layer]
        return torch.cat([past_keys, keys], dim=2), torch.cat([past_values, values], dim=2)


def cut_suffixes(
    model: PreTrainedModel, layout: ModelLayout, hidden: torch.Tensor, above: Sequence[int], sites: Sequence[int], lengths: Sequence[int]
) -> Suffix:
    """Cut rows at their sites.

    Args:
        hidden: [n, longest, d] output of the site's block for right-padded rows.
        above: the blocks above, to the last.
        sites: per row, the first position that will change.
        lengths: per row, its number of real tokens.
    """
    device = hidden.device
    site, length = torch.tensor(sites, device=device)[:, None], torch.tensor(lengths, device=device)[:, None]
    width = int((length - site).max())
    before = int(site.max())
    columns, earlier = torch.arange(width, device=device), torch.arange(before, device=device)
    positions = (site + columns).clamp(max=hidden.shape[1] - 1)
    cut = hidden.gather(1, positions[..., None].expand(-1, -1, hidden.shape[-1]))
    in_prefix = (earlier < site)[:, None, :].expand(-1, width, -1)
    in_suffix = (columns[:, None] >= columns)[None].expand(len(sites), -1, -1)
    mask = _mask_additively(torch.cat([in_prefix, in_suffix], dim=2), hidden.dtype)
    past = _read_past(model, layout, hidden[:, : max(before, 1)], above, site)
    kept = {layer: (keys[:, :, :before].contiguous(), values[:, :, :before].contiguous()) for layer, (keys, values) in past.items()}
    return Suffix(cut, kept, mask, positions, site + columns < length)


def _read_past(model: PreTrainedModel, layout: ModelLayout, hidden: torch.Tensor, above: Sequence[int], site: torch.Tensor) -> Past:
    """Keys and values of the blocks above at the positions of `hidden` [n, p, d], those before each row's `site` [n, 1] being right."""
    columns = torch.arange(hidden.shape[1], device=hidden.device)
    real = columns < site
    mask = _mask_additively((columns[:, None] >= columns)[None], hidden.dtype)
    cache = _PrefixCache({})
    # Of the last block only keys and values are wanted, so its MLP runs nowhere.
    _Blocks(model, layout, above, columns[None], mask).run(hidden, cache, real, torch.zeros_like(real))
    return cache.past


def _mask_additively(allowed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[n, s, t] bool → [n, 1, s, t]: 0 where allowed, the lowest finite value elsewhere."""
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(~allowed, torch.finfo(dtype).min)[:, None]


@dataclass(frozen=True)
class _Blocks:
    """Consecutive blocks of a model, called as the model calls them."""

    model: PreTrainedModel
    layout: ModelLayout
    layers: Sequence[int]
    positions: torch.Tensor
    """[n or 1, s]"""
    mask: torch.Tensor
    """[n or 1, 1, s, t] additive."""

    def run(self, hidden: torch.Tensor, cache: _PrefixCache, real: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
        """`hidden` [n, s, d] through the blocks.

        Args:
            real, asked: [n, s] bool: where MLPs run, and where that of the last block runs. The output is right at `asked` only.
        """
        extra: dict[str, Any] = {}
        if self.layout.rotary is not None:
            extra["position_embeddings"] = self.model.get_submodule(self.layout.rotary)(hidden, position_ids=self.positions)
        everywhere, at_last = (places.flatten().nonzero().squeeze(1) for places in (real, asked))
        for layer in self.layers:
            with run_at(self.layout.mlp_of(self.model, layer), at_last if layer == self.layers[-1] else everywhere):
                block = self.layout.block(self.model, layer)
                found = block(hidden, attention_mask=self.mask, position_ids=self.positions, **{self.layout.cache: cache}, **extra)
                hidden = found[0] if isinstance(found, tuple) else found
        return hidden
