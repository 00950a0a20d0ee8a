"""The project's own task decorator: retries, persistence, caching and log lines are decided here, once.

Nothing is persisted or cached by Prefect: stages pass names and digests, and every result that matters is an object of the stream.
Storage that does not answer is tried again; anything else a second try would meet again. Every try of a stage ends in one log line, on
stderr (see `errata.logs`) and in Prefect's log of the run.
"""

import functools
import inspect
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, ParamSpec, TypeVar, cast

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.exceptions import MissingContextError
from prefect.logging import get_run_logger
from prefect.tasks import exponential_backoff

from errata.errors import FormatError, KeyExistsError, KeyMissingError, ObjectCorruptError, StorageError, UnsafeStorageError
from errata.logs import RUN_LOGS, Redaction, has_started

P = ParamSpec("P")
R = TypeVar("R")

_log = logging.getLogger("errata.run")
for _name in RUN_LOGS:  # Prefect logs the exceptions of others there, too
    logging.getLogger(_name).addFilter(Redaction())

_SHOWN = 12
"""Digits of a work order's digest in a log line."""
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
    )(_tell(function))
    return cast(Callable[P, R], made)


def tell_run(level: int, message: str, **fields: Any) -> None:
    """Log a line, and the same line in Prefect's log of the run that goes on, if one does. A worker's stderr shows Prefect's alone."""
    if has_started():
        _log.log(level, "%s", message, extra=fields)
    with suppress(MissingContextError):
        get_run_logger().log(level, "%s", message, extra=fields)


def _tell(function: Callable[P, R]) -> Callable[P, R]:
    """The function, which then logs what it worked on, for how long, and what came of it."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def told(*values: P.args, **options: P.kwargs) -> R:
        given = signature.bind(*values, **options).arguments
        fields = {"stage": function.__name__, "stream": given.get("stream"), "batch": _name_batch(given), "commit": None}
        if "shard" in given:
            fields["shard"] = given["shard"]
        begun = time.perf_counter()
        try:
            result = function(*values, **options)
        except BaseException as error:
            fields |= {"seconds": _since(begun), "outcome": "failed", "error": f"{type(error).__name__}: {error}"}
            _tell_stage(logging.WARNING, fields)
            raise
        fields["batch"] = fields["batch"] or _name_batch({function.__name__.partition("_")[0]: result})
        outcome = "done" if signature.return_annotation is None else _name_outcome(result)
        fields |= {"commit": getattr(result, "commit", None), "seconds": _since(begun), "outcome": outcome}
        if (tokens := getattr(result, "tokens", None)) is not None:
            fields["tokens"] = tokens
        _tell_stage(logging.INFO, fields)
        return result

    return told


def _tell_stage(level: int, fields: dict[str, Any]) -> None:
    said = [f"{name} {value}" for name, value in fields.items() if name != "stage" and value is not None]
    tell_run(level, f"{fields['stage']}: {', '.join(said)}", **fields)


def _since(begun: float) -> float:
    return round(time.perf_counter() - begun, 3)


def _name_batch(given: dict[str, Any]) -> str | None:
    """The digest of the work order, which stages get as `order` or `draft`; those called `order_…` or `draft_…` make it."""
    digest = given.get("order") or given.get("draft")
    return digest[:_SHOWN] if isinstance(digest, str) else None


def _name_outcome(result: Any) -> str:
    """`accept`, `retry` or `reject` where the gate has decided, `nothing` where there was nothing to do, else `done`."""
    decision = getattr(result, "decision", None)
    return "nothing" if result is None else getattr(decision, "verdict", decision) or "done"


async def _is_passing(_task: Any, _run: Any, state: Any) -> bool:
    error = await state.aresult(raise_on_failure=False)
    return isinstance(error, StorageError) and not isinstance(error, _LASTING)
