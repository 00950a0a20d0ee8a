"""Live edits to another base, or to another site: prepared anew, summed from nothing, judged and committed as any batch is.

The head stays as it is until the commit: batches go on meanwhile, and the champion serves. A batch that lands first is a conflict; the
edits are ordered again then, and only what it brought is prepared.
"""

import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from errata.candidates import PreparedBatch, StoredPair, build_anew, load_artifacts, name_pair, repack_pairs
from errata.editors.base import list_units
from errata.edits import Edit, canonical_json
from errata.errors import InputError
from errata.evaluation.answered import find_answered
from errata.footprint import Estimate
from errata.gate import decide, digest_judgement
from errata.grouping import Regrouping, regroup
from errata.manifests import Manifest
from errata.plan import count_weights
from errata.report import Diagnosis, Report
from errata.rounds import Prepared, PreparedRecord, Round
from errata.settings import Settings
from errata.summary import RebaseSummary
from registry.events import Commit, RebaseCommit, RejectionCommit
from registry.fold import split_occurrence
from registry.orders import Held, RebaseOrder
from registry.prepared import forget_pairs, recall_pairs
from registry.rows import Outcome, Standing
from registry.stream import Stream
from tasks._progress import show_progress
from tasks._session import Model, load_model, load_named, open_named, plan_model, read_manifest
from tasks._task import stage
from tasks._tiers import Coming, move_above
from tasks.committing import commit_once, describe_writer, is_promoted, shorten_reasons
from tasks.editing import digest_preparation, prepare_regrouped, warn_of_overshoot
from tasks.evaluating import measure_candidate

_TIMED = 4
"""Edits prepared to learn how long one takes; they are kept."""


class _Work(NamedTuple):
    """An order with what it speaks of."""

    order: RebaseOrder
    model: Model
    """Where the edits go."""
    edits: list[Edit]
    """Those that are carried over, in order of arrival."""


@stage
def order_rebase(stream: str, base: str, profile: str, drop_answered: bool) -> str:
    """All live edits, and which of them the base answers without being edited, as a stored order.

    Args:
        base, profile: digests of what the root holds.

    Raises:
        InputError: the stream is there already.
    """
    settings, opened = open_named(stream)
    return _draft_order(settings, opened, base, profile, drop_answered).store(opened.objects)


@stage
def prepare_rebase(stream: str, order: str) -> Prepared:
    """Pairs of all edits that are carried over, stored. Pairs of an interrupted run are used again."""
    settings, opened = open_named(stream)
    begun = time.perf_counter()
    work = _open_work(settings, opened, RebaseOrder.load(opened.objects, order))
    known, made = _prepare(opened, work, work.edits, {})
    record = PreparedRecord(pairs=known, refused=dict(made.refused))
    ready = tuple(edit.edit_id for edit in work.edits if edit.edit_id in made.refs)
    return Prepared(record=opened.objects.put(canonical_json(record)), ready=ready, seconds=time.perf_counter() - begun)


@stage
def sum_pairs(stream: str, order: str, prepared: Prepared, rest: Sequence[str]) -> Round:
    """The pairs of the edits in `rest`, summed from nothing and solved: a candidate that nothing points to yet."""
    settings, opened = open_named(stream)
    begun = time.perf_counter()
    work = _open_work(settings, opened, RebaseOrder.load(opened.objects, order))
    record = PreparedRecord.model_validate_json(opened.objects.get(prepared.record))
    chosen = set(rest)
    _, made = _prepare(opened, work, [edit for edit in work.edits if edit.edit_id in chosen], record.pairs)
    places = repack_pairs(opened.objects, list(made.refs.values()))
    model, refs = work.model, list(dict.fromkeys(places.values()))
    candidate = build_anew(opened.objects, model.editor, work.order.base, work.order.profile, refs)
    warn_of_overshoot(candidate.fits)
    leaving = [opened.resolve_edit(held.occurrence) for held in work.order.live]
    names = {row.id: row.occurrence for row in leaving}
    come = [Coming(names[edit.edit_id], edit, written=True) for edit in work.edits if edit.edit_id in chosen]
    above = move_above(settings, opened, read_manifest(opened, work.order.manifest), work.order.base, come, leaving)
    return Round(
        rest=tuple(rest),
        manifest=opened.objects.put(above.crown(candidate.manifest).to_bytes()),
        placed={edit_id: places[made.refs[edit_id]] for edit_id in rest},
        losses=dict(made.losses),
        fits=dict(candidate.fits),
        told=above.told,
        seconds={"merge": time.perf_counter() - begun},
    )


