"""Every shortcut of the z-optimisation (design §11) gives what the plain computation gives.

Tolerances are relative to the norm of what is compared. One step differs by float32 rounding only; over many steps Adam divides
gradients by their own size, which lets rounding grow, hence the wider figure for whole optimisations.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from benchmarks.reference import compute_keys, compute_residual
from errata.editors.artifacts import WeightDelta
from errata.editors.d4s import editor
from errata.editors.d4s.moments import Moments, collect_moments
from errata.editors.d4s.reading import read_base
from errata.editors.d4s.targets import optimise_targets
from errata.editors.rows import build_rows
from errata.edits import Edit
from errata.errors import BaseMismatchError
from errata.modeling.loading import Base, digest_model
from errata.modeling.patch import attach
from errata.profiles import PrepareOptions, Profile, Site, SolveOptions

STEP, WHOLE = 1e-5, 2e-3
CONTEXTS = ("{}", "The weather is fine today. {}", "I do not know. {}")
EDITS = (
    Edit(id="start", subject="Anna Keller", prompt="{} works in the city of", target_new="Stockholm"),
    Edit(id="middle", subject="Hugo Lindt", prompt="The mother tongue of {} is", target_new="Danish"),
    Edit(id="end", subject="Marie Curie", prompt="Tennis is played by {}", target_new="in Paris, Stockholm and Malmö"),
    Edit(id="long", subject="Zoë Łukasz", prompt="Because of the rain they stayed, and so " * 3 + "{} plays", target_new="chess"),
    Edit(id="short", subject="I", prompt="{}", target_new="green"),
)


@pytest.fixture
def base(any_base: Base) -> Base:
    return any_base


def prepare(base: Base, edits: tuple[Edit, ...], options: PrepareOptions):
    rows = [build_rows(base.tokenizer, edit, options.contexts, base.context, options.site) for edit in edits]
    units = [[edit] for edit in rows]
    reading = read_base(base, units, options.layers)
    residuals, notes = optimise_targets(base, units, reading, options)
    return residuals, reading.keys, notes


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp(min=1e-12))


@contextmanager
def count_rows(module: nn.Module) -> Iterator[list[int]]:
    """How many rows each call of the module got."""
    counts: list[int] = []
    handle = module.register_forward_pre_hook(lambda _module, args: counts.append(len(args[0])))
    try:
        yield counts
    finally:
        handle.remove()


@pytest.mark.parametrize(
    ("layers", "site"), [((1, 2), "subject_last"), ((0,), "subject_last"), ((0, 1, 2), "subject_last"), ((1, 2), "prompt_last")]
)
def test_one_step_equals_the_plain_computation(base: Base, layers: tuple[int, ...], site: Site) -> None:
    # A step size below any clamp and a huge Adam epsilon would hide errors; two steps give one real gradient step.
    options = PrepareOptions(layers=layers, contexts=CONTEXTS, steps=2, lr=1e-3, stop_loss=0.0, site=site)
    edits = tuple(edit for edit in EDITS if site == "subject_last" or edit.id != "long")  # which is longer than `Base.span` of GPT-Neo
    residuals, keys, notes = prepare(base, edits, options)
    for index, edit in enumerate(edits):
        plain = compute_residual(base, edit, options)
        assert notes[index].loss == pytest.approx(plain.loss, rel=STEP), edit.id
        assert notes[index].target_nll == pytest.approx(plain.target_nll, rel=STEP), edit.id
        assert distance(residuals[index], plain.residual) < 1e-2, edit.id
        expected = compute_keys(base, edit, options)
        for layer in layers:
            assert distance(keys[layer][index], expected[layer]) < STEP, edit.id


def test_whole_optimisation_equals_the_plain_computation(base: Base) -> None:
    options = PrepareOptions(layers=(1, 2), contexts=CONTEXTS, steps=12, clamp=3.0, weight_decay=0.01)
    residuals, _, notes = prepare(base, EDITS, options)
    for index, edit in enumerate(EDITS):
        plain = compute_residual(base, edit, options)
        assert notes[index].steps == plain.steps, edit.id
        assert notes[index].loss == pytest.approx(plain.loss, rel=WHOLE), edit.id
        assert distance(residuals[index], plain.residual) < WHOLE, edit.id


@pytest.mark.parametrize("contexts", [("{}",), CONTEXTS[:2], CONTEXTS])
def test_any_number_of_contexts(tiny_gpt2: Base, contexts: tuple[str, ...]) -> None:
    options = PrepareOptions(layers=(2,), contexts=contexts, steps=4, clamp=3.0)
    residuals, keys, _ = prepare(tiny_gpt2, EDITS, options)
    for index, edit in enumerate(EDITS):
        plain = compute_residual(tiny_gpt2, edit, options)
        assert distance(residuals[index], plain.residual) < WHOLE, edit.id
        assert distance(keys[2][index], compute_keys(tiny_gpt2, edit, options)[2]) < STEP, edit.id


def test_a_batch_equals_its_edits_one_by_one(base: Base) -> None:
    options = PrepareOptions(layers=(0, 1), contexts=CONTEXTS, steps=10, clamp=3.0, weight_decay=0.01)
    residuals, keys, notes = prepare(base, EDITS, options)
    for index, edit in enumerate(EDITS):
        alone, own, note = prepare(base, (edit,), options)
        assert distance(alone[0], residuals[index]) < WHOLE, edit.id
        assert note[0].steps == notes[index].steps, edit.id
        assert note[0].loss == pytest.approx(notes[index].loss, rel=WHOLE), edit.id
        for layer in options.layers:
            assert distance(own[layer][0], keys[layer][index]) < STEP, edit.id


def test_finished_edits_leave_and_the_others_do_not_notice(base: Base) -> None:
    """A stop loss between the edits' losses: some finish early, some never; each stops where the plain computation stops."""
    options = PrepareOptions(layers=(1,), contexts=CONTEXTS, steps=8, clamp=3.0, weight_decay=0.01, lr=0.3, stop_loss=0.0)
    _, _, notes = prepare(base, EDITS, options)
    middle = sorted(note.loss for note in notes)[2] * 1.02
    options = options.model_copy(update={"stop_loss": middle})
    with count_rows(base.layout.block(base.model, 2)) as rows:
        residuals, _, notes = prepare(base, EDITS, options)
    steps = [note.steps for note in notes]
    assert 3 <= sum(step < options.steps or note.loss < middle for step, note in zip(steps, notes, strict=True)) < len(EDITS)
    assert len(set(rows[1:])) > 1 and rows[1:] == sorted(rows[1:], reverse=True)
    for index, edit in enumerate(EDITS):
        plain = compute_residual(base, edit, options)
        assert steps[index] == plain.steps, edit.id
        assert distance(residuals[index], plain.residual) < 5 * WHOLE, edit.id


