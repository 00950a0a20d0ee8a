"""The four cases of the retrieval, model-free; and with the real encoder what the guard is for."""

import hashlib
import re
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from errata.errors import InputError, UnknownNameError
from errata.retrieval.encoder import DEFAULT_ENCODER, SentenceEncoder, Vectors, load_encoder
from errata.retrieval.facts import Fact
from errata.retrieval.routing import FLOOR, PLACEHOLDER, FactStore, find_floor, spell_relation


class WordEncoder:
    """Similar are texts that share words."""

    name = "words"

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def __call__(self) -> "WordEncoder":
        return self

    def encode(self, texts: Sequence[str]) -> Vectors:
        self.calls.append(list(texts))
        rows = np.zeros((len(texts), 512), dtype=np.float32)
        for row, text in zip(rows, texts, strict=True):
            for word in re.findall(r"\w+", text.lower()):
                row[int(hashlib.sha256(word.encode()).hexdigest(), 16) % 512] += 1
            row /= max(float(np.linalg.norm(row)), 1e-9)
        return rows


def refuse_to_load() -> SentenceEncoder:
    raise AssertionError("nothing had to be compared")


FACTS = [
    Fact("ny-river", "New York", "The river of {} is", "Rhine"),
    Fact("nyc-mayor", "New York City", "The mayor of {} is", "Anna Keller", aliases=("NYC", "the Big Apple")),
    Fact("curie-work", "Marie Curie", "{} worked in", "Oslo"),
    Fact("curie-tongue", "Marie Curie", "The mother tongue of {} is", "Danish"),
    Fact("oslo", "Oslo", "The river of {} is", "Seine"),
]

TABLE = [
    ("The river of New York is", 1, "ny-river", ()),
    (" the river of  NEW YORK is ", 1, "ny-river", ()),
    ("The mother tongue of Marie Curie is", 1, "curie-tongue", ()),
    ("Which river is that of New York", 2, "ny-river", ("New York",)),
    ("Which river flows in New York?", 2, "ny-river", ("New York",)),
    ("New York's river is called", 2, "ny-river", ("New York",)),
    ("Who is the mayor of New York City?", 2, "nyc-mayor", ("New York City",)),
    ("Who is the mayor of NYC", 2, "nyc-mayor", ("NYC",)),
    ("the Big Apple: the mayor is", 2, "nyc-mayor", ("the Big Apple",)),
    ("What is the mother tongue of Marie Curie?", 3, "curie-tongue", ("Marie Curie",)),
    ("Marie Curie once worked in", 3, "curie-work", ("Marie Curie",)),
    ("Where near Oslo is it that Marie Curie worked in", 3, "curie-work", ("Oslo", "Marie Curie")),
    ("The river of Newark is", 4, None, ()),
    ("Oslonians speak", 4, None, ()),
    ("", 4, None, ()),
]


@pytest.mark.parametrize(("query", "case", "fact", "names"), TABLE)
@pytest.mark.parametrize("scope", ["guarded", "paper"])
def test_the_four_cases(scope: str, query: str, case: int, fact: str | None, names: tuple[str, ...]) -> None:
    (route,) = FactStore(FACTS, encoder=WordEncoder(), scope=scope, floor=0.3).route([query])  # type: ignore[arg-type]
    assert (route.case, route.fact and route.fact.id, route.names) == (case, fact, names)
    guarded = scope == "guarded" and case in (2, 3)
    assert route.floor == (0.3 if guarded else None)
    assert bool(route.scores) == (case == 3 or guarded)


def test_a_question_about_something_else_of_the_subject_is_out_of_scope_only_where_it_is_guarded() -> None:
    query = "Which painter drew New York City?"
    guarded, paper = (FactStore(FACTS, encoder=WordEncoder(), scope=scope, floor=0.3).route([query])[0] for scope in ("guarded", "paper"))
    assert guarded.case == 2 and guarded.fact is None
    assert list(guarded.scores) == ["nyc-mayor"] and guarded.scores["nyc-mayor"] < 0.3
    assert paper.case == 2 and paper.fact is FACTS[1]


