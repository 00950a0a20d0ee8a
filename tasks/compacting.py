"""The refresh of the sums: asked for, or by itself after a batch once enough pairs have come and gone."""

import time
from collections.abc import Sequence

from errata.compaction import compact_state
from errata.errors import ConflictError, KeyMissingError, ObjectCorruptError
from errata.exactness import RELATIVE
from errata.manifests import sort_refs
from errata.settings import Settings
from errata.summary import CompactionSummary
from registry.events import CompactionCommit
from registry.fold import list_written
from registry.stream import Stream
from tasks._session import load_model, open_named, read_manifest
from tasks._task import stage
from tasks.committing import commit_once, describe_writer
from tasks.editing import refer
from tasks.replaying import spell_live

_TOLD = 5
"""Withdrawn edits named at most."""
_CHECK = "`errata rebuild --check` says where the log and the state part; nothing was committed"


@stage
def compact_sums(stream: str, dry_run: bool = False) -> CompactionSummary:
    """Build the sums of a stream's head anew and commit them, unless the weights come out otherwise: that is a finding, and a result.

    Raises:
        ConflictError: another writer committed meanwhile.
    """
    return compact_stream(*open_named(stream), dry_run=dry_run)


@stage
def refresh_sums(stream: str) -> str | None:
    """Compact a stream that is due, as a commit of its own; what went wrong, if anything did.

    The batch before is committed, and its sums are good for it: nothing that happens here may fail it. A stream whose compaction is
    refused, or fails, is due again after the next batch.
    """
    try:
        settings, opened = open_named(stream)
        operations = read_manifest(opened, opened.head.manifest).layers[0].state.operations
        if operations < settings.apply.refresh_every:
            return None
        summary = compact_stream(settings, opened, dry_run=False)
        return None if summary.accepted else "; ".join(summary.reasons)
    except Exception as error:  # noqa: BLE001
        return f"{type(error).__name__}: {error}"


def compact_stream(settings: Settings, stream: Stream, *, dry_run: bool) -> CompactionSummary:
    """See `compact_sums`."""
    begun, head = time.perf_counter(), stream.head
    manifest = read_manifest(stream, head.manifest)
    # Edits of one subject may share a pair.
    live = [refer(row) for row in list_written(stream.index.find_rows("live"))]
    refs = sort_refs(live)

    def conclude(decision: str, commit: int | None = None, gap: float | None = None, reasons: Sequence[str] = ()) -> CompactionSummary:
        return CompactionSummary.model_validate(
            {
                "stream": stream.name,
                "commit": commit,
                "decision": decision,
                "live": len(live),
                "pairs": len(refs),
                "operations": manifest.layers[0].state.operations,
                "gap": gap,
                "reasons": tuple(reasons),
                "seconds": round(time.perf_counter() - begun, 3),
            }
        )

    accepted = stream.log.read(head.accepted)
    if accepted.seq == 0 or isinstance(accepted, CompactionCommit):
        return conclude("nothing to do", reasons=("nothing has been added or removed since the sums were built from the pairs",))
    try:
        made = compact_state(stream.objects, load_model(settings, stream).editor, manifest, refs)
    except (KeyMissingError, ObjectCorruptError) as error:
        return conclude("refuse", reasons=(f"{error}. {_CHECK}",))
    if not made.gap <= RELATIVE:
        # The tables are shared with other processes of this machine, and may have moved on between the head and the rows.
        if (newer := stream.refresh()).digest != head.digest:
            raise ConflictError(f"expected commit {head.seq} to be the newest, found {newer.seq}: another writer committed")
        said = f"expected weights within {RELATIVE:.1e} of those of commit {head.accepted}, found them {made.gap:.1e} apart. {_CHECK}"
        return conclude("refuse", gap=made.gap, reasons=(said,))
    told = [
        f"{live_id} answers what {removed}, which was withdrawn, asks, from now on: nothing stands between them any more"
        for removed, live_id in list(made.uncovered.items())[:_TOLD]
    ]
    if len(made.uncovered) > _TOLD:
        told.append(f"and so for {len(made.uncovered) - _TOLD} more")
    if dry_run:
        return conclude("accept", gap=made.gap, reasons=told)
    draft = CompactionCommit(
        seq=head.seq + 1,
        parent=head.digest,
        of=head.accepted,
        live=stream.objects.put(spell_live(refs)),
        manifest=stream.objects.put(made.manifest.to_bytes()),
        promoted=head.champion == head.accepted,
        report=accepted.report,
        decision="accept",
        reasons=(f"summed {len(refs)} pairs anew; the weights moved by {made.gap:.1e}", *told),
        seconds={"compact": round(time.perf_counter() - begun, 3)},
        **describe_writer(settings),
    )
    commit_once(stream, draft)
    return conclude("accept", draft.seq, made.gap, told)
