"""The log as an object of doubt: every object that it names is read, the stored pairs are merged again, and what is found is reported.

What follows from the log (manifests, change lists, snapshots, artifacts) is made again. What the log stands on (commits, outcomes, batches,
pairs, reports, raw files) is nowhere else: a loss is named, with the edits that it affects.
"""

import time
from collections.abc import Callable, Iterator, Sequence

from errata.candidates import spell_changes
from errata.edits import digest_of
from errata.errors import ConflictError, FormatError, KeyMissingError, ObjectCorruptError, UnknownNameError
from errata.findings import Finding, FindingState, RebuildReport, describe_fault, find_fault
from errata.manifests import PairRef, read_refs, sort_refs
from errata.replay import Replay
from errata.settings import Settings, load_settings
from errata.steps import Entry, Remade, Site, Step
from registry.collection import list_given_up
from registry.commit import commit as make_commit
from registry.erased import Erasure, finish_erasures, read_erasures
from registry.events import (
    CalibrationCommit,
    Commit,
    DistillationCommit,
    ErasureCommit,
    RebaseCommit,
    RebuildCommit,
    ReturnCommit,
    SummingCommit,
)
from registry.fold import Head, list_written, split_occurrence
from registry.history import History, is_accepted, list_named, open_history
from registry.rows import Outcome
from registry.stream import open_stream
from tasks._progress import show_progress
from tasks._session import load_named
from tasks._task import stage
from tasks.committing import describe_writer

_MEANING = {
    "pairs": "keys and residuals of these edits are nowhere else: they cannot be subtracted, nor can what was built on them be made again",
    "outcomes": "what became of these records is nowhere else: which of them were accepted, and what they replaced",
    "batch": "the text of these edits is nowhere else, but for the raw file that they came in",
    "report": "what was measured of this commit is nowhere else; no edit is affected",
    "live list": "which pairs it summed, and the outcomes that would say so are lost, too",
    "erased": "what an erasure deleted, and what stands in for it, is nowhere else",
    "file": "the lines as they were sent are nowhere else; the edits are in the batch",
}
"""What a loss means."""
_LOST = (FormatError, KeyMissingError, ObjectCorruptError)


@stage
def replay_log(stream: str, to: int | None, check: bool) -> RebuildReport:
    """Walk the log up to commit `to` (None: its head), compare, and mend what can be mended, unless only a check is wanted.

    Raises:
        UnknownNameError: no such stream or commit.
        ConflictError: another writer committed, and what was made again is not that of the newest state any more.
    """
    settings, begun = load_settings(stream=stream), time.perf_counter()
    history = open_history(settings.root, settings.stream)
    findings: list[Finding] = []
    if not check:
        finish_erasures(history.storage, history.key(""))
    erasures = [erasure for erasure in read_erasures(history.storage, history.key("")) if is_committed(history, erasure)]
    for erasure in erasures:
        if not erasure.done:
            detail = "an erasure is committed and not carried out: any command that opens the stream goes on with it"
            findings.append(Finding(commit=erasure.record.seq, what="erasure", state="mendable", detail=detail, edits=erasure.record.ids))
    first, head, goal = _read_ends(history, to, findings)
    if first is None or head is None:
        return RebuildReport(
            stream=history.name,
            to=0,
            check=check,
            recipe=None,
            compared={},
            worst=0.0,
            unverified=(),
            findings=tuple(findings),
            seconds=time.perf_counter() - begun,
        )
    last = head.seq if to is None else to
    if last > head.seq and not findings:
        raise UnknownNameError(f"commit: expected 0 to {head.seq} in stream {history.name!r}, found {to}")
    find_site = _remember_sites(settings, history)
    site = find_site(first)
    given_up = list_given_up(history, None if to is None else goal)
    steps = _remember_steps(history)
    hollow = frozenset(seq for erasure in erasures for seq in erasure.record.commits)
    replay = Replay(history.objects, site.editor, site.base, site.profile, steps, mend=not check, given_up=given_up, hollow=hollow)
    remade: Remade | None = None
    reported: set[str] = set()
    parent = 0
    with show_progress("replaying commits") as on_progress:
        for commit, position in history.walk():
            if commit.seq > last or replay.parted:
                break
            replay.findings += _check_primary(history, commit, reported, mend=not check)
            if is_accepted(commit):
                whole = not findings and commit.seq == head.accepted
                solve = commit.seq == goal or (check and not isinstance(commit, ReturnCommit))
                moved = (position.base, position.profile) != (replay.base, replay.profile)
                entry = _build_entry(commit, parent, find_site(position) if moved else None)
                remade = replay.follow(entry, solve=solve, remake=whole)
            parent = position.accepted
            on_progress(commit.seq + 1, last + 1)
    made = None
    if remade is not None:
        made = commit_rebuilt(settings, head, remade.manifest)
        replay.settle(remade.instead_of)
    return RebuildReport(
        stream=history.name,
        to=min(last, head.seq),
        check=check,
        recipe=replay.recipe,
        compared=dict(replay.compared),
        worst=replay.worst,
        unverified=tuple(replay.unverified),
        archived=tuple(sorted(set(replay.archived))),
        findings=(*replay.findings, *findings),
        commit=made,
        seconds=round(time.perf_counter() - begun, 3),
    )


