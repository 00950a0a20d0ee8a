"""The batched, gathered scoring equals plain full logits of each row alone."""

import pytest
import torch

from errata.evaluation import scoring
from errata.evaluation.scoring import Question, Scored, score_targets, split_by_tokens
from errata.modeling.loading import Base
from errata.modeling.tokens import encode_prompt, encode_target
from errata.modeling.trace import change_output

QUESTIONS: list[Question] = [
    ("Anna Keller lives in", "Paris"),
    ("Anna Keller lives in", "New York"),
    ("Anna Keller lives in", "French"),
    ("Anna Keller lives in", None),
    ("Where?", "French and a much longer answer than any other"),
    ("The mother tongue of Anna Keller is", None),
    ("Ł", "é"),
]


def score_plainly(base: Base, question: Question) -> Scored:
    prompt, target = question
    ids = encode_prompt(base.tokenizer, prompt)
    wanted = encode_target(base.tokenizer, target) if target is not None else []
    logprobs = base.model(torch.tensor([ids + wanted])).logits[0].log_softmax(-1)
    places = range(len(ids) - 1, len(ids) - 1 + max(len(wanted), 1))
    values = [logprobs[place, token].item() for place, token in zip(places, wanted, strict=False)]
    return Scored(tuple(wanted), tuple(values), tuple(int(logprobs[place].argmax()) for place in places))


@pytest.mark.parametrize("batch_tokens", [1, 40, 8_192])
@pytest.mark.parametrize("head_rows", [2, 256])
def test_equals_plain_full_logits(any_base: Base, monkeypatch: pytest.MonkeyPatch, batch_tokens: int, head_rows: int) -> None:
    monkeypatch.setattr(scoring, "_HEAD_ROWS", head_rows)
    found = score_targets(any_base, QUESTIONS, batch_tokens=batch_tokens)
    for question in QUESTIONS:
        plain = score_plainly(any_base, question)
        assert found[question].target == plain.target
        assert found[question].chosen == plain.chosen
        assert found[question].logprobs == pytest.approx(plain.logprobs, abs=1e-4)


def test_what_is_fed_alike_is_fed_once_and_batches_respect_the_bound(base: Base) -> None:
    sizes: list[tuple[int, int]] = []
    body = base.model.get_submodule(base.layout.body)
    handle = body.register_forward_pre_hook(lambda _m, _a, kwargs: sizes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True)
    seen: list[tuple[str, int, int]] = []
    try:
        score_targets(base, QUESTIONS * 3, batch_tokens=64, stage="s", progress=lambda *args: seen.append(args))
    finally:
        handle.remove()
    assert sum(rows for rows, _ in sizes) == len(QUESTIONS) - 2, "three questions need no more than the same prompt"
    assert all(rows == 1 or rows * length <= 64 for rows, length in sizes)
    assert len(sizes) > 1 and seen[-1] == ("s", len(QUESTIONS), len(QUESTIONS))


def test_ranges_cover_every_row_once() -> None:
    ranges = list(split_by_tokens([3, 3, 4, 9, 50, 60], 20))
    assert ranges == [range(3), range(3, 4), range(4, 5), range(5, 6)]
    assert list(split_by_tokens([], 20)) == []


def test_a_long_prompt_loses_its_beginning(base: Base) -> None:
    tail = "Anna Keller lives in"
    long = "x " * 200 + tail
    scored = score_targets(base, [(long, "Paris")], batch_tokens=8_192)[long, "Paris"]
    ids, wanted = encode_prompt(base.tokenizer, long), encode_target(base.tokenizer, "Paris")
    row = [*ids, *wanted[:-1]][-base.context :]
    logits = base.model(torch.tensor([row])).logits[0]
    assert scored.chosen == tuple(logits[-len(wanted) :].argmax(-1).tolist())


def test_values_that_are_not_finite_count_as_wrong_and_raise_nothing(base: Base) -> None:
    with change_output(base.model.get_submodule(base.layout.norm), lambda hidden: hidden * float("nan")):
        scored = score_targets(base, [("Anna", "Paris"), ("Anna", None)], batch_tokens=8_192)
    for question in scored.values():
        assert not question.finite
        assert set(question.chosen) == {-1}
    assert set(scored["Anna", "Paris"].logprobs) == {float("-inf")}
    assert scored["Anna", None].logprobs == ()
