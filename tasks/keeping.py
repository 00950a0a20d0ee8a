"""What a stream keeps: versions beyond it are archived, objects of no use are deleted, and archived versions come back on request."""

from collections import defaultdict
from datetime import timedelta
from typing import Any

from errata.errors import InputError
from errata.settings import Settings
from errata.summary import CollectionSummary
from registry.collection import Candidate, Survey, delete_garbage, delete_stale, find_garbage, survey_stream
from registry.history import History, open_history
from registry.keeping import open_archived
from registry.storage.base import read_clock
from registry.stream import Stream
from tasks._session import open_named, read_manifest
from tasks._task import stage
from tasks.projecting import open_registry


@stage
def archive_versions(stream: str, dry_run: bool = False) -> list[int]:
    """Give up the weights of versions that `[keep]` does not keep; the commits that are new among them. Objects go later, see
    `collect_objects`."""
    settings, opened = open_named(stream)
    found = survey(settings, open_history(settings.root, opened.name))
    notes = open_archived(opened.storage, opened.name)
    known = notes.read()
    given_up = sorted(seq for seqs in found.given_up.values() for seq in seqs)
    new = [seq for seq in dict.fromkeys(given_up) if seq not in known]
    if not dry_run:
        for seq in new:
            notes.write(seq, "archived")
        for seq in known:
            if seq in found.kept:
                notes.remove(seq)  # pinned since, or kept by wider settings
    return new


@stage
def collect_objects(stream: str, dry_run: bool = False) -> CollectionSummary:
    """Delete what nothing has needed for the length of the grace."""
    settings, opened = open_named(stream)
    history = open_history(settings.root, opened.name)
    now, grace = read_clock(history.storage), timedelta(hours=settings.gc.grace_hours)
    found = survey(settings, history)
    garbage = list(find_garbage(history, found, now, grace))
    due = [candidate for candidate in garbage if candidate.due]
    deleted = due if dry_run else delete_garbage(history, found, due, now, grace)
    stale = len(found.stale) if dry_run else delete_stale(history, found)
    hidden = 0 if dry_run else hide_archived(settings, opened, now - grace)
    waiting = [candidate for candidate in garbage if not candidate.due]
    return CollectionSummary(
        stream=opened.name,
        dry_run=dry_run,
        deleted=_sum(deleted),
        waiting=_sum(waiting),
        stale=stale,
        archived=len(open_archived(history.storage, history.name).read()),
        hidden=hidden,
    )


def survey(settings: Settings, history: History) -> Survey:
    """What the stream needs, under the settings."""
    grace = timedelta(hours=settings.gc.grace_hours)
    return survey_stream(history, settings.keep.recent, settings.keep.daily_days, read_clock(history.storage), grace)


def hide_archived(settings: Settings, stream: Stream, before: Any) -> int:
    """Take the weights of versions that were archived before a time out of MLflow, and tag them; how many. Safe to repeat."""
    due = [seq for seq, (_, since) in open_archived(stream.storage, stream.name).read().items() if since <= before]
    if not due:
        return 0
    registry, hidden = open_registry(settings), 0
    versions = {version.commit: version for version in registry.list_versions(stream.name)}
    for seq in due:
        if seq in versions and "errata.archived" not in versions[seq].tags:
            registry.archive_version(
                versions[seq], f"its weights are given up; `errata rebuild --stream {stream.name} --to {seq}` restores"
            )
            hidden += 1
    return hidden


@stage
def restore_version(stream: str, to: int) -> int | None:
    """After a rebuild up to commit `to`: where the state it reached was archived, it is a whole version again; the commit, or None."""
    settings, opened = open_named(stream)
    commit = opened.log.read(to)
    while not _is_state(commit):
        commit = opened.log.read(commit.seq - 1)
    notes = open_archived(opened.storage, opened.name)
    if commit.seq not in notes or commit.manifest is None:
        return None
    manifest = read_manifest(opened, commit.manifest)
    registry = open_registry(settings)
    version = registry.find_version(opened.name, commit.seq)
    if version is not None:
        weights = [opened.objects.get(digest) for digest in manifest.artifacts]
        parts = [digest for layer in manifest.layers for digest in layer.parts]
        registry.restore_version(version, weights, parts, opened.objects.get)
    notes.remove(commit.seq)
    return commit.seq


def describe_storage(settings: Settings, stream: Stream) -> list[dict[str, Any]]:
    """What is stored and why: a row per category and reason, with objects and bytes."""
    history = open_history(settings.root, stream.name)
    now, grace = read_clock(history.storage), timedelta(hours=settings.gc.grace_hours)
    found = survey(settings, history)
    rows: dict[tuple[str, str], list[int]] = defaultdict(list)
    for entry in history.objects.list_all():
        use = found.needed.get(entry.key)
        if use is not None:
            kept = use.why.partition("(")[2].rstrip(")") if use.category in ("artifact", "snapshot") else ""
            rows[use.category, kept.partition(",")[0].partition(":")[0] or "needed by commits"].append(entry.size)
    for candidate in find_garbage(history, found, now, grace):
        rows[candidate.category, "due: `errata gc` deletes it" if candidate.due else "younger than the grace"].append(candidate.size)
    for name in ("commits", "checkpoints", "inbox", "prepared"):
        sizes = [entry.size for entry in history.storage.list(history.key(f"{name}/"))]
        if sizes:
            rows[name, "by name"] = sizes
    return [{"category": what, "why": why, "objects": len(sizes), "bytes": sum(sizes)} for (what, why), sizes in sorted(rows.items())]


def pin_commit(stream: Stream, seq: int) -> int:
    """The accepted commit whose state commit `seq` has: what a pin keeps.

    Raises:
        InputError: its weights are gone already.
    """
    commit = stream.log.read(seq)
    while not _is_state(commit):
        commit = stream.log.read(commit.seq - 1)
    if commit.seq in open_archived(stream.storage, stream.name):
        raise InputError(
            f"pin: expected a version with weights, found commit {commit.seq} archived; `errata rebuild --to {commit.seq}` first"
        )
    return commit.seq


def _is_state(commit: Any) -> bool:
    return commit.seq == 0 or commit.kind != "rejection"


def _sum(candidates: list[Candidate]) -> dict[str, tuple[int, int]]:
    """Category → objects and bytes."""
    sums: dict[str, tuple[int, int]] = {}
    for candidate in candidates:
        count, size = sums.get(candidate.category, (0, 0))
        sums[candidate.category] = count + 1, size + candidate.size
    return sums
