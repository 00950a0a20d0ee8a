"""D4S sums: all that is kept of past edits, of a size that does not depend on their number (D4S eq. 6–8; algorithms.md §1, §T)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch

from errata.editors.artifacts import pack_tensors, unpack_tensors
from errata.editors.base import Pairs
from errata.errors import EditorError

_FORMAT = 1
_STRIP = 512
"""Rows per stored strip of the upper triangle of kk."""


@dataclass(frozen=True)
class D4SState:
    """`rk_l = Σ r k_lᵀ` and `kk_l = Σ k_l k_lᵀ` over the live pairs, float64."""

    base: str
    prepare: str
    count: int
    rk: Mapping[int, torch.Tensor]
    """Layer → [d_out, d_in] float64; empty when count is 0."""
    kk: Mapping[int, torch.Tensor]
    """Layer → [d_in, d_in] float64, symmetric; empty when count is 0."""

    @classmethod
    def empty(cls, base: str, prepare: str) -> Self:
        return cls(base, prepare, 0, {}, {})

    def add(self, pairs: Pairs) -> Self:
        """Raises BaseMismatchError: pairs of another base or other prepare options."""
        return self._combine(pairs, 1)

    def remove(self, pairs: Pairs) -> Self:
        """Subtract pairs that were added before. A count of 0 gives sums of exactly zero, not of rounding dust.

        Raises:
            BaseMismatchError: pairs of another base or other prepare options.
            EditorError: more pairs than the state holds.
        """
        return self._combine(pairs, -1)

    def _combine(self, pairs: Pairs, sign: int) -> Self:
        pairs.require_same(self.base, self.prepare)
        count = self.count + sign * len(pairs)
        if count < 0:
            raise EditorError(f"expected at most {self.count} pairs to remove, found {len(pairs)}")
        if count == 0:
            return self.empty(self.base, self.prepare)
        residuals = pairs.residuals.double()
        rk, kk = dict(self.rk), dict(self.kk)
        for layer, stored in pairs.keys.items():
            keys = stored.double()
            rk[layer] = _accumulate(self.rk.get(layer), residuals, keys, sign)
            kk[layer] = _accumulate(self.kk.get(layer), keys, keys, sign)
        return type(self)(self.base, self.prepare, count, rk, kk)

    def to_bytes(self) -> bytes:
        tensors: dict[str, torch.Tensor] = {f"rk.{layer}": rk.contiguous() for layer, rk in self.rk.items()}
        for layer, kk in self.kk.items():
            for start in range(0, len(kk), _STRIP):
                tensors[f"kk.{layer}.{start}"] = kk[start : start + _STRIP, start:].contiguous()
        return pack_tensors("d4s_state", _FORMAT, tensors, {"base": self.base, "prepare": self.prepare, "count": self.count})

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Raises FormatError: not a D4S state of this format."""
        tensors, metadata = unpack_tensors(data, "d4s_state", _FORMAT)
        rk = {int(name.split(".")[1]): tensor for name, tensor in tensors.items() if name.startswith("rk.")}
        kk = {layer: _unfold_strips(layer, tensors) for layer in rk}
        return cls(metadata["base"], metadata["prepare"], metadata["count"], rk, kk)


def _accumulate(total: torch.Tensor | None, left: torch.Tensor, right: torch.Tensor, sign: int) -> torch.Tensor:
    """total + sign · leftᵀ right, [d_left, d_right], from rows [n, d]."""
    if total is None:
        return sign * (left.T @ right)
    return torch.addmm(total, left.T, right, alpha=sign)


def _unfold_strips(layer: int, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    width = tensors[f"kk.{layer}.0"].shape[1]
    kk = torch.empty(width, width, dtype=torch.float64)
    for start in range(0, width, _STRIP):
        strip = tensors[f"kk.{layer}.{start}"]
        kk[start : start + _STRIP, start:] = strip
        kk[start:, start : start + _STRIP] = strip.T
    return kk
