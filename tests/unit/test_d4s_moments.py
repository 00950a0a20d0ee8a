"""Second moments are the plain mean of outer products over every real token, by a recipe that can be repeated."""

import pytest
import torch

from errata.editors.d4s.moments import collect_moments
from errata.errors import EditorError
from errata.modeling.loading import Base
from errata.modeling.tokens import encode_prompt
from errata.modeling.trace import trace_inputs

TEXTS = ["The mother tongue of Anna Keller is French.", "I do not know.", "Zoë", "Because of the rain they stayed. " * 8]


@pytest.fixture(params=["tiny_gpt2", "tiny_llama"])
def base(request: pytest.FixtureRequest) -> Base:
    return request.getfixturevalue(request.param)


@torch.no_grad()
def test_they_are_the_mean_over_real_tokens(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text by text, without padding and without stopping early."""
    keys: dict[int, list[torch.Tensor]] = {0: [], 2: []}
    for text in TEXTS:
        modules = {layer: base.layout.projection_of(base.model, layer) for layer in keys}
        with trace_inputs(modules, lambda inputs: inputs[0].double()) as found:
            base.model(input_ids=torch.tensor([encode_prompt(base.tokenizer, text)[: base.context]]))
        for layer, inputs in found.items():
            keys[layer].append(inputs)
    monkeypatch.setattr("errata.editors.d4s.moments.BATCH_TOKENS", 60)
    moments = collect_moments(base, [0, 2], TEXTS)
    for layer, parts in keys.items():
        every = torch.cat(parts)
        assert moments.tokens == len(every)
        assert torch.allclose(moments.c[layer].double(), every.T @ every / len(every), rtol=1e-4, atol=1e-6)
        assert moments.c[layer].dtype == torch.float32


def test_equal_recipes_are_equal_bytes_and_others_are_not(tiny_gpt2: Base) -> None:
    first = collect_moments(tiny_gpt2, [1], TEXTS, seed=1)
    assert collect_moments(tiny_gpt2, [1], list(TEXTS), seed=1).to_bytes() == first.to_bytes()
    other = collect_moments(tiny_gpt2, [1], TEXTS[:2], seed=1)
    assert (other.corpus, other.tokens) != (first.corpus, first.tokens)
    assert (first.base, first.seed) == (tiny_gpt2.digest, 1)


def test_counting_stops_at_the_limit(tiny_gpt2: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("errata.editors.d4s.moments.BATCH_TOKENS", 30)
    seen: list[tuple[int, int]] = []
    whole = collect_moments(tiny_gpt2, [1], TEXTS * 5)
    part = collect_moments(tiny_gpt2, [1], TEXTS * 5, max_tokens=40, on_progress=lambda done, total: seen.append((done, total)))
    assert 40 <= part.tokens < whole.tokens
    assert seen[-1] == (40, 40)


@pytest.mark.parametrize("texts", [[], ["", ""]])
def test_a_corpus_without_tokens_is_refused(tiny_gpt2: Base, texts: list[str]) -> None:
    with pytest.raises(EditorError, match="found no tokens"):
        collect_moments(tiny_gpt2, [1], texts)