@stage
def judge_rebase(stream: str, order: str, candidate: Round, earlier: Sequence[Round]) -> Round:
    """The round with its report and the gate's decision. Every edit is asked, as in a batch; a fault of the whole refuses the whole,
    since half a stream is no stream."""
    settings, opened = open_named(stream)
    begun = time.perf_counter()
    work = _open_work(settings, opened, RebaseOrder.load(opened.objects, order))
    chosen = set(candidate.rest)
    sample = {row.id for row in opened.index.sample_live(settings.evaluate.retention_sample, settings.evaluate.seed)}
    report = measure_candidate(
        settings,
        opened,
        work.model,
        load_artifacts(opened.objects, Manifest.from_bytes(opened.objects.get(candidate.manifest))),
        [edit for edit in work.edits if edit.edit_id in chosen],
        [edit for edit in work.edits if edit.edit_id in chosen & sample],
        diagnoses={edit_id: Diagnosis(loss=candidate.losses[edit_id]) for edit_id in candidate.rest},
        fits=candidate.fits,
    )
    report = report.model_copy(update={"live": len(candidate.rest)})
    decision = decide(report, [item.decision for item in earlier if item.decision], settings.gate)
    if decision.defer:
        rest = (*decision.rest, *decision.defer)
        decision = decision.model_copy(update={"verdict": "reject", "rest": rest, "defer": ()})
    seconds = {**candidate.seconds, "evaluate": time.perf_counter() - begun}
    return candidate.model_copy(update={"report": opened.objects.put(report.to_bytes()), "decision": decision, "seconds": seconds})


@stage
def commit_rebase(stream: str, order: str, prepared: Prepared, rounds: Sequence[Round], dry_run: bool = False) -> RebaseSummary:
    """Make the rebase a commit, or its refusal.

    Raises:
        ConflictError: another writer committed since the order was made.
    """
    settings, opened = open_named(stream)
    work, last = RebaseOrder.load(opened.objects, order), rounds[-1]
    record = PreparedRecord.model_validate_json(opened.objects.get(prepared.record))
    decisions = [item.decision for item in rounds if item.decision]
    assert last.report is not None and decisions, "a rebase is judged before it is committed"
    accepted = decisions[-1].verdict == "accept"
    faults = dict(record.refused) | {fault.id: fault.reason for fault in (fault for item in decisions for fault in item.drop)}
    outcomes = _conclude(settings, work, last, faults) if accepted else []
    named = f"The rebase to base {work.base[:12]}, profile {work.profile[:12]}, was refused."
    seconds = {"prepare": prepared.seconds}
    for name in ("merge", "evaluate"):
        seconds[name] = sum(item.seconds.get(name, 0.0) for item in rounds)
    fields = {
        "seq": work.seq,
        "parent": work.parent,
        "outcomes": opened.objects.put_rows(outcome.model_dump(mode="json", exclude_none=True) for outcome in outcomes),
        "report": last.report,
        "decision": decisions[-1].verdict,
        "reasons": shorten_reasons((*(last.told if accepted else (named,)), *decisions[-1].reasons)),
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        **describe_writer(settings),
    }
    draft: Commit = RejectionCommit(manifest=work.manifest, **fields)
    if accepted:
        model = load_named(settings, opened.storage, work.base, work.profile, work.editor)
        draft = RebaseCommit(
            base=model.ref.named,
            profile=work.profile,
            manifest=last.manifest,
            pairs=tuple(dict.fromkeys(ref.pairs for ref in last.placed.values())),
            promoted=is_promoted(settings, opened),
            **fields,
        )
    if not dry_run:
        commit_once(opened, draft)
        if accepted:
            forget_pairs(opened, digest_preparation(model, None), sorted({stored.ref.pairs for stored in record.pairs.values()}))
    report = Report.from_bytes(opened.objects.get(last.report))
    return RebaseSummary(
        stream=opened.name,
        commit=None if dry_run else draft.seq,
        decision=draft.decision,
        base=work.base,
        profile=work.profile,
        live=len(last.rest) if accepted else len(work.live),
        answered=work.answered,
        withdrawn=tuple(outcome.occurrence or "" for outcome in outcomes if outcome.outcome == "withdrawn"),
        quarantined={outcome.occurrence or "": outcome.reason or "" for outcome in outcomes if outcome.outcome == "quarantined"},
        rounds=len(rounds),
        metrics=report.metrics(),
        reasons=draft.reasons,
        seconds=draft.seconds,
    )


