"""Live edits into an adapter: lessons from memory and base, a student on what is served, judged and committed as a distillation.

The weights beneath stay as they are. What is computed on the way lies in the cache, so that a killed run goes on where it was.
"""

import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

from errata.candidates import load_artifacts
from errata.distillation.distil import distil_lessons
from errata.distillation.lessons import Drawn, draw_lessons
from errata.distillation.report import DistilReport
from errata.editors.adapters import LoraAdapter
from errata.editors.artifacts import Artifact
from errata.editors.memory import EditMemory
from errata.edits import Edit, digest_of
from errata.errors import ErasedError, KeyMissingError
from errata.evaluation.metrics import all_correct
from errata.evaluation.scoring import score_targets
from errata.modeling.loading import Base
from errata.modeling.patch import attach
from errata.modeling.queries import find_room
from errata.report import Report
from errata.rounds import Round, Trained
from errata.settings import Settings
from errata.summary import DistillationSummary
from registry.events import Commit, DistillationCommit, RejectionCommit
from registry.fold import split_occurrence
from registry.history import is_accepted
from registry.orders import DistillationOrder
from registry.stream import Stream
from registry.tiers import ADAPTER, read_learned
from tasks._progress import show_training
from tasks._session import load_model, open_named, read_manifest
from tasks._task import stage
from tasks._tiers import put_adapter, recall_all
from tasks.committing import commit_once, describe_writer, is_promoted, shorten_reasons
from tasks.evaluating import judge_whole

_ENOUGH = 0.5
"""Share of the live edits that memory has to answer, for a base to be one that reads its context."""
_LOOKED_BACK = 50
"""Accepted commits among which an adapter to go on from is looked for."""


@stage
def order_distillation(stream: str, afresh: bool) -> str | None:
    """All live edits, and the adapter to go on from, as a stored order; None where there are none, or the head's adapter was taught all.

    Args:
        afresh: go on from none, and distil even what is known.
    """
    settings, opened = open_named(stream)
    head, rows = opened.head, list(opened.index.find_rows("live"))
    learned = read_learned(opened, head.manifest)
    if not rows or (not afresh and learned.absorbed | learned.unlearned >= {row.id for row in rows}):
        return None
    live, start = tuple(row.occurrence for row in rows), None if afresh else find_start(settings, opened)
    order = DistillationOrder(seq=head.seq + 1, parent=head.digest, manifest=head.manifest, accepted=head.accepted, live=live, start=start)
    return order.store(opened.objects)


@stage
def train_adapter(stream: str, order: str) -> Trained:
    """An adapter on the weights of the order's head that answers as memory does, stored. What it does not answer by itself in the end it
    has not absorbed.

    Only edits that memory answers are taught: a base that does not take a fact from its context would teach what was true before.
    """
    settings, opened = open_named(stream)
    begun = time.perf_counter()
    work, model = DistillationOrder.load(opened.objects, order), load_model(settings, opened)
    head = read_manifest(opened, work.manifest)
    rows = [opened.resolve_edit(name) for name in work.live]
    edits = list(opened.read_edits(rows))
    memory = recall_all(settings, opened, head.base, rows)
    told = find_answered_by(settings, model.base, [memory], edits)
    if sum(told) < _ENOUGH * len(edits):
        said = (
            f"Memory answers {sum(told)} of {len(edits)} live edits: this base does not take facts from its context, and cannot teach them."
        )
        return Trained(adapter=None, live=len(edits), absorbed=(), went_on=False, told=said, seconds=time.perf_counter() - begun)
    taught = [edit for edit, takes in zip(edits, told, strict=True) if takes]
    drawn = draw_lessons(taught, partial(_teach, model.base, memory), model.base.tokenizer, settings.evaluate.seed)
    beneath = load_artifacts(opened.objects, head.model_copy(update={"layers": head.layers[:1]}))
    with show_training("distilling") as on_progress:
        made = distil_lessons(
            model.base,
            beneath,
            drawn.lessons,
            settings.distill,
            find_folder(settings),
            absorbed=work.live,
            start=LoraAdapter.from_bytes(opened.objects.get(work.start)) if work.start else None,
            on_progress=on_progress,
        )
    known = find_answered_by(settings, model.base, [*beneath, made.adapter], edits)
    absorbed = tuple(name for name, takes in zip(work.live, known, strict=True) if takes)
    rest = tuple(name for name in work.live if name not in set(absorbed))
    return Trained(
        adapter=opened.objects.put(replace(made.adapter, absorbed=absorbed, unlearned=rest).to_bytes()),
        live=len(edits),
        absorbed=absorbed,
        went_on=work.start is not None,
        told=tell_training(made.report, drawn, len(edits), len(absorbed)),
        seconds=time.perf_counter() - begun,
    )


