"""Calibration of iReVa's gate: cosines, search, profile. Every step that is measured is stored at once; an interrupted search goes on."""

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

from errata.calibration.contexts import sample_contexts
from errata.calibration.cosines import Survey, complete_edits, list_foreign, read_cosines
from errata.calibration.gate_figures import draw_cosines, draw_gate
from errata.calibration.gate_report import GateReport, GateSearch
from errata.calibration.gate_trials import GateDesk
from errata.calibration.gates import PUBLISHED, GateDone, GateTrial, choose_gate, choose_layer, propose_gates, propose_starts
from errata.calibration.report import FactSheet
from errata.calibration.summary import Asked, GateSummary, LayerRead, Surveyed, Taken
from errata.edits import SLOT, Edit
from errata.errors import EditorError
from errata.profiles import GateOptions, NeuronOptions, NeuronProfile
from errata.settings import Settings, load_settings
from errata.suggestions import CONTEXTS, suggest_neurons
from registry.calibrations import open_objects, read_steps, store_step
from registry.storage.base import Storage, open_storage
from tasks._calibration import MOST_EDITS, afford_edits, keep_choice, list_metrics, load_base, measure_step, open_root, open_runs
from tasks._progress import show_progress
from tasks._session import limit_editor
from tasks._task import stage

_TRIALS = 50
"""That a search usually takes."""
_SHARE = 0.7
"""Of the budget, for these trials."""


