"""DistillMIKE: what a memory says in context, folded into a LoRA that needs no context (algorithms.md §2, resolution K; design §5)."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from errata.distill_options import DistillOptions
from errata.distillation.divergence import diverge, soften
from errata.distillation.lessons import Lesson
from errata.distillation.report import Distance, DistilReport, Epoch
from errata.distillation.rows import Row, batch_by_length, list_rows, read_spans
from errata.distillation.student import seat_student
from errata.distillation.teacher import Progress, ask_teacher
from errata.distillation.training import Course, Trained, train_student
from errata.editors.adapters import LoraAdapter
from errata.editors.artifacts import Artifact
from errata.edits import canonical_json, digest_of
from errata.errors import InputError
from errata.modeling.loading import Base
from errata.modeling.patch import attach

_FORMAT = 1
"""Raised when what is stored, or what the same request would give, changes."""
_MEASURED = 256
"""Rows of a scope that is measured on what it is trained on."""


@dataclass(frozen=True)
class Distilled:
    adapter: LoraAdapter
    report: DistilReport


def distil_lessons(
    base: Base,
    beneath: Sequence[Artifact],
    lessons: Sequence[Lesson],
    options: DistillOptions,
    work: Path,
    absorbed: Sequence[str],
    start: LoraAdapter | None = None,
    on_progress: Progress | None = None,
) -> Distilled:
    """Train a LoRA on top of base + `beneath` to answer bare prompts as the teacher answers them in context.

    What was computed lies in `work` under digests of all that decides it, and is taken up from there: after a kill it goes on, and the
    same request again trains nothing.

    Args:
        base: untouched; it is the teacher, and stays as it is.
        beneath: what the LoRA will lie on, in order: the weight delta of a champion, or nothing.
        lessons: see `errata.distillation.lessons.draw_lessons`.
        work: a folder, made where there is none. Any number of distillations may share it.
        absorbed: occurrences that the adapter takes in, as it will say.
        start: an earlier adapter to go on from.

    Raises:
        InputError: no lesson in scope, or targets that cannot be adapted.
        BaseMismatchError: an artifact or `start` that does not fit, or an artifact that is attached to the base.
        EditorError: logits or a loss are not finite.
    """
    if not any(lesson.in_scope for lesson in lessons):
        raise InputError(f"distillation: expected at least one lesson in scope, found none among {len(lessons)}")
    rows = list_rows(lessons)
    course, trained_scopes = plan_course(rows, options)
    student_of = tuple(digest_of(artifact.to_bytes()) for artifact in beneath)
    with seat_student(base, beneath, options, start) as student:
        began = time.perf_counter()
        teacher = ask_teacher(base, rows, options, work, on_progress)
        asked = time.perf_counter() - began
        name = _digest_request(base, student_of, rows, student.targets, options, start)
        trained = train_student(student, teacher, course, options, work / f"student-{name[:24]}.safetensors", on_progress)
    return Distilled(
        _spell_adapter(base, trained, options, student_of, absorbed),
        DistilReport(
            lessons_inside=sum(lesson.in_scope for lesson in lessons),
            lessons_outside=sum(not lesson.in_scope for lesson in lessons),
            lessons_validation=len({id(rows[index].lesson) for index in set(course.validation) - set(course.training)}),
            validation_trained=trained_scopes,
            targets=student.targets,
            teacher_rows=len(rows),
            teacher_reused=teacher.reused,
            teacher_seconds=asked,
            teacher_tokens=sum(len(row.taught) for row in rows),
            cache_bytes=teacher.size,
            top_k=options.top_k,
            steps=trained.steps,
            student_seconds=trained.seconds,
            student_tokens=trained.tokens,
            before=Distance(**trained.before),
            after=Distance(**trained.curve[trained.best_epoch - 1]["distance"]),
            curve=tuple(Epoch(**epoch) for epoch in trained.curve),
            best_epoch=trained.best_epoch,
            stopped_early=trained.stopped,
        ),
    )


def plan_course(rows: Sequence[Row], options: DistillOptions) -> tuple[Course, tuple[str, ...]]:
    """Which rows are trained and which validate.

    Some edits are chosen by digest and seed, those with a paraphrase first. All their lessons but the rewrite prompt are held out: every
    edit is taught, and validation asks in words that were not. A scope without any is measured on trained lessons.

    Returns:
        The course, and the scopes that are measured on trained lessons.
    """
    edits = sorted({row.lesson.edit for row in rows if row.lesson.edit})
    rich = {row.lesson.edit for row in rows if row.lesson.kind == "paraphrase" and row.lesson.in_scope}
    ranked = sorted(edits, key=lambda edit: (edit not in rich, digest_of(f"validation\0{options.seed}\0{edit}".encode())))
    count = min(max(1, round(options.validation * len(edits))), len(edits) - 1) if options.validation else 0
    chosen = set(ranked[:count])
    held = {index for index, row in enumerate(rows) if row.lesson.edit in chosen and row.lesson.kind != "rewrite"}
    training = [index for index in range(len(rows)) if index not in held and (options.base_teacher or rows[index].lesson.in_scope)]
    if not any(rows[index].lesson.in_scope for index in training):
        raise InputError("distillation: expected a rewrite prompt or paraphrase to train on, found none that is not held out")
    validation, unheld = sorted(held), []
    for scope, name in ((True, "inside"), (False, "outside")):
        if not any(rows[index].lesson.in_scope is scope for index in held):
            validation += [index for index, row in enumerate(rows) if row.lesson.in_scope is scope][:_MEASURED]
            unheld.append(name)
    return Course(rows, training, validation, held_out="inside" not in unheld), tuple(unheld)


@torch.inference_mode()
def measure_truncation(
    base: Base, artifacts: Sequence[Artifact], lessons: Sequence[Lesson], options: DistillOptions, top_ks: Sequence[int]
) -> dict[int | None, float]:
    """Mean KL(teacher ‖ base + artifacts) per target position over the whole vocabulary (None), and its lower bound by the teacher's k
    likeliest tokens and one bucket, on the same lessons and the same logits: what `top_k` loses."""
    rows = list_rows(lessons)
    sums: dict[int | None, float] = dict.fromkeys([None, *top_ks], 0.0)
    for batch in batch_by_length([row.taught for row in rows], options.teacher_tokens):
        chosen = [rows[index] for index in batch]
        counts = [len(row.target) for row in chosen]
        taught = read_spans(base, [row.taught for row in chosen], counts)
        with attach(base, artifacts):
            asked = read_spans(base, [row.asked for row in chosen], counts)
        for top_k in sums:
            sums[top_k] += float(diverge(soften(taught, options.temperature, top_k), asked, options.temperature).double().sum())
    positions = sum(len(row.target) for row in rows)
    return {top_k: total / positions for top_k, total in sums.items()}


def _digest_request(
    base: Base,
    student_of: Sequence[str],
    rows: Sequence[Row],
    targets: Sequence[str],
    options: DistillOptions,
    start: LoraAdapter | None,
) -> str:
    """Names all that decides a training. What is absorbed does not."""
    asked = [[row.lesson.edit, row.lesson.kind, row.lesson.in_scope, row.taught, row.asked, row.target] for row in rows]
    began = digest_of(start.to_bytes()) if start is not None else None
    content = [_FORMAT, base.digest, base.device.type, student_of, asked, targets, options.model_dump(mode="json"), began]
    return digest_of(canonical_json(content))


def _spell_adapter(
    base: Base, trained: Trained, options: DistillOptions, student_of: tuple[str, ...], absorbed: Sequence[str]
) -> LoraAdapter:
    a, b = ({name[2:]: factor.float() for name, factor in trained.best.items() if name.startswith(side)} for side in ("a.", "b."))
    return LoraAdapter(base.digest, options.alpha, a, b, student_of, tuple(absorbed))
