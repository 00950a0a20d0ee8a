"""`apply_edits`: what waits in a stream's inbox becomes commits and model versions. The path of one batch, as a straight line."""

from collections.abc import Callable

from prefect import flow
from prefect.logging import get_run_logger

from errata.errors import ConflictError
from errata.rounds import Round
from errata.summary import BatchSummary
from tasks.committing import commit_batch
from tasks.compacting import refresh_sums
from tasks.editing import merge_pairs, prepare_pairs
from tasks.evaluating import judge_candidate
from tasks.intake import order_batch
from tasks.projecting import project_versions

MAX_CONFLICTS = 5
"""How often in a row a batch is started again because another writer committed first."""


@flow(name="apply-edits", timeout_seconds=6 * 3600)
def apply_edits(stream: str = "main", dry_run: bool = False) -> list[BatchSummary]:
    """Apply everything that waits, batch by batch.

    Args:
        stream: whose inbox.
        dry_run: prepare, evaluate and judge the first batch, and commit nothing.

    Returns:
        What became of each batch. A refused batch is a result; a fault is raised.
    """
    return write_batches(stream, lambda: order_batch(stream), dry_run)


def write_batches(stream: str, order_next: Callable[[], str | None], dry_run: bool) -> list[BatchSummary]:
    """Write order after order into a stream, until there is none."""
    done: list[BatchSummary] = []
    conflicts = 0
    while (order := order_next()) is not None:
        prepared = prepare_pairs(stream, order)
        rounds: list[Round] = []
        rest = prepared.ready
        while rest:
            candidate = merge_pairs(stream, order, prepared, rest)
            rounds.append(judge_candidate(stream, order, candidate, rounds))
            rest = rounds[-1].again
        try:
            done.append(commit_batch(stream, order, prepared, rounds, dry_run))
        except ConflictError as conflict:
            conflicts += 1
            if conflicts > MAX_CONFLICTS:
                raise
            get_run_logger().warning("%s; the batch is merged and judged again", conflict)
            continue
        conflicts = 0
        if dry_run:
            break
        project_versions(stream)
        if (fault := refresh_sums(stream)) is not None:
            get_run_logger().warning("the sums were not built anew, the next batch tries again: %s", fault)
    if not dry_run:
        # Also where nothing was committed: an earlier run may have stopped between a commit and its version.
        project_versions(stream)
    return done
