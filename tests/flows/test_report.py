"""`errata report`: the page says what the log says, needs nothing else, and says it as text whatever edits say."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

import html5lib
import pytest

from errata.edits import Edit
from registry.marks import store_watch

Make = Callable[..., Edit]
Run = Callable[..., Any]

HTML = "{http://www.w3.org/1999/xhtml}"
SVG = "{http://www.w3.org/2000/svg}"
ATTACK = "<script>alert(1)</script>"
REFERS = ("src", "href", "srcset", "data", "action", "poster", "{http://www.w3.org/1999/xlink}href")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "chrome-headless-shell")


def parse(path: Path) -> Element:
    """The page, by the rules of HTML5; any fault in it is raised."""
    found: Element = html5lib.HTMLParser(strict=True).parse(path.read_bytes(), transport_encoding="utf-8")
    return found


def read_text(element: Element) -> str:
    return " ".join("".join(element.itertext()).split())


def read_rows(page: Element, heading: str) -> list[list[str]]:
    """The rows of the table under a heading, without its head."""
    (table,) = [table for table in page.iter(f"{HTML}table") if table.get("aria-labelledby") == heading]
    return [[read_text(cell) for cell in row] for body in table.iter(f"{HTML}tbody") for row in body]


@pytest.fixture
def page(used_desk: Any, errata: Run, tmp_path: Path) -> Element:
    ran = errata("report", "--to", "page.html")
    assert ran.code == 0 and str(tmp_path / "page.html") in ran.out and ran.err == ""
    return parse(tmp_path / "page.html")


def test_the_page_says_what_the_log_says(page: Element) -> None:
    assert [read_text(heading) for heading in page.iter(f"{HTML}h1")] == ["Stream main"]
    rows = read_rows(page, "commits")
    assert [row[0] for row in rows] == ["2 ★", "1", "0"]
    assert [row[3] for row in rows] == ["models:/main/2", "models:/main/1", "–"]
    assert set(rows[0][4].split(", ")) == {"3 live", "1 replaced", "1 quarantined", "1 refused", "1 duplicate"}
    assert rows[0][5] == "5" and rows[1][6] == "1.000"
    batch = {row[0]: row for row in read_rows(page, "batch")}
    _, _, target, before, after, outcome = batch["case-3@2"]
    assert outcome == "live" and after.startswith(target) and not before.startswith(target)
    assert batch["case-4@2"][5].startswith("quarantined") and "z was not reached" in batch["case-4@2"][5]
    assert batch["case-4@2"][3:5] == ["–", "–"], "it was not measured"
    ages = {row[0]: row[1:] for row in read_rows(page, "retention")}
    assert ages["0"] == ["1.00", "1.00"] and ages["1-on"][1] == "–"
    told = {read_text(svg[0]): read_text(svg[1]) for svg in page.iter(f"{SVG}svg") if svg.get("role") == "img"}
    assert told["What became of edits"].startswith("6 accepted, 1 quarantined, 0 rejected, in commits 1–2")
    assert told.keys() == {"What became of edits", "Efficacy, generalization, specificity", "Norms of edited weights"}
    assert len(list(page.iter(f"{SVG}rect"))) == 3 + 3, "three bars' parts, and three samples"


def test_the_page_stands_alone(page: Element) -> None:
    ids = [element.get("id") for element in page.iter() if element.get("id")]
    assert len(ids) == len(set(ids))
    named = [name for element in page.iter() for key in ("aria-labelledby", "aria-describedby") for name in element.get(key, "").split()]
    assert set(named) <= set(ids)
    assert [(element.tag, key) for element in page.iter() for key in REFERS if element.get(key) is not None] == []
    tags = {str(element.tag).rpartition("}")[2] for element in page.iter()}
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    (style,) = page.iter(f"{HTML}style")
    assert "url(" not in read_text(style) and "@import" not in read_text(style)
    assert "prefers-color-scheme: dark" in read_text(style)
    metas = {meta.get("name") or meta.get("http-equiv"): meta.get("content") for meta in page.iter(f"{HTML}meta")}
    assert metas["viewport"] == "width=device-width, initial-scale=1"
    assert metas["Content-Security-Policy"] == "default-src 'none'; style-src 'unsafe-inline'"


def test_the_page_can_be_heard(page: Element) -> None:
    (html,) = [page] if page.tag == f"{HTML}html" else page.iter(f"{HTML}html")
    assert html.get("lang") == "en"
    levels = [int(str(element.tag)[-1]) for element in page.iter() if re.fullmatch(r"\{.*\}h[1-6]", str(element.tag))]
    assert levels[0] == 1 and all(after - before <= 1 for before, after in zip(levels, levels[1:], strict=False))
    for table in page.iter(f"{HTML}table"):
        assert all(cell.get("scope") == "col" for head in table.iter(f"{HTML}thead") for cell in head.iter(f"{HTML}th"))
        assert all(row[0].get("scope") == "row" for body in table.iter(f"{HTML}tbody") for row in body)
    for svg in page.iter(f"{SVG}svg"):
        assert svg.get("aria-hidden") == "true" or (svg.get("role"), len(svg.get("aria-labelledby", "").split())) == ("img", 2)


def test_edits_are_text_and_never_markup(used_desk: Any, errata: Run, make_edit: Make, tmp_path: Path, prefect_server: str) -> None:
    used_desk.submit("bad", make_edit(7, subject=ATTACK, id="<script>"), make_edit(8, target_new='"><img src=x onerror=alert(1)>'))
    assert len(used_desk.apply()) == 1
    assert errata("report", "--to", "page.html").code == 0
    page = parse(tmp_path / "page.html")
    rows = read_rows(page, "batch")
    assert any(ATTACK in row[1] and row[0].startswith("<script>@") for row in rows)
    assert any("<img src=x" in row[2] for row in rows)
    assert not {str(element.tag).rpartition("}")[2] for element in page.iter()} & {"script", "img"}
    assert not [key for element in page.iter() for key in element.attrib if key.startswith("on")]


def test_a_stream_without_edits_has_a_page(desk: Any, errata: Run, tmp_path: Path) -> None:
    ran = errata("report")
    assert ran.code == 0
    page = parse(tmp_path / "errata-main.html")
    assert [row[0] for row in read_rows(page, "commits")] == ["0 ★"]
    assert "Nothing has been measured yet" in read_text(page)


def test_the_page_goes_into_the_newest_commits_only(used_desk: Any, errata: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flows import chronicle
    from registry.log import CommitLog

    seen: set[int] = set()
    real = CommitLog.read
    monkeypatch.setattr(CommitLog, "read", lambda self, seq: seen.add(seq) or real(self, seq))
    monkeypatch.setattr(chronicle, "COMMITS", 1)
    monkeypatch.setattr(chronicle, "ROWS", 2)
    assert errata("report", "--to", "page.html").code == 0
    page = parse(tmp_path / "page.html")
    assert seen == {2}
    assert "newest 1 of 3 commits" in read_text(page)
    assert len(read_rows(page, "commits")) == 1 and len(read_rows(page, "batch")) == 2
    assert "5 edits, the first 2 of them here" in read_text(page)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """MLflow seems to be a server that asks for a password."""
    from registry import release
    from registry.models import ModelRegistry

    real = ModelRegistry.__init__
    uri = "https://ann:hunter2-hunter2@mlflow.example/tracking/"
    monkeypatch.setattr(ModelRegistry, "__init__", lambda self, uri, root: real(self, os.environ["REAL_URI"], root))
    resolve = release.resolve_tracking
    monkeypatch.setenv("REAL_URI", resolve(None, os.environ["ERRATA_ROOT"])[0])
    monkeypatch.setattr(release, "resolve_tracking", lambda *_: (uri, None))
    yield


def test_versions_link_to_an_mlflow_server(used_desk: Any, errata: Run, tmp_path: Path, served: None) -> None:
    assert errata("report", "--to", "page.html").code == 0
    links = [(read_text(link), link.get("href")) for link in parse(tmp_path / "page.html").iter(f"{HTML}a")]
    assert set(links) == {
        (f"models:/main/{number}", f"https://mlflow.example/tracking/#/models/main/versions/{number}") for number in (1, 2)
    }
    assert "hunter2" not in (tmp_path / "page.html").read_text()


def test_a_silent_mlflow_costs_the_links_only(used_desk: Any, errata: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://ann:hunter2-hunter2@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    assert errata("report", "--to", "page.html").code == 0
    page = parse(tmp_path / "page.html")
    assert "http://***@127.0.0.1:9, which could not be read" in read_text(page)
    assert "hunter2" not in (tmp_path / "page.html").read_text()
    assert [row[0] for row in read_rows(page, "commits")] == ["2 ★", "1", "0"]


def test_a_place_that_cannot_be_written_is_bad_input(used_desk: Any, errata: Run) -> None:
    ran = errata("report", "--to", "nowhere/page.html")
    assert (ran.code, ran.out) == (2, "") and "nowhere/page.html (No such file or directory)" in ran.err


def test_open_shows_the_page(used_desk: Any, errata: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    monkeypatch.setattr("webbrowser.open", shown.append)
    assert errata("report", "--open").code == 0
    assert shown == [(tmp_path / "errata-main.html").as_uri()]


def find_browser() -> str | None:
    """A Chromium of this machine, or of Playwright."""
    kept = sorted((Path.home() / ".cache/ms-playwright").glob("chromium*/chrome-*/*"))
    found = [str(path) for path in kept if path.name in ("chrome", "chrome-headless-shell", "headless_shell")]
    return next(filter(None, map(shutil.which, BROWSERS)), None) or next(iter(found), None)


@pytest.mark.parametrize(("scheme", "paper"), [(1, "rgb(255, 255, 255)"), (0, "rgb(18, 22, 27)")], ids=["light", "dark"])
@pytest.mark.parametrize("width", [375, 1280])
def test_a_browser_shows_the_page(page: Element, tmp_path: Path, width: int, scheme: int, paper: str) -> None:
    """On a phone nothing is wider than the screen, and the dark is dark. The policy of the page forbids scripts: the probe goes into a copy
    without it."""
    browser = find_browser()
    if browser is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium, or playwright install chromium")
    probe = "document.title = [scrollWidth <= clientWidth, getComputedStyle(document.body).backgroundColor].join(' ')"
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", (tmp_path / "page.html").read_text())
    copy = tmp_path / "probed.html"
    copy.write_text(text.replace("</body>", f"<script>with (document.documentElement) {{ {probe} }}</script></body>"))
    switches = [f"--window-size={width},900", f"--blink-settings=preferredColorScheme={scheme}", f"--user-data-dir={tmp_path / 'profile'}"]
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", *switches, "--dump-dom", copy.as_uri()]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    title = re.search(r"<title>(.*?)</title>", ran.stdout)
    assert title is not None and title[1] == f"true {paper}"


def test_the_map_shows_every_age_that_the_watch_has_measured(used_desk: Any, errata: Callable[..., Any], tmp_path: Path) -> None:
    stream = used_desk.open()
    for seq, value in ((1, 1.0), (2, 0.9), (2, 0.5)):
        ages = [{"age": "0", "retained": {"value": 1.0, "edits": 2}}, {"age": "10-99", "retained": {"value": value, "edits": 4}}]
        store_watch(stream, seq, datetime.now(UTC), json.dumps({"commit": seq, "ages": ages}).encode())
    assert errata("report", "--to", "page.html").code == 0
    rows = {row[0]: row[1:] for row in read_rows(parse(tmp_path / "page.html"), "retention")}
    assert rows == {"0": ["1.00", "1.00"], "10-99": ["0.50", "1.00"]}, "the latest of each commit, newest first"
