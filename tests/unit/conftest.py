"""Tiny random base models and tokenizers made in place: nothing is downloaded, nothing is trained."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from errata.modeling.loading import Base

STORIES = Path(__file__).parents[3] / "shared" / "data" / "models" / "stories260K"
"""A real Llama checkpoint of 260,000 parameters with a SentencePiece vocabulary, where this machine has one."""

_TEXTS = (
    "The mother tongue of Anna Keller is French. Hugo Lindt plays the sport of tennis.",
    "Marie Curie works in the city of Paris. Zoë Łukasz was born in Århus, 東京 or Malmö.",
    "The weather is fine today. I do not know. Because of the rain they stayed. Stockholm, Danish, chess, green.",
)


def make_byte_tokenizer(*, prefix_space: bool = False, bos: bool = False) -> "PreTrainedTokenizerFast":
    """A byte-level BPE like GPT-2's, trained on a few sentences; takes any text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<s>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXTS, trainer)
    trim = processors.ByteLevel(trim_offsets=True)
    if bos:
        start = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))])
        tokenizer.post_processor = processors.Sequence([trim, start])
    else:
        tokenizer.post_processor = trim
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", bos_token="<s>")


def make_tiny_gpt2(*, seed: int = 0, dtype: str = "float32") -> "Base":
    """Random GPT-2 of four layers; wide enough weights that the inputs matter to the outputs."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from errata.modeling.loading import hold_base

    tokenizer = make_byte_tokenizer()
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=96,
        n_embd=32,
        n_layer=4,
        n_head=4,
        n_inner=48,
        initializer_range=0.15,
    )
    return hold_base(GPT2LMHeadModel(config).to(getattr(torch, dtype)), tokenizer)


def make_tiny_llama(*, seed: int = 0, dtype: str = "float32") -> "Base":
    """Random Llama of four layers: rotary positions, two key-value heads for four query heads, a tokenizer that puts BOS in front."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from errata.modeling.loading import hold_base

    tokenizer = make_byte_tokenizer(prefix_space=True, bos=True)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.15,
    )
    return hold_base(LlamaForCausalLM(config).to(getattr(torch, dtype)), tokenizer)


FAMILIES: dict[str, dict[str, object]] = {
    "gptj": {"n_positions": 96, "n_embd": 32, "n_layer": 4, "n_head": 4, "rotary_dim": 4, "n_inner": 48},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 64, "num_layers": 4, "num_heads": 4},
    "gpt_neox": {"rotary_pct": 0.5},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 64},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
    "gemma": {"num_key_value_heads": 1, "head_dim": 8},
    "phi": {},
}
"""What the configuration of a family needs besides the common sizes."""


def make_family(name: str, *, spread: float = 0.15, dtype: str = "float32") -> "Base":
    """Random model of a family's own class, of four layers; its weights have the standard deviation `spread`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from errata.modeling.loading import hold_base

    tokenizer = make_byte_tokenizer(bos=name in ("gemma", "mistral"))
    common = {"hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 96}
    common |= {} if name == "gpt_neo" else {"num_hidden_layers": 4, "num_attention_heads": 4}
    sizes = FAMILIES[name] if name == "gptj" else common | FAMILIES[name]
    ids = {"bos_token_id": 1, "eos_token_id": 0, "pad_token_id": 0}
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, vocab_size=len(tokenizer), initializer_range=spread, **ids, **sizes)
    return hold_base(AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype)), tokenizer)


def load_stories() -> "Base":
    """The stories260K checkpoint; skips the test with a reason where the machine has none."""
    from errata.modeling.loading import load_base

    if not STORIES.is_dir():
        pytest.skip(f"no Llama checkpoint at {STORIES}")
    return load_base(STORIES, device="cpu")


@pytest.fixture(scope="session")
def tiny_gpt2() -> "Base":
    return make_tiny_gpt2()


@pytest.fixture(scope="session")
def tiny_llama() -> "Base":
    return make_tiny_llama()


@pytest.fixture(scope="session")
def stories() -> "Base":
    return load_stories()


make_family_once = functools.cache(make_family)


@pytest.fixture(scope="session")
def family_of() -> "Callable[..., Base]":
    """Makes the tiny model of a family, each once."""
    return make_family_once


@pytest.fixture(params=["tiny_gpt2", "tiny_llama", "stories", *FAMILIES])
def any_base(request: pytest.FixtureRequest) -> "Base":
    """Every family, one after the other."""
    name: str = request.param
    made: Base = make_family_once(name) if name in FAMILIES else request.getfixturevalue(name)
    return made


@pytest.fixture(scope="session")
def byte_tokenizer() -> "Callable[..., PreTrainedTokenizerFast]":
    return make_byte_tokenizer


@pytest.fixture(scope="session")
def gpt2_of() -> "Callable[..., Base]":
    """Makes a tiny GPT-2 with another seed or dtype."""
    return make_tiny_gpt2
