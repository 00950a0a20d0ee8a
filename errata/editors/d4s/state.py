"""What D4S keeps of past edits: the live pairs themselves while they are few, then only their sums (D4S eq. 6–8; algorithms.md §1, §T).

Few pairs take less room than the sums and less work to solve, and they are a set: equal contents are equal bytes and equal weights to
the bit, whatever the order and the batches. Sums have a size that does not depend on the number of edits; there, equal means 1e-8.

A spread that refreshes the residual between layers needs to know what a lower layer does to a key's residual: `Σ X_m k_m k_lᵀ`, which is
X_m times a sum over pairs again. These cross moments are kept beside the sums where they are wanted, and nowhere else.

The sums of a 7B model take 1.3 GB a layer. Large ones are never in memory as a whole: see `HELD`.
"""

import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import BinaryIO, Self

import torch

from errata.editors.artifacts import Parts, pack_tensors, unpack_tensors
from errata.editors.base import Pairs
from errata.editors.stored import Entry, Lazy, TensorFile, list_shapes, spill_doubles, write_doubles
from errata.errors import EditorError

_FORMAT = 1
_STRIP = 512
"""Rows per stored strip of the upper triangle of kk."""
_FEW = 4
"""Pairs are kept while their number is at most the narrowest d_in divided by this: about where solving by sums becomes as fast."""
HELD = 2**28
"""Bytes of sums that are kept in memory. Larger ones are made when they are read, layer by layer, from a file and the pairs since; to the
bit the same, as the same sums are formed in the same order."""


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
    waiting: int = 0
    """Bytes of the pairs that large sums hold on to until they are read."""

    @property
    def parts(self) -> Parts:
        """None: its size does not grow."""
        return {}

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
        few = keeps_pairs(len(every), [keys.shape[1] for keys in every.keys.values()])
        return state if few else self.empty(self.base, self.prepare)._combine(every, 1, crossed=crossed)

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
        """Sums with pairs added or subtracted; where they are large, not until they are read."""
        count = self.count + sign * len(pairs)
        if count == 0:
            return self.empty(self.base, self.prepare)
        d_out, widths = pairs.residuals.shape[1], {layer: keys.shape[1] for layer, keys in pairs.keys.items()}

        def read_rk(layer: int) -> torch.Tensor:
            return _accumulate(self.rk.get(layer), pairs.residuals.double(), pairs.keys[layer].double(), sign)

        def read_kk(layer: int) -> torch.Tensor:
            keys = pairs.keys[layer].double()
            return _accumulate(self.kk.get(layer), keys, keys, sign)

        def read_kx(both: tuple[int, int]) -> torch.Tensor:
            left, right = (pairs.keys[layer].double() for layer in both)
            return _accumulate(self.kx.get(both), left, right, sign)

        crosses = {both: [widths[layer] for layer in both] for both in combinations(sorted(widths), 2)} if crossed else {}
        rk = Lazy({layer: (d_out, width) for layer, width in widths.items()}, read_rk)
        kk, kx = Lazy({layer: (width, width) for layer, width in widths.items()}, read_kk), Lazy(crosses, read_kx)
        if count_sums([(d_out, width) for width in widths.values()], crossed=crossed) <= HELD:
            return type(self)(self.base, self.prepare, count, None, dict(rk), dict(kk), dict(kx))
        more = 4 * len(pairs) * (d_out + sum(widths.values()))
        return type(self)(self.base, self.prepare, count, None, rk, kk, kx, self.waiting + more)

    def settle(self, folder: Path | None) -> Self:
        """The same sums, to the bit. Where more pairs wait to be summed than one layer's sums take, they are summed now, layer by layer,
        into a file of `folder`.

        Raises:
            StorageError: there is no room.
        """
        shapes = list_shapes(self.rk)
        if not self.waiting or self.waiting < max(8 * (d_out + d_in) * d_in for d_out, d_in in shapes.values()):
            return self
        entries: list[Entry] = []
        for layer, shape in shapes.items():
            entries.append((f"rk.{layer}", shape, partial(self.rk.__getitem__, layer)))
            # Whole, unlike in a snapshot: the halves of a product need not agree in their last bits, and one of them is read.
            entries.append((f"kk.{layer}", (shape[1], shape[1]), partial(self.kk.__getitem__, layer)))
        entries += [(f"kx.{both[0]}.{both[1]}", shape, partial(self.kx.__getitem__, both)) for both, shape in list_shapes(self.kx).items()]
        file = spill_doubles(folder, "d4s_sums", _FORMAT, entries, {})
        kk = Lazy(list_shapes(self.kk), lambda layer: file[f"kk.{layer}"])
        return replace(self, rk=_read_rk(file), kk=kk, kx=_read_kx(file), waiting=0)

    def write(self, file: BinaryIO) -> None:
        """As it is stored: equal states are equal bytes. Sums are written layer by layer."""
        metadata = {"base": self.base, "prepare": self.prepare, "count": self.count}
        if self.pairs is not None or not self.count:
            owners = None if self.pairs is None else self.pairs.owners
            erased = {"erased": self.pairs.erased} if self.pairs is not None and self.pairs.erased else {}
            tensors = {} if self.pairs is None else self.pairs.to_tensors()
            file.write(pack_tensors("d4s_state", _FORMAT, tensors, {**metadata, "owners": owners, **erased}))
            return
        held: dict[int, torch.Tensor] = {}

        def read_strip(layer: int, start: int) -> torch.Tensor:
            if layer not in held:
                held.clear()
                held[layer] = self.kk[layer]
            return held[layer][start : start + _STRIP, start:]

        entries: list[Entry] = []
        for layer, (d_out, d_in) in list_shapes(self.rk).items():
            entries.append((f"rk.{layer}", (d_out, d_in), partial(self.rk.__getitem__, layer)))
            for start in range(0, d_in, _STRIP):
                strip = (min(_STRIP, d_in - start), d_in - start)
                entries.append((f"kk.{layer}.{start}", strip, partial(read_strip, layer, start)))
        entries += [(f"kx.{both[0]}.{both[1]}", shape, partial(self.kx.__getitem__, both)) for both, shape in list_shapes(self.kx).items()]
        write_doubles(file, "d4s_state", _FORMAT, entries, {**metadata, "owners": None})

    def to_bytes(self) -> bytes:
        with io.BytesIO() as file:
            self.write(file)
            return file.getvalue()

    @classmethod
    def load(cls, source: bytes | Path) -> Self:
        """From bytes, or from a file, where sums stay until they are asked for. Raises FormatError: not a D4S state of this format."""
        tensors: Mapping[str, torch.Tensor]
        if isinstance(source, bytes):
            tensors, metadata = unpack_tensors(source, "d4s_state", _FORMAT)
        else:
            tensors = TensorFile(source, "d4s_state", _FORMAT)
            metadata = tensors.metadata
        base, prepare, owners = metadata["base"], metadata["prepare"], metadata["owners"]
        if owners is not None:
            pairs = Pairs.from_tensors(base, prepare, owners, dict(tensors), metadata.get("erased", ()))
            return cls(base, prepare, metadata["count"], pairs, {}, {})
        rk, kx = _read_rk(tensors), _read_kx(tensors)
        kk = Lazy({layer: (width, width) for layer, (_, width) in rk.shapes.items()}, lambda layer: _unfold_strips(layer, tensors))
        if isinstance(source, bytes):
            return cls(base, prepare, metadata["count"], None, dict(rk), dict(kk), dict(kx))
        return cls(base, prepare, metadata["count"], None, rk, kk, kx)


