"""The algebra of the compared weight editors, without a model: each against its formula written out (algorithms.md §6, §T, Part 7)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from errata.comparison.rank_one import solve_rank_one
from errata.comparison.systems import Forgetful, LayerSystem, NullSpace, Remembering
from errata.editors.base import Pairs
from errata.editors.d4s.editor import D4S
from errata.editors.d4s.moments import Moments
from errata.editors.d4s.solve import factor_moments
from errata.errors import EditorError
from errata.modeling.layout import LAYOUTS
from errata.profiles import PrepareOptions, Profile, SolveOptions

WIDTH, OUT, LAM, LAYER = 24, 8, 30.0, 1
EXACT = 1e-8
JITTER = 1e-6


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_c() -> torch.Tensor:
    sample = draw(200, WIDTH, seed=5) * torch.logspace(0, -2, WIDTH, dtype=torch.float64)
    return sample.T @ sample / 200


def steady(c: torch.Tensor) -> torch.Tensor:
    """C as all solves have it."""
    return c + JITTER * c.diagonal().mean() * torch.eye(len(c), dtype=torch.float64)


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("count", [1, 7, 40])
def test_memit_is_its_normal_equation_however_much_was_written(count: int) -> None:
    c, keys, residuals = make_c(), draw(count, WIDTH), draw(count, OUT, seed=1)
    system = Forgetful(c, LAM)
    system.remember(draw(50, WIDTH, seed=2))
    expected = residuals.T @ keys @ torch.linalg.inv(LAM * steady(c) + keys.T @ keys)
    assert distance(system.solve(keys, residuals), expected) < EXACT
    assert system.count_bytes() == 0


@given(cuts=st.lists(st.integers(1, 139), max_size=12), count=st.integers(2, 140))
@settings(max_examples=25, deadline=None)
def test_memit_with_history_on_current_weights_is_d4s(cuts: list[int], count: int) -> None:
    """One layer, fixed keys and values: residuals against the weights as they are now, all keys in the denominator."""
    c, weight, keys, values = make_c(), draw(OUT, WIDTH, seed=3), draw(count, WIDTH), draw(count, OUT, seed=1)
    system, now = Remembering(c, LAM), weight.clone()
    edges = [0, *sorted({cut for cut in cuts if cut < count}), count]
    for first, last in zip(edges, edges[1:], strict=False):
        now += system.solve(keys[first:last], values[first:last] - keys[first:last] @ now.T)
        system.remember(keys[first:last])
    options = PrepareOptions(layers=(LAYER,))
    profile = Profile(base="base", prepare=options, solve=SolveOptions(lam=LAM, spread="single", moments="m"))
    editor = D4S(profile, Moments("base", "corpus", 0, 200, {LAYER: c}), LAYOUTS["gpt2"])
    owners = tuple((str(index),) for index in range(count))
    pairs = Pairs("base", options.digest, owners, values - keys @ weight.T, {LAYER: keys})
    (delta,) = editor.solve_exact(editor.merge(editor.empty_state(), pairs, None)).values()
    assert distance(now - weight, delta) < EXACT


def test_history_is_what_a_later_edit_leaves_alone() -> None:
    """Without it the same later edit takes away of the first one what it can."""
    c, key = make_c(), draw(1, WIDTH)
    lost = []
    for system in (Forgetful(c, 1e-3), Remembering(c, 1e-3)):
        value = draw(1, OUT, seed=1)
        weight = system.solve(key, value)
        system.remember(key)
        later = key + 0.5 * draw(1, WIDTH, seed=2)
        weight = weight + system.solve(later, -value - later @ weight.T)
        lost.append(distance(key @ weight.T, value))
    assert lost[1] < 0.01 < 0.3 < lost[0]


def test_alphaedit_is_its_normal_equation() -> None:
    c, energy, ridge = make_c(), 0.2, 0.5
    values, vectors = torch.linalg.eigh(c)
    small = vectors[:, values.cumsum(0) <= energy * values.sum()]
    assert 0 < small.shape[1] < WIDTH
    projector = small @ small.T
    l2 = ridge * float(torch.trace(projector @ c)) * (1 + JITTER)
    system, cache = NullSpace(c, energy, ridge), torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
    for seed in range(30):
        keys, residuals = draw(3, WIDTH, seed=seed), draw(3, OUT, seed=100 + seed)
        left = projector @ (keys.T @ keys + cache) + l2 * torch.eye(WIDTH, dtype=torch.float64)
        expected = torch.linalg.solve(left, projector @ keys.T @ residuals).T
        found = system.solve(keys, residuals)
        assert distance(found, expected) < EXACT
        assert float((found @ (c - projector @ c)).norm()) < EXACT, "it writes where preserved keys are"
        system.remember(keys)
        cache += keys.T @ keys
    assert system.count_bytes() == 8 * (small.numel() + small.shape[1] ** 2)


def test_alphaedit_says_when_there_is_no_room() -> None:
    with pytest.raises(EditorError, match="expected directions"):
        NullSpace(make_c(), 1e-9, 1.0)


def test_rome_gives_its_key_its_value_only_with_one_key() -> None:
    c, weight, value = make_c(), draw(OUT, WIDTH, seed=3), draw(OUT, seed=1)
    bare, noise = draw(WIDTH), draw(WIDTH, seed=9)
    mean, lower = bare + 0.3 * noise, factor_moments(c)
    same = weight + solve_rank_one(weight, value, mean, mean, lower)
    published = weight + solve_rank_one(weight, value, mean, bare, lower)
    assert distance(same @ mean, value) < EXACT
    assert distance(published @ mean, value) > 0.05, "the key that it aims at is not the one that it counts with"
    # ROME eq. 2: of all weights that hold the value it is the one nearest to W under C.
    inverse = torch.linalg.inv(steady(c))
    expected = torch.outer(value - weight @ mean, inverse @ mean) / (mean @ inverse @ mean)
    assert distance(same - weight, expected) < EXACT
    assert torch.linalg.matrix_rank(published - weight) == 1


def test_only_weights_that_feed_back_explode() -> None:
    """algorithms.md Part 7, acceptance test 5: values as far from h as h is long. Where h is read from the model that was written last,
    each edit makes the next one larger; anchored at the base none knows of another. Keys share a direction that C does not protect."""
    count, lam = 100, 3.0
    weight, common = draw(OUT, WIDTH) / WIDTH**0.5, 3 * draw(WIDTH, seed=1)
    sample = draw(2_000, WIDTH, seed=2)
    c, keys = sample.T @ sample / 2_000, draw(count, WIDTH, seed=3) + common
    directions = torch.nn.functional.normalize(draw(count, OUT, seed=4), dim=1)
    drifting, system = weight.clone(), Forgetful(c, lam)
    anchored = []
    growing: LayerSystem = Remembering(c, lam)
    for key, direction in zip(keys, directions, strict=True):
        drifting += system.solve(key[None], 0.75 * (drifting @ key).norm() * direction[None])
    delta = torch.zeros_like(weight)
    for key, direction in zip(keys, directions, strict=True):
        # D4S: z from the base, hence the residual against the weight as it is now is z less what is there.
        value = weight @ key + 0.75 * (weight @ key).norm() * direction
        delta = delta + growing.solve(key[None], (value - (weight + delta) @ key)[None])
        growing.remember(key[None])
        anchored.append(float((weight + delta).abs().mean() / weight.abs().mean()))
    assert float(drifting.abs().mean() / weight.abs().mean()) > 1e3
    assert max(anchored) < 10
