"""The page at its largest, and its charts at their oddest."""

import re
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import fromstring

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import flows.page
from flows.charts import _choose_ticks, draw_lines, draw_stacks
from flows.chronicle import COMMITS, FORGOTTEN, ROWS, find_site, spell_link
from flows.page import cut_text, draw_fates, draw_norms, lay_heat, render_page

NUMBERS = st.floats(-1e9, 1e9, allow_nan=False)


@given(NUMBERS, NUMBERS)
@example(0.0, 5e-324)
def test_ticks_are_few_even_and_enclose_the_values(one: float, other: float) -> None:
    low, high = sorted((one, other))
    ticks = _choose_ticks(low, high)
    steps = [after - before for before, after in zip(ticks, ticks[1:], strict=False)]
    assert 2 <= len(ticks) <= 8
    assert max(steps) == pytest.approx(min(steps), rel=1e-6, abs=1e-9)
    slack = 1e-6 * max(abs(low), abs(high), 1.0)
    assert ticks[0] <= low + slack and ticks[-1] >= high - slack


@given(st.lists(st.tuples(st.integers(0, 10**6), st.floats(0, 1e6)), min_size=1, max_size=20))
def test_every_point_of_a_line_is_inside_the_chart(line: list[tuple[int, float]]) -> None:
    svg = fromstring(draw_lines("a", "<title>", "told", {"w": line}, "live edits"))
    dots = [(float(dot.get("cx", "")), float(dot.get("cy", ""))) for dot in svg.iter("circle")]
    assert len(dots) == len(line)
    assert all(0 <= x <= 400 and 0 <= y <= 230 for x, y in dots)
    assert svg[0].text == "<title>"


def test_bars_are_as_high_as_their_numbers() -> None:
    svg = fromstring(draw_stacks("a", "t", "told", ["1", "2"], {"accepted": [10, 0], "rejected": [5, 15]}, "commit"))
    bars = [(bar.get("class"), float(bar.get("height", ""))) for bar in svg.iter("rect")]
    assert [kind for kind, _ in bars] == ["b0", "b1", "b1"]
    assert bars[0][1] == pytest.approx(2 * bars[1][1], abs=0.2) and bars[2][1] == pytest.approx(3 * bars[1][1], abs=0.3)


def make_point(seq: int, layers: int = 3, **fields: Any) -> dict[str, Any]:
    names = ("mean_abs_ratio", "frobenius_ratio", "spectral", "spectral_ratio", "condition")
    norms = [{"weight": f"model.layers.{layer}.mlp.down_proj.weight"} | dict.fromkeys(names, 1.0 + layer / 7) for layer in range(layers)]
    point = {"commit": seq, "kind": "edits", "time": "2026-11-21T07:00+00:00", "accepted": True, "champion": False, "live": 100 * seq}
    point |= {"outcomes": {"live": 100, "quarantined": 3, "replaced": 7}, "kl": 1.23456e-4, "norms": norms, "forgotten": []}
    point |= dict.fromkeys(("efficacy", "generalization", "specificity"), 0.98765)
    return point | {"fresh": {"value": 0.99, "edits": 100}, "retained": {"value": 0.9, "edits": 100}} | fields


def test_a_page_is_bounded_however_large_the_stream() -> None:
    wide = "𝔚" * 8_000
    points = [make_point(9_800 + number, layers=40) for number in range(COMMITS)]
    texts = dict.fromkeys(("occurrence", "prompt", "target", "before", "after", "reason"), wide)
    rows = [{**texts, "outcome": "quarantined"} for _ in range(ROWS)]
    last = {"commit": 9_999, "kind": "edits", "time": "2026-11-21T07:00:00+00:00", "seconds": {}}
    status = dict.fromkeys(("head", "champion", "champion_age_seconds", "live", "pending", "quarantined", "rejected"), 9_999)
    status |= {"stream": "main", "root": "s3://b/p", "base": {}, "records": {}, "last": last, "waiting_files": ["a"] * 9_999}
    facts = {
        "status": status,
        "made": "2026-11-21T07:00:00+00:00",
        "errata": "0.1.0",
        "points": points,
        "commits": 10_000,
        "norms": points[-1],
        "ages": [{"name": str(point["commit"]), "ages": [{"age": "0", "value": 1.0, "edits": 3}]} for point in points],
        "forgotten": [{"occurrence": wide, "prompt": wide, "target": wide, "age": 3} for _ in range(FORGOTTEN)],
        "batch": {"commit": 9_999, "kind": "edits", "rows": rows, "all": 1_000_000, "risk": ""},
        "mlflow": {"at": "x", "fault": None, "versions": {}},
    }
    page = render_page(facts)
    assert len(page.encode()) < 2**20
    assert f"newest {COMMITS} of 10000 commits" in re.sub(r"\s+", " ", page)