def keeps_pairs(count: int, widths: Iterable[int]) -> bool:
    """Whether a state of so many pairs is the pairs themselves, where layers have keys of these widths."""
    return count <= min(widths) // _FEW


def count_sums(shapes: Sequence[tuple[int, int]], *, crossed: bool) -> int:
    """Bytes of the sums of layers whose weights have the shapes [d_out, d_in]: rk, kk, and kx where there are cross moments."""
    own = sum((d_out + d_in) * d_in for d_out, d_in in shapes)
    return 8 * (own + (sum(left * right for (_, left), (_, right) in combinations(shapes, 2)) if crossed else 0))


def count_snapshot(shapes: Sequence[tuple[int, int]], *, crossed: bool) -> int:
    """Bytes of their tensors as they are stored: of kk the strips from the diagonal on."""
    below = sum((min(_STRIP, d_in - start)) * start for _, d_in in shapes for start in range(0, d_in, _STRIP))
    return count_sums(shapes, crossed=crossed) - 8 * below


def _read_rk(tensors: Mapping[str, torch.Tensor]) -> Lazy[int]:
    shapes = list_shapes(tensors).items()
    return Lazy(
        {int(name.removeprefix("rk.")): shape for name, shape in shapes if name.startswith("rk.")}, lambda layer: tensors[f"rk.{layer}"]
    )


def _read_kx(tensors: Mapping[str, torch.Tensor]) -> Lazy[tuple[int, int]]:
    crossed = {name.removeprefix("kx."): shape for name, shape in list_shapes(tensors).items() if name.startswith("kx.")}
    shapes = {(int(lower), int(layer)): shape for name, shape in crossed.items() for lower, layer in [name.split(".")]}
    return Lazy(shapes, lambda both: tensors[f"kx.{both[0]}.{both[1]}"])


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
