"""Which stored names a text names."""

import random
import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from errata.errors import InputError
from errata.retrieval.subjects import SubjectIndex, fold_text, split_tokens


def index_of(*names: str) -> SubjectIndex:
    """Each name by itself: its id is the name."""
    index = SubjectIndex()
    for name in names:
        index.add(name, name)
    return index


@pytest.mark.parametrize(
    ("names", "query", "found"),
    [
        (["Paris"], "The mayor of Paris", ["Paris"]),
        (["Paris"], "Paris", ["Paris"]),
        (["Paris"], "Is it Paris?", ["Paris"]),
        (["Paris"], "In (Paris), they say", ["Paris"]),
        (["Paris"], "Paris's mayor", ["Paris"]),
        (["Paris"], "Paris’s mayor", ["Paris"]),
        (["James"], "James' brother", ["James"]),
        (["Paris"], "Parish councils comparison", []),
        (["Paris"], "a Paris-based firm", ["Paris"]),
        (["Paris"], "capitale: l'été à Paris…", ["Paris"]),
        (["Italie"], "la capitale d'Italie", ["Italie"]),
        (["paris"], "PARIS IS BIG", ["PARIS"]),
        (["New York", "New York City"], "the mayor of New York City is", ["New York City"]),
        (["New York", "New York City"], "the state of New York is", ["New York"]),
        (["New York", "New York City"], "New York and New York City", ["New York", "New York City"]),
        (["York", "New York"], "New  York\n is", ["New  York"]),
        (["A", "A B", "B C D"], "A B C D", ["A", "B C D"]),
        (["Marie Curie", "Paris"], "Did Marie Curie work in Paris?", ["Marie Curie", "Paris"]),
        (["Paris"], "Paris, Paris and Paris", ["Paris", "Paris", "Paris"]),
        (["O'Neil"], "Who is O’Neil?", ["O’Neil"]),
        (["St. Petersburg"], "In St.Petersburg, people", ["St.Petersburg"]),
        (["St. Petersburg"], "In St Petersburg, people", []),
        (["Jean-Claude Gaudin"], "mother of Jean‐Claude Gaudin", ["Jean‐Claude Gaudin"]),
        (["Washington D.C."], "the mayor of Washington D.C.", ["Washington D.C."]),
        (["C", "C++"], "C++ is compiled", ["C++"]),
        (["Yahoo!"], "Yahoo! was bought", ["Yahoo!"]),
        (["2011"], "in 2011–12 and 20112", ["2011"]),
        (["snake_case"], "what snake_case is; a snake case", ["snake_case"]),
    ],
)
def test_names_are_found_on_word_boundaries_longest_first(names: list[str], query: str, found: list[str]) -> None:
    assert [match.name for match in index_of(*names).find(query)] == found


@pytest.mark.parametrize(
    ("name", "query", "found"),
    [
        ("Straße", "Die STRASSE ist lang", "STRASSE"),
        ("STRASSE", "eine Straße, lang", "Straße"),
        ("Zoë", "Is Zoe\u0308 there?", "Zoe\u0308"),
        ("Zoe\u0308", "Is Zoë there?", "Zoë"),
        ("Zoë", "Is Zoe there?", None),
        ("İzmir", "the port of İzmir is", "İzmir"),
        ("İzmir", "the port of I\u0307ZMI\u0307R is", None),
        ("Izmir", "the port of İzmir is", None),
        ("ΟΔΥΣΣΕΥΣ", "ο Οδυσσευς ήταν", "Οδυσσευς"),
        ("q\u0303x", "say q\u0303x now", "q\u0303x"),
        ("q", "say q\u0303 now", None),
        ("東京", "東京はどこですか", "東京"),
        ("東京", "日本の東京都", "東京"),
        ("パリ", "スパリゾートとは", None),
        ("パリ", "パリはどこですか", "パリ"),
        ("서울", "서울은 어디입니까", "서울"),
        (unicodedata.normalize("NFD", "서울"), "서울은 어디입니까", "서울"),
        ("서울", unicodedata.normalize("NFD", "서울은"), unicodedata.normalize("NFD", "서울")),
        ("กรุงเทพ", "กรุงเทพอยู่ที่ไหน", "กรุงเทพ"),
        ("თბილისი", "სად არის თბილისი?", "თბილისი"),
        ("NHK", "NHK交響楽団", "NHK"),
        ("😀 Inc", "who owns 😀 INC?", "😀 INC"),
    ],
)
def test_spellings_of_one_name_are_found_and_spans_are_those_of_the_query(name: str, query: str, found: str | None) -> None:
    matches = index_of(name).find(query)
    assert [match.name for match in matches] == ([] if found is None else [found])
    assert all(query[match.start : match.end] == match.name for match in matches)


