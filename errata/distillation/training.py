"""Training of a student on its teacher's predictions: what one step and one epoch are, and how it goes on after a kill."""

import logging
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from errata.distill_options import DistillOptions
from errata.distillation.divergence import diverge
from errata.distillation.report import Distance, Epoch
from errata.distillation.rows import Row, batch_by_length
from errata.distillation.student import Factors, Student
from errata.distillation.teacher import Progress, Teacher
from errata.editors.artifacts import pack_tensors, unpack_tensors
from errata.errors import EditorError, FormatError
from errata.placing import write_whole

_KIND, _FORMAT = "training", 1
_TENSORS = ("factors", "optimiser", "random", "best")
"""Fields of `Trained` that are tensors by name."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Course:
    """Rows by number, and which of them are for what."""

    rows: Sequence[Row]
    training: Sequence[int]
    validation: Sequence[int]
    held_out: bool
    """Whether validation tells when to stop and what was best. False where it is on rows that are trained."""


@dataclass
class Trained:
    """Where a training stands: all that a restart needs, and in the end what it gave."""

    factors: Factors = field(default_factory=dict)
    optimiser: Factors = field(default_factory=dict)
    """AdamW's own tensors, as `<number of the parameter>.<name>`."""
    random: Factors = field(default_factory=dict)
    """torch's state: of the CPU and, where one computes, of the GPU."""
    before: dict[str, float | None] = field(default_factory=dict)
    """`Distance` of the student as it began."""
    curve: list[dict[str, Any]] = field(default_factory=list)
    """One `Epoch` each."""
    best: Factors = field(default_factory=dict)
    best_epoch: int = 0
    """Counted from 1."""
    steps: int = 0
    place: int = 0
    """Batches of the present epoch that are done."""
    loss: float = 0.0
    """Sum over them."""
    tokens: int = 0
    """That the student has read in training, without padding."""
    seconds: float = 0.0
    done: bool = False
    stopped: bool = False
    """Before all steps were made: validation no longer got better."""


def train_student(
    student: Student, teacher: Teacher, course: Course, options: DistillOptions, place: Path, on_progress: Progress | None = None
) -> Trained:
    """Minimise KL(teacher ‖ student) over the target positions of the training rows (DistillMIKE eqs. 2 and 5, with the sign of a
    divergence): mean over the positions of a batch, weighted by scope.

    A checkpoint is written after every epoch and every `checkpoint_steps` steps. Training that goes on from one ends with the same bits as
    training that was never interrupted, on one machine with one number of threads.

    Args:
        place: the checkpoint's file; that of another training must not lie there.

    Raises:
        EditorError: a loss is not finite.
    """
    return _Training(student, teacher, course, options, place, on_progress).run()


def measure_distance(student: Student, teacher: Teacher, rows: Sequence[Row], indices: Sequence[int], options: DistillOptions) -> Distance:
    """Mean KL per position of some rows, in scope and out of scope."""
    sums: dict[bool, list[float]] = {True: [], False: []}
    for batch in batch_by_length([rows[index].asked for index in indices], options.batch_tokens):
        chosen = [indices[place] for place in batch]
        found = diverge(teacher.read(chosen, student.device), student.answer([rows[index] for index in chosen]), options.temperature)
        values = iter(found.double().clamp(min=0).tolist())  # rounding makes that of equal distributions slightly negative
        for index in chosen:
            sums[rows[index].lesson.in_scope] += [next(values) for _ in rows[index].target]
    inside, outside = (sum(sums[scope]) / len(sums[scope]) if sums[scope] else None for scope in (True, False))
    return Distance(inside=inside, outside=outside)


def _spell(now: Trained) -> bytes:
    """A checkpoint: its tensors by `<field>.<name>`, everything else as metadata."""
    fields = vars(now)
    tensors = {f"{part}.{name}": tensor for part in _TENSORS for name, tensor in fields[part].items()}
    return pack_tensors(_KIND, _FORMAT, tensors, {name: value for name, value in fields.items() if name not in _TENSORS})


def _read(data: bytes) -> Trained:
    """Raises FormatError: no checkpoint of this format."""
    tensors, metadata = unpack_tensors(data, _KIND, _FORMAT)
    fields: dict[str, Any] = {part: {} for part in _TENSORS}
    for key, tensor in tensors.items():
        part, _, name = key.partition(".")
        fields[part][name] = tensor
    fields |= {name: value for name, value in metadata.items() if name not in ("kind", "format")}
    return Trained(**fields)