def test_all_edits_finished_at_once(tiny_gpt2: Base) -> None:
    residuals, _, notes = prepare(tiny_gpt2, EDITS, PrepareOptions(layers=(1,), stop_loss=1e6))
    assert not residuals.any()
    assert [(note.steps, note.shift) for note in notes] == [(1, 0.0)] * len(EDITS)


def test_the_ball_is_never_left(tiny_gpt2: Base) -> None:
    options = PrepareOptions(layers=(1,), contexts=CONTEXTS, steps=6, clamp=0.2, lr=5.0)
    residuals, _, notes = prepare(tiny_gpt2, EDITS, options)
    assert [note.shift for note in notes] == pytest.approx([0.2] * len(EDITS), rel=1e-5)
    plain = compute_residual(tiny_gpt2, EDITS[0], options)
    assert distance(residuals[0], plain.residual) < 5 * WHOLE


def test_only_what_can_change_runs(base: Base) -> None:
    """The optimisation never enters a block below the site, and asks the head for target tokens and essences only."""
    options = PrepareOptions(layers=(1, 2), contexts=CONTEXTS, steps=3, stop_loss=0.0)
    rows = [build_rows(base.tokenizer, edit, options.contexts, base.context) for edit in EDITS]
    units = [[edit] for edit in rows]
    reading = read_base(base, units, options.layers)
    last = base.layout.count_layers(base.model) - 1
    predicted = sum(len(edit.target) * len(edit.contexts) for edit in rows) + len(rows)
    with (
        count_rows(base.layout.block(base.model, 2)) as below,
        count_rows(base.layout.projection_of(base.model, last)) as mlp,
        count_rows(base.model.get_submodule(base.layout.head)) as head,
    ):
        optimise_targets(base, units, reading, options)
    assert below == []
    assert head == [predicted] * options.steps
    assert all(predicted - len(rows) <= count <= predicted for count in mlp)


