"""What an editor is: pairs are prepared once per edit on the base, merged once per batch into an additive state (design §5)."""

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, Protocol, Self, TypeVar

import torch

from errata.editors.artifacts import Artifact, Fetch, Parts, pack_tensors, unpack_tensors
from errata.edits import Edit
from errata.errors import BaseMismatchError, EditorError
from errata.modeling.loading import Base

_FORMAT = 1

Progress = Callable[[int, int], None]
"""Called with (done, total)."""


class Blobs(Protocol):
    """Immutable bytes under their digest. The object store of a stream is one."""

    def get(self, digest: str) -> bytes: ...

    def put(self, data: bytes) -> str: ...

    def fetch(self, digest: str) -> bytes | Path:
        """As `get`; large ones as a local file, which is not to be changed."""
        return self.get(digest)

    def put_from(self, write: Callable[[BinaryIO], object]) -> str:
        """As `put`, of what `write` writes, however large that is."""
        with io.BytesIO() as file:
            write(file)
            return self.put(file.getvalue())


@dataclass(frozen=True)
class Pairs:
    """Keys and residuals of n pairs, float32, as they are stored: artifacts are built from exactly these values.

    A pair is one line, or several of an editor that writes a target token by token: `sizes`.
    """

    base: str
    """Digest of the base they were read from."""
    prepare: str
    """Digest of the prepare options."""
    owners: tuple[tuple[str, ...], ...]
    """Row → ids of the edits it carries, one or more."""
    residuals: torch.Tensor
    """[lines, d_out] float32: what is to be added to the output. D4S: z − h at the last edited layer; iReVa: the values of neurons."""
    keys: Mapping[int, torch.Tensor]
    """Layer → [lines, d_in] float32: the input it is to be added at."""
    erased: tuple[str | None, ...] = ()
    """Row → the digest it had before it was erased, None where it was not; empty where no row was. An erased row is zero: it adds nothing
    and takes nothing away, and its digest keeps the chain of the recipe whole."""
    sizes: tuple[int, ...] = ()
    """Row → how many lines it has, one after the other; empty where each has one."""
    scopes: tuple[str, ...] = ()
    """Row → digest of the subject its edit is about, for an editor that asks for it; empty for others. Empty in a row that was erased."""

    def __len__(self) -> int:
        return len(self.owners)

    @property
    def starts(self) -> list[int]:
        """Row → its first line; one more, the end."""
        return list(accumulate(self.sizes, initial=0)) if self.sizes else list(range(len(self) + 1))

    def take(self, rows: Sequence[int]) -> Self:
        """The rows named, in that order."""
        starts = self.starts
        index = torch.tensor([line for row in rows for line in range(starts[row], starts[row + 1])], dtype=torch.long)
        keys = {layer: keys[index] for layer, keys in self.keys.items()}
        owners, erased = tuple(self.owners[row] for row in rows), tuple(self.erased[row] for row in rows) if self.erased else ()
        taken = replace(self, owners=owners, residuals=self.residuals[index], keys=keys, erased=erased if any(erased) else ())
        sizes = tuple(self.sizes[row] for row in rows) if self.sizes else ()
        return replace(taken, sizes=sizes, scopes=tuple(self.scopes[row] for row in rows) if self.scopes else ())

    def erase(self, rows: Sequence[int]) -> Self:
        """The same rows under the same numbers, those named all zero."""
        digests, gone, starts = self.digest_rows(), set(rows), self.starts
        kept = torch.tensor([[row not in gone] for row in range(len(self)) for _ in range(starts[row], starts[row + 1])])
        keys = {layer: torch.where(kept, keys, 0.0) for layer, keys in self.keys.items()}
        before = self.erased or (None,) * len(self)
        erased = tuple(digests[row] if row in gone else before[row] for row in range(len(self)))
        scopes = tuple("" if row in gone else scope for row, scope in enumerate(self.scopes))
        return replace(self, residuals=torch.where(kept, self.residuals, 0.0), keys=keys, erased=erased, scopes=scopes)

    def digest_rows(self) -> list[str]:
        """One digest per row over owners, residual and keys: equal wherever the row is stored, in whatever object."""
        digests, starts = [], self.starts
        for row, owners in enumerate(self.owners):
            if self.erased and (known := self.erased[row]):
                digests.append(known)
                continue
            digest = hashlib.sha256(json.dumps([self.base, self.prepare, owners]).encode())
            for tensor in (self.residuals, *(self.keys[layer] for layer in sorted(self.keys))):
                digest.update(tensor[starts[row] : starts[row + 1]].contiguous().numpy().tobytes())
            digests.append(digest.hexdigest())
        return digests

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """`r` [lines, d_out] and `k.<layer>` [lines, d_in], as they are stored."""
        tensors = {"r": self.residuals, **{f"k.{layer}": keys for layer, keys in self.keys.items()}}
        return {name: tensor.float().contiguous().cpu() for name, tensor in tensors.items()}

    @classmethod
    def from_tensors(
        cls,
        base: str,
        prepare: str,
        owners: Sequence[Sequence[str]],
        tensors: Mapping[str, torch.Tensor],
        erased: Sequence[str | None] = (),
        sizes: Sequence[int] = (),
        scopes: Sequence[str] = (),
    ) -> Self:
        """The inverse of `to_tensors` and `describe`."""
        keys = {int(name.removeprefix("k.")): tensor for name, tensor in tensors.items() if name.startswith("k.")}
        ids = tuple(tuple(each) for each in owners)
        return cls(base, prepare, ids, tensors["r"], keys, tuple(erased), tuple(sizes), tuple(scopes))

    def describe(self) -> dict[str, Any]:
        """What is stored beside the tensors, base and prepare options apart; what is empty is left out."""
        rest = {"erased": self.erased, "sizes": self.sizes, "scopes": self.scopes}
        return {"owners": self.owners, **{name: values for name, values in rest.items() if values}}

    def to_bytes(self) -> bytes:
        return pack_tensors("pairs", _FORMAT, self.to_tensors(), {"base": self.base, "prepare": self.prepare, **self.describe()})

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Raises FormatError: not pairs of this format."""
        tensors, metadata = unpack_tensors(data, "pairs", _FORMAT)
        rest = {name: metadata.get(name, ()) for name in ("erased", "sizes", "scopes")}
        return cls.from_tensors(metadata["base"], metadata["prepare"], metadata["owners"], tensors, **rest)

    @classmethod
    def concatenate(cls, parts: Sequence[Self]) -> Self:
        """Several blocks as one, in order.

        Raises:
            BaseMismatchError: blocks of different bases or prepare options; mixing them is meaningless.
            EditorError: no blocks.
        """
        if not parts:
            raise EditorError("expected at least one block of pairs, found none")
        first = parts[0]
        for part in parts[1:]:
            first.require_same(part.base, part.prepare)
        keys = {layer: torch.cat([part.keys[layer] for part in parts]) for layer in first.keys}
        owners = tuple(ids for part in parts for ids in part.owners)
        erased = tuple(digest for part in parts for digest in part.erased or (None,) * len(part))
        residuals = torch.cat([part.residuals for part in parts])
        sizes, scopes = tuple(size for part in parts for size in part.sizes), tuple(scope for part in parts for scope in part.scopes)
        return cls(first.base, first.prepare, owners, residuals, keys, erased if any(erased) else (), sizes, scopes)

    def require_same(self, base: str, prepare: str) -> None:
        """Raises BaseMismatchError where these pairs were made on another base or with other prepare options."""
        for name, ours, theirs in (("base", self.base, base), ("prepare options", self.prepare, prepare)):
            if ours != theirs:
                raise BaseMismatchError(f"pairs: expected {name} {theirs[:12]}, found {ours[:12]}; edits must be prepared anew there")


@dataclass(frozen=True)
class Preparation:
    """How far one edit's optimisation came. Kept in the report; the gate reads it."""

    loss: float
    target_nll: float
    """Mean NLL per target token over the contexts at z, in nats."""
    steps: int
    shift: float
    """‖δ‖ / ‖h‖."""