def commit_rebuilt(settings: Settings, head: Head, manifest: str) -> int:
    """Point to a manifest that says the same as the head's in other objects; the number of the commit.

    Raises:
        ConflictError: the head has moved on.
    """
    stream = open_stream(settings.root, settings.stream, settings.cache)
    if stream.head.digest != head.digest:
        raise ConflictError(f"expected commit {head.seq} to be the newest, found {stream.head.seq}: another writer committed. Run it again")
    draft = RebuildCommit(
        seq=head.seq + 1,
        parent=head.digest,
        of=head.accepted,
        manifest=manifest,
        promoted=head.champion == head.accepted,
        report=stream.log.read(head.accepted).report,
        decision="rebuilt",
        reasons=(f"objects of commit {head.accepted} were damaged, and come out with other bytes on this machine",),
        **describe_writer(settings),
    )
    return make_commit(stream, draft, head).seq


def load_site(settings: Settings, history: History, head: Head) -> Site:
    """Where the state of a head is."""
    return Site(load_named(settings, history.storage, head.base, head.profile, head.editors[0]).editor, head.base, head.profile)


def derive_step(history: History, commit: Commit) -> Step | None:
    """What an accepted commit does to the state, from its outcomes and those of the commits whose edits leave; None where they are lost.

    A rebase has an outcome for every live edit: what stays live is all there is.
    """
    if isinstance(commit, CalibrationCommit) and commit.live is None:
        return Step(adopts=True)
    if isinstance(commit, SummingCommit):
        listed = read_live(history, commit)
        return Step(add=tuple(read_refs(listed)), fresh=True) if listed is not None else None
    try:
        outcomes = history.read_outcomes(commit)
        fresh = isinstance(commit, RebaseCommit)
        leaving = () if fresh else (outcome for outcome in outcomes if _leaves_pair(outcome, commit))
        left = (_find_left(history, outcome) for outcome in leaving)
        remove = dict.fromkeys(ref for ref in left if ref is not None)
    except _LOST:
        return None
    come = (outcome for outcome in outcomes if outcome.outcome == "live" and outcome.pairs is not None)
    add = dict.fromkeys(PairRef(pairs=outcome.pairs or "", row=outcome.row or 0) for outcome in come)
    return Step(remove=tuple(remove), add=tuple(add), fresh=fresh)


def _leaves_pair(outcome: Outcome, commit: Commit) -> bool:
    """Whether an edit that was live leaves, or gets another pair."""
    older = outcome.occurrence is not None and split_occurrence(outcome.occurrence)[1] < commit.seq
    return older and outcome.outcome in ("replaced", "withdrawn", "live")


def _find_left(history: History, outcome: Outcome) -> PairRef | None:
    """The pair that an edit had before; None of one that answered from memory."""
    before = outcome.before
    if before is not None:
        return PairRef(pairs=before.pairs, row=before.row) if before.pairs is not None and before.row is not None else None
    pairs, row = history.find_pair(outcome.occurrence or "")
    return PairRef(pairs=pairs, row=row)


def read_live(history: History, commit: SummingCommit) -> bytes | None:
    """The pairs that a commit summed: as they are stored, else as the outcomes up to there say; None where those are lost, too."""
    assert commit.live is not None, f"{commit.name} has summed no pairs"
    if find_fault(history.objects, commit.live) is None:
        return history.objects.get(commit.live)
    try:
        rows = history.list_live(commit.seq)
    except _LOST:
        return None
    listed = spell_live([PairRef(pairs=row.pairs or "", row=row.row or 0) for row in list_written(rows)])
    return listed if digest_of(listed) == commit.live else None


