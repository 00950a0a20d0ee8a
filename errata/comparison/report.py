"""A comparison as people read it: Markdown, the same as HTML with its pictures inside, and the raw numbers as CSV and Parquet."""

import base64
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from markdown_it import MarkdownIt

from errata.comparison.cells import MEASURES
from errata.comparison.drawing import draw_course, draw_trade
from errata.comparison.method import Recipe
from errata.comparison.orderings import Verdict, judge_claims
from errata.comparison.summary import Comparison, spell_spread

MAIN = (
    "efficacy",
    "generalization",
    "specificity",
    "score",
    "truth",
    "portability",
    "said",
    "said_paraphrase",
    "ability",
    "perplexity_ratio",
    "norm_ratio",
)
FIELD = ("es", "ps", "ns", "em", "pm", "nm", "kl", "fluency", "frobenius_ratio", "spectral_ratio")
COSTS = ("write_seconds", "build_seconds", "peak_mib", "state_bytes")
AGES = ("0-9", "10-99", "100-499", "500-on")
_IMAGE = re.compile(r'src="([^":]+\.png)"')
_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:90rem;margin:2rem auto;padding:0 1rem;color:#1b1f24}"
    "table{border-collapse:collapse;font-size:13px;display:block;overflow-x:auto}"
    "th,td{border-bottom:1px solid #d0d7de;padding:.25rem .6rem;text-align:right;white-space:nowrap}"
    "th:first-child,td:first-child{text-align:left}img{max-width:100%}code{background:#f6f8fa}"
)


class Heading(NamedTuple):
    """What stands above the tables."""

    title: str
    command: str
    base: str
    data: str
    caveat: str
    remarks: Sequence[str]


