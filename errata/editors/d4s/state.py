"""What D4S keeps of past edits: the live pairs themselves while they are few, then only their sums (D4S eq. 6–8; algorithms.md §1, §T).

Few pairs take less room than the sums and less work to solve, and they are a set: equal contents are equal bytes and equal weights to
the bit, whatever the order and the batches. Sums have a size that does not depend on the number of edits; there, equal means 1e-8.

A spread that refreshes the residual between layers needs to know what a lower layer does to a key's residual: `Σ X_m k_m k_lᵀ`, which is
X_m times a sum over pairs again. These cross moments are kept beside the sums where they are wanted, and nowhere else.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Self

import torch

from errata.editors.artifacts import pack_tensors, unpack_tensors
from errata.editors.base import Pairs
from errata.errors import EditorError

_FORMAT = 1
_STRIP = 512
"""Rows per stored strip of the upper triangle of kk."""
_FEW = 4
"""Pairs are kept while their number is at most the narrowest d_in divided by this: about where solving by sums becomes as fast."""


@dataclass(frozen=True)
class D4SState:
    """The live pairs, or sums in float64: `rk_l = Σ r k_lᵀ`, `kk_l = Σ k_l k_lᵀ`, perhaps `kx_ml = Σ k_m k_lᵀ`. Neither at count 0."""

    base: str
    prepare: str
    count: int
    pairs: Pairs | None
    """In canonical order, that of their row digests; None once they are summed."""
    rk: Mapping[int, torch.Tensor]
    """Layer → [d_out, d_in] float64; empty before."""
    kk: Mapping[int, torch.Tensor]
    """Layer → [d_in, d_in] float64, symmetric; empty before."""
    kx: Mapping[tuple[int, int], torch.Tensor] = field(default_factory=dict)
    """(m, l) with m < l → [d_in of m, d_in of l] float64: cross moments, of all edited layers or of none; empty before."""

    @property
    def crossed(self) -> bool:
        """Whether `read_right` and `carry` know what one layer does to another."""
        return len(self.kx) == len(list(combinations(self.rk, 2)))

    @classmethod
    def empty(cls, base: str, prepare: str) -> Self:
        return cls(base, prepare, 0, None, {}, {})

    def add(self, pairs: Pairs, crossed: bool = False) -> Self:
        """
        Args:
            crossed: keep cross moments from the moment that pairs become sums; sums that have none do not get any.

        Raises:
            BaseMismatchError: pairs of another base or other prepare options.
        """
        pairs.require_same(self.base, self.prepare)
        if self.rk:
            return self._combine(pairs, 1, crossed=bool(self.kx))
        every = _order(pairs if self.pairs is None else Pairs.concatenate([self.pairs, pairs]))
        state = type(self)(self.base, self.prepare, len(every), every, {}, {})
        few = min(keys.shape[1] for keys in every.keys.values()) // _FEW
        return state if len(every) <= few else self.empty(self.base, self.prepare)._combine(every, 1, crossed=crossed)

    def remove(self, pairs: Pairs) -> Self:
        """Take back pairs that were added before. A count of 0 is the empty state itself, not rounding dust.

        Raises:
            BaseMismatchError: pairs of another base or other prepare options.
            EditorError: more pairs than the state holds, or, where it can tell, pairs that it does not hold.
        """
        pairs.require_same(self.base, self.prepare)
        if len(pairs) > self.count:
            raise EditorError(f"expected at most {self.count} pairs to remove, found {len(pairs)}")
        if self.pairs is None:
            return self._combine(pairs, -1, crossed=bool(self.kx))
        leaving = Counter(pairs.digest_rows())
        kept = []
        for row, digest in enumerate(self.pairs.digest_rows()):
            if leaving[digest]:
                leaving[digest] -= 1
            else:
                kept.append(row)
        if missing := leaving.total():
            raise EditorError(f"expected pairs to remove that the state holds, found {missing} of {len(pairs)} that it does not")
        if not kept:
            return self.empty(self.base, self.prepare)
        return type(self)(self.base, self.prepare, len(kept), self.pairs.take(kept), {}, {})

    def forget_crosses(self) -> Self:
        """The same state for a spread that needs no cross moments."""
        return replace(self, kx={}) if self.kx else self

    def read_right(self, layer: int, below: Mapping[int, torch.Tensor]) -> torch.Tensor:
        """What `layer` is asked to write, before its share is taken: R [n, d_out] for the pair system, rk [d_out, d_in] for the sum system.

        Args:
            below: layer → ΔW [d_out, d_in] float64 of those below, whose part is subtracted: `R − Σ K_m X_mᵀ`, or `rk − Σ X_m kx_ml`.
        """
        if self.pairs is None:
            right = self.rk[layer]
            for lower, delta in below.items():
                right = right - delta @ self.kx[lower, layer]
            return right
        left = self.pairs.residuals.double()
        for lower, delta in below.items():
            left = left - self.pairs.keys[lower].double() @ delta.T
        return left

    def carry(self, lower: int, layer: int, columns: torch.Tensor) -> torch.Tensor:
        """`kx_mlᵀ G` [d_in of l, n], in either form, for G [d_in of m, n] float64, m being `lower`."""
        if self.pairs is None:
            return self.kx[lower, layer].T @ columns
        return self.pairs.keys[layer].double().T @ (self.pairs.keys[lower].double() @ columns)

    def _combine(self, pairs: Pairs, sign: int, *, crossed: bool) -> Self:
        """Sums with pairs added or subtracted."""
        count = self.count + sign * len(pairs)
        if count == 0:
            return self.empty(self.base, self.prepare)
        residuals = pairs.residuals.double()
        rk, kk, kx = dict(self.rk), dict(self.kk), dict(self.kx)
        for layer, stored in pairs.keys.items():
            keys = stored.double()
            rk[layer] = _accumulate(self.rk.get(layer), residuals, keys, sign)
            kk[layer] = _accumulate(self.kk.get(layer), keys, keys, sign)
        for lower, layer in combinations(sorted(pairs.keys), 2) if crossed else ():
            left, right = pairs.keys[lower].double(), pairs.keys[layer].double()
            kx[lower, layer] = _accumulate(self.kx.get((lower, layer)), left, right, sign)
        return type(self)(self.base, self.prepare, count, None, rk, kk, kx)

    def to_bytes(self) -> bytes:
        tensors: dict[str, torch.Tensor] = {f"rk.{layer}": rk.contiguous() for layer, rk in self.rk.items()}
        for layer, kk in self.kk.items():
            for start in range(0, len(kk), _STRIP):
                tensors[f"kk.{layer}.{start}"] = kk[start : start + _STRIP, start:].contiguous()
        tensors |= {f"kx.{lower}.{layer}": kx.contiguous() for (lower, layer), kx in self.kx.items()}
        if self.pairs is not None:
            tensors |= self.pairs.to_tensors()
        owners = None if self.pairs is None else self.pairs.owners
        metadata = {"base": self.base, "prepare": self.prepare, "count": self.count, "owners": owners}
        if self.pairs is not None and self.pairs.erased:
            metadata["erased"] = self.pairs.erased
        return pack_tensors("d4s_state", _FORMAT, tensors, metadata)

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Raises FormatError: not a D4S state of this format."""
        tensors, metadata = unpack_tensors(data, "d4s_state", _FORMAT)
        base, prepare, owners = metadata["base"], metadata["prepare"], metadata["owners"]
        pairs = None if owners is None else Pairs.from_tensors(base, prepare, owners, tensors, metadata.get("erased", ()))
        rk = {int(name.removeprefix("rk.")): tensor for name, tensor in tensors.items() if name.startswith("rk.")}
        kk = {layer: _unfold_strips(layer, tensors) for layer in rk}
        crossed = [name for name in tensors if name.startswith("kx.")]
        kx = {(int(lower), int(layer)): tensors[name] for name in crossed for _, lower, layer in [name.split(".")]}
        return cls(base, prepare, metadata["count"], pairs, rk, kk, kx)


def _order(pairs: Pairs) -> Pairs:
    digests = pairs.digest_rows()
    return pairs.take(sorted(range(len(pairs)), key=digests.__getitem__))


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
