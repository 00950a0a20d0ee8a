"""What the `errata` command does: promises of the commands that make, feed and change a stream, and of how they end."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from errata.edits import Edit
from errata.errors import ConflictError

pytestmark = pytest.mark.usefixtures("prefect_server")

Make = Callable[..., Edit]
Run = Callable[..., Any]

GOOD = '{"subject": "Finn Moe", "prompt": "The home of {}", "target_new": "Oslo"}'
BAD = '{"subject": "Finn Moe", "prompt": "The home of nobody", "target_new": "Oslo"}'
ONE = ["--prompt", "The home of {}", "--subject", "Finn Moe", "--target", "Oslo"]
"""The edit of GOOD, as options."""


@pytest.fixture
def files(tmp_path: Path, editable_options: Any, sentences: Any) -> Path:
    """A folder with a profile and a corpus for the editable base."""
    prepare = editable_options.model_dump_json()
    (tmp_path / "profile.json").write_text(f'{{"prepare": {prepare}, "lam": 1.0}}')
    (tmp_path / "corpus.txt").write_text("\n".join(sentences))
    return tmp_path


def test_init_makes_a_stream_once(desk: Any, errata: Run, files: Path, editable_folder: Path) -> None:
    words = ["init", "--stream", "mine", "--base", str(editable_folder), "--profile", "profile.json", "--corpus", "corpus.txt"]
    ran = errata(*words)
    assert ran.code == 0 and "mine" in ran.out
    facts = errata("status", "--stream", "mine", "--json").json
    assert (facts["head"], facts["live"]) == (0, 0)
    assert (facts["base"]["kind"], facts["base"]["source"]) == ("folder", str(editable_folder))
    ran = errata(*words)
    assert ran.code == 2 and "mine" in ran.err
    assert errata("status", "--stream", "mine", "--json").json["head"] == 0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"corpus": None}, "--corpus"),
        ({"corpus": "nowhere.txt"}, "nowhere.txt"),
        ({"base": "./nowhere"}, "./nowhere"),
        ({"profile": "nowhere.json"}, "nowhere.json"),
        ({"profile": "corpus.txt"}, "corpus.txt"),
        ({"profile": "typo.json"}, "lamda"),
        ({"profile": "typo.json", "corpus": None}, "lamda"),
    ],
)
def test_init_says_what_is_missing(desk: Any, errata: Run, files: Path, editable_folder: Path, change: dict[str, Any], says: str) -> None:
    (files / "typo.json").write_text((files / "profile.json").read_text().replace('"lam"', '"lamda"'))
    options = {"base": str(editable_folder), "profile": "profile.json", "corpus": "corpus.txt", **change}
    ran = errata("init", "--stream", "mine", *(word for name, value in options.items() if value for word in (f"--{name}", value)))
    assert (ran.code, ran.out) == (2, "")
    assert says in ran.err
    assert errata("status", "--stream", "mine").code == 2


@pytest.mark.parametrize("words", [["edits.jsonl"], ["-"], ONE], ids=["file", "stdin", "options"])
def test_submit_leaves_edits_in_the_inbox(desk: Any, errata: Run, tmp_path: Path, words: list[str]) -> None:
    (tmp_path / "edits.jsonl").write_text(GOOD)
    ran = errata("submit", *words, "--json", stdin=GOOD.encode())
    assert ran.code == 0
    assert ran.json == {"stream": "main", "submitted": 1, "file": desk.waiting()[0], "refused": []}
    (line,) = desk.open().storage.read(f"streams/main/inbox/{ran.json['file']}").splitlines()
    assert b"Finn Moe" in line and b"Oslo" in line
    assert errata("submit", *words, stdin=GOOD.encode()).out.startswith("1 edits submitted to main, 0 records refused")


def test_submit_refuses_records_one_by_one(desk: Any, errata: Run, tmp_path: Path) -> None:
    path = tmp_path / "edits.jsonl"
    path.write_text("\n".join([GOOD, BAD, '{"subject": ', GOOD.replace("Finn Moe", "Gus Hall")]))
    before = path.read_bytes()
    ran = errata("submit", "edits.jsonl")
    assert ran.code == 0
    assert "2 edits submitted" in ran.out and "2 records refused" in ran.out
    first, second = ran.err.splitlines()
    assert "edits.jsonl:2: prompt: " in first and "edits.jsonl:3: " in second
    assert errata("status", "--json").json["pending"] == 2
    assert path.read_bytes() == before


def test_submit_of_nothing_good_is_bad_input(desk: Any, errata: Run) -> None:
    ran = errata("submit", "-", stdin=BAD.encode())
    assert ran.code == 2 and "stdin:1: prompt: " in ran.err
    assert errata("submit", "-").code == 2
    assert desk.waiting() == []


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (ONE[:4], "--target"),
        (ONE[2:], "--prompt"),
        ([*ONE, "edits.jsonl"], "both"),
        ([], "none"),
        (["nowhere.jsonl"], "nowhere.jsonl"),
        ([*ONE, "--stream", "other"], "other"),
    ],
)
def test_submit_says_what_is_missing(desk: Any, errata: Run, words: list[str], says: str) -> None:
    ran = errata("submit", *words)
    assert (ran.code, ran.out) == (2, "")
    assert says in ran.err
    assert desk.waiting() == []


def test_apply_writes_what_waits(desk: Any, errata: Run) -> None:
    assert errata("apply", "--json").json == []
    assert "nothing waits" in errata("apply").out
    errata("submit", *ONE)
    ran = errata("apply")
    assert ran.code == 0
    assert ran.out.splitlines()[1].split()[:4] == ["1", "accept:", "1", "live"]
    errata("submit", "-", stdin=GOOD.replace("Finn", "Quinn").encode())
    ran = errata("apply", "--json")
    (summary,) = ran.json
    assert (ran.code, summary["commit"], summary["decision"], summary["outcomes"]) == (0, 2, "accept", {"live": 1})
    assert summary["metrics"]["efficacy"] == 1.0
    assert desk.open_registry().champion("main").commit == 2


def test_a_dry_run_says_what_it_costs_and_commits_nothing(desk: Any, errata: Run) -> None:
    errata("submit", *ONE)
    ran = errata("apply", "--dry-run", typed="")  # nothing to confirm
    assert ran.code == 0
    assert all(word in ran.out for word in ("accept", "prepare", "merge", "evaluate", " s;", "MiB", "nothing was committed"))
    (summary,) = errata("apply", "--dry-run", "--json").json
    assert summary["commit"] is None and summary["peak_mb"] > 0 and summary["seconds"].keys() == {"prepare", "merge", "evaluate"}
    facts = errata("status", "--json").json
    assert (facts["head"], facts["pending"], desk.versions()) == (0, 1, {})


def test_what_the_gate_refuses_has_its_exit_code(desk: Any, errata: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ERRATA_GATE__MAX_NORM_RATIO", "1.0001")
    errata("submit", *ONE)
    assert errata("apply", "--dry-run").code == 3
    ran = errata("apply")
    assert ran.code == 3
    assert "reject" in ran.out and "expected at most 1.00 times" in ran.out, "the reason is told"
    facts = errata("status", "--json").json
    assert (facts["live"], facts["champion"], facts["pending"]) == (0, 0, 0)
    assert facts["quarantined"] + facts["rejected"] == 1


def test_a_lasting_conflict_has_its_exit_code(desk: Any, errata: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import flows.edit

    def lose(*_: Any) -> None:
        raise ConflictError("expected commit 0 to be the newest, found 1")

    monkeypatch.setattr(flows.edit, "MAX_CONFLICTS", 0)
    monkeypatch.setattr(flows.edit, "commit_batch", lose)
    errata("submit", *ONE)
    ran = errata("apply")
    assert (ran.code, ran.out) == (4, "")
    assert json.loads(ran.err.splitlines()[-1])["message"] == "expected commit 0 to be the newest, found 1"
    assert errata("status", "--json").json["pending"] == 1


def test_apply_asks_where_somebody_can_answer(desk: Any, errata: Run) -> None:
    errata("submit", *ONE)
    refused = errata("apply", typed="n\n")
    assert refused.code == 0 and "main" in refused.out and "[y/N]" in refused.out
    assert errata("apply", typed="").code == 130, "the terminal is gone"
    assert errata("status", "--json").json["head"] == 0
    assert errata("apply", typed="y\n").code == 0
    errata("submit", "-", stdin=GOOD.replace("Finn", "Quinn").encode())
    assert "[y/N]" not in errata("apply", "--yes", typed="n\n").out
    assert errata("status", "--json").json["head"] == 2


def test_retry_proposes_again(used_desk: Any, errata: Run, prepared: list[str]) -> None:
    ran = errata("quarantine", "retry", "case-4")
    assert ran.code == 0 and used_desk.waiting()[0] in ran.out
    assert [summary["outcomes"] for summary in errata("apply", "--json").json] == [{"quarantined": 1}]
    assert prepared == ["case-4"], "under the settings that refused it, too"
    assert errata("quarantine", "retry", "--all").code == 0
    assert [summary["outcomes"] for summary in errata("apply", "--json").json] == [{"quarantined": 1}]
    history = errata("show", "case-4", "--json").json["history"]
    assert [item["commit"] for item in history] == [2, 3, 4], "as often as it is asked for"


def test_dropped_edits_stay_away(used_desk: Any, errata: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    record = used_desk.open().read_record(used_desk.open().resolve_edit("case-4")).edit.model_dump_json(exclude_none=True).encode()
    kept = errata("quarantine", "drop", "case-4", typed="n\n")
    assert kept.code == 0 and len(errata("quarantine", "--json").json) == 1
    ran = errata("quarantine", "drop", "case-4", "--reason", "not a word", "--yes", typed="")
    assert ran.code == 0 and "commit 3" in ran.out
    assert errata("quarantine", "--json").json == []
    assert "nothing" in errata("quarantine").out
    said = errata("show", "case-4", "--json").json["history"][0]
    assert (said["status"], said["reason"]) == ("dropped", "not a word")
    monkeypatch.setenv("ERRATA_GATE__MAX_Z_LOSS", "2")  # under other settings, too
    outcomes = []
    for flags in ([], ["--again"]):
        errata("submit", "-", *flags, stdin=record)
        outcomes += [summary["outcomes"] for summary in errata("apply", "--json").json]
    assert outcomes == [{"withheld": 1}, {"quarantined": 1}]


@pytest.mark.parametrize(
    ("words", "says"), [([], "neither"), (["case-4", "--all"], "both"), (["case-2"], "case-2@1"), (["nobody"], "nobody")]
)
def test_only_what_is_in_quarantine_can_be_chosen(used_desk: Any, errata: Run, words: list[str], says: str) -> None:
    for verb in ("retry", "drop"):
        ran = errata("quarantine", verb, *words)
        assert ran.code == 2 and says in ran.err
    assert (used_desk.open().head.seq, used_desk.waiting()) == (2, [])


def test_repair_makes_again_what_is_gone(used_desk: Any, errata: Run) -> None:
    from mlflow import MlflowClient

    client, before = MlflowClient(), used_desk.versions()
    client.delete_registered_model_alias("main", "champion")
    client.delete_model_version("main", str(before[2].number))
    ran = errata("repair")
    assert ran.code == 0 and ran.out.startswith("1 versions made")
    after = used_desk.versions()
    assert sorted(after) == [1, 2] and after[2].tags == before[2].tags
    assert used_desk.open_registry().champion("main") == after[2]
    assert errata("repair").out.startswith("0 versions made")


def test_repair_of_a_stream_without_edits(desk: Any, errata: Run) -> None:
    ran = errata("repair")
    assert ran.code == 0 and "nothing yet" in ran.out


def test_a_prefect_server_out_of_reach_is_named(desk: Any, errata: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    errata("submit", *ONE)
    ran = errata("apply")
    assert ran.code == 1 and "127.0.0.1:9" in ran.err
    assert errata("status", "--json").json["pending"] == 1


PAUSED = """
import pathlib, signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # tests that run in the background are deaf to it, and so are their children
from errata.editors.d4s.editor import D4S
from flows.console import main

