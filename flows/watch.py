"""`watch_model`: what the champion is like now, on a schedule of its own, and who is told."""

from prefect import flow

from errata.watching import WatchReport
from tasks.watching import announce_failure, measure_champion, raise_alarms, show_watch


@flow(name="watch-model", timeout_seconds=3 * 3600)
def watch_model(stream: str = "main") -> WatchReport:
    """Measure the champion, show it, and emit events for what exceeds `[watch]`.

    Args:
        stream: whose champion.
    """
    try:
        report = measure_champion(stream)
        report = report.model_copy(update={"alarms": tuple(raise_alarms(stream, report))})
        show_watch(stream, report)
    except Exception as error:
        announce_failure(stream, f"{type(error).__name__}: {error}")
        raise
    return report
