"""Registers the deployments of `prefect.yaml` for streams, with one limit for all writers of a stream.

`prefect deploy` can give a deployment a limit of its own only. The server can let several share one; so this is done afterwards.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate, WorkPoolCreate
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound

from errata.errors import ErrataError
from flows.checkout import find_checkout

WRITER = "writer"
"""Tag of the deployments that commit."""
_MADE = re.compile(r"Deployment '([^']+)'\s+successfully\s+created")


def deploy_streams(streams: Sequence[str], pool: str, *, every: int | None = None, schedules: bool = True) -> list[str]:
    """Register every entry for every stream. Safe to repeat.

    Args:
        pool: the work pool; made where it does not exist, as one whose runs are processes of the worker.
        every: seconds between two runs of `apply-edits`, instead of what the file says.
        schedules: False registers them all without one.

    Returns:
        Names as Prefect has them: `apply-edits/main`.

    Raises:
        ErrataError: Prefect refused an entry.
    """
    checkout = find_checkout()
    whole = build_file((checkout / "prefect.yaml").read_text(), streams, every, schedules)
    with get_client(sync_client=True) as client:
        with suppress(ObjectAlreadyExists):
            client.create_work_pool(WorkPoolCreate(name=pool, type="process"))
        made = _deploy(whole, checkout, pool)
        for stream in streams:
            _share_limit(client, stream, [name for name, tags in made.items() if {stream, WRITER} <= set(tags)])
        for entry in whole["deployments"]:
            if not entry.get("schedules"):
                _drop_schedules(client, f"{name_flow(entry)}/{entry['name']}")
    return sorted(made)


def build_file(template: str, streams: Sequence[str], every: int | None, schedules: bool) -> dict[str, Any]:
    """`prefect.yaml` for these streams: its text once for each of them."""
    parts = [yaml.safe_load(template.replace("{{ $ERRATA_STREAM }}", stream)) for stream in streams]
    entries = [entry for part in parts for entry in part["deployments"]]
    for entry in entries:
        if not schedules:
            entry["schedules"] = []
        elif every is not None and name_flow(entry) == "apply-edits":
            entry["schedules"] = [{"interval": every}]
    return {**parts[0], "deployments": entries}


def name_flow(entry: dict[str, Any]) -> str:
    """What Prefect calls the flow of an entry."""
    function: str = entry["entrypoint"].rpartition(":")[2]
    return function.replace("_", "-")


def limit_name(stream: str) -> str:
    """The limit that the writers of a stream share."""
    return f"errata-{stream}"


def _deploy(whole: dict[str, Any], checkout: Path, pool: str) -> dict[str, list[str]]:
    """Name → tags of what was registered."""
    wanted = {f"{name_flow(entry)}/{entry['name']}": entry["tags"] for entry in whole["deployments"]}
    variables = {"PREFECT_DEFAULT_WORK_POOL_NAME": pool, "COLUMNS": "250"}
    variables["PROJECT_ROOT"] = os.environ.get("PROJECT_ROOT", str(checkout))
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary, "prefect.yaml")
        file.write_text(yaml.safe_dump(whole, sort_keys=False))
        command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(file)]
        run = subprocess.run(command, cwd=checkout, env={**os.environ, **variables}, capture_output=True, text=True)
    # Prefect skips an entry that it finds invalid and calls that a success.
    missing = sorted(wanted.keys() - set(_MADE.findall(run.stdout)))
    if missing:
        printed = (run.stdout + run.stderr).strip()[-2_000:]
        raise ErrataError(f"deploy: expected Prefect to register {', '.join(missing)}, found it did not:\n{printed}")
    return wanted


def _drop_schedules(client: SyncPrefectClient, name: str) -> None:
    """`prefect deploy` leaves schedules of an earlier deployment where the file has none any more."""
    found = client.read_deployment_by_name(name)
    for schedule in found.schedules:
        client.delete_deployment_schedule(found.id, schedule.id)


def _share_limit(client: SyncPrefectClient, stream: str, writers: Sequence[str]) -> None:
    name = limit_name(stream)
    with suppress(ObjectAlreadyExists):
        client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=name, limit=1, active=True))
    limit = client.read_global_concurrency_limit_by_name(name)
    for writer in writers:
        try:
            found = client.read_deployment_by_name(writer)
        except ObjectNotFound:
            raise ErrataError(f"deploy: expected the deployment {writer} that was just registered, found none") from None
        if found.global_concurrency_limit is None or found.global_concurrency_limit.id != limit.id:
            # Prefect's own client has no such field yet; its server has.
            body = {"global_concurrency_limit_id": str(limit.id)}
            client.request("PATCH", "/deployments/{id}", path_params={"id": found.id}, json=body).raise_for_status()
