"""Which neuron a query activates: the same row and the same score from every form, and of equal keys the first."""

import importlib.util

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.neuron_lookup import draw_keys, draw_queries
from errata.errors import EditorError
from errata.retrieval import index as index_module
from errata.retrieval.index import CELLS_FROM, HALF_FROM, KeyIndex, choose_form

CPU = torch.device("cpu")
WIDTH = 96
needs_faiss = pytest.mark.skipif(importlib.util.find_spec("faiss") is None, reason="faiss is not installed: pip install 'errata[cpu]'")
EXACT = ("product", "half")
EVERY = (*EXACT, pytest.param("cells", marks=needs_faiss))


def standardise(rows: torch.Tensor) -> torch.Tensor:
    return (rows - rows.mean(dim=-1, keepdim=True)) / rows.std(dim=-1, keepdim=True)


def draw(count: int, seed: int, width: int = WIDTH) -> torch.Tensor:
    return standardise(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)))


def find_plainly(keys: torch.Tensor, queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Every product in float64, one key at a time; scores as float32, of equal ones the first row."""
    exact = torch.stack([(keys.double() * query.double()).sum(dim=1) for query in queries]).float()
    best = exact.amax(dim=1)
    return best, torch.tensor([int((row == top).nonzero()[0]) for row, top in zip(exact, best, strict=True)])


def assert_found(index: KeyIndex, queries: torch.Tensor, scores: torch.Tensor, rows: torch.Tensor) -> None:
    """All at once, and one by one: `half` answers only single queries by itself."""
    found, places = index.find_best(queries)
    alone = [index.find_best(query[None]) for query in queries]
    assert [int(row) for _, row in alone] == rows.tolist()
    assert [float(score) for score, _ in alone] == scores.tolist()
    assert found.dtype == torch.float32 and places.dtype == torch.int64
    assert places.tolist() == rows.tolist()
    assert found.tolist() == scores.tolist()


@pytest.mark.parametrize("form", EXACT)
@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 300), asked=st.integers(1, 6), spread=st.sampled_from([1.0, 1e-2, 1e-4, 0.0]))
def test_the_row_of_the_plain_product(form: index_module.Form, seed: int, count: int, asked: int, spread: float) -> None:
    """From keys in all directions to keys that differ by less than float16 or float32 products tell, and equal ones."""
    keys = draw(1, seed) + spread * draw(count, seed + 1)
    queries = torch.cat([keys[:1], draw(asked, seed + 2)])[:asked]
    if spread == 1e-4:
        keys = keys[:16]  # as many as are told apart where float32 cannot
    assert_found(KeyIndex(keys, form), queries, *find_plainly(keys, queries))


@pytest.mark.parametrize("form", EVERY)
@pytest.mark.parametrize("near", [1e-2, 1e-3, 1e-4, 1e-5])
def test_near_duplicates_are_told_apart(form: index_module.Form, near: float) -> None:
    """Six keys around each query, `near` of its length away: float16 alone mistakes them for each other from 1e-3 on."""
    queries = draw(40, 0, 768)
    keys = torch.cat([draw(2_000, 1, 768)] + [standardise(queries + near * draw(40, 2 + copy, 768)) for copy in range(6)])
    scores, rows = find_plainly(keys, queries)
    assert (rows >= 2_000).all()
    index = KeyIndex(keys, form)
    assert_found(index, queries, scores, rows)


@pytest.mark.parametrize("form", EVERY)
def test_of_equal_keys_the_first_wins(form: index_module.Form) -> None:
    """Wherever they lie: blocked products round the last rows of a matrix in another way than the first."""
    keys = draw(1_003, 3)
    for first, others in ((0, (1_002,)), (17, (500, 1_001)), (998, (999, 1_000))):
        keys[list(others)] = keys[first].clone()
    index = KeyIndex(keys, form)
    for first in (0, 17, 998):
        query = standardise(keys[first] + 0.3 * draw(1, first)[0])[None]
        assert index.find_best(query)[1].tolist() == [first]
        assert index.find_several(query, 2)[1][0, 0] == first


@pytest.mark.parametrize("form", EVERY)
def test_what_lies_within_a_tie_counts_as_equal(form: index_module.Form) -> None:
    """The first row of those answers, however little another one is nearer; what is farther than that is told apart as ever."""
    queries = draw(20, 0)
    width = queries.shape[1] - 1
    for near, first in ((1e-4, True), (0.1, False)):
        # Before each query's own key, one that lies `near` of its length beside it.
        keys = torch.cat([standardise(queries + near * draw(20, 1)), draw(600, 2), queries])
        index = KeyIndex(keys, form, tie=1e-4 * width)
        for asked in (queries, queries[:3], queries[:1]):
            rows = index.find_best(asked)[1].tolist()
            assert rows == [row if first else row + 620 for row in range(len(asked))]


@pytest.mark.parametrize("form", EXACT)
def test_hundreds_of_equal_keys(form: index_module.Form) -> None:
    keys = draw(1, 4).repeat(700, 1)
    index = KeyIndex(keys, form)
    assert index.find_best(keys[:1])[1].tolist() == [0]
    assert index.find_several(-keys[:1], 3)[1].tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("form", EVERY)
def test_one_key_and_no_query(form: index_module.Form) -> None:
    index = KeyIndex(draw(1, 5), form)
    assert index.find_best(draw(3, 6))[1].tolist() == [0, 0, 0]
    assert [part.shape for part in index.find_several(draw(3, 6), 4)] == [(3, 1), (3, 1)]
    assert [part.shape for part in index.find_best(draw(3, 6)[:0])] == [(0,), (0,)]


@pytest.mark.parametrize("form", EVERY)
@pytest.mark.parametrize("count", [1, 5, 200])
def test_the_best_few_in_order(form: index_module.Form, count: int) -> None:
    keys = draw(150, 7)
    keys[149] = keys[3]
    queries = torch.cat([keys[3:4], draw(4, 8)])
    scores, rows = KeyIndex(keys, form).find_several(queries, count)
    for place, query in enumerate(queries):
        exact = (keys.double() * query.double()).sum(dim=1).float()
        order = sorted(range(150), key=lambda row: (-float(exact[row]), row))[:count]
        assert rows[place].tolist() == order
        assert scores[place].tolist() == exact[order].tolist()


@pytest.mark.parametrize("form", EVERY)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_queries_of_any_dtype_are_compared_in_float32(form: index_module.Form, dtype: torch.dtype) -> None:
    keys, queries = draw(300, 9), draw(5, 10).to(dtype)
    assert_found(KeyIndex(keys, form), queries, *find_plainly(keys, queries.float()))


def test_values_beyond_float16() -> None:
    """Halves of such keys, or their products, are infinite or next to nothing, and rule nothing out."""
    for scale in (1e3, 1e6, 1e-3, 1e-5):
        keys, queries = draw(200, 11) * scale, draw(4, 12) * scale
        assert_found(KeyIndex(keys, "half"), queries, *find_plainly(keys, queries))


@pytest.mark.parametrize("form", EVERY)
def test_a_query_that_is_not_a_number_gets_a_score_that_is_none(form: index_module.Form) -> None:
    scores, rows = KeyIndex(draw(50, 13), form).find_best(torch.full((1, WIDTH), float("nan")))
    assert scores.isnan().all() and 0 <= int(rows[0]) < 50


@needs_faiss
def test_cells_find_what_a_query_means() -> None:
    """Keys in clusters, as relations are; hits of cosine .8 to .98. Of misses one in a hundred may get another row as far away."""
    keys = draw_keys(6_000, width=256, seed=0)
    plain, cells = KeyIndex(keys, "product"), KeyIndex(keys, "cells")
    for name, queries in draw_queries(keys, 200, seed=1).items():
        scores, rows = plain.find_best(queries)
        found, places = cells.find_best(queries)
        if name.startswith("hit"):
            assert places.tolist() == rows.tolist() and found.tolist() == scores.tolist(), name
        else:
            assert (places == rows).float().mean() >= 0.99, name
            assert (found <= scores).all(), name


@needs_faiss
def test_cells_are_the_same_each_time() -> None:
    keys, queries = draw(3_000, 14), draw(50, 15)
    first, second = (KeyIndex(keys, "cells").find_best(queries) for _ in range(2))
    assert first[0].tolist() == second[0].tolist() and first[1].tolist() == second[1].tolist()


def test_the_product_is_one_graph() -> None:
    index, queries = KeyIndex(draw(200, 16), "product"), draw(3, 17)
    compiled = torch.compile(index.find_best, fullgraph=True, backend="aot_eager")
    assert compiled(queries)[1].tolist() == index.find_best(queries)[1].tolist()


@pytest.mark.parametrize("form", ["half", pytest.param("cells", marks=needs_faiss)])
def test_the_other_forms_answer_in_a_compiled_function(form: index_module.Form) -> None:
    index, queries = KeyIndex(draw(200, 18), form), draw(1, 19)
    scores, rows = torch.compile(lambda states: index.find_best(states * 2), backend="aot_eager")(queries)
    assert rows.tolist() == index.find_best(queries * 2)[1].tolist()


def test_no_gradient_flows() -> None:
    for form in EXACT:
        assert not KeyIndex(draw(50, 20).requires_grad_(), form).find_best(draw(2, 21).requires_grad_())[0].requires_grad


def test_the_form_follows_the_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    assert [choose_form(count, CPU) for count in (1, HALF_FROM, CELLS_FROM)] == ["product", "half", "cells"]
    assert choose_form(CELLS_FROM, torch.device("cuda")) == "product"
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert choose_form(CELLS_FROM, CPU) == "half"
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert choose_form(CELLS_FROM, CPU) == "product"


def test_without_faiss_the_form_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(EditorError, match="expected faiss .* found no faiss"):
        KeyIndex(draw(5, 22), "cells")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (torch.empty(0, 4), r"at least one row .* found shape \[0, 4\]"),
        (torch.ones(4), r"found shape \[4\]"),
        (torch.tensor([[1.0, 2.0], [1.0, float("nan")]]), "finite values, found others in row 1"),
    ],
)
def test_keys_that_are_none(keys: torch.Tensor, message: str) -> None:
    with pytest.raises(EditorError, match=message):
        KeyIndex(keys)


def test_questions_that_are_none() -> None:
    index = KeyIndex(draw(3, 23))
    for queries in (torch.ones(2, WIDTH + 1), torch.ones(WIDTH)):
        with pytest.raises(EditorError, match=rf"expected queries of shape \[n, {WIDTH}\], found"):
            index.find_best(queries)
    with pytest.raises(EditorError, match="count of at least 1, found 0"):
        index.find_several(draw(1, 24), 0)
