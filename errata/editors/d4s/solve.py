"""From sums to weights: `ΔW_l = rk_l (λ C_l + kk_l)⁻¹ / share_l` (D4S eq. 4 and 9; with W0-anchored residuals this is batch ridge
regression, hence equal to recursive least squares in any order; algorithms.md §T)."""

from collections.abc import Mapping

import torch

from errata.editors.d4s.state import D4SState
from errata.errors import EditorError

_JITTER = 1e-6
"""Diagonal added to a C that is not positive definite (few samples), as a fraction of its mean diagonal."""


def solve_weights(state: D4SState, moments: Mapping[int, torch.Tensor], lam: float, share: int) -> dict[int, torch.Tensor]:
    """ΔW of every edited layer.

    Args:
        state: sums over the live pairs.
        moments: layer → C [d_in, d_in], the uncentred second moment E[k kᵀ] of preserved keys.
        lam: λ, the pseudo-count of preserved keys.
        share: number of layers that share the residual.

    Returns:
        layer → [d_out, d_in] float64; empty for a state of count 0.

    Raises:
        EditorError: λC + kk is singular even with jitter, or the solution is not finite.
    """
    deltas = {}
    for layer, rk in state.rk.items():
        factor = factor_system(moments[layer].double() * lam + state.kk[layer], layer)
        delta = torch.cholesky_solve(rk.T, factor).T / share
        if not torch.isfinite(delta).all():
            raise EditorError(f"layer {layer}: the solved delta is not finite")
        deltas[layer] = delta
    return deltas


def factor_system(system: torch.Tensor, layer: int) -> torch.Tensor:
    """Lower Cholesky factor of a symmetric positive definite [d, d] float64 matrix, with jitter where it is only semi-definite.

    Raises:
        EditorError: not positive definite even so.
    """
    factor, info = torch.linalg.cholesky_ex(system)
    if info.item() == 0:
        return factor
    jitter = _JITTER * system.diagonal().mean()
    factor, info = torch.linalg.cholesky_ex(system + jitter * torch.eye(len(system), dtype=system.dtype, device=system.device))
    if info.item() != 0:
        raise EditorError(
            f"layer {layer}: λC + kk is not positive definite at row {info.item()} of {len(system)}; "
            "C comes from too few tokens, or λ is too small"
        )
    return factor


def measure_fit(keys: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """ρ = kᵀ (λC + kk)⁻¹ k per row: the fraction of its own residual that an edit with key k realises (algorithms.md §1.1).

    Args:
        keys: [n, d_in].
        factor: from `factor_system`.

    Returns:
        [n] float64 in [0, 1).
    """
    half = torch.linalg.solve_triangular(factor, keys.double().T, upper=False)
    return half.square().sum(dim=0)
