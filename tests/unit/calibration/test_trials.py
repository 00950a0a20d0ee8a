"""A trial measures what the editor does: on a random base, whose answers mean nothing and whose arithmetic must hold all the same."""

import pytest
import torch

from benchmarks.tiny_base import SENTENCES, build_edit, choose_options, write_base
from errata.calibration.trials import Desk
from errata.editors.d4s.fits import solve_for_fit
from errata.editors.d4s.moments import collect_moments
from errata.editors.d4s.solve import PairSystem, factor_moments
from errata.edits import Probe
from errata.errors import EditorError
from errata.evaluation.answered import find_answered
from errata.evaluation.evaluate import evaluate_candidate
from errata.modeling.loading import load_base
from errata.modeling.patch import attach, require_untouched
from errata.profiles import Profile, SolveOptions
from errata.settings import EvaluateSettings


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    base = load_base(write_base(tmp_path_factory.mktemp("base")), device="cpu")
    moments = collect_moments(base, (0, 1), SENTENCES)
    edits = [
        build_edit(
            person,
            answer=person,
            paraphrase_prompts=(f"They say the home of {build_edit(person).subject}",),
            neighborhood_prompts=(Probe(prompt=build_edit(person + 8).rewrite_prompt, answers=("Oslo",)),),
        )
        for person in range(8)
    ]
    return Desk(base, moments, tuple(edits), 512)


def test_it_says_what_an_evaluation_says(desk: Desk) -> None:
    (trial,) = desk.try_options(choose_options(), ("single",), (), lambdas=(1.0,))
    editor = desk._make_editor(choose_options(), "single", 1.0)
    prepared = editor.prepare(desk.base, desk.edits)
    artifact = editor.solve(editor.merge(editor.empty_state(), prepared.pairs, None))
    report = evaluate_candidate(desk.base, [artifact], desk.edits, [], None, EvaluateSettings())
    assert trial.efficacy == pytest.approx(report.efficacy.value)
    assert trial.generalization == pytest.approx(report.paper.generalization.value)
    assert trial.specificity == pytest.approx(report.paper.specificity.value)
    assert trial.score == pytest.approx(report.paper.score)
    assert trial.norm_ratio == pytest.approx(max(norms.mean_abs_ratio for norms in report.norms))
    assert trial.spread == "single" and trial.edits == 8 and trial.efficacy > 0.5
    require_untouched(desk.base)


def test_fits_are_met(desk: Desk) -> None:
    options = choose_options().model_copy(update={"layers": (0, 1)})
    trials = desk.try_options(options, ("even", "refresh"), (0.9, 0.5))
    assert [trial.spread for trial in trials] == ["even", "even", "refresh", "refresh"]
    assert [trial.fit for trial in trials[:2]] == pytest.approx([0.9, 0.5], abs=0.01)
    assert trials[0].lam < trials[1].lam and trials[0].lam == trials[2].lam
    assert trials[0].norm_ratio > trials[1].norm_ratio > 1


def test_lambda_is_found_by_the_formula_that_solving_uses() -> None:
    generator = torch.Generator().manual_seed(0)
    keys = {layer: torch.randn(7, 12, generator=generator) for layer in (0, 1)}
    factors = {layer: factor_moments(torch.eye(12) + torch.ones(12, 12) / 3) for layer in keys}
    for fit in (0.2, 0.6, 0.95):
        lam = solve_for_fit(keys, factors.__getitem__, fit)
        found = [PairSystem.form(keys[layer], factors[layer], lam).measure_fit(keys[layer]) for layer in keys]
        assert torch.stack(found).mean(dim=0).median().item() == pytest.approx(fit, abs=0.005)
    assert solve_for_fit({0: torch.zeros(3, 12)}, factors.__getitem__, 0.5) == 1e-3


def test_growth_is_measured_on_the_first_edits(desk: Desk) -> None:
    (trial,) = desk.try_options(choose_options(), ("single",), (), lambdas=(1.0,))
    growth = desk.measure_growth(trial, (2, 4, 8, 100))
    assert [count for count, _ in growth] == [2, 4, 8]
    assert growth[-1][1] == pytest.approx(trial.norm_ratio) and growth[0][1] < growth[-1][1]


def test_edits_that_cannot_be_prepared_are_an_error(desk: Desk) -> None:
    long = build_edit(0).model_copy(update={"prompt": "so " * 80 + "{}"})
    with pytest.raises(EditorError, match="none among 1"):
        Desk(desk.base, desk.moments, (long,), 512).try_options(choose_options(), ("single",), (0.5,))


def test_the_solve_options_are_those_of_the_trial(desk: Desk) -> None:
    """What is stored as a profile does what the trial did."""
    (trial,) = desk.try_options(choose_options(), ("single",), (0.8,))
    profile = Profile(base=desk.base.digest, prepare=trial.prepare, solve=SolveOptions(lam=trial.lam, spread=trial.spread, moments="m"))
    editor = desk._editor.change(profile)
    artifact = editor.solve(editor.merge(editor.empty_state(), editor.prepare(desk.base, desk.edits).pairs, None))
    with attach(desk.base, [artifact]):
        assert len(find_answered(desk.base, desk.edits, 512)) == trial.efficacy * len(desk.edits)
    assert editor.options["lam"] == trial.lam
