"""A stream of edits with all that `benchmarks.context_quality` makes of it and asks about it. What takes long is kept on the disk."""

import json
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rich.console import Console

from benchmarks.common import MemoryBlobs
from benchmarks.edit_quality import write_stream
from errata.builtin import CONTEXTUAL
from errata.candidates import load_artifacts
from errata.distill_options import DistillOptions
from errata.distillation.distil import distil_lessons
from errata.distillation.lessons import Drawn, draw_lessons
from errata.editors.artifacts import Artifact, WeightDelta
from errata.editors.d4s.editor import D4S
from errata.editors.memory import EditMemory, MemoryOptions
from errata.edits import Edit, canonical_json, digest_of
from errata.evaluation.metrics import agreement, all_correct, prefers, token_accuracy
from errata.evaluation.probes import split_probes, state_fact
from errata.evaluation.scoring import Question, Scored, score_targets
from errata.modeling.loading import Base
from errata.modeling.patch import attach
from errata.modeling.queries import find_room
from errata.placing import write_whole
from errata.retrieval.demonstrations import spell_context
from errata.suggestions import suggest_builtin
from errata.world import World

BASE, ALWAYS, D4S_NAME, MIKE, MIKE_PAPER, DISTILLED = "base", "always in context", "D4S", "MIKE", "MIKE, scope paper", "DistillMIKE"
NO_BASE, FROM_BASE = "DistillMIKE, base does not teach", "DistillMIKE, student from the base"
SHOWN = {f"MIKE, k = {count}": count for count in (0, 4, 8)}
"""Name → demonstrations, of memories that show fewer than the default."""
_FORMAT = 1
_BATCH = 100
_POOL = 500
_BATCH_TOKENS = 4_096
_TOLD = 15.0
"""Seconds between two lines of progress."""

Shares = dict[str, float]
Kind = Literal["distinct", "slots"]

out = Console(width=170)
_began = time.perf_counter()


class Asked(NamedTuple):
    """One question about one edit."""

    kind: Literal["rewrite", "paraphrase", "neighbour", "same"]
    """same: another relation of the edit's subject, which no edit of the stream touches."""
    edit: Edit
    prompt: str
    answer: str
    other: str
    """What is to be less likely."""


class Teaching(NamedTuple):
    """How a student is taught."""

    options: DistillOptions = DistillOptions(batch_tokens=1_024)  # of the tables in README.md; it was the default
    from_base: bool = False
    """Else from D4S."""


STUDENTS = {
    DISTILLED: Teaching(),
    NO_BASE: Teaching(DistillOptions(base_teacher=False, batch_tokens=1_024)),
    FROM_BASE: Teaching(from_base=True),
}


