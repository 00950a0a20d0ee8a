"""What an erasure has to delete: every object of the stream is looked at, and all that holds the edits is listed with what stands in.

Objects that a commit names and that hold other edits, too, get a stand-in: the same rows under the same numbers, those of the edits blank.
States and artifacts that were made with the edits have none, nor has what no commit names (orders, candidates of refused batches).
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from itertools import chain
from typing import Any

from errata.edits import SLOT, Edit, canonical_json, digest_of
from errata.errors import InputError, UnknownNameError
from registry.erased import ErasureRecord, Gone, Waiting
from registry.events import AcceptedCommit, Commit, InitCommit
from registry.fold import ASIDE, EditRow, split_occurrence
from registry.history import list_layer, list_layers, list_named
from registry.inbox import list_waiting
from registry.objects import read_metadata
from registry.rows import BatchRow, Outcome, Standing
from registry.stream import Stream

BLANK = "[erased]"
_KEEPING = frozenset(["ireva", "mike"])
"""Layers whose versions keep something of edits that were withdrawn: keys of neurons, facts in blocks. Of others no artifact is read, large
as they are."""
_WEIGHTS = ("d4s_state", "weight_delta", "neuron_state", "neuron_patch", "lora_adapter", "edit_memory", "facts")
"""Kinds of objects that are made with edits, and again without them."""
_SHORTEST = 3
"""Characters of a text that is looked for in remarks; a shorter one would be found everywhere."""

FindLines = Callable[[bytes, "Wanted"], set[int]]
"""Lines, 1-based, of a raw inbox file that hold the edits or quote them."""
ErasePairs = Callable[[bytes, frozenset[str]], bytes | None]
"""Pairs object and ids → the object with their rows zero; None where it has none of them."""


@dataclass(frozen=True)
class Wanted:
    """What is to be erased."""

    ids: frozenset[str]
    contents: frozenset[str]
    """content_id of everything the edits ever said."""
    secrets: tuple[str, ...]
    """Subjects and prompts, which nothing that is kept may quote."""

    def quotes(self, text: str) -> bool:
        return any(secret in text for secret in self.secrets)


@dataclass
class Survey:
    """What the log says about the edits."""

    wanted: Wanted
    commits: set[int] = field(default_factory=set)
    """Accepted commits in whose state one of them is."""
    named: dict[str, str] = field(default_factory=dict)
    """Object that a commit names itself → what it is; what manifests name has a dictionary of its own."""
    layers: dict[str, bool] = field(default_factory=dict)
    """Artifact, snapshot or change list → whether it carries one of the edits."""
    versions: dict[str, set[int]] = field(default_factory=dict)
    """Artifact or snapshot of an editor that keeps what was withdrawn → the commits whose manifests name it."""
    artifacts: dict[int, set[str]] = field(default_factory=dict)
    """Commit → such artifacts that its manifest names."""
    lines: dict[str, set[int]] = field(default_factory=dict)
    """Raw file → lines of theirs that were read."""
    reports: dict[str, list[int]] = field(default_factory=dict)
    last: int = 0
    """The newest commit that is about one of them."""


def choose_erasable(stream: Stream, names: Iterable[str]) -> list[str]:
    """The ids that somebody means to erase, with all their occurrences.

    Raises:
        InputError: no names, an unknown one, or one with a live occurrence.
    """
    ids: dict[str, None] = {}
    faults = []
    for name in names:
        try:
            row = stream.resolve_edit(name)
        except UnknownNameError as error:
            faults.append(str(error))
            continue
        live = [item.occurrence for item in stream.index.find_occurrences(row.id) if item.status == "live"]
        faults += [f"{item} is live: take it back first, `errata withdraw {row.id}`" for item in live]
        ids[row.id] = None
    if faults or not ids:
        raise InputError(f"erase: expected edits that are not live, found {'; '.join(faults) or 'none'}. Nothing was erased")
    return list(ids)


def survey_log(stream: Stream, ids: Iterable[str]) -> Survey:
    """Read the whole log for what it says about the edits.

    Raises:
        InputError: the same fact stands under an id that was not named, or a served state carries one of the edits.
    """
    commits = [stream.log.read(seq) for seq in range(stream.head.seq + 1)]
    survey = Survey(_gather(stream, commits, list(ids)))
    present: set[str] = set()
    for commit in commits:
        outcomes = stream.read_outcomes(commit)
        for outcome in outcomes:
            if outcome.occurrence and split_occurrence(outcome.occurrence)[0] in survey.wanted.ids:
                survey.last = commit.seq
                (present.add if outcome.outcome == "live" else present.discard)(outcome.occurrence)
        for row in stream.read_batch(commit):
            if row.edit.edit_id in survey.wanted.ids:
                survey.last = commit.seq
                survey.lines.setdefault(row.file, set()).add(row.line)
        if present and isinstance(commit, AcceptedCommit):
            survey.commits.add(commit.seq)
        _note_named(stream, commit, survey)
    if stream.head.champion in survey.commits:
        raise InputError(f"erase: expected no served state with the edits, found commit {stream.head.champion}, the champion, with them")
    return survey


def _gather(stream: Stream, commits: list[Commit], ids: list[str]) -> Wanted:
    said: dict[str, set[str]] = {}
    secrets: dict[str, None] = {}
    rows = [row for commit in commits for row in stream.read_batch(commit) if not row.erased]
    for row in rows:
        said.setdefault(row.edit.content_id, set()).add(row.edit.edit_id)
        if row.edit.edit_id in ids:
            secrets |= dict.fromkeys((row.edit.subject, row.edit.rewrite_prompt))
    contents = {content for content, owners in said.items() if owners & set(ids)}
    same = set().union(*(said[content] for content in contents)) - set(ids)
    standing = sorted(name for name in same if stream.index.find_occurrences(name))
    if standing:
        raise InputError(f"erase: expected the same fact under no other name, found it as {', '.join(standing)}: name them, too")
    return Wanted(frozenset({*ids, *same}), frozenset(contents), tuple(text for text in secrets if len(text) >= _SHORTEST))


def _note_named(stream: Stream, commit: Commit, survey: Survey) -> None:
    for what, digest in list_named(commit):
        survey.named.setdefault(digest, what)
        # What stands in since an earlier erasure may have to go as well.
        if stream.objects.exists(digest):
            survey.named.setdefault(stream.objects.locate(digest), what)
    if commit.report:
        survey.reports.setdefault(commit.report, []).append(commit.seq)
    if commit.manifest is None or not isinstance(commit, AcceptedCommit | InitCommit):
        return
    survey.named.setdefault(commit.manifest, "manifest")
    manifest = stream.objects.get_json(commit.manifest)
    for what, digest in list_layers(manifest):
        # A snapshot is of the first commit that names it; an artifact that a commit without the edits names is without them.
        carries = commit.seq in survey.commits and what != "change list"
        known = survey.layers.setdefault(digest, carries)
        survey.layers[digest] = known and (carries or what == "snapshot")
    keeping = [layer for layer in manifest.get("layers", ()) if layer["editor"] in _KEEPING]
    for what, digest in chain.from_iterable(map(list_layer, keeping)):
        if what != "change list":
            survey.versions.setdefault(digest, set()).add(commit.seq)
        if what == "artifact":
            survey.artifacts.setdefault(commit.seq, set()).add(digest)


def _note_tombstones(stream: Stream, survey: Survey) -> None:
    """Note the versions that are without the edits and carry them all the same: neurons of a withdrawn edit keep their keys."""
    for digest, commits in survey.versions.items():
        entry = stream.objects.find(digest)
        if entry is not None and _list_owners(stream.storage.read(stream.key(f"objects/{digest}"))) & survey.wanted.ids:
            survey.commits |= commits
            for carrier in (digest, *(artifact for seq in commits for artifact in survey.artifacts.get(seq, ()))):
                survey.layers[carrier] = True


def plan_erasure(stream: Stream, survey: Survey, keep: Iterable[str], erase_pairs: ErasePairs, find_lines: FindLines) -> ErasureRecord:
    """List what goes, and store what stands in for it. Nothing is deleted yet.

    Args:
        keep: objects of the new manifest.
    """
    wanted, kept = survey.wanted, set(keep)
    _note_tombstones(stream, survey)
    gone: dict[str, Gone] = {}
    loose: list[tuple[str, datetime]] = []
    reach = _find_time(stream, survey.last)
    inbox = tuple(_plan_inbox(stream, wanted, find_lines))
    late = bool(inbox)
    prefix = stream.key("objects/")
    for entry in list(stream.storage.list(prefix)):
        digest = entry.key.removeprefix(prefix)
        if digest in kept:
            continue
        if digest in survey.layers and digest not in survey.named:  # a block of neurons may be an object of pairs, too
            if survey.layers[digest]:
                gone[digest] = Gone(digest=digest, what="weights or state with the edit")
            continue
        data = stream.storage.read(entry.key)
        kind = _read_kind(data)
        if kind in _WEIGHTS and digest not in survey.named:
            loose.append((digest, entry.modified))
            continue
        found = _redact(data, kind, wanted, survey.lines.get(digest, set()), erase_pairs, find_lines)
        if found is None:
            continue
        what, stand_in = found
        named = digest in survey.named
        late = late or (not named and entry.modified > reach and what != "segment")
        gone[digest] = Gone(digest=digest, by=stream.objects.put(stand_in) if named and stand_in is not None else None, what=what)
    # States and weights that no commit names: candidates that were refused, or left by a killed run. One that is younger than all that
    # is known of the edits cannot carry them, and may be in somebody's hands.
    gone |= {digest: Gone(digest=digest, what="candidate") for digest, made in loose if late or made <= reach}
    return ErasureRecord(
        seq=stream.head.seq + 1,
        ids=tuple(sorted(wanted.ids)),
        commits=tuple(sorted(survey.commits)),
        reports=tuple(sorted(seq for digest in gone for seq in survey.reports.get(digest, ()))),
        objects=tuple(gone[digest] for digest in sorted(gone) if gone[digest].by != digest),
        keys=tuple(_list_keys(stream, wanted, {digest for digest, item in gone.items() if item.what == "segment"})),
        inbox=inbox,
    )


def draft_tombstones(stream: Stream, ids: Iterable[str], reason: str) -> list[Outcome]:
    """The outcomes of an erasure commit, in order of arrival: every occurrence that is not erased already."""
    rows: dict[str, EditRow] = {}
    for row in sorted((row for name in ids for row in stream.index.find_occurrences(name)), key=lambda row: (row.seq, row.position)):
        if row.status != "erased" and (row.occurrence not in rows or row.status not in ASIDE):
            rows[row.occurrence] = row
    return [Outcome(outcome="erased", occurrence=name, reason=reason, before=Standing(status=row.status)) for name, row in rows.items()]


def find_remains(stream: Stream, secrets: Iterable[str]) -> list[str]:
    """Keys of the stream whose bytes still quote a text: other edits of the same subject, remarks in commits, which nobody can change."""
    sought = [form for text in secrets for form in {text.encode(), json.dumps(text)[1:-1].encode()}]
    found = []
    for entry in stream.storage.list(stream.key("")):
        if any(form in stream.storage.read(entry.key) for form in sought):
            found.append(entry.key)
    return found


def _find_time(stream: Stream, seq: int) -> datetime:
    """When a commit was stored, by the storage's own clock."""
    found = stream.storage.find(stream.key(f"commits/{seq:08d}.json"))
    assert found is not None, f"commit {seq} has been read"
    return found.modified


