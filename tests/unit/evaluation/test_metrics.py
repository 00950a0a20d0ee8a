"""Metrics against values worked out by hand from algorithms.md, Part 4."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from errata.evaluation.metrics import agreement, all_correct, harmonic_mean, magnitude, mean_loss, prefers, token_accuracy
from errata.report import Mean

HALF, QUARTER = math.log(0.5), math.log(0.25)
logprobs = st.lists(st.floats(-20, -1e-3), min_size=1, max_size=6)


def test_loss_is_the_mean_per_token_so_that_long_objects_are_not_punished() -> None:
    assert mean_loss([HALF, HALF, HALF]) == pytest.approx(-HALF)
    assert prefers([HALF] * 5, [QUARTER])
    assert not prefers([HALF], [HALF])  # a tie is no success


def test_magnitude_is_a_difference_of_geometric_means() -> None:
    assert magnitude([HALF, QUARTER * 2 - HALF], [QUARTER]) == pytest.approx(0.0)
    assert magnitude([HALF], [QUARTER]) == pytest.approx(0.25)
    assert magnitude([-math.inf], [HALF]) == pytest.approx(-0.5)


@given(logprobs, logprobs)
def test_success_and_magnitude_agree_and_swapping_roles_flips_the_sign(new: list[float], true: list[float]) -> None:
    assert magnitude(new, true) == -magnitude(true, new)
    if magnitude(new, true) > 0:
        assert prefers(new, true)


def test_accuracies() -> None:
    assert all_correct([3, 4], [3, 4])
    assert not all_correct([3, 5], [3, 4])
    assert token_accuracy([3, 5], [3, 4]) == 0.5
    assert agreement([7, 5, 1], [7, 2, 1]) == pytest.approx(2 / 3)


@pytest.mark.parametrize("measure", [all_correct, token_accuracy])
def test_no_tokens_are_an_error_rather_than_a_perfect_score(measure: object) -> None:
    with pytest.raises(ValueError, match="at least one"):
        measure([], [])  # type: ignore[operator]
    with pytest.raises(ValueError, match="found 1 and 2"):
        measure([1], [1, 2])  # type: ignore[operator]


def test_score_is_undefined_where_a_part_is_and_zero_where_a_part_is_zero() -> None:
    assert harmonic_mean([1.0, 0.5, 0.5]) == pytest.approx(0.6)
    assert harmonic_mean([1.0, None, 0.5]) is None
    assert harmonic_mean([1.0, 0.0, 0.5]) == 0.0
    assert harmonic_mean([]) is None


def test_means_are_taken_within_an_edit_first_and_count_only_what_was_measured() -> None:
    mean = Mean.over([[1.0, 1.0, 1.0, 1.0], [0.0], []])
    assert (mean.value, mean.edits, mean.prompts) == (0.5, 2, 5)
    assert Mean.over([[], []]) == Mean(value=None, edits=0, prompts=0)
