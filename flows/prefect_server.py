"""Prefect's server for a run of the console: one that is given, or a local one for the length of the run."""

import os
import signal
import urllib.error
import urllib.request

from errata.errors import ErrataError
from errata.logs import RUN_LOGS
from errata.settings import Settings

_PATIENCE = 5.0
"""Seconds for a given server to answer."""


def ready_prefect(settings: Settings) -> None:
    """Prefect reads these while it is imported. Its local database goes to our cache folder, its own reports to nobody."""
    if "PREFECT_HOME" not in os.environ:
        home = settings.cache / "prefect"
        home.mkdir(parents=True, exist_ok=True)  # Prefect makes the folder, but none above it
        os.environ["PREFECT_HOME"] = str(home)
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "CRITICAL")  # what fails is raised here and printed once
    if os.environ.get("PREFECT_API_URL"):
        for name in RUN_LOGS:  # people look at them there
            os.environ.setdefault(f"PREFECT_LOGGING_LOGGERS_{name.replace('.', '_').upper()}_LEVEL", "INFO")
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("DO_NOT_TRACK", "1")


def start_prefect(settings: Settings) -> None:
    """Have a server before a flow begins.

    Raises:
        ErrataError: there is none at `PREFECT_API_URL`.
    """
    ready_prefect(settings)
    if os.environ.get("PREFECT_API_URL"):
        reach_prefect()
        return
    from prefect.client.orchestration import get_client

    # Ctrl-C at a terminal reaches every process. The local server must outlive it, or Prefect reports the interruption to nobody, again
    # and again for more than a minute. A child inherits the mask; Prefect ends it by another signal.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        get_client(sync_client=True)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def reach_prefect() -> str:
    """Where flows run, in words.

    Raises:
        ErrataError: nothing answers at `PREFECT_API_URL`.
    """
    url = os.environ.get("PREFECT_API_URL")
    if not url:
        return "no PREFECT_API_URL: flows run in this process"
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=_PATIENCE):
            pass
    except urllib.error.HTTPError:
        pass  # it answers; whether it lets us in is between it and Prefect's client
    except (OSError, ValueError) as error:
        raise ErrataError(f"Prefect at {url} (PREFECT_API_URL): expected a server, found none ({error}); start it or unset it") from None
    return url
