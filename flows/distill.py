"""`distill_edits`: live edits are distilled into an adapter, so that inference needs no facts before the question (DistillMIKE)."""

import logging
from functools import partial

from prefect import flow

from errata.rounds import Trained
from errata.summary import DistillationSummary
from tasks._conflicts import repeat_on_conflict
from tasks._task import tell_run
from tasks.distilling import commit_distillation, judge_distillation, order_distillation, stack_adapter, train_adapter
from tasks.projecting import project_versions


@flow(name="distill-edits", timeout_seconds=12 * 3600)
def distill_edits(stream: str = "main", afresh: bool = False, dry_run: bool = False) -> DistillationSummary | None:
    """Teach an adapter on the newest accepted version to answer as memory does; its own commit and version.

    Batches go on meanwhile: what is trained is put on the head that there is in the end, and judged there.

    Args:
        stream: whose live edits.
        afresh: go on from no earlier adapter, and distil even what the newest one knows.
        dry_run: train, evaluate and judge, and commit nothing.

    Returns:
        What became of it; None where no edit is live, or the adapter was taught them all. A refusal by the gate is a result; a fault is
        raised.
    """

    while (order := order_distillation(stream, afresh)) is not None:
        trained = train_adapter(stream, order)
        summary = repeat_on_conflict(partial(_place, stream, trained, dry_run), "the adapter is put on the new head and judged there")
        if summary is not None:
            if not dry_run:
                project_versions(stream)
            return summary
        tell_run(logging.WARNING, "an edit that was distilled left meanwhile; the others are distilled without it")
    if not dry_run:
        project_versions(stream)  # it may be done already, by a run that died before its version was shown
    return None


def _place(stream: str, trained: Trained, dry_run: bool) -> DistillationSummary | None:
    """A trained adapter on the head as it is; None where it has to be trained again."""
    stacked = stack_adapter(stream, trained)
    if stacked is None:
        return None
    order, candidate = stacked
    return commit_distillation(stream, order, trained, judge_distillation(stream, candidate), dry_run)
