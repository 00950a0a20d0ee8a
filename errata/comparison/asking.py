"""What is asked of a model at a stop, and how its answers are counted: the same questions for every method (design §6)."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from statistics import fmean

from errata.comparison.cells import MEASURES, EditRow, Point, Scope, name_age
from errata.comparison.material import Material
from errata.comparison.method import SPLIT_SEED
from errata.edits import Edit
from errata.errors import EditorError
from errata.evaluation.abilities import measure_ability
from errata.evaluation.fluency import measure_entropy, sample_texts
from errata.evaluation.generation import generate_answers, match_answer
from errata.evaluation.metrics import agreement, all_correct, harmonic_mean, magnitude, prefers, token_accuracy
from errata.evaluation.probes import Probes, split_probes
from errata.evaluation.scoring import Question, Scored, score_targets
from errata.modeling.loading import Base
from errata.modeling.patch import Attachable, attach
from errata.modeling.tokens import can_write
from errata.monitors.locality import find_perplexity, measure_locality, read_probe
from errata.monitors.norms import measure_norms

_ENDS = 10
"""Edits that count as the newest, or the oldest."""
_FLUENT = 10
_FLUENT_TOKENS = 100
_NEW_TOKENS = 12

Values = dict[str, float | None]


@dataclass(frozen=True)
class _Live:
    position: int
    edit: Edit
    held: Probes
    """What was held out of it."""


class Sheet:
    """Everything that is asked about one stream, and what the base says to it.

    Args:
        base: untouched.
        scope: how much is asked.
    """

    def __init__(self, base: Base, material: Material, scope: Scope, seed: int, batch_tokens: int) -> None:
        self._base, self._material, self._scope, self._seed, self._batch_tokens = base, material, scope, seed, batch_tokens
        self._writable: dict[str, bool] = {}
        self._before: dict[Question, Scored] = {}
        self._probe = read_probe(base, material.texts) if material.texts else None
        self._perplexity = find_perplexity(self._probe) if self._probe else None

    def ask(self, artifacts: Sequence[Attachable], written: int) -> tuple[Point, list[EditRow]]:
        """What the base says with `artifacts`, after the first `written` edits of the stream.

        Raises:
            EditorError: what they make of a weight is not finite.
        """
        live = self._find_live(written)
        judged = self._choose_judged(live)
        said = judged[: self._scope.said]
        norms = [norm for item in artifacts for norm in measure_norms(self._base, item.deltas)]
        self._ask_base(judged)
        values: Values = dict.fromkeys(MEASURES)
        with attach(self._base, artifacts):
            scored = score_targets(self._base, [*self._list_rewrites(live), *self._list_probes(judged)], batch_tokens=self._batch_tokens)
            answers = self._generate(said)
            if self._probe:
                values["kl"] = measure_locality(self._base, self._probe).kl
                now = find_perplexity(read_probe(self._base, self._material.texts))
                values["perplexity_ratio"] = now / self._perplexity if now and self._perplexity else None
            texts = sample_texts(
                self._base,
                [item.edit.rewrite_prompt for item in judged[:_FLUENT]],
                tokens=_FLUENT_TOKENS,
                seed=self._seed,
                batch_tokens=self._batch_tokens,
            )
            if self._material.questions:
                values["ability"] = measure_ability(self._base, self._material.questions, batch_tokens=self._batch_tokens).value
        if not any(scored[question].finite for question in scored):
            raise EditorError("the model is destroyed: no answer of it is finite")
        values["fluency"] = _mean([entropy for entropy in map(measure_entropy, texts) if entropy is not None])
        values["norm_ratio"] = max((norm.mean_abs_ratio for norm in norms if norm.mean_abs_ratio is not None), default=1.0)
        values["frobenius_ratio"] = max((norm.frobenius_ratio for norm in norms if norm.frobenius_ratio is not None), default=1.0)
        values["spectral_ratio"] = max((norm.spectral_ratio for norm in norms if norm.spectral_ratio is not None), default=0.0)
        took = {item.position: self._took(scored, item.edit) for item in live}
        each = {item.position: self._judge(scored, item) for item in judged}
        for item in said:
            each[item.position] |= self._judge_said(answers, item)
        names = sorted({name for some in each.values() for name in some})
        values |= {name: _mean([some[name] for some in each.values() if name in some]) for name in names}
        values["efficacy"] = fmean(took.values())
        values["newest"] = _mean([took[item.position] for item in live if item.position >= written - _ENDS])
        values["oldest"] = _mean([took[item.position] for item in live if item.position < _ENDS])
        values["score"] = harmonic_mean([values["efficacy"], values.get("generalization"), values.get("specificity")])
        rows = []
        for item in live:
            probed = _pick(each, item.position)
            row = EditRow(edits=written, edit=item.edit.edit_id, position=item.position, efficacy=took[item.position], **probed)
            rows.append(row)
        return Point(edits=written, live=len(live), values=values, ages=_group_ages(took, written)), rows

    def _find_live(self, written: int) -> list[_Live]:
        """The last edit of every slot so far, in order of arrival."""
        last = {edit.slot: (position, edit) for position, edit in enumerate(self._material.edits[:written])}
        in_order = sorted(last.values(), key=itemgetter(0))
        return [_Live(position, edit, split_probes(edit, SPLIT_SEED).held_out) for position, edit in in_order]

    def _choose_judged(self, live: Sequence[_Live]) -> list[_Live]:
        """A sample that only the edits decide, so that all methods are asked the same, and a later stop asks again about earlier edits."""
        ranked = sorted(live, key=lambda item: hashlib.sha256(f"{self._seed}\0{item.edit.edit_id}".encode()).digest())
        return ranked[: self._scope.judged]

    def _list_rewrites(self, live: Sequence[_Live]) -> Iterator[Question]:
        return ((item.edit.rewrite_prompt, item.edit.target_new) for item in live)

    def _list_probes(self, judged: Sequence[_Live]) -> Iterator[Question]:
        for item in judged:
            edit, true = item.edit, self._find_truth(item.edit)
            for prompt in (edit.rewrite_prompt, *item.held.paraphrases):
                yield prompt, edit.target_new
                if true:
                    yield prompt, true
            for prompt, answer in self._list_neighbours(item):
                yield prompt, answer
                if answer:
                    yield prompt, edit.target_new
            yield from (question for questions in self._list_portability(edit) for question in questions)

    def _list_neighbours(self, item: _Live) -> list[Question]:
        """Each with its first answer, or without one, where there is only the base to compare with."""
        return [(probe.prompt, next(filter(self._can_write, probe.answers), None)) for probe in item.held.neighbours]

    def _list_portability(self, edit: Edit) -> list[list[Question]]:
        asked: list[list[Question]] = []
        for probe in edit.portability_prompts:
            asked.append([(probe.prompt, answer) for answer in probe.answers if self._can_write(answer)])
        return [questions for questions in asked if questions]

    def _find_truth(self, edit: Edit) -> str | None:
        return edit.target_true if edit.target_true and self._can_write(edit.target_true) else None

    def _can_write(self, text: str) -> bool:
        if text not in self._writable:
            self._writable[text] = can_write(self._base.tokenizer, text)
        return self._writable[text]

    def _ask_base(self, judged: Sequence[_Live]) -> None:
        new = [question for item in judged for question in self._list_neighbours(item) if question not in self._before]
        self._before |= score_targets(self._base, new, batch_tokens=self._batch_tokens)

    def _generate(self, said: Sequence[_Live]) -> dict[str, str]:
        """Prompt → greedy answer."""
        prompts = [prompt for item in said for prompt in (item.edit.rewrite_prompt, *item.held.paraphrases)]
        answers = generate_answers(self._base, prompts, max_new_tokens=_NEW_TOKENS, batch_tokens=self._batch_tokens)
        return dict(zip(prompts, answers, strict=True))

    def _took(self, scored: Mapping[Question, Scored], edit: Edit) -> float:
        found = scored[edit.rewrite_prompt, edit.target_new]
        return float(all_correct(found.chosen, found.target))

    def _judge(self, scored: Mapping[Question, Scored], item: _Live) -> dict[str, float]:
        """What one edit adds to the means, by measure: means over its own prompts."""
        edit, held, true = item.edit, item.held, self._find_truth(item.edit)
        found: dict[str, float | None] = {}
        if true:
            new, old = (scored[edit.rewrite_prompt, target].logprobs for target in (edit.target_new, true))
            found |= {"es": float(prefers(new, old)), "em": magnitude(new, old)}
            pairs = [tuple(scored[prompt, target].logprobs for target in (edit.target_new, true)) for prompt in held.paraphrases]
            found["ps"] = _mean([float(prefers(new, old)) for new, old in pairs])
            found["pm"] = _mean([magnitude(new, old) for new, old in pairs])
        paraphrased = [scored[prompt, edit.target_new] for prompt in held.paraphrases]
        found["generalization"] = _mean([float(all_correct(one.chosen, one.target)) for one in paraphrased])
        neighbours = self._list_neighbours(item)
        found["specificity"] = _mean([agreement(scored[asked].chosen, self._before[asked].chosen) for asked in neighbours])
        known = [(scored[asked], scored[asked[0], edit.target_new]) for asked in neighbours if asked[1]]
        found["truth"] = _mean([token_accuracy(right.chosen, right.target) for right, _ in known])
        found["ns"] = _mean([float(prefers(right.logprobs, new.logprobs)) for right, new in known])
        found["nm"] = _mean([magnitude(right.logprobs, new.logprobs) for right, new in known])
        ported = [[scored[asked] for asked in questions] for questions in self._list_portability(edit)]
        found["portability"] = _mean([max(token_accuracy(one.chosen, one.target) for one in some) for some in ported])
        return {name: value for name, value in found.items() if value is not None}

    def _judge_said(self, answers: Mapping[str, str], item: _Live) -> dict[str, float]:
        targets = [item.edit.target_new]
        said = {"said": float(match_answer(answers[item.edit.rewrite_prompt], targets))}
        if item.held.paraphrases:
            said["said_paraphrase"] = fmean(match_answer(answers[prompt], targets) for prompt in item.held.paraphrases)
        return said


def _pick(each: Mapping[int, Mapping[str, float]], position: int) -> dict[str, float]:
    return {name: each[position][name] for name in ("generalization", "specificity", "said") if name in each.get(position, ())}


def _group_ages(took: Mapping[int, float], written: int) -> dict[str, float]:
    groups: dict[str, list[float]] = {}
    for position, value in took.items():
        groups.setdefault(name_age(written - 1 - position), []).append(value)
    return {name: fmean(values) for name, values in groups.items()}


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None
