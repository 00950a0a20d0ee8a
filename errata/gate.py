"""The gate: from a report alone, whether a candidate may become a version (design §3). Pure; a refusal is a result, not an error.

A fault of one edit takes that edit out, a fault of the batch halves it, and the rest is merged again from the head and measured again:

    round 1   decide(report, [], settings)          → retry: drop e7 (did not take), the other 19 again
    round 2   decide(report, [first], settings)     → retry: locality exceeded, the first 9 again, 10 deferred
    round 3   decide(report, [first, second], …)    → accept
"""

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

from errata.edits import canonical_json, digest_of
from errata.report import EditRow, Mean, Report
from errata.settings import GateSettings


class EditFault(BaseModel):
    """An edit that is itself to blame, and why. It is quarantined."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    reason: str


class Decision(BaseModel):
    """What becomes of the edits of one round. Each of them is in exactly one of `drop`, `defer` and `rest`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    round: int
    """Counted from 1."""
    verdict: Literal["accept", "retry", "reject"]
    drop: tuple[EditFault, ...] = ()
    """To be quarantined."""
    defer: tuple[str, ...] = ()
    """Not judged: they stay in the inbox for the next batch."""
    rest: tuple[str, ...] = ()
    """All others in the order of the batch: accepted, tried again or rejected, as the verdict says."""
    reasons: tuple[str, ...] = ()
    """Sentences with the measured value and the threshold, most telling first."""


