"""`approve` and `refuse`: a person decides about a version that waits (`policy.promote = "manual"`)."""

import logging

from prefect import flow

from errata.errors import ConflictError
from errata.summary import RollbackSummary
from tasks._task import tell_run
from tasks.approving import draft_refusal, promote
from tasks.intake import requeue_gone
from tasks.projecting import project_versions
from tasks.undoing import commit_rollback

MAX_CONFLICTS = 5
"""How often in a row the work is started again because another writer committed first."""


@flow(name="approve")
def approve(stream: str, version: str, reason: str = "") -> int:
    """Make a version that waits the champion.

    Args:
        stream: whose version.
        version: `v3`, or its commit.
        reason: for the log.

    Returns:
        Number of the commit that says so.
    """
    for conflicts in range(MAX_CONFLICTS + 1):
        try:
            seq = promote(stream, version, reason)
            break
        except ConflictError as conflict:
            if conflicts == MAX_CONFLICTS:
                raise
            tell_run(logging.WARNING, f"{conflict}; it is approved on the new head")
    project_versions(stream)
    return seq


@flow(name="refuse")
def refuse(stream: str, version: str, reason: str = "", requeue: bool = True) -> RollbackSummary:
    """Return to the champion: what came after it leaves, and goes into the inbox once more.

    Args:
        stream: whose version.
        version: the one that waits, `v3` or its commit.
        reason: for the log.
        requeue: submit the edits that leave once more.
    """
    for conflicts in range(MAX_CONFLICTS + 1):
        draft = draft_refusal(stream, version, reason)
        try:
            summary = commit_rollback(stream, draft)
            break
        except ConflictError as conflict:
            if conflicts == MAX_CONFLICTS:
                raise
            tell_run(logging.WARNING, f"{conflict}; what leaves is worked out again")
    if requeue and summary.commit is not None:
        requeue_gone(stream, summary.commit)
    project_versions(stream)
    return summary
