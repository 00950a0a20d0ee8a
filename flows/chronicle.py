"""What the page for people shows of a stream, as plain data. Reads the newest commits with their reports, however long the history is."""

import json
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any
from urllib.parse import quote, urlsplit, urlunsplit

from errata.errors import ErrataError, KeyMissingError
from errata.redaction import redact
from errata.settings import Settings
from errata.summary import RiskSpread
from flows.lookup import describe_status
from flows.risks import show_batch
from registry.events import AcceptedCommit, Commit
from registry.marks import read_watches
from registry.stream import Stream

Facts = dict[str, Any]

COMMITS = 200
"""Newest commits that a page goes into."""
ROWS = 100
"""Most edits of the latest batch that it lists."""
FORGOTTEN = 20
"""Most forgotten edits that it lists."""
BATCHED = ("edits", "merge", "rejection")
"""Kinds of commits that records of the inbox, or of another stream, ended in."""
RESTATING = ("rollback", "rebuild", "compaction", "erasure")
"""Kinds of commits that name the report of an earlier one: its weights are theirs, its batch is not."""


def describe_stream(settings: Settings, stream: Stream) -> Facts:
    """All that the page shows."""
    head = stream.head.seq
    commits = [stream.log.read(seq) for seq in range(max(head - COMMITS + 1, 0), head + 1)]
    points = [describe_point(stream, commit) for commit in commits]
    measured = [point for point in points if point["accepted"] and point["norms"]]
    return {
        "status": describe_status(settings, stream),
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "errata": version("errata"),
        "points": points,
        "commits": head + 1,
        "norms": measured[-1] if measured else None,
        "ages": list_ages(stream, points),
        "forgotten": describe_forgotten(stream, points),
        "batch": describe_batch(stream, commits),
        "mlflow": describe_versions(settings, stream),
    }


def describe_point(stream: Stream, commit: Commit) -> Facts:
    """One commit, with what was measured of its weights; less than `errata show` tells, and without a word of any edit."""
    report = read_report(stream, commit)
    counts = Counter(outcome.told for outcome in stream.read_outcomes(commit))
    own = {} if commit.kind in RESTATING else report
    held_out = own.get("held_out", {})
    return {
        "commit": commit.seq,
        "kind": commit.kind,
        "time": commit.time.isoformat(timespec="minutes"),
        "accepted": isinstance(commit, AcceptedCommit),
        "champion": commit.seq == stream.head.champion,
        "outcomes": dict(counts),
        "live": report.get("live"),
        "efficacy": own.get("efficacy", {}).get("value"),
        "generalization": held_out.get("generalization", {}).get("value"),
        "specificity": held_out.get("specificity", {}).get("value"),
        "kl": report.get("locality", {}).get("kl"),
        "norms": report.get("norms", []),
        "fresh": own.get("efficacy", {}),
        "retained": own.get("retention", {}).get("efficacy", {}),
        "forgotten": own.get("retention", {}).get("forgotten", []),
    }


def read_report(stream: Stream, commit: Commit) -> Facts:
    """A commit's report; nothing where it has none, or none any more."""
    try:
        found: Facts = json.loads(stream.objects.get(commit.report)) if commit.report else {}
    except KeyMissingError:
        return {}
    return found


def list_ages(stream: Stream, points: Sequence[Facts]) -> list[Facts]:
    """Columns of the retention map, oldest first: a `name`, and `ages`, each with its label (commits since acceptance), `value` and number
    of `edits`.

    The watch measures every age. Where it has not run, the report of a commit tells two apart: its own edits, and a sample of all that were
    live before.
    """
    watched: dict[int, Facts] = {}
    for data in read_watches(stream, COMMITS):
        report = json.loads(data)
        ages = [{"age": item["age"], **item["retained"]} for item in report["ages"] if item["retained"].get("value") is not None]
        if ages:
            watched[report["commit"]] = {"name": str(report["commit"]), "ages": ages}  # of several of one commit the latest
    if watched:
        return [watched[commit] for commit in sorted(watched)]
    columns = []
    for point in points:
        measured = (("0", point["fresh"]), ("1-on", point["retained"]))
        ages = [{"age": age, **mean} for age, mean in measured if mean.get("value") is not None]
        if point["accepted"] and ages:
            columns.append({"name": str(point["commit"]), "ages": ages})
    return columns


def describe_forgotten(stream: Stream, points: Sequence[Facts]) -> list[Facts]:
    """The sampled edits that the newest accepted commit forgot, with their age in commits."""
    newest = next((point for point in reversed(points) if point["accepted"] and point["retained"].get("edits")), None)
    if newest is None:
        return []
    found = map(stream.index.find_edit, newest["forgotten"][:FORGOTTEN])
    rows = [row for row in found if row and row.seq < newest["commit"]]  # the others have come again since
    return [
        {"occurrence": row.occurrence, "prompt": edit.rewrite_prompt, "target": edit.target_new, "age": newest["commit"] - row.seq}
        for row, edit in zip(rows, stream.read_edits(rows), strict=True)
    ]


def describe_batch(stream: Stream, commits: Sequence[Commit]) -> Facts | None:
    """The newest batch: what each edit says, what became of it, and the answers before and after."""
    commit = next((commit for commit in reversed(commits) if commit.batch and commit.kind in BATCHED), None)
    if commit is None:
        return None
    answers = {row["id"]: row for row in read_report(stream, commit).get("rows", ())}
    fates = {outcome.occurrence: outcome for outcome in stream.read_outcomes(commit) if outcome.occurrence}
    batch, rows = stream.read_batch(commit), []
    for record in batch[:ROWS]:
        fate, measured = fates.get(record.occurrence), answers.get(record.edit.edit_id, {})
        rows.append(
            {
                "occurrence": record.occurrence,
                "prompt": record.edit.rewrite_prompt,
                "target": record.edit.target_new,
                "before": measured.get("answer_before"),
                "after": measured.get("answer"),
                "outcome": fate.told if fate else "",
                "reason": (fate.reason if fate else None) or "",
            }
        )
    spread = RiskSpread.over({record.edit.edit_id: record.risk for record in batch if record.risk})
    risk = f"Risk: {show_batch(spread.model_dump())}." if spread else ""
    return {"commit": commit.seq, "kind": commit.kind, "rows": rows, "all": len(batch), "risk": risk}


def describe_versions(settings: Settings, stream: Stream) -> Facts:
    """Commit → version and where to see it, for the newest ones; or why MLflow does not tell."""
    from registry.models import ModelRegistry
    from registry.release import resolve_tracking

    uri, root = resolve_tracking(settings.mlflow.tracking_uri, settings.root)
    try:
        found = ModelRegistry(uri, root).list_versions(stream.name, most=COMMITS)
    except ErrataError as error:
        return {"at": redact(uri), "fault": str(error), "versions": {}}
    site = find_site(uri)
    links = {item.commit: {"name": item.uri, "link": spell_link(site, item.stream, item.number)} for item in reversed(found)}
    return {"at": redact(uri), "fault": None, "versions": links}


def find_site(uri: str) -> str | None:
    """The address of MLflow's pages, without credentials; None where the tracking URI is no server."""
    parts = urlsplit(uri)
    if parts.scheme not in ("http", "https"):
        return None
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path.rstrip("/"), "", ""))


def spell_link(site: str | None, name: str, number: int) -> str | None:
    return f"{site}/#/models/{quote(name, safe='')}/versions/{number}" if site else None
