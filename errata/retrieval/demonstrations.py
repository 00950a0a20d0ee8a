"""How facts are put before a question: every template of in-context editing, in one place (MIKE, algorithms.md §2.2).

    New Fact: {fact} {target}⏎Prompt: {paraphrase} {target}⏎⏎        each demonstration, the nearest one last
    New Fact: {fact} {target}⏎Prompt: {fact} {target}⏎⏎              the fact itself as a copy
    New Fact: {fact} {target}⏎Prompt: {query}                        what is asked

Teacher and evaluated memory use the same layout; the published code asks the teacher "Prompt: {query}" without the fact before it.
This module travels inside every MLflow version.
"""

from collections.abc import Sequence

from errata.retrieval.facts import Fact


def spell_demonstration(fact: Fact, prompt: str) -> str:
    """A fact and how it answers a prompt, as it stands before a question."""
    return f"{_spell_fact(fact)}Prompt: {prompt} {fact.target}\n\n"


def spell_question(fact: Fact, query: str) -> str:
    """A fact and the question that it is to answer: the end of what the model reads."""
    return f"{_spell_fact(fact)}Prompt: {query}"


def spell_context(fact: Fact, demonstrations: Sequence[Fact], query: str) -> list[str]:
    """What the model reads, in pieces that are written one after the other: demonstrations, the fact as a copy, the question.

    Where there is too little room pieces are dropped from the front, and never the last.

    Args:
        fact: the one that answers the query.
        demonstrations: nearest last. Each shows its first paraphrase; without one, its own prompt.
    """
    shown = [spell_demonstration(other, (*other.paraphrases, other.rewrite_prompt)[0]) for other in demonstrations]
    return [*shown, spell_demonstration(fact, fact.rewrite_prompt), spell_question(fact, query)]


def spell_stored(fact: Fact) -> str:
    """The sentence that stands for a fact among others: what questions and facts are compared with (IKE, MIKE: `encode_facts.py`)."""
    return f"New Fact: {fact.rewrite_prompt} {fact.target}\nPrompt: {fact.rewrite_prompt} {fact.target}"


def _spell_fact(fact: Fact) -> str:
    return f"New Fact: {fact.rewrite_prompt} {fact.target}\n"
