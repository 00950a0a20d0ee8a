"""What many cells say together: tidy tables of raw numbers, and means with their spread over seeds."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property
from statistics import fmean

import pandas as pd

from errata.comparison.cells import MEASURES, CellResult

ENDED = dict.fromkeys(("norm_ratio", "frobenius_ratio", "spectral_ratio", "perplexity_ratio", "kl"), math.inf)
"""What a model that was destroyed counts as having at stops that it did not reach; 0 of everything else that counts answers."""
_COSTS = ("write_seconds", "build_seconds", "peak_mib", "state_bytes", "fluency")


class Comparison:
    """All cells of one command.

    Args:
        titles: method → how tables call it, in their order.
        once: methods that were measured with one size of batches: they stand in every table.
        risks: seed → edit id → its risk under the base (`errata.edits.Risk.figure`).
    """

    def __init__(
        self, results: Sequence[CellResult], titles: dict[str, str], once: Collection[str], risks: Mapping[int, Mapping[str, float]]
    ) -> None:
        self.results, self.titles, self._once, self._risks = tuple(results), titles, set(once), risks

    @cached_property
    def batches(self) -> list[int]:
        return sorted({result.cell.batch for result in self.results})

    @cached_property
    def seeds(self) -> list[int]:
        return sorted({result.cell.seed for result in self.results})

    @cached_property
    def measured(self) -> set[str]:
        """Measures that somebody has a number of: of the others the data holds nothing to ask."""
        return {name for result in self.results for point in result.points for name, value in point.values.items() if value is not None}

    @cached_property
    def methods(self) -> list[str]:
        found = {result.cell.method for result in self.results}
        return [name for name in self.titles if name in found]

    def find(self, method: str, batch: int, seed: int) -> CellResult | None:
        """The cell, or the only one of a method that is the same whatever the batches."""
        found = (item for item in self.results if item.cell.method == method and item.cell.seed == seed)
        return next((item for item in found if method in self._once or item.cell.batch == batch), None)

    def list_stops(self, batch: int) -> list[int]:
        return sorted({point.edits for item in self.results if item.cell.batch == batch for point in item.points})

    def read(self, method: str, batch: int, seed: int, edits: int | None, measure: str) -> float | None:
        """One number; None where it was not measured.

        Args:
            edits: the stop; None is the last one of the stream.
        """
        result = self.find(method, batch, seed)
        if result is None:
            return None
        stop = edits if edits is not None else max(self.list_stops(batch), default=0)
        point = next((item for item in result.points if item.edits == stop), None)
        if point is not None:
            return point.values.get(measure)
        if result.fault and not result.unsuited and stop > result.written - result.cell.batch:
            return ENDED.get(measure, 0.0) if measure in self.measured and measure not in _COSTS else None
        return None

    def gather(self, method: str, batch: int, edits: int | None, measure: str) -> list[float]:
        """One number per seed that has one."""
        values = (self.read(method, batch, seed, edits, measure) for seed in self.seeds)
        return [value for value in values if value is not None]

    def gather_age(self, method: str, batch: int, age: str) -> list[float]:
        """Efficacy at the end of the edits of one age, per seed."""
        found = [self.find(method, batch, seed) for seed in self.seeds]
        points = [item.points[-1] for item in found if item and item.points and not item.fault]
        return [point.ages[age] for point in points if age in point.ages]

    def gather_risk(self, method: str, batch: int, quarter: int, measure: str) -> list[float]:
        """One number per seed: a measure of `EditRow` at the end of the stream, over the edits in one quarter by risk.

        Args:
            quarter: from 0, that of the least.
        """
        found = []
        for seed in self.seeds:
            result = self.find(method, batch, seed)
            if result is None or result.fault:
                continue
            ranked = sorted(self._risks.get(seed, {}).values())
            if not ranked:
                continue
            low, high = (ranked[min(round(place * len(ranked) / 4), len(ranked) - 1)] for place in (quarter, quarter + 1))
            last = [row for row in result.rows if row.edits == result.written]
            values = [
                getattr(row, measure)
                for row in last
                if row.edit in self._risks[seed]
                and low <= self._risks[seed][row.edit]
                and (quarter == 3 or self._risks[seed][row.edit] < high)
            ]
            known = [value for value in values if value is not None]
            found += [fmean(known)] if known else []
        return found

    def tabulate_points(self) -> pd.DataFrame:
        """One row per number: method, batch, seed, edits, measure, value."""
        rows = [
            (*_key(result), point.edits, name, value)
            for result in self.results
            for point in result.points
            for name, value in [*point.values.items(), *((f"efficacy of age {age}", share) for age, share in point.ages.items())]
        ]
        return pd.DataFrame(rows, columns=["method", "batch", "seed", "edits", "measure", "value"])

    def tabulate_edits(self) -> pd.DataFrame:
        """One row per live edit at a stop."""
        columns = ["method", "batch", "seed", "edits", "edit", "position", "efficacy", "generalization", "specificity", "said"]
        rows = [
            (*_key(item), *(getattr(row, name) for name in columns[3:]), self._risks.get(item.cell.seed, {}).get(row.edit))
            for item in self.results
            for row in item.rows
        ]
        return pd.DataFrame(rows, columns=[*columns, "risk"])


def spell_spread(values: Iterable[float], measure: str) -> str:
    """The mean, and least to most where there are several: `.993 (.990–.996)`."""
    known, digits = list(values), MEASURES[measure].digits
    if not known:
        return "–"
    spelt = [_spell(value, digits) for value in (fmean(known), min(known), max(known))]
    return spelt[0] if len(known) == 1 or spelt[1] == spelt[2] else f"{spelt[0]} ({spelt[1]}–{spelt[2]})"


def _spell(value: float, digits: int) -> str:
    if math.isinf(value):
        return "∞"
    text = f"{round(value, digits) + 0.0:,.{digits}f}"  # + 0.0: no "-0.000"
    return text.replace("0.", ".", 1) if abs(value) < 1 and digits else text


def _key(result: CellResult) -> tuple[str, int, int]:
    return result.cell.method, result.cell.batch, result.cell.seed
