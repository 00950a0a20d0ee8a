"""`trace_edits`: can each edit of the champion be switched off alone, and does the base's answer come back?"""

from prefect import flow

from errata.traceability import TraceSummary
from tasks.tracing import show_trace, trace_champion


@flow(name="trace-edits", timeout_seconds=12 * 3600)
def trace_edits(stream: str = "main", sample: int | None = None, seed: int = 0) -> TraceSummary:
    """The withdrawal test of iReVa on the champion. Changes nothing; may be repeated.

    Args:
        stream: whose champion.
        sample: how many edits are switched off; None leaves it to what one costs.
        seed: of the sample.
    """
    found = trace_champion(stream, sample, seed)
    show_trace(stream, found)
    return found