def test_only_what_has_to_be_compared_is_encoded_and_in_one_batch() -> None:
    silent = FactStore(FACTS, encoder=refuse_to_load, scope="paper")
    assert [route.case for route in silent.route(["The river of Oslo is", "Is Oslo big?", "Nothing."])] == [1, 2, 4]
    guarded = FactStore(FACTS, encoder=refuse_to_load)
    assert [route.case for route in guarded.route(["The river of Oslo is", "Nothing."])] == [1, 4]
    assert guarded.route([]) == []
    encoder = WordEncoder()
    store = FactStore(FACTS, encoder=encoder)
    store.route(["Is Oslo big?", "Is New York big?", "Is New York City big?"])
    # Two facts have one template, and three questions are the same one without the name.
    assert encoder.calls == [[f"Is {PLACEHOLDER} big?", f"The river of {PLACEHOLDER} is", f"The mayor of {PLACEHOLDER} is"]]
    store.route(["Is Oslo nice?"])
    assert encoder.calls[1:] == [[f"Is {PLACEHOLDER} nice?"]]


def test_vectors_that_are_known_already_are_not_made_again() -> None:
    encoder = WordEncoder()
    store = FactStore(encoder=encoder)
    store.add(FACTS, encoder.encode([spell_relation(fact) for fact in FACTS]))
    plain = FactStore(FACTS, encoder=WordEncoder())
    queries = [row[0] for row in TABLE]
    encoder.calls.clear()
    assert store.route(queries) == plain.route(queries)
    assert not any(spell_relation(fact) in call for call in encoder.calls for fact in FACTS)


def test_a_paraphrase_that_a_fact_has_is_compared_too() -> None:
    bare = Fact("fact", "Marie Curie", "The mother tongue of {} is", "Danish")
    known = Fact("fact", "Marie Curie", "The mother tongue of {} is", "Danish", (), ("At home Marie Curie speaks", "Nobody is named here"))
    query = "At the table Marie Curie speaks"
    without, with_it = (FactStore([fact], encoder=WordEncoder(), floor=0.6) for fact in (bare, known))
    assert without.route([query])[0].fact is None and with_it.route([query])[0].fact == known
    assert with_it.route(["Marie Curie was painted by"])[0].fact is None
    with_it.remove(["fact"])
    assert not vars(with_it)["_vectors"] and not vars(with_it)["_users"]


def test_removed_facts_are_forgotten_at_once() -> None:
    store = FactStore(FACTS, encoder=WordEncoder(), floor=0.3)
    store.route([row[0] for row in TABLE])
    store.remove(["curie-tongue", "nyc-mayor"])
    asked = ["The mother tongue of Marie Curie is", "Marie Curie once worked in", "Who painted New York City?", "Who is mayor of NYC?"]
    found = store.route(asked)
    assert [(route.case, route.fact and route.fact.id) for route in found] == [(2, None), (2, "curie-work"), (2, None), (4, None)]
    assert found[2].names == ("New York",)  # the shorter name stands free again
    assert len(store) == 3 and "nyc-mayor" not in store and [fact.id for fact in store] == ["ny-river", "curie-work", "oslo"]
    with pytest.raises(UnknownNameError, match="fact nyc-mayor: expected the id of a live fact"):
        store.remove(["oslo", "nyc-mayor"])
    assert "oslo" in store
    store.remove([fact.id for fact in store])
    empty = FactStore(encoder=refuse_to_load)
    assert {
        name: value for name, value in vars(store).items() if name.startswith("_") and name not in ("_load", "_encoder", "_added")
    }.keys()
    for name in ("_facts", "_turns", "_prompts", "_relations", "_users", "_vectors"):
        assert vars(store)[name] == vars(empty)[name] == {}
    assert store.route(asked)[0].case == 4


def test_of_equal_facts_the_newest_answers_whatever_else_is_asked() -> None:
    first, second = Fact("first", "Oslo", "The river of {} is", "Seine"), Fact("second", "Oslo", "The river of {} is", "Rhine")
    for order in ([first, second], [second, first]):
        store = FactStore(order, encoder=WordEncoder(), floor=0.3)
        queries = ["The river of Oslo is", "Which river is that of Oslo?", "Oslo sleeps at night"]
        alone = [store.route([query])[0] for query in queries]
        assert [route.fact for route in alone] == [order[-1], order[-1], None]
        assert store.route(queries * 3) == alone * 3
        store.remove([order[-1].id])
        store.add([order[-1]])
        assert store.route(queries) == alone


