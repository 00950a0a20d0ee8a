"""Places follow from a trace."""

import pytest

from errata.calibration.places import Place, propose_places
from errata.calibration.tracing import Trace
from errata.profiles import Site


def make_trace(subject: tuple[float, ...], prompt: tuple[float, ...]) -> Trace:
    return Trace(facts=20, draws=3, clean=1.0, corrupted=0.0, restored={"subject_last": subject, "prompt_last": prompt})


EARLY = make_trace((0.95, 0.95, 0.94, 0.7, 0.1), (0.0, 0.0, 0.1, 0.7, 1.0))
"""The built-in base's own."""
LATE = make_trace((0.2, 0.2, 0.1, 0.1, 0.0, 0.0), (0.0, 0.1, 0.6, 0.8, 0.9, 1.0))


def test_layers_end_where_the_subject_still_carries_the_fact() -> None:
    places = propose_places(5, EARLY, None)
    assert places[0] == Place("subject_last", (1, 2))
    assert places[-1] == Place("prompt_last", (3,)) or places[-1] == Place("prompt_last", (2, 3))
    assert len(places) == len(set(places)) <= 8


def test_a_subject_that_carries_nothing_leaves_the_end_of_the_prompt() -> None:
    places = propose_places(6, LATE, None)
    assert {place.site for place in places} == {"prompt_last"}
    assert places[0].layers[-1] == 2, "the first layer to which the fact has come"


def test_published_layers_come_first() -> None:
    assert propose_places(32, None, tuple(range(4, 9)))[0] == Place("subject_last", (4, 5, 6, 7, 8))
    assert propose_places(5, EARLY, (0,))[:2] == [Place("subject_last", (0,)), Place("subject_last", (1, 2))]


@pytest.mark.parametrize("depth", [2, 3, 5, 12, 32, 80])
@pytest.mark.parametrize("site", ["subject_last", "prompt_last", None])
def test_every_place_lies_below_the_last_block(depth: int, site: Site | None) -> None:
    """z acts through the blocks above it: there must be one."""
    strong, weak = tuple(0.9 for _ in range(depth)), tuple(0.0 for _ in range(depth))
    trace = {None: None, "subject_last": make_trace(strong, weak), "prompt_last": make_trace(weak, strong)}[site]
    places = propose_places(depth, trace, None)
    assert places
    for place in places:
        assert list(place.layers) == list(range(place.layers[0], place.layers[-1] + 1))
        assert place.layers[0] >= 0 and place.layers[-1] <= depth - 2


def test_one_block_is_refused() -> None:
    with pytest.raises(ValueError, match="two blocks"):
        propose_places(1, None, None)
