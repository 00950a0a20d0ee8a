"""What is compared, and what was found: one cell is one method on one stream in batches of one size."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from errata.edits import canonical_json, digest_of

_FORMAT = 1
"""Raised whenever what is measured changes, so that nothing older is taken for it."""
_STOPS = (1, 10, 100, 500, 1_000, 2_000, 5_000, 10_000)


class Size(NamedTuple):
    """How much is compared."""

    edits: int
    """Of each stream."""
    batches: tuple[int, ...]
    seeds: int
    judged: int
    """Edits asked about with all their probes at each stop."""
    said: int
    """Edits asked for a greedy answer at each stop."""


FULL = Size(edits=1_000, batches=(1, 10, 100), seeds=3, judged=200, said=50)
QUICK = Size(edits=100, batches=(1, 20), seeds=2, judged=60, said=30)
"""The whole table within ten minutes on two cores."""


class Measure(NamedTuple):
    """Something that is measured, as people read it."""

    title: str
    meaning: str
    digits: int = 3


MEASURES: Mapping[str, Measure] = {
    "efficacy": Measure("efficacy", "live edits, of all ages, whose target is the model's choice token by token, teacher forced"),
    "generalization": Measure("generalization", "the same of the paraphrase that is held out; where the base was trained here, withheld"),
    "specificity": Measure("specificity", "held-out neighbours' tokens that are still the base's own choice"),
    "score": Measure("score", "harmonic mean of these three"),
    "truth": Measure("truth", "held-out neighbours' tokens that are right; the base's own is its ceiling"),
    "es": Measure("ES", "edits whose new target is likelier than the true one"),
    "ps": Measure("PS", "the same of held-out paraphrases"),
    "ns": Measure("NS", "held-out neighbours whose true answer is likelier than the new target"),
    "em": Measure("EM", "by how much, in geometric mean token probability"),
    "pm": Measure("PM", "the same of held-out paraphrases"),
    "nm": Measure("NM", "the same of held-out neighbours, the truth over the new target"),
    "portability": Measure("portability", "token accuracy on what follows from the edit"),
    "said": Measure("said", "edits whose target a greedy answer begins with: the honest efficacy"),
    "said_paraphrase": Measure("said, paraphrase", "the same of held-out paraphrases"),
    "newest": Measure("newest", "efficacy of the last ten edits"),
    "oldest": Measure("oldest", "efficacy of the first ten edits"),
    "ability": Measure("ability", "multiple choice about other subjects, by likelihood"),
    "perplexity_ratio": Measure("perplexity ratio", "on passages about other subjects, to the base's"),
    "kl": Measure("KL", "from the base on these passages, nats per token"),
    "fluency": Measure("fluency", "n-gram entropy of free text, bits", 2),
    "norm_ratio": Measure("norm ratio", "mean |W| / mean |W0| of the weight that grew most", 2),
    "frobenius_ratio": Measure("‖W‖ ratio", "Frobenius norm to the base's, of the weight that grew most", 2),
    "spectral_ratio": Measure("spectral ratio", "spectral norm of the change to that of the weight, the largest", 2),
    "write_seconds": Measure("s per edit", "of writing; CPU seconds, on a GPU wall seconds", 4),
    "build_seconds": Measure("s to build", "what the model carries, at the end; likewise", 2),
    "peak_mib": Measure("peak MiB", "of memory above the base, while writing", 0),
    "state_bytes": Measure("state", "bytes that must be kept to go on", 0),
}


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Scope(_Record):
    """What all cells of a comparison have in common."""

    base: str
    profile: str
    neurons: str
    """Digests."""
    lam: float = 1.0
    """λ of all that have one, as a multiple of the profile's."""
    edits: int
    judged: int
    """Edits at most that are asked about with all their probes at each stop; efficacy is over all."""
    said: int
    """Edits at most that are asked for a greedy answer."""


class Cell(_Record):
    method: str
    batch: int
    seed: int

    @property
    def title(self) -> str:
        return f"{self.method}, batches of {self.batch}, seed {self.seed}"


class Point(_Record):
    """What was found after so many edits."""

    edits: int
    live: int
    values: dict[str, float | None]
    """By name in `MEASURES`; None where the data has nothing to ask, or the model said nothing finite."""
    ages: dict[str, float]
    """Efficacy by how many edits came after: `0-9`, `10-99`, `100-499`, `500-on`."""


class EditRow(_Record):
    """One live edit at one stop."""

    edits: int
    edit: str
    position: int
    """From 0."""
    efficacy: float
    generalization: float | None = None
    specificity: float | None = None
    """None where it was not asked: only so many are (`Scope.judged`)."""
    said: float | None = None


class CellResult(_Record):
    cell: Cell
    fault: str = ""
    """Why it ended early; empty where it did not."""
    unsuited: bool = False
    """Whether it ended because the method can do nothing with this base."""
    written: int
    points: tuple[Point, ...]
    rows: tuple[EditRow, ...] = Field(repr=False)
    refused: dict[str, str]
    """Edit id → reason, of those that the method could not take."""
    seconds: float
    device: str
    load: float
    """Of the machine, when it ended."""

    @property
    def last(self) -> Point | None:
        return self.points[-1] if self.points else None


def name_cell(scope: Scope, material: str, cell: Cell) -> str:
    """24 hex digits: equal for what would be measured alike.

    Args:
        material: its digest.
    """
    content = [_FORMAT, scope.model_dump(mode="json"), material, cell.model_dump(mode="json")]
    return digest_of(canonical_json(content))[:24]


def list_stops(edits: int, batch: int) -> list[int]:
    """After how many edits is measured: at the first ends of batches from 1, 10, 100, 500, 1,000 … on, and at the end."""
    rounded = (-(-stop // batch) * batch for stop in _STOPS)
    return sorted({stop for stop in rounded if stop < edits} | {edits})


def name_age(age: int) -> str:
    """The bucket of an edit that so many came after."""
    return next(name for most, name in ((9, "0-9"), (99, "10-99"), (499, "100-499"), (age, "500-on")) if age <= most)


def list_cells(methods: Sequence[str], batches: Sequence[int], seeds: Sequence[int], once: Mapping[str, int]) -> Iterator[Cell]:
    """Seed by seed, so that a comparison that is interrupted has whole tables.

    Args:
        once: methods that are measured with one size of batches alone, and which.
    """
    for seed in seeds:
        for method in methods:
            yield from (Cell(method=method, batch=batch, seed=seed) for batch in ([once[method]] if method in once else batches))
