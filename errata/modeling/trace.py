"""Reading what flows through modules. Hooks are removed whatever happens inside the block."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

Capture = Callable[[torch.Tensor], torch.Tensor]


class _EarlyExit(Exception):
    """Raised by the last hook: nothing after it is wanted."""


@contextmanager
def trace_inputs(modules: Mapping[Any, nn.Module], capture: Capture, *, stop: bool = False) -> Iterator[dict[Any, torch.Tensor]]:
    """Collect the first input of each module, as `capture` cuts it.

    Args:
        modules: key → module. Modules run in the order of the model.
        capture: applied to the input [batch, positions, d_in] at once, so that only what is wanted stays in memory.
        stop: end the forward pass after the last module of `modules` has been reached; the `with` body then ends quietly there.

    Yields:
        key → captured tensor, filled while the body runs a forward pass.
    """
    found = _Found(len(modules) if stop else None)

    def hook_for(key: Any) -> Callable[..., None]:
        return lambda _module, args: found.take(key, capture(args[0]))

    with _hooked([module.register_forward_pre_hook(hook_for(key)) for key, module in modules.items()]):
        yield found


@contextmanager
def visit_inputs(modules: Mapping[Any, nn.Module], visit: Callable[[Any, torch.Tensor], None], *, stop: bool = False) -> Iterator[None]:
    """As `trace_inputs`, but keep nothing: `visit` is called with key and input as soon as a module is reached."""
    seen = _Found(len(modules) if stop else None)

    def hook_for(key: Any) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            visit(key, args[0])
            seen.take(key, args[0].new_empty(0))

        return hook

    with _hooked([module.register_forward_pre_hook(hook_for(key)) for key, module in modules.items()]):
        yield


@contextmanager
def capture_outputs(modules: Mapping[Any, nn.Module], *, stop: bool = False) -> Iterator[dict[Any, torch.Tensor]]:
    """Collect the output tensor of each module while the block runs a forward pass.

    Args:
        stop: as in `trace_inputs`.
    """
    found = _Found(len(modules) if stop else None)

    def hook_for(key: Any) -> Callable[..., None]:
        return lambda _module, _args, output: found.take(key, output[0] if isinstance(output, tuple) else output)

    with _hooked([module.register_forward_hook(hook_for(key)) for key, module in modules.items()]):
        yield found


@contextmanager
def change_output(module: nn.Module, change: Capture) -> Iterator[None]:
    """Replace the module's output tensor by `change(output)` while the block runs."""

    def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, tuple):
            return (change(output[0]), *output[1:])
        return change(output)

    with _hooked([module.register_forward_hook(hook)]):
        yield


@contextmanager
def run_at(module: nn.Module, places: torch.Tensor) -> Iterator[None]:
    """Run a module that treats every position alone (an MLP) at some positions only; elsewhere its output is zero.

    Args:
        module: takes and returns [batch, positions, d].
        places: [k] indices into the flattened batch · positions, none twice.
    """
    shape: torch.Size

    def gather(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        nonlocal shape
        shape = args[0].shape
        return (args[0].flatten(0, 1).index_select(0, places), *args[1:])

    def scatter(_module: nn.Module, _args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        whole = output.new_zeros(shape[0] * shape[1], output.shape[-1])
        return whole.index_copy(0, places, output).view(*shape[:2], -1)

    with _hooked([module.register_forward_pre_hook(gather), module.register_forward_hook(scatter)]):
        yield


class _Found(dict[Any, torch.Tensor]):
    """Tensors by key; taking the last of `wanted` ends the forward pass."""

    def __init__(self, wanted: int | None) -> None:
        super().__init__()
        self._wanted = wanted

    def take(self, key: Any, tensor: torch.Tensor) -> None:
        self[key] = tensor
        if len(self) == self._wanted:
            raise _EarlyExit


@contextmanager
def _hooked(handles: Sequence[RemovableHandle]) -> Iterator[None]:
    try:
        yield
    except _EarlyExit:
        pass
    finally:
        for handle in handles:
            handle.remove()
