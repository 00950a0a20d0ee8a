"""How the published methods turn keys and residuals of one batch into one layer's change: D4S's solver, with other memories.

MEMIT's system knows the batch alone, MEMIT with history and AlphaEdit all keys that were ever written.
"""

from typing import ClassVar, Protocol

import torch

from errata.editors.d4s.solve import PairSystem, SumSystem, factor_moments
from errata.errors import EditorError

_RECENT = 64
"""Keys that are carried as pairs before the whole is factored again: with so few the dual form costs a tenth of a factorisation."""


class LayerSystem(Protocol):
    """One layer of a model whose edits are written on top of each other."""

    remembers: ClassVar[bool]
    """Whether it asks for the keys of a batch once more when the batch is written."""

    def solve(self, keys: torch.Tensor, residuals: torch.Tensor) -> torch.Tensor:
        """What is added to the weight as it is now, [d_out, d_in] float64, for keys [e, d_in] and residuals [e, d_out] against it.

        Raises:
            EditorError: the system is singular, or not finite.
        """
        ...

    def remember(self, keys: torch.Tensor) -> None:
        """Protect the keys [e, d_in] of what is written now."""
        ...

    def count_bytes(self) -> int: ...


class Forgetful:
    """MEMIT: `Δ = R Kᵀ (λC + KKᵀ)⁻¹`, whatever was written before (MEMIT eq. 14)."""

    remembers: ClassVar[bool] = False

    def __init__(self, c: torch.Tensor, lam: float) -> None:
        """Args: c [d_in, d_in], factored here, once."""
        self._lower, self._lam = factor_moments(c), lam

    def solve(self, keys: torch.Tensor, residuals: torch.Tensor) -> torch.Tensor:
        return PairSystem.form(keys, self._lower, self._lam).solve(residuals)

    def remember(self, keys: torch.Tensor) -> None:
        pass

    def count_bytes(self) -> int:
        return 0


class Remembering:
    """MEMIT with history: `Δ = R Kᵀ (λC + Σ_earlier KKᵀ + KKᵀ)⁻¹`. With residuals against the current weight this is recursive least
    squares (algorithms.md §T), hence, for one layer, the weights of D4S for the same keys and values."""

    remembers: ClassVar[bool] = True

    def __init__(self, c: torch.Tensor, lam: float) -> None:
        """Args: c [d_in, d_in]."""
        self._c, self._lam = c, lam
        self._gram = torch.zeros(len(c), len(c), dtype=torch.float64)
        self._lower, self._recent = self._factor(), self._gram[:0]

    def solve(self, keys: torch.Tensor, residuals: torch.Tensor) -> torch.Tensor:
        known = torch.cat([self._recent, keys.double()])
        # Earlier keys ask for nothing; they are there to be left alone.
        asked = torch.cat([residuals.new_zeros(len(self._recent), residuals.shape[1]), residuals])
        return PairSystem.form(known, self._lower, 1.0).solve(asked)

    def remember(self, keys: torch.Tensor) -> None:
        keys = keys.double()
        self._gram.addmm_(keys.T, keys)
        self._recent = torch.cat([self._recent, keys])
        if len(self._recent) > _RECENT:
            self._lower, self._recent = self._factor(), self._gram[:0]

    def count_bytes(self) -> int:
        """The Gram, float64: its factor can be made again."""
        return count_tensor(self._gram)

    def _factor(self) -> torch.Tensor:
        return SumSystem.form(self._gram, self._c, self._lam).factor


class NullSpace:
    """AlphaEdit: what is written stays in the directions U that preserved keys hardly use, P = U Uᵀ (AlphaEdit eq. 14):

        [P (KKᵀ + Σ_earlier KKᵀ) + L2·I] Δᵀ = P K Rᵀ

    Both sides lie in the range of P, so that Δᵀ = U Y with `[Uᵀ (KKᵀ + Σ_earlier KKᵀ) U + L2·I] Y = Uᵀ K Rᵀ`: a system as MEMIT's with
    history, in fewer dimensions, with I for C.
    """

    remembers: ClassVar[bool] = True

    def __init__(self, c: torch.Tensor, energy: float, ridge: float) -> None:
        """
        Args:
            c: [d_in, d_in].
            energy: U are the eigenvectors of C with the smallest eigenvalues, as many as hold this share of its trace.
            ridge: L2 as a multiple of the mean power E‖Uᵀk‖² that preserved keys have in there.

        Raises:
            EditorError: no eigenvector is that small, or preserved keys have no power there.
        """
        values, vectors = torch.linalg.eigh(c.double())
        values = values.clamp(min=0)
        kept = int((values.cumsum(0) <= energy * values.sum()).sum())
        power = float(values[:kept].sum())
        if not power > 0:
            raise EditorError(f"AlphaEdit: expected directions that hold {energy:.1%} of the trace of C, found {kept} that hold nothing")
        self._basis = vectors[:, :kept].contiguous()
        self._inner = Remembering(torch.eye(kept, dtype=torch.float64), ridge * power)

    def solve(self, keys: torch.Tensor, residuals: torch.Tensor) -> torch.Tensor:
        delta: torch.Tensor = self._inner.solve(keys.double() @ self._basis, residuals) @ self._basis.T
        return delta

    def remember(self, keys: torch.Tensor) -> None:
        self._inner.remember(keys.double() @ self._basis)

    def count_bytes(self) -> int:
        """U and the Gram in its coordinates, float64."""
        return count_tensor(self._basis) + self._inner.count_bytes()


def count_tensor(tensor: torch.Tensor) -> int:
    """Bytes of its elements."""
    return tensor.numel() * tensor.itemsize
