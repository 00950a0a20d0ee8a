"""The search is a function of its trials: it ends, it goes on after an interruption, it prefers the smaller change among equals."""

import random

from errata.calibration.report import doubt_choice, foresee_norm, set_alarm
from errata.calibration.search import Done, Step, choose_best, choose_rivals, propose_step
from errata.calibration.trials import Trial
from errata.profiles import PrepareOptions

STARTS = [PrepareOptions(layers=layers, contexts=("{}", "So. {}")) for layers in ((1, 2), (2,), (0, 1, 2))]


def make_trial(prepare: PrepareOptions, lam: float = 1.0, score: float = 0.5, norm: float = 1.5, spread: str = "even") -> Trial:
    fields = {"fit": 0.9, "reached": 1.0, "efficacy": score, "generalization": score, "specificity": score, "seconds": 1.0, "edits": 10}
    return Trial.model_validate({**fields, "prepare": prepare, "lam": lam, "spread": spread, "score": score, "norm_ratio": norm})


def measure(step: Step, quality: dict[int, float] | None = None) -> Done:
    """What a world would say in which layers, clamp and λ matter."""
    best = (quality or {}).get(step.prepare.layers[0], 0.5)
    trials = [
        make_trial(
            step.prepare, lam=100 * fit, score=best - abs(fit - 0.9) / 5 + (0.05 if step.prepare.clamp == 1.25 else 0), spread=spread
        )
        for spread in step.spreads
        for fit in step.fits
    ]
    return Done(step=step, trials=tuple(trials), seconds=1.0)


def run(quality: dict[int, float], hurry_after: int | None = None) -> list[Done]:
    done: list[Done] = []
    while step := propose_step(STARTS, done, hurry_after is not None and len(done) >= hurry_after):
        done.append(measure(step, quality))
        assert len(done) < 60, "a search ends"
    return done


def test_it_tries_every_place_then_varies_the_best_and_ends_with_the_curve() -> None:
    done = run({1: 0.6, 2: 0.9, 0: 0.7})
    phases = [item.step.phase for item in done]
    assert (
        phases[:3] == ["places"] * 3
        and phases[-1] == "curve"
        and phases == sorted(phases, key=["places", "options", "spread", "curve"].index)
    )
    best = choose_best([trial for item in done for trial in item.trials])
    assert best.prepare.layers == (2,) and best.prepare.clamp == 1.25
    assert len({item.step.digest for item in done}) == len(done), "nothing is measured twice"


def test_a_search_that_was_cut_short_goes_on_and_draws_the_curve_of_what_is_best_then() -> None:
    done = run({1: 0.6, 2: 0.9, 0: 0.7}, hurry_after=1)
    assert [item.step.prepare.layers for item in done] == [(1, 2), (1, 2)]
    while step := propose_step(STARTS, done, False):
        done.append(measure(step, {1: 0.6, 2: 0.9, 0: 0.7}))
    best = choose_best([trial for item in done for trial in item.trials])
    assert done[-1].step.phase == "curve" and done[-1].step.prepare == best.prepare and best.prepare.layers == (2,)


def test_one_layer_has_nothing_to_spread() -> None:
    assert "spread" not in [item.step.phase for item in run({1: 0.1, 2: 0.9, 0: 0.1})]
    assert "spread" in [item.step.phase for item in run({1: 0.9, 2: 0.1, 0: 0.1})]


def test_in_a_hurry_only_the_curve_is_left() -> None:
    assert [item.step.phase for item in run({1: 0.6}, hurry_after=2)] == ["places", "places", "curve"]
    assert [item.step.phase for item in run({1: 0.6}, hurry_after=0)] == ["places", "curve"], "nothing can be chosen without a trial"


def test_the_order_of_what_is_known_does_not_matter() -> None:
    done = run({1: 0.6, 2: 0.9, 0: 0.7})[:9]
    shuffled = random.Random(0).sample(done, len(done))
    assert propose_step(STARTS, done, False) == propose_step(STARTS, shuffled, False)


def test_places_that_cannot_be_measured_are_passed_over() -> None:
    done = [Done(step=step, fault="no edit fits", seconds=0.1) for step in [propose_step(STARTS, [], False)] if step]
    following = propose_step(STARTS, done, False)
    assert following is not None and following.prepare == STARTS[1]
    nothing = list(done)
    while step := propose_step(STARTS, nothing, False):
        nothing.append(Done(step=step, fault="no edit fits", seconds=0.1))
    assert len(nothing) == len(STARTS)


def test_of_equals_the_one_that_grows_the_weights_less_is_better() -> None:
    near = (
        make_trial(STARTS[0], score=0.9005, norm=3.0),
        make_trial(STARTS[1], score=0.9, norm=1.2),
        make_trial(STARTS[2], score=0.8, norm=1.0),
    )
    assert choose_best(near) == near[1]
    assert choose_rivals(near, near[1], 2) == [near[0], near[2]]
    assert choose_rivals(near, near[1], 1) == [near[0]]


def test_growth_is_foreseen_from_its_square() -> None:
    growth = [(count, (1 + 0.02 * count) ** 0.5) for count in (25, 50, 100)]
    assert abs((foresee_norm(growth, 400) or 0) - 3.0) < 1e-9
    assert foresee_norm([]) is None and set_alarm([]) is None
    assert (set_alarm(growth) or 0) > (foresee_norm(growth) or 0)
    assert foresee_norm([(10, 0.9)]) == 1.0, "weights that shrink are not foreseen to vanish"


def test_a_choice_that_writes_few_edits_is_doubted() -> None:
    assert doubt_choice(make_trial(STARTS[0], score=0.5)) == []
    (weak,) = doubt_choice(make_trial(STARTS[0], score=0.02))
    assert "with what was chosen 2.0% take" in weak and "smaller λ" in weak
    (short,) = doubt_choice(make_trial(STARTS[0], score=0.0).model_copy(update={"reached": 0.1}))
    assert "z itself rarely says the target" in short