def write_report(comparison: Comparison, recipes: Mapping[str, Recipe], heading: Heading, folder: Path) -> list[Path]:
    """Write everything into a folder, which is made; what was there under these names is replaced.

    Returns:
        The files, `report.md` and `report.html` first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pictures = []
    for batch in comparison.batches:
        if comparison.list_stops(batch):
            pictures.append(draw_course(comparison, batch, folder / f"course-{batch}.png", heading.caveat))
            pictures.append(draw_trade(comparison, batch, folder / f"trade-{batch}.png", heading.caveat))
    text = spell_report(comparison, recipes, heading, [path.name for path in pictures])
    markdown, page = folder / "report.md", folder / "report.html"
    markdown.write_text(text)
    page.write_text(_render(text, heading.title, folder))
    numbers = [*_write_frame(comparison.tabulate_points(), folder / "points"), *_write_frame(comparison.tabulate_edits(), folder / "edits")]
    return [markdown, page, *pictures, *numbers]


def spell_report(comparison: Comparison, recipes: Mapping[str, Recipe], heading: Heading, pictures: Sequence[str]) -> str:
    """The report in Markdown.

    Args:
        pictures: file names, which begin with what they show and end in the size of batches.
    """
    parts = [f"# {heading.title}", f"> {heading.caveat}", f"`{heading.command}`", *_spell_heading(comparison, heading)]
    for batch in comparison.batches:
        parts += [f"## Batches of {batch}", *_spell_batch(comparison, batch)]
        parts += [f"![{name.partition('-')[0]}]({name})" for name in pictures if name.endswith(f"-{batch}.png")]
    parts += ["## What the papers lead one to expect", _spell_claims(judge_claims(comparison), len(comparison.batches) > 1)]
    parts += ["## Methods", _spell_methods(comparison, recipes)]
    parts += ["## What is measured", _spell_measures()]
    return "\n\n".join(part for part in parts if part) + "\n"


def spell_table(comparison: Comparison, batch: int, measures: Sequence[str]) -> str:
    """All methods at the end of the stream; measures that nothing was found for are left out."""
    gathered = {name: [comparison.gather(method, batch, None, name) for method in comparison.methods] for name in measures}
    shown = [name for name, columns in gathered.items() if any(columns)]
    rows = []
    for number, method in enumerate(comparison.methods):
        rows.append(
            [
                comparison.titles[method] + _mark_ended(comparison, method, batch),
                *(spell_spread(gathered[name][number], name) for name in shown),
            ]
        )
    return _spell_rows(["method", *(MEASURES[name].title for name in shown)], rows)


def _spell_heading(comparison: Comparison, heading: Heading) -> list[str]:
    seeds = len(comparison.seeds)
    loads = [result.load for result in comparison.results]
    devices = sorted({result.device for result in comparison.results})
    seconds = sum(result.seconds for result in comparison.results)
    lines = [
        f"Base: {heading.base}",
        f"Data: {heading.data}; {seeds} {'stream' if seeds == 1 else 'streams'}, each in an order and with edits of its own",
        f"Measured on {', '.join(devices)} in {seconds / 60:,.0f} minutes of all cells together, load {min(loads):.1f} to {max(loads):.1f}",
        "Numbers are means over the streams, least to most in brackets; held-out probes only",
        *heading.remarks,
    ]
    return ["\n".join(f"- {line}" for line in lines)]


def _spell_batch(comparison: Comparison, batch: int) -> list[str]:
    stops = comparison.list_stops(batch)
    if not stops:
        return ["Nothing was measured."]
    courses = []
    for measure in ("efficacy", "generalization", "specificity", "norm_ratio"):
        rows = [
            [comparison.titles[name], *(spell_spread(comparison.gather(name, batch, stop, measure), measure) for stop in stops)]
            for name in comparison.methods
        ]
        courses.append(
            f"**{MEASURES[measure].title}** of all live edits after so many edits"
            if measure == "efficacy"
            else f"**{MEASURES[measure].title}** after so many edits"
        )
        courses.append(_spell_rows(["method", *(f"{stop:,}" for stop in stops)], rows))
    ages = [age for age in AGES if any(comparison.gather_age(name, batch, age) for name in comparison.methods)]
    aged = [
        [comparison.titles[name], *(spell_spread(comparison.gather_age(name, batch, age), "efficacy") for age in ages)]
        for name in comparison.methods
    ]
    return [
        f"After {stops[-1]:,} edits:",
        spell_table(comparison, batch, MAIN),
        "The field's own counts, and what else the model says:",
        spell_table(comparison, batch, FIELD),
        *courses,
        "**Retention by age**: efficacy after the last edit of those that so many came after",
        _spell_rows(["method", *ages], aged),
        *_spell_risks(comparison, batch),
        "**Cost**",
        spell_table(comparison, batch, COSTS),
        _spell_faults(comparison, batch),
    ]


def _spell_risks(comparison: Comparison, batch: int) -> list[str]:
    """The quarter of edits with the least risk beside that with the most."""
    measures = ("efficacy", "generalization", "specificity")
    rows = []
    for method in comparison.methods:
        pairs = [(comparison.gather_risk(method, batch, quarter, name), name) for name in measures for quarter in (0, 3)]
        if any(values for values, _ in pairs):
            rows.append([comparison.titles[method], *(spell_spread(values, name) for values, name in pairs)])
    if not rows:
        return []
    titles = [f"{MEASURES[name].title}, {which} risk" for name in measures for which in ("least", "most")]
    return [
        "**By risk**: the quarter of edits whose targets surprise the base least (tokens · ln perplexity), and the quarter that do most",
        _spell_rows(["method", *titles], rows),
    ]


def _spell_faults(comparison: Comparison, batch: int) -> str:
    lines = []
    for result in comparison.results:
        if result.cell.batch == batch and (result.fault or result.refused):
            name = f"{comparison.titles[result.cell.method]}, seed {result.cell.seed}"
            lines += [f"- {name}: ended {result.fault}"] if result.fault else []
            lines += (
                [f"- {name}: {len(result.refused)} edits refused, the first because {next(iter(result.refused.values()))}"]
                if result.refused
                else []
            )
    return "\n".join(["**What went wrong**", "", *lines]) if lines else ""


def _mark_ended(comparison: Comparison, method: str, batch: int) -> str:
    found = [comparison.find(method, batch, seed) for seed in comparison.seeds]
    ended = [item for item in found if item is not None and item.fault and not item.unsuited]
    return f" († {len(ended)} of {len(found)} ended early)" if ended else ""


def _spell_claims(verdicts: Sequence[Verdict], several: bool) -> str:
    rows = []
    for verdict in verdicts:
        held = sum(found.holds for found in verdict.found.values())
        said = "holds" if held == len(verdict.found) else "does not hold" if not held else "holds in part"
        numbers = "; ".join(found.numbers for found in verdict.found.values())
        where = [f"{verdict.batch}"] if several else []
        rows.append(
            [
                verdict.claim.text,
                verdict.claim.source,
                *where,
                f"**{said}**, {held} of {len(verdict.found)}",
                numbers,
                "" if held == len(verdict.found) else verdict.claim.otherwise,
            ]
        )
    batch = ["batches of"] if several else []
    return (
        _spell_rows(["claim", "from", *batch, "here", "numbers, stream by stream", "likely reason"], rows)
        if rows
        else "Nothing measured here bears on them."
    )


def _spell_methods(comparison: Comparison, recipes: Mapping[str, Recipe]) -> str:
    rows = [[recipe.title, f"`{name}`", recipe.source, recipe.differs] for name, recipe in recipes.items() if name in comparison.methods]
    return _spell_rows(["method", "name", "source", "where ours departs from it"], rows)


def _spell_measures() -> str:
    return _spell_rows(["measure", "meaning"], [[measure.title, measure.meaning] for measure in MEASURES.values()])


def _spell_rows(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    def spell(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return "\n".join([spell(titles), "|" + "|".join("---" for _ in titles) + "|", *map(spell, rows)])


def _render(text: str, title: str, folder: Path) -> str:
    """HTML in one file: pictures are in it."""
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)

    def embed(match: re.Match[str]) -> str:
        return f'src="data:image/png;base64,{base64.b64encode((folder / match[1]).read_bytes()).decode()}"'

    body = _IMAGE.sub(embed, body)
    head = f'<meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
    return f'<!DOCTYPE html><html lang="en"><head>{head}</head><body>{body}</body></html>\n'


def _write_frame(frame: pd.DataFrame, path: Path) -> list[Path]:
    table, text = path.with_suffix(".parquet"), path.with_suffix(".csv")
    frame.to_parquet(table, index=False)
    frame.to_csv(text, index=False)
    return [table, text]
