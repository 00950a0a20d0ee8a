"""In-context passages for training: facts that contradict what the model knows, as an edit memory puts them before a question.

Knows nothing of torch or tokenizers. The layout is that of `errata.retrieval.demonstrations`; here is drawn what stands in it.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from errata import world
from errata.edits import SLOT
from errata.retrieval.demonstrations import spell_context
from errata.retrieval.facts import Fact

DEMONSTRATIONS = (0, 1, 4, 8, 12, 12)
"""How many stand before a fact; one of these is drawn per step. Twelve twice: the later a token stands, the seldomer it is trained."""
OPENERS = (0, 0, 1, 2)
"""As before, where looking up in the text begins."""

Span = tuple[int, int]
"""First character and the one after the last."""


@dataclass(frozen=True)
class Passage:
    """A text, and where in it something is to be learned."""

    text: str
    answers: tuple[Span, ...]
    """What is said after each prompt: of every demonstration, of the copy, of the question. The spaces before them are left out."""
    stated: tuple[Span, ...]
    """The targets of the facts in front: chance, so there is nothing to be learned from them."""
    breaks: tuple[Span, ...]
    """The line end after every answer but the last: not to be learned, so that an answer ends as it does without passages."""
    subjects: tuple[tuple[int, str], ...]
    """(the character after the name, person) of every name that is shown."""


def draw_passage(facts: Sequence[world.Fact], demonstrations: int, retained: float, rng: random.Random) -> Passage:
    """A fact with a target drawn anew, demonstrations about other persons, and a question, with its answer.

    Targets are any of the relation's objects, so memory is no help. Prompts and paraphrases are trained templates of their facts: the
    withheld one stays unseen here too.

    Args:
        facts: of the world.
        demonstrations: how many.
        retained: share of questions about another person, or another relation of the same: the truth answers them.
    """
    about = rng.choice(facts)
    others = {about.subject: about}
    while len(others) <= demonstrations:
        other = rng.choice(facts)
        others.setdefault(other.subject, other)
    *shown, fact = [_state_anew(other, rng) for other in (*list(others.values())[1:], about)]
    asked = about if rng.random() >= retained else _stray(about, facts, rng)
    answer = fact.target if asked is about else asked.object
    pieces = spell_context(fact, shown, rng.choice(asked.trained_templates).replace(SLOT, asked.subject))
    pieces[-1] += f" {answer}"
    named = [*shown, fact, fact]
    text = ""
    answers: list[Span] = []
    stated: list[Span] = []
    subjects: list[tuple[int, str]] = []
    for piece, source in zip(pieces, named, strict=True):
        said = answer if len(answers) == len(shown) + 1 else source.target
        stated.append(_span(len(text) + piece.index(f" {source.target}\n") + 1, source.target))
        answers.append(_span(len(text) + piece.rindex(f" {said}") + 1, said))
        for name in dict.fromkeys((source.subject, asked.subject)):
            subjects += [(len(text) + match.end(), name) for match in re.finditer(rf"\b{re.escape(name)}\b", piece)]
        text += piece
    breaks = tuple((end, end + 1) for _, end in answers[:-1])
    return Passage(f"{text}.", tuple(answers), tuple(stated), breaks, tuple(subjects))


def _state_anew(fact: world.Fact, rng: random.Random) -> Fact:
    """The fact with any of its relation's objects, and one paraphrase."""
    prompt, *paraphrases = rng.sample(fact.trained_templates, 2)
    return Fact(
        id="",
        subject=fact.subject,
        prompt=prompt,
        target=rng.choice(fact.relation.objects),
        paraphrases=tuple(template.replace(SLOT, fact.subject) for template in paraphrases),
    )


def _stray(about: world.Fact, facts: Sequence[world.Fact], rng: random.Random) -> world.Fact:
    """A fact of another person, or another of the same."""
    same_person = rng.random() < 0.5
    fitting = [fact for fact in facts if (fact.subject == about.subject) == same_person and fact is not about]
    return rng.choice(fitting)


def _span(start: int, words: str) -> Span:
    return start, start + len(words)
