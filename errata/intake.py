"""From the files of an inbox to arrivals: each line that no commit has consumed yet, in order."""

from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import Protocol

from errata.batching import Arrival
from errata.edits import Refusal, Submission
from errata.readers.files import read_lines


class WaitingFile(Protocol):
    """A file of the inbox (`registry.inbox.InboxFile`)."""

    @property
    def name(self) -> str: ...
    @property
    def digest(self) -> str: ...
    @property
    def data(self) -> bytes: ...
    @property
    def consumed(self) -> tuple[tuple[int, int], ...]:
        """Runs of lines, 1-based, both ends included."""

    @property
    def modified(self) -> datetime:
        """When it arrived, by the storage's clock."""

    @property
    def urgent(self) -> bool:
        """It goes before files that arrived earlier."""


class Intake:
    """Reads files as far as it is asked to, and remembers which it has read to their end."""

    def __init__(self, files: Iterable[WaitingFile]) -> None:
        self._files = files
        self.names: dict[str, str] = {}
        """Digest → name of every file it has begun."""
        self.ended: set[str] = set()
        """Digests of the files without a line left beyond those handed out."""

    def read(self) -> Iterator[Arrival]:
        for file in self._files:
            if file.digest in self.names:
                continue  # the same bytes under a second name are consumed once
            self.names[file.digest] = file.name
            consumed = {line for first, last in file.consumed for line in range(first, last + 1)}
            rows = read_lines(file.data, file.name, consumed)
            row = next(rows, None)
            while row is not None:
                line, record = row
                row = next(rows, None)  # one ahead, so that the last one is known as the last when it is handed out
                if row is None:
                    self.ended.add(file.digest)
                yield Arrival(_date_record(record, file), file.digest, line)


def _date_record(record: Submission | Refusal, file: WaitingFile) -> Submission | Refusal:
    """The record with the time that an overtaken one is compared by: what is urgent must not be undone by what waited before it."""
    if isinstance(record, Refusal):
        return record
    if file.urgent and record.edit.submitted_at is None:
        return record.model_copy(update={"edit": record.edit.model_copy(update={"submitted_at": file.modified})})
    return record.model_copy(update={"arrived": file.modified})
