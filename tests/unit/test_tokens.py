"""Prompts, targets and the subject's last token, over the kinds of tokenizer that matter."""

from collections.abc import Callable

import pytest
from transformers import PreTrainedTokenizerBase

from errata.editors.rows import build_rows
from errata.edits import Edit
from errata.errors import TokenizationError
from errata.modeling.loading import Base
from errata.modeling.tokens import encode_prompt, encode_target, find_ends, find_pad, locate_subject, pad_rows

KINDS = {
    "gpt2": {},
    "gpt2 with prefix space": {"prefix_space": True},
    "gpt2 with bos": {"bos": True},
    "gpt2 with both": {"prefix_space": True, "bos": True},
}


@pytest.fixture(params=[*KINDS, "llama"])
def tokenizer(request: pytest.FixtureRequest, byte_tokenizer: Callable[..., PreTrainedTokenizerBase]) -> PreTrainedTokenizerBase:
    if request.param == "llama":
        base: Base = request.getfixturevalue("stories")
        return base.tokenizer
    return byte_tokenizer(**KINDS[request.param])


PROMPTS = ("The mother tongue of Anna Keller is", "Zoë Łukasz was born in", "東京 lies in", "Is it Malmö, or")
TARGETS = ("Paris", "New York", "東京", "Århus", "x")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_target_continues_its_prompt_as_running_text_would(tokenizer: PreTrainedTokenizerBase, prompt: str, target: str) -> None:
    """The leading-space rule: prompt ids and target ids side by side are the ids of the whole sentence."""
    together = encode_prompt(tokenizer, prompt) + encode_target(tokenizer, target)
    assert together == encode_prompt(tokenizer, f"{prompt} {target}")
    assert encode_target(tokenizer, f"  {target} ") == encode_target(tokenizer, target)


def test_targets_hold_no_special_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    assert not set(encode_target(tokenizer, "Paris")) & set(tokenizer.all_special_ids)


@pytest.mark.parametrize("target", ["", "  "])
def test_an_empty_target_is_refused(tokenizer: PreTrainedTokenizerBase, target: str) -> None:
    with pytest.raises(TokenizationError):
        encode_target(tokenizer, target)


def test_a_target_the_vocabulary_cannot_write_is_refused() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2, "Paris": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    assert encode_target(tokenizer, "Paris") == [3]
    with pytest.raises(TokenizationError, match="cannot write 'Rome'"):
        encode_target(tokenizer, "Rome")


@pytest.mark.parametrize(
    ("text", "subject", "nth"),
    [
        ("The mother tongue of Anna Keller is", "Anna Keller", 0),
        ("Anna Keller", "Anna Keller", 0),
        ("Anna met Anna in the city", "Anna", 0),
        ("Anna met Anna in the city", "Anna", 1),
        ("They call her Zoë Łukasz", "Zoë Łukasz", 0),
        ("東京, the city", "東京", 0),
        ("The team of 👩‍🚀's friends", "👩‍🚀", 0),
        ('Is "Malmö" far?', "Malmö", 0),
    ],
)
def test_the_site_is_the_token_with_the_subjects_last_character(
    tokenizer: PreTrainedTokenizerBase, text: str, subject: str, nth: int
) -> None:
    start = text.index(subject)
    for _ in range(nth):
        start = text.index(subject, start + 1)
    ids, site = locate_subject(tokenizer, text, start, start + len(subject))
    assert ids == encode_prompt(tokenizer, text)
    # Up to the site the text decodes to everything through the subject, and without the site it does not.
    assert tokenizer.decode(ids[: site + 1], skip_special_tokens=True).strip() == text[: start + len(subject)]
    assert subject not in tokenizer.decode(ids[:site], skip_special_tokens=True).strip()[start:]


def test_a_token_that_reaches_beyond_the_subject_still_holds_its_end(byte_tokenizer: Callable[..., PreTrainedTokenizerBase]) -> None:
    tokenizer = byte_tokenizer()
    ids, site = locate_subject(tokenizer, "in Stockholm", 3, 8)
    assert tokenizer.decode(ids[: site + 1]).strip().startswith("in Stock")


def test_a_subject_outside_the_text_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(TokenizationError, match="no token covers"):
        locate_subject(tokenizer, "Anna", 10, 14)


def test_rows_place_subject_and_target_in_every_context(tokenizer: PreTrainedTokenizerBase) -> None:
    contexts = ("{}", "The weather is fine today. {}")
    edit = Edit(subject="Anna", prompt="They say that Anna is not {} but", target_new="New York")
    rows = build_rows(tokenizer, edit, contexts, 200)
    assert rows.target == encode_target(tokenizer, "New York")
    assert len(rows.contexts) == 2
    for row, context in zip(rows.contexts, contexts, strict=True):
        prompt = context.replace("{}", "They say that Anna is not Anna but")
        assert row.ids == encode_prompt(tokenizer, prompt) + rows.target[:-1]
        assert tokenizer.decode(row.ids[: row.site + 1], skip_special_tokens=True).strip() == prompt.removesuffix(" but")
        # Each predicting position is followed by its target token.
        assert [*row.ids, rows.target[-1]][row.predicts[0] + 1 :] == rows.target
        assert row.predicts == list(range(row.predicts[0], row.predicts[0] + len(rows.target)))
    assert rows.essence == encode_prompt(tokenizer, "Anna")
    with pytest.raises(TokenizationError, match="within 10 tokens"):
        build_rows(tokenizer, edit, contexts, 10)


def test_slow_tokenizers_are_refused(byte_tokenizer: Callable[..., PreTrainedTokenizerBase], monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_tokenizer()
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    with pytest.raises(TokenizationError, match="expected a fast tokenizer"):
        locate_subject(tokenizer, "Anna", 0, 4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(side: str) -> None:
    ids, mask = pad_rows([[5, 6, 7], [8]], 0, side)
    assert ids.tolist() == ([[5, 6, 7], [8, 0, 0]] if side == "right" else [[5, 6, 7], [0, 0, 8]])
    assert mask.tolist() == ([[1, 1, 1], [1, 0, 0]] if side == "right" else [[1, 1, 1], [0, 0, 1]])


def test_the_pad_token_exists(tokenizer: PreTrainedTokenizerBase) -> None:
    assert 0 <= find_pad(tokenizer) < len(tokenizer)


@pytest.mark.parametrize(("more", "ends"), [(None, []), (7, [7]), ([7, 9], [7, 9])])
def test_texts_end_where_tokenizer_or_model_say(gpt2_of: Callable[..., Base], more: int | list[int] | None, ends: list[int]) -> None:
    base = gpt2_of()
    base.model.generation_config.eos_token_id = more
    assert find_ends(base.tokenizer, base.model) == {base.tokenizer.eos_token_id, *ends}
    base.tokenizer.eos_token = None
    assert find_ends(base.tokenizer, base.model) == set(ends)
