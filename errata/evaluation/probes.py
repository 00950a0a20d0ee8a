"""Which probes a method may learn from and which it may not: the held-out split (design §6)."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from errata.edits import Edit, Probe
from errata.retrieval.facts import Fact


@dataclass(frozen=True)
class Probes:
    paraphrases: tuple[str, ...]
    neighbours: tuple[Probe, ...]


@dataclass(frozen=True)
class ProbeSplit:
    """Disjoint by prompt text: a text that an edit lists twice never stands on both sides."""

    training: Probes
    held_out: Probes


def split_probes(edit: Edit, seed: int) -> ProbeSplit:
    """Hold out one paraphrase and half of the neighbours (rounded up) of an edit.

    The choice depends on the edit's id, the seed and the probes' texts only, so it is the same on every machine, in every batch and
    under any order of the probes.
    """
    held_paraphrases = set(_rank(edit.paraphrase_prompts, edit.edit_id, seed)[:1])
    neighbours = _rank([probe.prompt for probe in edit.neighborhood_prompts], edit.edit_id, seed)
    held_neighbours = set(neighbours[: (len(neighbours) + 1) // 2])
    return ProbeSplit(
        training=Probes(
            tuple(text for text in edit.paraphrase_prompts if text not in held_paraphrases),
            tuple(probe for probe in edit.neighborhood_prompts if probe.prompt not in held_neighbours),
        ),
        held_out=Probes(
            tuple(text for text in edit.paraphrase_prompts if text in held_paraphrases),
            tuple(probe for probe in edit.neighborhood_prompts if probe.prompt in held_neighbours),
        ),
    )


def state_fact(edit: Edit, id: str, seed: int) -> Fact:
    """An edit as a memory keeps it: with the paraphrases of the training half. What is held out is for measuring.

    Args:
        id: of the fact; in a stream that of the occurrence.
        seed: of the split.
    """
    return Fact(id, edit.subject, edit.prompt, edit.target_new, edit.aliases, split_probes(edit, seed).training.paraphrases)


def _rank(texts: Sequence[str], edit_id: str, seed: int) -> list[str]:
    """Distinct texts in an order that only a digest decides: random modules may change theirs between Python versions."""
    return sorted(set(texts), key=lambda text: hashlib.sha256(f"{seed}\0{edit_id}\0{text}".encode()).digest())
