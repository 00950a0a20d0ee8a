"""Lessons as rows of ids: each candidate of each lesson is forced once, and read where its tokens are predicted."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from errata.distillation.lessons import Lesson
from errata.evaluation.scoring import split_by_tokens
from errata.modeling.beside import predict_at
from errata.modeling.loading import Base
from errata.modeling.tokens import find_pad, pad_rows


class Row(NamedTuple):
    """One candidate of one lesson."""

    lesson: Lesson
    target: tuple[int, ...]

    @property
    def taught(self) -> tuple[int, ...]:
        """What the teacher is fed: the last token of the target is predicted and not fed."""
        return (*self.lesson.teacher_ids, *self.target[:-1])

    @property
    def asked(self) -> tuple[int, ...]:
        """What the student is fed."""
        return (*self.lesson.student_ids, *self.target[:-1])


def list_rows(lessons: Sequence[Lesson]) -> list[Row]:
    """Candidates that differ in their last token only are one row: it is predicted and not fed, so they are read alike."""
    distinct = ((lesson, {target[:-1]: target for target in reversed(lesson.candidates)}) for lesson in lessons)
    return [Row(lesson, target) for lesson, targets in distinct for target in reversed(targets.values())]


def batch_by_length(fed: Sequence[Sequence[int]], batch_tokens: int) -> Iterator[list[int]]:
    """Indices of rows of similar length, the shortest first, padded to at most `batch_tokens`. Rows of one length keep their order."""
    order = sorted(range(len(fed)), key=lambda index: len(fed[index]))
    for places in split_by_tokens([len(fed[index]) for index in order], batch_tokens):
        yield [order[place] for place in places]


def read_spans(base: Base, fed: Sequence[Sequence[int]], counts: Sequence[int]) -> torch.Tensor:
    """Logits [Σ counts, vocabulary] at the last `counts` positions of each row, row by row, from one pass. A row longer than the context
    loses its beginning."""
    rows = [row[-base.context :] for row in fed]
    ids, _ = pad_rows(rows, find_pad(base.tokenizer), "right", base.device)
    where = torch.tensor([index for index, count in enumerate(counts) for _ in range(count)], device=base.device)
    places = [place for row, count in zip(rows, counts, strict=True) for place in range(len(row) - count, len(row))]
    at = torch.tensor(places, device=base.device)
    body, head = (base.model.get_submodule(path) for path in (base.layout.body, base.layout.head))
    # Padding on the right needs no mask under causal attention; one of ones keeps attention on its fast path.
    with predict_at(where, at):
        hidden = body(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).last_hidden_state  # [n, longest, d]
    logits: torch.Tensor = head(hidden[where, at])
    return logits
