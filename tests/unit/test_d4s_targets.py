"""Every shortcut of the z-optimisation (design §11) gives what the plain computation gives.

Tolerances are relative to the norm of what is compared. One step differs by float32 rounding only; over many steps Adam divides
gradients by their own size, which lets rounding grow, hence the wider figure for whole optimisations.
"""

import pytest
import torch

from benchmarks.reference import compute_pair
from errata.editors.d4s.reading import read_base
from errata.editors.d4s.rows import build_rows
from errata.editors.d4s.targets import optimise_targets
from errata.edits import Edit
from errata.modeling.loading import Base
from errata.profiles import PrepareOptions

STEP, WHOLE = 1e-5, 2e-3
CONTEXTS = ("{}", "The weather is fine today. {}", "I do not know. {}")
EDITS = (
    Edit(id="start", subject="Anna Keller", prompt="{} works in the city of", target_new="Stockholm"),
    Edit(id="middle", subject="Hugo Lindt", prompt="The mother tongue of {} is", target_new="Danish"),
    Edit(id="end", subject="Marie Curie", prompt="Tennis is played by {}", target_new="in Paris, Stockholm and Malmö"),
    Edit(id="long", subject="Zoë Łukasz", prompt="Because of the rain they stayed, and so " * 3 + "{} plays", target_new="chess"),
    Edit(id="short", subject="I", prompt="{}", target_new="green"),
)


@pytest.fixture(params=["tiny_gpt2", "tiny_llama", "stories"])
def base(request: pytest.FixtureRequest) -> Base:
    return request.getfixturevalue(request.param)


def prepare(base: Base, edits: tuple[Edit, ...], options: PrepareOptions):
    rows = [build_rows(base.tokenizer, edit, options.contexts, base.context) for edit in edits]
    reading = read_base(base, rows, options.layers)
    residuals, notes = optimise_targets(base, rows, reading, options)
    return residuals, reading.keys, notes


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("layers", [(1, 2), (0,), (0, 1, 2)])
def test_one_step_equals_the_plain_computation(base: Base, layers: tuple[int, ...]) -> None:
    # A step size below any clamp and a huge Adam epsilon would hide errors; two steps give one real gradient step.
    options = PrepareOptions(layers=layers, contexts=CONTEXTS, steps=2, lr=1e-3, stop_loss=0.0)
    residuals, keys, notes = prepare(base, EDITS, options)
    for index, edit in enumerate(EDITS):
        plain = compute_pair(base, edit, options)
        assert notes[index].loss == pytest.approx(plain.loss, rel=STEP), edit.id
        assert notes[index].target_nll == pytest.approx(plain.target_nll, rel=STEP), edit.id
        assert distance(residuals[index], plain.residual) < 1e-2, edit.id
        for layer in layers:
            assert distance(keys[layer][index], plain.keys[layer]) < STEP, edit.id


def test_whole_optimisation_equals_the_plain_computation(base: Base) -> None:
    options = PrepareOptions(layers=(1, 2), contexts=CONTEXTS, steps=12, clamp=3.0, weight_decay=0.01)
    residuals, _, notes = prepare(base, EDITS, options)
    for index, edit in enumerate(EDITS):
        plain = compute_pair(base, edit, options)
        assert notes[index].steps == plain.steps, edit.id
        assert notes[index].loss == pytest.approx(plain.loss, rel=WHOLE), edit.id
        assert distance(residuals[index], plain.residual) < WHOLE, edit.id
