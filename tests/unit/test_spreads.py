"""How layers share one residual: each spread against its own plain loop over pairs, and what `refresh` promises although layers depend on
those below (design §5; algorithms.md §1.1 and resolution B).

Widths differ between layers, so that a cross moment that is turned around cannot go unseen.
"""

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from errata.editors.base import Pairs
from errata.editors.d4s.editor import D4S
from errata.editors.d4s.moments import Moments
from errata.editors.d4s.state import D4SState
from errata.errors import BaseMismatchError, EditorError
from errata.modeling.layout import LAYOUTS
from errata.profiles import PrepareOptions, Profile, SolveOptions

WIDTHS = {1: 20, 2: 24, 4: 28}
OUT, LAM = 8, 12.0
FEW = 4
"""Pairs: the state keeps at most 5 of this width."""
EXACT = 1e-8
SPREADS = ("even", "refresh", "d4s_code")


def make_editor(spread: str, layers: Sequence[int] = tuple(WIDTHS), lam: float = LAM) -> D4S:
    generator = torch.Generator().manual_seed(0)
    c = {}
    for layer, width in WIDTHS.items():
        sample = torch.randn(200, width, generator=generator)
        c[layer] = sample.T @ sample / 200
    solve = SolveOptions.model_validate({"lam": lam, "spread": spread, "moments": "m"})
    profile = Profile(base="base", prepare=PrepareOptions(layers=tuple(layers)), solve=solve)
    return D4S(profile, Moments("base", "corpus", 0, 200, c), LAYOUTS["gpt2"])


def make_pairs(count: int, seed: int = 0, layers: Sequence[int] = tuple(WIDTHS)) -> Pairs:
    generator = torch.Generator().manual_seed(1_000 + seed)
    keys = {layer: torch.randn(count, WIDTHS[layer], generator=generator) for layer in layers}
    owners = tuple((f"e{seed}-{index}",) for index in range(count))
    return Pairs("base", PrepareOptions(layers=tuple(layers)).digest, owners, torch.randn(count, OUT, generator=generator), keys)


def build(editor: D4S, *batches: Pairs) -> D4SState:
    state = editor.empty_state()
    for batch in batches:
        state = editor.merge(state, batch, None)
    return state


def build_sums(editor: D4S, pairs: Pairs) -> D4SState:
    """The state of few pairs in the form that many have: others came and went."""
    others = make_pairs(30, seed=5, layers=list(pairs.keys))
    state = editor.merge(build(editor, others, pairs), None, others)
    assert state.pairs is None
    return state


def solve_loop(spread: str, pairs: Pairs, lam: float = LAM) -> list[torch.Tensor]:
    """Layer after layer in float64, the residual of each pair measured on the weights beneath as the spread says."""
    moments = make_editor("even")._moments.c
    residuals, deltas = pairs.residuals.double(), list[torch.Tensor]()
    for index, layer in enumerate(pairs.keys):
        asked = residuals.clone()
        for delta, lower in zip(deltas, pairs.keys, strict=False):
            if spread == "refresh":
                asked -= torch.stack([delta @ key for key in pairs.keys[lower].double()])
        asked /= len(pairs.keys) if spread == "even" else len(pairs.keys) - index
        keys, c = pairs.keys[layer].double(), moments[layer].double()
        system = lam * (c + 1e-6 * c.diagonal().mean() * torch.eye(len(c))) + keys.T @ keys
        deltas.append(torch.linalg.solve(system, keys.T @ asked).T)
    return deltas


def realise(deltas: Sequence[torch.Tensor], pairs: Pairs) -> torch.Tensor:
    """Σ X_l k_l per pair [n, d_out]."""
    return sum((keys.double() @ delta.T for delta, keys in zip(deltas, pairs.keys.values(), strict=True)), torch.zeros(len(pairs), OUT))


def weigh(editor: D4S, state: D4SState) -> list[torch.Tensor]:
    return list(editor.solve_exact(state).values())


