"""`withdraw_edits` and `rollback`: facts are taken back, or the champion becomes an earlier state again. History is never rewritten."""

from collections.abc import Callable

from prefect import flow

from errata.errors import InputError
from errata.summary import RollbackSummary, WithdrawalSummary
from tasks._conflicts import repeat_on_conflict
from tasks.projecting import project_versions
from tasks.undoing import commit_rollback, commit_withdrawal, draft_rollback, judge_withdrawal, order_withdrawal, subtract_pairs


@flow(name="withdraw-edits")
def withdraw_edits(stream: str, edits: list[str], reason: str = "", dry_run: bool = False, check: bool = False) -> WithdrawalSummary:
    """Take live edits back: the model is as if they had never come, and a version of its own says so.

    Args:
        stream: whose edits.
        edits: ids, beginnings of ids, or occurrences `<id>@<seq>`.
        reason: for the log.
        dry_run: subtract, evaluate and judge, and commit nothing.
        check: compare the weights with a rebuild from all remaining pairs.

    Returns:
        What became of it. A refusal by the gate is a result; a fault is raised.
    """

    def attempt() -> WithdrawalSummary:
        order = _order(lambda: order_withdrawal(stream, edits, reason), stream, dry_run)
        judged = judge_withdrawal(stream, order, subtract_pairs(stream, order), check)
        return commit_withdrawal(stream, order, judged, dry_run)

    summary = repeat_on_conflict(attempt, "the edits are subtracted and judged again")
    if not dry_run:
        project_versions(stream)
    return summary


@flow(name="rollback")
def rollback(stream: str, target: str, reason: str = "", dry_run: bool = False) -> RollbackSummary:
    """Serve the state of an earlier commit again, whatever came after it. The next batch builds on that state.

    Args:
        stream: whose champion.
        target: a commit (`12`, `head~1`) or a version (`v3`).
        reason: for the log.
        dry_run: say what would leave and come back, and commit nothing.
    """

    def attempt() -> RollbackSummary:
        draft = _order(lambda: draft_rollback(stream, target, reason), stream, dry_run)
        return commit_rollback(stream, draft, dry_run)

    summary = repeat_on_conflict(attempt, "what leaves and comes back is worked out again")
    if not dry_run:
        project_versions(stream)
    return summary


def _order(make: Callable[[], str], stream: str, dry_run: bool) -> str:
    """What `make` orders. Where it refuses, that may be because it is done, by a run that died before its version was shown."""
    try:
        return make()
    except InputError:
        if not dry_run:
            project_versions(stream)
        raise