class _Training:
    def __init__(
        self, student: Student, teacher: Teacher, course: Course, options: DistillOptions, place: Path, on_progress: Progress | None
    ) -> None:
        self._student, self._teacher, self._course, self._options = student, teacher, course, options
        self._place, self._tell = place, on_progress
        parameters = [factor.requires_grad_() for factor in student.factors.values()]
        self._optimiser = torch.optim.AdamW(parameters, lr=options.choose_lr(student.width), weight_decay=options.weight_decay)
        self._now = Trained()
        self._began = time.perf_counter()

    def run(self) -> Trained:
        cuda = self._student.device.type == "cuda"
        with torch.random.fork_rng(devices=[self._student.device] if cuda else []):
            torch.manual_seed(self._options.seed)
            if not self._resume():
                self._now.before = self._measure().model_dump()
            while not self._now.done:
                self._run_epoch()
        return self._now

    def _run_epoch(self) -> None:
        now, options = self._now, self._options
        batches = self._draw_batches(len(now.curve))
        total = min(options.epochs * len(batches), options.max_steps or options.epochs * len(batches))
        while now.place < len(batches) and now.steps < total:
            now.loss += self._step(batches[now.place])
            now.place, now.steps = now.place + 1, now.steps + 1
            if self._tell:
                latest = {f"validation_{name}": value for name, value in (now.curve[-1]["distance"] if now.curve else now.before).items()}
                losses = {"loss": now.loss / now.place} | {name: value for name, value in latest.items() if value is not None}
                self._tell("student", now.steps, total, losses)
            if now.steps % options.checkpoint_steps == 0:
                self._save()
        self._close_epoch()
        tired = self._course.held_out and len(now.curve) - now.best_epoch >= options.patience
        now.done, now.stopped = now.steps >= total or tired, tired and now.steps < total
        if now.done and not self._course.held_out:
            now.best, now.best_epoch = self._student.copy_factors(), len(now.curve)
        self._save()

    def _close_epoch(self) -> None:
        now = self._now
        now.curve.append(Epoch(steps=now.steps, loss=now.loss / max(now.place, 1), distance=self._measure()).model_dump())
        scores = [self._score(Distance(**epoch["distance"])) for epoch in now.curve]
        if scores.index(min(scores)) == len(scores) - 1:
            now.best, now.best_epoch = self._student.copy_factors(), len(scores)
        now.place, now.loss = 0, 0.0

    def _step(self, batch: Sequence[int]) -> float:
        rows = [self._course.rows[index] for index in batch]
        found = diverge(self._teacher.read(batch, self._student.device), self._student.practise(rows), self._options.temperature)
        scopes = torch.tensor([row.lesson.in_scope for row in rows for _ in row.target], device=found.device)
        weights = torch.where(scopes, self._options.in_weight, self._options.out_weight)
        loss = (weights * found).sum() / weights.sum()
        value = float(loss.detach())
        if not torch.isfinite(loss):
            raise EditorError(f"distillation: expected a finite loss at step {self._now.steps + 1}, found {value}; try a smaller lr")
        self._optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimiser.step()
        self._now.tokens += sum(len(row.asked) for row in rows)
        return value

    def _draw_batches(self, epoch: int) -> list[list[int]]:
        """Rows of one epoch: by length, those of one length in any order, and the batches in any order."""
        draw = random.Random(f"distillation {self._options.seed} {epoch}")
        order = draw.sample(self._course.training, len(self._course.training))
        fed = [self._course.rows[index].asked for index in order]
        batches = [[order[place] for place in batch] for batch in batch_by_length(fed, self._options.batch_tokens)]
        draw.shuffle(batches)
        return batches

    def _measure(self) -> Distance:
        return measure_distance(self._student, self._teacher, self._course.rows, self._course.validation, self._options)

    def _score(self, distance: Distance) -> float:
        """What training minimises, with each scope's own mean."""
        outside = distance.outside if self._options.base_teacher else None
        parts = [(self._options.in_weight, distance.inside), (self._options.out_weight, outside)]
        known = [(weight, value) for weight, value in parts if value is not None]
        return sum(weight * value for weight, value in known) / sum(weight for weight, _ in known)

    def _save(self) -> None:
        now, cuda = self._now, self._student.device.type == "cuda"
        held: Mapping[int, Mapping[str, torch.Tensor]] = self._optimiser.state_dict()["state"]
        now.factors = self._student.copy_factors()
        now.optimiser = {f"{number}.{name}": value.cpu() for number, values in held.items() for name, value in values.items()}
        now.random = {"cpu": torch.get_rng_state(), **({"gpu": torch.cuda.get_rng_state(self._student.device)} if cuda else {})}
        spent = time.perf_counter()
        now.seconds, self._began = now.seconds + spent - self._began, spent
        write_whole(self._place, _spell(now))

    def _resume(self) -> bool:
        if not self._place.exists():
            return False
        try:
            self._now = _read(self._place.read_bytes())
        except (FormatError, TypeError, OSError) as error:
            logger.warning("%s: expected a checkpoint, found it damaged; training starts again (%s)", self._place, error)
            return False
        self._student.load_factors(self._now.factors)
        held: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in self._now.optimiser.items():
            number, _, name = key.partition(".")
            held.setdefault(int(number), {})[name] = value
        self._optimiser.load_state_dict({**self._optimiser.state_dict(), "state": held})
        torch.set_rng_state(self._now.random["cpu"])
        if self._student.device.type == "cuda":
            torch.cuda.set_rng_state(self._now.random["gpu"], self._student.device)
        return True
