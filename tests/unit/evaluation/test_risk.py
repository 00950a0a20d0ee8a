"""What an edit is foretold to cost is what the base thinks of its target, to the last token."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from errata.edits import Edit, Risk
from errata.evaluation.risk import measure_risks
from errata.modeling.loading import Base
from errata.modeling.tokens import encode_prompt, encode_target
from errata.modeling.trace import change_output
from errata.summary import RiskSpread


def test_known_probabilities() -> None:
    risk = Risk.over([math.log(0.5), math.log(0.02)])
    assert risk == Risk(perplexity=10.0, tokens=2)
    assert risk.figure == pytest.approx(math.log(100)), "a hundred to one against the whole target"
    assert Risk.over([0.0, 0.0, 0.0]) == Risk(perplexity=1.0, tokens=3) and Risk.over([0.0]).figure == 0.0
    assert Risk.over([1e-9]).perplexity == 1.0, "rounding above certainty"


@given(st.lists(st.floats(-60, 0), min_size=1, max_size=20))
def test_the_figure_is_the_negative_log_likelihood_of_the_target(logprobs: list[float]) -> None:
    assert Risk.over(logprobs).figure == pytest.approx(-sum(logprobs), abs=6e-6 * len(logprobs))


@given(st.lists(st.floats(-60, -0.01), min_size=1, max_size=20), st.floats(-60, -0.01))
def test_a_longer_target_is_never_a_smaller_risk(logprobs: list[float], one_more: float) -> None:
    assert Risk.over([*logprobs, one_more]).figure > Risk.over(logprobs).figure - 1e-3


@pytest.mark.parametrize("logprobs", [[-math.inf], [-1.0, -math.inf], [math.nan], [-1e6]])
def test_what_is_not_finite_is_the_greatest_risk_and_can_be_stored(logprobs: list[float]) -> None:
    risk = Risk.over(logprobs)
    assert risk == Risk(perplexity=None, tokens=len(logprobs)) and risk.figure == math.inf
    assert Risk.model_validate_json(risk.model_dump_json()) == risk
    spread = RiskSpread.over({"a": Risk(perplexity=2.0, tokens=1), "b": risk})
    assert spread is not None and (spread.worst, spread.edit, spread.median) == (None, "b", None)


def test_of_a_batch_median_and_worst() -> None:
    assert RiskSpread.over({}) is None
    risks = {name: Risk(perplexity=math.e, tokens=tokens) for name, tokens in (("a", 1), ("b", 9), ("c", 2))}
    assert RiskSpread.over(risks) == RiskSpread(edits=3, median=2.0, worst=9.0, edit="b")


def test_equals_plain_full_logits(any_base: Base, edits: list[Edit]) -> None:
    long = edits[0].model_copy(update={"id": "long", "target_new": "French and a much longer answer"})
    risks = measure_risks(any_base, [*edits, long], batch_tokens=64)
    assert set(risks) == {edit.edit_id for edit in (*edits, long)}
    for edit in (*edits, long):
        prompt, target = encode_prompt(any_base.tokenizer, edit.rewrite_prompt), encode_target(any_base.tokenizer, edit.target_new)
        with torch.no_grad():
            logits = any_base.model(torch.tensor([prompt + target])).logits[0, len(prompt) - 1 : -1]
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(target)).item()
        assert risks[edit.edit_id].tokens == len(target)
        assert risks[edit.edit_id].perplexity == pytest.approx(math.exp(loss), rel=1e-3)
        assert risks[edit.edit_id].figure == pytest.approx(loss * len(target), rel=1e-3)


def test_logits_that_are_not_finite_are_no_crash(base: Base, edits: list[Edit]) -> None:
    with change_output(base.model.get_submodule(base.layout.norm), lambda hidden: hidden * math.nan):
        risks = measure_risks(base, edits, batch_tokens=64)
    assert all(risk.perplexity is None for risk in risks.values())
