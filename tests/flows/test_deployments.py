"""`prefect.yaml` on a throw-away server. Prefect skips an entry that it finds invalid and goes on with the others: so they are counted.

A scheduled run has to appear, too: with the wrong libraries the schedulers fail in the server's log only, while everything else works.
"""

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import DeploymentFilter, FlowRunFilter
from prefect.client.schemas.objects import StateType

ROOT = Path(__file__).parents[2]
POOL = "errata-tests"


@pytest.fixture(scope="module")
def deployments(prefect_server: str) -> Iterator[dict[str, Any]]:
    """Name → deployment, as the server has it after `prefect deploy --all`; removed afterwards."""
    with get_client(sync_client=True) as client:
        asyncio.run(_make_pool())
        variables = {"PREFECT_API_URL": prefect_server, "PROJECT_ROOT": str(ROOT), "PREFECT_DEFAULT_WORK_POOL_NAME": POOL}
        command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
        run = subprocess.run(command, cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout + run.stderr
        made = client.read_deployments()
        yield {deployment.name: deployment for deployment in made}
        for deployment in made:
            client.delete_deployment(deployment.id)


async def _make_pool() -> None:
    async with get_client() as client:
        await client.create_work_pool(WorkPoolCreate(name=POOL, type="process"))


def read_file() -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
    return entries


def test_every_entry_deploys(deployments: dict[str, Any]) -> None:
    assert sorted(deployments) == sorted(entry["name"] for entry in read_file())


def test_the_deployment_is_what_the_file_says(deployments: dict[str, Any]) -> None:
    main = deployments["main"]
    assert main.entrypoint == "flows/edit.py:apply_edits"
    assert main.parameters == {"stream": "main"}
    assert main.work_pool_name == POOL
    assert main.tags == ["errata", "main"]
    assert main.description
    assert main.global_concurrency_limit.limit == 1
    assert main.concurrency_options.collision_strategy == "ENQUEUE"
    assert main.pull_steps == [{"prefect.deployments.steps.set_working_directory": {"directory": str(ROOT)}}]
    (schedule,) = main.schedules
    assert schedule.active
    assert (schedule.schedule.cron, schedule.schedule.timezone) == ("*/15 * * * *", "Etc/UTC")
    assert main.parameter_openapi_schema["properties"].keys() == {"stream", "dry_run"}


def test_a_schedule_yields_runs(deployments: dict[str, Any]) -> None:
    with get_client(sync_client=True) as client:
        wanted = DeploymentFilter.model_validate({"id": {"any_": [deployments["main"].id]}})
        end = time.monotonic() + 120
        runs: list[Any] = []
        while not runs and time.monotonic() < end:
            runs = client.read_flow_runs(flow_run_filter=FlowRunFilter(), deployment_filter=wanted)
            time.sleep(0.2)
    assert runs, "no run was scheduled: read the server's log"
    assert {run.state_type for run in runs} == {StateType.SCHEDULED}
    assert all(run.auto_scheduled and run.parameters == {"stream": "main"} for run in runs)
