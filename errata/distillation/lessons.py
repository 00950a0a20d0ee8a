"""What is taught: prompts of the training half of the probes, what the teacher reads for them, and the continuations that are compared.

In scope the teacher reads facts before the question (MIKE); out of scope it is the base, which reads the bare question (algorithms.md §2.3,
resolution K). Nothing that evaluation holds out is ever asked (design §6).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest
from typing import Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from errata.edits import Edit, Probe, digest_of
from errata.evaluation.probes import Probes, ProbeSplit, split_probes
from errata.modeling.tokens import can_write, encode_prompt, encode_target
from errata.world import FILLER

Teach = Callable[[Sequence[str]], list[list[int] | None]]
"""Prompts → the ids that the memory has the model read for each; None where it leaves the prompt to the base."""

Kind = Literal["rewrite", "paraphrase", "neighbour", "fixed"]

FIXED = tuple(sentence for sentence in FILLER if len(sentence.split()) > 2)
"""Texts out of scope where edits bring too few neighbours: sentences that state no fact. Not the probe of `errata.monitors.locality`, by
which the gate measures: what is trained on says nothing there."""

_OUTSIDE = 2 / 3
"""Lessons out of scope per lesson in scope: the paper's 3 : 2."""


@dataclass(frozen=True)
class Lesson:
    """One prompt, to be answered by the student as the teacher answers it."""

    edit: str
    """Id of the edit that it is about; empty for a fixed text."""
    kind: Kind
    prompt: str
    in_scope: bool
    """Whether the memory answers it. A neighbour may be: the prompt of another live edit."""
    student_ids: tuple[int, ...]
    """The bare prompt."""
    teacher_ids: tuple[int, ...]
    """In scope what the memory has the model read; out of scope the bare prompt."""
    candidates: tuple[tuple[int, ...], ...]
    """Target ids that are forced, one after the other: the new object and the old one."""


class Drawn(NamedTuple):
    """The lessons of a distillation."""

    lessons: list[Lesson]
    unrouted: list[str]
    """Prompts of edits that the memory did not answer, and that are therefore not taught: the base would teach the opposite."""
    missing: int
    """Lessons out of scope that were wanted and could not be had."""


def draw_lessons(edits: Sequence[Edit], teach: Teach, tokenizer: PreTrainedTokenizerBase, seed: int) -> Drawn:
    """Lessons on live edits: in scope every rewrite prompt and the training paraphrases, out of scope training neighbours, 2 to every 3.

    A text that any of the edits holds out is not taught for another one either; a rewrite prompt always is. A neighbour that the memory
    answers is taught with what it says, beyond that ratio. Where an edit has too few neighbours others' stand in, then `FIXED`. Each text
    is taught once. The result does not depend on the order of `edits`.

    Args:
        edits: live ones; an edit without target_true has one candidate, target_new.
        seed: that of evaluation (`evaluate.seed`), which decides what is held out.

    Raises:
        TokenizationError: a target_new that the tokenizer cannot write.
    """
    ordered = sorted(edits, key=lambda edit: edit.edit_id)
    splits = {edit.edit_id: split_probes(edit, seed) for edit in ordered}
    asked = {edit.rewrite_prompt for edit in ordered}
    taken = {text for split in splits.values() for text in _list_texts(split.held_out)} - asked
    lessons, unrouted = _draw_inside(ordered, splits, taken, teach, tokenizer)
    wanted = round(_OUTSIDE * len(lessons))
    queues = [[(edit, probe) for probe in _rank(splits[edit.edit_id].training.neighbours, edit, seed)] for edit in ordered]
    neighbours = _skip_taken(_take_in_turn(queues), taken.union(unrouted, (lesson.prompt for lesson in lessons)))
    left = wanted
    while left and (some := list(islice(neighbours, left))):
        found = [
            _write_lesson(tokenizer, edit, "neighbour", probe.prompt, read, _list_answers(edit, probe))
            for (edit, probe), read in zip(some, teach([probe.prompt for _, probe in some]), strict=True)
        ]
        lessons += found
        left -= sum(not lesson.in_scope for lesson in found)
    fixed = [_write_fixed(tokenizer, text) for text in FIXED[:left]]
    return Drawn([*lessons, *fixed], unrouted, left - len(fixed))


def _draw_inside(
    edits: Sequence[Edit], splits: Mapping[str, ProbeSplit], taken: set[str], teach: Teach, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Lesson], list[str]]:
    """Lessons in scope, and prompts that the memory does not answer. A prompt of several edits is asked once, first of all as a rewrite."""
    owners: dict[str, tuple[Edit, Kind]] = {edit.rewrite_prompt: (edit, "rewrite") for edit in reversed(edits)}
    for edit in edits:
        for prompt in splits[edit.edit_id].training.paraphrases:
            if prompt not in taken:
                owners.setdefault(prompt, (edit, "paraphrase"))
    lessons, unrouted = [], []
    for (prompt, (edit, kind)), read in zip(owners.items(), teach(list(owners)), strict=True):
        if read is None:
            unrouted.append(prompt)
        else:
            answers = [edit.target_true] if edit.target_true else []
            lessons.append(_write_lesson(tokenizer, edit, kind, prompt, read, answers))
    return lessons, unrouted


def _write_lesson(
    tokenizer: PreTrainedTokenizerBase, edit: Edit, kind: Kind, prompt: str, read: list[int] | None, answers: Sequence[str]
) -> Lesson:
    """
    Args:
        answers: what is forced besides target_new: the first that the tokenizer can write, where one can be.
    """
    ids = tuple(encode_prompt(tokenizer, prompt))
    forced = [edit.target_new, *[answer for answer in answers if can_write(tokenizer, answer)][:1]]
    candidates = tuple(dict.fromkeys(tuple(encode_target(tokenizer, text)) for text in forced))
    return Lesson(edit.edit_id, kind, prompt, read is not None, ids, ids if read is None else tuple(read), candidates)


def _write_fixed(tokenizer: PreTrainedTokenizerBase, text: str) -> Lesson:
    """A text without its last word, which is forced."""
    prompt, _, last = text.rpartition(" ")
    ids = tuple(encode_prompt(tokenizer, prompt))
    return Lesson("", "fixed", prompt, False, ids, ids, (tuple(encode_target(tokenizer, last)),))


def _list_answers(edit: Edit, probe: Probe) -> list[str]:
    """What may be true of a neighbour: its own answers, else the object of the edit before it."""
    return [*probe.answers, *([edit.target_true] if edit.target_true else [])]


def _list_texts(probes: Probes) -> list[str]:
    return [*probes.paraphrases, *(probe.prompt for probe in probes.neighbours)]


def _rank(probes: Sequence[Probe], edit: Edit, seed: int) -> list[Probe]:
    """Probes in an order that only a digest decides."""
    return sorted(probes, key=lambda probe: digest_of(f"{seed}\0{edit.edit_id}\0{probe.prompt}".encode()))


def _take_in_turn(queues: Sequence[Sequence[tuple[Edit, Probe]]]) -> Iterator[tuple[Edit, Probe]]:
    """The first of each, then the second of each: every edit brings one before any brings two."""
    for row in zip_longest(*queues):
        yield from (item for item in row if item is not None)


def _skip_taken(neighbours: Iterable[tuple[Edit, Probe]], taken: set[str]) -> Iterator[tuple[Edit, Probe]]:
    """Each text once, and none of those that are taken."""
    for edit, probe in neighbours:
        if probe.prompt not in taken:
            taken.add(probe.prompt)
            yield edit, probe
