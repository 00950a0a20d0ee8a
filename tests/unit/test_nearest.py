"""The k nearest facts: exact below a size, grouped by faiss above it, first added first."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from errata.errors import EditorError
from errata.retrieval import nearest
from errata.retrieval.nearest import NearestFacts


def draw_rows(count: int, width: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=1)


def name_rows(count: int, start: int = 0) -> list[str]:
    return [f"fact-{place}" for place in range(start, start + count)]


def rank_slowly(live: dict[str, torch.Tensor], query: torch.Tensor, k: int) -> list[str]:
    """Float64, stable: of equal scores the first one."""
    scores = {id: float((row.double() * query.double()).sum().float()) for id, row in live.items()}
    return sorted(scores, key=lambda id: -scores[id])[:k]


@settings(max_examples=40, deadline=None)
@given(
    steps=st.lists(st.tuples(st.sampled_from(["add", "remove"]), st.integers(1, 12)), min_size=1, max_size=8),
    seed=st.integers(0, 1_000),
    k=st.integers(1, 9),
)
def test_what_is_found_is_what_a_plain_ranking_finds(steps: list[tuple[str, int]], seed: int, k: int) -> None:
    index, live, made = NearestFacts("cpu"), {}, 0
    pool = draw_rows(6, seed=seed)  # few rows, so that many facts are equal
    chance = np.random.default_rng(seed)
    for step, count in steps:
        if step == "add":
            rows, ids = pool[chance.integers(len(pool), size=count)], name_rows(count, made)
            index.add(ids, rows)
            live |= zip(ids, rows, strict=True)
            made += count
        else:
            gone = [id for id in live if chance.random() < count / 12]
            index.remove(gone)
            live = {id: row for id, row in live.items() if id not in gone}
        queries = draw_rows(3, seed=seed + 1)
        scores, ids = index.search(queries, k)
        assert len(index) == len(live) and scores.shape == (3, min(k, len(live)))
        assert ids == [rank_slowly(live, query, k) for query in queries]


def test_of_equal_facts_the_one_added_first_wins() -> None:
    index, row = NearestFacts("cpu"), draw_rows(1)
    index.add(name_rows(300), row.repeat(300, 1).numpy())
    assert index.search(row, 3)[1] == [["fact-0", "fact-1", "fact-2"]]
    index.remove(["fact-1"])
    index.add(["fact-1"], row)
    scores, ids = index.search(row.double(), 300)
    assert ids[0][:2] == ["fact-0", "fact-2"] and ids[0][-1] == "fact-1"
    torch.testing.assert_close(scores, torch.ones(1, 300))


def test_what_is_removed_is_overwritten() -> None:
    index = NearestFacts("cpu")
    index.add(name_rows(4), draw_rows(4))
    index.remove(["fact-2", "nobody"])
    assert not index._rows[2].any() and "fact-2" not in index._ids  # no other way to see what is kept
    index.remove(name_rows(4))
    assert not len(index) and index.search(draw_rows(2), 5)[1] == [[], []]
    index.add(["new"], draw_rows(1, width=8))
    assert index.search(draw_rows(1, width=8), 5)[1] == [["new"]]


def test_above_a_size_faiss_answers_and_the_near_ones_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearest, "CELLS_FROM", 3_000)
    grouped, rows = NearestFacts("cpu"), draw_rows(4_000, 32)
    grouped.add(name_rows(2_000), rows[:2_000])
    assert grouped._cells is None
    grouped.add(name_rows(1_500, 2_000), rows[2_000:3_500])
    assert grouped._cells is not None
    grouped.add(name_rows(500, 3_500), rows[3_500:])  # to the centres that are there
    gone = name_rows(4_000)[::7]
    grouped.remove(gone)
    live = {id: row for id, row in zip(name_rows(4_000), rows, strict=True) if id not in set(gone)}
    queries = torch.nn.functional.normalize(rows[:60] + 0.3 * draw_rows(60, 32, seed=5), dim=1)
    scores, ids = grouped.search(queries, 12)
    exact = [rank_slowly(live, query, 12) for query in queries]
    assert [found[0] for found in ids] == [right[0] for right in exact]
    # Directions at random are the hardest case: nothing groups them.
    assert np.mean([len(set(found) & set(right)) / 12 for found, right in zip(ids, exact, strict=True)]) > 0.8
    assert not {id for found in ids for id in found} & set(gone)
    assert bool((scores[:, :-1] >= scores[:, 1:]).all())
    # Asked for more than the groups that are read hold, it compares everything.
    assert len(grouped.search(queries[:1], len(live))[1][0]) == len(live)
    # Half of all removed: the room is given back, and below the size all rows are compared.
    grouped.remove(name_rows(2_500))
    assert grouped._cells is None and grouped.search(rows[3_001:3_002], 1)[1] == [["fact-3001"]]


@pytest.mark.parametrize(
    ("ids", "rows", "message"),
    [
        (["a"], draw_rows(2), "a vector for each of 1 facts, found 2"),
        (["a", "a"], draw_rows(2), "expected new ids"),
        (["old"], draw_rows(1), "expected new ids"),
        (["a"], draw_rows(1, 8), r"shape \[n, 16\], found \[1, 8\]"),
        (["a"], torch.full((1, 16), torch.nan), "expected finite vectors"),
        (["a"], torch.ones(16), "expected vectors of shape"),
    ],
)
def test_bad_facts_are_refused_and_nothing_changes(ids: list[str], rows: torch.Tensor, message: str) -> None:
    index = NearestFacts("cpu")
    index.add(["old"], draw_rows(1))
    with pytest.raises(EditorError, match=message):
        index.add(ids, rows)
    assert index.search(draw_rows(1), 9)[1] == [["old"]]
    with pytest.raises(EditorError, match="k of at least 1"):
        index.search(draw_rows(1), 0)
    with pytest.raises(EditorError, match="expected vectors of shape"):
        index.search(draw_rows(1, 8), 1)
