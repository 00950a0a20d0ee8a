"""Random tiny models with a byte-level vocabulary: they know nothing, which is enough for equalities and bookkeeping."""

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from errata.edits import Edit, Probe
from errata.modeling.loading import Base, hold_base


def make_base(family: str) -> Base:
    """Big initial weights, so that predictions differ clearly between positions and prompts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        ["Anna Keller lives in Paris and speaks French."],
        trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet),
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    size = {"vocab_size": len(fast), "initializer_range": 0.3, "bos_token_id": 0, "eos_token_id": 0}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return hold_base(_make_model(family, size), fast)


def _make_model(family: str, size: dict[str, Any]) -> PreTrainedModel:
    if family == "gpt2":
        return GPT2LMHeadModel(GPT2Config(n_positions=128, n_embd=32, n_layer=2, n_head=2, **size))
    config = LlamaConfig(
        max_position_embeddings=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, **size
    )
    return LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def base() -> Base:
    return make_base("gpt2")


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def any_base(request: pytest.FixtureRequest) -> Base:
    return make_base(request.param)


@pytest.fixture
def edits() -> list[Edit]:
    def edit(subject: str, new: str, true: str | None) -> Edit:
        return Edit(
            id=subject.split()[0],
            subject=subject,
            prompt="{} lives in",
            target_new=new,
            target_true=true,
            paraphrase_prompts=(f"The home of {subject} is", f"{subject} comes from the city of"),
            neighborhood_prompts=(
                Probe(prompt="Peter Novak lives in", answers=("Paris",)),
                Probe(prompt="Maria Rossi lives in", answers=("Paris",)),
                Probe(prompt="What does Jonas speak?"),
            ),
        )

    return [edit("Anna Keller", "Rome", "Paris"), edit("Zoé Łuczak", "New York", None)]
