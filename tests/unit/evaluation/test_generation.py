"""Greedy answers: independent of padding and batch, cut where an answer ends, matched on word boundaries."""

import pytest
import torch

from errata.evaluation.generation import find_stop, generate_answers, match_answer
from errata.modeling.loading import Base
from errata.modeling.tokens import encode_prompt
from errata.modeling.trace import change_output

PROMPTS = ["Anna Keller lives in", "Ł", "The mother tongue of Anna Keller, who lives in Paris, is", "Paris"]


def continue_plainly(base: Base, prompt: str, count: int) -> str:
    """One prompt, no cache, no padding."""
    ids = encode_prompt(base.tokenizer, prompt)
    start = len(ids)
    for _ in range(count):
        token = int(base.model(torch.tensor([ids])).logits[0, -1].argmax())
        if token == base.tokenizer.eos_token_id:
            break
        ids.append(token)
        text = base.tokenizer.decode(ids[start:], skip_special_tokens=True)
        stop = find_stop(text)
        if stop is not None:
            return text[:stop].strip()
    return base.tokenizer.decode(ids[start:], skip_special_tokens=True).strip()


@pytest.mark.parametrize("batch_tokens", [1, 8_192])
def test_left_padding_cache_and_batch_change_nothing(any_base: Base, batch_tokens: int) -> None:
    answers = generate_answers(any_base, PROMPTS, max_new_tokens=10, batch_tokens=batch_tokens)
    assert answers == [continue_plainly(any_base, prompt, 10) for prompt in PROMPTS]
    assert len(set(answers)) > 1, "a model that answers everything alike would hide a mix-up of rows"


def speak(base: Base, text: str):  # type: ignore[no-untyped-def]
    """Make the model say `text` whatever it is asked, by adding to the logits of the token that is due."""
    script = [*base.tokenizer(text, add_special_tokens=False).input_ids, base.tokenizer.eos_token_id]
    step = iter(range(10_000))

    def change(logits: torch.Tensor) -> torch.Tensor:
        spoken = torch.zeros_like(logits)
        spoken[..., script[min(next(step), len(script) - 1)]] = 1.0
        return spoken

    return change_output(base.model.get_submodule(base.layout.head), change)


@pytest.mark.parametrize(
    ("says", "answer"),
    [
        (" Paris. The city", "Paris."),
        (" Paris\nQ: next", "Paris"),
        ("\nParis\nQ: next", "Paris"),
        (" St. Petersburg in Russia! And", "St. Petersburg in Russia!"),
        (" J. R. R. Tolkien", "J. R. R. Tolkien"),
        (" Paris", "Paris"),
        ("", ""),
    ],
)
def test_an_answer_ends_by_itself(base: Base, says: str, answer: str) -> None:
    with speak(base, says):
        assert generate_answers(base, ["Where?"], max_new_tokens=60, batch_tokens=512) == [answer]


@pytest.mark.parametrize(
    ("text", "stop"),
    [
        ("about 3.5 million", None),
        ("the U.S. Army", None),
        ("Paris.", None),
        ('He said "Paris." Then', len('He said "Paris."')),
        ("Paris?\nNo", len("Paris?")),
        ("Wait... what", len("Wait...")),
        ("one\ntwo. three", len("one")),
        ("\n\nParis", None),
    ],
)
def test_find_stop(text: str, stop: int | None) -> None:
    assert find_stop(text) == stop


@pytest.mark.parametrize(
    ("answer", "accepted", "right"),
    [
        ("Paris, France", ["Paris"], True),
        ("  paris.", ["Paris"], True),
        ("Parisian cafés", ["Paris"], False),
        ("New   York City", ["New York"], True),
        ("in Paris", ["Paris"], False),
        ("“Paris” is it", ["Paris"], True),
        ("Zoe\u0301 Keller", ["Zo\u00e9"], True),
        ("Rome", ["Paris", "Rome"], True),
        ("Rome", [], False),
        ("Rome", [""], False),
        ("", ["Rome"], False),
    ],
)
def test_match_answer(answer: str, accepted: list[str], right: bool) -> None:
    assert match_answer(answer, accepted) is right


def test_a_prompt_longer_than_the_context_still_gets_an_answer(base: Base) -> None:
    (answer,) = generate_answers(base, ["x " * 300], max_new_tokens=5, batch_tokens=64)
    assert isinstance(answer, str)
