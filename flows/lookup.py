"""What the reading commands show, as plain data: read from the log and its tables, without torch, Prefect or MLflow."""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from errata.edits import Edit
from errata.errors import InputError, UnknownNameError
from errata.settings import Settings
from errata.summary import RiskSpread
from flows.risks import describe_risk, list_held
from registry.events import Commit
from registry.fold import EditRow
from registry.inbox import PART, InboxFile, list_files, list_waiting, read_waiting
from registry.setbacks import list_aside, read_setbacks
from registry.shared import get_base
from registry.storage.base import Entry
from registry.stream import Stream
from registry.tiers import describe_tiers, list_tiers

Facts = dict[str, Any]

_VERSION = re.compile(r"v\d{1,8}")


def describe_status(settings: Settings, stream: Stream) -> Facts:
    """Where a stream stands."""
    head, counts = stream.head, stream.index.counts()
    newest, champion = stream.log.read(head.seq), stream.log.read(head.champion)
    return {
        "stream": stream.name,
        "root": stream.storage.url,
        "base": get_base(stream.storage, head.base).named,
        "profile": head.profile,
        "head": head.seq,
        "champion": head.champion,
        "challenger": head.challenger,
        "held": list_held(stream),
        "champion_age_seconds": round((datetime.now(UTC) - champion.time).total_seconds()),
        "live": counts.get("live", 0),
        "tiers": describe_tiers(stream),
        "pending": count_pending(stream),
        "quarantined": counts.get("quarantined", 0),
        "rejected": counts.get("rejected", 0),
        "records": counts,
        "last": {"commit": newest.seq, "kind": newest.kind, "time": newest.time.isoformat(), "seconds": newest.seconds},
        "waiting_files": list_waiting(stream),
    }


def count_pending(stream: Stream) -> int:
    """Lines in the inbox that no commit has consumed."""
    return sum(_count_left(file) for file in read_waiting(stream))


def _count_left(file: InboxFile) -> int:
    consumed = sum(last - first + 1 for first, last in file.consumed)
    return max(sum(1 for line in file.data.split(b"\n") if line.strip()) - consumed, 0)


def describe_inbox(stream: Stream) -> list[Facts]:
    """The files of the inbox in the order they are taken, then those that were set aside."""
    now, setbacks, rows = datetime.now(UTC), read_setbacks(stream), []

    def add(entry: Entry, state: str, records: int | None, why: str) -> None:
        age = max((now - entry.modified).total_seconds(), 0.0)
        name = entry.key.rpartition("/")[2]
        rows.append({"file": name, "records": records, "bytes": entry.size, "age_seconds": round(age), "state": state, "why": why})

    entries = {entry.key.rpartition("/")[2]: entry for entry in list_files(stream)}
    for file in read_waiting(stream):
        reasons = setbacks.get(file.digest, [])
        state = f"failed {len(reasons)} times" if reasons else "urgent" if file.urgent else "waits"
        if (entry := entries.pop(file.name, None)) is not None:  # else it has come since the listing
            add(entry, state, _count_left(file), reasons[-1] if reasons else "")
    for name, left in entries.items():
        if name.endswith(PART):
            add(left, "being written", None, "")
    for entry, report in list_aside(stream):
        add(entry, "set aside", None, (report.get("reasons") or [""])[-1])
    return rows


def describe_log(stream: Stream, count: int) -> list[Facts]:
    """The newest commits, newest first."""
    return [describe_commit(stream, stream.log.read(seq)) for seq in range(stream.head.seq, max(stream.head.seq - count, -1), -1)]


def describe_commit(stream: Stream, commit: Commit) -> Facts:
    """One line of the log."""
    report = json.loads(stream.objects.get(commit.report)) if commit.report else {}
    return {
        "commit": commit.seq,
        "kind": commit.kind,
        "time": commit.time.isoformat(),
        "actor": commit.actor,
        "decision": commit.decision,
        "champion": commit.seq == stream.head.champion,
        "outcomes": dict(Counter(outcome.told for outcome in stream.read_outcomes(commit))),
        "efficacy": report.get("efficacy", {}).get("value"),
        "generalization": report.get("held_out", {}).get("generalization", {}).get("value"),
        "specificity": report.get("held_out", {}).get("specificity", {}).get("value"),
        "retention": report.get("retention", {}).get("efficacy", {}).get("value"),
        "withdrawal": report.get("withdrawal"),
        "norms": {norms["weight"]: norms["mean_abs_ratio"] for norms in report.get("norms", [])},
        "casting": {norms["weight"]: norms["casting"] for norms in report.get("norms", []) if norms.get("casting")},
        "seconds": commit.seconds,
    }


def describe_commit_whole(stream: Stream, seq: int) -> Facts:
    """A commit with what became of each record."""
    commit = stream.log.read(seq)
    found = stream.read_outcomes(commit)
    batch = stream.read_batch(commit)
    texts = {row.occurrence: row.edit for row in batch}
    texts |= _read_texts(stream, [outcome.occurrence for outcome in found if outcome.occurrence and outcome.occurrence not in texts])
    outcomes = []
    for outcome in found:
        edit = texts.get(outcome.occurrence or "")
        said = {"edit": f"{edit.rewrite_prompt} → {edit.target_new}"} if edit else {}
        outcomes.append({**outcome.model_dump(mode="json", exclude_none=True), "outcome": outcome.told, **said})
    spread = RiskSpread.over({row.edit.edit_id: row.risk for row in batch if row.risk})
    facts = {**describe_commit(stream, commit), "risks": spread.model_dump() if spread else None}
    whole = commit.model_dump(mode="json", exclude_none=True)
    return {**facts, "reasons": list(commit.reasons), "files": whole.get("files", []), "records": outcomes, "written": _writer(whole)}


