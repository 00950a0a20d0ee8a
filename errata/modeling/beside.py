"""What stands beside the MLP of one layer and adds to its output, at the token that the next one is predicted from (iReVa, design §5).

Where that token is, only the body knows, which is given the mask; the MLP is given the hidden states. So the body's forward notes its mask
for the thread it runs in, and the MLP's forward reads it there: a served model answers several threads at once.

Both forwards are replaced on the instance, as accelerate does it, and not hooked: `torch.compile` does not look for hooks on a module that
it has compiled without any, and would go on without them. An instance's own forward it does guard, so a model may be compiled before this
is attached or after, and runs on when it came off. Each attachment is traced anew, without a graph break of ours; beyond
`torch._dynamo.config.recompile_limit` (8) of them on one compiled model, dynamo warns and runs it uncompiled.
"""

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any, Literal

import torch
from torch import nn

from errata.errors import EditorError
from errata.modeling.loading import Base
from errata.modeling.patch import claim_places

Respond = Callable[[torch.Tensor], torch.Tensor]
"""[m, d] inputs of the MLP at the m active positions, in the model's dtype → [m, d] to be added to its output there."""

Forward = Callable[..., Any]

_USERS = "_errata_beside"
"""Attribute of the body: how many layers read its mask now."""
_OWN = "_errata_forward"
"""Attribute of a module whose forward is replaced: the forward it had been given before (by accelerate), None where it has its class's."""


class _Thread(threading.local):
    """What the forward pass of this thread has to know."""

    def __init__(self) -> None:
        # Set here and not on the class: dynamo would guard the class's value and miss that a thread has set its own.
        self.fed: tuple[Any] | None = None
        """The body's attention mask, as it was given; None outside of the body."""
        self.asked: tuple[torch.Tensor, torch.Tensor] | Literal["everywhere"] | None = None
        """Active positions, where they are not the last ones."""


_thread = _Thread()


@contextmanager
def respond_beside(base: Base, layer: int, respond: Respond) -> Iterator[None]:
    """While the block runs, the MLP of `layer` gives mlp(x) + respond(x) at the token that the next one is predicted from: in each row the
    last of the tokens fed that the attention mask [n, past + fed] leaves unmasked; the last one where there is no such mask (a mask of
    four dimensions, or one per kind of layer, as static caches have them, comes with padding on the left). A row without an unmasked token
    gets nothing.

    With a KV cache every decoded position was the last one when it was processed, and what was added there stays in the cached keys and
    values of the layers above. Without a cache (`use_cache=False`) each step runs the earlier positions again, which are not the last any
    more, so that the layers above see them untouched, as in the published code. Answers of several tokens may therefore differ between
    the two unless `layer` is the last one.

    Not covered is what feeds several tokens at once and means each: assisted decoding (only the last of the tokens it verifies is active)
    and a prompt fed in chunks (the last token of each chunk is).

    Args:
        respond: is called once per pass, with one row per row of the batch, and may be differentiated; what it gives is cast to the dtype
            of the model. Whether a row has an unmasked token is decided afterwards, so that nothing waits for the device.

    Raises:
        BaseMismatchError: something stands beside this MLP already.
        UnknownArchitectureError: the model has no such layer.
        EditorError: (by the MLP) it is run outside of the body, where no token is known to be the last.
    """
    mlp, body = base.layout.mlp_of(base.model, layer), base.model.get_submodule(base.layout.body)

    def add(plain: Forward, hidden: torch.Tensor) -> torch.Tensor:
        return _add_response(plain(hidden), hidden, respond)

    with claim_places(base, [f"the MLP of layer {layer}"], "neurons"), _noting_masks(body):
        _replace_forward(mlp, add)
        try:
            yield
        finally:
            _restore_forward(mlp)


