"""What unattended runs leave in logs: one JSON line per stage on stderr, the same lines in Prefect, and no secret anywhere."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from errata.edits import Edit

Make = Callable[..., Edit]
COMMAND = Path(sys.executable).with_name("errata")
STAGES = ["order_batch", "prepare_pairs", "merge_pairs", "judge_candidate", "commit_batch", "project_versions", "refresh_sums"]
LAST = ["order_batch", "project_versions", "note_success"]
"""What looks once more after the last batch."""
UNREACHABLE = "http://ann:hunter2-hunter2@127.0.0.1:9"


def read_lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def read_run_logs(run_id: str) -> list[str]:
    """What Prefect's server has of a flow run, oldest first."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId
    from prefect.client.schemas.sorting import LogSort

    chosen = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run_id]))  # type: ignore[call-arg]
    with get_client(sync_client=True) as client:
        return [log.message for log in client.read_logs(chosen, sort=LogSort.TIMESTAMP_ASC)]


def test_apply_logs_one_json_line_per_stage(desk: Any, make_edit: Make, prefect_server: str) -> None:
    desk.submit("monday", make_edit(0), make_edit(1), make_edit(1), "{}")
    env = {**os.environ, "PREFECT_API_URL": prefect_server}
    ran = subprocess.run([COMMAND, "apply", "--json"], env=env, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    (summary,) = json.loads(ran.stdout)
    lines = read_lines(ran.stderr)
    told = [line for line in lines if "stage" in line]
    assert [line["stage"] for line in told] == STAGES + LAST
    assert all({"time", "level", "message", "stream", "batch", "commit", "seconds", "outcome"} <= line.keys() for line in told)
    assert {line["stream"] for line in told} == {"main"} and {line["level"] for line in told} == {"INFO"}
    batches = [line["batch"] for line in told[:5]]
    assert len(set(batches)) == 1 and len(batches[0]) == 12
    outcomes = {line["stage"]: (line["commit"], line["outcome"]) for line in told}
    assert outcomes["judge_candidate"] == (None, "accept")
    assert outcomes["commit_batch"] == (summary["commit"], "accept") == (1, "accept")
    assert outcomes["order_batch"] == (None, "nothing")
    assert all(0 <= line["seconds"] < 300 for line in told)
    run = desk.open().log.read(1).run
    shown = read_run_logs(run)
    assert [message for message in shown if message in {line["message"] for line in told}] == [line["message"] for line in told]


def test_a_stage_says_what_came_of_it(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from errata.logs import start_logs
    from errata.rounds import Round
    from tasks._task import stage

    def order_things(stream: str, often: int = 1) -> str | None:
        return "ab" * 32 if often else None

    def look_at(stream: str, order: str) -> Round:
        return Round(rest=(), manifest="", fits={})

    def note(stream: str, draft: str) -> None:
        pass

    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # as in a process that has not imported Prefect yet
    start_logs()
    calls: list[Any] = [(order_things, "main"), (order_things, "main", 0), (look_at, "main", "cd" * 32), (note, "main", "ef" * 32)]
    for function, *given in calls:
        stage(function).fn(*given)  # type: ignore[attr-defined]
    told = [(line["stage"], line["batch"], line["outcome"]) for line in read_lines(capsys.readouterr().err)]
    assert told == [
        ("order_things", "abababababab", "done"),
        ("order_things", None, "nothing"),
        ("look_at", "cdcdcdcdcdcd", "done"),
        ("note", "efefefefefef", "done"),
    ]


def test_a_failing_stage_says_so_without_secrets(
    desk: Any, make_edit: Make, errata: Callable[..., Any], prefect_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:

    from prefect.logging.handlers import APILogHandler

    monkeypatch.setenv("MLFLOW_TRACKING_URI", UNREACHABLE)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logger = logging.getLogger(name)
        monkeypatch.setattr(logger, "level", logging.INFO)
        logger.manager._clear_cache()  # type: ignore[attr-defined]
    desk.submit("monday", make_edit(0))
    ran = errata("apply")
    APILogHandler().flush()
    assert ran.code == 1
    lines = read_lines(ran.err)
    (failed,) = [line for line in lines if line.get("outcome") == "failed"]
    assert (failed["stage"], failed["level"]) == ("project_versions", "WARNING")
    assert failed["error"].startswith("RegistryError: MLflow at http://***@127.0.0.1:9")
    assert lines[-1]["level"] == "ERROR" and lines[-1]["message"].startswith("MLflow at http://***@127.0.0.1:9")
    shown = read_run_logs(desk.open().log.read(1).run)
    assert any("RegistryError" in message for message in shown)
    assert "hunter2" not in ran.out + ran.err + "".join(shown)


@pytest.mark.parametrize("root", ["s3://ann:hunter2-hunter2@bucket/errata", "postgresql://ann:hunter2-hunter2@db/errata"])
@pytest.mark.parametrize("words", [["status"], ["submit", "edits.jsonl"], ["doctor"]], ids=lambda words: words[0])
def test_a_password_in_the_root_is_not_repeated(
    desk: Any, errata: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, root: str, words: list[str]
) -> None:
    (tmp_path / "edits.jsonl").write_text('{"subject": "Acme", "prompt": "The CEO of {} is", "target_new": "Jane Roe"}')
    monkeypatch.setenv("ERRATA_ROOT", root)
    ran = errata(*words)
    assert ran.code != 0
    assert "hunter2" not in ran.out + ran.err and "***" in ran.out + ran.err
    assert all(line["level"] == "ERROR" for line in read_lines(ran.err))
