"""Erasing: what somebody has a right to see gone. The model does not change: the edits are withdrawn, or were never written."""

import json
import time
from contextlib import suppress
from datetime import timedelta

from errata.candidates import load_state, read_pairs, store_artifact, store_state, take_snapshot
from errata.editors.base import Pairs
from errata.edits import Submission
from errata.errors import ErasedError, InputError, StorageError
from errata.exactness import RELATIVE, measure_gap
from errata.manifests import Layer, Manifest, StateRef
from errata.readers.files import read_lines
from errata.settings import Settings
from errata.summary import ErasureSummary
from registry.commit import commit
from registry.erased import announce, read_erasures
from registry.erasure import Wanted, choose_erasable, draft_tombstones, find_remains, plan_erasure, survey_log
from registry.events import ErasureCommit
from registry.fold import list_written
from registry.storage.base import read_clock
from registry.stream import Stream
from tasks._session import load_model, open_named, read_manifest
from tasks._task import stage
from tasks._tiers import forget_erased
from tasks.committing import describe_writer
from tasks.editing import refer
from tasks.projecting import open_registry


@stage
def erase(stream: str, edits: list[str], reason: str) -> ErasureSummary:
    """Commit an erasure and carry it out.

    Raises:
        InputError: an edit is unknown, or live, or nothing of it is left; or the reason quotes it.
        ConflictError: another writer committed meanwhile; nothing was erased.
    """
    settings, opened = open_named(stream)
    begun, head = time.perf_counter(), opened.head
    survey = survey_log(opened, choose_erasable(opened, edits))
    wanted = survey.wanted
    if wanted.quotes(reason):
        raise InputError("erase: expected a reason that does not quote what is erased: commits are never rewritten")
    manifest, gap = restate_head(settings, opened, wanted.ids)
    kept = [name for layer in manifest.layers for name in (*layer.stored, *layer.state_stored)]
    record = plan_erasure(opened, survey, kept, erase_rows, find_lines)
    said = f"commit {record.seq}: {reason}" if reason else f"commit {record.seq}"
    outcomes = draft_tombstones(opened, wanted.ids, said)
    if not (outcomes or record.objects or record.inbox):
        raise InputError(f"erase: expected something left of {', '.join(sorted(wanted.ids))}, found it erased already")
    digest = opened.objects.put_json(record.model_dump(mode="json"))
    before = opened.log.read(head.accepted)
    stand_in = {gone.digest: gone.by for gone in record.objects}
    draft = ErasureCommit(
        seq=record.seq,
        parent=head.digest,
        erased=digest,
        outcomes=opened.objects.put_rows(outcome.model_dump(mode="json", exclude_none=True) for outcome in outcomes),
        manifest=opened.objects.put(manifest.to_bytes()),
        report=stand_in.get(before.report, before.report) if before.report else None,
        decision="erased",
        reasons=(reason,) if reason else (),
        # Whoever waits for a promotion goes on waiting.
        promoted=head.champion == head.accepted,
        seconds={"erase": round(time.perf_counter() - begun, 3)},
        **describe_writer(settings),
    )
    announce(opened.storage, opened.key(""), record.seq, digest)
    commit(opened, draft, head)
    # It is committed: whatever goes wrong from here on, whoever opens the stream next goes on with it.
    opened.finish_erasures()
    opened.storage.sweep(read_clock(opened.storage) - timedelta(hours=1))
    with suppress(StorageError):
        opened.checkpoints.write(opened.index)
    return ErasureSummary(
        stream=opened.name,
        commit=record.seq,
        erased=tuple(outcome.occurrence or "" for outcome in outcomes),
        deleted=sum(gone.by is None for gone in record.objects),
        replaced=sum(gone.by is not None for gone in record.objects),
        commits=record.commits,
        gap=gap,
        finished=not any(read_erasures(opened.storage, opened.key(""), undone=True)),
        remains=tuple(find_remains(opened, wanted.secrets)),
    )


