"""Taking back: edits that are withdrawn, and the champion that becomes an earlier state again."""

import re
import time
from typing import Any

from errata.candidates import build_candidate, load_artifacts
from errata.errors import EditorError, InputError, KeyMissingError
from errata.evaluation.consistency import measure_consistency
from errata.exactness import measure_exactness
from errata.gate import decide
from errata.manifests import Manifest
from errata.report import Report
from errata.rounds import Round
from errata.settings import Settings
from errata.summary import RollbackSummary, WithdrawalSummary
from registry.events import Commit, RejectionCommit, ReturnCommit, RollbackCommit, WithdrawalCommit, read_commit, write_commit
from registry.fold import list_written
from registry.keeping import open_archived
from registry.orders import WithdrawalOrder
from registry.prepared import forget_pairs
from registry.rows import Outcome
from registry.stream import Stream
from registry.undoing import choose_live, choose_target, compare_live
from tasks._session import load_model, open_named, read_manifest
from tasks._task import stage
from tasks._tiers import carry_above
from tasks.committing import commit_once, describe_live, describe_writer, is_promoted, move_pairs
from tasks.editing import digest_preparation, find_older, plan_changes, prepare_regrouped, refer
from tasks.evaluating import measure_candidate
from tasks.projecting import open_registry

_VERSION = re.compile(r"v(\d{1,8})")


@stage
def order_withdrawal(stream: str, edits: list[str], reason: str) -> str:
    """The live edits that are meant, as a stored order.

    Raises:
        InputError: one of them is unknown, or not live.
    """
    _, opened = open_named(stream)
    rows, head = choose_live(opened, edits), opened.head
    occurrences = tuple(row.occurrence for row in sorted(rows, key=lambda row: (row.seq, row.position)))
    order = WithdrawalOrder(seq=head.seq + 1, parent=head.digest, manifest=head.manifest, occurrences=occurrences, reason=reason)
    return order.store(opened.objects)


@stage
def subtract_pairs(stream: str, order: str) -> Round:
    """The head's state without the pairs of the ordered edits, solved: a candidate that nothing points to yet. Edits that shared a pair
    with one of them get another, which is prepared here.

    Reads the pairs objects of these edits, the snapshot and the change lists since; how many edits are live does not matter.
    """
    settings, opened = open_named(stream)
    model = load_model(settings, opened)
    begun = time.perf_counter()
    work = WithdrawalOrder.load(opened.objects, order)
    leaving = [opened.resolve_edit(name) for name in work.occurrences]
    changed = plan_changes(opened, model, [], leaving)
    _, made = prepare_regrouped(opened, model, changed, {}, work.manifest)
    if made.refused:
        raise EditorError(
            "; ".join(f"{edit_id}, which shares its pair with a withdrawn edit: {why}" for edit_id, why in made.refused.items())
        )
    head, every = read_manifest(opened, work.manifest), settings.apply.snapshot_every
    above = carry_above(settings, opened, head, (), leaving)
    add = list(dict.fromkeys(made.refs[edit.edit_id] for edit in changed.edits))
    candidate = build_candidate(opened.objects, model.editor, head, add=add, remove=changed.remove, snapshot_every=every)
    return Round(
        rest=(),
        manifest=opened.objects.put(above.crown(candidate.manifest).to_bytes()),
        placed=dict(made.refs),
        older=find_older(opened, leaving, changed, ()),
        fits=dict(candidate.fits),
        told=above.told,
        seconds={"merge": time.perf_counter() - begun},
    )


