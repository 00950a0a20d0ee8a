"""The project's own task decorator: retries, persistence and caching are decided here, once.

Nothing is persisted or cached by Prefect: stages pass names and digests, and every result that matters is an object of the stream.
Storage that does not answer is tried again; anything else a second try would meet again.
"""

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.tasks import exponential_backoff

from errata.errors import FormatError, KeyExistsError, KeyMissingError, ObjectCorruptError, StorageError, UnsafeStorageError

P = ParamSpec("P")
R = TypeVar("R")

_LASTING = (FormatError, KeyExistsError, KeyMissingError, ObjectCorruptError, UnsafeStorageError)


def stage(function: Callable[P, R]) -> Callable[P, R]:
    """A function as a Prefect task named after it."""
    made = task(
        name=function.__name__.replace("_", "-"),
        cache_policy=NO_CACHE,
        persist_result=False,
        retries=2,
        retry_delay_seconds=exponential_backoff(backoff_factor=2),
        retry_condition_fn=_is_passing,
    )(function)
    return cast(Callable[P, R], made)


async def _is_passing(_task: Any, _run: Any, state: Any) -> bool:
    error = await state.aresult(raise_on_failure=False)
    return isinstance(error, StorageError) and not isinstance(error, _LASTING)
