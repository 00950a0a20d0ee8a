"""λ from what it shall do: the median fraction ρ of its residual that an edit realises (algorithms.md, resolution G)."""

from collections.abc import Callable, Mapping

import torch

_RANGE = (1e-3, 1e9)
_CLOSE = 1e-4
"""Of a logarithm."""


def solve_for_fit(keys: Mapping[int, torch.Tensor], factor: Callable[[int], torch.Tensor], fit: float) -> float:
    """The λ at which the median of ρ = kᵀ (λC + KKᵀ)⁻¹ k, meaned over layers, is `fit`; an end of the range 1e-3 … 1e9 where none is.

    With C = L Lᵀ and G = (L⁻¹K)ᵀ (L⁻¹K) = U diag(g) Uᵀ, ρ_i(λ) = Σ_j U_ij² g_j / (λ + g_j): one eigendecomposition per layer serves every
    λ, and ρ falls as λ grows, so that bisection finds it.

    Args:
        keys: layer → [n, d_in].
        factor: layer → L [d_in, d_in] float64, of `factor_moments`.
        fit: in (0, 1).
    """
    parts = []
    for layer, stored in keys.items():
        half = torch.linalg.solve_triangular(factor(layer), stored.double().T, upper=False)
        values, vectors = torch.linalg.eigh(half.T @ half)
        parts.append((values.clamp(min=0), vectors.square()))
    low, high = (torch.tensor(value, dtype=torch.float64).log().item() for value in _RANGE)
    while high - low > _CLOSE:
        middle = torch.tensor((low + high) / 2, dtype=torch.float64).exp()
        fits = torch.stack([weights @ (values / (middle + values)) for values, weights in parts]).mean(dim=0)
        if fits.median().item() > fit:
            low = middle.log().item()
        else:
            high = middle.log().item()
    return float(f"{torch.tensor((low + high) / 2, dtype=torch.float64).exp().item():.3g}")