@stage
def judge_withdrawal(stream: str, order: str, candidate: Round, check: bool) -> Round:
    """The candidate with its report and the gate's decision: retention of the other edits, locality, norms; what the withdrawn prompts
    answer now; with `check` also how far the weights are from a rebuild, which reads the pairs of all live edits."""
    settings, opened = open_named(stream)
    model = load_model(settings, opened)
    begun = time.perf_counter()
    names = WithdrawalOrder.load(opened.objects, order).occurrences
    leaving = set(names)
    manifest = Manifest.from_bytes(opened.objects.get(candidate.manifest))
    sample = opened.index.sample_live(settings.evaluate.retention_sample, settings.evaluate.seed)
    regrouped = [opened.resolve_edit(edit_id) for edit_id in candidate.placed]
    sample += [row for row in regrouped if row not in sample]
    retained = [opened.read_record(row).edit for row in sample if row.occurrence not in leaving]
    artifacts = load_artifacts(opened.objects, manifest)
    report = measure_candidate(settings, opened, model, artifacts, [], retained)
    measured = None
    if report.fault is None:
        withdrawn = [opened.read_record(opened.resolve_edit(name)).edit for name in names]
        measured = measure_consistency(model.base, artifacts, withdrawn, settings.evaluate)
        if check:
            staying = (row for row in opened.index.find_rows("live") if row.occurrence not in leaving)
            live = dict.fromkeys(candidate.placed.get(row.id) or refer(row) for row in list_written(staying))
            exactness = measure_exactness(opened.objects, model.editor, manifest, list(live))
            measured = measured.model_copy(update={"exactness": exactness})
    live_after = opened.index.counts().get("live", 0) - len(names)
    report = report.model_copy(update={"live": live_after, "withdrawal": measured})
    seconds = {**candidate.seconds, "evaluate": time.perf_counter() - begun}
    decision = decide(report, [], settings.gate)
    return candidate.model_copy(update={"report": opened.objects.put(report.to_bytes()), "decision": decision, "seconds": seconds})


@stage
def commit_withdrawal(stream: str, order: str, judged: Round, dry_run: bool = False) -> WithdrawalSummary:
    """Make the withdrawal a commit, or its refusal.

    Raises:
        ConflictError: another writer committed since the order was made.
    """
    settings, opened = open_named(stream)
    work = WithdrawalOrder.load(opened.objects, order)
    decision = judged.decision
    assert decision is not None and judged.report is not None, "a withdrawal is judged before it is committed"
    accepted = decision.verdict == "accept"
    reason = f"commit {work.seq}: {work.reason}" if work.reason else f"commit {work.seq}"
    outcomes: list[Outcome] = []
    if accepted:
        befores = [(name, describe_live(judged.older.get(name))) for name in work.occurrences]
        outcomes = [Outcome(outcome="withdrawn", occurrence=name, reason=reason, before=before) for name, before in befores]
        outcomes += move_pairs(judged.placed, judged.older)
    named = f"The withdrawal of {', '.join(work.occurrences[:10])}{' …' if len(work.occurrences) > 10 else ''} was refused."
    fields = {
        "seq": work.seq,
        "parent": work.parent,
        "outcomes": _store_outcomes(opened, outcomes),
        "report": judged.report,
        "decision": decision.verdict,
        "reasons": (*judged.told, *decision.reasons) if accepted else (named, *decision.reasons),
        "seconds": {name: round(value, 3) for name, value in judged.seconds.items()},
        **describe_writer(settings),
    }
    draft: Commit = RejectionCommit(manifest=work.manifest, **fields)
    if accepted:
        pairs = tuple(dict.fromkeys(ref.pairs for ref in judged.placed.values()))
        draft = WithdrawalCommit(manifest=judged.manifest, pairs=pairs, promoted=is_promoted(settings, opened), **fields)
    if not dry_run:
        commit_once(opened, draft)
        if judged.placed:
            scope = digest_preparation(load_model(settings, opened), work.manifest)
            forget_pairs(opened, scope, sorted({ref.pairs for ref in judged.placed.values()}))
    report = Report.from_bytes(opened.objects.get(judged.report))
    return WithdrawalSummary(
        stream=opened.name,
        commit=None if dry_run else draft.seq,
        decision=draft.decision,
        withdrawn=work.occurrences,
        live=report.live or 0,
        measured=report.withdrawal,
        metrics=report.metrics(),
        reasons=draft.reasons,
        seconds=draft.seconds,
    )