@dataclass(frozen=True)
class Stream:
    """Edits of the built-in world, and the methods that were given them."""

    base: Base
    editor: D4S
    world: World
    kind: Kind
    size: int
    seed: int
    judged: int
    """Edits that are asked about."""
    work: Path

    @cached_property
    def edits(self) -> list[Edit]:
        return self.world.make_edits(self.size, self.seed, self.kind)

    @cached_property
    def questions(self) -> list[Asked]:
        """Of probes those that are held out: no method was taught them."""
        slots = {(edit.subject, edit.relation_id) for edit in self.edits}
        rows: list[Asked] = []
        for edit in random.Random(f"asked {self.seed}").sample(self.edits, min(self.judged, self.size)):
            new, true = edit.target_new, str(edit.target_true)
            held = split_probes(edit, self.seed).held_out
            rows.append(Asked("rewrite", edit, edit.rewrite_prompt, new, true))
            rows += [Asked("paraphrase", edit, prompt, new, true) for prompt in held.paraphrases]
            rows += [Asked("neighbour", edit, probe.prompt, probe.answers[0], new) for probe in held.neighbours]
            spare = [fact for fact in self.world.facts_of(edit.subject) if (edit.subject, fact.relation.name) not in slots]
            draw = random.Random(f"same {self.seed} {edit.edit_id}")
            rows += [Asked("same", edit, draw.choice(fact.prompts), fact.object, new) for fact in draw.sample(spare, min(1, len(spare)))]
        return rows

    @cached_property
    def delta(self) -> WeightDelta:
        """All edits, by D4S."""
        path = self._name("delta", ".safetensors")
        if not path.exists():
            self._tell(f"D4S writes {self.size:,} edits")
            blobs = MemoryBlobs()
            manifest, _ = write_stream(blobs, self.base, self.editor, self.edits, _BATCH)
            write_whole(path, load_artifacts(blobs, manifest)[0].to_bytes())
        return WeightDelta.from_bytes(path.read_bytes())

    @cached_property
    def memory(self) -> EditMemory:
        """All edits, and as a pool counterfactual facts of persons that none of them is about."""
        self._tell(f"a memory of {self.size:,} facts")
        edited = {edit.subject for edit in self.edits}
        others = [edit for edit in self.world.make_edits(len(self.world.persons), 1_000 + self.seed) if edit.subject not in edited]
        memory = EditMemory(self.base.digest, MemoryOptions())
        memory = memory.with_pool([state_fact(edit, f"pool {edit.edit_id}", self.seed) for edit in others[:_POOL]])
        return memory.update([state_fact(edit, edit.edit_id, self.seed) for edit in self.edits], [])

    @cached_property
    def drawn(self) -> Drawn:
        self._tell("lessons")
        teach = partial(_write_prompts, self.memory, self.base, find_room(self.base))
        return draw_lessons(self.edits, teach, self.base.tokenizer, self.seed)

    def change_memory(self, **options: Any) -> EditMemory:
        return replace(self.memory, options=replace(self.memory.options, **options))

    def find_artifacts(self, name: str) -> list[Artifact]:
        """What a method puts on the base."""
        if name in STUDENTS:
            return self.teach(STUDENTS[name])
        if name in SHOWN:
            return [self.change_memory(demonstrations=SHOWN[name])]
        chosen: dict[str, Callable[[], list[Artifact]]] = {
            BASE: list,
            ALWAYS: list,
            D4S_NAME: lambda: [self.delta],
            MIKE: lambda: [self.memory],
            MIKE_PAPER: lambda: [self.change_memory(scope="paper")],
        }
        return chosen[name]()

    def teach(self, teaching: Teaching) -> list[Artifact]:
        """A student: what it started from, and a LoRA. The same again trains nothing."""
        lessons, beneath = self.drawn.lessons, [] if teaching.from_base else [self.delta]
        self._tell(f"a student of {len(lessons):,} lessons")
        made = distil_lessons(self.base, beneath, lessons, teaching.options, self.work, [], None, _tell_training())
        self._remember(_name_report(teaching), lambda: made.report.model_dump(mode="json"))
        return [*beneath, made.adapter]

    def read_report(self, teaching: Teaching) -> Mapping[str, Any]:
        """Of the distillation, as it was when it was first done."""
        path = self._name(_name_report(teaching), ".json")
        if not path.exists():
            self.teach(teaching)
        return json.loads(path.read_text())

    def measure(self, name: str) -> Shares:
        """Shares of a method, each with the name of what it measures."""
        if name in STUDENTS:
            return self.measure_student(STUDENTS[name])
        return self._remember([name, "shares", self.judged], lambda: self._measure(name, self.find_artifacts(name)))

    def measure_student(self, teaching: Teaching) -> Shares:
        return self._remember([*_name_report(teaching), "shares", self.judged], lambda: self._measure("", self.teach(teaching)))

    def _measure(self, name: str, artifacts: Sequence[Artifact]) -> Shares:
        self._tell(f"asking {name or 'the student'}")
        before = score_targets(self.base, [(row.prompt, row.answer) for row in self.questions], batch_tokens=_BATCH_TOKENS)
        texts = [self._spell_always(row) if name == ALWAYS else row.prompt for row in self.questions]
        wanted: list[Question] = [(text, row.answer) for text, row in zip(texts, self.questions, strict=True)]
        unwanted: list[Question] = [(text, row.other) for text, row in zip(texts, self.questions, strict=True)]
        with attach(self.base, artifacts):
            after = score_targets(self.base, [*wanted, *unwanted], batch_tokens=_BATCH_TOKENS)
        values: dict[str, list[float]] = {}
        for row, asked, other in zip(self.questions, wanted, unwanted, strict=True):
            for measure, value in _judge(row, after[asked], after[other], before[row.prompt, row.answer]).items():
                values.setdefault(measure, []).append(value)
        return {measure: statistics.mean(some) for measure, some in values.items()}

    def _spell_always(self, row: Asked) -> str:
        """The question with the edit's own fact in front, whatever it asks."""
        fact = self.memory.facts[row.edit.edit_id]
        return "".join(spell_context(fact, self.memory.choose_demonstrations(fact), row.prompt))

    def _remember(self, name: Sequence[Any], make: Callable[[], Any]) -> Any:
        """What `make` returns as JSON, made once."""
        path = self._name(name, ".json")
        if not path.exists():
            write_whole(path, json.dumps(make()).encode())
        return json.loads(path.read_text())

    def _name(self, name: Any, ending: str) -> Path:
        profile = [suggest_builtin(CONTEXTUAL.digest).prepare.model_dump(mode="json"), self.editor.options]
        content = [_FORMAT, self.base.digest, profile, self.kind, self.size, self.seed, name]
        return self.work / f"{digest_of(canonical_json(content))[:24]}{ending}"

    def _tell(self, what: str) -> None:
        tell(f"{self.kind} {self.size:,}, seed {self.seed}: {what}")


def tell(what: str) -> None:
    out.print(f"[dim]{time.perf_counter() - _began:5.0f} s  {what}[/]")


def _write_prompts(memory: EditMemory, base: Base, room: int, prompts: Sequence[str]) -> list[list[int] | None]:
    return memory.write_prompts(base, prompts, room)


def _name_report(teaching: Teaching) -> list[Any]:
    return ["student", teaching.options.digest, teaching.from_base]


def _judge(row: Asked, wanted: Scored, unwanted: Scored, before: Scored) -> Shares:
    """The values of one question, by measure."""
    success = float(prefers(wanted.logprobs, unwanted.logprobs))
    if row.kind == "rewrite":
        return {"efficacy": float(all_correct(wanted.chosen, wanted.target)), "ES": success}
    if row.kind == "paraphrase":
        return {"generalization": float(all_correct(wanted.chosen, wanted.target)), "PS": success}
    kept, true = agreement(wanted.chosen, before.chosen), token_accuracy(wanted.chosen, wanted.target)
    if row.kind == "neighbour":
        return {"agreement": kept, "truth": true, "NS": success}
    return {"same subject, agreement": kept, "same subject, truth": true}


def _tell_training() -> Callable[[str, int, int, Mapping[str, float]], None]:
    last = time.perf_counter()

    def on_progress(stage: str, done: int, total: int, losses: Mapping[str, float]) -> None:
        nonlocal last
        if time.perf_counter() - last > _TOLD:
            last = time.perf_counter()
            tell(f"  {stage} {done:,} of {total:,}" + "".join(f", {name} {value:.3f}" for name, value in losses.items()))

    return on_progress