@stage
def stack_adapter(stream: str, trained: Trained) -> tuple[str, Round] | None:
    """A trained adapter on the head as it is now: an order and a candidate that nothing points to yet. None where an edit that it has
    absorbed is not live any more: then it has to be trained again."""
    settings, opened = open_named(stream)
    head = opened.head
    if not all(_still_says(opened, name) for name in trained.absorbed):
        return None
    assert trained.adapter is not None, "what was not trained is not put anywhere"
    order = DistillationOrder(
        seq=head.seq + 1, parent=head.digest, manifest=head.manifest, accepted=head.accepted, live=trained.absorbed, start=None
    )
    manifest = read_manifest(opened, head.manifest)
    above = put_adapter(settings, opened, manifest, LoraAdapter.from_bytes(opened.objects.get(trained.adapter)))
    candidate = Round(
        rest=trained.absorbed,
        manifest=opened.objects.put(above.crown(manifest).to_bytes()),
        fits={},
        told=(trained.told,),
        seconds={"distill": trained.seconds},
    )
    return order.store(opened.objects), candidate


@stage
def judge_distillation(stream: str, candidate: Round) -> Round:
    """The candidate with its report and the gate's decision: see `judge_whole`. An adapter cannot be taken apart."""
    settings, opened = open_named(stream)
    judged = judge_whole(settings, opened, load_model(settings, opened), candidate)
    if candidate.rest:
        return judged
    assert judged.decision is not None, "a round that was judged has a decision"
    said = {"verdict": "reject", "reasons": ("No live edit takes with the adapter alone.",)}
    return judged.model_copy(update={"decision": judged.decision.model_copy(update=said)})


@stage
def commit_distillation(stream: str, order: str, trained: Trained, judged: Round, dry_run: bool = False) -> DistillationSummary:
    """Make the distillation a commit, or its refusal. What training left in the cache goes.

    Raises:
        ConflictError: another writer committed since the order was made.
    """
    settings, opened = open_named(stream)
    work, decision = DistillationOrder.load(opened.objects, order), judged.decision
    assert decision is not None and judged.report is not None, "a distillation is judged before it is committed"
    accepted = decision.verdict == "accept"
    fields = {
        "seq": work.seq,
        "parent": work.parent,
        "report": judged.report,
        "decision": decision.verdict,
        "reasons": shorten_reasons((*judged.told, *(() if accepted else ("The adapter was refused.",)), *decision.reasons)),
        "seconds": {name: round(value, 3) for name, value in judged.seconds.items()},
        **describe_writer(settings),
    }
    draft: Commit = RejectionCommit(outcomes=opened.objects.put_rows([]), manifest=work.manifest, **fields)
    if accepted:
        promoted = is_promoted(settings, opened)
        draft = DistillationCommit(of=work.accepted, absorbed=len(judged.rest), manifest=judged.manifest, promoted=promoted, **fields)
    if not dry_run:
        commit_once(opened, draft)
        shutil.rmtree(find_folder(settings), ignore_errors=True)
    report = Report.from_bytes(opened.objects.get(judged.report))
    return DistillationSummary(
        stream=opened.name,
        commit=None if dry_run else draft.seq,
        decision=draft.decision,
        live=report.live or 0,
        taught=trained.live,
        absorbed=len(judged.rest),
        went_on=trained.went_on,
        metrics=report.metrics(),
        reasons=draft.reasons,
        seconds=draft.seconds,
    )


