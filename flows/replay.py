"""`rebuild`: the stored pairs of a stream become its weights once more; what is damaged is mended, or named."""

from prefect import flow

from errata.findings import RebuildReport
from tasks.projecting import project_versions
from tasks.replaying import replay_log


@flow(name="rebuild")
def rebuild(stream: str = "main", to: int | None = None, check: bool = False) -> RebuildReport:
    """Replay a stream's log, compare, and mend.

    Args:
        to: the last commit to replay; None is the newest.
        check: change nothing.

    Returns:
        What was compared and found. That something is lost, or differs, is a result; storage that fails is raised.
    """
    report = replay_log(stream, to, check)
    if report.commit is not None:
        project_versions(stream)
    return report
