"""A model that is larger than its device edits as one that is not: same digest, same pairs, same weights, same answers."""

from pathlib import Path
from typing import Any

import pytest
import torch

from errata.editors.artifacts import WeightDelta
from errata.editors.d4s.editor import D4S
from errata.editors.d4s.moments import Moments, collect_moments
from errata.edits import Edit
from errata.errors import BaseMismatchError
from errata.evaluation.generation import generate_answers
from errata.modeling.export import export_folder
from errata.modeling.loading import Base, digest_model, load_base, sketch_model
from errata.modeling.offload import read_parameter, spread_blocks
from errata.modeling.patch import attach
from errata.monitors.norms import measure_norms
from errata.profiles import PrepareOptions, Profile, SolveOptions

TEXTS = ["The mother tongue of Anna Keller is French.", "Hugo Lindt plays the sport of tennis.", "Marie Curie works in Paris."] * 5
EDITS = [
    Edit(id=name, subject=subject, prompt=prompt, target_new=target)
    for name, subject, prompt, target in (
        ("one", "Anna Keller", "The mother tongue of {} is", "Danish"),
        ("two", "Hugo Lindt", "{} plays the sport of", "chess"),
        ("three", "Marie Curie", "The city of {} is", "Stockholm"),
    )
]


@pytest.fixture(params=["gpt2", "llama"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    base: Base = request.getfixturevalue(f"tiny_{request.param}")
    base.model.save_pretrained(tmp_path / "model")
    base.tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def plain(folder: Path) -> Base:
    return load_base(folder, device="cpu")


@pytest.fixture(params=["memory", "some on disk", "all on disk"])
def spread(request: pytest.FixtureRequest, folder: Path, plain: Base, tmp_path: Path) -> Base:
    """The same model, dispatched."""
    layout, body = plain.layout, plain.model.get_submodule(plain.layout.body)
    places: dict[str, Any] = {f"{layout.body}.{name}": "cpu" for name, _ in body.named_children()}
    del places[layout.blocks]
    places |= {f"{layout.blocks}.{layer}": "disk" if layer in (1, 3) else "cpu" for layer in range(4)}
    places[layout.head] = "cpu"
    if request.param == "all on disk":
        places = dict.fromkeys(places, "disk")
    return load_base(folder, device="cpu", device_map={"": "cpu"} if request.param == "memory" else places, offload=tmp_path / "offload")


def make_editor(base: Base, moments: Moments) -> D4S:
    prepare = PrepareOptions(layers=(1, 2), contexts=("{}", "It rained. {}"), steps=8)
    solve = SolveOptions(lam=2.0, spread="even", moments="m")
    return D4S(Profile(base=base.digest, prepare=prepare, solve=solve), moments, base.layout)


def read_logits(base: Base) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = base.model(input_ids=torch.tensor([[5, 6, 7, 8, 9]], device=base.device)).logits
    return logits


def test_it_edits_as_the_plain_model_does(plain: Base, spread: Base, tmp_path: Path) -> None:
    assert spread.digest == plain.digest and spread.device == plain.device == torch.device("cpu")
    theirs, ours = (collect_moments(base, (1, 2), TEXTS) for base in (plain, spread))
    assert all(torch.equal(ours.c[layer], theirs.c[layer]) for layer in (1, 2))
    artifacts = []
    for base in (plain, spread):
        editor = make_editor(base, theirs)
        prepared = editor.prepare(base, EDITS, groups=editor.find_groups(base, EDITS))
        assert prepared.pairs is not None
        artifact = editor.solve(editor.merge(editor.empty_state(), prepared.pairs, None))
        assert artifact is not None
        artifacts.append((prepared.pairs.to_bytes(), artifact.to_bytes()))
    assert artifacts[0] == artifacts[1]
    before = read_logits(spread)
    assert torch.equal(before, read_logits(plain))
    assert measure_norms(plain, artifact.deltas) == measure_norms(spread, artifact.deltas)
    said = []
    for base in (plain, spread):
        with attach(base, [artifact]):
            said.append((read_logits(base), generate_answers(base, ["Anna Keller is"], max_new_tokens=4, batch_tokens=100)))
            assert digest_model(base.model, base.tokenizer) != base.digest
            exported = load_base(export_folder(base, [], tmp_path / str(len(said)), {}), device="cpu")
            assert torch.equal(read_logits(exported), said[-1][0])
    assert torch.equal(said[0][0], said[1][0]) and said[0][1] == said[1][1] and not torch.equal(said[0][0], before)
    assert torch.equal(read_logits(spread), before) and digest_model(spread.model, spread.tokenizer) == plain.digest


def test_deltas_are_refused_twice_on_offloaded_weights_too(spread: Base) -> None:
    name = spread.layout.weight_name(1)
    artifact = WeightDelta(spread.digest, {name: torch.ones(spread.layout.read_weight(spread.model, 1).shape)})
    with pytest.raises(BaseMismatchError, match="carries a delta already"), attach(spread, [artifact, artifact]):
        raise AssertionError("attached twice")
    with pytest.raises(KeyError), attach(spread, [artifact]):
        assert torch.equal(read_parameter(spread.model, name), _add_one(spread, name))
        raise KeyError
    assert digest_model(spread.model, spread.tokenizer) == spread.digest


def _add_one(base: Base, name: str) -> torch.Tensor:
    stored = load_base(base.model.config._name_or_path, device="cpu").model.get_parameter(name)
    return (stored.double() + 1).float()


def test_blocks_fill_the_device_then_memory_then_the_disk(folder: Path, tmp_path: Path) -> None:
    model = sketch_model(folder)
    whole = sum(tensor.nbytes for tensor in model.parameters())
    places = spread_blocks(model, torch.device("cuda", 0), {0: whole, "cpu": whole // 2})
    order = list(dict.fromkeys(map(str, places.values())))
    assert order[0] == "cuda:0" and order[-1] == "disk" and set(order) <= {"cuda:0", "cpu", "disk"}
    everything = spread_blocks(model, torch.device("cpu"), {"cpu": 100 * whole})
    assert set(map(str, everything.values())) == {"cpu"}
    some = spread_blocks(model, torch.device("cpu"), {"cpu": whole})
    loaded = load_base(folder, device="cpu", device_map=some, offload=tmp_path / "offload")
    assert loaded.digest == load_base(folder, device="cpu", device_map="auto").digest == load_base(folder, device="cpu").digest
    assert any(parameter.device.type == "meta" for parameter in loaded.model.parameters())