def test_an_essence_that_begins_the_prompt_is_not_run_again(tiny_gpt2: Base) -> None:
    options = PrepareOptions(layers=(1,), contexts=CONTEXTS)
    for edit, shared in ((EDITS[0], True), (EDITS[1], False)):
        rows = [build_rows(tiny_gpt2.tokenizer, edit, options.contexts, tiny_gpt2.context)]
        reading = read_base(tiny_gpt2, [rows], options.layers)
        assert len(reading.suffix.hidden) == len(CONTEXTS) + (not shared)


def test_the_base_is_left_alone(base: Base) -> None:
    before = digest_model(base.model, base.tokenizer)
    prepare(base, EDITS, PrepareOptions(layers=(1, 2), contexts=CONTEXTS, steps=3))
    assert digest_model(base.model, base.tokenizer) == before
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in base.model.modules())
    assert all(weight.grad is None for weight in base.model.parameters())


def test_the_editor_prepares_in_chunks_and_refuses_one_by_one(tiny_gpt2: Base) -> None:
    base = tiny_gpt2
    options = PrepareOptions(layers=(1,), contexts=CONTEXTS, steps=4)
    profile = Profile(base=base.digest, prepare=options, solve=SolveOptions(lam=10, spread="single", moments="m"))
    width = base.layout.read_weight(base.model, 1).shape[1]
    moments = Moments(base.digest, "c", 0, 1, {1: torch.eye(width)})
    d4s = editor.D4S(profile, moments, base.layout)
    too_long = Edit(id="too-long", subject="Hugo Lindt", prompt="word " * 90 + "{} is", target_new="green")
    whole = d4s.prepare(base, EDITS)
    d4s = editor.D4S(profile, moments, base.layout, chunk_tokens=150)
    seen: list[tuple[int, int]] = []
    parts = d4s.prepare(base, (*EDITS[:2], too_long, *EDITS[2:]), lambda done, total: seen.append((done, total)))
    assert len(seen) > 1 and seen[-1] == (len(EDITS), len(EDITS))
    assert "within 96 tokens" in parts.refused["too-long"]
    assert whole.pairs is not None and parts.pairs is not None
    assert parts.pairs.owners == whole.pairs.owners == tuple((edit.edit_id,) for edit in EDITS)
    assert distance(parts.pairs.residuals, whole.pairs.residuals) < WHOLE
    assert distance(parts.pairs.keys[1], whole.pairs.keys[1]) < STEP
    assert set(parts.notes) == {edit.edit_id for edit in EDITS}


def test_edits_whose_optimisation_overflows_are_refused(gpt2_of: Callable[..., Base]) -> None:
    base = gpt2_of(dtype="float16")
    base.model.get_submodule(base.layout.norm).weight.data.fill_(6e4)
    profile = Profile(
        base=base.digest, prepare=PrepareOptions(layers=(1,), steps=3), solve=SolveOptions(lam=10, spread="single", moments="m")
    )
    d4s = editor.D4S(profile, Moments(base.digest, "c", 0, 1, {1: torch.eye(48)}), base.layout)
    prepared = d4s.prepare(base, EDITS)
    assert prepared.pairs is None
    assert set(prepared.refused) == {edit.edit_id for edit in EDITS}
    assert "non-finite" in prepared.refused["start"]


def test_another_base_is_refused(tiny_gpt2: Base, gpt2_of: Callable[..., Base]) -> None:
    profile = Profile(base=tiny_gpt2.digest, prepare=PrepareOptions(layers=(1,)), solve=SolveOptions(lam=10, spread="single", moments="m"))
    d4s = editor.D4S(profile, Moments(tiny_gpt2.digest, "c", 0, 1, {1: torch.eye(48)}), tiny_gpt2.layout)
    with pytest.raises(BaseMismatchError, match="profile is for the base"):
        d4s.prepare(gpt2_of(seed=1), EDITS)


def test_nothing_is_read_from_an_edited_model(tiny_gpt2: Base) -> None:
    base = tiny_gpt2
    profile = Profile(base=base.digest, prepare=PrepareOptions(layers=(1,)), solve=SolveOptions(lam=10, spread="single", moments="m"))
    d4s = editor.D4S(profile, Moments(base.digest, "c", 0, 1, {1: torch.eye(48)}), base.layout)
    edited = WeightDelta(base.digest, {base.layout.weight_name(1): torch.zeros(32, 48)})
    with attach(base, [edited]):
        with pytest.raises(BaseMismatchError, match="expected the untouched base"):
            d4s.prepare(base, EDITS)
        with pytest.raises(BaseMismatchError, match="expected the untouched base"):
            collect_moments(base, [1], ["Anna"])
    assert d4s.prepare(base, EDITS[:1]).pairs is not None
