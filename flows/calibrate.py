"""`calibrate_base`: where to write into a base, and how strongly, measured: facts → trace → second moments → search → profile.
`calibrate_gate`: where neurons answer, how near to their keys and how loudly: facts → cosines → search → profile.
"""

import logging
import time
from collections.abc import Callable

from prefect import flow

from errata.calibration.summary import CalibrationSummary, GateSummary, Taken
from errata.corpus import MAKESHIFT
from flows.measure import measure_moments
from tasks._task import tell_run
from tasks.calibrating import ask_base, conclude_search, open_search, propose_starts, take_step, trace_base
from tasks.calibrating_gates import conclude_gate_search, open_gate_search, survey_layers, take_gate_step

_AHEAD = 4
"""Steps that must still fit into the budget for another one to be begun: itself, the curve over λ, and measuring the choice."""


@flow(name="calibrate-base")
def calibrate_base(
    base: str,
    facts: str | None = None,
    corpus: str = MAKESHIFT,
    budget_minutes: float = 5.0,
    edits: int | None = None,
    seed: int = 0,
) -> CalibrationSummary:
    """Find a profile for a base.

    Args:
        base: digest of a base that the root holds (`tasks.onboarding.place_base`).
        facts: file of edits whose target_true the base may know; by default the project's own facts.
        corpus: text whose keys are to be preserved, a file or folder, or a name of `errata.corpus`.
        budget_minutes: the search ends about then, with what it has.
        edits: written in each trial; by default as many as the budget is likely to bear.
        seed: of contexts, noise, and the project's own facts.

    Returns:
        What was found. That the base knows no facts is a result, and said in its remarks.
    """
    begun = time.monotonic()
    asked = ask_base(base, facts, seed)
    remarks = []
    if not asked.traced:
        remarks.append(
            f"The model knows {asked.known} of {asked.asked} facts it was asked ({asked.source}): too few to trace. Layers were chosen by "
            "the search alone, and edits write facts that it did not know."
        )
    trace = trace_base(base, asked.sheet, seed) if asked.traced else None
    starts = propose_starts(base, trace, seed)
    if corpus == MAKESHIFT:
        remarks.append(
            "No corpus was given: what is preserved was measured on a few generated sentences. With text like that which the model is used "
            "for (--corpus), edits disturb less."
        )
    moments = measure_moments(base, sorted({layer for start in starts for layer in start.layers}), corpus, seed=seed)
    search = open_search(base, asked.sheet, starts, moments, budget_minutes, edits)
    cut_short = _run_steps(lambda hurry: take_step(base, search, hurry), begun, budget_minutes)
    return conclude_search(base, search, asked, trace, cut_short, remarks)


@flow(name="calibrate-gate")
def calibrate_gate(
    base: str, facts: str | None = None, budget_minutes: float = 5.0, edits: int | None = None, seed: int = 0
) -> GateSummary:
    """Find a profile of iReVa for a base. Arguments and result as `calibrate_base`; no text is preserved, since no weight changes."""
    begun = time.monotonic()
    asked = ask_base(base, facts, seed)
    surveyed = survey_layers(base, asked.sheet, seed)
    remarks = []
    if not asked.traced:
        remarks.append(
            f"The model knows {asked.known} of {asked.asked} facts it was asked ({asked.source}): too few. Edits write facts that it did "
            "not know."
        )
    if surveyed.completed:
        remarks.append(
            f"{surveyed.completed} edits have no paraphrases: their prompts behind generated sentences stand in. With paraphrases like "
            "those that the model will meet (--facts), θ suits them better."
        )
    search = open_gate_search(base, surveyed, budget_minutes, edits)
    cut_short = _run_steps(lambda hurry: take_gate_step(base, search, hurry), begun, budget_minutes)
    return conclude_gate_search(base, search, asked, cut_short, remarks)


def _run_steps(take: Callable[[bool], Taken | None], begun: float, budget_minutes: float) -> bool:
    """Take the steps of a search until it is through; whether the budget ended it before.

    Args:
        take: is told whether to hurry.
        begun: the time from which the budget counts.
    """
    longest, cut_short = 0.0, False
    while True:
        hurry = time.monotonic() - begun + _AHEAD * longest > 60 * budget_minutes
        taken = take(hurry)
        if taken is None:
            return cut_short
        cut_short = cut_short or hurry
        longest = max(longest, taken.seconds)
        result = taken.fault or (f"score {taken.score:.3f}" if taken.score is not None else "nothing measured")
        tell_run(logging.INFO, f"step {taken.number}, {taken.told}: {result}, {taken.seconds:.1f} s")