def test_spans_hold_where_folding_changes_lengths() -> None:
    query = "İİ ßßß ﬃ Ǆ: Straße, İstanbul!"
    assert [(match.start, match.name) for match in index_of("STRASSE", "İSTANBUL").find(query)] == [(12, "Straße"), (20, "İstanbul")]


def test_several_go_by_one_name_and_one_by_several() -> None:
    index = SubjectIndex()
    for id, names in {"a": ["New York", "NYC"], "b": ["new york"], "c": ["NEW YORK", "new  york"]}.items():
        for name in names:
            index.add(name, id)
    (match,) = index.find("In New York")
    assert match.ids == ("a", "b", "c")
    assert index.find("NYC?")[0].ids == ("a",)
    index.remove("a")
    assert index.find("NYC?") == []
    assert index.find("In New York")[0].ids == ("b", "c")
    index.remove("c")
    assert index.find("In New York")[0].ids == ("b",)
    index.remove("nobody")
    index.remove("b")
    assert index.find("In New York") == [] and not len(index)


def test_a_name_needs_a_character() -> None:
    with pytest.raises(InputError, match="expected a name, found ' '"):
        SubjectIndex().add(" ", "a")


def test_nothing_is_kept_of_what_was_removed() -> None:
    index = index_of("New York", "New York City", "Oslo")
    for name in ("New York City", "Oslo", "New York"):
        index.remove(name)
    assert not any(vars(index).values())


_WORDS = st.sampled_from(["a", "b", "ab", "ß", "ss", "é", "e\u0301", "東", "京", "-", ".", "'", "’"])
_TEXTS = st.lists(st.tuples(_WORDS, st.sampled_from(["", " ", "  "])), min_size=1, max_size=8).map(
    lambda parts: "".join(map("".join, parts))
)
_NAMES = _TEXTS.filter(lambda text: bool(text.strip()))


def find_slowly(names: list[str], query: str) -> list[tuple[int, int]]:
    """Every substring of the query, compared as a whole: longest first, then leftmost."""

    def spell(text: str) -> list[str]:
        plain = unicodedata.normalize("NFC", text).casefold().replace("’", "'")
        return re.findall(r"[東京]|[^\W東京]+|[^\w\s]", plain)

    def splits(place: int) -> bool:
        around = unicodedata.normalize("NFC", query[:place])[-1:] + query[place : place + 1]
        inside = 0 < place < len(query)
        return not (inside and (query[place] == "\u0301" or re.fullmatch(r"[^\W東京]{2}", around)))

    wanted = [spell(name) for name in names]
    spans = [
        (start, end)
        for start in range(len(query))
        for end in range(start + 1, len(query) + 1)
        if query[start:end].strip() == query[start:end] and splits(start) and splits(end) and spell(query[start:end]) in wanted
    ]
    taken: list[tuple[int, int]] = []
    for start, end in sorted(spans, key=lambda span: (span[0] - span[1], span)):
        if all(end <= other[0] or start >= other[1] for other in taken):
            taken.append((start, end))
    return sorted(taken)


@given(names=st.lists(_NAMES, min_size=1, max_size=6), query=_TEXTS)
def test_matches_are_those_of_a_naive_search(names: list[str], query: str) -> None:
    assert [(match.start, match.end) for match in index_of(*names).find(query)] == find_slowly(names, query)


@given(names=st.lists(_NAMES, min_size=1, max_size=8), query=_TEXTS, seed=st.integers(0, 99))
def test_an_index_that_forgot_is_one_that_never_knew(names: list[str], query: str, seed: int) -> None:
    chance = random.Random(seed)
    index, kept = SubjectIndex(), SubjectIndex()
    stays = [chance.random() < 0.5 for _ in names]
    for id, (name, stay) in enumerate(zip(names, stays, strict=True)):
        index.add(name, str(id))
        if stay:
            kept.add(name, str(id))
    for id, stay in enumerate(stays):
        if not stay:
            index.remove(str(id))
    assert index.find(query) == kept.find(query) and len(index) == len(kept)
    assert vars(index) == vars(kept)


@given(st.text(max_size=40))
def test_any_text_splits_into_spans_that_cover_all_but_white_space(text: str) -> None:
    tokens = split_tokens(text)
    covered = {place for token in tokens for place in range(token.start, token.end)}
    assert all(text[place].isspace() for place in range(len(text)) if place not in covered)
    assert sum(token.end - token.start for token in tokens) == len(covered)


@given(st.text(max_size=40))
def test_canonically_equal_texts_fold_alike(text: str) -> None:
    assert fold_text(unicodedata.normalize("NFC", text)) == fold_text(unicodedata.normalize("NFD", text))
