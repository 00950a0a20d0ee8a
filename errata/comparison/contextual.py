"""Editing in context as a method of the comparison: facts are put before questions, and no weight changes (IKE, MIKE; algorithms.md §2)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from errata.comparison.method import SPLIT_SEED, Bench, Recipe
from errata.editors.memory import EditMemory, MemoryOptions, open_encoder
from errata.edits import Edit
from errata.errors import TokenizationError
from errata.evaluation.probes import state_fact
from errata.modeling.tokens import encode_target
from errata.retrieval.nearest import NearestFacts
from errata.retrieval.routing import Route


@dataclass(frozen=True)
class NearestMemory(EditMemory):
    """A memory that never leaves a question to the base: it puts the nearest fact before whatever is asked (IKE)."""

    def route(self, prompts: Sequence[str]) -> list[Route]:
        """The fact whose sentence is most similar to the question."""
        if not self.facts:
            return [Route(4) for _ in prompts]
        _, found = self._live.search(open_encoder(self.options.encoder).encode(list(prompts)), 1)
        return [Route(3, self.facts[name]) for (name,) in found]

    @cached_property
    def _live(self) -> NearestFacts:
        nearest = NearestFacts("cpu")
        blocks = (*self.closed.values(), self.opened)
        for block in blocks:
            kept = block.keep(self.facts)
            nearest.add([fact.id for fact in kept.facts], kept.vectors)
        return nearest


class InContext:
    """A memory that grows with the stream."""

    def __init__(self, bench: Bench, memory: EditMemory) -> None:
        """
        Args:
            memory: empty; gets the pool of the bench.
        """
        self._tokenizer = bench.base.tokenizer
        self._memory = memory.with_pool([state_fact(edit, f"pool {number}", SPLIT_SEED) for number, edit in enumerate(bench.pool)])
        self._ids: dict[str, str] = {}
        self._edits: dict[str, Edit] = {}
        self._written = 0
        self.refused: dict[str, str] = {}

    @property
    def memory(self) -> EditMemory:
        return self._memory

    @property
    def live(self) -> list[Edit]:
        return list(self._edits.values())

    def write(self, edits: Sequence[Edit]) -> None:
        """See `Method.write`: of a slot the earlier fact is forgotten."""
        facts, forgotten = [], []
        for edit in {edit.slot: edit for edit in edits}.values():
            try:
                encode_target(self._tokenizer, edit.target_new)
            except TokenizationError as error:
                self.refused[edit.edit_id] = str(error)
                continue
            if edit.slot in self._ids:
                forgotten.append(self._ids[edit.slot])
            self._written += 1
            self._ids[edit.slot], self._edits[edit.slot] = f"{edit.edit_id}@{self._written}", edit
            facts.append(state_fact(edit, self._ids[edit.slot], SPLIT_SEED))
        self._memory = self._memory.update(facts, forgotten)

    def build_artifacts(self) -> list[EditMemory]:
        """See `Method.build_artifacts`."""
        return [self._memory] if self._edits else []

    def count_bytes(self) -> int:
        """The memory as it is stored, with its pool, which does not grow."""
        return len(self._memory.to_bytes()) + sum(len(read()) for read in self._memory.parts.values())


def start_ike(bench: Bench) -> InContext:
    return InContext(bench, NearestMemory(bench.base.digest, MemoryOptions()))


def start_mike(bench: Bench) -> InContext:
    return InContext(bench, EditMemory(bench.base.digest, MemoryOptions()))


def start_paper_mike(bench: Bench) -> InContext:
    return InContext(bench, EditMemory(bench.base.digest, MemoryOptions(scope="paper")))


_MIKE = "MIKE (JoveReCode/DistillMIKE: acl.py, encode_facts.py; algorithms.md §2)"

CONTEXT_RECIPES = (
    Recipe(
        name="ike",
        title="IKE",
        source="Can we edit factual knowledge by in-context learning?, EMNLP 2023 (Zce1112zslx/IKE; zjunlp/EasyEdit; algorithms.md §2.4)",
        build=start_ike,
        differs="the fact is found by the sentence encoder, where the published test hands over the right one (an oracle); demonstrations "
        "are MIKE's twelve, nearest last, where IKE mixes 4 copies, 12 updates and 16 retained facts; it is put before every question, as "
        "published",
        same=True,
    ),
    Recipe(
        name="mike",
        title="MIKE, guarded",
        source=_MIKE,
        build=start_mike,
        differs="a fact about a subject that is named is used only if it is similar enough to what is asked; the fact stands before the "
        "question, too",
        same=True,
    ),
    Recipe(
        name="mike_paper",
        title="MIKE, as published",
        source=_MIKE,
        build=start_paper_mike,
        differs="the fact stands before the question, too; of several facts of a subject the most similar one answers",
        same=True,
    ),
)
