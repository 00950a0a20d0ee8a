"""Causal tracing against what must hold of any model, whatever it knows."""

from collections.abc import Callable

import pytest
import torch

from errata.calibration.tracing import Trace, trace_facts
from errata.edits import Edit
from errata.errors import TokenizationError
from errata.modeling.loading import Base

FACTS = (
    Edit(subject="Anna Keller", prompt="{} works in the city of", target_new="Paris", target_true="Rome"),
    Edit(subject="Hugo Lindt", prompt="The mother tongue of {} is", target_new="Danish", target_true="Greek"),
    Edit(subject="Zoë Łukasz", prompt="Therefore, {} plays the", target_new="chess", target_true="golf"),
)


@pytest.fixture(params=["tiny_gpt2", "tiny_llama", "gpt_neox", "gemma"])
def base(request: pytest.FixtureRequest, family_of: Callable[..., Base]) -> Base:
    return family_of(request.param) if request.param in ("gpt_neox", "gemma") else request.getfixturevalue(request.param)


@torch.no_grad()
def ask_plainly(base: Base, fact: Edit) -> float:
    ids = base.tokenizer(fact.rewrite_prompt, return_tensors="pt").input_ids
    whole = base.tokenizer(f"{fact.rewrite_prompt} {fact.target_true}").input_ids
    return float(base.model(ids).logits[0, -1].softmax(dim=-1)[whole[ids.shape[1]]])


def test_the_clean_answer_is_the_models_own(base: Base) -> None:
    trace = trace_facts(base, FACTS, draws=1)
    assert trace.clean == pytest.approx(sum(ask_plainly(base, fact) for fact in FACTS) / len(FACTS), rel=1e-4)


def test_the_last_state_of_the_prompt_is_the_answer_and_the_subjects_is_not(base: Base) -> None:
    """After the last block nothing is carried any further: what is restored at the end decides all, elsewhere nothing."""
    trace = trace_facts(base, FACTS, draws=2)
    assert trace.restored["prompt_last"][-1] == pytest.approx(trace.clean, rel=1e-4)
    assert trace.restored["subject_last"][-1] == pytest.approx(trace.corrupted, rel=1e-4)


def test_batches_and_order_change_nothing_but_the_noise(tiny_gpt2: Base) -> None:
    first, again = (trace_facts(tiny_gpt2, FACTS, seed=3) for _ in range(2))
    assert first == again
    assert trace_facts(tiny_gpt2, FACTS[::-1], seed=3).clean == pytest.approx(first.clean, rel=1e-5)
    small = trace_facts(tiny_gpt2, FACTS, seed=3, batch_tokens=1)
    assert small.clean == pytest.approx(first.clean, rel=1e-5) and small.facts == first.facts == 3
    assert trace_facts(tiny_gpt2, FACTS, seed=4).corrupted != first.corrupted


def test_the_base_is_left_as_it_was(tiny_gpt2: Base) -> None:
    before = ask_plainly(tiny_gpt2, FACTS[0])
    trace_facts(tiny_gpt2, FACTS)
    assert ask_plainly(tiny_gpt2, FACTS[0]) == before
    assert not any(module._forward_hooks for module in tiny_gpt2.model.modules())


def test_effects_are_shares_of_what_was_lost() -> None:
    trace = Trace(facts=1, draws=1, clean=0.9, corrupted=0.1, restored={"subject_last": (0.5, 0.9), "prompt_last": (0.1, 0.9)})
    assert trace.measure_effects("subject_last") == pytest.approx((0.5, 1.0))
    assert Trace.from_bytes(trace.to_bytes()) == trace
    assert trace.model_copy(update={"corrupted": 0.9}).measure_effects("prompt_last") == (0.0, 0.0)


def test_without_a_fact_that_can_be_placed_it_says_so(tiny_gpt2: Base) -> None:
    with pytest.raises(TokenizationError, match="none among 0"):
        trace_facts(tiny_gpt2, ())
