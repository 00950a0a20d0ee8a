"""How good second moments are: the spectrum of C, and how much it would still change if more of the corpus were read.

The change is estimated from shards, whose means C_i over n_i tokens scatter about their common mean C̄. `Σ n_i ‖C_i − C̄‖² / (m − 1)`
estimates σ², the variance of one token's share; tokens of one passage are alike, and since shards take whole blocks of text, σ² has that
in it. The expected squared change of C̄, over N tokens, by M more is then `σ² M / (N (N + M))`: that of the difference of two means of
independent samples, times the share M / (N + M) that the new one gets. Its limit σ² / N for M → ∞ is the squared standard error.
"""

import math

import torch
from pydantic import BaseModel, ConfigDict, Field

from errata.errors import EditorError


class LayerSpectrum(BaseModel):
    """One layer's C, of width d_in."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layer: int
    width: int
    rank: int
    """Eigenvalues above the rounding of float64. Below `width`, some directions were never seen, and nothing but the solve's jitter is in
    an edit's way there."""
    effective_rank: float
    """exp of the entropy of the eigenvalues as shares of their sum (Roy & Vetterli, EUSIPCO 2007): in [1, rank]."""
    noise: float | None
    """σ / ‖C‖_F: the expected relative error of C in the Frobenius norm is `noise / √tokens`. None: fewer than two shards had text."""


class MomentsReport(BaseModel):
    """What is known of how good C is. λC changes by the same share as C, since λ is a factor.

    The Frobenius norm weighs directions by their moments: those that the corpus shows rarely converge later.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokens: int = Field(ge=1)
    shards: int = Field(ge=1)
    """With text in them."""
    faults: int = 0
    """Lines of the corpus that could not be read."""
    layers: tuple[LayerSpectrum, ...]

    @property
    def slowest(self) -> LayerSpectrum:
        """The layer whose C is the least certain."""
        return max(self.layers, key=lambda layer: layer.noise or 0.0)

    @property
    def singular(self) -> tuple[int, ...]:
        """Layers of whose keys some directions were never seen: fewer tokens than width, or units that are always off."""
        return tuple(layer.layer for layer in self.layers if layer.rank < layer.width)

    def predict_change(self, more: int, layer: LayerSpectrum | None = None) -> float | None:
        """The expected ‖C' − C‖_F / ‖C‖_F after so many more tokens of the same corpus; of the slowest layer unless one is named."""
        noise = (layer or self.slowest).noise
        return None if noise is None else noise * math.sqrt(more / (self.tokens * (self.tokens + more)))

    def estimate_error(self, layer: LayerSpectrum | None = None) -> float | None:
        """The expected relative error of C as it is: the limit of `predict_change` for ever more tokens."""
        noise = (layer or self.slowest).noise
        return None if noise is None else noise / math.sqrt(self.tokens)

    def count_enough(self, tolerance: float, layer: LayerSpectrum | None = None) -> int | None:
        """Tokens at which the expected relative error is `tolerance`."""
        noise = (layer or self.slowest).noise
        return None if noise is None else math.ceil((noise / tolerance) ** 2)


def measure_rank(c: torch.Tensor) -> tuple[int, float]:
    """Rank and effective rank of a second moment, as `LayerSpectrum` defines them.

    Args:
        c: [d, d] float64, positive semi-definite, not zero.

    Raises:
        EditorError: it is not finite, or zero.
    """
    if not torch.isfinite(c).all() or not c.any():
        raise EditorError("second moments: expected finite values that are not all zero; does the base give finite activations?")
    values = torch.linalg.eigvalsh(c).clamp(min=0)
    least = float(values[-1]) * len(c) * torch.finfo(c.dtype).eps
    shares = values[values > 0] / values.sum()
    return int((values > least).sum()), float(torch.exp(torch.special.entr(shares).sum()))
