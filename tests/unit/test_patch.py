"""Artifacts go on a base for the length of a block and come off bit for bit."""

from collections.abc import Callable

import pytest
import torch

from errata.editors.artifacts import WeightDelta
from errata.errors import BaseMismatchError, EditorError
from errata.modeling.loading import Base, digest_model
from errata.modeling.patch import attach


def make_delta(base: Base, *, scale: float = 0.1, layers: tuple[int, ...] = (1, 2), digest: str | None = None) -> WeightDelta:
    generator = torch.Generator().manual_seed(0)
    deltas = {}
    for layer in layers:
        shape = base.layout.read_weight(base.model, layer).shape
        deltas[base.layout.weight_name(layer)] = scale * torch.randn(*shape, generator=generator)
    return WeightDelta(digest or base.digest, deltas)


@pytest.fixture(params=["tiny_gpt2", "tiny_llama"])
def base(request: pytest.FixtureRequest) -> Base:
    return request.getfixturevalue(request.param)


def current(base: Base) -> str:
    return digest_model(base.model, base.tokenizer)


def test_while_attached_the_weight_is_the_sum(base: Base) -> None:
    artifact = make_delta(base)
    before = {layer: base.layout.read_weight(base.model, layer).clone() for layer in (1, 2)}
    with attach(base, [artifact]):
        for layer, weight in before.items():
            expected = weight.double() + artifact.deltas[base.layout.weight_name(layer)].double()
            assert torch.equal(base.layout.read_weight(base.model, layer), expected.float())
        assert current(base) != base.digest
    assert current(base) == base.digest


def test_it_is_restored_after_an_error(base: Base) -> None:
    with pytest.raises(KeyError), attach(base, [make_delta(base)]):
        raise KeyError
    assert current(base) == base.digest
    with attach(base, [make_delta(base)]):
        assert current(base) != base.digest
    assert current(base) == base.digest


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_other_dtypes_are_restored_and_rounded_once(gpt2_of: Callable[..., Base], dtype: str) -> None:
    base = gpt2_of(dtype=dtype)
    artifact = make_delta(base, scale=0.3)
    original = base.layout.read_weight(base.model, 1).clone()
    with attach(base, [artifact]):
        weight = base.layout.read_weight(base.model, 1)
        assert weight.dtype == original.dtype == getattr(torch, dtype)
        assert torch.equal(weight, (original.double() + artifact.deltas[base.layout.weight_name(1)].double()).to(weight.dtype))
        base.model(input_ids=torch.tensor([[3, 5, 7]]))
    # W + Δ − Δ in 16 bits would not come back: this does.
    assert current(base) == base.digest
    assert torch.equal(base.layout.read_weight(base.model, 1), original)


def test_a_second_delta_on_the_same_weight_is_refused(base: Base) -> None:
    first, second, apart = make_delta(base), make_delta(base, layers=(2,)), make_delta(base, layers=(0,))
    with attach(base, [first]):
        edited = current(base)
        with pytest.raises(BaseMismatchError, match="carries a delta already"), attach(base, [second]):
            pytest.fail("attached twice")
        assert current(base) == edited
        with attach(base, [apart]):
            pass
        assert current(base) == edited
    assert current(base) == base.digest
    # Refused within one list as well: the first of the two comes off again.
    with pytest.raises(BaseMismatchError), attach(base, [first, second]):
        pytest.fail("attached twice")
    assert current(base) == base.digest


def test_an_artifact_of_another_base_is_refused(base: Base, gpt2_of: Callable[..., Base]) -> None:
    stranger = make_delta(base, digest=gpt2_of(seed=9).digest)
    for artifacts in ([stranger], [make_delta(base), stranger]):
        with pytest.raises(BaseMismatchError, match="artifact is for the base"), attach(base, artifacts):
            pytest.fail("attached to another base")
        assert current(base) == base.digest


def test_a_delta_of_another_shape_is_refused(base: Base) -> None:
    name = base.layout.weight_name(1)
    square = WeightDelta(base.digest, {name: torch.ones(2, 2)})
    with pytest.raises(BaseMismatchError, match=r"expected a delta of shape .* found \[2, 2\]"), attach(base, [square]):
        pytest.fail("attached a delta that does not fit")
    assert current(base) == base.digest


def test_what_is_not_finite_is_refused_before_any_weight_changes(gpt2_of: Callable[..., Base]) -> None:
    base = gpt2_of(dtype="float16")
    good = make_delta(base, layers=(1,))
    for huge in (1e6, float("nan")):
        deltas = {**good.deltas, base.layout.weight_name(2): torch.full(tuple(base.layout.read_weight(base.model, 2).shape), huge)}
        with pytest.raises(EditorError, match="not finite"), attach(base, [WeightDelta(base.digest, deltas)]):
            pytest.fail("attached")
        assert current(base) == base.digest
