"""`collect_garbage`: versions beyond `[keep]` are archived, and what nothing has needed for long enough is deleted. For schedules."""

from prefect import flow

from errata.summary import CollectionSummary
from tasks.keeping import archive_versions, collect_objects


@flow(name="collect-garbage", timeout_seconds=3 * 3600)
def collect_garbage(stream: str = "main", dry_run: bool = False) -> CollectionSummary:
    """Archive and collect. May be killed anywhere and repeated at any time, beside writers.

    Args:
        stream: whose objects.
        dry_run: say what would be deleted, and change nothing.
    """
    archive_versions(stream, dry_run)
    return collect_objects(stream, dry_run)
