"""Work order to candidate: pairs on the base, merged into the head's state."""

import logging
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from statistics import median

from errata.candidates import (
    PreparedBatch,
    StoredPair,
    build_candidate,
    load_state,
    name_pair,
    prepare_batch,
    prepare_chunk,
    read_pairs,
)
from errata.editors.base import Progress, list_units
from errata.edits import Edit, canonical_json, digest_of
from errata.evaluation.risk import measure_risks
from errata.grouping import Placed, Regrouping, regroup
from errata.manifests import PairRef
from errata.rounds import Prepared, PreparedRecord, Round
from errata.settings import load_settings
from registry.fold import EditRow, list_written
from registry.orders import Order, Planned
from registry.prepared import recall_pairs, remember_pairs
from registry.stream import Stream
from tasks._progress import show_progress
from tasks._session import Model, load_model, load_named, open_named, read_manifest
from tasks._spreading import spread
from tasks._task import stage, tell_run
from tasks._tiers import Coming, carry_above

_OVERSHOOT = 1.3


@stage
def prepare_pairs(stream: str, order: str) -> Prepared:
    """Keys and residuals of the order's edits and of their key groups, stored, with what each edit is foretold to cost. Pairs of an
    interrupted run are used again."""
    settings, opened = open_named(stream)
    work = Order.load(opened.objects, order)
    ids = tuple(planned.row.edit.edit_id for planned in work.additions)
    if not ids or work.tier == "memory":
        return Prepared(record=opened.objects.put(canonical_json(PreparedRecord(pairs={}, refused={}))), ready=ids, seconds=0)
    begun = time.perf_counter()
    model = load_model(settings, opened)
    changed = plan_changes(opened, model, [item.row.edit for item in work.additions], find_replaced(opened, work.additions))
    known, made = prepare_regrouped(opened, model, changed, {}, work.manifest)
    # An edit that is refused may have been in a group: what is left of it gets a pair in the first round.
    ready = tuple(edit_id for edit_id in ids if edit_id in made.refs)
    chosen = [item.row.edit for item in work.additions if item.row.edit.edit_id in made.refs]
    risks = measure_risks(model.base, chosen, batch_tokens=settings.evaluate.batch_tokens)
    record = PreparedRecord(pairs=known, refused=dict(made.refused), risks=risks)
    return Prepared(record=opened.objects.put(canonical_json(record)), ready=ready, seconds=time.perf_counter() - begun)


@stage
def merge_pairs(stream: str, order: str, prepared: Prepared, rest: Sequence[str]) -> Round:
    """The head's state with the pairs of the edits in `rest`, solved: a candidate that nothing points to yet. What goes to memory has no
    pairs; those of what it replaces are subtracted.

    Key groups that have lost an edit since they were prepared get another pair, which is prepared here.
    """
    settings, opened = open_named(stream)
    model = load_model(settings, opened)
    begun = time.perf_counter()
    work, record = Order.load(opened.objects, order), PreparedRecord.model_validate_json(opened.objects.get(prepared.record))
    planned = [item for item in work.additions if item.row.edit.edit_id in set(rest)]
    leaving, head = find_replaced(opened, planned), read_manifest(opened, work.manifest)
    writes = work.tier == "weights"
    changed = plan_changes(opened, model, [item.row.edit for item in planned] if writes else [], leaving)
    _, made = prepare_regrouped(opened, model, changed, record.pairs, work.manifest)
    candidate = build_candidate(
        opened.objects,
        model.editor,
        head,
        add=list(dict.fromkeys(made.refs[edit.edit_id] for edit in changed.edits)),
        remove=changed.remove,
        snapshot_every=settings.apply.snapshot_every,
    )
    warn_of_overshoot(candidate.fits)
    come = [Coming(item.row.occurrence, item.row.edit, written=writes) for item in planned]
    above = carry_above(settings, opened, head, come, leaving)
    return Round(
        rest=tuple(rest),
        manifest=opened.objects.put(above.crown(candidate.manifest).to_bytes()),
        placed={edit.edit_id: made.refs[edit.edit_id] for edit in changed.edits},
        older=find_older(opened, leaving, changed, rest),
        losses={**dict.fromkeys(rest), **made.losses},
        fits=dict(candidate.fits),
        told=above.told,
        seconds={"merge": time.perf_counter() - begun},
    )


def warn_of_overshoot(fits: Mapping[str, float]) -> None:
    """Say in the log where the layers together write more than they were to (algorithms.md, resolution B: ρ·H_L above 1.3)."""
    middle = median(fits.values()) if fits else 0.0
    if middle > _OVERSHOOT:
        said = f"the layers together realise {middle:.2f} times the residual (median of {len(fits)} edits), expected at most {_OVERSHOOT}"
        tell_run(logging.WARNING, f"{said}: a larger λ, or spread 'refresh' or 'even', writes less", rho=round(middle, 4))


def find_replaced(stream: Stream, planned: Sequence[Planned]) -> list[EditRow]:
    """The live edits that additions replace, each once."""
    return [stream.resolve_edit(name) for name in dict.fromkeys(name for item in planned for name in item.replaces)]


