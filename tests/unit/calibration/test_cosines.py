"""What is read, and of which prompts: on a random base, whose answers mean nothing and whose arithmetic must hold all the same."""

from pathlib import Path

import pytest
import torch

from benchmarks.tiny_base import build_edit, write_base
from errata.calibration.cosines import Cosines, complete_edits, list_foreign, read_cosines
from errata.calibration.gate_trials import GateDesk
from errata.editors.ireva.editor import IReVa
from errata.edits import Edit, Probe
from errata.errors import EditorError
from errata.evaluation.evaluate import evaluate_candidate
from errata.modeling.loading import Base, load_base
from errata.modeling.patch import require_untouched
from errata.profiles import GateOptions, NeuronOptions, NeuronProfile
from errata.settings import EvaluateSettings


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return load_base(write_base(tmp_path_factory.mktemp("base")), device="cpu")


@pytest.fixture(scope="module")
def edits() -> list[Edit]:
    return [
        build_edit(
            person,
            answer=person,
            relation=person % 2,
            relation_id=("home", "language")[person % 2],
            paraphrase_prompts=(f"They say: {build_edit(person, relation=person % 2).rewrite_prompt}",),
            neighborhood_prompts=(Probe(prompt=build_edit(person + 8).rewrite_prompt, answers=("Oslo",)),),
        )
        for person in range(6)
    ]


def read_key(base: Base, layer: int, prompt: str) -> torch.Tensor:
    """As the editor itself makes one."""
    edit = Edit(subject=prompt.split()[-1], prompt=" ".join((*prompt.split()[:-1], "{}")), target_new="Oslo")
    profile = NeuronProfile(base=base.digest, prepare=NeuronOptions(layer=layer), solve=GateOptions())
    pairs = IReVa(profile, base.layout).prepare(base, [edit]).pairs
    assert pairs is not None
    return pairs.keys[layer][0]


def test_cosines_are_those_of_the_editors_own_keys(base: Base, edits: list[Edit]) -> None:
    others = [build_edit(10), build_edit(11)]
    foreign = list_foreign(edits, others)
    first, second = read_cosines(base, (1, 2), edits, foreign, ["The weather is fine"], batch_tokens=64)
    assert (first.layer, second.layer) == (1, 2)
    keys = torch.stack([read_key(base, 2, edit.rewrite_prompt) for edit in edits])

    def compare(prompts: list[str]) -> torch.Tensor:
        return torch.stack([torch.nn.functional.cosine_similarity(read_key(base, 2, prompt)[None], keys) for prompt in prompts])

    own = compare([edit.paraphrase_prompts[0] for edit in edits]).diagonal()
    assert sorted(second.own) == pytest.approx(sorted(own.tolist()), abs=1e-3)
    for kind, prompts in foreign.items():
        assert sorted(second.foreign[kind]) == pytest.approx(sorted(compare(prompts).amax(1).tolist()), abs=1e-3), kind
    assert len(second.foreign["other edits"]) == len(edits) and max(second.foreign["other edits"]) < 1
    assert len(second.foreign["text"]) == len(base.tokenizer("The weather is fine").input_ids), "at every token"
    assert Cosines.from_bytes(second.to_bytes()) == second
    require_untouched(base)


def test_nothing_that_an_edit_is_about_counts_as_foreign(edits: list[Edit]) -> None:
    found = list_foreign(edits, [edits[0], build_edit(10)])
    assert found["other prompts"] == [build_edit(10).rewrite_prompt]
    assert len(found["same subject"]) == len(edits) and set(found["same subject"]) == {
        build_edit(person, relation=1 - person % 2).rewrite_prompt for person in range(6)
    }
    nameless = [edit.model_copy(update={"relation_id": None}) for edit in edits]
    assert "same subject" not in list_foreign(nameless, []), "which templates ask for the same is not known"


def test_edits_are_completed_only_where_they_lack_something(edits: list[Edit]) -> None:
    bare = build_edit(10)
    whole, made = complete_edits([edits[0], bare], [edits[1]], ("So it is. {}", "I know. {}"))
    assert whole == edits[0]
    assert made.paraphrase_prompts == (f"So it is. {bare.rewrite_prompt}", f"I know. {bare.rewrite_prompt}")
    assert [probe.prompt for probe in made.neighborhood_prompts] == [edits[1].rewrite_prompt]


def test_a_trial_says_what_an_evaluation_says(base: Base, edits: list[Edit]) -> None:
    desk = GateDesk(base, tuple(edits), 512)
    quiet, loud = desk.try_gates(2, [(0.9, 1e-3), (0.9, 5e3)])
    profile = NeuronProfile(base=base.digest, prepare=NeuronOptions(layer=2), solve=GateOptions(theta=0.9, gain=5e3))
    editor = IReVa(profile, base.layout)
    patch = editor.solve(editor.merge(editor.empty_state(), editor.prepare(base, edits).pairs, None))
    report = evaluate_candidate(base, [patch], edits, [], None, EvaluateSettings())
    assert loud.point.efficacy == pytest.approx(report.efficacy.value) == 1.0
    assert loud.point.generalization == pytest.approx(report.paper.generalization.value)
    assert loud.point.specificity == pytest.approx(report.paper.specificity.value)
    assert loud.point.score == pytest.approx(report.paper.score)
    assert quiet.point.efficacy < 1 and quiet.point.specificity == 1 and quiet.edits == 6
    require_untouched(base)


def test_edits_that_cannot_be_prepared_are_a_fault(base: Base, tmp_path: Path) -> None:
    long = build_edit(0, target_new="Oslo " * 40)
    with pytest.raises(EditorError, match="expected edits that can be prepared, found none among 1"):
        GateDesk(base, (long,), 512).try_gates(2, [(0.75, 80.0)])
