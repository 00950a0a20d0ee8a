"""`prefect.yaml` on a throw-away server. Prefect skips an entry that it finds invalid and goes on with the others: so they are counted.

A scheduled run has to appear, too: with the wrong libraries the schedulers fail in the server's log only, while everything else works.
"""

import ast
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import DeploymentFilter, FlowRunFilter
from prefect.client.schemas.objects import StateType
from prefect.states import Pending, Running

from errata.errors import ErrataError
from flows.deploying import build_file, deploy_streams, limit_name, name_flow
from flows.prefect_runs import settle_past

ROOT = Path(__file__).parents[2]
POOL = "errata-tests"
SCHEDULED = {
    "apply-edits": "*/15 * * * *",
    "collect-garbage": "30 3 * * *",
    "distill-edits": "0 2 * * *",
    "rebuild": "0 5 * * 0",
    "watch-model": "7 * * * *",
}
BESIDE = {"collect-garbage", "distill-edits", "rebuild", "trace-edits", "watch-model"}
"""What does not commit as it is scheduled, or trains for long and is put on whatever the head is then: it need not wait for writers."""


@pytest.fixture(scope="module")
def client(prefect_server: str) -> Iterator[SyncPrefectClient]:
    with get_client(sync_client=True) as client:
        yield client


@pytest.fixture(scope="module")
def deployments(prefect_server: str, client: SyncPrefectClient) -> Iterator[dict[str, Any]]:
    """`flow/stream` → deployment, as the server has it after a second registration of two streams; removed afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_API_URL", prefect_server)
        for _ in range(2):
            names = deploy_streams(["main", "other"], POOL)
    yield {name: client.read_deployment_by_name(name) for name in names}
    for deployment in client.read_deployments():
        client.delete_deployment(deployment.id)


def read_file() -> list[dict[str, Any]]:
    return list(build_file((ROOT / "prefect.yaml").read_text(), ["main"], None, True)["deployments"])


def find_flows() -> set[str]:
    """Every function under `@flow` in `flows/` that works on a stream, as an entrypoint. The others are run by commands."""
    return {
        f"flows/{path.name}:{node.name}"
        for path in (ROOT / "flows").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and any("flow(" in f"{ast.unparse(mark)}(" for mark in node.decorator_list)
        if {"stream", "into"} & {argument.arg for argument in node.args.args}
    }


def test_every_flow_is_in_the_file() -> None:
    assert sorted(entry["entrypoint"] for entry in read_file()) == sorted(find_flows())


def test_every_entry_is_registered_for_every_stream(deployments: dict[str, Any], client: SyncPrefectClient) -> None:
    assert sorted(deployments) == sorted(f"{name_flow(entry)}/{stream}" for entry in read_file() for stream in ("main", "other"))
    assert len(client.read_deployments()) == len(deployments)


@pytest.mark.parametrize("entry", read_file(), ids=name_flow)
def test_the_deployment_is_what_the_file_says(deployments: dict[str, Any], entry: dict[str, Any]) -> None:
    made = deployments[f"{name_flow(entry)}/main"]
    assert made.entrypoint == entry["entrypoint"]
    assert made.parameters == entry["parameters"] and "main" in made.parameters.values()
    assert made.work_pool_name == POOL
    assert set(made.tags) == {"errata", "main"} | (set() if name_flow(entry) in BESIDE else {"writer"})
    assert made.description == entry["description"]
    assert made.global_concurrency_limit.limit == 1
    assert made.concurrency_options.collision_strategy == "ENQUEUE"
    assert made.pull_steps == [{"prefect.deployments.steps.set_working_directory": {"directory": str(ROOT)}}]
    schedules = [(row.active, row.schedule.cron, row.schedule.timezone) for row in made.schedules]
    assert schedules == ([(True, SCHEDULED[name_flow(entry)], "Etc/UTC")] if name_flow(entry) in SCHEDULED else [])
    for name, field in made.parameter_openapi_schema["properties"].items():
        assert field.get("description"), f"{name_flow(entry)}: expected the docstring to describe {name}"


def test_the_file_deploys_by_hand(prefect_server: str, deployments: dict[str, Any], client: SyncPrefectClient) -> None:
    variables = {
        "PREFECT_API_URL": prefect_server,
        "PROJECT_ROOT": str(ROOT),
        "PREFECT_DEFAULT_WORK_POOL_NAME": POOL,
        "ERRATA_STREAM": "hand",
    }
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    run = subprocess.run(command, cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    made = [deployment for deployment in client.read_deployments() if deployment.name == "hand"]
    assert len(made) == len(read_file())
    assert {deployment.parameters.get("stream", "hand") for deployment in made} == {"hand"}
    for deployment in made:
        client.delete_deployment(deployment.id)


def test_a_schedule_yields_runs(deployments: dict[str, Any], client: SyncPrefectClient) -> None:
    wanted = DeploymentFilter.model_validate({"id": {"any_": [deployments["apply-edits/main"].id]}})
    end = time.monotonic() + 120
    runs: list[Any] = []
    while not runs and time.monotonic() < end:
        runs = client.read_flow_runs(flow_run_filter=FlowRunFilter(), deployment_filter=wanted)
        time.sleep(0.2)
    assert runs, "no run was scheduled: read the server's log"
    assert {run.state_type for run in runs} == {StateType.SCHEDULED}
    assert all(run.auto_scheduled and run.parameters == {"stream": "main"} for run in runs)


def test_the_writers_of_a_stream_share_one_limit(deployments: dict[str, Any]) -> None:
    limits = {name: made.global_concurrency_limit.name for name, made in deployments.items()}
    for stream in ("main", "other"):
        writers = {limits[name] for name, made in deployments.items() if {stream, "writer"} <= set(made.tags)}
        assert writers == {limit_name(stream)}
    beside = [limit for name, limit in limits.items() if name.split("/")[0] in BESIDE]
    assert len(set(beside)) == len(beside) == 2 * len(BESIDE)


def test_a_writer_waits_for_another_one_of_its_stream(prefect_server: str, deployments: dict[str, Any], client: SyncPrefectClient) -> None:
    def propose(name: str) -> Any:
        run = client.create_flow_run_from_deployment(deployments[name].id)
        return run.id, client.set_flow_run_state(run.id, Pending()).state

    first, state = propose("apply-edits/main")
    assert state.type == StateType.PENDING
    client.set_flow_run_state(first, Running())
    second, state = propose("compact/main")
    assert (state.type, state.name) == (StateType.SCHEDULED, "AwaitingConcurrencySlot")
    assert propose("compact/other")[1].type == StateType.PENDING
    assert propose("collect-garbage/main")[1].type == StateType.PENDING

    # A server that was killed leaves this behind; whoever starts it again, and nothing else, lets the next writer in.
    assert settle_past(prefect_server) >= 3  # and what other tests have killed
    assert client.read_flow_run(first).state_type == StateType.CRASHED
    assert client.read_flow_run(second).state_type == StateType.SCHEDULED
    assert client.set_flow_run_state(second, Pending()).state.type == StateType.PENDING
    client.delete_flow_run(second)
    assert settle_past(prefect_server) == 0


def test_another_schedule_or_none() -> None:
    template = (ROOT / "prefect.yaml").read_text()
    often = {name_flow(entry): entry.get("schedules") for entry in build_file(template, ["a"], 20, True)["deployments"]}
    assert often["apply-edits"] == [{"interval": 20}]
    assert often["rebuild"] == [{"cron": SCHEDULED["rebuild"], "timezone": "Etc/UTC"}]
    never = build_file(template, ["a", "b"], 20, False)["deployments"]
    assert [entry["schedules"] for entry in never] == [[]] * 2 * len(often)
    assert {entry["name"] for entry in never} == {"a", "b"}


@pytest.mark.long
def test_a_schedule_that_is_not_in_the_file_any_more_is_gone(
    prefect_server: str, client: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", prefect_server)
    for _ in range(5):
        assert "apply-edits/gone" in deploy_streams(["gone"], POOL, every=3_600)
        deploy_streams(["gone"], POOL, schedules=False)
        made = [deployment for deployment in client.read_deployments() if deployment.name == "gone"]
        assert len(made) == len(read_file()) and not any(deployment.schedules for deployment in made)
        wanted = DeploymentFilter.model_validate({"id": {"any_": [deployment.id for deployment in made]}})
        if not (left := client.read_flow_runs(deployment_filter=wanted)):
            break  # else Prefect's scheduler was about to write them while the schedule went
    assert left == []
    for deployment in made:
        client.delete_deployment(deployment.id)


@pytest.mark.long
def test_an_entry_that_prefect_refuses_is_an_error(prefect_server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import flows.deploying

    whole = yaml.safe_load((ROOT / "prefect.yaml").read_text())
    whole["deployments"] = whole["deployments"][1:2]
    whole["deployments"][0]["schedules"] = [{"cron": "every day"}]
    (tmp_path / "prefect.yaml").write_text(yaml.safe_dump(whole))
    (tmp_path / "flows").symlink_to(ROOT / "flows")
    monkeypatch.setattr(flows.deploying, "find_checkout", lambda: tmp_path)
    monkeypatch.setenv("PREFECT_API_URL", prefect_server)
    with pytest.raises(ErrataError, match="expected Prefect to register remember-edits/main, found it did not"):
        deploy_streams(["main"], POOL)


def test_the_command_says_what_is_missing(desk: Any, errata: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    ran = errata("deploy")
    assert ran.code == 2 and "PREFECT_API_URL" in ran.err


def test_the_command_knows_its_streams(desk: Any, errata: Callable[..., Any], prefect_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", prefect_server)
    ran = errata("deploy", "--stream", "mian")
    assert ran.code == 2 and "(main), found mian" in ran.err


def test_what_runs_unattended_has_a_time_out() -> None:
    from flows.edit import apply_edits
    from flows.keep import collect_garbage
    from flows.replay import compact, rebuild

    assert all(flow.timeout_seconds for flow in (apply_edits, collect_garbage, rebuild, compact))
