"""Putting artifacts on a base model for the length of a block, and taking them off bit for bit."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Protocol

import torch

from errata.errors import BaseMismatchError, EditorError
from errata.modeling.loading import Base
from errata.modeling.offload import read_parameter, restore_parameter, swap_parameter

_EDITED = "_errata_edited"
"""Attribute of the model itself, so that all views of one model agree: what of it carries something now (weights by name, an MLP)."""


class Attachable(Protocol):
    """What can be put on a base: of an artifact, all that a model has to know."""

    @property
    def base(self) -> str:
        """Digest of the base that it may be put on."""
        ...

    @property
    def deltas(self) -> Mapping[str, torch.Tensor]:
        """Parameter name → what is added to it [d_out, d_in]; empty where every weight stays as it is."""
        ...

    def attach(self, base: Base) -> AbstractContextManager[None]: ...


@contextmanager
def attach(base: Base, artifacts: Sequence[Attachable]) -> Iterator[None]:
    """Apply artifacts to the base, in order, while the block runs.

    Raises:
        BaseMismatchError: an artifact is for other weights; an edited model is not a base.
    """
    with ExitStack() as stack:
        for artifact in artifacts:
            if artifact.base != base.digest:
                raise BaseMismatchError(f"artifact is for the base {artifact.base[:12]}, this model is {base.digest[:12]}")
            stack.enter_context(artifact.attach(base))
        yield


def require_untouched(base: Base) -> None:
    """Raises BaseMismatchError while an artifact is attached: what is read from the model now is not what the base says."""
    if edited := base.model.__dict__.get(_EDITED):
        raise BaseMismatchError(f"expected the untouched base, found an artifact on {sorted(edited)[0]}; take it off first")


@contextmanager
def claim_places(base: Base, places: Collection[str], what: str) -> Iterator[None]:
    """Places of the model that carry `what` while the block runs, each once.

    Raises:
        BaseMismatchError: one of them carries something already.
    """
    edited: set[str] = base.model.__dict__.setdefault(_EDITED, set())
    if taken := edited.intersection(places):
        raise BaseMismatchError(f"{sorted(taken)[0]} carries {what} already; one artifact holds all edits and is attached to the base once")
    edited.update(places)
    try:
        yield
    finally:
        edited.difference_update(places)


@contextmanager
def add_deltas(base: Base, deltas: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """`W = W0 + Δ` while the block runs, never `W + Δ` on an edited weight.

    New weights are computed aside (float64, cast once to the model's dtype), checked finite, and only then put in place. The original
    tensors are kept and put back, so that the base is the same to the bit afterwards.

    Args:
        deltas: parameter name → [d_out, d_in].

    Raises:
        BaseMismatchError: a weight carries a delta already, or a delta has another shape.
        EditorError: a sum is not finite in the model's dtype.
    """
    with claim_places(base, deltas, "a delta"):
        totals = {name: _add(base, name, delta) for name, delta in deltas.items()}
        originals: dict[str, Any] = {}
        try:
            for name, weight in totals.items():
                originals[name] = swap_parameter(base.model, name, weight)
            yield
        finally:
            for name, original in originals.items():
                restore_parameter(base.model, name, original)


def add_once(weight: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    """W0 + Δ in float64, cast once to the weight's dtype."""
    return (weight.double() + change.double()).to(weight.dtype)


def _add(base: Base, name: str, delta: torch.Tensor) -> torch.Tensor:
    weight = read_parameter(base.model, name)
    oriented = base.layout.orient(delta.to(weight.device))
    if oriented.shape != weight.shape:
        raise BaseMismatchError(f"{name}: expected a delta of shape {list(weight.shape)}, found {list(oriented.shape)}")
    total = add_once(weight, oriented)
    if not torch.isfinite(total).all():
        raise EditorError(f"{name}: W0 + Δ is not finite in {weight.dtype}")
    return total.contiguous()
