"""What a report says of C: its rank, and how much more tokens would change it, compared with what they did change."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from errata.editors.d4s.moments import Moments, MomentSum, PooledSum
from errata.editors.d4s.spectrum import LayerSpectrum, MomentsReport, measure_rank
from errata.edits import digest_of
from errata.errors import EditorError, FormatError

WIDTH = 24
REPORT = MomentsReport(tokens=400, shards=4, layers=(LayerSpectrum(layer=1, width=4, rank=4, effective_rank=4.0, noise=2.0),))


def draw_shard(rng: torch.Generator, passages: int, length: int = 10) -> MomentSum:
    """Tokens of one passage are alike, as they are in text, and all have a mean that is not zero."""
    scale = torch.logspace(0, -1.5, WIDTH, dtype=torch.float64)
    topics = torch.randn(passages, 1, WIDTH, dtype=torch.float64, generator=rng)
    tokens = torch.randn(passages, length, WIDTH, dtype=torch.float64, generator=rng)
    keys = ((1.0 * topics + tokens) * scale + 0.3).flatten(0, 1)
    return MomentSum("base", 1, len(keys), keys.T @ keys)


def report_of(pooled: PooledSum) -> MomentsReport:
    return MomentsReport(tokens=pooled.tokens, shards=pooled.shards, layers=(pooled.describe(1),))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("passages", "more"), [(40, 40), (40, 400), (300, 30)])
def test_the_predicted_change_is_the_change_within_a_factor_of_two(seed: int, passages: int, more: int) -> None:
    """`more` passages besides 8 shards of `passages`. Without regard to likeness within a passage it would be too low threefold."""
    rng = torch.Generator().manual_seed(seed)
    parts = [draw_shard(rng, passages) for _ in range(8)]
    pooled = PooledSum.pool(parts)
    before = pooled.mean
    late = draw_shard(rng, more * 8)
    predicted = report_of(pooled).predict_change(late.tokens)
    pooled.add(late)
    actual = float((pooled.mean - before).norm() / before.norm())
    assert predicted is not None and actual / 2 < predicted < actual * 2


@pytest.mark.parametrize("seed", range(4))
def test_enough_tokens_are_enough(seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    first = report_of(PooledSum.pool(draw_shard(rng, 40) for _ in range(8)))
    enough = first.count_enough(0.02)
    assert enough is not None and enough > first.tokens
    again = PooledSum.pool(draw_shard(rng, math.ceil(enough / 80)) for _ in range(8))
    truth = PooledSum.pool(draw_shard(rng, 20_000) for _ in range(2)).mean
    error = float((again.mean - truth).norm() / truth.norm())
    assert 0.01 < error < 0.04
    estimated = report_of(again).estimate_error()
    assert estimated is not None and error / 2 < estimated < error * 2


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(1, 30), min_size=2, max_size=6), seed=st.integers(0, 100))
def test_the_running_scatter_is_the_plain_one(sizes: list[int], seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    parts = [draw_shard(rng, size) for size in sizes]
    pooled = PooledSum.pool(parts)
    mean = sum((part.total for part in parts), torch.zeros(WIDTH, WIDTH)) / sum(part.tokens for part in parts)
    assert torch.allclose(pooled.mean, mean, rtol=1e-12)
    scatter = sum(part.tokens * float((part.total / part.tokens - mean).norm()) ** 2 for part in parts)
    assert pooled.describe(1).noise == pytest.approx(math.sqrt(scatter / (len(parts) - 1)) / float(mean.norm()), rel=1e-9)


def test_pooling_leaves_the_parts_as_they_are() -> None:
    rng = torch.Generator().manual_seed(0)
    parts = [draw_shard(rng, 5) for _ in range(3)]
    before = [part.total.clone() for part in parts]
    assert torch.equal(PooledSum.pool(parts).mean, PooledSum.pool(parts).mean)
    assert all(torch.equal(part.total, total) for part, total in zip(parts, before, strict=True))


def test_one_shard_says_nothing_of_convergence() -> None:
    report = report_of(PooledSum.pool([draw_shard(torch.Generator().manual_seed(0), 5)]))
    assert (report.predict_change(100), report.estimate_error(), report.count_enough(0.01)) == (None, None, None)


def test_ranks() -> None:
    assert measure_rank(torch.eye(6, dtype=torch.float64)) == (6, pytest.approx(6.0))
    flat = torch.diag(torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0], dtype=torch.float64))
    assert measure_rank(flat) == (3, pytest.approx(3.0))
    rank, effective = measure_rank(torch.diag(torch.tensor([1.0, 1e-3, 1e-6], dtype=torch.float64)))
    assert rank == 3 and 1.0 < effective < 1.02


@pytest.mark.parametrize("passages", [1, 4])
def test_fewer_tokens_than_width_are_noticed(passages: int) -> None:
    report = report_of(PooledSum.pool([draw_shard(torch.Generator().manual_seed(0), passages)]))
    assert report.singular == ((1,) if passages == 1 else ())


@pytest.mark.parametrize("total", [torch.full((3, 3), torch.nan), torch.zeros(3, 3)])
def test_sums_that_cannot_be_are_refused(total: torch.Tensor) -> None:
    with pytest.raises(EditorError, match="finite activations"):
        PooledSum.pool([MomentSum("base", 1, 3, total.double())]).describe(1)


def test_nothing_pooled_has_no_mean() -> None:
    with pytest.raises(EditorError, match="found no tokens"):
        _ = PooledSum().mean


def test_sums_and_reports_are_read_as_they_were_stored() -> None:
    part = draw_shard(torch.Generator().manual_seed(0), 3)
    again = MomentSum.from_bytes(part.to_bytes())
    assert (again.base, again.layer, again.tokens, again.total.dtype) == ("base", 1, 30, torch.float64)
    assert torch.equal(again.total.triu(), part.total.triu()) and torch.equal(again.total, again.total.T)
    assert len(part.to_bytes()) < 0.6 * 8 * WIDTH**2 + 500
    moments = Moments("base", "corpus", 0, 400, {1: torch.eye(4)}, REPORT)
    assert Moments.from_bytes(moments.to_bytes()).report == REPORT
    with pytest.raises(FormatError, match="moment_sum"):
        MomentSum.from_bytes(moments.to_bytes())


def test_moments_without_a_report_keep_their_bytes() -> None:
    """As they were written before there were reports: streams name them by digest."""
    old = Moments("b" * 64, "corpus", 3, 17, {1: torch.eye(2), 4: torch.ones(2, 2)})
    assert digest_of(old.to_bytes()) == "b2fea927f1d741b1f33035c06d7c60f3c3926da36b6e53063693b1bed4d11931"
    again = Moments.from_bytes(old.to_bytes())
    assert (again.tokens, again.report) == (17, None)
    assert torch.equal(again.c[4], torch.ones(2, 2))
