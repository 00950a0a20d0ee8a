"""The withdrawal test of the champion: each edit alone switched off, and what its prompt says then."""

import time
from datetime import UTC, datetime

from errata.candidates import load_artifacts, load_state, read_blocks
from errata.manifests import PairRef
from errata.switching import choose_sample, switch_off
from errata.traceability import TraceSummary, summarise
from registry.undoing import list_served
from tasks._progress import show_progress
from tasks._session import load_under, open_named
from tasks._task import stage
from tasks.asking import read_champion
from tasks.projecting import open_registry


@stage
def trace_champion(stream: str, sample: int | None, seed: int) -> TraceSummary:
    """Switch off live edits of the champion, each alone.

    Args:
        sample: how many edits; None is all where that takes one pass, else `errata.switching.FEW`.
        seed: of the sample.

    Raises:
        EditorError: a system cannot be solved without a pair.
    """
    settings, opened = open_named(stream)
    begun = time.perf_counter()
    manifest = read_champion(opened)
    model = load_under(settings, opened, manifest)
    # Only what is written is switched off pair by pair: a memory says itself which fact it used, and an adapter cannot be taken apart.
    artifacts = load_artifacts(opened.objects, manifest.model_copy(update={"layers": manifest.layers[:1]}))
    served = [each for each in list_served(opened) if each.pairs]
    chosen = choose_sample(artifacts[-1] if artifacts else None, served, sample, seed)
    chosen.sort(key=lambda each: (each.row.seq, each.row.position))
    edits = {edit.edit_id: edit for edit in opened.read_edits(each.row for each in chosen)}
    state = load_state(opened.objects, model.editor, manifest.layers[0].state)
    with show_progress("switching edits off") as on_progress:
        blocks = read_blocks(opened.objects, [PairRef(pairs=each.pairs, row=each.line) for each in chosen])
        rows = switch_off(model.base, model.editor, state, blocks, edits, settings.evaluate.batch_tokens, on_progress)
    measured = summarise(rows, live=len(served))
    seconds = round(time.perf_counter() - begun, 3)
    return TraceSummary(stream=opened.name, commit=opened.head.champion, seed=seed, measured=measured, seconds=seconds)


@stage
def show_trace(stream: str, found: TraceSummary) -> None:
    """The shares as metrics `trace.…` of the champion's MLflow run, if MLflow shows it and an edit was asked."""
    settings, opened = open_named(stream)
    registry = open_registry(settings)
    version = registry.find_version(stream, found.commit) if found.measured.retrieve_success.edits else None
    if version is not None:
        now = datetime.now(UTC)
        minutes = int((now - opened.log.read(found.commit).time).total_seconds() // 60)
        registry.log_metrics(version, "trace", found.measured.metrics(), int(now.timestamp() * 1000), max(minutes, 0))
