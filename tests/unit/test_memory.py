"""Edits that answer from memory: what the model reads for a prompt, in one batch with others, and what is forgotten."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pytest

from errata.errors import BaseMismatchError, FormatError
from errata.retrieval.demonstrations import spell_question
from errata.retrieval.facts import Fact

if TYPE_CHECKING:
    from errata.editors.memory import EditMemory
    from errata.modeling.loading import Base

LIMITS = {"batch_tokens": 512}


class CountingEncoder:
    """A vector for each text by its letters: equal texts are equal, similar ones similar."""

    name = "letters"

    def encode(self, texts: Sequence[str]) -> "np.ndarray[tuple[int, ...], np.dtype[np.float32]]":
        rows = np.array([[1 + text.lower().count(letter) for letter in "abcdefghijklmnopqrstuvwxyz"] for text in texts], dtype=np.float32)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture(autouse=True)
def encoder(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("errata.editors.memory.open_encoder", lambda name: CountingEncoder())
    return


def make_facts(count: int, first: int = 0) -> list[Fact]:
    return [
        Fact(f"e{number}@1", f"Person{number} Keller", "The mother tongue of {} is", "Danish") for number in range(first, first + count)
    ]


def make_memory(base: str, facts: Sequence[Fact], **options: object) -> "EditMemory":
    from errata.editors.memory import EditMemory, MemoryOptions

    return EditMemory(base, MemoryOptions(**{"demonstrations": 0, "scope": "paper", **options})).update(facts, ())


def reload(memory: "EditMemory") -> "EditMemory":
    from errata.editors.memory import EditMemory

    return EditMemory.from_bytes(memory.to_bytes(), lambda digest: memory.parts[digest]())


def test_a_prompt_in_scope_is_read_behind_its_fact_and_others_as_they_are(tiny_gpt2: "Base") -> None:
    from errata.modeling.patch import attach
    from errata.modeling.queries import encode_queries

    fact = Fact("a@1", "Anna Keller", "The mother tongue of {} is", "Danish")
    prompts = ["Anna Keller speaks", "Hugo Lindt speaks"]
    bare = encode_queries(tiny_gpt2, prompts, 4)
    with attach(tiny_gpt2, [make_memory(tiny_gpt2.digest, [fact])]):
        inside, outside = encode_queries(tiny_gpt2, prompts, 4)
    text = tiny_gpt2.tokenizer.decode(inside)
    assert text.endswith("New Fact: The mother tongue of Anna Keller is Danish\nPrompt: Anna Keller speaks")
    assert outside == bare[1]
    assert encode_queries(tiny_gpt2, prompts, 4) == bare


def test_one_call_of_mixed_prompts_equals_each_alone_in_scoring_and_generation(tiny_gpt2: "Base") -> None:
    from errata.evaluation.generation import generate_answers
    from errata.evaluation.scoring import score_targets
    from errata.modeling.patch import attach

    facts = make_facts(3)
    memory = make_memory(tiny_gpt2.digest, facts, demonstrations=2)
    prompts = ["Person1 Keller speaks", "The weather is", "The mother tongue of Person2 Keller is", "Nobody speaks"]
    with attach(tiny_gpt2, [memory]):
        together = score_targets(tiny_gpt2, [(prompt, "Danish") for prompt in prompts], **LIMITS)
        written = generate_answers(tiny_gpt2, prompts, max_new_tokens=5, **LIMITS)
        for prompt, answer in zip(prompts, written, strict=True):
            question = (prompt, "Danish")
            alone = score_targets(tiny_gpt2, [question], **LIMITS)[question]
            assert together[question].logprobs == pytest.approx(alone.logprobs, abs=1e-4)
            assert generate_answers(tiny_gpt2, [prompt], max_new_tokens=5, **LIMITS) == [answer]
    # What is scored is what is generated: the first token of the answer is the argmax that scoring found.
    with attach(tiny_gpt2, [memory]):
        first = score_targets(tiny_gpt2, [(prompt, None) for prompt in prompts], **LIMITS)
        from errata.evaluation.generation import continue_prompt

        for prompt in prompts:
            assert continue_prompt(tiny_gpt2, prompt, max_new_tokens=5).ids[0] == first[prompt, None].chosen[0]


def test_a_context_that_overflows_loses_demonstrations_and_never_the_question(tiny_gpt2: "Base") -> None:
    facts = make_facts(9)
    memory = make_memory(tiny_gpt2.digest, facts, demonstrations=8)
    prompt = "Person4 Keller speaks"
    whole = tiny_gpt2.tokenizer.decode(memory.write_prompts(tiny_gpt2, [prompt], 10_000)[0] or [])
    assert whole.count("New Fact:") == 8 + 2
    for room in (90, 60, 40):
        ids = memory.write_prompts(tiny_gpt2, [prompt], room)[0]
        assert ids is not None and len(ids) <= room
        text = tiny_gpt2.tokenizer.decode(ids)
        assert text.endswith(prompt) and whole.endswith(text)
    question = tiny_gpt2.tokenizer(spell_question(facts[4], prompt)).input_ids
    assert memory.write_prompts(tiny_gpt2, [prompt], len(question))[0] == question
    assert memory.write_prompts(tiny_gpt2, [prompt], 5)[0] == question[-5:]


def test_the_nearest_demonstration_stands_last_and_the_fact_is_none_of_them(tiny_gpt2: "Base") -> None:
    from errata.editors.memory import EditMemory, MemoryOptions

    fact = Fact("own@1", "Anna Keller", "The mother tongue of {} is", "Danish")
    near = Fact("near", "Anna Kellerman", "The mother tongue of {} is", "Danish", (), ("Anna Kellerman grew up speaking",))
    far = Fact("far", "Zoe", "The zzz of {} is zz", "zzz")
    memory = EditMemory(tiny_gpt2.digest, MemoryOptions(demonstrations=2)).with_pool([near, far]).update([fact], ())
    assert [shown.id for shown in memory.choose_demonstrations(fact)] == ["far", "near"]
    text = tiny_gpt2.tokenizer.decode(memory.write_prompts(tiny_gpt2, [fact.rewrite_prompt], 10_000)[0] or [])
    assert "Prompt: Anna Kellerman grew up speaking Danish\n\nNew Fact: The mother tongue of Anna Keller is" in text
    assert [shown.id for shown in memory.update([], ["near"]).choose_demonstrations(fact)] == ["far"]


def test_it_survives_a_restart_and_forgets_at_once(tiny_gpt2: "Base") -> None:
    facts = make_facts(5)
    memory = make_memory(tiny_gpt2.digest, facts)
    again = reload(memory)
    assert again.to_bytes() == memory.to_bytes() and again.facts == memory.facts
    without = again.update([], ["e2@1", "unknown@1"])
    assert [route.case for route in without.route(["The mother tongue of Person2 Keller is", "Person1 Keller speaks"])] == [4, 2]
    assert without.update([facts[2]], ()).route([facts[2].rewrite_prompt])[0].fact == facts[2]


def test_it_grows_by_appending_and_what_is_closed_is_shared(tiny_gpt2: "Base", monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("errata.editors.memory._BLOCK", 4)
    memory = make_memory(tiny_gpt2.digest, make_facts(9))
    assert [len(block.facts) for block in memory.closed.values()] == [4, 4] and len(memory.opened.facts) == 1
    more = memory.update(make_facts(2, first=9), ["e0@1"])
    assert list(more.parts) == list(memory.parts) and more.gone == {"e0@1"}
    assert list(reload(more).facts) == [f"e{number}@1" for number in range(1, 11)]
    # Most of the closed blocks is gone: they are packed anew, and nothing of what was forgotten is left.
    few = more.update([], [f"e{number}@1" for number in range(1, 6)])
    assert few.gone == frozenset() and few.stored_ids == {f"e{number}@1" for number in range(6, 11)}
    assert list(few.facts) == [f"e{number}@1" for number in range(6, 11)] and reload(few).facts == few.facts


def test_only_one_memory_is_attached_and_only_to_its_base(tiny_gpt2: "Base", tiny_llama: "Base") -> None:
    from errata.modeling.patch import attach, require_untouched

    memory = make_memory(tiny_gpt2.digest, make_facts(1))
    with pytest.raises(BaseMismatchError), attach(tiny_llama, [memory]):
        pass
    with attach(tiny_gpt2, [memory]):
        with pytest.raises(BaseMismatchError, match="carries facts already"), attach(tiny_gpt2, [memory]):
            pass
        with pytest.raises(BaseMismatchError, match="untouched"):
            require_untouched(tiny_gpt2)
    require_untouched(tiny_gpt2)


def test_bytes_of_another_kind_are_refused(tiny_gpt2: "Base") -> None:
    from errata.editors.artifacts import WeightDelta
    from errata.editors.memory import EditMemory, FactBlock

    other = WeightDelta(tiny_gpt2.digest, {}).to_bytes()
    with pytest.raises(FormatError, match="edit_memory"):
        EditMemory.from_bytes(other, lambda digest: b"")
    with pytest.raises(FormatError, match="facts"):
        FactBlock.from_bytes(other)
