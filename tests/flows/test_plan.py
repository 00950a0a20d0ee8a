"""`errata plan` says what editing a base takes; `errata init` refuses what has no room before it loads anything."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.tiny_base import choose_options
from errata.modeling import loading

Errata = Callable[..., Any]
LLAMA_7B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "dtype": "float16",
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 4096,
    "vocab_size": 32_000,
}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "large").mkdir()
    (tmp_path / "large" / "config.json").write_text(json.dumps(LLAMA_7B))
    return tmp_path / "large" / "config.json"


@pytest.mark.usefixtures("desk")
def test_a_plan_of_a_configuration(errata: Errata, config: Path) -> None:
    done = errata("plan", "--base", str(config), "--device-memory", "24GiB", "--edits", "20000", "--json")
    assert done.json["parameters"] == 6_738_415_616 and done.json["layers"] == [4, 5, 6, 7, 8]
    assert done.json["pair_bytes"] == 236_544 and done.json["room"]["device"] == 24 * 2**30
    refused = errata("plan", "--base", str(config), "--device-memory", "8GiB")
    assert refused.code == 3 and "does not fit" in refused.out and "no room" in refused.out and "12.6 GiB" in refused.out


@pytest.mark.usefixtures("desk")
def test_a_model_too_large_is_planned_over_memory_and_disk(errata: Errata, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ERRATA_DEVICE_MAP", "auto")
    lines = errata("plan", "--base", str(config), "--device-memory", "8GiB", "--json").json["lines"]
    weights = {line["place"]: line["bytes"] for line in lines if line["what"].startswith("weights")}
    assert set(weights) == {"device", "memory", "disk"} and weights["device"] < 8 * 2**30 < sum(weights.values())


@pytest.mark.usefixtures("desk")
def test_a_plan_of_the_base_at_hand(errata: Errata, editable_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "profile.json").write_text(json.dumps({"prepare": choose_options().model_dump(mode="json"), "lam": 1.0}))
    done = errata("plan", "--base", str(editable_folder), "--profile", str(tmp_path / "profile.json"))
    assert done.code == 0 and "fits" in done.out and "layers 1" in done.out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--base", "nowhere/at/all.json"], "expected a Hugging Face causal language model at 'nowhere/at/all.json'"),
        (["--base", "CONFIG", "--device-memory", "much"], "expected bytes such as 24GiB, found 'much'"),
        (["--base", "CONFIG", "--profile", "none.json"], "none.json: expected a readable profile"),
    ],
)
@pytest.mark.usefixtures("desk")
def test_bad_input_is_told_in_one_line(errata: Errata, config: Path, words: list[str], said: str) -> None:
    done = errata("plan", *(str(config) if word == "CONFIG" else word for word in words))
    assert done.code in (1, 2) and said in done.err and len(done.err.strip().splitlines()) == 1


@pytest.mark.usefixtures("desk")
def test_what_has_no_room_is_refused_before_it_is_loaded(
    errata: Errata, editable_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from errata import plan

    monkeypatch.setattr(plan, "list_free", lambda _device: {"cpu": 1_000})
    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("it was loaded"))
    (tmp_path / "profile.json").write_text(json.dumps({"prepare": choose_options().model_dump(mode="json"), "lam": 1.0}))
    words = ("--stream", "other", "--base", str(editable_folder), "--profile", str(tmp_path / "profile.json"))
    done = errata("init", *words)
    assert done.code == 1 and "plan: expected room for weights (always)" in done.err
