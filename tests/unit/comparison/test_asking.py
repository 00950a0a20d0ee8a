"""What is asked of a model, and how it is counted, against the plain count by hand."""

import math

import pytest
import torch

from benchmarks.tiny_base import PEOPLE, build_edit
from errata.comparison.asking import Sheet
from errata.comparison.cells import Scope
from errata.comparison.material import Material
from errata.editors.artifacts import WeightDelta
from errata.edits import Edit, Probe
from errata.errors import EditorError
from errata.evaluation.fluency import measure_entropy, sample_texts
from errata.evaluation.metrics import all_correct
from errata.evaluation.scoring import score_targets
from errata.modeling.loading import Base
from errata.modeling.patch import attach
from errata.readers.abilities import AbilityQuestion

EDITS = tuple(
    build_edit(
        person,
        answer=person,
        target_true="Bern" if person % 4 != 3 else "Rome",
        paraphrase_prompts=(f"Where {PEOPLE[person]}", f"Now {PEOPLE[person]}"),
        neighborhood_prompts=(Probe(prompt=f"The home of {PEOPLE[person + 8]}", answers=("Bern",)), Probe(prompt="The sport of all")),
    )
    for person in range(6)
)


@pytest.fixture(scope="module")
def base(small_base: Base) -> Base:
    return small_base


def make_material(edits: tuple[Edit, ...] = EDITS) -> Material:
    return Material(source="test", edits=edits, pool=(), texts=("It rains in Bern.",), questions=())


def make_scope(**fields: int) -> Scope:
    return Scope(**{"base": "", "profile": "", "neurons": "", "edits": len(EDITS), "judged": 10, "said": 3, **fields})


def shift_weight(base: Base, size: float) -> WeightDelta:
    name = base.layout.weight_name(1)
    d_in, d_out = base.model.get_parameter(name).shape
    change = torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(0))
    return WeightDelta(base.digest, {name: size * change})


def share(base: Base, rows: list[tuple[str, str]]) -> float:
    scored = score_targets(base, rows, batch_tokens=512)
    return sum(all_correct(scored[row].chosen, scored[row].target) for row in rows) / len(rows)


def test_values_are_the_plain_counts(base: Base) -> None:
    delta = shift_weight(base, 0.3)
    point, rows = Sheet(base, make_material(), make_scope(), 0, 512).ask([delta], len(EDITS))
    with attach(base, [delta]):
        efficacy = share(base, [(edit.rewrite_prompt, edit.target_new) for edit in EDITS])
        own = score_targets(
            base, [(edit.rewrite_prompt, target) for edit in EDITS for target in ("Bern", "Rome", edit.target_new)], batch_tokens=512
        )
    assert point.values["efficacy"] == pytest.approx(efficacy)
    wins = [
        sum(own[edit.rewrite_prompt, edit.target_new].logprobs) / len(own[edit.rewrite_prompt, edit.target_new].logprobs)
        > sum(own[edit.rewrite_prompt, str(edit.target_true)].logprobs) / len(own[edit.rewrite_prompt, str(edit.target_true)].logprobs)
        for edit in EDITS
    ]
    assert point.values["es"] == pytest.approx(sum(wins) / len(wins))
    assert {row.edit for row in rows} == {edit.edit_id for edit in EDITS}
    assert point.values["norm_ratio"] > 1
    assert point.values["kl"] > 0


def test_the_base_agrees_with_itself(base: Base) -> None:
    point, _ = Sheet(base, make_material(), make_scope(), 0, 512).ask([], len(EDITS))
    assert point.values["specificity"] == 1
    assert point.values["norm_ratio"] == 1
    assert point.values["perplexity_ratio"] == 1
    assert point.values["kl"] == 0
    assert point.values["ability"] is None, "no questions were given"
    assert point.values["portability"] is None


def test_only_the_last_edit_of_a_slot_is_live_and_ages_count_what_came_after(base: Base) -> None:
    again = build_edit(0, answer=2)
    stream = (*EDITS, again)
    point, rows = Sheet(base, make_material(stream), make_scope(), 0, 512).ask([], len(stream))
    assert point.live == len(EDITS)
    assert EDITS[0].edit_id not in {row.edit for row in rows}
    assert {row.position for row in rows if row.edit == again.edit_id} == {len(EDITS)}
    early, _ = Sheet(base, make_material(stream), make_scope(), 0, 512).ask([], 3)
    assert (early.edits, early.live) == (3, 3)
    assert set(early.ages) == {"0-9"}


def test_a_sample_is_asked_the_same_of_every_method(base: Base) -> None:
    sheet = Sheet(base, make_material(), make_scope(judged=2, said=1), 0, 512)
    plain, changed = (sheet.ask(items, len(EDITS))[1] for items in ([], [shift_weight(base, 0.1)]))
    asked = [{row.edit for row in rows if row.specificity is not None} for rows in (plain, changed)]
    assert asked[0] == asked[1] and len(asked[0]) == 2
    assert sum(row.said is not None for row in plain) == 1


def test_questions_about_others_are_an_ability(base: Base) -> None:
    material = make_material().model_copy(
        update={"questions": (AbilityQuestion(question="The home of Bo Lind", choices=("Paris", "Oslo"), answer=0),)}
    )
    values = Sheet(base, material, make_scope(), 0, 512).ask([], 1)[0].values
    scored = score_targets(base, [("The home of Bo Lind", name) for name in ("Paris", "Oslo")], batch_tokens=512)
    losses = [-sum(item.logprobs) / len(item.logprobs) for item in scored.values()]
    assert values["ability"] == float(losses[0] < losses[1])


def test_a_model_that_says_nothing_finite_is_destroyed(base: Base) -> None:
    name = base.layout.weight_name(1)
    d_in, d_out = base.model.get_parameter(name).shape
    huge = WeightDelta(base.digest, {name: torch.full((d_out, d_in), 3e38)})
    with pytest.raises(EditorError, match="destroyed|not finite"):
        Sheet(base, make_material(), make_scope(), 0, 512).ask([huge], len(EDITS))


def test_entropy_is_the_weighted_mean_over_bigrams_and_trigrams() -> None:
    assert measure_entropy("a b") is None
    assert measure_entropy("a a a a a") == 0
    text = "a b c d e"  # four different bigrams, three different trigrams
    assert measure_entropy(text) == pytest.approx((2 / 3 * math.log2(4) + 4 / 3 * math.log2(3)) / 2)


def test_texts_are_drawn_with_a_seed_and_row_by_row(base: Base) -> None:
    prompts = [edit.rewrite_prompt for edit in EDITS[:3]]
    both = [sample_texts(base, prompts, tokens=8, seed=1, batch_tokens=tokens) for tokens in (512, 512)]
    assert both[0] == both[1]
    assert sample_texts(base, prompts, tokens=8, seed=2, batch_tokens=512) != both[0]
    assert all(both[0])
