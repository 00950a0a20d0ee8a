"""Which live fact a query asks for, if any: the paper's retrieval made decidable (MIKE §3.1; algorithms.md §2.1, resolution J).

    1  the query is a live fact's rewrite prompt                             that fact
    2  it names subjects that have one fact between them                     that fact
    3  the facts of the subjects it names are several                        the most similar one
    4  it names no subject                                                   none: the query is out of scope

A subject that is named need not be asked about what was edited: "Danielle Darrieux was born in" names a subject whose mother tongue was
edited. With `scope = "guarded"` a fact is taken in cases 2 and 3 only if it is similar enough; `"paper"` asks nothing. Case 1 is sure.

Similarity is the cosine of the query with the rewrite prompt or a paraphrase that the fact has, whichever is nearer, with the subject's
name replaced by one neutral word in all of them, so that the relation decides and not the name; of the query only what stands from the
sentence with that name on. Facts are encoded when they are first compared, by template; case 1, case 4 and, in `paper`, case 2 compare
nothing.
This module travels inside every MLflow version.
"""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from errata.errors import InputError, UnknownNameError
from errata.retrieval.encoder import Encoder, Vectors, load_encoder
from errata.retrieval.facts import Fact
from errata.retrieval.subjects import Match, SubjectIndex, fold_text

Scope = Literal["guarded", "paper"]
Case = Literal[1, 2, 3, 4]

PLACEHOLDER = "X"
"""Stands for a subject where texts are compared."""
_SENTENCE_END = re.compile(r"(?<!\b[A-ZÀ-Þ])(?<!\b[A-ZÀ-Þ]\w)[.!?]+[\"'”’)\]]*\s+|\n+|[。！？]")
"""Not after a capital or a capital and a letter: "St.", "Dr." and initials end no sentence."""
FLOOR = 0.64
"""Similarity from which a fact is asked for, by all-MiniLM-L6-v2. It tells best between paraphrases of edits and other questions about
their subjects, of CounterFact and KnowEdit (`python -m benchmarks.retrieval`); another encoder needs its own (`find_floor`)."""


