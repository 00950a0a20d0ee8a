"""Events that automations turn into notifications (`deployments/alerts.yaml`). Each holds what a person needs at night: what, where, by how
much, and the command that takes it back."""

import os
from collections.abc import Sequence
from contextlib import suppress

from prefect.events import emit_event
from prefect.runtime import flow_run
from prefect.utilities.urls import url_for

from errata.errors import RegistryError
from errata.settings import Settings
from errata.summary import BatchSummary
from errata.watching import CHANGED, Alarm, explain_rejection
from registry.events import CompactionCommit, PromotionCommit, RebuildCommit, RejectionCommit, ReturnCommit
from registry.marks import mark_success
from registry.models import ModelRegistry
from registry.release import resolve_tracking
from registry.stream import Stream
from tasks._session import open_named
from tasks._task import stage


@stage
def announce_rejection(stream: str, summary: BatchSummary) -> None:
    """Say that the gate refused a batch, and which budgets of the whole it exceeded."""
    settings, opened = open_named(stream)
    announce(settings, opened, explain_rejection(summary.metrics, summary.reasons, settings.gate))


@stage
def note_success(stream: str) -> None:
    """Leave the sign of life that the dead man's switch looks for."""
    mark_success(open_named(stream)[1])


def announce_champion(settings: Settings, stream: Stream, version: int, before: int | None) -> None:
    """Say that another version is served.

    Args:
        version: MLflow's number of the new champion.
        before: of the one before, where there was one.
    """
    message = f"Version {version} is the champion now, after {f'version {before}' if before else 'none'}."
    alarm = Alarm(event=CHANGED, measure="version of the champion", value=version, threshold=None, message=message)
    announce(settings, stream, [alarm], version)


def announce(settings: Settings, stream: Stream, alarms: Sequence[Alarm], version: int | None = None) -> None:
    """Emit one event per alarm, about the resource `errata.stream.<name>`. Outside of a run, and without a server, nobody listens.

    Args:
        version: MLflow's number of the champion; looked up where it is not given.
    """
    if not alarms or (flow_run.get_id() is None and not os.environ.get("PREFECT_API_URL")):
        return
    resource = {"prefect.resource.id": f"errata.stream.{stream.name}", "prefect.resource.name": stream.name}
    run, champion = flow_run.get_id(), stream.head.champion
    number = version if version is not None else find_number(settings, stream, champion)
    common = {
        "stream": stream.name,
        "commit": champion,
        "version": number,
        "run": run,
        "run_link": (url_for("flow-run", obj_id=run) or "") if run else "",
        "rollback": spell_rollback(stream),
    }
    for alarm in alarms:
        # The event is a label of the resource as well, so that each is cooled down by itself.
        emit_event(alarm.event, {**resource, "errata.event": alarm.event}, payload={**common, **alarm.model_dump(exclude={"event"})})


def find_number(settings: Settings, stream: Stream, commit: int) -> int | None:
    """MLflow's number of the version that shows a commit. An alarm is not kept back because MLflow does not answer."""
    with suppress(RegistryError):
        registry = ModelRegistry(*resolve_tracking(settings.mlflow.tracking_uri, settings.root))
        version = registry.find_version(stream.name, commit)
        return version.number if version else None
    return None


def spell_rollback(stream: Stream) -> str:
    """The command that takes back what the champion's commit brought; empty where there is no earlier state."""
    earlier = find_earlier_state(stream)
    return "" if earlier is None else f"errata rollback {earlier} -s {stream.name}"


def find_earlier_state(stream: Stream) -> int | None:
    """The newest commit before the champion whose state is another: what a rollback left behind is not gone back to, and a commit that only
    says the same again is passed over."""
    seq = stream.head.champion
    while True:
        commit = stream.log.read(seq)
        if isinstance(commit, ReturnCommit):
            seq = commit.target
        elif isinstance(commit, RebuildCommit | CompactionCommit):
            seq = commit.of
        else:
            break
    for earlier in range(seq - 1, -1, -1):
        if not isinstance(stream.log.read(earlier), RejectionCommit | PromotionCommit):
            return earlier
    return None
