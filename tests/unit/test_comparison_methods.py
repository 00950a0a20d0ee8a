"""Methods of the comparison that change weights, or stand beside them: an edit takes, and the base stays what it was."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from benchmarks.tiny_base import build_bench, build_edit
from errata.comparison.catalogue import OTHER_RECIPES
from errata.comparison.codebook import CodeBook, Grace
from errata.comparison.method import Bench, Method, Recipe
from errata.comparison.streams import OWN_RECIPES, EditorStream
from errata.comparison.tuned import FineTuning
from errata.editors.artifacts import WeightDelta
from errata.edits import Edit
from errata.evaluation.generation import continue_prompt, generate_answers
from errata.evaluation.metrics import all_correct
from errata.evaluation.scoring import score_rows, score_targets
from errata.modeling.loading import Base, digest_model
from errata.modeling.patch import Attachable, attach
from errata.modeling.tokens import encode_prompt, encode_target

RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in (*OWN_RECIPES, *OTHER_RECIPES)}
HERE = ("d4s", "d4s_code", "ireva", "ireva_retrofit", "ft", "lora", "grace")
DRAWN = ("lora", "grace")
"""Those that draw something at random."""

Start = Callable[..., Method]


@pytest.fixture(scope="module")
def bench(editable: Base, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return build_bench(editable, tmp_path_factory.mktemp("work"))


@pytest.fixture
def start(bench: Bench) -> Start:
    def start(name: str, seed: int = 0) -> Method:
        return RECIPES[name].build(Bench(**{**vars(bench), "seed": seed}))

    return start


def make_batch(count: int = 4) -> list[Edit]:
    return [build_edit(person, 0, person + 1) for person in range(count)]


def is_said(base: Base, edits: Sequence[Edit]) -> list[bool]:
    questions = [(edit.rewrite_prompt, edit.target_new) for edit in edits]
    scored = score_targets(base, questions, batch_tokens=1_024)
    return [all_correct(scored[question].chosen, scored[question].target) for question in questions]


def is_answered(base: Base, method: Method, edits: Sequence[Edit]) -> list[bool]:
    with attach(base, method.build_artifacts()):
        return is_said(base, edits)


def list_tensors(artifacts: Sequence[Attachable]) -> list[torch.Tensor]:
    """All that artifacts hold."""
    found: list[torch.Tensor] = []
    for artifact in artifacts:
        if isinstance(artifact, CodeBook):
            found += [artifact.keys, artifact.values, artifact.radii]
        else:
            found += getattr(artifact, "written").values()  # noqa: B009  not of every Attachable
    return found


@torch.inference_mode()
def read_logits(base: Base, text: str) -> torch.Tensor:
    logits: torch.Tensor = base.model(input_ids=torch.tensor([encode_prompt(base.tokenizer, text)])).logits
    return logits


def test_names_and_their_order_are_those_of_the_command() -> None:
    assert [recipe.name for recipe in OWN_RECIPES] == ["d4s", "d4s_code", "ireva", "ireva_retrofit"]
    assert [recipe.name for recipe in OTHER_RECIPES] == ["ft", "lora", "grace", "ike", "mike", "mike_paper", "distillmike"]
    assert all(recipe.source and recipe.differs for recipe in RECIPES.values())
    assert [recipe.name for recipe in RECIPES.values() if recipe.final_only] == ["distillmike"]


@pytest.mark.parametrize("name", HERE)
def test_an_edit_takes_and_the_base_is_to_the_bit_what_it_was(name: str, start: Start, editable: Base) -> None:
    # FT's ball holds no more than one edit of so small a model.
    edits, state = make_batch(1 if name == "ft" else 4), torch.get_rng_state()
    before = read_logits(editable, "The home of Zoe Berg")
    assert not all(is_said(editable, edits))
    method = start(name)
    assert not list(method.build_artifacts())
    assert method.count_bytes() >= 0
    method.write(edits)
    assert all(is_answered(editable, method, edits))
    assert method.count_bytes() > 0
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(read_logits(editable, "The home of Zoe Berg"), before)
    assert digest_model(editable.model, editable.tokenizer) == editable.digest


@pytest.mark.parametrize("name", HERE)
def test_equal_seeds_give_equal_artifacts(name: str, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("errata.comparison.tuned.LORA_STEPS", 5)
    monkeypatch.setattr("errata.comparison.codebook.STEPS", 5)
    edits = make_batch()
    found = []
    for seed in (0, 0, 1):
        method = start(name, seed)
        method.write(edits[:2])
        method.write(edits[2:])
        found.append(list_tensors(method.build_artifacts()))
    assert all(torch.equal(one, other) for one, other in zip(found[0], found[1], strict=True))
    assert any(not torch.equal(one, other) for one, other in zip(found[0], found[2], strict=True)) == (name in DRAWN)


@pytest.mark.parametrize("name", HERE)
def test_of_a_slot_the_newer_edit_answers(name: str, start: Start, editable: Base) -> None:
    older, newer = build_edit(0, 0, 1), build_edit(0, 0, 2)
    method = start(name)
    method.write([older, build_edit(1, 0, 3)])
    assert is_answered(editable, method, [older]) == [True]
    method.write([newer])
    assert is_answered(editable, method, [older, newer]) == [False, True]


@pytest.mark.parametrize("name", HERE)
def test_what_cannot_be_read_is_left_out_and_the_others_go_on(name: str, start: Start, editable: Base) -> None:
    older, other = build_edit(0, 0, 1), build_edit(1, 0, 2)
    # Of the older one's slot, so that what is there stays.
    long = older.model_copy(update={"target_new": "Rome " * 80, "id": "long"})
    method = start(name)
    method.write([older])
    method.write([long, other])
    assert list(method.refused) == ["long"]
    assert is_answered(editable, method, [other]) == [True]
    if name not in ("ft", "lora"):  # which forget
        assert is_answered(editable, method, [older]) == [True]


@pytest.mark.parametrize("name", ["d4s", "ireva"])
def test_a_replaced_edit_leaves_what_would_be_there_without_it(name: str, start: Start, bench: Bench) -> None:
    edits, older = make_batch(3), build_edit(0, 0, 3)
    plain, replaced = start(name), start(name)
    plain.write(edits)
    replaced.write([older, edits[1]])
    replaced.write([edits[0], edits[2]])
    for one, other in zip(*(list_tensors(method.build_artifacts()) for method in (plain, replaced)), strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "pairs"), [("d4s", 1), ("d4s_code", 3)])
def test_edits_of_one_subject_share_a_pair_but_as_published(name: str, pairs: int, start: Start, editable: Base) -> None:
    method = start(name)
    edits = [build_edit(0, relation, relation + 1) for relation in range(3)]
    # The tiny base's prompts end in their subject: the same last words, yet keys of their own, so that only equal ones are put together.
    same = [edit.model_copy(update={"prompt": "{}", "relation_id": str(number), "id": str(number)}) for number, edit in enumerate(edits)]
    method.write(same[:1])
    method.write(same[1:])
    assert isinstance(method, EditorStream)
    assert method._state.count == pairs
    assert [edit.edit_id for edit in method.live] == ["0", "1", "2"]


class TestFineTuning:
    def test_the_ball_around_the_base_holds_through_any_number_of_batches(self, start: Start, editable: Base) -> None:
        method = start("ft")
        assert isinstance(method, FineTuning)
        for edit in make_batch(6):
            method.write([edit])
        (delta,) = method.build_artifacts()
        assert isinstance(delta, WeightDelta)
        (change,) = delta.deltas.values()
        reached = float(change.abs().max())
        assert reached <= method.radius * (1 + 1e-4)
        assert reached > method.radius / 2
        assert next(iter(delta.deltas)) == editable.layout.weight_name(1)

    def test_the_radius_follows_the_scale_of_the_weight_and_not_its_width(self, gpt2_of: Callable[..., Base]) -> None:
        from errata.comparison.tuned import FT_RADIUS, find_radius

        base = gpt2_of(seed=3)
        weight = base.layout.read_weight(base.model, 1)
        key = torch.randn(weight.shape[1], generator=torch.Generator().manual_seed(0))
        corner = find_radius(base, 1) * float(key.abs().sum())
        assert corner == pytest.approx(FT_RADIUS * float((weight @ key).abs().mean()), rel=0.5)


class TestLora:
    def test_a_batch_goes_on_from_the_one_before(self, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("errata.comparison.tuned.LORA_STEPS", 10)
        first, second = make_batch(2)
        both, alone = start("lora"), start("lora")
        both.write([first])
        both.write([second])
        alone.write([second])
        found = [list_tensors(method.build_artifacts()) for method in (both, alone)]
        assert not any(torch.allclose(one, other, atol=1e-3) for one, other in zip(*found, strict=True))


class TestGrace:
    @pytest.fixture
    def grace(self, start: Start) -> Grace:
        method = start("grace")
        assert isinstance(method, Grace)
        return method

    def place(self, grace: Grace, slot: str, at: float, label: Sequence[int]) -> None:
        key = torch.zeros(192)
        key[0] = at
        grace._place(slot, key, tuple(label))

    def test_other_prompts_are_answered_exactly_as_by_the_base(self, grace: Grace, editable: Base) -> None:
        texts = [f"The {what} of {who}" for what in ("home", "sport") for who in ("Eva Horn", "Max Thorn", "Nora Sand")]
        before = [read_logits(editable, text) for text in texts]
        grace.write(make_batch())
        with attach(editable, grace.build_artifacts()):
            after = [read_logits(editable, text) for text in texts]
            changed = read_logits(editable, make_batch()[0].rewrite_prompt)
        assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
        assert not torch.equal(changed, read_logits(editable, make_batch()[0].rewrite_prompt))

    def test_keys_apart_have_the_first_radius(self, grace: Grace) -> None:
        radius = grace._radius
        for number in range(3):
            self.place(grace, str(number), 3 * radius * number, [number])
        assert [code.radius for code in grace.codes] == [radius] * 3

    def test_another_label_nearby_halves_the_room(self, grace: Grace) -> None:
        radius = grace._radius
        self.place(grace, "a", 0.0, [1])
        self.place(grace, "b", radius, [2])
        assert [code.radius for code in grace.codes] == pytest.approx([radius / 2, radius / 2])
        self.place(grace, "c", radius * 1.9, [3])  # near b, whose room it does not widen
        assert [code.radius for code in grace.codes] == pytest.approx([radius / 2, radius * 0.45, radius * 0.45])

    def test_the_same_label_nearby_widens_the_code(self, grace: Grace) -> None:
        radius = grace._radius
        self.place(grace, "a", 0.0, [1, 2])
        self.place(grace, "b", radius * 1.5, [1, 2])
        (code,) = grace.codes
        assert code.radius == pytest.approx(radius * 1.5)
        assert code.slots == {"a", "b"}
        self.place(grace, "a", 90 * radius, [4])  # the other edit is still answered
        assert [code.slots for code in grace.codes] == [{"b"}, {"a"}]

    def test_labels_of_one_mean_are_not_the_same(self, grace: Grace) -> None:
        """The published code compares the mean of the ids."""
        self.place(grace, "a", 0.0, [1, 3])
        self.place(grace, "b", grace._radius / 2, [2, 2])
        assert [code.label for code in grace.codes] == [(1, 3), (2, 2)]

    def test_a_slot_that_is_edited_again_has_one_code(self, grace: Grace, editable: Base) -> None:
        for answer in range(4):
            grace.write([build_edit(0, 0, answer)])
            assert len(grace.codes) == 1
            assert grace.codes[0].radius == grace._radius

    def test_what_is_decoded_is_what_is_forced(self, grace: Grace, editable: Base) -> None:
        """The value stands at the last token of the prompt, and reaches what follows through the blocks above."""
        edits = [build_edit(0, 0, 0, target_new="chess golf"), *make_batch(3)[1:]]
        assert len(encode_target(editable.tokenizer, "chess golf")) == 2
        grace.write(edits)
        prompts = [edit.rewrite_prompt for edit in edits]
        plain = [continue_prompt(editable, prompt, max_new_tokens=8).ids for prompt in prompts]
        with attach(editable, grace.build_artifacts()):
            assert is_said(editable, edits) == [True] * 3
            decoded = [continue_prompt(editable, prompt, max_new_tokens=8) for prompt in prompts]
            forced = score_rows(editable, [((*one.prompt, *one.ids[:-1]), tuple(one.ids)) for one in decoded])
            together = generate_answers(editable, prompts, max_new_tokens=8, batch_tokens=1_024)
        assert [list(scored.chosen) for scored in forced] == [one.ids for one in decoded]
        assert together == [one.answer for one in decoded]
        assert together[0].startswith("chess golf")
        assert all(one.ids != before for one, before in zip(decoded, plain, strict=True))

    def test_a_pool_without_prompts_is_refused_in_one_line(self, bench: Bench) -> None:
        from errata.errors import EditorError

        with pytest.raises(EditorError, match="expected at least two prompts of the pool"):
            RECIPES["grace"].build(Bench(**{**vars(bench), "pool": ()}))


def test_methods_take_a_model_of_another_family(tiny_llama: Base, tmp_path: Path) -> None:
    """Rotary positions, a gated MLP, weights that are not transposed."""
    bench = build_bench(tiny_llama, tmp_path)
    edit = make_batch(1)[0]
    question = (edit.rewrite_prompt, edit.target_new)
    before = score_targets(tiny_llama, [question], batch_tokens=1_024)[question]
    for name in ("ft", "lora", "grace"):
        method = RECIPES[name].build(bench)
        method.write([edit])
        with attach(tiny_llama, method.build_artifacts()):
            after = score_targets(tiny_llama, [question], batch_tokens=1_024)[question]
        assert sum(after.logprobs) > sum(before.logprobs) + 2, name
    assert digest_model(tiny_llama.model, tiny_llama.tokenizer) == tiny_llama.digest
