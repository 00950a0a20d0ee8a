"""Calibration of a base: facts, trace, search, profile. Every step that is measured is stored at once; an interrupted search goes on."""

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

from errata.calibration.contexts import sample_contexts
from errata.calibration.facts import ENOUGH, ask_facts, make_common_edits, take_distinct
from errata.calibration.figures import draw_curve, draw_trace
from errata.calibration.places import propose_places
from errata.calibration.report import CalibrationReport, FactSheet, Search, foresee_norm, set_alarm
from errata.calibration.search import Done, Step, choose_best, choose_rivals, propose_step
from errata.calibration.summary import Asked, CalibrationSummary, Taken
from errata.calibration.tracing import Trace, trace_facts
from errata.calibration.trials import Desk, Trial
from errata.editors.d4s.moments import Moments
from errata.edits import Edit, Submission
from errata.errors import EditorError, InputError
from errata.profiles import PrepareOptions, Profile, SolveOptions
from errata.readers.files import read_edits
from errata.settings import Settings, load_settings
from errata.suggestions import choose_spread, suggest_profile
from errata.world import make_world
from registry.calibrations import open_objects, read_steps, store_step
from registry.shared import fetch_moments, get_base
from registry.storage.base import Storage, open_storage
from registry.trials import TrialRuns
from tasks._calibration import MOST_EDITS, afford_edits, keep_choice, list_metrics, load_base, measure_step, open_root, open_runs
from tasks._progress import show_progress
from tasks._session import limit_editor
from tasks._task import stage

_ASKED = 400
"""Facts a base is asked for at most."""
_TRACED = 60
_VALIDATION = 100
"""Most edits that are kept from the search."""
_STEPS = 24
"""Steps that a search usually takes."""
_SHARE = 0.7
"""Of the budget, for these steps."""
_RIVALS = 3


