"""Retention of live edits by age: what was learnt long ago is what a lifelong editor loses first (design §7).

The age of an edit is the number of commits since the one that accepted it. `seq` is the only order there is; clocks are for people.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from errata.figures import open_figure, save_figure
from errata.report import Mean
from errata.watching import AgeRetention

_NAMED = 20
"""Forgotten edits of one age that are named."""


class Age(NamedTuple):
    """A bucket of ages, in commits; `last` None is open."""

    label: str
    first: int
    last: int | None


AGES = (Age("0", 0, 0), Age("1-9", 1, 9), Age("10-99", 10, 99), Age("100-999", 100, 999), Age("1000-on", 1_000, None))
"""Each ten times as wide as the one before: forgetting is quick at first, if it is there. Labels suit MLflow's alphabet."""


@dataclass(frozen=True)
class Remembered:
    """One sampled live edit."""

    id: str
    immediate: bool | None
    """Whether it took when it was accepted, by the report of that commit; None where that report does not say."""
    retained: bool
    """Whether it takes now."""


def summarise_age(age: Age, sample: Sequence[Remembered]) -> AgeRetention:
    """Immediate against retained efficacy of the edits of one age."""
    return AgeRetention(
        age=age.label,
        immediate=Mean.over([float(item.immediate)] for item in sample if item.immediate is not None),
        retained=Mean.over([float(item.retained)] for item in sample),
        forgotten=tuple(item.id for item in sample if not item.retained)[:_NAMED],
    )


def plot_retention(ages: Iterable[AgeRetention], path: Path) -> Path:
    """Draw immediate and retained efficacy of every age that has edits, as a PNG.

    Returns:
        `path`, for the caller to log.
    """
    shown = [item for item in ages if item.retained.value is not None]
    figure, (axes,) = open_figure((7, 3.6), grid="y")
    for shift, label, color, values in (
        (-0.2, "when accepted", "0.75", [item.immediate.value or 0.0 for item in shown]),
        (0.2, "now", "tab:blue", [item.retained.value or 0.0 for item in shown]),
    ):
        axes.bar([place + shift for place in range(len(shown))], values, width=0.38, label=label, color=color)
    axes.set_xticks(range(len(shown)), [f"{item.age}\n{item.retained.edits} edits" for item in shown])
    axes.set_ylim(0, 1.05)
    axes.set_xlabel("age in commits")
    axes.set_ylabel("efficacy")
    axes.set_title("Immediate and retained efficacy of live edits" if shown else "No live edits yet", fontsize=10)
    if shown:
        axes.legend(frameon=False, fontsize=8, loc="lower right")
    return save_figure(figure, path)
