"""What was measured of one candidate: the noun that evaluation and monitors fill, the gate judges and the commit stores. No torch here.

Every number that could not be measured is None: a share of no cases is neither 0 nor 1.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, ValidationError, model_serializer, model_validator

from errata.edits import canonical_json
from errata.errors import FormatError


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Mean(_Part):
    """A mean over prompts within an edit, then over edits, as CounterFact's summaries take it (memit experiments/summarize.py)."""

    value: float | None = None
    """None where nothing was measured."""
    edits: int = 0
    """Edits that contributed at least one prompt."""
    prompts: int = 0

    @classmethod
    def over(cls, cases: Iterable[Sequence[float]]) -> Self:
        """The mean over `cases`, one sequence of values per edit; edits without values do not count."""
        filled = [case for case in cases if case]
        if not filled:
            return cls()
        value = sum(sum(case) / len(case) for case in filled) / len(filled)
        return cls(value=value, edits=len(filled), prompts=sum(map(len, filled)))


class Diagnosis(_Part):
    """How one edit was prepared and solved for, as its editor saw it. Numbers that are not finite become None and `finite` False."""

    loss: float | None = None
    """Nats per token of target_new with its z in place on the base: how well the fact was reached before any merging."""
    fit: float | None = None
    """ρ: the fraction of its residual that the solved weights realise."""
    finite: bool = True

    @model_validator(mode="before")
    @classmethod
    def _mark_nonfinite(cls, data: Any) -> Any:
        if isinstance(data, dict):
            wild = [name for name in ("loss", "fit") if isinstance(data.get(name), float) and not math.isfinite(data[name])]
            if wild:
                return {**data, **dict.fromkeys(wild), "finite": False}
        return data


class ProbeScores(_Part):
    """Generalization and specificity over one choice of probes: the held-out ones, or all of them as the papers do."""

    generalization: Mean = Mean()
    """Share of paraphrases answered with every token of target_new, teacher forced."""
    generalization_success: Mean = Mean()
    """CounterFact's PS: target_new likelier than target_true after the paraphrase."""
    generalization_magnitude: Mean = Mean()
    """CounterFact's PM."""
    specificity: Mean = Mean()
    """Agreement with the base: share of answer tokens of neighbours whose argmax is the base's."""
    specificity_truth: Mean = Mean()
    """Accuracy against the truth: share of the true answer's tokens that are the candidate's argmax."""
    specificity_truth_base: Mean = Mean()
    """The same of the untouched base: the ceiling to read `specificity_truth` against."""
    specificity_success: Mean = Mean()
    """CounterFact's NS: the true answer likelier than target_new after the neighbour."""
    specificity_magnitude: Mean = Mean()
    """CounterFact's NM."""
    score: float | None = None
    """Harmonic mean of strict efficacy, generalization and agreement with the base."""
    counterfact_score: float | None = None
    """CounterFact's score: harmonic mean of ES, PS and NS."""


class EditRow(_Part):
    """One edit of the batch."""

    id: str
    already_known: bool
    """The base itself answers target_new, every token of it."""
    efficacy: bool
    """Every token of target_new is the argmax after the edit's prompt, teacher forced."""
    token_accuracy: float
    """Share of the tokens of target_new that are the argmax (zsRE's and EasyEdit's accuracy)."""
    success: bool | None
    """CounterFact's ES: target_new likelier than target_true. None without a target_true."""
    magnitude: float | None
    """CounterFact's EM: P(target_new) − P(target_true), geometric means over tokens."""
    greedy: bool
    """The greedy answer with its natural stop begins with target_new."""
    loss: float | None
    """Negative log-likelihood of target_new in nats per token; None if not finite."""
    answer_before: str
    answer: str
    held_out: ProbeScores
    paper: ProbeScores
    diagnosis: Diagnosis | None = None
    broken: tuple[str, ...] = ()
    """Older edits that share its pair and whose target_new is no longer the answer."""


class Retention(_Part):
    """Efficacy on a sample of edits that were live before this batch."""

    efficacy: Mean = Mean()
    previous: float | None = None
    """Of the previous version, on its own sample."""
    forgotten: tuple[str, ...] = ()
    """Sampled edits whose target_new is no longer the answer."""


class Locality(_Part):
    """Distance from the base on a fixed probe: texts that no edit is about."""

    kl: float | None = None
    """Mean KL(base ‖ candidate) in nats over token positions."""
    agreement: float | None = None
    """Share of positions with the base's argmax."""
    positions: int = 0


COARSE = 0.1
"""`Casting.error` above which people are warned: a tenth of the change is noise then."""


class Casting(_Part):
    """What is left of a change when a weight of few bits takes it: edits are solved in float64, and W0 + Δ is cast once."""

    error: float
    """‖cast(W0 + Δ) − W0 − Δ‖ / ‖Δ‖, Frobenius: 0 is all of it, 1 as much noise as change."""
    lost: float
    """Share of the entries of Δ that are not zero and leave W0 as it was."""
    norm: float
    """‖Δ‖."""
    entries: int
    """Entries of Δ that are not zero."""

    @classmethod
    def over(cls, parts: Sequence[Self]) -> Self | None:
        """Of several weights as if they were one; None of none."""
        norm, entries = math.hypot(*(part.norm for part in parts)), sum(part.entries for part in parts)
        if not norm:
            return None
        error = math.hypot(*(part.error * part.norm for part in parts)) / norm
        return cls(error=error, lost=sum(part.lost * part.entries for part in parts) / entries, norm=norm, entries=entries)


