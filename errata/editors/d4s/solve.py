"""From pairs or sums to weights: `ΔW = R Kᵀ (λC + K Kᵀ)⁻¹` (D4S eq. 4 and 9).

With W0-anchored residuals this is batch ridge regression, hence equal to recursive least squares in any order (algorithms.md §T). Both
forms below are the same matrix. With n pairs of width d the dual form costs n·d² and n³ beside one factor of C that never changes; the
primal form costs d³ and d²·d_out at any n.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch

from errata.errors import EditorError

_JITTER = 1e-6
"""Added to the diagonal of C, as a fraction of its mean: C is stored in float32 and comes from finitely many tokens (a silent unit has
an empty row), so that directions below this are noise. Added always, not where a factorisation fails: all solves must share one C."""
_TOLERANCE = 1e-4
_MAX_ITERATIONS = 300


@dataclass(frozen=True)
class PairSystem:
    """Dual form, for few pairs (Woodbury): with L Lᵀ = C and H = L⁻¹ K / √λ, `ΔW = R (I + HᵀH)⁻¹ Hᵀ L⁻¹ / √λ`."""

    lower: torch.Tensor
    """L [d_in, d_in], from `factor_moments`."""
    half: torch.Tensor
    """H [d_in, n]."""
    gram: torch.Tensor
    """Cholesky factor of I + HᵀH [n, n]."""
    lam: float

    @classmethod
    def form(cls, keys: torch.Tensor, lower: torch.Tensor, lam: float) -> Self:
        """Args: keys [n, d_in]; lower from `factor_moments`."""
        half = torch.linalg.solve_triangular(lower, keys.double().T, upper=False) / lam**0.5
        identity = torch.eye(len(keys), dtype=torch.float64)
        return cls(lower, half, _factor(identity + half.T @ half, "I + KᵀK/λC"), lam)

    def solve(self, residuals: torch.Tensor) -> torch.Tensor:
        """ΔW [d_out, d_in] float64 from R [n, d_out]."""
        weights = torch.cholesky_solve(residuals.double(), self.gram)
        # The triangular solve is the costly part: over n columns or over d_out, whichever is fewer.
        if self.half.shape[1] <= weights.shape[1]:
            whole = torch.linalg.solve_triangular(self.lower.T, self.half, upper=True) @ weights
        else:
            whole = torch.linalg.solve_triangular(self.lower.T, self.half @ weights, upper=True)
        delta: torch.Tensor = whole.T / self.lam**0.5
        return delta

    def measure_fit(self, keys: torch.Tensor) -> torch.Tensor:
        """ρ = kᵀ (λC + kk)⁻¹ k per row of [n, d_in], in [0, 1): the fraction of its own residual that an edit realises."""
        half = torch.linalg.solve_triangular(self.lower, keys.double().T, upper=False) / self.lam**0.5
        explained = torch.linalg.solve_triangular(self.gram, self.half.T @ half, upper=False)
        fit: torch.Tensor = half.square().sum(dim=0) - explained.square().sum(dim=0)
        return fit

    def multiply(self, vector: torch.Tensor) -> torch.Tensor:
        """(λC + kk) v [d_in]: with kk = λ L H Hᵀ Lᵀ this is λ L (I + H Hᵀ) Lᵀ v."""
        image = self.lower.T @ vector
        product: torch.Tensor = self.lower @ (image + self.half @ (self.half.T @ image))
        return self.lam * product

    def divide(self, columns: torch.Tensor) -> torch.Tensor:
        """(λC + kk)⁻¹ V [d_in, m] for V [d_in, m], by Woodbury."""
        image: torch.Tensor = torch.linalg.solve_triangular(self.lower, columns, upper=False)
        image = image - self.half @ torch.cholesky_solve(self.half.T @ image, self.gram)
        quotient: torch.Tensor = torch.linalg.solve_triangular(self.lower.T, image, upper=True) / self.lam
        return quotient

    @property
    def width(self) -> int:
        """d_in."""
        return len(self.lower)


@dataclass(frozen=True)
class SumSystem:
    """Primal form, for any number of pairs: `ΔW = rk (λC + kk)⁻¹`."""

    factor: torch.Tensor
    """Cholesky factor of λC + kk [d_in, d_in]."""

    @classmethod
    def form(cls, kk: torch.Tensor, c: torch.Tensor, lam: float) -> Self:
        """Args: kk [d_in, d_in] float64; c the second moment [d_in, d_in]."""
        system = _regularise(c)
        return cls(_factor(torch.add(kk, system, alpha=lam, out=system), "λC + kk"))

    def solve(self, rk: torch.Tensor) -> torch.Tensor:
        """ΔW [d_out, d_in] float64 from rk [d_out, d_in]."""
        return torch.cholesky_solve(rk.T, self.factor).T

    def measure_fit(self, keys: torch.Tensor) -> torch.Tensor:
        """As `PairSystem.measure_fit`."""
        half: torch.Tensor = torch.linalg.solve_triangular(self.factor, keys.double().T, upper=False)
        return half.square().sum(dim=0)

    def multiply(self, vector: torch.Tensor) -> torch.Tensor:
        """(λC + kk) v [d_in]."""
        return self.factor @ (self.factor.T @ vector)

    def divide(self, columns: torch.Tensor) -> torch.Tensor:
        """(λC + kk)⁻¹ V [d_in, m] for V [d_in, m]."""
        return torch.cholesky_solve(columns, self.factor)

    @property
    def width(self) -> int:
        """d_in."""
        return len(self.factor)


def estimate_condition(system: PairSystem | SumSystem) -> float:
    """λ_max / λ_min of λC + kk, which is symmetric and positive definite; infinite where a product is not finite.

    By power iteration on the matrix and on its inverse, from the factor that solving has made anyway: d_in² per product, where an
    eigendecomposition takes d_in³ and minutes per layer of a 7B model. Both ends are approached from within, so the estimate is a lower
    bound, a few percent below where eigenvalues crowd at an end. The start is fixed: equal systems give equal numbers.
    """
    return _find_largest(system.multiply, system.width) * _find_largest(lambda vector: system.divide(vector[:, None])[:, 0], system.width)


def _find_largest(product: Callable[[torch.Tensor], torch.Tensor], width: int) -> float:
    """The largest eigenvalue of a symmetric positive definite product with vectors [width]."""
    vector = torch.randn(width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    value = 0.0
    for _ in range(_MAX_ITERATIONS):
        vector = vector / vector.norm()
        vector = product(vector)
        previous, value = value, vector.norm().item()
        if not math.isfinite(value):
            return math.inf
        if abs(value - previous) <= _TOLERANCE * value:
            break
    return value


def factor_moments(c: torch.Tensor) -> torch.Tensor:
    """Lower Cholesky factor of C, float64.

    Raises:
        EditorError: C is not positive definite.
    """
    return _factor(_regularise(c), "C")


def _regularise(c: torch.Tensor) -> torch.Tensor:
    whole = c.to(torch.float64, copy=True)
    whole.diagonal().add_(_JITTER * whole.diagonal().mean())
    return whole


def _factor(system: torch.Tensor, name: str) -> torch.Tensor:
    factor: torch.Tensor
    factor, info = torch.linalg.cholesky_ex(system)
    if info.item() != 0:
        raise EditorError(
            f"expected {name} to be positive definite, found that it is not at row {int(info)} of {len(system)}; "
            "the second moments C are not those of a corpus, or the sums hold values that are not finite"
        )
    return factor
