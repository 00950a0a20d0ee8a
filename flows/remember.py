"""`remember_edits`: what waits answers from memory within seconds. The next batch writes it into the model."""

from prefect import flow

from errata.summary import BatchSummary
from flows.edit import write_batches
from tasks.intake import order_memory


@flow(name="remember-edits", timeout_seconds=3600)
def remember_edits(stream: str = "main", dry_run: bool = False) -> list[BatchSummary]:
    """Put everything that waits into memory. What memory cannot answer goes on waiting for `apply_edits`.

    Args:
        stream: whose inbox.
        dry_run: evaluate and judge the first batch, and commit nothing.

    Returns:
        What became of each batch.
    """
    return write_batches(stream, lambda: order_memory(stream), dry_run, remembers=True)
