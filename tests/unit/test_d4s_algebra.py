"""What the algebra of D4S promises, without a model (algorithms.md §T and "Model-free acceptance tests" 1–5).

Widths are small, so that with a few pairs the state keeps them and with more it keeps sums: both forms are crossed all the time.
"""

import hashlib
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.reference import solve_plain
from errata.editors.base import Pairs
from errata.editors.d4s.editor import D4S
from errata.editors.d4s.moments import Moments
from errata.editors.d4s.solve import PairSystem, SumSystem, estimate_condition, factor_moments
from errata.editors.d4s.state import D4SState
from errata.editors.kinds import load_artifact
from errata.errors import BaseMismatchError, EditorError
from errata.modeling.layout import LAYOUTS
from errata.modeling.loading import Base
from errata.modeling.patch import attach
from errata.profiles import PrepareOptions, Profile, SolveOptions

LAYERS, WIDTH, OUT, LAM = (1, 2), 24, 8, 30.0
PREPARE = PrepareOptions(layers=LAYERS)
EXACT = 1e-8
"""Relative, in float64."""


def make_moments(seed: int = 0, width: int = WIDTH) -> Moments:
    generator = torch.Generator().manual_seed(seed)
    c = {}
    for layer in LAYERS:
        sample = torch.randn(200, width, generator=generator)
        c[layer] = sample.T @ sample / 200
    return Moments("base", "corpus", seed, 200, c)


def make_editor(base: str = "base", moments: Moments | None = None) -> D4S:
    profile = Profile(base=base, prepare=PREPARE, solve=SolveOptions(lam=LAM, spread="even", moments="m"))
    return D4S(profile, moments or make_moments(), LAYOUTS["gpt2"])


def make_pairs(
    count: int, seed: int = 0, *, base: str = "base", prepare: str = PREPARE.digest, width: int = WIDTH, out: int = OUT
) -> Pairs:
    generator = torch.Generator().manual_seed(1_000 + seed)
    keys = {layer: torch.randn(count, width, generator=generator) for layer in LAYERS}
    owners = tuple((f"e{seed}-{index}",) for index in range(count))
    return Pairs(base, prepare, owners, torch.randn(count, out, generator=generator), keys)


def weigh(editor: D4S, state: D4SState) -> torch.Tensor:
    """ΔW of all layers in float64, before the artifact rounds them."""
    deltas = []
    for layer in LAYERS:
        right = state.rk[layer] if state.pairs is None else state.pairs.residuals
        deltas.append(editor._form(state, layer).solve(right))
    return torch.stack(deltas) / len(LAYERS)


def build(editor: D4S, *batches: Pairs) -> D4SState:
    state = editor.empty_state()
    for batch in batches:
        state = editor.merge(state, batch, None)
    return state


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def split(pairs: Pairs, cuts: Sequence[int]) -> list[Pairs]:
    edges = [0, *sorted(set(cuts)), len(pairs)]
    return [pairs.take(range(first, last)) for first, last in zip(edges, edges[1:], strict=False) if last > first]


@pytest.mark.parametrize("count", [1, 5, 6, 7, 20, 60])
def test_batch_ridge_is_least_squares_is_dual_is_primal_is_incremental(count: int) -> None:
    moments, pairs = make_moments(), make_pairs(count)
    editor = make_editor(moments=moments)
    ridge_of = {layer: c.double() + 1e-6 * c.double().diagonal().mean() * torch.eye(WIDTH) for layer, c in moments.c.items()}
    plain = solve_plain(pairs.residuals, pairs.keys, ridge_of, LAM, share=1)
    for layer in LAYERS:
        keys, residuals = pairs.keys[layer].double(), pairs.residuals.double()
        expected = plain[layer]
        # Recursive least squares: each pair against the weights so far, all history in the inverse.
        inverse, weights = torch.linalg.inv(LAM * ridge_of[layer]), torch.zeros(OUT, WIDTH, dtype=torch.float64)
        for key, residual in zip(keys, residuals, strict=True):
            gain = inverse @ key / (1 + key @ inverse @ key)
            weights += torch.outer(residual - weights @ key, gain)
            inverse -= torch.outer(gain, key @ inverse)
        dual = PairSystem.form(keys, factor_moments(moments.c[layer]), LAM).solve(residuals)
        primal = SumSystem.form(keys.T @ keys, moments.c[layer], LAM).solve(residuals.T @ keys)
        for name, found in (("recursive", weights), ("dual", dual), ("primal", primal)):
            assert distance(found, expected) < EXACT, (name, layer)
    whole = torch.stack([plain[layer] for layer in LAYERS]) / len(LAYERS)
    one_by_one = build(editor, *(pairs.take([row]) for row in range(count)))
    assert distance(weigh(editor, one_by_one), whole) < EXACT
    assert one_by_one.count == count