def spell_live(refs: Sequence[PairRef]) -> bytes:
    """What a compaction stores as its live list."""
    return spell_changes(sort_refs(refs), [])


def is_committed(history: History, erasure: Erasure) -> bool:
    """Whether an erasure that was announced is part of the log."""
    try:
        commit = history.log.read(erasure.record.seq)
    except _LOST:
        return False
    return isinstance(commit, ErasureCommit) and commit.erased == erasure.digest


def _remember_sites(settings: Settings, history: History) -> Callable[[Head], Site]:
    """`load_site`, each once: rollbacks go to and fro between profiles."""
    sites: dict[tuple[str, str], Site] = {}

    def find_site(head: Head) -> Site:
        key = head.base, head.profile
        if key not in sites:
            sites[key] = load_site(settings, history, head)
        return sites[key]

    return find_site


def _remember_steps(history: History) -> Callable[[int], Step | None]:
    return lambda seq: derive_step(history, history.log.read(seq))


def _read_ends(history: History, to: int | None, findings: list[Finding]) -> tuple[Head | None, Head | None, int]:
    """The first and the last head of the readable part of the log, and the newest accepted commit up to `to`. Where the log is broken,
    that is a finding."""
    first: Head | None = None
    head: Head | None = None
    goal = 0
    for commit, position in history.walk():
        first, head = first or position, position
        if to is None or commit.seq <= to:
            goal = position.accepted
    broken = history.find_break(head)
    if broken is not None:
        detail = f"{broken.reason}. It is nowhere else, and nothing from it on can be read; what is before it is intact"
        findings.append(Finding(commit=broken.seq, what="commit", state="lost", detail=detail))
    return first, head, goal


def _build_entry(commit: Commit, parent: int, site: Site | None) -> Entry:
    manifest = commit.manifest or ""
    match commit:
        case ReturnCommit(target=target):
            return Entry(commit.seq, parent, manifest, restates=target, site=site)
        case DistillationCommit():
            return Entry(commit.seq, parent, manifest, restates=parent)
        case RebuildCommit(of=of):
            return Entry(commit.seq, parent, manifest, restates=of, rebuilt=True)
        case ErasureCommit():
            return Entry(commit.seq, parent, manifest, restates=parent)
        case _:
            return Entry(commit.seq, parent, manifest, site=site)


def _check_primary(history: History, commit: Commit, reported: set[str], *, mend: bool) -> Iterator[Finding]:
    """What of a commit's own objects is lost, but for what an earlier commit was `reported` to have lost: a rollback, a rebuild and a
    compaction name the report of the commit whose state they take over. A live list follows from the outcomes and is made again."""
    for what, digest in list_named(commit):
        fault = find_fault(history.objects, digest)
        if fault is None and digest not in reported and history.follow(digest) != digest:
            reported.add(digest)
            detail = "the same without edits that were erased stands in for it"
            yield Finding(commit=commit.seq, what=what, state="erased", detail=detail, digest=digest)
        if fault is not None and digest not in reported:
            reported.add(digest)
            if what == "live list" and isinstance(commit, SummingCommit) and (listed := read_live(history, commit)) is not None:
                state: FindingState = "mended" if mend else "mendable"
                if mend:
                    history.objects.put(listed)
                yield Finding(commit=commit.seq, what=what, state=state, detail=describe_fault(fault, state), digest=digest)
                continue
            edits = tuple(_list_affected(history, commit, what, digest))
            yield Finding(commit=commit.seq, what=what, state="lost", detail=f"{fault}; {_MEANING[what]}", digest=digest, edits=edits)


def _list_affected(history: History, commit: Commit, what: str, digest: str) -> Iterator[str]:
    """Occurrences that a lost object leaves without something."""
    try:
        if what == "outcomes":
            yield from (row.occurrence for row in history.read_batch(commit))
        elif what in ("pairs", "batch"):
            outcomes = history.read_outcomes(commit)
            yield from (row.occurrence for row in outcomes if row.occurrence and _hangs_on(row, commit, what, digest))
    except _LOST:
        return  # lost together: each is a finding of its own


def _hangs_on(outcome: Outcome, commit: Commit, what: str, digest: str) -> bool:
    return outcome.pairs == digest if what == "pairs" else outcome.occurrence is not None and outcome.occurrence.endswith(f"@{commit.seq}")
