"""What Prometheus scrapes: names and labels that dashboards depend on, from storage alone."""

import json
import re
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from errata.edits import Edit
from errata.settings import load_settings

pytestmark = pytest.mark.usefixtures("prefect_server")

ROOT = Path(__file__).parents[2]
NAMES = {
    "errata_weight_norm_ratio": {"stream", "layer"},
    "errata_retention": {"stream", "age"},
    "errata_edits_total": {"stream", "outcome"},
    "errata_memory_only_edits": {"stream"},
    "errata_memory_only_age_seconds": {"stream"},
    "errata_batch_age_seconds": {"stream"},
    "errata_champion_commit": {"stream"},
    "errata_alias_lag_commits": {"stream"},
    "errata_last_success_timestamp_seconds": {"stream"},
}

Samples = dict[tuple[str, str], float]


def parse(text: str) -> Samples:
    """(name, value of the label that is not the stream, or the stream) → number."""
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            assert sample.labels.keys() == NAMES[sample.name] and sample.labels["stream"] == "main"
            own = [value for name, value in sample.labels.items() if name != "stream"]
            found[sample.name, own[0] if own else ""] = sample.value
    return found


def test_every_metric_is_there_with_its_labels(used_desk: Any, errata: Callable[..., Any], make_edit: Callable[..., Edit]) -> None:
    before = parse(errata("metrics").out)
    assert {name for name, _ in before} == NAMES.keys() - {"errata_weight_norm_ratio", "errata_retention"}, "nobody has watched yet"
    watched = errata("watch", "--json").json
    used_desk.submit("wednesday", make_edit(8))
    samples = parse(errata("metrics", "--stream", "main").out)
    assert {name for name, _ in samples} == NAMES.keys()
    assert samples["errata_weight_norm_ratio", "1"] == pytest.approx(watched["layers"][0]["norms"]["mean_abs_ratio"])
    assert samples["errata_retention", "0"] == watched["ages"][0]["retained"]["value"]
    assert (samples["errata_edits_total", "live"], samples["errata_edits_total", "quarantined"]) == (5, 1)
    assert samples["errata_champion_commit", ""] == 2 and samples["errata_alias_lag_commits", ""] == 0
    assert 0 < samples["errata_batch_age_seconds", ""] < 600
    assert before["errata_batch_age_seconds", ""] == 0


def test_the_table_says_what_was_measured(used_desk: Any, errata: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ERRATA_WATCH__NORM_RATIO", "1.0001")
    shown = errata("watch")
    assert shown.code == 0 and "commit 2 of main, version 2, 5 live edits" in shown.out
    assert "errata.norm.exceeded: mean |W| of layer 1 is" in shown.out and "age in commits" in shown.out


def test_an_alias_that_lags_is_seen(used_desk: Any, errata: Callable[..., Any]) -> None:
    (shown,) = (used_desk.root / "streams" / "main" / "marks" / "shown").iterdir()
    shown.rename(shown.with_name("00000001"))
    assert parse(errata("metrics").out)["errata_alias_lag_commits", ""] == 1
    errata("repair")
    assert parse(errata("metrics").out)["errata_alias_lag_commits", ""] == 0


def test_they_are_written_whole_and_served(used_desk: Any, errata: Callable[..., Any], tmp_path: Path) -> None:
    from tasks.exposing import build_registry, serve_metrics

    path = tmp_path / "errata.prom"
    assert errata("metrics", "--textfile", str(path)).code == 0
    written = parse(path.read_text())
    assert [item.name for item in tmp_path.iterdir() if item.name.startswith("errata.prom")] == ["errata.prom"]
    server, thread = serve_metrics(build_registry(load_settings()), "127.0.0.1", 0)
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/metrics", timeout=30) as answer:
            served = parse(answer.read().decode())
        assert served == written
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    assert errata("metrics", "--textfile", str(tmp_path / "no" / "folder.prom")).code == 2
    assert errata("metrics", "--serve", "nowhere").code == 2
    assert errata("metrics", "--stream", "other").code == 2


def test_a_stream_that_cannot_be_read_does_not_hide_the_others(used_desk: Any, errata: Callable[..., Any]) -> None:
    broken = used_desk.root / "streams" / "broken" / "commits"
    broken.mkdir(parents=True)
    (broken / "00000000.json").write_text("no commit")
    assert parse(errata("metrics").out)["errata_champion_commit", ""] == 2


def test_nothing_heavy_is_imported() -> None:
    code = "import tasks.exposing, sys; print(sorted({'torch', 'mlflow', 'prefect', 'transformers'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_the_dashboard_asks_for_nothing_else() -> None:
    dashboard = json.loads((ROOT / "deployments" / "grafana.json").read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked += [variable["query"]["query"] for variable in dashboard["templating"]["list"] if variable["type"] == "query"]
    assert {name for expr in asked for name in re.findall(r"errata_\w+", expr)} == NAMES.keys()
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in dashboard["panels"]]
    assert len(set(places)) == len(places) and all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in dashboard["panels"])
