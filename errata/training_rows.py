"""The text that a base is trained on, drawn step by step: rows of tokens, and where in them something is to be learned."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from errata.builtin import TrainingSettings
from errata.edits import SLOT
from errata.passages import DEMONSTRATIONS, OPENERS, Passage, Span, draw_passage
from errata.training_tokens import END
from errata.world import FILLER, Fact

ROW_LENGTHS = (24, 24, 24, 48, 96)
"""Most tokens per row, one drawn per step: short prompts and long contexts are both trained."""
OPENING = 110
"""Steps that are short passages only, where there are passages at all. Looking up in the text is learned within a hundred of them; with
facts from the beginning memory came first, and looking up only after several hundred."""


Place = tuple[int, int]
"""(row, position)."""


@dataclass(frozen=True)
class Piece:
    """A name, a sentence or a passage about to join a row; positions count from its own start."""

    ids: list[int]
    subjects: list[tuple[int, int]]
    """(position of a name's last token, number of its subject)."""
    answers: list[int]
    """Positions that predict a token of an answer."""
    unlearned: list[int] = field(default_factory=list)
    """Positions of which nothing is learned."""
    relation: str = ""
    """Of the one fact that it states; empty where there may be several."""

    def after(self, words: list[int]) -> "Piece":
        """The same with other words before it."""
        shift = len(words)
        subjects = [(position + shift, owner) for position, owner in self.subjects]
        answers, unlearned = ([position + shift for position in places] for places in (self.answers, self.unlearned))
        return Piece([*words, *self.ids], subjects, answers, unlearned, self.relation)


@dataclass
class Rows:
    """Token rows of one step, and where in them something is to be learned."""

    ids: list[list[int]] = field(default_factory=list)
    subjects: list[tuple[int, int]] = field(default_factory=list)
    """(row, position) of the last token of each name."""
    owners: list[int] = field(default_factory=list)
    """Whose name it is."""
    answers: list[tuple[int, int]] = field(default_factory=list)
    """(row, position) of each token that predicts a token of an answer."""
    unlearned: list[tuple[int, int]] = field(default_factory=list)
    """(row, position) of each token that predicts what is not to be learned."""
    stated: list["Stated"] = field(default_factory=list)
    """Pieces that state one fact."""
    exchanged: list[tuple[Place, Place]] = field(default_factory=list)
    """Last tokens of two names, whose states are to be exchanged."""

    def add(self, piece: Piece) -> None:
        """Append to the last row."""
        row, start = len(self.ids) - 1, len(self.ids[-1])
        self.subjects += [(row, start + position) for position, _ in piece.subjects]
        self.owners += [owner for _, owner in piece.subjects]
        self.answers += [(row, start + position) for position in piece.answers]
        self.unlearned += [(row, start + position) for position in piece.unlearned]
        self.ids[-1] += piece.ids
        if piece.relation:
            name = (row, start + piece.subjects[0][0])
            self.stated.append(Stated(piece.relation, name, [(row, start + position) for position in piece.answers]))

    def exchange(self, share: float, rng: random.Random) -> None:
        """Exchange the answers of pairs of facts of one relation, where equally long, and note their names' places."""
        alike: dict[tuple[str, int], list[Stated]] = {}
        for fact in rng.sample(self.stated, round(share * len(self.stated))):
            alike.setdefault((fact.relation, len(fact.answers)), []).append(fact)
        for facts in alike.values():
            for one, other in zip(facts[::2], facts[1::2], strict=False):
                self.exchanged.append((one.name, other.name))
                for (row, position), (other_row, other_position) in zip(one.answers, other.answers, strict=True):
                    ids, other_ids = self.ids[row], self.ids[other_row]
                    ids[position + 1], other_ids[other_position + 1] = other_ids[other_position + 1], ids[position + 1]


@dataclass(frozen=True)
class Stated:
    """Where a row states a fact."""

    relation: str
    name: Place
    """Last token of the subject's name."""
    answers: list[Place]
    """Tokens that predict a token of the answer."""


class RowWriter:
    """Facts as tokens, and the random streams that decide which are shown.

    Args:
        facts: of any subjects, each with any number of relations; a fact's `withheld` template is never shown.
    """

    def __init__(self, settings: TrainingSettings, facts: Sequence[Fact], tokenizer: PreTrainedTokenizerFast) -> None:
        self.rng = random.Random(f"training {settings.seed}")
        # Of its own, so that a base without passages reads the same text as before there were any.
        self.passage_rng = random.Random(f"passages {settings.seed}")
        self.settings, self.tokenizer, self.all_facts = settings, tokenizer, facts
        by_subject: dict[str, list[Fact]] = {}
        for fact in facts:
            by_subject.setdefault(fact.subject, []).append(fact)
        self.subjects, self.facts = list(by_subject), list(by_subject.values())
        self.number_of = {name: number for number, name in enumerate(self.subjects)}
        self.templates = list(dict.fromkeys(template for fact in facts for template in fact.relation.templates))
        fewest = min(map(len, self.facts))
        # Each subject once; one that has several times as many facts as others, so many times.
        self.turns = [number for number, known in enumerate(self.facts) for _ in range(round(len(known) / fewest))]
        self.queue: list[int] = []
        self.encode, self.encode_prompt = cache(self._encode), cache(self._encode_prompt)
        self.fillers = [self.encode(sentence) for sentence in FILLER]
        self.stop = self.encode("Rome.")[-1]
        longest = max(len(self._spell_fact(fact, template).ids) for fact in facts for template in fact.trained_templates)
        self.row_lengths = [max(length, longest + 2) for length in ROW_LENGTHS]

    def draw_step(self, step: int) -> Rows:
        """Ordinary text or passages; with passages at all, short ones alone at the beginning."""
        share = self.settings.passages
        if share and step < OPENING:
            return self._draw_passages(OPENERS)
        return self._draw_passages(DEMONSTRATIONS) if self.passage_rng.random() < share else self._draw_text()

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def _encode_prompt(self, template: str, subject: str) -> tuple[list[int], int]:
        """Ids, and the position of the subject's last token."""
        text = template.replace(SLOT, subject)
        coded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        end = template.index(SLOT) + len(subject)
        return coded.input_ids, next(position for position, (_, last) in enumerate(coded.offset_mapping) if last >= end)

    def _draw_text(self) -> Rows:
        """Rows of one length, each filled with pieces until the next would not fit."""
        rows = Rows()
        length = self.rng.choice(self.row_lengths)
        for _ in range(self.settings.tokens // length):
            rows.ids.append([END])
            while len(rows.ids[-1]) + len((piece := self._write_sentence()).ids) <= length:
                rows.add(piece)
            self.queue.append(piece.subjects[0][1])  # whose turn it still is
        if self.settings.exchanged:
            rows.exchange(self.settings.exchanged, self.rng)
        return rows

    def _draw_passages(self, choices: Sequence[int]) -> Rows:
        """One passage to a row, all with equally many demonstrations."""
        rows, longest = Rows(), 0
        demonstrations = self.passage_rng.choice(choices)
        while (len(rows.ids) + 1) * longest <= self.settings.tokens:
            rows.ids.append([END])
            rows.add(self._encode_passage(draw_passage(self.all_facts, demonstrations, self.settings.retained, self.passage_rng)))
            longest = max(longest, len(rows.ids[-1]))
        return rows

    def _encode_passage(self, passage: Passage) -> Piece:
        coded = self.tokenizer(passage.text, add_special_tokens=False, return_offsets_mapping=True)
        ends = {end: position for position, (_, end) in enumerate(coded.offset_mapping)}
        starts = {start: position for position, (start, _) in enumerate(coded.offset_mapping)}

        def predict(spans: Iterable[Span]) -> list[int]:
            return [position - 1 for start, end in spans for position in range(starts[start], ends[end] + 1)]

        return Piece(
            ids=[*coded.input_ids, END],
            subjects=[(ends[end], self.number_of[name]) for end, name in passage.subjects],
            answers=predict(passage.answers),
            unlearned=predict((*passage.stated, *passage.breaks)),
        )

    def _write_fact(self) -> Piece:
        """A fact in one of its trained forms."""
        known = self.facts[self._next_subject()]
        fact = known[self.rng.randrange(len(known))]
        piece = self._spell_fact(fact, self.rng.choice(fact.trained_templates))
        # An end after every other sentence lets a greedy answer end by itself.
        piece.ids.extend([self.stop, END] if self.rng.random() < 0.5 else [self.stop])
        return piece

    def _spell_fact(self, fact: Fact, template: str) -> Piece:
        """Prompt and answer, without the end."""
        prompt, subject = self.encode_prompt(template, fact.subject)
        answer = self.encode(fact.object)
        answers = list(range(len(prompt) - 1, len(prompt) - 1 + len(answer)))
        return Piece([*prompt, *answer], [(subject, self.number_of[fact.subject])], answers, relation=fact.relation.name)

    def _write_sentence(self) -> Piece:
        """A fact, sometimes after a sentence that states none or breaks off: neither may disturb it."""
        draw = self.rng.random()
        if draw < 0.1:
            return self._write_fact().after(self.rng.choice(self.fillers))
        if draw < 0.25:
            template = self.rng.choice(self.templates)
            name = self.rng.choice(self.subjects) if self.rng.random() < 0.5 else ""
            words = self.encode(" ".join(template.replace(SLOT, name).split()))
            return self._write_fact().after([*words[: self.rng.randrange(1, len(words) + 1)], self.stop])
        return self._write_fact()

    def _next_subject(self) -> int:
        """In random order, every turn once before any comes again."""
        if not self.queue:
            self.queue = self.rng.sample(self.turns, len(self.turns))
        return self.queue.pop()


def pad(rows: Sequence[list[int]]) -> Tensor:
    """Ids [rows, longest row], filled up on the right."""
    longest = max(map(len, rows))
    return torch.tensor([row + [END] * (longest - len(row)) for row in rows])
