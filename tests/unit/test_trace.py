"""Hooks read and change what flows through modules, and are gone afterwards whatever happened."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import nn

from errata.modeling.trace import capture_outputs, change_output, run_at, trace_inputs


class Twice(nn.Module):
    """Returns a tuple, as attention modules do."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, str]:
        return 2 * x, "kept"


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(3, 3), Twice(), nn.Linear(3, 2)
        self.ran_to_the_end = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        doubled, word = self.second(self.first(x))
        assert word == "kept"
        y: torch.Tensor = self.third(doubled)
        self.ran_to_the_end = True
        return y


@pytest.fixture
def chain() -> Chain:
    torch.manual_seed(0)
    return Chain()


def count_hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


WAYS: dict[str, Callable[[Chain], AbstractContextManager[object]]] = {
    "trace_inputs": lambda chain: trace_inputs({1: chain.first, 2: chain.third}, torch.clone),
    "capture_outputs": lambda chain: capture_outputs({1: chain.first, 2: chain.second}),
    "change_output": lambda chain: change_output(chain.second, torch.clone),
    "run_at": lambda chain: run_at(chain.first, torch.tensor([0])),
}


@pytest.mark.parametrize("way", WAYS)
def test_hooks_are_removed_after_use_and_after_an_error(chain: Chain, way: str) -> None:
    x = torch.randn(1, 2, 3)
    plain = chain(x)
    with WAYS[way](chain):
        assert count_hooks(chain) > 0
        chain(x)
    assert count_hooks(chain) == 0
    with pytest.raises(KeyError), WAYS[way](chain):
        raise KeyError
    # An error inside the forward pass itself: a wrong width.
    with pytest.raises(RuntimeError), WAYS[way](chain):
        chain(torch.randn(1, 2, 4))
    assert count_hooks(chain) == 0
    assert torch.equal(chain(x), plain)


def test_inputs_and_outputs_are_what_flows(chain: Chain) -> None:
    x = torch.randn(1, 2, 3)
    with (
        trace_inputs({"in": chain.third}, lambda inputs: inputs[0, 1]) as inputs,
        capture_outputs({"a": chain.first, "b": chain.second}) as outputs,
    ):
        chain(x)
    assert torch.equal(outputs["a"], chain.first(x))
    assert torch.equal(outputs["b"], 2 * chain.first(x))
    assert torch.equal(inputs["in"], 2 * chain.first(x)[0, 1])


def test_stopping_early_skips_what_follows(chain: Chain) -> None:
    x = torch.randn(1, 2, 3)
    for stopping in (trace_inputs({1: chain.first}, torch.clone, stop=True), capture_outputs({1: chain.first}, stop=True)):
        after = False
        with stopping as found:
            chain(x)
            after = True
        assert (chain.ran_to_the_end, after) == (False, False)
        assert set(found) == {1}
        assert count_hooks(chain) == 0


def test_change_output_keeps_the_rest_of_a_tuple(chain: Chain) -> None:
    x = torch.randn(1, 2, 3)
    with change_output(chain.second, lambda hidden: hidden + 1):
        changed = chain(x)
    assert torch.allclose(changed, chain.third(2 * chain.first(x) + 1))


def test_run_at_is_the_module_there_and_zero_elsewhere_with_gradients() -> None:
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(3, 5), nn.GELU(), nn.Linear(5, 3))
    x = torch.randn(2, 4, 3, requires_grad=True)
    places = torch.tensor([0, 2, 5])
    seen = []
    handle = mlp[0].register_forward_pre_hook(lambda _module, args: seen.append(tuple(args[0].shape)))
    with run_at(mlp, places):
        some = mlp(x)
    handle.remove()
    assert seen == [(3, 3)]
    whole = mlp(x)
    kept = torch.zeros(2, 4, dtype=torch.bool)
    kept.view(-1)[places] = True
    assert torch.allclose(some[kept], whole[kept])
    assert not some[~kept].any()
    (found,) = torch.autograd.grad(some.square().sum(), x)
    (expected,) = torch.autograd.grad(whole[kept].square().sum(), x)
    assert torch.allclose(found, expected, atol=1e-6)
    with run_at(mlp, places[:0]):
        assert not mlp(x).any()