@stage
def draft_rollback(stream: str, target: str, reason: str) -> str:
    """The commit that serves an earlier state again, stored and not yet made.

    Args:
        target: `12`, `head~1` or `v3`.

    Raises:
        UnknownNameError: no such commit or version.
        InputError: its state is served already.
        KeyMissingError: something that its manifest names is gone from the store.
    """
    settings, opened = open_named(stream)
    fields = draft_return(settings, opened, resolve_state(settings, opened, target), reason)
    return opened.objects.put(write_commit(RollbackCommit(decision="accept", **fields)))


def resolve_state(settings: Settings, stream: Stream, target: str) -> int:
    """The commit that `12`, `head~1` or `v3` means.

    Raises:
        UnknownNameError: no such commit or version.
    """
    version = _VERSION.fullmatch(target)
    return open_registry(settings).read_version(stream.name, int(version[1])).commit if version else stream.resolve_commit(target)


def draft_return(settings: Settings, stream: Stream, seq: int, reason: str) -> dict[str, Any]:
    """The fields of a commit that serves the state of commit `seq` again.

    Raises:
        InputError: its state is served already.
        KeyMissingError: something that its manifest names is gone from the store.
    """
    commit = choose_target(stream, seq)
    head, manifest = stream.head, read_manifest(stream, commit.manifest)
    _require_objects(stream, commit.seq, manifest)
    return {
        "seq": head.seq + 1,
        "parent": head.digest,
        "target": commit.seq,
        "outcomes": _store_outcomes(stream, compare_live(stream, commit.seq)),
        "manifest": commit.manifest,
        "report": commit.report,
        "base": manifest.base if manifest.base != head.base else None,
        "profile": manifest.profile if manifest.profile != head.profile else None,
        "reasons": (reason,) if reason else (),
        **describe_writer(settings),
    }


@stage
def commit_rollback(stream: str, draft: str, dry_run: bool = False) -> RollbackSummary:
    """Make a drafted rollback the newest commit.

    Raises:
        ConflictError: another writer committed since it was drafted.
    """
    _, opened = open_named(stream)
    commit = read_commit(opened.objects.get(draft), "drafted rollback")
    assert isinstance(commit, ReturnCommit), f"expected the draft of a rollback, found {commit.name}"
    if not dry_run:
        commit_once(opened, commit)
    outcomes = opened.read_outcomes(commit)
    left = tuple(outcome.occurrence or "" for outcome in outcomes if outcome.outcome != "live")
    back = tuple(outcome.occurrence or "" for outcome in outcomes if outcome.outcome == "live" and not _stays(outcome))
    return RollbackSummary(
        stream=opened.name,
        commit=None if dry_run else commit.seq,
        target=commit.target,
        left=left,
        back=back,
        live=opened.index.counts().get("live", 0) + (len(back) - len(left) if dry_run else 0),
    )


def _store_outcomes(stream: Stream, outcomes: list[Outcome]) -> str:
    return stream.objects.put_rows(outcome.model_dump(mode="json", exclude_none=True) for outcome in outcomes)


def _stays(outcome: Outcome) -> bool:
    """Whether an edit was live all along, and only gets back the pair it had."""
    return outcome.before is not None and outcome.before.status == "live"


def _require_objects(stream: Stream, seq: int, manifest: Manifest) -> None:
    """Whoever builds on a manifest reads its artifact and its state; better to learn now than then that they are gone."""
    for layer in manifest.layers:
        for digest in (*layer.stored, *layer.state_stored):
            if not stream.objects.exists(digest):
                if seq in open_archived(stream.storage, stream.name):
                    raise InputError(f"rollback: expected weights of commit {seq}, found it archived; `errata rebuild --to {seq}` first")
                raise KeyMissingError(f"rollback: expected commit {seq} with everything its manifest names, found no object {digest}")
