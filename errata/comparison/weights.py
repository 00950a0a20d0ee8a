"""The weight editors of the comparison: one z-optimisation, one solver, one profile, and the bookkeeping of each paper."""

from collections.abc import Callable

import torch

from errata.comparison.drifting import BottomUp, optimise_hidden
from errata.comparison.method import Bench, Recipe
from errata.comparison.pmet import build_pmet
from errata.comparison.rank_one import RankOne
from errata.comparison.systems import Forgetful, LayerSystem, NullSpace, Remembering

ALPHAEDIT_ENERGY, ALPHAEDIT_RIDGE = 0.05, 0.5
"""Share of the trace of C in the space that AlphaEdit writes into, and L2 in units of the power of preserved keys there. Measured on the
built-in base: energies of .005 to .2 by ridges of .1, 1 and 10 with 100 edits, then four pairs with 200, of which this one has the best
harmonic mean of efficacy, generalization and specificity. At 10 hardly anything is written; with a smaller ridge untouched facts suffer."""


def build_memit(bench: Bench) -> BottomUp:
    lam = bench.profile.solve.lam
    return _build_bottom_up(bench, lambda c: Forgetful(c, lam))


def build_memit_history(bench: Bench) -> BottomUp:
    lam = bench.profile.solve.lam
    return _build_bottom_up(bench, lambda c: Remembering(c, lam))


def build_alphaedit(bench: Bench, energy: float = ALPHAEDIT_ENERGY, ridge: float = ALPHAEDIT_RIDGE) -> BottomUp:
    """AlphaEdit; energy and ridge as `NullSpace` takes them."""
    return _build_bottom_up(bench, lambda c: NullSpace(c, energy, ridge))


def build_rome(bench: Bench) -> RankOne:
    return RankOne(bench, consistent=False)


def build_r_rome(bench: Bench) -> RankOne:
    return RankOne(bench, consistent=True)


def _build_bottom_up(bench: Bench, form: Callable[[torch.Tensor], LayerSystem]) -> BottomUp:
    layers = bench.profile.prepare.layers
    systems = {layer: form(bench.moments.c[layer]) for layer in layers}
    return BottomUp(bench, systems, optimise=optimise_hidden, output=bench.base.layout.block(bench.base.model, layers[-1]))


_SHARED = "λ, layers, contexts and z-options are the profile's, not the paper's"

WEIGHT_RECIPES: tuple[Recipe, ...] = (
    Recipe(
        "memit",
        "MEMIT",
        "Meng et al. 2023, arXiv 2210.07229; kmeng01/memit `memit_main.py`",
        build_memit,
        f"{_SHARED}; batches of any size, each read from the model that the last one left",
    ),
    Recipe(
        "memit_history",
        "MEMIT with history",
        "jianghoucheng/AlphaEdit `memit_seq_main.py`",
        build_memit_history,
        f"{_SHARED}; the published file never passes its cache on to the solve, ours does",
    ),
    Recipe(
        "alphaedit",
        "AlphaEdit",
        "Fang et al. 2025, arXiv 2410.02355; jianghoucheng/AlphaEdit `AlphaEdit_main.py`",
        build_alphaedit,
        f"{_SHARED}; writes into the least {ALPHAEDIT_ENERGY:.0%} of the trace of C, with L2 {ALPHAEDIT_RIDGE:g} times "
        "the power of preserved keys there; published are eigenvalues < .02 and L2 = 10, which depend on the scale of a model; in float64",
    ),
    Recipe(
        "rome",
        "ROME",
        "Meng et al. 2022, arXiv 2202.05262; kmeng01/rome `compute_u.py`, `compute_v.py`",
        build_rome,
        "contexts and z-options but the clamp (4) are the profile's; one layer, the profile's last; mean key and bare key as published",
        same=True,
    ),
    Recipe(
        "r_rome",
        "R-ROME",
        "Gupta et al. 2024, arXiv 2403.07175",
        build_r_rome,
        "as ROME, with the mean key of all contexts in all three places",
        same=True,
    ),
    Recipe(
        "pmet",
        "PMET",
        "Li et al. 2024, arXiv 2308.08742; xpq-tech/PMET `pmet_main.py`, `compute_zs.py`",
        build_pmet,
        "λ, layers, contexts and z-options but kl (1) and steps (30) are the profile's; Cholesky where the published code inverts",
    ),
)
