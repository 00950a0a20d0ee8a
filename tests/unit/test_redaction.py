"""What must never be read in an error, a log line or a page."""

import json
import logging
import sys
from collections.abc import Iterator

import pytest

from errata.errors import ErrataError, RecordError, StorageError
from errata.logs import start_logs
from errata.redaction import redact

SECRET = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"


@pytest.mark.parametrize(
    "text",
    [
        "MLflow at https://ann:hunter2@mlflow.example:5000: expected to connect",
        "postgresql+psycopg2://errata:hunter2@db:5432/mlflow",
        "postgresql://errata:hun/ter2@db/mlflow?sslmode=require",
        "http://ann:hunter2@ss@host/path",
        "https://hunter2@mlflow.example/api and http://ann:hunter2@other",
        "GET https://b.s3.amazonaws.com/k?X-Amz-Credential=hunter2&X-Amz-Signature=hunter2",
        "headers: {'Authorization': 'Bearer hunter2'}",
        "Authorization: Basic hunter2",
        "the key AKIAHUNTER2HUNTER212 is unknown",
    ],
)
def test_secrets_go(text: str) -> None:
    assert "hunter2" not in redact(text).lower() and "ter2" not in redact(text)
    assert "***" in redact(text)


@pytest.mark.parametrize(
    "text",
    [
        "MLflow at http://127.0.0.1:5000/#/models/main: expected a version of 'main'",
        "models:/main@champion is version 3",
        "sqlite:////work/errata/mlflow.db",
        "edits.jsonl:2: prompt: expected one {}; found 'ann@example.org'",
        "s3://bucket/prefix: expected an object 'a'; case-1@2",
    ],
)
def test_all_else_stays(text: str) -> None:
    assert redact(text) == text


def test_values_of_secret_variables_go_wherever_they_appear(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD", "PREFECT_API_KEY"):
        monkeypatch.setenv(name, f"{SECRET}{name}")
        assert redact(f"expected {SECRET}{name}.") == "expected ***."
        monkeypatch.delenv(name)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "test")
    assert redact("a test") == "a test"


def test_errors_carry_no_secret() -> None:
    found = [kind("root: expected a folder, found 'ftp://ann:hunter2@host'") for kind in (ErrataError, StorageError, RecordError)]
    assert [str(error) for error in found] == ["root: expected a folder, found 'ftp://***@host'"] * 3


@pytest.fixture
def handler(monkeypatch: pytest.MonkeyPatch) -> Iterator[logging.Handler]:
    """Ours, the only one of a process that has just started."""
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    start_logs()
    start_logs()
    (handler,) = logging.getLogger().handlers
    yield handler
    logging.captureWarnings(False)


def test_log_lines_are_json_without_secrets(handler: logging.Handler, capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("errata.somewhere")
    logger.info("reading %s", "https://ann:hunter2@host", extra={"url": "https://ann:hunter2@host", "seconds": 0.5, "commit": None})
    try:
        raise ValueError('one "line"\nand another, of https://ann:hunter2@host')
    except ValueError as error:
        logger.exception("failed")
        sys.excepthook(ValueError, error, error.__traceback__)
    printed = capsys.readouterr().err
    first, second, third = map(json.loads, printed.splitlines())
    assert "hunter2" not in printed
    assert first.pop("time").endswith("+00:00")
    told = {"level": "INFO", "logger": "errata.somewhere", "message": "reading https://***@host"}
    assert first == {**told, "url": "https://***@host", "seconds": 0.5, "commit": None}
    assert (second["level"], third["level"]) == ("ERROR", "CRITICAL")
    assert all('one "line"\nand another' in line["traceback"] for line in (second, third))


def test_what_prefect_logs_of_a_run_is_left_to_prefect(handler: logging.Handler, capsys: pytest.CaptureFixture[str]) -> None:
    for name, message in (("prefect.task_runs", "Crash detected"), ("somebody.else", "a warning")):
        handler.handle(logging.makeLogRecord({"name": name, "levelno": logging.CRITICAL, "msg": message}))
    assert [json.loads(line)["message"] for line in capsys.readouterr().err.splitlines()] == ["a warning"]


def test_at_a_terminal_only_warnings_are_told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    start_logs()
    logging.getLogger("errata.somewhere").info("a word")
    logging.getLogger("errata.somewhere").warning("commit_batch: outcome failed", extra={"stage": "commit_batch"})
    logging.getLogger("errata.somewhere").warning("no checkpoint at %s", "https://ann:hunter2@host")
    assert capsys.readouterr().err == "WARNING: no checkpoint at https://***@host\n"
