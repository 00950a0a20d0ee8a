"""Methods of the comparison that read facts in front of questions, and what is distilled from them."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.tiny_base import PEOPLE, build_bench, build_edit, write_reader
from errata.comparison.catalogue import OTHER_RECIPES
from errata.comparison.method import SPLIT_SEED, Bench
from errata.editors.adapters import LoraAdapter
from errata.editors.memory import EditMemory
from errata.edits import Edit
from errata.errors import EditorError
from errata.evaluation.metrics import all_correct
from errata.evaluation.probes import split_probes
from errata.evaluation.scoring import score_targets
from errata.modeling.loading import Base, digest_model, load_base
from errata.modeling.patch import attach
from errata.modeling.queries import read_queries

RECIPES = {recipe.name: recipe for recipe in OTHER_RECIPES}
IN_CONTEXT = ("ike", "mike", "mike_paper")


class WordEncoder:
    """Texts are similar that have words in common."""

    name = "words"

    def encode(self, texts: Sequence[str]) -> "np.ndarray[tuple[int, ...], np.dtype[np.float32]]":
        rows = np.zeros((len(texts), 1 << 12), dtype=np.float32)
        for row, text in zip(rows, texts, strict=True):
            for word in text.split():
                row[int.from_bytes(hashlib.md5(word.encode()).digest()[:2]) % len(row)] += 1
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture(autouse=True)
def encoder(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("errata.editors.memory.open_encoder", lambda name: WordEncoder())
    monkeypatch.setattr("errata.comparison.contextual.open_encoder", lambda name: WordEncoder())
    return


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    base = load_base(write_reader(tmp_path_factory.mktemp("reader")), device="cpu")
    return build_bench(base, tmp_path_factory.mktemp("work"))


def make_batch(count: int = 4) -> list[Edit]:
    edits = []
    for person in range(count):
        paraphrases = tuple(f"{start} the home of {PEOPLE[person]}" for start in ("Now", "So", "And"))
        edits.append(build_edit(person, 0, person + 1, paraphrase_prompts=paraphrases))
    return edits


def is_said(base: Base, edits: Sequence[Edit]) -> list[bool]:
    questions = [(edit.rewrite_prompt, edit.target_new) for edit in edits]
    scored = score_targets(base, questions, batch_tokens=1_024)
    return [all_correct(scored[question].chosen, scored[question].target) for question in questions]


@pytest.mark.parametrize("name", IN_CONTEXT)
def test_facts_are_read_and_the_newer_one_of_a_slot_answers(name: str, bench: Bench) -> None:
    base, edits = bench.base, make_batch()
    method = RECIPES[name].build(bench)
    assert not list(method.build_artifacts())
    method.write(edits[:2])
    method.write(edits[2:])
    newer = build_edit(0, 0, 3)
    with attach(base, method.build_artifacts()):
        assert sum(is_said(base, edits)) >= 3, "the tiny base misreads one at most"
    method.write([newer])
    method.write([edits[1]])  # the same again
    with attach(base, method.build_artifacts()):
        assert is_said(base, [newer, edits[0], edits[1]]) == [True, False, True]
        assert all(query.routed for query in read_queries(base, [edit.rewrite_prompt for edit in edits], 4))
    assert read_queries(base, [edits[1].rewrite_prompt], 4)[0].routed is False
    assert digest_model(base.model, base.tokenizer) == base.digest
    assert method.count_bytes() > 0


@pytest.mark.parametrize(("name", "routed"), [("ike", [True, True]), ("mike", [True, False]), ("mike_paper", [True, False])])
def test_only_ike_puts_a_fact_before_whatever_is_asked(name: str, routed: list[bool], bench: Bench) -> None:
    method = RECIPES[name].build(bench)
    method.write(make_batch())
    asked = [make_batch()[1].rewrite_prompt, "The weather in Bern is"]
    with attach(bench.base, method.build_artifacts()):
        read = read_queries(bench.base, asked, 4)
    assert [query.routed for query in read] == routed
    said = bench.base.tokenizer.decode(read[0].ids)
    assert said.endswith("Prompt: The home of Hugo Lindt")
    assert "New Fact: The home of Hugo Lindt Oslo" in said


@pytest.mark.parametrize("name", IN_CONTEXT)
def test_what_is_held_out_is_in_no_memory(name: str, bench: Bench) -> None:
    edits = make_batch()
    found = []
    for _ in range(2):
        method = RECIPES[name].build(bench)
        method.write(edits)
        (memory,) = method.build_artifacts()
        assert isinstance(memory, EditMemory)
        found.append(memory.to_bytes())
    assert found[0] == found[1]
    for edit in edits:
        split = split_probes(edit, SPLIT_SEED)
        assert split.held_out.paraphrases[0].encode() not in found[0]
        assert split.training.paraphrases[0].encode() in found[0]


def test_ike_stays_with_what_is_live(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through blocks that are closed, which keep what is forgotten."""
    monkeypatch.setattr("errata.editors.memory._BLOCK", 8)
    method = RECIPES["ike"].build(bench)
    older = [build_edit(0, 0, 1, subject=f"Person{number} Keller") for number in range(20)]
    method.write(older)
    method.write([build_edit(0, 0, 2, subject="Person7 Keller")])
    (memory,) = method.build_artifacts()
    assert isinstance(memory, EditMemory)
    assert memory.gone
    (route,) = memory.route(["The home of Person7 Keller"])
    assert route.fact is not None
    assert (route.fact.subject, route.fact.target) == ("Person7 Keller", "Oslo")


class TestDistillation:
    def test_a_student_of_the_memory_lies_on_the_stream_of_weights(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("errata.comparison.distilled.MAX_STEPS", 60)
        base, edits, state, made = bench.base, make_batch(6), torch.get_rng_state(), []
        for seed in (0, 0, 1):
            method = RECIPES["distillmike"].build(Bench(**{**vars(bench), "seed": seed, "work": bench.work / f"{len(made)}"}))
            assert not list(method.build_artifacts())
            method.write(edits[:3])
            method.write(edits[3:])
            delta, adapter = method.build_artifacts()
            assert isinstance(adapter, LoraAdapter)
            assert not delta.deltas.keys() & adapter.deltas.keys()
            assert all(bool(change.any()) for change in adapter.deltas.values())
            with attach(base, [delta, adapter]):
                assert sum(is_said(base, edits)) >= 5
            made.append(adapter.to_bytes())
        assert made[0] == made[1] != made[2]
        assert torch.equal(torch.get_rng_state(), state)
        assert digest_model(base.model, base.tokenizer) == base.digest

    def test_a_base_that_does_not_read_its_context_is_told_so_in_one_line(self, editable: Base, tmp_path: Path) -> None:
        method = RECIPES["distillmike"].build(build_bench(editable, tmp_path))
        method.write(make_batch(2))
        with pytest.raises(EditorError, match="memory answers 0 of 2 edits: a base that does not read its context teaches nothing"):
            method.build_artifacts()