def _plan_inbox(stream: Stream, wanted: Wanted, find_lines: FindLines) -> Iterable[Waiting]:
    for name in list_waiting(stream):
        data = stream.storage.read(stream.key(f"inbox/{name}"))
        lines = find_lines(data, wanted)
        if not lines:
            continue
        digest = digest_of(data)
        use = stream.index.find_file(digest)
        consumed = {line for first, last in (use.lines if use else ()) for line in range(first, last + 1)}
        rest = _blank_lines(data, lines | consumed)
        yield Waiting(name=name, digest=digest, by=stream.objects.put(rest) if rest.strip() else None)


def _list_keys(stream: Stream, wanted: Wanted, segments: set[str]) -> Iterable[str]:
    prefix = stream.key("")
    for entry in stream.storage.list(stream.key("checkpoints/")):
        checkpoint = json.loads(stream.storage.read(entry.key))
        if any(segment["digest"] in segments for segment in checkpoint["segments"]):
            yield entry.key.removeprefix(prefix)
    for entry in stream.storage.list(stream.key("prepared/")):
        names = [name for name, _ in json.loads(stream.storage.read(entry.key))]
        # The name of a pair holds the ids of all its edits. A hint that goes for a likeness costs a computation.
        if any(identity in name for name in names for identity in wanted.ids):
            yield entry.key.removeprefix(prefix)


