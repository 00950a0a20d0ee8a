"""Work that another writer's commit makes void is done again on the new head."""

import logging
from collections.abc import Callable
from typing import TypeVar

from errata.errors import ConflictError
from tasks._task import tell_run

MAX_CONFLICTS = 5
"""How often in a row the work is started again because another writer committed first."""
R = TypeVar("R")


def repeat_on_conflict(attempt: Callable[[], R], again: str) -> R:
    """What an attempt returns that nobody comes before.

    Args:
        attempt: the whole work, from the head on.
        again: what is done once more, for the log.

    Raises:
        ConflictError: others came first each time.
    """
    for conflicts in range(MAX_CONFLICTS + 1):
        try:
            return attempt()
        except ConflictError as conflict:
            if conflicts == MAX_CONFLICTS:
                raise
            tell_run(logging.WARNING, f"{conflict}; {again}")
    raise AssertionError("the last attempt returns or raises")