@stage
def refuse_distillation(stream: str, trained: Trained) -> DistillationSummary:
    """What is said where nothing could be trained. Nothing is committed."""
    _, opened = open_named(stream)
    return DistillationSummary(
        stream=opened.name,
        commit=None,
        decision="reject",
        live=opened.index.counts().get("live", 0),
        taught=0,
        absorbed=0,
        went_on=False,
        metrics={},
        reasons=(trained.told,),
        seconds={"distill": round(trained.seconds, 3)},
    )


def find_start(settings: Settings, stream: Stream) -> str | None:
    """Digest of the newest adapter of the size that is wanted, on the head's base, whose absorbed edits are all live still, among those of
    the last accepted commits."""
    head, seen = stream.head, set[str]()
    commits = (stream.log.read(seq) for seq in range(head.accepted, 0, -1))
    for commit in islice(filter(is_accepted, commits), _LOOKED_BACK):
        with suppress(KeyMissingError, ErasedError):
            layer = read_manifest(stream, commit.manifest or "").find_above(ADAPTER)
            if layer is None or layer.artifact is None or layer.artifact in seen:
                continue
            seen.add(layer.artifact)
            adapter = LoraAdapter.from_bytes(stream.objects.get(layer.artifact))
            wanted = adapter.base == head.base and (adapter.rank, adapter.alpha) == (settings.distill.r, settings.distill.alpha)
            if wanted and all(_still_says(stream, name) for name in adapter.absorbed):
                return layer.artifact
    return None


def find_answered_by(settings: Settings, base: Base, artifacts: Sequence[Artifact], edits: Sequence[Edit]) -> list[bool]:
    """Of each edit, whether it takes with these artifacts on the base."""
    asked = [(edit.rewrite_prompt, edit.target_new) for edit in edits]
    with attach(base, artifacts):
        scored = score_targets(base, asked, batch_tokens=settings.evaluate.batch_tokens)
    return [all_correct(scored[question].chosen, scored[question].target) for question in asked]


def find_folder(settings: Settings) -> Path:
    """Where training keeps what it has done; it holds prompts of edits."""
    return settings.cache / "distill" / digest_of(f"{settings.root} {settings.stream}".encode())[:16]


def tell_training(report: DistilReport, drawn: Drawn, live: int, absorbed: int) -> str:
    """What an adapter was taught, and how well."""
    told = f"{absorbed} of {live} live edits take with the adapter alone, after {report.steps} steps"
    told += f" on {report.lessons_inside} prompts that memory answers and {report.lessons_outside} that it leaves to the base"
    for name in ("inside", "outside"):
        before, after = getattr(report.before, name), getattr(report.after, name)
        if before is not None and after is not None:
            told += f"; KL {name} {before:.3f} → {after:.3f} nats per token"
    told += f"; {len(drawn.unrouted)} of their prompts were not taught, since memory does not answer them" if drawn.unrouted else ""
    return f"{told}."


def _teach(base: Base, memory: EditMemory, prompts: Sequence[str]) -> list[list[int] | None]:
    return memory.write_prompts(base, prompts, find_room(base))


def _still_says(stream: Stream, occurrence: str) -> bool:
    """Whether the edit that an adapter knows is live, and says what it said."""
    identity, seq = split_occurrence(occurrence)
    now = stream.index.find_edit(identity)
    then = {row.content for row in stream.index.find_occurrences(identity) if row.seq == seq}
    return now is not None and now.status == "live" and now.content in then