@contextmanager
def predict_at(rows: torch.Tensor, places: torch.Tensor) -> Iterator[None]:
    """For measurement with a forced target: the positions (row, place) of the batch fed within the block count as active, instead of the
    last one of each row. With the positions that predict a target, one pass is what decoding it with a KV cache is, up to rounding.

    Holds for the thread that enters it, and for every pass within.

    Args:
        rows, places: [m] int64 indices into the batch [n, positions]; `respond` gets them in order, each once.
    """
    pairs = torch.unique(torch.stack([rows, places]), dim=1)
    with _asking((pairs[0], pairs[1])):
        yield


@contextmanager
def predict_everywhere() -> Iterator[None]:
    """Every position fed within the block counts as active: what decoding the text token by token with a KV cache would do.

    Holds for the thread that enters it.
    """
    with _asking("everywhere"):
        yield


@contextmanager
def _asking(asked: tuple[torch.Tensor, torch.Tensor] | Literal["everywhere"]) -> Iterator[None]:
    before, _thread.asked = _thread.asked, asked
    try:
        yield
    finally:
        _thread.asked = before


def _add_response(output: torch.Tensor, hidden: torch.Tensor, respond: Respond) -> torch.Tensor:
    """`output` [n, q, d] of an MLP with the response to its input `hidden` [n, q, d] added at the active positions."""
    fed, asked = _thread.fed, _thread.asked
    if fed is None:
        raise EditorError("expected an MLP with neurons beside it to run within its model, found it run alone: no token is the last there")
    if asked == "everywhere":
        return output + respond(hidden.flatten(0, 1)).to(output).view_as(output)
    if asked is not None:
        at = (asked[0].to(hidden.device), asked[1].to(hidden.device))
        return output.index_put(at, output[at] + respond(hidden[at]).to(output))
    real = _find_real(hidden, fed[0])
    if hidden.shape[1] == 1:
        return output + torch.where(real, respond(hidden[:, 0]).to(output), 0)[:, None]
    last = torch.where(real, torch.arange(hidden.shape[1], device=hidden.device), -1).amax(1)  # [n]; −1: none
    at = (torch.arange(len(last), device=hidden.device), last.clamp(min=0))
    changed = output[at] + respond(hidden[at]).to(output)
    return output.index_put(at, torch.where((last >= 0)[:, None], changed, output[at]))


def _find_real(hidden: torch.Tensor, mask: Any) -> torch.Tensor:
    """[n, q] which of the tokens fed now are unmasked."""
    if isinstance(mask, torch.Tensor) and mask.dim() == 2:
        return mask[:, -hidden.shape[1] :].to(hidden.device) != 0
    return torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)


@contextmanager
def _noting_masks(body: nn.Module) -> Iterator[None]:
    """The body notes its mask while it runs. Layers share this and may leave in any order."""
    users: int = body.__dict__.get(_USERS, 0)
    if not users:
        place = list(inspect.signature(body.forward).parameters).index("attention_mask")

        def note(plain: Forward, *args: Any, **kwargs: Any) -> Any:
            before, _thread.fed = _thread.fed, (args[place] if len(args) > place else kwargs.get("attention_mask"),)
            try:
                return plain(*args, **kwargs)
            finally:
                _thread.fed = before

        _replace_forward(body, note)
    body.__dict__[_USERS] = users + 1
    try:
        yield
    finally:
        body.__dict__[_USERS] -= 1
        if not body.__dict__[_USERS]:
            del body.__dict__[_USERS]
            _restore_forward(body)


def _replace_forward(module: nn.Module, around: Callable[..., Any]) -> None:
    """From now on a call of the module is `around(forward as it was, *its arguments)`. A deep copy of the module does so with its own
    weights, but for one that has been given a forward before (by accelerate), which belongs to the original."""
    own, plain = module.__dict__.get("forward"), type(module).forward

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return around(own if own is not None else partial(plain, self), *args, **kwargs)

    module.__dict__[_OWN] = own
    module.forward = MethodType(forward, module)


def _restore_forward(module: nn.Module) -> None:
    own = module.__dict__.pop(_OWN)
    if own is None:
        del module.forward
    else:
        module.forward = own