def find_older(stream: Stream, leaving: Sequence[EditRow], changed: Regrouping, own: Collection[str]) -> dict[str, PairRef]:
    """Older occurrences that leave, or get another pair, with the pairs that they have, where they have any; `own` are the ids of edits
    that come."""
    moved = [stream.resolve_edit(edit.edit_id) for edit in changed.edits if edit.edit_id not in own]
    return {row.occurrence: refer(row) for row in list_written((*leaving, *moved))}


def plan_changes(stream: Stream, model: Model, coming: Sequence[Edit], leaving: Sequence[EditRow]) -> Regrouping:
    """What happens to pairs when edits come and live ones go.

    Reads the texts of the other live edits of the same subjects, however long the stream is.
    """
    gone = {row.occurrence for row in leaving}
    subjects = dict.fromkeys((*(edit.subject_key for edit in coming), *(row.subject for row in leaving)))
    rows = [row for key in subjects for row in stream.index.find_subject(key) if row.occurrence not in gone]
    staying = [Placed(stream.read_record(row).edit, refer(row)) for row in list_written(rows)]
    return regroup(model.editor, model.base, coming, staying, map(refer, list_written(leaving)))


def prepare_regrouped(
    stream: Stream, model: Model, changed: Regrouping, known: Mapping[str, StoredPair], head: str | None
) -> tuple[dict[str, StoredPair], PreparedBatch]:
    """The new pairs, by name and by edit; those that are `known` or were stored by an interrupted run are used again.

    Args:
        head: digest of the manifest whose state they will be added to; None where that is summed from nothing.
    """
    scope = digest_preparation(model, head)
    by_id = {edit.edit_id: edit for edit in changed.edits}
    if any(name_pair([by_id[i] for i in unit]) not in known for unit in list_units(by_id, changed.groups)):
        found = recall_pairs(stream, scope).items()
        stored = {name: StoredPair(ref=PairRef(pairs=pairs, row=row), losses=tuple(losses)) for name, (pairs, row, losses) in found}
        known = {**stored, **known}
    ground = None
    if head is not None and not model.editor.order_free:
        state = load_state(stream.objects, model.editor, read_manifest(stream, head).layers[0].state)
        ground = model.editor.merge(state, None, read_pairs(stream.objects, changed.remove))
    with show_progress("optimising targets") as on_progress:
        elsewhere = partial(_spread_chunks, stream.name, model, changed, on_progress)
        made = prepare_batch(
            stream.objects,
            model.editor,
            model.base,
            changed.edits,
            known,
            lambda pairs, losses: remember_pairs(stream, scope, pairs, losses),
            on_progress,
            changed.groups,
            ground,
            elsewhere if load_settings().compute.runner == "ray" else None,
        )
    units = list_units(made.refs, changed.groups)
    pairs = {
        name_pair([by_id[i] for i in unit]): StoredPair(ref=made.refs[unit[0]], losses=tuple(made.losses[i] for i in unit))
        for unit in units
    }
    return pairs, made


@stage
def prepare_part(
    stream: str, base: str, profile: str, editor: str, edits: Sequence[Edit], groups: Sequence[Sequence[str]]
) -> PreparedBatch:
    """Keys and residuals of a part of a batch, stored and noted: what another process does for `prepare_regrouped`.

    Args:
        base, profile: digests of what the pairs are prepared on, which need not be the head's.
        editor: its name.
        groups: ids of edits that share one pair.
    """
    settings, opened = open_named(stream)
    model = load_named(settings, opened.storage, base, profile, editor)
    scope = digest_preparation(model, None)  # chunks are spread where order does not matter
    return prepare_chunk(
        opened.objects,
        model.editor,
        model.base,
        edits,
        lambda pairs, losses: remember_pairs(opened, scope, pairs, losses),
        groups=groups,
    )


def _spread_chunks(
    stream: str, model: Model, changed: Regrouping, on_progress: Progress, chunks: Sequence[Sequence[Edit]]
) -> Iterable[PreparedBatch]:
    """See `prepare_batch`: `prepare_part` for each chunk, as `compute.runner` says."""
    done = len(changed.edits) - sum(map(len, chunks))

    def tell(part: PreparedBatch) -> None:
        nonlocal done
        done += len(part.refs) + len(part.refused)
        on_progress(done, len(changed.edits))

    under = {"base": model.base.digest, "profile": model.profile.digest, "editor": model.editor.name}
    calls = [{"stream": stream, **under, "edits": list(chunk), "groups": changed.groups} for chunk in chunks]
    return spread(prepare_part, calls, on_result=tell)


def refer(row: EditRow) -> PairRef:
    """Where the pair of a live edit lies that has one."""
    assert row.pairs is not None and row.row is not None, f"{row.occurrence} is live and has no pair"
    return PairRef(pairs=row.pairs, row=row.row)


def digest_preparation(model: Model, head: str | None) -> str:
    """What a pair depends on besides its edit: where order matters, also on what it is added to (see `prepare_regrouped`)."""
    options = [model.base.digest, model.profile.prepare.digest, model.editor.name, model.editor.version]
    return digest_of(canonical_json(options if model.editor.order_free else [*options, head]))[:32]