@stage
def survey_layers(base: str, sheet: str, seed: int) -> Surveyed:
    """The cosines of paraphrases, and of everything else, at the later half of the blocks, stored; and the edits as they are measured:
    those without paraphrases or neighbours are given some."""
    settings, storage = open_root()
    objects = open_objects(storage, base)
    facts = FactSheet.from_bytes(objects.get(sheet))
    model = load_base(settings, storage, base)
    contexts = sample_contexts(model, seed)[1:] or CONTEXTS[1:]
    search = complete_edits(facts.search, facts.validation, contexts)
    validation = complete_edits(facts.validation, facts.search, contexts)
    whole = facts.model_copy(update={"search": tuple(search), "validation": tuple(validation)})
    depth = model.layout.count_layers(model.model)
    with show_progress("reading cosines") as on_progress:
        layers = read_cosines(
            model,
            range(depth // 2, depth),
            search[:MOST_EDITS],
            list_foreign(search[:MOST_EDITS], validation),
            [context.removesuffix(SLOT).strip() for context in contexts],
            settings.evaluate.batch_tokens,
            on_progress,
        )
    completed = sum(not edit.paraphrase_prompts for edit in facts.search)
    survey = Survey(completed=completed, layers=layers)
    return Surveyed(sheet=objects.put(whole.to_bytes()), survey=objects.put(survey.to_bytes()), completed=completed)


@stage
def open_gate_search(base: str, surveyed: Surveyed, budget_minutes: float, edits: int | None) -> str:
    """A search, stored. Without a number of `edits`, so many are written in each trial as the budget is likely to bear."""
    settings, storage = open_root()
    objects = open_objects(storage, base)
    facts = FactSheet.from_bytes(objects.get(surveyed.sheet))
    survey = Survey.from_bytes(objects.get(surveyed.survey))
    model = load_base(settings, storage, base)
    published = suggest_neurons(model.layout.count_layers(model.model), builtin=False).prepare.layer
    starts = propose_starts(survey.layers, published)
    count = min(edits or MOST_EDITS, len(facts.search))
    if edits is None:
        desk = _make_desk(settings, storage, base, facts.search[:count], starts[0].layer)

        def try_some(some: int) -> None:
            replace(desk, edits=desk.edits[:some]).try_gates(starts[0].layer, [(PUBLISHED.theta, PUBLISHED.gain)])

        count = afford_edits(try_some, count, _SHARE * budget_minutes * 60 / _TRIALS)
    search = GateSearch(base=base, facts=surveyed.sheet, survey=surveyed.survey, edits=count, starts=starts)
    return objects.put(search.to_bytes())


@stage
def take_gate_step(base: str, search: str, hurry: bool) -> Taken | None:
    """Measure what the search proposes next and store it; None when it is through.

    Args:
        hurry: only what the choice cannot do without.
    """
    settings, storage = open_root()
    desk, plan, _ = _open_desk(settings, base, search)
    done = _read_done(storage, base, search)
    step = propose_gates(plan.starts, done, hurry)
    if step is None:
        return None
    trials, fault, seconds = measure_step(step.told, lambda on_progress: desk.try_gates(step.layer, step.gates, on_progress))
    made = GateDone(step=step, trials=trials, fault=fault, seconds=seconds)
    # Shown first, as in `tasks.calibrating.take_step`.
    runs = open_runs(settings, base, search)
    for trial in trials:
        point = trial.point
        name = f"layer {point.layer}, θ {point.theta:g}, gain {point.gain:g}"
        parameters = {"layer": point.layer, "theta": point.theta, "gain": point.gain, "edits": trial.edits, "phase": step.phase}
        runs.record_trial(name, f"{step.digest}/{point.theta:g}/{point.gain:g}", parameters, _list_metrics(trial))
    store_step(storage, base, search, len(done), step.digest, made.to_bytes())
    best = max((trial.point.score for trial in trials), default=None)
    return Taken(number=len(done) + 1, told=step.told, fault=fault, score=best, seconds=made.seconds)


@stage
def conclude_gate_search(base: str, search: str, asked: Asked, cut_short: bool, remarks: Sequence[str]) -> GateSummary:
    """The choice, measured on edits the search never wrote, as a stored profile; figures; the search in MLflow.

    Raises:
        EditorError: nothing could be measured.
    """
    settings, storage = open_root()
    begun = time.perf_counter()
    objects = open_objects(storage, base)
    desk, plan, facts = _open_desk(settings, base, search)
    survey = Survey.from_bytes(objects.get(plan.survey))
    done = _read_done(storage, base, search)
    trials = [trial for item in done for trial in item.trials]
    if not trials:
        why = next((item.fault for item in done if item.fault), "nothing was tried")
        raise EditorError(f"base {base[:12]}: expected a layer beside which edits can be written, found none ({why})")
    layer = choose_layer(trials, plan.starts)
    measured = {trial.point.layer for trial in trials}
    best, *others = (choose_gate(trials, plan.starts, at) for at in sorted(measured, key=lambda at: (at != layer, -at)))
    published = suggest_neurons(desk.base.layout.count_layers(desk.base.model), builtin=False).prepare.layer
    gates = [(trial.point.layer, trial.point.theta, trial.point.gain) for trial in (best, *others)]
    gates.insert(1, (published, PUBLISHED.theta, PUBLISHED.gain))
    gates = list(dict.fromkeys(gates))
    with show_progress("measuring the choice on other edits") as on_progress:
        apart = replace(desk, edits=facts.validation)
        validation: list[GateTrial] = []
        for number, (at, theta, gain) in enumerate(gates):
            validation += apart.try_gates(at, [(theta, gain)])
            on_progress(number + 1, len(gates))
    report = GateReport(
        search=plan, facts=facts, survey=survey, steps=tuple(done), chosen=best, validation=tuple(validation), cut_short=cut_short
    )
    stored = objects.put(report.to_bytes())
    note, point = report.write_note(stored), best.point
    profile = NeuronProfile(
        base=base,
        prepare=NeuronOptions(layer=point.layer),
        solve=GateOptions(theta=point.theta, gain=point.gain),
        origin=f"measured by errata calibrate on {plan.edits} edits of {facts.source}",
        calibration=note,
    )
    figures = {"cosines": draw_cosines(report), "gate": draw_gate(report)}
    parameters = {"layer": point.layer, "theta": point.theta, "gain": point.gain}
    kept = keep_choice(settings, storage, search, profile, stored, figures, parameters, _list_metrics(validation[0]))
    return GateSummary(
        base=base,
        profile=kept.profile,
        source=asked.source,
        asked=asked.asked,
        known=asked.known,
        layer=point.layer,
        theta=point.theta,
        gain=point.gain,
        fired=report.cosines.measure_fired(point.theta),
        layers=tuple(
            LayerRead(layer=read.layer, separation=round(read.separation, 4), low=round(read.range[0], 4), high=round(read.range[1], 4))
            for read in survey.layers
        ),
        chosen=note.chosen,
        rivals=note.rivals,
        curve=note.curve,
        gains=note.gains,
        edits=plan.edits,
        steps=len(done),
        trials=len(trials),
        cut_short=cut_short,
        seconds=round(sum(item.seconds for item in done) + time.perf_counter() - begun, 1),
        figures=kept.figures,
        run=kept.run,
        remarks=(*remarks, *report.doubts),
    )


def _read_done(storage: Storage, base: str, search: str) -> list[GateDone]:
    return [GateDone.from_bytes(data) for data in read_steps(storage, base, search)]


def _open_desk(settings: Settings, base: str, search: str) -> tuple[GateDesk, GateSearch, FactSheet]:
    return _hold_desk(settings.root, settings.device, settings.evaluate.batch_tokens, base, search)


@lru_cache(maxsize=1)
def _hold_desk(root: str, device: str, batch_tokens: int, base: str, search: str) -> tuple[GateDesk, GateSearch, FactSheet]:
    settings, storage = load_settings(root=root, device=device), open_storage(root)
    objects = open_objects(storage, base)
    plan = GateSearch.from_bytes(objects.get(search))
    facts = FactSheet.from_bytes(objects.get(plan.facts))
    return _make_desk(settings, storage, base, facts.search[: plan.edits], plan.starts[0].layer), plan, facts


def _make_desk(settings: Settings, storage: Storage, base: str, edits: tuple[Edit, ...], layer: int) -> GateDesk:
    model = load_base(settings, storage, base)
    chunk_tokens = limit_editor(settings, model, (layer,))["chunk_tokens"]
    return GateDesk(model, edits, settings.evaluate.batch_tokens, chunk_tokens)


def _list_metrics(trial: GateTrial) -> dict[str, float]:
    values = {name: getattr(trial.point, name) for name in ("efficacy", "generalization", "specificity", "score")}
    return list_metrics({**values, "seconds": trial.seconds})
