"""The report: what it counts, on a random model and on one that an artifact makes say one thing."""

import copy

import pytest
import torch

from errata.editors.artifacts import WeightDelta
from errata.edits import Edit, Probe
from errata.errors import BaseMismatchError, FormatError
from errata.evaluation import evaluate
from errata.evaluation.evaluate import evaluate_candidate
from errata.modeling.loading import Base, hold_base
from errata.modeling.tokens import can_write, encode_target
from errata.report import Diagnosis, Report
from errata.settings import EvaluateSettings

SETTINGS = EvaluateSettings(max_new_tokens=4, batch_tokens=512)


def shout(base: Base, word: str) -> WeightDelta:
    """An artifact that makes the model answer `word`'s first token everywhere: each key of the last layer is mapped onto its embedding.

    The update is rank one along the mean key, so it acts on every prompt; it is far too strong on purpose.
    """
    name = base.layout.weight_name(1)
    weight = base.layout.read_weight(base.model, 1)
    token = encode_target(base.tokenizer, word)[0]
    direction = base.model.get_output_embeddings().weight[token].detach()
    keys: list[torch.Tensor] = []
    handle = base.layout.projection_of(base.model, 1).register_forward_pre_hook(lambda _m, args: keys.append(args[0].flatten(0, 1)))
    base.model(torch.tensor([base.tokenizer("Anna Keller lives in Paris").input_ids]))
    handle.remove()
    mean = torch.cat(keys).mean(0)
    return WeightDelta(base.digest, {name: (3000 * torch.outer(direction, mean) / weight.norm()).float()})


def test_the_untouched_base_agrees_with_itself_and_has_no_norm_to_report(base: Base, edits: list[Edit]) -> None:
    report = evaluate_candidate(base, [], edits, edits[:1], None, SETTINGS)
    assert [row.id for row in report.rows] == ["Anna", "Zoé"]
    assert report.held_out.specificity.value == report.paper.specificity.value == 1.0
    assert (report.paper.specificity.edits, report.paper.specificity.prompts) == (2, 6)
    assert report.held_out.specificity.prompts == 4 and report.held_out.generalization.prompts == 2
    assert report.paper.specificity_truth == report.paper.specificity_truth_base
    assert report.paper.specificity_truth.prompts == 4, "neighbours without an answer have no truth"
    assert report.locality.agreement == 1.0 and report.locality.kl == pytest.approx(0, abs=1e-6)
    assert report.locality.positions > 100
    assert report.norms == () and report.nonfinite == 0 and report.fault is None
    assert all(row.answer == row.answer_before for row in report.rows)


def test_undefined_is_none(base: Base, edits: list[Edit]) -> None:
    bare = edits[1].model_copy(update={"paraphrase_prompts": (), "neighborhood_prompts": ()})
    report = evaluate_candidate(base, [], [bare], [], None, SETTINGS)
    row = report.rows[0]
    assert row.success is None and row.magnitude is None and report.success.value is None
    assert report.paper.generalization.value is None and report.paper.specificity.value is None
    assert report.paper.score is None and report.paper.counterfact_score is None
    assert report.retention.efficacy.value is None and report.retention.forgotten == ()
    empty = evaluate_candidate(base, [], [], [], None, SETTINGS)
    assert empty.efficacy.value is None and empty.rows == ()


def test_an_artifact_that_writes_one_word_everywhere(base: Base) -> None:
    """Efficacy, generalization and forgetting of the same candidate, seen from an edit that it serves and from one that it breaks."""
    served = Edit(
        id="served",
        subject="Anna Keller",
        prompt="{} lives in",
        target_new="French",
        target_true="Paris",
        paraphrase_prompts=("The home of Anna Keller is",),
        neighborhood_prompts=(Probe(prompt="Peter Novak lives in", answers=("Paris",)),),
    )
    broken = served.model_copy(update={"id": "broken", "target_new": "speaks"})
    token = encode_target(base.tokenizer, "French")[0]
    loud = shout(base, "French")
    lost = broken.model_copy(update={"id": "lost"})
    report = evaluate_candidate(base, [loud], [served], [broken, served], 0.75, SETTINGS, mates={"served": [lost, served]})
    row = report.rows[0]
    assert row.broken == ("lost",), "of the older edits that share its pair; they are no part of retention"
    assert not row.already_known and row.efficacy and row.success and row.token_accuracy == 1.0
    assert row.magnitude is not None and row.magnitude > 0 and row.loss is not None and row.loss < 1
    assert row.answer != row.answer_before and row.answer.startswith(base.tokenizer.decode([token]).strip())
    assert report.paper.generalization.value == 1.0 and report.paper.generalization_success.value == 1.0
    assert report.paper.specificity.value == 0.0 and report.paper.specificity_success.value == 0.0
    assert report.paper.score == 0.0
    assert report.retention.efficacy.value == 0.5 and report.retention.forgotten == ("broken",) and report.retention.previous == 0.75
    assert (
        report.locality.kl is not None
        and report.locality.kl > 1
        and report.locality.agreement is not None
        and report.locality.agreement < 0.5
    )
    (norms,) = report.norms
    assert norms.mean_abs_ratio is not None and norms.mean_abs_ratio > 1


