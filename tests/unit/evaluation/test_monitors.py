"""Norms against plain linear algebra, locality against plain distributions, and a plot that can be read."""

from pathlib import Path

import pytest
import torch
from matplotlib.image import imread

from errata.editors.artifacts import WeightDelta
from errata.modeling.loading import Base
from errata.modeling.patch import attach
from errata.modeling.trace import change_output
from errata.monitors.forgetting import AGES, Remembered, plot_retention, summarise_age
from errata.monitors.locality import find_perplexity, measure_locality, read_probe
from errata.monitors.norms import NormPoint, measure_norms, plot_norms, spectral_norm
from errata.report import WeightNorms


def random_delta(base: Base, layer: int, scale: float) -> dict[str, torch.Tensor]:
    shape = base.layout.read_weight(base.model, layer).shape
    return {base.layout.weight_name(layer): scale * torch.randn(shape, generator=torch.Generator().manual_seed(layer))}


def test_norms_equal_plain_linear_algebra(base: Base) -> None:
    deltas = random_delta(base, 1, 0.5) | random_delta(base, 0, 0.1)
    measured = measure_norms(base, deltas, {base.layout.weight_name(0): 123.0})
    assert [norms.weight for norms in measured] == sorted(deltas)
    for layer, norms in enumerate(measured):
        before, delta = base.layout.read_weight(base.model, layer), deltas[norms.weight]
        assert norms.mean_abs_ratio == pytest.approx(((before + delta).abs().mean() / before.abs().mean()).item(), rel=1e-5)
        assert norms.frobenius_ratio == pytest.approx((torch.linalg.norm(before + delta) / torch.linalg.norm(before)).item(), rel=1e-5)
        assert norms.spectral == pytest.approx(torch.linalg.matrix_norm(delta, 2).item(), rel=1e-3)
        assert norms.spectral_ratio == pytest.approx(norms.spectral / torch.linalg.matrix_norm(before, 2).item(), rel=1e-3)
    assert measured[0].condition == 123.0 and measured[1].condition is None


def test_a_zero_delta_is_the_base(base: Base) -> None:
    (norms,) = measure_norms(base, random_delta(base, 0, 0.0))
    assert (norms.mean_abs_ratio, norms.frobenius_ratio, norms.spectral) == (1.0, 1.0, 0.0)


def test_values_that_are_not_finite_are_none(base: Base) -> None:
    (norms,) = measure_norms(base, random_delta(base, 0, float("inf")), {base.layout.weight_name(0): float("inf")})
    assert norms.mean_abs_ratio is None and norms.spectral is None and norms.condition is None


@pytest.mark.parametrize("shape", [(1, 5), (5, 1), (40, 17), (17, 40)])
def test_spectral_norm(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert spectral_norm(matrix) == pytest.approx(torch.linalg.matrix_norm(matrix, 2).item(), rel=1e-4)


def test_locality_equals_plain_divergence(base: Base) -> None:
    texts = ["Anna Keller lives in Paris.", "It rains."]
    reference = read_probe(base, texts)
    with attach(base, [WeightDelta(base.digest, random_delta(base, 1, 0.2))]):
        locality = measure_locality(base, reference)
        after = [base.model(torch.tensor([base.tokenizer(text).input_ids])).logits[0] for text in texts]
    before = [base.model(torch.tensor([base.tokenizer(text).input_ids])).logits[0] for text in texts]
    p, q = torch.cat(before).log_softmax(-1), torch.cat(after).log_softmax(-1)
    assert locality.positions == len(p)
    assert locality.kl == pytest.approx(torch.nn.functional.kl_div(q, p, reduction="batchmean", log_target=True).item(), rel=1e-4)
    assert locality.agreement == pytest.approx((p.argmax(-1) == q.argmax(-1)).float().mean().item())
    assert locality.kl is not None and locality.kl > 0.01


def test_locality_of_what_is_not_finite_or_not_there(base: Base) -> None:
    reference = read_probe(base, ["It rains."])
    with change_output(base.model.get_submodule(base.layout.norm), lambda hidden: hidden * float("nan")):
        locality = measure_locality(base, reference)
    assert locality.kl is None and locality.agreement == 0.0 and locality.positions == len(reference.logprobs[0])
    assert measure_locality(base, read_probe(base, [])).agreement is None


def test_the_plot_draws_one_line_per_weight(tmp_path: Path) -> None:
    def point(commit: int, live: int, *ratios: float | None) -> NormPoint:
        norms = (
            WeightNorms(weight=f"h.{layer}", mean_abs_ratio=ratio, frobenius_ratio=1, spectral=1, spectral_ratio=1)
            for layer, ratio in enumerate(ratios)
        )
        return NormPoint(commit, live, tuple(norms))

    path = plot_norms([point(2, 40, 1.4, None), point(1, 20, 1.2, 1.1), point(3, 60, 1.5, 1.3)], tmp_path / "new" / "norms.png")
    blank = plot_norms([], tmp_path / "blank.png")
    drawn, empty = imread(path), imread(blank)
    assert drawn.shape == empty.shape and drawn.shape[1] > 900
    assert (drawn[..., :3] < 0.99).any(-1).sum() > 1.5 * (empty[..., :3] < 0.99).any(-1).sum()


def test_perplexity_equals_the_model_s_own_loss(base: Base) -> None:
    texts = ["Anna Keller lives in Paris.", "It rains."]
    losses, counts = [], []
    for text in texts:
        ids = torch.tensor([base.tokenizer(text).input_ids])
        losses.append(base.model(ids, labels=ids).loss.item())
        counts.append(ids.shape[1] - 1)
    expected = torch.tensor(sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)).exp().item()
    assert find_perplexity(read_probe(base, texts)) == pytest.approx(expected, rel=1e-4)
    assert find_perplexity(read_probe(base, [])) is None


def test_ages_cover_every_commit_once() -> None:
    for age in (0, 1, 9, 10, 99, 100, 999, 1_000, 10**6):
        assert sum(item.first <= age and (item.last is None or age <= item.last) for item in AGES) == 1


def test_an_age_compares_immediate_with_retained(tmp_path: Path) -> None:
    sample = [Remembered("a", True, True), Remembered("b", True, False), Remembered("c", None, True), Remembered("d", True, True)]
    found = summarise_age(AGES[1], sample)
    assert (found.age, found.immediate.value, found.immediate.edits, found.retained.value) == ("1-9", 1.0, 3, 0.75)
    assert found.forgotten == ("b",)
    drawn, empty = (imread(plot_retention(ages, tmp_path / "new" / "plot.png")) for ages in ([found], []))
    assert (drawn[..., :3] < 0.99).any(-1).sum() > 1.5 * (empty[..., :3] < 0.99).any(-1).sum()
