"""ROME and R-ROME: one edit at a time, one layer, one matrix of rank one (ROME eq. 2; Gupta et al. 2024, "Rebuilding ROME").

The published ROME takes the mean key of all contexts where it aims, and the bare prompt's key where it asks how far: so that neither
key gets the value, and the step is too large by a factor that no λ limits. R-ROME is the same formula with one key throughout.
"""

from collections.abc import Mapping, Sequence

import torch

from errata.comparison.drifting import DriftingWeights, optimise_finitely, optimise_hidden
from errata.comparison.method import Bench
from errata.editors.d4s.reading import read_contexts
from errata.editors.d4s.solve import factor_moments
from errata.editors.rows import EditRows
from errata.edits import Edit
from errata.modeling.patch import Attachable

CLAMP = 4.0
"""Radius of δ's ball, as a multiple of what the MLP says at the site (ROME's hparams)."""


class RankOne:
    """`W += (v − W k) uᵀ / (u·k)`, `u = C⁻¹ k̄`, at the last edited layer of the profile."""

    def __init__(self, bench: Bench, *, consistent: bool) -> None:
        """Args: consistent: whether k is k̄, as in R-ROME, or the bare prompt's key."""
        self._base, self._options = bench.base, bench.profile.prepare
        self._layer, self._consistent = self._options.layers[-1], consistent
        self._mlp = bench.base.layout.mlp_of(bench.base.model, self._layer)
        self._lower = factor_moments(bench.moments.c[self._layer])
        self._weights = DriftingWeights(bench)

    @property
    def refused(self) -> Mapping[str, str]:
        return self._weights.refused

    def write(self, edits: Sequence[Edit]) -> None:
        for chunk in self._weights.build_rows(edits):
            for row in chunk:
                self._write_one(row)

    def _write_one(self, row: EditRows) -> None:
        with self._weights.attach():
            keys, said = read_contexts(self._base, [row], [self._layer], self._mlp)
            _, hidden = read_contexts(self._base, [row], [self._layer], self._base.layout.block(self._base.model, self._layer))
            # Our ball is a multiple of ‖h‖.
            options = self._options.model_copy(update={"clamp": CLAMP * float(said.norm() / hidden.norm())})
            delta = optimise_finitely(optimise_hidden, self._base, [row], options)[0]
        each = keys[self._layer][0].double().cpu()
        bare, mean = each[0], each.mean(dim=0)
        weight = self._weights.read_weight(self._layer)
        value = weight @ bare + delta.double()
        self._weights.add(self._layer, solve_rank_one(weight, value, mean, mean if self._consistent else bare, self._lower))

    def build_artifacts(self) -> Sequence[Attachable]:
        return self._weights.build_artifacts()

    def count_bytes(self) -> int:
        return self._weights.count_bytes()


def solve_rank_one(weight: torch.Tensor, value: torch.Tensor, aim: torch.Tensor, key: torch.Tensor, lower: torch.Tensor) -> torch.Tensor:
    """`(v − W k) uᵀ / (u·k)` with `u = C⁻¹ aim`: [d_out, d_in] float64. Then (W + Δ) k = v; the farther `aim` is from k, the more it takes.

    Args:
        weight: W [d_out, d_in].
        value: v [d_out].
        aim, key: [d_in].
        lower: Cholesky factor of C (`factor_moments`).
    """
    direction = torch.cholesky_solve(aim[:, None], lower)[:, 0]
    return torch.outer(value - weight @ key, direction) / (direction @ key)