def test_what_the_base_already_says_is_marked(base: Base) -> None:
    loud = copy.deepcopy(base.model)
    for name, delta in shout(base, "French").deltas.items():
        loud.get_parameter(name).data += base.layout.orient(delta)
    french = hold_base(loud, base.tokenizer)
    edits = [Edit(id=target, subject="Anna", prompt="{} lives in", target_new=target) for target in ("French", "Paris")]
    report = evaluate_candidate(french, [], edits, [], None, SETTINGS)
    assert [row.already_known for row in report.rows] == [True, False] and report.already_known == 1
    assert [row.efficacy for row in report.rows] == [True, False] and report.efficacy.value == 0.5


def test_the_base_is_left_as_it_was(base: Base, edits: list[Edit]) -> None:
    before = {name: parameter.clone() for name, parameter in base.model.named_parameters()}
    evaluate_candidate(base, [shout(base, "French")], edits, [], None, SETTINGS)
    assert all(torch.equal(before[name], parameter) for name, parameter in base.model.named_parameters())


def test_a_candidate_that_is_not_finite_is_a_fault_in_the_report(base: Base, edits: list[Edit]) -> None:
    name = base.layout.weight_name(0)
    nan = WeightDelta(base.digest, {name: torch.full(tuple(base.layout.read_weight(base.model, 0).shape), float("nan"))})
    report = evaluate_candidate(base, [nan], edits, edits, None, SETTINGS)
    assert report.fault is not None and "not finite" in report.fault
    assert report.nonfinite > 0 and report.efficacy.value == 0.0 and report.retention.efficacy.value == 0.0
    assert report.norms[0].mean_abs_ratio is None and report.locality.kl is None
    assert Report.from_bytes(report.to_bytes()) == report


def test_logits_that_overflow_are_counted(base: Base, edits: list[Edit]) -> None:
    name = base.layout.weight_name(1)
    shape = tuple(base.layout.read_weight(base.model, 1).shape)
    huge = WeightDelta(base.digest, {name: torch.full(shape, 3e38) * torch.sign(torch.arange(shape[0]) - 7.5)[:, None]})
    report = evaluate_candidate(base, [huge], edits, [], None, SETTINGS)
    assert report.fault is None and report.nonfinite > 0 and report.efficacy.value == 0.0 and report.locality.kl is None
    assert Report.from_bytes(report.to_bytes()) == report


def test_an_artifact_of_another_base_is_refused(base: Base, edits: list[Edit]) -> None:
    with pytest.raises(BaseMismatchError):
        evaluate_candidate(base, [WeightDelta("0" * 64, {"nowhere": torch.zeros(1)})], edits, [], None, SETTINGS)


def test_diagnoses_and_settings_reach_the_report(base: Base, edits: list[Edit]) -> None:
    diagnoses = {"Anna": Diagnosis(loss=0.1), "Zoé": Diagnosis(loss=float("nan"))}
    settings = SETTINGS.model_copy(update={"seed": 4})
    report = evaluate_candidate(base, [], edits, [], None, settings, diagnoses=diagnoses, fits={"Anna": 0.5, "Zoé": 0.4})
    first, second = (row.diagnosis for row in report.rows)
    assert first == Diagnosis(loss=0.1, fit=0.5, finite=True)
    assert second == Diagnosis(loss=None, fit=0.4, finite=False)
    assert report.seed == 4
    assert Report.from_bytes(report.to_bytes()) == report


def test_a_truth_that_cannot_be_written_leaves_its_measures_undefined(
    base: Base, edits: list[Edit], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "can_write", lambda tokenizer, text: text != "Paris" and can_write(tokenizer, text))
    report = evaluate_candidate(base, [], edits[:1], [], None, SETTINGS)
    assert report.rows[0].success is None and report.paper.specificity_truth.value is None
    assert report.paper.specificity.prompts == 3 and report.rows[0].held_out.specificity.value == 1.0


def test_reports_are_refused_where_their_format_is_unknown(base: Base) -> None:
    report = evaluate_candidate(base, [], [], [], None, SETTINGS)
    with pytest.raises(FormatError, match="format"):
        Report.from_bytes(report.to_bytes().replace(b'"format":1', b'"format":2'))
    with pytest.raises(FormatError, match="report"):
        Report.from_bytes(b"not json")


def test_metrics_have_flat_names_and_only_measured_values(base: Base, edits: list[Edit]) -> None:
    metrics = evaluate_candidate(base, [shout(base, "French")], edits, [], None, SETTINGS).metrics()
    assert metrics["norms.transformer.h.1.mlp.c_proj.weight.mean_abs_ratio"] > 1
    assert metrics["paper.specificity"] <= 1 and "retention" not in metrics
    assert all(isinstance(value, float) for value in metrics.values())