def _read_texts(stream: Stream, occurrences: Sequence[str]) -> dict[str, Edit]:
    """The edits behind older occurrences; each batch object is read once."""
    batches: dict[str, dict[int, str]] = defaultdict(dict)
    for row in map(stream.resolve_edit, occurrences):
        batches[row.batch][row.position] = row.occurrence
    texts = {}
    for digest, places in batches.items():
        for record in stream.objects.get_rows(digest):
            if record["position"] in places:
                texts[places[record["position"]]] = Edit.model_validate(record["edit"])
    return texts


def _writer(commit: Facts) -> Facts:
    names = ("parent", "target", "batch", "manifest", "report", "host", "run", "versions", "device", "threads")
    return {name: commit[name] for name in names if name in commit}


def describe_edit(stream: Stream, row: EditRow) -> Facts:
    """An edit, where it stands, and all its occurrences."""
    record = stream.read_record(row)
    history = [
        {"occurrence": item.occurrence, "status": item.status, "by": item.by, "reason": item.reason, "commit": item.seq}
        for item in stream.index.find_occurrences(row.id)
    ]
    beside = [item for item in stream.index.find_subject(record.edit.subject_key) if item.occurrence != row.occurrence]
    written = row.status == "live" and row.pairs is not None
    shared = [item.occurrence for item in beside if written and (item.pairs, item.row) == (row.pairs, row.row)]
    return {
        "id": row.id,
        "occurrence": row.occurrence,
        "status": row.status,
        "origin": row.origin,
        "edit": record.edit.model_dump(mode="json", exclude_none=True, exclude_defaults=True),
        "risk": describe_risk(record.risk),
        "measured": _find_measurement(stream, row),
        "same_subject": [item.occurrence for item in beside],
        "shares_pair": shared,
        "tiers": list_tiers(stream, row) if row.status == "live" else [],
        "history": history,
    }


def _find_measurement(stream: Stream, row: EditRow) -> Facts | None:
    commit = stream.log.read(row.seq)
    report = json.loads(stream.objects.get(commit.report)) if commit.report else {"rows": []}
    return next((item for item in report["rows"] if item["id"] == row.id), None)


def describe_quarantine(stream: Stream) -> list[Facts]:
    """Edits that wait for somebody's decision, in order of arrival."""
    found = []
    for row in stream.index.find_rows("quarantined", "rejected"):
        edit = stream.read_record(row).edit
        said = f"{edit.rewrite_prompt} → {edit.target_new}"
        found.append({"id": row.id, "occurrence": row.occurrence, "status": row.status, "edit": said, "reason": row.reason})
    return found


def choose_quarantined(stream: Stream, names: Sequence[str], every: bool) -> list[EditRow]:
    """The edits in quarantine that a person means.

    Raises:
        InputError: neither or both of names and `every`, or an edit that is not in quarantine.
    """
    if bool(names) == every:
        raise InputError("quarantine: expected edits, or --all; found " + ("both" if names else "neither"))
    if every:
        rows = list(stream.index.find_rows("quarantined", "rejected"))
        if not rows:
            raise InputError("quarantine: expected edits to choose from, found none")
        return rows
    rows = [stream.resolve_edit(name) for name in names]
    for row in rows:
        if row.status not in ("quarantined", "rejected"):
            raise InputError(f"{row.occurrence}: expected an edit in quarantine, found it {row.status}")
    return rows


def resolve_reference(settings: Settings, stream: Stream, ref: str) -> int | EditRow:
    """The commit number or the edit that a person means: `12`, `head~1`, `v12`, or an edit's id, its beginning, or `<id>@<seq>`.

    Raises:
        InputError: it means a commit and an edit.
        UnknownNameError: it means neither.
    """
    commit: int | None = None
    if is_version(ref):
        return resolve_version(settings, stream, ref)
    with suppress(UnknownNameError):
        commit = stream.resolve_commit(ref)
    if commit is not None and stream.index.find_edit(ref) is not None:
        raise InputError(
            f"{ref}: this is a commit and an edit; name the edit as {stream.resolve_edit(ref).occurrence}, the commit as head~N"
        )
    if commit is not None:
        return commit
    try:
        return stream.resolve_edit(ref)
    except UnknownNameError as error:
        raise UnknownNameError(f"{ref}: expected a commit (0 to {stream.head.seq}, head~N, vN) or an edit; {error}") from None


def is_version(ref: str) -> bool:
    """Whether `ref` is spelled as an MLflow version."""
    return _VERSION.fullmatch(ref) is not None


def resolve_state(settings: Settings, stream: Stream, ref: str) -> int:
    """The commit that a person means by `12`, `head`, `head~1` or `v12`.

    Raises:
        UnknownNameError: no such commit or version.
    """
    return resolve_version(settings, stream, ref) if _VERSION.fullmatch(ref) else stream.resolve_commit(ref)


def resolve_version(settings: Settings, stream: Stream, ref: str) -> int:
    """The commit that an MLflow version shows."""
    from registry.models import ModelRegistry
    from registry.release import resolve_tracking

    registry = ModelRegistry(*resolve_tracking(settings.mlflow.tracking_uri, settings.root))
    return registry.read_version(stream.name, int(ref.removeprefix("v"))).commit