@dataclass(frozen=True)
class Prepared:
    """Pairs of one call of `prepare`, and what became of each edit."""

    pairs: Pairs | None
    """None where no edit could be prepared."""
    notes: Mapping[str, Preparation]
    """Edit id → diagnostics, for each row."""
    refused: Mapping[str, str]
    """Edit id → reason, where no pair can be made (the tokenizer cannot place the subject, the prompt does not fit, …)."""


def list_units(ids: Iterable[str], groups: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    """The edits `ids` as units of one pair each, in the order of their first member; within a unit in canonical order, that of the ids.

    Args:
        groups: ids that belong together. Members that are not among `ids` are left out.
    """
    present = list(ids)
    known = set(present)
    unit_of = {member: tuple(sorted(known.intersection(group))) for group in groups for member in group}
    return list(dict.fromkeys(unit_of.get(edit_id, (edit_id,)) for edit_id in present))


class State(Protocol):
    """Additive and serialisable."""

    count: int
    """Pairs that are live in it."""

    @property
    def parts(self) -> Parts:
        """What it has in objects of their own, which its bytes name."""
        ...

    def to_bytes(self) -> bytes: ...

    def write(self, file: BinaryIO) -> None:
        """What `to_bytes` returns, piece by piece."""
        ...


S = TypeVar("S", bound=State)


class Editor(Protocol[S]):
    """Prepare is expensive, per edit and parallel; merge is cheap and once per batch."""

    name: str
    version: str

    @property
    def order_free(self) -> bool:
        """Whether a pair depends on its edits, the base and the profile alone, so that the same edits give the same weights in any order
        and split. Where it does not, pairs that are stored still add and subtract exactly, in any order."""
        ...

    @property
    def options(self) -> Mapping[str, Any]:
        """Everything besides the pairs that decides the weights, as JSON. Part of the recipe digest."""
        ...

    def find_groups(self, base: Base, edits: Sequence[Edit]) -> Sequence[tuple[str, ...]]:
        """Edits that must share one pair because apart they would get in each other's way: ids in canonical order, two or more."""
        ...

    def prepare(
        self,
        base: Base,
        edits: Sequence[Edit],
        on_progress: Progress | None = None,
        groups: Sequence[Sequence[str]] = (),
        state: S | None = None,
    ) -> Prepared:
        """Pairs: one for each of the `groups`, in which edits share it, one for each edit that is in none.

        Args:
            state: what the pairs will be added to. Only an editor that is not order-free looks at it; None is the empty state.
        """
        ...

    def empty_state(self) -> S: ...

    def load_state(self, source: bytes | Path, fetch: Fetch) -> S:
        """From what `State.write` wrote, in memory or in a file, which must stay as long as the state.

        Args:
            fetch: digest → bytes of its parts.
        """
        ...

    def carry_state(self, state: S) -> S | None:
        """A state that was made under another solve part, as it has to be under this one; None where the pairs have to be summed anew.

        Raises:
            BaseMismatchError: it is of another base, or of other prepare options.
        """
        ...

    def merge(self, state: S, add: Pairs | None, remove: Pairs | None) -> S:
        """State with pairs added and removed. Raises BaseMismatchError for pairs of another base or profile."""
        ...

    def solve(self, state: S) -> Artifact | None:
        """The artifact of a state; None for a state without edits, which is the base itself."""
        ...

    def solve_exact(self, state: S) -> Mapping[str, torch.Tensor]:
        """What the artifact writes, before it is rounded for storage: name → float64, as `Artifact.written` names it; empty for a state
        without edits. Equal for states of the same live pairs, whatever order they came in."""
        ...

    def measure_fits(self, state: S, pairs: Pairs) -> torch.Tensor:
        """How much of each pair's residual its own part of the artifact realises: [n] float64, 1 being all of it."""
        ...

    def find_uncovered(self, state: S) -> Mapping[str, str]:
        """Edits that were removed and that the state still keeps others from answering for: id → id of the live edit that would answer
        their own prompt instead of the base, once the state is built anew from its live pairs. Empty for an editor that keeps nothing of
        what was removed."""
        ...

    def measure_conditions(self, state: S) -> Mapping[str, float]:
        """Parameter name → condition number of the matrix that its weights are solved with; empty for a state without edits."""
        ...
