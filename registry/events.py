"""What a commit says, as data: one frozen model per kind, joined by `kind`.

A commit names its texts and tensors by digest and holds none itself; the rows of those objects are in `registry.rows`. A kind or a format
that this version does not know stops the reader: guessing at a history is worse than not reading it.
"""

import json
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import AwareDatetime, Field, TypeAdapter, ValidationError, model_validator

from errata.edits import canonical_json
from errata.errors import FormatError
from registry.rows import Digest, FileUse, Record, describe_faults

FORMAT = 1
"""Newest format of commits, checkpoints and roots that this version reads, and the one it writes."""
MAX_COMMIT_BYTES = 64_000


class _CommitBase(Record):
    kind: str
    format: Literal[1] = 1
    seq: int = Field(ge=0)
    parent: str = Field(pattern=r"^([0-9a-f]{64})?$")
    """sha256 of the parent commit's bytes; empty for seq 0."""
    batch: Digest | None = None
    outcomes: Digest | None = None
    pairs: tuple[Digest, ...] = ()
    """Pairs objects that this commit adds rows from."""
    manifest: Digest | None = None
    report: Digest | None = None
    files: tuple[FileUse, ...] = ()
    decision: str = ""
    reasons: tuple[str, ...] = ()
    promoted: bool = False
    """The champion is this commit."""
    actor: str
    host: str
    run: str | None = None
    versions: dict[str, str]
    """Of `errata` and the libraries whose results it depends on."""
    device: str | None = None
    threads: int | None = None
    seconds: dict[str, float] = {}
    """Stage → wall seconds it took."""
    time: AwareDatetime
    """For people; `seq` is the only order."""

    @model_validator(mode="after")
    def _begin_at_the_beginning(self) -> "_CommitBase":
        if (self.seq == 0) != (self.parent == "") or (self.seq == 0) != (self.kind == "init"):
            raise ValueError(f"expected init, without parent, at seq 0 only; found {self.kind} at {self.seq} with parent {self.parent!r}")
        return self

    @property
    def name(self) -> str:
        """How messages call it."""
        return f"commit {self.seq} ({self.kind} by {self.actor} on {self.host})"


class _Placing(_CommitBase):
    """The stream stands on one base under one profile from here on."""

    base: dict[str, str | None]
    """Where the base comes from (kind, source, revision) and its `digest`."""
    profile: Digest

    @model_validator(mode="after")
    def _name_the_base(self) -> Self:
        if not self.base.get("digest"):
            raise ValueError(f"base: expected its digest, found {self.base}")
        return self


class _Naming(_CommitBase):
    """About an earlier commit."""

    of: int = Field(ge=0)
    """Its number."""

    @model_validator(mode="after")
    def _look_back(self) -> Self:
        if self.of >= self.seq:
            raise ValueError(f"of: expected a commit before {self.seq}, found {self.of}")
        return self


class InitCommit(_Placing):
    """The stream begins, on one base under one profile."""

    kind: Literal["init"] = "init"
    editors: tuple[str, ...]
    manifest: Digest


class EditsCommit(_CommitBase):
    """A batch was accepted: the manifest is new."""

    kind: Literal["edits"] = "edits"
    batch: Digest
    outcomes: Digest
    manifest: Digest


class MemoryCommit(_CommitBase):
    """A batch answers from memory from here on: its edits are live and have no pairs, and no weight was written for them. Pairs of what
    they replace are subtracted."""

    kind: Literal["memory"] = "memory"
    batch: Digest
    outcomes: Digest
    manifest: Digest


class WithdrawalCommit(_CommitBase):
    """Live edits were taken back: their pairs are subtracted, the manifest is new. The outcomes name them."""

    kind: Literal["withdrawal"] = "withdrawal"
    outcomes: Digest
    manifest: Digest


class ReturnCommit(_CommitBase):
    """The state of an earlier commit is served again. The outcomes name every occurrence that leaves or comes back."""

    target: int = Field(ge=0)
    """The accepted commit, or the first one, whose manifest this is."""
    outcomes: Digest
    manifest: Digest
    """The target's."""
    report: Digest | None = None
    """The target's: what was measured of these very weights."""
    base: str | None = None
    """Digest of the target's base, where the head's is another one."""
    profile: Digest | None = None
    """The target's, likewise."""
    promoted: Literal[True] = True

    @model_validator(mode="after")
    def _look_back(self) -> Self:
        if self.target >= self.seq:
            raise ValueError(f"target: expected a commit before {self.seq}, found {self.target}")
        return self


class RollbackCommit(ReturnCommit):
    """Somebody asked for it."""

    kind: Literal["rollback"] = "rollback"


class RefusalCommit(ReturnCommit):
    """A challenger was refused: the champion's state again."""

    kind: Literal["refusal"] = "refusal"
    of: int = Field(ge=0)
    """The challenger."""


class PromotionCommit(_Naming):
    """A version that waited becomes the champion; `of` is its commit. Nothing else changes."""

    kind: Literal["promotion"] = "promotion"
    outcomes: None = None
    manifest: Digest
    """The previous one: batches go on from the newest accepted version, whatever is served."""
    promoted: Literal[False] = False


