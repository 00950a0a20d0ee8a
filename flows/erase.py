"""`erase_edits`: edits that are not live are erased from the store and from MLflow, and leave tombstones."""

from prefect import flow

from errata.summary import ErasureSummary
from tasks._conflicts import repeat_on_conflict
from tasks.erasing import erase, hide_erased
from tasks.projecting import project_versions


@flow(name="erase-edits")
def erase_edits(stream: str, edits: list[str], reason: str = "") -> ErasureSummary:
    """Delete the text and the pairs of edits, and every state and artifact that carries them. It cannot be undone.

    Args:
        stream: whose edits.
        edits: ids, beginnings of ids, or occurrences `<id>@<seq>`; every occurrence of the id is erased. None may be live.
        reason: for the log, which keeps it: it must not quote what is erased.
    """
    summary = repeat_on_conflict(lambda: erase(stream, edits, reason), "what has to go is worked out again")
    project_versions(stream)
    hide_erased(stream)
    return summary
