"""Weights of 16 bits: edits are computed with more bits than that, cast once, and what that loses is measured."""

from typing import Any

import pytest
import torch

from benchmarks.casting import build_editor, cast_base, write_edits
from benchmarks.tiny_base import SENTENCES, build_edit, choose_options, write_base
from errata.editors.artifacts import WeightDelta
from errata.evaluation.answered import find_answered
from errata.modeling.loading import Base, load_base
from errata.modeling.patch import attach
from errata.monitors.norms import measure_casting, measure_norms
from errata.report import Casting, Locality, Mean, ProbeScores, Report, Retention, WeightNorms
from tasks import evaluating

EDITS = [build_edit(person, person % 4, person) for person in range(12)]
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return load_base(write_base(tmp_path_factory.mktemp("base")), device="cpu")


@DTYPES
def test_casting_equals_plain_arithmetic(dtype: torch.dtype) -> None:
    weight = torch.randn(20, 30, generator=torch.Generator().manual_seed(0)).to(dtype)
    change = 1e-3 * torch.randn(20, 30, generator=torch.Generator().manual_seed(1))
    change[:, :10] = 0
    measured = measure_casting(weight, change)
    assert measured is not None
    plain = (weight.double() + change.double()).to(dtype).double() - weight.double()
    assert measured.error == pytest.approx(((plain - change).norm() / change.double().norm()).item())
    assert measured.lost == pytest.approx(((plain == 0) & (change != 0)).sum().item() / 400) and 0 < measured.lost < 1
    assert (measured.norm, measured.entries) == (pytest.approx(change.norm().item()), 400)


def test_weights_with_as_many_bits_as_the_change_lose_nothing_worth_a_number() -> None:
    change = torch.ones(2, 2)
    assert measure_casting(torch.ones(2, 2), change) is None and measure_casting(torch.ones(2, 2).double(), change) is None
    coarse = torch.ones(2, 2, dtype=torch.bfloat16)
    assert measure_casting(coarse, torch.zeros(2, 2)) is None and measure_casting(coarse, torch.full((2, 2), torch.inf)) is None


def test_several_weights_are_measured_as_if_they_were_one() -> None:
    weights = [torch.randn(8, size, generator=torch.Generator().manual_seed(size)).bfloat16() for size in (5, 40)]
    noise = [torch.randn(weight.shape, generator=torch.Generator().manual_seed(9)) for weight in weights]
    changes = [1e-2 * noise[0], 1e-4 * noise[1]]
    parts = [measure_casting(weight, change) for weight, change in zip(weights, changes, strict=True)]
    whole, one = Casting.over([part for part in parts if part]), measure_casting(torch.cat(weights, dim=1), torch.cat(changes, dim=1))
    assert whole is not None and one is not None
    assert whole.model_dump() == pytest.approx(one.model_dump())
    assert Casting.over([]) is None


@DTYPES
def test_edits_are_computed_with_more_bits_than_the_weights_have(base: Base, dtype: torch.dtype) -> None:
    coarse, options = cast_base(base, dtype), choose_options()
    editor = build_editor(coarse, options, 1.0, SENTENCES)
    pairs = editor.prepare(coarse, EDITS).pairs
    assert pairs is not None
    state = editor.merge(editor.empty_state(), pairs, None)
    (delta,) = editor.solve_exact(state).values()
    assert (pairs.residuals.dtype, pairs.keys[1].dtype, delta.dtype) == (torch.float32, torch.float32, torch.float64)
    # Values that 16 bits cannot hold: neither δ and Adam's moments, nor the solve was ever of the weights' dtype.
    for values in (pairs.residuals, delta):
        assert not torch.equal(values.to(dtype).to(values.dtype), values)
    artifact = editor.solve(state)
    assert artifact is not None and {stored.dtype for stored in artifact.deltas.values()} == {torch.float32}


@DTYPES
def test_a_base_of_16_bits_takes_its_edits(base: Base, dtype: torch.dtype) -> None:
    coarse = cast_base(base, dtype)
    artifact = write_edits(build_editor(coarse, choose_options(), 1.0, SENTENCES), coarse, EDITS)
    (norms,) = measure_norms(coarse, artifact.deltas)
    assert norms.casting is not None and 0 < norms.casting.error < 0.01
    assert {"cast_error", "cast_lost"} <= set(norms.numbers)
    with attach(coarse, [artifact]):
        assert find_answered(coarse, EDITS, 1_000) == EDITS


def test_reports_on_float32_weights_are_spelled_as_before(base: Base) -> None:
    name = base.layout.weight_name(1)
    delta = {name: 1e-3 * torch.randn(base.layout.read_weight(base.model, 1).shape)}
    (norms,) = measure_norms(base, delta)
    assert norms.casting is None and "casting" not in norms.model_dump_json() and "cast_error" not in norms.numbers
    (coarse,) = measure_norms(cast_base(base, torch.bfloat16), delta)
    assert WeightNorms.model_validate_json(coarse.model_dump_json()) == coarse and coarse.casting is not None


def make_report(*castings: Casting) -> Report:
    numbers = dict.fromkeys(("mean_abs_ratio", "frobenius_ratio", "spectral", "spectral_ratio"), 1.0)
    norms = tuple(WeightNorms(weight=f"h.{index}", **numbers, casting=casting) for index, casting in enumerate(castings))
    means: dict[str, Any] = dict.fromkeys(("efficacy", "token_accuracy", "success", "magnitude", "greedy"), Mean())
    scores = {"held_out": ProbeScores(), "paper": ProbeScores(), "retention": Retention(), "locality": Locality()}
    return Report(seed=0, rows=(), already_known=0, **means, **scores, norms=norms)


def test_people_are_warned_of_weights_that_are_too_coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[str] = []
    monkeypatch.setattr(evaluating, "tell_run", lambda _level, message: heard.append(message))
    fine, coarse = (Casting(error=error, lost=0.5, norm=1.0, entries=8) for error in (0.01, 0.4))
    evaluating.warn_coarse(make_report())
    evaluating.warn_coarse(make_report(fine))
    assert not heard
    evaluating.warn_coarse(make_report(fine, coarse))
    assert len(heard) == 1 and "28% off and 50% of its entries lost" in heard[0]
    assert make_report(coarse).metrics()["cast_error"] == 0.4


def test_a_delta_is_cast_once_or_not_at_all(base: Base) -> None:
    """Two artifacts never meet on one weight, so that no sum is cast and added to again."""
    coarse = cast_base(base, torch.bfloat16)
    name = coarse.layout.weight_name(1)
    artifact = WeightDelta(coarse.digest, {name: torch.full(coarse.layout.read_weight(coarse.model, 1).shape, 1e-3)})
    with pytest.raises(Exception, match="carries a delta already"), attach(coarse, [artifact, artifact]):
        raise AssertionError("attached twice")
