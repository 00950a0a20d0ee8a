"""A stream under another solve part: its sums solved anew, judged on a sample of its live edits, and committed as a calibration.

No pair is prepared, and none is read, unless the new spread needs cross moments that the sums do not have: then all live pairs are summed
anew, block by block, as a compaction does.
"""

import time

from errata.candidates import adopt_state, load_state, restart_state, store_restart
from errata.errors import InputError
from errata.manifests import replace_bottom
from errata.profiles import require_same_pairs
from errata.report import Report
from errata.rounds import Round
from errata.summary import AdoptionSummary
from registry.events import CalibrationCommit, Commit, RejectionCommit
from registry.fold import list_written
from registry.orders import AdoptionOrder
from tasks._session import load_model, load_named, open_named, read_manifest
from tasks._task import stage
from tasks.committing import commit_once, describe_writer, is_promoted, shorten_reasons
from tasks.editing import refer
from tasks.evaluating import judge_whole
from tasks.replaying import spell_live


@stage
def order_adoption(stream: str, profile: str) -> str:
    """What is to be solved anew, as a stored order.

    Args:
        profile: digest of a profile of the stream's base.

    Raises:
        InputError: the stream is under it already, or its pairs are not valid there.
    """
    settings, opened = open_named(stream)
    head = opened.head
    if head.profile == profile:
        raise InputError(f"adopt: expected another profile than stream {opened.name!r} is under, found {profile[:12]} again")
    target = load_named(settings, opened.storage, head.base, profile, head.editors[0])
    require_same_pairs(load_model(settings, opened).profile, target.profile)
    order = AdoptionOrder(seq=head.seq + 1, parent=head.digest, manifest=head.manifest, accepted=head.accepted, profile=profile)
    return order.store(opened.objects)


@stage
def solve_anew(stream: str, order: str) -> Round:
    """The head's sums under the new profile, solved: a candidate that nothing points to yet."""
    settings, opened = open_named(stream)
    begun = time.perf_counter()
    work = AdoptionOrder.load(opened.objects, order)
    head = read_manifest(opened, work.manifest)
    layer, blobs = head.layers[0], opened.objects
    before = load_named(settings, opened.storage, head.base, head.profile, layer.editor).editor
    editor = load_named(settings, opened.storage, head.base, work.profile, layer.editor).editor
    made = adopt_state(editor, head.base, work.profile, load_state(blobs, before, layer.state), head.recipe)
    operations, live = layer.state.operations, None
    if made is None:
        refs = [refer(row) for row in list_written(opened.index.find_rows("live"))]
        made, operations, live = restart_state(blobs, editor, head.base, work.profile, refs), 0, blobs.put(spell_live(refs))
    manifest = replace_bottom(head, store_restart(blobs, editor, head.base, work.profile, made, operations))
    return Round(rest=(), manifest=blobs.put(manifest.to_bytes()), fits={}, live=live, seconds={"solve": time.perf_counter() - begun})


@stage
def judge_adoption(stream: str, order: str, candidate: Round) -> Round:
    """The candidate with its report and the gate's decision: see `judge_whole`."""
    settings, opened = open_named(stream)
    work, manifest = AdoptionOrder.load(opened.objects, order), read_manifest(opened, candidate.manifest)
    model = load_named(settings, opened.storage, manifest.base, work.profile, manifest.layers[0].editor)
    return judge_whole(settings, opened, model, candidate)


@stage
def commit_adoption(stream: str, order: str, judged: Round, dry_run: bool = False) -> AdoptionSummary:
    """Make the adoption a commit, or its refusal.

    Raises:
        ConflictError: another writer committed since the order was made.
    """
    settings, opened = open_named(stream)
    work, decision = AdoptionOrder.load(opened.objects, order), judged.decision
    assert decision is not None and judged.report is not None, "an adoption is judged before it is committed"
    accepted = decision.verdict == "accept"
    named = f"Profile {work.profile[:12]} was refused."
    fields = {
        "seq": work.seq,
        "parent": work.parent,
        "report": judged.report,
        "decision": decision.verdict,
        "reasons": shorten_reasons(decision.reasons if accepted else (named, *decision.reasons)),
        "seconds": {name: round(value, 3) for name, value in judged.seconds.items()},
        **describe_writer(settings),
    }
    draft: Commit
    if accepted:
        promoted = is_promoted(settings, opened)
        draft = CalibrationCommit(
            of=work.accepted, profile=work.profile, live=judged.live, manifest=judged.manifest, promoted=promoted, **fields
        )
    else:
        draft = RejectionCommit(outcomes=opened.objects.put_rows([]), manifest=work.manifest, **fields)
    if not dry_run:
        commit_once(opened, draft)
    report = Report.from_bytes(opened.objects.get(judged.report))
    return AdoptionSummary(
        stream=opened.name,
        commit=None if dry_run else draft.seq,
        decision=draft.decision,
        profile=work.profile,
        live=report.live or 0,
        summed=judged.live is not None,
        metrics=report.metrics(),
        reasons=draft.reasons,
        seconds=draft.seconds,
    )
