"""Work order to candidate: pairs on the base, merged into the head's state."""

import time
from collections.abc import Sequence

from errata.candidates import StoredPair, build_candidate, prepare_batch
from errata.edits import canonical_json, digest_of
from errata.manifests import PairRef
from errata.report import Diagnosis
from errata.rounds import Prepared, PreparedRecord, Round
from registry.orders import Order
from registry.prepared import recall_pairs, remember_pairs
from registry.stream import Stream
from tasks._progress import show_progress
from tasks._session import Model, load_model, open_named, read_manifest
from tasks._task import stage


@stage
def prepare_pairs(stream: str, order: str) -> Prepared:
    """Keys and residuals of the order's edits, stored. Pairs of an interrupted run are used again."""
    settings, opened = open_named(stream)
    edits = [planned.row.edit for planned in Order.load(opened.objects, order).additions]
    if not edits:
        return Prepared(record=opened.objects.put(canonical_json(PreparedRecord(refs={}, diagnoses={}, refused={}))), ready=(), seconds=0)
    model = load_model(settings, opened)
    scope = digest_preparation(model)
    known = {name: StoredPair(PairRef(pairs=pairs, row=row), loss) for name, (pairs, row, loss) in recall_pairs(opened, scope).items()}
    begun = time.perf_counter()
    with show_progress("optimising targets") as on_progress:
        made = prepare_batch(
            opened.objects,
            model.editor,
            model.base,
            edits,
            known,
            lambda pairs, losses: remember_pairs(opened, scope, pairs, losses),
            on_progress,
        )
    diagnoses = {edit_id: Diagnosis(loss=loss) for edit_id, loss in made.losses.items()}
    record = PreparedRecord(refs=dict(made.refs), diagnoses=diagnoses, refused=dict(made.refused))
    ready = tuple(edit.edit_id for edit in edits if edit.edit_id in made.refs)
    return Prepared(record=opened.objects.put(canonical_json(record)), ready=ready, seconds=time.perf_counter() - begun)


@stage
def merge_pairs(stream: str, order: str, prepared: Prepared, rest: Sequence[str]) -> Round:
    """The head's state with the pairs of the edits in `rest`, solved: a candidate that nothing points to yet."""
    settings, opened = open_named(stream)
    model = load_model(settings, opened)
    begun = time.perf_counter()
    work, record = Order.load(opened.objects, order), PreparedRecord.model_validate_json(opened.objects.get(prepared.record))
    candidate = build_candidate(
        opened.objects,
        model.editor,
        read_manifest(opened, work.manifest),
        add=[record.refs[edit_id] for edit_id in rest],
        remove=find_replaced(opened, work, set(rest)),
        snapshot_every=settings.apply.snapshot_every,
    )
    manifest = opened.objects.put(candidate.manifest.to_bytes())
    return Round(rest=tuple(rest), manifest=manifest, fits=dict(candidate.fits), seconds={"merge": time.perf_counter() - begun})


def digest_preparation(model: Model) -> str:
    """What a pair depends on besides its edit."""
    return digest_of(canonical_json([model.base.digest, model.profile.prepare.digest, model.editor.name, model.editor.version]))[:32]


def find_replaced(stream: Stream, order: Order, kept: set[str]) -> list[PairRef]:
    """The stored pairs of the live edits that the kept additions replace, each once."""
    occurrences = dict.fromkeys(name for planned in order.additions if planned.row.edit.edit_id in kept for name in planned.replaces)
    refs = []
    for row in map(stream.resolve_edit, occurrences):
        assert row.pairs is not None and row.row is not None, f"{row.occurrence} is live and has no pair"
        refs.append(PairRef(pairs=row.pairs, row=row.row))
    return refs
