"""Candidate to decision: what it does to its own edits, to older ones and to everything else, and whether that is good enough."""

import logging
import time
from collections.abc import Sequence
from typing import Any

from errata.candidates import load_artifacts
from errata.editors.artifacts import Artifact
from errata.edits import Edit
from errata.evaluation.evaluate import evaluate_candidate
from errata.gate import decide, decide_whole
from errata.monitors.locality import PROBE_TEXTS
from errata.report import COARSE, Diagnosis, Report
from errata.rounds import Round
from errata.settings import Settings
from errata.world import FILLER
from registry.orders import Order
from registry.stream import Stream
from registry.tiers import ADAPTER
from tasks._progress import show_progress
from tasks._session import Model, load_model, open_named, read_manifest
from tasks._task import stage, tell_run
from tasks._tiers import Coming, drop_adapter


@stage
def judge_candidate(stream: str, order: str, candidate: Round, earlier: Sequence[Round]) -> Round:
    """The round with its report and the gate's decision. Where something is wrong and an adapter lies over the weights, the same is tried
    without it: edits that come are not refused for what was trained before them."""
    settings, opened = open_named(stream)
    model = load_model(settings, opened)
    begun = time.perf_counter()
    work = Order.load(opened.objects, order)
    chosen = [planned for planned in work.additions if planned.row.edit.edit_id in candidate.rest]
    leaving = {name for planned in chosen for name in planned.replaces}
    sample = opened.index.sample_live(settings.evaluate.retention_sample, settings.evaluate.seed)
    retained = [opened.read_record(row).edit for row in sample if row.occurrence not in leaving]
    mates, live = find_mates(opened, candidate), opened.index.counts().get("live", 0) - len(leaving) + len(candidate.rest)

    def judge(round: Round) -> Round:
        report = measure_candidate(
            settings,
            opened,
            model,
            load_artifacts(opened.objects, read_manifest(opened, round.manifest)),
            [planned.row.edit for planned in chosen],
            retained,
            mates=mates,
            diagnoses={edit_id: Diagnosis(loss=round.losses[edit_id]) for edit_id in round.rest},
            fits=round.fits,
        )
        report = report.model_copy(update={"live": live})
        decision = decide(report, [item.decision for item in earlier if item.decision], settings.gate)
        return round.model_copy(update={"report": opened.objects.put(report.to_bytes()), "decision": decision})

    judged = judge(candidate)
    manifest = read_manifest(opened, candidate.manifest)
    if _count_refused(judged) and manifest.find_above(ADAPTER) is not None:
        come = [Coming(planned.row.occurrence, planned.row.edit, written=work.tier == "weights") for planned in chosen]
        bare = drop_adapter(settings, opened, manifest, come, [opened.resolve_edit(name) for name in leaving])
        without = candidate.model_copy(update={"manifest": opened.objects.put(bare.crown(manifest).to_bytes()), "told": bare.told})
        without = judge(without)
        judged = without if _count_refused(without) < _count_refused(judged) else judged
    return judged.model_copy(update={"seconds": {**candidate.seconds, "evaluate": time.perf_counter() - begun}})


def judge_whole(settings: Settings, stream: Stream, model: Model, candidate: Round) -> Round:
    """A candidate that changes how live edits are answered, and not which: a sample of them is asked everything that a batch is asked. A
    fault refuses the whole, since no edit is to blame."""
    begun = time.perf_counter()
    sample = list(stream.read_edits(stream.index.sample_live(settings.evaluate.retention_sample, settings.evaluate.seed)))
    artifacts = load_artifacts(stream.objects, read_manifest(stream, candidate.manifest))
    report = measure_candidate(settings, stream, model, artifacts, sample, sample)
    report = report.model_copy(update={"live": stream.index.counts().get("live", 0)})
    found = {"report": stream.objects.put(report.to_bytes()), "decision": decide_whole(report, settings.gate)}
    return candidate.model_copy(update={**found, "seconds": {**candidate.seconds, "evaluate": time.perf_counter() - begun}})


def _count_refused(judged: Round) -> int:
    """Edits of a round that cannot be accepted as they are."""
    assert judged.decision is not None, "a round that was judged has a decision"
    return 0 if judged.decision.verdict == "accept" else len(judged.decision.drop) or len(judged.rest)


def measure_candidate(
    settings: Settings,
    stream: Stream,
    model: Model,
    artifacts: Sequence[Artifact],
    edits: Sequence[Edit],
    retained: Sequence[Edit],
    **known: Any,
) -> Report:
    """`evaluate_candidate` under a stream's settings, against its newest accepted version, with its progress shown.

    Args:
        known: what else there is to say of the edits, by the names it has there.
    """
    with show_progress("evaluating") as on_progress:
        report = evaluate_candidate(
            model.base,
            artifacts,
            edits,
            retained,
            read_retention(stream),
            settings.evaluate,
            probe_texts=FILLER if model.ref.kind == "builtin" else PROBE_TEXTS,
            progress=lambda _stage, done, total: on_progress(done, total),
            **known,
        )
    warn_coarse(report)
    return report


def warn_coarse(report: Report) -> None:
    """Say so where the base's weights have too few bits for what was written. No reason to refuse: efficacy is measured as cast."""
    if (cast := report.casting) and cast.error > COARSE:
        said = f"casting: expected weights that take the change to within {COARSE:.0%}, found it {cast.error:.0%} off"
        tell_run(logging.WARNING, f"{said} and {cast.lost:.0%} of its entries lost; a base of more bits would keep them")


def find_mates(stream: Stream, candidate: Round) -> dict[str, list[Edit]]:
    """Edit id → the older edits that share its pair in the candidate."""
    mates: dict[str, list[Edit]] = {}
    older = [(edit_id, ref) for edit_id, ref in candidate.placed.items() if edit_id not in set(candidate.rest)]
    for edit_id, ref in older:
        row = stream.index.find_edit(edit_id)
        assert row is not None and row.status == "live", f"{edit_id} shares a pair and is not live"
        edit = stream.read_record(row).edit
        for own in candidate.rest:
            if candidate.placed[own] == ref:
                mates.setdefault(own, []).append(edit)
    return mates


def read_retention(stream: Stream) -> float | None:
    """Retention of the newest accepted version, as its own report has it."""
    accepted = stream.log.read(stream.head.accepted)
    return Report.from_bytes(stream.objects.get(accepted.report)).retention.efficacy.value if accepted.report else None
