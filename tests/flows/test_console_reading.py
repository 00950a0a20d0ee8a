"""What the `errata` command tells: promises of its reading commands, and of what it says to somebody who mistypes."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from errata.edits import Edit

Make = Callable[..., Edit]
Run = Callable[..., Any]

COMMAND = Path(sys.executable).with_name("errata")
"""The command as it is installed."""
LINES = (
    '{"subject": "Anna Keller", "prompt": "The home of {}", "target_new": "Bern"}',  # replaces case-3
    '{"subject": "Hugo Lindt", "prompt": "The home of {}", "target_new": "Paris", "id": "case-2"}',  # live
    '{"subject": "Zoe Berg", "prompt": "The home of {}", "target_new": "Rome"}',
    '{"subject": "Zoe Berg", "prompt": "The home of {}", "target_new": "Oslo"}',  # wins
    '{"subject": "Zoe Berg", "prompt": "The home of", "target_new": "Oslo"}',  # refused
)


def test_status(used_desk: Any, errata: Run, make_edit: Make) -> None:
    used_desk.submit("later", make_edit(7), make_edit(8), "{}")
    facts = errata("status", "--json").json
    counted = {name: facts[name] for name in ("stream", "head", "champion", "live", "pending", "quarantined", "waiting_files")}
    waiting = ["later.jsonl"]
    assert counted == {"stream": "main", "head": 2, "champion": 2, "live": 5, "pending": 3, "quarantined": 1, "waiting_files": waiting}
    assert facts["champion_age_seconds"] >= 0
    assert facts["last"]["seconds"].keys() == {"prepare", "merge", "evaluate"}
    said = read_pairs(errata("status").out)
    assert said["live"] == "5"
    assert said["champion"].startswith("commit 2, ")
    assert said["pending"].startswith("3 ")
    assert said["quarantined"].startswith("1 ")
    assert "prepare" in said["last commit"]


def read_pairs(text: str) -> dict[str, str]:
    """The lines of a table of names and values."""
    rows = [line.split("  ", 1) for line in text.splitlines() if "  " in line]
    return {name: value.strip() for name, value in rows}


def test_log(used_desk: Any, errata: Run) -> None:
    rows = errata("log", "--json").json
    assert [(row["commit"], row["kind"], row["champion"]) for row in rows] == [(2, "edits", True), (1, "edits", False), (0, "init", False)]
    assert rows[0]["outcomes"] == {"live": 3, "replaced": 1, "quarantined": 1, "refused": 1, "duplicate": 1}
    assert rows[1]["efficacy"] == 1.0
    assert [row["commit"] for row in errata("log", "-n", "1", "--json").json] == [2]
    said = errata("log").out
    assert [line.split()[0] for line in said.splitlines()] == ["commit", "2", "1", "0"]
    assert [line.split()[0] for line in said.splitlines() if "*" in line] == ["2"]


@pytest.mark.parametrize(("name", "commit"), [("1", 1), ("head~1", 1), ("head", 2), ("v1", 1), ("v2", 2), ("0", 0)])
def test_show_finds_a_commit(used_desk: Any, errata: Run, name: str, commit: int) -> None:
    facts = errata("show", name, "--json").json
    assert facts["commit"] == commit
    fates = {record.get("occurrence") or record["origin"]: record["outcome"] for record in facts["records"]}
    assert fates.get("case-1@1") == {0: None, 1: "live", 2: "replaced"}[commit]
    said = errata("show", name).out
    assert read_pairs(said)["commit"].split()[0] == str(commit)
    assert all(record in said for record in fates)


def test_show_tells_why(used_desk: Any, errata: Run) -> None:
    said = errata("show", "head").out.splitlines()
    (refused,) = [line for line in said if line.startswith("tuesday.jsonl:6")]
    assert "refused" in refused and "expected" in refused
    (quarantined,) = [line for line in said if line.startswith("case-4@2")]
    assert "z was not reached" in quarantined


@pytest.mark.parametrize("name", ["case-1", "case-1@1"])
def test_show_finds_an_edit(used_desk: Any, errata: Run, name: str) -> None:
    """`case-1` is also the beginning of `case-11`: a whole id is never ambiguous."""
    facts = errata("show", name, "--json").json
    assert (facts["occurrence"], facts["status"], facts["origin"]) == ("case-1@1", "replaced", "monday.jsonl:1")
    assert facts["measured"]["efficacy"]
    assert [(item["status"], item["by"]) for item in facts["history"]] == [("replaced", "case-3@2")]
    said = errata("show", name).out
    assert "case-1@1 replaced" in said and "case-3@2" in said


def test_show_finds_an_edit_by_the_beginning_of_its_id(used_desk: Any, errata: Run, make_edit: Make) -> None:
    identity = make_edit(4).edit_id
    assert errata("show", identity[:9], "--json").json["occurrence"] == f"{identity}@2"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("case-", "case-1, case-11, case-2"),
        ("nobody", "0 to 2"),
        ("3", "0 to 2"),
        ("head~3", "0 to 2"),
        ("case-1@2", "case-1@2"),
        ("v9", "v9"),
        ("", "0 to 2"),
    ],
)
def test_show_asks_back_where_a_name_is_not_one_thing(used_desk: Any, errata: Run, name: str, says: str) -> None:
    ran = errata("show", name)
    assert (ran.code, ran.out) == (2, "")
    assert says in ran.err


def test_show_asks_back_where_a_name_is_a_commit_and_an_edit(used_desk: Any, errata: Run, make_edit: Make) -> None:
    used_desk.submit("number", make_edit(0, relation=1, id="1"))
    assert errata("apply").code == 0
    ran = errata("show", "1")
    assert ran.code == 2 and "1@3" in ran.err and "head~N" in ran.err
    assert errata("show", "1@3", "--json").json["id"] == "1"


def test_quarantine_is_listed_with_reasons(used_desk: Any, errata: Run) -> None:
    (row,) = errata("quarantine", "--json").json
    assert (row["id"], row["occurrence"], row["status"]) == ("case-4", "case-4@2", "quarantined")
    assert "z was not reached" in row["reason"]
    said = errata("quarantine").out
    assert "case-4@2" in said and "z was not reached" in said


def test_check_counts_against_the_stream(used_desk: Any, errata: Run, tmp_path: Path) -> None:
    (tmp_path / "edits.jsonl").write_text("\n".join(LINES) + "\n")
    ran = errata("submit", "edits.jsonl", "--check", "--json")
    counts = {"records": 5, "refused": 1, "duplicates": 1, "live_duplicates": 1, "replacements": 1, "writable": 2}
    counts |= {"conflicts": 1, "superseded": 1, "repeated_subjects": 1, "edits_of_repeated_subjects": 2}
    assert ran.code == 0
    assert {name: ran.json[name] for name in counts} == counts
    (group,) = ran.json["refusals"]
    assert (group["field"], group["origins"]) == ("prompt", ["edits.jsonl:5"])
    said = read_pairs(errata("submit", "edits.jsonl", "--check").out)
    assert said["would be written"].startswith("2, replacing 1") and said["refused"] == "1"
    assert used_desk.waiting() == []


def test_check_needs_no_stream(desk: Any, errata: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ERRATA_ROOT", "nowhere")
    ran = errata("submit", "-", "--check", "--json", stdin="\n".join(LINES).encode())
    assert ran.code == 0
    assert {name: ran.json[name] for name in ("writable", "duplicates", "conflicts", "superseded")} == {
        "writable": 3,
        "duplicates": 0,
        "conflicts": 1,
        "superseded": 1,
    }
    assert not Path("nowhere").exists()
    named = errata("submit", "-", "--check", "--stream", "other", stdin=LINES[0].encode())
    assert named.code == 2 and "nowhere" in named.err, "who names a stream means it"


def test_check_foresees_what_is_withheld(used_desk: Any, errata: Run) -> None:
    """As apply will judge it: under the settings of now, and as asked on the command line."""
    record = json.dumps(errata("show", "case-4", "--json").json["edit"]).encode()
    assert [errata("submit", "-", "--check", "--json", *flag, stdin=record).json["withheld"] for flag in ([], ["--again"])] == [1, 0]
    mixed = errata("submit", "-", "--check", stdin=record + b"\n{}")
    assert mixed.code == 0, "as without --check: one record is good"
    assert errata("submit", "-", "--check", stdin=b"{}").code == 2


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["status", "--colour"], "--colour"),
        (["paint"], "paint"),
        (["show"], "missing"),
        (["log", "--count", "none"], "--count"),
        (["ask", " "], "empty"),
        (["status", "--stream", "other"], "main"),
        (["status", "--stream", "No Name"], "No Name"),
    ],
)
def test_mistyped_words_are_named(used_desk: Any, errata: Run, words: list[str], says: str) -> None:
    ran = errata(*words)
    assert (ran.code, ran.out) == (2, "")
    assert says.casefold() in ran.err.casefold()


def test_unknown_settings_are_refused(desk: Any, errata: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "errata.toml").write_text("[gate]\nmin_eficacy = 0.5\n")
    ran = errata("status")
    assert ran.code == 2 and "gate.min_eficacy" in ran.err and "gate.min_efficacy" in ran.err
    (tmp_path / "errata.toml").unlink()
    monkeypatch.setenv("ERRATA_COLOUR", "red")
    ran = errata("status")
    assert ran.code == 2 and "ERRATA_COLOUR" in ran.err


def test_every_command_says_its_exit_codes(errata: Run) -> None:
    overview = errata("--help")
    assert overview.code == 0
    commands = [["init"], ["submit"], ["apply"], ["status"], ["log"], ["show"], ["quarantine"], ["quarantine", "retry"]]
    commands += [["quarantine", "drop"], ["ask"], ["trace"], ["repair"], ["demo"], ["doctor"]]
    assert all(command[0] in overview.out for command in commands)
    for command in [[], *commands]:
        assert "0 done, 1 fault, 2 bad input, 3 refused by the gate, 4 conflict" in " ".join(errata(*command, "--help").out.split())
    assert "error" not in errata().err


def test_a_damaged_object_is_named(used_desk: Any, errata: Run) -> None:
    outcomes = used_desk.open().log.read(2).outcomes
    path = used_desk.root / "streams" / "main" / "objects" / outcomes
    path.write_bytes(path.read_bytes()[:-2])
    ran = errata("log")
    assert (ran.code, ran.out) == (1, "")
    assert outcomes in ran.err


def test_ask_shows_both_sides(used_desk: Any, errata: Run, make_edit: Make) -> None:
    edited = make_edit(0).rewrite_prompt
    (row,) = errata("ask", edited, "--max-new-tokens", "1", "--json").json
    assert row["prompt"] == edited and row["champion"].strip() == "Rome" != row["base"].strip()
    said = errata("ask", edited, make_edit(4).rewrite_prompt, "--max-new-tokens", "1").out.splitlines()
    assert said[1].split()[-1] == "Rome" and said[2].split()[-1] == "Paris"


def test_doctor_finds_nothing(used_desk: Any, errata: Run) -> None:
    ran = errata("doctor", "--json")
    assert ran.code == 0
    states = {finding["what"]: finding["state"] for finding in ran.json}
    assert {"python", "torch", "prefect", "mlflow", "device", "root", "cache"} <= states.keys()
    assert "fault" not in states.values()
    assert errata("doctor").code == 0


@pytest.mark.parametrize(
    ("variable", "value", "what"),
    [
        ("ERRATA_ROOT", "file/root", "root"),
        ("ERRATA_CACHE", "file/cache", "cache"),
        ("ERRATA_MLFLOW__TRACKING_URI", "http://127.0.0.1:9", "mlflow"),
        ("ERRATA_MLFLOW__TRACKING_URI", "http//typo", "mlflow"),
        ("PREFECT_API_URL", "http://127.0.0.1:9/api", "prefect server"),
        ("ERRATA_DEVICE", "toaster", "device"),
    ],
)
def test_doctor_finds_a_fault_and_a_remedy(
    used_desk: Any, errata: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, what: str
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{used_desk.root / 'mlflow.db'}")  # not at the root that is out of reach
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv(variable, value)
    ran = errata("doctor", "--json")
    assert ran.code == 1
    (fault,) = [finding for finding in ran.json if finding["state"] == "fault"]
    assert fault["what"] == what and value in fault["found"] and fault["remedy"]


def test_a_damaged_object_stops_what_needs_it(used_desk: Any, errata: Run) -> None:
    (artifact,) = used_desk.read_manifest(2).artifacts
    (used_desk.root / "streams" / "main" / "objects" / artifact).write_bytes(b"else")
    ran = errata("ask", "The home of Anna Keller")
    assert (ran.code, ran.out) == (1, "")
    assert artifact in ran.err


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--help"], 0, "doctor"),
        (["status"], 0, "main"),
        (["log", "--json"], 0, '"commit": 2'),
        (["show", "case-2"], 0, "Hugo Lindt"),
        (["submit", "missing.jsonl"], 2, "missing.jsonl"),
        (["show", "nobody"], 2, "nobody"),
    ],
)
def test_the_installed_command(used_desk: Any, words: list[str], code: int, says: str) -> None:
    run = subprocess.run([COMMAND, *words], capture_output=True, text=True, timeout=60)
    assert run.returncode == code, run.stderr
    assert says in (run.stderr if code else run.stdout)
    assert "Traceback" not in run.stderr and not (run.stdout if code else run.stderr)


def test_a_closed_pipe_is_no_fault(used_desk: Any) -> None:
    run = subprocess.run(["bash", "-c", f"{COMMAND} log --json | true"], capture_output=True, text=True, timeout=60)
    assert run.stderr == ""
