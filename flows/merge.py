"""`merge_streams`: the live edits of one stream become edits of another on the same base. The first is left as it is."""

from prefect import flow

from errata.summary import BatchSummary
from flows.edit import write_batches
from tasks.merging import order_merge


@flow(name="merge-streams")
def merge_streams(source: str, into: str, dry_run: bool = False) -> list[BatchSummary]:
    """Merge, batch by batch, until nothing is left that is worth writing; more than one batch only where the gate halves the first.

    Args:
        source: whose live edits.
        into: the stream that gets them.
        dry_run: merge, evaluate and judge, and commit nothing.

    Returns:
        What became of each batch; none where all live edits of `source` are live in `into`, or were judged there before.
    """
    return write_batches(into, lambda: order_merge(into, source), dry_run)