def distance(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    return max(float((ours - theirs).norm() / theirs.norm()) for ours, theirs in zip(found, expected, strict=True))


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("count", [1, FEW, 40])
def test_a_spread_is_its_plain_loop_in_both_forms(spread: str, count: int) -> None:
    editor, pairs = make_editor(spread), make_pairs(count)
    wanted = solve_loop(spread, pairs)
    direct, summed = build(editor, pairs), build_sums(editor, pairs)
    assert (direct.pairs is None) == (count == 40)
    assert distance(weigh(editor, direct), wanted) < EXACT
    assert distance(weigh(editor, summed), wanted) < EXACT
    assert torch.allclose(editor.measure_fits(direct, pairs), editor.measure_fits(summed, pairs), rtol=EXACT)


def test_with_one_layer_every_spread_is_the_same() -> None:
    pairs = make_pairs(FEW, layers=[2])
    found = [weigh(make_editor(spread, [2]), build(make_editor(spread, [2]), pairs)) for spread in ("single", *SPREADS)]
    assert all(torch.equal(first[0], found[0][0]) for first in found)
    sums = build_sums(make_editor("refresh", [2]), pairs)
    assert not sums.kx
    assert make_editor("refresh", [2]).load_state(sums.to_bytes()).crossed


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("form", [build, build_sums])
@pytest.mark.parametrize("count", [1, FEW, 40])
def test_the_realised_fraction_is_what_a_pair_does_for_itself(spread: str, form: Callable[[D4S, Pairs], D4SState], count: int) -> None:
    """By hand: all residuals zero but its own."""
    editor, pairs = make_editor(spread), make_pairs(count)
    fits = editor.measure_fits(form(editor, pairs), pairs)
    for row in range(0, count, 7):
        alone = torch.zeros_like(pairs.residuals)
        alone[row] = pairs.residuals[row]
        own = Pairs(pairs.base, pairs.prepare, pairs.owners, alone, pairs.keys)
        got = realise(solve_loop(spread, own), own)[row]
        assert torch.allclose(got, fits[row] * pairs.residuals[row].double(), rtol=1e-6, atol=1e-9)


def test_what_is_asked_for_is_what_is_left() -> None:
    """As λ falls a lone fact is written whole, by all layers but those that overshoot: H_3 = 11/6 of it."""
    pairs = make_pairs(1)
    for spread, reached in (("even", 1.0), ("refresh", 1.0), ("d4s_code", 11 / 6)):
        editor = make_editor(spread, lam=1e-6)
        state = build(editor, pairs)
        assert float(editor.measure_fits(state, pairs)) == pytest.approx(reached, abs=1e-4)
        assert float((realise(weigh(editor, state), pairs) - reached * pairs.residuals).norm()) < 1e-3
    strong = {spread: float(make_editor(spread, lam=40.0).measure_fits(build(make_editor(spread), pairs), pairs)) for spread in SPREADS}
    assert strong["even"] < strong["refresh"] < strong["d4s_code"]


@given(data=st.data(), count=st.integers(2, 30))
@settings(max_examples=40, deadline=None)
def test_refreshing_depends_on_no_order_and_no_batches(data: st.DataObject, count: int) -> None:
    editor, pairs = make_editor("refresh"), make_pairs(count)
    order = data.draw(st.permutations(range(count)))
    cuts = sorted(data.draw(st.sets(st.integers(1, count - 1), max_size=5)))
    edges = [0, *cuts, count]
    batches = [pairs.take(order[first:last]) for first, last in zip(edges, edges[1:], strict=False)]
    assert distance(weigh(editor, build(editor, *batches)), weigh(editor, build(editor, pairs))) < EXACT


@given(data=st.data(), count=st.integers(2, 30))
@settings(max_examples=40, deadline=None)
def test_a_pair_that_is_taken_back_was_never_there(data: st.DataObject, count: int) -> None:
    editor, pairs = make_editor("refresh"), make_pairs(count)
    leaving = data.draw(st.lists(st.integers(0, count - 1), unique=True, min_size=1, max_size=count))
    state = build(editor, pairs)
    for row in leaving:
        state = editor.merge(state, None, pairs.take([row]))
    staying = [row for row in range(count) if row not in leaving]
    if not staying:
        assert state.to_bytes() == editor.empty_state().to_bytes()
        return
    assert distance(weigh(editor, state), weigh(editor, build(editor, pairs.take(staying)))) < EXACT


def test_cross_moments_are_stored_under_refresh_only() -> None:
    pairs = make_pairs(40)
    refreshed, plain = build(make_editor("refresh"), pairs), build(make_editor("even"), pairs)
    again = make_editor("refresh").load_state(refreshed.to_bytes())
    assert set(again.kx) == {(1, 2), (1, 4), (2, 4)}
    assert {key: cross.shape for key, cross in again.kx.items()} == {(1, 2): (20, 24), (1, 4): (20, 28), (2, 4): (24, 28)}
    assert again.to_bytes() == refreshed.to_bytes()
    more = make_pairs(3, seed=1)
    continued = build(make_editor("refresh"), pairs, more)
    assert make_editor("refresh").merge(again, more, None).to_bytes() == continued.to_bytes()
    assert b"kx." not in plain.to_bytes()
    assert make_editor("d4s_code").load_state(refreshed.to_bytes()).to_bytes() == plain.to_bytes()
    few = make_pairs(FEW)
    assert build(make_editor("refresh"), few).to_bytes() == build(make_editor("even"), few).to_bytes()


@pytest.mark.parametrize("count", [0, FEW, 40])
@pytest.mark.parametrize("there", SPREADS)
@pytest.mark.parametrize("here", SPREADS)
def test_a_state_goes_over_to_another_spread_or_says_that_it_cannot(here: str, there: str, count: int) -> None:
    old, new = make_editor(here), make_editor(there, lam=2 * LAM)
    state, wanted = (build(editor, make_pairs(count)) if count else editor.empty_state() for editor in (old, new))
    carried = new.carry_state(state)
    assert (carried is None) == (count == 40 and there == "refresh" and here != "refresh")
    if carried is not None:
        assert carried.to_bytes() == wanted.to_bytes()
        assert all(map(torch.equal, weigh(new, carried), weigh(new, wanted)))
    for foreign in (D4SState.empty("other", state.prepare), D4SState.empty("base", "other")):
        with pytest.raises(BaseMismatchError, match="state: expected"):
            new.carry_state(foreign)


def test_sums_without_cross_moments_cannot_be_refreshed() -> None:
    plain = build(make_editor("even"), make_pairs(40))
    with pytest.raises(EditorError, match="expected the cross moments"):
        make_editor("refresh").load_state(plain.to_bytes())
    with pytest.raises(EditorError, match="expected the cross moments"):
        make_editor("refresh").solve(plain)
    with pytest.raises(EditorError, match="expected the cross moments"):
        make_editor("refresh").measure_fits(plain, make_pairs(1))
