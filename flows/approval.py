"""`approve` and `refuse`: a person decides about a version that waits (`policy.promote = "manual"`)."""

from prefect import flow

from errata.summary import RollbackSummary
from tasks._conflicts import repeat_on_conflict
from tasks.approving import draft_refusal, promote
from tasks.intake import requeue_gone
from tasks.projecting import project_versions
from tasks.undoing import commit_rollback


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
    seq = repeat_on_conflict(lambda: promote(stream, version, reason), "it is approved on the new head")
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
    summary = repeat_on_conflict(lambda: commit_rollback(stream, draft_refusal(stream, version, reason)), "what leaves is worked out again")
    if requeue and summary.commit is not None:
        requeue_gone(stream, summary.commit)
    project_versions(stream)
    return summary