# Objects, by what they hold


def _read_kind(data: bytes) -> str | None:
    """What a safetensors object of ours is; None for anything else."""
    kind = read_metadata(data).get("kind")
    return None if kind is None else str(kind)


def _list_owners(data: bytes) -> set[str]:
    """The edits that a safetensors object of ours names as owners of its rows."""
    metadata = read_metadata(data)
    return {edit_id for part in (metadata, metadata.get("tail", {})) for ids in part.get("owners") or () for edit_id in ids}


def _redact(
    data: bytes, kind: str | None, wanted: Wanted, lines: set[int], erase_pairs: ErasePairs, find_lines: FindLines
) -> tuple[str, bytes | None] | None:
    """What an object is and what stands in for it; None where it holds nothing of the edits."""
    if kind is not None:
        stand_in = erase_pairs(data, wanted.ids) if kind == "pairs" else None
        return ("pairs", stand_in) if stand_in is not None else None
    try:
        rows = [json.loads(line) for line in data.split(b"\n") if line.strip()]
    except (ValueError, RecursionError):
        rows = []
    if rows and all(isinstance(row, dict) for row in rows):
        if len(rows) == 1 and "additions" in rows[0]:
            planned = [item["row"] for item in rows[0]["additions"]] + rows[0]["rows"]
            return ("order", None) if any(_is_wanted(row, wanted) for row in planned) else None
        if len(rows) == 1 and "held_out" in rows[0]:
            return _pack("report", _redact_report(rows[0], wanted), rows[0], canonical_json)
        if "outcome" in rows[0]:
            return _pack("outcomes", [_redact_outcome(row, wanted) for row in rows], rows, _spell_rows)
        if {"position", "occurrence", "edit"} <= rows[0].keys():
            return _pack("batch", [_redact_row(row) if _is_wanted(row, wanted) else row for row in rows], rows, _spell_rows)
        if _is_segment(rows[0]):
            held = any(row.get("edit", {}).get("id") in wanted.ids and row["edit"]["content"] for row in rows)
            return ("segment", None) if held else None
    found = lines | find_lines(data, wanted)
    stand_in = _blank_lines(data, found)
    return ("file", stand_in) if stand_in != data else None


