"""What is asked of a model, as the ids that it reads. An edit memory puts facts before some prompts; whatever asks goes through here.

A prompt is routed once, by its text alone, before anything is decoded (algorithms.md, resolution N).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from errata.modeling.loading import Base
from errata.modeling.patch import claim_places
from errata.modeling.tokens import encode_prompt

Router = Callable[[Base, Sequence[str], int], Sequence[list[int] | None]]
"""A base, prompts, and the most tokens that may be read → the ids to read for each; None where it is the prompt itself."""

_RESERVE = 32
"""Tokens of the context that are kept for an answer, at least: short answers of whatever length then follow one and the same context. A
quarter of a context that is shorter than four times that."""
_ROUTER = "_errata_router"
"""Attribute of the model itself, so that all views of one model agree."""


@contextmanager
def route_queries(base: Base, router: Router) -> Iterator[None]:
    """Ask `router` what is read for each prompt while the block runs.

    Raises:
        BaseMismatchError: a memory is attached already.
    """
    with claim_places(base, ["an edit memory"], "facts"):
        base.model.__dict__[_ROUTER] = router
        try:
            yield
        finally:
            del base.model.__dict__[_ROUTER]


class Query(NamedTuple):
    """What a model reads for a prompt."""

    ids: list[int]
    routed: bool
    """Facts stand before it."""


def encode_queries(base: Base, prompts: Sequence[str], answer: int) -> list[list[int]]:
    """The ids of `read_queries`, whatever stands before them."""
    return [query.ids for query in read_queries(base, prompts, answer)]


def read_queries(base: Base, prompts: Sequence[str], answer: int) -> list[Query]:
    """What the model reads for each prompt as it is now. A prompt that leaves no room in the context loses its beginning.

    Args:
        answer: tokens that will follow.
    """
    router: Router | None = base.model.__dict__.get(_ROUTER)
    routed = router(base, prompts, find_room(base, answer)) if router and prompts else [None] * len(prompts)
    longest = max(base.context - answer, 1)
    return [
        Query(encode_prompt(base.tokenizer, prompt)[-longest:], False) if ids is None else Query(ids, True)
        for prompt, ids in zip(prompts, routed, strict=True)
    ]


def find_room(base: Base, answer: int = 0) -> int:
    """Tokens that may be read before an answer of so many; the same for all that are short."""
    return max(base.context - max(answer, min(_RESERVE, base.context // 4)), 1)