def estimate_rebase(settings: Settings, stream: Stream, base: str, profile: str, drop_answered: bool) -> Estimate:
    """What a rebase would take: edits and pairs are counted, a few that are missing are prepared and timed.

    Raises:
        InputError: the stream is there already.
    """
    work = _open_work(settings, stream, _draft_order(settings, stream, base, profile, drop_answered))
    plan = plan_model(settings, work.model, len(work.edits))
    by_id = {edit.edit_id: edit for edit in work.edits}
    names = recall_pairs(stream, digest_preparation(work.model, None)).keys()
    changed = regroup(work.model.editor, work.model.base, work.edits, [], [])
    units = list_units(by_id, changed.groups)
    missing = [unit for unit in units if name_pair([by_id[edit_id] for edit_id in unit]) not in names]
    timed, seconds = [unit for unit in missing if len(unit) == 1][:_TIMED], None
    if timed:
        begun = time.perf_counter()
        chosen = tuple(by_id[edit_id] for unit in timed for edit_id in unit)
        prepare_regrouped(stream, work.model, Regrouping(chosen, (), ()), {}, None)
        seconds = round((time.perf_counter() - begun) / len(timed) * (len(missing) - len(timed)), 1)
    return Estimate(
        edits=len(work.edits),
        answered=work.order.answered,
        pairs=len(units),
        prepared=len(units) - len(missing) + len(timed),
        seconds=seconds,
        base_bytes=count_weights(work.model.base.model),
        sum_bytes=sum(line.bytes for line in plan.lines if line.phase == "solve"),
    )


def _draft_order(settings: Settings, stream: Stream, base: str, profile: str, drop_answered: bool) -> RebaseOrder:
    head = stream.head
    if (head.base, head.profile) == (base, profile):
        raise InputError(f"rebase: expected another base or profile than stream {stream.name!r} is on, found base {base[:12]} and the same")
    model = load_named(settings, stream.storage, base, profile, head.editors[0])
    if head.base == base and load_model(settings, stream).profile.prepare == model.profile.prepare:
        raise InputError(
            f"rebase: expected another prepare part than that of stream {stream.name!r}, found profile {profile[:12]}, which solves the "
            f"same pairs otherwise: `errata adopt {stream.name} --profile {profile[:12]}` does that without preparing any"
        )
    rows = list(stream.index.find_rows("live"))
    edits = list(stream.read_edits(rows))
    with show_progress("asking the base") as on_progress:
        told = find_answered(model.base, edits, settings.evaluate.batch_tokens, lambda _stage, done, total: on_progress(done, total))
    answered = {edit.edit_id for edit in told}
    return RebaseOrder(
        seq=head.seq + 1,
        parent=head.digest,
        manifest=head.manifest,
        base=base,
        profile=profile,
        editor=head.editors[0],
        live=tuple(Held(occurrence=row.occurrence, pairs=row.pairs, row=row.row) for row in rows),
        answered=tuple(row.occurrence for row in rows if row.id in answered),
        drop_answered=drop_answered,
    )


def _open_work(settings: Settings, stream: Stream, order: RebaseOrder) -> _Work:
    model = load_named(settings, stream.storage, order.base, order.profile, order.editor)
    dropped = set(order.answered) if order.drop_answered else set[str]()
    rows = [stream.resolve_edit(held.occurrence) for held in order.live if held.occurrence not in dropped]
    return _Work(order, model, list(stream.read_edits(rows)))


def _prepare(
    stream: Stream, work: _Work, edits: Sequence[Edit], known: Mapping[str, StoredPair]
) -> tuple[dict[str, StoredPair], PreparedBatch]:
    return prepare_regrouped(stream, work.model, regroup(work.model.editor, work.model.base, edits, [], []), known, None)


def _conclude(settings: Settings, work: RebaseOrder, last: Round, faults: Mapping[str, str]) -> list[Outcome]:
    """What becomes of every live edit."""
    reason = f"commit {work.seq}: base {work.base[:12]} answers it already"
    under = digest_judgement(settings.gate, work.profile)
    dropped = set(work.answered) if work.drop_answered else set[str]()
    outcomes = []
    for held in work.live:
        before = Standing(status="live", pairs=held.pairs, row=held.row)
        edit_id, _ = split_occurrence(held.occurrence)
        if held.occurrence in dropped:
            outcomes.append(Outcome(outcome="withdrawn", occurrence=held.occurrence, reason=reason, before=before))
        elif edit_id in last.placed:
            ref = last.placed[edit_id]
            outcomes.append(Outcome(outcome="live", occurrence=held.occurrence, pairs=ref.pairs, row=ref.row, before=before))
        else:
            said = f"commit {work.seq}: {faults[edit_id]}"
            outcomes.append(Outcome(outcome="quarantined", occurrence=held.occurrence, reason=said, under=under, before=before))
    return outcomes
