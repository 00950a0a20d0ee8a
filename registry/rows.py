"""The rows of the objects that a commit names: which records it considered, what became of each, which lines are consumed."""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from errata.edits import Edit, Risk
from errata.errors import FormatError

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Lines = tuple[int, int]
"""First and last line of a run of lines, 1-based, both included."""
Status = Literal["live", "replaced", "superseded", "stale", "quarantined", "rejected", "dropped", "withdrawn", "reverted", "erased"]
"""Where an occurrence stands. `withdrawn`: taken back by name; `reverted`: a rollback left it behind; `erased`: a tombstone, its text and
its pair are gone for good."""
OutcomeName = Status | Literal["duplicate", "withheld", "refused"]
"""What became of one record: a status, or nothing happened (`duplicate`, `withheld`), or it was no edit (`refused`)."""


class Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileUse(Record):
    """Which lines of one inbox file have been consumed."""

    digest: Digest
    """Of the file's raw bytes, which are an object of the stream."""
    name: str
    lines: tuple[Lines, ...]
    done: bool
    """No line is left."""


class BatchRow(Record):
    """One record that a commit considered; the rows of the `batch` object, in arrival order."""

    position: int = Field(ge=0)
    occurrence: str
    edit: Edit
    origin: str
    file: Digest
    line: int = Field(ge=1)
    erased: Literal[True] | None = None
    """Its text is gone for good: `edit` has its id, and says nothing else."""
    risk: Risk | None = None
    """On the base that it came to. None where nothing was to be written into weights for it: settled without the model, or for memory."""

    @model_serializer(mode="wrap")
    def _omit_no_risk(self, spell: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Rows without one are spelled as they were before it was measured."""
        content: dict[str, Any] = spell(self)
        return content if self.risk else {name: value for name, value in content.items() if name != "risk"}


class Standing(Record):
    """Where an older occurrence stood before this commit moved it: what a rollback across it, and a replay, need to know."""

    status: Status
    by: str | None = None
    reason: str | None = None
    since: AwareDatetime | None = None
    pairs: Digest | None = None
    """Of a live one: the pairs object its pair lay in."""
    row: int | None = None


class Outcome(Record):
    """What became of a record of this batch, or of an older occurrence; the rows of the `outcomes` object.

    A row about this batch carries `file` and `line` of its record. A row about an older occurrence carries its name and how it stood
    `before`; a live one that stays live has another pair from now on (`pairs`, `row`), because its key group or its base changed.
    """

    outcome: OutcomeName
    occurrence: str | None = None
    """`<id>@<seq>`; none for a refused record."""
    by: str | None = None
    """The occurrence that took its place."""
    reason: str | None = None
    origin: str | None = None
    field: str | None = None
    pairs: Digest | None = None
    row: int | None = None
    """Row in the pairs object."""
    under: str | None = None
    """Digest of the settings it was judged under."""
    file: Digest | None = None
    line: int | None = None
    since: AwareDatetime | None = None
    """When it was withdrawn, where that was not by this commit."""
    before: Standing | None = None

    @property
    def status(self) -> Status | None:
        """The status it gives the occurrence; None where the record came to nothing."""
        # Spelled out so that the type checker narrows it.
        if self.outcome == "duplicate" or self.outcome == "withheld" or self.outcome == "refused":
            return None
        return self.outcome

    @property
    def told(self) -> str:
        """The outcome in a word for people: an edit that stays live with another pair is no new live edit."""
        return "regrouped" if self.outcome == "live" and self.before and self.before.status == "live" else self.outcome

    @model_validator(mode="after")
    def _name_its_subject(self) -> "Outcome":
        if (self.occurrence is None) != (self.outcome == "refused"):
            raise ValueError(f"expected an occurrence unless refused, found {self.occurrence!r} with outcome {self.outcome!r}")
        return self


_Row = TypeVar("_Row", BatchRow, Outcome)


def read_rows(model: type[_Row], rows: list[dict[str, Any]], where: str) -> list[_Row]:
    """Rows of a batch or outcomes object.

    Raises:
        FormatError: one is not as the model says.
    """
    try:
        return [model.model_validate(row) for row in rows]
    except ValidationError as error:
        raise FormatError(f"{where}: {describe_faults(error)}") from None


def describe_faults(error: ValidationError) -> str:
    """What does not fit, field by field, in one line."""
    return "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']} (found {str(e['input'])[:80]!r})" for e in error.errors())
