"""`apply_edits`: what waits in a stream's inbox becomes commits and model versions. The path of one batch, as a straight line."""

import logging
from collections.abc import Callable

from prefect import flow

from errata.errors import ConflictError, RegistryError, StorageError
from errata.rounds import Prepared, Round
from errata.summary import BatchSummary
from tasks._conflicts import MAX_CONFLICTS
from tasks._task import tell_run
from tasks.announcing import announce_rejection, note_success
from tasks.committing import commit_batch
from tasks.compacting import refresh_sums
from tasks.editing import merge_pairs, prepare_pairs
from tasks.evaluating import judge_candidate
from tasks.intake import is_overtaken, note_failure, order_batch
from tasks.projecting import project_versions


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


def try_batch(stream: str, order: str) -> tuple[Prepared, list[Round]]:
    """Prepare a batch, then merge and judge it until the gate has decided."""
    prepared = prepare_pairs(stream, order)
    rounds: list[Round] = []
    rest = prepared.ready
    while rest:
        candidate = merge_pairs(stream, order, prepared, rest)
        rounds.append(judge_candidate(stream, order, candidate, rounds))
        rest = rounds[-1].again
    return prepared, rounds


def write_batches(stream: str, order_next: Callable[[], str | None], dry_run: bool, *, remembers: bool = False) -> list[BatchSummary]:
    """Write order after order into a stream, until there is none.

    Args:
        remembers: they only go to memory: what it cannot answer is not refused, and batches may stand still all the same.
    """
    done: list[BatchSummary] = []
    conflicts = 0
    while (order := order_next()) is not None:
        try:
            prepared, rounds = try_batch(stream, order)
            done.append(commit_batch(stream, order, prepared, rounds, dry_run))
        except (StorageError, RegistryError):
            raise  # whatever is in the batch
        except Exception as fault:
            # Where another writer commits meanwhile, what is read does not fit the order any more, and anything may come of it.
            if not (isinstance(fault, ConflictError) or is_overtaken(stream, order)):
                note_failure(stream, order, f"{type(fault).__name__}: {fault}")
                raise
            conflicts += 1
            if conflicts > MAX_CONFLICTS:
                raise
            tell_run(logging.WARNING, f"{type(fault).__name__}: {fault}; the batch is ordered, merged and judged again")
            continue
        conflicts = 0
        if dry_run:
            break
        if done[-1].decision == "reject" and not remembers:
            announce_rejection(stream, done[-1])
        project_versions(stream)
        if (fault := refresh_sums(stream)) is not None:
            tell_run(logging.WARNING, f"the sums were not built anew, the next batch tries again: {fault}")
    if not dry_run:
        # Also where nothing was committed: an earlier run may have stopped between a commit and its version.
        project_versions(stream)
        if not remembers:
            note_success(stream)
    return done
