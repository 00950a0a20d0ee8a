"""Small charts as SVG that stands inside a page: no scripts, colours from the page's style sheet (classes `s0` to `s5`), text that can be
read aloud. Values only; whoever calls knows what they mean. Built as a tree of elements, so that nothing needs escaping by hand."""

import math
from collections.abc import Callable, Mapping, Sequence
from xml.etree.ElementTree import Element, SubElement, tostring

Line = Sequence[tuple[float, float]]

SERIES = 6
"""How many lines one chart tells apart."""
_WIDTH, _HEIGHT = 400, 230
"""Units, of which about one is a pixel on a phone: the letters stay readable there."""
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 390, 12, 186
_TICKS = 5
_LEAST = 1e-9
"""Narrower than this no axis is: ticks are rounded to twelve places."""
_MANY = 60
"""Marks on a line that still can be told apart."""


def draw_lines(
    name: str,
    title: str,
    told: str,
    lines: Mapping[str, Line],
    x_label: str,
    span: tuple[float, float] | None = None,
    level: float = 1.0,
) -> str:
    """Lines over numbers, with a mark at every point.

    Args:
        name: distinguishes the chart on its page.
        told: what the chart shows, for who cannot see it.
        lines: at most `SERIES`, each in order of drawing.
        span: the least that the vertical axis spans; by default what the values span, and `level`.
        level: where a thin line goes, for comparison.
    """
    xs = [x for line in lines.values() for x, _ in line]
    ys = [y for line in lines.values() for _, y in line]
    across = _scale(min(xs), max(xs), _LEFT + 6, _RIGHT - 6)
    low, high = span or (level, level)
    steps = _choose_ticks(min([low, *ys]), max([high, *ys]))
    up = _scale(steps[0], steps[-1], _BOTTOM, _TOP)
    svg = _begin(name, title, told)
    _draw_frame(svg, {up(y): _spell(y) for y in steps}, {across(x): _spell(x) for x in _choose_places(xs)}, x_label)
    if steps[0] <= level <= steps[-1]:
        _line(svg, "level", _LEFT, up(level), _RIGHT, up(level))
    for number, (label, line) in enumerate(lines.items()):
        size = 2.2 if len(line) <= _MANY else 0.9  # or they hide the dashes
        if len(line) > 1:
            SubElement(svg, "polyline", {"class": f"s{number}", "points": " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in line)})
        for x, y in line:
            dot = SubElement(svg, "circle", {"class": f"d{number}", "cx": f"{across(x):.1f}", "cy": f"{up(y):.1f}", "r": str(size)})
            SubElement(dot, "title").text = f"{label}: {_spell(y)} at {_spell(x)}"
    return tostring(svg, encoding="unicode")


def draw_stacks(name: str, title: str, told: str, columns: Sequence[str], stacks: Mapping[str, Sequence[int]], x_label: str) -> str:
    """One bar per column, of numbers stacked in the order of `stacks`. Columns are named by a number, or by a run such as `7–9`."""
    steps = _choose_ticks(0, max([_TICKS, *map(sum, zip(*stacks.values(), strict=True))]))  # whole numbers, also of few
    up = _scale(steps[0], steps[-1], _BOTTOM, _TOP)
    wide = (_RIGHT - _LEFT) / max(len(columns), 1)
    svg = _begin(name, title, told)
    middles = {index: _LEFT + (index + 0.5) * wide for index in range(len(columns))}
    shown = {middles[index]: columns[index].partition("–")[0] for index in range(0, len(columns), -(-len(columns) // _TICKS) or 1)}
    _draw_frame(svg, {up(y): _spell(y) for y in steps}, shown, x_label)
    for index, column in enumerate(columns):
        below = 0
        for number, (label, values) in enumerate(stacks.items()):
            if not values[index]:
                continue
            top, floor = up(below + values[index]), up(below)
            place = {"x": middles[index] - 0.4 * wide, "y": top, "width": 0.8 * wide, "height": floor - top}
            bar = SubElement(svg, "rect", {"class": f"b{number}", **{key: f"{value:.1f}" for key, value in place.items()}})
            SubElement(bar, "title").text = f"{column}: {values[index]} {label}"
            below += values[index]
    return tostring(svg, encoding="unicode")


def draw_sample(number: int, bar: bool) -> str:
    """The colour and dashes of one line or bar, for a legend."""
    svg = Element("svg", {"class": "sample", "viewBox": "0 0 24 10", "aria-hidden": "true"})
    if bar:
        SubElement(svg, "rect", {"class": f"b{number}", "x": "4", "y": "0", "width": "16", "height": "10"})
    else:
        SubElement(svg, "polyline", {"class": f"s{number}", "points": "0,5 24,5"})
    return tostring(svg, encoding="unicode")


def _begin(name: str, title: str, told: str) -> Element:
    svg = Element("svg", {"viewBox": f"0 0 {_WIDTH} {_HEIGHT}", "role": "img", "aria-labelledby": f"{name}-title {name}-told"})
    SubElement(svg, "title", {"id": f"{name}-title"}).text = title
    SubElement(svg, "desc", {"id": f"{name}-told"}).text = told
    return svg


def _draw_frame(svg: Element, rows: Mapping[float, str], columns: Mapping[float, str], x_label: str) -> None:
    for y, label in rows.items():
        _line(svg, "grid", _LEFT, y, _RIGHT, y)
        _text(svg, label, _LEFT - 6, y + 4, "end")
    for x, label in columns.items():
        _text(svg, label, x, _BOTTOM + 16, "middle")
    _text(svg, x_label, (_LEFT + _RIGHT) / 2, _HEIGHT - 8, "middle")


def _line(svg: Element, kind: str, x1: float, y1: float, x2: float, y2: float) -> None:
    places = {"x1": x1, "y1": y1, "x2": x2, "y2": y2}
    SubElement(svg, "line", {"class": kind, **{name: f"{value:.1f}" for name, value in places.items()}})


def _text(svg: Element, text: str, x: float, y: float, anchor: str) -> None:
    SubElement(svg, "text", {"x": f"{x:.1f}", "y": f"{y:.1f}", "text-anchor": anchor}).text = text


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """Numbers from `low` to `high` as places from `start` to `end`."""
    return lambda value: (start + end) / 2 if high == low else start + (value - low) / (high - low) * (end - start)


def _choose_ticks(low: float, high: float) -> list[float]:
    """Round numbers, evenly spaced, from one not above `low` to one not below `high`."""
    span = max(high - low or abs(high) * 0.1 or 1.0, _LEAST)
    size = 10.0 ** math.floor(math.log10(span / _TICKS))
    step = size * next(factor for factor in (1, 2, 5, 10) if span / (size * factor) <= _TICKS)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, max(last, first + 1) + 1)]


def _choose_places(values: Sequence[float]) -> list[float]:
    """Round whole numbers among the values; the only value where there is one."""
    inside = [tick for tick in _choose_ticks(min(values), max(values)) if min(values) <= tick <= max(values) and tick == int(tick)]
    return inside or [min(values)]


def _spell(value: float) -> str:
    return f"{value:.0f}" if value == int(value) else f"{value:.4g}"