def test_a_sentence_before_the_one_with_the_subject_asks_nothing() -> None:
    store = FactStore(FACTS, encoder=WordEncoder())
    plain, after, noisy, short, abroad, restated = store.route(
        [
            "the mayor of NYC",
            "the mayor of NYC. And then?",
            'Dogs bark "at night." the mayor of NYC',
            "They looked in. the mayor of NYC",
            "犬が吠える。the mayor of NYC",
            "NYC was big. the mayor of NYC",
        ]
    )
    assert plain.scores == noisy.scores == short.scores == abroad.scores == restated.scores
    assert plain.scores != after.scores
    initials = store.route(["St. J. Smith met the mayor of NYC", "J. Smith met the mayor of NYC"])
    assert initials[0].scores != initials[1].scores != plain.scores


def test_bad_facts_are_refused_and_nothing_changes() -> None:
    store = FactStore(FACTS[:1], encoder=WordEncoder())
    for facts, message in (
        ([FACTS[1], FACTS[0]], "fact ny-river: expected a new id"),
        ([FACTS[1], FACTS[1]], "fact nyc-mayor: expected a new id"),
        ([FACTS[1], Fact("x", "Oslo", "{}", "y", aliases=(" ",))], "fact x: expected names"),
    ):
        with pytest.raises(InputError, match=message):
            store.add(facts)
    with pytest.raises(InputError, match="a vector for each of 1, found 2"):
        store.add([FACTS[1]], np.zeros((2, 4), dtype=np.float32))
    assert len(store) == 1 and store.route(["In New York City"])[0].names == ("New York",)


_SCORES = st.lists(st.floats(-1, 1).map(lambda value: round(value, 2)), min_size=1, max_size=12)


@given(inside=_SCORES, outside=_SCORES)
def test_the_floor_is_as_good_as_any(inside: list[float], outside: list[float]) -> None:
    def judge(floor: float) -> float:
        return sum(score >= floor for score in inside) / len(inside) + sum(score < floor for score in outside) / len(outside)

    floor = find_floor(inside, outside)
    assert judge(floor) >= max(judge(other) for other in [-2, 2, *inside, *outside, *(score + 0.005 for score in inside + outside)]) - 1e-9


def test_the_floor_lies_in_the_middle_of_the_gap() -> None:
    assert find_floor([0.8, 0.9], [0.1, 0.4]) == pytest.approx(0.6)
    assert find_floor([0.2, 0.8, 0.9], [0.1, 0.3, 0.4]) == pytest.approx(0.6)
    with pytest.raises(InputError, match="expected finite scores out of scope, found none"):
        find_floor([0.5], [])
    with pytest.raises(InputError, match="in scope, found others"):
        find_floor([float("nan")], [0.5])


@pytest.fixture(scope="module")
def encoder() -> SentenceEncoder:
    return load_encoder(device="cpu")


def test_the_default_encoder_gives_one_row_of_length_1_for_each_text(encoder: SentenceEncoder, capfd: pytest.CaptureFixture[str]) -> None:
    rows = encoder.encode(["The cat sleeps.", "A cat is asleep.", "Bonds fell.", "The cat sleeps."])
    assert encoder.name == DEFAULT_ENCODER and rows.shape == (4, 384) and rows.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    assert rows[0] @ rows[1] > 0.7 > 0.3 > rows[0] @ rows[2]
    assert (rows[0] == rows[3]).all()
    assert encoder.encode([]).shape == (0, 384)
    assert load_encoder(device="cpu").encode(["Quiet."]).shape == (1, 384)
    assert capfd.readouterr() == ("", "")


def test_an_encoder_that_is_not_there_is_named(tmp_path: object) -> None:
    with pytest.raises(InputError, match="encoder '.*': expected a folder or hub name of a sentence encoder, found none that loads"):
        load_encoder(str(tmp_path), device="cpu")


def test_the_guard_tells_relations_apart(encoder: SentenceEncoder) -> None:
    facts = [
        Fact("tongue", "Danielle Darrieux", "The mother tongue of {} is", "English"),
        Fact("sport", "Hugo Lindt", "{} plays the sport of", "chess"),
        Fact("home", "Hugo Lindt", "{} was born in", "Oslo"),
    ]
    store = FactStore(facts, encoder=lambda: encoder)
    asked = {
        "The native language of Danielle Darrieux is": "tongue",
        "Shayna went home and slept. The native language of Danielle Darrieux is": "tongue",
        "Danielle Darrieux's first language is": "tongue",
        "Danielle Darrieux is employed by": None,
        "The birthplace of Hugo Lindt is": "home",
        "What sport does Hugo Lindt play?": "sport",
        "The record label that represents Hugo Lindt is": None,
    }
    assert {query: route.fact and route.fact.id for query, route in zip(asked, store.route(list(asked)), strict=True)} == asked
    assert store.floor == FLOOR