class RebuildCommit(_Naming):
    """The state of the newest accepted commit in new objects, because some of its own are damaged and their bytes come out otherwise on
    this machine. Recipe and edits are the same; weights agree to 1e-8."""

    kind: Literal["rebuild"] = "rebuild"
    manifest: Digest


class CompactionCommit(_Naming):
    """The state of the newest accepted commit, summed anew from its live pairs in canonical order, and snapshotted: rounding of many
    additions and subtractions goes, the weights agree to 1e-8. The recipe begins anew."""

    kind: Literal["compaction"] = "compaction"
    live: Digest
    """Of the list of pairs that it sums, spelled as a change list: whoever replays the log can begin here."""
    outcomes: None = None
    manifest: Digest


class CalibrationCommit(_Naming):
    """The sums of the newest accepted commit, solved under the solve part of another profile. The recipe goes on with one more link."""

    kind: Literal["calibration"] = "calibration"
    profile: Digest
    live: Digest | None = None
    """As of a compaction, where the new spread needs sums that there were not: they and the recipe begin anew."""
    outcomes: None = None
    manifest: Digest


class DistillationCommit(_Naming):
    """Live edits were distilled into an adapter on the state of the newest accepted commit, which stays as it is beneath."""

    kind: Literal["distillation"] = "distillation"
    absorbed: int = Field(ge=1)
    """Live edits that the adapter has taken in; it names them itself."""
    outcomes: None = None
    manifest: Digest


class MergeCommit(_CommitBase):
    """The live edits of another stream of this root became edits of this one; the batch holds them in their order of arrival there."""

    kind: Literal["merge"] = "merge"
    source: str
    """Name of the other stream."""
    source_seq: int = Field(ge=0)
    """Its newest commit then."""
    batch: Digest
    outcomes: Digest
    manifest: Digest


class RebaseCommit(_Placing):
    """Live edits were prepared anew on another base, or at another site. The outcomes give each its new pair, or say why it left."""

    kind: Literal["rebase"] = "rebase"
    outcomes: Digest
    manifest: Digest


class ErasureCommit(_CommitBase):
    """Text and pairs of edits are gone for good, and with them every object that held them; the outcomes are their tombstones."""

    kind: Literal["erasure"] = "erasure"
    erased: Digest
    """Of the object that lists what was deleted, and what stands in for it."""
    outcomes: Digest
    manifest: Digest
    """The same recipe, in a snapshot of its own that names no erased pair."""


class RejectionCommit(_CommitBase):
    """Nothing changed in the model; what became of the records, or of quarantined edits, did. Or a withdrawal was refused."""

    kind: Literal["rejection"] = "rejection"
    outcomes: Digest
    manifest: Digest
    """The previous one."""
    promoted: Literal[False] = False


SummingCommit = CompactionCommit | CalibrationCommit  # may name all live pairs
_Changing = EditsCommit | MemoryCommit | WithdrawalCommit | MergeCommit | RebaseCommit | ErasureCommit
AcceptedCommit = _Changing | RollbackCommit | RefusalCommit | RebuildCommit | SummingCommit | DistillationCommit
"""Each of them is a version of the model."""
Commit = InitCommit | AcceptedCommit | PromotionCommit | RejectionCommit
_COMMIT: TypeAdapter[Commit] = TypeAdapter(Annotated[Commit, Field(discriminator="kind")])
_KINDS = tuple(str(member.model_fields["kind"].default) for member in get_args(Commit))


def write_commit(commit: Commit) -> bytes:
    """The commit's one spelling.

    Raises:
        FormatError: it is larger than a commit may be; texts belong into objects.
    """
    data = canonical_json(commit.model_dump(mode="json"))
    if len(data) >= MAX_COMMIT_BYTES:
        raise FormatError(f"commit {commit.seq}: expected less than {MAX_COMMIT_BYTES} bytes, found {len(data)}")
    return data


def read_commit(data: bytes, where: str) -> Commit:
    """The commit in `data`.

    Raises:
        FormatError: it was written by a newer Errata, is of an unknown kind, or is no commit.
    """
    content = read_formatted(data, where)
    if content.get("kind") not in _KINDS:
        raise FormatError(f"{where}: expected a commit of kind {', '.join(_KINDS)}, found {content.get('kind')!r}; {_name_need(content)}")
    try:
        return _COMMIT.validate_python(content)
    except ValidationError as error:
        raise FormatError(f"{where}: {describe_faults(error)}") from None


def read_formatted(data: bytes, where: str) -> dict[str, Any]:
    """A JSON object whose `format` this version knows.

    Raises:
        FormatError: not JSON, no format, or a newer one.
    """
    try:
        content = json.loads(data)
    except ValueError as error:
        raise FormatError(f"{where}: expected JSON, found {data[:40]!r} ({error})") from None
    if not isinstance(content, dict) or not isinstance(content.get("format"), int):
        raise FormatError(f"{where}: expected an object with a format number, found {data[:40]!r}")
    if content["format"] > FORMAT:
        raise FormatError(f"{where}: expected format {FORMAT} or older, found {content['format']}; {_name_need(content)}")
    return content


def _name_need(content: dict[str, Any]) -> str:
    versions = content.get("versions")
    writer = versions.get("errata") if isinstance(versions, dict) else None
    return f"it was written by errata {writer}: install that version or a newer one" if writer else "install a newer errata"