def restate_head(settings: Settings, stream: Stream, ids: frozenset[str]) -> tuple[Manifest, float]:
    """The head's state summed anew from the live pairs, as a stored manifest of the same recipe, and how far its weights are from before.

    Raises:
        InputError: its weights are not those of the head, or a live edit shares its pair with one of `ids`.
    """
    model, head = load_model(settings, stream), read_manifest(stream, stream.head.manifest)
    editor, layer = model.editor, head.layers[0]
    pairs = read_pairs(stream.objects, list(dict.fromkeys(refer(row) for row in list_written(stream.index.find_rows("live")))))
    if shared := sorted({owner for owners in (pairs.owners if pairs else ()) if ids & set(owners) for owner in owners} - ids):
        raise InputError(
            f"erase: expected no live edit that shares a pair with what is erased, found {', '.join(shared)}: withdraw it, too"
        )
    state = editor.merge(editor.empty_state(), pairs, None)
    try:
        gap = measure_gap(editor.solve_exact(state), editor.solve_exact(load_state(stream.objects, editor, layer.state)))
    except ErasedError:
        raise InputError("erase: expected the state of the newest commit whole, found part of it erased; `errata rebuild` tells") from None
    if gap > RELATIVE:
        raise InputError(f"erase: expected the weights to be those of the live edits, found them {gap:.1e} apart; `errata rebuild` tells")
    built = Layer(
        editor=layer.editor,
        editor_version=layer.editor_version,
        built_on=layer.built_on,
        state=take_snapshot(StateRef(), store_state(stream.objects, state), state.parts),
        **store_artifact(stream.objects, editor.solve(state)),
    )
    return forget_erased(settings, stream, head, ids).crown(head.model_copy(update={"layers": (built,)})), gap


def erase_rows(data: bytes, ids: frozenset[str]) -> bytes | None:
    """A pairs object with the rows of some edits zero; None where it has none."""
    pairs = Pairs.from_bytes(data)
    before = pairs.erased or (None,) * len(pairs)
    rows = [row for row, owners in enumerate(pairs.owners) if ids & set(owners) and before[row] is None]
    return pairs.erase(rows).to_bytes() if rows else None


def find_lines(data: bytes, wanted: Wanted) -> set[int]:
    """Lines of a raw file that hold the edits, or hold something that is no edit and quotes them."""
    lines = data.split(b"\n")
    found = set()
    for number, record in read_lines(data, "inbox"):
        if isinstance(record, Submission):
            if record.edit.edit_id in wanted.ids or record.edit.content_id in wanted.contents:
                found.add(number)
        elif record.origin == "inbox":  # no file of edits at all
            found |= {place for place, line in enumerate(lines, start=1) if wanted.quotes(line.decode(errors="replace"))}
        elif wanted.quotes(_spell(lines[number - 1])):
            found.add(number)
    return found


def _spell(line: bytes) -> str:
    """A line with its texts as they read, however they are escaped."""
    try:
        return json.dumps(json.loads(line), ensure_ascii=False)
    except (ValueError, RecursionError):
        return line.decode(errors="replace")


def hide_versions(settings: Settings, stream: Stream) -> int:
    """Take what was erased out of MLflow: files of versions that carried it, and answers in their reports. How many versions are touched.
    Safe to repeat."""
    erasures = [erasure for erasure in read_erasures(stream.storage, stream.key("")) if erasure.done]
    if not erasures:
        return 0
    registry, touched = open_registry(settings), 0
    versions = {version.commit: version for version in registry.list_versions(stream.name)}
    for erasure in erasures:
        for seq in sorted({*erasure.record.commits, *erasure.record.reports} & versions.keys()):
            version = versions[seq]
            if int(version.tags.get("errata.erased", 0)) >= erasure.record.seq:
                continue
            report = stream.log.read(seq).report
            data = stream.objects.get(report) if report else None
            registry.hide_version(version, erasure.record.seq, weights=seq in erasure.record.commits, report=data)
            touched += 1
        registry.remove_parts(stream.name, [gone.digest for gone in erasure.record.objects])
    return touched


@stage
def hide_erased(stream: str) -> int:
    """See `hide_versions`."""
    return hide_versions(*open_named(stream))