def test_weights_minimise_the_ridge_objective() -> None:
    """‖(W0 + Δ)K − V‖² + λ tr(Δ C Δᵀ) with V = W0 K + R: no step away from Δ lowers it."""
    moments, pairs = make_moments(), make_pairs(9)
    keys, residuals, c = pairs.keys[1].double(), pairs.residuals.double(), moments.c[1].double()
    delta = (weigh(make_editor(moments=moments), build(make_editor(moments=moments), pairs))[0] * len(LAYERS)).requires_grad_(True)
    loss = (keys @ delta.T - residuals).square().sum() + LAM * torch.trace(delta @ c @ delta.T)
    (gradient,) = torch.autograd.grad(loss, delta)
    assert gradient.norm() < 1e-4 * residuals.norm() * keys.norm()


@given(cuts=st.lists(st.integers(1, 39), max_size=8), count=st.integers(2, 40))
@settings(max_examples=40, deadline=None)
def test_any_split_into_batches_gives_the_same_weights(cuts: list[int], count: int) -> None:
    editor, pairs = make_editor(), make_pairs(count)
    whole = weigh(editor, build(editor, pairs))
    parts = weigh(editor, build(editor, *split(pairs, [cut for cut in cuts if cut < count])))
    assert distance(parts, whole) < EXACT


@given(data=st.data(), count=st.integers(1, 30))
@settings(max_examples=40, deadline=None)
def test_order_does_not_matter(data: st.DataObject, count: int) -> None:
    editor, pairs = make_editor(), make_pairs(count)
    order = data.draw(st.permutations(range(count)))
    assert distance(weigh(editor, build(editor, pairs.take(order))), weigh(editor, build(editor, pairs))) < EXACT


@given(data=st.data(), count=st.integers(2, 30))
@settings(max_examples=40, deadline=None)
def test_removing_any_pairs_in_any_order_equals_never_having_added_them(data: st.DataObject, count: int) -> None:
    editor, pairs = make_editor(), make_pairs(count)
    leaving = data.draw(st.lists(st.integers(0, count - 1), unique=True, min_size=1, max_size=count - 1))
    state = build(editor, pairs)
    for row in leaving:
        state = editor.merge(state, None, pairs.take([row]))
    staying = pairs.take([row for row in range(count) if row not in leaving])
    assert state.count == len(staying)
    assert distance(weigh(editor, state), weigh(editor, build(editor, staying))) < EXACT


@pytest.mark.parametrize("count", [3, 40])
def test_removing_everything_leaves_the_empty_state_and_no_artifact(count: int) -> None:
    editor, pairs = make_editor(), make_pairs(count)
    state = editor.merge(build(editor, pairs), None, pairs.take(list(reversed(range(count)))))
    assert state.to_bytes() == editor.empty_state().to_bytes()
    assert editor.solve(state) is None


def test_a_replacement_equals_having_written_only_the_new_one() -> None:
    editor, pairs = make_editor(), make_pairs(20)
    old, new = pairs.take([0]), make_pairs(1, seed=7)
    replaced = editor.merge(build(editor, pairs), new, old)
    rest = pairs.take(range(1, 20))
    assert distance(weigh(editor, replaced), weigh(editor, build(editor, rest, new))) < EXACT


