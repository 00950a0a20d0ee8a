"""Names of subjects in a text: which of a million stored names a question names, in microseconds.

Two texts are the same if their tokens are. A token is

    a word          letters, digits and underscores in a run, with their combining marks;
    one character   of a script that is written without spaces, or whose particles follow a noun without one (Han, Hiragana, Hangul,
                    Thai, Lao, Khmer, Burmese): there a name may begin and end anywhere, and the longest name wins;
    one character   of anything else but white space, which only separates.

Every token is compared in NFC and case-folded (Unicode's canonical caseless match), typographic apostrophes and hyphens as plain ones. So
"O’NEIL" is "O'Neil", "STRASSE" is "Straße", "St.Petersburg" is "St. Petersburg"; but "St Petersburg" is not (an alias says so), "İzmir" is
not "izmir" (folding is of no language), and accents count. A name is found between word boundaries, hence before "'s", "," or at the end,
and never inside a word. Folding changes lengths; spans are those of the text as it was given.

Names lie in a table by their joined tokens. For each first token there are the lengths of names that begin so: a text of n tokens costs n
looks at that table, and one more per length at those places only. An Aho–Corasick automaton in C (pyahocorasick 2.3, over the same folded
texts) finds names among 1,000,000 in 12 µs where this takes 23, but needs three times the memory (596 against 192 MB) and 8 s to be built
anew after every change; this takes a name or forgets it in microseconds.

This module travels inside every MLflow version.
"""

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from errata.errors import InputError

_ASCII = re.compile(r"[a-z0-9_]+|[^\sa-z0-9_]")
_LONE = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1100-\u11ff\u1780-\u17ff\u2e80-\u2fdf\u3005-\u3007\u3040-\u309f\u31a0-\u31bf\u3400-\u4dbf\u4e00-\u9fff"
    "\ua960-\ua97f\uac00-\ud7ff\uf900-\ufaff\U00020000-\U0003ffff]"
)
"""Scripts in which every character is a token. Katakana is not among them: it mostly spells whole foreign words."""
_PLAIN = str.maketrans("\u2018\u2019\u02bc\uff07\u2010\u2011\u2012\u2013", "''''----")
"""Apostrophes and hyphens that word processors write."""


class Token(NamedTuple):
    text: str
    """Folded."""
    start: int
    end: int
    """Of the text that was split, in characters."""


@dataclass(frozen=True)
class Match:
    """A place where a text names a subject."""

    ids: tuple[str, ...]
    """Whoever goes by this name, in the order of being added."""
    start: int
    end: int
    """Of the query as it was given, in characters: `query[start:end] == name`."""
    name: str
    """As the query spells it."""


def split_tokens(text: str) -> list[Token]:
    """The tokens of a text, as the head of this module says."""
    if text.isascii():
        return [Token(found[0], found.start(), found.end()) for found in _ASCII.finditer(text.lower())]
    tokens: list[Token] = []
    word = -1  # where the word that is being read begins
    for start, end in _split_clusters(text):
        head = text[start].translate(_PLAIN)
        joins = (head.isalnum() or head == "_") and not _LONE.match(head)
        if word >= 0 and not joins:
            tokens.append(Token(_fold(text[word:start]), word, start))
            word = -1
        if joins:
            word = start if word < 0 else word
        elif not head.isspace():
            tokens.append(Token(_fold(text[start:end]), start, end))
    if word >= 0:
        tokens.append(Token(_fold(text[word:]), word, len(text)))
    return tokens


def fold_text(text: str) -> str:
    """The tokens with a space between: equal for texts that this module takes for the same."""
    return " ".join(token.text for token in split_tokens(text))


class SubjectIndex:
    """Names and who goes by them. Grows and forgets one name at a time; nothing is ever built anew."""

    def __init__(self) -> None:
        # One id as it is, several as a dictionary, which keeps their order and forgets one of many at once.
        self._ids: dict[str, str | dict[str, None]] = {}
        self._names: dict[str, tuple[str, ...]] = {}
        self._lengths: dict[str, dict[int, int]] = {}
        """First token → length of a name in tokens → how many names."""

    def __len__(self) -> int:
        """How many different names are known."""
        return len(self._ids)

    def add(self, name: str, id: str) -> None:
        """Gives `id` another name; several may share one.

        Raises:
            InputError: a name of white space only.
        """
        tokens = split_tokens(name)
        key = " ".join(token.text for token in tokens)
        if not key:
            raise InputError(f"subject: expected a name, found {name!r}")
        known = self._ids.get(key)
        if known is None:
            self._ids[key] = id
            lengths = self._lengths.setdefault(tokens[0].text, {})
            lengths[len(tokens)] = lengths.get(len(tokens), 0) + 1
        elif known == id:
            return
        elif isinstance(known, dict):
            if id in known:
                return
            known[id] = None
        else:
            self._ids[key] = {known: None, id: None}
        self._names[id] = (*self._names.get(id, ()), key)

    def remove(self, id: str) -> None:
        """Forgets every name of `id`; one that is not known has none."""
        for key in self._names.pop(id, ()):
            known = self._ids[key]
            if isinstance(known, dict):
                del known[id]
                if len(known) == 1:
                    self._ids[key] = next(iter(known))
            else:
                del self._ids[key]
                self._forget_length(key)

    def find(self, query: str) -> list[Match]:
        """Where names stand in `query`, from left to right. The longest name (in characters; of equal ones the first) goes first, and no
        name is found where a longer one stands."""
        tokens = split_tokens(query)
        found = sorted(self._list_places(tokens), key=lambda place: (tokens[place[0]].start - tokens[place[1]].end, place))
        taken = bytearray(len(tokens))
        matches = []
        for first, last, key in found:
            if any(taken[first : last + 1]):
                continue
            taken[first : last + 1] = b"\1" * (last + 1 - first)
            known = self._ids[key]
            start, end = tokens[first].start, tokens[last].end
            matches.append(Match((known,) if isinstance(known, str) else tuple(known), start, end, query[start:end]))
        return sorted(matches, key=lambda match: match.start)

    def _list_places(self, tokens: list[Token]) -> Iterator[tuple[int, int, str]]:
        """First and last token of every name in the text, and its key."""
        texts = [token.text for token in tokens]
        for first, text in enumerate(texts):
            for length in self._lengths.get(text, ()):
                if first + length <= len(texts) and (key := " ".join(texts[first : first + length])) in self._ids:
                    yield first, first + length - 1, key

    def _forget_length(self, key: str) -> None:
        tokens = key.split(" ")
        lengths = self._lengths[tokens[0]]
        lengths[len(tokens)] -= 1
        if not lengths[len(tokens)]:
            del lengths[len(tokens)]
        if not lengths:
            del self._lengths[tokens[0]]


def _fold(text: str) -> str:
    """Canonical caseless form (Unicode 3.13, D145), composed."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", text).casefold()).translate(_PLAIN)


def _split_clusters(text: str) -> Iterator[tuple[int, int]]:
    """Characters with the marks that follow them: NFC never joins across these borders."""
    start = 0
    for place in range(1, len(text)):
        if not _continues(text[place]):
            yield start, place
            start = place
    if text:
        yield start, len(text)


def _continues(character: str) -> bool:
    """A combining mark, or a vowel or final consonant of a Hangul syllable that is written in parts."""
    return (
        not character.isascii()
        and unicodedata.category(character)[0] == "M"
        or ("\u1160" <= character <= "\u11ff" or "\ud7b0" <= character <= "\ud7ff")
    )