class WeightNorms(_Part):
    """How far one edited weight has moved from the base. Infinite or undefined values are None."""

    weight: str
    """Parameter name."""
    mean_abs_ratio: float | None
    """mean |W| / mean |W0|, the growth that the lifelong-editing papers plot."""
    frobenius_ratio: float | None
    """‖W‖_F / ‖W0‖_F."""
    spectral: float | None
    """Largest singular value of ΔW."""
    spectral_ratio: float | None
    """The same over the largest singular value of W0."""
    condition: float | None = None
    """Condition number of the matrix that was solved with, where the editor reports one."""
    casting: Casting | None = None
    """Of a weight with fewer bits than the stored Δ, which is float32; None of others."""

    @model_serializer(mode="wrap")
    def _omit_none(self, spell: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Reports on float32 weights are spelled as they were before casting was measured."""
        content: dict[str, Any] = spell(self)
        return content if self.casting else {name: value for name, value in content.items() if name != "casting"}

    @property
    def numbers(self) -> dict[str, float | None]:
        """Under flat names, for a tracking server."""
        names = ("mean_abs_ratio", "frobenius_ratio", "spectral", "spectral_ratio", "condition")
        cast = {"cast_error": self.casting.error, "cast_lost": self.casting.lost} if self.casting else {}
        return {**{name: getattr(self, name) for name in names}, **cast}


class WithdrawnRow(_Part):
    """One edit that was taken back."""

    id: str
    consistent: bool
    """Over the tokens of its target_new, teacher forced, the argmax is the base's."""
    greedy: bool
    """The greedy answer is the base's."""
    answer_base: str
    answer: str


class Exactness(_Part):
    """How far weights are from those of the live pairs added up from nothing."""

    relative: float
    """Largest difference of an entry of ΔW over the largest entry of the rebuilt ΔW, in float64; of the worst weight."""
    identical: bool
    """The artifacts are the same to the bit."""


class Withdrawal(_Part):
    """The two truths about edits that were taken back: the weights are as if they had never come (*exactness*); what the model then
    answers may still differ from the base, since other edits act on the same keys (*consistency*)."""

    rows: tuple[WithdrawnRow, ...]
    consistency: Mean
    """Share of the withdrawn prompts that answer as the base again, teacher forced."""
    greedy_consistency: Mean
    exactness: Exactness | None = None
    """None where it was not asked for: it costs reading every live pair."""


class Report(_Part):
    """All measurements of one candidate. Stored as an object, named by the commit, shown by `errata show`."""

    format: Literal[1] = 1
    seed: int
    """Seed of the held-out split."""
    live: int | None = None
    """Edits that are live with this candidate."""
    rows: tuple[EditRow, ...]
    """In the order of the batch."""
    already_known: int
    efficacy: Mean
    token_accuracy: Mean
    success: Mean
    magnitude: Mean
    greedy: Mean
    held_out: ProbeScores
    """On probes that no method may train on: one paraphrase and half of the neighbours per edit."""
    paper: ProbeScores
    """On all probes: the published protocol."""
    retention: Retention
    locality: Locality
    norms: tuple[WeightNorms, ...]
    nonfinite: int = 0
    """Prompts whose logits under the candidate hold a value that is not finite; they count as wrong."""
    fault: str | None = None
    """Why the candidate could not be measured at all."""
    withdrawal: Withdrawal | None = None
    """Of a candidate from which edits were taken back."""

    @property
    def casting(self) -> Casting | None:
        """Of all edited weights together; None where they lose nothing."""
        return Casting.over([norms.casting for norms in self.norms if norms.casting])

    def to_bytes(self) -> bytes:
        # Left out where there is none, so that the report of a batch is spelled as it was before withdrawals were known.
        return canonical_json(self.model_dump(mode="json", exclude=None if self.withdrawal else {"withdrawal"}))

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Raises FormatError: not a report, or one of a newer format."""
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "report"
            raise FormatError(f"report: expected format 1 of this version of Errata, found a mismatch at {where}: {first['msg']}") from None

    def metrics(self) -> dict[str, float]:
        """The measured numbers under flat names, for a tracking server."""
        named: dict[str, float | None] = {
            "efficacy": self.efficacy.value,
            "token_accuracy": self.token_accuracy.value,
            "success": self.success.value,
            "magnitude": self.magnitude.value,
            "greedy": self.greedy.value,
            "already_known": self.already_known,
            "retention": self.retention.efficacy.value,
            "locality.kl": self.locality.kl,
            "locality.agreement": self.locality.agreement,
            "nonfinite": self.nonfinite,
        }
        if self.withdrawal:
            named["withdrawn.consistency"] = self.withdrawal.consistency.value
            named["withdrawn.greedy_consistency"] = self.withdrawal.greedy_consistency.value
            named["withdrawn.exactness"] = self.withdrawal.exactness.relative if self.withdrawal.exactness else None
        for label, scores in (("held_out", self.held_out), ("paper", self.paper)):
            for name, value in scores:
                named[f"{label}.{name}"] = value.value if isinstance(value, Mean) else value
        for norms in self.norms:
            named |= {f"norms.{norms.weight}.{name}": value for name, value in norms.numbers.items()}
        if casting := self.casting:
            named |= {"cast_error": casting.error, "cast_lost": casting.lost}
        return {name: float(value) for name, value in named.items() if value is not None}
