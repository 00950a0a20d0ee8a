"""Where a stream's objects and its log part, as data: what a rebuild found, and what it did about it."""

from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict

from errata.editors.base import Blobs
from errata.errors import ErasedError, KeyMissingError, ObjectCorruptError

FindingState = Literal["mended", "mendable", "replaced", "unequal", "differs", "lost", "erased", "archived"]
"""`mended`: was missing or damaged and is stored again, bit for bit; `mendable`: would be; `unequal`: its bytes come out otherwise on this
machine; `replaced`: so they did, and a rebuild commit points to a new one; `differs`: it is intact and not what the log gives; `lost`:
nothing makes it again; `erased`: it held an edit that was erased, and is gone on purpose or in a form without it; `archived`: weights of a
version that is not kept, which are told of by commit only."""

_SAID: Mapping[FindingState, str] = {
    "mended": "made again from the stored pairs, bit for bit",
    "mendable": "`errata rebuild` makes it again from the stored pairs, bit for bit",
    "unequal": "from the stored pairs it comes out with other bytes here: another machine, other libraries, or another number of threads",
    "lost": "what it was made from is lost, too: nothing makes it again",
    "erased": "it carried an edit that was erased: gone for good, and on purpose",
    "archived": "`errata rebuild --to` makes the weights of an archived version again",
    "replaced": "from the stored pairs it came out with other bytes; a rebuild commit points to them",
}


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Finding(_Record):
    """One object, or one commit, that is not as it should be."""

    commit: int
    what: str
    """`artifact`, `snapshot`, `manifest`, `change list`, `live list`, `recipe`, `pairs`, `outcomes`, `batch`, `report`, `file` or
    `commit`."""
    state: FindingState
    detail: str
    digest: str | None = None
    edits: tuple[str, ...] = ()
    """Occurrences that are affected."""


class RebuildReport(_Record):
    """What a rebuild compared, and what it found."""

    stream: str
    to: int
    """The last commit that was replayed."""
    check: bool
    """Nothing was to be changed."""
    recipe: str | None
    """After that commit, from the stored pairs; None where it cannot be known."""
    compared: dict[str, int]
    """How weights were compared (`bits`, `float64`, `float32`) → commits."""
    worst: float
    """Largest relative difference of weights that were not equal to the bit."""
    unverified: tuple[int, ...]
    """Commits whose weights could not be compared, because something before them is lost."""
    archived: tuple[int, ...] = ()
    """Commits whose stored weights are given up: replayed, but there is nothing to compare with."""
    findings: tuple[Finding, ...]
    commit: int | None = None
    """The rebuild commit that was made."""
    seconds: float

    @property
    def sound(self) -> bool:
        """Everything is as the log says, now."""
        return not self.unverified and all(finding.state in ("mended", "replaced", "erased") for finding in self.findings)


def find_fault(blobs: Blobs, digest: str) -> str | None:
    """What is wrong with a stored object: `missing`, `erased`, `damaged`, or nothing.

    Raises:
        StorageError: the storage fails, which says nothing about the object.
    """
    try:
        blobs.get(digest)
    except ErasedError:
        return "erased"
    except KeyMissingError:
        return "missing"
    except ObjectCorruptError:
        return "damaged"
    return None


def describe_fault(fault: str, state: FindingState) -> str:
    """A fault of something that can be derived, and what becomes of it."""
    return f"{fault}; {_SAID[state]}"