def test_many_commits_share_bars_and_many_weights_leave_the_largest() -> None:
    points = [make_point(number, layers=9) for number in range(1, 101)]
    fates, norms = draw_fates(points), draw_norms(points)
    assert fates is not None and "Each bar holds up to 3 commits" in fates["told"] and fates["told"].startswith("10000 accepted, 300 quar")
    assert norms is not None and "The 6 largest of 9 weights" in norms["told"]
    assert [name for _, name in norms["legend"]] == [f"model.layers.{layer}.mlp.down_proj.weight" for layer in range(3, 9)]


def test_the_map_of_retention_takes_any_ages() -> None:
    columns = [
        {"name": "12", "ages": [{"age": "1-9", "value": 0.9, "edits": 5}, {"age": "10-99", "value": 0.4, "edits": 5}]},
        {"name": "14", "ages": [{"age": "0", "value": 1.0, "edits": 2}, {"age": "1000-on", "value": 0.7, "edits": 5}]},
    ]
    heat = lay_heat(columns)
    assert heat is not None and heat["columns"] == ["14", "12"]
    assert [(age, [cell and cell["value"] for cell in cells]) for age, cells in heat["rows"]] == [
        ("0", [1.0, None]),
        ("1-9", [None, 0.9]),
        ("10-99", [None, 0.4]),
        ("1000-on", [0.7, None]),
    ]


def test_texts_lose_what_a_page_cannot_hold() -> None:
    assert cut_text("a\x00b\x1bc\n<b>") == "a�b�c\n<b>"
    assert len(cut_text("x" * 10_000)) == 200


@pytest.mark.parametrize(
    ("uri", "link"),
    [
        ("http://127.0.0.1:5000", "http://127.0.0.1:5000/#/models/main/versions/3"),
        ("https://ann:secret@mlflow.example/a/?x=1", "https://mlflow.example/a/#/models/main/versions/3"),
        ("sqlite:////work/mlflow.db", None),
        ("postgresql://ann:secret@db/mlflow", None),
        ("javascript:alert(1)", None),
    ],
)
def test_links_lead_to_servers_only(uri: str, link: str | None) -> None:
    assert spell_link(find_site(uri), "main", 3) == link


def read_colours() -> list[dict[str, str]]:
    """The colours of the page by name: in the light, and in the dark."""
    text = (Path(flows.page.__file__).parent / "page.html").read_text()
    light, dark = re.findall(r":root \{(.*?)\}", text, flags=re.DOTALL)
    return [dict(re.findall(r"--(\w+): (#\w{6})", found)) for found in (light, dark)]


def find_contrast(one: str, other: str) -> float:
    """https://www.w3.org/TR/WCAG21/#dfn-contrast-ratio"""

    def shine(colour: str) -> float:
        parts = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
        red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    lower, upper = sorted((shine(one), shine(other)))
    return (upper + 0.05) / (lower + 0.05)


@pytest.mark.parametrize("colours", read_colours(), ids=["light", "dark"])
def test_texts_and_lines_stand_out(colours: dict[str, str]) -> None:
    """Texts as WCAG's AA asks (4.5), lines and bars as it asks of graphics (3)."""
    assert len(colours) == 20
    for ink in ("ink", "soft", "link", "good", "warn", "bad"):
        assert find_contrast(colours[ink], colours["paper"]) >= 4.5, ink
    for ground in ("card", "h0", "h1", "h2", "h3", "h4"):
        assert find_contrast(colours["ink"], colours[ground]) >= 4.5, ground
    assert find_contrast(colours["soft"], colours["card"]) >= 4.5
    for line in ("c0", "c1", "c2", "c3", "c4", "c5"):
        assert find_contrast(colours[line], colours["paper"]) >= 3, line
