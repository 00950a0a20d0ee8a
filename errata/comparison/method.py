"""What the comparison asks of a method: edits go in batch by batch, and what a model has to carry comes out where it is measured.

Most methods compared here cannot be an editor of a stream (design §5): their edits cannot be taken back, or depend on order. Hence this
contract and not `errata.editors.base.Editor`. Whatever a method changes, it changes through artifacts: the base itself stays as it is.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from errata.editors.d4s.moments import Moments
from errata.edits import Edit
from errata.errors import EditorError
from errata.modeling.loading import Base
from errata.modeling.patch import Attachable
from errata.profiles import NeuronProfile, Profile

SPLIT_SEED = 0
"""Of held-out probes (`errata.evaluation.probes`), in every run: whoever makes data for a comparison can withhold the same ones."""


@dataclass(frozen=True)
class Bench:
    """What all methods of one run start from."""

    base: Base
    profile: Profile
    """D4S's own for this base; all that write weights share its layers, contexts, options of z, and λ where they have one."""
    moments: Moments
    neurons: NeuronProfile
    """iReVa's own for this base."""
    pool: tuple[Edit, ...]
    """Edits about subjects that the stream does not name: demonstrations for what edits in context."""
    work: Path
    """Folder of this run alone, for what takes long."""
    seed: int
    batch_tokens: int
    """Padded tokens that are scored or generated at once."""


class UnsuitedError(EditorError):
    """The method cannot do anything with this base: no result, not even a bad one."""


class Method(Protocol):
    """One way to make a model say something else, over the length of one stream."""

    @property
    def refused(self) -> Mapping[str, str]:
        """Edit id → reason, of those that could not be taken so far; all others were."""
        ...

    def write(self, edits: Sequence[Edit]) -> None:
        """Take in the next batch. An edit of a slot that an earlier one had replaces it, as far as the method can do that.

        Raises:
            EditorError: it cannot be written; the comparison says so and ends this run.
        """
        ...

    def build_artifacts(self) -> Sequence[Attachable]:
        """What makes the base the edited model, after all that was written so far. Called at checkpoints only.

        Raises:
            EditorError: as `write`.
            UnsuitedError: the base lacks what the method lives on.
        """
        ...

    def count_bytes(self) -> int:
        """Bytes that have to be kept so that the next batch can be written: state, not the base."""
        ...


@dataclass(frozen=True)
class Recipe:
    """A method as the comparison knows it."""

    name: str
    """As `--methods` takes it."""
    title: str
    """As tables show it."""
    source: str
    """Paper, and code that was read."""
    build: Callable[[Bench], Method]
    differs: str = ""
    """Where ours departs from the published code, and why."""
    same: bool = False
    """Whether it comes to the same whatever the size of batches, as all that writes edit by edit does: measured with the smallest."""
    final_only: bool = False
    """Whether it is too slow to be measured at each checkpoint: measured after the last edit."""