def test_few_pairs_are_a_set_to_the_bit() -> None:
    """As long as the state keeps its pairs, neither order nor batches nor a detour through other pairs leave a trace."""
    editor, pairs = make_editor(), make_pairs(WIDTH // 4)
    whole = build(editor, pairs)
    detour = build(editor, pairs.take([5, 3, 1]), pairs.take([0]))
    detour = editor.merge(detour, pairs.take([4, 2, 3]), pairs.take([3]))
    assert whole.pairs is not None
    assert detour.to_bytes() == whole.to_bytes()
    first, second = editor.solve(whole), editor.solve(detour)
    assert first is not None and second is not None
    assert first.to_bytes() == second.to_bytes()


def test_many_pairs_become_sums_of_fixed_size() -> None:
    editor = make_editor()
    sizes = {len(build(editor, make_pairs(count)).to_bytes()) // 64 for count in (20, 200, 2_000)}
    assert build(editor, make_pairs(20)).pairs is None
    assert len(sizes) == 1


@pytest.mark.parametrize("width", [24, 512, 700, 1_030])
def test_states_survive_storage(width: int) -> None:
    for count in (2, width // 4 + 1):
        editor = make_editor(moments=make_moments(width=width))
        state = build(editor, make_pairs(count, width=width, out=3))
        again = editor.load_state(state.to_bytes())
        assert (again.count, again.pairs is None) == (count, state.pairs is None)
        assert again.to_bytes() == state.to_bytes()
        for layer in state.kk:
            assert torch.equal(again.rk[layer], state.rk[layer])
            # kk is stored as its upper triangle; the product that makes it is symmetric only up to rounding.
            assert torch.allclose(again.kk[layer], state.kk[layer], rtol=1e-12, atol=1e-12)
            assert torch.equal(again.kk[layer], again.kk[layer].T)
        assert editor.merge(again, make_pairs(1, seed=3, width=width, out=3), None).count == count + 1


def test_equal_keys_share_the_mean_residual() -> None:
    """Why a fact must be replaced and not added again (algorithms.md §T 5)."""
    editor, pairs = make_editor(), make_pairs(2)
    keys = {layer: each[[0, 0]] * 100 for layer, each in pairs.keys.items()}
    equal = Pairs(pairs.base, pairs.prepare, pairs.owners, pairs.residuals, keys)
    delta = weigh(editor, build(editor, equal))[0] * len(LAYERS)
    reached = delta @ equal.keys[1][0].double()
    assert distance(reached, equal.residuals.double().mean(dim=0)) < 1e-2


def test_realised_fraction() -> None:
    """ρ is what an edit alone realises of its residual, in both forms, and λ lowers it."""
    editor = make_editor()
    for count in (1, 5, 30):
        pairs = make_pairs(count)
        state = build(editor, pairs)
        fits = editor.measure_fits(state, pairs)
        assert fits.shape == (count,) and bool((fits > 0).all()) and bool((fits < 1).all())
        expected = torch.zeros(count, dtype=torch.float64)
        for layer in LAYERS:
            c = make_moments().c[layer].double()
            keys = pairs.keys[layer].double()
            system = LAM * (c + 1e-6 * c.diagonal().mean() * torch.eye(WIDTH)) + keys.T @ keys
            expected += (keys @ torch.linalg.inv(system) * keys).sum(dim=1) / len(LAYERS)
        assert torch.allclose(fits, expected, rtol=1e-9)
    alone = make_pairs(1)
    state = build(editor, alone)
    realised = (weigh(editor, state)[0] * len(LAYERS)) @ alone.keys[1][0].double()
    share = PairSystem.form(alone.keys[1], factor_moments(make_moments().c[1]), LAM).measure_fit(alone.keys[1])
    assert distance(realised, share * alone.residuals[0].double()) < EXACT


@pytest.mark.parametrize("count", [2, 30])
def test_moments_that_are_none_give_a_clear_error(count: int) -> None:
    bad = make_moments()
    broken = Moments("base", "corpus", 0, 1, {layer: -c for layer, c in bad.c.items()})
    editor = make_editor(moments=broken)
    with pytest.raises(EditorError, match=r"layer 1: expected .* positive definite"):
        editor.solve(build(editor, make_pairs(count)))


@pytest.mark.parametrize("count", [2, 30])
def test_moments_of_few_tokens_still_solve(count: int) -> None:
    """A C of rank 3 out of 24 has a null space; the solution there stays finite."""
    sample = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0))
    thin = Moments("base", "corpus", 0, 3, dict.fromkeys(LAYERS, sample.T @ sample / 3))
    editor = make_editor(moments=thin)
    artifact = editor.solve(build(editor, make_pairs(count)))
    assert artifact is not None
    assert all(bool(torch.isfinite(delta).all()) for delta in artifact.deltas.values())


def test_pairs_of_another_base_or_profile_are_refused() -> None:
    editor, pairs = make_editor(), make_pairs(3)
    state = build(editor, pairs)
    for stranger in (make_pairs(1, base="other"), make_pairs(1, prepare="other")):
        for changes in ((stranger, None), (None, stranger)):
            with pytest.raises(BaseMismatchError, match="expected (base|prepare options)"):
                editor.merge(state, *changes)
        with pytest.raises(BaseMismatchError):
            Pairs.concatenate([pairs, stranger])
    with pytest.raises(BaseMismatchError, match="second moments"):
        make_editor(base="other")
    for foreign in (D4SState.empty("other", PREPARE.digest), D4SState.empty("base", "other")):
        with pytest.raises(BaseMismatchError, match="state: expected"):
            editor.solve(foreign)
        with pytest.raises(BaseMismatchError, match="state: expected"):
            editor.load_state(foreign.to_bytes())


def test_what_was_never_added_cannot_be_removed() -> None:
    editor, pairs = make_editor(), make_pairs(3)
    with pytest.raises(EditorError, match="at most 3 pairs to remove, found 4"):
        editor.merge(build(editor, pairs), None, make_pairs(4, seed=2))
    with pytest.raises(EditorError, match="found 1 of 1 that it does not"):
        editor.merge(build(editor, pairs), None, make_pairs(1, seed=2))


def test_a_cumulative_delta_is_refused_on_anything_but_its_base(tiny_gpt2: Base) -> None:
    base = tiny_gpt2
    d_out, d_in = base.layout.read_weight(base.model, 1).shape
    moments = Moments(base.digest, "corpus", 0, 200, make_moments(width=d_in).c)
    profile = Profile(base=base.digest, prepare=PREPARE, solve=SolveOptions(lam=LAM, spread="even", moments="m"))
    editor = D4S(profile, moments, base.layout)
    artifact = editor.solve(build(editor, make_pairs(2, base=base.digest, width=d_in, out=d_out)))
    assert artifact is not None
    stored = load_artifact(artifact.to_bytes(), {}.__getitem__)
    before = {name: hashlib.sha256(weight.numpy().tobytes()).digest() for name, weight in base.model.named_parameters()}
    with attach(base, [stored]), pytest.raises(BaseMismatchError, match="carries a delta already"), attach(base, [stored]):
        pytest.fail("a cumulative delta was added to weights that carry one")
    after = {name: hashlib.sha256(weight.numpy().tobytes()).digest() for name, weight in base.model.named_parameters()}
    assert after == before


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_memit_on_the_drifting_model_explodes_and_d4s_does_not(seed: int) -> None:
    """The feedback toy of algorithms.md, Part 5.2: each residual is a fixed fraction of the norm of the hidden state that is edited.

    MEMIT reads that state from the model as edited so far, solves against C alone and adds to it. D4S reads it from W0 and solves for
    all edits at once. Nothing else differs. Keys share a direction, as those of real models do: that is what closes the loop.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    width, lam, edits = 64, 3.0, 100
    corpus = draw(1_000, width)
    c = corpus.T @ corpus / len(corpus)
    w0 = draw(width, width) / width**0.5
    keys = 2 * draw(width) + draw(edits, width)
    directions = torch.nn.functional.normalize(draw(edits, width), dim=1)

    def pull(weights: torch.Tensor, index: int) -> torch.Tensor:
        return 0.75 * (weights @ keys[index]).norm() * directions[index]

    def grown(weights: torch.Tensor) -> float:
        return float(weights.abs().mean() / w0.abs().mean())

    drifting = w0.clone()
    for index in range(edits):
        key = keys[index : index + 1]
        drifting = drifting + SumSystem.form(key.T @ key, c, lam).solve(torch.outer(pull(drifting, index), key[0]))
    anchored = torch.stack([pull(w0, index) for index in range(edits)])
    sums = [(anchored[:n].T @ keys[:n], keys[:n].T @ keys[:n]) for n in range(10, edits + 1, 10)]
    d4s = [grown(w0 + SumSystem.form(kk, c, lam).solve(rk)) for rk, kk in sums]
    assert grown(drifting) > 1e3
    assert max(d4s) < 10


@pytest.mark.parametrize("count", [1, 3, 60])
def test_the_condition_is_that_of_the_matrix_that_is_solved_with(count: int) -> None:
    """Both forms, against an eigendecomposition. The estimate comes from below."""
    keys, c = make_pairs(count).keys[1], make_moments().c[1]
    kk = keys.double().T @ keys.double()
    lower = factor_moments(c)
    expected = float(torch.linalg.cond(LAM * lower @ lower.T + kk))
    for system in (PairSystem.form(keys, lower, LAM), SumSystem.form(kk, c, LAM)):
        assert 0.95 * expected < estimate_condition(system) < 1.001 * expected
    editor = make_editor()
    conditions = editor.measure_conditions(editor.merge(editor.empty_state(), make_pairs(count), None))
    assert conditions[LAYOUTS["gpt2"].weight_name(1)] == pytest.approx(expected, rel=0.05)
    assert editor.measure_conditions(editor.empty_state()) == {}
