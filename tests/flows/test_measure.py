"""`errata moments`: one pass over a corpus in shards, each computed once however often the run is killed."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import pytest

from errata.editors.d4s.moments import Moments, collect_moments
from errata.errors import InputError, ObjectCorruptError, SettingsError
from registry.shards import ShardStore
from registry.shared import fetch_base, get_base, get_moments, put_base
from registry.storage.base import Storage, open_storage

Run = Callable[..., Any]
ALL = 100_000
"""More tokens than the corpus has."""
DEADLY = """
import os, signal
from registry.shards import ShardStore
noted, note = [], ShardStore.note
def deadly(self, record):
    note(self, record)
    noted.append(record.shard)
    if len(noted) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
ShardStore.note = deadly
from flows.console import main
main()
"""


@pytest.fixture
def corpus(tmp_path: Path, sentences: Any) -> Path:
    """A folder: half of the sentences as text, half as JSONL."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    half = len(sentences) // 2
    (folder / "first.txt").write_text("\n".join(sentences[:half]))
    (folder / "second.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in sentences[half:]))
    return folder


@pytest.fixture
def summed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The limits of the shards that are summed in this process, as it goes on."""
    import tasks.measuring

    limits: list[int] = []
    real = tasks.measuring.sum_moments

    def sum_moments(*values: Any, **options: Any) -> Any:
        limits.append(options["limit"])
        return real(*values, **options)

    monkeypatch.setattr("tasks.measuring.sum_moments", sum_moments)
    return limits


@pytest.fixture
def storage(desk: Any) -> Storage:
    return open_storage(str(desk.root))


def list_parts(storage: Storage) -> list[str]:
    return [
        entry.key.rpartition("/")[2] for entry in storage.list("shared/moments-parts/") if "/sums/" in entry.key or ".json" in entry.key
    ]


def make_words(folder: Path, text: Path, **options: Any) -> list[str]:
    given = {"base": folder, "corpus": text, "layers": "0-1", "tokens": ALL, "shards": 6, **options}
    return ["moments", *(str(word) for name, value in given.items() for word in (f"--{name}", value)), "--json"]


def test_it_measures_the_mean_and_says_how_good_it_is(
    desk: Any, errata: Run, editable: Any, editable_folder: Path, corpus: Path, sentences: Any, storage: Storage, prefect_server: str
) -> None:
    ran = errata(*make_words(editable_folder, corpus))
    assert ran.code == 0, ran.err
    facts = ran.json
    moments = Moments.from_bytes(get_moments(storage, facts["moments"]))
    plain = collect_moments(editable, [0, 1], sentences)
    assert (moments.base, moments.tokens, set(moments.c)) == (editable.digest, plain.tokens, {0, 1})
    assert all((moments.c[layer] - plain.c[layer]).norm() < 1e-5 * plain.c[layer].norm() for layer in (0, 1))
    assert facts["tokens"] == facts["more"] == plain.tokens and facts["shards"] == 6
    assert [row["width"] for row in facts["layers"]] == [192, 192]
    assert all(1 < row["effective_rank"] < row["rank"] <= 192 and 0 < row["error"] < 1 for row in facts["layers"])
    assert facts["change"] < max(row["error"] for row in facts["layers"])
    assert facts["enough"] > 0
    assert list_parts(storage) == []

    said = errata(*(word for word in make_words(editable_folder, corpus) if word != "--json")).out
    assert f"{plain.tokens:,} more tokens would change λC by {facts['change']:.2%} (layer {facts['slowest']}, the slowest)" in said
    assert f"{plain.tokens:,} tokens (of 100,000 asked for)" in said


def test_few_tokens_are_called_too_few(desk: Any, errata: Run, editable_folder: Path, corpus: Path, prefect_server: str) -> None:
    words = make_words(editable_folder, corpus, tokens=100, layers="1")
    facts = errata(*words).json
    assert facts["tokens"] == 100 and facts["layers"][0]["rank"] <= 100 < facts["layers"][0]["width"]
    assert "layer 1: C is singular (fewer tokens than width)" in errata(*words[:-1]).out


def test_the_predicted_change_is_what_more_tokens_do(
    desk: Any, errata: Run, editable_folder: Path, corpus: Path, storage: Storage, prefect_server: str
) -> None:
    def measure(tokens: int) -> tuple[Any, Any]:
        facts = errata(*make_words(editable_folder, corpus, tokens=tokens, layers="1")).json
        return facts, Moments.from_bytes(get_moments(storage, facts["moments"])).c[1]

    (facts, before), (_, after) = measure(800), measure(1_600)
    actual = float((after - before).norm() / before.norm())
    assert actual / 2 < facts["change"] < actual * 2


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_shards_it_has(
    desk: Any,
    errata: Run,
    editable_folder: Path,
    corpus: Path,
    storage: Storage,
    summed: list[int],
    prefect_server: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = make_words(editable_folder, corpus)
    monkeypatch.setenv("ERRATA_ROOT", str(tmp_path / "undisturbed"))
    undisturbed = errata(*words).json["moments"]
    assert len(summed) == 6

    monkeypatch.setenv("ERRATA_ROOT", str(desk.root))
    checkout = str(Path(__file__).parents[2])
    variables = {**os.environ, "PYTHONPATH": checkout, "OMP_NUM_THREADS": "1", "PREFECT_API_URL": prefect_server}
    killed = subprocess.run([sys.executable, "-c", DEADLY, *words], env=variables, cwd=tmp_path, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert len([name for name in list_parts(storage) if name.endswith(".json")]) == 3

    summed.clear()
    assert errata(*words).json["moments"] == undisturbed
    assert len(summed) == 3
    assert list_parts(storage) == []
    assert errata(*words).json["moments"] == undisturbed  # what is finished is not begun again
    assert len(summed) == 3


def test_a_damaged_part_is_named_and_computed_again(desk: Any, editable: Any, corpus: Path, storage: Storage, summed: list[int]) -> None:
    from errata.corpus import open_corpus
    from tasks.measuring import make_plan, pool_stored, sum_part

    opened = open_corpus(corpus)
    plan = make_plan(editable.digest, [1], str(corpus), opened, 500, 2, 0)

    def sum_all() -> None:
        for shard in range(2):
            sum_part(storage, editable, opened, plan, shard, lambda _done: None)

    sum_all()
    record = ShardStore(storage, plan.digest).find(1)
    assert record is not None
    path = desk.root / f"shared/moments-parts/{plan.digest}/sums/{record.sums[1]}"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b"?")
    with pytest.raises(ObjectCorruptError):
        pool_stored(storage, plan)
    sum_all()
    assert len(summed) == 3 and path.read_bytes() == whole
    assert Moments.from_bytes(get_moments(storage, pool_stored(storage, plan))).tokens == 500


def test_a_corpus_that_changes_meanwhile_is_refused(desk: Any, editable: Any, corpus: Path, storage: Storage) -> None:
    from errata.corpus import open_corpus
    from tasks.measuring import make_plan, sum_part

    plan = make_plan(editable.digest, [1], str(corpus), open_corpus(corpus), 500, 2, 0)
    (corpus / "third.txt").write_text("More.")
    with pytest.raises(InputError, match=r"corpus: expected \d+ bytes as when it was planned"):
        sum_part(storage, editable, open_corpus(corpus), plan, 0, lambda _done: None)


def test_lines_that_cannot_be_read_are_told_and_counted(
    desk: Any, errata: Run, editable_folder: Path, corpus: Path, prefect_server: str
) -> None:
    with (corpus / "second.jsonl").open("a") as file:
        file.write('{"txt": "typo"}\n' * 9)
    ran = errata(*make_words(editable_folder, corpus, shards=1))
    assert ran.json["faults"] == 9
    told = re.findall(r"left out of the corpus: \S+second\.jsonl:(\d+): expected an object with a passage", ran.err)
    assert len(set(told)) == 3 and {int(line) for line in told} <= set(range(145, 154))


def test_init_uses_what_was_measured(
    desk: Any, errata: Run, editable_folder: Path, corpus: Path, summed: list[int], tmp_path: Path, prefect_server: str
) -> None:
    (tmp_path / "profile.json").write_text(json.dumps({"prepare": {"layers": [1]}, "lam": 1.0}))
    assert errata(*make_words(editable_folder, corpus, layers="1", shards=8)).code == 0
    assert len(summed) == 8
    words = ["init", "--base", str(editable_folder), "--profile", str(tmp_path / "profile.json"), "--corpus", str(corpus)]
    assert errata(*words, "--stream", "mine").code == 0
    assert len(summed) == 8
    assert errata(*words[:-1], str(corpus / "first.txt"), "--stream", "other").code == 0
    assert len(summed) == 16


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"layers": "1-9"}, "layers: expected 0 to 2"),
        ({"layers": "3-1"}, "layers: expected numbers and ranges"),
        ({"layers": "last"}, "layers: expected numbers and ranges"),
        ({"corpus": "nowhere"}, "nowhere: expected a readable text file"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    desk: Any, errata: Run, editable_folder: Path, corpus: Path, prefect_server: str, options: dict[str, str], says: str
) -> None:
    ran = errata(*make_words(editable_folder, corpus, **options))
    assert ran.code == 2 and says in ran.err


def test_shards_go_round_the_gpus_of_a_machine(
    desk: Any, editable: Any, corpus: Path, prefect_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With two, calls run beside each other; each has its GPU's copy of the base for itself."""
    from errata.modeling.loading import load_base
    from flows.measure import measure_moments

    asked: list[str] = []

    def load(source: str, *, device: str, **options: Any) -> Any:
        asked.append(device)
        return load_base(source, device="cpu", **options)

    base = desk.open().head.base
    plain = measure_moments(base, [1], str(corpus), ALL, 4)
    monkeypatch.setenv("ERRATA_DEVICE", "auto")
    monkeypatch.setenv("ERRATA_ROOT", str(desk.root / "other"))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("tasks._session.load_base", load)
    here = open_storage(str(desk.root))
    put_base(open_storage(str(desk.root / "other")), get_base(here, base), fetch_base(here, base, desk.cache))
    assert measure_moments(base, [1], str(corpus), ALL, 4) == plain
    assert sorted(asked) == ["cuda:0", "cuda:1"]


def test_the_first_failure_ends_the_others(desk: Any, prefect_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from tasks._spreading import spread, tell_step
    from tasks._task import stage

    ended: list[str] = []
    begun = threading.Event()

    @stage
    def work(call: int) -> None:
        if call == 1:
            assert begun.wait(60)
            raise InputError("expected something, found nothing")
        begun.set()
        for step in range(600):
            try:
                tell_step(call, step)
            except CancelledError:
                ended.append("told")
                raise
            time.sleep(0.05)
        ended.append("in its own time")

    monkeypatch.setenv("ERRATA_DEVICE", "auto")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(InputError, match="found nothing"):
        spread(work, [{"call": 1}, {"call": 2}, {"call": 3}])
    assert ended in (["told"], ["told", "told"])


def test_a_runner_that_is_not_installed_is_named(desk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from tasks._spreading import spread

    monkeypatch.setenv("ERRATA_COMPUTE__RUNNER", "ray")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SettingsError, match=r'compute.runner: .* found no ray; pip install "errata\[ray\]"'):
        spread(lambda: None, [{}])