class Settled(BaseModel):
    """The end of one edit of a batch."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    outcome: Literal["accepted", "quarantined", "rejected", "deferred"]
    reason: str = ""


def decide(report: Report, history: Sequence[Decision], settings: GateSettings) -> Decision:
    """Judge one round.

    Edits at fault themselves go first and the others are tried again, since one bad edit can look like a bad batch. A fault of the
    batch as a whole is halved; a single edit with such a fault is to blame for it. The last round accepts or rejects.

    Args:
        report: the measured candidate; its rows are the edits of this round, in the order of the batch. A withdrawal has none: it is
            accepted or rejected as a whole.
        history: the decisions of the earlier rounds of this batch, oldest first.

    Raises:
        ValueError: the report is not about the edits that the last decision left.
    """
    ids = tuple(row.id for row in report.rows)
    if history and (history[-1].verdict != "retry" or history[-1].rest != ids):
        raise ValueError(
            f"expected a report on the {len(history[-1].rest)} edits that round {len(history)} left to try again, found {len(ids)}"
        )
    batch_faults = find_batch_faults(report, settings)
    drop = find_edit_faults(report, settings)
    if not drop and not batch_faults:
        return Decision(round=len(history) + 1, verdict="accept", rest=ids, reasons=(_praise(report),))
    if not drop and len(ids) == 1:
        drop = (EditFault(id=ids[0], reason=batch_faults[0]),)
    dropped = {fault.id for fault in drop}
    rest = tuple(name for name in ids if name not in dropped)
    reasons = (*(f"{fault.id}: {fault.reason}" for fault in drop), *(fault for fault in batch_faults if len(ids) != 1))
    last = len(history) + 1 >= settings.max_rounds
    if not rest or last:
        if rest:
            reasons = (*reasons, f"This was round {len(history) + 1} of at most {settings.max_rounds}: the rest is rejected.")
        return Decision(round=len(history) + 1, verdict="reject", drop=drop, rest=rest, reasons=reasons)
    half = len(rest) if drop else len(rest) // 2
    return Decision(round=len(history) + 1, verdict="retry", drop=drop, defer=rest[half:], rest=rest[:half], reasons=reasons)


def decide_whole(report: Report, settings: GateSettings) -> Decision:
    """Judge a candidate with the edits that were live before it, none of which can be taken out.

    Args:
        report: its rows are a sample of them. Whether they still take is retention, which has budgets of its own.
    """
    faults = find_batch_faults(report.model_copy(update={"efficacy": Mean()}), settings)
    return Decision(round=1, verdict="reject" if faults else "accept", reasons=faults or (_praise(report),))


def settle(decisions: Sequence[Decision]) -> dict[str, Settled]:
    """Edit id → how it ended, over all rounds of a batch whose last decision accepts or rejects.

    Raises:
        ValueError: the last decision asks for another round, or there is none.
    """
    if not decisions or decisions[-1].verdict == "retry":
        raise ValueError(f"expected a batch whose last decision accepts or rejects, found {decisions[-1].verdict if decisions else 'none'}")
    settled: dict[str, Settled] = {}
    for decision in decisions:
        settled.update({fault.id: Settled(outcome="quarantined", reason=fault.reason) for fault in decision.drop})
        settled.update({name: Settled(outcome="deferred", reason=" ".join(decision.reasons)) for name in decision.defer})
    last = decisions[-1]
    if last.verdict == "accept":
        settled.update({name: Settled(outcome="accepted") for name in last.rest})
    else:
        settled.update({name: Settled(outcome="rejected", reason=" ".join(last.reasons)) for name in last.rest})
    return settled


def digest_judgement(settings: GateSettings, profile: str) -> str:
    """What edits are judged under: a quarantined edit comes again by itself once this changes.

    Args:
        profile: digest of the stream's profile.
    """
    return digest_of(canonical_json({"gate": settings.model_dump(mode="json"), "profile": profile}))[:16]


def find_edit_faults(report: Report, settings: GateSettings) -> tuple[EditFault, ...]:
    """The edits that are to blame themselves.

    Where logits are not finite, or most of the batch did not take, a failing edit says nothing about itself: only its own preparation
    is judged then, and the batch as a whole by `find_batch_faults`.
    """
    collective = _is_broken(report) or _lacks_efficacy(report, settings)
    crowded = _falls_short(report.held_out.specificity, settings.min_specificity, settings.n_min)
    found = []
    for row in report.rows:
        reason = _blame_preparation(row, settings)
        if not reason and not collective:
            reason = _blame_outcome(row, crowded, settings)
        if reason:
            found.append(EditFault(id=row.id, reason=reason))
    return tuple(found)


def find_batch_faults(report: Report, settings: GateSettings) -> tuple[str, ...]:
    """Every budget that the candidate as a whole exceeds, as a sentence. Where it computes nothing finite, that is the only fault."""
    if report.fault:
        return (f"The candidate could not be measured: {report.fault}.",)
    broken = _find_nonfinite(report)
    if broken:
        return (f"The candidate computes values that are not finite ({broken}), expected none.",)
    found = []
    if _lacks_efficacy(report, settings):
        found.append(f"Efficacy is {_show(report.efficacy)}, expected at least {settings.min_efficacy:.3f}.")
    found += _judge_retention(report, settings)
    specificity = report.held_out.specificity
    if _falls_short(specificity, settings.min_specificity, settings.n_min):
        found.append(
            f"Agreement with the base on held-out neighbours is {_show(specificity)}, expected at least {settings.min_specificity:.3f}."
        )
    if report.locality.kl is not None and report.locality.kl > settings.max_locality_kl:
        found.append(
            f"KL(base ‖ candidate) on the fixed probe is {report.locality.kl:.3f} nats over {report.locality.positions} positions, "
            f"expected at most {settings.max_locality_kl:.3f}."
        )
    for norms in report.norms:
        if norms.mean_abs_ratio is not None and norms.mean_abs_ratio > settings.max_norm_ratio:
            most = f"expected at most {settings.max_norm_ratio:.2f} times"
            found.append(f"mean |W| of {norms.weight} is {norms.mean_abs_ratio:.2f} times the base's, {most}.")
    return tuple(found)


def _judge_retention(report: Report, settings: GateSettings) -> list[str]:
    """The absolute budget and the comparison with the previous version: many small losses must not each pass."""
    retained, previous = report.retention.efficacy, report.retention.previous
    found = []
    before = "" if previous is None else f" (previous version: {previous:.3f})"
    if _falls_short(retained, settings.min_retention, settings.n_min):
        found.append(f"Retention is {_show(retained)}, expected at least {settings.min_retention:.3f}{before}.")
    if previous is not None and _falls_short(retained, previous - settings.max_retention_drop, settings.n_min):
        found.append(
            f"Retention is {_show(retained)}, {previous - (retained.value or 0):.3f} below the previous version's {previous:.3f}; "
            f"expected a drop of at most {settings.max_retention_drop:.3f}."
        )
    return found


def _blame_preparation(row: EditRow, settings: GateSettings) -> str | None:
    if row.diagnosis is None:
        return None
    if not row.diagnosis.finite:
        return "Its preparation is not finite."
    loss = row.diagnosis.loss
    if loss is not None and loss > settings.max_z_loss:
        return f"Its z was not reached: {loss:.3f} nats per token of the target remain, expected at most {settings.max_z_loss:.3f}."
    return None


def _blame_outcome(row: EditRow, crowded: bool, settings: GateSettings) -> str | None:
    """Why this edit's own answers disqualify it. `crowded`: the batch lacks specificity too, so few neighbours suffice as evidence."""
    if not row.efficacy:
        loss = "" if row.loss is None else f", at {row.loss:.3f} nats per token"
        return f"It did not take: {row.token_accuracy:.3f} of its target's tokens are the model's choice{loss}, expected all."
    if row.broken:
        return f"It shares its pair with older edits of its subject that no longer take: {', '.join(row.broken)}."
    if _falls_short(row.paper.specificity, settings.min_own_specificity, 1 if crowded else settings.n_min):
        return (
            f"Its own neighbours are broken: agreement with the base is {_show(row.paper.specificity)}, "
            f"expected at least {settings.min_own_specificity:.3f}."
        )
    return None


def _lacks_efficacy(report: Report, settings: GateSettings) -> bool:
    return _falls_short(report.efficacy, settings.min_efficacy, settings.n_min)


def _falls_short(mean: Mean, least: float, n_min: int) -> bool:
    """Below the budget on enough prompts to say so. The slack absorbs rounding in sums of thirds and tenths."""
    return mean.value is not None and mean.prompts >= n_min and mean.value < least - 1e-9


def _is_broken(report: Report) -> bool:
    return report.fault is not None or _find_nonfinite(report) is not None


def _find_nonfinite(report: Report) -> str | None:
    if report.nonfinite:
        return f"logits of {report.nonfinite} prompts"
    if report.locality.positions and report.locality.kl is None:
        return "logits on the fixed probe"
    return next((f"weight {norms.weight}" for norms in report.norms if norms.mean_abs_ratio is None), None)


def _praise(report: Report) -> str:
    measured = (("efficacy", report.efficacy), ("specificity", report.held_out.specificity), ("retention", report.retention.efficacy))
    shown = [f"{name} {_show(mean)}" for name, mean in measured if mean.value is not None]
    return f"Within all budgets: {', '.join(shown)}." if shown else "Within all budgets."


def _show(mean: Mean) -> str:
    value = 0.0 if mean.value is None else mean.value
    return f"{value:.3f} over {mean.prompts} prompts"