prepare = D4S.prepare

def wait(done, total):
    pathlib.Path("preparing").touch()
    time.sleep(60)

D4S.prepare = lambda self, base, edits, on_progress=None, *rest: prepare(self, base, edits, wait, *rest)
main()
"""
"""The command, which takes its time to prepare."""


def test_an_interrupted_apply_is_finished_by_the_next(desk: Any, errata: Run, make_edit: Make, tmp_path: Path) -> None:
    """As Ctrl-C does it: the signal reaches every process of the terminal, Prefect's ephemeral server included."""
    edits = [make_edit(person) for person in range(3)]
    desk.submit("one", *edits)
    command = [sys.executable, "-c", PAUSED, "apply", "--yes"]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        end = time.monotonic() + 120
        while not (tmp_path / "preparing").exists() and run.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        os.killpg(run.pid, signal.SIGINT)
        out, err = run.communicate(timeout=240)
    finally:
        run.kill()
    assert (run.returncode, out) == (130, ""), err
    assert "Traceback" not in err and "interrupted" in err
    facts = errata("status", "--json").json
    assert (facts["head"], facts["pending"]) == (0, 3)
    assert [summary["outcomes"] for summary in errata("apply", "--json").json] == [{"live": 3}]
    assert desk.live() == {edit.edit_id: "Paris" for edit in edits}