@dataclass(frozen=True)
class Route:
    """What a query was found to ask for, and why."""

    case: Case
    """The case that decided. In cases 2 and 3 the fact may be None: it was not similar enough."""
    fact: Fact | None = None
    """None: out of scope."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """Id → similarity of every fact that was compared with the query."""
    floor: float | None = None
    """What the best score was asked to reach; None where nothing was asked."""
    names: tuple[str, ...] = ()
    """The subjects that were found, as the query spells them, from left to right. Not looked for in case 1."""


class FactStore:
    """Live facts, found by the question. Grows by appending and forgets at once.

    Args:
        facts: the first ones.
        encoder: called once, when something is first to be compared.
        scope: what cases 2 and 3 ask.
        floor: the similarity that `guarded` asks for, with the encoder used.

    Raises:
        InputError: as `add`.
    """

    def __init__(
        self,
        facts: Iterable[Fact] = (),
        *,
        encoder: Callable[[], Encoder] = load_encoder,
        scope: Scope = "guarded",
        floor: float = FLOOR,
    ) -> None:
        self.scope: Scope = scope
        self.floor = floor
        self._load = encoder
        self._encoder: Encoder | None = None
        self._facts: dict[str, Fact] = {}
        self._added = 0
        self._turns: dict[str, int] = {}
        """Id → when it was added: of equal facts the newest one answers."""
        self._subjects = SubjectIndex()
        self._prompts: dict[str, tuple[str, ...]] = {}
        """Folded rewrite prompt → ids, in the order of being added."""
        self._relations: dict[str, tuple[str, ...]] = {}
        """Id → what it is compared by: at first its prompt, with its paraphrases once it is compared."""
        self._users: dict[str, int] = {}
        """Such a text → how many live facts have it."""
        self._vectors: dict[str, Vectors] = {}
        """Such a text → [d], where it was needed or given."""
        self.add(list(facts))

    def __len__(self) -> int:
        return len(self._facts)

    def __contains__(self, id: str) -> bool:
        return id in self._facts

    def __iter__(self) -> Iterator[Fact]:
        """In the order of being added."""
        return iter(self._facts.values())

    def add(self, facts: Sequence[Fact], vectors: Vectors | None = None) -> None:
        """Appends facts. All or none.

        Args:
            vectors: [n, d], what the encoder makes of `spell_relation` of each, where it is known already.

        Raises:
            InputError: an id that is live or comes twice, a subject or alias without a name, or another number of vectors than of facts.
        """
        ids: set[str] = set()
        for fact in facts:
            if fact.id in self._facts or fact.id in ids:
                raise InputError(f"fact {fact.id}: expected a new id, found one that is live already or comes twice")
            ids.add(fact.id)
        if vectors is not None and len(vectors) != len(facts):
            raise InputError(f"facts: expected a vector for each of {len(facts)}, found {len(vectors)}")
        for fact in facts:
            if not all(name.strip() for name in (fact.subject, *fact.aliases)):
                raise InputError(f"fact {fact.id}: expected names for its subject, found an empty one")
        for place, fact in enumerate(facts):
            self._facts[fact.id] = fact
            self._turns[fact.id] = self._added
            self._added += 1
            for name in (fact.subject, *fact.aliases):
                self._subjects.add(name, fact.id)
            prompt = fold_text(fact.rewrite_prompt)
            self._prompts[prompt] = (*self._prompts.get(prompt, ()), fact.id)
            self._relate(fact.id, (spell_relation(fact),))
            if vectors is not None:
                self._vectors[spell_relation(fact)] = np.array(vectors[place], dtype=np.float32)

    def remove(self, ids: Collection[str]) -> None:
        """Forgets facts, with their names and whatever was computed of them. All or none.

        Raises:
            UnknownNameError: an id that is not live.
        """
        if unknown := next((id for id in ids if id not in self._facts), None):
            raise UnknownNameError(f"fact {unknown}: expected the id of a live fact, found none of that name")
        for id in set(ids):
            fact = self._facts.pop(id)
            del self._turns[id]
            self._subjects.remove(id)
            prompt = fold_text(fact.rewrite_prompt)
            if others := tuple(other for other in self._prompts[prompt] if other != id):
                self._prompts[prompt] = others
            else:
                del self._prompts[prompt]
            for text in self._relations.pop(id):
                self._users[text] -= 1
                if not self._users[text]:
                    del self._users[text]
                    self._vectors.pop(text, None)

    def route(self, queries: Sequence[str]) -> list[Route]:
        """One route for each query. What has to be compared is encoded in one batch.

        Args:
            queries: prompts as users write them; each is read once, before decoding.
        """
        routes: list[Route | None] = []
        compared: dict[int, tuple[list[Match], list[tuple[Fact, str]]]] = {}
        for place, query in enumerate(queries):
            if ids := self._prompts.get(fold_text(query)):
                routes.append(Route(1, self._facts[ids[-1]]))
                continue
            matches = self._subjects.find(query)
            facts = sorted({id for match in matches for id in match.ids}, key=self._turns.__getitem__, reverse=True)
            if not facts:
                routes.append(Route(4))
            elif len(facts) == 1 and self.scope == "paper":
                routes.append(Route(2, self._facts[facts[0]], names=_list_names(matches)))
            else:
                routes.append(None)
                compared[place] = matches, [(self._facts[id], spell_asked(query, matches, id)) for id in facts]
        scores = iter(self._score([pair for _, pairs in compared.values() for pair in pairs]))
        for place, (matches, pairs) in compared.items():
            found = {fact.id: score for (fact, _), score in zip(pairs, scores, strict=False)}
            # The newest comes first, so that it wins ties.
            best = max(pairs, key=lambda pair: found[pair[0].id])[0]
            floor = self.floor if self.scope == "guarded" else None
            fact = best if floor is None or found[best.id] >= floor else None
            routes[place] = Route(2 if len(pairs) == 1 else 3, fact, found, floor, _list_names(matches))
        return [route for route in routes if route is not None]

    def _score(self, pairs: Sequence[tuple[Fact, str]]) -> list[float]:
        """Similarity of facts with what `spell_asked` makes of a query: of each fact, that of the nearest of its texts."""
        if not pairs:
            return []
        for fact, _ in pairs:
            self._read_paraphrases(fact)
        missing = dict.fromkeys(text for fact, _ in pairs for text in self._relations[fact.id] if text not in self._vectors)
        asked = list(dict.fromkeys(text for _, text in pairs))
        if self._encoder is None:
            self._encoder = self._load()
        rows = self._encoder.encode([*asked, *missing])
        self._vectors |= zip(missing, rows[len(asked) :], strict=True)
        # Summed in float64, so that equal texts score the same in any batch.
        exact = {text: row.astype(np.float64) for text, row in zip(asked, rows, strict=False)}
        return [max(float(np.dot(exact[text], self._vectors[own])) for own in self._relations[fact.id]) for fact, text in pairs]

    def _read_paraphrases(self, fact: Fact) -> None:
        """Compare a fact by its paraphrases, too, as far as they name its subject."""
        known = self._relations[fact.id]
        if not fact.paraphrases or len(known) > 1:
            return
        found = [(text, self._subjects.find(text)) for text in fact.paraphrases]
        masked = [spell_asked(text, matches, fact.id) for text, matches in found if any(fact.id in match.ids for match in matches)]
        self._relate(fact.id, tuple(dict.fromkeys(text for text in masked if text not in known)))

    def _relate(self, id: str, texts: tuple[str, ...]) -> None:
        self._relations[id] = (*self._relations.get(id, ()), *texts)
        for text in texts:
            self._users[text] = self._users.get(text, 0) + 1


def spell_relation(fact: Fact) -> str:
    """What a fact is compared by above all: its prompt with a neutral word for the subject."""
    return fact.prompt.replace("{}", PLACEHOLDER)


def find_floor(in_scope: Sequence[float], out_of_scope: Sequence[float]) -> float:
    """The similarity that tells best what is in scope (at or above it) from what is not: the largest balanced accuracy, the mean of the two
    shares that are right. Between two scores it is their middle; of equally good gaps the widest, then the lowest.

    Raises:
        InputError: no scores of one kind, or scores that are not finite.
    """
    inside, outside = (np.sort(np.asarray(scores, dtype=np.float64)) for scores in (in_scope, out_of_scope))
    for kind, scores in (("in scope", inside), ("out of scope", outside)):
        if not len(scores) or not np.isfinite(scores).all():
            raise InputError(f"floor: expected finite scores {kind}, found {'others' if len(scores) else 'none'}")
    scores = np.unique(np.concatenate([inside, outside]))
    lower = np.concatenate([[scores[0] - 1], scores])
    upper = np.concatenate([scores, [scores[-1] + 1]])
    right = (1 - np.searchsorted(inside, upper) / len(inside) + np.searchsorted(outside, upper) / len(outside)) / 2
    best = np.flatnonzero(right >= right.max() - 1e-12)
    widest = best[np.argmax((upper - lower)[best])]
    return float((lower[widest] + upper[widest]) / 2)


def spell_asked(query: str, matches: Sequence[Match], id: str) -> str:
    """What a query is compared by with this fact: from the sentence on that names its subject last, with the neutral word for each such
    name. What stands before that sentence asks nothing about the subject."""
    own = [match for match in matches if id in match.ids]
    begin = max((end.end() for end in _SENTENCE_END.finditer(query, 0, own[-1].start)), default=0)
    text, last = "", begin
    for match in own:
        if match.start >= begin:
            text += query[last : match.start] + PLACEHOLDER
            last = match.end
    return text + query[last:]


def _list_names(matches: Sequence[Match]) -> tuple[str, ...]:
    return tuple(match.name for match in matches)
