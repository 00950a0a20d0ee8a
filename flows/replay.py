"""`rebuild`: the stored pairs of a stream become its weights once more; what is damaged is mended, or named. `compact`: the sums begin
anew. `rebase`: the live edits become pairs of another base, or of another site."""

from collections.abc import Sequence

from prefect import flow

from errata.findings import RebuildReport
from errata.rounds import Prepared, Round
from errata.summary import CompactionSummary, RebaseSummary
from tasks._conflicts import repeat_on_conflict
from tasks.compacting import compact_sums
from tasks.keeping import restore_version
from tasks.projecting import project_versions
from tasks.rebasing import commit_rebase, judge_rebase, order_rebase, prepare_rebase, sum_pairs
from tasks.replaying import replay_log


@flow(name="rebuild", timeout_seconds=24 * 3600)
def rebuild(stream: str = "main", to: int | None = None, check: bool = False) -> RebuildReport:
    """Replay a stream's log, compare, and mend.

    Args:
        stream: whose log.
        to: the last commit to replay; None is the newest.
        check: change nothing.

    Returns:
        What was compared and found. That something is lost, or differs, is a result; storage that fails is raised.
    """
    report = replay_log(stream, to, check)
    if to is not None and not check and report.sound:
        restore_version(stream, report.to)
    if report.commit is not None or (report.sound and not check):
        project_versions(stream)  # also where an earlier try was cut off before that
    return report


@flow(name="compact", timeout_seconds=6 * 3600)
def compact(stream: str = "main", dry_run: bool = False) -> CompactionSummary:
    """Build a stream's sums anew from the pairs of its live edits; its own commit and version.

    Args:
        stream: whose sums.
        dry_run: sum, solve and compare, and commit nothing.

    Returns:
        What became of it. That the weights come out otherwise is a result; storage that fails is raised.
    """
    summary = repeat_on_conflict(lambda: compact_sums(stream, dry_run), "the sums are built once more")
    if not dry_run:
        project_versions(stream)
    return summary


@flow(name="rebase")
def rebase(stream: str, base: str, profile: str, drop_answered: bool = False, dry_run: bool = False) -> RebaseSummary:
    """Carry a stream's live edits to another base or profile. The champion serves, and batches go on, until it is done.

    Args:
        stream: whose live edits.
        base: digest of a base that the root holds (`tasks.onboarding.place_target`).
        profile: digest of one of its profiles.
        drop_answered: take back edits whose answer the base gives without them.
        dry_run: prepare, evaluate and judge, and commit nothing; a later run uses the pairs.

    Returns:
        What became of it. A refusal by the gate is a result; a fault is raised.
    """

    def attempt() -> RebaseSummary:
        order = order_rebase(stream, base, profile, drop_answered)
        prepared = prepare_rebase(stream, order)
        rounds = [_try_edits(stream, order, prepared, prepared.ready, [])]
        while rounds[-1].again:
            rounds.append(_try_edits(stream, order, prepared, rounds[-1].again, rounds))
        return commit_rebase(stream, order, prepared, rounds, dry_run)

    summary = repeat_on_conflict(attempt, "what it brought is prepared, too, and everything summed and judged again")
    if not dry_run:
        project_versions(stream)
    return summary


def _try_edits(stream: str, order: str, prepared: Prepared, rest: Sequence[str], earlier: Sequence[Round]) -> Round:
    return judge_rebase(stream, order, sum_pairs(stream, order, prepared, rest), earlier)
