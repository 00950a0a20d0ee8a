"""DistillMIKE as a method of the comparison: D4S beneath, and a LoRA distilled from a memory of all edits (algorithms.md §2.3)."""

from collections.abc import Sequence
from functools import partial

from errata.comparison.contextual import InContext, start_mike
from errata.comparison.method import SPLIT_SEED, Bench, Recipe, UnsuitedError
from errata.comparison.streams import EditorStream, start_d4s
from errata.distill_options import DistillOptions
from errata.distillation.distil import distil_lessons
from errata.distillation.lessons import draw_lessons
from errata.editors.artifacts import Artifact
from errata.editors.memory import EditMemory
from errata.edits import Edit
from errata.evaluation.answered import find_answered
from errata.modeling.loading import Base
from errata.modeling.patch import attach
from errata.modeling.queries import find_room

MAX_STEPS = 3_000
"""Of the student: minutes on two cores for a built-in base. Fewer edits take fewer, by the epochs."""
LEAST = 0.1
"""Share of live edits that memory has to answer. A stream asks for half; with fewer than this nothing but D4S would be measured."""


class Distillation:
    """Both of what a stream with both has: weights and a memory. The adapter is trained when it is asked for, from all live edits."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._stream: EditorStream = start_d4s(bench)
        self._memory: InContext = start_mike(bench)
        self._options = DistillOptions(max_steps=MAX_STEPS, seed=bench.seed)

    @property
    def refused(self) -> dict[str, str]:
        return self._memory.refused | self._stream.refused

    def write(self, edits: Sequence[Edit]) -> None:
        """See `Method.write`: both take the batch in; nothing is distilled yet."""
        self._stream.write(edits)
        self._memory.write(edits)

    def build_artifacts(self) -> list[Artifact]:
        """See `Method.build_artifacts`. Only edits that memory answers are taught, as in a stream: it would teach the opposite of others.

        Raises:
            UnsuitedError: memory answers hardly any.
        """
        base, beneath, live = self._bench.base, self._stream.build_artifacts(), self._memory.live
        if not live:
            return beneath
        with attach(base, self._memory.build_artifacts()):
            taught = find_answered(base, live, self._bench.batch_tokens)
        if len(taught) < LEAST * len(live):
            raise UnsuitedError(
                f"distillmike: memory answers {len(taught)} of {len(live)} edits: a base that does not read its context teaches nothing; "
                "choose one that does (builtin-contextual)"
            )
        teach = partial(_write_prompts, self._memory.memory, base)
        lessons = draw_lessons(taught, teach, base.tokenizer, SPLIT_SEED).lessons
        return [*beneath, distil_lessons(base, beneath, lessons, self._options, self._bench.work, ()).adapter]

    def count_bytes(self) -> int:
        """What weights and memory need to go on; the adapter is made anew."""
        return self._stream.count_bytes() + self._memory.count_bytes()


def _write_prompts(memory: EditMemory, base: Base, prompts: Sequence[str]) -> list[list[int] | None]:
    return memory.write_prompts(base, prompts, find_room(base))


DISTILLED_RECIPE = Recipe(
    name="distillmike",
    title="DistillMIKE",
    source="DistillMIKE (JoveReCode/DistillMIKE: distill_IKEbase.py; algorithms.md §2.3)",
    build=Distillation,
    differs="the student is D4S with a LoRA, where the published one stands on MEMIT; the divergence is taken over the target, not over "
    "the last three positions; the teacher reads the fact before the question, too; only edits that memory answers are taught; at most "
    f"{MAX_STEPS:,} steps",
    final_only=True,
)
