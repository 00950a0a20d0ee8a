"""Where log lines go: JSON on stderr, one object per line; at a terminal only warnings, in words. Secrets are in neither.

Programs call `start_logs` first, before they import what logs; a library that is imported never does.
"""

import logging
import sys
from types import TracebackType
from typing import TextIO

from pythonjsonlogger.json import JsonFormatter

from errata.redaction import redact

ROOMS = ("errata", "registry", "tasks", "flows")
RUN_LOGS = ("prefect.flow_runs", "prefect.task_runs")
"""Their lines belong to Prefect's server. What they share with ours is said by ours, too."""
_NAME = "errata"


class Redaction(logging.Filter):
    """Takes secrets out of a record's message, its traceback and its fields. Passes every record."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = redact(record.getMessage()), None
        if record.exc_info:
            record.exc_text, record.exc_info = redact(logging.Formatter().formatException(record.exc_info)), None
        for name, value in vars(record).items():
            if isinstance(value, str):
                setattr(record, name, redact(value))
        return True


class StderrHandler(logging.StreamHandler[TextIO]):
    """Writes to what is stderr at that moment. Lines that Prefect's runs log are left to Prefect."""

    def __init__(self) -> None:
        super().__init__()
        self.set_name(_NAME)
        self.addFilter(lambda record: record.name not in RUN_LOGS)
        self.addFilter(Redaction())

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def start_logs() -> None:
    """Send what this process logs to stderr, uncaught exceptions included. Safe to repeat."""
    if has_started():
        return
    handler = StderrHandler()
    if sys.stderr.isatty():
        handler.setLevel(logging.WARNING)
        handler.addFilter(lambda record: not hasattr(record, "stage"))  # the command itself says how it ended
        handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    else:
        names = {"levelname": "level", "name": "logger", "exc_info": "traceback"}
        fields = ("levelname", "name", "message")
        handler.setFormatter(JsonFormatter(fields, timestamp="time", rename_fields=names, json_ensure_ascii=False))
        logging.captureWarnings(True)
    logging.getLogger().addHandler(handler)
    for room in ROOMS:
        logging.getLogger(room).setLevel(logging.INFO)
    sys.excepthook = _log_uncaught


def has_started() -> bool:
    """Whether this process has called `start_logs`."""
    return any(handler.name == _NAME for handler in logging.getLogger().handlers)


def _log_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    logging.getLogger(_NAME).critical("%s: this is a fault of the program", kind.__name__, exc_info=(kind, error, trace))
