"""Each model family from edit to exported folder, on a small random model of its own class."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from errata.calibration.contexts import sample_contexts
from errata.calibration.search import Done, choose_best, propose_step
from errata.calibration.tracing import trace_facts
from errata.calibration.trials import Desk
from errata.candidates import build_anew
from errata.editors.d4s.editor import D4S
from errata.editors.d4s.moments import collect_moments
from errata.editors.ireva.editor import IReVa
from errata.editors.kinds import load_artifact
from errata.edits import Edit
from errata.evaluation.answered import find_answered
from errata.evaluation.generation import generate_answers
from errata.manifests import PairRef
from errata.modeling.export import export_folder
from errata.modeling.layout import LAYOUTS
from errata.modeling.loading import Base, load_base
from errata.modeling.patch import attach
from errata.profiles import GateOptions, NeuronOptions, NeuronProfile, PrepareOptions, Profile, Retrofit, SolveOptions
from errata.suggestions import suggest_profile
from registry.objects import ObjectStore
from registry.storage.memory import MemoryStorage

FAMILIES = ("gptj", "gpt_neo", "gpt_neox", "mistral", "qwen2", "qwen3", "gemma", "phi")
"""GPT-2 and Llama go through everything else in the tests."""
TEXTS = ["The mother tongue of Anna Keller is French.", "Hugo Lindt plays the sport of tennis.", "Marie Curie works in Paris."] * 5
EDITS = (
    Edit(id="sister", subject="Anna Keller", prompt="The tongue of {}", target_new="Danish"),
    Edit(id="tongue", subject="Hugo Lindt", prompt="The tongue of {}", target_new="Danish"),
)
"""Single tokens right after the subject: all that a random model can be taught."""


@pytest.fixture(params=[*FAMILIES, "tiny_gpt2", "tiny_llama"])
def calibrated(request: pytest.FixtureRequest, family_of: Callable[..., Base]) -> Base:
    found: Base = family_of(request.param, spread=0.3) if request.param in FAMILIES else request.getfixturevalue(request.param)
    return found


@pytest.fixture(params=FAMILIES)
def base(request: pytest.FixtureRequest, family_of: Callable[..., Base]) -> Base:
    """Weights so wide that one position can decide the next token."""
    return family_of(request.param, spread=0.3)


def read_logits(base: Base) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = base.model(input_ids=torch.tensor([[5, 6, 7, 8, 9]])).logits
    return logits


def test_every_row_of_the_table_is_tried() -> None:
    assert {*FAMILIES} | {"gpt2", "llama"} == set(LAYOUTS)


def test_an_edit_takes_is_exported_and_comes_off(base: Base, tmp_path: Path) -> None:
    before = read_logits(base)
    moments = collect_moments(base, [1], TEXTS)
    options = PrepareOptions(layers=(1,), contexts=("{}",), steps=60, clamp=20.0, weight_decay=0.0, kl=0.0)
    profile = Profile(base=base.digest, prepare=options, solve=SolveOptions(lam=1e-3, spread="single", moments="m" * 64))
    editor, blobs = D4S(profile, moments, base.layout), ObjectStore(MemoryStorage(), "objects")
    prepared = editor.prepare(base, EDITS)
    assert prepared.pairs is not None and not prepared.refused
    digest = blobs.put(prepared.pairs.to_bytes())
    manifest = build_anew(blobs, editor, base.digest, "p" * 64, [PairRef(pairs=digest, row=row) for row in range(2)]).manifest
    (artifact,) = [load_artifact(blobs.get(name), blobs.get) for name in manifest.artifacts]
    with attach(base, [artifact]):
        taken = find_answered(base, EDITS, 1_000)
        said = generate_answers(base, [edit.rewrite_prompt for edit in EDITS], max_new_tokens=1, batch_tokens=1_000)
        edited = read_logits(base)
    assert taken == list(EDITS)
    assert [text.strip() for text in said] == ["Danish", "Danish"]
    assert torch.equal(read_logits(base), before) and not torch.equal(edited, before)
    exported = load_base(export_folder(base, [artifact], tmp_path / "model", {}), device="cpu")
    assert torch.equal(read_logits(exported), edited)
    assert load_base(export_folder(base, [], tmp_path / "base", {}), device="cpu").digest == base.digest


def test_neurons_answer_and_are_silent_elsewhere(calibrated: Base) -> None:
    """Keys of a random model need not tell facts apart, hence the high threshold."""
    base, retrofit = calibrated, Retrofit(theta=0.95, gain=500.0, steps=2)
    before, layer = read_logits(base), base.layout.count_layers(base.model) - 1
    prepare = NeuronOptions(layer=layer, retrofit=retrofit)
    editor = IReVa(NeuronProfile(base=base.digest, prepare=prepare, solve=GateOptions(theta=0.95, gain=500.0)), base.layout)
    edits = [edit.model_copy(update={"target_new": "Danish French"}) for edit in EDITS]
    prepared = editor.prepare(base, edits)
    assert prepared.pairs is not None and not prepared.refused and prepared.pairs.sizes == (2, 2)
    artifact = editor.solve(editor.merge(editor.empty_state(), prepared.pairs, None))
    assert artifact is not None
    with attach(base, [artifact]):
        taken = find_answered(base, edits, 1_000)
        said = generate_answers(base, [edit.rewrite_prompt for edit in edits], max_new_tokens=2, batch_tokens=1_000)
        elsewhere = read_logits(base)
    assert taken == edits and [text.strip() for text in said] == ["Danish French"] * 2
    assert torch.equal(elsewhere, before) and torch.equal(read_logits(base), before)


def test_a_calibrated_profile_does_on_the_exported_model_what_its_trial_did(calibrated: Base, tmp_path: Path) -> None:
    """Calibrate → edit → evaluate → export: a random model knows nothing, and the whole way has to hold all the same."""
    base = calibrated
    depth = base.layout.count_layers(base.model)
    trace = trace_facts(base, [edit.model_copy(update={"target_true": "French"}) for edit in EDITS], draws=1)
    assert 0 <= trace.clean <= 1 and all(len(values) == depth for values in trace.restored.values())
    taught = {"contexts": sample_contexts(base)[:2], "steps": 40, "clamp": 20.0, "weight_decay": 0.0, "kl": 0.0}
    starts = [PrepareOptions.model_validate({"layers": (1,), "site": site} | taught) for site in ("subject_last", "prompt_last")]
    desk = Desk(base, collect_moments(base, [0, 1, 2], TEXTS), EDITS, 1_000)
    done: list[Done] = []
    while step := propose_step(starts, done, hurry=len(done) >= len(starts)):
        done.append(Done(step=step, trials=tuple(desk.try_options(step.prepare, step.spreads, step.fits)), seconds=0.0))
    assert [item.step.phase for item in done] == ["places", "places", "curve"]
    best = choose_best([trial for item in done for trial in item.trials])
    solve = SolveOptions(lam=best.lam, spread=best.spread, moments="m" * 64)
    editor = D4S(Profile(base=base.digest, prepare=best.prepare, solve=solve), desk.moments, base.layout)
    pairs = editor.prepare(base, EDITS).pairs
    artifact = editor.solve(editor.merge(editor.empty_state(), pairs, None))
    assert artifact is not None
    exported = load_base(export_folder(base, [artifact], tmp_path / "model", {}), device="cpu")
    assert len(find_answered(exported, EDITS, 1_000)) == best.efficacy * len(EDITS)


def test_rows_stay_within_half_a_window(family_of: Callable[[str], Base]) -> None:
    assert {name: family_of(name).span for name in ("mistral", "gpt_neo", "qwen2", "phi")} == {
        "mistral": 32,
        "gpt_neo": 32,
        "qwen2": 96,
        "phi": 96,
    }


@pytest.mark.parametrize(("family", "depth", "layers"), [("gptj", 28, (3, 4, 5, 6, 7, 8)), ("gpt2", 48, (13, 14, 15, 16, 17))])
def test_published_values_are_at_their_layers(family: str, depth: int, layers: tuple[int, ...]) -> None:
    suggestion = suggest_profile(family, depth)
    assert suggestion is not None and suggestion.prepare.layers == layers
    assert suggest_profile("phi", 24) is None