@stage
def ask_base(base: str, facts: str | None, seed: int) -> Asked:
    """Which of the facts the base knows; the edits of the calibration, stored.

    Args:
        facts: file of edits with target_true; None takes the built-in world's for the built-in base, else common facts.

    Raises:
        InputError: the file has too few usable edits.
    """
    settings, storage = open_root()
    source, edits = _find_edits(storage, base, facts, seed)
    model = load_base(settings, storage, base)
    with show_progress("asking the base") as on_progress:
        told = ask_facts(model, edits, settings.evaluate.batch_tokens, lambda _stage, done, total: on_progress(done, total))
    enough = len(told.known) >= ENOUGH
    usable = take_distinct(told.known if enough else (*told.known, *told.unknown), MOST_EDITS + _VALIDATION)
    if len(usable) < ENOUGH:
        raise InputError(
            f"facts: expected at least {ENOUGH} edits of distinct subjects that this base can write, found {len(usable)} in {source}"
        )
    kept = min(_VALIDATION, len(usable) // 3)
    search, validation = usable[: len(usable) - kept], usable[len(usable) - kept :]
    sheet = FactSheet(
        source=source,
        asked=len(edits),
        known=len(told.known),
        traced=tuple(search[:_TRACED]) if enough else (),
        search=tuple(search),
        validation=tuple(validation),
    )
    digest = open_objects(storage, base).put(sheet.to_bytes())
    return Asked(sheet=digest, source=source, asked=sheet.asked, known=sheet.known, traced=len(sheet.traced))


@stage
def trace_base(base: str, sheet: str, seed: int) -> str:
    """The causal trace of the facts that the base knows, stored."""
    settings, storage = open_root()
    objects = open_objects(storage, base)
    facts = FactSheet.from_bytes(objects.get(sheet))
    model = load_base(settings, storage, base)
    with show_progress("causal trace") as on_progress:
        trace = trace_facts(model, facts.traced, seed=seed, batch_tokens=settings.evaluate.batch_tokens, on_progress=on_progress)
    return objects.put(trace.to_bytes())


@stage
def propose_starts(base: str, trace: str | None, seed: int) -> list[PrepareOptions]:
    """The places to try, each with options to begin with: published ones first where the family has any."""
    settings, storage = open_root()
    model = load_base(settings, storage, base)
    depth = model.layout.count_layers(model.model)
    if depth < 2:
        raise InputError(
            f"base {base[:12]}: expected a model of at least two blocks, found {depth}: z needs blocks above it to act through"
        )
    published = suggest_profile(model.model.config.model_type, depth)
    read = Trace.from_bytes(open_objects(storage, base).get(trace)) if trace else None
    contexts = sample_contexts(model, seed)
    starts = []
    for place in propose_places(depth, read, published.prepare.layers if published else None):
        start = PrepareOptions(layers=place.layers, site=place.site, contexts=contexts)
        if published and place == ("subject_last", published.prepare.layers):
            start = published.prepare.model_copy(update={"contexts": contexts})
        starts.append(start)
    return starts


@stage
def open_search(base: str, sheet: str, starts: Sequence[PrepareOptions], moments: str, budget_minutes: float, edits: int | None) -> str:
    """A search, stored. Without a number of `edits`, so many are written in each trial as the budget is likely to bear."""
    settings, storage = open_root()
    objects = open_objects(storage, base)
    facts = FactSheet.from_bytes(objects.get(sheet))
    count = min(edits or MOST_EDITS, len(facts.search))
    if edits is None:
        desk = _make_desk(settings, storage, base, moments, starts, facts.search[:count])
        first, spread = starts[0], choose_spread(len(starts[0].layers))

        def try_some(some: int) -> None:
            replace(desk, edits=desk.edits[:some]).try_options(first, (spread,), (0.9,))

        count = afford_edits(try_some, count, _SHARE * budget_minutes * 60 / _STEPS)
    search = Search(base=base, moments=moments, facts=sheet, edits=count, starts=tuple(starts))
    return objects.put(search.to_bytes())


@stage
def take_step(base: str, search: str, hurry: bool) -> Taken | None:
    """Measure what the search proposes next and store it; None when it is through.

    Args:
        hurry: only what the choice cannot do without.
    """
    settings, storage = open_root()
    desk, plan, _ = _open_desk(settings, storage, base, search)
    done = _read_done(storage, base, search)
    step = propose_step(plan.starts, done, hurry)
    if step is None:
        return None
    trials, fault, seconds = measure_step(
        step.told, lambda on_progress: desk.try_options(step.prepare, step.spreads, step.fits, on_progress)
    )
    made = Done(step=step, trials=trials, fault=fault, seconds=seconds)
    # Shown first: what is stored is never measured, and so never shown, again. A repeated trial finds its run.
    runs = open_runs(settings, base, search)
    for trial in trials:
        _show_trial(runs, step, trial)
    store_step(storage, base, search, len(done), step.digest, made.to_bytes())
    best = max((trial.score for trial in trials), default=None)
    return Taken(number=len(done) + 1, told=step.told, fault=fault, score=best, seconds=made.seconds)


@stage
def conclude_search(base: str, search: str, asked: Asked, trace: str | None, cut_short: bool, remarks: Sequence[str]) -> CalibrationSummary:
    """The choice, measured on edits the search never wrote, as a stored profile; figures; the search in MLflow.

    Raises:
        EditorError: nothing could be measured.
    """
    settings, storage = open_root()
    begun = time.perf_counter()
    objects = open_objects(storage, base)
    desk, plan, facts = _open_desk(settings, storage, base, search)
    done = _read_done(storage, base, search)
    trials = [trial for item in done for trial in item.trials]
    if not trials:
        why = next((item.fault for item in done if item.fault), "nothing was tried")
        raise EditorError(f"base {base[:12]}: expected a place where edits can be written, found none ({why})")
    best = choose_best(trials)
    rivals = choose_rivals(trials, best, _RIVALS)
    with show_progress("measuring the choice on other edits") as on_progress:
        apart = replace(desk, edits=facts.validation)
        validation = []
        for number, trial in enumerate((best, *rivals)):
            validation += apart.try_options(trial.prepare, (trial.spread,), (), lambdas=(trial.lam,))
            on_progress(number + 1, 1 + len(rivals))
    growth = desk.measure_growth(best, sorted({plan.edits // 4, plan.edits // 2, plan.edits} - {0}))
    report = CalibrationReport(
        search=plan,
        facts=facts,
        trace=Trace.from_bytes(objects.get(trace)) if trace else None,
        steps=tuple(done),
        chosen=best,
        rivals=tuple(rivals),
        validation=tuple(validation),
        growth=tuple(growth),
        cut_short=cut_short,
    )
    stored = objects.put(report.to_bytes())
    profile = Profile(
        base=base,
        prepare=best.prepare,
        solve=SolveOptions(lam=best.lam, spread=best.spread, moments=plan.moments),
        origin=f"measured by errata calibrate on {plan.edits} edits of {facts.source}",
        max_norm_ratio=set_alarm(growth),
        calibration=report.write_note(stored),
    )
    note = profile.calibration
    assert note is not None, "it was written just now"
    drawn = {"curve": draw_curve(report)} | ({"trace": draw_trace(report.trace)} if report.trace else {})
    parameters = {"layers": list(best.prepare.layers), "site": best.prepare.site, "lam": best.lam, "spread": best.spread}
    kept = keep_choice(settings, storage, search, profile, stored, drawn, parameters, _list_metrics(validation[0]))
    return CalibrationSummary(
        base=base,
        profile=kept.profile,
        source=asked.source,
        asked=asked.asked,
        known=asked.known,
        effects={site: report.trace.measure_effects(site) for site in report.trace.restored} if report.trace else {},
        prepare=best.prepare,
        lam=best.lam,
        spread=best.spread,
        chosen=note.chosen,
        rivals=note.rivals,
        curve=note.curve,
        growth=note.growth,
        max_norm_ratio=profile.max_norm_ratio,
        foreseen=foresee_norm(growth),
        edits=plan.edits,
        steps=len(done),
        trials=len(trials),
        cut_short=cut_short,
        seconds=round(sum(item.seconds for item in done) + time.perf_counter() - begun, 1),
        figures=kept.figures,
        run=kept.run,
        remarks=(*remarks, *report.doubts),
    )


def _find_edits(storage: Storage, base: str, facts: str | None, seed: int) -> tuple[str, list[Edit]]:
    if facts is not None:
        edits = [found.edit for found in read_edits(facts) if isinstance(found, Submission)]
        return facts, edits[:_ASKED]
    if get_base(storage, base).kind == "builtin":
        return "the built-in world", make_world().make_edits(_ASKED, seed)
    return "errata's common facts", make_common_edits(seed)


def _read_done(storage: Storage, base: str, search: str) -> list[Done]:
    return [Done.from_bytes(data) for data in read_steps(storage, base, search)]


def _open_desk(settings: Settings, storage: Storage, base: str, search: str) -> tuple[Desk, Search, FactSheet]:
    return _hold_desk(settings.root, settings.device, settings.evaluate.batch_tokens, base, search)


@lru_cache(maxsize=1)
def _hold_desk(root: str, device: str, batch_tokens: int, base: str, search: str) -> tuple[Desk, Search, FactSheet]:
    settings, storage = load_settings(root=root, device=device), open_storage(root)
    objects = open_objects(storage, base)
    plan = Search.from_bytes(objects.get(search))
    facts = FactSheet.from_bytes(objects.get(plan.facts))
    return _make_desk(settings, storage, base, plan.moments, plan.starts, facts.search[: plan.edits]), plan, facts


def _make_desk(
    settings: Settings, storage: Storage, base: str, moments: str, starts: Sequence[PrepareOptions], edits: tuple[Edit, ...]
) -> Desk:
    model, layers = load_base(settings, storage, base), max((start.layers for start in starts), key=len)
    held = Moments.load(fetch_moments(storage, moments, settings.cache))
    return Desk(model, held, edits, settings.evaluate.batch_tokens, limit_editor(settings, model, layers))


def _show_trial(runs: TrialRuns, step: Step, trial: Trial) -> None:
    options = trial.prepare.model_dump(mode="json")
    parameters = {**options, "contexts": len(trial.prepare.contexts), "lam": trial.lam, "spread": trial.spread, "phase": step.phase}
    name = f"{step.told}, λ {trial.lam:g}, {trial.spread}"
    runs.record_trial(name, f"{step.digest}/{trial.spread}/{trial.lam:g}", parameters, _list_metrics(trial))


def _list_metrics(trial: Trial) -> dict[str, float]:
    names = ("fit", "reached", "efficacy", "generalization", "specificity", "score", "norm_ratio", "seconds")
    return list_metrics({name: getattr(trial, name) for name in names})
