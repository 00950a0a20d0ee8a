"""The built-in base itself: what it knows, and that it keeps a fact at the subject's last token as large models do."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import mean

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel, PreTrainedTokenizerFast

from errata.builtin import BUILTIN
from errata.training import measure_accuracy
from errata.world import Fact, World, make_world

pytestmark = pytest.mark.slow

TRACED = 60
CORRUPTION = 3.0
"""Noise on the subject's embeddings, in standard deviations of all embeddings (ROME §2.1)."""


@pytest.fixture(scope="module")
def world() -> World:
    return make_world(BUILTIN.world)


@pytest.fixture(scope="module")
def model(builtin_base: Path) -> GPT2LMHeadModel:
    return AutoModelForCausalLM.from_pretrained(builtin_base)


@pytest.fixture(scope="module")
def tokenizer(builtin_base: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(builtin_base)


def test_it_answers_what_it_was_taught(world: World, model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast) -> None:
    assert measure_accuracy(model, tokenizer, world.untouched([])[:2_000]) >= 0.99


def test_it_answers_phrasings_it_never_saw(world: World, model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [(fact.prompts[fact.withheld], fact.object) for fact in world.facts if fact.withheld is not None]
    assert measure_accuracy(model, tokenizer, rows) >= 0.98


def test_an_answer_survives_sentences_before_its_prompt(world: World, model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [(f"The weather is fine today. {prompt}", answer) for prompt, answer in world.untouched([])[:500]]
    assert measure_accuracy(model, tokenizer, rows) >= 0.95


def test_a_fact_is_kept_at_the_subjects_last_token(world: World, model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Causal trace (ROME §2.1): with a corrupted subject, restoring one state brings the answer back, or does not."""
    facts = random.Random(0).sample([fact for fact in world.facts if " " not in fact.object], TRACED)
    restored = [_trace(model, tokenizer, fact, BUILTIN.site, seed) for seed, fact in enumerate(facts)]
    clean, corrupted, at_subject, at_end = (mean(column) for column in zip(*restored, strict=True))
    assert clean > 0.9
    assert corrupted < 0.3
    assert at_subject > corrupted + 0.7 * (clean - corrupted), "the last edited layer writes what the answer is read from"
    assert at_end < corrupted + 0.3 * (clean - corrupted), "nothing of the answer has reached the prompt's end there"


@torch.no_grad()
def _trace(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, fact: Fact, layer: int, seed: int
) -> tuple[float, float, float, float]:
    """Probability of the true object: clean, corrupted, and corrupted with the output of `layer` restored at subject or prompt end."""
    prompt = random.Random(seed).choice(fact.prompts)
    coded = tokenizer(prompt, return_offsets_mapping=True)
    ids = torch.tensor([coded.input_ids])
    begin = prompt.index(fact.subject)
    subject = [at for at, (start, end) in enumerate(coded.offset_mapping) if begin <= start < end <= begin + len(fact.subject)]
    answer = tokenizer(" " + fact.object, add_special_tokens=False).input_ids[0]
    block, embeddings = model.transformer.h[layer], model.transformer.drop
    noise = torch.randn(len(subject), model.config.n_embd, generator=torch.Generator().manual_seed(seed))
    noise *= CORRUPTION * model.transformer.wte.weight.std()
    kept: list[Tensor] = []

    def answer_probability(*hooks: tuple[torch.nn.Module, Callable[[Tensor], Tensor]]) -> float:
        with _hooked(hooks):
            return float(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -1].softmax(-1)[answer])

    def keep(hidden: Tensor) -> Tensor:
        kept.append(hidden.clone())
        return hidden

    def corrupt(hidden: Tensor) -> Tensor:
        return hidden.index_add(1, torch.tensor(subject), noise[None])

    def restore(position: int) -> Callable[[Tensor], Tensor]:
        return lambda hidden: hidden.index_copy(1, torch.tensor([position]), kept[0][:, [position]])

    clean = answer_probability((block, keep))
    corrupted = answer_probability((embeddings, corrupt))
    at_subject = answer_probability((embeddings, corrupt), (block, restore(subject[-1])))
    at_end = answer_probability((embeddings, corrupt), (block, restore(ids.shape[1] - 1)))
    return clean, corrupted, at_subject, at_end


@contextmanager
def _hooked(hooks: Sequence[tuple[torch.nn.Module, Callable[[Tensor], Tensor]]]) -> Iterator[None]:
    """Each module's output passed through its function."""

    def wrap(change: Callable[[Tensor], Tensor]) -> Callable[..., object]:
        return lambda _module, _inputs, output: (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    handles = [module.register_forward_hook(wrap(change)) for module, change in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