def _pack(what: str, redacted: Any, before: Any, spell: Callable[[Any], bytes]) -> tuple[str, bytes] | None:
    return (what, spell(redacted)) if redacted != before else None


def _spell_rows(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(canonical_json(row) + b"\n" for row in rows)


def _is_wanted(row: Mapping[str, Any], wanted: Wanted) -> bool:
    return split_occurrence(row["occurrence"])[0] in wanted.ids and not row.get("erased")


def _is_segment(row: Mapping[str, Any]) -> bool:
    return ("edit" in row and isinstance(row["edit"], dict) and "slot" in row["edit"]) or (set(row) == {"file"})


def _redact_row(row: Mapping[str, Any]) -> dict[str, Any]:
    identity = split_occurrence(row["occurrence"])[0]
    edit = Edit(id=identity, subject=BLANK, prompt=f"{BLANK} {SLOT}", target_new=BLANK)
    # Its risk goes too: whoever guesses a short target could confirm it by its perplexity.
    blank = BatchRow.model_validate({**row, "edit": edit, "origin": "", "erased": True, "risk": None})
    return blank.model_dump(mode="json", exclude_none=True)


def _redact_outcome(row: dict[str, Any], wanted: Wanted) -> dict[str, Any]:
    """Names and pairs stay: the recipe stands on them. Where a record came from goes, and a remark that quotes it."""
    redacted = dict(row)
    if "occurrence" in row and split_occurrence(row["occurrence"])[0] in wanted.ids:
        redacted.pop("origin", None)
    for name in ("reason", "origin"):
        if name in redacted and wanted.quotes(redacted[name]):
            redacted[name] = BLANK
    return redacted


def _redact_report(report: dict[str, Any], wanted: Wanted) -> dict[str, Any]:
    """Numbers stay; what the model said goes."""
    redacted: dict[str, Any] = json.loads(json.dumps(report))
    for row in redacted["rows"] + (redacted.get("withdrawal") or {"rows": []})["rows"]:
        if row["id"] in wanted.ids:
            row |= {name: BLANK for name in ("answer", "answer_before", "answer_base") if name in row}
        else:
            row |= {name: BLANK for name in ("answer", "answer_before", "answer_base") if name in row and wanted.quotes(row[name])}
    return redacted


def _blank_lines(data: bytes, lines: set[int]) -> bytes:
    """The file without the content of some lines; every other line keeps its number."""
    return b"\n".join(b"" if number in lines else line for number, line in enumerate(data.split(b"\n"), start=1))
