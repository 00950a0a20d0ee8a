"""What `errata calibrate` finds unaided on the built-in base, against what there is without it, on edits that no search has seen: the
profile written by hand for D4S, the published gate for iReVa.

    python -m benchmarks.calibration [--editor d4s|ireva] [--budget 5] [--edits 300] [--seeds 3]

The whole flow on a fresh root, with Prefect and MLflow, timed from its start; then both profiles write the same streams of other persons
in batches of 20. Score: harmonic mean of efficacy, generalization and specificity (against the truth).
"""

import os
import tempfile
import time
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.common import MemoryBlobs, load_builtin
from benchmarks.edit_quality import share, write_stream
from errata.builtin import CAVEAT
from errata.calibration.gate_report import GateReport
from errata.calibration.report import CalibrationReport, FactSheet
from errata.candidates import load_artifacts
from errata.editors.base import Editor
from errata.editors.d4s.editor import D4S
from errata.editors.d4s.moments import Moments
from errata.editors.ireva.editor import IReVa
from errata.edits import Edit
from errata.evaluation.metrics import harmonic_mean
from errata.modeling.loading import Base
from errata.modeling.patch import attach
from errata.profiles import NeuronProfile, Profile
from errata.settings import Settings, load_settings
from errata.suggestions import suggest_neurons
from flows.console_calibrate import build_calibration, build_gate
from flows.prefect_server import start_prefect
from registry.calibrations import open_objects
from registry.shared import get_moments, get_profile
from registry.storage.base import open_storage

_UNTOUCHED = 2_000

out = Console(width=130)


def run(
    editor: Annotated[str, typer.Option(help="'d4s' or 'ireva'.")] = "d4s",
    budget: Annotated[float, typer.Option(help="Minutes for the search.")] = 5.0,
    edits: Annotated[int, typer.Option(help="Edits per stream.")] = 300,
    seeds: Annotated[int, typer.Option(help="Streams.")] = 3,
) -> None:
    base, by_hand, world = load_builtin()
    out.print(f"[dim]{CAVEAT}[/]")
    with tempfile.TemporaryDirectory() as root:
        os.environ["ERRATA_ROOT"] = root
        settings = load_settings()
        start_prefect(settings)
        begun = time.perf_counter()
        calibrated, seen = (_calibrate_gate if editor == "ireva" else _calibrate)(settings, base, budget)
        seconds = time.perf_counter() - begun
    usual, other = "by hand", by_hand
    if editor == "ireva":
        published = suggest_neurons(base.layout.count_layers(base.model), builtin=True)
        profile = NeuronProfile(base=base.digest, prepare=published.prepare, solve=published.solve)
        usual, other = "published", IReVa(profile, base.layout)
    table = Table(title=f"{edits} edits of persons the search never edited, batches of 20; calibrated in {seconds:.0f} s")
    for name in ("seed", "profile", "efficacy", "generalization", "specificity", "untouched", "score"):
        table.add_column(name, justify="right")
    gaps = []
    for seed in range(seeds):
        drawn = world.make_edits(min(len(world.persons) * 2 // 3, edits * 5 // 3), seed, "distinct")
        stream = [edit for edit in drawn if edit.subject not in seen][:edits]
        scores = {}
        for name, each in {usual: other, "calibrated": calibrated}.items():
            values = _measure(base, each, stream, world.untouched(drawn)[:_UNTOUCHED])
            scores[name] = harmonic_mean(values[:3]) or 0.0
            table.add_row(str(seed), name, *(f"{value:.3f}" for value in (*values, scores[name])))
        gaps.append(scores[usual] - scores["calibrated"])
    out.print(table)
    out.print(f"{usual} minus calibrated: {', '.join(f'{gap:+.4f}' for gap in gaps)} (wanted: at most .01, within 300 s)")


def _calibrate(settings: Settings, base: Base, budget: float) -> tuple[Editor[Any], set[str]]:
    """The editor that was found, and the subjects it was found with."""
    from flows.calibrate import calibrate_base
    from tasks.onboarding import place_base, preserve_text

    placed = place_base(settings, "builtin", None)
    found = calibrate_base(placed.ref.digest, corpus=preserve_text(placed, None), budget_minutes=budget)
    out.print(build_calibration(found.model_dump(mode="json")))
    storage = open_storage(settings.root)
    profile = Profile.model_validate_json(get_profile(storage, found.base, found.profile))
    assert profile.calibration is not None
    report = CalibrationReport.from_bytes(open_objects(storage, found.base).get(profile.calibration.report))
    moments = Moments.from_bytes(get_moments(storage, profile.solve.moments))
    return D4S(profile, moments, base.layout), _list_subjects(report.facts)


def _calibrate_gate(settings: Settings, base: Base, budget: float) -> tuple[Editor[Any], set[str]]:
    """As `_calibrate`, for iReVa."""
    from flows.calibrate import calibrate_gate
    from tasks.onboarding import place_base

    found = calibrate_gate(place_base(settings, "builtin", None).ref.digest, budget_minutes=budget)
    out.print(build_gate(found.model_dump(mode="json")))
    storage = open_storage(settings.root)
    profile = NeuronProfile.model_validate_json(get_profile(storage, found.base, found.profile))
    assert profile.calibration is not None
    report = GateReport.from_bytes(open_objects(storage, found.base).get(profile.calibration.report))
    return IReVa(profile, base.layout), _list_subjects(report.facts)


def _list_subjects(facts: FactSheet) -> set[str]:
    return {edit.subject for edit in (*facts.search, *facts.validation)}


def _measure(base: Base, editor: Editor[Any], stream: Sequence[Edit], untouched: Sequence[tuple[str, str]]) -> list[float]:
    blobs = MemoryBlobs()
    manifest, _ = write_stream(blobs, base, editor, stream, 20)
    neighbours = [(probe.prompt, probe.answers[0]) for edit in stream for probe in edit.neighborhood_prompts]
    with attach(base, load_artifacts(blobs, manifest)):
        return [
            share(base, [(edit.rewrite_prompt, edit.target_new) for edit in stream]),
            share(base, [(prompt, edit.target_new) for edit in stream for prompt in edit.paraphrase_prompts]),
            share(base, neighbours),
            share(base, untouched),
        ]


if __name__ == "__main__":
    typer.run(run)
