"""The page for people: facts of `flows.chronicle` as one HTML file that needs nothing else, on paper, phone or screen, light or dark."""

import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from flows.charts import SERIES, draw_lines, draw_sample, draw_stacks
from flows.views import show_age, show_share

Facts = dict[str, Any]

_LONGEST = 200
"""Characters of a text of an edit."""
_BARS = 40
_HEAT = 30
"""Most columns of the retention map."""
_LEVELS = (0.5, 0.8, 0.9, 0.97)
"""Where one colour of the retention map ends and the next begins."""
_FATES = {"live": "accepted", "quarantined": "quarantined", "rejected": "rejected"}
_QUALITY = ("efficacy", "generalization", "specificity")


def render_page(facts: Facts) -> str:
    """The HTML of the page."""
    # Autoescaped, so that what edits say is text and never markup; charts are trees of elements already.
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"share": show_share, "age": show_age, "cut": cut_text, "number": spell_number, "level": find_level}
    points = facts["points"]
    charts = [chart for chart in (draw_fates(points), draw_quality(points), draw_norms(points)) if chart]
    return environment.get_template("page.html").render(**facts, charts=charts, heat=lay_heat(facts["ages"]))


def draw_fates(points: Sequence[Facts]) -> Facts | None:
    """Accepted, quarantined and rejected records, commit after commit."""
    shown = [
        point for point in points if any(name in point["outcomes"] for name in _FATES) and point["kind"] in ("edits", "merge", "rejection")
    ]
    if not shown:
        return None
    size = -(-len(shown) // _BARS)
    groups = [shown[start : start + size] for start in range(0, len(shown), size)]
    stacks = {told: [sum(point["outcomes"].get(name, 0) for point in group) for group in groups] for name, told in _FATES.items()}
    columns = [spell_run(group) for group in groups]
    totals = ", ".join(f"{sum(values)} {name}" for name, values in stacks.items())
    told = f"{totals}, in commits {spell_run(shown)}, from {shown[0]['time'][:10]} to {shown[-1]['time'][:10]}."
    told += f" Each bar holds up to {size} commits." if size > 1 else ""
    drawn = draw_stacks("fates", "What became of edits", told, columns, stacks, "commit")
    return {"title": "What became of edits", "svg": drawn, "told": told, "legend": lay_legend(list(stacks), bar=True)}


def draw_quality(points: Sequence[Facts]) -> Facts | None:
    """Efficacy, generalization and specificity of each accepted batch."""
    lines = {
        name: [(point["commit"], point[name]) for point in points if point["accepted"] and point[name] is not None] for name in _QUALITY
    }
    lines = {name: line for name, line in lines.items() if line}
    if not lines:
        return None
    newest = ", ".join(f"{name} {show_share(line[-1][1])}" for name, line in lines.items())
    told = f"Of each accepted batch, on probes held out of all training. The newest: {newest}."
    drawn = draw_lines("quality", "Efficacy, generalization, specificity", told, lines, "commit", (0.0, 1.0))
    return {"title": "Efficacy, generalization, specificity", "svg": drawn, "told": told, "legend": lay_legend(list(lines))}


def draw_norms(points: Sequence[Facts]) -> Facts | None:
    """Growth of each edited weight against the number of live edits."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for point in points:
        for norms in point["norms"] if point["accepted"] and point["live"] is not None else ():
            if norms["mean_abs_ratio"] is not None:
                lines.setdefault(norms["weight"], []).append((point["live"], norms["mean_abs_ratio"]))
    if not lines:
        return None
    largest = sorted(lines, key=lambda name: -lines[name][-1][1])[:SERIES]
    chosen = {name: line for name, line in lines.items() if name in largest}
    left = f" The {SERIES} largest of {len(lines)} weights." if len(lines) > SERIES else ""
    told = f"mean |W| against that of the base, by live edits; 1 is the base. The largest is {lines[largest[0]][-1][1]:.4g} now.{left}"
    drawn = draw_lines("norms", "Norms of edited weights", told, chosen, "live edits")
    return {"title": "Norms of edited weights", "svg": drawn, "told": told, "legend": lay_legend(list(chosen))}


def lay_legend(names: Sequence[str], bar: bool = False) -> list[tuple[str, str]]:
    """(sample, name) of each line or bar."""
    return [(draw_sample(number, bar), name) for number, name in enumerate(names)]


def lay_heat(columns: Sequence[Facts]) -> Facts | None:
    """The newest columns of the retention map, newest first, and its rows: (age, a cell per column or None)."""
    shown = columns[: -_HEAT - 1 : -1]
    ages = sorted({item["age"] for column in columns for item in column["ages"]}, key=lambda age: int(age.partition("-")[0]))
    rows = [(age, [next((item for item in column["ages"] if item["age"] == age), None) for column in shown]) for age in ages]
    return {"columns": [column["name"] for column in shown], "rows": rows} if shown else None


def find_level(value: float) -> int:
    """The colour of a share, 0 to 4."""
    return sum(value >= level for level in _LEVELS)


def cut_text(text: str) -> str:
    """A text of an edit, of bounded length, without characters that a page cannot hold."""
    clean = "".join("�" if unicodedata.category(letter) in ("Cc", "Cs") and letter not in "\n\t" else letter for letter in text)
    return clean if len(clean) <= _LONGEST else f"{clean[: _LONGEST - 1]}…"


def spell_number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def spell_run(points: Sequence[Mapping[str, Any]]) -> str:
    """`7`, or `7–9`."""
    first, last = points[0]["commit"], points[-1]["commit"]
    return str(first) if first == last else f"{first}–{last}"
