"""Measuring a candidate: the base first, then the same questions with the artifacts attached, all gathered in one `Report`.

Nothing is judged here; `errata.gate` does that, from the report alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from errata.editors.artifacts import Artifact
from errata.edits import Edit, Probe
from errata.errors import EditorError
from errata.evaluation.generation import generate_answers, match_answer
from errata.evaluation.metrics import agreement, all_correct, harmonic_mean, magnitude, mean_loss, prefers, token_accuracy
from errata.evaluation.probes import Probes, split_probes
from errata.evaluation.scoring import Progress, Question, Scored, score_targets
from errata.modeling.loading import Base
from errata.modeling.patch import attach
from errata.modeling.tokens import can_write, encode_target
from errata.monitors.locality import PROBE_TEXTS, measure_locality, read_probe
from errata.monitors.norms import measure_norms
from errata.report import Diagnosis, EditRow, Locality, Mean, ProbeScores, Report, Retention
from errata.settings import EvaluateSettings

Scores = Mapping[Question, Scored]


def evaluate_candidate(
    base: Base,
    artifacts: Sequence[Artifact],
    edits: Sequence[Edit],
    retained: Sequence[Edit],
    previous_retention: float | None,
    settings: EvaluateSettings,
    *,
    mates: Mapping[str, Sequence[Edit]] | None = None,
    diagnoses: Mapping[str, Diagnosis] | None = None,
    fits: Mapping[str, float] | None = None,
    conditions: Mapping[str, float] | None = None,
    probe_texts: Sequence[str] = PROBE_TEXTS,
    progress: Progress | None = None,
) -> Report:
    """Measure `base + artifacts` on a batch of edits, on older edits, and on texts that no edit is about.

    Logits that are not finite are counted in the report, and a candidate that cannot be attached is a report with a `fault`: both are
    for the gate to judge.

    Args:
        edits: the batch, in its order.
        retained: sample of the edits that were live before the batch and still are.
        previous_retention: retention of the previous version on its own sample, where there is one.
        mates: edit id → older edits that share its pair with it now.
        diagnoses: edit id → how its preparation ended.
        fits: edit id → the fraction of its residual that the solve realises.
        conditions: parameter name → condition number of the solve.
        probe_texts: the fixed probe of locality.

    Raises:
        BaseMismatchError: an artifact is not for this base.
        TokenizationError: a target_new that the tokenizer cannot write.
    """
    mates = mates or {}
    questioner = _Questioner(base, edits, [*retained, *(mate for group in mates.values() for mate in group)])
    batch_tokens = settings.batch_tokens
    prompts = [edit.rewrite_prompt for edit in edits]
    before = score_targets(base, questioner.of_base(), batch_tokens=batch_tokens, stage="base", progress=progress)
    answers_before = generate_answers(base, prompts, max_new_tokens=settings.max_new_tokens, batch_tokens=batch_tokens)
    reference = read_probe(base, probe_texts)
    try:
        with attach(base, artifacts):
            after = score_targets(base, questioner.of_candidate(), batch_tokens=batch_tokens, stage="candidate", progress=progress)
            answers = generate_answers(
                base, prompts, max_new_tokens=settings.max_new_tokens, batch_tokens=batch_tokens, stage="answers", progress=progress
            )
            locality = measure_locality(base, reference)
            fault = None
    except EditorError as error:
        # Every question unanswered, so that each number says "wrong" or "undefined" rather than the base's value.
        after = {question: _unanswered(base, question) for question in questioner.of_candidate()}
        answers, locality, fault = [""] * len(edits), Locality(), str(error)
    norms = measure_norms(base, {name: delta for artifact in artifacts for name, delta in artifact.deltas.items()}, conditions)
    judged = [
        _judge_edit(
            edit,
            questioner,
            before,
            after,
            settings.seed,
            _diagnose(edit, diagnoses or {}, fits or {}),
            texts,
            tuple(mate.edit_id for mate in mates.get(edit.edit_id, ()) if not _holds(mate, after)),
        )
        for edit, texts in zip(edits, zip(answers_before, answers, strict=True), strict=True)
    ]
    rows = [item.row for item in judged]
    efficacy, success = Mean.over([float(row.efficacy)] for row in rows), Mean.over(_known(row.success) for row in rows)
    return Report(
        seed=settings.seed,
        rows=tuple(rows),
        already_known=sum(row.already_known for row in rows),
        efficacy=efficacy,
        token_accuracy=Mean.over([row.token_accuracy] for row in rows),
        success=success,
        magnitude=Mean.over(_known(row.magnitude) for row in rows),
        greedy=Mean.over([float(row.greedy)] for row in rows),
        held_out=_summarise([item.held_out for item in judged], efficacy, success),
        paper=_summarise([item.paper for item in judged], efficacy, success),
        retention=_judge_retention(retained, after, previous_retention),
        locality=locality,
        norms=norms,
        nonfinite=sum(not scored.finite for scored in after.values()),
        fault=fault,
    )


class _Questioner:
    """Which questions the edits ask. One place, so that what is asked and what is looked up cannot differ."""

    def __init__(self, base: Base, edits: Sequence[Edit], older: Sequence[Edit]) -> None:
        self._base, self._edits, self._older = base, edits, older
        self._writable: dict[str, bool] = {}

    def of_base(self) -> list[Question]:
        rewrites = [(edit.rewrite_prompt, edit.target_new) for edit in self._edits]
        return rewrites + [self.neighbour(probe) for edit in self._edits for probe in edit.neighborhood_prompts]

    def of_candidate(self) -> list[Question]:
        questions: list[Question] = [(edit.rewrite_prompt, edit.target_new) for edit in self._older]
        for edit in self._edits:
            true = self.truth(edit)
            for prompt in (edit.rewrite_prompt, *edit.paraphrase_prompts):
                questions += [(prompt, edit.target_new)] + ([(prompt, true)] if true else [])
            for probe in edit.neighborhood_prompts:
                questions += [self.neighbour(probe), (probe.prompt, edit.target_new)]
        return questions

    def truth(self, edit: Edit) -> str | None:
        """target_true, where there is one that the tokenizer can write: a comparison with it is undefined otherwise."""
        return edit.target_true if edit.target_true and self._can_write(edit.target_true) else None

    def neighbour(self, probe: Probe) -> Question:
        """A neighbour with its first answer forced, or, without a usable one, only the token after its prompt."""
        return probe.prompt, next((answer for answer in probe.answers if self._can_write(answer)), None)

    def _can_write(self, text: str) -> bool:
        if text not in self._writable:
            self._writable[text] = can_write(self._base.tokenizer, text)
        return self._writable[text]


@dataclass(frozen=True)
class _ProbeValues:
    """Values per prompt of one edit, in the terms of `ProbeScores`."""

    generalization: list[float]
    generalization_success: list[float]
    generalization_magnitude: list[float]
    specificity: list[float]
    specificity_truth: list[float]
    specificity_truth_base: list[float]
    specificity_success: list[float]
    specificity_magnitude: list[float]


@dataclass(frozen=True)
class _Judged:
    row: EditRow
    held_out: _ProbeValues
    paper: _ProbeValues


def _judge_edit(
    edit: Edit,
    questioner: _Questioner,
    before: Scores,
    after: Scores,
    seed: int,
    diagnosis: Diagnosis | None,
    texts: tuple[str, str],
    broken: tuple[str, ...],
) -> _Judged:
    prompt = edit.rewrite_prompt
    base_new, new, true = before[prompt, edit.target_new], after[prompt, edit.target_new], questioner.truth(edit)
    old = after[prompt, true] if true else None
    held_out = _judge_probes(edit, split_probes(edit, seed).held_out, questioner, before, after)
    paper = _judge_probes(edit, Probes(edit.paraphrase_prompts, edit.neighborhood_prompts), questioner, before, after)
    took = all_correct(new.chosen, new.target)
    success = prefers(new.logprobs, old.logprobs) if old else None
    own, own_success = Mean.over([[float(took)]]), Mean.over([_known(success)])
    row = EditRow(
        id=edit.edit_id,
        already_known=all_correct(base_new.chosen, base_new.target),
        efficacy=took,
        token_accuracy=token_accuracy(new.chosen, new.target),
        success=success,
        magnitude=magnitude(new.logprobs, old.logprobs) if old else None,
        greedy=match_answer(texts[1], [edit.target_new]),
        loss=mean_loss(new.logprobs) if new.finite else None,
        answer_before=texts[0],
        answer=texts[1],
        held_out=_summarise([held_out], own, own_success),
        paper=_summarise([paper], own, own_success),
        diagnosis=diagnosis,
        broken=broken,
    )
    return _Judged(row, held_out, paper)


def _judge_probes(edit: Edit, probes: Probes, questioner: _Questioner, before: Scores, after: Scores) -> _ProbeValues:
    values = _ProbeValues([], [], [], [], [], [], [], [])
    true = questioner.truth(edit)
    for prompt in probes.paraphrases:
        new = after[prompt, edit.target_new]
        values.generalization.append(float(all_correct(new.chosen, new.target)))
        if true:
            values.generalization_success.append(float(prefers(new.logprobs, after[prompt, true].logprobs)))
            values.generalization_magnitude.append(magnitude(new.logprobs, after[prompt, true].logprobs))
    for probe in probes.neighbours:
        question = questioner.neighbour(probe)
        kept, was, new = after[question], before[question], after[probe.prompt, edit.target_new]
        values.specificity.append(agreement(kept.chosen, was.chosen))
        if kept.target:
            values.specificity_truth.append(token_accuracy(kept.chosen, kept.target))
            values.specificity_truth_base.append(token_accuracy(was.chosen, was.target))
            values.specificity_success.append(float(prefers(kept.logprobs, new.logprobs)))
            values.specificity_magnitude.append(magnitude(kept.logprobs, new.logprobs))
    return values


def _summarise(values: Sequence[_ProbeValues], efficacy: Mean, success: Mean) -> ProbeScores:
    means = {name: Mean.over(getattr(item, name) for item in values) for name in _ProbeValues.__dataclass_fields__}
    return ProbeScores(
        **means,
        score=harmonic_mean([efficacy.value, means["generalization"].value, means["specificity"].value]),
        counterfact_score=harmonic_mean([success.value, means["generalization_success"].value, means["specificity_success"].value]),
    )


def _judge_retention(retained: Sequence[Edit], after: Scores, previous: float | None) -> Retention:
    kept = [_holds(edit, after) for edit in retained]
    return Retention(
        efficacy=Mean.over([float(value)] for value in kept),
        previous=previous,
        forgotten=tuple(edit.edit_id for edit, value in zip(retained, kept, strict=True) if not value),
    )


def _holds(edit: Edit, after: Scores) -> bool:
    """Whether an older edit still takes."""
    scored = after[edit.rewrite_prompt, edit.target_new]
    return all_correct(scored.chosen, scored.target)


def _diagnose(edit: Edit, diagnoses: Mapping[str, Diagnosis], fits: Mapping[str, float]) -> Diagnosis | None:
    diagnosis, fit = diagnoses.get(edit.edit_id), fits.get(edit.edit_id)
    if fit is None:
        return diagnosis
    return Diagnosis.model_validate({**(diagnosis.model_dump() if diagnosis else {}), "fit": fit})


def _unanswered(base: Base, question: Question) -> Scored:
    target = tuple(encode_target(base.tokenizer, question[1])) if question[1] is not None else ()
    return Scored(target, (float("-inf"),) * len(target), (-1,) * max(len(target), 1))


def _known(value: float | None) -> list[float]:
    return [] if value is None else [float(value)]
