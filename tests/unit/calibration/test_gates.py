"""Where θ is sought, what is tried, and what is taken: functions of what was read and measured."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from errata.calibration.cosines import Cosines
from errata.calibration.gates import (
    GAINS,
    PUBLISHED,
    GateDone,
    GateStart,
    GateStep,
    GateTrial,
    choose_gate,
    choose_layer,
    propose_gates,
    propose_starts,
)
from errata.profiles import GatePoint

APART = Cosines(layer=5, own=(0.9, 0.92, 0.95, 0.99), foreign={"neighbours": (0.3, 0.5), "text": (0.1, 0.2, 0.2)})
MIXED = Cosines(layer=4, own=(0.5, 0.7, 0.9), foreign={"neighbours": (0.4, 0.6, 0.8)})
STARTS = (
    GateStart(layer=5, thetas=(0.2, 0.5, 0.6, 0.7, 0.75, 0.8, 0.9), middle=0.7, least=0.5),
    GateStart(layer=4, thetas=(0.3, 0.5, 0.6, 0.75), middle=0.5, least=0.0),
)


def make_trial(layer: int, theta: float, gain: float, score: float) -> GateTrial:
    point = GatePoint(layer=layer, theta=theta, gain=gain, efficacy=score, generalization=score, specificity=score, score=score)
    return GateTrial(point=point, edits=10, seconds=1.0)


def measure(step: GateStep, quality: dict[int, float]) -> GateDone:
    """What a world would say in which the layer matters, gains below 80 do too little, and θ above .85 misses paraphrases."""
    trials = [
        make_trial(step.layer, theta, gain, quality[step.layer] - (0.3 if gain < 80 else 0) - (0.1 if theta > 0.85 else 0))
        for theta, gain in step.gates
    ]
    return GateDone(step=step, trials=tuple(trials), seconds=1.0)


def run(quality: dict[int, float], done: list[GateDone], hurry: bool = False) -> list[GateDone]:
    while step := propose_gates(STARTS, done, hurry):
        done.append(measure(step, quality))
        assert len(done) < 10, "a search ends"
    return done


def list_trials(done: list[GateDone]) -> list[GateTrial]:
    return [trial for item in done for trial in item.trials]


def test_theta_is_sought_between_the_distributions() -> None:
    assert APART.separation == 1.0 and not APART.overlap
    low, high = APART.range
    assert 0.49 < low <= 0.5 and 0.9 <= high < 0.91
    assert APART.measure_fired(0.91) == {"paraphrases": 0.75, "neighbours": 0.0, "text": 0.0}
    assert APART.measure_fired(0.5)["neighbours"] == 0.0, "a neuron fires above θ, not at it"
    assert MIXED.overlap and MIXED.separation == pytest.approx(1 / 3)
    low, high = MIXED.range
    assert low < 0.6 < 0.75 < high


@given(st.lists(st.floats(-1, 1), min_size=1), st.lists(st.floats(-1, 1), min_size=1))
def test_separation_is_what_the_best_threshold_does(own: list[float], other: list[float]) -> None:
    found = Cosines(layer=0, own=tuple(own), foreign={"text": tuple(other)}).separation

    def judge(theta: float) -> float:
        return sum(value > theta for value in own) / len(own) - sum(value > theta for value in other) / len(other)

    assert found == pytest.approx(max(map(judge, (*own, *other))))
    assert 0 <= found <= 1


def test_the_published_layer_comes_first_and_every_gate_is_a_valid_one() -> None:
    layers = [cosines.model_copy(update={"layer": layer}) for layer, cosines in enumerate((MIXED, APART, MIXED, APART, MIXED))]
    starts = propose_starts(layers, published=4)
    assert [start.layer for start in starts] == [4, 3, 1]
    for start in starts:
        assert PUBLISHED.theta in start.thetas and start.middle in start.thetas and list(start.thetas) == sorted(set(start.thetas))
        assert all(0 <= theta < 1 for theta in start.thetas)
    assert starts[0].least == 0, "where the distributions overlap, no θ keeps everything else quiet"
    assert starts[1].least == pytest.approx(APART.range[0], abs=1e-3) and min(starts[1].thetas) < starts[1].least


def test_it_tries_every_layer_and_then_the_best_at_every_gate() -> None:
    done = run({5: 0.8, 4: 0.9}, [])
    assert [(item.step.phase, item.step.layer) for item in done] == [("layers", 5), ("layers", 4), ("gates", 4)]
    tried = [(trial.point.theta, trial.point.gain) for trial in list_trials(done) if trial.point.layer == 4]
    assert len(tried) == len(set(tried)), "nothing is measured twice"
    assert set(tried) == {(theta, gain) for theta in STARTS[1].thetas for gain in GAINS}


def test_a_search_in_a_hurry_measures_one_layer_and_goes_on_later() -> None:
    quality = {5: 0.8, 4: 0.9}
    done = run(quality, [], hurry=True)
    assert [(item.step.phase, item.step.layer) for item in done] == [("layers", 5), ("gates", 5)]
    run(quality, done)
    assert [(item.step.phase, item.step.layer) for item in done[2:]] == [("layers", 4), ("gates", 4)]


def test_layers_that_cannot_be_measured_are_passed_over() -> None:
    faulty = GateDone(step=propose_gates(STARTS, [], False), fault="no", seconds=0.0)
    step = propose_gates(STARTS, [faulty], False)
    assert step is not None and step.layer == 4
    both = [faulty, GateDone(step=step, fault="no", seconds=0.0)]
    assert propose_gates(STARTS, both, False) is None and propose_gates(STARTS, both, True) is None


def test_of_equal_layers_the_first_is_taken() -> None:
    trials = [make_trial(4, 0.75, 80, 0.9005), make_trial(5, 0.75, 80, 0.9)]
    assert choose_layer(trials, STARTS) == 5
    assert choose_layer([*trials, make_trial(4, 0.5, 80, 0.95)], STARTS) == 4


def test_theta_lies_in_the_middle_of_its_plateau_at_the_smallest_gain_that_has_one() -> None:
    done = run({5: 0.9, 4: 0.5}, [])
    best = choose_gate(list_trials(done), STARTS, 5).point
    assert (best.theta, best.gain, best.score) == (0.7, 80, 0.9), "of .5 to .8; .2 is as good and fires elsewhere"


def test_a_small_gain_with_little_room_is_left_for_a_larger_one() -> None:
    wide = [make_trial(5, theta, 160, 1.0) for theta in (0.5, 0.6, 0.7, 0.75, 0.8, 0.9)]
    narrow = [make_trial(5, theta, 80, 1.0 if theta == 0.5 else 0.9) for theta in (0.5, 0.6, 0.7)]
    assert choose_gate([*wide, *narrow], STARTS, 5).point.gain == 160
    enough = [make_trial(5, theta, 80, 1.0) for theta in (0.5, 0.6, 0.7, 0.75)]
    shuffled = [*wide, *enough]
    random.Random(0).shuffle(shuffled)
    assert (choose_gate(shuffled, STARTS, 5).point.gain, choose_gate(shuffled, STARTS, 5).point.theta) == (80, 0.6)


def test_a_plateau_ends_where_something_between_is_worse() -> None:
    trials = [make_trial(5, theta, 80, score) for theta, score in ((0.5, 1.0), (0.6, 0.9), (0.7, 1.0), (0.8, 1.0), (0.9, 1.0))]
    assert choose_gate(trials, STARTS, 5).point.theta == 0.8
